"""The Alpaca prompt. Models in the wild were trained on exactly these bytes: LF line ends, no blank at the end."""

import json
from collections.abc import Mapping
from typing import Any

IGNORE_INDEX = -100  # the label of a token without loss

PROMPT_DICT = {
    "prompt_input": (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
    ),
    "prompt_no_input": (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:"
    ),
}


def format_prompt(task: Mapping[str, Any]) -> str:
    """The training prompt of one task; a null, missing or blank input selects the template without input."""
    instruction, context = task["instruction"], task.get("input") or ""
    # Not str.format: braces in the data are text.
    if context.strip():
        head, rest = PROMPT_DICT["prompt_input"].split("{instruction}")
        middle, tail = rest.split("{input}")
        return f"{head}{instruction}{middle}{context}{tail}"
    head, tail = PROMPT_DICT["prompt_no_input"].split("{instruction}")
    return f"{head}{instruction}{tail}"


def alpaca_chat_template(add_bos: bool) -> str:
    """The training prompt as a Jinja chat template, so that chat servers feed a checkpoint what it was trained on.

    The first user message becomes the instruction of the prompt without input; further turns follow it in the same
    headings. A system message stands before the instruction as a paragraph of its own. `add_bos`: whether the
    tokenizer itself puts its BOS before plain text (chat templates are tokenised without special tokens).
    """
    preamble = json.dumps(PROMPT_DICT["prompt_no_input"].split("### Instruction:")[0])
    bos = "{{ bos_token }}" if add_bos else ""
    return (
        bos + "{{ " + preamble + " }}"
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
        "{% elif message['role'] == 'user' %}"
        "{{ '### Instruction:\\n' + message['content'] + '\\n\\n### Response:' }}"
        "{% elif message['role'] == 'assistant' %}"
        "{{ message['content'] + eos_token }}{% if not loop.last %}{{ '\\n\\n' }}{% endif %}"
        "{% endif %}{% endfor %}"
    )
