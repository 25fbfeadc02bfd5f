"""The main benchmarks in one run: one dated table, its summary beside the plain way, and two plots.

    make bench                                       # under 30 minutes on two quiet CPU cores, quickstart included
    python benchmarks/run_all.py --quickstart False --scale 0.01      # every step at a hundredth of its size: minutes

The data are made from what the project ships: instructions as bench_dedup.py makes them up, with the answers of
alpaca_data.json; the model is the embedded one. A benchmark that fails is named in the table, and the others go on.
`--before DIR` also runs dedup, tokenising, weight diff and generation of another checkout, at the same sizes.
`--peer DIR`, a folder with TRL installed, adds its trainer to the training table.
"""

import itertools
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from bench_dedup import environment, made_up_instructions  # noqa: E402

from alpaca.common.cli import run_cli  # noqa: E402
from alpaca.common.errors import UserError  # noqa: E402
from alpaca.common.files import atomic_write, jdump, jload, refuse_existing  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"


@dataclass
class Benchmark:
    """One script's run: `arguments` of this project, `ratio` a pattern whose group 1 is its figure in the summary."""

    name: str
    arguments: Sequence[str]
    plain: str = ""
    ratio: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    output: str = ""
    seconds: float = 0.0
    failed: bool = False
    ratios: list[float] = field(default_factory=list)

    def run(self, checkout: Path, minutes: float) -> None:
        begin = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *map(str, self.arguments)],
            cwd=checkout, env={**os.environ, "HF_HUB_OFFLINE": "1", **self.environment}, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        try:
            output, errors = process.communicate(timeout=60 * minutes)
            if process.returncode < 0:
                errors = f"ended by signal {-process.returncode} (9: out of memory?)"
        except subprocess.TimeoutExpired:
            output, errors = "", f"not done within {minutes:g} minutes"
        finally:  # also at Ctrl-C: what the script has started ends with it, and does not disturb the next one
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        self.output = re.sub(r"^#+ ", r"##\g<0>", output.strip(), flags=re.MULTILINE)
        self.failed = process.returncode != 0
        self.seconds = time.perf_counter() - begin
        if self.failed:
            self.output = f"**failed**: {errors.strip().splitlines()[-1] if errors.strip() else 'no error was printed'}"
        self.ratios = [float(figure.replace(",", "")) for figure in re.findall(self.ratio, self.output) if self.ratio]


def run(
    quickstart: bool = True,
    scale: float = 1.0,
    before: str | None = None,
    peer: str | None = None,
    output_path: str | None = None,
    overwrite: bool = False,
) -> int:
    """Writes the table, and the plots beside it; the exit status is 1 where a benchmark failed.

    Args:
        quickstart: the recipe from end to end too, about ten minutes.
        scale: of the numbers of rows and steps; below 1 for a trial.
        before: another checkout of this project, such as a clone at an earlier commit.
        peer: a folder in which TRL is installed (pip install --target DIR trl).
        output_path: the Markdown file; default benchmarks/results/all_DATE.md.
        overwrite: replace it where it exists.
    """
    target = Path(output_path or RESULTS / f"all_{time.strftime('%Y-%m-%d')}.md")
    refuse_existing(str(target), overwrite)
    if before and not (Path(before) / "benchmarks").is_dir():
        raise UserError(f"--before {before} is no checkout of this project: it has no folder benchmarks.")
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        done = list(measure(benchmarks(folder, scale, peer), ROOT))
        earlier = list(measure(earlier_benchmarks(folder, scale), Path(before).resolve())) if before else []
        if quickstart:
            its_own = {"QUICKSTART_RUN": str(folder / "quickstart_run")}  # a user's own run stays as it is
            done += measure([Benchmark("quickstart", ["-c", QUICKSTART], environment=its_own)], ROOT)
    lines = [f"# All benchmarks, {time.strftime('%Y-%m-%d')}", "", *environment()]
    lines += [f"- {time.perf_counter() - begin:,.0f} s in all, load averages at the end: {os.getloadavg()}", ""]
    lines += summary(done)
    for bench in done:
        lines += ["", f"## {bench.name}, {bench.seconds:,.0f} s", "", bench.output]
    for bench in earlier:
        lines += ["", f"## {bench.name} of {Path(before or '').name}, {bench.seconds:,.0f} s", "", bench.output]
    text = "\n".join(lines).replace(f"{work}/", "")  # the benches name their inputs, which are gone
    with atomic_write(target) as stream:
        stream.write(text + "\n")
    draw(done, target)
    print("\n".join(summary(done)), f"\n{target}", sep="\n")
    return int(any(bench.failed for bench in (*done, *earlier)))


