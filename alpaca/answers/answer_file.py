"""A file of tasks to a file of answers, batch by batch, going on where a killed run stopped."""

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alpaca.answers.answering import Answer, Sampling, answer_batch, prompt_ids, room_for_answer
from alpaca.answers.loading import load_model
from alpaca.common.answer_journal import AnswerJournal, answered_row
from alpaca.common.errors import UserError
from alpaca.common.run_record import run_record


def answer_file(
    model,
    tokenizer,
    tasks: Sequence[dict],
    journal: AnswerJournal,
    sampling: Sampling,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Answers every task that `journal` does not hold yet, batch by batch. Returns figures of the work done.

    The figures: `answers` and `tokens` generated now, `seconds`, `tokens_per_second`.
    """
    import torch
    from tqdm import tqdm

    prompts = [prompt_ids(tokenizer, task) for task in tasks]
    rooms = [room_for_answer(model, prompt, sampling.max_new_tokens) for prompt in prompts]
    missing = [row for row in range(len(tasks)) if row not in journal.answers]
    too_long = {row: dataclasses.asdict(Answer("", "prompt_too_long", 0)) for row in missing if rooms[row] < 1}
    if too_long:
        journal.add(too_long)
        print(
            f"warning: {len(too_long)} prompts are longer than the model's context and get empty answers: rows "
            f"{', '.join(str(row + 1) for row in list(too_long)[:10])}",
            file=sys.stderr,
        )
    # Prompts of like length share a batch, the longest first: where memory is short it shows at once. A row whose
    # context ends early goes alone, so that it does not cut its neighbours short.
    order = sorted((row for row in missing if rooms[row] > 0), key=lambda row: -len(prompts[row]))
    tight = [[row] for row in order if rooms[row] < sampling.max_new_tokens]
    free = [row for row in order if rooms[row] == sampling.max_new_tokens]
    batches = tight + [free[i : i + batch_size] for i in range(0, len(free), batch_size)]

    begin, tokens = time.monotonic(), 0
    with tqdm(total=len(tasks), initial=len(journal.answers), unit="task", disable=None) as bar:
        for rows in batches:
            try:
                answers = answer_batch(model, tokenizer, [tasks[row] for row in rows], sampling, rows)
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"the GPU's memory is too small for {len(rows)} tasks at once. The same command with a lower "
                    "--batch_size goes on; the answers so far are kept."
                ) from error
            journal.add({row: dataclasses.asdict(answer) for row, answer in zip(rows, answers, strict=True)})
            tokens += sum(answer.tokens for answer in answers)
            bar.update(len(rows))
            bar.set_postfix_str(f"{tokens / (time.monotonic() - begin):.0f} tokens/s")
    seconds = time.monotonic() - begin
    return {
        "answers": len(missing),
        "tokens": tokens,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(tokens / seconds, 2) if tokens else 0.0,
    }


def weights_identity(path: str) -> dict[str, Any]:
    """Size and time of a checkpoint's weight files: answers of another checkpoint under the same name are not mixed."""
    files = sorted(Path(path).glob("*.safetensors")) if Path(path).is_dir() else []
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def answer_tasks(
    model_name_or_path: str,
    tasks: Sequence[dict],
    output_path: str,
    sampling: Sampling,
    batch_size: int = 8,
    device: str | None = None,
    dtype: str | None = None,
    adapter: str | None = None,
    overwrite: bool = False,
    generator: str | None = None,
    data_path: str | None = None,
) -> dict[str, Any]:
    """Answers `tasks` with a local model into `output_path` (JSON or JSONL), going on after an interruption.

    Each row keeps its task's fields; `output` is the answer, `reference` the task's own output, `generator` the name
    given or the model's path. Leaves OUTPUT's run record beside it. Returns the figures of `answer_file`.
    """
    if batch_size < 1:
        raise UserError("--batch_size must be at least 1.")
    settings = {
        "model": model_name_or_path, "adapter": adapter, "weights": weights_identity(model_name_or_path),
        "tasks": hashlib.sha256(json.dumps(tasks, sort_keys=True).encode()).hexdigest(), "rows": len(tasks),
        "dtype": dtype, **dataclasses.asdict(sampling),
    }  # fmt: skip
    output = Path(output_path)
    with (
        AnswerJournal(output, settings, overwrite) as journal,
        run_record(output.parent, settings, [data_path] if data_path else [], f"{output.stem}.run.json") as record,
    ):
        if journal.answers:
            print(f"{len(journal.answers)} of {len(tasks)} answers are there already; going on with the rest.")
        model, tokenizer = load_model(model_name_or_path, device, dtype, adapter)
        record["figures"] = answer_file(model, tokenizer, tasks, journal, sampling, batch_size)
        name = generator or str(adapter or model_name_or_path)
        journal.finish([answered_row(task, journal.answers[row], name) for row, task in enumerate(tasks)])
    return record["figures"]
