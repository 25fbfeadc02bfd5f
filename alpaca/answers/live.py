"""Questions on their way through one or two models: a waiting line, growing answers, stopping, the record.

run = Run(models, "Name three colours.", "", Sampling(temperature=0.7, seed=None), WaitingLine(16, 0.02))
for _ in run.updates():
    print(run.columns[0].shown, run.status(run.columns[0]))
"""

import dataclasses
import json
import math
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

from alpaca.answers.answering import Answer, stream_answer
from alpaca.answers.moderation import Filter, refusal
from alpaca.answers.sampling import Sampling
from alpaca.common.errors import UserError
from alpaca.common.run_record import now

# Seconds between two updates of a growing answer, of one behind a filter, which is asked at each, and of a place in the
# waiting line.
UPDATE_SECONDS, FILTER_SECONDS, WAITING_SECONDS = 0.05, 0.5, 0.5
# The most seconds that a stopped answer may take for its last token; after which a visitor who waits counts as gone.
LAST_TOKEN_SECONDS, GONE_SECONDS = 30, 10


@dataclasses.dataclass
class Served:
    """A loaded model with what the page says about it."""

    name: str
    size: str
    details: str
    model: Any
    tokenizer: Any


class WaitingLine:
    """One question is answered at a time, in the order of arrival; at most `most_waiting` others wait.

    `seconds_per_token`: what an answer's token takes; each answer measures it anew.
    """

    def __init__(self, most_waiting: int, seconds_per_token: float):
        self.most_waiting, self.seconds_per_token = most_waiting, seconds_per_token
        self._runs: list[Run] = []  # the first is being answered
        self._lock = threading.Lock()

    def join(self, run: "Run") -> bool:
        """Puts `run` at the end of the line; False where the line is full."""
        with self._lock:
            if sum(other.in_line for other in self._runs) > self.most_waiting:
                return False
            self._runs.append(run)
            return True

    def ahead_of(self, run: "Run") -> list["Run"]:
        with self._lock:
            run.seen = time.monotonic()
            return [other for other in self._runs[: self._runs.index(run)] if other.in_line]

    def leave(self, run: "Run") -> None:
        with self._lock:
            self._runs.remove(run)
            timed = [column for column in run.columns if column.answer and column.answer.tokens >= 8]
            if timed:
                self.seconds_per_token = max(column.seconds / column.answer.tokens for column in timed)

    def notice(self, ahead: list["Run"]) -> str:
        """What somebody behind the runs `ahead` is told; the time is that of answers as long as their limits allow."""
        seconds = sum(run.sampling.max_new_tokens for run in ahead) * self.seconds_per_token
        seconds = max(1.0, seconds - (time.monotonic() - ahead[0].begun if ahead[0].begun else 0))
        wait = f"{math.ceil(seconds)} s" if seconds < 100 else f"{math.ceil(seconds / 60)} minutes"
        before = "1 question is" if len(ahead) == 1 else f"{len(ahead)} questions are"
        return f"Waiting: {before} before yours, at most about {wait}."


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

    def __init__(
        self, models: list[Served], instruction: str, input: str, sampling: Sampling, line: WaitingLine,
        check: Filter | None = None,
    ):  # fmt: skip
        self.instruction, self.input, self.sampling, self.line, self.check = instruction, input, sampling, line, check
        self.columns = [Column(served) for served in models]
        self.workers: list[threading.Thread] = []
        self.begun: float | None = None  # when its turn came
        self.seen = time.monotonic()  # when it last asked for its place
        self.waiting: str | None = None  # what is said until then
        self.stopped = False
        self.closed = threading.Event()

    def updates(self) -> Iterator[None]:
        """Waits for its turn and answers; yields whenever there is more to show. Its user calls `close` afterwards."""
        trouble = refusal(self.check, self.instruction, self.input, None)
        if trouble is None and not self.line.join(self):
            trouble = f"Busy: {self.line.most_waiting} questions are waiting already. Please try again in a minute."
        if trouble:
            for column in self.columns:
                column.trouble = trouble
            return
        try:
            while not self.stopped and (ahead := self.line.ahead_of(self)):
                self.waiting = self.line.notice(ahead)
                yield
                time.sleep(WAITING_SECONDS)
            self.waiting = None
            if not self.stopped:
                yield from self._answer()
        finally:
            self.line.leave(self)

    @property
    def in_line(self) -> bool:
        """Whether those behind have to wait for it; a visitor who is gone may never end the iteration of `updates`."""
        if self.begun:
            return any(worker.is_alive() for worker in self.workers)
        return not self.stopped and time.monotonic() - self.seen < GONE_SECONDS

    def _answer(self) -> Iterator[None]:
        self.workers = [threading.Thread(target=self._write, args=(column,), daemon=True) for column in self.columns]
        for worker in self.workers:
            worker.start()
        self.begun = time.monotonic()
        yield
        writing = True
        while writing:
            writing = any(worker.is_alive() for worker in self.workers)  # asked first: the last update has all
            if any([self._show(column) for column in self.columns]):
                yield
            time.sleep(FILTER_SECONDS if self.check and writing else UPDATE_SECONDS)

    def close(self) -> None:
        """Says that nobody takes further updates, whatever the reason."""
        self._end_writing()
        self.closed.set()

    def _write(self, column: Column) -> None:
        served, begin = column.served, time.monotonic()
        task = {"instruction": self.instruction, "input": self.input}
        pieces = stream_answer(served.model, served.tokenizer, task, self.sampling, column.stop)
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

    def _show(self, column: Column) -> bool:
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

    def finish(self) -> None:
        """Waits until a stopped or closed run writes no more, and shows what was written last."""
        self.closed.wait(LAST_TOKEN_SECONDS)
        for worker in self.workers:
            worker.join(LAST_TOKEN_SECONDS)
        for column in self.columns:
            self._show(column)

    def _end_writing(self) -> None:
        for column in self.columns:
            column.stop.set()

    def status(self, column: Column) -> str:
        """The line under an answer."""
        if column.trouble:
            return column.trouble
        if column.answer is None and not self.stopped:
            searching = "Searching; the answer comes in one piece …"
            return self.waiting or (searching if self.sampling.num_beams > 1 else "Writing …")
        if column.answer is None:
            return "Stopped."
        tokens = column.answer.tokens
        rate = f"{tokens:,} tokens in {column.seconds:.1f} s, {tokens / max(column.seconds, 0.001):,.0f} a second."
        if column.answer.finish_reason == "stop":
            return f"{'Complete.' if column.shown else 'The model ended at once, without a word.'} {rate}"
        return f"{'Stopped.' if self.stopped else 'Cut off: no room for more tokens.'} {rate}"


def log_run(path: str, run: Run) -> None:
    """Appends a question and its answers to a JSONL file, once the models write no more."""
    run.finish()
    answers = [
        {"model": column.served.name, "written": column.written, "shown": column.shown, "status": run.status(column)}
        for column in run.columns
    ]
    row = {
        "time": now(), "instruction": run.instruction, "input": run.input,
        "settings": dataclasses.asdict(run.sampling),
        "answers": answers,
    }  # fmt: skip
    with open(path, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(row, ensure_ascii=False) + "\n")
