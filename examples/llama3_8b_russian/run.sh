#!/usr/bin/env bash
# What needs no GPU, once:      examples/llama3_8b_russian/run.sh prepare --corpus.en F... --corpus.ru F...
# A stage on a node of 8 GPUs:  examples/llama3_8b_russian/run.sh embeddings [flags of tools/pretrain.py]
# On several, on each of them:  NNODES=4 HEAD_NODE=HOST examples/llama3_8b_russian/run.sh embeddings
# A stage that is called again goes on from its last checkpoint.
set -euo pipefail
cd "$(dirname "$0")/../.."
recipe=examples/llama3_8b_russian/recipe.toml
if [[ $1 == prepare ]]; then exec "${PYTHON:-python}" examples/prepare.py --recipe "$recipe" "${@:2}"; fi
# A restart (MAX_RESTARTS=3) needs the variable: without it the new ranks look for the old ones.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes "${NNODES:-1}" --nproc-per-node "${NPROC_PER_NODE:-8}" --rdzv-id "${RUN_ID:-llama3_8b_russian}" \
    --rdzv-backend c10d --rdzv-endpoint "${HEAD_NODE:-localhost}:${PORT:-29500}" --max-restarts "${MAX_RESTARTS:-0}" \
    tools/pretrain.py --recipe "$recipe" --stage "$1" "${@:2}"
