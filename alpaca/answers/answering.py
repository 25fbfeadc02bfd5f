"""From instructions to answers: the training prompt, left-padded batches, seeded sampling, streaming.

answers = answer_batch(model, tokenizer, tasks, Sampling(max_new_tokens=256))
for piece in stream_answer(model, tokenizer, tasks[0], Sampling()): print(piece, end="")
"""

import dataclasses
import hashlib
import os
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from alpaca.answers.loading import not_finite
from alpaca.answers.sampling import Sampling
from alpaca.common.errors import UserError
from alpaca.common.prompt import format_prompt
from alpaca.training.data import decode_answer, encode_prompts


@dataclasses.dataclass(frozen=True)
class Answer:
    """`text` without blanks at its ends; `finish_reason`: stop, or length where no token more was allowed; `tokens`."""

    text: str
    finish_reason: str
    tokens: int


def prompt_ids(tokenizer, task: dict[str, Any]) -> list[int]:
    """Token ids of a task's prompt, as training sees them: with BOS where the tokenizer puts one, never with EOS."""
    return encode_prompts(tokenizer, [format_prompt(task)])[0]


def room_for_answer(model, prompt: Sequence[int], max_new_tokens: int) -> int:
    """How many tokens may follow `prompt`: `max_new_tokens`, or what the model's context leaves (0 or less: none)."""
    context = context_of(model)
    return max_new_tokens if context is None else min(max_new_tokens, context - len(prompt))


def context_of(model) -> int | None:
    """The most tokens of prompt and answer together; None for a model without such a limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def refuse_long_prompts(model, prompts: Sequence[Sequence[int]], way_out: str = "Shorten them.") -> None:
    """Raises UserError, naming up to ten rows, where a prompt leaves no token for an answer in the model's context."""
    long = [f"row {row} ({len(p):,} tokens)" for row, p in enumerate(prompts, 1) if room_for_answer(model, p, 1) < 1]
    if long:
        raise UserError(
            f"{len(long)} of {len(prompts)} prompts leave no room for an answer in the model's context of "
            f"{context_of(model):,} tokens: {', '.join(long[:10])}{', ...' if len(long) > 10 else ''}. {way_out}"
        )


def answer_batch(
    model, tokenizer, tasks: Sequence[dict], sampling: Sampling, row_numbers: Sequence[int] | None = None
) -> list[Answer]:
    """Answers `tasks` in one left-padded batch. `row_numbers` (default 0, 1, ...) seed each row's sampling.

    In float32 greedy answers equal those given one at a time; in half precision a sum taken over another width may
    round otherwise and tip a near tie between two tokens. Raises UserError where a prompt leaves no room for an answer,
    and where the model's scores are not finite.
    """
    prompts = [prompt_ids(tokenizer, task) for task in tasks]
    refuse_long_prompts(model, prompts)
    return _answers(model, tokenizer, prompts, sampling, row_numbers or range(len(prompts)))


def _answers(model, tokenizer, prompts: Sequence[list[int]], sampling: Sampling, rows: Sequence[int]) -> list[Answer]:
    return [
        Answer(decode_answer(tokenizer, prompt, new), "stop" if stopped else "length", len(new) + stopped)
        for prompt, (new, stopped) in zip(prompts, generate(model, prompts, sampling, rows), strict=True)
    ]


def answer_all(
    model, tokenizer, tasks: Sequence[dict], sampling: Sampling, batch_size: int, rows: Iterable[int] | None = None
) -> Iterator[dict[int, Answer]]:
    """Yields the answers to `rows` of `tasks` (default: all) by row number, batch by batch.

    Prompts of like length share a batch, the longest first: where memory is short it shows at once. A row whose context
    ends early goes alone, so that it does not cut its neighbours short. Raises UserError before the first answer where
    a prompt of `tasks` leaves no room for one.
    """
    prompts, most = [prompt_ids(tokenizer, task) for task in tasks], sampling.max_new_tokens
    refuse_long_prompts(model, prompts)
    order = sorted(range(len(tasks)) if rows is None else rows, key=lambda row: -len(prompts[row]))
    tight = [row for row in order if room_for_answer(model, prompts[row], most) < most]
    free = [row for row in order if room_for_answer(model, prompts[row], most) == most]
    for batch in [[row] for row in tight] + [free[i : i + batch_size] for i in range(0, len(free), batch_size)]:
        answers = _answers(model, tokenizer, [prompts[row] for row in batch], sampling, batch)
        yield dict(zip(batch, answers, strict=True))


def answers_in_order(model, tokenizer, tasks: Sequence[dict], sampling: Sampling, batch_size: int) -> list[Answer]:
    """All of answer_all's answers, in the order of the tasks."""
    found: dict[int, Answer] = {}
    for answers in answer_all(model, tokenizer, tasks, sampling, batch_size):
        found |= answers
    return [found[row] for row in range(len(tasks))]


