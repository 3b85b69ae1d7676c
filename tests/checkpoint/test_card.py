import json
import re

import pytest

from megatron_adapt.checkpoint.card import OPEN, RunFacts, render_card, write_card
from megatron_adapt.checkpoint.hf import read_hf_shape
from tests.helpers.tiny import write_llama

FACTS = RunFacts(
    base_model="Small-1B", languages_old=("en",), languages_new=("no", "quenya"), report="## Bits per byte\n\n| a | b |"
)


@pytest.fixture
def shape(tmp_path):
    return read_hf_shape(write_llama(tmp_path / "model"))


def read_metadata(card):
    return re.match(r"---\n(.*?)\n---\n", card, re.S)[1].splitlines()


def test_a_card_says_what_is_known_and_leaves_the_rest_open_by_name(shape):
    card = render_card(name="mine", shape=shape, step=1200, facts=FACTS)
    assert f"{shape.num_parameters:,} parameters, 300 tokens and 128 positions" in card
    assert "adapted from Small-1B (en) to no, quenya." in card
    assert "after 1,200 steps" in card
    assert "## Bits per byte\n\n| a | b |\n" in card
    assert 'from_pretrained("mine"' in card
    opened = re.findall(r"\| (.*?) \| " + re.escape(OPEN), card)
    assert opened == ["licence", "training data: sources, licences, dates", "intended use and limits", "contact"]


def test_without_a_run_what_it_would_have_said_is_open_too(shape):
    card = render_card(name="mine", shape=shape, step=0)
    for field in ("licence", "base model", "languages, and tokens of each", "recipe", "bits per byte before and after"):
        assert f"| {field} | {OPEN} |" in card
    assert "adapted from" not in card
    assert "steps" not in card


def test_metadata_are_yaml_that_names_no_licence_and_codes_of_languages_only(shape):
    lines = read_metadata(render_card(name="mine", shape=shape, step=0, facts=FACTS))
    assert lines == [
        "library_name: transformers", "pipeline_tag: text-generation", "language:", '- "en"', '- "no"',
    ]  # fmt: skip
    assert [json.loads(line.removeprefix("- ")) for line in lines[-2:]] == ["en", "no"], "no is not false"


def test_the_file_is_written_whole(tmp_path, shape):
    folder = tmp_path / "out"
    write_card(folder, name="mine", shape=shape, step=3, facts=FACTS)
    assert [file.name for file in folder.iterdir()] == ["README.md"]
    assert (folder / "README.md").read_text() == render_card(name="mine", shape=shape, step=3, facts=FACTS)
