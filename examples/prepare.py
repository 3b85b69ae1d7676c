"""Do what of a recipe needs no GPU: corpus, tokenizer, tokens, new rows, the checkpoint that training starts from.

``python examples/prepare.py --recipe examples/llama2_7b_arabic/recipe.toml --corpus.ar ar.jsonl.zst ...``: the stages
of ``tools/adapt.py`` before the first training, for runs whose training is launched on many nodes. What is finished is
skipped; ``tools/adapt.py`` skips it later, too.
"""

from itertools import takewhile
from pathlib import Path

from megatron_adapt.commands import run_commands
from megatron_adapt.errors import ConfigError
from megatron_adapt.files import write_json
from megatron_adapt.flags import load_recipe, run_tool
from megatron_adapt.pipeline import check_corpus, plan_corpus, plan_training, plan_vocabulary
from megatron_adapt.recipe import Recipe
from megatron_adapt.run_folder import RunFolder


def prepare(recipe: Recipe) -> None:
    """Run the commands of a recipe up to its first training stage."""
    if recipe.base_model is None:
        raise ConfigError("base_model: missing; name the folder of the model to adapt")
    check_corpus(recipe)
    run = RunFolder(recipe.work_dir)
    write_json(run.root / "recipe.json", recipe)
    before_training = takewhile(lambda command: not command.stage, plan_training(recipe, run, recipe.base_model))
    commands = [*plan_corpus(recipe, run), *plan_vocabulary(recipe, run, recipe.base_model), *before_training]
    run_commands(commands, recipe, Path(__file__).parents[1] / "tools")


if __name__ == "__main__":
    run_tool(prepare, load_recipe()[0])
