"""A file of tasks to a file of answers by a model behind an OpenAI-compatible server."""

import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alpaca.answers.answer_journal import AnswerJournal, tasks_digest
from alpaca.common.errors import UserError
from alpaca.common.prompt import format_prompt
from alpaca.common.run_record import run_record
from alpaca.generation.client import ModelClient
from alpaca.generation.many_requests import RequestFailed, RequestSlots, run_async
from alpaca.generation.prices import find_price


def write_server_answers(
    tasks: Sequence[dict],
    output_path: str,
    inputs: Sequence[str | os.PathLike],
    settings: dict[str, Any],
    generator: str,
    max_concurrency: int,
    overwrite: bool,
) -> dict[str, Any]:
    """Asks for the answers to `tasks` and writes them as answer_file.write_answers does.

    `settings`: model, base_url, api (chat sends the task as a message, completions the training prompt),
    max_new_tokens, temperature, top_p, and where given reasoning_effort. Raises UserError where a task got no answer;
    the same call asks for it again.
    """
    begin, output = time.monotonic(), Path(output_path)
    settings = {**settings, "rows": len(tasks), "tasks": tasks_digest(tasks)}
    with (
        AnswerJournal(output, settings, overwrite) as journal,
        run_record(output.parent, settings, inputs, f"{output.stem}.run.json") as record,
    ):
        earlier = len(journal.answers)
        usage, failed = run_async(ask_for_missing(tasks, journal, settings, max_concurrency))
        price = find_price(settings["model"])
        record["figures"] = {
            "answers": len(journal.answers) - earlier,
            "tokens": dict(usage),
            "cost_usd": round(price.cost(usage), 6) if price else None,
            "seconds": round(time.monotonic() - begin, 2),
        }
        if failed:
            row, reason = failed[0]
            raise UserError(
                f"{len(failed)} of {len(tasks)} tasks got no answer (row {row + 1}: {reason}). The others are kept in "
                f"{journal.path}; the same command asks again for the missing ones."
            )
        journal.finish(tasks, generator)
    return record["figures"]


async def ask_for_missing(
    tasks: Sequence[dict], journal: AnswerJournal, settings: dict[str, Any], max_concurrency: int
) -> tuple[Counter, list[tuple[int, str]]]:
    """Adds the answers that `journal` lacks: (tokens used by kind, row and reason of each task that got none)."""
    sent = {name: settings[name] for name in ("model", "base_url", "api", "temperature", "top_p")}
    most = settings["max_new_tokens"]
    client = ModelClient(**sent, max_tokens=most, reasoning_effort=settings.get("reasoning_effort"), flag="--model")
    slots = RequestSlots(max_concurrency)
    usage, failed = Counter(prompt=0, completion=0), []

    async def ask(row: int) -> None:
        task = tasks[row]
        message = "\n\n".join(part for part in (task["instruction"], task["input"]) if part.strip())
        async with slots:
            try:
                reply = await client.ask(format_prompt(task) if client.api == "completions" else message)
            except RequestFailed as error:
                failed.append((row, str(error)))
                return
            usage.update(reply.usage)
            answer = {"text": reply.text.strip(), "finish_reason": reply.finish_reason}
            # Thoughts alone are no bad answer.
            if not answer["text"] and reply.finish_reason == "length" and reply.usage.get("reasoning"):
                way_out = "Begin again with --overwrite True and more of them, or with --reasoning_effort low"
                failed.append((row, f"it thought until --max_new_tokens {most} were used up. {way_out}"))
                return
            journal.add({row: {**answer, "tokens": reply.usage["completion"]}})

    try:
        await slots.run(ask(row) for row in range(len(tasks)) if row not in journal.answers)
    finally:
        await client.close()
    return usage, failed
