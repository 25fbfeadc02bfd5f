"""Tokenising a data file: this project, cold and from its cache, beside the original's one row at a time, twice.

    python benchmarks/bench_tokenize.py --data_path alpaca_data.json --tokenizer huggyllama/llama-7b     # minutes
    python benchmarks/bench_tokenize.py --data_path alpaca_data.json --tokenizer huggyllama/llama-7b --max_samples 3000

Each way runs in a process of its own, so that its peak memory is its own; the time is from the file to the dataset and
leaves out the imports and the tokenizer's loading, which all ways share. The ways take turns for `--rounds` rounds.
"""

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from alpaca.common.cli import run_cli
from alpaca.common.prompt import format_prompt
from alpaca.common.run_record import git_commit, package_versions
from alpaca.common.tasks import load_tasks

WAYS = ("row by row, twice", "this project, cold", "this project, from the cache")


def row_by_row(data_path: str, tokenizer, max_length: int, max_samples: int | None) -> tuple[int, int]:
    """The plain way: two tokenizer calls a row, tensors kept in lists. Returns (rows, tokens)."""
    import torch

    rows = load_tasks(data_path)[:max_samples]
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    how = dict(return_tensors="pt", padding="longest", max_length=max_length, truncation=True)
    prompts = [format_prompt(row) for row in rows]
    whole = [prompt + row["output"] + tokenizer.eos_token for prompt, row in zip(prompts, rows, strict=True)]
    input_ids = [tokenizer(text, **how).input_ids[0] for text in whole]
    prompt_lengths = [tokenizer(text, **how).input_ids.shape[1] for text in prompts]
    labels = [torch.clone(ids) for ids in input_ids]
    for row, length in zip(labels, prompt_lengths, strict=True):
        row[:length] = -100
    return len(labels), sum(len(ids) for ids in input_ids)


def one(way: str, data_path: str, tokenizer: str, max_length: int, max_samples: int | None, cache: str) -> None:
    """Runs one way once and prints its figures as JSON."""
    import torch  # noqa: F401  (the imports are not what is measured)
    from check_labels import load_tokenizer

    from alpaca.training.data import load_rows, tokenize_dataset

    tok = load_tokenizer(tokenizer)
    begin, before = time.perf_counter(), time.process_time()
    if way == WAYS[0]:
        rows, tokens = row_by_row(data_path, tok, max_length, max_samples)
    else:
        dataset = tokenize_dataset(load_rows(data_path, max_samples), tok, max_length, cache_dir=cache)
        rows, tokens = len(dataset), int(dataset["length"][:].sum())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    figures = {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - before}
    print(json.dumps({**figures, "rows": rows, "tokens": tokens, "peak_gb": peak / 1e9}))


def bench(
    data_path: str, tokenizer: str, max_length: int = 512, max_samples: int | None = None, rounds: int = 1
) -> None:
    """Prints a markdown table: best time of the rounds, rows a second, ratio to the plain way, peak memory."""
    best: dict[str, dict] = {}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            for way in WAYS:
                command = [
                    sys.executable, __file__, "one", way, data_path, tokenizer, str(max_length), str(max_samples), cache
                ]  # fmt: skip
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                figures = json.loads(done.stdout.splitlines()[-1])
                if way not in best or figures["seconds"] < best[way]["seconds"]:
                    best[way] = figures
    plain = best[WAYS[0]]
    versions = package_versions()
    print(
        f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, {time.strftime('%Y-%m-%d')}, "
        f"commit {git_commit()}, python {versions['python']}, tokenizers {versions['tokenizers']}, "
        f"transformers {versions['transformers']}; best of {rounds}\n"
    )
    print("| way | rows | seconds | CPU s | rows/s | times as fast | peak memory GB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for way, f in best.items():
        print(
            f"| {way} | {f['rows']:,} | {f['seconds']:.2f} | {f['cpu_seconds']:.2f} | "
            f"{f['rows'] / f['seconds']:,.0f} | {plain['seconds'] / f['seconds']:.1f} | {f['peak_gb']:.2f} |"
        )


if __name__ == "__main__":
    run_cli({"bench": bench, "one": one}, default="bench")