# The script's own tables, from its last lines on.
QUICKSTART = (
    "import subprocess, sys; done = subprocess.run(['bash', 'quickstart.sh'], capture_output=True, text=True); "
    "at = done.stdout.rfind('\\nstep '); print('```' + done.stdout[at:].rstrip() + '\\n```'); "
    "sys.stderr.write(done.stderr); sys.exit(done.returncode)"
)


def measure(listed: Sequence[Benchmark], checkout: Path, minutes: float = 30):
    for bench in listed:
        print(f"{time.strftime('%H:%M:%S')} {bench.name}: {' '.join(map(str, bench.arguments))[:100]}", flush=True)
        bench.run(checkout, minutes)
        yield bench


def benchmarks(folder: Path, scale: float, peer: str | None) -> list[Benchmark]:
    base, pool, rows = made_inputs(folder, scale)
    sizes = ",".join(str(max(100, round(size * scale))) for size in (10_000, 100_000, 1_000_000))
    steps = max(1, round(12 * scale))
    train = ["benchmarks/bench_train.py", "--model", base, "--data_path", rows, "--batch_sizes", 4]
    train += ["--steps", steps]
    return [
        Benchmark(
            "dedup", ["benchmarks/bench_dedup.py", "--data_path", pool, "--sizes", sizes, "--plain_candidates", 1],
            "rouge_score in a loop, one candidate against the pool",
            r"\| RougeLIndex\.scores, one candidate \| [\d.,]+ \| ([\d.,]+) \|",
        ),
        Benchmark(
            "generation", generation(scale), "one request after the other",
            r"\| 32 \|.*\| ([\d.,]+) \|(?:\n|$)",
        ),
        Benchmark(
            "tokenising", ["benchmarks/bench_tokenize.py", "--data_path", rows, "--tokenizer", base],
            "row by row, twice", r"\| this project, cold \|(?:[^|]*\|){4} ([\d.,]+) \|",
        ),
        Benchmark(
            "training", train + (["--peer", peer] if peer else []), "padded batches in float32",
            r"\| this recipe[^|]*\|(?:[^|]*\|){2} ([\d.,]+) \|",
        ),
        Benchmark(
            "weight diff", weight_diff(scale), "both models in memory",
            r"\| recover \|.*?\| ([\d.,]+)x as fast",
        ),
    ]  # fmt: skip


def generation(scale: float) -> list:
    return ["benchmarks/bench_generate.py", "--concurrencies", "1,8,32", "--seconds", max(2, round(20 * scale)),
            "--serial_requests", max(2, round(6 * scale)), "--latency", 1.0 if scale == 1 else 0.2]  # fmt: skip


def weight_diff(scale: float) -> list:
    return ["benchmarks/bench_weight_diff.py", "--sizes", "0.3B,1.3B" if scale == 1 else "tiny", "--repeats", 1]


