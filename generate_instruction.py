"""Self-instruct data generation: ask a teacher, keep every reply, filter, deduplicate, write training data.

    python generate_instruction.py --output_dir out --num_instructions_to_generate 52000 --max_cost_usd 20
    python generate_instruction.py --output_dir out --num_instructions_to_generate 5 --base_url http://127.0.0.1:8080/v1

The first needs OPENAI_API_KEY; the second takes minutes on a CPU, beside `python local_llm.py serve`. More commands:
`rebuild` makes all files again from the kept replies, `check FILE` reports on any data set, `clean FILE --output FILE`
writes its good rows.
"""

import asyncio
import json
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alpaca.common.cli import run_cli
from alpaca.common.errors import UserError
from alpaca.common.journal import Journal
from alpaca.common.run_record import run_record, sha256_file
from alpaca.common.tasks import load_tasks
from alpaca.generation import harvest as task_harvest
from alpaca.generation import parsing as task_parsing
from alpaca.generation.data_check import check, clean
from alpaca.generation.filters import find_word_in_string, instruction_problem, normalize_input, output_problem
from alpaca.generation.parsing import encode_prompt
from alpaca.generation.prices import DEFAULT_MODEL, DEFAULT_MODEL_EFFORT, Price, estimate_tokens, price_for
from alpaca.generation.run import FileWriter, GenerationRun, Progress, Prompter
from alpaca.generation.teacher import Teacher, find_server, served_model

__all__ = [
    "encode_prompt", "post_process_gpt3_response", "find_word_in_string", "generate_instruction_following_data",
    "rebuild", "check", "clean",
]  # fmt: skip


def post_process_gpt3_response(num_prompt_instructions: int, response: Mapping | None) -> list[dict[str, str]]:
    """The tasks of one reply that pass the filters: dicts of instruction, input and output.

    response: the reply's `text` (what came after "{num_prompt_instructions + 1}. Instruction:") and `finish_reason`,
    or None, which gives no tasks.
    """
    if response is None:
        return []
    cut = response["finish_reason"] in task_harvest.CUT_OFF
    tasks = []
    for task in task_parsing.parse_reply(response["text"], num_prompt_instructions + 1, cut):
        problem = task.problem or instruction_problem(task.instruction) or output_problem(task.instruction, task.output)
        if not problem:
            tasks.append({"instruction": task.instruction, "input": normalize_input(task.input), "output": task.output})
    return tasks


