"""inference.py: its journal, which survives a kill, its command line, and serving."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import psutil
import pytest
import tiny_models
from conftest import ROOT

import inference
from alpaca.answers.answer_file import AnswerJob, write_answers
from alpaca.answers.answer_journal import AnswerJournal, PartJournal
from alpaca.answers.answering import answer_batch
from alpaca.answers.loading import load_model
from alpaca.answers.sampling import Sampling
from alpaca.common.errors import UserError
from alpaca.common.prompt import format_prompt
from alpaca.common.tasks import load_tasks

TASKS = tiny_models.make_tasks(9)


# ----------------------------------------------------------------------------------------------------------------------
# The journal.


def test_journal_survives_a_torn_line_and_refuses_other_settings(tmp_path):
    """A kill in mid-write leaves half a line; going on with another model or length would mix two runs in one file."""
    output = tmp_path / "answers.jsonl"
    with AnswerJournal(output, {"model": "a", "seed": 0}) as journal:
        journal.add({0: {"text": "zero"}, 2: {"text": "two\nlines"}})
        with pytest.raises(UserError, match="another run is writing"):
            AnswerJournal(output, {"model": "a", "seed": 0})
    with open(journal.path, "a", encoding="utf-8") as stream:
        stream.write('{"row": 1, "answer": {"text": "to')
    with pytest.raises(UserError, match="model: a, now b"):
        AnswerJournal(output, {"model": "b", "seed": 0})
    with AnswerJournal(output, {"model": "a", "seed": 0}) as journal:
        assert journal.answers == {0: {"text": "zero"}, 2: {"text": "two\nlines"}}
        with PartJournal(
            output, {"model": "a", "seed": 0}, 1
        ) as part:  # another process of this run, or of a killed one
            part.add({1: {"text": "one"}})
        journal.take_over_parts()
        journal.finish([{"instruction": "x"}] * 3, "a")
    assert [json.loads(line)["output"] for line in output.read_text().splitlines()] == ["zero", "one", "two\nlines"]
    assert [path.name for path in tmp_path.iterdir()] == [output.name]
    with pytest.raises(UserError, match="already exists"):
        AnswerJournal(output, {})
    with pytest.raises(UserError, match="must end in"):
        AnswerJournal(tmp_path / "answers.txt", {})
    journal.path.write_text('{"settings": {}}\nno JSON\n{"row": 1, "answer": {}}\n')
    output.unlink()
    with pytest.raises(UserError, match="line 2 is broken"):
        AnswerJournal(output, {"model": "c"})
    with AnswerJournal(output, {"model": "c"}, overwrite=True) as journal:
        assert journal.answers == {}


def test_a_killed_run_with_overwrite_goes_on(tmp_path):
    """Guards: each start of the same command erased the answers that the message about full memory called kept."""
    output, settings = tmp_path / "answers.json", {"model": "a"}
    output.write_text("[]")  # an older result, which stays until the new one is whole
    for seen in ({}, {0: {"text": "zero"}, 1: {"text": "one"}}):
        with AnswerJournal(output, settings, overwrite=True) as journal:
            assert journal.answers == seen
            journal.add({0: {"text": "zero"}})
        with PartJournal(output, settings, 1) as part:
            part.add({1: {"text": "one"}})
    with AnswerJournal(output, {"model": "b"}, overwrite=True) as journal:
        assert journal.answers == {}
        journal.add({0: {"text": "other"}, 1: {"text": "model"}})
        journal.finish([{"instruction": "x"}] * 2, "b")
    with AnswerJournal(output, {"model": "b"}, overwrite=True) as journal:
        assert journal.answers == {}


# ----------------------------------------------------------------------------------------------------------------------
# The command line.


def test_252_tasks_killed_in_the_middle_and_resumed(tiny_tied, run_script, tmp_path):
    """No task twice, none missing, and the same answers as a run that nobody killed, in another batch size."""
    tasks = [
        {"id": f"t{i}", "instruction": task["instruction"], "instances": [{"input": task["input"], "output": "gold"}]}
        for i, task in enumerate(tiny_models.make_tasks(252))
    ]
    data = tmp_path / "tasks.jsonl"
    data.write_text("".join(json.dumps(task) + "\n" for task in tasks), encoding="utf-8")
    flags = ["--model_name_or_path", tiny_tied, "--data_path", data, "--max_new_tokens", "12"]
    output, journal = tmp_path / "killed.json", tmp_path / "killed.json.partial.jsonl"

    command = [sys.executable, "inference.py", *map(str, flags), "--output_path", str(output), "--batch_size", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 40):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    process.kill()
    process.wait()
    held = journal.read_bytes().count(b"\n") - 1
    assert 40 <= held < 252 and not output.exists()

    done = run_script("inference.py", *flags, "--output_path", output, "--batch_size", "32")
    assert f"{held} of 252 answers are there already" in done.stdout and "tokens/s" in done.stdout
    rows = json.loads(output.read_text())
    assert [row["id"] for row in rows] == [task["id"] for task in tasks]
    assert all(row["reference"] == "gold" and row["output"] for row in rows) and not journal.exists()
    assert json.loads((tmp_path / "killed.run.json").read_text())["outcome"] == "finished"
    job = AnswerJob(str(tiny_tied), load_tasks(data, require_output=False), Sampling(12), 16)
    write_answers(job, tmp_path / "whole.jsonl", [])
    whole = [json.loads(line) for line in (tmp_path / "whole.jsonl").read_text().splitlines()]
    assert whole == rows
    with pytest.raises(UserError, match="already exists"):
        write_answers(job, output, [])


def run_killed(command, rank, enough):
    """Starts `command` (a torchrun), kills process `rank` of it with -9 once `enough()`, and waits for its end."""
    torchrun = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not enough():
        assert torchrun.poll() is None, torchrun.stdout.read()
        time.sleep(0.02)
    for process in psutil.Process(torchrun.pid).children(recursive=True):
        if process.environ().get("RANK") == str(rank):
            process.kill()
    torchrun.communicate(timeout=120)
    assert torchrun.returncode != 0


def test_two_processes_answer_what_one_does_whoever_is_killed(tiny_tied, tmp_path):
    """Rows by rank, one file: after kill -9 of either process no row is lost, answered twice, or other than alone."""
    data = tiny_models.write_tasks(tmp_path / "tasks.json", 250)
    tasks, output, alone = json.loads(data.read_text()), tmp_path / "two.json", tmp_path / "one.json"
    journals = [tmp_path / "two.json.partial.jsonl", tmp_path / "two.json.partial.1.jsonl"]

    def answered():
        return [path.read_bytes().count(b"\n") if path.exists() else 0 for path in journals]

    flags = ["--model_name_or_path", tiny_tied, "--data_path", data, "--max_new_tokens", "24", "--output_path", output]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    inference = [*map(str, [*torchrun, ROOT / "inference.py", *flags, "--batch_size", "2"])]
    run_killed(inference, 1, lambda: min(answered()) > 10)
    first = sum(answered())
    assert not output.exists()
    run_killed(inference, 0, lambda: answered()[0] > first and answered()[1] > 5)
    assert not output.exists() and 20 < sum(answered()) < 200
    # evaluation.py goes on with it: the same job.
    evaluation = [*map(str, [*torchrun, ROOT / "evaluation.py", "answer", *flags, "--generator", "two"])]
    done = subprocess.run(evaluation, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("answers are there already") == done.stdout.count("250 answers, ") == 1
    assert not any(path.exists() for path in journals)
    write_answers(AnswerJob(str(tiny_tied), tasks, Sampling(24), 16, generator="two"), alone, [])
    assert json.loads(output.read_text()) == json.loads(alone.read_text())
    assert {row["generator"] for row in json.loads(output.read_text())} == {"two"}


def test_what_torchrun_cannot_share_is_refused(tiny_tied, run_script):
    """Eight processes would each stream the same answer, or ask the same server."""
    env, data = {"WORLD_SIZE": "8", "RANK": "0"}, ["--data_path", "seed_tasks.jsonl", "--output_path", "x.json"]
    one = run_script("inference.py", "--model_name_or_path", tiny_tied, "--instruction", "x", env=env, status=2)
    assert "under torchrun, inference.py answers a --data_path into an --output_path" in one.stderr
    served = run_script("evaluation.py", "answer", "--model", "m", *data, env=env, status=2)
    assert "leave out torchrun" in served.stderr


def test_one_instruction_and_two_models_side_by_side(tiny_tied, tiny_opt, run_script, tmp_path, capsys):
    """Fire reads "a, b" as a tuple and 7 as a number; an instruction is a text."""
    one = run_script(
        "inference.py", "--model_name_or_path", tiny_tied, "--instruction", "red, blue", "--input", "7",
        "--max_new_tokens", "5",
    )  # fmt: skip
    model, tokenizer = load_model(str(tiny_tied))
    wanted = answer_batch(model, tokenizer, [{"instruction": "red, blue", "input": "7"}], Sampling(5))[0].text
    assert one.stdout.strip() == wanted and "tokens/s" in one.stderr
    data = tiny_models.write_tasks(tmp_path / "tasks.json", 5)
    inference.answer(str(tiny_tied), base=str(tiny_opt), data_path=str(data), limit=2, max_new_tokens=5)
    two = capsys.readouterr().out
    assert two.count("base:") == two.count("tuned:") == 3 and "[2]" in two and "[3]" not in two


def test_chat_in_the_terminal(tiny_opt):
    """Instruction, input, answer, again, until the input ends; where it ended behind an instruction, no answer came."""
    command = [sys.executable, "inference.py", "chat", "--model_name_or_path", str(tiny_opt), "--max_new_tokens", "6"]
    done = subprocess.run(
        command, input="Say hi.\n\nSort.\nb, a\nName three.\n", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Instruction:") == 4 and done.stderr.count("tokens/s") == 3


def test_mistakes_are_named_before_anything_is_loaded(tiny_opt, run_script):
    """A misspelt flag or a missing instruction costs a second, not a model's loading."""
    from alpaca.answers import answering

    misspelt = run_script("inference.py", "--model_name", tiny_opt, "--instruction", "x", status=2)
    assert "Did you mean --model_name_or_path" in misspelt.stderr
    nothing = run_script("inference.py", "--model_name_or_path", tiny_opt, status=2)
    assert "--instruction" in nothing.stderr and "Traceback" not in nothing.stderr
    for wrong in ({"temperature": -1}, {"top_p": 0}, {"max_new_tokens": 0}, {"num_beams": 0}):
        with pytest.raises(UserError):
            answering.Sampling(**wrong)
    code = "import inference, evaluation, sys; print('torch' in sys.modules, 'openai' in sys.modules)"
    assert run_script("-c", code).stdout.split() == ["False", "False"]


