"""Instruction tasks from any file that holds them."""

import contextlib
import csv
import io
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from alpaca.common.errors import UserError, did_you_mean
from alpaca.common.files import jload, read_jsonl, read_text, refuse_lfs_pointer

TASK_FILES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
BLOCK = 1 << 20  # characters read at a time


def load_tasks(path: str | os.PathLike, require_output: bool = True) -> list[dict[str, Any]]:
    """Tasks from alpaca_data.json, regen.json, seed_tasks.jsonl (`instances`), or JSONL, CSV or Parquet of such rows.

    Returns a list of dicts with str `instruction`, `input` ("" where missing or null) and `output` (left out where it
    is missing and `require_output` is false); other fields stay. Raises UserError listing up to ten bad rows by file
    and row (the first row is 1).
    """
    return check_tasks(read_rows(path), path, require_output)


def read_rows(path: str | os.PathLike) -> list[Any]:
    """The rows of a JSON list, JSONL, CSV or Parquet file as they stand, whatever they are.

    Text is UTF-8 or UTF-16, with or without a byte-order mark. CSV (.csv, .tsv) has a header line. Raises UserError
    where there is no such file, or it cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*.*")], f"{path.parent}/")
        raise UserError(f"no file {path}.{near}" if not path.is_dir() else f"{path} is a folder; name a file in it.")
    if path.suffix == ".parquet":
        return _read_parquet(path)
    if path.suffix in (".csv", ".tsv"):
        return _read_csv(path)
    text = read_text(path).lstrip()
    if text.startswith("["):
        return jload(path)
    if text.startswith("{") and (lists := _lists_inside(text)):
        raise UserError(f"{path} holds one object, not a list of rows. Its rows stand under {lists}: save that list.")
    return read_jsonl(path)


def iter_rows(path: str | os.PathLike) -> Iterator[Any]:
    """The rows that `read_rows` returns and its errors; UTF-8 JSON and JSONL are read as they are taken."""
    taken = 0
    if Path(path).is_file() and Path(path).suffix not in (".parquet", ".csv", ".tsv"):
        try:
            for row in _stream_rows(path):
                yield row
                taken += 1
            return
        except ValueError:  # another encoding or layout, or a fault that read_rows names
            pass
    yield from itertools.islice(read_rows(path), taken, None)


def _stream_rows(path: str | os.PathLike) -> Iterator[Any]:
    """Rows of a JSON list or JSONL file; ValueError where it is neither."""
    with open(path, encoding="utf-8-sig", newline="\n") as stream:
        text = stream.read(BLOCK).lstrip()
        if not text:
            raise ValueError("nothing to see yet")
        if not text.startswith("["):
            stream.seek(0)
            rows = (json.loads(line) for line in stream if line.strip())
            first = next(rows)
            if isinstance(first, dict) and "instruction" not in first and "instances" not in first:
                raise ValueError("an object that may hold lists of rows")
            yield first
            yield from rows
            return
        decoder, place, separator = json.JSONDecoder(), 1, re.compile(r"\s*([],])\s*")
        if re.compile(r"\s*]").match(text, 1):
            raise ValueError("an empty list, or something behind it")
        while True:
            place = re.compile(r"\s*").match(text, place).end()
            try:
                row, end = decoder.raw_decode(text, place)
                sign = separator.match(text, end)
            except ValueError:
                sign = None
            if sign and (sign.end() < len(text) or sign[1] == "]"):
                yield row
                place = sign.end()
                if sign[1] == "]":
                    break
            else:  # the row goes on behind what was read
                more = stream.read(max(BLOCK, len(text) - place))
                if not more:
                    raise ValueError("not a list of rows")
                text, place = text[place:] + more, 0
        if (text[place:] + stream.read()).strip():
            raise ValueError("something behind the list")


def _lists_inside(text: str) -> str:
    """Where a text is one JSON object: the names under which it holds lists of objects."""
    with contextlib.suppress(ValueError):
        content = json.loads(text)
        if "instruction" not in content and "instances" not in content:
            return " and ".join(repr(k) for k, v in content.items() if isinstance(v, list) and v and type(v[0]) is dict)
    return ""


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    refuse_lfs_pointer(path)
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {error}") from error


def _read_csv(path: Path) -> list[dict[str, str]]:
    rows = []
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter="\t" if path.suffix == ".tsv" else ",")
    try:
        header = next(reader, [])
        if "instruction" not in header:
            raise UserError(f"{path}: its first line names no column 'instruction'; it is {','.join(header)[:100]!r}.")
        for cells in reader:
            if cells and len(cells) != len(header):
                raise UserError(
                    f"{path}, line {reader.line_num} (row {len(rows) + 1}) has {len(cells)} cells, the header "
                    f"{len(header)}. A cell with commas, quotes or line ends needs double quotes."
                )
            if cells:
                rows.append(dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num} is not valid CSV: {error}") from error
    return rows


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
