"""evaluation.py: answers from a server, both-order judging with kept replies, the report, held-out loss."""

import json
import math
import re

import pytest
import tiny_models
import torch
from fake_openai import FakeOpenAI

import evaluation
from alpaca.answers import judge, pairs, report_page, win_rate
from alpaca.answers.held_out_loss import held_out_loss, rouge_l
from alpaca.answers.loading import load_model
from alpaca.common.errors import UserError
from alpaca.common.prompt import format_prompt


def shown_answers(body):
    """(answer A, answer B) that a judge was shown."""
    prompt = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
    return tuple(re.search(rf"\[Answer {side}\]\n(.*?)\n?\[End of answer {side}\]", prompt, re.S)[1] for side in "AB")


def verdict_of(body):
    """A judge that looks for the word good; it falls for a place, ties, or babbles where an answer tells it to."""
    first, second = shown_answers(body)
    both = first + second
    if "babble" in both:
        return "Both have their merits."
    if "place" in both:
        return "A"
    if "even" in both:
        return "TIE"
    return "Verdict: **A**" if "good" in first else "B\n\nBecause of its tone."


def answer_file(path, answers, **extra):
    rows = [{"instruction": f"Task {i}", "input": "", "output": answer, **extra} for i, answer in enumerate(answers)]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.fixture
def two_files(tmp_path):
    first = answer_file(
        tmp_path / "old.json", ["bad", "good", "even", "place", "babble", "same"], generator="old-model"
    )
    second = answer_file(tmp_path / "new.json", ["good", "bad", "even 2", "place 2", "babble 2", "same"])
    return ["--answers_1", first, "--answers_2", second, "--model", "fake-model"]


# ----------------------------------------------------------------------------------------------------------------------
# Judging.


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("A", "A"), (" b.", "B"), ("**TIE**", "TIE"), ("Answer B", "B"), ("Verdict: A\n\nIt is clearer.", "A"),
        ("Both are fine, but one is clearer.\n\nVerdict: B", "B"), ("The verdict is: answer A, for its detail.", "A"),
        ("[[B]]", "B"), ("", None), ("A or B", None), ("I prefer a short answer.", None), ("C", None),
        ("Verdict: A. No, verdict: B.", None), ("Answer A is good. Answer B is good.", None), ("A tie", None),
        ("Answer A:\nWrong sum.\n\nAnswer B:\nCorrect.\n\nVerdict: B", "B"), ("[Answer A]\n..\nVerdict: TIE", "TIE"),
        ("**Answer A**\nshort\n**Answer B**\nbetter\n\nB", "B"), ("A:\nshort\nB:\nbetter\n\nAnswer: A", "A"),
        ("**Answer A**\nshort\n**Answer B**\nbetter", None), ("Answer A:\nIt is wrong.", None), ("A\nB", None),
        ("Answer B\n\nIt is clearer than answer A.", "B"), ("Verdict: a tie.\n\nBoth are right.", "TIE"),
        ("Verdict: a close one.\nI cannot tell.", None), ("<think>\nA?\n\nVerdict: A\n</think>\nB", "B"),
        ("<think>\nIs it A or B?\nA", None), ("Answer A is vague.\nVerdict: b", "B"), ("So it is.\n\nverdict: a", "A"),
    ],
)  # fmt: skip
def test_verdicts_are_read_and_never_guessed(reply, verdict):
    """A parser that takes the first letter it sees turns babble, headings and thoughts into votes."""
    assert judge.read_verdict(reply) == verdict


def test_judge_prompt_takes_texts_as_they_are():
    """Answers with braces or with the prompt's own marks must not rewrite it."""
    prompt = judge.judge_prompt({"instruction": "{answer_b}", "input": "x"}, "{task} {0}", "{answer_a}")
    assert "[Task]\n{answer_b}\n\nInput:\nx\n" in prompt
    assert "[Answer A]\n{task} {0}\n" in prompt and "[Answer B]\n{answer_a}\n" in prompt


