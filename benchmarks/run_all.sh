#!/usr/bin/env bash
# Every benchmark at a small size, on the data and the model that come with the project: minutes on two CPU cores.
# Each script's first lines hold its full-scale command; the tables of full-scale runs are in benchmarks/results/.
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python local_llm.py export_hf --output_dir "$work/base"
python benchmarks/bench_generate.py --concurrencies 1,8 --seconds 5 --latency 0.5 --serial_requests 3
python benchmarks/bench_dedup.py --data_path alpaca_data.json --sizes 1000,10000 --plain_candidates 1
python benchmarks/bench_tokenize.py --data_path alpaca_data.json --tokenizer "$work/base"
python benchmarks/check_labels.py --data_path alpaca_data.json --tokenizer "$work/base"
python benchmarks/bench_train.py --model "$work/base" --data_path alpaca_data.json --steps 2 --batch_sizes 4
python benchmarks/bench_weight_diff.py --sizes tiny --repeats 1
