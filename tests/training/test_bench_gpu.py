"""The benchmarks of training on a CPU: gpu.sh without CUDA's kernels, and bench_train.py beside a peer."""

import os
import subprocess
import sys

import numpy as np
import pytest
import tiny_models
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import bench_gpu  # noqa: E402


def test_lengths_are_those_of_the_released_data():
    """Guards: figures of a GPU for rows that nobody trains on."""
    rows = bench_gpu.made_up_rows(20_000, 512, max_length=10_000)
    lengths, prompts = np.asarray(rows["length"][:]), np.asarray(rows["prompt_length"][:])
    assert lengths.mean() == pytest.approx(127, abs=2)
    assert (lengths > 512).mean() == pytest.approx(97 / 52_002, abs=1e-3)
    assert 1 - prompts.sum() / lengths.sum() == pytest.approx(0.5, abs=0.01)


def test_every_row_that_a_cpu_can_run():
    """Guards: a script for a card that nobody has at hand, broken when someone does."""
    command = ["bash", ROOT / "benchmarks/gpu.sh", "--tiny", "--steps", "3"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env={**os.environ, "PYTHON": sys.executable}
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    table = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ")]
    rows = {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in table if len(cells) == 9}
    for way in bench_gpu.WAYS:
        (cells,) = (cells for name, cells in rows.items() if name.split(", 2 ranks")[0] == way.name)
        if way.cuda:
            assert cells[-1] == "not measured here: its kernels need an NVIDIA GPU"
        else:
            assert float(cells[0].replace(",", "")) > 0 and float(cells[6]) < 1e-2, (way.name, cells)
    assert float(table[-1][1].replace(",", "")) > 0, "batched inference"


TRL = """
import torch
import transformers


class SFTConfig(transformers.TrainingArguments):
    def __init__(self, max_length=0, gradient_checkpointing=True, **settings):
        super().__init__(gradient_checkpointing=gradient_checkpointing, remove_unused_columns=False, **settings)


def pad(rows):
    rows = {name: [torch.tensor(row[name]) for row in rows] for name in ("input_ids", "labels")}
    padded = {n: torch.nn.utils.rnn.pad_sequence(r, True, -100) for n, r in rows.items()}
    return {"input_ids": padded["input_ids"].clamp(min=0), "labels": padded["labels"],
            "attention_mask": (padded["input_ids"] >= 0).long()}


class SFTTrainer(transformers.Trainer):
    def __init__(self, **settings):
        super().__init__(data_collator=pad, **settings)
"""


def test_a_peer_trains_on_the_same_rows(tiny_tied, tmp_path, run_script):
    """Guards: a peer that gets other rows, another order or another loss, and looks slow or fast for it."""
    (tmp_path / "peer/trl").mkdir(parents=True)
    (tmp_path / "peer/trl/__init__.py").write_text(TRL)
    data = tiny_models.write_tasks(tmp_path / "tasks.json", 40)
    done = run_script(
        "benchmarks/bench_train.py", "--model", tiny_tied, "--data_path", data, "--steps", 1, "--batch_sizes", "4",
        "--peer", tmp_path / "peer", "--threads", 1,
    )  # fmt: skip
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith(("| train.py", "| TRL"))]
    assert [cells[1].strip() for cells in rows] == ["train.py's trainer", "TRL, default", "TRL, best settings"]
    assert all(float(cells[5]) < 1e-3 and float(cells[2].replace(",", "")) > 0 for cells in rows), done.stdout
