"""Check a Hugging Face folder, write its checksums, and push it to the Hub.

``python tools/release_model.py --model run/export/full --push-to-hub USER/NAME``
"""

from megatron_adapt.config import ReleaseModel
from megatron_adapt.flags import load_config, run_tool

if __name__ == "__main__":
    config = load_config(ReleaseModel)
    from megatron_adapt.checkpoint.release import release_model

    run_tool(release_model, config)
