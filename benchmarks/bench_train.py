"""Training steps: this project's recipe beside padded float32 batches, as the original's code does them on a CPU.

    python benchmarks/bench_train.py --model BASE --data_path alpaca_data.json --steps 12     # BASE: see local_llm.py
    python benchmarks/bench_train.py --model BASE --data_path alpaca_data.json --steps 2 --batch_sizes 4     # a minute

All ways start from the same weights and train on the same rows in the same order, each with its own copy of the model;
their steps take turns, so that a busy machine slows all of them. A step is forward, backward, clipping to 1 and AdamW.
Equal losses in the last column but one show that the ways are the same training. Where a step has more than 4 rows, the
original's way to take as many is measured too: 4 rows at a time, their gradients added up.
"""

import gc
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alpaca.common.cli import run_cli
from alpaca.common.prompt import IGNORE_INDEX
from alpaca.common.run_record import git_commit, package_versions
from alpaca.training import attention
from alpaca.training.data import (
    PaddedCollator,
    PaddingFreeCollator,
    load_rows,
    takes_logits_to_keep,
    tokenize_dataset,
)
from alpaca.training.internals import cpu_has_bf16
from alpaca.training.report import Flops, peak_tflops

WAYS = ("padded", "padding-free alone", "this recipe", "padded, 4 rows at a time")


class Way:
    """A model, its optimizer and its way to make a batch."""

    def __init__(self, name: str, model_path: str, pad_token_id: int, max_length: int, device: str, half: bool):
        self.name, self.device, self.half = name, device, half
        self.model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, attn_implementation="sdpa")
        self.model.config.use_cache = False
        self.model.to(device).train()
        recipe = name == WAYS[2]
        self.rows_at_a_time = 4 if name == WAYS[3] else sys.maxsize
        if name in (WAYS[0], WAYS[3]):
            self.collate = PaddedCollator(pad_token_id)
        else:
            by_row = attention.fits(self.model, max_length)
            if by_row:
                self.model.set_attn_implementation(attention.register())
            response_only = recipe and takes_logits_to_keep(self.model)
            self.collate = PaddingFreeCollator(response_only, row_lengths=by_row)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-5, weight_decay=0.0, fused=recipe or None)
        self.seconds = self.cpu_seconds = 0.0
        self.losses: list[float] = []

    def step(self, rows: list[dict]) -> None:
        parts = [rows[start : start + self.rows_at_a_time] for start in range(0, len(rows), self.rows_at_a_time)]
        batches = [
            {name: value.to(self.device) if hasattr(value, "to") else value for name, value in batch.items()}
            for batch in map(self.collate, parts)
        ]
        answers, whole = response_tokens(rows), 0.0
        begin, cpu_begin = time.perf_counter(), time.process_time()
        for batch in batches:
            with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.half):
                loss = self.model(**batch, num_items_in_batch=answers).loss
            loss.backward()
            whole += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(whole)
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - begin
        self.cpu_seconds += time.process_time() - cpu_begin


def response_tokens(rows: list[dict]) -> int:
    """How many tokens of `rows` carry loss."""
    return sum(int((row["labels"] != IGNORE_INDEX).sum()) for row in rows)


def bench(
    model: str,
    data_path: str,
    batch_sizes: str | int | tuple = (4, 16),
    steps: int = 6,
    warmup: int = 1,
    threads: int | None = None,
    max_length: int = 512,
    seed: int = 0,
) -> None:
    """Prints a markdown table for each batch size: real tokens/s, ratio to padded batches, losses, padding share.

    `steps`: timed optimizer steps of each way, after `warmup` untimed ones. `threads`: of torch (default: all cores).
    Rows are drawn from `data_path` by `seed`. On a GPU all ways compute in bfloat16 over float32 weights; on a CPU the
    recipe does so where the CPU has the instructions. MFU and peak memory are shown on a GPU.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    card = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    tokenizer = AutoTokenizer.from_pretrained(model)
    with tempfile.TemporaryDirectory() as cache:
        dataset = tokenize_dataset(load_rows(data_path), tokenizer, max_length, cache_dir=cache)
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
        versions = package_versions()
        print(
            f"{card}, {torch.get_num_threads()} threads, {time.strftime('%Y-%m-%d')}, commit {git_commit()}, "
            f"torch {versions['torch']}, transformers {versions['transformers']}; {Path(model).name}, "
            f"{len(dataset):,} rows of {Path(data_path).name}, rows up to {max_length} tokens, {steps} steps"
        )
        sizes = (batch_sizes,) if isinstance(batch_sizes, int) else batch_sizes
        for size in sizes:
            pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
            ways = [
                Way(name, model, pad, max_length, device, device == "cuda" or (name == WAYS[2] and cpu_has_bf16()))
                for name in (WAYS if size > 4 else WAYS[:3])
            ]
            real = places = answers = 0
            for turn in range(warmup + steps):
                rows = [dataset[place] for place in order[turn * size : (turn + 1) * size]]
                if turn == warmup:
                    for way in ways:
                        way.seconds = way.cpu_seconds = 0.0
                if turn >= warmup:
                    lengths = [len(row["input_ids"]) for row in rows]
                    real, places = real + sum(lengths), places + max(lengths) * size
                    answers += response_tokens(rows)
                for place in range(len(ways)):
                    ways[(turn + place) % len(ways)].step(rows)
            print(f"\n**Batches of {size}** ({real:,} real tokens, {1 - real / places:.1%} padding when padded)\n")
            print(
                "| way | real tokens/s | per CPU second | times as fast | mean loss | largest loss difference | MFU |"
            )
            print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
            flops, peak = Flops(ways[0].model), peak_tflops(card) if device == "cuda" else None
            for way in ways:
                apart = max(abs(a - b) for a, b in zip(way.losses, ways[0].losses, strict=True))
                mfu = f"{flops.of(real, answers) / way.seconds / peak / 1e12:.1%}" if peak else ""
                print(
                    f"| {way.name}, {'bfloat16' if way.half else 'float32'} | {real / way.seconds:,.0f} | "
                    f"{real / way.cpu_seconds:,.0f} | {ways[0].seconds / way.seconds:.2f} | "
                    f"{sum(way.losses) / len(way.losses):.5f} | {apart:.1e} | {mfu} |",
                    flush=True,
                )
            ways.clear()
            gc.collect()
            if device == "cuda":
                print(f"\nPeak memory of all the models together: {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")


def cpu_name() -> str:
    """The CPU's name."""
    names = [line.split(":", 1)[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return names[0].strip() if names else "CPU"


if __name__ == "__main__":
    run_cli({"bench": bench}, default="bench")
