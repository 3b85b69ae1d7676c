"""Give a model the rows of an extended tokenizer.

``python tools/resize_vocab.py --model DIR --tokenizer DIR --method subtoken_mean --output DIR``
"""

from megatron_adapt.config import ResizeVocab
from megatron_adapt.flags import load_config, run_tool

if __name__ == "__main__":
    config = load_config(ResizeVocab)
    from megatron_adapt.vocab.resize import resize_vocab

    run_tool(resize_vocab, config)