def generate_instruction_following_data(
    output_dir: str = "./",
    seed_tasks_path: str = "./seed_tasks.jsonl",
    num_instructions_to_generate: int = 100,
    model_name: str = DEFAULT_MODEL,
    num_prompt_instructions: int = 3,
    request_batch_size: int = 5,
    temperature: float = 1.0,
    top_p: float = 1.0,
    num_cpus: int = 16,
    base_url: str | None = None,
    api: str = "auto",
    max_concurrency: int = 32,
    max_tokens: int = 3072,
    reasoning_effort: str | None = None,
    max_retries: int = 6,
    request_timeout: float = 600.0,
    num_tasks_per_request: int = 20,
    prompt_path: str | None = None,
    seed: int = 42,
    sample_from_generated: int = 0,
    sample_lag: int = 64,
    answer_separately: bool = False,
    unicode_dedup: bool = False,
    max_requests_without_new: int = 100,
    expected_tasks_per_request: float | None = None,
    max_cost_usd: float | None = None,
    price_input: float | None = None,
    price_output: float | None = None,
    batch_api: bool = False,
    batch_poll_seconds: float = 30.0,
    dry_run: bool = False,
    change_settings: bool = False,
    overwrite: bool = False,
) -> None:
    """Asks a teacher model for new tasks until enough are kept. The same command goes on where a run stopped.

    Args:
        output_dir: folder for responses.jsonl (every reply), regen.json, alpaca_data.json, rejections.jsonl, run.json.
        seed_tasks_path: tasks written by people, from which the examples in the prompts are drawn.
        num_instructions_to_generate: tasks to keep in all, those of earlier runs in the folder included.
        model_name: the teacher.
        num_prompt_instructions: example tasks in each prompt.
        request_batch_size: no longer used; requests are sent one by one, many at a time (max_concurrency).
        temperature: of the sampling; 1.0 is the widest that teachers still answer well at.
        top_p: of the sampling; lower values cut unlikely words off.
        num_cpus: no longer used; comparing with the pool takes a millisecond on one.
        base_url: server with OpenAI's API, such as http://127.0.0.1:8080/v1; default OPENAI_BASE_URL, then OpenAI.
        api: completions, chat, or auto: chat, or completions where the server has no chat for this model. With
            answer_separately the lists of instructions prefer completions, except at OpenAI.
        max_concurrency: requests under way at the same time.
        max_tokens: longest reply, in tokens.
        reasoning_effort: how long a reasoning model thinks (none, low, ...); the default model does not think.
        max_retries: of one request after connection errors, rate limits and server errors.
        request_timeout: seconds for one attempt, all in all.
        num_tasks_per_request: length of the list that the prompt asks for, its examples included.
        prompt_path: the prompt's text, with {num_tasks} in it; default prompt.txt.
        seed: of the drawing of examples, together with the request's number.
        sample_from_generated: how many of the examples come from kept tasks of earlier replies.
        sample_lag: these are taken from requests at least so much earlier; it also bounds the concurrency then.
        answer_separately: ask for instructions first and for each answer on its own over chat; for small teachers.
        unicode_dedup: tokens of any script count in the comparison, and instructions in any script pass.
        max_requests_without_new: end after so many replies in a row without a task that is kept.
        expected_tasks_per_request: a first guess that decides how many requests start at once, before replies tell;
            default 0.6 of what the list has room for.
        max_cost_usd: stop before the replies could cost more than this, in US dollars, earlier runs included.
        price_input: US dollars per million tokens of prompt; default configs/prices.json.
        price_output: US dollars per million tokens of reply.
        batch_api: use OpenAI's Batch API: half the price, within a day.
        batch_poll_seconds: how often a batch's state is asked for.
        dry_run: print the first prompt, the number of requests and the estimated cost; ask nothing.
        change_settings: go on in a folder whose replies were made with other settings.
        overwrite: replace output files that this run did not write.

    Raises:
        UserError: wrong settings, or a teacher that cannot be asked; what was answered is kept.
    """
    output_dir = str(output_dir)  # a folder named 2026 arrives as a number
    if batch_api and answer_separately:
        raise UserError(
            "--batch_api and --answer_separately cannot be combined: a batch takes hours, answers need two."
        )
    if not 0 <= sample_from_generated <= num_prompt_instructions < num_tasks_per_request:
        raise UserError(
            "expected 0 <= --sample_from_generated <= --num_prompt_instructions < --num_tasks_per_request, found "
            f"{sample_from_generated}, {num_prompt_instructions}, {num_tasks_per_request}."
        )
    for name, value in {"max_concurrency": max_concurrency, "max_tokens": max_tokens, "sample_lag": sample_lag}.items():
        if value < 1:
            raise UserError(f"--{name} must be at least 1, found {value}.")
    if not dry_run:
        find_server(base_url)  # complains before anything else happens
        model_name = served_model(base_url, model_name)
    price = price_for(model_name, price_input, price_output, max_cost_usd)
    if reasoning_effort is None and model_name == DEFAULT_MODEL:
        reasoning_effort = DEFAULT_MODEL_EFFORT
    seeds = load_seeds(seed_tasks_path)
    if len(seeds) < num_prompt_instructions:
        raise UserError(f"{seed_tasks_path} has {len(seeds)} tasks, fewer than --num_prompt_instructions.")
    prompt_text = load_prompt(prompt_path, answer_separately)
    # What decides which replies come and what is kept of them. A folder holds replies of one such set.
    settings = {
        "model_name": model_name,
        "temperature": temperature,
        "top_p": top_p,
        "max_tokens": max_tokens,
        "reasoning_effort": reasoning_effort,
        "api": api,
        "seed": seed,
        "num_prompt_instructions": num_prompt_instructions,
        "num_tasks_per_request": num_tasks_per_request,
        "sample_from_generated": sample_from_generated,
        "sample_lag": sample_lag,
        "answer_separately": bool(answer_separately),
        "unicode_dedup": bool(unicode_dedup),
        "prompt_path": prompt_text,
        "seed_tasks_path": seeds_fingerprint(seeds),
    }
    room = num_tasks_per_request - num_prompt_instructions
    limits = {
        "max_concurrency": min(max_concurrency, sample_lag) if sample_from_generated else max_concurrency,
        "max_cost_usd": max_cost_usd,
        "max_requests_without_new": max_requests_without_new,
        "batch_poll_seconds": batch_poll_seconds,
        "expected_tasks_per_request": 0.6 * room if expected_tasks_per_request is None else expected_tasks_per_request,
    }
    prompter = Prompter(seeds, settings, prompt_text)
    if dry_run:
        print_plan(prompter, price, num_instructions_to_generate, limits, batch_api)
        return
    for name, value, default in (("num_cpus", num_cpus, 16), ("request_batch_size", request_batch_size, 5)):
        if value != default:
            print(f"note: --{name} has no use any more; --max_concurrency sets how many requests run at a time.")

    # A small model goes on with a list of instructions better than it follows the wish for one.
    first_api = "completions" if answer_separately and not find_server(base_url)[2] else "chat"
    teacher = Teacher(
        model_name,
        base_url=base_url,
        api=api,
        first_api=first_api,
        temperature=temperature,
        top_p=top_p,
        max_tokens=max_tokens,
        reasoning_effort=reasoning_effort,
        max_retries=max_retries,
        request_timeout=request_timeout,
    )
    journal = Journal(Path(output_dir) / "responses.jsonl")
    try:
        begin_or_go_on(journal, settings, seeds, num_instructions_to_generate, change_settings)
        writer = FileWriter(journal, overwrite)
        refuse_foreign_files(writer)
        record_settings = {**settings, "prompt_path": prompt_path, "seed_tasks_path": seed_tasks_path, **limits}
        record_settings |= {"num_instructions_to_generate": num_instructions_to_generate, "base_url": teacher.url}
        inputs = [seed_tasks_path, prompt_path or task_parsing.PROMPT_FILE]
        with run_record(output_dir, record_settings, inputs) as record:
            if batch_api:
                from alpaca.generation import batch_api as batches

                harvest, why, spent = batches.run(teacher, journal, prompter, price, limits, writer)
                error = None
            else:
                harvest, why, spent, error = ask_until_done(teacher, journal, prompter, price, limits, writer)
            record["result"] = summarize(harvest, journal.records, why, spent, price, teacher.counts, limits)
            print_left_alone(writer)
            if error:
                raise error
    finally:
        journal.close()


