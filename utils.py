"""The importable names of the original's utils: files in and out, the OpenAI call. Not a command.

from utils import jload, jdump, openai_completion, OpenAIDecodingArguments
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from alpaca.common.errors import UserError
from alpaca.common.files import jdump as jdump
from alpaca.common.files import jload as jload
from alpaca.common.prompt import PROMPT_DICT as PROMPT_DICT


@dataclasses.dataclass
class OpenAIDecodingArguments:
    """Decoding settings, with the names and defaults of the original; None is left out of the request."""

    max_tokens: int = 1800
    temperature: float = 0.2
    top_p: float = 1.0
    n: int = 1
    stream: bool = False
    stop: Sequence[str] | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    suffix: str | None = None
    logprobs: int | None = None
    echo: bool = False


def openai_completion(
    prompts: Any,
    decoding_args: OpenAIDecodingArguments,
    model_name: str | None = None,
    sleep_time: float = 2,
    batch_size: int = 1,
    max_instances: int = sys.maxsize,
    max_batches: int = sys.maxsize,
    return_text: bool = False,
    **decoding_kwargs: Any,
) -> Any:
    """Asks an OpenAI-compatible server and returns what the original returned, over chat or completions.

    prompts: a text or a chat message ({"role", "content"}) gives one completion; a list of these, or of conversations
    (lists of messages), gives a list in the same order. With decoding_args.n > 1 each is a list of n completions. A
    completion is its text (`return_text`) or an object with .text, .finish_reason, .total_tokens and the server's other
    fields. OPENAI_BASE_URL and OPENAI_API_KEY choose the server; `model_name` defaults to the
    project's default model.
    Requests run at the same time and wait as long as the server says: `sleep_time` has no use any more, and
    `batch_size` only bounds `max_instances` through `max_batches`.
    Raises UserError, with the server's reason, where a request cannot be answered.
    """
    from alpaca.generation.openai_completion import (
        complete_all,  # late: utils is imported where openai is not installed
    )
    from alpaca.generation.prices import DEFAULT_MODEL

    if decoding_args.stream:
        raise UserError("openai_completion returns whole completions; set stream=False.")
    single = isinstance(prompts, str | Mapping)
    wanted = [prompts] if single else list(prompts)
    wanted = wanted[: max_instances if max_batches == sys.maxsize else max_batches * batch_size]
    # Values that are the API's own defaults are left out: many models refuse parameters that they do not know.
    own_defaults = {"n": 1, "presence_penalty": 0.0, "frequency_penalty": 0.0, "echo": False, "stream": False}
    settings = {
        name: value
        for name, value in {**dataclasses.asdict(decoding_args), **decoding_kwargs}.items()
        if value is not None and own_defaults.get(name) != value
    }
    completions = complete_all(wanted, model_name or DEFAULT_MODEL, settings)
    if return_text:
        completions = [[choice.text for choice in choices] for choices in completions]
    if decoding_args.n == 1:
        completions = [choices[0] for choices in completions]
    return completions[0] if single else completions
