"""Recipe: a whole adaptation as one TOML file, read strictly.

A key that no config class knows is refused with the nearest known name; a value of a wrong type with its place.
The JSON that a run saves as its resolved recipe reads back equal.
"""

import difflib
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_adapt.config import (
    BaseSettings,
    CheckpointSettings,
    CorpusSettings,
    DataSettings,
    EvaluateSettings,
    ParallelSettings,
    StageSettings,
    TokenizerSettings,
    TrainSettings,
    VocabSettings,
)
from megatron_adapt.config.names import get_language, is_source_name
from megatron_adapt.errors import ConfigError
from megatron_adapt.files import read_json
from megatron_adapt.shape import LlamaShape


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole adaptation: one TOML file."""

    work_dir: Path
    "Folder of the run; every stage writes its own folder in it."
    old_languages: tuple[str, ...]
    "Languages the base model knows and must keep."
    new_languages: tuple[str, ...]
    "Languages it shall learn."
    corpus: dict[str, tuple[str, ...]]
    "Files of raw documents per language; a language of several sources has LANGUAGE/SOURCE for each."
    base_model: Path | None = None
    "Hugging Face folder of the base model. Without it, [base] and [base_train] make one from scratch."
    prepare: CorpusSettings = field(default_factory=CorpusSettings)
    parallel: dict[str, ParallelSettings] = field(default_factory=dict)
    "Sources whose files hold pairs of translated texts, such as ja/parallel, and what becomes of the pairs."
    base: BaseSettings | None = None
    base_train: StageSettings | None = None
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)
    vocab: VocabSettings = field(default_factory=VocabSettings)
    compare: dict[str, VocabSettings] = field(default_factory=dict)
    "Ways to fill new rows that tools/compare_init.py measures against each other, each with a name."
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    data: DataSettings = field(default_factory=DataSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)

    def __post_init__(self) -> None:
        for language in sorted(set(self.old_languages) & set(self.new_languages)):
            raise ConfigError(f"new_languages: {language!r} is among old_languages too; keep it in one")
        self._check_corpus()
        stages = (*self.train.stages, *([self.base_train] if self.base_train else []))
        for stage in stages:
            self._check_stage(stage)
        if self.train.z_loss and stages and all(stage.objective == "token_distillation" for stage in stages):
            raise ConfigError(
                f"train.z_loss: {self.train.z_loss} has no effect, all stages are token_distillation, which has no "
                "softmax; leave it out"
            )
        for name in self.compare:
            if not re.fullmatch(r"\w[\w.-]*", name):
                raise ConfigError(f"compare.{name}: the name must be a plain word; rename the table")
        for stage in self.train.stages:
            taken = ("base", "resized", *([self.base_train.name] if self.base_train else []))
            if stage.name in taken:
                raise ConfigError(f"train.stages {stage.name}: the name is taken by another model; rename the stage")

    def list_sources(self, *languages: str) -> tuple[str, ...]:
        """Return the sources of languages: ``ja``, or ``ja/wiki`` and ``ja/web``."""
        return tuple(source for language in languages for source in self.corpus if get_language(source) == language)

    def list_texts(self, *languages: str) -> tuple[str, ...]:
        """Return the sources of languages that hold their text alone: no pairs of translations."""
        return tuple(source for source in self.list_sources(*languages) if source not in self.parallel)

    def list_stage_sources(self, stage: StageSettings) -> tuple[str, ...]:
        """Return the sources that a stage reads: all of its languages', or those it gives a weight."""
        sources: list[str] = []
        for language in stage.blend:
            own = self.list_sources(language)
            weighted = [source for source in own if source in stage.weights]
            sources += weighted if stage.within == "weight" and len(own) > 1 else own
        return tuple(sources)

    def _check_corpus(self) -> None:
        languages = set(self.old_languages) | set(self.new_languages)
        for source in self.corpus:
            if not is_source_name(source):
                raise ConfigError(
                    f"corpus.{source}: no name of a corpus; write LANGUAGE, or LANGUAGE/SOURCE for one of several"
                )
            language = get_language(source)
            if language not in languages:
                raise ConfigError(
                    f"corpus.{source}: {language!r} is not among old_languages and new_languages; add it or correct "
                    "the name"
                )
            if source in self.parallel and source == language:
                raise ConfigError(
                    f"parallel.{source}: is all of {language}; name it {language}/parallel, beside its text"
                )
            if source != language and language in self.corpus:
                raise ConfigError(f"corpus.{language}: there is {source} too; name both {language}/SOURCE")
        for source in sorted(set(self.parallel) - set(self.corpus)):
            raise ConfigError(f"parallel.{source}: no files; add corpus.{source} to the recipe")
        for language in sorted(languages - set(map(get_language, set(self.corpus) - set(self.parallel)))):
            raise ConfigError(f"corpus: no files for {language!r}; add corpus.{language} to the recipe")

    def _check_stage(self, stage: StageSettings) -> None:
        where = f"train.stages {stage.name}"
        for language in sorted(set(stage.blend) - set(self.old_languages) - set(self.new_languages)):
            raise ConfigError(f"{where}: blend.{language} is not among old_languages and new_languages")
        sources = self.list_sources(*stage.blend)
        _check_names(f"{where}: weights", stage.weights, sources)
        weighted = set(map(get_language, stage.weights))
        for language in stage.blend:
            if stage.within == "weight" and language not in weighted and len(self.list_sources(language)) > 1:
                raise ConfigError(f"{where}: weights name no source of {language!r}; name those it shall read")
        _check_names(f"{where}: max_epochs", stage.max_epochs, (*stage.blend, *self.list_stage_sources(stage)))


