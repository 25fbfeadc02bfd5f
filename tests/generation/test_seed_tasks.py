"""The data the project is written around: seed tasks, evaluation tasks and the generation prompt."""

import csv
import datetime
import io
import json
import re
import sqlite3
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from rapidfuzz import process
from rapidfuzz.distance import LCSseq
from rouge_score.rouge_scorer import RougeScorer

ROOT = Path(__file__).resolve().parents[2]


def read_jsonl(name):
    return [json.loads(line) for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]


SEEDS = read_jsonl("seed_tasks.jsonl")
EVAL_TASKS = read_jsonl("configs/eval_tasks.jsonl")
BY_NAME = {seed["name"]: seed["instances"][0] for seed in SEEDS}


def rouge_l(texts, others):
    """ROUGE-L F1 of every text with every other as rouge_score counts it: lower case, [a-z0-9] tokens, no stemming."""
    code = {}  # one character per token, which is what rapidfuzz compares fastest

    def encode(text):
        return "".join(
            chr(0x10000 + code.setdefault(token, len(code))) for token in re.findall("[a-z0-9]+", text.lower())
        )

    rows, columns = [encode(text) for text in texts], [encode(text) for text in others]
    lengths = np.add.outer([len(row) for row in rows], [len(column) for column in columns])
    return 2 * process.cdist(rows, columns, scorer=LCSseq.similarity, dtype=np.int32) / np.maximum(lengths, 1)


def test_seed_file_has_the_shape_that_generation_reads():
    """A missing key or a second instance would fail only deep inside a paid generation run."""
    assert [seed["id"] for seed in SEEDS] == [f"seed_task_{n}" for n in range(175)]
    assert len(BY_NAME) == 175 and all(re.fullmatch(r"[a-z0-9_]+", name) for name in BY_NAME)
    for seed in SEEDS:
        assert list(seed) == ["id", "name", "kind", "instruction", "instances", "is_classification"]
        (instance,) = seed["instances"]
        assert list(instance) == ["input", "output"] and isinstance(seed["is_classification"], bool)
        for text in (seed["instruction"], *instance.values()):
            assert text == text.strip() and "###" not in text  # "###" separates tasks in the prompt
        assert "\n" not in seed["instruction"] and instance["output"]


def test_seeds_are_spread_over_kinds_and_lengths():
    """Seeds of few kinds or of one length make generated data of few kinds and one length."""
    kinds = Counter(seed["kind"] for seed in SEEDS)
    assert len(kinds) >= 30 and min(kinds.values()) >= 3
    assert 0.25 <= np.mean([not instance["input"] for instance in BY_NAME.values()]) <= 0.35
    outputs = [len(instance["output"].split()) for instance in BY_NAME.values()]
    assert min(outputs) == 1 and 200 <= max(outputs) <= 250 and sum(words >= 100 for words in outputs) >= 12
    instructions = [len(seed["instruction"].split()) for seed in SEEDS]
    assert min(instructions) == 4 and max(instructions) >= 30
    openings = Counter(" ".join(seed["instruction"].split()[:2]) for seed in SEEDS)
    assert max(openings.values()) <= 12


def test_no_two_seeds_are_near_duplicates():
    """Generation drops what is above 0.7 to a seed; two such seeds would break that rule before it starts."""
    texts = [seed["instruction"] for seed in SEEDS]
    scores = np.tril(rouge_l(texts, texts), -1)
    row, column = np.unravel_index(scores.argmax(), scores.shape)
    assert scores.max() <= 0.7, (texts[row], texts[column])
    official = RougeScorer(["rougeL"], use_stemmer=False).score(texts[row], texts[column])["rougeL"].fmeasure
    assert scores.max() == pytest.approx(official)


def test_own_filters_reject_no_seed():
    """A seed that the filters refuse teaches the teacher to write what is then thrown away."""
    from alpaca.generation.filters import contains_task_header, is_no_input, output_problem
    from generate_instruction import instruction_problem

    for seed in SEEDS:
        instance = seed["instances"][0]
        assert instruction_problem(seed["instruction"]) is None, seed
        assert output_problem(seed["instruction"], instance["output"]) is None, seed
        assert not is_no_input(instance["input"]) and not contains_task_header(instance["input"]), seed


@pytest.mark.parametrize(
    "name, most",
    [
        ("shorten_lift_notice", 12),
        ("what_is_a_mortgage", 40),
        ("card_for_nurse", 59),
        ("headline_for_swans", 8),
        ("umbrella_slogan", 6),
        ("wool_blanket_text", 80),
    ],
)
def test_answers_keep_the_limits_of_their_instructions(name, most):
    """An answer longer than its own instruction allows teaches a model to ignore limits."""
    assert len(BY_NAME[name]["output"].split()) <= most


