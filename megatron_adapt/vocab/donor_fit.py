"""How far a donor's rows explain the base's: the tokens both have, and a linear map judged on some of them.

1. ``donor.find_overlap`` compares tokens by their surface form; ``describe_overlap`` counts them;
2. ``judge_map`` holds shared tokens out (``linear.hold_out``), fits ``linear.fit_map`` on the others and
   compares the mapped rows of the held-out ones with the base's.
"""

from pathlib import Path
from typing import Any

from megatron_adapt.config import VocabSettings
from megatron_adapt.vocab.census import Census, Ids
from megatron_adapt.vocab.donor import Overlap, find_overlap, list_surfaces
from megatron_adapt.vocab.linear import fit_map, hold_out
from megatron_adapt.vocab.norms import scale_to_unit
from megatron_adapt.vocab.rows import BaseRows, FillSources, name_matrix


def open_donor(folder: Path, census: Census) -> Overlap:
    """Open a donor and find what it shares with the base and with the new tokens.

    Raises:
        CheckpointError: it is incomplete, does not fit its tokenizer, or shares next to nothing with the base.
        DataError: its tokenizer is of a kind this package does not know.
    """
    settings = VocabSettings(method="linear_transform", donor=folder)
    return find_overlap(FillSources(id_map=census.id_map, settings=settings, own=census.base, made=census.made))


def describe_overlap(overlap: Overlap, census: Census, frequency_V: Ids | None) -> dict[str, Any]:
    """Return how many tokens are shared, and the share of the new ones that the donor has, each and by occurrence.

    Args:
        overlap: what the donor shares.
        census: which tokens are new.
        frequency_V: how often each id of the model occurs in texts; None without texts.
    """
    num_new = 0 if frequency_V is None else int(frequency_V[census.new].sum())
    num_found = 0 if frequency_V is None else int(frequency_V[list(overlap.found)].sum())
    return {
        "tokens": len(list_surfaces(overlap.donor.tokenizer)),
        "shared": overlap.num_anchors,
        "new_in_donor": len(overlap.found) / len(census.new),
        "new_in_donor_by_occurrence": num_found / num_new if num_new else None,
    }


def judge_map(overlap: Overlap, base: BaseRows) -> dict[str, Any]:
    """Fit a map from the donor's rows to those of a matrix of the base and judge it on tokens that it did not see.

    Returns:
        ``estimator``, ``fitted`` and ``held_out`` tokens, ``r2``, the share of the variance about the mean of the
        fitted ones that the map predicts, and ``mean_cosine`` of predicted and true rows.

    Raises:
        CheckpointError: a shared row is not finite.
    """
    seed = VocabSettings().seed
    held, rest = hold_out(overlap.num_anchors, seed)
    read = overlap.read_anchors(base)
    where = f"{name_matrix(base)} from {overlap.donor.source.folder}, a tenth held out"
    linear = fit_map(lambda numbers: read(rest[numbers]), len(rest), estimator="auto", seed=seed, where=where)
    theirs_ND, rows_NH = read(held)
    mapped_NH = linear.apply(theirs_ND)
    variance = float((rows_NH - linear.mean_y).square().sum())
    return {
        "estimator": linear.estimator,
        "fitted": len(rest),
        "held_out": len(held),
        "r2": 1 - float((rows_NH - mapped_NH).square().sum()) / variance if variance else None,
        "mean_cosine": float((scale_to_unit(mapped_NH) * scale_to_unit(rows_NH)).sum(-1).mean()),
    }
