"""The rows that the project is written around: seed tasks, written tasks, evaluation tasks and the prompt."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from rapidfuzz import process
from rapidfuzz.distance import LCSseq
from rouge_score.rouge_scorer import RougeScorer

from alpaca.generation.filters import contains_task_header, instruction_problem, is_no_input, output_problem

ROOT = Path(__file__).resolve().parents[2]


def read_jsonl(name):
    return [json.loads(line) for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]


SEEDS = read_jsonl("seed_tasks.jsonl")
WRITTEN = read_jsonl("data/written_tasks.jsonl")
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


def test_written_rows_have_the_shape_that_the_build_reads():
    """A row without a name or with a name of another row loses its check and its line in data/origin.jsonl."""
    names = [*BY_NAME, *(row["name"] for row in WRITTEN)]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[a-z0-9_]+", name) for name in names)
    for row in WRITTEN:
        assert list(row) == ["kind", "name", "instruction", "input", "output", "check"]
        assert all(text == text.strip() for text in row.values()) and "\n" not in row["instruction"]
        assert 1 <= len(row["output"].split()) <= 300, row["name"]


def test_written_rows_are_many_and_of_many_kinds():
    """A thousand rows of few kinds, or none with an input, teach a model those alone."""
    kinds = Counter(row["kind"] for row in WRITTEN)
    assert len(SEEDS) + len(WRITTEN) >= 1000 and len(kinds) >= 60 and min(kinds.values()) >= 12
    assert {seed["kind"] for seed in SEEDS} < set(kinds)
    inputs = [bool(row["input"]) for row in WRITTEN] + [bool(task["input"]) for task in BY_NAME.values()]
    assert 1 / 3 <= np.mean(inputs) <= 0.5


def test_no_two_rows_are_near_duplicates():
    """Generation drops what is above 0.7 to a seed; two such seeds would break that rule before it starts."""
    texts = [row["instruction"] for row in [*SEEDS, *WRITTEN]]
    scores = np.tril(rouge_l(texts, texts), -1)
    row, column = np.unravel_index(scores.argmax(), scores.shape)
    assert scores.max() <= 0.7, (texts[row], texts[column])
    official = RougeScorer(["rougeL"], use_stemmer=False).score(texts[row], texts[column])["rougeL"].fmeasure
    assert scores.max() == pytest.approx(official)


def test_own_filters_reject_no_row():
    """A seed that the filters refuse teaches the teacher to write what is then thrown away."""
    for row in [*({**seed, **seed["instances"][0]} for seed in SEEDS), *WRITTEN]:
        assert instruction_problem(row["instruction"]) is None, row
        assert output_problem(row["instruction"], row["output"]) is None, row
        assert not is_no_input(row["input"]) and not contains_task_header(row["input"]), row


def test_percentages_are_written_in_one_way():
    """ "10 %" in some rows and "10%" in others teaches both."""
    rows = [*({**seed, **seed["instances"][0]} for seed in SEEDS), *WRITTEN]
    spaced = {
        row["name"] for row in rows for field in ("instruction", "input", "output") if re.search(r"\d %", row[field])
    }
    assert spaced == {"slugify", "digit_sum_c_to_python"}  # code, where % is an operator or a character to drop


def test_eval_tasks_are_complete_and_not_among_the_rows():
    """A win rate or a held-out loss on tasks that the training data holds measures memory."""
    assert [task["id"] for task in EVAL_TASKS] == [f"eval_task_{n}" for n in range(60)]
    assert len({task["category"] for task in EVAL_TASKS}) == 15
    for task in EVAL_TASKS:
        (instance,) = task["instances"]
        assert list(instance) == ["input", "output"] and instance["output"]
    texts = [task["instruction"] for task in EVAL_TASKS]
    assert rouge_l(texts, [row["instruction"] for row in [*SEEDS, *WRITTEN]]).max() <= 0.5
    assert np.tril(rouge_l(texts, texts), -1).max() <= 0.5


def test_prompt_numbers_its_requirements_without_a_gap():
    """The original counted 1, 2, 3, 2, 3, 4 and had the number of tasks written into the text."""
    prompt = (ROOT / "prompt.txt").read_text(encoding="utf-8")
    numbers = [int(number) for number in re.findall(r"^(\d+)\. ", prompt, flags=re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= 5
    assert "{num_tasks}" in prompt and not re.findall(r"[{}]", prompt.replace("{num_tasks}", ""))
    assert not re.search(r"^#", prompt, flags=re.MULTILINE)  # the tasks that follow are the first "###" lines
