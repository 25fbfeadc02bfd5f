"""Two files of answers as pairs of answers to the same tasks."""

import collections
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alpaca.common.errors import UserError
from alpaca.common.tasks import load_tasks

CATEGORY_FIELDS = ("category", "motivation_app", "dataset")  # this project's, Self-Instruct's, AlpacaEval's


def category_of(row: Mapping[str, Any]) -> str | None:
    """A task's category under any of the names that the known files use."""
    return next((str(row[field]) for field in CATEGORY_FIELDS if row.get(field)), None)


def task_key(row: Mapping[str, Any]) -> tuple[str, str]:
    """Instruction and input, spacing aside: what makes two rows the same task."""
    return " ".join(row["instruction"].split()), " ".join((row.get("input") or "").split())


def load_answers(path: str | Path, name: str | None = None) -> list[dict[str, Any]]:
    """Rows with `instruction`, `input`, `answer` and `generator` from an answer file of any known kind.

    The answer is the row's `output`, or `response` (Self-Instruct's prediction files); task files with references
    (`instances`, alpaca_data.json) count as answered by their authors. `generator` is `name`, the row's own, or the
    file's name. Raises UserError where a row has no answer.
    """
    rows = load_tasks(path, require_output=False)
    bad = []
    for number, row in enumerate(rows, start=1):
        row["answer"] = row.get("output", row.get("response"))
        row["generator"] = name or row.get("generator") or Path(path).stem
        if not isinstance(row["answer"], str):
            bad.append(number)
    if bad:
        raise UserError(
            f"{path}: {len(bad)} of {len(rows)} rows have no answer (an `output` or `response`), first row {bad[0]}. "
            "A file of tasks alone? First run evaluation.py answer."
        )
    return rows


def pair_answers(first: Sequence[dict], second: Sequence[dict]) -> tuple[list[dict], dict[str, int]]:
    """Pairs of answers to the same task, in the order of `first`, and how many rows are left out for what reason.

    The reasons: `only_in_1` and `only_in_2` (the task has no answer in the other file), `repeated` (one file answers
    the task more often than the other).
    """
    waiting: dict[tuple, collections.deque] = collections.defaultdict(collections.deque)
    for row in second:
        waiting[task_key(row)].append(row)
    tasks_1, tasks_2, pairs, left_out = {task_key(row) for row in first}, set(waiting), [], collections.Counter()
    for number, row in enumerate(first):
        if not waiting[task_key(row)]:
            left_out["repeated" if task_key(row) in tasks_2 else "only_in_1"] += 1
            continue
        other = waiting[task_key(row)].popleft()
        pair = {
            "instruction": row["instruction"].strip(),
            "input": row["input"].strip(),
            "output_1": row["answer"],
            "output_2": other["answer"],
            "generator_1": row["generator"],
            "generator_2": other["generator"],
            "index": row.get("index", number),  # pairs that get no verdict leave gaps
        }
        extra = {"id": row.get("id") or other.get("id"), "category": category_of(row) or category_of(other)}
        pairs.append(pair | {name: value for name, value in extra.items() if value})
    for key, rows in waiting.items():
        left_out["repeated" if key in tasks_1 else "only_in_2"] += len(rows)
    return pairs, {reason: left_out[reason] for reason in ("only_in_1", "only_in_2", "repeated")}
