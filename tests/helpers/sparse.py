"""Models of real width that take no disk: headers, then holes, which read as zeros."""

import os
from itertools import islice, product
from math import prod
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import orjson
import torch

from megatron_adapt.checkpoint.companions import write_companions
from megatron_adapt.checkpoint.dist import DistWriter
from megatron_adapt.checkpoint.hf import HFWriter, read_config, read_hf_shape
from megatron_adapt.checkpoint.layout import list_hf_tensors, list_rules, shape_megatron
from megatron_adapt.checkpoint.root import HF_FOLDER, Description, name_iteration, write_description, write_latest
from megatron_adapt.checkpoint.values import TensorSpec, list_boxes
from megatron_adapt.files import write_json
from megatron_adapt.shape import LlamaShape, pad_vocab_size, read_shape
from megatron_adapt.tokenizer.pieces import read_tokenizer
from tests.helpers.tiny import NUM_BASE_IDS, write_byte_tokenizer

LLAMA_70B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
}


def write_sparse_llama(folder: Path, config: dict[str, Any]) -> LlamaShape:
    """Write a folder of bf16 weights that are all zero, without a tokenizer; return the shape."""
    shape = read_shape(config, "config")
    specs = {name: TensorSpec(size, torch.bfloat16) for _, name, size in list_hf_tensors(shape)}
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config)
    with HFWriter(folder, specs) as writer:
        for name, spec in specs.items():
            writer.count_written(name, prod(spec.shape))
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = orjson.loads(opened.read(length))
        header.pop("__metadata__")
        os.truncate(file, 8 + length + max(item["data_offsets"][1] for item in header.values()))
    return shape


def write_sparse_checkpoint(root: Path, hf: Path) -> None:
    """Write a Megatron checkpoint of step 10, with its optimizer, all values zero, for config and tokenizer in hf."""
    shape, tokenizer = read_hf_shape(hf), read_tokenizer(hf)
    folder = root / name_iteration(10)
    folder.mkdir(parents=True)
    specs = {}
    for rule in list_rules(shape):
        size = shape_megatron(rule, shape, pad_vocab_size(shape.vocab_size, 1024))
        specs[rule.megatron] = TensorSpec(size, torch.bfloat16)
        for state in ("param", "exp_avg", "exp_avg_sq"):
            specs[f"optimizer.state.{state}.{rule.megatron}"] = TensorSpec(size, torch.float32)
    with DistWriter(folder, specs, 8 << 30) as writer:
        for key, spec in specs.items():
            for offsets, sizes in list_boxes(spec, 64 << 20):
                writer.reserve(key, offsets, sizes)
            writer.count_written(key, prod(spec.shape))
        writer.write_common({"iteration": 10})
    description = Description(
        shape=shape,
        true_vocab_size=shape.vocab_size,
        padded_vocab_size=pad_vocab_size(shape.vocab_size, 1024),
        tokenizer_fingerprint=tokenizer.fingerprint,
        step=10,
        dtype="bfloat16",
    )
    write_description(folder, description)
    write_companions(root / HF_FOLDER, config=read_config(hf), source=hf, tokenizer=tokenizer)
    write_latest(root, 10)


def list_merges(number: int) -> list[tuple[str, str]]:
    """Return so many merges of letters: all pairs, then pairs of pairs."""
    pairs = ["".join(pair) for pair in product(ascii_lowercase, repeat=2)]
    return list(islice((*product(ascii_lowercase, repeat=2), *product(pairs, repeat=2)), number))


def write_large_tokenizer(folder: Path, vocab_size: int) -> Path:
    """Write a byte-level tokenizer of any size."""
    return write_byte_tokenizer(folder, vocab_size, list_merges(vocab_size - NUM_BASE_IDS))
