"""Generation on a bad day: kills, rough servers, outages, errors in mid-run. Nothing paid for is lost or doubled."""

import json

import kill_generate
import pytest
from fake_openai import FakeOpenAI
from test_generate_instruction import contents, generate, replies

import generate_instruction
from alpaca.common.errors import UserError
from alpaca.common.files import jload


def test_sigkill_at_random_moments(tmp_path):
    """Every reply that the server finished is in the journal once, and the files are the journal's rebuild.

    A short form of `python tests/kill_generate.py --kills 200`.
    """
    figures = kill_generate.kill_and_check(6, tmp_path, seed=1)
    assert figures["rows kept"] > 0 and figures["replies in the journal"] > 20


def test_a_rough_server_gives_the_rows_of_a_calm_one(tmp_path):
    """429, 500, resets in mid-body, slow drips, broken JSON: slower, but the same rows byte for byte."""
    made = {}
    rough = ["429", None, "500", None, "reset", None, "drip", None, "broken_json", None]
    for name, faults in (("calm", {}), ("rough", lambda number, body: rough[number % len(rough)])):
        with FakeOpenAI(faults=faults, latency=0.005, retry_after=0.05, tasks_per_reply=4) as server:
            generate(tmp_path / name, server, 60, max_concurrency=12)
        made[name] = contents(tmp_path / name)
    assert made["calm"] == made["rough"]
    handled = jload(tmp_path / "rough" / "run.json")["result"]["handled"]
    assert {"429 rate limit", "500 server error", "connection lost", "broken JSON"} <= set(handled)


def test_cut_filtered_and_empty_replies_are_counted_and_bounded(tmp_path, capsys):
    """finish_reason length and content_filter drop the last task; empty choices and empty texts end nothing."""
    cycle = ["length", "content_filter", "empty_choices", "policy", "empty", None]
    with FakeOpenAI(faults=lambda number, body: cycle[number % 6], tasks_per_reply=4) as server:
        generate(tmp_path, server, 30, max_concurrency=3)
    rows = jload(tmp_path / "alpaca_data.json")
    whole = "".join(entry["text"] or "" for entry in server.log)
    assert len(rows) == 30 and all(f"Output:\n{row['output']}\n" in whole for row in rows)
    failed = sum("error" in record for record in replies(tmp_path))
    assert failed > 2 and f"{failed} requests failed for good" in capsys.readouterr().out


def test_an_outage_stops_the_run_in_bounded_time_and_keeps_everything(tmp_path):
    """A server that is down for good ends the run with its reason; the same command goes on when it is back."""
    with FakeOpenAI(faults=lambda number, body: "503" if number >= 10 else None, tasks_per_reply=4) as server:
        with pytest.raises(UserError, match="20 requests in a row failed.*503"):
            generate(tmp_path, server, 400, max_retries=0)
        assert len(server.log) < 60
        paid = len(server.finished())
        answered = [record for record in replies(tmp_path) if "text" in record]
        assert len(answered) == paid == 10 and len(jload(tmp_path / "alpaca_data.json")) > 20
        server.faults = {}
        generate(tmp_path, server, 60)
    assert len(jload(tmp_path / "alpaca_data.json")) == 60


@pytest.mark.parametrize("fault", ["401", "quota"])
def test_a_permanent_error_in_mid_run_stops_at_once_and_keeps_what_was_paid(tmp_path, run_script, fault):
    """Exit status 2, the server's own words, no further requests, and files with all that was answered."""
    with FakeOpenAI(faults=lambda number, body: fault if number >= 12 else None, latency=0.01) as server:
        done = run_script(
            "generate_instruction.py", "--output_dir", tmp_path, "--base_url", server.base_url, "--model_name", "m",
            "--num_instructions_to_generate", 5000, "--max_concurrency", 4, status=2,
        )  # fmt: skip
        assert len(server.log) <= 12 + 4
    assert "What was answered is kept" in done.stderr and "Traceback" not in done.stderr
    assert len([record for record in replies(tmp_path) if "text" in record]) == 12
    before = contents(tmp_path)
    assert len(json.loads(before["alpaca_data.json"])) > 40
    generate_instruction.rebuild(str(tmp_path))
    assert contents(tmp_path) == before
    assert "UserError" in jload(tmp_path / "run.json")["outcome"]


def test_rate_limits_hold_back_everybody_but_lose_nothing(tmp_path):
    """A server with room for three at a time answers 429 to the rest; all requests get through in the end."""
    with FakeOpenAI(max_parallel=3, latency=0.02, retry_after=0.1, tasks_per_reply=4) as server:
        generate(tmp_path, server, 80, max_concurrency=12)
    assert len(jload(tmp_path / "alpaca_data.json")) == 80
    assert all("text" in record for record in replies(tmp_path))


def test_a_full_disk_stops_the_run_before_more_is_paid(tmp_path, monkeypatch):
    """A reply that cannot be written down must stop the asking, not be forgotten."""
    from alpaca.common import journal as reply_journal

    real, written = reply_journal.os.write, []

    def full(descriptor, data):
        written.append(len(data))
        if len(written) > 5:
            raise OSError(28, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(reply_journal.os, "write", full)
    with FakeOpenAI(latency=0.01) as server, pytest.raises((UserError, OSError), match="No space left"):
        generate(tmp_path, server, 5000, max_concurrency=4)
    assert len(server.log) < 30
