"""Compare tokenizers on corpora: fertility, parity, use of the vocabulary; or extensions of one by several sizes.

``python tools/measure_tokenizer.py --tokenizers base=DIR new=DIR --corpora en=en.jsonl.zst ar=ar.jsonl.zst``
``python tools/measure_tokenizer.py --sweep 25 50 75 100 --base DIR --corpus ar.jsonl.zst --scripts Arabic
--model-shape DIR --corpora en=en-valid.jsonl.zst ar=ar-valid.jsonl.zst``
"""

from megatron_adapt.config import MeasureTokenizer
from megatron_adapt.flags import load_config, run_tool

if __name__ == "__main__":
    config = load_config(MeasureTokenizer)
    from megatron_adapt.tokenizer.measure import measure_tokenizer

    run_tool(measure_tokenizer, config)