def ask_until_done(teacher, journal, prompter, price, limits, writer):
    """Runs the event loop; returns the harvest, why it ended, US dollars spent in all, and the error that ended it."""
    start = _new_harvest(journal.records)
    progress = Progress(start, journal.records, price)

    async def main() -> GenerationRun:
        run = GenerationRun(teacher, journal, start, prompter, price, limits, writer, progress)
        try:
            if not start.full:
                await teacher.check_model()
            await run.run()
        finally:
            await teacher.close()
        return run

    try:
        run = asyncio.run(main())
    except KeyboardInterrupt:
        progress.close()
        replies = sum(r["kind"] == "reply" for r in journal.records)
        print(f"\ninterrupted; {replies} replies are kept in {journal.path}. The same command goes on from there.")
        raise
    finally:
        progress.close()
    return run.harvest, run.why, run.spent, run.error


def _new_harvest(records: Sequence[Mapping]) -> task_harvest.Harvest:
    """A harvest with the journal's settings and nothing read yet."""
    return task_harvest.harvest_journal([record for record in records if record["kind"] == "run"])


# ----------------------------------------------------------------------------------------------------------------------
# Before the first request.


def load_seeds(path: str) -> list[dict[str, Any]]:
    """The seed tasks, each with an `id`; the shipped file stands in where the default is not in the current folder."""
    if path == "./seed_tasks.jsonl" and not Path(path).exists():
        path = str(Path(__file__).with_name("seed_tasks.jsonl"))
    seeds = load_tasks(path)
    return [
        {
            "id": str(seed.get("id", f"row_{row}")),
            **{field: seed[field] for field in ("instruction", "input", "output")},
        }
        for row, seed in enumerate(seeds)
    ]


def seeds_fingerprint(seeds: Sequence[Mapping]) -> str:
    import hashlib

    return hashlib.sha256(json.dumps(seeds, sort_keys=True).encode()).hexdigest()


