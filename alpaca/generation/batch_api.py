"""Generation over OpenAI's Batch API: half the price, within a day, and never submitted twice.

The journal keeps what was planned and submitted, so a run can stop at any moment.
"""

import asyncio
import json
import math
import uuid
from collections.abc import Mapping
from typing import Any

import openai

from alpaca.common.errors import UserError
from alpaca.generation.many_requests import RequestFailed
from alpaca.generation.run import FEW_IN_A_ROW, Run, failure_fields, reply_fields
from alpaca.generation.summary import empty_replies

MAX_REQUESTS = 20_000  # of one batch; OpenAI takes 50,000
MAX_BYTES = 150_000_000  # of one batch; OpenAI takes 200 MB
OVER = ("completed", "failed", "expired", "cancelled")
SUBMIT_TRIES = 5


class BatchRun(Run):
    """Submits batches until the target, the budget or the model's ideas are exhausted, or the server refuses."""

    async def run(self) -> None:
        self._answered: list[int] = []  # the positions of requests with a reply
        self._read(self.journal.records)
        self._earlier_requests = len(self.harvest.kept_after)
        try:
            await self._ask_batches()
        except UserError as error:
            self.end, self.error = "error", error
        self.files.write(self.harvest)

    async def _ask_batches(self) -> None:
        """Raises UserError where the server refuses or is lost."""
        try:
            while True:
                plan = self._open_plan()
                if plan is None and (end := self._why_over()):
                    self.end = end
                    break
                plan = plan or await self._make_plan()
                if plan is None:
                    self.end = "budget"
                    break
                if plan["last"] >= plan["first"]:
                    batch = await self._wait(self._batch_id(plan) or await self._submit(plan))
                    await self._collect(batch, plan)
                self.files.write(self.harvest)
        except openai.APIStatusError as error:
            self.client.stop_if_permanent(error)
            raise UserError(f"{self.client.url} refused a batch call ({error.status_code}): {error.message}") from error
        except openai.APIConnectionError as error:
            raise UserError(f"lost {self.client.url}: {error}") from error

    def _read(self, records: list[Mapping[str, Any]]) -> None:
        position = self.prompter.settings.shard.position
        self._answered += [position(r["index"]) for r in records if r["kind"] == "reply" and "text" in r]
        self.harvest.add(records)
        self.harvest.read_rest()

    def _journal(self, records: list[dict[str, Any]]) -> None:
        """Writes records down and reads the replies among them."""
        self.journal.append_now(records)
        for record in records:
            self.budget.count(record)
        self._read(records)

    def _records(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.journal.records if record["kind"] == kind]

    # ------------------------------------------------------------------------------------------------------------------
    # Planning.

    def _open_plan(self) -> dict[str, Any] | None:
        """The planned batch that is not yet over."""
        over = {record["number"] for record in self._records("batch_over")}
        return next((plan for plan in self._records("batch_planned") if plan["number"] not in over), None)

    def _why_over(self) -> str | None:
        if self.harvest.full:
            return "target reached"
        kept, few = self.harvest.kept_after, self.limits.max_requests_without_new
        answered = sorted(i for i in self._answered if self._earlier_requests <= i < len(kept))[-few:]
        if len(answered) == few and kept[-1] == (kept[answered[0] - 1] if answered[0] else self.harvest.imported):
            return "nothing new"
        return None

    def _prompt(self, index: int) -> tuple[str, list[str]]:
        """The prompt of a request and the names of its examples, as GenerationRun would make them."""
        settings, harvest = self.prompter.settings, self.harvest
        if not settings.sample_from_generated:
            return self.prompter.prompt(index, [])
        decided = settings.shard.position(index) - settings.sample_lag + 1
        kept = harvest.kept_after[decided - 1] if decided > 0 else harvest.imported
        return self.prompter.prompt(index, harvest.tasks[:kept])

    def _record(self, index: int, names: list[str]) -> dict[str, Any]:
        return {"kind": "reply", "index": index, "examples": names, "first_number": self.prompter.first_number}

    async def _make_plan(self) -> dict[str, Any] | None:
        """Asks a first request directly, and plans the rest as a batch. None where the budget does not reach."""
        settings, plans = self.prompter.settings, self._records("batch_planned")
        refused = bool(plans) and "room" in self._records("batch_over")[-1]  # its first request has shown what it shows
        first = plans[-1]["first"] - settings.shard.count if refused else await self._ask_first()
        if first is None:
            return None
        made = len(self.harvest.tasks) - self.harvest.imported
        rate = (made + self.limits.expected_tasks_per_request) / (len(self._answered) + 1)  # failures say nothing
        wanted = math.ceil((self.harvest.target - len(self.harvest.tasks)) / max(rate, 0.05))
        if settings.sample_from_generated:
            wanted = min(wanted, settings.sample_lag - 1)
        most, size, count, step = 0.0, 0, 0, settings.shard.count
        while count < min(wanted, self._room()):
            prompt, _ = self._prompt(first + (1 + count) * step)
            most += self.budget.most(prompt, self.client.max_tokens, batch=True)
            size += len(prompt.encode()) + 1000
            if not self.budget.affords(most) or size > MAX_BYTES:
                break
            count += 1
        if count == 0 and wanted > 0:
            return None
        plan = {"kind": "batch_planned", "number": len(plans), "first": first + step, "last": first + count * step}
        plan |= {"run_id": plans[0]["run_id"] if plans else uuid.uuid4().hex, "api": self.client.api}
        plan["left_out"] = sorted(self.client.dropped)
        if count:
            self._journal([plan])
        return plan

    def _room(self) -> int:
        """Requests of the next batch at most: halved where there was no room, doubled behind a batch that got through,
        and anew behind one that was refused, which ended the run."""
        room = MAX_REQUESTS
        for record in self._records("batch_over"):
            got_through = min(2 * room, MAX_REQUESTS) if record["status"] != "failed" else MAX_REQUESTS
            room = record.get("room", got_through)
        return room

    async def _ask_first(self) -> int | None:
        """The number of the first request with a reply, which shows what the model accepts; None beyond the budget.

        Raises UserError after FEW_IN_A_ROW without one: a refusal may be one prompt's alone, but a batch of empty
        replies would be paid for.
        """
        failures = []
        while len(failures) < FEW_IN_A_ROW:
            index = self._next_index()
            prompt, names = self._prompt(index)
            if not self.budget.affords(self.budget.most(prompt, self.client.max_tokens)):
                return None
            try:
                fields = reply_fields(await self.client.ask(prompt, self.prompter.stop))
            except RequestFailed as error:
                fields = failure_fields(error)
            self._journal([self._record(index, names) | fields])
            if fields.get("text", "").strip():
                return index
            failures.append(fields)
        if all("text" in fields for fields in failures):
            raise UserError(empty_replies(fields, len(failures)))
        reason = fields.get("error", "an empty reply")
        raise UserError(f"{len(failures)} requests before a batch failed, the last one with: {reason}")

    def _next_index(self) -> int:
        shard, last = self.prompter.settings.shard, max((r["index"] for r in self._records("reply")), default=-1)
        return shard.item(shard.share(last + 1))

    def _indices(self, plan: Mapping[str, Any]) -> range:
        return range(plan["first"], plan["last"] + 1, self.prompter.settings.shard.count)

    # ------------------------------------------------------------------------------------------------------------------
    # Submitting, waiting, collecting.

    def _batch_id(self, plan: Mapping[str, Any]) -> str | None:
        submitted = (record for record in self._records("batch_submitted") if record["number"] == plan["number"])
        return next((record["batch_id"] for record in submitted), None)

    async def _submit(self, plan: Mapping[str, Any]) -> str:
        """Creates the batch, or finds the one that was created before a crash could note it down."""
        metadata = {"run_id": plan["run_id"], "number": str(plan["number"])}
        file_id = batch_id = None
        for attempt in range(SUBMIT_TRIES):
            batch_id = await self._find_batch(metadata)
            if batch_id is not None:
                break
            file_id = file_id or await self._upload(plan)
            try:
                # No retries of the SDK's: a lost answer may stand for a batch that exists.
                batch = await self.client.sdk.with_options(max_retries=0).batches.create(
                    input_file_id=file_id,
                    endpoint="/v1" + ("/completions" if plan["api"] == "completions" else "/chat/completions"),
                    completion_window="24h",
                    metadata=metadata,
                )
            except (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError):
                if attempt + 1 == SUBMIT_TRIES:
                    raise
                await asyncio.sleep(2**attempt)
            else:
                batch_id = batch.id
                break
        self._journal([{"kind": "batch_submitted", "number": plan["number"], "batch_id": batch_id}])
        print(f"batch {batch_id}: {len(self._indices(plan)):,} requests submitted; it goes on if this ends")
        return batch_id

    async def _find_batch(self, metadata: Mapping[str, str]) -> str | None:
        async for batch in self.client.sdk.batches.list(limit=100):
            if batch.metadata and all(batch.metadata.get(name) == value for name, value in metadata.items()):
                return batch.id
        return None

    async def _upload(self, plan: Mapping[str, Any]) -> str:
        """The batch's input file at the server; one that was uploaded before a crash is used again."""
        name = f"{plan['run_id']}-{plan['number']}.jsonl"
        async for file in self.client.sdk.files.list(purpose="batch"):
            if file.filename == name:
                return file.id
        self.client.api = plan["api"]
        self.client.dropped.update(plan["left_out"])
        lines = []
        for index in self._indices(plan):
            path, body = self.client.request(self._prompt(index)[0], self.prompter.stop)
            row = {"custom_id": f"request-{index}", "method": "POST", "url": "/v1" + path, "body": body}
            lines.append(json.dumps(row) + "\n")
        file = await self.client.sdk.files.create(file=(name, "".join(lines).encode()), purpose="batch")
        return file.id

    async def _wait(self, batch_id: str):
        shown = None
        while True:
            batch = await self.client.sdk.batches.retrieve(batch_id)
            done = batch.request_counts.completed if batch.request_counts else 0
            if (batch.status, done) != shown:
                shown = (batch.status, done)
                print(f"batch {batch_id}: {batch.status}, {done:,} done", flush=True)
            if batch.status in OVER:
                return batch
            await asyncio.sleep(self.limits.batch_poll_seconds)

    async def _collect(self, batch, plan: Mapping[str, Any]) -> None:
        """Journals every reply that is not there yet; requests without one are journaled as failed."""
        over = {"kind": "batch_over", "number": plan["number"], "status": batch.status}
        if batch.status == "failed":
            errors = (batch.errors.data or []) if batch.errors else []
            reason = "; ".join(str(error.message) for error in errors[:3]) or "no reason given"
            number = len(self._indices(plan))
            # OpenAI limits how many tokens may wait in all batches of an account: fewer at a time get through.
            if number > 1 and any(error.code == "token_limit_exceeded" for error in errors):
                self._journal([over | {"room": number // 2}])
                print(f"note: OpenAI has no room for {number:,} requests: {reason}\nThe next batch has half as many.")
                await asyncio.sleep(self.limits.batch_poll_seconds)
                return
            self._journal([over])
            raise UserError(f"OpenAI refused batch {batch.id}: {reason}")
        there = {record["index"] for record in self._records("reply")}
        rows = {}
        for file_id in filter(None, (batch.output_file_id, batch.error_file_id)):
            content = await self.client.sdk.files.content(file_id)
            for line in content.content.splitlines():  # of bytes: JSON texts may hold Unicode's own line ends
                row = json.loads(line)
                rows[row["custom_id"]] = row
        records = []
        for index in self._indices(plan):
            if index not in there:
                prompt, names = self._prompt(index)
                fields = self._reply_fields(rows.get(f"request-{index}"), prompt, batch.status)
                records.append(self._record(index, names) | fields)
        self._journal([*records, over])
        failures = [record["error"] for record in records if "error" in record]
        if failures and len(failures) == len(records):
            raise UserError(f"every request of batch {batch.id} failed, the first one with: {failures[0]}")

    def _reply_fields(self, row: Mapping[str, Any] | None, prompt: str, status: str) -> dict[str, Any]:
        """What the journal says of one line of a batch's output (None: it has no such line)."""
        if row is None:
            return failure_fields(RequestFailed(f"batch {status}", "no answer to this request"))
        response = row.get("response") or {}
        body = response.get("body") or {}
        if response.get("status_code") != 200 or not body.get("choices"):
            reason = row.get("error") or body.get("error") or "no choices"
            return failure_fields(RequestFailed(str(response.get("status_code")), str(reason), row))
        try:
            reply = self.client.read_reply(body, prompt, response.get("request_id"))
        except Exception as error:  # whatever form it has: it is paid for
            return failure_fields(RequestFailed("unreadable reply", repr(error), row))
        return reply_fields(reply) | {"batch": True}