def test_both_orders_ties_failures_and_the_cache(two_files, run_script, tmp_path):
    """Agreement counts, a leaning to a place is a tie, babble is a failure; a second run pays for nothing."""
    flags = [*two_files, "--name_2", "new-model", "--output_dir", tmp_path / "judged"]
    with FakeOpenAI(reply=verdict_of, faults=lambda number, _: {1: "429", 3: "500"}.get(number)) as server:
        flags += ["--base_url", server.base_url, "--price_input", "10", "--price_output", "20"]
        done = run_script("evaluation.py", "judge", *flags)
        asked = server.finished()
        again = run_script("evaluation.py", "judge", *flags, status=2)
        run_script("evaluation.py", "judge", *flags, "--overwrite", "True")
        assert len(server.finished()) == len(asked) == 10  # identical answers need no judge
    assert "already exists" in again.stderr
    rows = json.loads((tmp_path / "judged" / "annotations.json").read_text())
    assert [row["preference"] for row in rows] == [2, 1, 1.5, 1.5, 1.5]
    assert [row["verdicts"] for row in rows] == [[2, 2], [1, 1], [1.5, 1.5], [1, 2], ["identical"] * 2]
    assert {row["generator_1"] for row in rows} == {"old-model"} and rows[0]["generator_2"] == "new-model"
    assert rows[0]["annotator"] == "fake-model" and rows[0]["prompt_version"] == judge.PROMPT_VERSION
    summary = json.loads((tmp_path / "judged" / "judge.json").read_text())
    assert summary["failures"] == 1 and summary["failure_reasons"] == {"no verdict in the reply": 1}
    assert (summary["replies_asked"], summary["replies_from_cache"], summary["cost_usd"]) == (0, 10, 0)
    assert summary["cost_usd_of_cached"] > 0 and "cost $0.0" in done.stdout
    # The prices that were typed count for what is spent too, also where the table knows the judge.
    known = evaluation.DEFAULT_MODEL
    with FakeOpenAI(reply="A") as server:
        judged = {"output_dir": str(tmp_path / "known"), "model": known, "base_url": server.base_url, "limit": 1}
        first, second = (str(two_files[place]) for place in (1, 3))
        evaluation.judge(first, second, price_input=1e6, price_output=1e6, **judged)
    assert json.loads((tmp_path / "known" / "judge.json").read_text())["cost_usd"] > 100
    assert summary["orders"]["first_place_both_times"] == 1
    for entry in asked:  # blind, each answer once in each place
        assert "model" not in json.dumps(entry["body"]["messages"])
    shown = [shown_answers(entry["body"]) for entry in asked]
    assert {pair[::-1] for pair in shown} == set(shown)


