"""Tokenise documents into PREFIX.bin and PREFIX.idx, readable by megatron-core.

``python tools/preprocess_data.py --input corpus.jsonl.zst --tokenizer DIR --output-prefix tokens/ar --append-eod``
"""

from megatron_adapt.config import PreprocessData
from megatron_adapt.flags import load_config, run_tool

if __name__ == "__main__":
    config = load_config(PreprocessData)
    from megatron_adapt.data.encode import preprocess_data

    run_tool(preprocess_data, config)
