"""Memory and time of make_diff and recover on a made-up fp16 Llama, beside the plain way and beside copying the bytes.

    python benchmarks/bench_weight_diff.py                        # 0.3B and 1.3B in 5 shards: 35 GB disk, 12 GB memory
    python benchmarks/bench_weight_diff.py --sizes tiny --repeats 1   # seconds

The plain way is the original's: both models as float32 in memory, subtracted or added, saved. Every run is a process of
its own; memory is its VmHWM, file pages that it maps included. Copies are synced to the disk, as recover's result is.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from alpaca.common.run_record import git_commit  # noqa: E402
from alpaca.weights.tensors import INDEX, make_header, new_shard, parse_header, pieces  # noqa: E402

# hidden size, intermediate size, layers, vocabulary
SIZES = {"tiny": (64, 128, 2, 320), "0.3B": (1024, 2816, 18, 32000), "1.3B": (2048, 5504, 24, 32000)}
SHARDS = 5

# A process that runs one command line and notes its own peak memory.
MEASURED = """
import runpy, sys
try:
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    lines = open("/proc/self/status").read().splitlines()
    print(next(line for line in lines if line.startswith("VmHWM")), file=open(sys.orig_argv[3], "w"))
"""

PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM
job, raw_folder, other_folder, out = sys.argv[1:]
raw = AutoModelForCausalLM.from_pretrained(raw_folder, dtype=torch.float32)
other = AutoModelForCausalLM.from_pretrained(other_folder, dtype=torch.float32)
rows = other.get_input_embeddings().weight.shape[0]
old = raw.get_input_embeddings().weight.shape[0]
if rows != old:
    raw.resize_token_embeddings(rows, mean_resizing=False)
    for layer in (raw.get_input_embeddings(), raw.get_output_embeddings()):
        layer.weight.data[old:] = layer.weight.data[:old].mean(dim=0, keepdim=True)
sign = -1 if job == "make_diff" else 1
state = raw.state_dict()
for name, tensor in other.state_dict().items():
    tensor.add_(state[name], alpha=sign)
other.save_pretrained(out)
"""


def bench(
    sizes: str = "0.3B,1.3B",
    work_dir: str | None = None,
    repeats: int = 3,
    plain: bool = True,
    other: str | None = None,
) -> None:
    """Prints the table.

    Args:
        sizes: of the made-up models, with commas: tiny, 0.3B, 1.3B.
        work_dir: where a temporary folder is made, and removed at the end; default the system's.
        repeats: runs of each step; the table shows the fastest, memory the highest.
        plain: whether to run the plain way (11 GB of memory for 1.3B).
        other: another checkout of this project, whose weight_diff.py is measured in the same run.
    """
    sizes = sizes if isinstance(sizes, list | tuple) else str(sizes).split(",")
    print(f"- {hardware()}\n- {versions()}, commit {git_commit()}\n- `{' '.join(['python', *sys.argv])}`\n")
    print("| model | step | seconds | peak memory, GB | beside the plain way | beside copying base + diff |")
    print("| --- | --- | --- | --- | --- | --- |")
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="bench_weight_diff.", dir=work_dir) as folder:
            for row in bench_size(size, Path(folder), int(repeats), plain, other):
                print("| " + " | ".join(row) + " |", flush=True)


def bench_size(size: str, folder: Path, repeats: int, plain: bool, other: str | None):
    """Yields the table's rows for one model size."""
    raw, tuned, diff, out = (folder / name for name in ("raw", "tuned", "diff", "out"))
    make_models(size, raw, tuned)
    steps = {
        "make_diff": ["make_diff", "--path_raw", raw, "--path_tuned", tuned, "--path_diff", diff],
        "recover": ["recover", "--path_raw", raw, "--path_diff", diff, "--path_tuned", out],
    }
    script = folder / "plain.py"
    script.write_text(PLAIN)
    for step, flags in steps.items():
        ours = best(lambda flags=flags: run(folder, ROOT / "weight_diff.py", *flags), flags[-1], repeats)
        both = [raw, tuned] if step == "make_diff" else [raw, diff]
        copy = best(lambda both=both: copy_weights(both, folder / "copy"), folder / "copy", repeats)
        result = best(lambda out=flags[-1]: copy_weights([out], folder / "copy"), folder / "copy", repeats)
        shutil.rmtree(folder / "copy")
        beside = ""
        if plain:
            arguments = [step, raw, both[1], folder / "plain"]
            theirs = best(lambda a=arguments: run(folder, script, *a), folder / "plain", repeats)
            shutil.rmtree(folder / "plain")
            yield size, f"{step}, plain way", f"{theirs[0]:.1f}", f"{theirs[1]:.2f}", "1", f"{theirs[0] / copy[0]:.2f}x"
            beside = f"{theirs[0] / ours[0]:.2f}x as fast, {theirs[1] / ours[1]:.1f}x less memory"
        yield size, step, f"{ours[0]:.1f}", f"{ours[1]:.2f}", beside, f"{ours[0] / copy[0]:.2f}x"
        if other:
            arguments = [Path(other) / "weight_diff.py", *flags[:-1], folder / "other"]
            theirs = best(lambda a=arguments: run(folder, *a), folder / "other", repeats)
            shutil.rmtree(folder / "other")
            beside = f"{theirs[0] / ours[0]:.2f} of this one's time"
            yield (
                size,
                f"{step} of {other}",
                f"{theirs[0]:.1f}",
                f"{theirs[1]:.2f}",
                beside,
                f"{theirs[0] / copy[0]:.2f}x",
            )
        inputs = sum(weight_bytes(path) for path in both) / 1e9
        yield size, f"copy of {step}'s inputs ({inputs:.2f} GB)", f"{copy[0]:.1f}", "", "", "1"
        yield size, f"copy of {step}'s result ({weight_bytes(flags[-1]) / 1e9:.2f} GB)", f"{result[0]:.1f}", "", "", ""
    same = all((tuned / p.name).read_bytes() == p.read_bytes() for p in out.glob("*.safetensors"))
    yield size, "recovered files equal the tuned ones", str(same), "", "", ""


