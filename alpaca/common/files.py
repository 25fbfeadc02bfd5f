"""Files that appear whole or not at all; JSON and JSONL."""

import codecs
import contextlib
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
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
def named_in_errors(path: str | os.PathLike) -> Iterator[None]:
    """Gives an OSError of a write, which knows no file name, this one."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "w") -> Iterator[Any]:
    """Opens a file beside `path` for writing and renames it to `path` only when the block ends well.

    Text is UTF-8 with LF. On an error the old file is untouched and the half-written one is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Half a character, which JSON can hold, must not stop a file whose content took hours.
    options = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n", "errors": "backslashreplace"}
    descriptor, beside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with named_in_errors(path), os.fdopen(descriptor, mode, **options) as stream:
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

    Raises UserError before the block where `path` holds something and `overwrite` is false, and where it cannot be
    renamed. With `overwrite` the old folder is set aside until the new one stands in its place. A link is followed.
    """
    path = Path(path).resolve()
    refuse_existing(path, overwrite)
    if path.is_file():
        raise UserError(f"{path} is a file, and a folder is to be made there. Choose another path.")
    refuse_unmovable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    replaced = None
    try:
        with named_in_errors(path):
            yield beside
        for file in beside.rglob("*"):
            if file.is_file():
                with open(file, "rb") as stream:
                    os.fsync(stream.fileno())
        usual_rights(beside)
        if path.exists():
            replaced = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".replaced", dir=path.parent))
            os.replace(path, replaced)
        os.replace(beside, path)
        fsync_dir(path.parent)
        if replaced:
            shutil.rmtree(replaced)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        if replaced and not path.exists():
            os.replace(replaced, path)
        elif replaced:  # empty where the old folder could not be moved, else the old one, whose place is taken
            shutil.rmtree(replaced, ignore_errors=True)
        raise


def refuse_unmovable(path: Path) -> None:
    """Raises UserError where the folder `path`, links resolved, cannot be replaced by renaming another one to it."""
    if path.is_mount() or Path.cwd().is_relative_to(path):
        what = "a mounted disk" if path.is_mount() else "the folder that you are in, or holds it"
        raise UserError(f"{path} is {what}, and cannot be put in place whole. Name a new folder, such as {path}/out.")


def is_inside(path: str | os.PathLike, folder: str | os.PathLike) -> bool:
    """Whether `path` is `folder` or lies below it."""
    return Path(path).resolve().is_relative_to(Path(folder).resolve())


def refuse_existing(
    path: str | os.PathLike, overwrite: bool = False, way_out: str = "Choose another path, or add --overwrite True."
) -> None:
    """Raises UserError where `path` is a file or a folder that holds something, unless `overwrite`."""
    path = Path(path)
    occupied = any(path.iterdir()) if path.is_dir() else path.exists()
    if occupied and not overwrite:
        raise UserError(f"{path} already exists and is left alone. {way_out}")


def read_text(path: str | os.PathLike) -> str:
    """The text of a file in UTF-8 or UTF-16, with or without a byte-order mark.

    Raises UserError for other encodings, naming the first line that is not readable, and for a git-lfs pointer.
    """
    data = Path(path).read_bytes()
    refuse_lfs_pointer(path, data[:200])
    encoding = _encoding(data)
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {line} is not {encoding.removesuffix('-sig').upper()} text ({error.reason} at byte "
            f"{error.start}). Save the file as UTF-8."
        ) from error


def _encoding(data: bytes) -> str:
    for mark, name in (
        (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
    ):  # fmt: skip
        if data.startswith(mark):
            return name
    # Without a mark: JSON and CSV begin with an ASCII character, whose other byte is zero in UTF-16.
    return "utf-16-be" if data[:1] == b"\0" else "utf-16-le" if data[1:2] == b"\0" else "utf-8"


def refuse_lfs_pointer(path: str | os.PathLike, head: bytes | None = None) -> None:
    """Raises UserError where a file is the text that git leaves in place of one kept with git-lfs.

    path: the file, or a folder, whose files are all looked at. head: the file's first 200 bytes or more, where they
    have been read already.
    """
    if Path(path).is_dir():
        for file in filter(Path.is_file, sorted(Path(path).iterdir())):
            refuse_lfs_pointer(file)
        return
    if head is None:
        with open(path, "rb") as stream:
            head = stream.read(200)
    if head.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{path} is a git-lfs pointer, not the file itself. Fetch it with `git lfs install && git lfs pull` in its "
            "repository, or download the file from the Hub."
        )


def jload(f: Any, mode: str = "r") -> Any:
    """Reads one JSON document from a path or an open file; a broken one is a UserError that names file, line and row.

    Raises UserError, and OSError where a path cannot be opened. `mode` is kept from the original.
    """
    is_path = not isinstance(f, io.IOBase)
    text, name = (read_text(f), f) if is_path else (f.read(), getattr(f, "name", f))
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is not valid JSON: {_json_problem(error)}") from error


def _json_problem(error: Exception) -> str:
    """What is wrong with a JSON text, and in which row of a list."""
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    text, problem = error.doc, str(error)
    rest = text[error.pos :].lstrip()
    if rest[:1] in ("]", "}") and text[: error.pos].rstrip().endswith(","):
        problem = f"a trailing comma before {rest[0]!r} in line {error.lineno}"
    elif not rest:
        problem = f"the text ends in the middle, in line {error.lineno}"
    if not text.lstrip().startswith("["):
        return problem
    row, position, decoder = 0, text.index("[") + 1, json.JSONDecoder()
    with contextlib.suppress(ValueError):
        while True:
            row += 1
            position = decoder.raw_decode(text, re.compile(r"[\s,]*").match(text, position).end())[1]
    return f"{problem} (row {row})"


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


def json_list(rows: Iterable[Any]) -> Iterator[str]:
    """The text of json.dumps(list(rows), indent=4, ensure_ascii=False), row by row."""
    begin = "[\n    "
    for row in rows:
        yield begin + json.dumps(row, indent=4, ensure_ascii=False, default=str).replace("\n", "\n    ")
        begin = ",\n    "
    yield "[]" if begin.startswith("[") else "\n]"


def read_jsonl(path: str | os.PathLike) -> list[Any]:
    """All objects of a JSONL file; blank lines are skipped, a broken line is a UserError with its number."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):  # not splitlines: U+2028 may stand in a text
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise UserError(f"{path}, line {number} is not valid JSON: {_json_problem(error)}") from error
    return rows


def write_jsonl(path: str | os.PathLike, rows: Iterable[Any]) -> None:
    """Writes one JSON object a line, atomically."""
    with atomic_write(path) as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
