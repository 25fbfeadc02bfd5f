"""Which rows of a data set stand in an evaluation set: the same instruction, or many words in a row.

python generate_instruction.py check alpaca_data.json --against configs/eval_tasks.jsonl
"""

import bisect
from collections import defaultdict
from typing import Any

from alpaca.common.tasks import load_tasks
from alpaca.generation.rouge import rouge_tokens, unicode_tokens

GRAM = 13  # words in a row that a text may not share with an evaluation set (GPT-3: Brown et al. 2020, appendix C)
PART = (GRAM + 1) // 2  # any GRAM words hold PART words that begin at a multiple of PART


class EvaluationSets:
    """The tasks of evaluation sets, and where each run of PART words stands in their inputs and outputs.

    paths: files that `load_tasks` reads, comma-separated. Raises UserError where one cannot be read.
    """

    def __init__(self, paths: str, unicode_dedup: bool = False):
        self._tokens = unicode_tokens if unicode_dedup else rouge_tokens
        self._tasks = [
            (path, row, task)
            for path in map(str.strip, paths.split(","))
            for row, task in enumerate(load_tasks(path, require_output=False), start=1)
        ]
        self._words = [""]  # of all texts, one after the other, with "" between them
        self._starts: list[int] = []
        self._texts: list[tuple[int, str]] = []  # number of the task and the field's name
        self._places: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for number, (_, _, task) in enumerate(self._tasks):
            for field in ("input", "output"):
                start, words = len(self._words), self._tokens(task.get(field, ""))
                for i in range(len(words) - PART + 1):
                    self._places[tuple(words[i : i + PART])].append(start + i)
                self._starts.append(start)
                self._texts.append((number, field))
                self._words += [*words, ""]

    @property
    def instructions(self) -> list[str]:
        return [task["instruction"] for _, _, task in self._tasks]

    def source(self, number: int, field: str = "instruction") -> dict[str, Any]:
        """Where a task stands and its text, for a report."""
        path, row, task = self._tasks[number]
        return {"against": path, "against_row": row, "against_text": task[field]}

    def shared_words(self, text: str) -> dict[str, Any] | None:
        """The first GRAM or more words in a row that `text` shares with an input or output, and whose; None if none."""
        words = self._tokens(text)
        for first in range(0, len(words) - PART + 1, PART):
            for place in self._places.get(tuple(words[first : first + PART]), ()):
                start, stop, shift = first, first + PART, place - first
                while start and words[start - 1] == self._words[start - 1 + shift]:
                    start -= 1
                while stop < len(words) and words[stop] == self._words[stop + shift]:
                    stop += 1
                if stop - start >= GRAM:
                    number, field = self._texts[bisect.bisect_right(self._starts, place) - 1]
                    return {"words": " ".join(words[start:stop]), **self.source(number, field)}
        return None
