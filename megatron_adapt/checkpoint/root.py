"""The folders of a Megatron checkpoint, and what they say about the model.

A root holds ``latest_checkpointed_iteration.txt`` ("release" for converted weights, else the step), ``release/`` or
``iter_0000010/`` (``torch_dist`` folders, as Megatron-LM names them), and ``hf/``: the small Hugging Face files
that travel with the weights. ``adapt.json`` in a ``torch_dist`` folder describes the model, so that nobody has to
guess its true vocabulary from a padded matrix.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_adapt.errors import CheckpointError, DataError
from megatron_adapt.files import read_json, replace_file, write_json
from megatron_adapt.shape import LlamaShape

LATEST_FILE = "latest_checkpointed_iteration.txt"
DESCRIPTION_FILE = "adapt.json"
RELEASE = "release"
HF_FOLDER = "hf"
METADATA_FILE = ".metadata"
"Index of a ``torch_dist`` folder; a folder without it is incomplete."
PARTITION_PATTERN = "mp_rank_*"
"Folders of an iteration in partitions (``legacy``), which has no index."
_ITERATION = re.compile(r"iter_(\d{7,})")


@dataclass(frozen=True, kw_only=True)
class Description:
    """Content of ``adapt.json``.

    Attributes:
        shape: the model, with its true vocabulary.
        true_vocab_size: rows of the vocabulary matrices that mean something.
        padded_vocab_size: rows they have in this checkpoint.
        tokenizer_fingerprint: fingerprint of the tokenizer that the model speaks; None when it came without one.
        step: training steps of this run so far; 0 for converted weights.
        dtype: type of the weights, for example "bfloat16".
        new_blocks: numbers of the blocks that ``reshape.expand_blocks`` added, from 0.
    """

    shape: LlamaShape
    true_vocab_size: int
    padded_vocab_size: int
    tokenizer_fingerprint: str | None
    step: int
    dtype: str
    new_blocks: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; ``from_dict`` is the inverse."""
        return {**vars(self), "shape": self.shape.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Description":
        """Rebuild a description written by ``to_dict``."""
        new_blocks = tuple(values.get("new_blocks", ()))
        return cls(**{**values, "shape": LlamaShape.from_dict(values["shape"]), "new_blocks": new_blocks})


def name_iteration(step: int) -> str:
    """Return the name of a step's folder, as Megatron-LM writes it."""
    return f"iter_{step:07d}"


def list_steps(root: Path) -> list[int]:
    """Return the steps of the checkpoints in a root, in ascending order."""
    named = ((path, _ITERATION.fullmatch(path.name)) for path in (root.iterdir() if root.is_dir() else ()))
    return sorted(int(match[1]) for path, match in named if match and _is_iteration(path))


def is_megatron_checkpoint(folder: Path) -> bool:
    """Tell whether a folder is the root of a Megatron checkpoint or one of its iterations."""
    return (folder / LATEST_FILE).is_file() or _is_iteration(folder)


def _is_iteration(folder: Path) -> bool:
    return (folder / METADATA_FILE).is_file() or next(folder.glob(PARTITION_PATTERN), None) is not None


def find_checkpoint(folder: Path) -> Path:
    """Return the iteration of a checkpoint root (its latest), or ``folder`` itself if it is one.

    It is a ``torch_dist`` folder, or holds partitions that another program wrote.

    Raises:
        CheckpointError: there is no checkpoint, or the one named as latest is missing.
    """
    if _is_iteration(folder):
        return folder
    latest = folder / LATEST_FILE
    if not latest.is_file():
        raise CheckpointError(
            f"{folder}: no Megatron checkpoint (no {LATEST_FILE}, {METADATA_FILE} or mp_rank_... in it); check it"
        )
    word = latest.read_text(encoding="utf-8").strip()
    if word != RELEASE and not word.isdecimal():
        raise CheckpointError(f"{latest}: {word!r} is neither a step nor 'release'; correct the file")
    found = folder / (RELEASE if word == RELEASE else name_iteration(int(word)))
    if not _is_iteration(found):
        others = list_steps(folder)
        there = f"write {others[-1]} into it to take {name_iteration(others[-1])}" if others else "there is no other"
        raise CheckpointError(f"{latest}: names {found.name}, which is no checkpoint; {there}")
    return found


def write_latest(root: Path, step: int | None) -> None:
    """Name the newest checkpoint of a root: a step, or None for converted weights."""
    with replace_file(root / LATEST_FILE) as partial:
        partial.write_text(RELEASE if step is None else str(step), encoding="utf-8")


def write_description(iter_folder: Path, description: Description) -> None:
    """Write ``adapt.json`` into a ``torch_dist`` folder."""
    write_json(iter_folder / DESCRIPTION_FILE, description.to_dict())


def read_description(iter_folder: Path) -> Description:
    """Read ``adapt.json`` of a ``torch_dist`` folder.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = iter_folder / DESCRIPTION_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{iter_folder}: no {DESCRIPTION_FILE}, so its true vocabulary is unknown; "
            "convert a checkpoint of another program first: tools/convert_checkpoint.py --to hf, then --to megatron"
        )
    try:
        return Description.from_dict(read_json(path))
    except (DataError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); take another checkpoint") from None
