"""A converted checkpoint loads in megatron-core's own GPTModel under every layout, interleaved pipelines included."""

import dataclasses
import math

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

from megatron_adapt.checkpoint.convert import convert_checkpoint
from megatron_adapt.checkpoint.dist import DistReader
from megatron_adapt.checkpoint.root import read_description
from megatron_adapt.checkpoint.weights import weights_state_dict
from megatron_adapt.config import CheckpointSettings, ConvertCheckpoint, Layout
from megatron_adapt.engine.llama import _make_config
from megatron_adapt.engine.parallel import start_engine
from tests.helpers.spawn import run_ranks
from tests.helpers.tensors import compare_shards
from tests.helpers.tiny import write_llama


def build_chunks(description, layout, num_chunks):
    """Build the chunks of this rank out of megatron-core alone."""
    shape = description.shape
    # Without the activation that our layer spec names.
    config = dataclasses.replace(_make_config(shape, layout, False, "torch"), use_te_activation_func=False)
    if num_chunks > 1:
        config = dataclasses.replace(config, virtual_pipeline_model_parallel_size=num_chunks)
        parallel_state.set_virtual_pipeline_model_parallel_world_size(num_chunks)
    stages = range(num_chunks) if num_chunks > 1 else [None]
    return [
        GPTModel(
            config=config,
            transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
            vocab_size=description.padded_vocab_size,
            max_sequence_length=16,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            share_embeddings_and_output_weights=shape.tied,
            position_embedding_type="rope",
            rotary_base=shape.rotary_base,
            vp_stage=stage,
        )
        for stage in stages
    ]


def load_and_compare(release, tensor_size, pipeline_size, num_chunks):
    """Load strictly, compare every shard with its box of the checkpoint; return the boxes and their sizes."""
    layout = Layout(tensor_model_parallel_size=tensor_size, pipeline_model_parallel_size=pipeline_size)
    description = read_description(release)
    with start_engine(layout, seed=0):
        models = build_chunks(description, layout, num_chunks)
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        names = ["model"] if num_chunks == 1 else [f"model{at}" for at in range(num_chunks)]

        def describe():
            states = (model.sharded_state_dict(metadata={"dp_cp_group": group}) for model in models)
            return dict(zip(names, states, strict=True))

        for model in models:
            for parameter in model.parameters():
                torch.nn.init.constant_(parameter, 7.0)
        loaded = dist_checkpointing.load(describe(), str(release), strict="raise_unexpected")
        for name, model in zip(names, models, strict=True):
            model.load_state_dict(loaded[name], strict=True)
        return compare_shards(weights_state_dict(models), DistReader(release))


@pytest.mark.parametrize(
    ("tensor_size", "pipeline_size", "num_chunks"),
    [
        pytest.param(2, 1, 1, id="tp2", marks=pytest.mark.slow),
        pytest.param(1, 2, 1, id="pp2", marks=pytest.mark.slow),
        pytest.param(2, 2, 1, id="tp2-pp2"),
        pytest.param(1, 2, 2, id="pp2-vpp2"),
    ],
)
def test_stock_megatron_core_loads_it(tmp_path, tensor_size, pipeline_size, num_chunks):
    write_llama(tmp_path / "hf", num_hidden_layers=4)
    pad = CheckpointSettings(vocab_pad_multiple=64)
    output = tmp_path / "megatron"
    convert_checkpoint(ConvertCheckpoint(source=tmp_path / "hf", to="megatron", output=output, settings=pad))
    boxes = {}
    size = tensor_size * pipeline_size
    for found in run_ranks(load_and_compare, size, output / "release", tensor_size, pipeline_size, num_chunks):
        boxes.update(found)
    reader = DistReader(output / "release")
    loaded = {key: sum(size for (name, _), size in boxes.items() if name == key) for key in reader.keys}
    assert loaded == {key: math.prod(reader.shape(key)) for key in reader.keys}
