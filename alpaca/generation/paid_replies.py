"""Replies of a judging model by prompt, each paid for once."""

import asyncio
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from alpaca.common.errors import UserError
from alpaca.common.journal import Journal
from alpaca.common.run_record import now
from alpaca.generation.client import ModelClient
from alpaca.generation.many_requests import RequestFailed, RequestSlots
from alpaca.generation.prices import Budget


class PaidReplies:
    """Asks a model, and keeps each reply in a journal under the sha256 of all that decides it.

    version: of the prompt; replies under different prompts are different measurements. usable: whether a reply serves;
    one that does not is asked for again. Jobs that call `reply` run in `slots.run`. earlier: the keys of replies that
    were there from the start.
    """

    def __init__(
        self,
        client: ModelClient,
        journal: Journal,
        budget: Budget,
        version: str,
        max_concurrency: int,
        usable: Callable[[Mapping[str, Any]], Any] = bool,
    ):
        self.client, self.journal, self.budget, self.version = client, journal, budget, version
        self.slots = RequestSlots(max_concurrency)
        self.asked = self.cached = 0
        self.tokens: Counter[str] = Counter()
        self.cost_of_cached = 0.0
        self._settings = {**client.settings, "max_tokens": client.max_tokens, "api": client.api}
        self._known = {record["key"]: record for record in journal.records if "key" in record and usable(record)}
        self.earlier = frozenset(self._known)
        self._reservation_ended = asyncio.Condition()
        self._under_way = 0  # requests with a reservation; sums of dollars need not come back to 0.0
        self._of_one_key: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def reply(self, prompt: str) -> dict[str, Any]:
        """The record of a reply: `reply`, `usage`, `model`, `date`, and `first_token` where log-probabilities came.

        Raises RequestFailed where this request has none, and UserError where no request can have one or the budget is
        used up.
        """
        identity = [self.client.model, self.client.url, self._settings, self.version, prompt]
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        async with self._of_one_key[key], self.slots:  # rows can be equal: the second waits for the first one's reply
            if key in self._known:
                if key in self.earlier:
                    self.cached += 1
                    self.cost_of_cached += self.budget.cost(self._known[key])
                return self._known[key]
            most = await self._reserve(prompt)
            try:
                return await self._ask(key, prompt)
            finally:  # only now, when the reply's cost is counted: else another request would take its place
                self.budget.reserved -= most
                self._under_way -= 1
                async with self._reservation_ended:
                    self._reservation_ended.notify_all()

    async def _ask(self, key: str, prompt: str) -> dict[str, Any]:
        try:
            reply = await self.client.ask(prompt)
        except RequestFailed as failure:
            if failure.sent is not None:  # it is paid for, whatever it is
                await self.journal.append({"failed": key, "error": str(failure), "sent": failure.sent})
            raise
        record = {
            "key": key,
            "reply": reply.text,
            "finish_reason": reply.finish_reason,
            "usage": reply.usage,
            "model": reply.model,
            "asked": reply.asked,
            "seconds": reply.seconds,
            "prompt_version": self.version,
            "date": now(),
        }
        record |= {"first_token": reply.first_token} if reply.first_token else {}
        await self.journal.append(record)
        self._known[key] = record
        self.asked += 1
        self.tokens.update(reply.usage)
        self.budget.count(record)
        return record

    async def _reserve(self, prompt: str) -> float:
        most = self.budget.most(prompt, self.client.max_tokens)
        async with self._reservation_ended:
            # The first reply shows what a request costs at a server that ignores max_tokens.
            budget = self.budget
            await self._reservation_ended.wait_for(
                lambda: not self._under_way or (budget.affords(most) and (budget.limit is None or budget.longest_reply))
            )
            if not self.budget.affords(most):
                raise UserError(
                    f"the budget of ${self.budget.limit:g} is spent after {self.asked} replies. They are kept in "
                    f"{self.journal.path}; the same command with a higher --max_cost_usd goes on."
                )
            self.budget.reserved += most
            self._under_way += 1
        return most
