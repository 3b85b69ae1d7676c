"""Fill the rows of new tokens in every way of a recipe's [compare.NAME] tables, train from each, and compare.

``python tools/compare_init.py --recipe examples/compare_init/recipe.toml``
"""

from pathlib import Path

from megatron_adapt.flags import load_recipe, run_tool

if __name__ == "__main__":
    recipe, _ = load_recipe()
    from megatron_adapt.compare import compare_init

    run_tool(compare_init, recipe, Path(__file__).parent)
