#!/usr/bin/env bash
# What needs no GPU, once:      examples/llama2_70b_japanese/run.sh prepare --corpus.en/arxiv F... --corpus.en/refinedweb F... --corpus.ja F...
# On each of 32 nodes:          NNODES=32 HEAD_NODE=HOST examples/llama2_70b_japanese/run.sh full
# A stage that is called again goes on from its last checkpoint.
set -euo pipefail
cd "$(dirname "$0")/../.."
recipe=examples/llama2_70b_japanese/recipe.toml
if [[ $1 == prepare ]]; then exec "${PYTHON:-python}" examples/prepare.py --recipe "$recipe" "${@:2}"; fi
# A restart (MAX_RESTARTS=3) needs the variable: without it the new ranks look for the old ones.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes "${NNODES:-1}" --nproc-per-node "${NPROC_PER_NODE:-8}" --rdzv-id "${RUN_ID:-llama2_70b_japanese}" \
    --rdzv-backend c10d --rdzv-endpoint "${HEAD_NODE:-localhost}:${PORT:-29500}" --max-restarts "${MAX_RESTARTS:-0}" \
    tools/pretrain.py --recipe "$recipe" --stage "$1" "${@:2}"
