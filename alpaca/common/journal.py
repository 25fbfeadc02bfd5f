"""Every reply of a run in a JSONL file, on disk before anything is made of it; one writer, torn lines mended.

generate_instruction.py writes responses.jsonl with it, and makes all its other files from that again; inference.py and
evaluation.py keep answers and verdicts the same way:

    python generate_instruction.py rebuild --output_dir DIR                     # full scale: any journal
    python -c "import reply_journal as j; print(len(j.read_records('DIR/responses.jsonl')))"       # one minute
"""

import asyncio
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


class Journal:
    """An open journal. `records` holds what is on disk; append adds to both, and returns when the disk has it.

    `afresh`: forgets what stands there, however damaged. Raises UserError where another process has the journal open,
    and where a line before the last is broken.
    """

    def __init__(self, path: str | os.PathLike, afresh: bool = False):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            # The kernel gives the lock back however the process ends, so no stale lock file can remain.
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._file)
            raise UserError(
                f"another run is writing {self.path}. Wait for it, or choose another place for the output."
            ) from error
        if afresh:
            os.ftruncate(self._file, 0)
        fsync_dir(self.path.parent)
        content = self.path.read_bytes()
        try:
            self.records, whole = _parse(content, self.path)
        except UserError:
            os.close(self._file)
            raise
        if whole < len(content):
            print(f"note: the last line of {self.path} was torn by a crash and is taken out.")
            os.ftruncate(self._file, whole)
            os.fsync(self._file)
        self._lock = threading.Lock()
        self._waiting: list[asyncio.Future] = []
        self._syncer: asyncio.Task | None = None

    def append_now(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Writes records with one write and one sync."""
        self._write(records)
        os.fsync(self._file)

    def _write(self, records: Iterable[Mapping[str, Any]]) -> None:
        records = [dict(record) for record in records]
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        # A lone surrogate in a reply is no reason to lose it.
        data = memoryview(lines.encode("utf-8", errors="backslashreplace"))
        with self._lock:
            while data:
                data = data[os.write(self._file, data) :]
            self.records.extend(records)

    async def append(self, record: Mapping[str, Any]) -> None:
        """Writes at once, which outlives a kill of the process; returns when the disk has it, as after a power cut.

        Replies that arrive during a sync, which may take seconds on a busy disk, share the next one.
        """
        done = asyncio.get_running_loop().create_future()
        try:
            self._write([record])
            self._waiting.append(done)
            if self._syncer is None or self._syncer.done():
                self._syncer = asyncio.create_task(self._sync_waiting())
            await done
        except OSError as error:  # a full disk
            raise UserError(f"{self.path} cannot be written: {error}") from error

    async def _sync_waiting(self) -> None:
        while self._waiting:
            together, self._waiting = self._waiting, []
            error = None
            try:
                await asyncio.to_thread(os.fsync, self._file)
            except OSError as caught:
                error = caught
            for done in together:
                if done.cancelled():
                    continue
                done.set_exception(error) if error else done.set_result(None)

    def close(self) -> None:
        os.close(self._file)
