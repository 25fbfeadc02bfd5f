"""Answers on disk as they come: a killed run goes on where it stopped, and answers no task twice.

Beside OUTPUT stands OUTPUT.partial.jsonl until the last answer is there: its first line holds the run's settings, each
further line one answer. Then OUTPUT appears whole, in the order of the tasks, and the journal is removed.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alpaca.common.errors import UserError
from alpaca.common.files import jdump, refuse_existing, write_jsonl
from alpaca.common.journal import Journal, changed_settings


class AnswerJournal(Journal):
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
        super().__init__(self.output_path.with_name(self.output_path.name + ".partial.jsonl"), afresh=overwrite)
        try:
            self.answers = self._read(json.loads(json.dumps(settings, default=str)))
        except BaseException:
            self.close()
            raise

    def _read(self, settings: dict[str, Any]) -> dict[int, dict[str, Any]]:
        try:
            earlier = self.records[0]["settings"] if self.records else settings
            answers = {line["row"]: line["answer"] for line in self.records[1:]}
        except (KeyError, TypeError) as error:
            raise UserError(f"{self.path} is damaged ({error}). Move it away, or add --overwrite True.") from error
        if changed := changed_settings(earlier, settings):
            shown = "; ".join(f"{name}: {change}" for name, change in sorted(changed.items()))
            raise UserError(
                f"{self.path} holds {len(answers)} answers of a run with other settings ({shown}). Use those settings, "
                "choose another --output_path, or add --overwrite True to begin again."
            )
        if not self.records:
            self.append_now([{"settings": settings}])
        return answers

    def add(self, answers: Mapping[int, dict[str, Any]]) -> None:
        """Appends answers by row number and returns when they are on the disk."""
        self.append_now({"row": row, "answer": answer} for row, answer in answers.items())
        self.answers.update(answers)

    def finish(self, rows: Sequence[dict[str, Any]]) -> None:
        """Writes the final file and removes the journal."""
        if self.output_path.suffix == ".jsonl":
            write_jsonl(self.output_path, rows)
        else:
            jdump(list(rows), self.output_path)
        self.path.unlink()


def answered_row(task: Mapping[str, Any], answer: Mapping[str, Any], generator: str) -> dict[str, Any]:
    """A task's line of the answer file: `output` is the model's answer, the task's own output becomes `reference`."""
    row = {key: value for key, value in task.items() if key != "output"}
    if "output" in task:
        row["reference"] = task["output"]
    return {**row, "output": answer["text"], "generator": generator, **{k: v for k, v in answer.items() if k != "text"}}
