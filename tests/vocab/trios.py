"""A base model, the same adapted to a new tokenizer, and an instruct model with chat tokens, all tiny."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_adapt.checkpoint.hf import HFFolder, HFWriter
from megatron_adapt.checkpoint.values import TensorSpec
from megatron_adapt.config import PropagateEmbeddings, PropagateSettings
from megatron_adapt.tokenizer.append import write_extended
from megatron_adapt.tokenizer.pieces import LoadedTokenizer, copy_tokenizer, read_tokenizer
from megatron_adapt.vocab.propagate import propagate_embeddings
from tests.helpers.tiny import write_llama
from tests.tokenizer.bases import write_chat_base

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NEW = ("日", "本", "語", "学", "日本", "語学", "日本語", "п", "р", "е", "пр", "пре")
WIDTH = 32


@dataclass
class Trio:
    """The folders, and what was put into their matrices by name, for all ids of the tokenizers."""

    base: Path
    adapted: Path
    instruct: Path
    tied: bool

    @property
    def names(self) -> tuple[str, ...]:
        return (EMBEDDING,) if self.tied else (EMBEDDING, HEAD)

    def propagate(self, output: Path, *args, **changes) -> HFFolder:
        self.run(output, *args, **changes)
        return HFFolder(output)

    def run(self, output: Path, method: str = "conversion", body_delta: float = 0.0, **changes) -> None:
        settings = PropagateSettings(method=method, body_delta=body_delta)
        folders = {"base": self.base, "adapted": self.adapted, "instruct": self.instruct, "output": output}
        propagate_embeddings(PropagateEmbeddings(**{**folders, "settings": settings, **changes}))


def change_model(source: Path, folder: Path, tokenizer: LoadedTokenizer, changes: dict[str, torch.Tensor]) -> Path:
    """Write a model again with other tensors and another tokenizer."""
    old = HFFolder(source)
    specs = {name: TensorSpec(tuple(changes.get(name, old.read(name)).shape), old.dtype(name)) for name in old.names}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with HFWriter(folder, specs) as writer:
        for name in old.names:
            writer.write(name, changes.get(name, old.read(name)).to(specs[name].dtype))
    config = json.loads((source / "config.json").read_text())
    rows = specs[EMBEDDING].shape[0]
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
    copy_tokenizer(tokenizer.folder, folder)
    return folder


def draw(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def list_pieces(kind: str) -> list[bytes]:
    """Return ``NEW`` as bytes; of bytes, what a letter of three bytes is merged from goes before it."""
    pieces = []
    for word in NEW:
        data = word.encode()
        if kind == "byte_level" and len(data) == 3:
            pieces.append(data[:2])
        pieces.append(data)
    return pieces


def extend(tokenizer: LoadedTokenizer, folder: Path) -> LoadedTokenizer:
    folder.mkdir(parents=True)
    write_extended(tokenizer, list_pieces(tokenizer.kind), folder)
    return read_tokenizer(folder)


def make_trio(
    folder: Path,
    own: LoadedTokenizer,
    *,
    made: LoadedTokenizer | None = None,
    chat: LoadedTokenizer | None = None,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    maps: dict[str, torch.Tensor] | None = None,
    **model,
) -> Trio:
    """Write the three models.

    Args:
        folder: where to.
        own: tokenizer of the base.
        made: the new tokenizer; by default the base's with ``NEW``.
        chat: tokenizer of the instruct model; by default the base's with two tokens.
        tied: whether head and input are one.
        dtype: of all.
        maps: matrices that take the base's rows to the instruct model's; by default noise is added to the rows.
        model: settings of the base model.
    """
    made = made or extend(own, folder / "tokenizer")
    (folder / "chat").mkdir(parents=True, exist_ok=True)
    chat = chat or write_chat_base(own, folder / "chat")
    settings = {"vocab_size": own.vocab_size, "tokenizer": False, "dtype": dtype, "tie_word_embeddings": tied, **model}
    base = write_llama(folder / "base", **settings)
    copy_tokenizer(own.folder, base)
    names = (EMBEDDING,) if tied else (EMBEDDING, HEAD)
    learned = {name: draw(made.vocab_size, 10 + at) for at, name in enumerate(names)}
    adapted = change_model(base, folder / "adapted", made, learned)
    other = write_llama(folder / "other", **{**settings, "seed": 5})
    rows = {}
    for at, name in enumerate(names):
        old = HFFolder(base).read(name)[: own.vocab_size].float()
        image = old @ maps[name] if maps else old + 0.1 * draw(len(old), 20 + at)
        rows[name] = torch.cat([image, draw(chat.vocab_size - own.vocab_size, 30 + at)])
    instruct = change_model(other, folder / "instruct", chat, rows)
    return Trio(base, adapted, instruct, tied)