@pytest.mark.parametrize(
    ("first_token", "preference"),
    [
        ({"A": 0.75, " B": 0.25}, 1.25), ({" a": 0.5, "A": 0.25, "B": 0.25}, 1.25), ({"T": 0.5, "TI": 0.2}, 1.5),
        ({"B": 0.2, "TIE": 0.2, "The": 0.6}, 1.75), ({"The": 0.99, "A": 0.001}, None), ({" ": 1.0}, None),
    ],
)  # fmt: skip
def test_soft_verdicts_weigh_the_words_by_their_probabilities(first_token, preference):
    """A word behind a space and the first half of TIE count as what they are; a judge naming none gives no number."""
    found = judge.soft_verdict({token: math.log(share) for token, share in first_token.items()})
    assert found == (None if preference is None else pytest.approx(preference))


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_soft_judging_cancels_a_leaning_to_a_place(api, two_files, run_script, tmp_path):
    """A judge that always says A, and is surest where A is the good one: its words are ties, its odds are not."""

    def reply(body):
        surely = 0.9 if "good" in shown_answers(body)[0] else 0.6
        odds = {"A": math.log(surely), "B": math.log(1 - surely)}
        if api == "completions":
            return {"text": "A", "logprobs": {"top_logprobs": [odds]}}
        likeliest = [{"token": token, "logprob": logprob} for token, logprob in odds.items()]
        return {"text": "A", "logprobs": {"content": [{"token": "A", "logprob": 0, "top_logprobs": likeliest}]}}

    flags = [*two_files, "--api", api, "--limit", "2", "--output_dir"]
    with FakeOpenAI(reply=reply) as server:
        flags += [tmp_path / "judged", "--base_url", server.base_url]
        run_script("evaluation.py", "judge", *flags)
        hard = json.loads((tmp_path / "judged" / "annotations.json").read_text())
        done = run_script("evaluation.py", "judge", *flags, "--soft", "True", "--overwrite", "True")
        assert "0 failures; 4 replies asked" in done.stdout  # none of the words' replies serves for the odds
        body = server.log[-1]["body"]
        again = run_script("evaluation.py", "judge", *flags, "--soft", "True", "--overwrite", "True")
        assert "0 replies asked, 4 from the cache" in again.stdout
        server.reply = "A"
        flags[flags.index(tmp_path / "judged")] = tmp_path / "silent"
        silent = run_script("evaluation.py", "judge", *flags, "--soft", "True", status=2)
        assert "no log-probabilities" in silent.stderr and "leave out --soft" in silent.stderr
        # A server that keeps some odds back, and is then mended: those are asked for again.
        server.reply = lambda body: "A" if shown_answers(body) == ("good", "bad") else reply(body)
        first = run_script("evaluation.py", "judge", *flags, "--soft", "True", "--max_concurrency", "1", status=None)
        server.reply = reply
        mended = run_script("evaluation.py", "judge", *flags, "--soft", "True", "--overwrite", "True")
        assert "2 pairs judged" in mended.stdout and "0 failures" in mended.stdout, first.stdout
    assert [row["preference"] for row in hard] == [1.5, 1.5]
    rows = json.loads((tmp_path / "judged" / "annotations.json").read_text())
    assert [row["preference"] for row in rows] == [pytest.approx(1.65), pytest.approx(1.35)]
    assert body["logprobs"] == (5 if api == "completions" else True) and body["max_tokens"] == 1
    assert json.loads((tmp_path / "judged" / "judge.json").read_text())["soft"] is True


def test_requests_that_fail_are_failures_and_not_cached(two_files, run_script, tmp_path):
    """An unanswered pair is listed, not counted as a draw, and asked for again by the next run."""

    def faults(_, body):
        return "broken_json" if "bad" in shown_answers(body) else None

    flags = [*two_files, "--output_dir", tmp_path / "judged"]
    with FakeOpenAI(reply=verdict_of, faults=faults, retry_after=0.01) as server:
        flags += ["--base_url", server.base_url, "--limit", "4"]
        done = run_script("evaluation.py", "judge", *flags)
        assert "2 failures" in done.stdout and "broken JSON" in done.stdout
        assert len(json.loads((tmp_path / "judged" / "annotations.json").read_text())) == 2
        server.faults = {}
        done = run_script("evaluation.py", "judge", *flags, "--overwrite", "True")
        assert "0 failures; 4 replies asked, 4 from the cache" in done.stdout


def test_a_budget_stops_the_judge_and_keeps_its_replies(two_files, run_script, tmp_path):
    """Replies that were paid for before the stop are not paid for again."""
    flags = [*two_files, "--output_dir", tmp_path / "judged", "--max_concurrency", "1", "--limit", "4"]
    with FakeOpenAI(reply=verdict_of) as server:
        flags += ["--base_url", server.base_url, "--price_input", "1000", "--price_output", "1000"]
        stopped = run_script("evaluation.py", "judge", *flags, "--max_cost_usd", "0.4", status=2)
        paid = len(server.finished())
        assert "budget of $0.4 is spent" in stopped.stderr and 0 < paid < 8
        run_script("evaluation.py", "judge", *flags)
        assert len(server.finished()) == 8


