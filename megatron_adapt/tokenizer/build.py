"""Make the tokenizer of a new language out of a base tokenizer, by one of ``METHODS``.

Reads: a base tokenizer folder, documents, for ``transplant`` a donor. Writes: a tokenizer folder, ``added_pieces.json``
(``id_map``), ``report.json`` and ``stage.json``.
Guarantees, proved on the files written (``check``): methods that promise it leave every old id its piece; every new
piece encodes to its own id; text that the base gave back unchanged still is; ``tokenizer.json`` and
``tokenizer.model`` give the same ids wherever those of the base did; the old language drifts no more than allowed.

1. ``check_base`` refuses a base whose files contradict one another.
2. The method learns or takes pieces and writes the tokenizer files (``extend``, ``merge``, ``replace``, ``optimize``,
   ``transplant``).
3. ``map_ids`` finds which old ids spell each new one; ``check_made`` proves the guarantees.
4. ``measure_drift`` encodes the old language before and after.

Costs: 50 MB of text and 32,000 pieces take about a minute and under 2 GB.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_adapt.config import BuildTokenizer
from megatron_adapt.errors import ConfigError
from megatron_adapt.files import STAGE_FILE, replace_folder, require_file, write_json, write_stage
from megatron_adapt.tokenizer.base import check_base
from megatron_adapt.tokenizer.check import check_made
from megatron_adapt.tokenizer.drift import Drift, measure_drift
from megatron_adapt.tokenizer.extend import make_continued
from megatron_adapt.tokenizer.id_map import IdMap, map_ids, write_id_map
from megatron_adapt.tokenizer.made import Made, list_counts
from megatron_adapt.tokenizer.merge import make_merged
from megatron_adapt.tokenizer.optimize import make_optimized
from megatron_adapt.tokenizer.pieces import LoadedTokenizer, piece_bytes, read_tokenizer
from megatron_adapt.tokenizer.replace import make_replaced
from megatron_adapt.tokenizer.transplant import make_transplanted

REPORT_FILE = "report.json"
_logger = logging.getLogger(__name__)

METHODS: dict[str, Callable[[LoadedTokenizer, BuildTokenizer, Path], Made]] = {
    "continue": make_continued,
    "merge": make_merged,
    "replace": make_replaced,
    "optimize": make_optimized,
    "transplant": make_transplanted,
}


def build_tokenizer(config: BuildTokenizer) -> None:
    """Write the tokenizer that ``config`` asks for to ``config.output``.

    Raises:
        ConfigError: the output exists and ``overwrite`` is off, a script is unknown, or a setting lacks its input.
        DataError: an input is missing, damaged or of an unknown kind, the corpus gives no piece, or the old language
            drifts too far.
    """
    for path in config.corpus:
        require_file(path, "--corpus")
    for path in config.old_corpus:
        require_file(path, "--old-corpus")
    if config.settings.max_drift < 1 and not config.old_corpus:
        raise ConfigError(
            f"tokenizer.max_drift: {config.settings.max_drift} has no text to be measured on; name it: --old-corpus"
        )
    donors = [config.settings.donor] if config.settings.donor else []
    inputs = [config.base, *donors, *config.corpus, *config.old_corpus]
    for path in inputs:
        if path.resolve().is_relative_to(config.output.resolve()):
            raise ConfigError(f"--output: {config.output} holds {path}, which is read; name another output")
    with replace_folder(config.output, overwrite=config.overwrite) as folder:
        base = read_tokenizer(config.base)
        check_base(base)
        made = METHODS[config.settings.method](base, config, folder)
        after = read_tokenizer(folder)
        id_map = map_ids(base, after)
        figures = check_made(base, after, id_map, made)
        drift = measure_drift(base, after, config)
        write_id_map(id_map, folder)
        report = _describe(base, after, id_map, made, figures, drift)
        write_json(folder / REPORT_FILE, {**report, "new_pieces": _list_pieces(after, id_map)})
        write_stage(folder / STAGE_FILE, config=config, inputs=inputs, counts=report)
    _show(config.output, report)


def _describe(
    base: LoadedTokenizer,
    after: LoadedTokenizer,
    id_map: IdMap,
    made: Made,
    figures: Mapping[str, Any],
    drift: Drift | None,
) -> dict[str, Any]:
    kept = {old for index in range(after.vocab_size) if (old := id_map.old_id(index)) is not None}
    return {
        "documents": made.num_texts,
        "bytes": made.num_bytes,
        "base_vocab_size": base.vocab_size,
        "vocab_size": after.vocab_size,
        "pieces_asked": made.num_asked,
        "pieces_added": len(id_map.pieces),
        "pieces_kept": len(kept),
        "pieces_dropped": base.vocab_size - len(kept),
        "ids_moved": len(id_map.moved),
        "candidates": dict(made.reasons),
        **figures,
        **({"drift": drift.figures} if drift else {}),
    }


def _list_pieces(after: LoadedTokenizer, id_map: IdMap) -> dict[str, str]:
    """List the surface form of every new id, for a reader's eye; a part of a character as its bytes."""
    surfaces = piece_bytes(after)
    return {
        str(index): surfaces[index].decode(errors="backslashreplace") or (after.tokenizer.id_to_token(index) or "")
        for index in id_map.pieces
    }


def _show(output: Path, report: Mapping[str, Any]) -> None:
    is_unsafe = "differing_from_model" in report
    _logger.info(
        "%s: %s tokens: %s of the base's %s kept (%s moved), %s new, from %s documents; candidates: %s",
        output,
        *(f"{report[name]:,}" for name in ("vocab_size", "pieces_kept", "base_vocab_size", "ids_moved")),
        f"{report['pieces_added']:,}",
        f"{report['documents']:,}",
        list_counts(report["candidates"]),
    )
    _logger.info(
        "%s: %s; %s texts checked: round trip as the base, tokenizer.json == tokenizer.model in %s; tokens per byte "
        "%.4f -> %.4f",
        output,
        f"{report['unreachable_by_json']:,} new pieces unreachable" if is_unsafe else "all new pieces reachable",
        report["checked_texts"],
        report["checked_against_model"] - (report["differing_from_model"] if is_unsafe else 0),
        report["base_tokens_per_byte"],
        report["tokens_per_byte"],
    )
    if "drift" in report:
        drift = report["drift"]
        _logger.info(
            "%s: old language: its tokens changed in %s of %s documents (%.2f %%), %s touched by text in the new "
            "scripts; tokens per byte %.4f -> %.4f",
            output,
            f"{drift['changed']:,}",
            f"{drift['documents']:,}",
            100 * drift["share"],
            f"{drift['touched'] - drift['changed']:,}",
            drift["base_tokens_per_byte"],
            drift["tokens_per_byte"],
        )
