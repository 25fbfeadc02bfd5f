"""Finds what is wrong in a data set of tasks, and writes the rows that are good.

python generate_instruction.py check alpaca_data.json                                # 52,002 rows take seconds
python generate_instruction.py clean alpaca_data.json --output alpaca_clean.json     # the same, and a file
python generate_instruction.py check seed_tasks.jsonl                                # one second
"""

import hashlib
import json
import re
import resource
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alpaca.common.errors import UserError
from alpaca.common.files import jdump, read_jsonl, refuse_existing, write_jsonl
from alpaca.common.tasks import read_rows, read_task
from alpaca.generation.filters import find_task_header, instruction_problem, is_no_input, output_problem
from alpaca.generation.rouge import first_repeats

FIELDS = ("instruction", "input", "output")
NO_INPUT = 'input: "no input" in some spelling'
OTHER_MARKER = 'input: another marker (N/A, none, "no input required")'
SWALLOWED = "output: contains the next task"
EXACT, NEAR = "exact duplicate", "near duplicate"
# Listed even where there are none: what people look for first.
ALWAYS_LISTED = ("unreadable", NO_INPUT, OTHER_MARKER, "output: empty output", SWALLOWED, EXACT, NEAR)
REPAIRED = (NO_INPUT, OTHER_MARKER)  # `clean` makes these inputs empty and keeps the row


def check(
    path: str,
    threshold: float = 0.7,
    unicode_dedup: bool = False,
    examples: int = 3,
    json_path: str | None = None,
    overwrite: bool = False,
) -> int:
    """Reports on a data set; the exit status is 1 where any row is bad, else 0.

    Args:
        path: alpaca_data.json, regen.json, seed_tasks.jsonl or any JSON list or JSONL file of tasks.
        threshold: ROUGE-L F1 with an earlier row above which an instruction is a near duplicate.
        unicode_dedup: compare instructions in any script, and let them begin with any letter.
        examples: how many rows of each kind are shown.
        json_path: the whole report, with every bad row, goes into this JSON file too.
        overwrite: replace json_path where it exists.
    """
    if json_path:
        refuse_existing(json_path, overwrite)
    report, _ = inspect_rows(read_rows(path), threshold, unicode_dedup)
    report = {"path": str(path), **report}
    print(report_table(report, examples))
    if json_path:
        jdump(report, json_path)
        print(f"\nThe whole report is in {json_path}.")
    return 1 if report["bad_rows"] else 0


def clean(
    path: str,
    output: str,
    threshold: float = 0.7,
    unicode_dedup: bool = False,
    examples: int = 3,
    json_path: str | None = None,
    overwrite: bool = False,
    ratings: str | None = None,
    min_rating: float = 4.5,
) -> int:
    """Writes the good rows of a data set to `output` and says what it dropped and why; the exit status is 0.

    Inputs that only say that there is no input become "". Duplicates are sought among the rows that are good
    otherwise, so that a bad row never takes a good one with it. Other fields of a row stay.

    Args:
        path: alpaca_data.json, regen.json, seed_tasks.jsonl or any JSON list or JSONL file of tasks.
        output: the new file: JSONL where the name ends in .jsonl, else a JSON list.
        threshold: ROUGE-L F1 with an earlier good row above which an instruction is a near duplicate.
        unicode_dedup: compare instructions in any script, and let them begin with any letter.
        examples: how many rows of each kind are shown.
        json_path: the whole report, with every dropped row, goes into this JSON file too.
        overwrite: replace output and json_path where they exist.
        ratings: the folder of `rate`: rows that are rated lower than min_rating, or not at all, go too.
        min_rating: the lowest rating that stays.
    """
    for target in filter(None, (output, json_path)):
        refuse_existing(target, overwrite)
    known = None if ratings is None else load_ratings(ratings)
    report, good = inspect_rows(read_rows(path), threshold, unicode_dedup, True, known, min_rating)
    report = {"path": str(path), "output": str(output), "written": len(good), **report}
    if not good:
        raise UserError(f"no row of {path} is good, so {output} was not written. `check {path}` says why.")
    if str(output).endswith(".jsonl"):
        write_jsonl(output, good)
    else:
        jdump(good, output)
    print(report_table(report, examples))
    print(f"\n{output}: {len(good):,} rows written, {report['rows'] - len(good):,} dropped.")
    if json_path:
        jdump(report, json_path)
        print(f"The whole report is in {json_path}.")
    return 0


