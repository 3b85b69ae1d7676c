"""A donor: a model of the new language whose rows stand for tokens that the base lacks.

Reads: a Hugging Face folder of any hidden size with its own tokenizer. Tokens of two tokenizers are the same when they
have one *surface form*: the text, and whether a space goes before it, however the family writes that. Byte pieces,
pieces that are no whole characters and special tokens have none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_adapt.checkpoint.hf import HFFolder
from megatron_adapt.checkpoint.layout import EMBEDDING, HEAD
from megatron_adapt.errors import CheckpointError
from megatron_adapt.tokenizer.pieces import LoadedTokenizer, piece_bytes, read_tokenizer, to_byte_piece

Surface = tuple[bool, str]
"""Whether a token begins a word (a space before it), and its text without that space."""


@dataclass(frozen=True)
class Donor:
    """The vocabulary matrices of a model."""

    source: HFFolder
    tokenizer: LoadedTokenizer

    def get_name(self, is_head: bool) -> str:
        """Return the name of the matrix that plays the role; a donor with tied matrices has one."""
        return HEAD if is_head and HEAD in self.source.names else EMBEDDING

    def get_width(self, is_head: bool) -> int:
        """Return its hidden size."""
        return self.source.shape(self.get_name(is_head))[1]

    def gather(self, ids: Sequence[int], is_head: bool) -> torch.Tensor:
        """Return rows: [len(ids), hidden size of the donor], fp64.

        Raises:
            CheckpointError: a row is not finite.
        """
        rows_NH = self.source.gather_rows(self.get_name(is_head), ids).double()
        is_finite_N = rows_NH.isfinite().all(-1)
        if not is_finite_N.all():
            index = ids[int((~is_finite_N).nonzero()[0, 0])]
            token = self.tokenizer.tokenizer.id_to_token(index)
            raise CheckpointError(
                f"{self.source.folder}: row {index} ({token!r}) of {self.get_name(is_head)} holds NaN or infinity; "
                "mend the donor or name another"
            )
        return rows_NH


def read_donor(folder: Path) -> Donor:
    """Open a donor.

    Raises:
        CheckpointError: there are no weights, no embedding matrix, or one that the tokenizer does not fit.
        DataError: there is no tokenizer that this package knows.
    """
    source = HFFolder(folder)
    donor = Donor(source, read_tokenizer(folder))
    for is_head in (False, True):
        name = donor.get_name(is_head)
        num_rows = source.shape(name)[0]
        if donor.tokenizer.vocab_size > num_rows:
            raise CheckpointError(
                f"{folder}: its tokenizer has {donor.tokenizer.vocab_size} tokens, {name} only {num_rows} rows; name a "
                "donor with the tokenizer it was trained with"
            )
    return donor


def list_surfaces(tokenizer: LoadedTokenizer) -> dict[Surface, int]:
    """Return the surface forms of a tokenizer with their ids, the lowest where several share one."""
    is_byte = {to_byte_piece(byte) for byte in range(256)} if tokenizer.kind == "sentencepiece" else set()
    found: dict[Surface, int] = {}
    for index, data in enumerate(piece_bytes(tokenizer)):
        if not data or tokenizer.tokenizer.id_to_token(index) in is_byte:
            continue
        try:
            text = data.decode()
        except UnicodeDecodeError:
            continue
        found.setdefault((text.startswith(" "), text.removeprefix(" ")), index)
    return found
