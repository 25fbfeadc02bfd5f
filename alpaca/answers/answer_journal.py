"""Answers on disk as they come: a killed run goes on where it stopped, and answers no task twice.

Beside OUTPUT stands OUTPUT.partial.jsonl until the last answer is there: its first line holds the run's settings, each
further line one answer. Where torchrun started several processes, process R > 0 writes OUTPUT.partial.R.jsonl, which
the first process takes over when all are done, or when the next run begins. Then OUTPUT appears whole, in the order of
the tasks, and the journals are removed.
"""

import glob
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alpaca.common.errors import UserError
from alpaca.common.files import jdump, refuse_existing, write_jsonl
from alpaca.common.journal import Journal, changed_settings, read_records


def tasks_digest(tasks: Sequence[Mapping[str, Any]]) -> str:
    """The sha256 that stands for `tasks` in a run's settings."""
    return hashlib.sha256(json.dumps(tasks, sort_keys=True).encode()).hexdigest()


def journal_path(output_path: str | os.PathLike, rank: int = 0) -> Path:
    output = Path(output_path)
    return output.with_name(f"{output.name}.partial{f'.{rank}' if rank else ''}.jsonl")


class AnswerJournal(Journal):
    """The answers of one run by row number, on disk: `answers` holds those of an earlier, interrupted run as well.

    Raises UserError where `output_path` (.json or .jsonl) exists, where another run holds the journal, where it is
    damaged, and where an earlier run had other `settings`: they decide the answers. `overwrite` replaces a finished
    file, and a journal that is damaged or has other settings; a killed run goes on with it too.
    """

    def __init__(self, output_path: str | os.PathLike, settings: Mapping[str, Any], overwrite: bool = False):
        self.output_path = Path(output_path)
        if self.output_path.suffix not in (".json", ".jsonl"):
            raise UserError(f"--output_path {output_path} must end in .json or .jsonl.")
        refuse_existing(self.output_path, overwrite)
        self.settings = json.loads(json.dumps(settings, default=str))
        super().__init__(journal_path(output_path), afresh=overwrite and not self._goes_on(journal_path(output_path)))
        try:
            for part in self._parts() if overwrite else ():
                if not self._goes_on(part):
                    part.unlink()
            self.answers = self._read(self.path, self.records)
            if not self.records:
                self.append_now([{"settings": self.settings}])
            self.take_over_parts()
        except BaseException:
            self.close()
            raise

    def _parts(self) -> list[Path]:
        return sorted(self.output_path.parent.glob(f"{glob.escape(self.output_path.name)}.partial.*.jsonl"))

    def _goes_on(self, path: Path) -> bool:
        """Whether `path` is the undamaged journal of an unfinished run with these settings."""
        try:
            self._read(path, read_records(path))
        except (UserError, OSError):
            return False
        return True

    def _read(self, path: Path, records: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
        try:
            earlier = records[0]["settings"] if records else self.settings
            answers = {line["row"]: line["answer"] for line in records[1:]}
        except (KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}). Move it away, or add --overwrite True.") from error
        if changed := changed_settings(earlier, self.settings):
            shown = "; ".join(f"{name}: {change}" for name, change in sorted(changed.items()))
            raise UserError(
                f"{path} holds {len(answers)} answers of a run with other settings ({shown}). Use those settings, "
                "choose another --output_path, or add --overwrite True to begin again."
            )
        return answers

    def add(self, answers: Mapping[int, Mapping[str, Any]]) -> None:
        """Appends answers by row number and returns when they are on the disk."""
        self.append_now({"row": row, "answer": answer} for row, answer in answers.items())
        self.answers.update(answers)

    def take_over_parts(self) -> None:
        """Adds the answers of the other processes' journals, and removes these."""
        for part in self._parts():
            self.add(self._read(part, read_records(part)))
            part.unlink()

    def finish(self, tasks: Sequence[Mapping[str, Any]], generator: str) -> None:
        """Writes the final file, a row for each of `tasks`, and removes the journal."""
        rows = [answered_row(task, self.answers[row], generator) for row, task in enumerate(tasks)]
        if self.output_path.suffix == ".jsonl":
            write_jsonl(self.output_path, rows)
        else:
            jdump(rows, self.output_path)
        self.path.unlink()


class PartJournal(Journal):
    """The answers of process `rank` > 0, for AnswerJournal to take over."""

    def __init__(self, output_path: str | os.PathLike, settings: Mapping[str, Any], rank: int):
        super().__init__(journal_path(output_path, rank), afresh=True)
        self.append_now([{"settings": json.loads(json.dumps(settings, default=str))}])

    def add(self, answers: Mapping[int, Mapping[str, Any]]) -> None:
        self.append_now({"row": row, "answer": answer} for row, answer in answers.items())


def answered_row(task: Mapping[str, Any], answer: Mapping[str, Any], generator: str) -> dict[str, Any]:
    """A task's line of the answer file: `output` is the model's answer, the task's own output becomes `reference`."""
    row = {key: value for key, value in task.items() if key != "output"}
    if "output" in task:
        row["reference"] = task["output"]
    return {**row, "output": answer["text"], "generator": generator, **{k: v for k, v in answer.items() if k != "text"}}