def test_a_budget_without_a_price_is_refused(two_files, run_script, tmp_path):
    """The cost of an unlisted judge stayed 0, and a budget never ended anything."""
    flags = [*two_files, "--output_dir", tmp_path / "judged", "--max_cost_usd", "1"]
    with FakeOpenAI(reply=verdict_of) as server:
        refused = run_script("evaluation.py", "judge", *flags, "--base_url", server.base_url, status=2)
        assert "--max_cost_usd needs the price of fake-model" in refused.stderr and not server.log


def test_replies_under_way_at_the_stop_are_kept(tmp_path, run_script):
    """When one request ended the run the others were cut off: paid for, and on no disk."""
    first = answer_file(tmp_path / "old.json", [f"bad {i}" for i in range(8)], generator="old")
    second = answer_file(tmp_path / "new.json", [f"good {i}" for i in range(8)], generator="new")
    files = ["--answers_1", first, "--answers_2", second, "--model", "fake-model"]
    with FakeOpenAI(reply=verdict_of, latency=0.5) as server:
        server.faults = lambda number, _: "quota" if number == 3 else None
        server.latency = lambda rng: 0.2 if len(server.log) == 4 else 1.0
        flags = [*files, "--output_dir", tmp_path / "judged", "--base_url", server.base_url]
        stopped = run_script("evaluation.py", "judge", *flags, status=2)
        assert "quota" in stopped.stderr
        finished = len(server.finished())
    cached = (tmp_path / "judged" / "judge_cache.jsonl").read_text().splitlines()
    assert finished == len(cached) == 7


def test_pairs_of_the_2023_files(tmp_path):
    """Self-Instruct's tasks (instances, motivation_app) against davinci's predictions (response, a newline behind)."""
    tasks, predictions = tmp_path / "tasks.jsonl", tmp_path / "text-davinci-003_predictions.jsonl"
    tasks.write_text(
        "".join(
            json.dumps({
                "id": f"user_{i}", "motivation_app": "Gmail", "instruction": f"Task {i}.",
                "instances": [{"input": f"in {i}", "output": f"gold {i}"}],
            }) + "\n"
            for i in range(3)
        )
    )  # fmt: skip
    predictions.write_text(
        "".join(
            json.dumps({
                "prompt": "p", "instruction": f"Task {i}.\n", "input": f"in {i}", "response": f" text {i}",
            }) + "\n"
            for i in (2, 1, 7)
        )
    )  # fmt: skip
    found, left_out = pairs.pair_answers(pairs.load_answers(predictions), pairs.load_answers(tasks, "humans"))
    assert [(pair["output_1"], pair["output_2"]) for pair in found] == [(" text 2", "gold 2"), (" text 1", "gold 1")]
    assert found[0]["generator_1"] == "text-davinci-003_predictions" and found[0]["category"] == "Gmail"
    assert found[0]["id"] == "user_2" and left_out == {"only_in_1": 1, "only_in_2": 1, "repeated": 0}
    tasks.write_text(json.dumps({"instruction": "No answer here."}))
    with pytest.raises(UserError, match="no answer.*row 1"):
        pairs.load_answers(tasks)


def test_missing_partners_and_repeated_tasks_are_counted_apart():
    """One count for both hid that a file held some tasks twice."""

    def answers(*tasks):
        return [
            {"instruction": task, "input": "", "answer": f"{task}{i}", "generator": "g"} for i, task in enumerate(tasks)
        ]

    found, left_out = pairs.pair_answers(answers("a", "b", "b", "b", "c"), answers("b", "d", "b", "a", "a", "e"))
    assert [(pair["output_1"], pair["output_2"]) for pair in found] == [("a0", "a3"), ("b1", "b0"), ("b2", "b2")]
    assert left_out == {"only_in_1": 1, "only_in_2": 2, "repeated": 2}
    # AlpacaEval's difficulty of an instruction is found by its place in the first file, whatever was left out.
    (pair,), _ = pairs.pair_answers(answers("z", "a"), answers("a"))
    assert pair["index"] == 1


