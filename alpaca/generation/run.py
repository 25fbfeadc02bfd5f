"""The asking part of generate_instruction.py: which request is next, how many at a time, when it is enough.

python generate_instruction.py --num_instructions_to_generate 52000 --output_dir DIR               # full scale
python generate_instruction.py --num_instructions_to_generate 20 --base_url http://127.0.0.1:8080/v1   # one minute
"""

import asyncio
import hashlib
import random
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alpaca.common.errors import UserError
from alpaca.common.files import atomic_write
from alpaca.common.journal import Journal
from alpaca.generation.harvest import Harvest, answers_of, harvest_journal, replies_in_order
from alpaca.generation.parsing import encode_prompt, next_list_header
from alpaca.generation.prices import Price, estimate_tokens
from alpaca.generation.teacher import AskError, Reply, Teacher

WRITE_EVERY = 60.0  # seconds between two writings of the final files, at least; more where writing them takes long
FAILURES_IN_A_ROW = 20  # requests that fail one after another before the server counts as down


class Prompter:
    """Draws the examples of request `index` from `seed` and `index` alone, so that a run can be repeated.

    With `sample_from_generated` K, up to K examples come from the tasks that were kept from requests up to
    index - sample_lag: whatever the concurrency, these are settled before the prompt is made.
    """

    def __init__(self, seeds: Sequence[Mapping], settings: Mapping[str, Any], prompt_text: str):
        self.seeds, self.settings, self.prompt_text = seeds, settings, prompt_text
        self.first_number = settings["num_prompt_instructions"] + 1
        self.outputs = not settings["answer_separately"]

    def examples(self, index: int, machine_tasks: Sequence[Mapping]) -> tuple[list[Mapping], list[str]]:
        """The example tasks and their names: a seed's id, or "generated:ROW"."""
        rng = random.Random(f"{self.settings['seed']}:{index}")
        wanted = self.settings["num_prompt_instructions"]
        machine = rng.sample(range(len(machine_tasks)), min(self.settings["sample_from_generated"], len(machine_tasks)))
        chosen = [(machine_tasks[row], f"generated:{row}") for row in machine]
        for number in rng.sample(range(len(self.seeds)), wanted - len(chosen)):
            chosen.append((self.seeds[number], self.seeds[number]["id"]))
        rng.shuffle(chosen)
        return [task for task, _ in chosen], [name for _, name in chosen]

    def prompt(self, index: int, machine_tasks: Sequence[Mapping]) -> tuple[str, list[str]]:
        tasks, names = self.examples(index, machine_tasks)
        text = encode_prompt(tasks, self.prompt_text, self.settings["num_tasks_per_request"], self.outputs)
        return text, names


def answer_prompt(entry: Mapping[str, Any]) -> str:
    """What a chat model is asked when a task gets its answer separately: the instruction, and the input below it."""
    return f"{entry['instruction']}\n\n{entry['input']}" if entry["input"] else entry["instruction"]


