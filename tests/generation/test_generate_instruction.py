"""generate_instruction.py against a local server: files, repeatability, resume, money, batches, messages."""

import asyncio
import errno
import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from fake_openai import FakeOpenAI

import generate_instruction
from alpaca.common.errors import UserError
from alpaca.common.files import jload, read_jsonl
from alpaca.common.journal import Journal, read_records
from alpaca.generation import harvest, rouge
from alpaca.generation.prices import find_price

FILES = ("regen.json", "alpaca_data.json", "rejections.jsonl")


@pytest.fixture
def server():
    with FakeOpenAI(tasks_per_reply=4) as running:
        yield running


def generate(folder, server, count=20, **options):
    """Runs the job in this process, with small prompts."""
    options = {
        "model_name": "fake-model",
        "num_tasks_per_request": 7,
        "max_concurrency": 8,
        "max_retries": 8,
        **options,
    }
    generate_instruction.generate_instruction_following_data(
        str(folder), num_instructions_to_generate=count, base_url=server.base_url, **options
    )


def contents(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


def replies(folder):
    return [record for record in read_records(folder / "responses.jsonl") if record["kind"] == "reply"]


# ----------------------------------------------------------------------------------------------------------------------
# Commands and files.


def test_the_command_of_2023(run_script, tmp_path, server):
    """`python -m generate_instruction generate_instruction_following_data ...` runs as written."""
    env = {"OPENAI_BASE_URL": server.base_url, "OPENAI_API_KEY": "sk-very-secret"}
    done = run_script(
        "-m", "generate_instruction", "generate_instruction_following_data", "--output_dir", tmp_path / "out",
        "--num_instructions_to_generate", 10, "--model_name=fake-model", "--request_batch_size", 4, env=env,
    )  # fmt: skip
    out = tmp_path / "out"
    regen, rows, record = jload(out / "regen.json"), jload(out / "alpaca_data.json"), jload(out / "run.json")
    assert len(regen) == len(rows) == 10
    for task, row in zip(regen, rows, strict=True):
        assert set(row) == {"instruction", "input", "output"} and row.items() <= task.items()
        assert len(task["most_similar_instructions"]) == 10
        assert sorted(task["most_similar_instructions"].values(), reverse=True) == list(
            task["most_similar_instructions"].values()
        )
        assert max(task["most_similar_instructions"].values()) <= 0.7 and 0 <= task["avg_similarity_score"] < 0.7
        assert row["input"] != "<noinput>"
    assert (out / "alpaca_data.json").read_text(encoding="utf-8").startswith('[\n    {\n        "instruction": "')
    assert record["outcome"] == "finished" and record["result"]["tasks"] == 10
    assert "--request_batch_size has no use any more" in done.stdout and "10 of 10 tasks kept" in done.stdout
    assert all("very-secret" not in path.read_text() for path in out.iterdir())
    one = replies(out)[0]
    assert set(one) >= {"index", "examples", "text", "finish_reason", "usage", "model", "time", "request_id", "seconds"}


def test_no_key_and_no_server_in_five_lines(run_script, tmp_path):
    """A newcomer without a key reads what to set or type, and exit status 2."""
    done = run_script("generate_instruction.py", "--output_dir", tmp_path / "new", status=2)
    assert len(done.stderr.strip().splitlines()) <= 5 and "Traceback" not in done.stderr
    assert all(word in done.stderr for word in ("OPENAI_API_KEY", "--base_url", "--dry_run"))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("value, plan", [("false", False), ("no", False), ("True", True), ("1", True)])
def test_switches_take_any_spelling(run_script, tmp_path, value, plan):
    """--overwrite false was the text "false", which is true, and replaced files."""
    done = run_script(
        "generate_instruction.py", "--output_dir", tmp_path, "--dry_run", value,
        status=0 if plan else 2, env={"OPENAI_API_KEY": "", "OPENAI_BASE_URL": ""},
    )  # fmt: skip
    assert ("first prompt ends here" in done.stdout) == plan
    wrong = run_script("generate_instruction.py", "--dry_run", "perhaps", status=2)
    assert "--dry_run takes True or False, found 'perhaps'" in wrong.stderr


def test_misspelt_names_are_told(run_script):
    """The original's misspelt task was a bare KeyError, and fire runs a job before it looks at a misspelt flag."""
    done = run_script("generate_instruction.py", "generate_instruction_folowing_data", status=2)
    assert "Did you mean generate_instruction_following_data?" in done.stderr
    assert "--temperature" in run_script("generate_instruction.py", "--temprature", "1", status=2).stderr
    assert "generate_instruction_following_data" in run_script("generate_instruction.py", "--help").stdout


def test_a_dry_run_needs_no_key_and_asks_nothing(run_script, tmp_path):
    """The first prompt, the number of requests and the cost, before any money is spent."""
    done = run_script(
        "generate_instruction.py",
        "--dry_run",
        "True",
        "--num_instructions_to_generate",
        52000,
        "--output_dir",
        tmp_path,
    )
    assert "4. Instruction:\n" in done.stdout and "about 5,098 requests for 52,000 tasks" in done.stdout
    assert "gpt-6-luna" in done.stdout and "$" in done.stdout and not list(tmp_path.iterdir())


def test_check_and_clean_are_commands(run_script, tmp_path):
    """Exit status 1 where rows are bad, and the good rows in a file."""
    rows = [{"instruction": f"Name a thing number {n}.", "input": "", "output": "x" if n else ""} for n in range(2)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert "empty output" in run_script("generate_instruction.py", "check", tmp_path / "rows.json", status=1).stdout
    run_script("generate_instruction.py", "clean", tmp_path / "rows.json", "--output", tmp_path / "good.json")
    assert jload(tmp_path / "good.json") == rows[1:]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_prompt_instructions": 7}, "num_prompt_instructions < --num_tasks_per_request"),
        ({"sample_from_generated": 4}, "sample_from_generated <= --num_prompt_instructions"),
        ({"max_concurrency": 0}, "--max_concurrency must be at least 1"),
        ({"max_cost_usd": 1.0}, "needs the price of fake-model"),
        ({"api": "chatty"}, "--api must be auto"),
        ({"prompt_path": "no_such.txt"}, "no file no_such.txt"),
        ({"seed_tasks_path": "no_such.jsonl"}, "no file no_such.jsonl"),
        ({"batch_api": True, "answer_separately": True}, "cannot be combined"),
        ({"answer_temperature": 0.2}, "--answer_separately True"),
    ],
)
def test_wrong_settings_are_told_before_the_first_request(tmp_path, server, options, words):
    """Each of these would cost money or crash later."""
    with pytest.raises(UserError, match=words):
        generate(tmp_path / "out", server, **options)
    assert not server.log and not (tmp_path / "out").exists()


