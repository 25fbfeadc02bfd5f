"""What a model is asked: the generation prompt with its example tasks, and the question for a separate answer."""

import hashlib
import json
import os
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alpaca.common.errors import UserError
from alpaca.common.files import read_text
from alpaca.common.paths import ROOT
from alpaca.common.tasks import load_tasks
from alpaca.generation.settings import GenerationSettings

PROMPT_FILE = ROOT / "prompt.txt"

# The first half of --answer_separately: tasks without their answers, in few words, because small models lose track of
# a long prompt.
INSTRUCTIONS_PROMPT = (
    "Here is a list of {num_tasks} different tasks that people gave to a helpful assistant. Each task can be done by "
    "reading and writing text alone. Input is the text that the instruction speaks of, or <noinput>."
)


def encode_prompt(
    prompt_instructions: Sequence[Mapping], prompt_text: str | None = None, num_tasks: int = 20, outputs: bool = True
) -> str:
    """The generation prompt: the text, the example tasks (instruction, input, output), and the next task's header.

    `prompt_text` defaults to prompt.txt; {num_tasks} in it is replaced. `outputs=False` leaves the answers out, for
    models that are asked for instructions first.
    """
    text = PROMPT_FILE.read_text(encoding="utf-8") if prompt_text is None else prompt_text
    prompt = text.replace("{num_tasks}", str(num_tasks)) + "\n"
    for number, task in enumerate(prompt_instructions, start=1):
        instruction = re.sub(r"\s+", " ", task["instruction"]).strip().rstrip(":")
        context = "<noinput>" if task["input"] == "" else task["input"]
        prompt += f"###\n{number}. Instruction: {instruction}\n{number}. Input:\n{context}\n"
        if outputs:
            prompt += f"{number}. Output:\n{task['output']}\n"
    return prompt + f"###\n{len(prompt_instructions) + 1}. Instruction:"


def next_list_header(num_tasks: int) -> str:
    """The stop string for completion models: the header of a task beyond the list. It can begin no line of an answer
    that the parser would have kept, since at a line's start it begins the next task."""
    return f"\n{num_tasks + 1}. Instruction:"


def answer_prompt(instruction: str, context: str) -> str:
    """What a chat model is asked when a task gets its answer separately: the instruction, and the input below it."""
    return f"{instruction}\n\n{context}" if context else instruction


class Prompter:
    """Draws the examples of a request from the seed and the request's index alone, so that a run can be repeated.

    With `sample_from_generated` K, up to K examples come from tasks that were kept from earlier requests.
    """

    def __init__(self, seeds: Sequence[Mapping], settings: GenerationSettings):
        self.seeds, self.settings = seeds, settings
        self.first_number = settings.num_prompt_instructions + 1  # the number of the first task that is asked for
        self.stop = [next_list_header(settings.num_tasks_per_request)]

    def prompt(self, index: int, generated: Sequence[Mapping]) -> tuple[str, list[str]]:
        """The prompt of request `index`, and the names of its examples: a seed's id, or "generated:ROW".

        generated: the kept tasks that examples may be drawn from.
        """
        rng = random.Random(f"{self.settings.seed}:{index}")
        rows = rng.sample(range(len(generated)), min(self.settings.sample_from_generated, len(generated)))
        chosen = [(generated[row], f"generated:{row}") for row in rows]
        for number in rng.sample(range(len(self.seeds)), self.settings.num_prompt_instructions - len(chosen)):
            chosen.append((self.seeds[number], self.seeds[number]["id"]))
        rng.shuffle(chosen)
        text = encode_prompt(
            [task for task, _ in chosen],
            self.settings.prompt_text,
            self.settings.num_tasks_per_request,
            outputs=not self.settings.answer_separately,
        )
        return text, [name for _, name in chosen]


def load_seeds(path: str) -> list[dict[str, Any]]:
    """The seed tasks, each with an `id`; the shipped file stands in where the default is not in the current folder."""
    if path == "./seed_tasks.jsonl" and not os.path.exists(path):
        path = str(ROOT / "seed_tasks.jsonl")
    return [
        {
            "id": str(seed.get("id", f"row_{row}")),
            **{field: seed[field] for field in ("instruction", "input", "output")},
        }
        for row, seed in enumerate(load_tasks(path))
    ]


def seeds_sha256(seeds: Sequence[Mapping]) -> str:
    return hashlib.sha256(json.dumps(seeds, sort_keys=True).encode()).hexdigest()


def load_prompt(path: str | None, answer_separately: bool) -> str:
    """The text of --prompt_path, or the default one."""
    if path is None:
        return INSTRUCTIONS_PROMPT if answer_separately else PROMPT_FILE.read_text(encoding="utf-8")
    if not Path(path).is_file():
        raise UserError(f"no file {path} for --prompt_path.")
    return read_text(path).replace("\r\n", "\n")
