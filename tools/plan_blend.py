"""Show how many windows of each language every training stage of a recipe reads.

``python tools/plan_blend.py --recipe examples/quickstart/recipe.toml`` (after its corpus was tokenised)
"""

import sys

from megatron_adapt.flags import load_recipe, run_tool

if __name__ == "__main__":
    recipe, _ = load_recipe()
    from megatron_adapt.data.plan import describe_stages

    run_tool(lambda: sys.stdout.write(f"{describe_stages(recipe)}\n"))
