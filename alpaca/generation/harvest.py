"""From raw replies to kept tasks: parse, filter, deduplicate, in the order of the requests. The same journal gives the
same files, byte for byte, whenever and wherever it is read.
"""

import dataclasses
import itertools
import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from alpaca.common.errors import UserError
from alpaca.common.files import json_list
from alpaca.generation.filters import instruction_problem, normalize_input, output_problem
from alpaca.generation.parsing import parse_reply, visible_text
from alpaca.generation.rouge import RougeLIndex
from alpaca.generation.settings import GenerationSettings

MAX_SIMILARITY = 0.7  # ROUGE-L F1; an instruction that is more similar to any kept one is a duplicate
DUPLICATE = "too similar to an earlier instruction"
MOST_SIMILAR = 10  # how many neighbours regen.json names
AT_ONCE = 10_000  # replies of a journal that are compared together, which is much faster than one by one
# Finish reasons of a reply that ended by itself, as servers spell them, and of servers that say nothing. Any other
# ("length", "content_filter", "error", "max_tokens", ...) means that the last task may be unfinished.
ENDED = {
    None, "", "stop", "stop_sequence", "end_turn", "eos", "eos_token", "end", "complete", "completed", "finished",
}  # fmt: skip


@dataclasses.dataclass
class Candidate:
    """A task read from a reply. `reason` says why it is rejected; None where it is not, or not yet."""

    request: int
    part: int  # its place in the reply
    instruction: str
    input: str
    output: str
    reason: str | None = None
    unreadable: bool = False  # a fragment that is no task
    nearest: Sequence[tuple[str, float]] = ()  # texts and F1, most similar first
    average: float | None = None  # F1 over the pool, where similarity figures are wanted

    @property
    def key(self) -> tuple[int, int]:
        return self.request, self.part

    def rejection(self) -> dict[str, Any]:
        """The row of rejections.jsonl."""
        row = {name: getattr(self, name) for name in ("reason", "request", "part", "instruction", "input", "output")}
        if self.reason == DUPLICATE:
            row["similar_to"], row["similarity"] = self.nearest[0]
        return row

    def task(self) -> dict[str, Any]:
        """The row of regen.json."""
        row = {"instruction": self.instruction, "input": self.input, "output": self.output}
        if self.average is not None:
            row |= {"most_similar_instructions": dict(self.nearest), "avg_similarity_score": self.average}
        return row


def read_candidates(
    reply: Mapping[str, Any], answer_separately: bool = False, unicode_dedup: bool = False
) -> list[Candidate]:
    """The tasks of a reply in its order, those that the filters refuse with their reason.

    reply: a journal's record, of which `index`, `text`, `first_number` and `finish_reason` count.
    """
    found, outputs = [], not answer_separately
    for part, task in enumerate(parse_reply(plain(reply["text"]), reply["first_number"], may_be_cut(reply), outputs)):
        reason = task.problem or instruction_problem(task.instruction, unicode_dedup)
        if not reason and not answer_separately:
            reason = output_problem(task.instruction, task.output)
        given, unreadable = normalize_input(task.input), task.problem is not None
        found.append(Candidate(reply["index"], part, task.instruction, given, task.output, reason, unreadable))
    return found


def may_be_cut(reply: Mapping[str, Any]) -> bool:
    """Whether a reply may have been ended in the middle."""
    reason = reply["finish_reason"]
    return (reason.lower() if isinstance(reason, str) else reason) not in ENDED


def plain(text: str) -> str:
    """A text without lone surrogates, which could not be written to a file."""
    return text.encode("utf-8", "replace").decode()


