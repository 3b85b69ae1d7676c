"""Let an instruct model answer prompts, as data that calibrates its adapted version.

``python tools/make_calibration.py --prompts prompts.jsonl --model DIR --output calibration.jsonl.zst``
``python tools/make_calibration.py --prompts prompts.jsonl --server URL --tokenizer DIR --output calibration.jsonl.zst``
"""

from megatron_adapt.config import MakeCalibration
from megatron_adapt.flags import load_config, run_tool

if __name__ == "__main__":
    config = load_config(MakeCalibration)
    from megatron_adapt.evaluate.calibration import make_calibration

    run_tool(make_calibration, config)
