"""Tiny models and tokenizers, made where the test runs: Hugging Face Llama folders and byte-level tokenizers."""

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM

SPECIALS = ("<s>", "</s>")
NUM_BASE_IDS = 258
"Ids that every byte-level tokenizer has: two special tokens and 256 bytes."


def write_byte_tokenizer(folder: Path, vocab_size: int = 300, merges: Sequence[tuple[str, str]] | None = None) -> Path:
    """Write a byte-level BPE tokenizer with BOS and EOS; merges of letter pairs fill it up to ``vocab_size``.

    ``merges`` (pairs of byte-level pieces, spaces written as Ġ) replaces the letter pairs.
    """
    if merges is None:
        merges = list(product(ascii_lowercase, repeat=2))[: vocab_size - NUM_BASE_IDS]
        assert len(merges) == vocab_size - NUM_BASE_IDS, "at most 934 ids"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*SPECIALS, *letters, *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={piece: at for at, piece in enumerate(pieces)}, merges=list(merges)))
    tokenizer.add_special_tokens([AddedToken(piece, special=True) for piece in SPECIALS])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return folder


def write_extended_tokenizer(base: Path, folder: Path, merges: Sequence[tuple[str, str]]) -> Path:
    """Write ``base`` plus one piece per merge, with the ``added_pieces.json`` that says how they were spelt before."""
    raw = json.loads((base / "tokenizer.json").read_text())
    before = Tokenizer.from_file(str(base / "tokenizer.json"))
    first = before.get_vocab_size()
    decoder = decoders.ByteLevel()
    spelt = {}
    for at, (left, right) in enumerate(merges, start=first):
        raw["model"]["vocab"][left + right] = at
        raw["model"]["merges"].append([left, right])
        spelt[str(at)] = before.encode(decoder.decode([left + right]), add_special_tokens=False).ids
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    (folder / "tokenizer_config.json").write_bytes((base / "tokenizer_config.json").read_bytes())
    id_map = {"base_vocab_size": first, "vocab_size": first + len(merges), "moved": {}, "pieces": spelt}
    (folder / "added_pieces.json").write_text(json.dumps(id_map))
    return folder


def swap_two_pieces(tokenizer: Path) -> None:
    """Give ids 258 and 259 of an extended tokenizer to each other's piece, and note it in its record."""
    path = tokenizer / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab["aa"], vocab["ab"] = vocab["ab"], vocab["aa"]
    path.write_text(json.dumps(content))
    path = tokenizer / "added_pieces.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "moved": {"258": 259, "259": 258}}))


def write_llama(
    folder: Path,
    *,
    vocab_size: int = 300,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = True,
    max_shard_size: str = "1GB",
    seed: int = 0,
    **settings: Any,
) -> Path:
    """Write a Hugging Face folder of a two-layer Llama with random weights, norms included, and its tokenizer.

    ``settings`` are fields of ``LlamaConfig``, for example ``num_key_value_heads`` or ``tie_word_embeddings``.
    """
    defaults: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **{**defaults, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            # Large enough for attention and norms to leave their mark on the logits.
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.1))
            if parameter.dim() == 1:
                parameter.add_(1)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer:
        write_byte_tokenizer(folder, vocab_size)
    return folder
