"""Run one training stage of a recipe, or continue it; under torchrun on as many ranks as the layout needs.

``torchrun --nproc-per-node 2 tools/pretrain.py --recipe examples/quickstart/recipe.toml --stage embeddings``
"""

from megatron_adapt.flags import load_recipe, run_tool

if __name__ == "__main__":
    recipe, stage = load_recipe(stage=True)
    from megatron_adapt.train.loop import train

    run_tool(train, recipe, stage)
