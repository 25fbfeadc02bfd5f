"""Answer one instruction, a file of tasks, or chat in the terminal, with the prompt that the model was trained on.

    python inference.py --model_name_or_path ./alpaca-7b --data_path configs/eval_tasks.jsonl --output_path answers.json
    python inference.py --model_name_or_path embedded --instruction "Name three colours." --max_new_tokens 48   # 1 min
    python inference.py chat --model_name_or_path ./alpaca-7b
    python inference.py serve --model_name_or_path ./alpaca-7b --port 8000        # an OpenAI-compatible server of it

A model is a folder with a full checkpoint or a LoRA adapter, a GGUF file, a hub name, or the word `embedded`.
"""

import contextlib
import dataclasses
import importlib.util
import os
import sys
import time
from pathlib import Path
from typing import Any

from alpaca.answers.answer_file import answer_tasks
from alpaca.answers.answering import Sampling, answer_batch, stream_answer
from alpaca.answers.loading import check_model_path, load_model, quiet_bars
from alpaca.common.cli import run_cli
from alpaca.common.errors import UserError
from alpaca.common.files import atomic_dir
from alpaca.common.ports import free_port
from alpaca.common.tasks import load_tasks

# ----------------------------------------------------------------------------------------------------------------------
# Commands.


def answer(
    model_name_or_path: str,
    instruction: str | None = None,
    input: str = "",
    data_path: str | None = None,
    output_path: str | None = None,
    base: str | None = None,
    adapter: str | None = None,
    limit: int | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    num_beams: int = 1,
    seed: int = 0,
    batch_size: int = 8,
    device: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
):
    """Answers one instruction or a file of tasks.

    Args:
        model_name_or_path: A checkpoint's folder, a LoRA adapter's folder, a GGUF file, or "embedded".
        instruction: One instruction; its answer streams to the terminal.
        input: The instruction's input, if it has one.
        data_path: A JSON or JSONL file of tasks (instruction, input) instead of one instruction.
        output_path: Where the answers to data_path go (.json or .jsonl); without it they are printed. The same
            command goes on with an interrupted file.
        base: A second model, usually the one before fine-tuning: answers of both are printed side by side.
        adapter: A LoRA adapter's folder to put on model_name_or_path.
        limit: Only the first so many tasks of data_path.
        max_new_tokens: An answer's greatest length in tokens.
        temperature: 0 takes the likeliest token each time; above 0 samples.
        top_p: Samples only from the likeliest tokens that make up this probability.
        num_beams: Above 1: beam search, in which temperature and top_p have no part.
        seed: Of the sampling; an answer depends on it and on its row, not on the batch.
        batch_size: Tasks answered at once; lower it where memory runs out.
        device: cuda, cpu, or auto (spread over all GPUs).
        dtype: float32, bfloat16 or float16; by default the checkpoint's own.
        overwrite: Begin output_path again.
    """
    sampling = _sampling(max_new_tokens, temperature, top_p, num_beams, seed)
    if (instruction is None) == (data_path is None):
        raise UserError('give --instruction "..." or --data_path FILE (or chat: python inference.py chat --help).')
    if output_path and (base or data_path is None):
        raise UserError("--output_path takes the answers of one model to a --data_path. Leave out --base.")
    tasks = load_tasks(data_path, require_output=False)[:limit] if data_path else [_one_task(instruction, input)]
    quiet_bars()
    if output_path:
        figures = answer_tasks(
            model_name_or_path, tasks, output_path, sampling, batch_size, device, dtype, adapter, overwrite,
            data_path=data_path,
        )  # fmt: skip
        print(f"{output_path}: {len(tasks)} answers. {_rate(figures)}")
        return

    answers: dict[str, list[str]] = {}
    for name, path, on_top in (("base", base, None), ("tuned" if base else "answer", model_name_or_path, adapter)):
        if path is None:
            continue
        model, tokenizer = load_model(path, device, dtype, on_top)
        if instruction is not None and base is None:
            _print_stream(model, tokenizer, tasks[0], sampling)
            return
        begin, done = time.monotonic(), []
        for start in range(0, len(tasks), batch_size):
            rows = range(start, min(start + batch_size, len(tasks)))
            done += answer_batch(model, tokenizer, [tasks[row] for row in rows], sampling, rows)
        seconds = time.monotonic() - begin
        answers[name] = [answer.text for answer in done]
        tokens = sum(answer.tokens for answer in done)
        figures = {"answers": len(done), "tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}
        print(f"{name}: {path}. {_rate(figures)}")
        del model  # two large models need not fit beside each other
    for row, task in enumerate(tasks):
        print(f"\n[{row + 1}] {task['instruction']}")
        if task.get("input"):
            print(f"    input: {task['input']}")
        for name, texts in answers.items():
            print(f"  {name}:\n" + "\n".join("    " + line for line in texts[row].splitlines() or ["(empty)"]))


def _sampling(max_new_tokens: int, temperature: float, top_p: float, num_beams: int, seed: int | None) -> Sampling:
    if num_beams > 1 and temperature > 0:
        print("warning: beam search ignores --temperature and --top_p.", file=sys.stderr)
    return Sampling(max_new_tokens, temperature, top_p, num_beams, seed)


def _one_task(instruction: str, input: str) -> dict[str, str]:
    if not instruction.strip():
        raise UserError("--instruction is blank.")
    return {"instruction": instruction, "input": input}


def _rate(figures: dict[str, Any]) -> str:
    return (
        f"{figures['answers']} answered now: {figures['tokens']} tokens in {figures['seconds']:.1f} s, "
        f"{figures['tokens_per_second']:.1f} tokens/s."
    )


def _print_stream(model, tokenizer, task: dict[str, str], sampling: Sampling) -> None:
    settings, begin = dataclasses.asdict(sampling), time.monotonic()
    with contextlib.closing(stream_answer(model, tokenizer, task["instruction"], task["input"], **settings)) as stream:
        while True:
            try:
                print(next(stream), end="", flush=True)
            except StopIteration as end:
                tokens = end.value.tokens
                break
    print()
    seconds = time.monotonic() - begin
    print(f"[{tokens} tokens in {seconds:.1f} s: {tokens / seconds:.1f} tokens/s]", file=sys.stderr)


def chat(
    model_name_or_path: str,
    adapter: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.7,
    top_p: float = 0.9,
    num_beams: int = 1,
    seed: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
):
    """Answers instructions typed in the terminal, streaming. Each stands alone: Alpaca was trained on single turns.

    Ctrl-C stops an answer, Ctrl-D (or Ctrl-C at the prompt) leaves. Flags as for `answer`; sampling is on by default,
    with another seed each time.
    """
    sampling = _sampling(max_new_tokens, temperature, top_p, num_beams, seed)
    quiet_bars()
    model, tokenizer = load_model(model_name_or_path, device, dtype, adapter)
    print("Type an instruction, then its input or just Enter. Ctrl-C stops an answer, Ctrl-D leaves.")
    while True:
        try:
            instruction = input("\nInstruction: ")
            context = input("Input: ") if instruction.strip() else ""
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not instruction.strip():
            continue
        try:
            _print_stream(model, tokenizer, {"instruction": instruction, "input": context}, sampling)
        except KeyboardInterrupt:
            print(" [stopped]")
        except UserError as error:
            print(f"error: {error}")


def serve(
    model_name_or_path: str,
    port: int = 8000,
    backend: str | None = None,
    adapter: str | None = None,
    merged_dir: str | None = None,
    dtype: str | None = None,
):
    """Serves a checkpoint over the OpenAI API on 127.0.0.1, with vLLM where it is installed, else transformers serve.

    Clients name the model by the path given here. Completions take the training prompt as it is; chat works with the
    template that train.py saves in the tokenizer.

    Args:
        model_name_or_path: A checkpoint's folder, or an adapter's with --merged_dir.
        port: On 127.0.0.1 only.
        backend: vllm or transformers; by default vllm where it is installed.
        adapter: A LoRA adapter's folder to put on model_name_or_path.
        merged_dir: Servers take full checkpoints: where an adapter, a GGUF file or "embedded" is written as one.
        dtype: Of the merged or served weights.
    """
    if backend not in (None, "vllm", "transformers"):
        raise UserError(f"--backend {backend}: choose vllm or transformers.")
    backend = backend or ("vllm" if importlib.util.find_spec("vllm") else "transformers")
    if backend == "vllm" and importlib.util.find_spec("vllm") is None:
        raise UserError("vLLM is not installed here: pip install vllm, or --backend transformers.")
    port = free_port(port)

    needs_merge = adapter or not (Path(model_name_or_path) / "config.json").is_file()
    if needs_merge:
        if merged_dir is None:
            raise UserError(
                f"{adapter or model_name_or_path} is no full checkpoint. Add --merged_dir DIR to write one."
            )
        if (Path(merged_dir) / "config.json").is_file():
            raise UserError(
                f"{merged_dir} holds a checkpoint already. To serve that: --model_name_or_path {merged_dir} alone; to "
                "merge again choose another --merged_dir."
            )
        _write_merged(model_name_or_path, adapter, dtype, merged_dir)
        model_name_or_path = merged_dir
    else:
        check_model_path(model_name_or_path)  # refuses a weight diff

    if backend == "transformers":
        from huggingface_hub.constants import HF_HUB_CACHE

        # Its list of models scans the hub's cache and fails where there is none yet.
        Path(HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)
    if backend == "vllm":
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model_name_or_path]
    else:
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", model_name_or_path]
    command += ["--host", "127.0.0.1", "--port", str(port)] + (["--dtype", dtype] if dtype else [])
    print(f"{' '.join(command)}\nmodel name for clients: {model_name_or_path}   base URL: http://127.0.0.1:{port}/v1")
    sys.stdout.flush()
    os.execv(sys.executable, command)


def _write_merged(path: str, adapter: str | None, dtype: str | None, merged_dir: str) -> None:
    with atomic_dir(merged_dir) as folder:
        model, tokenizer = load_model(path, "cpu", dtype, adapter)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    run_cli({"answer": answer, "chat": chat, "serve": serve}, default="answer")
