#!/usr/bin/env bash
# Write a synthetic corpus, then adapt: base, tokenizer, new rows, two training stages, export, report.
# A second call skips what is finished. Flags go to tools/adapt.py, for example --train.bf16.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python}
if [ ! -f runs/quickstart/raw/qx.jsonl ]; then
    rm -rf runs/quickstart/raw.partial
    "$PYTHON" examples/quickstart/make_corpus.py --output runs/quickstart/raw.partial
    mv runs/quickstart/raw.partial runs/quickstart/raw
fi
"$PYTHON" tools/adapt.py --recipe examples/quickstart/recipe.toml "$@"
