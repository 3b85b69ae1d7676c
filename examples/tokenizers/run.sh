#!/usr/bin/env bash
# Compare the ways to extend a tokenizer, on your own text; a second call skips what is finished:
#   examples/tokenizers/run.sh --corpora en=en.jsonl.zst ja=ja.jsonl.zst ru=ru.jsonl.zst --old en --bases llama=DIR
set -euo pipefail
cd "$(dirname "$0")/../.."
"${PYTHON:-python}" examples/tokenizers/compare.py "$@"
