"""Shards: several processes ask, and their journals join to the files of one."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from fake_openai import FakeOpenAI
from test_generate_instruction import contents, generate

import generate_instruction
from alpaca.common.errors import UserError
from alpaca.common.files import jload
from alpaca.common.journal import read_records
from alpaca.common.shard import Shard, find_shard


@pytest.fixture
def server():
    with FakeOpenAI(tasks_per_reply=4) as running:
        yield running


def split(run, out, count):
    """The folders that `count` shards would have left, had they got the replies of a whole run."""
    begin, *records = read_records(run / "responses.jsonl")
    for index in range(count):
        shard = Shard(index, count)
        settings = begin["settings"] | ({} if count == 1 else {"shard": str(shard)})
        mine = [begin | {"target": shard.share(begin["target"]), "settings": settings}]
        mine += [r for r in records if r["kind"] in ("reply", "answer") and r["index"] % count == index]
        (out / f"shard_{index}").mkdir(parents=True)
        (out / f"shard_{index}" / "responses.jsonl").write_text("".join(json.dumps(r) + "\n" for r in mine))


@pytest.mark.parametrize("count", [1, 2, 8])
@pytest.mark.parametrize("options", [{}, {"answer_separately": True}])
def test_joined_shards_are_one_process(tmp_path, server, count, options):
    """The same replies give the same files, byte for byte, however many processes asked."""
    server.faults = lambda number, body: {3: "length", 5: "policy"}.get(number)
    generate(tmp_path / "one", server, 61, **options)
    split(tmp_path / "one", tmp_path / "out", count)
    for _ in range(2):  # its own files are replaced without a complaint
        generate_instruction.rebuild(str(tmp_path / "joined"), shards=str(tmp_path / "out" / "shard_*"))
        assert contents(tmp_path / "joined") == contents(tmp_path / "one")


@pytest.mark.parametrize("options", [{}, {"sample_from_generated": 2, "sample_lag": 3}])
def test_shards_ask_each_request_once_and_say_what_is_missing(tmp_path, server, capsys, monkeypatch, options):
    """Shard I has the requests I modulo N, an Nth of the tasks, and its folder; what they have in common goes."""
    options["expected_tasks_per_request"] = 4
    for index in range(3):
        with monkeypatch.context() as torchrun:  # as torchrun says it
            torchrun.setenv("RANK", str(index))
            torchrun.setenv("WORLD_SIZE", "3")
            generate(tmp_path / "out", server, 50, price_input=1, price_output=1, **options)
    journals = [read_records(tmp_path / "out" / f"shard_{index}" / "responses.jsonl") for index in range(3)]
    indices = [[r["index"] for r in journal if r["kind"] == "reply"] for journal in journals]
    assert all(index % 3 == shard for shard, found in enumerate(indices) for index in found)
    assert [journal[0]["target"] for journal in journals] == [17, 17, 16]
    # A shard that was killed before its first record is one that is missing, not an end of all.
    shutil.copytree(tmp_path / "out", tmp_path / "begun")
    (tmp_path / "begun/shard_2/responses.jsonl").write_bytes(b"")
    generate_instruction.rebuild(str(tmp_path / "some"), shards=str(tmp_path / "begun" / "shard_*"))
    assert "1 of 3 shards are missing: 2" in capsys.readouterr().out
    # Two shards with the same ideas: what the second has in common with the first is missing.
    path = tmp_path / "out" / "shard_1" / "responses.jsonl"
    text = {r["index"] + 1: r["text"] for r in journals[0] if r["kind"] == "reply"}
    copied = [r | {"text": text[r["index"]]} if r.get("index") in text else r for r in journals[1]]
    path.write_text("".join(json.dumps(r) + "\n" for r in copied))
    capsys.readouterr()
    generate_instruction.rebuild(str(tmp_path / "joined"), shards=str(tmp_path / "out" / "shard_*"))
    rows, out = jload(tmp_path / "joined" / "alpaca_data.json"), capsys.readouterr().out
    assert 30 < len(rows) < 50 and len({row["instruction"] for row in rows}) == len(rows)
    wanted = int(re.search(r"--num_instructions_to_generate (\d+)", out)[1])
    assert f"{50 - len(rows)} of 50 tasks are missing" in out and wanted > 50
    assert "--shard I/3" in out  # else the command is one for a single process
    for index in range(3):
        generate(tmp_path / "out", server, wanted + 9, shard=f"{index}/3", price_input=1, price_output=1, **options)
    generate_instruction.rebuild(str(tmp_path / "joined"), shards=str(tmp_path / "out" / "shard_*"))
    assert len(jload(tmp_path / "joined" / "alpaca_data.json")) >= 50


def test_killed_shards_join_to_the_same_files(tmp_path, run_script):
    """kill -9 of any shard and its resume change nothing."""
    with FakeOpenAI(tasks_per_reply=4, latency=0.05) as server:
        command = ["generate_instruction.py", "--output_dir", tmp_path / "out", "--base_url", server.base_url]
        command += ["--model_name", "fake-model", "--num_instructions_to_generate", 160, "--num_tasks_per_request", 7]
        command += ["--max_concurrency", 2]
        for index in range(2):
            environment = {"RANK": str(index), "WORLD_SIZE": "2"}
            seen = len(server.log)
            line = ["env", *(f"{k}={v}" for k, v in environment.items()), sys.executable, *map(str, command)]
            process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while len(server.finished()) < seen + 6:
                time.sleep(0.02)
            process.kill()
            process.wait()
            run_script(*command, env=environment)
        pattern = str(tmp_path / "out" / "shard_*")
        done = run_script("generate_instruction.py", "rebuild", "--output_dir", tmp_path / "a", "--shards", pattern)
        for index in range(2):
            generate(tmp_path / "calm", server, 160, shard=f"{index}/2", max_concurrency=2)
    generate_instruction.rebuild(str(tmp_path / "b"), shards=str(tmp_path / "calm" / "shard_*"))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    if "missing" in done.stdout:
        assert shlex.split(done.stdout.strip().splitlines()[-1])[:2] == ["python", "generate_instruction.py"]


def test_folders_that_are_no_shards_of_one_run_are_refused(tmp_path, server):
    generate(tmp_path / "shard_a", server, 8)
    generate(tmp_path / "shard_b", server, 8)
    with pytest.raises(UserError, match="are both shard 0/1"):
        generate_instruction.rebuild(str(tmp_path / "out"), shards=str(tmp_path / "shard_*"))
    generate(tmp_path / "other", server, 8, shard="1/2")
    (tmp_path / "other" / "shard_1").rename(tmp_path / "shard_c")
    (tmp_path / "shard_a").rename(tmp_path / "another")
    with pytest.raises(UserError, match="no shards of one run:\n.*--shard: default, now 0/2"):
        generate_instruction.rebuild(str(tmp_path / "out"), shards=str(tmp_path / "shard_*"))
    with pytest.raises(UserError, match="names no folder"):
        generate_instruction.rebuild(str(tmp_path / "out"), shards=str(tmp_path / "none_*"))
    with pytest.raises(UserError, match="--shard 1/2, now 1/3; they cannot be mixed"):
        generate(tmp_path / "other", server, 8)
        (tmp_path / "shard_c").rename(tmp_path / "other" / "shard_1")
        generate(tmp_path / "other", server, 8, shard="1/3")


@pytest.mark.parametrize(
    ("environment", "shard"),
    [
        ({}, Shard()), ({"RANK": "3", "WORLD_SIZE": "8"}, Shard(3, 8)), ({"RANK": "0", "WORLD_SIZE": "1"}, Shard()),
        ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_COUNT": "4"}, Shard(2, 4)),
        ({"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2", "RANK": "2", "WORLD_SIZE": "4"}, Shard(6, 8)),
    ],
)  # fmt: skip
def test_shards_of_torchrun_and_slurm(monkeypatch, environment, shard):
    """Each process finds its part by itself; a flag comes before the environment."""
    for name in ("RANK", "WORLD_SIZE", "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert find_shard() == shard and find_shard("1/2") == Shard(1, 2) and find_shard("0/1").whole
    assert [shard.item(shard.position(item)) for item in range(shard.index, 40, shard.count)] == list(
        range(shard.index, 40, shard.count)
    )
    for wrong in ("2/2", "1", "-1/2", "a/b", "1/0"):
        with pytest.raises(UserError, match="--shard takes I/N"):
            find_shard(wrong)


def test_gaps_in_an_array_are_named(monkeypatch):
    """--array=0,5 numbers two tasks with a gap: their parts would overlap or miss some."""
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    with pytest.raises(UserError, match="without gaps"):
        find_shard()


def test_ray_starts_shards_and_joins_them(tmp_path):
    """docs/ray_generate.py on the cluster that Ray starts on this machine."""
    pytest.importorskip("ray")
    with FakeOpenAI(tasks_per_reply=4) as server:
        command = [sys.executable, "docs/ray_generate.py", "2", "--output_dir", tmp_path, "--model_name", "fake-model"]
        command += ["--base_url", server.base_url, "--num_instructions_to_generate", "20"]
        subprocess.run(list(map(str, command)), cwd=ROOT, check=True, timeout=300)
    assert len(jload(tmp_path / "alpaca_data.json")) >= 15
    assert all((tmp_path / f"shard_{index}" / "run.json").is_file() for index in range(2))
