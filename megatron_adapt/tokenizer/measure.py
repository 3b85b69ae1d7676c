"""Compare tokenizers on corpora, or extensions of one tokenizer by several sizes.

Reads: tokenizer folders and documents. Writes: tables on the terminal and, when asked, a plot and JSON
``{tokenizer: {language: figures}}`` (``figures.TokenizerFigures``) with a ``stage.json`` beside it. With ``--sweep``
the JSON has one key more: ``"sweep": {base, rule, flattens_at, sizes}`` (``sweep.Sweep``).

1. ``measure_corpora`` measures one tokenizer on every language.
2. ``compare_parallel`` adds the premium that a language pays over the reference for documents of the same id.
3. ``sweep.sweep_sizes`` builds and measures the extensions.

Costs: the time of encoding every corpus once for each tokenizer.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_adapt.config import MeasureTokenizer
from megatron_adapt.corpus.documents import get_text, limit_texts, read_documents
from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.files import STAGE_FILE, require_file, write_json, write_stage
from megatron_adapt.flags import split_pairs
from megatron_adapt.logs import show_progress
from megatron_adapt.tokenizer.figures import Tally, TokenizerFigures, take_batches
from megatron_adapt.tokenizer.pieces import LoadedTokenizer, read_tokenizer
from megatron_adapt.tokenizer.show import draw_figures, draw_sweep, show_figures, show_sweep
from megatron_adapt.tokenizer.sweep import sweep_sizes

_SWEEP_KEY = "sweep"


@dataclass(frozen=True)
class MeasuredCorpus:
    """One language by one tokenizer."""

    figures: TokenizerFigures
    tokens_by_id: dict[str, int]
    "Tokens of every document; empty unless documents are compared."


def measure_tokenizer(config: MeasureTokenizer) -> dict[str, dict[str, TokenizerFigures]]:
    """Measure every tokenizer on every corpus, sweep if asked, show tables and write what ``config`` names.

    Returns:
        Figures by tokenizer and language.

    Raises:
        ConfigError: a name is given to two tokenizers, or the reference is no language of ``corpora``.
        DataError: a tokenizer or a corpus is missing or damaged, a corpus is empty, or none is parallel.
    """
    settings = config.settings
    folders, corpora = _read_names(config)

    def measure(tokenizer: LoadedTokenizer, name: str) -> dict[str, TokenizerFigures]:
        measured = measure_corpora(tokenizer, name, corpora, config)
        if config.parity_reference:
            return compare_parallel(measured, config.parity_reference)
        return {language: item.figures for language, item in measured.items()}

    tokenizers = {name: read_tokenizer(folder) for name, folder in folders.items()}
    figures = {name: measure(tokenizer, name) for name, tokenizer in tokenizers.items()}
    found: dict[str, Any] = dict(figures)
    if figures:
        show_figures(figures)
    if settings.sweep:
        sweep = sweep_sizes(settings, config.text_key, measure)
        show_sweep(sweep)
        found[_SWEEP_KEY] = sweep
    if config.plot and settings.sweep:
        draw_sweep(sweep, config.plot)
    elif config.plot:
        draw_figures(figures, config.plot)
    if config.json:
        write_json(config.json, found)
        inputs = [*folders.values(), *(path for paths in corpora.values() for path in paths), *settings.corpus]
        inputs += [folder for folder in (settings.base, settings.model_shape) if folder]
        write_stage(config.json.with_name(f"{config.json.stem}.{STAGE_FILE}"), config=config, inputs=inputs)
    return figures


def _read_names(config: MeasureTokenizer) -> tuple[dict[str, Path], dict[str, list[Path]]]:
    folders = split_pairs(config.tokenizers, "--tokenizers")
    for name, paths in folders.items():
        if len(paths) > 1:
            raise ConfigError(f"--tokenizers: {name!r} names {len(paths)} folders; give every tokenizer its own name")
    if _SWEEP_KEY in folders and config.settings.sweep:
        raise ConfigError(f"--tokenizers: {_SWEEP_KEY!r} is the key of --sweep in the JSON; give it another name")
    corpora = split_pairs(config.corpora, "--corpora")
    for path in (path for paths in corpora.values() for path in paths):
        require_file(path, "--corpora")
    if config.parity_reference and config.parity_reference not in corpora:
        raise ConfigError(
            f"--parity-reference: {config.parity_reference!r} is not among --corpora ({', '.join(corpora)}); name one"
        )
    return {name: paths[0] for name, paths in folders.items()}, corpora


def measure_corpora(
    tokenizer: LoadedTokenizer, name: str, corpora: Mapping[str, list[Path]], config: MeasureTokenizer
) -> dict[str, MeasuredCorpus]:
    """Measure a tokenizer on every language.

    Raises:
        DataError: a corpus is damaged or holds no text, or documents that are to be compared have no ids of their own.
    """
    measured = {}
    for language, paths in corpora.items():
        ids: list[str] = []
        lengths: list[int] = []
        tally = Tally(tokenizer)
        with show_progress(f"{name} on {language}", None, "MB") as advance:
            for batch in take_batches(limit_texts(_read_texts(paths, config, ids), config.max_bytes)):
                lengths += tally.add(batch)
                advance(sum(len(text.encode()) for text in batch) / 1e6)
        figures = tally.describe()
        if not figures.bytes:
            raise DataError(f"--corpora: {language} holds no text ({', '.join(map(str, paths))}); check the files")
        tokens_by_id = dict(zip(ids, lengths, strict=False))
        if len(tokens_by_id) < len(ids):
            raise DataError(
                f"--corpora: {len(ids) - len(tokens_by_id)} of {len(ids)} documents of {language} have the "
                f"{config.id_key!r} of another one; --parity-reference needs ids that name one document"
            )
        measured[language] = MeasuredCorpus(figures, tokens_by_id)
    return measured


def _read_texts(paths: list[Path], config: MeasureTokenizer, ids: list[str]) -> Iterator[str]:
    """Yield the texts; note their ids if documents are to be compared."""
    for where, document in read_documents(paths):
        if config.parity_reference:
            if config.id_key not in document:
                raise DataError(
                    f"{where}: no key {config.id_key!r} (keys: {', '.join(document)}), which --parity-reference "
                    "compares documents by; name the key: --id-key"
                )
            ids.append(str(document[config.id_key]))
        yield get_text(document, config.text_key, where)


def compare_parallel(measured: Mapping[str, MeasuredCorpus], reference: str) -> dict[str, TokenizerFigures]:
    """Add to the figures of every language its premium: tokens for documents of the reference, over the reference's.

    ``sum_d tokens(language, d) / sum_d tokens(reference, d)`` over the ids ``d`` of both (Petrov et al. 2023).

    Raises:
        DataError: no other language has a document of the reference.
    """
    base = measured[reference].tokens_by_id
    compared = {}
    for language, item in measured.items():
        shared = item.tokens_by_id.keys() & base.keys()
        expected = sum(base[index] for index in shared)
        premium = sum(item.tokens_by_id[index] for index in shared) / expected if expected else None
        compared[language] = replace(item.figures, parallel_documents=len(shared), premium=premium)
    if not any(item.parallel_documents for language, item in compared.items() if language != reference):
        raise DataError(
            f"--parity-reference: no document of another language has an id of {reference}'s; name the key of the id "
            "(--id-key), or leave the flag out"
        )
    return compared
