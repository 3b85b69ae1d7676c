"""Run a whole adaptation: every stage of a recipe, skipping those that are finished.

``python tools/adapt.py --recipe examples/quickstart/recipe.toml``
"""

from pathlib import Path

from megatron_adapt.flags import load_recipe, run_tool

if __name__ == "__main__":
    recipe, _ = load_recipe()
    from megatron_adapt.pipeline import adapt

    run_tool(adapt, recipe, Path(__file__).parent)
