"""A file of tasks to a file of answers by a local model, in batches, by one process or by several under torchrun."""

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from alpaca.answers.answer_journal import AnswerJournal, PartJournal, tasks_digest
from alpaca.answers.answering import answer_all
from alpaca.answers.loading import load_model
from alpaca.answers.model_paths import check_model
from alpaca.answers.ranks import Ranks, torchrun_ranks
from alpaca.answers.sampling import Sampling
from alpaca.common.errors import UserError
from alpaca.common.run_record import run_record


@dataclasses.dataclass(frozen=True)
class AnswerJob:
    """Which tasks are answered how, by which model. `generator`: the name that the answers carry."""

    model: str
    tasks: Sequence[dict]
    sampling: Sampling
    batch_size: int = 8
    device: str | None = None
    dtype: str | None = None
    adapter: str | None = None
    generator: str | None = None

    def settings(self) -> dict[str, Any]:
        """What decides the answers."""
        return {
            "model": self.model, "adapter": self.adapter,
            "weights": weights_identity(*check_model(self.model, self.adapter)),
            "tasks": tasks_digest(self.tasks), "rows": len(self.tasks), "dtype": self.dtype,
            **dataclasses.asdict(self.sampling),
        }  # fmt: skip


def weights_identity(*paths: str | None) -> dict[str, Any]:
    """Size and time of the weight files of a model and of an adapter on it: answers of other weights under the same
    name are not mixed."""
    files: list[Path] = []
    for path in map(Path, filter(None, paths)):
        files += [path] if path.is_file() else sorted([*path.glob("*.safetensors"), *path.glob("*.bin")])
    return {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def write_answers(
    job: AnswerJob, output_path: str, inputs: Sequence[str | os.PathLike], overwrite: bool = False
) -> dict[str, Any] | None:
    """Answers the tasks of `job` into `output_path` (JSON or JSONL), going on after an interruption.

    Each row keeps its task's fields; `output` is the answer, `reference` the task's own output, `generator` the name
    given or the model's path. `inputs` go into the run record beside OUTPUT. Under torchrun every process calls this
    and answers the rows whose number modulo the number of processes is its rank. Returns what was done now: `answers`,
    `tokens`, `seconds`, `tokens_per_second`; None on all processes but the first.
    """
    output, settings = Path(output_path), job.settings()
    with torchrun_ranks() as ranks:
        if job.device == "auto" and ranks.count > 1:
            raise UserError("--device auto spreads one model over all GPUs; under torchrun each process has its own.")
        if ranks.rank > 0:
            done = set(ranks.share(None))
            with PartJournal(output, settings, ranks.rank) as part:
                figures = answer_share(job, done, part.add, ranks)
            ranks.gather(figures)
            return None
        with (
            AnswerJournal(output, settings, overwrite) as journal,
            run_record(output.parent, settings, inputs, f"{output.stem}.run.json") as record,
        ):
            if journal.answers:
                print(f"{len(journal.answers)} of {len(job.tasks)} answers are there already; going on with the rest.")
            ranks.share(list(journal.answers))
            figures = ranks.gather(answer_share(job, set(journal.answers), journal.add, ranks))
            tokens, seconds = sum(part["tokens"] for part in figures), max(part["seconds"] for part in figures)
            record["figures"] = {
                "answers": sum(part["answers"] for part in figures),
                "tokens": tokens,
                "seconds": round(seconds, 2),
                "tokens_per_second": round(tokens / seconds, 2) if tokens else 0.0,
            }
            journal.take_over_parts()
            journal.finish(job.tasks, job.generator or str(job.adapter or job.model))
    return record["figures"]


def answer_share(
    job: AnswerJob, done: set[int], keep: Callable[[dict[int, dict[str, Any]]], None], ranks: Ranks
) -> dict[str, Any]:
    """Answers this process's rows that are not `done`; `keep` gets the answers by row number, batch by batch."""
    model, tokenizer = load_model(job.model, job.device, job.dtype, job.adapter)
    rows = [row for row in range(ranks.rank, len(job.tasks), ranks.count) if row not in done]
    begin, tokens = time.monotonic(), 0
    with tqdm(total=len(rows), unit="task", disable=True if ranks.rank else None) as bar:
        try:
            for answers in answer_all(model, tokenizer, job.tasks, job.sampling, job.batch_size, rows):
                keep({row: dataclasses.asdict(answer) for row, answer in answers.items()})
                tokens += sum(answer.tokens for answer in answers.values())
                bar.update(len(answers))
                bar.set_postfix_str(f"{tokens / (time.monotonic() - begin):.0f} tokens/s")
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the GPU's memory is too small for {job.batch_size} tasks at once. The same command with a lower "
                "--batch_size goes on; the answers so far are kept."
            ) from error
    return {"answers": len(rows), "tokens": tokens, "seconds": time.monotonic() - begin}
