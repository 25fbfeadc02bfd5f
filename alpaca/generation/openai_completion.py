"""The original's openai_completion on top of the client; utils.openai_completion calls it."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from alpaca.common.errors import UserError
from alpaca.generation.client import ModelClient, text_of
from alpaca.generation.many_requests import RequestFailed, RequestSlots, run_async


class NotAllAnswered(UserError):
    """`completions`: the choices of each prompt, None where it was not answered. What was answered is paid for."""

    completions: list[list["Completion"] | None]


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

    Raises NotAllAnswered, which has the choices of the others, where a prompt cannot be answered.
    """
    settings = dict(settings)
    max_tokens = settings.pop("max_tokens", None)
    completions: list[list[Completion] | None] = [None] * len(prompts)

    async def ask_all() -> None:
        client, slots = ModelClient(model, max_tokens=max_tokens, extra=settings), RequestSlots(max_concurrency)

        async def ask_one(place: int, prompt: Any) -> None:
            async with slots:
                data, _ = await client.post([prompt] if isinstance(prompt, Mapping) else prompt)
            tokens = data["usage"].get("total_tokens") if isinstance(data.get("usage"), dict) else None
            completions[place] = [
                Completion(
                    choice,
                    text=text_of(choice.get("text")) or text_of((choice.get("message") or {}).get("content")),
                    total_tokens=tokens,
                )
                for choice in data["choices"]
            ]

        try:
            await slots.run(itertools.starmap(ask_one, enumerate(prompts)))
        except (RequestFailed, UserError) as error:
            said = f"{client.url} did not answer: {error}" if isinstance(error, RequestFailed) else str(error)
            answered = sum(choices is not None for choices in completions)
            said += f" {answered} of {len(prompts)} prompts were answered; this error's `completions` has these."
            not_all = NotAllAnswered(said)  # one argument: an error travels between processes
            not_all.completions = completions
            raise not_all from error
        finally:
            await client.close()

    run_async(ask_all())
    return completions