def test_files_that_cannot_be_compared(two_files, run_script, tmp_path):
    """No common task, or one name for both models, would make an empty or unreadable report."""
    other = answer_file(tmp_path / "other.json", [])
    other.write_text(json.dumps([{"instruction": "Elsewhere", "output": "x"}]))
    flags = ["--output_dir", tmp_path / "judged", "--model", "m", "--base_url", "http://127.0.0.1:9/v1"]
    done = run_script("evaluation.py", "judge", *two_files[:2], "--answers_2", other, *flags, status=2)
    assert "no task in common" in done.stderr
    done = run_script("evaluation.py", "judge", *two_files[:2], "--answers_2", two_files[1], *flags, status=2)
    assert "--name_1" in done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# Answers from a server.


def test_answers_from_a_server_go_on_after_failures(run_script, tmp_path):
    """A failed request leaves no hole in the answer file: the next run asks for the missing ones only."""
    data = tiny_models.write_tasks(tmp_path / "tasks.json", 12)
    flags = ["--model", "fake-model", "--data_path", data, "--output_path", tmp_path / "answers.json"]

    def faults(number, body):
        return "broken_json" if "7" in body["prompt"].split("###")[1] else None

    with FakeOpenAI(reply=lambda body: f" Echo: {body['prompt'][-40:]} ", faults=faults) as server:
        flags += ["--base_url", server.base_url, "--api", "completions", "--max_new_tokens", "60"]
        failed = run_script("evaluation.py", "answer", *flags, status=2)
        assert "1 of 12 tasks got no answer" in failed.stderr and not (tmp_path / "answers.json").exists()
        before = len(server.finished())
        server.faults = {}
        run_script("evaluation.py", "answer", *flags)
        assert (before, len(server.finished())) == (11, 12)
        body = server.log[-1]["body"]
    rows, tasks = json.loads((tmp_path / "answers.json").read_text()), json.loads(data.read_text())
    assert [row["instruction"] for row in rows] == [task["instruction"] for task in tasks]
    for row, task in zip(rows, tasks, strict=True):
        assert row["output"] == f"Echo: {format_prompt(task)[-40:]}".strip() and row["reference"] == task["output"]
        assert row["generator"] == "fake-model"
    assert body["prompt"] == format_prompt(tasks[7]) and body["temperature"] == 0 and body["max_tokens"] == 60


def test_errors_name_the_flag_that_the_command_has(two_files, tmp_path):
    """They named --model_name, which generate_instruction.py has and evaluation.py refuses."""
    import evaluation

    data, judged = tiny_models.write_tasks(tmp_path / "tasks.json", 1), {"output_dir": str(tmp_path / "judged")}
    judged |= {"answers_1": str(two_files[1]), "answers_2": str(two_files[3])}
    with FakeOpenAI(faults=lambda *_: "404", models=("one", "two")) as server:
        with pytest.raises(UserError, match=r"serves one, two\. Choose one with --model\."):
            evaluation.judge(**judged, base_url=server.base_url)
        with pytest.raises(UserError, match="Check --model, "):
            evaluation.judge(**judged, base_url=server.base_url, model="m")
        with pytest.raises(UserError, match="Check --model, "):
            evaluation.answer(str(data), str(tmp_path / "answers.json"), model="m", base_url=server.base_url)


