"""Split raw text into training and validation documents, without exact duplicates.

``python tools/prepare_corpus.py --input raw.jsonl.zst --output corpus/ar --valid-share 0.02``
"""

from megatron_adapt.config import PrepareCorpus
from megatron_adapt.flags import load_config, run_tool

if __name__ == "__main__":
    config = load_config(PrepareCorpus)
    from megatron_adapt.corpus.prepare import prepare_corpus

    run_tool(prepare_corpus, config)
