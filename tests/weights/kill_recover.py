"""Kills `weight_diff.py recover` at random moments and shows that nothing false is left and that a rerun finishes.

    python tests/weights/kill_recover.py --kills 30

Each round starts recover as a process, SIGKILLs it after a random share of the time that a whole run takes, and asserts
that no folder stands at --path_tuned, or a whole one. Now and then a run is let through: it goes on from what the kills
left, and its files must be the tuned ones byte for byte.
"""

import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fire
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import weight_diff  # noqa: E402
from alpaca.weights.tensors import INDEX, make_header, new_shard  # noqa: E402

SHARDS, TENSORS, ROWS = 8, 3, 1000  # 24 tensors of 1,000 x 500: long enough to be hit in every phase


def make_models(folder: Path) -> tuple[Path, Path, Path]:
    """Base, tuned and diff of a made-up model in several shards."""
    rng = np.random.default_rng(0)
    raw, tuned = folder / "raw", folder / "tuned"
    for path in (raw, tuned):
        path.mkdir()
        (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    weight_map = {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        names = [f"layer{shard}.{number}.weight" for number in range(TENSORS)]
        weight_map |= dict.fromkeys(names, file)
        header = make_header((name, "F16", (ROWS, 500)) for name in names)
        with new_shard(raw / file, header) as write_raw, new_shard(tuned / file, header) as write_tuned:
            for name in names:
                values = rng.standard_normal(ROWS * 500, np.float32)
                write_raw(name, 0, values.astype(np.float16))
                write_tuned(name, 0, (values * np.float32(1.01)).astype(np.float16))
    for path in (raw, tuned):
        (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    weight_diff.make_diff(raw, tuned, folder / "diff")
    return raw, tuned, folder / "diff"


def same_files(tuned: Path, out: Path) -> None:
    for path in tuned.iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes(), f"{path.name} is not the tuned model's"


def kill_recover(kills: int = 30, seed: int = 0, let_through: float = 0.2) -> dict:
    """Runs the rounds in a temporary folder; returns and prints how many were killed in which state.

    `let_through`: the share of rounds that may run to their end (the last one always does).
    """
    rng, seen = (
        random.Random(seed),
        {"killed": 0, "with finished shards": 0, "after the rename": 0, "let through": 0, "resumed": 0},
    )
    with tempfile.TemporaryDirectory(prefix="kill_recover.") as temporary:
        folder = Path(temporary)
        raw, tuned, diff = make_models(folder)
        out, work = folder / "out", folder / ".out.recovering"
        command = [sys.executable, str(ROOT / "weight_diff.py"), "recover", "--path_raw", str(raw)]
        command += ["--path_diff", str(diff), "--path_tuned", str(out)]

        def finish() -> None:
            seen["resumed"] += (work / "progress.json").exists()
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            same_files(tuned, out)
            assert not work.exists()
            seen["let through"] += 1
            shutil.rmtree(out)

        begin = time.monotonic()
        finish()
        whole = time.monotonic() - begin
        while seen["killed"] < kills:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(rng.uniform(0.1, 1.0) * whole)
            process.send_signal(signal.SIGKILL)
            if process.wait() == 0:  # it was faster than its killer
                shutil.rmtree(out)
                continue
            seen["killed"] += 1
            if out.exists():  # killed between the rename and its last line of text: then all is there
                same_files(tuned, out)
                seen["after the rename"] += 1
                shutil.rmtree(out)
                continue
            assert not (work / "config.json").exists() or len(list(work.glob("*.safetensors"))) == SHARDS
            seen["with finished shards"] += any(work.glob("*.safetensors")) if work.exists() else 0
            if rng.random() < let_through:
                finish()
        finish()
    print(json.dumps(seen))
    return seen


if __name__ == "__main__":
    fire.Fire(kill_recover, serialize=lambda _: None)
