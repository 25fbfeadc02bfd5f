"""generate_instruction.py --batch_api True against a local server: batches killed, refused, halved and expired."""

import json
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from fake_openai import FakeOpenAI, made_up_reply
from test_generate_instruction import contents, generate, replies

from alpaca.common.errors import UserError
from alpaca.common.files import jload
from alpaca.common.journal import read_records
from alpaca.generation.harvest import harvest_journal


@pytest.fixture
def server():
    with FakeOpenAI(tasks_per_reply=4) as running:
        yield running


def test_batches_until_the_target(tmp_path, server):
    """Half the price, and the same tasks as direct requests give."""
    server.faults = lambda number, body: "500" if number % 7 == 6 else None
    options = {"price_input": 1.0, "price_output": 1.0, "batch_poll_seconds": 0.01}
    generate(tmp_path / "batch", server, 40, batch_api=True, **options)
    assert len(jload(tmp_path / "batch" / "regen.json")) == 40 and server.batches
    by_batch = [record for record in replies(tmp_path / "batch") if record.get("batch")]
    direct = [record for record in replies(tmp_path / "batch") if "text" in record and not record.get("batch")]
    assert len(by_batch) > 5 * len(direct)  # one request a round is asked directly, to learn what the model accepts
    tokens = sum(sum(record["usage"].values()) for record in by_batch) / 2
    tokens += sum(sum(record["usage"].values()) for record in direct)
    assert jload(tmp_path / "batch" / "run.json")["result"]["usd"] == pytest.approx(tokens / 1e6, abs=2e-6)
    assert (
        contents(tmp_path / "batch")["regen.json"]
        == "".join(harvest_journal(read_records(tmp_path / "batch" / "responses.jsonl")).files()["regen.json"]).encode()
    )


def test_a_batch_interrupted_between_submit_and_download_is_not_submitted_twice(tmp_path):
    """Killed while it polls, and killed before it could even note the batch's id: one batch, and every answer once."""
    with FakeOpenAI(tasks_per_reply=4, batch_polls=10**9) as server:
        command = [sys.executable, "generate_instruction.py", "--output_dir", str(tmp_path / "a"), "--base_url"]
        command += [server.base_url, "--model_name", "m", "--num_instructions_to_generate", "30", "--batch_api", "True"]
        command += ["--num_tasks_per_request", "7", "--batch_poll_seconds", "0.05"]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not any(batch["polls"] > 2 for batch in list(server.batches.values())):
            time.sleep(0.02)
        process.kill()
        process.wait()
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        path = tmp_path / "b" / "responses.jsonl"
        lines = [line for line in path.read_text().splitlines() if "batch_submitted" not in line]
        path.write_text("\n".join(lines) + "\n")
        server.batch_polls = 0
        for name in "ab":
            generate(tmp_path / name, server, 30, model_name="m", batch_api=True, batch_poll_seconds=0.01)
            own = json.loads(lines[-1])["run_id"]
            assert sum(b["metadata"] == {"run_id": own, "number": "0"} for b in server.batches.values()) == 1
            indices = [record["index"] for record in replies(tmp_path / name)]
            assert indices == list(range(len(indices))) and len(jload(tmp_path / name / "regen.json")) == 30
        uploads = [file for file in server.files.values() if file["filename"] == f"{own}-0.jsonl"]
        assert len(uploads) == 1


def test_a_batch_of_more_requests_than_sample_lag(tmp_path, server):
    """The prompts of requests 65 and later looked for tasks of replies that had not come: real batches never began."""
    options = {"batch_poll_seconds": 0.01, "expected_tasks_per_request": 4.0}
    generate(tmp_path / "batch", server, 330, batch_api=True, **options)
    assert len(jload(tmp_path / "batch" / "regen.json")) == 330
    assert max(batch["request_counts"]["total"] for batch in server.batches.values()) > 70


def test_a_batch_that_finds_no_room_is_halved(tmp_path, server, capsys):
    """OpenAI limits the tokens of all waiting batches: the same batch was refused at every start."""
    run_batch = server._run_batch

    def queue(batch):
        number = server.files[batch["input_file_id"]]["content"].count(b"\n")
        if number <= 3:
            return run_batch(batch)
        error = {"code": "token_limit_exceeded", "message": "Enqueued token limit reached", "param": None, "line": None}
        batch |= {"status": "failed", "errors": {"object": "list", "data": [error]}}

    server._run_batch = queue
    generate(tmp_path / "run", server, 40, batch_api=True, batch_poll_seconds=0.01)
    assert len(jload(tmp_path / "run" / "regen.json")) == 40
    assert "no room for" in capsys.readouterr().out
    sizes = [batch["request_counts"]["total"] for batch in server.batches.values()]
    assert sizes[0] > 3 and sum(size > 3 for size in sizes) <= 3
    direct = [record for record in replies(tmp_path / "run") if "text" in record and not record.get("batch")]
    assert len(direct) == sum(size <= 3 for size in sizes)  # a halved batch asks no further one at the full price
    server._run_batch = run_batch  # the queue is empty again: batches grow
    generate(tmp_path / "run", server, 140, batch_api=True, batch_poll_seconds=0.01)
    assert max(batch["request_counts"]["total"] for batch in list(server.batches.values())[len(sizes) :]) > 3


