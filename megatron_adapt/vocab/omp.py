"""Method ``omp``: a donor's row as a sum of a few shared rows, and the same sum of the base's rows.

Orthogonal matching pursuit, as in mergekit's tokensurgeon (Goddard and Fernandes Neto 2025, arXiv 2506.06607): again
and again take the shared token (*atom*) whose donor row is nearest in angle to what is left of the new token's, and fit
all that were taken by least squares. mergekit compares products, which prefers long rows; here atoms have length 1, as
in the algorithm's definition, and the coefficients are scaled back.

1. ``find_overlap`` opens the donor. Of more than 16384 shared tokens those with the lowest ids are atoms, which a BPE
   learned first: the products of all pairs are held.
2. ``Dictionary`` holds atoms of length 1 and their Gram matrix, in blocks of columns.
3. ``Dictionary.pursue`` is Batch-OMP (Rubinstein, Zibulevsky, Elad 2008) for 2048 tokens at a time: products with all
   atoms once, after that only rows of the Gram matrix. Instead of the Cholesky factor L of the chosen atoms' Gram
   matrix its inverse grows by a row each step: the new coefficients are the old ones plus a multiple of that row.

A token is done when nothing is left of it but rounding: so fewer atoms than ``num_atoms``, equal atoms and zero rows
are no trouble. Correlations are fp32, the small matrices fp64; weights of atoms that are nearly dependent are refined
against the rows themselves (``Dictionary._refine``).

Costs: products of atoms x atoms and new x atoms over the donor's width, and for k atoms k (k + 1) / 2 sums of Gram rows
for each new token. A block of the Gram matrix serves all 2048 tokens from the cache. Memory of the Gram matrix (at most
1.1 GB), the atoms in both models, and 2048 x atoms, all fp32.
"""

import logging
from collections.abc import Iterator

import torch

from megatron_adapt.vocab.donor import Overlap, find_overlap
from megatron_adapt.vocab.norms import scale_to_unit
from megatron_adapt.vocab.rows import CHUNK_ROWS, BaseRows, Fill, FillSources, name_matrix

_logger = logging.getLogger(__name__)
_MAX_ATOMS = 1 << 14
_BLOCK_COLUMNS = 256
_SMALLEST_CORRELATION = 2e-6  # of the length of the token's row: below it fp32 knows no more
_SMALLEST_PIVOT = 1e-5  # squared distance of an atom of length 1 from the plane of those before
_SAFE_PIVOT = 0.05
_REFINED_ROWS = 64  # at a time
_REFINEMENTS = 2


def plan_omp(sources: FillSources) -> Fill:
    """Give each token that the donor has the sum of base rows that approximates its donor row in the donor.

    Raises:
        CheckpointError: the donor is incomplete, does not fit its tokenizer, or shares next to nothing with the base.
        ConfigError: the model came without its tokenizer.
        DataError: the donor's tokenizer is of a kind this package does not know.
    """
    overlap, num_atoms = find_overlap(sources), sources.settings.num_atoms

    def fill(base: BaseRows) -> Iterator[tuple[list[int], torch.Tensor]]:
        theirs_CD, rows_CH = _read_atoms(overlap, base)
        dictionary = Dictionary(theirs_CD)
        del theirs_CD

        def compute(targets_ND: torch.Tensor) -> torch.Tensor:
            return combine_atoms(rows_CH, *dictionary.pursue(targets_ND, num_atoms))

        yield from overlap.fill_found(base, compute)

    return fill


def _read_atoms(overlap: Overlap, base: BaseRows) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the atoms' rows of donor and base, in fp32."""
    num_atoms = min(overlap.num_anchors, _MAX_ATOMS)
    if num_atoms < overlap.num_anchors:
        said = "%s: the %d of %d shared tokens with the lowest ids are atoms"
        _logger.info(said, name_matrix(base), num_atoms, overlap.num_anchors)
    parts = []
    for start in range(0, num_atoms, CHUNK_ROWS):
        theirs_CD, rows_CH = overlap.gather_anchors(base, slice(start, min(start + CHUNK_ROWS, num_atoms)))
        parts.append((theirs_CD.float(), rows_CH.float()))
    theirs, rows = zip(*parts, strict=True)
    return torch.cat(theirs), torch.cat(rows)


