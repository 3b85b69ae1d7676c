"""Method ``clp``: mean of the base's rows of all shared tokens, weighted by how near each is to the token in a donor.

Cross-lingual and progressive transfer (Ostendorff and Rehm 2023, arXiv 2301.09626): the weight of a shared token is the
cosine of its donor row with the new token's. Input rows are weighed in the donor's input matrix, rows of the head in
its head; the published code leaves the head of an untied model as it is.

Negative cosines weigh nothing. Signed weights may sum to nearly zero, and the row then becomes as long as one likes;
without them it is a mean of shared rows. What lies at right angles to all shared tokens has no row by this method.

1. ``find_overlap`` opens the donor.
2. ``average_by_cosine`` goes through the shared tokens in chunks, for 8192 new tokens at a time.

Costs: two products, new x shared tokens x width of the donor and of the base, in fp32; one reading of the shared rows
for every 8192 new tokens. Memory of 8192 rows of each model in fp32 and their weights for 2048 shared tokens.
"""

from collections.abc import Callable, Iterator

import torch

from megatron_adapt.vocab.donor import find_overlap
from megatron_adapt.vocab.norms import scale_to_unit
from megatron_adapt.vocab.rows import CHUNK_ROWS, BaseRows, Fill, FillSources

_NEW_ROWS = 4 * CHUNK_ROWS


def plan_clp(sources: FillSources) -> Fill:
    """Give each token that the donor has the mean of shared rows weighted by cosine.

    Raises:
        CheckpointError: the donor is incomplete, does not fit its tokenizer, or shares next to nothing with the base.
        ConfigError: the model came without its tokenizer.
        DataError: the donor's tokenizer is of a kind this package does not know.
    """
    overlap = find_overlap(sources)

    def fill(base: BaseRows) -> Iterator[tuple[list[int], torch.Tensor]]:
        def read(numbers: slice) -> tuple[torch.Tensor, torch.Tensor]:
            return overlap.gather_anchors(base, numbers)

        def compute(targets_ND: torch.Tensor) -> torch.Tensor:
            return average_by_cosine(targets_ND, read, overlap.num_anchors)

        yield from overlap.fill_found(base, compute, _NEW_ROWS)

    return fill


def average_by_cosine(
    targets_ND: torch.Tensor, read: Callable[[slice], tuple[torch.Tensor, torch.Tensor]], num_anchors: int
) -> torch.Tensor:
    """Return the mean of the anchors' base rows, weighted by the cosines of their donor rows that are positive.

    Args:
        targets_ND: donor rows of new tokens.
        read: returns donor and base rows of a slice of the anchors.
        num_anchors: how many there are, at least 1.

    Returns:
        Rows [N, H] in fp32; zeros where no cosine is positive.
    """
    units_ND = scale_to_unit(targets_ND.float())
    totals_N = torch.zeros(len(units_ND))
    sums_NH = torch.zeros(0)
    for start in range(0, num_anchors, CHUNK_ROWS):
        theirs_CD, rows_CH = read(slice(start, start + CHUNK_ROWS))
        weights_NC = (units_ND @ scale_to_unit(theirs_CD.float()).T).clamp_(min=0)
        totals_N += weights_NC.sum(1)
        if not start:
            sums_NH = torch.zeros(len(units_ND), rows_CH.shape[1])
        sums_NH.addmm_(weights_NC, rows_CH.float())
    return sums_NH.div_(totals_N.masked_fill_(totals_N == 0, 1)[:, None])


def count_clp_bytes(width: int) -> int:
    """Return about how many bytes of memory the method takes for a base and a donor of ``width`` columns."""
    return 4 * (4 * _NEW_ROWS * width + 3 * CHUNK_ROWS * width + _NEW_ROWS * CHUNK_ROWS)
