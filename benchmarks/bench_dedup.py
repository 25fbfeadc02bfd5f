"""Dedup measured beside the plain way: one candidate against the whole pool, whole files, and harvests.

    python benchmarks/bench_dedup.py --data_path data/stanford/alpaca_data.json --sizes 10000000 --commands dedup
    python benchmarks/bench_dedup.py --data_path alpaca_data.json --sizes 10000 --plain_candidates 1     # one minute

The first takes 14 minutes on two cores.

The made-up instructions are built like real ones: the beginning of one instruction of the file and the end of another,
in which the frequent words stay and the others are drawn anew from a Zipf law. The law goes on beyond the file's own
vocabulary with invented words, so that the vocabulary grows with the text as it does in real ones. One in fifty repeats
an earlier instruction with one word changed.
"""

import collections
import contextlib
import functools
import itertools
import math
import multiprocessing
import os
import platform
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from alpaca.common.cli import run_cli
from alpaca.common.files import atomic_write, refuse_existing, write_jsonl
from alpaca.common.paths import ROOT
from alpaca.common.run_record import git_commit, package_versions
from alpaca.common.tasks import iter_rows, load_tasks
from alpaca.generation.filters import instruction_problem
from alpaca.generation.rouge import RougeLIndex, rouge_tokens

FREQUENT = 200  # words of the file that stay where they are
VOCABULARY = 200_000  # real and invented words together
BLOCK = 100_000  # instructions made up at a time
ZIPF = 1.8  # gives 52,000 made-up instructions about as many distinct words as the released ones have


def made_up_instructions(texts: list[str], number: int, seed: int = 0) -> Iterator[str]:
    """`number` instructions with the build, lengths and word frequencies of `texts`; see the top of this file."""
    rng = np.random.default_rng(seed)
    tokens = [words for words in map(rouge_tokens, texts) if words]
    counts = collections.Counter(itertools.chain.from_iterable(tokens))
    words = sorted(counts, key=lambda word: (-counts[word], word))
    frequent = set(words[:FREQUENT])
    words += [f"word{i}" for i in range(len(words), VOCABULARY)]
    power = 1 - ZIPF
    made: list[str] = []
    for start in range(0, number, BLOCK):
        size = min(BLOCK, number - start)
        # Zipf over the ranks after the frequent words, by inverting its integral.
        ranks = rng.uniform(VOCABULARY**power, FREQUENT**power, size * 8) ** (1 / power)
        draw = map(words.__getitem__, itertools.cycle(ranks.astype(int).tolist()))
        heads, tails = rng.integers(len(tokens), size=(2, size)).tolist()
        cuts, copied, origins = rng.random(size), rng.random(size) < 0.02, rng.random(size)
        for i in range(size):
            if copied[i] and made:
                chosen = made[int(origins[i] * len(made))].split()
                chosen[int(cuts[i] * len(chosen))] = next(draw)
            else:
                head, tail = tokens[heads[i]], tokens[tails[i]]
                build = head[: math.ceil(cuts[i] * len(head))] + tail[math.ceil(cuts[i] * len(tail)) :]
                chosen = [word if word in frequent else next(draw) for word in build]
            made.append(" ".join(chosen))
            yield made[-1]


def bench(
    data_path: str,
    sizes: str = "10000,100000",
    harvests: str = "",
    commands: str = "dedup,check",
    similarity_figures: str = "False,True",
    candidates: int = 200,
    plain_candidates: int = 3,
    processes: int = 16,
    samples: int = 100,
    output_path: str | None = None,
    overwrite: bool = False,
) -> None:
    """Prints the tables as Markdown.

    Args:
        data_path: a data set; its instructions are the pool, and what made-up ones are built from.
        sizes: rows of made-up files to deduplicate, comma-separated.
        harvests: tasks to keep of made-up replies, comma-separated; with figures 1000000 take more than an hour.
        commands: which commands run over the made-up files.
        similarity_figures: which kinds of harvests are measured.
        candidates: how many candidates RougeLIndex and rapidfuzz score.
        plain_candidates: how many candidates rouge_score scores, at one to two seconds each for 52,002 instructions.
        processes: processes of the original's pool, which it starts anew for each candidate.
        samples: rows of each made-up file whose fate is compared with brute force.
        output_path: a Markdown file for the tables.
        overwrite: replace output_path where it exists.
    """
    if output_path:
        refuse_existing(output_path, overwrite)
    texts = [task["instruction"] for task in load_tasks(data_path, require_output=False)]
    lines = [f"# Dedup, {time.strftime('%Y-%m-%d')}", "", *environment(), ""]
    lines += [f"## One candidate against {len(texts):,} instructions", ""]
    lines += against_the_pool(texts, candidates, plain_candidates, processes)
    lines += ["", "## Whole files (exact: F1 above 0.7 with an earlier row that stays)", ""]
    with tempfile.TemporaryDirectory() as folder:
        lines += whole_files(data_path, Path(folder), numbers(sizes), samples, commands.split(","))
        if harvests:
            lines += ["", "## Harvests of a journal (`rebuild`)", ""]
            lines += measured_harvests(data_path, Path(folder), numbers(harvests), similarity_figures.split(","))
    lines += ["", f"Load averages at the end, other programs' work included: {os.getloadavg()}"]
    table = "\n".join(lines) + "\n"
    print(table)
    if output_path:
        with atomic_write(output_path) as stream:
            stream.write(table)