def test_serve_asks_for_a_merge_where_there_is_something_to_merge(tiny_tied, tmp_path, monkeypatch):
    """A name on the hub was called no full checkpoint."""

    served = []
    monkeypatch.setattr("alpaca.answers.openai_server.serve_with_transformers", lambda path, *_: served.append(path))
    for path in ("an-org/a-model", str(tiny_tied)):
        inference.serve(path, port=0, backend="transformers")
    assert served == ["an-org/a-model", str(tiny_tied)]
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tiny_tied)}))
    for path in ("embedded", str(tmp_path)):
        with pytest.raises(UserError, match="is no full checkpoint. Add --merged_dir DIR"):
            inference.serve(path, port=0, backend="transformers")


def test_serve_hands_the_checkpoint_to_a_server(tiny_tied, tmp_path):
    """The served model answers as the local one does, on 127.0.0.1 alone, and a taken port is said. transformers' own
    server lists other models than it serves, and answers a chat without messages with status 500."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "inference.py", "serve", "--model_name_or_path", str(tiny_tied), "--port", str(port)]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hub")}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True)
    try:
        base = f"http://127.0.0.1:{port}/v1"
        for _ in range(600):
            assert process.poll() is None, process.stdout.read()
            try:
                urllib.request.urlopen(f"{base}/models", timeout=20).read()
                break
            except urllib.error.HTTPError:
                raise
            except OSError:
                time.sleep(0.2)
        taken = subprocess.run(command, capture_output=True, text=True)
        assert taken.returncode == 2 and "is taken" in taken.stderr
        with urllib.request.urlopen(f"{base}/models", timeout=20) as reply:
            assert [model["id"] for model in json.load(reply)["data"]] == [str(tiny_tied)]
        for messages in ([], "hi", [{"role": "user"}], None):
            body = {"model": str(tiny_tied), "messages": messages}
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(
                    urllib.request.Request(
                        f"{base}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
                    ),
                    timeout=60,
                )
            assert refused.value.code == 400 and "'messages'" in json.load(refused.value)["error"]["message"]
        body = {"model": str(tiny_tied), "prompt": format_prompt(TASKS[0]), "max_tokens": 8, "temperature": 0}
        request = urllib.request.Request(
            f"{base}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        served = json.load(urllib.request.urlopen(request, timeout=60))["choices"][0]["text"]
        assert served.strip() == answer_batch(*load_model(str(tiny_tied)), TASKS[:1], Sampling(8))[0].text
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
