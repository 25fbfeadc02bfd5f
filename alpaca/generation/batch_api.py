"""Generation over OpenAI's Batch API: half the price, within a day, and never submitted twice.

Called by generate_instruction.py; the journal keeps what was planned and submitted, so a run can stop at any moment:

    python generate_instruction.py --batch_api True --num_instructions_to_generate 52000 --max_cost_usd 20
    python generate_instruction.py --batch_api True --num_instructions_to_generate 52000 --dry_run True   # one minute
"""

import asyncio
import json
import math
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from alpaca.common.errors import UserError
from alpaca.common.journal import Journal
from alpaca.generation.harvest import Harvest, harvest_journal
from alpaca.generation.parsing import next_list_header
from alpaca.generation.prices import Price, estimate_tokens
from alpaca.generation.run import FileWriter, Prompter, journal_cost, reply_fields
from alpaca.generation.teacher import AskError, Teacher

MAX_REQUESTS = 20_000  # of one batch; OpenAI takes 50,000
MAX_BYTES = 150_000_000  # of one batch; OpenAI takes 200 MB
OVER = ("completed", "failed", "expired", "cancelled")
SUBMIT_TRIES = 5


def run(
    teacher: Teacher,
    journal: Journal,
    prompter: Prompter,
    price: Price | None,
    limits: Mapping[str, Any],
    writer: FileWriter,
) -> tuple[Harvest, str, float]:
    """Submits batches until the target, the budget or the teacher's ideas are reached.

    limits: as for GenerationRun, and `batch_poll_seconds`. Returns the harvest, why it ended, and US dollars spent.
    """
    return asyncio.run(_BatchRun(teacher, journal, prompter, price, limits, writer).run())


