"""Questions on their way through one or two models: growing answers, stopping, the moderation hook, the record.

Not a command; demo.py serves it.

    run = Run(models, "Name three colours.", "", Sampling(temperature=0.7, seed=None), check=None)
    for _ in run.updates():
        print(run.columns[0].shown, run.status(run.columns[0]))
"""

import dataclasses
import importlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from alpaca.answers.answering import Answer, Sampling, stream_answer
from alpaca.common.errors import UserError

Filter = Callable[[str, str, str | None], str | None]

# Seconds between two looks at a growing answer. A filter is asked at each look, so it gets a longer breath.
UPDATE_SECONDS, FILTER_SECONDS = 0.05, 0.5
# The most seconds that a stopped answer may take for its last token.
SETTLE_SECONDS = 30
REFUSED = "This request was refused by the demo's filter."
FILTER_FAILED = "The demo's filter failed, so nothing is shown. Please tell whoever runs this demo."


# ----------------------------------------------------------------------------------------------------------------------
# The moderation hook.


def load_filter(spec: str) -> Filter:
    """The function that "module:function" names; the module may lie in the working folder. Raises UserError."""
    module, colon, name = spec.partition(":")
    if not (module and colon and name):
        raise UserError(
            f"--filter {spec}: expected module:function, such as my_filter:check for check in my_filter.py."
        )
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception as error:
        raise UserError(f"--filter {spec}: importing {module} failed: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise UserError(f"--filter {spec}: {module} has no function {name}.")
    return found


def refusal(check: Filter | None, instruction: str, input: str, answer: str | None) -> str | None:
    """What to show instead, or None where `check` lets the texts pass. Whatever goes wrong in it refuses."""
    if check is None:
        return None
    try:
        verdict = check(instruction, input, answer)
    except Exception as error:
        # The error's own text may quote what somebody typed, so the place is printed without it.
        place = traceback.extract_tb(error.__traceback__)[-1]
        print(f"the filter failed: {type(error).__name__} in {place.filename}, line {place.lineno}", file=sys.stderr)
        return FILTER_FAILED
    if verdict is None:
        return None
    return verdict if isinstance(verdict, str) and verdict.strip() else REFUSED


# ----------------------------------------------------------------------------------------------------------------------
# One question on its way through the models.


@dataclasses.dataclass
class Served:
    """A loaded model with what the page says about it."""

    name: str
    size: str
    details: str
    model: Any
    tokenizer: Any


@dataclasses.dataclass
class Column:
    """One model's answer: `written` grows in a thread, `shown` is as much of it as has passed the filter."""

    served: Served
    stop: threading.Event = dataclasses.field(default_factory=threading.Event)
    written: str = ""
    shown: str = ""
    seconds: float = 0.0
    answer: Answer | None = None
    trouble: str | None = None


class Run:
    """One question being answered by every model at the same time."""

    def __init__(self, models: list[Served], instruction: str, input: str, sampling: Sampling, check: Filter | None):
        self.instruction, self.input, self.sampling, self.check = instruction, input, sampling, check
        self.columns = [Column(served) for served in models]
        self.workers: list[threading.Thread] = []
        self.stopped = False
        self.closed = threading.Event()

    def updates(self) -> Iterator[None]:
        """Answers; yields whenever there is more to show. Whoever iterates calls `close` afterwards."""
        refused = refusal(self.check, self.instruction, self.input, None)
        if refused:
            for column in self.columns:
                column.trouble = refused
            return
        for column in self.columns:
            self.workers.append(threading.Thread(target=self._write, args=(column,), daemon=True))
            self.workers[-1].start()
        writing = True
        while writing:
            writing = any(worker.is_alive() for worker in self.workers)  # asked first: the last look sees all
            if any([self._look(column) for column in self.columns]):
                yield
            time.sleep(FILTER_SECONDS if self.check and writing else UPDATE_SECONDS)

    def close(self) -> None:
        """Says that nobody takes further updates, whatever the reason."""
        self._end_writing()
        self.closed.set()

    def _write(self, column: Column) -> None:
        served, begin = column.served, time.monotonic()
        pieces = stream_answer(
            served.model, served.tokenizer, self.instruction, self.input, stop_event=column.stop,
            **dataclasses.asdict(self.sampling),
        )  # fmt: skip
        try:
            while True:
                column.written += next(pieces)
        except StopIteration as end:
            column.answer = end.value
        except UserError as error:
            column.trouble = f"Not answered: {error}"
        except Exception as error:
            traceback.print_exc()
            column.trouble = f"The model failed ({type(error).__name__}); the terminal shows more."
        column.seconds = time.monotonic() - begin

    def _look(self, column: Column) -> bool:
        """Brings what is shown up to what is written, as far as the filter lets it; true where that changed it."""
        written = column.written
        if written == column.shown or column.trouble:
            return False
        refused = refusal(self.check, self.instruction, self.input, written)
        if refused:
            column.trouble, column.shown = refused, ""
            column.stop.set()
        else:
            column.shown = written
        return True

    def stop(self) -> None:
        """Ends every answer after the token that it is at."""
        self.stopped = True
        self._end_writing()

    def settle(self) -> None:
        """Waits until a stopped or closed run is still, and shows what was written last."""
        self.closed.wait(SETTLE_SECONDS)
        for worker in self.workers:
            worker.join(SETTLE_SECONDS)
        for column in self.columns:
            self._look(column)

    def _end_writing(self) -> None:
        for column in self.columns:
            column.stop.set()

    def status(self, column: Column) -> str:
        """The line under an answer."""
        if column.trouble:
            return column.trouble
        if column.answer is None and not self.stopped:
            return "Searching; the answer comes in one piece …" if self.sampling.num_beams > 1 else "Writing …"
        if column.answer is None:
            return "Stopped."
        tokens = column.answer.tokens
        rate = f"{tokens:,} tokens in {column.seconds:.1f} s, {tokens / max(column.seconds, 0.001):,.0f} a second."
        if column.answer.finish_reason == "stop":
            return f"{'Complete.' if column.shown else 'The model ended at once, without a word.'} {rate}"
        return f"{'Stopped.' if self.stopped else 'Cut off: no room for more tokens.'} {rate}"


def log_run(path: str, run: Run) -> None:
    """Appends a question and its answers to a JSONL file, once the models are still."""
    run.settle()
    answers = [
        {"model": column.served.name, "written": column.written, "shown": column.shown, "status": run.status(column)}
        for column in run.columns
    ]
    row = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "instruction": run.instruction, "input": run.input,
        "settings": dataclasses.asdict(run.sampling),
        "answers": answers,
    }  # fmt: skip
    with open(path, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(row, ensure_ascii=False) + "\n")