def numbers(text: str) -> list[int]:
    return [int(number) for number in str(text).split(",")]


def environment() -> list[str]:
    """Hardware, versions, commit and command, one line each."""
    model = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    versions = {**package_versions(), "rouge_score": metadata.version("rouge_score")}
    return [
        f"- {os.cpu_count()} cores, {model[1] if model else platform.machine()}",
        "- " + ", ".join(f"{name} {versions[name]}" for name in ("python", "numpy", "rapidfuzz", "rouge_score")),
        f"- commit {git_commit()}, `python {shlex.join(sys.argv)}`",
    ]


def against_the_pool(texts: list[str], candidates: int, plain_candidates: int, processes: int) -> list[str]:
    """Milliseconds a candidate: rouge_score in a loop and in a pool of processes, rapidfuzz, and RougeLIndex."""
    from rapidfuzz import process
    from rapidfuzz.distance import LCSseq
    from rouge_score import rouge_scorer

    made = list(made_up_instructions(texts, candidates, seed=1))
    pool_tokens = [rouge_tokens(text) for text in texts]
    index = RougeLIndex(texts)
    index.scores(made[0])

    def plain(text):
        tokens = rouge_tokens(text)
        return [rouge_scorer._score_lcs(tokens, item).fmeasure for item in pool_tokens]

    def plain_pool(text):
        with multiprocessing.Pool(processes) as pool:
            scores = pool.map(functools.partial(rouge_scorer._score_lcs, rouge_tokens(text)), pool_tokens)
        return [score.fmeasure for score in scores]

    codes: dict[str, str] = {}
    strings = ["".join(codes.setdefault(w, chr(len(codes) + 1)) for w in words) for words in pool_tokens]

    def cdist(batch):
        queries = ["".join(codes.get(word, "\0") for word in rouge_tokens(text)) for text in batch]
        return process.cdist(queries, strings, scorer=LCSseq.similarity, dtype=np.int32)

    def milliseconds(function, arguments, each=1):
        begin = time.perf_counter()
        results = [function(argument) for argument in arguments]
        return (time.perf_counter() - begin) * 1e3 / len(arguments) / each, results

    loop, wanted = milliseconds(plain, made[:plain_candidates])
    pooled, again = milliseconds(plain_pool, made[:plain_candidates])
    assert wanted == again
    single, _ = milliseconds(lambda text: cdist([text]), made)
    blocks, _ = milliseconds(cdist, [made[i : i + 16] for i in range(0, len(made), 16)])
    blocks *= -(-len(made) // 16) / len(made)
    ours, scores = milliseconds(index.scores, made)
    assert all(scores[i].tolist() == wanted[i] for i in range(plain_candidates)), "figures differ from rouge_score's"
    top, _ = milliseconds(lambda i: index.top(made[i], 10, scores[i]), range(len(made)))
    added, _ = milliseconds(index.add, made)
    rows = [
        ("rouge_score in a loop", loop),
        (f"rouge_score in a pool of {processes} processes, started for each candidate as in the original", pooled),
        ("rapidfuzz cdist, one candidate", single),
        ("rapidfuzz cdist, 16 candidates at a time", blocks),
        ("RougeLIndex.scores, one candidate", ours),
        ("RougeLIndex.top(10) from those scores", top),
        ("RougeLIndex.add", added),
    ]
    lines = ["| way | ms a candidate | times as fast as the loop |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {ms:,.3f} | {loop / ms:,.1f} |" for name, ms in rows]
    return [*lines, "", f"Every figure of the {plain_candidates} candidates of the loop is equal in all 64 bits."]


def measured(*command: str | Path) -> dict[str, float]:
    """Runs a command of the project: wall and CPU seconds and the peak memory of its processes in GB.

    A page that processes share counts once (PSS). Memory is looked at twice a second.
    """
    before, begin, peak = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            own = psutil.Process(process.pid)
            peak = max(peak, sum(each.memory_full_info().pss for each in [own, *own.children(recursive=True)]))
        time.sleep(0.5 if peak > 1 << 28 else 0.05)
    assert process.returncode in (0, 1), command
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": time.perf_counter() - begin, "cpu_seconds": cpu, "gigabytes": peak / 2**30}


def figures(run: dict[str, float]) -> str:
    return f"{run['seconds']:,.1f} | {run['cpu_seconds']:,.1f} | {run['gigabytes']:.2f}"


def whole_files(data_path: str, folder: Path, sizes: list[int], samples: int, commands: list[str]) -> list[str]:
    """Table lines for `check` and `dedup` of the file itself and of made-up ones."""
    tasks = load_tasks(data_path)
    evaluation = folder / "evaluation.jsonl"
    write_jsonl(evaluation, tasks[:: -(-len(tasks) // 1000)])
    against = measured("generate_instruction.py", "check", Path(data_path).resolve(), "--against", evaluation)
    lines = [
        "| command | rows | rows that stay | seconds | CPU seconds | peak memory, GB | growth of CPU time |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        f"| `check --against`, 1,000 of its own rows | {len(tasks):,} of the file | | {figures(against)} | |",
    ]
    before: dict[str, tuple[int, float]] = {}
    for size in sizes:
        rows, unique = folder / "rows.jsonl", folder / "unique.jsonl"
        subprocess.run([sys.executable, __file__, "make_rows", data_path, str(size), str(rows)], check=True)
        for command in commands:
            more = ["--output", unique, "--overwrite", "True"] if command == "dedup" else []
            run = measured("generate_instruction.py", command, rows, *more)
            growth = ""
            if command in before:
                earlier, seconds = before[command]
                growth = f"rows^{math.log(run['cpu_seconds'] / seconds) / math.log(size / earlier):.2f}"
            before[command] = size, run["cpu_seconds"]
            kept = kept_rows(unique, size) if command == "dedup" else None
            shown = "" if kept is None else f"{kept.sum():,}"
            lines.append(f"| `{command}` | {size:,} made up | {shown} | {figures(run)} | {growth} |")
            if kept is not None:
                compare_with_brute_force(rows, kept, samples)
    return [*lines, "", f"The fate of {samples} rows drawn from each made-up file is that of brute force."]


def make_rows(data_path: str, size: int, path: str) -> None:
    """Writes a JSONL file of `size` made-up rows, in a process of its own, whose memory goes with it."""
    texts = [task["instruction"] for task in load_tasks(data_path, require_output=False)]
    made = enumerate(made_up_instructions(texts, size))
    write_jsonl(path, ({"instruction": text, "input": "", "output": f"Answer {i}.", "id": i} for i, text in made))


def kept_rows(path: Path, size: int) -> np.ndarray:
    """Which rows of a made-up file stand in the file that `dedup` wrote."""
    kept = np.zeros(size, bool)
    for row in iter_rows(path):
        kept[row["id"]] = True
    return kept


def compare_with_brute_force(path: Path, kept: np.ndarray, samples: int) -> None:
    """Fails unless each of some rows stays exactly where no earlier row that stays has F1 above 0.7 with it."""
    drawn = np.random.default_rng(0).choice(len(kept), min(samples, len(kept)), replace=False)
    texts = {row["id"]: row["instruction"] for row in iter_rows(path) if row["id"] in set(drawn.tolist())}
    similar = dict.fromkeys(texts, False)
    rows = iter_rows(path)
    for start in range(0, len(kept), BLOCK):
        index = RougeLIndex(row["instruction"] for row in itertools.islice(rows, BLOCK))
        earlier = np.arange(start, start + len(index))
        for number, text in texts.items():
            similar[number] |= bool((index.scores(text)[(earlier < number) & kept[earlier]] > 0.7).any())
    assert all(kept[number] != similar[number] for number in texts), "dedup and brute force differ"


def measured_harvests(data_path: str, folder: Path, targets: list[int], figures_wanted: list[str]) -> list[str]:
    """Table lines for journals of made-up replies."""
    lines = [
        "| tasks kept | similarity figures | seconds | CPU seconds | peak memory, GB |",
        "| ---: | --- | ---: | ---: | ---: |",
    ]
    for target in targets:
        shutil.rmtree(folder / "run", ignore_errors=True)
        make = [sys.executable, __file__, "make_journal", data_path, str(target), str(folder / "run")]
        subprocess.run(make, check=True)
        for wanted in figures_wanted:
            run = measured("generate_instruction.py", "rebuild", folder / "run", "--similarity_figures", wanted)
            kept = sum(1 for _ in iter_rows(folder / "run" / "alpaca_data.json"))
            lines.append(f"| {kept:,} | {'yes' if wanted == 'True' else 'no'} | {figures(run)} |")
    return lines


def make_journal(data_path: str, target: int, folder: str) -> None:
    """Writes a journal whose replies, of 17 made-up tasks each, are enough for `target` tasks to be kept."""
    texts = [task["instruction"] for task in load_tasks(data_path, require_output=False)]
    made = (text for text in made_up_instructions(texts, 2 * target) if not instruction_problem(text))
    seeds = [{"id": "seed", "instruction": "Name a river in Europe.", "input": "", "output": "The Rhine."}]
    records: list[dict] = [{"kind": "run", "time": "", "target": target, "settings": {}, "seeds": seeds}]
    for index in range(-(-3 * target // 34)):
        text = ""
        for number, instruction in enumerate(itertools.islice(made, 17), start=4):
            text += f"###\n{number}. Instruction: " if text else " "
            text += f"{instruction}\n{number}. Input:\n<noinput>\n{number}. Output:\nAnswer.\n"
        records.append({"kind": "reply", "index": index, "text": text, "first_number": 4, "finish_reason": "stop"})
    write_jsonl(Path(folder) / "responses.jsonl", records)


if __name__ == "__main__":
    run_cli({"bench": bench, "make_rows": make_rows, "make_journal": make_journal}, default="bench")
