"""Turn pairs of translated sentences into training and validation documents, in both directions.

``python tools/prepare_parallel.py --input pairs.jsonl.zst --languages en ja --output corpus/en-ja``
"""

from megatron_adapt.config import PrepareParallel
from megatron_adapt.flags import load_config, run_tool

if __name__ == "__main__":
    config = load_config(PrepareParallel)
    from megatron_adapt.corpus.parallel import prepare_parallel

    run_tool(prepare_parallel, config)
