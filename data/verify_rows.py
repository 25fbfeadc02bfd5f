"""Execute or recompute the answers of written rows: code, SQL, JSON, regular expressions, sums, units, dates, counts.

    python data/verify_rows.py data/written_tasks.jsonl

A row's `check` holds Python statements that assert something about its answer. They see `instruction`, `input` and
`output`, the standard modules named in MODULES, and the functions of this file. The script prints how many rows were
covered, by kind of check, and ends with status 1 where an assertion fails.
"""

import contextlib
import importlib
import io
import json
import re
import sqlite3
import sys
import traceback
from collections import Counter
from pathlib import Path

MODULES = (
    "calendar collections csv datetime decimal fractions io itertools json math random re sqlite3 statistics string "
    "textwrap"
)
FENCE = re.compile(r"```[\w+-]*\n(.*?)```", re.DOTALL)


def code(text: str) -> str:
    """The first fenced block of `text`, or the whole text where there is none."""
    found = FENCE.search(text)
    return found.group(1) if found else text


def run_python(source: str) -> dict:
    """Execute `source`; returns its names, with what it printed under `printed`."""
    names: dict = {"__name__": "row"}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(source, "row", "exec"), names)
    names["printed"] = printed.getvalue()
    return names


def run_sql(setup: str, query: str) -> list[tuple]:
    """Rows that `query` gives in an empty SQLite database after the statements of `setup`."""
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        database.executescript(setup)
        statements = [part for part in query.split(";") if part.strip()]
        rows: list[tuple] = []
        for statement in statements:
            rows = database.execute(statement).fetchall()
        return rows


def words(text: str) -> int:
    """The number of words of `text`, split at white space."""
    return len(text.split())


def numbers(text: str) -> list[float]:
    """Every number of `text` in order; "1,234.5" counts as one."""
    return [float(n.replace(",", "")) for n in re.findall(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?|-?\d+(?:\.\d+)?", text)]


def verify(row: dict) -> str:
    """Run a row's check; returns "" where it holds, else what failed."""
    names = {name: importlib.import_module(name) for name in MODULES.split()}
    names |= {key: row.get(key) or "" for key in ("instruction", "input", "output")}
    names |= {f.__name__: f for f in (code, run_python, run_sql, words, numbers)}
    try:
        exec(compile(row["check"], "check", "exec"), names)
    except Exception:
        return traceback.format_exc(limit=-1).strip().splitlines()[-1] or "assertion failed"
    return ""


def main(paths: list[str]) -> int:
    covered: Counter[str] = Counter()
    failed = total = 0
    for path in paths:
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
            row = json.loads(line)
            total += 1
            if not row.get("check"):
                continue
            covered[row["kind"]] += 1
            if problem := verify(row):
                failed += 1
                print(f"{path}, line {number} ({row['instruction'][:60]}): {problem}\n    {row['check']}")
    for kind, count in sorted(covered.items(), key=lambda item: -item[1]):
        print(f"{count:5d}  {kind}")
    print(f"{sum(covered.values())} of {total} rows executed or recomputed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
