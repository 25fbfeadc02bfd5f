"""Answers in the terminal: one that streams, a chat, two models side by side."""

import contextlib
import sys
import time
from collections.abc import Sequence
from typing import Any

from alpaca.answers.answering import answers_in_order, stream_answer
from alpaca.answers.loading import load_model
from alpaca.answers.sampling import Sampling
from alpaca.common.errors import UserError


def rate(figures: dict[str, Any]) -> str:
    return (
        f"{figures['answers']} answered now: {figures['tokens']} tokens in {figures['seconds']:.1f} s, "
        f"{figures['tokens_per_second']:.1f} tokens/s."
    )


def print_stream(model, tokenizer, task: dict[str, str], sampling: Sampling) -> None:
    """Prints an answer as its tokens come, and its rate on stderr."""
    begin = time.monotonic()
    with contextlib.closing(stream_answer(model, tokenizer, task, sampling)) as stream:
        while True:
            try:
                print(next(stream), end="", flush=True)
            except StopIteration as end:
                tokens = end.value.tokens
                break
    print()
    seconds = time.monotonic() - begin
    print(f"[{tokens} tokens in {seconds:.1f} s: {tokens / seconds:.1f} tokens/s]", file=sys.stderr)


def print_answers(
    models: dict[str, tuple[str, str | None]],
    tasks: Sequence[dict],
    sampling: Sampling,
    batch_size: int,
    device: str | None,
    dtype: str | None,
) -> None:
    """Answers `tasks` with one model after the other, and prints each task with the answers.

    `models`: a heading for each model's answers -> (path, adapter).
    """
    texts: dict[str, list[str]] = {}
    for name, (path, adapter) in models.items():
        model, tokenizer = load_model(path, device, dtype, adapter)
        begin = time.monotonic()
        done = answers_in_order(model, tokenizer, tasks, sampling, batch_size)
        seconds, tokens = time.monotonic() - begin, sum(answer.tokens for answer in done)
        figures = {"answers": len(done), "tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}
        print(f"{name}: {path}. {rate(figures)}")
        texts[name] = [answer.text for answer in done]
        del model  # two large models need not fit beside each other
    for row, task in enumerate(tasks):
        print(f"\n[{row + 1}] {task['instruction']}")
        if task.get("input"):
            print(f"    input: {task['input']}")
        for name, answers in texts.items():
            print(f"  {name}:\n" + "\n".join("    " + line for line in answers[row].splitlines() or ["(empty)"]))


def chat(model, tokenizer, sampling: Sampling) -> None:
    """Answers what is typed until the input ends or Ctrl-C comes at the prompt."""
    print("Type an instruction, then its input or just Enter. Ctrl-C stops an answer, Ctrl-D leaves.")
    while True:
        try:
            instruction, context = input("\nInstruction: "), ""
            if instruction.strip():
                with contextlib.suppress(EOFError):  # echo "Name three colours." | python inference.py chat
                    context = input("Input: ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not instruction.strip():
            continue
        try:
            print_stream(model, tokenizer, {"instruction": instruction, "input": context}, sampling)
        except KeyboardInterrupt:
            print(" [stopped]")
        except UserError as error:
            print(f"error: {error}")
