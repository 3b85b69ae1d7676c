"""Make the tokenizer of a new language out of a base tokenizer and a corpus.

``python tools/build_tokenizer.py --base DIR --corpus ar.jsonl.zst --size 32000 --scripts Arabic --output DIR``
"""

from megatron_adapt.config import BuildTokenizer
from megatron_adapt.flags import load_config, run_tool

if __name__ == "__main__":
    config = load_config(BuildTokenizer)
    from megatron_adapt.tokenizer.build import build_tokenizer

    run_tool(build_tokenizer, config)