def _check_names(where: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Refuse a name that a stage does not read."""
    known = list(dict.fromkeys(known))
    for name in names:
        if name not in known:
            raise ConfigError(f"{where}.{name}: the stage reads nothing of that name; use {', '.join(known)}")


def read_recipe(path: Path) -> Recipe:
    """Read a recipe: TOML, or the JSON that a run saves as its resolved recipe.

    Raises:
        ConfigError: the file is missing, is no TOML, or has an unknown key or a value of a wrong type.
    """
    if not path.is_file():
        raise ConfigError(f"--recipe: {path} is not a file; check the path")
    if path.suffix == ".json":
        table = read_json(path)
    else:
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: no valid TOML ({error}); correct the line") from None
    return typing.cast(Recipe, _build(Recipe, table, str(path), ""))


def make_base_shape(base: BaseSettings) -> LlamaShape:
    """Return the shape of a base model that is made from scratch."""
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


def _build(kind: Any, value: Any, where: str, key: str) -> Any:
    """Turn a TOML value into ``kind``; ``key`` is the dotted name for messages."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        choices = [part for part in parts if part is not type(None)]
        # A word of a Literal, or what the last choice says.
        named = [part for part in choices[:-1] if value in typing.get_args(part)]
        return None if value is None else _build((named or choices[-1:])[0], value, where, key)
    if is_dataclass(kind):
        return _build_dataclass(kind, value, where, key)
    if origin is tuple and isinstance(value, list):
        return tuple(_build(parts[0], item, where, f"{key}[{at}]") for at, item in enumerate(value))
    if origin is tuple and isinstance(value, str):
        return (_build(parts[0], value, where, key),)
    if origin is dict and isinstance(value, Mapping):
        return {name: _build(parts[1], item, where, f"{key}.{name}") for name, item in value.items()}
    if origin is Literal and value in parts:
        return value
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and type(value) is int:
        return float(value)
    if isinstance(kind, type) and type(value) is kind:
        return value
    expected = " or ".join(map(repr, parts)) if origin is Literal else getattr(kind, "__name__", str(kind))
    raise ConfigError(f"{where}: {key}: {value!r} is not {expected}; correct the value")


def _build_dataclass(kind: Any, value: Any, where: str, key: str) -> Any:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: {key}: {value!r} is no table; write it as [{key}]")
    hints = typing.get_type_hints(kind)
    prefix = f"{key}." if key else ""
    for name in value:
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1)
            advice = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(hints)}"
            raise ConfigError(f"{where}: {prefix}{name}: unknown setting; {advice}")
    # A misspelt name deeper down explains a missing one better than the other way round.
    built = {name: _build(hints[name], item, where, f"{prefix}{name}") for name, item in value.items()}
    for item in fields(kind):
        required = item.default is MISSING and item.default_factory is MISSING
        if required and item.name not in value:
            raise ConfigError(f"{where}: {prefix}{item.name}: missing; add it to the recipe")
    try:
        return kind(**built)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