def test_the_servers_only_model_is_the_teacher(tmp_path, server, capsys):
    """A local server's model needs no --model_name, and is not taken for OpenAI's priced one."""
    generate(tmp_path, server, 4, model_name=generate_instruction.DEFAULT_MODEL)
    assert {entry["body"]["model"] for entry in server.log} == {"fake-model"}
    assert "$" not in capsys.readouterr().out
    server.models = ("a", "b")
    with pytest.raises(UserError, match="serves a, b. Choose one"):
        generate(tmp_path / "other", server, 4, model_name=generate_instruction.DEFAULT_MODEL)


# ----------------------------------------------------------------------------------------------------------------------
# The same replies, the same files.


@pytest.mark.parametrize("options", [{}, {"sample_from_generated": 2, "sample_lag": 3}, {"answer_separately": True}])
def test_results_do_not_depend_on_concurrency_or_timing(tmp_path, options):
    """Replies arrive in any order; what is kept depends on seed and request index alone."""
    made = []
    for concurrency in (1, 5, 16):
        folder = tmp_path / str(concurrency)
        with FakeOpenAI(tasks_per_reply=4, latency=lambda rng: rng.uniform(0, 0.03), seed=concurrency) as server:
            generate(folder, server, 40, max_concurrency=concurrency, **options)
            assert server.most_parallel <= concurrency
        made.append(contents(folder))
    assert made[0] == made[1] == made[2]
    assert len(json.loads(made[0]["regen.json"])) == 40


def test_examples_from_generated_tasks_are_used_and_named(tmp_path, server):
    """SA#157: K of the prompt's examples come from kept tasks; the journal says which."""
    generate(tmp_path, server, 30, sample_from_generated=2, sample_lag=2, expected_tasks_per_request=3)
    names = [name for record in replies(tmp_path) for name in record["examples"]]
    kept = [task["instruction"] for task in jload(tmp_path / "regen.json")]
    used = [int(name.split(":")[1]) for name in names if name.startswith("generated:")]
    prompts = "".join(str(entry["body"]) for entry in server.log)
    assert used and all(kept[row] in prompts for row in used)


