"""The files that follow from a journal, written only over files that the same journal made."""

import contextlib
import hashlib
import threading
import time
from pathlib import Path
from typing import Any

from alpaca.common.errors import UserError
from alpaca.common.files import atomic_write
from alpaca.common.journal import Journal
from alpaca.common.run_record import sha256_file
from alpaca.generation.harvest import Harvest

OUTPUTS = ("regen.json", "alpaca_data.json", "rejections.jsonl")
WRITE_EVERY = 60.0  # seconds between two writings of the files, at least; more where writing them takes long


class OutputFiles:
    """regen.json, alpaca_data.json and rejections.jsonl in a journal's folder.

    `left_alone` holds an alpaca_data.json that this journal did not make and that is not overwritten. Raises UserError
    where another file is somebody else's: an edited regen.json would be lost.
    """

    def __init__(self, journal: Journal, overwrite: bool):
        self.journal, self.folder = journal, journal.path.parent
        self.left_alone: list[Path] = []
        self._last, self._took = time.monotonic(), 0.0
        self._lock = threading.Lock()
        for name in OUTPUTS:
            for torn in self.folder.glob(f".{name}.*.partial"):  # of a run that was killed while it wrote
                torn.unlink()
            path = self.folder / name
            own = [mark["sha256"].get(name) for mark in self._marks()]
            if path.exists() and not overwrite and sha256_file(path) not in own:
                if name != "alpaca_data.json":
                    raise UserError(
                        f"{path} was not written by this run. Move it away, or add --overwrite True to replace it."
                    )
                print(f"note: {path} was not written by this run and is left alone; regen.json gets the same tasks.")
                self.left_alone.append(path)

    def _marks(self) -> list[dict[str, Any]]:
        return [record for record in self.journal.records if "sha256" in record]

    def due(self) -> bool:
        return time.monotonic() - self._last > max(WRITE_EVERY, 20 * self._took)

    def write(self, harvest: Harvest) -> None:
        """Replaces the files, each whole. Their checksums are journaled first, so that a later run knows its own."""
        with self._lock, contextlib.ExitStack() as stack:
            begin, sums = time.monotonic(), {}
            for name, pieces in harvest.files().items():
                if self.folder / name not in self.left_alone:
                    stream, digest = stack.enter_context(atomic_write(self.folder / name)), hashlib.sha256()
                    for piece in pieces:
                        digest.update(piece.encode("utf-8"))
                        stream.write(piece)
                    sums[name] = digest.hexdigest()
            marks = self._marks()
            if not marks or marks[-1]["sha256"] != sums:
                self.journal.append_now([{"kind": "written", "sha256": sums}])
            self._last = time.monotonic()
            self._took = self._last - begin

    def print_left_alone(self) -> None:
        for path in self.left_alone:
            print(f"note: {path} was left alone; --overwrite True replaces it. train.py takes regen.json too.")