class GenerationRun:
    """One run: asks, journals, harvests and writes until the target, the budget or the teacher's ideas are reached.

    limits: `max_concurrency`, `max_cost_usd` (None: none), `max_requests_without_new`,
    `expected_tasks_per_request`. After `await run()`, `why` says why it ended; a UserError of the teacher is raised
    only when everything is written.
    """

    def __init__(
        self,
        teacher: Teacher,
        journal: Journal,
        harvest: Harvest,
        prompter: Prompter,
        price: Price | None,
        limits: Mapping[str, Any],
        writer: "FileWriter",
        progress: "Progress",
    ):
        self.teacher, self.journal, self.harvest, self.prompter = teacher, journal, harvest, prompter
        self.price, self.limits, self.writer, self.progress = price, limits, writer, progress
        self.settings = prompter.settings
        self.why: str | None = None
        self.error: BaseException | None = None
        self.asked = 0  # requests of this run
        self.failed = 0
        self._failures_in_a_row = 0
        self._without_new = 0
        self.spent = journal_cost(journal.records, price)
        self._reserved = 0.0  # the most that the requests under way can cost
        self._under_way: set[asyncio.Task] = set()
        self._changed = asyncio.Event()
        self._harvest_event = asyncio.Event()

        # Replies arrive in any order and are harvested by index.
        self._arrived = {record["index"]: record for record in replies_in_order(journal.records)}
        self._of_earlier_runs = set(self._arrived)
        self._answers = answers_of(journal.records)
        last = max(self._arrived, default=-1)
        self._missing = deque(index for index in range(last + 1) if index not in self._arrived)
        self._next_index = last + 1
        self._to_read = 0  # the next index to parse
        self._open: deque[tuple[int, list[dict]]] = deque()  # parsed replies whose entries are not all settled
        self._to_answer: deque[dict] = deque()
        self._answers_under_way = 0

    # ------------------------------------------------------------------------------------------------------------------
    # The loop.

    async def run(self) -> None:
        harvester = asyncio.create_task(self._harvest_forever())
        harvester.add_done_callback(lambda _: self._changed.set())
        try:
            while self._harvestable() and not harvester.done():  # what an earlier run left comes before new requests
                await self._changed.wait()
                self._changed.clear()
            while True:
                while len(self._under_way) < self.limits["max_concurrency"]:
                    job = self._next_job()
                    if job is None:
                        break
                    self._start(job)
                if not self._under_way and not self._harvestable():
                    break
                await self._changed.wait()
                self._changed.clear()
                if harvester.done():
                    harvester.result()
        except asyncio.CancelledError:  # Ctrl-C: what is under way is given up, what is on disk stays
            for task in self._under_way:
                task.cancel()
            raise
        finally:
            harvester.cancel()
        if self.why is None:
            self.why = "target reached" if self.harvest.full else "nothing left to ask"
        if not self.harvest.full and (self._open or len(self._arrived) > self._to_read):
            # Stopped with requests unanswered: the replies behind them count too.
            self.harvest = await asyncio.to_thread(harvest_journal, list(self.journal.records))
        await asyncio.to_thread(self.writer.write, self.harvest)

    def _next_job(self) -> tuple | None:
        """("answer", entry) or ("reply", index, prompt, example names), or None where nothing should be asked now."""
        if self.why or self.harvest.full:
            return None
        if self._to_answer:
            entry = self._to_answer[0]
            enough = len(self.harvest.tasks) + self._answers_under_way >= self.harvest.target
            if enough or not self._affordable(answer_prompt(entry)):
                return None
            self._to_answer.popleft()
            return "answer", entry
        if not self._missing and self._expected() >= self.harvest.target:
            return None
        index = self._missing[0] if self._missing else self._next_index
        settled = len(self.harvest.kept_after)
        machine = []
        if self.settings["sample_from_generated"]:
            settled_needed = index - self.settings["sample_lag"] + 1
            if settled_needed > settled:
                return None
            kept = self.harvest.kept_after[settled_needed - 1] if settled_needed > 0 else self.harvest.imported
            machine = self.harvest.tasks[:kept]
        prompt, names = self.prompter.prompt(index, machine)
        if not self._affordable(prompt):
            return None
        if self._missing:
            self._missing.popleft()
        else:
            self._next_index += 1
        return "reply", index, prompt, names

    def _expected(self) -> float:
        """Tasks that will be kept when all that is asked has been answered."""
        replies = len(self.harvest.kept_after)
        kept = len(self.harvest.tasks)
        a_reply = (kept - self.harvest.imported + self.limits["expected_tasks_per_request"]) / (replies + 1)
        requests = len(self._under_way) - self._answers_under_way
        unread = len(self._arrived) - self._to_read
        answering = sum("reason" not in entry for _, entries in self._open for entry in entries)
        return kept + answering + (requests + unread) * a_reply

    def _affordable(self, prompt: str) -> bool:
        if self.limits["max_cost_usd"] is None:
            return True
        if self.spent + self._reserved + self._most(prompt) <= self.limits["max_cost_usd"]:
            return True
        if not self._under_way:
            self.why = "budget"
        return False

    def _most(self, prompt: str) -> float:
        """The most that a request can cost, in US dollars."""
        if self.price is None:
            return 0.0
        return self.price.cost({"prompt": estimate_tokens(prompt), "completion": self.teacher.max_tokens})

    def _start(self, job: tuple) -> None:
        prompt = answer_prompt(job[1]) if job[0] == "answer" else job[2]
        self.asked += 1
        self._answers_under_way += job[0] == "answer"
        most = self._most(prompt)
        self._reserved += most
        task = asyncio.create_task(self._ask(job, prompt))
        self._under_way.add(task)

        def done(task: asyncio.Task) -> None:
            self._under_way.discard(task)
            self._reserved -= most
            self._answers_under_way -= job[0] == "answer"
            if not task.cancelled() and task.exception():
                self._stop("error", task.exception())
            self._changed.set()

        task.add_done_callback(done)

    def _stop(self, why: str, error: BaseException | None = None) -> None:
        self.why = self.why or why
        self.error = self.error or error
        self._changed.set()

    async def _ask(self, job: tuple, prompt: str) -> None:
        """Asks one request and has its reply on disk before anything else happens to it."""
        if job[0] == "answer":
            record = {"kind": "answer", "index": job[1]["request"], "part": job[1]["part"]}
            message, stop = [{"role": "user", "content": prompt}], None
        else:
            record = {"kind": "reply", "index": job[1], "examples": job[3]}
            record["first_number"] = self.prompter.first_number
            message, stop = prompt, [next_list_header(self.settings["num_tasks_per_request"])]
        try:
            reply = await self.teacher.ask(message, stop)
        except AskError as error:
            self.failed += 1
            self._failures_in_a_row += 1
            record |= {"error": f"{error.kind}: {error}", "time": _now()}
            if self._failures_in_a_row >= FAILURES_IN_A_ROW:
                reason = f"{FAILURES_IN_A_ROW} requests in a row failed, the last one with: {error.kind}: {error}"
                self._stop("error", UserError(f"{reason}\nWhat was answered is kept; run the same command later."))
        else:
            self._failures_in_a_row = 0
            record |= reply_fields(reply)
        await self.journal.append(record)
        if self.price and "usage" in record:
            self.spent += self.price.cost(record["usage"])
        if record["kind"] == "answer":
            self._answers[record["index"], record["part"]] = record
        else:
            self._arrived[record["index"]] = record
        self.progress.count(record)
        self._changed.set()
        self._harvest_event.set()

    # ------------------------------------------------------------------------------------------------------------------
    # Harvesting, one reply after the other.

    def _harvestable(self) -> bool:
        return not self.harvest.full and (self._to_read in self._arrived or self._settleable())

    def _settleable(self) -> bool:
        return bool(self._open) and all(self._has_answer(entry) for entry in self._open[0][1])

    def _has_answer(self, entry: Mapping[str, Any]) -> bool:
        separate = self.settings["answer_separately"]
        return not separate or "reason" in entry or (entry["request"], entry["part"]) in self._answers

    async def _harvest_forever(self) -> None:
        self._harvest_event.set()
        while True:
            await self._harvest_event.wait()
            self._harvest_event.clear()
            while self._harvestable():
                if self._to_read in self._arrived:
                    # Comparing with a large pool takes a while; meanwhile the event loop goes on asking.
                    reply = self._arrived[self._to_read]
                    entries = await asyncio.to_thread(self.harvest.read, reply)
                    self._to_answer.extend(entry for entry in entries if not self._has_answer(entry))
                    self._open.append((self._to_read, entries))
                    self._to_read += 1
                while self._settleable() and not self.harvest.full:
                    self._settle_first()
                self._changed.set()
                if self.writer.due():
                    await asyncio.to_thread(self.writer.write, self.harvest)
                await asyncio.sleep(0)

    def _settle_first(self) -> None:
        index, entries = self._open.popleft()
        kept = sum(
            self.harvest.settle(entry, self._answers.get((entry["request"], entry["part"]))) for entry in entries
        )
        self.harvest.kept_after.append(len(self.harvest.tasks))
        if index not in self._of_earlier_runs and "text" in self._arrived[index]:
            self._without_new = 0 if kept else self._without_new + 1
            if self._without_new >= self.limits["max_requests_without_new"]:
                self._stop("nothing new")
        self.progress.show(self)


