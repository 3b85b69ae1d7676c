"""Run a whole adaptation: every stage of a recipe in order, as the commands a user would type.

Reads: a recipe. Writes: the run folder (``run_folder``), ``recipe.json`` (the resolved recipe), ``evaluation.json``
and ``report.md``. A stage whose record says that the same settings made it from the same inputs is skipped, so a
run that was killed continues, and a changed setting repeats what depends on it.

1. ``plan_base``: where the recipe asks for it, a base model from scratch, trained on the old languages.
2. ``plan_adaptation``: tokenizer, new rows, token files, training stages, exports.
3. ``run_commands``: each as its own process; training under torchrun.
4. ``write_results``: of the scores of base, resized model and every stage, the table and the model card.
"""

import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_adapt.checkpoint.card import RunFacts, write_card
from megatron_adapt.checkpoint.hf import read_hf_shape
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
from megatron_adapt.data.stage_plans import check_trained
from megatron_adapt.errors import ConfigError
from megatron_adapt.evaluate.report import render_report, show_table, write_report
from megatron_adapt.files import STAGE_FILE, is_finished, read_json, require_file, write_json
from megatron_adapt.flags import to_flags
from megatron_adapt.recipe import Recipe
from megatron_adapt.run_folder import RunFolder, describe_training, is_trained
from megatron_adapt.shape import LlamaShape, check_launch, check_layout, pad_vocab_size

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Command:
    """One tool call."""

    tool: str
    "Name of the file in tools/."
    config: Any
    "Config of the tool; for training the stage's settings."
    record: Path
    "stage.json that the tool writes when it is finished."
    stage: str = ""
    "Name of the training stage."
    outputs: tuple[Path, ...] = ()
    "Files beside the record that the tool writes; a folder stands and falls with its record."

    def is_finished(self) -> bool:
        """Tell whether the output is there, made by this config from the inputs as they are now."""
        if self.stage:
            return is_trained(self.record.parent, self.config)
        return all(item.is_file() for item in self.outputs) and is_finished(self.record, config=self.config)


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
    base_model = recipe.base_model or run.base.export(_get_base(recipe)[1].name)
    commands = [*plan_corpus(recipe, run), *plan_base(recipe, run), *plan_adaptation(recipe, run, base_model)]
    run_commands([*commands, *plan_results(recipe, run, base_model)], recipe, tools)
    write_results(recipe, run, base_model)


def check_recipe(recipe: Recipe) -> None:
    """Refuse in a second what would otherwise fail after hours.

    Raises:
        ConfigError: no training stage, no file for a source, or a layout that does not fit the model.
        DataError: a file of the corpus is missing.
    """
    if not recipe.train.stages:
        raise ConfigError("train.stages: empty; add a [[train.stages]] table to the recipe")
    for source, files in recipe.corpus.items():
        if not files:
            raise ConfigError(f"corpus.{source}: names no file; add --corpus.{source} FILE")
        for file in files:
            require_file(Path(file), f"corpus.{source}")
    tables = [recipe.base, recipe.base_train]
    if tables.count(None) != (0 if recipe.base_model is None else 2):
        raise ConfigError("base_model: give either base_model or both tables [base] and [base_train]")
    train = recipe.train
    shape = _shape_of_base(_get_base(recipe)[0]) if recipe.base_model is None else read_hf_shape(recipe.base_model)
    if recipe.evaluate.seq_length > shape.max_position_embeddings:
        raise ConfigError(
            f"evaluate.seq_length: {recipe.evaluate.seq_length} exceeds the model's {shape.max_position_embeddings} "
            f"positions; use at most {shape.max_position_embeddings}"
        )
    check_layout(
        shape,
        tensor_model_parallel_size=train.tensor_model_parallel_size,
        pipeline_model_parallel_size=train.pipeline_model_parallel_size,
        sequence_parallel=train.sequence_parallel,
        seq_length=train.seq_length,
        padded_vocab_size=pad_vocab_size(shape.vocab_size, recipe.checkpoint.vocab_pad_multiple),
    )
    check_launch(
        num_ranks=train.nproc_per_node,
        tensor_model_parallel_size=train.tensor_model_parallel_size,
        pipeline_model_parallel_size=train.pipeline_model_parallel_size,
        micro_batch_size=train.micro_batch_size,
        global_batch_size=train.global_batch_size,
    )


