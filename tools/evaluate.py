"""Score Hugging Face folders in bits per byte per language.

``python tools/evaluate.py --models base=DIR adapted=DIR --corpora en=valid.jsonl.zst --json evaluation.json``
"""

from megatron_adapt.config import Evaluate
from megatron_adapt.flags import load_config, run_tool

if __name__ == "__main__":
    config = load_config(Evaluate)
    from megatron_adapt.evaluate.bits_per_byte import evaluate

    run_tool(evaluate, config)
