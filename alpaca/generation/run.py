"""Asks requests at the same time: which one is next, how many at a time, when it is enough."""

import asyncio
import dataclasses
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from alpaca.common.errors import UserError
from alpaca.common.journal import Journal, changed_settings
from alpaca.common.run_record import now, sha256_file
from alpaca.common.tasks import load_tasks
from alpaca.generation.client import ModelClient, Reply
from alpaca.generation.filters import check_seeds
from alpaca.generation.harvest import Candidate, Harvest, harvest_journal, run_records
from alpaca.generation.many_requests import RequestFailed, on_interrupt
from alpaca.generation.output import OutputFiles
from alpaca.generation.parsing import look_of
from alpaca.generation.prices import Budget
from alpaca.generation.prompting import Prompter, answer_prompt
from alpaca.generation.settings import GenerationSettings, Limits
from alpaca.generation.summary import Progress, empty_replies

# How many requests may fail one after another before the run stops: a server that is down comes back, one that answers
# with something else than replies does not.
FAILURES_IN_A_ROW = 20
FEW_IN_A_ROW = 5
STOP_AFTER_FEW = ("unreadable reply", "empty reply")


def begin_or_go_on(
    journal: Journal, settings: GenerationSettings, seeds: Sequence[Mapping], target: int, change_settings: bool
) -> None:
    """Writes this run's settings into the journal, and imports a regen.json of the original script into a new one.

    Raises UserError where the folder's replies were made with other settings, and for seeds that need other filters.
    """
    runs = run_records(journal.records)
    begin = {"kind": "run", "time": now(), "target": target, "settings": settings.to_record()}
    if not runs:
        check_seeds([seed["instruction"] for seed in seeds], settings.unicode_dedup)
        earlier = journal.path.with_name("regen.json")
        begin["seeds"] = list(seeds)
        if earlier.exists():
            # All in one record, which is there whole or not at all. The checksum makes the file one of this run's own.
            begin |= {"imported": load_tasks(earlier), "sha256": {earlier.name: sha256_file(earlier)}}
            print(f"note: going on from the {len(begin['imported'])} tasks of {earlier}.")
        journal.append_now([begin])
        return
    old = GenerationSettings.from_record(runs[-1]["settings"])
    changed = changed_settings(old.to_record(), settings.to_record())
    if changed and any(record["kind"] in ("reply", "answer") for record in journal.records):
        if "answer_separately" in changed or "shard" in changed:
            name = "answer_separately" if "answer_separately" in changed else "shard"
            raise UserError(
                f"the replies in {journal.path} were asked for with --{name} {changed[name]}; they cannot be mixed. "
                "Choose another --output_dir."
            )
        if not change_settings:
            shown = "\n".join(f"  --{name}: {change}" for name, change in changed.items())
            raise UserError(
                f"the replies in {journal.path} were made with other settings:\n{shown}\n"
                "Use the old ones, choose another --output_dir, or add --change_settings True to mix them."
            )
    if target < runs[-1]["target"]:  # a lower target takes nothing away that is kept already
        kept = harvest_journal(journal.records, similarity_figures=False).tasks  # the same tasks, much sooner
        begin["target"] = max(target, len(kept))
    if changed or begin["target"] != runs[-1]["target"]:
        journal.append_now([begin | ({"seeds": list(seeds)} if "seed_tasks_path" in changed else {})])


def reply_fields(reply: Reply) -> dict[str, Any]:
    """A reply as the journal keeps it."""
    fields = {
        "text": reply.text,
        "finish_reason": reply.finish_reason,
        "usage": reply.usage,
        "model": reply.model,
        "asked": reply.asked,
        "time": now(),
        "request_id": reply.request_id,
        "seconds": reply.seconds,
    }
    return fields if reply.sent is None else fields | {"sent": reply.sent}


def failure_fields(failure: RequestFailed) -> dict[str, Any]:
    """A failed request as the journal keeps it."""
    fields = {"error": f"{failure.kind}: {failure}", "time": now()}
    return fields if failure.sent is None else fields | {"sent": failure.sent}


@dataclasses.dataclass
class Request:
    """One request, and what the journal will say of it besides the reply."""

    record: dict[str, Any]
    prompt: str
    most: float = 0.0  # US dollars reserved for it

    @property
    def is_answer(self) -> bool:
        return self.record["kind"] == "answer"


