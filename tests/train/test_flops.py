"""Operations of training: by hand, and as torch counts those of the engine's model."""

from dataclasses import replace

import pytest
from torch.utils.flop_counter import FlopCounterMode

from megatron_adapt.engine.fake import start_fake_engine
from megatron_adapt.engine.llama import build_model
from megatron_adapt.engine.trainable import freeze_rest
from megatron_adapt.train.flops import count_flops, count_learning, list_weights
from megatron_adapt.train.memory import run_forward_backward
from tests.helpers.shapes import SMALL_SHAPE
from tests.train.test_memory import PADDED, SHAPE, make_job

SMALL = replace(SMALL_SHAPE, ffn_hidden_size=10, vocab_size=90)


def test_operations_by_hand():
    # Query 8x8, key and value 4x8 each, output 8x8: 192. Gate, up and down, each 10x8: 240. Two layers, head 90x8.
    matrices = 2 * (192 + 240) + 720
    # Scores and their sum: 2 * 2 * 8 numbers a key, over (15 + 1) / 2 keys, two layers.
    attention = 2 * 32 * 8
    assert count_flops(SMALL, 15, "all") == 6 * matrices + 3 * attention
    # The gradients of the body's matrices are not computed; those of the head are.
    assert count_flops(SMALL, 15, "embeddings") == 4 * matrices + 2 * 720 + 3 * attention
    assert count_flops(SMALL, 15, "new_rows") == count_flops(SMALL, 15, "embeddings")
    assert count_flops(replace(SMALL, tied=True), 15, "all") == count_flops(SMALL, 15, "all")


def test_six_operations_a_parameter_for_a_large_model():
    """The rule of thumb of Kaplan et al., at 70B within five per cent: attention adds, the embedding is left out."""
    shape = replace(
        SMALL, num_layers=80, hidden_size=8192, ffn_hidden_size=28672, num_attention_heads=64, num_query_groups=8,
        kv_channels=128, vocab_size=32000,
    )  # fmt: skip
    assert count_flops(shape, 4096, "all") == pytest.approx(6 * shape.num_parameters, rel=0.05)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_weights_are_those_of_the_shape_and_of_the_engine(tied, qkv_bias):
    shape = replace(SHAPE, tied=tied, qkv_bias=qkv_bias)
    weights = dict(list_weights(shape, PADDED))
    assert sum(weights.values()) == replace(shape, vocab_size=PADDED).num_parameters
    job = make_job(shape)
    with start_fake_engine(job.train, rank=0, world_size=1, on_gpu=True):
        model = build_model(shape, padded_vocab_size=PADDED, layout=job.train, seq_length=128, bf16=True)
        assert {name: weight.numel() for name, weight in model.named_parameters()} == weights
        for trainable in ("embeddings", "all"):
            assert freeze_rest(model, trainable) == count_learning(shape, PADDED, trainable)


# What learns, and through the attention of how many of the four layers gradients go.
CHOICES = {
    "all": ("all", 4),
    "embeddings": ("embeddings", 4),
    "blocks": ("expanded_blocks", 3),
    "a matrix": (("decoder.layers.1.mlp.linear_fc1.*",), 2),
    "a bias": (("decoder.layers.0.*bias",), 4),
    "the head": (("output_layer.*",), 0),
}


@pytest.mark.parametrize(("trainable", "num_backward"), CHOICES.values(), ids=CHOICES)
def test_torch_counts_the_same_matrix_products(trainable, num_backward):
    job = make_job()
    with start_fake_engine(job.train, rank=0, world_size=1, on_gpu=True):
        shape = replace(SHAPE, qkv_bias=True)
        model = build_model(shape, padded_vocab_size=PADDED, layout=job.train, seq_length=128, bf16=True)
        assert freeze_rest(model, trainable, new_blocks=(1,)) == count_learning(shape, PADDED, trainable, (1,))
        with FlopCounterMode(display=False) as counter:
            run_forward_backward(job, model)
    counted = {str(name): number for name, number in counter.get_flop_counts()["Global"].items()}
    products = sum(number for name, number in counted.items() if "attention" not in name)
    tokens, width = 2 * 128, SHAPE.num_attention_heads * SHAPE.kv_channels
    attention = (SHAPE.num_layers + 2 * num_backward) * 4 * width * (128 + 1) / 2
    assert products == tokens * (count_flops(shape, 128, trainable, (1,)) - attention)