def test_answers_in_python_run():
    """Code in a seed that does not run is copied into hundreds of generated tasks."""
    scope = {"temps": [0, 36.6, 100]}
    exec(BY_NAME["fahrenheit_one_liner"]["output"], scope)
    assert scope["temps_f"] == [32.0, 97.9, 212.0]
    exec(BY_NAME["second_largest"]["output"].split("\n\nFor example")[0], scope)
    assert scope["second_largest"]([4, 9, 9, 1]) == 4 and scope["second_largest"]([7, 7]) is None
    exec(BY_NAME["early_return"]["output"].split("\n\n")[1], scope)
    assert scope["count_vowels"]("banana") == 3
    stack = BY_NAME["complete_stack_class"]
    exec(stack["output"] + stack["input"].split("# your methods here")[1], scope)


def test_answers_in_sql_json_csv_and_regex_hold():
    """The same for the other formal languages that the standard library can check."""
    database = sqlite3.connect(":memory:")
    database.executescript(
        "CREATE TABLE customers(id, name); INSERT INTO customers VALUES (1, 'a'), (2, 'b');"
        "CREATE TABLE orders(id, customer_id, customer, total, city, paid);"
        "INSERT INTO orders VALUES (1, 1, 'a', 5, 'x', 1), (2, 1, 'a', 7, 'x', 1), (3, 3, 'c', 9, 'x', 1);"
    )
    query = BY_NAME["customers_without_orders"]
    assert database.execute(query["input"]).fetchall() == []
    assert database.execute(query["output"].split("\n\n")[0]).fetchall() == [("b",)]
    assert database.execute(BY_NAME["top_three_customers"]["output"]).fetchall() == [("a", 12), ("c", 9)]

    assert json.loads(BY_NAME["order_to_json"]["output"])["member"] is True
    with pytest.raises(json.JSONDecodeError):
        json.loads(BY_NAME["repair_json"]["input"])
    assert json.loads(BY_NAME["repair_json"]["output"]) == {
        "name": "Olu",
        "age": 41,
        "languages": ["Yoruba", "English"],
    }

    rows = list(csv.reader(io.StringIO(BY_NAME["list_to_csv"]["output"])))
    assert [len(row) for row in rows] == [4] * 4 and rows[3][1] == "Vega, Oslo"
    scores = csv.DictReader(io.StringIO(BY_NAME["count_high_scores"]["input"]))
    assert sum(int(row["score"]) > 80 for row in scores) == int(BY_NAME["count_high_scores"]["output"])

    for line in BY_NAME["which_strings_match"]["output"].splitlines():
        text, verdict = line.split(": ")
        assert (verdict == "yes") == bool(re.fullmatch(r"gr[ae]y(hound)?s?", text))
    code = re.compile(BY_NAME["product_code_pattern"]["output"])
    assert code.match("AB-1234") and not any(map(code.match, ("AB-12", "AB-123456", "ab-123", "xAB-123")))


def test_answers_with_dates_and_sums_are_right():
    """Wrong sums in seeds pass for style."""
    assert (datetime.date(2027, 4, 3) - datetime.date(2027, 2, 12)).days == 50
    assert BY_NAME["days_between"]["output"].startswith("50 days")
    assert BY_NAME["train_arrival"]["output"].startswith("It arrives at 13:25") and (9 * 60 + 47) + 218 == 13 * 60 + 25
    assert round(1000 * 1.04**3, 2) == 1124.86 and round(1000 * 1.04**30) == 3243  # compound_interest
    assert round((4 * 2.35 + 2 * 1.20) * 0.9, 2) == 10.62 and "10.62" in BY_NAME["order_with_discount"]["output"]
    assert 1 - (5 / 6) ** 2 == pytest.approx(11 / 36) and BY_NAME["two_dice_six"]["output"].startswith("11/36")


def test_eval_tasks_are_complete_and_not_among_the_seeds():
    """A win rate or a held-out loss on tasks that the training data holds measures memory."""
    assert [task["id"] for task in EVAL_TASKS] == [f"eval_task_{n}" for n in range(60)]
    assert len({task["category"] for task in EVAL_TASKS}) == 15
    for task in EVAL_TASKS:
        (instance,) = task["instances"]
        assert list(instance) == ["input", "output"] and instance["output"]
    texts = [task["instruction"] for task in EVAL_TASKS]
    assert rouge_l(texts, [seed["instruction"] for seed in SEEDS]).max() <= 0.5
    assert np.tril(rouge_l(texts, texts), -1).max() <= 0.5


def test_eval_tasks_are_not_in_the_shipped_data():
    """The same for alpaca_data.json, whose rows will change; above 0.7 the project calls two tasks the same."""
    rows = json.loads((ROOT / "alpaca_data.json").read_text(encoding="utf-8"))
    assert rouge_l([task["instruction"] for task in EVAL_TASKS], [row["instruction"] for row in rows]).max() <= 0.7


def test_prompt_numbers_its_requirements_without_a_gap():
    """The original counted 1, 2, 3, 2, 3, 4 and had the number of tasks written into the text."""
    prompt = (ROOT / "prompt.txt").read_text(encoding="utf-8")
    numbers = [int(number) for number in re.findall(r"^(\d+)\. ", prompt, flags=re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= 5
    assert "{num_tasks}" in prompt and not re.findall(r"[{}]", prompt.replace("{num_tasks}", ""))
    assert not re.search(r"^#", prompt, flags=re.MULTILINE)  # the tasks that follow are the first "###" lines
