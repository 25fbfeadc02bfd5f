"""Answers on disk as they come, so that a killed run goes on where it stopped: no task twice, none missing.

Not a command; inference.py and evaluation.py import it. Beside OUTPUT stands OUTPUT.partial.jsonl until the last
answer is there: its first line holds the run's settings, each further line one answer, synced to the disk before the
next batch begins. Then OUTPUT appears whole, in the order of the tasks, and the journal goes.
"""

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alpaca.common.errors import UserError
from alpaca.common.files import jdump, refuse_existing, write_jsonl
from alpaca.common.journal import Journal


class AnswerJournal(contextlib.AbstractContextManager):
    """The answers of one run by row number, on disk: `answers` holds those of an earlier, interrupted run as well."""

    def __init__(self, output_path: str | os.PathLike, settings: Mapping[str, Any], overwrite: bool = False):
        """Opens or goes on with the journal of `output_path` (.json or .jsonl).

        `settings` decide the answers: going on with others is refused. Raises UserError then, where the output
        exists (unless `overwrite`), where another run holds the journal, and where the ending is neither of the two.
        """
        self.output_path = Path(output_path)
        if self.output_path.suffix not in (".json", ".jsonl"):
            raise UserError(f"--output_path {output_path} must end in .json or .jsonl.")
        refuse_existing(self.output_path, overwrite)
        self.path = self.output_path.with_name(self.output_path.name + ".partial.jsonl")
        self.journal = Journal(self.path, afresh=overwrite)
        try:
            self.answers = self._read(json.loads(json.dumps(settings, default=str)))
        except BaseException:
            self.journal.close()
            raise

    def _read(self, settings: dict[str, Any]) -> dict[int, dict[str, Any]]:
        lines = self.journal.records
        try:
            earlier = lines[0]["settings"] if lines else settings
            answers = {line["row"]: line["answer"] for line in lines[1:]}
        except (KeyError, TypeError) as error:
            raise UserError(f"{self.path} is damaged ({error}). Move it away, or add --overwrite True.") from error
        changed = sorted(key for key in {*earlier, *settings} if earlier.get(key) != settings.get(key))
        if changed:
            shown = "; ".join(
                f"{key}: {_short(earlier.get(key))} then, {_short(settings.get(key))} now" for key in changed
            )
            raise UserError(
                f"{self.path} holds {len(answers)} answers of a run with other settings ({shown}). Use those settings, "
                "choose another --output_path, or add --overwrite True to begin again."
            )
        if not lines:
            self.journal.append_now([{"settings": settings}])
        return answers

    def add(self, answers: Mapping[int, dict[str, Any]]) -> None:
        """Appends answers by row number and returns when they are on the disk."""
        self.journal.append_now({"row": row, "answer": answer} for row, answer in answers.items())
        self.answers.update(answers)

    def finish(self, rows: Sequence[dict[str, Any]]) -> None:
        """Writes the final file and removes the journal."""
        (write_jsonl if self.output_path.suffix == ".jsonl" else _write_json)(self.output_path, rows)
        self.path.unlink()

    def __exit__(self, *_):
        self.journal.close()


def _write_json(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    jdump(list(rows), path)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def answered_row(task: Mapping[str, Any], answer: Mapping[str, Any], generator: str) -> dict[str, Any]:
    """A task's line of the answer file: `output` is the model's answer, the task's own output becomes `reference`."""
    row = {key: value for key, value in task.items() if key != "output"}
    if "output" in task:
        row["reference"] = task["output"]
    return {**row, "output": answer["text"], "generator": generator, **{k: v for k, v in answer.items() if k != "text"}}
