"""Kills a generation run with SIGKILL at random moments, again and again, and checks that nothing is lost or doubled.

    python tests/generation/kill_generate.py --kills 200            # about ten minutes
    python tests/generation/kill_generate.py --kills 5              # one minute

The test suite runs a few kills.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fake_openai import FakeOpenAI, made_up_reply  # noqa: E402

ROUGH = {"429": 0.08, "500": 0.06, "reset": 0.06, "drip": 0.1, "broken_json": 0.06, "length": 0.05}
# Seconds. A reply that left the server less than this before the kill may have been in the network or the kernel or, on
# a machine with more to do than cores, in a process that waited for its turn. The longest time is printed.
ON_THE_WAY = 1.0


def run_until_killed(command: list[str], server: FakeOpenAI, rng: random.Random) -> float:
    """Starts the command, kills it at a random moment, and returns when that was."""
    seen = len(server.log)
    errors = tempfile.TemporaryFile("w+")  # not a pipe, which nobody would empty
    process = subprocess.Popen(command, cwd=ROOT, stdout=errors, stderr=errors)
    if rng.random() < 0.15:
        time.sleep(rng.uniform(0, 1.5))  # while it starts, reads the journal, or writes its first lines
    else:
        while len(server.log) == seen and process.poll() is None:
            time.sleep(0.005)
        time.sleep(rng.expovariate(1 / 0.35))
    if process.poll() is not None:
        errors.seek(0)
        raise AssertionError(f"the run ended by itself, with status {process.returncode}: {errors.read()[-3000:]}")
    process.kill()
    process.wait()
    errors.close()
    return time.monotonic()


def kill_and_check(kills: int, folder: Path, seed: int = 0) -> dict[str, float]:
    """Runs the whole trial in `folder` and returns its figures; AssertionError where something is lost or doubled."""
    rng = random.Random(seed)
    output = folder / "run"
    with FakeOpenAI(
        faults=ROUGH, latency=lambda r: r.uniform(0.01, 0.3), retry_after=0.05, tasks_per_reply=4
    ) as server:
        command = [
            sys.executable,
            "generate_instruction.py",
            "--output_dir",
            str(output),
            "--base_url",
            server.base_url,
        ]
        command += ["--model_name", "fake-model", "--num_instructions_to_generate", "1000000"]
        command += ["--num_tasks_per_request", "7", "--max_requests_without_new", "30", "--max_retries", "9"]
        killed_at = [run_until_killed(command, server, rng) for _ in range(kills)]
        asked = len(server.log)
        # The last run ends by itself: the teacher behaves well now, and has no ideas left.
        server.faults, server.reply = {}, "I have no more ideas."
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    records = [json.loads(line) for line in (output / "responses.jsonl").read_bytes().splitlines()]
    replies = [record for record in records if record["kind"] == "reply"]
    indices = [record["index"] for record in replies]
    assert sorted(indices) == list(range(len(indices))), "an index is missing or there twice"
    given_up = [record for record in replies if "error" in record]  # three broken replies in a row, for instance
    replies = [record for record in replies if "text" in record]
    assert len(given_up) <= max(1, len(replies) // 200), "too many requests were given up"

    # Every reply in the journal is one that the server sent, once, to the prompt that belongs to its index. "Sent" is
    # more than "finished": a client that read a reply, wrote it down and died is gone when the server looks again.
    sent = {entry["request_id"]: entry for entry in server.log if entry["status"] == 200 and entry["text"] is not None}
    finished = {entry["request_id"] for entry in server.finished()}
    ids = [record["request_id"] for record in replies]
    assert len(set(ids)) == len(ids), "a reply is in the journal twice"
    for record in replies:
        entry = sent[record["request_id"]]
        assert record["text"] == entry["text"]
        if record["finish_reason"] == "stop" and record["text"] != server.reply:
            prompt = (entry["body"].get("messages") or [{"content": entry["body"].get("prompt")}])[-1]["content"]
            assert record["text"] == made_up_reply(prompt, 4)

    # And every reply that the server finished is there, but for those on the way when the process died. One that was
    # asked for before a kill and finished after it had nobody to reach.
    on_the_way = []
    for request_id in finished - set(ids):
        begin, end = sent[request_id]["begin"], sent[request_id]["end"]
        if not any(begin <= at <= end for at in killed_at):
            on_the_way.append(min((at - end for at in killed_at if at >= end), default=float("inf")))
    assert all(late < ON_THE_WAY for late in on_the_way), f"replies were lost: {sorted(on_the_way)[-5:]}"

    # The final files are what the journal gives, and hold no row twice.
    final = {name: (output / name).read_bytes() for name in ("regen.json", "alpaca_data.json", "rejections.jsonl")}
    copy = folder / "rebuilt"
    copy.mkdir()
    shutil.copy(output / "responses.jsonl", copy)
    rebuild = [sys.executable, "generate_instruction.py", "rebuild", "--output_dir", str(copy)]
    subprocess.run(rebuild, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert all((copy / name).read_bytes() == data for name, data in final.items()), "rebuild gives other files"
    rows = json.loads(final["alpaca_data.json"])
    assert len({row["instruction"] for row in rows}) == len(rows)
    assert not list(output.glob(".*json*.partial")), "a half-written file remained"
    return {
        "kills": kills,
        "requests during the kills": asked,
        "replies the server finished": len(finished),
        "replies in the journal": len(replies),
        "requests given up": len(given_up),
        "replies on the way at a kill, asked again": len(on_the_way),
        "longest such time (ms)": round(1000 * max(on_the_way, default=0.0), 1),
        "rows kept": len(rows),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=int(os.environ.get("KILLS", 200)))
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        for name, value in kill_and_check(flags.kills, Path(place), flags.seed).items():
            print(f"{name:>42}: {value:,}")
    print(f"{'seconds':>42}: {time.monotonic() - begin:,.0f}")