def inspect_rows(
    rows: Sequence[Any],
    threshold: float = 0.7,
    unicode_dedup: bool = False,
    duplicates_among_good: bool = False,
    ratings: Mapping[str, Mapping[str, Any]] | None = None,
    min_rating: float = 4.5,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What is wrong with `rows` as read from a file, and the rows that are good, their no-input markers removed.

    The report holds `rows`, `bad_rows`, `lengths` in characters, `empty_inputs`, and `problems`: kind -> a list with
    the row (the first is 1) and the faulty text of each; duplicates also name the earlier row, its text and the F1.
    Duplicates are sought among all readable rows, or with `duplicates_among_good` among those without another fault.
    ratings: rows of ratings.jsonl by task_sha256; those below `min_rating` and those without one are bad then.
    """
    if not 0 <= threshold < 1:
        raise UserError(f"--threshold is a ROUGE-L F1 that duplicates exceed, from 0 to below 1; got {threshold}.")
    begin = time.perf_counter()
    problems: dict[str, list[dict[str, Any]]] = {name: [] for name in ALWAYS_LISTED}
    tasks: dict[int, dict[str, Any]] = {}
    dropped: set[int] = set()
    for number, row in enumerate(rows, start=1):
        task, unreadable = read_task(row)
        if unreadable:
            found = [("unreadable", unreadable)]
        else:
            tasks[number] = task
            found = row_problems(task, unicode_dedup)
            if ratings is not None:
                found += rating_problem(task, ratings, min_rating)
        for name, text in found:
            problems.setdefault(name, []).append({"row": number, "text": text})
            if name not in REPAIRED:
                dropped.add(number)

    compared = [number for number in tasks if not (duplicates_among_good and number in dropped)]
    repeats = first_repeats([tasks[number]["instruction"] for number in compared], threshold, unicode_dedup)
    for first, again, score in repeats:
        earlier, number = compared[first], compared[again]
        texts = [[_plain(tasks[n][field]) for field in ("instruction", "input")] for n in (earlier, number)]
        problems[EXACT if texts[0] == texts[1] else NEAR].append(
            {
                "row": number,
                "text": tasks[number]["instruction"],
                "f1": score,
                "repeats_row": earlier,
                "repeats": tasks[earlier]["instruction"],
            }
        )
        dropped.add(number)

    report = {
        "rows": len(rows),
        "bad_rows": len({entry["row"] for entries in problems.values() for entry in entries}),
        "threshold": threshold,
        "lengths": {field: _lengths([task[field] for task in tasks.values()]) for field in FIELDS},
        "empty_inputs": sum(not task["input"].strip() for task in tasks.values()),
        "problems": problems,
        "seconds": round(time.perf_counter() - begin, 2),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }
    good = [
        task | {"input": ""} if is_no_input(task["input"]) else task
        for number, task in tasks.items()
        if number not in dropped
    ]
    return report, good


def row_problems(task: Mapping[str, str], unicode_dedup: bool = False) -> list[tuple[str, str]]:
    """All that is wrong with one task by itself: kinds of problems, each with the faulty text."""
    found = []
    if reason := instruction_problem(task["instruction"], any_language=unicode_dedup):
        found.append((f"instruction: {reason}", task["instruction"]))
    if is_no_input(task["input"]):
        spelled_out = re.sub(r"[^a-z0-9]", "", task["input"].lower()) == "noinput"
        found.append((NO_INPUT if spelled_out else OTHER_MARKER, task["input"]))
    elif header := find_task_header(task["input"]):
        found.append(("input: contains the next task", task["input"][header.start() :]))
    if reason := output_problem(task["instruction"], task["output"]):
        # Where the output does not show the fault, what does: the task behind it, or the instruction without an answer.
        header = find_task_header(task["output"])
        text = task["output"][header.start() :] if header else task["output"].strip() or task["instruction"]
        found.append((f"output: {reason}", text))
    return found


def task_sha256(task: Mapping[str, str]) -> str:
    """What a row's rating is found by, wherever the row stands."""
    return hashlib.sha256(json.dumps([task[field] for field in FIELDS]).encode()).hexdigest()


def load_ratings(folder: str) -> dict[str, dict[str, Any]]:
    """The rows of a folder's ratings.jsonl by task_sha256; UserError where it has none."""
    path = Path(str(folder)) / "ratings.jsonl"
    if not path.is_file():
        raise UserError(f"no file {path}: --ratings takes the --output_dir of `rate`.")
    return {row["task_sha256"]: row for row in read_jsonl(path)}


def rating_problem(
    task: Mapping[str, str], ratings: Mapping[str, Mapping[str, Any]], min_rating: float
) -> list[tuple[str, str]]:
    """As row_problems: what the rating says against a task."""
    row = ratings.get(task_sha256(task), {"rating": None, "reason": "not rated"})
    if row["rating"] is None:
        return [("rating: none", f"{row['reason']}: {task['instruction']}")]
    if row["rating"] < min_rating:
        return [(f"rating: below {min_rating:g}", f"{row['rating']:g}, {row['reason']}: {task['instruction']}")]
    return []


def report_table(report: Mapping[str, Any], examples: int = 3) -> str:
    """The report for people: sizes, a line for each kind of problem, and the first rows of each."""
    lines = [
        f"{report['path']}: {report['rows']:,} rows, {report['bad_rows']:,} of them with a problem "
        f"({report['seconds']:.1f} s, peak memory {report['peak_memory_mb']:,} MB)",
        "",
        f"{'characters':<14}{'shortest':>10}{'mean':>10}{'median':>10}{'95 %':>10}{'longest':>10}",
    ]
    for field, lengths in report["lengths"].items():
        lines.append(f"{field:<14}" + "".join(f"{lengths[name]:>10,}" for name in LENGTHS))
    lines += [f"{report['empty_inputs']:,} inputs are empty (lengths are of the others)", "", "   rows  problem"]
    for name, entries in report["problems"].items():
        above = f" (ROUGE-L F1 above {report['threshold']} with an earlier row)" if name == NEAR else ""
        lines.append(f"{len(entries):>7,}  {name}{above}")
    for name, entries in report["problems"].items():
        if entries and examples > 0:
            lines += ["", f"{name}:"]
            for entry in entries[:examples]:
                lines.append(f"  row {entry['row']:,}: {_excerpt(entry['text'])}")
                if "repeats" in entry:
                    lines.append(f"    F1 {entry['f1']:.4f} with row {entry['repeats_row']:,}: {entry['repeats']!r}")
            if len(entries) > examples:
                lines.append(f"  and {len(entries) - examples:,} more")
    return "\n".join(lines)


LENGTHS = ("min", "mean", "median", "p95", "max")


def _lengths(texts: Sequence[str]) -> dict[str, int]:
    sizes = sorted(len(text) for text in texts if text.strip()) or [0]
    figures = (
        sizes[0],
        statistics.fmean(sizes),
        statistics.median(sizes),
        sizes[int(0.95 * (len(sizes) - 1))],
        sizes[-1],
    )
    return dict(zip(LENGTHS, map(round, figures), strict=True))


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _excerpt(text: str, size: int = 100) -> str:
    return repr(text) if len(text) <= size else f"{text[:size]!r}..."
