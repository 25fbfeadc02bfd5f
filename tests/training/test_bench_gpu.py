"""benchmarks/gpu.sh on a CPU: every row but those of CUDA's kernels."""

import os
import subprocess
import sys

import numpy as np
import pytest
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
