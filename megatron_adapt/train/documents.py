"""Documents inside a window: where each begins, which targets bear loss, and whether the data can tell.

A window is a slice of documents laid end to end: it may begin and end inside one. A document ends with its
end-of-document token (EOD), which belongs to it; text that spells the token ends one too, as in Megatron-LM.

Shapes: B windows of a micro-batch, N windows, T positions.
Source: ``_get_ltor_masks_and_position_ids`` of megatron-core 0.16 ``datasets/gpt_dataset.py``.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_adapt.config import TrainSettings
from megatron_adapt.data.record import read_appended_eod, record_path
from megatron_adapt.errors import ConfigError
from megatron_adapt.tokenizer.pieces import read_tokenizer

_SETTINGS = ("reset_attention_mask", "eod_mask_loss")


def find_documents(ids_BT: NDArray[np.int64], eod_id: int) -> NDArray[np.int32]:
    """Return the first token of each document among all B * T, window after window, and B * T: ``cu_seqlens``.

    A document begins at the head of every window and behind every EOD.
    """
    begins_BT = np.ones(ids_BT.shape, dtype=bool)
    begins_BT[:, 1:] = ids_BT[:, :-1] == eod_id
    return np.append(np.flatnonzero(begins_BT), ids_BT.size).astype(np.int32)


def mask_eod(windows: NDArray[np.int64], eod_id: int) -> NDArray[np.bool_]:
    """Return the loss mask [N, T] of windows [N, T + 1] that is False where the input is EOD.

    What follows EOD is another document, which nothing before it tells; EOD itself is learned.
    """
    mask_NT: NDArray[np.bool_] = windows[:, :-1] != eod_id
    return mask_NT


def find_eod(train: TrainSettings, prefixes: Sequence[Path], tokenizer: Path) -> int | None:
    """Return the id that ends documents in all of these token files; None if no setting asks for it.

    Args:
        train: settings of the run.
        prefixes: token files to train and validate on.
        tokenizer: folder of the tokenizer that travels with the checkpoint.

    Raises:
        ConfigError: a setting needs EOD, but the tokenizer has none, or the documents were written without it.
    """
    asking = [name for name in _SETTINGS if getattr(train, name)]
    if not asking:
        return None
    setting = f"train.{asking[0]}"
    eod_id = read_tokenizer(tokenizer).eos_id
    if eod_id is None:
        raise ConfigError(
            f"{setting}: the tokenizer {tokenizer} has no end-of-document token (eos_token); name one in its "
            "tokenizer_config.json and tokenise again, or switch the setting off"
        )
    for prefix in prefixes:
        written = read_appended_eod(prefix)
        if written != eod_id:
            found = "no end-of-document token" if written is None else f"{written} at the end of documents"
            raise ConfigError(
                f"{setting}: {record_path(prefix)} says {found}, the tokenizer {eod_id}; tokenise again with "
                "data.append_eod (--append-eod), or switch the setting off"
            )
    return eod_id