class Harvest:
    """The kept tasks and the rejections of a run's replies.

    Records are added in any order. Replies are read in the order of their requests, and a reply's tasks are kept or
    rejected when the separate answers to all of them are there (at once where none are asked for).

    seeds: tasks whose instructions are in the pool from the start. imported: rows of an earlier regen.json, kept as
    they are. target: how many tasks to keep in all; replies beyond it change nothing.
    """

    def __init__(
        self, seeds: Sequence[Mapping], settings: GenerationSettings, target: int, imported: Iterable[Mapping] = ()
    ):
        self.settings, self.target = settings, target
        self.tasks: list[dict[str, Any]] = [dict(task) for task in imported]  # rows of regen.json
        self.imported = len(self.tasks)
        self.rejections: list[dict[str, Any]] = []  # rows of rejections.jsonl
        self.read = 0  # tasks found in replies
        self.unreadable: list[Mapping[str, Any]] = []  # replies without a task, whatever the filters say
        self.kept_after: list[int] = []  # how many tasks are kept after this shard's first, second, ... request
        self.index = RougeLIndex(
            [seed["instruction"] for seed in seeds] + [task["instruction"] for task in self.tasks],
            unicode_dedup=settings.unicode_dedup,
        )
        self._replies: dict[int, Mapping[str, Any]] = {}  # not read yet, by request
        self._answers: dict[tuple[int, int], Mapping[str, Any]] = {}
        self._undecided: deque[tuple[Mapping, list[Candidate]]] = deque()  # replies that are read

    @property
    def full(self) -> bool:
        return len(self.tasks) >= self.target

    def add(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Takes replies and answers from the journal; other records are passed over."""
        for record in records:
            if record["kind"] == "reply":
                self._replies[record["index"]] = record
            elif record["kind"] == "answer":
                self._answers[record["index"], record["part"]] = record

    @property
    def next_request(self) -> int:
        """The request whose reply is read next."""
        return self.settings.shard.item(len(self.kept_after) + len(self._undecided))

    @property
    def next_has_come(self) -> bool:
        return not self.full and self.next_request in self._replies

    def compare_next(self) -> list[Candidate]:
        """The tasks of the next reply, those that are new added to the pool. `take` must follow."""
        candidates = self._read_reply(self.next_request)
        self._compare(candidates)
        return candidates

    def _read_reply(self, request: int) -> list[Candidate]:
        reply = self._replies[request]
        if "text" not in reply:  # a failed request
            return []
        return read_candidates(reply, self.settings.answer_separately, self.settings.unicode_dedup)

    def _compare(self, candidates: Iterable[Candidate], done: Callable[[int], object] = lambda tasks: None) -> None:
        """Marks those that resemble an instruction of the pool or one before them, and adds the others to the pool."""
        candidates = [candidate for candidate in candidates if not candidate.reason]
        neighbours = MOST_SIMILAR if self.settings.similarity_figures else 0
        texts = [candidate.instruction for candidate in candidates]
        found = self.index.add_new(texts, MAX_SIMILARITY, neighbours, done)
        for candidate, compared in zip(candidates, found, strict=True):
            candidate.nearest, candidate.average = compared.nearest, compared.average
            if not compared.new:
                candidate.reason = DUPLICATE

    def take(self, candidates: list[Candidate]) -> None:
        """Puts the tasks that compare_next read behind those that wait to be decided."""
        reply = self._replies.pop(self.next_request)
        if reply.get("text", "").strip() and all(candidate.unreadable for candidate in candidates):
            self.unreadable.append(reply)
        self._undecided.append((reply, candidates))

    def needs_answer(self, candidate: Candidate) -> bool:
        """Whether a task waits for its separately asked answer."""
        return self.settings.answer_separately and not candidate.reason and candidate.key not in self._answers

    @property
    def awaiting(self) -> int:
        """Tasks that may be kept when their replies are decided."""
        return sum(not candidate.reason for _, candidates in self._undecided for candidate in candidates)

    @property
    def unread(self) -> int:
        return len(self._replies)

    def decide(self, without_answers: bool = False) -> Iterator[tuple[Mapping[str, Any], int]]:
        """Keeps or rejects the tasks of each reply whose answers are there; yields the reply and how many were kept.

        without_answers: tasks whose answer has not come are left out.
        """
        while self._undecided and not self.full:
            reply, candidates = self._undecided[0]
            if not without_answers and any(map(self.needs_answer, candidates)):
                return
            before = len(self.tasks)
            for candidate in candidates:
                if not self.needs_answer(candidate):
                    self._decide_task(candidate)
            self._undecided.popleft()
            self.kept_after.append(len(self.tasks))
            yield reply, len(self.tasks) - before

    def _decide_task(self, candidate: Candidate) -> None:
        if self.full:
            return
        self.read += 1
        if not candidate.reason and self.settings.answer_separately:
            answer = self._answers.pop(candidate.key)
            answered = visible_text(plain(answer.get("text", "")))
            candidate.output = (answered or "").strip()
            candidate.reason = answer_problem(candidate, answer, answered)
        if candidate.reason:
            self.rejections.append(candidate.rejection())
        else:
            self.tasks.append(candidate.task())

    def read_rest(self) -> "Harvest":
        """Reads all replies that are there. Requests without a reply and tasks without their answer change nothing."""
        for _ in self.decide(without_answers=True):
            pass
        requests = iter(sorted(self._replies))
        with tqdm(total=self.target, initial=len(self.tasks), unit="task", delay=60, desc="read") as bar:
            while not self.full and (read := self._read_replies(requests)):
                self._compare(itertools.chain.from_iterable(read.values()), bar.update)
                for index, candidates in read.items():
                    skipped = self.settings.shard.position(index) - len(self.kept_after)
                    self.kept_after.extend([len(self.tasks)] * skipped)
                    self.take(candidates)
                    for _ in self.decide(without_answers=True):
                        pass
                    if self.full:
                        break
                bar.update(len(self.tasks) - bar.n)  # less the figures of surplus tasks
        return self

    def _read_replies(self, requests: Iterator[int]) -> dict[int, list[Candidate]]:
        """The tasks of the next replies, by request: AT_ONCE replies, or so many as are likely to fill the target."""
        read: dict[int, list[Candidate]] = {}
        wanted = 1.25 * (self.target - len(self.tasks))  # a fifth may be duplicates
        for request in itertools.islice(requests, AT_ONCE):
            read[request] = self._read_reply(request)
            wanted -= sum(not candidate.reason for candidate in read[request])
            if wanted <= 0:
                break
        return read

    # ------------------------------------------------------------------------------------------------------------------

    def files(self) -> dict[str, Iterable[str]]:
        """The text of each file that follows from the replies, in pieces, by file name."""
        tasks, rejections = list(self.tasks), list(self.rejections)  # a run goes on while they are written
        rows = ({field: task[field] for field in ("instruction", "input", "output")} for task in tasks)
        return {
            "regen.json": itertools.chain(json_list(tasks), ["\n"]),
            "alpaca_data.json": itertools.chain(json_list(rows), ["\n"]),
            "rejections.jsonl": (json.dumps(row, ensure_ascii=False) + "\n" for row in rejections),
        }

    def reasons(self) -> Counter[str]:
        """How many tasks were rejected, by reason."""
        return Counter(row["reason"] for row in self.rejections)

    def most_similar_pairs(self, count: int) -> list[tuple[float, str, str]]:
        """The pairs of a kept task and its most similar earlier instruction with the highest scores."""
        pairs = []
        for task in self.tasks:
            if nearest := task.get("most_similar_instructions"):
                text, score = max(nearest.items(), key=lambda item: item[1])
                pairs.append((score, task["instruction"], text))
        return sorted(pairs, key=lambda pair: -pair[0])[:count]


def answer_problem(candidate: Candidate, answer: Mapping[str, Any], text: str | None) -> str | None:
    """Why a task cannot stay with the answer that was asked for separately; None where it can.

    text: of the answer, None where it holds thoughts that never end.
    """
    if "text" not in answer:
        return "no answer"
    if may_be_cut(answer):
        return "answer cut off"
    return "thoughts that never end" if text is None else output_problem(candidate.instruction, candidate.output)


def run_records(records: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """A journal's records of how its runs were started."""
    return [record for record in records if record["kind"] == "run"]


def empty_harvest(records: Iterable[Mapping[str, Any]], **changes: Any) -> Harvest:
    """A harvest with a journal's settings, apart from `changes`, and nothing read yet."""
    runs = run_records(records)
    if not runs:
        raise UserError("responses.jsonl holds no run.")
    seeds = next(record["seeds"] for record in reversed(runs) if "seeds" in record)
    settings = dataclasses.replace(GenerationSettings.from_record(runs[-1]["settings"]), **changes)
    return Harvest(seeds, settings, runs[-1]["target"], runs[0].get("imported", ()))


def harvest_journal(records: Sequence[Mapping[str, Any]], **changes: Any) -> Harvest:
    """What a journal's records come to: every reply that is there, in the order of request indices.

    changes: settings that are not to be the journal's.
    """
    harvest = empty_harvest(records, **changes)
    harvest.add(records)
    return harvest.read_rest()