def earlier_benchmarks(folder: Path, scale: float) -> list[Benchmark]:
    """What a checkout of any age can run at the same sizes: ten million rows, say, took it too much memory."""
    base, pool, rows = folder / "base", folder / "pool.json", folder / "tasks.json"
    sizes = ",".join(str(max(100, round(size * scale))) for size in (10_000, 100_000))
    return [
        Benchmark("dedup", ["benchmarks/bench_dedup.py", "--data_path", pool, "--sizes", sizes,
                            "--plain_candidates", 1]),
        Benchmark("generation", generation(scale)),
        Benchmark("tokenising", ["benchmarks/bench_tokenize.py", "--data_path", rows, "--tokenizer", base]),
        Benchmark("weight diff", weight_diff(scale)),
    ]  # fmt: skip


def made_inputs(folder: Path, scale: float) -> tuple[Path, Path, Path]:
    """The embedded model as a checkpoint, a pool of instructions, and tasks with answers of real lengths."""
    subprocess.run([sys.executable, "local_llm.py", "export_hf", "--output_dir", folder / "base"],
                   cwd=ROOT, check=True, stdout=subprocess.DEVNULL)  # fmt: skip
    shipped = jload(ROOT / "alpaca_data.json")
    texts = [row["instruction"] for row in shipped]
    sizes = {"pool.json": max(1_100, round(52_002 * scale)), "tasks.json": max(1_100, round(20_000 * scale))}
    for seed, (name, size) in enumerate(sizes.items()):
        drawn = random.Random(seed)
        made = itertools.islice(made_up_instructions(texts, size, seed), size)
        rows = [{"instruction": text, "input": "", "output": drawn.choice(shipped)["output"]} for text in made]
        jdump(rows, folder / name)
    return folder / "base", folder / "pool.json", folder / "tasks.json"


def summary(done: Sequence[Benchmark]) -> list[str]:
    lines = ["| benchmark | the plain way | times as fast | seconds taken |", "| --- | --- | ---: | ---: |"]
    for bench in done:
        figure = "failed" if bench.failed else ", ".join(f"{ratio:,g}" for ratio in bench.ratios)
        lines.append(f"| {bench.name} | {bench.plain} | {figure} | {bench.seconds:,.0f} |")
    return lines


def draw(done: Sequence[Benchmark], target: Path) -> None:
    """Two plots beside the table: the ratios, and CPU time of whole files against their rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ratios = {bench.name: bench.ratios[-1] for bench in done if bench.ratios}
    if ratios:
        figure, axes = plt.subplots(figsize=(6, 2.6), layout="constrained")
        bars = axes.barh(list(ratios), list(ratios.values()), color="#4472a8")
        axes.bar_label(bars, [f"{ratio:,.3g} times" for ratio in ratios.values()], padding=3)
        axes.set(xscale="log", xlim=(0.5, 20 * max(ratios.values())), xlabel="times as fast as the plain way")
        axes.axvline(1, color="black", linewidth=0.8)
        axes.invert_yaxis()
        figure.savefig(target.with_name(f"{target.stem}_ratios.svg"))
    curves = growth({bench.name: bench.output for bench in done}.get("dedup", ""))
    if curves:
        figure, axes = plt.subplots(figsize=(6, 2.6), layout="constrained")
        for command, points in curves.items():
            axes.plot(*zip(*points, strict=True), marker="o", label=f"{command}, exact")
        axes.set(xscale="log", yscale="log", xlabel="rows", ylabel="CPU seconds")
        axes.legend(frameon=False)
        figure.savefig(target.with_name(f"{target.stem}_growth.svg"))


def growth(output: str) -> Mapping[str, list[tuple[int, float]]]:
    """(rows, CPU seconds) of each command in the table of whole files."""
    curves: dict[str, list[tuple[int, float]]] = {}
    row = r"\| `(\w+)` \| ([\d,]+) made up \|[^|]*\|[^|]*\| ([\d.,]+) \|"
    for command, rows, seconds in re.findall(row, output):
        curves.setdefault(command, []).append((int(rows.replace(",", "")), float(seconds.replace(",", ""))))
    return curves


if __name__ == "__main__":
    run_cli({"run": run}, default="run")
