"""Convert a Hugging Face folder to a Megatron checkpoint, or back.

``python tools/convert_checkpoint.py --source DIR --to megatron --output DIR --verify``
"""

from megatron_adapt.config import ConvertCheckpoint
from megatron_adapt.flags import load_config, run_tool

if __name__ == "__main__":
    config = load_config(ConvertCheckpoint)
    from megatron_adapt.checkpoint.convert import convert_checkpoint

    run_tool(convert_checkpoint, config)
