"""From raw replies to kept tasks: parse, filter, deduplicate, in the order of the requests. The same journal gives the
same files, byte for byte, whenever and wherever it is read.

    python generate_instruction.py rebuild --output_dir DIR           # full scale: all files of a run from its journal
    python -c "import task_harvest; help(task_harvest.Harvest)"       # one minute
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from alpaca.generation.filters import instruction_problem, normalize_input, output_problem
from alpaca.generation.parsing import parse_reply

MAX_SIMILARITY = 0.7  # ROUGE-L F1; an instruction that is more similar to any kept one is a duplicate
MOST_SIMILAR = 10  # how many neighbours regen.json names
CUT_OFF = ("length", "content_filter")  # finish reasons that leave the last task unfinished


class Harvest:
    """Kept tasks and rejections of a run's replies.

    seeds: tasks whose instructions are in the pool from the start. imported: rows of an earlier regen.json, kept as
    they are. target: how many tasks to keep in all; replies beyond it change nothing. settings: `unicode_dedup`,
    `answer_separately`.

    `read(reply)` is called once for each reply, in the order of request indices, and gives its entries; `settle(entry)`
    once for each entry, in the same order. tasks: rows of regen.json. rejections: rows of rejections.jsonl.
    """

    def __init__(
        self, seeds: Sequence[Mapping], settings: Mapping[str, Any], target: int, imported: Iterable[Mapping] = ()
    ):
        from alpaca.generation.rouge import RougeLIndex

        self.settings, self.target = settings, target
        self.tasks: list[dict[str, Any]] = [dict(task) for task in imported]
        self.imported = len(self.tasks)
        self.rejections: list[dict[str, Any]] = []
        self.parsed = 0
        self.kept_after: list[int] = []  # number of kept tasks after request 0, 1, ... was settled
        self.index = RougeLIndex(
            [seed["instruction"] for seed in seeds] + [task["instruction"] for task in self.tasks],
            unicode_dedup=bool(settings.get("unicode_dedup")),
        )

    @property
    def full(self) -> bool:
        return len(self.tasks) >= self.target

    def read(self, reply: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The reply's tasks as entries: candidates, and rejections (with a "reason"), in the reply's order."""
        if "text" not in reply:
            return []
        outputs = not self.settings.get("answer_separately")
        text = reply["text"].encode("utf-8", "replace").decode()  # a lone surrogate could not be written to a file
        parsed = parse_reply(text, reply["first_number"], reply["finish_reason"] in CUT_OFF, outputs)
        entries = []
        for part, task in enumerate(parsed):
            entry = {"request": reply["index"], "part": part, "instruction": task.instruction}
            entry |= {"input": normalize_input(task.input), "output": task.output}
            reason = task.problem or instruction_problem(task.instruction, bool(self.settings.get("unicode_dedup")))
            if not reason and outputs:
                reason = output_problem(task.instruction, task.output)
            entries.append(self._reject(entry, reason) if reason else self._compare(entry))
        return entries

    def _compare(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Adds the similarity figures, and the instruction to the pool unless it is a duplicate."""
        scores = self.index.scores(entry["instruction"])
        nearest = self.index.top(entry["instruction"], MOST_SIMILAR, scores)
        if nearest and nearest[0][1] > MAX_SIMILARITY:
            entry |= {"similar_to": nearest[0][0], "similarity": nearest[0][1]}
            return self._reject(entry, "too similar to an earlier instruction")
        self.index.add(entry["instruction"])
        average = float(scores.mean()) if len(scores) else 0.0
        return entry | {"most_similar_instructions": dict(nearest), "avg_similarity_score": average}

    @staticmethod
    def _reject(entry: Mapping[str, Any], reason: str) -> dict[str, Any]:
        return {"reason": reason, **entry}

    def settle(self, entry: Mapping[str, Any], answer: Mapping[str, Any] | None = None) -> bool:
        """Keeps or rejects one entry; `answer` is the record of its own answer where these are asked for separately.

        True where a task was kept.
        """
        if self.full:
            return False
        self.parsed += 1
        if "reason" not in entry and self.settings.get("answer_separately"):
            entry = {**entry, "output": self._answer_text(answer)}
            if reason := self._answer_problem(entry, answer):
                figures = ("most_similar_instructions", "avg_similarity_score")
                entry = self._reject({k: v for k, v in entry.items() if k not in figures}, reason)
        if "reason" in entry:
            self.rejections.append(dict(entry))
            return False
        fields = ("instruction", "input", "output", "most_similar_instructions", "avg_similarity_score")
        self.tasks.append({field: entry[field] for field in fields})
        return True

    @staticmethod
    def _answer_text(answer: Mapping[str, Any] | None) -> str:
        return (answer or {}).get("text", "").encode("utf-8", "replace").decode().strip()

    @staticmethod
    def _answer_problem(entry: Mapping[str, Any], answer: Mapping[str, Any] | None) -> str | None:
        if answer is None or "text" not in answer:
            return "no answer"
        if answer["finish_reason"] in CUT_OFF:
            return "answer cut off"
        return output_problem(entry["instruction"], entry["output"])

    # ------------------------------------------------------------------------------------------------------------------

    def files(self) -> dict[str, str]:
        """The text of each file that follows from the replies, by file name."""
        rows = [{field: task[field] for field in ("instruction", "input", "output")} for task in self.tasks]
        return {
            "regen.json": json.dumps(self.tasks, indent=4, ensure_ascii=False) + "\n",
            "alpaca_data.json": json.dumps(rows, indent=4, ensure_ascii=False) + "\n",
            "rejections.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rejections),
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


def replies_in_order(records: Iterable[Mapping]) -> Iterator[Mapping[str, Any]]:
    """The journal's replies (and failed requests) by request index."""
    return iter(sorted((r for r in records if r["kind"] == "reply"), key=lambda record: record["index"]))


def answers_of(records: Iterable[Mapping]) -> dict[tuple[int, int], Mapping[str, Any]]:
    """The journal's separately asked answers by (request index, part)."""
    return {(r["index"], r["part"]): r for r in records if r["kind"] == "answer"}


def harvest_journal(records: Sequence[Mapping[str, Any]]) -> Harvest:
    """What a journal's records come to: every reply that is there, in the order of request indices.

    Requests that were still under way when the run ended leave no trace here; the run asks them first when it goes on.
    """
    runs = [record for record in records if record["kind"] == "run"]
    seeds = next(record["seeds"] for record in reversed(runs) if "seeds" in record)
    harvest = Harvest(seeds, runs[-1]["settings"], runs[-1]["target"], runs[0].get("imported", ()))
    answers = answers_of(records)
    separate = runs[-1]["settings"].get("answer_separately")
    for reply in replies_in_order(records):
        if harvest.full:
            break
        # A request without a trace changed nothing.
        harvest.kept_after.extend([len(harvest.tasks)] * (reply["index"] - len(harvest.kept_after)))
        for entry in harvest.read(reply):
            answer = answers.get((entry["request"], entry["part"]))
            if "reason" in entry or answer or not separate:
                harvest.settle(entry, answer)
        harvest.kept_after.append(len(harvest.tasks))
    return harvest
