"""Instruction tasks from any file that holds them."""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alpaca.common.errors import UserError
from alpaca.common.files import jload, read_jsonl


def load_tasks(path: str | os.PathLike, require_output: bool = True) -> list[dict[str, Any]]:
    """Tasks from alpaca_data.json, regen.json, a JSONL file of either, or seed_tasks.jsonl (`instances`).

    Returns a list of dicts with str `instruction`, `input` ("" where missing or null) and `output` (left out where it
    is missing and `require_output` is false); other fields stay. Raises UserError listing up to ten bad rows by file
    and row (the first row is 1).
    """
    return check_tasks(read_rows(path), path, require_output)


def read_rows(path: str | os.PathLike) -> list[Any]:
    """The rows of a JSON list or of a JSONL file as they stand, whatever they are; UserError where there are none."""
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.json*")], n=1)
        hint = f" Did you mean {path.parent / near[0]}?" if near else ""
        raise UserError(f"no file {path}.{hint}")
    with open(path, encoding="utf-8") as stream:
        is_list = stream.read(4096).lstrip("\ufeff \t\r\n").startswith("[")
    return jload(path) if is_list else read_jsonl(path)


def check_tasks(rows: Sequence[Any], path: str | os.PathLike, require_output: bool = True) -> list[dict[str, Any]]:
    """Rows read from `path`, as `load_tasks` returns them and with its errors."""
    problems, tasks = [], []
    for number, row in enumerate(rows, start=1):
        task, problem = read_task(row, require_output)
        if problem:
            problems.append(f"  row {number}: {problem}")
        else:
            tasks.append(task)
    if problems:
        more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise UserError(
            f"{path}: {len(problems)} of {len(rows)} rows cannot be read:\n" + "\n".join(problems[:10]) + more
        )
    if not tasks:
        raise UserError(f"{path} holds no rows.")
    return tasks


def read_task(row: Any, require_output: bool = True) -> tuple[dict[str, Any], str | None]:
    """One row as `load_tasks` returns it and None, or an empty dict and what is wrong with the row."""
    if not isinstance(row, dict):
        return {}, f"expected an object with instruction, input, output; found {type(row).__name__}"
    instances = row.get("instances")
    if isinstance(instances, list) and instances and isinstance(instances[0], dict):
        row = {**{key: value for key, value in row.items() if key != "instances"}, **instances[0]}
    task = dict(row)
    for field in ("instruction", "input", "output"):
        value = row.get(field)
        if value is None:
            if field == "instruction" or (field == "output" and require_output):
                return {}, f"{field!r} is missing or null (fields: {', '.join(row) or 'none'})"
            if field == "input":
                task["input"] = ""
            else:
                task.pop("output", None)
        elif not isinstance(value, str):
            return {}, f"{field!r} must be a string, found {type(value).__name__}: {str(value)[:40]!r}"
        else:
            task[field] = value.encode("utf-8", "replace").decode()  # a lone surrogate is no character
    if not task["instruction"].strip():
        return {}, "'instruction' is blank"
    return task, None