def reply_fields(reply: Reply) -> dict[str, Any]:
    """A reply as the journal keeps it."""
    return {
        "text": reply.text,
        "finish_reason": reply.finish_reason,
        "usage": reply.usage,
        "model": reply.model,
        "time": _now(),
        "request_id": reply.request_id,
        "seconds": reply.seconds,
    }


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def journal_cost(records: Sequence[Mapping[str, Any]], price: Price | None) -> float:
    """US dollars of all replies in a journal; 0 where the price is unknown."""
    if price is None:
        return 0.0
    return sum(price.cost(record["usage"], record.get("batch", False)) for record in records if "usage" in record)


# ----------------------------------------------------------------------------------------------------------------------
# The final files.


class FileWriter:
    """Writes what follows from the journal into the output folder, and only over files that this journal made."""

    def __init__(self, journal: Journal, overwrite: bool):
        self.journal, self.folder = journal, journal.path.parent
        self._last = time.monotonic()
        self._took = 0.0
        self.left_alone: list[Path] = []
        self._lock = threading.Lock()
        for name in OUTPUTS:
            for torn in self.folder.glob(f".{name}.*.partial"):  # of a run that was killed while it wrote
                torn.unlink()
            path, own = self.folder / name, [mark["sha256"].get(name) for mark in self._marks()]
            if path.exists() and not overwrite and _sha256(path.read_bytes()) not in own:
                self.left_alone.append(path)

    def _marks(self) -> list[dict[str, Any]]:
        return [record for record in self.journal.records if "sha256" in record]

    def due(self) -> bool:
        return time.monotonic() - self._last > max(WRITE_EVERY, 20 * self._took)

    def write(self, harvest: Harvest) -> None:
        """Replaces the files, each whole. Their checksums are journaled first, so that a later run knows its own."""
        with self._lock:
            begin = time.monotonic()
            files = {name: text for name, text in harvest.files().items() if self.folder / name not in self.left_alone}
            sums = {name: _sha256(text.encode("utf-8")) for name, text in files.items()}
            marks = self._marks()
            if not marks or marks[-1]["sha256"] != sums:
                self.journal.append_now([{"kind": "written", "sha256": sums}])
            for name, text in files.items():
                with atomic_write(self.folder / name) as stream:
                    stream.write(text)
            self._last = time.monotonic()
            self._took = self._last - begin


