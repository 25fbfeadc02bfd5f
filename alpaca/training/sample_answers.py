"""Answers of the model in training to a few tasks, at each evaluation: does it follow instructions yet, does it end?

python train.py configs/lora.yaml --val_size 200 --eval_strategy steps --eval_steps 50 --sample_tasks tasks.json ...
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from alpaca.common.files import write_jsonl
from alpaca.common.journal import read_records
from alpaca.common.prompt import format_prompt
from alpaca.common.tasks import load_tasks
from alpaca.training.arguments import named_paths
from alpaca.training.data import decode_answer, encode_prompts

MAX_NEW_TOKENS = 64


class SampleAnswers(TrainerCallback):
    """Greedy answers to the tasks of `--sample_tasks`: printed, in sample_answers.jsonl, in the tracker, in the report.

    One task at a time: an answer is then that of inference.py, which no padding can tip. Every process answers every
    task, so that the gathers of FSDP2 and ZeRO-3 meet. Raises UserError where the file cannot be read.
    """

    def __init__(self, trainer, tokenizer, path: str, say=print):
        self.trainer, self.tokenizer, self.say = trainer, tokenizer, say
        self.tasks = [task for name in named_paths(path) for task in load_tasks(name, require_output=False)]
        self.prompts = encode_prompts(tokenizer, [format_prompt(task) for task in self.tasks])
        self.seconds, self.last = 0.0, []
        self.by_step: dict[int, list[dict[str, Any]]] = {}
        self.written: set[int] = set()  # steps in the file, on the first process

    def on_train_begin(self, args, state, control, **kwargs):
        file = self.file(args)
        if args.process_index == 0:  # a resumed run keeps the answers up to its checkpoint
            earlier = read_records(file) if state.global_step and file.is_file() else []
            earlier = [row for row in earlier if row["step"] <= state.global_step]
            self.written = {row["step"] for row in earlier}
            write_jsonl(file, earlier)

    def on_evaluate(self, args, state, control, **kwargs):
        self.answer(args, state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        # What is saved: with --load_best_model_at_end the model of an earlier step, which is loaded by now.
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        step = int(best.rsplit("-", 1)[1]) if best else state.global_step
        if step not in self.by_step:
            self.answer(args, step)
        self.last = self.by_step[step]
        share = self.seconds / max(self.trainer.report.totals["seconds"], 1e-9)
        self.say(f"sample answers took {self.seconds:.1f} s, {share:.1%} of the training time")

    def file(self, args) -> Path:
        return Path(args.output_dir) / "sample_answers.jsonl"

    def answer(self, args, step: int) -> None:
        begin = time.monotonic()
        texts = [self.continuation(ids) for ids in self.prompts]
        self.seconds += time.monotonic() - begin
        self.last = self.by_step[step] = [
            {"step": step, "instruction": task["instruction"], "input": task["input"], **text}
            for task, text in zip(self.tasks, texts, strict=True)
        ]
        if args.process_index == 0 and step not in self.written:  # a resumed run can come back to an earlier best step
            self.written.add(step)
            with open(self.file(args), "a", encoding="utf-8") as stream:
                stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in self.last)
            for row in self.last:
                print(f"step {step}: {row['instruction'][:100]}\n    {as_line(row)}", flush=True)
            track(self.last, step, args.report_to, self.trainer.callback_handler.callbacks)

    def continuation(self, ids: list[int]) -> dict[str, Any]:
        """The answer to a prompt, and whether it ended by itself within MAX_NEW_TOKENS."""
        # What is wrapped for the steps: gathers happen in its layers. DistributedDataParallel alone has nothing to add.
        model = self.trainer.accelerator.unwrap_model(self.trainer.model_wrapped, keep_torch_compile=False)
        trained = model.training
        model.eval()
        prompt = torch.tensor([ids], device=self.trainer.args.device)
        try:
            with torch.no_grad():
                whole = model.generate(
                    input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=MAX_NEW_TOKENS,
                    do_sample=False, num_beams=1, use_cache=True, eos_token_id=self.tokenizer.eos_token_id,
                    pad_token_id=self.tokenizer.pad_token_id,
                    # Not those of the base's generation_config.json, as in inference.py.
                    repetition_penalty=1.0, no_repeat_ngram_size=0, min_length=0,
                )[0].tolist()  # fmt: skip
        finally:
            model.train(trained)
        answer = decode_answer(self.tokenizer, ids, whole[len(ids) :])
        return {"answer": answer, "ended": whole[-1] == self.tokenizer.eos_token_id}


def as_line(row: dict[str, Any]) -> str:
    return " ".join(row["answer"].split())[:200] + ("" if row["ended"] else " [...]")


def track(rows: list[dict[str, Any]], step: int, report_to: list[str], callbacks: list[TrainerCallback]) -> None:
    """The answers as text in each tracker of the run that shows text."""
    columns = ["instruction", "input", "answer", "ended"]
    values = [[row[name] for name in columns] for row in rows]
    if "tensorboard" in report_to:
        writer = next(each.tb_writer for each in callbacks if isinstance(each, TensorBoardCallback))
        text = "\n\n".join(f"**{row['instruction']}**\n\n{row['input']}\n\n> {row['answer']}" for row in rows)
        writer.add_text("sample_answers", text, step)
    if "wandb" in report_to:
        import wandb  # optional

        wandb.log({"sample_answers": wandb.Table(columns=columns, data=values)})
    if "trackio" in report_to:
        import trackio  # optional

        trackio.log({"sample_answers": trackio.Table(columns=columns, data=values)})
