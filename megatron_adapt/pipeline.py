"""Run a whole adaptation: every stage of a recipe in order, as the commands a user would type.

Reads: a recipe. Writes: the run folder (``run_folder``), ``recipe.json`` (the resolved recipe), ``evaluation.json``
and ``report.md``. A stage whose record says that the same settings made it from the same inputs is skipped, so a
run that was killed continues, and a changed setting repeats what depends on it.

1. ``plan_base``: where the recipe asks for it, a base model from scratch, trained on the old languages. A recipe
   without new languages makes that alone.
2. ``plan_vocabulary``: tokenizer and token files; ``plan_training``: new rows, training stages, exports.
3. ``run_commands`` (``commands``): each as its own process; training under torchrun.
4. ``write_results``: of the scores of base, resized model and every stage, the table and the model card.
"""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_adapt.checkpoint.card import RunFacts, write_card
from megatron_adapt.checkpoint.hf import read_hf_shape
from megatron_adapt.commands import Command, run_commands
from megatron_adapt.config import (
    BaseSettings,
    BuildTokenizer,
    ConvertCheckpoint,
    CreateBase,
    Evaluate,
    MeasureTokenizer,
    PrepareCorpus,
    PrepareParallel,
    PreprocessData,
    ResizeVocab,
    StageSettings,
)
from megatron_adapt.config.names import get_language
from megatron_adapt.data.index import bin_path, idx_path
from megatron_adapt.data.record import record_path
from megatron_adapt.errors import ConfigError
from megatron_adapt.evaluate.report import render_report, show_table, write_report
from megatron_adapt.files import STAGE_FILE, read_json, require_file, write_json
from megatron_adapt.parallelism import check_parallelism
from megatron_adapt.recipe import Recipe, make_base_shape
from megatron_adapt.run_folder import RunFolder, describe_training
from megatron_adapt.shape import pad_vocab_size

_logger = logging.getLogger(__name__)


def adapt(recipe: Recipe, tools: Path) -> None:
    """Run every stage of the recipe that is not finished, then score and report.

    Args:
        recipe: what to do.
        tools: folder of the tools.

    Raises:
        ConfigError: the recipe is incomplete, or its layout does not fit the model.
        DataError: a file of the corpus is missing.
        CheckpointError: a training stage was finished under other settings.
    """
    check_recipe(recipe)
    run = RunFolder(recipe.work_dir)
    write_json(run.root / "recipe.json", recipe)
    if not recipe.new_languages:
        run_commands([*plan_corpus(recipe, run), *plan_base(recipe, run)], recipe, tools)
        return
    base_model = find_base_model(recipe, run)
    prepared = [*plan_corpus(recipe, run), *plan_base(recipe, run), *plan_vocabulary(recipe, run, base_model)]
    trained = [*plan_training(recipe, run, base_model), *plan_results(recipe, run, base_model)]
    run_commands([*prepared, *trained], recipe, tools)
    write_results(recipe, run, base_model)


def find_base_model(recipe: Recipe, run: RunFolder) -> Path:
    """Return the base model's Hugging Face folder, also where ``plan_base`` has yet to make it."""
    return recipe.base_model or run.base.export(_get_base(recipe)[1].name)


def check_recipe(recipe: Recipe) -> None:
    """Refuse in a second what would otherwise fail after hours.

    Raises:
        ConfigError: no training stage, no file for a source, or a layout that does not fit the model.
        DataError: a file of the corpus is missing.
    """
    if recipe.new_languages and not recipe.train.stages:
        raise ConfigError("train.stages: empty; add a [[train.stages]] table to the recipe")
    if not recipe.new_languages and (recipe.train.stages or recipe.base_train is None):
        raise ConfigError("new_languages: empty, so only a base can be made; give [base], [base_train] and no stages")
    check_corpus(recipe)
    tables = [recipe.base, recipe.base_train]
    if tables.count(None) != (0 if recipe.base_model is None else 2):
        raise ConfigError("base_model: give either base_model or both tables [base] and [base_train]")
    shape = make_base_shape(_get_base(recipe)[0]) if recipe.base_model is None else read_hf_shape(recipe.base_model)
    if recipe.evaluate.seq_length > shape.max_position_embeddings:
        raise ConfigError(
            f"evaluate.seq_length: {recipe.evaluate.seq_length} exceeds the model's {shape.max_position_embeddings} "
            f"positions; use at most {shape.max_position_embeddings}"
        )
    padded = pad_vocab_size(shape.vocab_size, recipe.checkpoint.vocab_pad_multiple)
    check_parallelism(shape, recipe.train, padded_vocab_size=padded, num_ranks=recipe.train.nproc_per_node)


