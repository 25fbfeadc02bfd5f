"""Executes or recomputes the answers of rows: code, SQL, JSON, regular expressions, sums, units, dates, counts.

    python data/verify_rows.py                                        # the seeds and data/written_tasks.jsonl, seconds
    python data/verify_rows.py FILE.jsonl                             # any file of such rows

A row's `check` holds Python statements that assert something about its answer. They see `instruction`, `input` and
`output`, the standard modules named in MODULES, and the functions of this file. The checks of the seeds stand in
data/seed_checks.jsonl under the seeds' names. The script prints how many rows were covered, by kind, and ends with
status 1 where an assertion fails.
"""

import contextlib
import importlib
import io
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from alpaca.common.errors import UserError, cli_errors  # noqa: E402
from alpaca.common.files import read_jsonl  # noqa: E402

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
        # optimize=0: `python -O` would leave the assertions out
        exec(compile(source, "row", "exec", optimize=0), names)
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


def run_shell(setup: str, command: str) -> str:
    """What `command` prints under bash in an empty folder after `setup`; bash, coreutils, sed, awk and grep alone.

    Raises ValueError for a command that deletes or reaches the network.
    """
    if found := re.search(r"\brm\b|\brmdir\b|-delete\b|\bshred\b|\bdd\b|\bsudo\b|\bcurl\b|\bwget\b", setup + command):
        raise ValueError(f"a check may not run {found[0]}")
    with tempfile.TemporaryDirectory() as folder:
        environment = {"PATH": os.environ["PATH"], "HOME": folder, "TMPDIR": folder, "LC_ALL": "C"}
        done = subprocess.run(
            ["bash", "-c", f"{setup}\n{command}"],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=20,
        )
        return done.stdout


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
    names |= {f.__name__: f for f in (code, run_python, run_sql, run_shell, words, numbers)}
    try:
        exec(compile(row["check"], "check", "exec", optimize=0), names)
    except (Exception, SystemExit):  # an answer's program may end with sys.exit(0)
        return traceback.format_exc(limit=-1).strip().splitlines()[-1] or "assertion failed"
    return ""


def load(path: Path) -> list[dict]:
    """Rows of instruction, input, output and check; seeds get their checks from data/seed_checks.jsonl."""
    rows = read_jsonl(path)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or "name" not in row:
            raise UserError(f"{path}, row {number} is no object with a name.")
    if rows and "instances" in rows[0]:
        checks = {row["name"]: row["check"] for row in load(ROOT / "data/seed_checks.jsonl")}
        if unknown := checks.keys() - {row["name"] for row in rows}:
            raise UserError(f"data/seed_checks.jsonl names {', '.join(sorted(unknown))}, which {path} does not hold.")
        rows = [row | row["instances"][0] | {"check": checks.get(row["name"], "")} for row in rows]
    return rows


def main(paths: list[str]) -> int:
    covered: Counter[str] = Counter()
    failed = total = 0
    for path in map(Path, paths or [ROOT / "seed_tasks.jsonl", ROOT / "data/written_tasks.jsonl"]):
        rows = load(path)
        checked = [row for row in rows if row.get("check")]
        for row in checked:
            if problem := verify(row):
                failed += 1
                print(f"{path}, {row['name']} ({row.get('instruction', '')[:60]}): {problem}\n    {row['check']}")
        covered.update(row.get("kind", "(no kind)") for row in checked)
        total += len(rows)
        print(f"{path.name}: {len(checked)} of {len(rows)} rows")
    for kind, count in sorted(covered.items(), key=lambda item: (-item[1], item[0])):
        print(f"{count:5d}  {kind}")
    print(f"{sum(covered.values())} of {total} rows executed or recomputed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    with cli_errors():
        sys.exit(main(sys.argv[1:]))
