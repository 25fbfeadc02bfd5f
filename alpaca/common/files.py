"""Files that appear whole or not at all; JSON and JSONL."""

import contextlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from alpaca.common.errors import UserError


def fsync_dir(path: str | os.PathLike) -> None:
    """Makes a rename or a new name in the folder `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def usual_rights(path: str | os.PathLike) -> None:
    """Gives a file or folder the rights that the user's umask means; what tempfile and safetensors make is private."""
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, (0o777 if os.path.isdir(path) else 0o666) & ~umask)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "w") -> Iterator[Any]:
    """Opens a file beside `path` for writing and renames it to `path` only when the block ends well.

    Text is UTF-8 with LF. On an error the old file is untouched and the half-written one is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    descriptor, beside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(descriptor, mode, **options) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        usual_rights(beside)
        os.replace(beside, path)
        fsync_dir(path.parent)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_dir(path: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """Yields a new folder beside `path`, which takes the name `path` only when the block ends well.

    Raises UserError before the block where `path` holds something and `overwrite` is false. With `overwrite` the old
    folder is set aside until the new one stands in its place.
    """
    path = Path(path)
    refuse_existing(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        yield beside
        for file in beside.rglob("*"):
            if file.is_file():
                with open(file, "rb") as stream:
                    os.fsync(stream.fileno())
        usual_rights(beside)
        replaced = None
        if path.exists():
            replaced = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".replaced", dir=path.parent))
            os.replace(path, replaced)
        os.replace(beside, path)
        fsync_dir(path.parent)
        if replaced:
            shutil.rmtree(replaced)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def is_inside(path: str | os.PathLike, folder: str | os.PathLike) -> bool:
    """Whether `path` is `folder` or lies below it."""
    return Path(path).resolve().is_relative_to(Path(folder).resolve())


def refuse_existing(path: str | os.PathLike, overwrite: bool = False) -> None:
    """Raises UserError where `path` is a file or a folder that holds something, unless `overwrite`."""
    path = Path(path)
    occupied = any(path.iterdir()) if path.is_dir() else path.exists()
    if occupied and not overwrite:
        raise UserError(f"{path} already exists and is left alone. Choose another path, or add --overwrite True.")


def _open_for(f: Any, mode: str) -> Any:
    return contextlib.nullcontext(f) if isinstance(f, io.IOBase) else open(f, mode, encoding="utf-8")


def jload(f: Any, mode: str = "r") -> Any:
    """Reads one JSON document from a path or an open file; a broken one is a UserError that names file and line."""
    with _open_for(f, mode) as stream:
        try:
            return json.load(stream)
        except ValueError as error:
            raise UserError(f"{getattr(stream, 'name', f)} is not valid JSON: {error}") from error


def jdump(obj: Any, f: Any, mode: str = "w", indent: int | None = 4, default: Callable = str) -> None:
    """Writes `obj` as JSON, or a string as it is, to a path (atomically) or an open file. UTF-8, no \\u escapes."""
    if not isinstance(obj, str | dict | list):
        raise ValueError(f"jdump writes a dict, a list or a str, not {type(obj).__name__}")
    text = obj if isinstance(obj, str) else json.dumps(obj, indent=indent, default=default, ensure_ascii=False)
    if isinstance(f, io.IOBase):
        f.write(text)
    elif "a" in mode:
        with open(f, mode, encoding="utf-8") as stream:
            stream.write(text)
    else:
        with atomic_write(f, mode) as stream:
            stream.write(text)


def read_jsonl(path: str | os.PathLike) -> list[Any]:
    """All objects of a JSONL file; blank lines are skipped, a broken line is a UserError with its number."""
    rows = []
    with open(path, encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except ValueError as error:
                    raise UserError(f"{path}, line {number} is not valid JSON: {error}") from error
    return rows


def write_jsonl(path: str | os.PathLike, rows: Sequence[Any]) -> None:
    """Writes one JSON object a line, atomically."""
    with atomic_write(path) as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