def check_corpus(recipe: Recipe) -> None:
    """Refuse a source without a file.

    Raises:
        ConfigError: it names none.
        DataError: one is missing.
    """
    for source, files in recipe.corpus.items():
        if not files:
            raise ConfigError(f"corpus.{source}: names no file; add --corpus.{source} FILE")
        for file in files:
            require_file(Path(file), f"corpus.{source}")


def _get_base(recipe: Recipe) -> tuple[BaseSettings, StageSettings]:
    """Return [base] and [base_train], which ``Recipe`` requires where there is no base model."""
    assert recipe.base is not None
    assert recipe.base_train is not None
    return recipe.base, recipe.base_train


def plan_corpus(recipe: Recipe, run: RunFolder) -> Iterator[Command]:
    """Yield one call of prepare_corpus per source, or of prepare_parallel."""
    for source in recipe.list_sources(*recipe.old_languages, *recipe.new_languages):
        output = run.corpus(source)
        files = tuple(Path(file) for file in recipe.corpus[source])
        if source in recipe.parallel:
            pairs = PrepareParallel(input=files, output=output, overwrite=True, settings=recipe.parallel[source])
            yield Command("prepare_parallel", pairs, output / STAGE_FILE)
            continue
        config = PrepareCorpus(input=files, output=output, overwrite=True, settings=recipe.prepare)
        yield Command("prepare_corpus", config, output / STAGE_FILE)


def plan_base(recipe: Recipe, run: RunFolder) -> Iterator[Command]:
    """Yield the calls that train a base from scratch; none when the recipe names a base model."""
    if recipe.base_model is not None:
        return
    base, (settings, stage) = run.base, _get_base(recipe)
    sources = recipe.list_sources(*recipe.old_languages)
    corpus = _list_parts(recipe, run, recipe.old_languages)
    config = CreateBase(corpus=corpus, output=base.scratch, overwrite=True, settings=settings)
    yield Command("create_base", config, base.scratch / STAGE_FILE)
    yield _convert(recipe, base.scratch, "megatron", base.megatron)
    for source in sources:
        yield from _tokenise(recipe, run, base, source, base.scratch)
    yield _train(recipe, base, stage)
    yield _convert(recipe, base.checkpoints(stage.name), "hf", base.export(stage.name))


def plan_vocabulary(recipe: Recipe, run: RunFolder, base_model: Path) -> Iterator[Command]:
    """Yield the calls that make the tokenizer and cut all text with it."""
    build = BuildTokenizer(
        base=base_model,
        corpus=_list_parts(recipe, run, recipe.new_languages),
        old_corpus=_list_parts(recipe, run, recipe.old_languages),
        output=run.tokenizer,
        overwrite=True,
        settings=recipe.tokenizer,
    )
    yield Command("build_tokenizer", build, run.tokenizer / STAGE_FILE)
    for source in recipe.list_sources(*recipe.old_languages, *recipe.new_languages):
        yield from _tokenise(recipe, run, run, source, run.tokenizer)


def plan_training(recipe: Recipe, run: RunFolder, base_model: Path) -> Iterator[Command]:
    """Yield the calls from the base model to the exports of every training stage."""
    resize = ResizeVocab(
        model=base_model,
        tokenizer=run.tokenizer,
        output=run.resized,
        corpus=_list_parts(recipe, run, recipe.new_languages) if recipe.vocab.reads_corpus else (),
        overwrite=True,
        settings=recipe.vocab,
    )
    yield Command("resize_vocab", resize, run.resized / STAGE_FILE)
    yield _convert(recipe, run.resized, "megatron", run.megatron)
    for stage in recipe.train.stages:
        yield _train(recipe, run, stage)
        yield _convert(recipe, run.checkpoints(stage.name), "hf", run.export(stage.name))


def plan_results(recipe: Recipe, run: RunFolder, base_model: Path) -> Iterator[Command]:
    """Yield the calls that score the models and the tokenizers, per language, on the documents its sources held out."""
    sources = recipe.list_texts(*recipe.old_languages, *recipe.new_languages)
    corpora = tuple(f"{get_language(source)}={run.corpus_part(source, 'valid')}" for source in sources)
    stages = (f"{stage.name}={run.export(stage.name)}" for stage in recipe.train.stages)
    models = (f"base={base_model}", f"resized={run.resized}", *stages)
    scores = run.root / "evaluation.json"
    evaluate = Evaluate(models=models, corpora=corpora, json=scores, settings=recipe.evaluate)
    yield Command("evaluate", evaluate, scores.with_name(f"evaluation.{STAGE_FILE}"), outputs=(scores,))
    figures = run.root / "tokenizers.json"
    tokenizers = (f"base={base_model}", f"adapted={run.tokenizer}")
    measure = MeasureTokenizer(tokenizers=tokenizers, corpora=corpora, json=figures)
    yield Command("measure_tokenizer", measure, figures.with_name(f"tokenizers.{STAGE_FILE}"), outputs=(figures,))