def test_thoughts_without_an_answer_are_no_answer(tmp_path):
    """A reasoning model that spent all tokens on its thoughts got empty answers stored, which a judge then compares."""
    import evaluation

    data, output = tiny_models.write_tasks(tmp_path / "tasks.json", 3), tmp_path / "answers.json"
    usage = {"prompt_tokens": 9, "completion_tokens": 512, "completion_tokens_details": {"reasoning_tokens": 512}}
    thoughts = {"text": "", "finish_reason": "length", "usage": usage}
    with FakeOpenAI(reply=lambda body: "So." if body["reasoning_effort"] == "low" else thoughts) as server:
        ask = {"data_path": str(data), "output_path": str(output), "model": "m", "base_url": server.base_url}
        with pytest.raises(UserError, match=r"3 of 3 tasks got no answer .*--max_new_tokens 512 .*--reasoning_effort"):
            evaluation.answer(**ask, reasoning_effort="high")
        assert not output.exists()
        evaluation.answer(**ask, reasoning_effort="low", overwrite=True)
        assert [row["output"] for row in json.loads(output.read_text())] == ["So."] * 3
        # A model that writes line feeds to the end has answered, with nothing: it would do so each time.
        server.reply = lambda body: {"text": "\n\n", "finish_reason": "length"}
        evaluation.answer(**ask, overwrite=True)
    assert [row["output"] for row in json.loads(output.read_text())] == [""] * 3


def test_a_lone_surrogate_in_a_reply_is_no_end(run_script, tmp_path):
    """A broken half of a character could be written to no file: all answers were paid, and none could be used."""
    data = tiny_models.write_tasks(tmp_path / "tasks.json", 3)
    with FakeOpenAI(reply="half a smile \ud83d") as server:
        run_script(
            "evaluation.py", "answer", "--model", "m", "--base_url", server.base_url, "--data_path", data,
            "--output_path", tmp_path / "answers.json",
        )  # fmt: skip
    assert {row["output"] for row in json.loads((tmp_path / "answers.json").read_text())} == {"half a smile ?"}


# ----------------------------------------------------------------------------------------------------------------------
# The report.


def test_report_of_an_alpaca_eval_file(run_script, tmp_path):
    """The table, report.json and the page from an annotations.json as AlpacaEval writes it."""
    rows = [
        {
            "instruction": f"Task {i}", "output_1": "x" * 20, "output_2": "y" * (20 + i), "generator_1": "davinci",
            "generator_2": "tuned", "dataset": ["koala", "vicuna"][i % 2], "annotator": "a", "preference": preference,
        }
        for i, preference in enumerate([1, 2, 2, 1.5, None, 1.8])
    ]  # fmt: skip
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(rows))
    done = run_script("evaluation.py", "report", "--annotations", path, "--output_dir", tmp_path / "report")
    figures = json.loads((tmp_path / "report" / "report.json").read_text())
    assert figures["win_rate"] == pytest.approx((0 + 1 + 1 + 0.5 + 0.8) / 5)
    assert (figures["wins"], figures["ties"], figures["losses"], figures["dropped"]) == (3, 1, 1, 1)
    assert figures["mean_length_2"] == 22.2 and set(figures["categories"]) == {"koala", "vicuna"}
    assert "66.00" in done.stdout and "koala" in done.stdout and "length-adjusted" in done.stdout
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("<article") == 5 and "preference 1.8" in page and "not counted: 1." in page
    assert json.loads((tmp_path / "report" / "run.json").read_text())["inputs"]
    refused = run_script("evaluation.py", "report", "--annotations", tmp_path / "nothing.json", status=2)
    assert "no file" in refused.stderr


def test_the_page_shows_texts_and_runs_nothing():
    """A model's answer with a script tag must be text on the page, and the page must load nothing from outside."""
    evil = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
    row = {"instruction": evil, "input": evil, "output_1": evil, "output_2": "", "generator_1": evil}
    row |= {"generator_2": "b", "win": 0.0, "category": evil}
    page = report_page.report_page(win_rate.summarise([row, {**row, "win": 1.0}], 10), [row], None)
    assert page.count("<script>") == 1 and "<img" not in page and "onerror=alert(2)&gt;" in page
    assert "default-src 'none'" in page and "http" not in page.replace("http-equiv", "")
    assert "(empty)" in page


# ----------------------------------------------------------------------------------------------------------------------
# Held-out loss.


