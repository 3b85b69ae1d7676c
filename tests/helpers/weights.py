"""Megatron checkpoints of a tiny model, made in the test, with a tied head and without."""

from pathlib import Path
from typing import Any

from megatron_adapt.checkpoint.convert import convert_checkpoint
from megatron_adapt.checkpoint.root import find_checkpoint
from megatron_adapt.config import CheckpointSettings, ConvertCheckpoint
from tests.helpers.tiny import write_llama


def make_weights(folder: Path, *, vocab_pad_multiple: int, **model: Any) -> dict[bool, Path]:
    """Write both checkpoints below ``folder``; return their iterations by whether the head is tied."""
    found, settings = {}, CheckpointSettings(vocab_pad_multiple=vocab_pad_multiple)
    for tied in (False, True):
        hf, output = write_llama(folder / f"hf-{tied}", tie_word_embeddings=tied, **model), folder / f"megatron-{tied}"
        convert_checkpoint(ConvertCheckpoint(source=hf, to="megatron", output=output, settings=settings))
        found[tied] = find_checkpoint(output)
    return found
