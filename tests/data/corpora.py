"""Tokenizers and documents for the tests of preprocess_data, and what its output must be."""

from pathlib import Path

import orjson
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from megatron_adapt.config import DataSettings, PreprocessData
from megatron_adapt.data.index import bin_path, idx_path
from megatron_adapt.tokenizer.pieces import encode_texts, read_tokenizer

TEXTS = [
    "the old language",
    "",
    "日本語の文書。" * 40,
    "  \n",
    "naïve café \x00 <|end|> <|begin|>x",
    *(f"document {n} of many, {n * 7919 % 1000}" for n in range(300)),
]


_OF_THE_TOOL = ("overwrite", "json_keys", "plain_text", "split_sentences", "keep_newlines", "lang")


def make_tokenizer(folder: Path, *, eos: bool = True, bos: bool = False, kind: str = "byte_level") -> Path:
    """A BPE tokenizer of 300 pieces learned from ``TEXTS``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE())
    specials = ["<|begin|>", "<|end|>"] if eos else ["<|begin|>"]
    if kind == "sentencepiece":
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        alphabet = []
        specials += ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    size = 300 if kind == "byte_level" else 400
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
        )
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<|begin|>"} | ({"eos_token": "<|end|>"} if eos else {})
    (folder / "tokenizer_config.json").write_bytes(orjson.dumps(names))
    return folder


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts))
    return path


def make_config(*corpus: Path, tokenizer: Path, prefix: Path, **other) -> PreprocessData:
    """A config; what is no setting of the stage is one of the tool."""
    own = {name: other.pop(name) for name in _OF_THE_TOOL if name in other}
    settings = DataSettings(**{"append_eod": True, "backend": "tokenizers", **other})
    return PreprocessData(input=corpus, tokenizer=tokenizer, output_prefix=prefix, settings=settings, **own)


def expect_ids(tokenizer: Path, texts: list[str], *, eod: bool = True) -> list[list[int]]:
    """The documents that must be in the output: what the library gives, and the end."""
    loaded = read_tokenizer(tokenizer)
    kept = [text for text in texts if text.strip()]
    return [[*ids, loaded.eos_id] if eod else ids for ids in encode_texts(loaded, kept)]


def read_files(prefix: Path) -> tuple[bytes, bytes]:
    return bin_path(prefix).read_bytes(), idx_path(prefix).read_bytes()
