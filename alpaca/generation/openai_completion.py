"""The original's openai_completion on top of the client; utils.openai_completion calls it."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from alpaca.common.errors import UserError
from alpaca.generation.client import ModelClient, text_of
from alpaca.generation.many_requests import RequestFailed, RequestSlots


class Completion(dict):
    """One choice of a reply: text, finish_reason, total_tokens and the server's fields, as items and as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def complete_all(
    prompts: Sequence[Any], model: str, settings: Mapping[str, Any], max_concurrency: int = 16
) -> list[list[Completion]]:
    """Asks for every prompt (text, chat message or list of chat messages) and returns its choices, in order.

    Raises UserError where a request cannot be answered.
    """
    settings = dict(settings)
    max_tokens = settings.pop("max_tokens", None)

    async def ask_all() -> list[list[Completion]]:
        client, slots = ModelClient(model, max_tokens=max_tokens, extra=settings), RequestSlots(max_concurrency)

        async def ask_one(prompt: Any) -> list[Completion]:
            async with slots:
                try:
                    data, _ = await client.post([prompt] if isinstance(prompt, Mapping) else prompt)
                except RequestFailed as error:
                    raise UserError(f"{client.url} did not answer: {error}") from error
            tokens = data["usage"].get("total_tokens") if isinstance(data.get("usage"), dict) else None
            return [
                Completion(
                    choice,
                    text=text_of(choice.get("text")) or text_of((choice.get("message") or {}).get("content")),
                    total_tokens=tokens,
                )
                for choice in data["choices"]
            ]

        try:
            return await slots.run(map(ask_one, prompts))
        finally:
            await client.close()

    return asyncio.run(ask_all())
