"""The recipes of large models: they read, their plans come out as committed, their scripts are sound."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_adapt.config import PlanRun
from megatron_adapt.flags import load_recipe_with
from megatron_adapt.train.plan_run import find_shape, plan_run

ROOT = Path(__file__).parents[2]
NAMES = ("llama2_7b_arabic", "llama2_13b_hindi", "llama2_70b_japanese", "llama3_8b_russian")
QUICK = "llama3_8b_russian"
NUMBER = re.compile(r"\d[\d,]*\.?\d*(?:e[+-]?\d+)?")


def load(name):
    """Read the recipe as the first line of its plan.txt calls it."""
    command, _, plan = (ROOT / "examples" / name / "plan.txt").read_text().partition("\n")
    recipe, config = load_recipe_with(PlanRun, shlex.split(command)[3:])
    return recipe, config, plan


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    "name", [name if name == QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_a_recipe_takes_what_its_plan_says(name, capsys):
    recipe, config, plan = load(name)
    plan_run(recipe, config)
    made = capsys.readouterr().out
    assert NUMBER.sub("#", made).split() == NUMBER.sub("#", plan).split()
    numbers = [[float(number.replace(",", "")) for number in NUMBER.findall(text)] for text in (made, plan)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.02)
    assert "does not fit" not in made


def test_vocabularies_are_the_published_ones():
    sizes = {}
    for name in NAMES:
        recipe, config, _ = load(name)
        sizes[name] = find_shape(recipe, config.config).vocab_size
    assert sizes == dict(zip(NAMES, (64_000, 40_000, 43_176, 174_816), strict=True))


def test_steps_are_the_published_ones():
    recipe, _, _ = load("llama2_70b_japanese")
    (stage,) = recipe.train.stages
    assert stage.tokens == 25_000 * recipe.train.global_batch_size * recipe.train.seq_length
    assert round(stage.lr_warmup_fraction * 25_000) == 1_000
    recipe, _, _ = load("llama3_8b_russian")
    (stage,) = recipe.train.stages
    steps = stage.tokens / (recipe.train.global_batch_size * recipe.train.seq_length)
    assert stage.lr_warmup_fraction * steps == pytest.approx(100, rel=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_scripts_name_stages_of_their_recipe_and_the_ranks_of_its_plan(name):
    folder = ROOT / "examples" / name
    recipe, config, _ = load(name)
    stages = {stage.name for stage in recipe.train.stages}
    for script in ("run.sh", "slurm.sbatch"):
        assert subprocess.run(["bash", "-n", folder / script], check=False).returncode == 0
        text = (folder / script).read_text()
        named = set(re.findall(rf"examples/{name}/(?:run\.sh|slurm\.sbatch) (\w+)", text))
        assert named - {"prepare"} <= stages
        assert named
    nodes = int(re.search(r"--nodes=(\d+)", text)[1])
    assert 8 * nodes == config.world_size
    assert re.search(r"^#SBATCH --requeue$", text, re.MULTILINE)


def test_prepare_names_the_corpus_that_is_missing():
    command = ["bash", ROOT / "examples" / QUICK / "run.sh", "prepare"]
    environment = {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    assert "corpus.en: names no file; add --corpus.en FILE" in done.stderr