@pytest.mark.parametrize("options", [{}, {"answer_separately": True}])
def test_rebuild_gives_the_same_bytes_without_a_request(tmp_path, server, options, run_script):
    """All files follow from the journal by a pure function."""
    generate(tmp_path / "run", server, 25, **options)
    (tmp_path / "copy").mkdir()
    shutil.copy(tmp_path / "run" / "responses.jsonl", tmp_path / "copy")
    asked = len(server.log)
    run_script("generate_instruction.py", "rebuild", "--output_dir", tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(tmp_path / "run") and len(server.log) == asked
    run_script("generate_instruction.py", "rebuild", "--output_dir", tmp_path / "copy")  # its own files: no complaint
    assert (
        "needs the folder"
        in run_script("generate_instruction.py", "rebuild", "--output_dir", tmp_path, status=2).stderr
    )


@pytest.mark.parametrize("options", [{}, {"answer_separately": True}])
@pytest.mark.parametrize("many, at_once", [(1 << 20, 10_000), (0, 2)])
def test_without_similarity_figures(tmp_path, server, monkeypatch, options, many, at_once):
    """A harvest without figures keeps the same tasks for the same reasons, whether replies are compared one by one or
    many at once; only the figures are missing. Figures of many at once are those of the run."""
    monkeypatch.setattr(rouge, "_MANY", many)
    monkeypatch.setattr(harvest, "AT_ONCE", at_once)
    monkeypatch.setattr(harvest, "MAX_SIMILARITY", 0.2)  # so that some tasks are duplicates
    generate(tmp_path / "with", server, 25, **options)
    generate(tmp_path / "without", server, 25, similarity_figures=False, **options)
    for name, figures in (("rebuilt", False), ("rebuilt_with", True)):
        (tmp_path / name).mkdir()
        shutil.copy(tmp_path / "with" / "responses.jsonl", tmp_path / name)
        generate_instruction.rebuild(str(tmp_path / name), similarity_figures=figures)
    expected, *others = [contents(tmp_path / name) for name in ("with", "without", "rebuilt")]
    assert contents(tmp_path / "rebuilt_with") == expected
    tasks = json.loads(expected["alpaca_data.json"])
    assert b"similar_to" in expected["rejections.jsonl"]
    for found in others:
        assert found == expected | {"regen.json": found["regen.json"]}
        assert json.loads(found["regen.json"]) == tasks


@pytest.mark.parametrize("options", [{}, {"answer_separately": True}, {"sample_from_generated": 1, "sample_lag": 4}])
def test_going_on_equals_going_through(tmp_path, server, options):
    """The same command with a higher target goes on, asks nothing twice, and ends with the same bytes."""
    for count in (10, 10, 31):
        generate(tmp_path / "steps", server, count, **options)
    asked = [(entry["path"], json.dumps(entry["body"])) for entry in server.log]
    assert len(set(asked)) == len(asked)
    generate(tmp_path / "once", server, 31, **options)
    assert contents(tmp_path / "steps") == contents(tmp_path / "once")
    generate(tmp_path / "steps", server, 5, **options)  # a lower target takes nothing away
    assert len(jload(tmp_path / "steps" / "regen.json")) == 31


def test_a_gap_left_by_a_stop_is_asked_first(tmp_path, server):
    """Requests under way when the run died are asked again; the result is that of an undisturbed run."""
    generate(tmp_path / "run", server, 40)
    generate(tmp_path / "calm", server, 40)
    path = tmp_path / "run" / "responses.jsonl"
    lines = [line for line in path.read_text().splitlines() if '"index": 1,' not in line and '"index": 4,' not in line]
    path.write_text("\n".join(lines) + "\n")
    before = len(server.log)
    generate(tmp_path / "run", server, 40)
    again = [entry["body"]["messages"] for entry in server.log[before:]]
    assert 2 <= len(again) <= 4 and all(
        body in [e["body"]["messages"] for e in server.log[:before]] for body in again[:2]
    )
    assert contents(tmp_path / "run") == contents(tmp_path / "calm")


def test_other_settings_are_refused_by_name(tmp_path, server):
    """Mixing replies of two settings silently would make the data set unexplainable; before the first reply all may
    change, as after a misspelt model name."""
    server.faults = {"404": 1.0}
    with pytest.raises(UserError, match="does not exist"):
        generate(tmp_path, server, 8, model_name="fake-modle", seed=7)
    server.faults = {}
    generate(tmp_path, server, 8)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="(?s)--temperature: 1.0, now 0.5.*--change_settings"):
        generate(tmp_path, server, 20, temperature=0.5)
    with pytest.raises(UserError, match="--prompt_path"):
        (tmp_path / "prompt.txt").write_text("Write {num_tasks} tasks.")
        generate(tmp_path, server, 20, prompt_path=str(tmp_path / "prompt.txt"))
    assert contents(tmp_path) == before
    generate(tmp_path, server, 20, temperature=0.5, change_settings=True)
    assert len(jload(tmp_path / "regen.json")) == 20
    # Lists with outputs read as lists without would empty the kept tasks.
    with pytest.raises(UserError, match="cannot be mixed"):
        generate(tmp_path, server, 30, temperature=0.5, change_settings=True, answer_separately=True)


