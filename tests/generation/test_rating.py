"""rate and clean --ratings: a judge rates each row once, and the good rows stay."""

import asyncio
import json

import pytest
from fake_openai import FakeOpenAI

import generate_instruction
from alpaca.common.errors import UserError
from alpaca.common.files import jload, read_jsonl
from alpaca.common.journal import Journal
from alpaca.generation.client import ModelClient
from alpaca.generation.paid_replies import PaidReplies
from alpaca.generation.prices import Budget, Price, find_price
from alpaca.generation.rating import rating_prompt, read_rating

ROWS = [
    {"instruction": instruction, "input": "", "output": output}
    for instruction, output in (
        ("Explain how rain forms.", "good"), ("Tell me about snow please.", "bad"),
        ("Why is there fog?", "good {task}"), ("Describe a hail storm now.", "babble"), ("How heavy is ice?", "fine"),
    )
]  # fmt: skip


def judge(body):
    prompt = body["messages"][-1]["content"]
    answer = prompt.split("[Answer]\n")[1].split("\n[End of answer]")[0]
    return {"good": "5 - correct and clear", "bad": "**2/5** — wrong", "fine": "Rating: 4.5\nClear enough."}.get(
        answer.split()[0], "Well, opinions differ."
    )


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS))
    return path


def rate(path, folder, server, **options):
    generate_instruction.rate(str(path), str(folder), model_name="judge", base_url=server.base_url, **options)


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("4", (4.0, "")), ("4.5 - Clear.", (4.5, "Clear")), ("Rating: 3/5. One wrong date.", (3.0, "One wrong date")),
        ("**5** – complete", (5.0, "complete")), ("[2] Wrong.", (2.0, "Wrong")), ("1,5 - Made up", (1.5, "Made up")),
        ("The answer is short.\nScore: 4 - fine", (4.0, "fine")), ("", None), ("6 - great", None), ("45", None),
        ("0", None), ("Good.", None), ("100%", None), ("There are 3 faults.", None), ("5.5", None),
        ("<think>\nRating: 2 would be harsh.\n</think>\n\n4.5 - Correct.", (4.5, "Correct")),
        ("<think>\n2 - no", None), ("Here it is:\n4 - ok", (4.0, "ok")), ("4 - fair\nor so", (4.0, "fair\nor so")),
        ("Faults:\n1 - spelling\n2 - style", None),
    ],
)  # fmt: skip
def test_ratings_are_read_and_never_guessed(reply, rating):
    assert read_rating(reply) == rating


def test_the_rating_prompt_takes_texts_as_they_are():
    prompt = rating_prompt({"instruction": "{answer}", "input": "x", "output": "{task} {0}"})
    assert "[Task]\n{answer}\n\nInput:\nx\n[End" in prompt and "[Answer]\n{task} {0}\n[End" in prompt


def test_rows_are_rated_once_and_the_good_ones_stay(data, tmp_path, capsys):
    """AlpaGasus: 9,229 of 52,002 rows rated 4.5 and more train a better model than all of them."""
    with FakeOpenAI(reply=judge) as server:
        options = {"price_input": 1.0, "price_output": 1.0}
        rate(data, tmp_path / "rated", server, limit=3, **options)
        rate(data, tmp_path / "rated", server, **options)
        assert len(server.log) == 5
    ratings = read_jsonl(tmp_path / "rated" / "ratings.jsonl")
    assert [row["rating"] for row in ratings] == [5, 2, 5, None, 4.5] and ratings[1]["reason"] == "wrong"
    assert "opinions differ" in ratings[3]["reason"] and "mean 4.12 over 4 rows" in capsys.readouterr().out
    data.write_text(json.dumps(ROWS[::-1] + [{"instruction": "Name a new row here.", "input": "", "output": "x"}]))
    status = generate_instruction.clean(str(data), str(tmp_path / "good.json"), ratings=str(tmp_path / "rated"))
    assert status == 0 and jload(tmp_path / "good.json") == [ROWS[4], ROWS[2], ROWS[0]]
    out = capsys.readouterr().out
    assert "1  rating: below 4.5" in out and "2  rating: none" in out and "'2, wrong: Tell me about snow" in out
    with pytest.raises(UserError, match="--ratings takes the --output_dir of `rate`"):
        generate_instruction.clean(str(data), str(tmp_path / "no.json"), ratings=str(tmp_path))


def test_a_budget_or_a_wrong_key_keeps_what_was_rated(data, tmp_path):
    """Paid ratings are on disk, and the same command goes on."""
    with FakeOpenAI(reply=judge, faults=lambda number, body: "401" if number == 2 else None) as server:
        with pytest.raises(UserError, match="does not accept the key"):
            rate(data, tmp_path / "rated", server, max_concurrency=1)
        assert len(read_jsonl(tmp_path / "rated" / "ratings.jsonl")) == 2
        with pytest.raises(UserError, match=r"budget of \$0.01 is spent"):
            rate(data, tmp_path / "rated", server, max_cost_usd=0.01, price_input=10, price_output=10)
        rate(data, tmp_path / "rated", server)
        assert len(read_jsonl(tmp_path / "rated" / "ratings.jsonl")) == 5 and len(server.log) == 6