def _list_parts(recipe: Recipe, run: RunFolder, languages: tuple[str, ...]) -> tuple[Path, ...]:
    """List the training documents of languages."""
    return tuple(run.corpus_part(source, "train") for source in recipe.list_texts(*languages))


def _convert(recipe: Recipe, source: Path, to: Any, output: Path) -> Command:
    config = ConvertCheckpoint(
        source=source, to=to, output=output, verify=True, overwrite=True, settings=recipe.checkpoint
    )
    return Command("convert_checkpoint", config, output / STAGE_FILE)


def _tokenise(recipe: Recipe, run: RunFolder, target: RunFolder, source: str, tokenizer: Path) -> Iterator[Command]:
    pairs = recipe.parallel.get(source)
    has_prompts = pairs is not None and pairs.format == "instruction"
    settings = replace(recipe.data, prompt_key="prompt") if has_prompts else recipe.data
    for part in ("train", "valid"):
        prefix = target.tokens(source, part)
        config = PreprocessData(
            input=(run.corpus_part(source, part),),
            tokenizer=tokenizer,
            output_prefix=prefix,
            overwrite=True,
            settings=settings,
        )
        yield Command("preprocess_data", config, record_path(prefix), outputs=(bin_path(prefix), idx_path(prefix)))


def _train(recipe: Recipe, run: RunFolder, stage: StageSettings) -> Command:
    config = describe_training(stage, recipe.train)
    return Command("pretrain", config, run.checkpoints(stage.name) / STAGE_FILE, stage=stage.name)


def write_results(recipe: Recipe, run: RunFolder, base_model: Path) -> None:
    """Write ``report.md`` and the model card of the last export, and show the table of all models."""
    evaluation = read_json(run.root / "evaluation.json")
    tokenizers = read_json(run.root / "tokenizers.json")
    tokens_per_byte = {
        name: {language: figures["tokens_per_byte"] for language, figures in languages.items()}
        for name, languages in tokenizers.items()
    }
    old, new = recipe.old_languages, recipe.new_languages
    body = render_report(evaluation, tokens_per_byte, old, new, _collect_facts(recipe, run))
    write_report(run.root / "report.md", title=f"From {', '.join(old)} to {', '.join(new)}", body=body)
    export = run.export(recipe.train.stages[-1].name)
    name = base_model.name if recipe.base_model else "a model trained from scratch for this run"
    write_card(
        export,
        name=export.name,
        shape=read_hf_shape(export),
        step=read_json(export / STAGE_FILE)["counts"]["step"],
        facts=RunFacts(base_model=name, languages_old=old, languages_new=new, report=body),
    )
    show_table(evaluation, old, new)
    _logger.info("wrote %s; the adapted model is %s", run.root / "report.md", export)


def _collect_facts(recipe: Recipe, run: RunFolder) -> dict[str, str]:
    """Return name and value of what a reader should know of the run; what was counted is read from the records."""
    resized = read_json(run.resized / STAGE_FILE)["counts"]
    facts = {
        "tokenizer": f"{recipe.tokenizer.method}: {resized['base_vocab_size']:,} to {resized['vocab_size']:,} tokens",
        "rows of new tokens": f"{resized['new_rows']:,}, by {recipe.vocab.method}",
        "sequence length": str(recipe.train.seq_length),
    }
    tokens = {
        stage.name: read_json(run.checkpoints(stage.name) / STAGE_FILE)["counts"]["tokens"]
        for stage in recipe.train.stages
    }
    for stage in recipe.train.stages:
        blend = ", ".join(f"{language} {share:g}" for language, share in stage.blend.items())
        facts[f"stage {stage.name}"] = (
            f"{stage.tokens:,} tokens, blend {blend}, learns {stage.learning}, lr {stage.lr:g}"
        )
    for language in (*recipe.old_languages, *recipe.new_languages):
        parts = {name: counts.get(language, 0) for name, counts in tokens.items()}
        listed = ", ".join(f"{count:,} in {name}" for name, count in parts.items())
        facts[f"tokens of {language}"] = f"{sum(parts.values()):,} ({listed})"
    return facts
