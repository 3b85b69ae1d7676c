"""Show how many windows of each source every training stage of a recipe reads, before any of them runs.

``python tools/plan_blend.py --recipe examples/quickstart/recipe.toml`` (after its corpus was tokenised)
"""

from megatron_adapt.flags import load_recipe, run_tool

if __name__ == "__main__":
    recipe, _ = load_recipe()
    from megatron_adapt.data.plan_table import show_plans

    run_tool(show_plans, recipe)
