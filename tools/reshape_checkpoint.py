"""Make new weights out of Megatron checkpoints: without optimizer, averaged, or with more blocks.

``python tools/reshape_checkpoint.py strip --source run/checkpoints/full --output weights --dtype bfloat16``
``python tools/reshape_checkpoint.py average --sources iter_0000100 iter_0000200 --output mean``
``python tools/reshape_checkpoint.py expand --source run/megatron --output wider --blocks 8``
"""

from typing import Any

from megatron_adapt.config import AverageCheckpoints, ExpandBlocks, StripCheckpoint
from megatron_adapt.flags import load_command, run_tool

if __name__ == "__main__":
    name, config = load_command({"strip": StripCheckpoint, "average": AverageCheckpoints, "expand": ExpandBlocks})
    from megatron_adapt.checkpoint.reshape import average_checkpoints, expand_blocks, strip_checkpoint

    entries: dict[str, Any] = {"strip": strip_checkpoint, "average": average_checkpoints, "expand": expand_blocks}
    run_tool(entries[name], config)
