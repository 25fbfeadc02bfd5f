"""Generation on a bad day: kills, rough servers, outages, errors in mid-run. Nothing paid for is lost or doubled."""

import json
import signal
import subprocess
import sys
import time

import kill_generate
import pytest
from conftest import ROOT
from fake_openai import FakeOpenAI, made_up_reply
from test_generate_instruction import contents, generate, replies

import generate_instruction
from alpaca.common import journal
from alpaca.common.errors import UserError
from alpaca.common.files import jload


def test_sigkill_at_random_moments(tmp_path):
    """Every reply that the server finished is in the journal once, and the files are the journal's rebuild.

    A short form of `python tests/generation/kill_generate.py --kills 200`.
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
    real, written = journal.os.write, []

    def full(descriptor, data):
        written.append(len(data))
        if len(written) > 5:
            raise OSError(28, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(journal.os, "write", full)
    with FakeOpenAI(latency=0.01) as server, pytest.raises((UserError, OSError), match="No space left"):
        generate(tmp_path, server, 5000, max_concurrency=4)
    assert len(server.log) < 30


# ----------------------------------------------------------------------------------------------------------------------
# Replies that are no replies.


def test_a_reply_in_another_form_is_journaled_as_it_came(tmp_path):
    """A content in parts crashed before the journal, and the paid reply was lost."""

    def reply(body):
        text = made_up_reply(body["messages"][-1]["content"], 4)
        return {"sent": {"choices": [{"message": {"content": [{"type": "text", "text": text}]}}], "usage": "a lot"}}

    with FakeOpenAI(reply=reply) as server:
        generate(tmp_path, server, 12)
    assert len(jload(tmp_path / "alpaca_data.json")) == 12
    assert all(record["sent"]["usage"] == "a lot" for record in replies(tmp_path))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"faults": {"html": 1.0}}, "5 requests in a row.*Sign in to the network"),
        ({"reply": {"sent": {"error": "no backend is up"}}}, "5 requests in a row.*no backend is up"),
    ],
)
def test_five_replies_in_a_row_that_are_none_stop_the_run(tmp_path, options, words):
    """Each was asked for three times, twenty of them in a row."""
    with FakeOpenAI(**options) as server:
        with pytest.raises(UserError, match=words):
            generate(tmp_path, server, 500, max_concurrency=2)
        assert len(server.log) <= 6
    assert all("error" in record for record in replies(tmp_path))


def test_replies_that_thought_away_all_their_tokens_stop_the_run(tmp_path):
    """104 empty replies were paid, the status was 0, and the advice was "more seeds"."""
    usage = {"prompt_tokens": 9, "completion_tokens": 300}
    usage["completion_tokens_details"] = {"reasoning_tokens": 300}
    with FakeOpenAI(reply={"text": None, "finish_reason": "length", "usage": usage}) as server:
        with pytest.raises(
            UserError, match="(?s)5 replies in a row.*'length'.*300 of them reasoning.*--reasoning_effor"
        ):
            generate(tmp_path, server, 500, max_concurrency=2)
        assert len(server.log) <= 6


def test_a_prompt_that_a_filter_refuses_is_passed_over(tmp_path):
    """The run ended there, and so did every restart."""
    with FakeOpenAI(faults=lambda number, body: "policy" if number == 2 else None, tasks_per_reply=4) as server:
        generate(tmp_path, server, 30, max_concurrency=1)
        (refused,) = [record for record in replies(tmp_path) if "error" in record]
        assert refused["index"] == 2 and "refused content" in refused["error"]
        asked = len(server.log)
        generate(tmp_path, server, 40, max_concurrency=1)
        assert all("text" in record for record in replies(tmp_path)[3:]) and len(server.log) > asked
    assert len(jload(tmp_path / "alpaca_data.json")) == 40


@pytest.mark.parametrize(("reason", "kept"), [("stop", 4), ("end_turn", 4), (None, 4), ("error", 3), ("max_tokens", 3)])
def test_only_a_reply_that_ended_by_itself_keeps_its_last_task(tmp_path, reason, kept):
    """Of 31 replies with the reasons error, max_tokens and others 16 halves of tasks were kept."""
    text = made_up_reply("1. Instruction:", 4).replace("2. Instruction", "5. Instruction")
    assert len(generate_instruction.post_process_gpt3_response(0, {"text": text, "finish_reason": reason})) == kept


def test_thoughts_are_no_part_of_a_separate_answer(tmp_path):
    """<think>...</think> stood in the answers, and where it never ended, drafts did."""

    def reply(body):
        if "prompt" in body:
            return None
        question = body["messages"][-1]["content"]
        return "<think>\nHm." if len(question) % 5 == 0 else "<think>\nHm.\n</think>\n\nYes.<|im_end|>"

    with FakeOpenAI(reply=reply, tasks_per_reply=4) as server:
        generate(tmp_path, server, 12, answer_separately=True)
    assert {row["output"] for row in jload(tmp_path / "alpaca_data.json")} == {"Yes."}
    assert "thoughts that never end" in (tmp_path / "rejections.jsonl").read_text()


def test_a_reply_that_cannot_be_read_is_shown_once(tmp_path, capsys):
    """Tables were only counted as rejections, so that nobody saw what the model wrote."""
    with FakeOpenAI(reply="| Instruction | Output |\n|---|---|\n| Name a colour. | Red |") as server:
        generate(tmp_path, server, 12, max_requests_without_new=4)
    out = capsys.readouterr().out
    assert (
        out.count("It is a table, which begins:\n    | Instruction | Output |") == 1 and "replies hold no task" in out
    )


# ----------------------------------------------------------------------------------------------------------------------
# Money.


def test_a_server_that_ignores_max_tokens_overshoots_once(tmp_path, capsys):
    """A run with a cap of $0.05 spent $3.00, and the advice named a budget below that."""
    options = {"price_input": 0.0, "price_output": 100.0, "max_cost_usd": 0.05, "max_tokens": 50}
    with FakeOpenAI(ignores_length=True, tasks_per_reply=20, latency=0.02) as server:
        generate(tmp_path, server, 500, max_concurrency=32, **options)
        generate(tmp_path, server, 500, max_concurrency=32, **options)
        assert len(server.log) == 1
    spent = jload(tmp_path / "run.json")["result"]["usd"]
    advised = float(capsys.readouterr().out.split("--max_cost_usd ")[-1].split()[0])
    assert spent > 0.05 and advised > 1.5 * spent


# ----------------------------------------------------------------------------------------------------------------------
# Ctrl-C, and places that cannot be written.


def start(server, folder, *flags):
    command = [sys.executable, "generate_instruction.py", "--output_dir", folder, "--base_url", server.base_url]
    command += ["--model_name", "m", "--num_instructions_to_generate", "5000", "--max_concurrency", "8", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(list(map(str, command)), cwd=ROOT, **pipes)


def test_ctrl_c_waits_for_the_replies_under_way_and_writes_the_files(tmp_path):
    """Up to 32 paid replies were thrown away, and no file was written."""
    with FakeOpenAI(latency=lambda rng: rng.uniform(0.5, 1.5)) as server:
        process = start(server, tmp_path)
        while len(server.finished()) < 10:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert len(server.finished()) == len(server.log) == len(replies(tmp_path))
    assert process.returncode == 130 and "Traceback" not in err
    assert "waiting for 8 replies under way. Ctrl-C again" in out and "goes on from there" in out
    assert jload(tmp_path / "run.json")["outcome"] == "interrupted" and len(jload(tmp_path / "alpaca_data.json")) > 30


def test_a_second_ctrl_c_leaves_at_once_and_names_rebuild(tmp_path, run_script):
    with FakeOpenAI(latency=lambda rng: 0.1 if len(server.log) < 10 else 60.0) as server:
        process = start(server, tmp_path)
        while len(server.log) < 17:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        while "waiting for" not in process.stdout.readline():
            pass
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in err
    assert f"rebuild --output_dir {tmp_path}" in out
    run_script("generate_instruction.py", "rebuild", "--output_dir", tmp_path)
    assert len(jload(tmp_path / "alpaca_data.json")) > 20


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/none"])
def test_a_place_that_cannot_be_written_is_a_sentence(tmp_path, run_script, place):
    """A file as --output_dir ended in a chained traceback."""
    (tmp_path / "file").write_text("mine")
    with FakeOpenAI() as server:
        done = run_script(
            "generate_instruction.py", "--base_url", server.base_url, "--model_name", "m",
            "--output_dir", tmp_path / place, status=2,
        )  # fmt: skip
        assert not server.log
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_a_disk_that_fills_up_is_a_sentence(tmp_path):
    """Files larger than the limit are what a test can do without a disk of its own."""
    with FakeOpenAI(latency=0.02) as server:
        command = f"ulimit -f 40; exec {sys.executable} generate_instruction.py --output_dir {tmp_path} --model_name m"
        command += f" --base_url {server.base_url} --num_instructions_to_generate 5000 --max_concurrency 4"
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=100)
        asked = len(server.log)
        time.sleep(0.2)
        assert len(server.log) == asked
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "responses.jsonl cannot be written: File too large" in done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# Seeds.

CHINESE = ["请解释为什么天空是蓝色的。", "写一首关于春天的短诗。", "列出三种常见的水果。"]
VIETNAMESE = [
    "Hãy giải thích vì sao bầu trời có màu xanh.",
    "Viết một bài thơ ngắn về mùa xuân.",
    "Kể tên ba loại quả.",
]
FRENCH = ["Explique pourquoi le ciel est bleu.", "Écris un court poème sur le printemps.", "Nomme trois fruits mûrs."]


@pytest.mark.parametrize(
    ("instructions", "refused"), [(CHINESE, True), (VIETNAMESE, True), (FRENCH * 2 + FRENCH[:1] * 2, False)]
)
def test_seeds_in_another_script_name_the_flag_before_money_is_spent(tmp_path, instructions, refused):
    """0, 0 and 1 tasks were kept of runs in Chinese, Arabic and Vietnamese."""
    seeds = tmp_path / "seeds.jsonl"
    rows = [json.dumps({"instruction": text, "input": "", "output": "x"}) for text in instructions]
    seeds.write_text("\n".join(rows), encoding="utf-16")
    with FakeOpenAI(tasks_per_reply=4) as server:
        if refused:
            with pytest.raises(UserError, match="--unicode_dedup True"):
                generate(tmp_path / "out", server, 5, seed_tasks_path=str(seeds))
            assert not server.log
        generate(tmp_path / "out", server, 5, seed_tasks_path=str(seeds), unicode_dedup=refused)
