"""Prompts: the beginning of a document that the model reads and is not trained to write (parallel text, instructions).

Stored beside the tokens: PREFIX.prompts, the number of prompt tokens of every document (i32, little endian), only where
some document has any. ``.bin`` and ``.idx`` stay as megatron-core knows them, which reads them and trains on
everything.

``mask_prompts`` turns them into the targets of a window that bear no loss. Only the prompt itself is left out: the
first token behind it is a target, predicted from the last one of the prompt.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_adapt.data.index import TokensFile
from megatron_adapt.errors import DataError
from megatron_adapt.files import replace_file

_COUNT = np.dtype("<i4")


def prompts_path(prefix: Path) -> Path:
    """Return the file of prompt lengths."""
    return prefix.with_name(f"{prefix.name}.prompts")


def read_prompts(prefix: Path, num_documents: int) -> NDArray[np.int32] | None:
    """Map the prompt tokens of every document, ``[D]``; None where no document has a prompt.

    Raises:
        DataError: the file belongs to other tokens.
    """
    path = prompts_path(prefix)
    if not path.is_file():
        return None
    if path.stat().st_size != _COUNT.itemsize * num_documents:
        raise DataError(
            f"{path}: {path.stat().st_size // _COUNT.itemsize} prompts for {num_documents} documents; the files "
            "do not belong together: tokenise the corpus again with tools/preprocess_data.py"
        )
    prompts_D: NDArray[np.int32] = np.memmap(path, _COUNT, "r").view(np.ndarray)
    return prompts_D


def join_prompts(files: Sequence[TokensFile], output: Path) -> None:
    """Write the prompts of documents behind one another under a new prefix; none where no file has any."""
    prompts = [read_prompts(file.prefix, file.num_documents) for file in files]
    prompts_path(output).unlink(missing_ok=True)
    if all(prompts_D is None for prompts_D in prompts):
        return
    with replace_file(prompts_path(output)) as partial, partial.open("wb") as target:
        for file, prompts_D in zip(files, prompts, strict=True):
            target.write(np.zeros(file.num_documents, _COUNT).data if prompts_D is None else prompts_D.data)


def mask_prompts(
    starts_D1: NDArray[np.int64], prompts_D: NDArray[np.int32], starts_N: NDArray[np.int64], seq_length: int
) -> NDArray[np.bool_]:
    """Return which targets of windows bear loss, ``[N, T]``.

    Args:
        starts_D1: first token of each document, and the number of tokens.
        prompts_D: prompt tokens of each document.
        starts_N: first token of each window, on the ring of the source's tokens.
        seq_length: T.
    """
    mask_NT = np.ones((len(starts_N), seq_length), bool)
    num_tokens = int(starts_D1[-1])
    for row, start in enumerate(starts_N.tolist()):
        # Targets are the tokens behind the first; the second pass is for a window that goes on at the first token.
        for begin in (start + 1, start + 1 - num_tokens):
            first = max(0, int(np.searchsorted(starts_D1, begin, side="right")) - 1)
            last = int(np.searchsorted(starts_D1, begin + seq_length, side="left"))
            for document in range(first, min(last, len(prompts_D))):
                at = int(starts_D1[document]) - begin
                mask_NT[row, max(0, at) : max(0, at + int(prompts_D[document]))] = False
    return mask_NT
