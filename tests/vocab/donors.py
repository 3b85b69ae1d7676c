"""Donors in folders: a tiny Llama with any tokenizer and given matrices."""

from safetensors.torch import load_file, save_file

from megatron_adapt.checkpoint.hf import HFFolder
from megatron_adapt.config import ResizeVocab, VocabSettings
from megatron_adapt.tokenizer.pieces import copy_tokenizer
from megatron_adapt.vocab.resize import resize_vocab
from tests.helpers.tiny import write_byte_tokenizer, write_extended_tokenizer, write_llama

NEW = [("aa", "ab"), ("t", "h"), ("th", "e"), ("Ġ", "the")]
MATRICES = ("model.embed_tokens.weight", "lm_head.weight")


def write_made(tmp_path):
    """Write a tokenizer of 300 ids as ``base``, and one with four more as ``made``."""
    return write_extended_tokenizer(write_byte_tokenizer(tmp_path / "base", 300), tmp_path / "made", NEW)


def write_rows(folder, rows):
    """Put matrices into the one weights file of a model."""
    path = folder / "model.safetensors"
    save_file({**load_file(path), **{name: matrix.clone() for name, matrix in rows.items()}}, path, {"format": "pt"})


def write_donor(folder, tokenizer, rows, **settings):
    width = next(iter(rows.values())).shape[1]
    write_llama(folder, vocab_size=len(next(iter(rows.values()))), tokenizer=False, hidden_size=width, **settings)
    copy_tokenizer(tokenizer, folder)
    write_rows(folder, rows)
    return folder


def resize(tmp_path, model, made, donor, method="linear_transform", corpus=(), **settings):
    settings = VocabSettings(method=method, donor=donor, **settings)
    resize_vocab(ResizeVocab(model=model, tokenizer=made, output=tmp_path / "out", corpus=corpus, settings=settings))
    return HFFolder(tmp_path / "out")
