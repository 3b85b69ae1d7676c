"""Say what is in a checkpoint: model, vocabulary, training position, tensors.

``python tools/inspect_checkpoint.py --folder DIR``
"""

from megatron_adapt.config import InspectCheckpoint
from megatron_adapt.flags import load_config, run_tool

if __name__ == "__main__":
    config = load_config(InspectCheckpoint)
    from megatron_adapt.checkpoint.inspect import inspect_checkpoint

    run_tool(inspect_checkpoint, config)