def combine_atoms(rows_CH: torch.Tensor, index_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
    """Return a weighted sum of K rows for each new one: [N, H]."""
    return torch.nn.functional.embedding_bag(index_NK, rows_CH, mode="sum", per_sample_weights=weights_NK)


class Dictionary:
    """Atoms and their Gram matrix."""

    def __init__(self, atoms_CD: torch.Tensor) -> None:
        """Scale atoms (fp32) to length 1 and multiply all pairs."""
        self.num_atoms = len(atoms_CD)
        norms_C = torch.linalg.vector_norm(atoms_CD, dim=1, dtype=torch.float64)
        self._norms_C = norms_C.masked_fill_(norms_C == 0, 1)
        self._atoms_CD = scale_to_unit(atoms_CD)
        self._starts = range(0, self.num_atoms, _BLOCK_COLUMNS)
        # Columns behind the last are zero, and never the nearest.
        self._gram_SCB = torch.zeros(len(self._starts), self.num_atoms, _BLOCK_COLUMNS)
        for at, start in enumerate(self._starts):
            block_BD = self._atoms_CD[start : start + _BLOCK_COLUMNS]
            part_CB = self._gram_SCB[at, :, : len(block_BD)]
            torch.mm(self._atoms_CD[start:], block_BD.T, out=part_CB[start:])
            for before in range(at):
                rows = slice(self._starts[before], self._starts[before] + _BLOCK_COLUMNS)
                part_CB[rows] = self._gram_SCB[before, start : start + len(block_BD)].T

    def pursue(self, targets_ND: torch.Tensor, num_atoms: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Approximate rows by sums of atoms.

        Args:
            targets_ND: the rows.
            num_atoms: most atoms of a sum; ties go to the lowest number.

        Returns:
            Numbers of the atoms [N, K] and their weights [N, K] in fp32, 0 where fewer are needed.
        """
        targets_ND = targets_ND.float()
        size, most = len(targets_ND), min(num_atoms, self.num_atoms)
        smallest_N = _SMALLEST_CORRELATION * torch.linalg.vector_norm(targets_ND, dim=1, dtype=torch.float64)
        products_SNB = self._multiply(targets_ND)
        index_NK = torch.zeros(size, most, dtype=torch.long)
        weights_NK = torch.zeros(size, most, dtype=torch.float64)
        inverse_NKK = torch.zeros(size, most, most, dtype=torch.float64)
        is_done_N, is_rough_N = (torch.zeros(size, dtype=torch.bool) for _ in range(2))
        for step in range(most):
            known = max(1, step)  # a first atom of weight 0 is none
            chosen_N, left_N = self._find_nearest(products_SNB, index_NK[:, :known], weights_NK[:, :known])
            # The part of the atom within the plane of those before, in their orthonormal basis.
            within_NK = torch.bmm(
                inverse_NKK[:, :step, :step], self._look_up(chosen_N, index_NK[:, :step]).double()[:, :, None]
            )[:, :, 0]
            pivot_N = 1 - within_NK.square().sum(1)
            is_done_N |= (left_N.abs() <= smallest_N) | (pivot_N <= _SMALLEST_PIVOT)
            if is_done_N.all():
                break
            is_rough_N |= (pivot_N < _SAFE_PIVOT) & ~is_done_N
            root_N = pivot_N.clamp(min=_SMALLEST_PIVOT).sqrt()
            row_NK = inverse_NKK[:, step, : step + 1]
            row_NK[:, :step] = -torch.bmm(within_NK[:, None], inverse_NKK[:, :step, :step])[:, 0] / root_N[:, None]
            row_NK[:, step] = 1 / root_N
            row_NK[is_done_N] = 0
            index_NK[:, step] = chosen_N
            weights_NK[:, : step + 1] += (left_N / root_N)[:, None] * row_NK
        rough = is_rough_N.nonzero()[:, 0]
        for start in range(0, len(rough), _REFINED_ROWS):
            rough_M = rough[start : start + _REFINED_ROWS]
            self._refine(targets_ND[rough_M], index_NK[rough_M], weights_NK, inverse_NKK[rough_M], rough_M)
        return index_NK, (weights_NK / self._norms_C[index_NK]).float()

    def _multiply(self, targets_ND: torch.Tensor) -> torch.Tensor:
        """Return products with all atoms, in the blocks of the Gram matrix."""
        products_SNB = torch.zeros(len(self._starts), len(targets_ND), _BLOCK_COLUMNS)
        for products_NB, start in zip(products_SNB, self._starts, strict=True):
            block_BD = self._atoms_CD[start : start + _BLOCK_COLUMNS]
            torch.mm(targets_ND, block_BD.T, out=products_NB[:, : len(block_BD)])
        return products_SNB

    def _find_nearest(
        self, products_SNB: torch.Tensor, index_NK: torch.Tensor, weights_NK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the atom nearest to what the weighted atoms leave of each row, and its product with that, fp64."""
        index_NK, weights_NK = index_NK.contiguous(), weights_NK.float()
        largest_SN = torch.empty(products_SNB.shape[:2])
        for largest_N, products_NB, gram_CB in zip(largest_SN, products_SNB, self._gram_SCB, strict=True):
            sums_NB = combine_atoms(gram_CB, index_NK, weights_NK)
            torch.amax(torch.sub(products_NB, sums_NB, out=sums_NB).abs_(), 1, out=largest_N)
        # Where in the block is a slower question, so it is asked of one block for each row.
        block_N = largest_SN.argmax(0)
        gram_FB = self._gram_SCB.view(-1, _BLOCK_COLUMNS)
        sums_NB = combine_atoms(gram_FB, block_N[:, None] * self.num_atoms + index_NK, weights_NK)
        left_NB = products_SNB[block_N, torch.arange(len(block_N))] - sums_NB
        at_N = left_NB.abs().argmax(1)
        return block_N * _BLOCK_COLUMNS + at_N, left_NB.gather(1, at_N[:, None])[:, 0].double()

    def _refine(
        self,
        targets_MD: torch.Tensor,
        index_MK: torch.Tensor,
        weights_NK: torch.Tensor,
        inverse_MKK: torch.Tensor,
        at_M: torch.Tensor,
    ) -> None:
        """Correct the weights of rows ``at_M`` by what they leave of the targets, in fp64."""
        chosen_MKD = self._atoms_CD[index_MK].double()
        for _ in range(_REFINEMENTS):
            left_MD = targets_MD - torch.bmm(weights_NK[at_M][:, None], chosen_MKD)[:, 0]
            within_MK = inverse_MKK @ (chosen_MKD @ left_MD[:, :, None])
            weights_NK[at_M] += (inverse_MKK.mT @ within_MK)[:, :, 0]

    def _look_up(self, rows_N: torch.Tensor, columns_NK: torch.Tensor) -> torch.Tensor:
        """Return the products of one atom with K others, for each row: [N, K]."""
        return self._gram_SCB[columns_NK // _BLOCK_COLUMNS, rows_N[:, None], columns_NK % _BLOCK_COLUMNS]


def count_omp_bytes(width: int) -> int:
    """Return about how many bytes of memory the method takes for a base and a donor of ``width`` columns."""
    return 4 * (_MAX_ATOMS * (_MAX_ATOMS + CHUNK_ROWS) + 4 * _MAX_ATOMS * width)