def generate(
    model,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    row_numbers: Sequence[int],
    streamer: Any = None,
    stopped: Callable[[], bool] = lambda: False,
) -> list[tuple[list[int], bool]]:
    """Token ids that follow each prompt, up to the end token (left out), and whether that was reached.

    `prompts`: token ids, a list a row, padded on the left here with a mask of their lengths. `stopped` is asked after
    every token and ends all rows.
    """
    settings, width = model.generation_config, max(map(len, prompts))
    ids = torch.full((len(prompts), width), settings.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1

    def check_scores(input_ids, scores):
        if not torch.isfinite(scores.amax(-1)).all():
            raise not_finite(model)
        return scores

    def ask_stopped(input_ids, scores, **_):
        return torch.full((input_ids.shape[0],), stopped(), dtype=torch.bool, device=input_ids.device)

    processors = [check_scores, *_samplers(sampling, row_numbers)]
    if sampling.repetition_penalty > 1:
        processors.insert(1, RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty, prompt_ignore_length=width))
    out = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=min(room_for_answer(model, prompt, sampling.max_new_tokens) for prompt in prompts),
        do_sample=False,
        num_beams=sampling.num_beams,
        logits_processor=LogitsProcessorList(processors),
        stopping_criteria=StoppingCriteriaList([ask_stopped]),
        streamer=streamer,
    )
    rows = []
    for new in out[:, width:].tolist():
        end = next((i for i, token in enumerate(new) if token in settings.eos_token_id), None)
        rows.append((new[:end], end is not None))
    return rows


def _samplers(sampling: Sampling, row_numbers: Sequence[int]) -> list:
    """What to do to the scores so that their largest is a sample (nothing for greedy and beam search)."""
    if sampling.temperature == 0 or sampling.num_beams > 1:
        return []
    chain = [TemperatureLogitsWarper(float(sampling.temperature)), _GumbelNoise(sampling.seed, row_numbers)]
    if sampling.top_p < 1:
        chain.insert(1, TopPLogitsWarper(float(sampling.top_p)))
    return chain


class _GumbelNoise:
    """Adds Gumbel noise to the scores, from one generator a row: their argmax is then an exact sample of the softmax.

    transformers samples a whole batch from the process's one generator, where a row's draw depends on its neighbours.
    """

    def __init__(self, seed: int | None, row_numbers: Sequence[int]):
        entropy = os.urandom(8).hex() if seed is None else str(seed)
        self.seeds = [
            int.from_bytes(hashlib.sha256(f"{entropy}:{row}".encode()).digest()[:7], "big") for row in row_numbers
        ]
        self.generators: list[torch.Generator] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not self.generators:
            self.generators = [torch.Generator(scores.device).manual_seed(seed) for seed in self.seeds]
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.log()


class _TokenStream:
    """A streamer for generate(): passes on new token ids as they come, without the prompt."""

    def __init__(self, pass_on: Callable[[list[int]], None]):
        self.pass_on, self.prompt_seen = pass_on, False

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_seen:
            self.pass_on(value.flatten().tolist())
        self.prompt_seen = True

    def end(self) -> None:
        pass


def stream_answer(
    model, tokenizer, task: dict[str, Any], sampling: Sampling, stop_event: threading.Event | None = None
) -> Generator[str, None, Answer]:
    """Yields an answer in pieces of text as its tokens come; joined they are the text that `answer_batch` gives.

    With several beams nothing is certain before the end, so the answer comes in one piece. Generation ends early when
    `stop_event` is set or the iterator is closed. The generator returns the whole as an Answer (StopIteration.value).
    Raises UserError as `answer_batch` does.
    """
    prompt = prompt_ids(tokenizer, task)
    refuse_long_prompts(model, [prompt])
    events: queue.SimpleQueue = queue.SimpleQueue()
    closed = threading.Event()

    def stopped() -> bool:
        return closed.is_set() or (stop_event is not None and stop_event.is_set())

    def work() -> None:
        try:
            tokens = _TokenStream(events.put) if sampling.num_beams == 1 else None
            events.put(generate(model, [prompt], sampling, [0], tokens, stopped)[0])
        except BaseException as error:
            events.put(error)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    new: list[int] = []
    sent = ""
    try:
        while True:
            event = events.get()
            if isinstance(event, BaseException):
                raise event
            done = isinstance(event, tuple)
            if done:
                new = event[0]
            else:
                new += [token for token in event if token not in model.generation_config.eos_token_id]
            text = decode_answer(tokenizer, prompt, new)
            # A character of several bytes may still be incomplete.
            if len(text) > len(sent) and (done or not text.endswith("\ufffd")):
                yield text[len(sent) :]
                sent = text
            if done:
                return Answer(text, "stop" if event[1] else "length", len(new) + event[1])
    finally:
        closed.set()
        worker.join()
