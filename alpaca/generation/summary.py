"""What the user sees of a generation run: the plan, the bar, the summary."""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from alpaca.common.cli import command_with
from alpaca.generation.harvest import Harvest
from alpaca.generation.prices import Budget, Price, estimate_tokens
from alpaca.generation.prompting import Prompter
from alpaca.generation.settings import Limits


def print_plan(prompter: Prompter, price: Price | None, target: int, limits: Limits, batch: bool) -> None:
    """What a run would ask and cost."""
    settings = prompter.settings
    prompt, names = prompter.prompt(0, [])
    requests = max(1, round(target / max(limits.expected_tasks_per_request, 1e-9)))
    sample = [estimate_tokens(prompter.prompt(index, [])[0]) for index in range(min(requests, 50))]
    prompt_tokens = requests * sum(sample) // len(sample)
    # 100 tokens a task, headers included: the released Alpaca data has 65 in the answer, about 25 before it.
    a_task = 35 if settings.answer_separately else 100
    completion_tokens = requests * min(a_task * settings.tasks_per_reply, settings.max_tokens)
    if settings.answer_separately:  # each kept task's answer: the instruction with its chat wrapping, and the answer
        prompt_tokens, completion_tokens = prompt_tokens + 50 * target, completion_tokens + 65 * target
    print(f"{prompt}\n\n--- the first prompt ends here (examples: {', '.join(names)}) ---")
    print(f"about {requests:,} requests for {target:,} tasks, at {limits.expected_tasks_per_request:.1f} kept a reply")
    if settings.answer_separately:
        print(f"and {target:,} requests for the answers, at least")
    print(f"about {prompt_tokens:,} tokens of prompts and {completion_tokens:,} tokens of replies")
    if price is None:
        print("cost unknown: give --price_input and --price_output in USD per million tokens")
    else:
        cost = price.cost({"prompt": prompt_tokens, "completion": completion_tokens}, batch)
        print(f"about ${cost:.2f} with {settings.model_name}{' over the Batch API' if batch else ''}")


class Progress:
    """The bar: kept tasks, with tokens, money spent, the projected total, and the rates."""

    def __init__(self, harvest: Harvest, records: Sequence[Mapping[str, Any]]):
        self.replies = self.tokens = 0
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
        self.clear, self.close = self.bar.clear, self.bar.close

    def count(self, record: Mapping[str, Any]) -> None:
        if "usage" in record:
            self.replies += record["kind"] == "reply"
            self.tokens += record["usage"]["prompt"] + record["usage"]["completion"]

    def show(self, harvest: Harvest, budget: Budget) -> None:
        words = [f"{self.replies} replies", f"{self.tokens / 1e6:.3f}M tokens"]
        if budget.price:
            made = len(harvest.tasks) - harvest.imported
            projected = budget.spent * (harvest.target - harvest.imported) / made if made else float("nan")
            words.append(f"${budget.spent:.4f} of about ${projected:.2f}")
        self.bar.set_postfix_str(", ".join(words), refresh=False)
        self.bar.update(len(harvest.tasks) - self.bar.n)


def summarize(
    harvest: Harvest,
    records: Sequence[Mapping[str, Any]],
    end: str,
    budget: Budget,
    counts: Mapping[str, int],
    limits: Limits,
) -> dict[str, Any]:
    """Prints what the run came to, and returns the figures for run.json."""
    replies = [record for record in records if record["kind"] == "reply"]
    answered = [record for record in replies if "text" in record]
    failed = len(replies) - len(answered)
    new = len(harvest.tasks) - harvest.imported
    usage = [record["usage"] for record in records if "usage" in record]
    tokens = {kind: sum(used[kind] for used in usage) for kind in ("prompt", "completion")}
    print(
        f"\n{len(harvest.tasks):,} of {harvest.target:,} tasks kept ({harvest.imported:,} imported). Ended by: {end}."
    )
    per_reply = new / len(answered) if answered else 0.0
    print(f"{len(answered):,} replies, {harvest.read:,} tasks read in them, {per_reply:.2f} kept a reply.")
    for reason, count in harvest.reasons().most_common():
        print(f"  {count:>7,} rejected: {reason}")
    for what, count in sorted(counts.items(), key=lambda item: -item[1]):
        print(f"  {count:>7,} times: {what}")
    if harvest.unreadable:
        print(f"  {len(harvest.unreadable):>7,} replies hold no task")
    if failed:
        print(f"  {failed:>7,} requests failed for good")
    cost = f", ${budget.spent:.4f} (${1000 * budget.spent / new:.4f} per 1,000 tasks)" if budget.price and new else ""
    print(f"{tokens['prompt']:,} tokens of prompts, {tokens['completion']:,} of replies{cost}.")
    for score, one, other in harvest.most_similar_pairs(10):
        print(f"  {score:.3f}  {one[:70]!r} ~ {other[:70]!r}")
    if end == "budget":
        # The flag names the budget of all shards.
        more = math.ceil(200 * max(budget.limit, budget.spent) * harvest.settings.shard.count) / 100
        # torchrun and Slurm give the shard in the environment.
        part = {} if harvest.settings.shard.whole else {"shard": harvest.settings.shard}
        print("The budget is used up. To go on:\n  " + command_with(sys.argv, max_cost_usd=f"{more:g}", **part))
    if end == "nothing new":
        print(
            f"{limits.max_requests_without_new} replies in a row brought no new task. More seeds, a higher "
            "--temperature or --sample_from_generated give the model new ideas."
        )
    return {
        "ended_by": end,
        "tasks": len(harvest.tasks),
        "replies": len(answered),
        "failed_requests": failed,
        "rejected": dict(harvest.reasons()),
        "handled": dict(counts),
        "tokens": tokens,
        "usd": round(budget.spent, 6) if budget.price else None,
    }


def empty_replies(record: Mapping[str, Any], count: int) -> str:
    """What the last of so many empty replies shows, and the flag that helps."""
    usage = record["usage"]
    reasoning = f", {usage['reasoning']} of them reasoning" if usage.get("reasoning") else ""
    return (
        f"{count} replies in a row were empty; the last one ended with finish_reason {record['finish_reason']!r} after "
        f"{usage['completion']} tokens{reasoning}. A model that thinks before it answers may use up all of "
        "--max_tokens: raise it, or give --reasoning_effort none (or low)."
    )