OUTPUTS = ("regen.json", "alpaca_data.json", "rejections.jsonl")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# What the user sees.


class Progress:
    """The bar: kept tasks, with tokens, money spent, the projected total, and the rates."""

    def __init__(self, harvest: Harvest, records: Sequence[Mapping[str, Any]], price: Price | None):
        from tqdm import tqdm

        self.price = price
        self.replies = self.prompt_tokens = self.completion_tokens = 0
        for record in records:
            self.count(record)
        # A log file gets a line now and then, a terminal a moving bar.
        self.bar = tqdm(
            total=harvest.target,
            initial=len(harvest.tasks),
            unit="task",
            mininterval=0.5 if sys.stderr.isatty() else 30.0,
            dynamic_ncols=True,
            smoothing=0.05,
        )

    def count(self, record: Mapping[str, Any]) -> None:
        if "usage" in record:
            self.replies += record["kind"] == "reply"
            self.prompt_tokens += record["usage"]["prompt"]
            self.completion_tokens += record["usage"]["completion"]

    def show(self, run: GenerationRun) -> None:
        tokens = (self.prompt_tokens + self.completion_tokens) / 1e6
        words = [f"{self.replies} replies", f"{tokens:.3f}M tokens"]
        if self.price:
            made = len(run.harvest.tasks) - run.harvest.imported
            projected = run.spent * (run.harvest.target - run.harvest.imported) / made if made else float("nan")
            words.append(f"${run.spent:.4f} of about ${projected:.2f}")
        self.bar.set_postfix_str(", ".join(words), refresh=False)
        self.bar.update(len(run.harvest.tasks) - self.bar.n)

    def close(self) -> None:
        self.bar.close()
