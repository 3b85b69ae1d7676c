#!/usr/bin/env bash
# English to Japanese on your own text:  examples/small_ja/run.sh --corpus.en en.jsonl.zst --corpus.ja ja.jsonl.zst
# A second call skips what is finished. Other flags go to tools/adapt.py, for example --work-dir runs/other.
set -euo pipefail
cd "$(dirname "$0")/../.."
"${PYTHON:-python}" tools/adapt.py --recipe examples/small_ja/recipe.toml "$@"