def load_prompt(path: str | None, answer_separately: bool) -> str:
    if path is None:
        if answer_separately:
            return task_parsing.INSTRUCTIONS_PROMPT
        return task_parsing.PROMPT_FILE.read_text(encoding="utf-8")
    if not Path(path).is_file():
        raise UserError(f"no file {path} for --prompt_path.")
    return Path(path).read_text(encoding="utf-8")


def begin_or_go_on(
    journal: Journal, settings: Mapping[str, Any], seeds: Sequence[Mapping], target: int, change_settings: bool
) -> None:
    """Writes this run's settings into the journal, and imports a regen.json of the original script into a new one.

    Raises UserError where the folder's replies were made with other settings.
    """
    runs = [record for record in journal.records if record["kind"] == "run"]
    begin = {"kind": "run", "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "target": target, "settings": dict(settings)}
    if not runs:
        earlier = journal.path.with_name("regen.json")
        begin["seeds"] = list(seeds)
        if earlier.exists():
            # All in one record, which is there whole or not at all. The checksum makes the file one of this run's own.
            begin |= {"imported": load_tasks(earlier), "sha256": {earlier.name: sha256_file(earlier)}}
            print(f"note: going on from the {len(begin['imported'])} tasks of {earlier}.")
        journal.append_now([begin])
        return
    old = runs[-1]["settings"]
    answered = any(record["kind"] in ("reply", "answer") for record in journal.records)
    changed = [name for name in settings if settings[name] != old.get(name)]
    if "answer_separately" in changed and answered:
        raise UserError(
            f"the replies in {journal.path} were asked for with --answer_separately {old.get('answer_separately')}; "
            "lists with outputs and lists without cannot be mixed. Choose another --output_dir."
        )
    if changed and answered and not change_settings:
        shown = "\n".join(f"  --{name}: {_short(old.get(name))}, now {_short(settings[name])}" for name in changed)
        raise UserError(
            f"the replies in {journal.path} were made with other settings:\n{shown}\n"
            "Use the old ones, choose another --output_dir, or add --change_settings True to mix them."
        )
    if target < runs[-1]["target"]:  # a lower wish takes nothing away that is kept already
        begin["target"] = max(target, len(task_harvest.harvest_journal(journal.records).tasks))
    if changed or begin["target"] != runs[-1]["target"]:
        journal.append_now([begin | ({"seeds": list(seeds)} if "seed_tasks_path" in changed else {})])


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 40 else f"{text[:30]!r}..."


def refuse_foreign_files(writer: FileWriter) -> None:
    """A regen.json that changed since this run wrote it would be lost; alpaca_data.json is only left alone."""
    for path in writer.left_alone:
        if path.name == "alpaca_data.json":
            print(f"note: {path} was not written by this run and is left alone; regen.json gets the same tasks.")
        else:
            raise UserError(f"{path} was not written by this run. Move it away, or add --overwrite True to replace it.")


def print_left_alone(writer: FileWriter) -> None:
    for path in writer.left_alone:
        print(f"note: {path} was left alone; --overwrite True replaces it. train.py takes regen.json too.")


def print_plan(prompter: Prompter, price: Price | None, target: int, limits: Mapping, batch: bool) -> None:
    """What a run would ask and cost."""
    prompt, names = prompter.prompt(0, [])
    print(prompt)
    room = prompter.settings["num_tasks_per_request"] - prompter.settings["num_prompt_instructions"]
    requests = max(1, round(target / max(limits["expected_tasks_per_request"], 1e-9)))
    sample = [estimate_tokens(prompter.prompt(index, [])[0]) for index in range(min(requests, 50))]
    prompt_tokens = requests * sum(sample) // len(sample)
    # 100 tokens a task, headers included: the released Alpaca data has 65 in the answer, about 25 before it.
    separately = prompter.settings["answer_separately"]
    completion_tokens = requests * min((35 if separately else 100) * room, prompter.settings["max_tokens"])
    if separately:  # and each kept task's answer: the instruction with its chat wrapping, and the answer
        prompt_tokens, completion_tokens = prompt_tokens + 50 * target, completion_tokens + 65 * target
    print(f"\n--- the first prompt ends here (examples: {', '.join(names)}) ---")
    print(
        f"about {requests:,} requests for {target:,} tasks, at {limits['expected_tasks_per_request']:.1f} kept a reply"
    )
    if separately:
        print(f"and {target:,} requests for the answers, at least")
    print(f"about {prompt_tokens:,} tokens of prompts and {completion_tokens:,} tokens of replies")
    if price is None:
        print("cost unknown: give --price_input and --price_output in USD per million tokens")
    else:
        cost = price.cost({"prompt": prompt_tokens, "completion": completion_tokens}, batch)
        print(f"about ${cost:.2f} with {prompter.settings['model_name']}{' over the Batch API' if batch else ''}")


# ----------------------------------------------------------------------------------------------------------------------
# After the last one.


def summarize(harvest, records, why, spent, price, counts, limits) -> dict[str, Any]:
    """Prints what the run came to, and returns the figures for run.json."""
    replies = [record for record in records if record["kind"] == "reply"]
    answered = [record for record in replies if "text" in record]
    new = len(harvest.tasks) - harvest.imported
    usage = [record["usage"] for record in records if "usage" in record]
    tokens = {kind: sum(used[kind] for used in usage) for kind in ("prompt", "completion")}
    print(
        f"\n{len(harvest.tasks):,} of {harvest.target:,} tasks kept ({harvest.imported:,} imported). Ended by: {why}."
    )
    per_reply = new / len(answered) if answered else 0.0
    print(f"{len(answered):,} replies, {harvest.parsed:,} tasks read in them, {per_reply:.2f} kept a reply.")
    for reason, count in harvest.reasons().most_common():
        print(f"  {count:>7,} rejected: {reason}")
    for what, count in counts.most_common():
        print(f"  {count:>7,} times: {what}")
    failed = len(replies) - len(answered)
    if failed:
        print(f"  {failed:>7,} requests failed for good")
    print(f"{tokens['prompt']:,} tokens of prompts, {tokens['completion']:,} of replies", end="")
    print(f", ${spent:.4f} (${1000 * spent / new:.4f} per 1,000 tasks)." if price and new else ".")
    for score, one, other in harvest.most_similar_pairs(10):
        print(f"  {score:.3f}  {one[:70]!r} ~ {other[:70]!r}")
    if why == "budget":
        print("The budget is used up. To go on:\n  " + _command_to_go_on(limits["max_cost_usd"] * 2))
    if why == "nothing new":
        print(
            f"{limits['max_requests_without_new']} replies in a row brought no new task. More seeds, a higher "
            "--temperature or --sample_from_generated give the teacher new ideas."
        )
    return {
        "ended_by": why,
        "tasks": len(harvest.tasks),
        "replies": len(answered),
        "failed_requests": failed,
        "rejected": dict(harvest.reasons()),
        "handled": dict(counts),
        "tokens": tokens,
        "usd": round(spent, 6) if price else None,
    }


def _command_to_go_on(budget: float) -> str:
    command = shlex.join(["python", *sys.argv])
    return re.sub(r"--max_cost_usd[= ]\S+", f"--max_cost_usd {budget:g}", command)


def rebuild(output_dir: str = "./", overwrite: bool = False) -> None:
    """Makes regen.json, alpaca_data.json and rejections.jsonl again from output_dir/responses.jsonl, without a request.

    Args:
        output_dir: the folder of a run.
        overwrite: replace files that the run did not write.
    """
    path = Path(str(output_dir)) / "responses.jsonl"
    if not path.is_file():
        raise UserError(f"no file {path}: rebuild needs the folder of a run.")
    journal = Journal(path)
    try:
        if not any(record["kind"] == "run" for record in journal.records):
            raise UserError(f"{path} holds no run.")
        writer = FileWriter(journal, overwrite)
        refuse_foreign_files(writer)
        harvest = task_harvest.harvest_journal(journal.records)
        writer.write(harvest)
    finally:
        journal.close()
    print(f"{len(harvest.tasks):,} tasks and {len(harvest.rejections):,} rejections from {path}")
    print_left_alone(writer)


if __name__ == "__main__":
    run_cli(
        {
            "generate_instruction_following_data": generate_instruction_following_data,
            "rebuild": rebuild,
            "check": check,
            "clean": clean,
        },
        default="generate_instruction_following_data",
    )