# ----------------------------------------------------------------------------------------------------------------------
# Nothing of anybody's is lost.


def test_files_of_the_original_script_continue(tmp_path, server):
    """A regen.json of 2023 without a journal: its tasks stay first, word for word, and count for the comparison."""
    old = [
        {"instruction": f"Recite the poem that begins with {word}.", "input": "", "output": "x",
         "most_similar_instructions": {"a": 0.1}, "avg_similarity_score": 0.05}
        for word in ("roses", "violets", "sugar")
    ]  # fmt: skip
    (tmp_path / "regen.json").write_text(json.dumps(old))
    text = "4. Instruction: Recite the poem that begins with sugar?\n4. Input:\n\n4. Output:\nx\n"
    server.reply = lambda body: None if len(server.log) > 1 else text
    generate(tmp_path, server, 9, max_concurrency=1)
    tasks = jload(tmp_path / "regen.json")
    assert tasks[:3] == old and len(tasks) == 9
    assert any(row.get("similar_to") == old[2]["instruction"] for row in read_jsonl(tmp_path / "rejections.jsonl"))
    generate(tmp_path, server, 12)
    assert jload(tmp_path / "regen.json")[:9] == tasks and len(jload(tmp_path / "alpaca_data.json")) == 12


def test_foreign_files_are_never_overwritten(tmp_path, server, capsys):
    """An alpaca_data.json that this run did not write stays unless --overwrite True; so does an edited regen.json."""
    (tmp_path / "alpaca_data.json").write_text("[]")
    generate(tmp_path, server, 6)
    assert (tmp_path / "alpaca_data.json").read_text() == "[]" and len(jload(tmp_path / "regen.json")) == 6
    assert "was left alone" in capsys.readouterr().out
    generate(tmp_path, server, 8, overwrite=True)
    assert len(jload(tmp_path / "alpaca_data.json")) == 8
    generate(tmp_path, server, 10)  # its own file now
    assert len(jload(tmp_path / "alpaca_data.json")) == 10
    (tmp_path / "regen.json").write_text("[1]")
    with pytest.raises(UserError, match="regen.json was not written by this run"):
        generate(tmp_path, server, 12)
    with pytest.raises(UserError, match="regen.json was not written by this run"):
        generate_instruction.rebuild(str(tmp_path))
    assert (tmp_path / "regen.json").read_text() == "[1]"


def test_two_runs_cannot_share_a_folder(tmp_path, server):
    """Two writers would double requests and mix journals."""
    journal = Journal(tmp_path / "responses.jsonl")
    with pytest.raises(UserError, match="another run is writing"):
        generate(tmp_path, server)
    journal.close()
    generate(tmp_path, server, 4)


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    """Some network file systems refuse every lock, which was a traceback before the first request."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("alpaca.common.journal.fcntl.flock", refuse)
    with Journal(tmp_path / "responses.jsonl") as journal:
        journal.append_now([{"a": 1}])
    assert "has no locks" in capsys.readouterr().out
    assert read_records(tmp_path / "responses.jsonl") == [{"a": 1}]


def test_a_torn_last_line_is_mended_and_a_broken_one_before_it_is_named(tmp_path, server, capsys):
    """A power cut may tear the journal's last line; anything else is damage that nobody should build on."""
    generate(tmp_path / "run", server, 12)
    whole = contents(tmp_path / "run")
    path = tmp_path / "run" / "responses.jsonl"
    for torn in ('{"kind": "reply", "index": 99, "te', '{"kind": "reply"}', "\0\0\0"):
        with open(path, "a") as stream:
            stream.write(torn)
        generate(tmp_path / "run", server, 12)
        assert "torn by a crash" in capsys.readouterr().out and contents(tmp_path / "run") == whole
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:30], *lines[2:]]) + "\n")
    with pytest.raises(UserError, match="line 2 is broken"):
        generate(tmp_path / "run", server, 12)


