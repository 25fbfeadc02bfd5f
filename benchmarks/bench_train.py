"""Training steps: this project's recipe beside padded float32 batches, as the original's code does them on a CPU.

    python benchmarks/bench_train.py --model BASE --data_path alpaca_data.json --steps 12     # BASE: see local_llm.py
    python benchmarks/bench_train.py --model BASE --data_path alpaca_data.json --steps 2 --batch_sizes 4     # a minute
    pip install --target DIR --no-deps trl==1.16.0
    python benchmarks/bench_train.py --model BASE --data_path alpaca_data.json --batch_sizes 8 --steps 15 --peer DIR

All ways start from the same weights and train on the same rows in the same order, each with its own copy of the model;
their steps take turns, so that a busy machine slows all of them. A step is forward, backward, clipping to 1 and AdamW.
Equal losses in the last column but one show that the ways are the same training. Where a step has more than 4 rows, the
original's way to take as many is measured too: 4 rows at a time, their gradients added up.

With --peer the same rows, weights and steps are trained by train.py's trainer and by TRL's SFTTrainer too, each in a
process of its own, one after the other: TRL as it comes (gradient checkpointing), and with the settings that are best
for the machine (without it; on a GPU padding-free where flash_attn is there, and Liger where that is).
"""

import gc
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from alpaca.common.cli import run_cli
from alpaca.common.files import jdump, jload
from alpaca.common.prompt import IGNORE_INDEX
from alpaca.common.run_record import git_commit, package_versions
from alpaca.training import attention
from alpaca.training.checks import is_installed, read_command_line
from alpaca.training.data import (
    PaddedCollator,
    PaddingFreeCollator,
    data_report,
    load_rows,
    takes_logits_to_keep,
    tokenize_dataset,
)
from alpaca.training.internals import cpu_has_bf16
from alpaca.training.model import load_model
from alpaca.training.report import Flops, peak_tflops
from alpaca.training.trainer import make_trainer
from alpaca.training.training_arguments import arguments_for_this_machine

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
    batch_sizes: str = "4,16",
    steps: int = 6,
    warmup: int = 1,
    threads: int | None = None,
    max_length: int = 512,
    seed: int = 0,
    peer: str | None = None,
) -> None:
    """Prints a markdown table for each batch size: real tokens/s, ratio to padded batches, losses, padding share.

    `steps`: timed optimizer steps of each way, after `warmup` untimed ones. `threads`: of torch (default: all cores).
    Rows are drawn from `data_path` by `seed`. On a GPU all ways compute in bfloat16 over float32 weights; on a CPU the
    recipe does so where the CPU has the instructions. MFU and peak memory are shown on a GPU. `peer`: a folder with
    TRL in it.
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
        for size in map(int, batch_sizes.split(",")):
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
            if peer:
                rows = dataset.select(order[: (warmup + steps) * size])
                peer_table(model, rows, size, steps, warmup, peer, Path(cache) / f"peer_{size}")
            if device == "cuda":
                print(f"\nPeak memory of all the models together: {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")


# ----------------------------------------------------------------------------------------------------------------------
# Beside TRL.

TRAINERS = ("train.py's trainer", "TRL, default", "TRL, best settings")


class Clock(TrainerCallback):
    """When each optimizer step ended."""

    def __init__(self):
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def trainer_row(way: str, folder: str, model: str, batch_size: int, threads: int, peer: str) -> None:
    """Trains on the rows in FOLDER/rows, in their order, with one of TRAINERS; writes FOLDER/WAY.json."""
    torch.set_num_threads(threads)
    gpu = torch.cuda.is_available()
    rows, half = datasets.load_from_disk(f"{folder}/rows").with_format("numpy"), gpu or cpu_has_bf16()
    settings = dict(
        output_dir=f"{folder}/out {way}", max_steps=len(rows) // batch_size, per_device_train_batch_size=batch_size,
        learning_rate=2e-5, lr_scheduler_type="constant", logging_steps=1, save_strategy="no", disable_tqdm=True,
        bf16=half, train_sampling_strategy="sequential",
    )  # fmt: skip
    tokenizer, clock = AutoTokenizer.from_pretrained(model), Clock()
    if way == TRAINERS[0]:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        line = read_command_line(["--model_name_or_path", model, "--data_path", "in-memory", *words])
        model_args, data_args, args = arguments_for_this_machine(line)
        Path(args.output_dir).mkdir()
        counts = data_report(rows, [{"output": "x"}] * len(rows))
        trained = load_model(model_args, args, tokenizer)
        trainer, _ = make_trainer(trained, tokenizer, model_args, data_args, args, rows, None, counts)
    else:
        sys.path.insert(0, peer)
        from trl import SFTConfig, SFTTrainer  # from the folder that --peer names

        if way == TRAINERS[2]:
            settings |= dict(gradient_checkpointing=False)
            if gpu:
                flash = {"attn_implementation": "flash_attention_2"} if is_installed("flash_attn") else {}
                settings |= dict(padding_free=bool(flash), use_liger_kernel=is_installed("liger_kernel"), tf32=True)
        kernel = flash if way == TRAINERS[2] and gpu else {}
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **kernel),
            args=SFTConfig(**settings, report_to="none", use_cpu=not gpu, max_length=None),
            train_dataset=rows.select_columns(["input_ids", "labels"]).with_format(None), processing_class=tokenizer,
        )  # fmt: skip
    trainer.add_callback(clock)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    jdump({"ends": clock.ends, "losses": losses}, Path(folder) / f"{way}.json")


def peer_table(model: str, rows, size: int, steps: int, warmup: int, peer: str, folder: Path) -> None:
    """Trains `rows`, batches of `size` in this order, with each of TRAINERS; prints a table."""
    rows.save_to_disk(folder / "rows")
    real = int(rows["length"][warmup * size :].sum())
    trl = next((folder.name.split("-")[1] for folder in Path(peer).glob("trl-*.dist-info")), "").removesuffix(".dist")
    print(f"\n**{TRAINERS[0]} beside TRL {trl}**, batches of {size}, {steps} steps after {warmup}\n")
    print("| trainer | real tokens/s | times as fast | mean loss | largest loss difference |")
    print("| --- | ---: | ---: | ---: | ---: |", flush=True)
    found: dict[str, dict] = {}
    for way in TRAINERS:
        words = ["trainer_row", way, str(folder), model, str(size), str(torch.get_num_threads()), peer]
        with open(folder / "log", "w", encoding="utf-8") as log:
            done = subprocess.run([sys.executable, __file__, *words], stdout=log, stderr=subprocess.STDOUT)
        if done.returncode:
            print(
                f"| {way} | failed: {(folder / 'log').read_text().strip().splitlines()[-1][:160]} | | | |", flush=True
            )
            continue
        found[way] = jload(folder / f"{way}.json")
        losses, ends = found[way]["losses"], found[way]["ends"]
        first = next(iter(found.values()))
        seconds = ends[-1] - ends[warmup - 1]
        apart = max(abs(a - b) for a, b in zip(losses, first["losses"], strict=True))
        times = (first["ends"][-1] - first["ends"][warmup - 1]) / seconds
        print(
            f"| {way} | {real / seconds:,.0f} | {times:.2f} | {sum(losses) / len(losses):.5f} | {apart:.1e} |",
            flush=True,
        )


def cpu_name() -> str:
    """The CPU's name."""
    names = [line.split(":", 1)[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return names[0].strip() if names else "CPU"


if __name__ == "__main__":
    run_cli({"bench": bench, "trainer_row": trainer_row}, default="bench")
