"""A donor: a model of the new language whose rows stand for tokens that the base lacks.

Reads: a Hugging Face folder of any hidden size with its own tokenizer. Tokens of two tokenizers are the same when they
have one *surface form*: the text, and whether a space goes before it, however the family writes that. Byte pieces,
pieces that are no whole characters and special tokens have none.

1. ``find_overlap`` opens the donor and compares it with the base and the new tokenizer.
2. ``Overlap`` reads the rows of the tokens that both have (*anchors*), input from the donor's input matrix, head from
   its head; a donor with tied matrices gives its one matrix for both.
3. ``Overlap.fill_found`` runs a method on the new tokens that the donor has; the others have no row by it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_adapt.checkpoint.hf import HFFolder
from megatron_adapt.checkpoint.layout import EMBEDDING, HEAD
from megatron_adapt.errors import CheckpointError
from megatron_adapt.tokenizer.pieces import LoadedTokenizer, list_byte_pieces, piece_bytes, read_tokenizer
from megatron_adapt.vocab.rows import CHUNK_ROWS, BaseRows, FillSources, name_matrix

Surface = tuple[bool, str]
"""Whether a token begins a word (a space before it), and its text without that space."""
_MIN_ANCHORS = 10


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
        """Return rows: [len(ids), hidden size of the donor], in the type of the donor.

        Raises:
            CheckpointError: a row is not finite.
        """
        rows_NH = self.source.gather_rows(self.get_name(is_head), ids)
        at = _find_damaged(rows_NH)
        if at is not None:
            index = ids[at]
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
    byte_pieces = list_byte_pieces(tokenizer)
    found: dict[Surface, int] = {}
    for index, data in enumerate(piece_bytes(tokenizer)):
        if not data or tokenizer.tokenizer.id_to_token(index) in byte_pieces:
            continue
        try:
            text = data.decode()
        except UnicodeDecodeError:
            continue
        found.setdefault((text.startswith(" "), text.removeprefix(" ")), index)
    return found


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """What a donor shares with the base, and which new tokens it has."""

    donor: Donor
    own: LoadedTokenizer
    anchors: np.ndarray
    "Shared tokens [C, 3], in the order of the base: id in the donor, in the base, in the new tokenizer or -1."
    found: dict[int, int]
    "New id to the donor's id of the same token."
    new_ids: list[int]
    "All of them, in ascending order."

    @property
    def num_anchors(self) -> int:
        """C."""
        return len(self.anchors)

    def gather_anchors(self, base: BaseRows, numbers: np.ndarray | slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the donor's and the base's rows of some anchors, each in the type of its model.

        Raises:
            CheckpointError: a row is not finite.
        """
        theirs, olds, _ = self.anchors[numbers].T.tolist()
        rows_NH = base.gather(olds)
        at = _find_damaged(rows_NH)
        if at is not None:
            raise CheckpointError(
                f"{name_matrix(base)}: row {olds[at]} ({self.own.tokenizer.id_to_token(olds[at])!r}) holds NaN or "
                "infinity; mend the model, or use --method subtoken_mean"
            )
        return self.donor.gather(theirs, base.is_head), rows_NH

    def read_anchors(self, base: BaseRows) -> Callable[[np.ndarray], tuple[torch.Tensor, torch.Tensor]]:
        """Return what reads anchors as ``gather_anchors`` does, in fp64, for a fit (``linear.fit_map``)."""

        def read(numbers: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
            theirs_ND, rows_NH = self.gather_anchors(base, numbers)
            return theirs_ND.double(), rows_NH.double()

        return read

    def fill_found(
        self, base: BaseRows, compute: Callable[[torch.Tensor], torch.Tensor], num_rows: int = CHUNK_ROWS
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Yield the rows of all new tokens, ``num_rows`` at a time; zeros for those that the donor lacks.

        Args:
            base: the old rows.
            compute: makes rows [n, H] of the donor's rows of n tokens.
            num_rows: most new tokens at a time.
        """
        width = base.read(0, 1).shape[1]
        for start in range(0, len(self.new_ids), num_rows):
            ids = self.new_ids[start : start + num_rows]
            rows_NH = torch.zeros(len(ids), width)
            has_donor = [at for at, new in enumerate(ids) if new in self.found]
            if has_donor:
                theirs_ND = self.donor.gather([self.found[ids[at]] for at in has_donor], base.is_head)
                rows_NH[has_donor] = compute(theirs_ND).float()
            yield ids, rows_NH


def find_overlap(sources: FillSources) -> Overlap:
    """Open the donor of the settings and find what it shares with the base and with the new tokenizer.

    Raises:
        CheckpointError: the donor is incomplete, does not fit its tokenizer, or shares next to nothing with the base.
        ConfigError: the model came without its tokenizer.
        DataError: the donor's tokenizer is of a kind this package does not know.
    """
    folder, own = sources.settings.donor, sources.require_own()
    assert folder is not None
    donor = read_donor(folder)
    theirs, made = list_surfaces(donor.tokenizer), list_surfaces(sources.require_made())
    shared = [(theirs[form], old, made.get(form, -1)) for form, old in list_surfaces(own).items() if form in theirs]
    if len(shared) < _MIN_ANCHORS:
        raise CheckpointError(
            f"{folder}: shares {len(shared)} tokens with {own.folder}, too few to go by; name a donor with more, or "
            "use --method subtoken_mean"
        )
    pieces = sources.id_map.pieces
    found = {index: theirs[form] for form, index in made.items() if index in pieces and form in theirs}
    return Overlap(donor=donor, own=own, anchors=np.array(shared, np.int64), found=found, new_ids=list(pieces))


def _find_damaged(rows_NH: torch.Tensor) -> int | None:
    is_finite_N = rows_NH.isfinite().all(-1)
    return None if is_finite_N.all() else int((~is_finite_N).nonzero()[0, 0])
