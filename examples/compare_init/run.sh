#!/usr/bin/env bash
# Compare the ways to fill new rows on your own text, with models that are trained here:
#   examples/compare_init/run.sh SEED en.jsonl.zst ja.jsonl.zst [flags of tools/compare_init.py]
# SEED is that of base, donor and data. A second call skips what is finished.
set -euo pipefail
cd "$(dirname "$0")/../.."
seed=$1 english=$2 japanese=$3
root=runs/compare_init/$seed
donor=$root/donor/base/export/donor
run() { "${PYTHON:-python}" "tools/$1.py" --recipe "examples/compare_init/$2.toml" --train.seed "$3" "${@:4}"; }
run adapt base "$seed" --work-dir "$root/base" --base.seed "$seed" --corpus.en "$english"
run adapt donor "10$seed" --work-dir "$root/donor" --base.seed "10$seed" --corpus.en "$english" --corpus.ja "$japanese"
named=(--tokenizer.donor "$donor")
for way in clp omp linear_transform linear_procrustes linear_median; do named+=("--compare.$way.donor" "$donor"); done
run compare_init recipe "$seed" --work-dir "$root" --base-model "$root/base/base/export/base" "${named[@]}" \
    --corpus.en "$english" --corpus.ja "$japanese" "${@:4}"
