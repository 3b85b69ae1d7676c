"""Method ``linear_transform``: rows of a donor through the linear map that takes those of shared tokens to the base's.

The embedding space transformation of Bilingual Adaptation (Gosal et al. 2024, arXiv 2407.12869).

1. ``read_donor`` opens the donor, ``list_surfaces`` compares tokens by their surface form.
2. ``fit_map`` fits a map for each matrix on its own rows: input from the donor's input matrix, head from its head. A
   donor with tied matrices gives its one matrix for both.
3. A new token that the donor has takes the mapped donor row; the others have no row by this method.

Costs: those of ``linear``.
"""

from collections.abc import Iterator

import numpy as np
import torch

from megatron_adapt.errors import CheckpointError
from megatron_adapt.vocab.donor import list_surfaces, read_donor
from megatron_adapt.vocab.linear import fit_map
from megatron_adapt.vocab.rows import BaseRows, Fill, FillSources, divide_ids, name_matrix

_MIN_ANCHORS = 10


def plan_linear_transform(sources: FillSources) -> Fill:
    """Give each token that the donor has its mapped row.

    Raises:
        CheckpointError: the donor is incomplete, does not fit its tokenizer, or shares next to nothing with the base.
        ConfigError: the model came without its tokenizer.
        DataError: the donor's tokenizer is of a kind this package does not know.
    """
    settings, own = sources.settings, sources.require_own()
    assert settings.donor is not None
    donor = read_donor(settings.donor)
    theirs = list_surfaces(donor.tokenizer)
    anchors = np.array(
        [(theirs[form], old) for form, old in list_surfaces(own).items() if form in theirs], np.int64
    ).reshape(-1, 2)
    if len(anchors) < _MIN_ANCHORS:
        raise CheckpointError(
            f"{settings.donor}: shares {len(anchors)} tokens with {own.folder}, too few to fit a map; name a donor "
            "with more, or use --method subtoken_mean"
        )
    wanted = {index: form for form, index in list_surfaces(sources.require_made()).items()}
    found = {new: theirs[wanted[new]] for new in sources.id_map.pieces if wanted.get(new) in theirs}

    def fill(base: BaseRows) -> Iterator[tuple[list[int], torch.Tensor]]:
        def read(numbers: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
            theirs_N, olds_N = anchors[numbers].T.tolist()
            rows_NH = base.gather(olds_N).double()
            is_finite_N = rows_NH.isfinite().all(-1)
            if not is_finite_N.all():
                old = olds_N[int((~is_finite_N).nonzero()[0, 0])]
                raise CheckpointError(
                    f"{name_matrix(base)}: row {old} ({own.tokenizer.id_to_token(old)!r}) holds NaN or infinity; mend "
                    "the model, or use --method subtoken_mean"
                )
            return donor.gather(theirs_N, base.is_head), rows_NH

        where = f"{name_matrix(base)} from {settings.donor}"
        linear = fit_map(read, len(anchors), estimator=settings.estimator, seed=settings.seed, where=where)
        for ids in divide_ids(sources.id_map.pieces):
            rows_NH = torch.zeros(len(ids), len(linear.mean_y))
            has_donor = [at for at, new in enumerate(ids) if new in found]
            if has_donor:
                mapped = linear.apply(donor.gather([found[ids[at]] for at in has_donor], base.is_head))
                rows_NH[has_donor] = mapped.float()
            yield ids, rows_NH

    return fill
