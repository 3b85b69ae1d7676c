"""Write a Hugging Face folder with a new tokenizer and random weights, for demos and tests.

``python tools/create_base.py --corpus corpus/en/train-00000.jsonl.zst --output base --vocab-size 8192``
"""

from megatron_adapt.config import CreateBase
from megatron_adapt.flags import load_config, run_tool

if __name__ == "__main__":
    config = load_config(CreateBase)
    from megatron_adapt.scratch import create_base

    run_tool(create_base, config)