@dataclasses.dataclass
class Run:
    """What a run works with. Afterwards `end` says why it ended, and `error` which error ended it, if one did."""

    client: ModelClient
    journal: Journal
    harvest: Harvest
    prompter: Prompter
    limits: Limits
    budget: Budget
    files: OutputFiles
    progress: Progress
    end: str | None = None
    error: BaseException | None = None


@dataclasses.dataclass
class GenerationRun(Run):
    """Asks, journals and harvests until the target, the budget or the model's ideas are exhausted."""

    def __post_init__(self):
        self.settings = self.harvest.settings
        self._failures: list[str] = []  # kinds of the last failures without a reply between them
        self._unreadable_shown = False
        self._without_new = 0  # replies in a row without a task that is kept
        self._under_way: dict[asyncio.Task, Request] = {}
        self._changed = asyncio.Event()
        self._unanswered: deque[Candidate] = deque()

        self.harvest.add(self.journal.records)
        self._of_earlier_runs = {record["index"] for record in self.journal.records if record["kind"] == "reply"}
        shard = self.settings.shard
        asked = range(shard.index, max(self._of_earlier_runs, default=-1) + 1, shard.count)
        # Requests that were under way when an earlier run ended come first.
        self._indices = deque(index for index in asked if index not in self._of_earlier_runs)
        self._next_index = shard.item(len(asked))

    async def run(self) -> None:
        with on_interrupt(self._interrupt):
            try:
                await self._harvest()  # what an earlier run left comes before new requests
                self._start_requests()
                while self._under_way:
                    await self._changed.wait()
                    self._changed.clear()
                    await self._harvest()
                    self._start_requests()
            except Exception as error:
                self._stop("error", error)
            while self._under_way:
                await asyncio.wait(list(self._under_way))
            try:
                if not self.harvest.full:  # the replies behind requests without one count too
                    await asyncio.to_thread(self.harvest.read_rest)
                await asyncio.to_thread(self.files.write, self.harvest)
            except Exception as error:
                self._stop("error", error)
            self.end = self.end or ("target reached" if self.harvest.full else "nothing left to ask")

    def _stop(self, end: str, error: BaseException | None = None) -> None:
        """Starts no further request. Those under way finish, because they are paid for."""
        self.end = self.end or end
        self.error = self.error or error
        self._changed.set()

    def _interrupt(self) -> None:
        self._stop("interrupted", KeyboardInterrupt())
        self.progress.clear()
        print(
            f"\ninterrupted: waiting for {len(self._under_way)} replies under way. Ctrl-C again leaves at once; then "
            f"`rebuild --output_dir {self.files.folder}` writes the files.",
            flush=True,
        )

    # ------------------------------------------------------------------------------------------------------------------
    # Choosing requests.

    def _start_requests(self) -> None:
        while len(self._under_way) < self.limits.max_concurrency and (request := self._next_request()):
            self.budget.reserved += request.most
            task = asyncio.create_task(self._ask(request))
            self._under_way[task] = request
            task.add_done_callback(self._request_ended)

    def _next_request(self) -> Request | None:
        """The request to ask now; None where there is none."""
        if self.end or self.harvest.full:
            return None
        request = self._answer_request() if self._unanswered else self._list_request()
        if request is None:
            return None
        request.most = self.budget.most(request.prompt, self.client.max_tokens)
        # The first reply shows what a request costs at a server that ignores max_tokens.
        unknown_cost = self.budget.limit is not None and not self.budget.longest_reply and self._under_way
        if unknown_cost or not self.budget.affords(request.most):
            if not self._under_way:
                self._stop("budget")
            return None
        if request.is_answer:
            self._unanswered.popleft()
        else:
            self._indices.popleft()
        return request

    def _answer_request(self) -> Request | None:
        answers = sum(request.is_answer for request in self._under_way.values())
        if len(self.harvest.tasks) + answers >= self.harvest.target:
            return None
        candidate = self._unanswered[0]
        record = {"kind": "answer", "index": candidate.request, "part": candidate.part}
        return Request(record, answer_prompt(candidate.instruction, candidate.input))

    def _list_request(self) -> Request | None:
        if not self._indices:
            if self._expected_tasks() >= self.harvest.target:
                return None
            self._indices.append(self._next_index)
            self._next_index += self.settings.shard.count
        index, generated = self._indices[0], []
        if self.settings.sample_from_generated:
            # Whatever the concurrency, the examples come from the same tasks: those of requests at least sample_lag
            # before this one.
            decided = self.settings.shard.position(index) - self.settings.sample_lag + 1
            if decided > len(self.harvest.kept_after):
                return None
            kept = self.harvest.kept_after[decided - 1] if decided > 0 else self.harvest.imported
            generated = self.harvest.tasks[:kept]
        prompt, names = self.prompter.prompt(index, generated)
        record = {"kind": "reply", "index": index, "examples": names, "first_number": self.prompter.first_number}
        return Request(record, prompt)

    def _expected_tasks(self) -> float:
        """Tasks that will be kept when all that is asked has been answered."""
        kept, replies = len(self.harvest.tasks), len(self.harvest.kept_after)
        a_reply = (kept - self.harvest.imported + self.limits.expected_tasks_per_request) / (replies + 1)
        lists = sum(not request.is_answer for request in self._under_way.values())
        return kept + self.harvest.awaiting + (lists + self.harvest.unread) * a_reply

    # ------------------------------------------------------------------------------------------------------------------
    # Asking.

    async def _ask(self, request: Request) -> None:
        """Asks one request and has its reply on disk before anything else happens to it."""
        message, stop, temperature = request.prompt, self.prompter.stop, None
        if request.is_answer:
            message, stop = [{"role": "user", "content": request.prompt}], None
            temperature = self.settings.answer_temperature
        try:
            reply = await self.client.ask(message, stop, temperature)
        except RequestFailed as failure:
            fields, kind = failure_fields(failure), failure.kind
        else:
            fields, kind = reply_fields(reply), None if reply.text.strip() else "empty reply"
        record = request.record | fields
        await self.journal.append(record)
        self.budget.count(record)
        self.progress.count(record)
        self.harvest.add([record])
        self._note_failure(kind, record)

    def _note_failure(self, kind: str | None, record: Mapping[str, Any]) -> None:
        """Stops the run after too many failures in a row. kind: None for a reply."""
        if kind is None:
            self._failures.clear()
            return
        self._failures.append(kind)
        count = len(self._failures)
        few = kind in STOP_AFTER_FEW and self._failures.count(kind) >= FEW_IN_A_ROW
        if few and kind == "empty reply":
            reason = empty_replies(record, FEW_IN_A_ROW)
        elif few or count >= FAILURES_IN_A_ROW:
            reason = f"{count} requests in a row failed, the last one with: {record.get('error', kind)}"
        else:
            return
        self._stop("error", UserError(f"{reason}\nWhat was answered is kept; run the same command later."))

    def _show_unreadable(self) -> None:
        """Shows the first reply of this run in which no task could be found."""
        if self._unreadable_shown or not self.harvest.unreadable:
            return
        reply = self.harvest.unreadable[-1]
        if reply["index"] not in self._of_earlier_runs:
            self._unreadable_shown = True
            self.progress.clear()
            print(f"note: no task could be read from reply {reply['index']}. It is {look_of(reply['text'])}")

    def _request_ended(self, task: asyncio.Task) -> None:
        self.budget.reserved -= self._under_way.pop(task).most
        if task.cancelled():
            self._stop("interrupted")
        elif task.exception():
            self._stop("error", task.exception())
        self._start_requests()
        self._changed.set()

    # ------------------------------------------------------------------------------------------------------------------
    # Harvesting.

    async def _harvest(self) -> None:
        """Reads the replies that have come, in the order of their requests."""
        while True:
            for reply, kept in self.harvest.decide():
                if reply["index"] not in self._of_earlier_runs and "text" in reply:
                    self._without_new = 0 if kept else self._without_new + 1
                    if self._without_new >= self.limits.max_requests_without_new:
                        self._stop("nothing new")
            self.progress.show(self.harvest, self.budget)
            if self._under_way:
                self._start_requests()
            if not self.harvest.next_has_come:
                return
            # Comparing with a large pool takes a while; meanwhile the event loop goes on asking.
            candidates = await asyncio.to_thread(self.harvest.compare_next)
            self.harvest.take(candidates)
            self._show_unreadable()
            self._unanswered.extend(filter(self.harvest.needs_answer, candidates))
            if self.files.due():
                await asyncio.to_thread(self.files.write, self.harvest)
