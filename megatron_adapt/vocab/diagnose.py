"""Measure the rows of a resized model: lengths, neighbours, use, loss, donor and translations.

Reads: the Hugging Face folders of a model before and after ``tools/resize_vocab.py`` (also after training), and what
else the settings name. Which tokens are new follows from the two tokenizers (``id_map.map_ids``).
Writes: tables on the terminal; when asked JSON with a ``stage.json`` beside it, and a folder of plots.

1. ``open_models`` refuses a model that was not resized from the base;
2. ``census`` counts tokens by script and in the corpora;
3. ``geometry`` measures each matrix: lengths, odd rows, kept rows before and after, nearest old tokens;
4. ``donor_fit`` judges a linear map from the donor on held-out tokens;
5. ``lexicon`` searches translations by the input rows;
6. ``evaluate`` scores both models in bits per byte; it is handed in, as it stands beside this stage.

The JSON, parts that were not asked for being null::

    vocabulary: base_vocab_size, vocab_size, kept, moved, new, dropped, pieces_per_new_token,
      scripts: {SCRIPT: {kept, moved, new, dropped}}
    use: {LANG: {tokens, share_of_new_tokens, new_tokens_seen, vocabulary_used}}
    matrices: {input, head (untied models): {
      norms: {base, kept, new: {"1", "5", "25", "50", "75", "95", "99": length}},
      kept_rows: {identical, mean_cosine},
      odd_rows: {not_finite, zero, tiny: {count, tokens: [{id, token, is_new}]}},
      nearest: [{id, token, occurrences, nearest: [{id, token, cosine}]}]}}
    donor: {tokens, shared, new_in_donor, new_in_donor_by_occurrence,
      maps: {input, head: {estimator, fitted, held_out, r2, mean_cosine}}}
    bits_per_byte: {base, model: {LANG: {bits_per_byte, loss_per_token, tokens_per_byte, tokens, bytes, documents}}}
    lexicon: {entries, left_out: {long, no_new_token, new_token_in_old}, examples: [[old, new]],
      to_old, to_new: {queries, candidates, cosine, csls, chance: {"1", "5": precision, above: share}}}

Costs: a reading of the matrices for each of the parts, in chunks; 128,000 rows of width 4096 take under 0.5 GB beside
the donor's map (``linear``) and the models that are scored.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from megatron_adapt.checkpoint.hf import HFFolder, read_hf_shape
from megatron_adapt.checkpoint.layout import EMBEDDING, HEAD, check_hf_tensors
from megatron_adapt.config import DiagnoseVocab, Evaluate
from megatron_adapt.corpus.documents import get_text, limit_texts, read_documents, read_texts
from megatron_adapt.errors import CheckpointError, DataError
from megatron_adapt.files import STAGE_FILE, require_file, write_json, write_stage
from megatron_adapt.flags import split_pairs
from megatron_adapt.logs import show_progress
from megatron_adapt.shape import LlamaShape
from megatron_adapt.tokenizer.pieces import LoadedTokenizer, read_tokenizer
from megatron_adapt.vocab.census import Census, Ids, count_tokens, describe_use, describe_vocabulary, name_tokens
from megatron_adapt.vocab.cooccurrence import link_words
from megatron_adapt.vocab.diagnose_show import draw_diagnosis, show_diagnosis
from megatron_adapt.vocab.donor_fit import describe_overlap, judge_map, open_donor
from megatron_adapt.vocab.geometry import (
    choose_examples,
    compare_kept,
    describe_norms,
    find_nearest,
    find_odd_rows,
    read_all_norms,
)
from megatron_adapt.vocab.lexicon import read_dictionary, search_both, select_entries, spell_words
from megatron_adapt.vocab.resize import MatrixRows

_logger = logging.getLogger(__name__)
_LEAST_COSINE = 0.1
_MAX_EXAMPLES = 20
Evaluator = Callable[[Evaluate], Mapping[str, Any]]


@dataclass(frozen=True)
class OpenModels:
    """The vocabulary matrices of a model before and after, by role: ``input``, and ``head`` of an untied model."""

    before: dict[str, MatrixRows]
    after: dict[str, MatrixRows]
    census: Census


def diagnose_vocab(config: DiagnoseVocab, evaluate: Evaluator) -> dict[str, Any]:
    """Measure a resized model, show the figures and write what ``config`` names.

    Args:
        config: the settings.
        evaluate: scores models in bits per byte (``evaluate.bits_per_byte.evaluate``); called if there are corpora.

    Returns:
        The figures, as in the JSON.

    Raises:
        CheckpointError: a model is incomplete, was not resized from the base, or the donor does not fit.
        ConfigError: a model or a name of a corpus is not supported.
        DataError: a corpus, a dictionary or a tokenizer is missing, damaged or empty, or no translation is left.
    """
    corpora = split_pairs(config.corpora, "--corpora")
    for path in chain.from_iterable(corpora.values()):
        require_file(path, "--corpora")
    models = open_models(config.base, config.model)
    census = models.census
    names = {"base": name_tokens(census.base), "model": name_tokens(census.made)}
    counts = {language: _count(census.made, language, paths, config) for language, paths in corpora.items()}
    frequency_V: Ids | None = np.sum([*counts.values()], axis=0) if counts else None
    norms = {role: _read_norms(models, role) for role in models.after}
    lexicon = _search_lexicon(config, models, names["model"])
    figures: dict[str, Any] = {
        "vocabulary": describe_vocabulary(census),
        "use": {language: describe_use(census, count_V) for language, count_V in counts.items()} or None,
        "matrices": {
            role: _describe_matrix(models, role, norms[role], names["model"], frequency_V, config.num_examples)
            for role in models.after
        },
        "donor": _describe_donor(config.donor, models, frequency_V) if config.donor else None,
        "bits_per_byte": dict(evaluate(_score_both(config))) if corpora else None,
        "lexicon": lexicon,
    }
    show_diagnosis(figures)
    inputs = [config.base, config.model, *chain.from_iterable(corpora.values())]
    inputs += [path for path in (config.donor, config.dictionary, config.parallel) if path is not None]
    if config.json is not None:
        write_json(config.json, figures)
        write_stage(config.json.with_name(f"{config.json.stem}.{STAGE_FILE}"), config=config, inputs=inputs)
    if config.plots is not None:
        draw_diagnosis(figures, norms, config.plots)
    return figures


def open_models(base: Path, model: Path) -> OpenModels:
    """Open the models and compare their tokenizers.

    Raises:
        CheckpointError: weights are missing, the tokenizer is larger than the matrices, or the models differ in width
            or in whether they have a head of their own.
        DataError: one has no tokenizer that this package knows.
    """
    shape, base_shape = read_hf_shape(model), read_hf_shape(base)
    if (shape.hidden_size, shape.tied) != (base_shape.hidden_size, base_shape.tied):
        said = [f"of width {item.hidden_size} with {'tied' if item.tied else 'untied'}" for item in (shape, base_shape)]
        raise CheckpointError(
            f"{model}: {said[0]} matrices, {base} {said[1]}; name the model it was resized from: --base"
        )
    (before, own), (after, made) = _open_matrices(base, base_shape), _open_matrices(model, shape)
    return OpenModels(before, after, Census.of(own, made))


def _open_matrices(folder: Path, shape: LlamaShape) -> tuple[dict[str, MatrixRows], LoadedTokenizer]:
    source, tokenizer = HFFolder(folder), read_tokenizer(folder)
    check_hf_tensors({name: source.shape(name) for name in source.names}, shape, str(folder))
    if tokenizer.vocab_size > shape.vocab_size:
        raise CheckpointError(
            f"{folder}: the model has {shape.vocab_size} rows, its tokenizer {tokenizer.vocab_size} ids; give it the "
            "rows with tools/resize_vocab.py"
        )
    roles = {"input": EMBEDDING} if shape.tied else {"input": EMBEDDING, "head": HEAD}
    return {role: MatrixRows(source, name, tokenizer.vocab_size) for role, name in roles.items()}, tokenizer


def _count(tokenizer: LoadedTokenizer, language: str, paths: Sequence[Path], config: DiagnoseVocab) -> Ids:
    limit = -(-config.count_bytes // len(paths))
    texts = (text for path in paths for text in limit_texts(read_texts([path], config.text_key), limit))
    with show_progress(f"counting tokens of {language}", None, "MB") as advance:

        def note(text: str) -> str:
            advance(len(text.encode()) / 1e6)
            return text

        count_V = count_tokens(tokenizer, map(note, texts))
    if not count_V.any():
        raise DataError(f"--corpora: {language} holds no text ({', '.join(map(str, paths))}); check the files")
    return count_V


def _score_both(config: DiagnoseVocab) -> Evaluate:
    models = (f"base={config.base}", f"model={config.model}")
    return Evaluate(models=models, corpora=config.corpora, text_key=config.text_key, settings=config.settings)


def _read_norms(models: OpenModels, role: str) -> dict[str, np.ndarray]:
    """Return the lengths of all rows of the base, and of the kept and the new rows and all rows of the model."""
    norms_V = read_all_norms(models.after[role])
    kept, new = norms_V[models.census.kept], norms_V[models.census.new]
    return {"base": read_all_norms(models.before[role]), "kept": kept, "new": new, "model": norms_V}


def _describe_matrix(
    models: OpenModels,
    role: str,
    norms: Mapping[str, np.ndarray],
    names: Sequence[str],
    frequency_V: Ids | None,
    num_examples: int,
) -> dict[str, Any]:
    census, rows = models.census, models.after[role]
    examples = choose_examples(census, frequency_V, num_examples)
    nearest = find_nearest(rows, examples, census.kept.tolist())
    kept_rows = compare_kept(models.before[role], rows, census)
    cosine = kept_rows["mean_cosine"]
    if cosine is not None and cosine < _LEAST_COSINE:
        _logger.warning(
            "%s: rows of tokens that stayed point elsewhere than in --base (mean cosine %.3f); was the model made from "
            "it?",
            *(rows.source.folder, cosine),
        )
    return {
        "norms": {name: describe_norms(norms[name]) for name in ("base", "kept", "new")},
        "kept_rows": kept_rows,
        "odd_rows": find_odd_rows(norms["model"], census, names),
        "nearest": [
            {
                "id": index,
                "token": names[index],
                "occurrences": None if frequency_V is None else int(frequency_V[index]),
                "nearest": [{"id": near, "token": names[near], "cosine": cosine} for near, cosine in found],
            }
            for index, found in zip(examples, nearest, strict=True)
        ],
    }


def _describe_donor(folder: Path, models: OpenModels, frequency_V: Ids | None) -> dict[str, Any]:
    overlap = open_donor(folder, models.census)
    maps = {role: judge_map(overlap, rows) for role, rows in models.before.items()}
    return {**describe_overlap(overlap, models.census, frequency_V), "maps": maps}


def _search_lexicon(config: DiagnoseVocab, models: OpenModels, names: Sequence[str]) -> dict[str, Any] | None:
    census = models.census
    if config.dictionary is not None:
        pairs = read_dictionary(config.dictionary)
        news = spell_words(census.made, [new for _, new in pairs])
    elif config.parallel is not None:
        linked = _link_parallel(config, census, names)
        pairs = [(word, names[index]) for word, index in linked.items()]
        news = [(index,) for index in linked.values()]
    else:
        return None
    olds = spell_words(census.made, [old for old, _ in pairs])
    lexicon = select_entries(census, zip(olds, news, strict=True), config.max_word_tokens)
    kept = set(lexicon.entries)
    examples = [pair for pair, *spelt in zip(pairs, olds, news, strict=True) if tuple(spelt) in kept]
    return {
        "entries": len(lexicon.entries),
        "left_out": dict(lexicon.left_out),
        "examples": examples[:_MAX_EXAMPLES],
        **search_both(models.after["input"], census, lexicon),
    }


def _link_parallel(config: DiagnoseVocab, census: Census, names: Sequence[str]) -> dict[str, int]:
    assert config.parallel is not None
    require_file(config.parallel, "--parallel")
    old_key, new_key = config.parallel_keys
    with show_progress("linking words", None, "pairs") as advance:

        def read(where: str, document: dict[str, Any]) -> tuple[str, str]:
            advance()
            return get_text(document, old_key, where), get_text(document, new_key, where)

        pairs = (read(where, document) for where, document in read_documents([config.parallel]))
        return link_words(pairs, census.made, {index: names[index] for index in census.new.tolist()})