# ----------------------------------------------------------------------------------------------------------------------
# What is kept, and what is not.


def test_every_rejection_is_in_the_ledger_with_its_reason(tmp_path, server, capsys):
    """SA#265, 114, 17: bad rows do not vanish, they are named and counted."""
    server.reply = (
        " Draw me a nice cat.\n4. Input:\n<noinput>\n4. Output:\nok\n###\n"
        "5. Instruction: Say hello.\n5. Input:\nx\n5. Output:\nHello\n###\n"
        "6. Instruction: Name the largest planet.\n6. Input:\nNo input needed.\n6. Output:\nJupiter\n###\n"
        "7. Instruction: Name the smallest planet.\n7. Input:\nN/A\n7. Output:\n\n###\n"
        "8. Instruction: Name the very largest planet.\n8. Input:\nx\n8. Output:\nJupiter\n###\n"
        "9. Instruction: Describe your last trip.\n9. Input:\nx\n9. Output:\nAs an AI language model, I cannot.\n"
    )
    generate(tmp_path, server, 5, max_requests_without_new=3)
    (task,) = jload(tmp_path / "regen.json")
    assert (task["instruction"], task["input"], task["output"]) == ("Name the largest planet.", "", "Jupiter")
    rejected = [row for row in read_jsonl(tmp_path / "rejections.jsonl") if row["request"] == 0]
    assert [row["reason"] for row in rejected] == [
        'asks for more than text: "draw"', "fewer than 4 words", "empty output",
        "too similar to an earlier instruction", "refusal",
    ]  # fmt: skip
    assert rejected[3]["similar_to"] == "Name the largest planet." and 0.7 < rejected[3]["similarity"] < 1
    assert "Ended by: nothing new." in capsys.readouterr().out
    server.reply = None  # the teacher has ideas again: the same command goes on
    generate(tmp_path, server, 5, max_requests_without_new=3)
    assert len(jload(tmp_path / "regen.json")) == 5


def test_separate_answers_are_paid_once_and_checked(tmp_path, server, capsys):
    """--answer_separately: instructions first, each answer on its own over chat, all in the journal."""

    def reply(body):
        if "prompt" in body:
            return None
        question = body["messages"][-1]["content"]
        return {
            "text": "Sorry, I cannot fulfil this request." if len(question) % 5 == 0 else "A good answer.",
            "finish_reason": "length" if len(question) % 7 == 0 else "stop",
        }

    server.reply = reply
    generate(tmp_path, server, 12, answer_separately=True, answer_temperature=0.2)
    tasks = jload(tmp_path / "regen.json")
    assert len(tasks) == 12 and {task["output"] for task in tasks} == {"A good answer."}
    with_input = [task for task in tasks if task["input"]]
    asked = [entry["body"]["messages"][-1]["content"] for entry in server.log if "messages" in entry["body"]]
    assert all(f"{task['instruction']}\n\n{task['input']}" in asked for task in with_input) and with_input
    assert len(set(asked)) == len(asked)
    temperatures = {("messages" in entry["body"], entry["body"]["temperature"]) for entry in server.log}
    assert temperatures == {(False, 1.0), (True, 0.2)}  # one for both: lists without variety, or answers without sense
    reasons = {row["reason"] for row in read_jsonl(tmp_path / "rejections.jsonl")}
    assert {"answer cut off", "refusal"} <= reasons


def test_separate_answers_need_chat_and_nothing_else(tmp_path, capsys):
    """Lists of instructions go over chat where there are no completions; answers cannot go without chat."""
    with FakeOpenAI(completions=False, tasks_per_reply=4) as server:
        generate(tmp_path / "chat", server, 8, answer_separately=True)
    assert len(jload(tmp_path / "chat" / "alpaca_data.json")) == 8
    assert capsys.readouterr().err.count("has no completions endpoint; chat is used") == 1
    with FakeOpenAI(chat=False, tasks_per_reply=4) as server, pytest.raises(UserError, match="--api"):
        generate(tmp_path / "none", server, 8, answer_separately=True)