def test_a_judge_that_gives_no_ratings_is_stopped(tmp_path):
    rows = [{**ROWS[0], "instruction": f"Explain the number {n} to me."} for n in range(60)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with FakeOpenAI(reply="I would rather not say.") as server:
        with pytest.raises(UserError, match="20 rows in a row got no rating.*rather not say"):
            rate(tmp_path / "rows.json", tmp_path / "rated", server, max_concurrency=4)
        assert len(server.log) < 26
        server.reply = "5 - fine"
        asked = len(server.log)
        rate(tmp_path / "rows.json", tmp_path / "rated", server, max_concurrency=4)  # what was paid for stops nothing
        assert len(server.log) == 60
    ratings = [row["rating"] for row in read_jsonl(tmp_path / "rated" / "ratings.jsonl")]
    assert ratings.count(None) == asked and ratings.count(5) == 60 - asked


def test_equal_rows_are_paid_for_once_and_the_first_shows_the_cost(tmp_path):
    """Guards: as many payments as equal rows that are asked for at a time, and a budget that eight replies of a judge
    which ignores max_tokens overshoot."""
    rows = [ROWS[0]] * 6 + [{**ROWS[0], "instruction": f"Explain the number {n} to me."} for n in range(3)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with FakeOpenAI(reply=judge, latency=0.05) as server:
        rate(tmp_path / "rows.json", tmp_path / "rated", server, max_cost_usd=1, price_input=1, price_output=1)
        assert len(server.log) == 4
        assert server.log[0]["end"] <= min(request["begin"] for request in server.log[1:])
    assert [row["rating"] for row in read_jsonl(tmp_path / "rated" / "ratings.jsonl")] == [5] * 9


@pytest.mark.parametrize("flags", [{"max_concurrency": 0}, {"max_concurrency": -1}, {"limit": -1}])
def test_numbers_below_one_are_refused(data, tmp_path, flags):
    """--max_concurrency 0 waited for ever, and --limit -1 left out the last row."""
    with pytest.raises(UserError, match=f"--{next(iter(flags))} must be at least 1"):
        generate_instruction.rate(str(data), str(tmp_path / "rated"), base_url="http://127.0.0.1:9/v1", **flags)


def test_replies_cost_what_their_own_model_does():
    """A cheaper model in the same folder made the dear one's replies cheap, and the budget was spent many times."""
    usage = {"prompt": 1_000_000, "completion": 0}
    budget = Budget(find_price("gpt-6-luna"), model="gpt-6-luna")
    for asked in ("gpt-6-luna", "gpt-4o", "gpt-4o-2024-08-06", "a model of my own"):
        budget.count({"usage": usage, "model": "x", "asked": asked})
    budget.count({"usage": usage, "model": "gpt-4o"})  # of a journal before 2026-12
    own, other = find_price("gpt-6-luna").input, find_price("gpt-4o").input
    assert budget.spent == pytest.approx(3 * own + 2 * other) and other > own
    # A proxy's own name, with the price from the flags, while its replies name the model behind it.
    flagged = Budget(Price(1.0, 1.0), model="my-deployment")
    flagged.count({"usage": usage, "model": "gpt-4o-2024-08-06", "asked": "my-deployment"})
    assert flagged.spent == pytest.approx(1.0)


def test_a_spent_budget_ends_the_wait(tmp_path):
    """Guards: reservations of unequal prompts, whose sum did not come back to 0.0, so that all waited for nobody."""
    budget = Budget(Price(1.0, 1.0), limit=1e-9, reserved=(0.1 + 0.2) - 0.2 - 0.1)
    assert budget.reserved != 0

    async def ask() -> None:
        with Journal(tmp_path / "replies.jsonl") as journal, FakeOpenAI(reply=judge) as server:
            client = ModelClient("judge", server.base_url, "auto", max_tokens=100)
            replies = PaidReplies(client, journal, budget, "1", 8)
            await asyncio.wait_for(replies.reply("Rate this."), 10)

    with pytest.raises(UserError, match="budget of .* is spent"):
        asyncio.run(ask())


def test_copies_of_one_bad_reply_are_one_failure(tmp_path, capsys):
    """Guards: a judge stopped for one reply without a rating, which 25 equal rows shared."""
    bad = {**ROWS[3]}
    rows = [bad] * 25 + [{**ROWS[0], "instruction": f"Explain the number {n} to me."} for n in range(5)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with FakeOpenAI(reply=judge) as server:
        rate(tmp_path / "rows.json", tmp_path / "rated", server, max_concurrency=4)
        assert len(server.log) == 6
    assert "6 replies asked, 0 kept from before" in capsys.readouterr().out


def test_a_run_of_generation_keeps_its_record(data, tmp_path):
    """Guards: run.json of a generation, which `rate` into its folder replaced."""
    (tmp_path / "responses.jsonl").write_text("")
    with FakeOpenAI(reply=judge) as server, pytest.raises(UserError, match="holds a run of generation"):
        rate(data, tmp_path, server)


def test_rate_is_a_command(run_script, data, tmp_path):
    """Status 0, a table, and the next command."""
    with FakeOpenAI(reply=judge) as server:
        done = run_script(
            "generate_instruction.py", "rate", data, "--output_dir", tmp_path / "rated", "--model_name", "judge",
            "--base_url", server.base_url,
        )  # fmt: skip
    assert "2  rated 5" in done.stdout and f"clean {data} --output good.json --ratings" in done.stdout
