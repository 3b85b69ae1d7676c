"""Floating-point operations of training on one token, and what devices reach.

A multiplication and an addition count as two. For the matrices of a layer and the head with ``W`` values in all, of
which ``W_l`` learn, a token takes (Kaplan et al. 2020, arXiv 2001.08361, section 2.1; Narayanan et al. 2021, arXiv
2104.04473, appendix):

- forward ``2 W``; backward ``2 W`` for the gradients of what came in, which go down to the first parameter that learns
  (in a pipeline through all stages but the first), and ``2 W_l`` for those of the weights: a frozen body saves a third
  of its work;
- attention: ``2 * 2 * N * D`` per layer and key for scores and their sum, over ``(T + 1) / 2`` keys, because a token
  sees those before it; twice that backward, where gradients go down so far.

The input embedding is looked up, not multiplied; norms, rotary embeddings and the softmax are left out, and so are the
rows that pad the vocabulary, which the loss does not compute. These are operations of the model: what is
computed twice to save memory counts once, and attention that stops at documents counts as if it saw the whole window.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from megatron_adapt.config.plan_run import DeviceName
from megatron_adapt.engine.trainable import find_rule
from megatron_adapt.shape import LlamaShape

_EMBEDDING = "embedding.word_embeddings.weight"
_HEAD = "output_layer.weight"


@dataclass(frozen=True)
class Device:
    """What a data sheet says: memory, and peak without sparsity."""

    memory_gb: float
    bf16_tflops: float
    fp32_tflops: float


DEVICES: dict[DeviceName, Device] = {
    # A device has the number of its data sheet in GiB, about; the seven per cent more than that number in GB are what
    # the CUDA context, buffers of NCCL and cuBLAS, and gaps of the allocator may take.
    # NVIDIA A100 data sheet (2021), SXM: 312 TFLOP/s, 19.5 in fp32 (156 in TF32, which the package leaves off).
    "a100-40": Device(40, 312, 19.5),
    "a100": Device(80, 312, 19.5),
    # NVIDIA H100 data sheet (2023), SXM: 1,979 TFLOP/s with sparsity.
    "h100": Device(80, 989.5, 67),
    # NVIDIA H200 data sheet (2024), SXM.
    "h200": Device(141, 989.5, 67),
    # NVIDIA HGX B200 data sheet (2025): 36 PFLOP/s with sparsity and 1.44 TB on eight.
    "b200": Device(180, 2250, 75),
    "cpu": Device(0, 0, 0),
}


def find_device(name: str) -> Device | None:
    """Return the data sheet of a GPU by the name that CUDA gives it; None for one that is not in the table.

    Other forms of a chip (PCIe and NVL cards, slices of one, GH200) have other peaks. A100s all have the same.
    """
    found = re.search(r"\b(A100|H100|H200|B200)\b", name)
    if found is None or "MIG" in name or (found[1] != "A100" and re.search("PCIe|NVL", name, re.IGNORECASE)):
        return None
    names: dict[str, DeviceName] = {"A100": "a100", "H100": "h100", "H200": "h200", "B200": "b200"}
    return DEVICES[names[found[1]]]


def list_weights(shape: LlamaShape, padded_vocab_size: int) -> Iterator[tuple[str, int]]:
    """Yield name and values of every parameter that a checkpoint holds, under the names of the engine's model."""
    heads, groups, width, hidden = (
        shape.num_attention_heads,
        shape.num_query_groups,
        shape.kv_channels,
        shape.hidden_size,
    )
    layer = {
        "input_layernorm.weight": hidden,
        "self_attention.linear_qkv.weight": (heads + 2 * groups) * width * hidden,
        "self_attention.linear_proj.weight": heads * width * hidden,
        "pre_mlp_layernorm.weight": hidden,
        "mlp.linear_fc1.weight": 2 * shape.ffn_hidden_size * hidden,
        "mlp.linear_fc2.weight": shape.ffn_hidden_size * hidden,
    }
    if shape.qkv_bias:
        layer["self_attention.linear_qkv.bias"] = (heads + 2 * groups) * width
    yield _EMBEDDING, padded_vocab_size * hidden
    for number in range(shape.num_layers):
        for name, size in layer.items():
            yield f"decoder.layers.{number}.{name}", size
    yield "decoder.final_layernorm.weight", hidden
    if not shape.tied:
        yield _HEAD, padded_vocab_size * hidden


def count_learning(
    shape: LlamaShape, padded_vocab_size: int, trainable: str | tuple[str, ...], new_blocks: Collection[int] = ()
) -> int:
    """Count the values that have a gradient buffer and moments; of a matrix of which some rows learn, all."""
    learns = find_rule(trainable, new_blocks)
    return sum(size for name, size in list_weights(shape, padded_vocab_size) if learns(name))


def count_flops(
    shape: LlamaShape, seq_length: int, trainable: str | tuple[str, ...], new_blocks: Collection[int] = ()
) -> float:
    """Count the operations of one training step on one token, forward and backward.

    Args:
        shape: the model; rows that pad its vocabulary take no part.
        seq_length: T, tokens in a window.
        trainable: what learns.
        new_blocks: numbers of the blocks that were added to the model.
    """
    learns = find_rule(trainable, new_blocks)
    keys = (seq_length + 1) / 2
    attention = 4 * shape.num_attention_heads * shape.kv_channels * keys
    weights = dict(list_weights(shape, shape.vocab_size))
    # A tied head is multiplied as an untied one and learns as the embedding does.
    weights.setdefault(_HEAD, weights[_EMBEDDING])
    total, goes_down = 0.0, False
    for name, size in weights.items():
        own = learns(_EMBEDDING if name == _HEAD and shape.tied else name)
        # A matrix of the body that learns computes the gradients of what came in, also where nobody below asks for
        # them. The bias of queries and keys goes with their matrix, before attention.
        if name != _HEAD:
            goes_down = goes_down or own or learns(name.replace("qkv.weight", "qkv.bias"))
        if name != _EMBEDDING and name.endswith(".weight") and "layernorm" not in name:
            total += size * (2 + 2 * goes_down + 2 * own)
        if name.endswith("linear_qkv.weight"):
            total += attention * (1 + 2 * goes_down)
    return total