class _BatchRun:
    def __init__(self, teacher, journal, prompter, price, limits, writer):
        self.teacher, self.journal, self.prompter = teacher, journal, prompter
        self.price, self.limits, self.writer = price, limits, writer

    async def run(self) -> tuple[Harvest, str, float]:
        import openai

        self._requests_before = len(harvest_journal(self.journal.records).kept_after)
        try:
            await self.teacher.check_model()
            while True:
                harvest = harvest_journal(self.journal.records)
                plan = self._open_plan()
                if plan is None and (why := self._reason_to_end(harvest)):
                    break
                plan = plan or await self._make_plan(harvest)
                if plan is None:
                    why = "budget"
                    break
                if plan["last"] >= plan["first"]:
                    await self._carry_out(plan, harvest)
                self.writer.write(harvest_journal(self.journal.records))
        except openai.APIStatusError as error:
            self.teacher.stop_if_permanent(error)
            raise UserError(
                f"{self.teacher.url} refused a batch call ({error.status_code}): {error.message}"
            ) from error
        except openai.APIConnectionError as error:
            raise UserError(f"lost {self.teacher.url}: {error}. The same command goes on from here.") from error
        finally:
            await self.teacher.close()
        self.writer.write(harvest)
        return harvest, why, journal_cost(self.journal.records, self.price)

    # ------------------------------------------------------------------------------------------------------------------
    # Planning.

    def _records(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.journal.records if record["kind"] == kind]

    def _open_plan(self) -> dict[str, Any] | None:
        """The planned batch that is not yet over."""
        over = {record["number"] for record in self._records("batch_over")}
        return next((plan for plan in self._records("batch_planned") if plan["number"] not in over), None)

    def _reason_to_end(self, harvest: Harvest) -> str | None:
        if harvest.full:
            return "target reached"
        quiet = self.limits["max_requests_without_new"]
        if (
            len(harvest.kept_after) - self._requests_before > quiet
            and harvest.kept_after[-1] == harvest.kept_after[-1 - quiet]
        ):
            return "nothing new"
        return None

    def _prompt(self, index: int, harvest: Harvest) -> tuple[str, list[str]]:
        if not self.prompter.settings["sample_from_generated"]:
            return self.prompter.prompt(index, [])
        settled = index - self.prompter.settings["sample_lag"]
        kept = harvest.kept_after[settled] if settled >= 0 else harvest.imported
        return self.prompter.prompt(index, harvest.tasks[:kept])

    async def _make_plan(self, harvest: Harvest) -> dict[str, Any] | None:
        """Asks the first request directly, which shows what the model accepts, and plans the rest as a batch.

        None where the budget does not reach.
        """
        first = max((record["index"] for record in self._records("reply")), default=-1) + 1
        prompt, names = self._prompt(first, harvest)
        if self._too_dear(self._most(prompt)):
            return None
        stop = [next_list_header(self.prompter.settings["num_tasks_per_request"])]
        try:
            answer = reply_fields(await self.teacher.ask(prompt, stop))
        except AskError as error:
            raise UserError(f"the first request failed: {error.kind}: {error}") from error
        self.journal.append_now([self._record(first, names) | answer])

        harvest = harvest_journal(self.journal.records)
        made = len(harvest.tasks) - harvest.imported
        rate = (made + self.limits["expected_tasks_per_request"]) / (len(harvest.kept_after) + 1)
        wanted = math.ceil((harvest.target - len(harvest.tasks)) / max(rate, 0.05))
        if self.prompter.settings["sample_from_generated"]:
            wanted = min(wanted, self.prompter.settings["sample_lag"] - 1)
        most, size, count = 0.0, 0, 0
        while count < min(wanted, MAX_REQUESTS):
            prompt, _ = self._prompt(first + 1 + count, harvest)
            most += self._most(prompt, batch=True)
            size += len(prompt.encode()) + 1000
            if self._too_dear(most) or size > MAX_BYTES:
                break
            count += 1
        if count == 0 and wanted > 0:
            return None
        plan = {"kind": "batch_planned", "number": len(self._records("batch_planned")), "first": first + 1}
        plan |= {"last": first + count, "run_id": self._run_id(), "api": self.teacher.api}
        plan["left_out"] = sorted(self.teacher.dropped)
        if count:
            self.journal.append_now([plan])
        return plan

    def _run_id(self) -> str:
        plans = self._records("batch_planned")
        return plans[0]["run_id"] if plans else uuid.uuid4().hex

    def _most(self, prompt: str, batch: bool = False) -> float:
        if self.price is None:
            return 0.0
        usage = {"prompt": estimate_tokens(prompt), "completion": self.teacher.max_tokens}
        return self.price.cost(usage, batch)

    def _too_dear(self, most: float) -> bool:
        budget = self.limits["max_cost_usd"]
        return budget is not None and journal_cost(self.journal.records, self.price) + most > budget

    def _record(self, index: int, names: Sequence[str]) -> dict[str, Any]:
        return {"kind": "reply", "index": index, "examples": names, "first_number": self.prompter.first_number}

    # ------------------------------------------------------------------------------------------------------------------
    # Submitting, waiting, collecting.

    async def _carry_out(self, plan: Mapping[str, Any], harvest: Harvest) -> None:
        submitted = [record for record in self._records("batch_submitted") if record["number"] == plan["number"]]
        batch_id = submitted[0]["batch_id"] if submitted else await self._submit(plan, harvest)
        batch = await self._wait(batch_id)
        await self._collect(batch, plan, harvest)

    async def _submit(self, plan: Mapping[str, Any], harvest: Harvest) -> str:
        """Creates the batch, or finds the one that was created before a crash could note it down."""
        import openai

        client, metadata = self.teacher.client, {"run_id": plan["run_id"], "number": str(plan["number"])}
        file_id = None
        for attempt in range(SUBMIT_TRIES):
            batch_id = await self._find_batch(metadata)
            if batch_id is None:
                file_id = file_id or await self._upload(plan, harvest)
                try:
                    # No retries of the SDK's: a lost answer may stand for a batch that exists.
                    batch = await client.with_options(max_retries=0).batches.create(
                        input_file_id=file_id,
                        endpoint="/v1" + self._path(plan),
                        completion_window="24h",
                        metadata=metadata,
                    )
                    batch_id = batch.id
                except (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError):
                    if attempt + 1 == SUBMIT_TRIES:
                        raise
                    await asyncio.sleep(2**attempt)
                    continue
            self.journal.append_now([{"kind": "batch_submitted", "number": plan["number"], "batch_id": batch_id}])
            print(f"batch {batch_id}: {plan['last'] - plan['first'] + 1:,} requests submitted; it goes on if this ends")
            return batch_id
        raise UserError("no batch could be submitted")

    async def _find_batch(self, metadata: Mapping[str, str]) -> str | None:
        async for batch in self.teacher.client.batches.list(limit=100):
            if batch.metadata and all(batch.metadata.get(name) == value for name, value in metadata.items()):
                return batch.id
        return None

    @staticmethod
    def _path(plan: Mapping[str, Any]) -> str:
        return "/completions" if plan["api"] == "completions" else "/chat/completions"

    async def _upload(self, plan: Mapping[str, Any], harvest: Harvest) -> str:
        """The batch's input file at the server; one that was uploaded before a crash is used again."""
        name = f"{plan['run_id']}-{plan['number']}.jsonl"
        async for file in self.teacher.client.files.list(purpose="batch"):
            if file.filename == name:
                return file.id
        self.teacher.api = plan["api"]
        self.teacher.dropped.update(plan["left_out"])
        stop = [next_list_header(self.prompter.settings["num_tasks_per_request"])]
        lines = []
        for index in range(plan["first"], plan["last"] + 1):
            path, body = self.teacher.request(self._prompt(index, harvest)[0], stop)
            row = {"custom_id": f"request-{index}", "method": "POST", "url": "/v1" + path, "body": body}
            lines.append(json.dumps(row) + "\n")
        file = await self.teacher.client.files.create(file=(name, "".join(lines).encode()), purpose="batch")
        return file.id

    async def _wait(self, batch_id: str):
        shown = None
        while True:
            batch = await self.teacher.client.batches.retrieve(batch_id)
            done = batch.request_counts.completed if batch.request_counts else 0
            if (batch.status, done) != shown:
                shown = (batch.status, done)
                print(f"batch {batch_id}: {batch.status}, {done:,} done", flush=True)
            if batch.status in OVER:
                return batch
            await asyncio.sleep(self.limits["batch_poll_seconds"])

    async def _collect(self, batch, plan: Mapping[str, Any], harvest: Harvest) -> None:
        """Journals every answer that is not there yet; requests without an answer are journaled as failed."""
        if batch.status == "failed":
            reasons = [error.message for error in (batch.errors.data or [])] if batch.errors else []
            self.journal.append_now([{"kind": "batch_over", "number": plan["number"], "status": batch.status}])
            raise UserError(f"OpenAI refused batch {batch.id}: {'; '.join(map(str, reasons[:3])) or 'no reason given'}")
        there = {record["index"] for record in self._records("reply")}
        wanted = [index for index in range(plan["first"], plan["last"] + 1) if index not in there]
        answers = {}
        for file_id in (batch.output_file_id, batch.error_file_id):
            if file_id:
                content = await self.teacher.client.files.content(file_id)
                for line in content.content.splitlines():  # of bytes: JSON texts may hold Unicode's own line ends
                    row = json.loads(line)
                    answers[row["custom_id"]] = row
        records, failures = [], []
        for index in wanted:
            prompt, names = self._prompt(index, harvest)
            fields = self._answer_fields(answers.get(f"request-{index}"), prompt, batch.status)
            failures += [fields["error"]] if "error" in fields else []
            records.append(self._record(index, names) | fields)
        over = {"kind": "batch_over", "number": plan["number"], "status": batch.status}
        self.journal.append_now([*records, over])
        if failures and len(failures) == len(records):
            raise UserError(f"every request of batch {batch.id} failed, the first one with: {failures[0]}")

    def _answer_fields(self, row: Mapping[str, Any] | None, prompt: str, status: str) -> dict[str, Any]:
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        if row is None:
            return {"error": f"batch {status} without an answer", "time": now}
        response = row.get("response") or {}
        body = response.get("body") or {}
        if response.get("status_code") != 200 or not body.get("choices"):
            reason = row.get("error") or body.get("error") or "no choices"
            return {"error": f"{response.get('status_code')}: {reason}", "time": now}
        body |= {"_request_id": response.get("request_id"), "_seconds": None}
        return reply_fields(self.teacher.read_reply(body, prompt)) | {"batch": True}
