"""Compare tokenizers on corpora: tokens per word, character and byte, single-token words, use of the vocabulary.

``python tools/measure_tokenizer.py --tokenizers base=DIR new=DIR --corpora en=en.jsonl.zst ar=ar.jsonl.zst``
"""

from megatron_adapt.config import MeasureTokenizer
from megatron_adapt.flags import load_config, run_tool

if __name__ == "__main__":
    config = load_config(MeasureTokenizer)
    from megatron_adapt.tokenizer.measure import measure_tokenizer

    run_tool(measure_tokenizer, config)