def best(function, made: Path, repeats: int) -> tuple[float, float]:
    """(fewest seconds, highest memory) of `repeats` runs that each make the folder `made` anew."""
    results = []
    for _ in range(repeats):
        if made.exists():
            shutil.rmtree(made)
        os.sync()
        begin = time.perf_counter()
        memory = function()
        results.append((time.perf_counter() - begin, memory))
    return min(seconds for seconds, _ in results), max(memory for _, memory in results)


def run(folder: Path, script: Path, *arguments) -> float:
    """Runs a script; its peak memory in GB."""
    note = folder / "memory.txt"
    command = [sys.executable, "-c", MEASURED, str(note), str(script), *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=script.parent, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    if done.returncode:
        raise SystemExit(f"{script.name} {' '.join(map(str, arguments))} failed:\n{done.stderr[-3000:]}")
    return int(note.read_text().split()[1]) * 1024 / 1e9


def copy_weights(folders: list[Path], target: Path) -> float:
    """Copies the weight files of the folders, synced; no memory to speak of."""
    for number, folder in enumerate(folders):
        (target / str(number)).mkdir(parents=True)
        for path in folder.glob("*.safetensors"):
            copy = target / str(number) / path.name
            shutil.copyfile(path, copy)
            with open(copy, "rb") as stream:
                os.fsync(stream.fileno())
    return 0.0


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def make_models(size: str, raw: Path, tuned: Path) -> None:
    """A random fp16 base in 5 shards, and a tuned model a small step away from it with one more row of embeddings."""
    hidden, intermediate, layers, rows = SIZES[size]
    rng = np.random.default_rng(0)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": hidden // 64 or 1,
        "num_key_value_heads": hidden // 64 or 1, "vocab_size": rows, "tie_word_embeddings": False, "dtype": "float16",
    }  # fmt: skip
    for folder, height in ((raw, rows), (tuned, rows + 1)):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**config, "vocab_size": height}))
    shapes = {"model.embed_tokens.weight": (rows, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{at}mlp.{name}_proj.weight": (intermediate, hidden) for name in ("gate", "up")}
        shapes |= {f"{at}mlp.down_proj.weight": (hidden, intermediate)}
        shapes |= {f"{at}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (rows, hidden)}
    total, done, plan = sum(map(np.prod, shapes.values())), 0, [[] for _ in range(SHARDS)]
    for name, shape in shapes.items():
        plan[min(SHARDS - 1, done * SHARDS // int(total))].append((name, shape))
        done += int(np.prod(shape))
    weight_map = {}
    for number, held in enumerate(plan, start=1):
        file = f"model-{number:05}-of-{SHARDS:05}.safetensors"
        weight_map |= {name: file for name, _ in held}
        taller = [(name, (shape[0] + 1, *shape[1:]) if shape[0] == rows else shape) for name, shape in held]
        headers = [make_header((name, "F16", shape) for name, shape in tensors) for tensors in (held, taller)]
        inside = {tensor.name: tensor.numel for tensor in parse_header(headers[0], Path())}
        with new_shard(raw / file, headers[0]) as write_base, new_shard(tuned / file, headers[1]) as write_tuned:
            for tensor in parse_header(headers[1], Path()):
                for start, count in pieces(tensor.numel):
                    old = (rng.standard_normal(count, np.float32) * 0.02).astype(np.float16)
                    step = rng.standard_normal(count, np.float32) * 1e-3
                    write_base(tensor.name, start, old[: max(0, min(count, inside[tensor.name] - start))])
                    write_tuned(tensor.name, start, (old + step).astype(np.float16))
    for folder in (raw, tuned):
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def hardware() -> str:
    model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return (
        f"{model or platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GB of memory, {time.strftime('%Y-%m-%d')}"
    )


def versions() -> str:
    names = ("numpy", "torch", "transformers", "safetensors")
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {metadata.version(name)}" for name in names)])


if __name__ == "__main__":
    import fire

    fire.Fire(bench)
