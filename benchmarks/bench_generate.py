"""Rows per second of generate_instruction.py at several concurrencies, beside the ideal and beside a serial loop.

    python benchmarks/bench_generate.py                                            # full scale, about three minutes
    python benchmarks/bench_generate.py --concurrencies 1,8 --seconds 5 --latency 0.5 --serial_requests 3  # one minute

The server is tests/fake_openai.py in a process of its own; it answers after a time drawn evenly between half and one
and a half times --latency. The ideal is what so many requests at a time could do with exactly those latencies and
nothing else: each starts the moment an earlier one ends. The serial loop is the plain way: one request after the other,
each new instruction compared by rouge_score with all earlier ones.
"""

import contextlib
import heapq
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from alpaca.common.cli import run_cli
from alpaca.common.files import jload
from alpaca.common.run_record import git_commit
from alpaca.generation.parsing import parse_reply
from alpaca.generation.prompting import PROMPT_FILE, Prompter, load_seeds
from alpaca.generation.settings import GenerationSettings

ROOT = Path(__file__).resolve().parent.parent
TASKS = 17  # in a reply: the list of 20 less its three examples


@contextlib.contextmanager
def fake_server(latency: float, log: Path) -> Iterator[str]:
    """The base URL of a fake server in a process of its own, which writes its log of requests when it ends."""
    command = [sys.executable, "tests/fake_openai.py", "--port", "0", "--latency", str(latency)]
    command += ["--tasks", str(TASKS), "--log", str(log)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().split()[-1]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def ideal_seconds(latencies: list[float], concurrency: int) -> float:
    """How long `concurrency` slots take for requests of these lengths, in this order, without any pause."""
    slots = [0.0] * concurrency
    for latency in latencies:
        heapq.heapreplace(slots, slots[0] + latency)
    return max(slots)


def measure(concurrency: int, requests: int, latency: float, shards: int = 1) -> dict[str, float]:
    """One real run, as users start it, for about so many requests in all; `concurrency` is that of each shard.

    Each shard has a server of its own, whose log shows how long the shard asked. rate: rows a second, all shards added
    up; ideal_rate: what they could do; share: of the shard that was farthest from its ideal.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as servers:
        logs, running, begin = [Path(folder) / f"log_{shard}.json" for shard in range(shards)], [], time.monotonic()
        for shard, log in enumerate(logs):
            base_url = servers.enter_context(fake_server(latency, log))
            command = [sys.executable, "generate_instruction.py", "--output_dir", f"{folder}/run"]
            command += ["--base_url", base_url, "--model_name", "fake-model", "--max_concurrency", str(concurrency)]
            command += ["--num_instructions_to_generate", str(int(requests * TASKS * 0.95))]
            command += ["--expected_tasks_per_request", str(TASKS * 0.95), "--shard", f"{shard}/{shards}"]
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            running.append(subprocess.Popen(command, cwd=ROOT, **quiet))
        if any([process.wait() for process in running]):
            raise RuntimeError("a run failed")
        whole = time.monotonic() - begin
        servers.close()
        got = {"requests": 0, "rows": 0, "seconds": 0.0, "whole": whole, "rate": 0.0, "ideal_rate": 0.0, "share": 1.0}
        for shard, log in enumerate(logs):
            entries = [entry for entry in json.loads(log.read_text()) if entry["done"]]
            place = "run" if shards == 1 else f"run/shard_{shard}"
            rows = len(jload(f"{folder}/{place}/alpaca_data.json"))
            seconds = max(entry["end"] for entry in entries) - min(entry["begin"] for entry in entries)
            ideal = ideal_seconds([entry["latency"] for entry in entries], concurrency)
            got["requests"] += len(entries)
            got["rows"] += rows
            got["seconds"] = max(got["seconds"], seconds)
            got["rate"] += rows / seconds
            got["ideal_rate"] += rows / ideal
            got["share"] = min(got["share"], ideal / seconds)
    return got


def serial_loop(requests: int, latency: float) -> float:
    """Rows per second of the plain way over `requests` requests."""
    import openai
    from rouge_score import rouge_scorer
    from rouge_score.tokenizers import DefaultTokenizer

    seeds = load_seeds(ROOT / "seed_tasks.jsonl")
    prompter = Prompter(seeds, GenerationSettings(prompt_text=PROMPT_FILE.read_text()))
    tokenizer = DefaultTokenizer(use_stemmer=False)
    with tempfile.TemporaryDirectory() as folder, fake_server(latency, Path(folder) / "log.json") as base_url:
        client = openai.OpenAI(base_url=base_url, api_key="none")
        pool = [tokenizer.tokenize(seed["instruction"]) for seed in seeds]
        kept, begin = 0, time.monotonic()
        for index in range(requests):
            prompt, _ = prompter.prompt(index, [])
            reply = client.completions.create(model="m", prompt=prompt, max_tokens=3072).choices[0]
            for task in parse_reply(reply.text, 4):
                tokens = tokenizer.tokenize(task.instruction)
                if max(rouge_scorer._score_lcs(tokens, other).fmeasure for other in pool) <= 0.7:
                    pool.append(tokens)
                    kept += 1
        return kept / (time.monotonic() - begin)


def bench(
    concurrencies: str = "1,8,32,128",
    latency: float = 2.0,
    seconds: float = 30.0,
    serial_requests: int = 10,
    shards: int = 1,
) -> None:
    """Prints the table, in Markdown, with hardware, versions, commit and command.

    Args:
        concurrencies: numbers of requests at a time, separated by commas.
        latency: mean seconds before a reply.
        seconds: about how long each run asks.
        serial_requests: requests of the serial loop.
        shards: processes that ask at the same time, each with so many requests at a time.
    """
    levels = [int(level) for level in str(concurrencies).strip("()").split(",")]
    serial = serial_loop(serial_requests, latency)
    model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line), "unknown CPU")
    print(f"{model}, {len(os.sched_getaffinity(0))} cores; {time.strftime('%Y-%m-%d')}; commit {git_commit()}")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("openai", "httpx2", "numpy"))
    print(f"Python {platform.python_version()}, {versions}; latency {latency / 2:g} to {latency * 1.5:g} s")
    print(f"`python {shlex.join(sys.argv)}`\n")
    print("| requests at a time | requests | rows | s | rows/s | ideal rows/s | of the ideal | of the serial loop |")
    print("|---|---|---|---|---|---|---|---|")
    print(f"| serial loop | {serial_requests} | | | {serial:.1f} | | | 1.0 |")
    for concurrency in levels:
        got = measure(concurrency, max(4, round(shards * concurrency * seconds / latency)), latency, shards)
        name = f"{shards} x {concurrency}" if shards > 1 else concurrency
        took = f"{got['seconds']:.1f} ({got['whole']:.1f} with start and files)"
        rates = f"{got['rate']:.1f} | {got['ideal_rate']:.1f} | {got['share']:.1%} | {got['rate'] / serial:.1f}"
        print(f"| {name} | {got['requests']:,} | {got['rows']:,} | {took} | {rates} |", flush=True)


if __name__ == "__main__":
    run_cli({"bench": bench}, default="bench")
