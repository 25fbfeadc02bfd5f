"""Finds what is wrong in a data set of tasks, and writes the rows that are good.

    python generate_instruction.py check alpaca_data.json                              # 52,002 rows take seconds
    python generate_instruction.py check alpaca_data.json --against configs/eval_tasks.jsonl
    python generate_instruction.py clean alpaca_data.json --output alpaca_clean.json   # the same, and a file
    python generate_instruction.py dedup FILE.jsonl --output UNIQUE.jsonl              # ten million rows: eight minutes

The commands are served by generate_instruction.py.
"""

import hashlib
import itertools
import json
import os
import re
import resource
import signal
import tempfile
import time
from array import array
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from alpaca.common.errors import UserError
from alpaca.common.files import atomic_write, json_list, read_jsonl, refuse_existing, write_jsonl
from alpaca.common.tasks import iter_rows, read_task
from alpaca.generation.evaluation_overlap import GRAM, EvaluationSets
from alpaca.generation.filters import find_task_header, instruction_problem, is_no_input, output_problem
from alpaca.generation.pair_search import CORES, TokenNumbers, TokenStore
from alpaca.generation.rouge import Matches, first_repeats, nearest, number_tokens

FIELDS = ("instruction", "input", "output")
NO_INPUT = 'input: "no input" in some spelling'
OTHER_MARKER = 'input: another marker (N/A, none, "no input required")'
SWALLOWED = "output: contains the next task"
EXACT, NEAR = "exact duplicate", "near duplicate"
EVALUATED = "in an evaluation set: the instruction"
EVALUATED_WORDS = f"in an evaluation set: {GRAM} words of the {{}}"
# Listed even where there are none: what people look for first.
ALWAYS_LISTED = ("unreadable", NO_INPUT, OTHER_MARKER, "output: empty output", SWALLOWED, EXACT, NEAR)
REPAIRED = (NO_INPUT, OTHER_MARKER)  # `clean` makes these inputs empty and keeps the row
BATCH = 2000  # rows that a process inspects at a time
ONE_PROCESS = 4_000_000  # bytes of a file up to which more processes do not pay


def check(
    path: str,
    threshold: float = 0.7,
    unicode_dedup: bool = False,
    examples: int = 3,
    json_path: str | None = None,
    overwrite: bool = False,
    against: str | None = None,
    against_threshold: float = 0.7,
) -> int:
    """Reports on a data set; the exit status is 1 where any row is bad, else 0.

    Args:
        path: alpaca_data.json, regen.json, seed_tasks.jsonl or any JSON list, JSONL, CSV or Parquet file of tasks.
        threshold: ROUGE-L F1 with an earlier row above which an instruction is a near duplicate.
        unicode_dedup: compare instructions in any script, and let them begin with any letter.
        examples: how many rows of each kind are shown.
        json_path: the whole report, with every bad row, goes into this JSON file too.
        overwrite: replace json_path where it exists.
        against: evaluation sets, comma-separated; rows that stand in them are named.
        against_threshold: ROUGE-L F1 of the instructions above which a row stands in an evaluation set.
    """
    options = CheckOptions(threshold, unicode_dedup, against=against, against_threshold=against_threshold)
    return inspect_file(path, options, examples, json_path, overwrite)


