"""A run folder whose model has rows of new tokens, made in the test: the run of ``helpers.runs``, resized."""

import shutil
from pathlib import Path
from typing import Any

from megatron_adapt.config import ResizeVocab
from megatron_adapt.vocab.resize import resize_vocab
from tests.helpers.runs import encode_documents, make_run
from tests.helpers.tiny import write_extended_tokenizer

LETTERS = [("á", "ĥ"), *(("áĥ", last) for last in "ĳĲĴ£ĵĺķĿ")]
"Merges of the three bytes of letters of the second language, as byte-level pieces."
NEW_IDS = list(range(300, 300 + len(LETTERS)))


def make_extended_run(folder: Path, *, stage: str, **model: Any) -> Path:
    """Write everything a training stage reads, cut by an extended tokenizer; return the recipe.

    ``stage`` replaces what the first stage of the recipe trains: lines of its table.
    """
    recipe = make_run(folder, **model)
    run = folder / "run"
    tokenizer = write_extended_tokenizer(folder / "hf", folder / "tokenizer", LETTERS)
    (run / "megatron").rename(run / "base")
    resize_vocab(ResizeVocab(model=run / "base", tokenizer=tokenizer, output=run / "megatron", vocab_pad_multiple=128))
    shutil.rmtree(run / "tokens")
    encode_documents(folder / "raw", tokenizer, run / "tokens")
    text = recipe.read_text()
    assert text.count('trainable = "all"') == 1
    recipe.write_text(text.replace('trainable = "all"', stage))
    return recipe
