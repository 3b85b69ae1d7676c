"""A recipe of two languages, Japanese from two sources, and its token files."""

from pathlib import Path
from typing import Any

from megatron_adapt.config import StageSettings, TrainSettings
from megatron_adapt.recipe import Recipe
from tests.data.token_files import count_up, make_tokens

SEQ_LENGTH = 10
TOKENS = {"ja/wiki": 501, "ja/web": 251, "en": 901}
WINDOWS = {"ja/wiki": 50, "ja/web": 25, "en": 90}


def make_stage(**changes: Any) -> StageSettings:
    return StageSettings(**{"name": "full", "tokens": 1000, "blend": {"ja": 0.9, "en": 0.1}, **changes})


def make_recipe(work_dir: Path, *stages: StageSettings, **changes: Any) -> Recipe:
    train = TrainSettings(stages=stages, seq_length=SEQ_LENGTH, global_batch_size=4, **changes.pop("train", {}))
    values: dict[str, Any] = {
        "work_dir": work_dir,
        "old_languages": ("en",),
        "new_languages": ("ja",),
        "corpus": {source: (f"{source}.jsonl",) for source in TOKENS},
        "base_model": Path("base"),
        "train": train,
    }
    return Recipe(**{**values, **changes})


def make_sources(work_dir: Path) -> None:
    """Write token files of 7 tokens a document; ids from 0, 10000 and 20000 tell source and place."""
    for number, (source, num_tokens) in enumerate(TOKENS.items()):
        make_tokens(work_dir / "tokens" / f"{source}-train", count_up(10_000 * number, num_tokens), vocab_size=30_000)