def clean(
    path: str,
    output: str,
    threshold: float = 0.7,
    unicode_dedup: bool = False,
    examples: int = 3,
    json_path: str | None = None,
    overwrite: bool = False,
    against: str | None = None,
    against_threshold: float = 0.7,
    ratings: str | None = None,
    min_rating: float = 4.5,
) -> int:
    """Writes the good rows of a data set to `output` and says what it dropped and why; the exit status is 0.

    Inputs that only say that there is no input become "". Duplicates are sought among the rows that are good
    otherwise, so that a bad row never takes a good one with it. Other fields of a row stay.

    Args:
        path: alpaca_data.json, regen.json, seed_tasks.jsonl or any JSON list, JSONL, CSV or Parquet file of tasks.
        output: the new file: JSONL where the name ends in .jsonl, else a JSON list.
        threshold: ROUGE-L F1 with an earlier good row above which an instruction is a near duplicate.
        unicode_dedup: compare instructions in any script, and let them begin with any letter.
        examples: how many rows of each kind are shown.
        json_path: the whole report, with every dropped row, goes into this JSON file too.
        overwrite: replace output and json_path where they exist.
        against: evaluation sets, comma-separated; rows that stand in them are dropped.
        against_threshold: ROUGE-L F1 of the instructions above which a row stands in an evaluation set.
        ratings: the folder of `rate`: rows that are rated lower than min_rating, or not at all, go too.
        min_rating: the lowest rating that stays.
    """
    options = CheckOptions(threshold, unicode_dedup, against=against, against_threshold=against_threshold)
    options.ratings, options.min_rating = ratings and load_ratings(ratings), min_rating
    return inspect_file(path, options, examples, json_path, overwrite, output)


def dedup(
    path: str,
    output: str,
    threshold: float = 0.7,
    unicode_dedup: bool = False,
    examples: int = 3,
    json_path: str | None = None,
    overwrite: bool = False,
) -> int:
    """Writes the rows of a data set whose instruction resembles no earlier row that stays; the exit status is 0.

    Args:
        path: alpaca_data.json, regen.json, seed_tasks.jsonl or any JSON list, JSONL, CSV or Parquet file of tasks.
        output: the new file: JSONL where the name ends in .jsonl, else a JSON list.
        threshold: ROUGE-L F1 with an earlier row above which an instruction is a near duplicate.
        unicode_dedup: compare instructions in any script.
        examples: how many rows of each kind are shown.
        json_path: the whole report, with every dropped row, goes into this JSON file too.
        overwrite: replace output and json_path where they exist.
    """
    return inspect_file(
        path, CheckOptions(threshold, unicode_dedup, filters=False), examples, json_path, overwrite, output
    )


@dataclass
class CheckOptions:
    """Flags of the commands. filters: whether rows are judged by themselves, or duplicates alone are sought."""

    threshold: float
    unicode_dedup: bool
    filters: bool = True
    against: str | None = None
    against_threshold: float = 0.7
    ratings: Mapping[str, Mapping[str, Any]] | None = None  # rows of ratings.jsonl by task_sha256
    min_rating: float = 4.5

    def __post_init__(self):
        for name, value in {"threshold": self.threshold, "against_threshold": self.against_threshold}.items():
            if not 0 <= value < 1:
                raise UserError(f"--{name} is a ROUGE-L F1 that is exceeded, from 0 to below 1; got {value}.")


