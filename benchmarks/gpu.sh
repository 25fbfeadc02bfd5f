#!/usr/bin/env bash
# What one card does: training in every way of this project beside the original's, and batched inference. Under ten
# minutes, no download: random weights of Llama's shapes, chosen by the card's memory; made-up rows.
#
#   bash benchmarks/gpu.sh > benchmarks/results/gpu_CARD_DATE.md
#   bash benchmarks/gpu.sh --tiny       # the script itself, on a CPU: a tiny model; CUDA's kernels are left out
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "${PYTHON:-python}" benchmarks/bench_gpu.py bench "$@"