def _shape_of_base(base: BaseSettings) -> LlamaShape:
    return LlamaShape(
        num_layers=base.num_layers,
        hidden_size=base.hidden_size,
        ffn_hidden_size=base.ffn_hidden_size,
        num_attention_heads=base.num_attention_heads,
        num_query_groups=base.num_query_groups,
        kv_channels=base.hidden_size // base.num_attention_heads,
        vocab_size=base.vocab_size,
        max_position_embeddings=base.max_position_embeddings,
        layernorm_epsilon=1e-6,
        rotary_base=10000.0,
        rope_scaling=None,
        tied=base.tied,
    )


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
    corpus = tuple(run.corpus_part(source, "train") for source in recipe.list_texts(*recipe.old_languages))
    config = CreateBase(corpus=corpus, output=base.scratch, overwrite=True, settings=settings)
    yield Command("create_base", config, base.scratch / STAGE_FILE)
    yield _convert(recipe, base.scratch, "megatron", base.megatron)
    for source in sources:
        yield from _tokenise(recipe, run, base, source, base.scratch)
    yield _train(recipe, base, stage)
    yield _convert(recipe, base.checkpoints(stage.name), "hf", base.export(stage.name))


def plan_adaptation(recipe: Recipe, run: RunFolder, base_model: Path) -> Iterator[Command]:
    """Yield the calls from the base model to the exports of every training stage."""
    new, old = (
        tuple(run.corpus_part(source, "train") for source in recipe.list_texts(*languages))
        for languages in (recipe.new_languages, recipe.old_languages)
    )
    build = BuildTokenizer(
        base=base_model,
        corpus=new,
        old_corpus=old,
        output=run.tokenizer,
        overwrite=True,
        settings=recipe.tokenizer,
    )
    yield Command("build_tokenizer", build, run.tokenizer / STAGE_FILE)
    resize = ResizeVocab(
        model=base_model,
        tokenizer=run.tokenizer,
        output=run.resized,
        corpus=new if recipe.vocab.method == "align" else (),
        overwrite=True,
        settings=recipe.vocab,
    )
    yield Command("resize_vocab", resize, run.resized / STAGE_FILE)
    yield _convert(recipe, run.resized, "megatron", run.megatron)
    for source in recipe.list_sources(*recipe.old_languages, *recipe.new_languages):
        yield from _tokenise(recipe, run, run, source, run.tokenizer)
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


def run_commands(commands: list[Command], recipe: Recipe, tools: Path) -> None:
    """Run the commands that are not finished, each as its own process.

    Raises:
        CheckpointError: a training stage was finished under other settings or on another plan; nothing is thrown
            away unasked.
        SystemExit: a command failed; its own message stands above, its exit code is passed on.
    """
    for number, command in enumerate(commands, start=1):
        title = f"[{number}/{len(commands)}] {command.tool} {command.stage}".rstrip()
        if command.is_finished():
            if command.stage:
                check_trained(recipe, command.stage)
            _logger.info("%s: finished before", title)
            continue
        argv = _make_argv(command, recipe, tools)
        _logger.info("%s: %s", title, shlex.join(argv))
        code = subprocess.run(argv, check=False, env=_make_environment(command, recipe)).returncode
        if code:
            _logger.error("%s: failed with exit code %d; the lines above say why", title, code)
            raise SystemExit(code)
        if not command.record.is_file():
            _logger.info("%s: stopped before its end, as asked; the same call continues", title)
            raise SystemExit(0)


def _make_environment(command: Command, recipe: Recipe) -> dict[str, str]:
    """Share the cores between the ranks of a training stage; other tools take them all."""
    if not command.stage:
        return dict(os.environ)
    threads = max(1, (os.cpu_count() or 1) // recipe.train.nproc_per_node)
    return {"OMP_NUM_THREADS": str(threads), **os.environ}


def _make_argv(command: Command, recipe: Recipe, tools: Path) -> list[str]:
    tool = str(tools / f"{command.tool}.py")
    if not command.stage:
        return [sys.executable, tool, *to_flags(command.config)]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(recipe.train.nproc_per_node)]
    return [sys.executable, *launch, tool, "--recipe", str(recipe.work_dir / "recipe.json"), "--stage", command.stage]


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
            f"{stage.tokens:,} tokens, blend {blend}, learns {stage.trainable}, lr {stage.lr:g}"
        )
    for language in (*recipe.old_languages, *recipe.new_languages):
        parts = {name: counts.get(language, 0) for name, counts in tokens.items()}
        listed = ", ".join(f"{count:,} in {name}" for name, count in parts.items())
        facts[f"tokens of {language}"] = f"{sum(parts.values()):,} ({listed})"
    return facts