def inspect_file(
    path: str, options: CheckOptions, examples: int, json_path: str | None, overwrite: bool, output: str | None = None
) -> int:
    """Prints what is wrong with the rows of a file, and writes the good ones to `output`. Returns the exit status.

    JSON and JSONL are read row by row; what stays in memory are token numbers and lengths.
    """
    for target in filter(None, (output, json_path)):
        refuse_existing(target, overwrite)
    begin = time.perf_counter()
    evaluation = EvaluationSets(options.against, options.unicode_dedup) if options.against else None
    findings = Findings(path, options, examples, keep_all=bool(json_path))
    findings.compare_rows(findings.look_at_rows(evaluation), evaluation, among_good=output is not None)
    report = {"path": str(path), **findings.report(), "seconds": round(time.perf_counter() - begin, 2)}
    report["peak_memory_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    if output:
        report |= {"output": str(output), "written": int((~findings.dropped).sum())}
        if not report["written"]:
            raise UserError(f"no row of {path} is good, so {output} was not written. `check {path}` says why.")
        if str(output).endswith(".jsonl"):
            write_jsonl(output, findings.good_rows())
        else:
            with atomic_write(output) as stream:
                stream.writelines(json_list(findings.good_rows()))
    print(report_table(report, findings.problems))
    if output:
        print(f"\n{output}: {report['written']:,} rows written, {report['rows'] - report['written']:,} dropped.")
    if json_path:
        write_report(json_path, report, findings.problems)
        print(f"\nThe whole report is in {json_path}.")
    return 1 if report["bad_rows"] and not output else 0


class Problem:
    """The rows with one kind of fault: their number, the first ones, and with `keep_all` all of them in a file."""

    def __init__(self, examples: int, keep_all: bool):
        self.count, self._most = 0, examples
        self.examples: list[dict[str, Any]] = []
        self.file: IO[str] | None = tempfile.TemporaryFile("w+", encoding="utf-8") if keep_all else None

    def add(self, entry: dict[str, Any]) -> None:
        self.count += 1
        if len(self.examples) < self._most:
            self.examples.append(entry)
        if self.file:
            self.file.write(json.dumps(entry, ensure_ascii=False) + "\n")


class Findings:
    """What is wrong with the rows of a file. Rows count from 0 here and from 1 in what is shown.

    problems: by kind. bad, dropped: bool of each row. lengths: characters of each row's fields, int32 of shape
    (rows, 3), 0 where a field is blank, -1 where the row cannot be read.
    """

    def __init__(self, path: str, options: CheckOptions, examples: int, keep_all: bool):
        self.path, self.options, self.examples, self.keep_all = path, options, examples, keep_all
        self.problems: defaultdict[str, Problem] = defaultdict(lambda: Problem(examples, keep_all))
        listed = ALWAYS_LISTED if options.filters else ("unreadable", EXACT, NEAR)
        if options.against:
            listed += (EVALUATED, *map(EVALUATED_WORDS.format, ("input", "output")))
        for kind in listed:
            self.problems[kind].count = 0

    def look_at_rows(self, evaluation: EvaluationSets | None) -> TokenStore:
        """Judges each row by itself, and returns the tokens of the instructions."""
        store, batches, rows = TokenStore(), [], 0
        bad, dropped = array("q"), array("q")
        for batch in inspected_batches(self.path, RowInspector(self.options, evaluation)):
            for row, kind, entry in batch.problems:
                self.problems[kind].add({"row": rows + row + 1, **entry})
                bad.append(rows + row)
                if kind not in REPAIRED:
                    dropped.append(rows + row)
            store.append(batch.tokens)
            batches.append((batch.lengths, batch.texts))
            rows += len(batch.lengths)
        self.lengths = np.concatenate([np.empty((0, len(FIELDS)), np.int32), *(lengths for lengths, _ in batches)])
        self.texts = np.concatenate([np.empty(0, np.uint64), *(texts for _, texts in batches)])
        self.bad, self.dropped = np.zeros(rows, bool), np.zeros(rows, bool)
        self.bad[bad] = self.dropped[dropped] = True
        return store

    def compare_rows(self, store: TokenStore, evaluation: EvaluationSets | None, among_good: bool) -> None:
        """Finds instructions of evaluation sets, and duplicates among all rows or those without another fault."""
        rows = len(self.bad)
        if evaluation:
            store.append(number_tokens(evaluation.instructions, self.options.unicode_dedup))
        sequences = store.sequences()
        readable = self.lengths[:, 0] >= 0
        if evaluation:
            tasks = np.arange(rows, len(sequences))
            found = nearest(sequences, np.flatnonzero(readable), tasks, self.options.against_threshold)
            self._add(EVALUATED, found, lambda other: evaluation.source(other - rows))
        compared = np.flatnonzero(readable & ~self.dropped if among_good else readable)
        found = first_repeats(sequences, self.options.threshold, compared)
        exact = self.texts[found.rows] == self.texts[found.others]
        for kind, chosen in ((EXACT, exact), (NEAR, ~exact)):
            self._add(kind, Matches(*(column[chosen] for column in found)))

    def _add(self, kind: str, found: Matches, source: Callable[[int], dict[str, Any]] | None = None) -> None:
        """Adds rows that resemble another one. source: what is shown of the other; default an earlier row's text."""
        self.bad[found.rows] = self.dropped[found.rows] = True
        shown = len(found.rows) if self.keep_all else min(self.examples, len(found.rows))
        self.problems[kind].count += len(found.rows) - shown
        rows, others, scores = (column[:shown].tolist() for column in found)
        wanted = set(rows if source else rows + others)
        instructions: dict[int, str] = {}
        for row, content in enumerate(iter_rows(self.path) if wanted else ()):
            if row in wanted:
                instructions[row] = read_task(content, require_output=False)[0]["instruction"]
                if len(instructions) == len(wanted):
                    break
        for row, other, score in zip(rows, others, scores, strict=True):
            shown_other = source(other) if source else {"repeats_row": other + 1, "repeats": instructions[other]}
            self.problems[kind].add({"row": row + 1, "text": instructions[row], "f1": score, **shown_other})

    def good_rows(self) -> Iterator[Any]:
        """The rows that stay, read from the file again."""
        for row in itertools.compress(iter_rows(self.path), ~self.dropped):
            if self.options.filters:
                row, _ = read_task(row)
                row |= {"input": ""} if is_no_input(row["input"]) else {}
            yield row

    def report(self) -> dict[str, Any]:
        """The figures; `problems` is beside them."""
        return {
            "rows": len(self.bad),
            "bad_rows": int(self.bad.sum()),
            "threshold": self.options.threshold,
            "against_threshold": self.options.against_threshold,
            "lengths": {field: _length_figures(sizes) for field, sizes in zip(FIELDS, self.lengths.T, strict=True)},
            "empty_inputs": int((self.lengths[:, 1] == 0).sum()),
        }


# ----------------------------------------------------------------------------------------------------------------------
# One row at a time, in processes of their own where the file is large.


class InspectedBatch(NamedTuple):
    """problems: row in the batch, kind, what is shown of it. texts: 64 bits of hash of instruction and input."""

    problems: list[tuple[int, str, dict[str, Any]]]
    lengths: np.ndarray
    texts: np.ndarray
    tokens: TokenNumbers


@dataclass
class RowInspector:
    """Looks at rows as read from a file."""

    options: CheckOptions
    evaluation: EvaluationSets | None = None

    def __call__(self, rows: Sequence[Any]) -> InspectedBatch:
        problems, instructions = [], []
        lengths, texts = np.full((len(rows), len(FIELDS)), -1, np.int32), np.zeros(len(rows), np.uint64)
        for number, row in enumerate(rows):
            task, unreadable = read_task(row, require_output=self.options.filters)
            if unreadable:
                problems.append((number, "unreadable", {"text": unreadable}))
                instructions.append("")
                continue
            instructions.append(task["instruction"])
            fields = [task.get(field, "") for field in FIELDS]
            lengths[number] = [len(text) if text.strip() else 0 for text in fields]
            plain = "\0".join(" ".join(text.casefold().split()) for text in fields[:2])
            texts[number] = int.from_bytes(hashlib.blake2b(plain.encode(), digest_size=8).digest())
            if self.options.filters:
                found = row_problems(task, self.options.unicode_dedup)
                if self.options.ratings is not None:
                    found += rating_problem(task, self.options.ratings, self.options.min_rating)
                problems += ((number, kind, {"text": text}) for kind, text in found)
            for field in ("input", "output") if self.evaluation else ():
                if shared := self.evaluation.shared_words(task[field]):
                    problems.append((number, EVALUATED_WORDS.format(field), {"text": task[field], **shared}))
        return InspectedBatch(problems, lengths, texts, number_tokens(instructions, self.options.unicode_dedup))


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


def inspected_batches(path: str, inspect: RowInspector) -> Iterator[InspectedBatch]:
    """The rows of a file, inspected BATCH at a time on all cores, in order."""
    rows = iter_rows(path)
    batches = iter(lambda: list(itertools.islice(rows, BATCH)), [])
    if CORES == 1 or not os.path.isfile(path) or os.path.getsize(path) <= ONE_PROCESS:
        yield from map(inspect, batches)
        return
    with ProcessPoolExecutor(CORES, initializer=_start_worker, initargs=(inspect,)) as processes:
        # A few batches ahead of the one that is waited for, and not the whole file.
        waiting = deque(processes.submit(_inspect, batch) for batch in itertools.islice(batches, 2 * CORES))
        with tqdm(unit=" rows", unit_scale=BATCH, delay=5, mininterval=1, desc="rows read") as bar:
            while waiting:
                yield waiting.popleft().result()
                bar.update()
                waiting.extend(processes.submit(_inspect, batch) for batch in itertools.islice(batches, 1))


def _start_worker(inspect: RowInspector) -> None:
    global _inspect_rows
    _inspect_rows = inspect
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the process that reads, and that ends this one


def _inspect(rows: Sequence[Any]) -> InspectedBatch:
    return _inspect_rows(rows)


# ----------------------------------------------------------------------------------------------------------------------
# The report.

LENGTHS = ("min", "mean", "median", "p95", "max")


def report_table(report: Mapping[str, Any], problems: Mapping[str, Problem]) -> str:
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
    notes = {
        NEAR: f" (ROUGE-L F1 above {report['threshold']} with an earlier row)",
        EVALUATED: f" (ROUGE-L F1 above {report['against_threshold']})",
    }
    lines += [f"{problem.count:>7,}  {kind}{notes.get(kind, '')}" for kind, problem in problems.items()]
    for kind, problem in problems.items():
        if problem.examples:
            lines += ["", f"{kind}:"]
            for entry in problem.examples:
                lines += [f"  row {entry['row']:,}: {_excerpt(entry['text'])}", *_other_text(entry)]
            if problem.count > len(problem.examples):
                lines.append(f"  and {problem.count - len(problem.examples):,} more")
    return "\n".join(lines)


def _other_text(entry: Mapping[str, Any]) -> list[str]:
    """The line that names what a row repeats."""
    if "words" in entry:
        what = f"has {_excerpt(entry['words'])} in common with"
    elif "f1" in entry:
        what = f"F1 {entry['f1']:.4f} with"
    else:
        return []
    if "repeats" in entry:
        return [f"    {what} row {entry['repeats_row']:,}: {entry['repeats']!r}"]
    return [f"    {what} row {entry['against_row']:,} of {entry['against']}: {_excerpt(entry['against_text'])}"]


def write_report(path: str, report: Mapping[str, Any], problems: Mapping[str, Problem]) -> None:
    """The report as JSON: the figures, and under `problems` every row of each kind."""
    with atomic_write(path) as stream:
        stream.write(json.dumps(report, indent=4, ensure_ascii=False)[:-2] + ',\n    "problems": {')
        for number, (kind, problem) in enumerate(problems.items()):
            stream.write(f"{',' if number else ''}\n        {json.dumps(kind, ensure_ascii=False)}: [")
            problem.file.seek(0)
            for i, line in enumerate(problem.file):
                stream.write(f"{',' if i else ''}\n            {line.rstrip()}")
            stream.write("\n        ]" if problem.count else "]")
        stream.write("\n    }\n}\n")


def _length_figures(sizes: np.ndarray) -> dict[str, int]:
    """Figures of the lengths above 0."""
    sizes = np.sort(sizes[sizes > 0])
    if not len(sizes):
        return dict.fromkeys(LENGTHS, 0)
    figures = sizes[0], sizes.mean(), np.median(sizes), sizes[int(0.95 * (len(sizes) - 1))], sizes[-1]
    return {name: round(float(figure)) for name, figure in zip(LENGTHS, figures, strict=True)}


def _excerpt(text: str, size: int = 100) -> str:
    return repr(text) if len(text) <= size else f"{text[:size]!r}..."
