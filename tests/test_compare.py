"""Ways to fill new rows, measured against each other on a tiny recipe."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_adapt.compare import compare_init, render_comparison
from megatron_adapt.config import VocabSettings
from megatron_adapt.errors import ConfigError
from megatron_adapt.flags import load_recipe
from tests.helpers.runs import make_run

ROOT = Path(__file__).parents[1]
WAYS = '[compare.mean]\nmethod = "mean"\n\n[compare.pieces]\nmethod = "subtoken_mean"\n'


def write_recipe(folder, ways=WAYS):
    path = make_run(folder)
    path.write_text(path.read_text() + ways)
    return path


def load(path, *flags):
    return load_recipe(["--recipe", str(path), *flags])[0]


def compare(path, *flags):
    command = [sys.executable, "tools/compare_init.py", "--recipe", str(path), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)


SMALL = "--tokenizer.size 20 --train.eval-interval 2 --train.stages.0.tokens 800".split()


@pytest.mark.slow
def test_every_way_trains_on_the_same_windows_and_is_measured_once(tmp_path):
    path = write_recipe(tmp_path)
    documents = tmp_path / "raw"
    for language in ("en", "xx"):
        whole = (documents / f"{language}-train.jsonl").read_text() + (
            documents / f"{language}-valid.jsonl"
        ).read_text()
        (documents / f"{language}.jsonl").write_text(whole)
    result = compare(path, *SMALL)
    assert result.returncode == 0, result.stderr[-3000:]
    run = tmp_path / "run"
    found = json.loads((run / "compare.json").read_text())
    assert list(found) == ["mean", "pieces"]
    for way in found.values():
        assert [point["tokens"] for point in way["curve"]] == [0, 2 * 192, 4 * 192, 5 * 192]
        assert set(way["curve"][0]["bits_per_byte"]) == {"en", "xx"}
        assert way["fill"]["seconds"] > 0
        assert way["fill"]["peak_mib"] > 1
    starts = [way["curve"][0]["bits_per_byte"] for way in found.values()]
    assert starts[0]["xx"] != starts[1]["xx"]
    for language in ("en", "xx"):
        assert (run / f"compare-{language}.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "compare.md").read_text().count("\n") == 4
    assert sorted(item.name for item in (run / "compare" / "mean").iterdir()) == [
        "corpus", "fill.json", "recipe.json", "stage.json", "tokenizer", "tokens",
    ]  # fmt: skip
    again = compare(path, *SMALL)
    assert again.stderr.count("measured before") == 2
    changed = compare(path, *SMALL, "--compare.mean.norm", "median")
    assert changed.returncode == 0, changed.stderr[-3000:]
    assert changed.stderr.count("measured before") == 1
    assert json.loads((run / "compare.json").read_text())["mean"] != found["mean"]


def test_a_recipe_that_compares_nothing_is_refused(tmp_path):
    recipe = load(make_run(tmp_path))
    with pytest.raises(ConfigError, match=r"compare: the recipe needs new_languages and a table \[compare.NAME\]"):
        compare_init(recipe, ROOT / "tools")
    with pytest.raises(ConfigError, match=r"compare\.a b: the name must be a plain word; rename the table"):
        replace(recipe, compare={"a b": VocabSettings()})


def test_the_table_has_a_row_for_each_way_and_both_ends_of_each_curve():
    curve = [{"tokens": 0, "bits_per_byte": {"xx": 2.0}}, {"tokens": 1500, "bits_per_byte": {"xx": 1.0}}]
    table = render_comparison({"mean": {"fill": {"seconds": 1.25, "peak_mib": 300.4}, "curve": curve}}, ["xx"])
    assert table.splitlines() == [
        "| method | fill s | fill MiB | xx at 0 | xx at 1,500 |",
        "| --- | --: | --: | --: | --: |",
        "| mean | 1.2 | 300 | 2.0000 | 1.0000 |",
    ]
