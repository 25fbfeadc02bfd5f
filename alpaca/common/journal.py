"""A JSONL file of paid or computed results: each record is on disk before anything is made of it.

generate_instruction.py keeps replies and ratings in a Journal, evaluation.py a judge's replies, and answer_journal.py
the answers of inference.py and evaluation.py.
"""

import asyncio
import contextlib
import errno
import fcntl
import json
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from alpaca.common.errors import UserError
from alpaca.common.files import fsync_dir


def read_records(path: str | os.PathLike) -> list[dict[str, Any]]:
    """All records of a journal; a last line that a crash tore is left out. UserError names a broken line before it."""
    return _parse(Path(path).read_bytes(), path)[0]


def _parse(content: bytes, path: str | os.PathLike) -> tuple[list[dict[str, Any]], int]:
    """The records, and how many bytes of `content` they fill."""
    records, whole = [], 0
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if whole + len(line) < len(content):
                raise UserError(f"{path}, line {number} is broken, and not by a crash: {error}") from error
            break
        if not line.endswith(b"\n"):
            break
        records.append(record)
        whole += len(line)
    return records, whole


class Journal(contextlib.AbstractContextManager):
    """An open journal. `records` holds what is on disk; appending adds to both.

    `afresh`: empties the file first, however damaged. Raises UserError where another process has the journal open,
    where a line before the last is broken, and where the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike, afresh: bool = False):
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}. Choose another place.") from error
        try:
            self._lock_file()
            if afresh:
                os.ftruncate(self._file, 0)
            fsync_dir(self.path.parent)
            content = self.path.read_bytes()
            self.records, whole = _parse(content, self.path)
            if whole < len(content):
                print(f"note: the last line of {self.path} was torn by a crash and is taken out.")
                os.ftruncate(self._file, whole)
                os.fsync(self._file)
        except BaseException:
            os.close(self._file)
            raise
        self._lock = threading.Lock()
        self._waiting: list[asyncio.Future] = []
        self._syncer: asyncio.Task | None = None

    def _lock_file(self) -> None:
        """The kernel releases the lock however the process ends, so no stale lock file can remain."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another run is writing {self.path}. Wait for it, or choose another place for the output."
            ) from error
        except OSError as error:  # some network file systems have no locks
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            print(f"note: the file system of {self.path} has no locks. Start no second run with the same folder.")

    def append_now(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Writes records with one write and one sync; returns when the disk has them."""
        self._write(records)
        self._sync()

    async def append(self, record: Mapping[str, Any]) -> None:
        """Writes a record at once, so that it outlives a kill of the process; returns when the disk has it.

        Records that arrive during a sync, which may take seconds on a busy disk, share the next one.
        """
        self._write([record])
        done = asyncio.get_running_loop().create_future()
        self._waiting.append(done)
        if self._syncer is None or self._syncer.done():
            self._syncer = asyncio.create_task(self._sync_waiting())
        await done

    def close(self) -> None:
        os.close(self._file)

    def __exit__(self, *_):
        self.close()

    def _write(self, records: Iterable[Mapping[str, Any]]) -> None:
        records = [dict(record) for record in records]
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        # A lone surrogate in a reply is no reason to lose it.
        data = memoryview(lines.encode("utf-8", errors="backslashreplace"))
        with self._lock:
            before = os.fstat(self._file).st_size
            try:
                while data:
                    data = data[os.write(self._file, data) :]
            except OSError as error:
                os.ftruncate(self._file, before)  # else the next record would be glued to a half one
                raise UserError(f"{self.path} cannot be written: {error.strerror}") from error
            self.records.extend(records)

    def _sync(self) -> None:
        try:
            os.fsync(self._file)
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}") from error

    async def _sync_waiting(self) -> None:
        while self._waiting:
            together, self._waiting = self._waiting, []
            error = None
            try:
                await asyncio.to_thread(self._sync)
            except UserError as caught:
                error = caught
            for done in together:
                if not done.cancelled():
                    done.set_exception(error) if error else done.set_result(None)


def changed_settings(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """The settings that differ, each with both values in words: {"seed": "1, now 2"}.

    One that is missing on one side has its default there.
    """
    return {
        name: f"{_short(earlier.get(name, 'default'))}, now {_short(now.get(name, 'default'))}"
        for name in {**earlier, **now}
        if earlier.get(name) != now.get(name)
    }


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]!r}..."
