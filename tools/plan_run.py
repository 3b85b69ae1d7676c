"""Say what training takes on so many ranks, without one of them: memory per rank, time, checkpoints, communication.

``python tools/plan_run.py --recipe examples/llama2_70b_japanese/recipe.toml --world-size 256 --device a100-40``
A base model that is not on this machine: ``--config config.json``. Settings of the recipe are flags, too:
``--train.tensor-model-parallel-size 8``.
"""

from megatron_adapt.config import PlanRun
from megatron_adapt.flags import load_recipe_with, run_tool

if __name__ == "__main__":
    recipe, config = load_recipe_with(PlanRun)
    from megatron_adapt.train.plan_run import plan_run

    run_tool(plan_run, recipe, config)