def test_loss_is_the_models_own_on_response_tokens(tiny_opt):
    """Padding, prompt tokens or a mean of means in the loss would make two models' figures incomparable."""
    model, tokenizer = load_model(str(tiny_opt))
    # Without the row whose "-" merges with the prompt's colon: train_data splits that token, this reference cannot.
    tasks = [task for task in tiny_models.make_tasks(7) if not task["output"].startswith("-")]
    found = held_out_loss(model, tokenizer, tasks, batch_size=3)
    total, count = 0.0, 0
    for task in tasks:
        prompt = tokenizer(format_prompt(task))["input_ids"]
        ids = torch.tensor([tokenizer(format_prompt(task) + task["output"])["input_ids"] + [tokenizer.eos_token_id]])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        with torch.inference_mode():
            mean = model(input_ids=ids, labels=labels).loss.item()
        total += mean * (ids.shape[1] - len(prompt))
        count += ids.shape[1] - len(prompt)
    assert found["tokens"] == count and found["loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    short = held_out_loss(model, tokenizer, [*tasks, {**tasks[0], "input": "word " * 600}], max_length=512)
    assert short["rows_without_response"] == 1 and short["tokens"] == count
    # Beyond OPT's table of positions there was an IndexError, on a GPU a device-side assert.
    with pytest.raises(UserError, match=r"--max_length 1,200 the longest row has 1,200 .* Use --max_length 1024\."):
        held_out_loss(model, tokenizer, [*tasks, {**tasks[0], "output": "word " * 1200}], max_length=1200)


def test_the_loss_of_a_broken_model_is_an_error(tiny_opt):
    """A nan among the weights printed a loss of nan, with status 0."""
    model, tokenizer = load_model(str(tiny_opt))
    with torch.no_grad():
        model.model.decoder.layers[0].fc1.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"1 of 8,192 values of model\.decoder\.layers\.0\.fc1\.weight are not finite"):
        held_out_loss(model, tokenizer, tiny_models.make_tasks(3))


def test_rouge_l_is_rouge_scores():
    """F1 of the longest common subsequence, digit for digit."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    texts = [task["output"] for task in tiny_models.make_tasks(30)] + ["", "Ä!", "The cat's 2 hats"]
    for text, reference in zip(texts, texts[1:] + texts[:1], strict=True):
        assert rouge_l(text, reference) == pytest.approx(scorer.score(reference, text)["rougeL"].fmeasure, abs=1e-12)


def test_loss_command_compares_two_models(tiny_opt, tiny_tied, run_script, tmp_path):
    """Base and tuned model side by side, in a table and in loss.json."""
    data = tiny_models.write_tasks(tmp_path / "tasks.json", 6)
    done = run_script(
        "evaluation.py", "loss", "--base", tiny_opt, "--model_name_or_path", tiny_tied, "--data_path", data,
        "--output_dir", tmp_path / "out", "--rouge_tasks", "3", "--max_new_tokens", "6",
    )  # fmt: skip
    results = json.loads((tmp_path / "out" / "loss.json").read_text())
    assert set(results) == {"base", "tuned"} and results["base"]["rows"] == 6 and results["base"]["rouge_tasks"] == 3
    assert f"{results['tuned']['loss']:.4f}" in done.stdout and "perplexity" in done.stdout


def test_a_prompt_too_long_for_rouge_is_said_before_the_loss(tiny_opt, monkeypatch, tmp_path):
    """It ended the command after the loss of all rows, which was lost; and --rouge_tasks -1 took all but the last."""
    tasks = [*tiny_models.make_tasks(2), {"instruction": "Count.", "input": "zebra " * 600, "output": "600"}]
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    monkeypatch.setattr("alpaca.answers.held_out_loss.held_out_loss", lambda *_: pytest.fail("the loss came first"))
    with pytest.raises(UserError, match=r"row 3 .*--rouge_tasks 0"):
        evaluation.loss(str(tiny_opt), str(tmp_path / "tasks.json"))
    with pytest.raises(UserError, match="--rouge_tasks must be 0 .* found -1"):
        evaluation.loss(str(tiny_opt), str(tmp_path / "tasks.json"), rouge_tasks=-1)
