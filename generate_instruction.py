"""Self-instruct data generation: ask a model, keep every reply, filter, deduplicate, write training data.

    python generate_instruction.py --output_dir out --num_instructions_to_generate 52000 --max_cost_usd 20
    python generate_instruction.py --output_dir out --num_instructions_to_generate 5 --base_url http://127.0.0.1:8080/v1

The first needs OPENAI_API_KEY; the second takes minutes on a CPU, beside `python local_llm.py serve`. More commands:
`rebuild` makes all files again from the kept replies, `check FILE` reports on any data set, `rate FILE` asks a judge
about each row, `clean FILE --output FILE` writes the good rows, `dedup FILE --output FILE` those that repeat no other.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alpaca.common.cli import at_least_one, run_cli
from alpaca.common.errors import UserError
from alpaca.common.journal import Journal
from alpaca.common.run_record import run_record
from alpaca.common.shard import find_shard
from alpaca.common.tasks import load_tasks
from alpaca.generation.data_check import check, clean, dedup
from alpaca.generation.filters import check_seeds, find_word_in_string
from alpaca.generation.harvest import empty_harvest, harvest_journal, read_candidates
from alpaca.generation.many_requests import run_async
from alpaca.generation.output import OutputFiles
from alpaca.generation.prices import DEFAULT_MODEL, DEFAULT_MODEL_EFFORT, Budget, price_for
from alpaca.generation.prompting import PROMPT_FILE, Prompter, encode_prompt, load_prompt, load_seeds, seeds_sha256
from alpaca.generation.server import find_server
from alpaca.generation.settings import GenerationSettings, Limits
from alpaca.generation.shards import find_folders, how_to_go_on, join_shards

__all__ = [
    "encode_prompt", "post_process_gpt3_response", "find_word_in_string", "generate_instruction_following_data",
    "rebuild", "check", "clean", "dedup", "rate",
]  # fmt: skip


def post_process_gpt3_response(num_prompt_instructions: int, response: Mapping | None) -> list[dict[str, str]]:
    """The tasks of one reply that pass the filters: dicts of instruction, input and output.

    response: the reply's `text` (what came after "{num_prompt_instructions + 1}. Instruction:") and `finish_reason`,
    or None, which gives no tasks.
    """
    if response is None:
        return []
    reply = {"index": 0, "first_number": num_prompt_instructions + 1}
    candidates = read_candidates(reply | {name: response[name] for name in ("text", "finish_reason")})
    fields = ("instruction", "input", "output")
    return [{name: getattr(task, name) for name in fields} for task in candidates if not task.reason]


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
    answer_temperature: float | None = None,
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
    shard: str | None = None,
    similarity_figures: bool = True,
) -> None:
    """Asks a model for new tasks until enough are kept. The same command goes on where a run stopped.

    Args:
        output_dir: folder for responses.jsonl (every reply), regen.json, alpaca_data.json, rejections.jsonl, run.json.
        seed_tasks_path: tasks written by people, from which the examples in the prompts are drawn.
        num_instructions_to_generate: tasks to keep in all, those of earlier runs in the folder included.
        model_name: the model that is asked.
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
        answer_temperature: of the separately asked answers; default --temperature. Lists of tasks want variety, answers
            the likeliest words.
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
        shard: I/N: ask only the requests whose index is I modulo N, into the folder shard_I of output_dir, for one Nth
            of the tasks and of the budget; `rebuild --shards` joins the folders. Default: torchrun's RANK and
            WORLD_SIZE, or a Slurm array's variables, else 0/1.
        similarity_figures: the most similar instructions and the mean similarity of each task in regen.json; False
            leaves them out, which harvests a million tasks in two minutes instead of an hour.

    Raises:
        UserError: wrong settings, or a model that cannot be asked; what was answered is kept.
    """
    flags = dict(locals())
    if batch_api and answer_separately:
        raise UserError(
            "--batch_api and --answer_separately cannot be combined: a batch takes hours, answers need two."
        )
    part, seeds = find_shard(shard), load_seeds(seed_tasks_path)
    prompt_text = load_prompt(prompt_path, answer_separately)
    derived = {"prompt_text": prompt_text, "seeds_sha256": seeds_sha256(seeds), "shard": part}
    settings, limits = GenerationSettings.from_flags(flags | derived), Limits.from_flags(flags)
    settings.check(len(seeds))
    limits.check()
    server = None if dry_run else find_server(base_url)

    # Late: openai takes a second, which --help and a line that is refused need not wait for.
    from alpaca.generation.client import served_model
    from alpaca.generation.run import begin_or_go_on
    from alpaca.generation.summary import print_plan

    if server:
        settings = dataclasses.replace(settings, model_name=served_model(base_url, model_name))
    if reasoning_effort is None and settings.model_name == DEFAULT_MODEL:
        settings = dataclasses.replace(settings, reasoning_effort=DEFAULT_MODEL_EFFORT)
    price = price_for(settings.model_name, price_input, price_output, max_cost_usd)
    prompter, target = Prompter(seeds, settings), part.share(num_instructions_to_generate)
    if dry_run:
        check_seeds([task["instruction"] for task in seeds], unicode_dedup)
        print_plan(prompter, price, target, limits, batch_api)
        return
    for name, default in (("num_cpus", 16), ("request_batch_size", 5)):
        if flags[name] != default:
            print(f"note: --{name} has no use any more; --max_concurrency sets how many requests run at a time.")
    folder = Path(str(output_dir))
    if not part.whole:
        folder /= f"shard_{part.index}"
        print(f"note: shard {part}: {target:,} tasks into {folder}.")

    with Journal(folder / "responses.jsonl") as journal:
        begin_or_go_on(journal, settings, seeds, target, change_settings)
        files = OutputFiles(journal, overwrite)
        most = None if max_cost_usd is None else max_cost_usd / part.count
        budget = Budget(price, most, model=settings.model_name)
        recorded = flags | dataclasses.asdict(limits) | {"base_url": server.url, "shard": str(part)}
        recorded |= {"model_name": settings.model_name, "reasoning_effort": settings.reasoning_effort}
        with run_record(folder, recorded, [seed_tasks_path, prompt_path or PROMPT_FILE]) as record:
            # A small model goes on with a list of instructions better than it follows the request for one.
            first_api = "completions" if answer_separately and not server.official else "chat"
            connection = {"base_url": base_url, "first_api": first_api, "max_retries": max_retries}
            connection["request_timeout"] = request_timeout
            record["result"], error = _generate(journal, prompter, limits, budget, files, connection, batch_api)
            if error:
                print(f"The replies are in {journal.path}; the same command goes on from there.")
                raise error


def _generate(
    journal: Journal,
    prompter: Prompter,
    limits: Limits,
    budget: Budget,
    files: OutputFiles,
    connection: Mapping[str, Any],
    batch_api: bool,
) -> tuple[dict[str, Any], BaseException | None]:
    """Asks until the run ends and writes the files; returns the figures for run.json and the error that ended it."""
    from alpaca.generation.batch_api import BatchRun
    from alpaca.generation.client import ModelClient
    from alpaca.generation.run import GenerationRun
    from alpaca.generation.summary import Progress, summarize

    harvest = empty_harvest(journal.records)
    for reply in journal.records:
        budget.count(reply)
    progress = Progress(harvest, journal.records)

    async def ask() -> tuple[dict[str, Any], BaseException | None]:
        client = ModelClient.for_settings(prompter.settings, **connection)
        client.accepted = any("text" in reply for reply in journal.records)
        kind = BatchRun if batch_api else GenerationRun
        generation = kind(client, journal, harvest, prompter, limits, budget, files, progress)
        try:
            await client.check_model()
            await generation.run()
        finally:
            progress.close()
            await client.close()
        return summarize(harvest, journal.records, generation.end, budget, client.counts, limits), generation.error

    try:
        return run_async(ask())
    except KeyboardInterrupt:
        print(f"\nleft at once. `rebuild --output_dir {files.folder}` writes the files from {journal.path}.")
        raise
    finally:
        files.print_left_alone()


def rebuild(
    output_dir: str = "./",
    overwrite: bool = False,
    shards: str | None = None,
    similarity_figures: bool | None = None,
) -> None:
    """Makes regen.json, alpaca_data.json and rejections.jsonl again from output_dir/responses.jsonl, without a request.

    Args:
        output_dir: the folder of a run.
        overwrite: replace files that the run did not write.
        shards: a pattern such as 'out/shard_*': join the replies of these folders into output_dir instead.
        similarity_figures: whether regen.json has them; default as in the run.
    """
    changes = {} if similarity_figures is None else {"similarity_figures": similarity_figures}
    folder, name = Path(str(output_dir)), "responses.jsonl" if shards is None else "written.jsonl"
    folders = [folder] if shards is None else find_folders(shards)
    if not (folders[0] / "responses.jsonl").is_file():
        raise UserError(f"no file {folder}/responses.jsonl: rebuild needs the folder of a run.")
    with Journal(folder / name) as journal:
        files = OutputFiles(journal, overwrite)
        harvest = harvest_journal(journal.records, **changes) if shards is None else join_shards(folders, **changes)
        files.write(harvest)
    source = f"{folder}/responses.jsonl" if shards is None else f"{len(folders)} shards"
    print(f"{len(harvest.tasks):,} tasks and {len(harvest.rejections):,} rejections from {source}")
    files.print_left_alone()
    if shards is not None and not harvest.full:
        print(how_to_go_on(harvest, folders))


def rate(
    path: str,
    output_dir: str,
    model_name: str = DEFAULT_MODEL,
    base_url: str | None = None,
    api: str = "auto",
    limit: int | None = None,
    temperature: float = 0.0,
    max_tokens: int = 128,
    reasoning_effort: str | None = None,
    max_concurrency: int = 32,
    max_retries: int = 6,
    request_timeout: float = 600.0,
    max_cost_usd: float | None = None,
    price_input: float | None = None,
    price_output: float | None = None,
) -> None:
    """Asks a judge to rate each row of a data set from 1 to 5, with a reason. The same command goes on after a stop.

    Args:
        path: alpaca_data.json, regen.json, seed_tasks.jsonl or any JSON list or JSONL file of tasks.
        output_dir: folder for ratings.jsonl, run.json and replies.jsonl, which holds every reply. A row that is rated
            there by the same judge, at the same address and with the same settings, is not paid for again.
        model_name: the judge.
        base_url: server with OpenAI's API; default OPENAI_BASE_URL, then OpenAI.
        api: completions, chat, or auto.
        limit: only the first so many rows.
        temperature: of the judge.
        max_tokens: longest reply; a judge that thinks before it answers needs more.
        reasoning_effort: how long a reasoning model thinks (none, low, ...); the default model does not think.
        max_concurrency: requests under way at the same time.
        max_retries: of one request after connection errors and server errors.
        request_timeout: seconds for one attempt, all in all.
        max_cost_usd: stop before the replies could cost more than this, in US dollars, earlier runs included.
        price_input: US dollars per million tokens of prompt; default configs/prices.json.
        price_output: US dollars per million tokens of reply.

    Raises:
        UserError: a file that cannot be read, or a judge that cannot be asked; what was answered is kept.
    """
    at_least_one(limit=limit, max_tokens=max_tokens, max_concurrency=max_concurrency)
    tasks, folder = load_tasks(path)[:limit], Path(str(output_dir))
    if (folder / "responses.jsonl").exists():
        raise UserError(
            f"--output_dir {folder} holds a run of generation, whose run.json stays. Choose another folder."
        )
    find_server(base_url)

    # Late: openai takes a second.
    from alpaca.generation import rating
    from alpaca.generation.client import ModelClient, served_model

    model_name = served_model(base_url, model_name)
    if reasoning_effort is None and model_name == DEFAULT_MODEL:
        reasoning_effort = DEFAULT_MODEL_EFFORT
    price = price_for(model_name, price_input, price_output, max_cost_usd)
    budget = Budget(price, max_cost_usd, model=model_name)
    settings = {"model_name": model_name, "api": api, "temperature": temperature, "max_tokens": max_tokens}
    settings |= {"reasoning_effort": reasoning_effort, "base_url": base_url, "limit": limit}

    async def ask(journal: Journal) -> rating.Ratings:
        client = ModelClient(
            model_name,
            base_url,
            api,
            temperature=temperature,
            max_tokens=max_tokens,
            reasoning_effort=reasoning_effort,
            max_retries=max_retries,
            request_timeout=request_timeout,
        )
        try:
            return await rating.rate_rows(tasks, client, journal, budget, max_concurrency)
        finally:
            await client.close()

    with Journal(folder / "replies.jsonl") as journal, run_record(folder, settings, [path]) as record:
        for reply in journal.records:
            budget.count(reply)
        ratings = run_async(ask(journal))
        rating.write_ratings(folder / "ratings.jsonl", ratings.rows)
        record["result"] = {"rows": len(tasks), "rated": sum(row["rating"] is not None for row in ratings.rows)}
        print(ratings.table())
        if ratings.error:
            print(f"The replies are in {journal.path}; the same command goes on from there.")
            raise ratings.error
    print(f"next: generate_instruction.py clean {path} --output good.json --ratings {folder} --min_rating 4.5")


if __name__ == "__main__":
    run_cli(
        {
            "generate_instruction_following_data": generate_instruction_following_data,
            "rebuild": rebuild,
            "check": check,
            "clean": clean,
            "dedup": dedup,
            "rate": rate,
        },
        default="generate_instruction_following_data",
    )