def test_a_refused_batch_leaves_the_files_of_what_was_answered(tmp_path, server, capsys):
    """Paid tasks were in the journal alone, and nothing said how to go on."""

    def refuse(batch):
        batch |= {
            "status": "failed",
            "errors": {"object": "list", "data": [{"code": "x", "message": "No.", "line": 1}]},
        }

    server._run_batch = refuse
    with pytest.raises(UserError, match="OpenAI refused batch batch_0: No."):
        generate(tmp_path / "run", server, 40, batch_api=True, batch_poll_seconds=0.01)
    assert jload(tmp_path / "run" / "alpaca_data.json")
    assert "the same command goes on from there" in capsys.readouterr().out


def test_a_batch_whose_replies_hold_line_separators(tmp_path, server):
    """U+2028 and U+0085 stand unescaped in JSON, and text split at them loses a day's paid batch."""
    server.reply = lambda body: made_up_reply(body["messages"][-1]["content"], 4).rstrip() + " so\u2028it\x85ends"
    generate(tmp_path / "batch", server, 12, batch_api=True, batch_poll_seconds=0.01)
    by_batch = [record for record in replies(tmp_path / "batch") if record.get("batch")]
    assert by_batch and all(record["text"].endswith(" so\u2028it\x85ends") for record in by_batch)


def test_a_first_request_that_is_refused_does_not_block_the_batch(tmp_path, server):
    """Guards: a prompt that the server's policy refuses, which every later start asked first again."""
    server.faults = lambda number, body: "policy" if number < 2 else None
    generate(tmp_path / "run", server, 20, batch_api=True, batch_poll_seconds=0.01)
    assert len(jload(tmp_path / "run" / "regen.json")) == 20
    assert ["error" in record for record in replies(tmp_path / "run")][:3] == [True, True, False]


@pytest.mark.parametrize(
    ("fault", "message"), [("policy", "5 requests before a batch failed"), ("empty", "were empty")]
)
def test_a_batch_is_not_submitted_behind_failures_alone(tmp_path, server, fault, message):
    """Guards: a day's batch of empty replies, paid for."""
    server.faults = lambda number, body: fault
    with pytest.raises(UserError, match=message):
        generate(tmp_path / "run", server, 20, batch_api=True, batch_poll_seconds=0.01)
    assert not server.batches and len(replies(tmp_path / "run")) == 5


def test_requests_without_a_reply_are_not_nothing_new(tmp_path, server):
    """Guards: an expired batch, after which the run ended as if the model had no ideas left."""
    server.faults = lambda number, body: "500" if 3 <= number < 12 else None
    options = {"batch_api": True, "batch_poll_seconds": 0.01, "expected_tasks_per_request": 4.0}
    generate(tmp_path / "run", server, 40, max_requests_without_new=4, **options)
    assert len(jload(tmp_path / "run" / "regen.json")) == 40
    assert "xxxxx" in "".join("x" if "error" in record else "." for record in replies(tmp_path / "run"))


def test_a_batch_keeps_to_the_budget_and_reports_refusals(tmp_path, server):
    """The budget bounds a batch before it is submitted; a batch that fails as a whole says why."""
    options = {
        "price_input": 1.0,
        "price_output": 1.0,
        "batch_poll_seconds": 0.01,
        "batch_api": True,
        "max_tokens": 500,
    }
    generate(tmp_path / "run", server, 400, max_cost_usd=0.02, **options)
    result = jload(tmp_path / "run" / "run.json")["result"]
    assert result["ended_by"] == "budget" and 0.01 < result["usd"] <= 0.02
    server.faults = lambda number, body: "500" if body in [b["body"] for b in asked] else None
    asked = []
    server._run_batch_of = server._run_batch

    def fail(batch):
        lines = server.files[batch["input_file_id"]]["content"].decode().splitlines()
        asked.extend(json.loads(line) for line in lines)
        server._run_batch_of(batch)

    server._run_batch = fail
    with pytest.raises(UserError, match="every request of batch .* failed"):
        generate(tmp_path / "bad", server, 40, **options)