def test_any_script_with_unicode_dedup(tmp_path, server):
    """SA#110, 124: other languages: kept as they are, no \\u escapes, and duplicates found."""
    server.reply = (
        " 请解释为什么天空是蓝色的。\n4. Input:\n<noinput>\n4. Output:\n因为散射。\n###\n"
        "5. Instruction: 请解释为什么天空是蓝色的！\n5. Input:\n<noinput>\n5. Output:\n重复。\n###\n"
        "6. Instruction: Напиши короткое письмо другу.\n6. Input:\n<noinput>\n6. Output:\nПривет!\n"
    )
    generate(tmp_path, server, 5, unicode_dedup=True, max_requests_without_new=2)
    text = (tmp_path / "alpaca_data.json").read_text(encoding="utf-8")
    assert len(json.loads(text)) == 2 and "因为散射" in text and "\\u" not in text


def test_a_reply_with_half_a_character_is_no_crash(tmp_path, server):
    """Lone surrogates come out of some servers' JSON; files are UTF-8 all the same."""
    server.reply = " Name the colour of\ud83d snow.\n4. Input:\n\n4. Output:\nwhite\ud83d"
    generate(tmp_path, server, 3, max_requests_without_new=2)
    assert jload(tmp_path / "alpaca_data.json") == [
        {"instruction": "Name the colour of? snow.", "input": "", "output": "white?"}
    ]
    generate_instruction.rebuild(str(tmp_path))


# ----------------------------------------------------------------------------------------------------------------------
# Money.


def spent(folder, price):
    return sum(
        price.cost(record["usage"], record.get("batch", False)) for record in replies(folder) if "usage" in record
    )


def test_a_budget_stops_the_run_and_prints_the_command_to_go_on(tmp_path, run_script):
    """--max_cost_usd 0.05: never more than that, and not much less."""
    with FakeOpenAI(latency=0.02, tasks_per_reply=20) as server:
        command = ["generate_instruction.py", "--output_dir", tmp_path, "--base_url", server.base_url]
        command += ["--model_name", "fake-model", "--num_instructions_to_generate", 52000, "--max_tokens", 900]
        command += ["--price_input", 0.5, "--price_output", 2.0, "--max_cost_usd", 0.05]
        done = run_script(*command)
        price = find_price("x", 0.5, 2.0)
        cost = spent(tmp_path, price)
        one = max(price.cost(record["usage"]) for record in replies(tmp_path))
        assert 0.05 - 3 * one < cost <= 0.05
        assert "Ended by: budget" in done.stdout and "--max_cost_usd 0.1" in done.stdout
        assert len(server.finished()) == len(replies(tmp_path))  # all that was asked was waited for
        run_script(*command[:-1], 0.06)
        assert cost < spent(tmp_path, price) <= 0.06


def test_the_summary_has_tokens_money_and_similar_pairs(tmp_path, server, capsys):
    """What the run cost and what it brought, in words and in run.json."""
    generate(tmp_path, server, 12, price_input=1.0, price_output=2.0)
    out = capsys.readouterr().out
    assert "tokens of prompts" in out and "per 1,000 tasks" in out and out.count(" ~ ") == 10
    result = jload(tmp_path / "run.json")["result"]
    assert result["usd"] > 0 and result["tasks"] == 12 and result["ended_by"] == "target reached"


# ----------------------------------------------------------------------------------------------------------------------
# In a notebook.


def test_a_notebook_has_an_event_loop_of_its_own(tmp_path, server):
    """asyncio.run refuses to run where a loop runs already, as in Jupyter, when the folder was made."""

    async def cell():
        generate(tmp_path / "run", server, 8)

    asyncio.run(cell())
    assert len(jload(tmp_path / "run" / "alpaca_data.json")) == 8


def test_an_interrupted_notebook_lets_the_requests_under_way_finish(tmp_path, server):
    """In a notebook's thread the first Ctrl-C was heard when everything had been asked and paid for."""
    server.latency = 0.3
    cell = f"""
import asyncio, os, signal, threading, generate_instruction
async def cell():
    threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    generate_instruction.generate_instruction_following_data(
        {str(tmp_path / "run")!r}, base_url={server.base_url!r}, model_name="m", num_instructions_to_generate=400,
        num_tasks_per_request=7, max_concurrency=2)
asyncio.new_event_loop().run_until_complete(cell())  # as Jupyter runs it: asyncio.run handles signals itself
"""
    done = subprocess.run([sys.executable, "-c", cell], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "interrupted: waiting for" in done.stdout and "KeyboardInterrupt" in done.stderr
    assert 0 < len(replies(tmp_path / "run")) == len(server.log) < 30
