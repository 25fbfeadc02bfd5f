"""Dedup measured beside the plain way: one candidate against the whole pool, and whole files of growing size.

    python benchmarks/bench_dedup.py --data_path alpaca_data.json --sizes 10000,100000,1000000     # full scale, minutes
    python benchmarks/bench_dedup.py --data_path alpaca_data.json --sizes 10000 --plain_candidates 1     # one minute

The made-up instructions are built like real ones: the beginning of one instruction of the file and the end of another,
in which the frequent words stay and the others are drawn anew from a Zipf law. The law goes on beyond the file's own
vocabulary with invented words, so that the vocabulary grows with the text as it does in real ones. One in fifty repeats
an earlier instruction with one word changed.
"""

import collections
import functools
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from alpaca.common.cli import run_cli
from alpaca.common.files import atomic_write, refuse_existing
from alpaca.common.run_record import git_commit, package_versions
from alpaca.common.tasks import load_tasks
from alpaca.generation.rouge import RougeLIndex, first_repeats, rouge_tokens, token_sequences

FREQUENT = 200  # words of the file that stay where they are
VOCABULARY = 200_000  # real and invented words together
ZIPF = 1.8  # gives 52,000 made-up instructions about as many distinct words as the released ones have


def made_up_instructions(texts: list[str], number: int, seed: int = 0) -> list[str]:
    """`number` instructions with the build, lengths and word frequencies of `texts`; see the top of this file."""
    rng = np.random.default_rng(seed)
    tokens = [words for words in map(rouge_tokens, texts) if words]
    counts = collections.Counter(itertools.chain.from_iterable(tokens))
    words = sorted(counts, key=lambda word: (-counts[word], word))
    frequent = set(words[:FREQUENT])
    words += [f"word{i}" for i in range(len(words), VOCABULARY)]
    # Zipf over the ranks after the frequent words, by inverting its integral.
    power = 1 - ZIPF
    ranks = rng.uniform(VOCABULARY**power, FREQUENT**power, number * 8) ** (1 / power)
    draw = map(words.__getitem__, itertools.cycle(ranks.astype(int).tolist()))

    heads, tails = rng.integers(len(tokens), size=(2, number)).tolist()
    cuts, copied, origins = rng.random(number), rng.random(number) < 0.02, rng.random(number)
    made: list[str] = []
    for i in range(number):
        if copied[i] and made:
            chosen = made[int(origins[i] * i)].split()
            chosen[int(cuts[i] * len(chosen))] = next(draw)
        else:
            head, tail = tokens[heads[i]], tokens[tails[i]]
            build = head[: math.ceil(cuts[i] * len(head))] + tail[math.ceil(cuts[i] * len(tail)) :]
            chosen = [word if word in frequent else next(draw) for word in build]
        made.append(" ".join(chosen))
    return made


def bench(
    data_path: str,
    sizes: str = "10000,100000",
    candidates: int = 200,
    plain_candidates: int = 3,
    processes: int = 16,
    output_path: str | None = None,
    overwrite: bool = False,
) -> None:
    """Prints the two tables as Markdown.

    Args:
        data_path: a data set; its instructions are the pool, and what made-up ones are built from.
        sizes: how many made-up instructions to deduplicate, comma-separated; 1000000 takes minutes.
        candidates: how many candidates RougeLIndex and rapidfuzz score.
        plain_candidates: how many candidates rouge_score scores, at one to two seconds each for 52,002 instructions.
        processes: processes of the original's pool, which it starts anew for each candidate.
        output_path: a Markdown file for the tables.
        overwrite: replace output_path where it exists.
    """
    if output_path:
        refuse_existing(output_path, overwrite)
    if isinstance(sizes, int):
        sizes = [sizes]
    elif isinstance(sizes, str):
        sizes = [int(size) for size in sizes.split(",")]
    texts = [task["instruction"] for task in load_tasks(data_path, require_output=False)]
    lines = [f"# Dedup, {time.strftime('%Y-%m-%d')}", "", *environment(), ""]
    lines += [f"## One candidate against {len(texts):,} instructions", ""]
    lines += against_the_pool(texts, candidates, plain_candidates, processes)
    lines += [
        "",
        "## Whole files, deduplicated exactly (`first_repeats`, F1 above 0.7 against every earlier row that stayed)",
        "",
    ]
    lines += whole_files(data_path, len(texts), sizes)
    table = "\n".join(lines) + "\n"
    print(table)
    if output_path:
        with atomic_write(output_path) as stream:
            stream.write(table)


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

    made = made_up_instructions(texts, candidates, seed=1)
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


def whole_files(data_path: str, rows: int, sizes: list[int]) -> list[str]:
    """A table line for the file itself and for each size, each measured in a process of its own."""
    lines = [
        "| instructions | tokens | words | kept | seconds | CPU seconds | peak memory, GB | growth of CPU time |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    before = None
    for size in [0, *sizes]:
        command = [sys.executable, __file__, "one_file", data_path, str(size)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        result = json.loads(done.stdout)
        growth = ""
        if size:
            if before:
                exponent = math.log(result["cpu_seconds"] / before[1]) / math.log(size / before[0])
                growth = f"rows^{exponent:.2f}"
            before = size, result["cpu_seconds"]
        name = f"{size:,} made up" if size else f"{rows:,} of the file"
        lines.append(
            f"| {name} | {result['tokens']:,} | {result['words']:,} | {result['kept']:,} | {result['seconds']:.1f} "
            f"| {result['cpu_seconds']:.1f} | {result['gigabytes']:.2f} | {growth} |"
        )
    return lines


def one_file(data_path: str, size: int) -> None:
    """Deduplicates `size` made-up instructions, or the file's own where it is 0, and prints the figures as JSON."""
    texts = [task["instruction"] for task in load_tasks(data_path, require_output=False)]
    if size:
        texts = made_up_instructions(texts, size)
    begin, cpu_begin = time.perf_counter(), time.process_time()
    gone = first_repeats(token_sequences(texts)).rows
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
    # Not getrusage: its peak is the parent's where a large process starts this one.
    gigabytes = int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 2**20
    words = collections.Counter(itertools.chain.from_iterable(map(rouge_tokens, texts)))
    figures = {"tokens": words.total(), "words": len(words), "kept": len(texts) - len(gone)}
    print(json.dumps({**figures, "seconds": seconds, "cpu_seconds": cpu_seconds, "gigabytes": gigabytes}))


if __name__ == "__main__":
    run_cli({"bench": bench, "one_file": one_file}, default="bench")
