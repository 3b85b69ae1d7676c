"""Which layouts are refused before anything is built, and what the message offers instead."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_adapt.config import TrainSettings
from megatron_adapt.errors import ConfigError
from megatron_adapt.parallelism import check_launch, check_layout, check_parallelism, split_layers
from tests.helpers.shapes import SMALL_SHAPE

SHAPE = replace(
    SMALL_SHAPE, num_layers=6, num_query_groups=4, num_attention_heads=8, ffn_hidden_size=176,
    max_position_embeddings=128,
)  # fmt: skip


def check(padded_vocab_size=1024, **train):
    settings = TrainSettings(**{"seq_length": 128, **train})
    check_layout(SHAPE, settings, padded_vocab_size=padded_vocab_size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tensor_model_parallel_size": 8},
            r"train\.tensor_model_parallel_size: 8 does not fit the model's 4 key-value heads, "
            r"176 feed-forward columns and 1024 vocabulary rows; use 1 or 2 or 4$",
        ),
        (
            {"pipeline_model_parallel_size": 4},
            r"train\.pipeline_model_parallel_size: 4 does not divide 6 layers; use 1 or 2 or 3 or 6, or give num_",
        ),
        ({"sequence_parallel": True}, r"train\.sequence_parallel: has no effect at .* 1; switch it off"),
        (
            {"sequence_parallel": True, "tensor_model_parallel_size": 4, "seq_length": 126},
            r"train\.seq_length: 126 is not a multiple of tensor_model_parallel_size 4, .*; use 124$",
        ),
        ({"seq_length": 129}, r"train\.seq_length: 129 exceeds the model's 128 positions; use at most 128$"),
        (
            {"context_parallel_size": 2, "seq_length": 126},
            r"train\.seq_length: 126 is not a multiple of 4, which context_parallel_size needs; use 124$",
        ),
        (
            {
                "context_parallel_size": 2,
                "tensor_model_parallel_size": 2,
                "sequence_parallel": True,
                "seq_length": 124,
            },
            r"train\.seq_length: 124 is not a multiple of 8, which context_parallel_size needs; use 120$",
        ),
        (
            {"context_parallel_size": 2, "reset_attention_mask": True},
            r"train\.reset_attention_mask: does not run at context_parallel_size 2, where",
        ),
        (
            {"transformer_impl": "transformer_engine", "reset_attention_mask": True},
            r"train\.reset_attention_mask: does not run with transformer_impl \"transformer_engine\", whose",
        ),
        (
            {"transformer_impl": "transformer_engine", "fp8": "hybrid"},
            r'train\.fp8: "hybrid" with recipe "tensorwise" multiplies blocks of 16, and 8 hidden_size are no multiple '
            r'of it; use "none"$',
        ),
        (
            {"virtual_pipeline_model_parallel_size": 2},
            r"train\.virtual_pipeline_model_parallel_size: has no effect at pipeline_model_parallel_size 1; leave it",
        ),
        (
            {"num_layers_in_last_pipeline_stage": 2},
            r"train\.num_layers_in_last_pipeline_stage: has no effect at pipeline_model_parallel_size 1; leave it",
        ),
        (
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
            r"train\.virtual_pipeline_model_parallel_size: 2 does not divide the layers of the stages, 3 \+ 3; use 1 "
            r"or 3$",
        ),
        (
            {"pipeline_model_parallel_size": 3, "num_layers_in_first_pipeline_stage": 1},
            r"train\.num_layers_in_first_pipeline_stage: 1 layers in the first stage and 0 in the last leave 5 for 2 "
            r"stages \(0: like the others\); leave a multiple of 2$",
        ),
        (
            {"recompute_granularity": "full", "recompute_num_layers": 4, "pipeline_model_parallel_size": 2},
            r"train\.recompute_num_layers: 4 exceeds the 3 layers of a part of the model; use at most 3$",
        ),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_with_the_ones_that_do(changes, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        check(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"overlap_param_gather": True}, r"train\.overlap_param_gather: needs use_distributed_optimizer and overlap_"),
        (
            {"overlap_param_gather": True, "overlap_grad_reduce": True, "use_distributed_optimizer": False},
            r"train\.overlap_param_gather: needs use_distributed_optimizer and overlap_",
        ),
        ({"ddp_bucket_size": 1000}, r"train\.ddp_bucket_size: has no effect without overlap_grad_reduce; leave it"),
        ({"recompute_num_layers": 2}, r"train\.recompute_method: has, like recompute_num_layers, no effect without"),
        ({"recompute_granularity": "selective"}, r'train\.recompute_modules: \[\] with recompute_granularity "sel'),
        ({"recompute_modules": ("mlp",)}, r"train\.recompute_modules: \['mlp'\] with recompute_granularity \"none\""),
        ({"fp8": "hybrid"}, r'train\.fp8: "hybrid" runs in Transformer Engine alone; add .*, or use "none"$'),
        ({"fp8_recipe": "mxfp8"}, r'train\.fp8_recipe: "mxfp8" has no effect with fp8 = "none"; leave it out$'),
        ({"context_parallel_size": 0}, r"train\.context_parallel_size: 0 is below 1$"),
        ({"num_layers_in_first_pipeline_stage": -1}, r"train\.num_layers_in_first_pipeline_stage: -1 is below 0$"),
    ],
)
def test_settings_that_exclude_each_other_or_have_no_effect_are_refused(changes, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        TrainSettings(**changes)


@pytest.mark.parametrize(
    ("num_ranks", "changes", "message"),
    [
        (3, {}, r"launch: 3 ranks cannot hold tensor_model_parallel_size 2 x .* 1; start a multiple of 2"),
        (6, {"context_parallel_size": 2}, r"launch: 6 ranks cannot hold .* x context_parallel_size 2; start .* of 4"),
        (4, {"global_batch_size": 6}, r"train\.global_batch_size: 6 is not .* 2 x 2 data-par.*; use a multiple of 4"),
        (
            4,
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 3, "global_batch_size": 6},
            r"train\.global_batch_size: 6 is not a multiple of micro_batch_size 2 x 1 data-parallel ranks x 2 pipeline "
            r"stages, which a virtual pipeline needs; use a multiple of 4$",
        ),
    ],
)
def test_a_launch_that_does_not_fit_is_refused(num_ranks, changes, message):
    launch = {"tensor_model_parallel_size": 2, "micro_batch_size": 2, "global_batch_size": 8}
    check_launch(TrainSettings(**launch), num_ranks=4)
    with pytest.raises(ConfigError, match=message):
        check_launch(TrainSettings(**{**launch, **changes}), num_ranks=num_ranks)


def test_a_vocabulary_that_cannot_be_split_is_refused_before_the_engine_sees_it():
    with pytest.raises(ConfigError, match=r"2 does not fit .* 1999 vocabulary rows; use 1$"):
        check(tensor_model_parallel_size=2, padded_vocab_size=1999)


def test_layouts_that_fit_are_accepted():
    check()
    check(tensor_model_parallel_size=4, pipeline_model_parallel_size=3, sequence_parallel=True)
    check(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=3, context_parallel_size=4)
    everything = TrainSettings(
        tensor_model_parallel_size=2, pipeline_model_parallel_size=3, context_parallel_size=2, seq_length=128
    )
    check_parallelism(SHAPE, everything, padded_vocab_size=1024, num_ranks=24)


@given(
    num_layers=st.integers(1, 24), pipeline=st.integers(1, 8), first=st.integers(0, 6), last=st.integers(0, 6),
    parts=st.integers(1, 4),
)  # fmt: skip
def test_a_split_has_all_layers_and_the_sizes_that_were_asked_for_or_is_refused(
    num_layers, pipeline, first, last, parts
):
    train = TrainSettings(
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=parts,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
    )
    try:
        stages = split_layers(num_layers, train)
    except ConfigError:
        even = not (first or last) and not num_layers % (pipeline * parts) and (parts == 1 or pipeline > 1)
        assert not even
        return
    assert len(stages) == pipeline
    assert sum(stages) == num_layers
    assert min(stages) >= parts
    assert stages[0] == (first or stages[0])
    assert stages[-1] == (last or stages[-1])
    assert len(set(stages[bool(first) : len(stages) - bool(last)])) <= 1


FITS_FP8 = replace(
    SMALL_SHAPE, hidden_size=64, ffn_hidden_size=128, num_attention_heads=8, num_query_groups=4, kv_channels=16,
    max_position_embeddings=128,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "train", "message"),
    [
        ({}, {"fp8_recipe": "mxfp8", "tensor_model_parallel_size": 2}, None),
        ({"hidden_size": 72}, {}, "72 hidden_size"),
        ({"num_attention_heads": 5, "kv_channels": 12}, {}, "60 query columns of a rank"),
        ({"num_query_groups": 2, "kv_channels": 20}, {}, "40 key and value columns of a rank"),
        ({"ffn_hidden_size": 144}, {"tensor_model_parallel_size": 2}, "72 feed-forward columns of a rank"),
        ({}, {"seq_length": 120, "micro_batch_size": 1}, "120 tokens of a micro-batch on a rank"),
        ({}, {"seq_length": 120, "micro_batch_size": 2}, None),
        ({}, {"seq_length": 120, "micro_batch_size": 2, "fp8_recipe": "mxfp8"}, "240 tokens of a micro-batch"),
    ],
)
def test_fp8_takes_whole_blocks(changes, train, message):
    settings = TrainSettings(
        **{"seq_length": 128, "transformer_impl": "transformer_engine", "fp8": "hybrid", **train}
    )  # fmt: skip
    if message is None:
        check_layout(replace(FITS_FP8, **changes), settings, padded_vocab_size=1024)
        return
    with pytest.raises(ConfigError, match=rf'^train\.fp8: "hybrid" with recipe .* and {message}.* no multiple of it'):
        check_layout(replace(FITS_FP8, **changes), settings, padded_vocab_size=1024)
