"""The rule of the house, read from the imports of every file.

Every .py at the top level is a command (and utils.py); everything else lies in alpaca/, in rooms. Commands import
rooms, rooms import the rooms below them, nothing imports a command, and nothing imports in a circle.
"""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

COMMANDS = {
    "generate_instruction", "train", "weight_diff", "inference", "evaluation", "demo", "parse_analysis", "local_llm",
    "convert_llama", "fetch_data",
}  # fmt: skip
# A room imports from those before it alone.
ROOMS = ("common", "weights", "generation", "training", "answers")


def module_name(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path, modules: set[str]) -> set[str]:
    """The project's modules that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found & modules


def faults(root: Path) -> list[str]:
    """Every breach of the rule in the project at `root`."""
    files = {module_name(path, root): path for path in [*root.glob("*.py"), *root.glob("alpaca/**/*.py")]}
    packages = {name for name, path in files.items() if path.name == "__init__.py"}
    graph = {name: imports(path, set(files)) - {name} - packages for name, path in files.items()}
    found = []
    for name, path in files.items():
        top = "." not in name and name != "alpaca"
        if top and name not in COMMANDS | {"utils"}:
            found.append(f"{path.name} at the top level is no command")
        if top and name != "utils" and '__name__ == "__main__"' not in path.read_text(encoding="utf-8"):
            found.append(f"{path.name} cannot be run")
        for other in graph[name]:
            if "." not in other and not (top and other == "utils"):
                found.append(f"{name} imports the command {other}")
            elif not top and other.startswith("alpaca."):
                room, others = name.split(".")[1], other.split(".")[1]
                if ROOMS.index(others) > ROOMS.index(room):
                    found.append(f"{name} imports upward: {other}")
    return found + [f"circle: {' -> '.join(circle)}" for circle in circles(graph)]


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """A chain of imports that comes back to its start, for each module that closes one."""
    found, done = [], set()

    def visit(name: str, chain: list[str]) -> None:
        if name in chain:
            found.append([*chain[chain.index(name) :], name])
        elif name not in done:
            for other in sorted(graph[name]):
                visit(other, [*chain, name])
            done.add(name)

    for name in sorted(graph):
        visit(name, [])
    return found


def test_the_rule_holds():
    """Circles (utils -> teacher -> utils) and helpers among the commands had crept in before this was tested."""
    assert faults(ROOT) == []


PLANTED = {
    "circle": {"alpaca/common/a.py": "from alpaca.common import b", "alpaca/common/b.py": "import alpaca.common.a"},
    "upward": {"alpaca/common/a.py": "def f():\n    from alpaca.training import data", "alpaca/training/data.py": ""},
    "the command": {"alpaca/common/a.py": "import train", "train.py": 'if __name__ == "__main__":\n    pass'},
    "no command": {"helper.py": ""},
}


@pytest.mark.parametrize(("expected", "planted"), PLANTED.items())
def test_a_planted_breach_is_found(tmp_path, expected, planted):
    for name, text in planted.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert any(expected in fault for fault in faults(tmp_path)), faults(tmp_path)


# The names that forks import, and the leading arguments that they pass by position.
IMPORTABLE = {
    "generate_instruction": {
        "encode_prompt": ["prompt_instructions"],
        "post_process_gpt3_response": ["num_prompt_instructions", "response"],
        "find_word_in_string": ["w", "s"],
        "generate_instruction_following_data": [
            "output_dir", "seed_tasks_path", "num_instructions_to_generate", "model_name", "num_prompt_instructions",
            "request_batch_size", "temperature", "top_p", "num_cpus",
        ],
    },
    "train": {
        "ModelArguments": ["model_name_or_path"],
        "DataArguments": ["data_path"],
        "TrainingArguments": None,
        "smart_tokenizer_and_embedding_resize": ["special_tokens_dict", "tokenizer", "model"],
        "preprocess": ["sources", "targets", "tokenizer"],
        "SupervisedDataset": ["data_path", "tokenizer"],
        "DataCollatorForSupervisedDataset": ["tokenizer"],
        "make_supervised_data_module": ["tokenizer", "data_args"],
        "train": [],
    },
    "weight_diff": {
        "make_diff": ["path_raw", "path_tuned", "path_diff", "device"],
        "recover": ["path_raw", "path_diff", "path_tuned", "device", "test_inference", "check_integrity_naively"],
    },
    "utils": {
        "openai_completion": [
            "prompts", "decoding_args", "model_name", "sleep_time", "batch_size", "max_instances", "max_batches",
            "return_text",
        ],
        "OpenAIDecodingArguments": [
            "max_tokens", "temperature", "top_p", "n", "stream", "stop", "presence_penalty", "frequency_penalty",
            "suffix", "logprobs", "echo",
        ],
        "jload": ["f", "mode"],
        "jdump": ["obj", "f", "mode", "indent", "default"],
    },
}  # fmt: skip


@pytest.mark.parametrize(("module", "name"), [(m, n) for m, names in IMPORTABLE.items() for n in names])
def test_names_that_forks_import(module, name):
    """`from generate_instruction import encode_prompt`, `train.SupervisedDataset`: place and order of arguments."""
    found, leading = getattr(importlib.import_module(module), name), IMPORTABLE[module][name]
    if leading is not None:
        assert list(inspect.signature(found).parameters)[: len(leading)] == leading


def test_constants_that_forks_import():
    import train

    assert train.IGNORE_INDEX == -100 and train.DEFAULT_PAD_TOKEN == "[PAD]"
    assert train.PROMPT_DICT["prompt_no_input"].endswith("### Response:")


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import train", ("torch", "openai")),
        ("import train, alpaca.training.trainer", ("openai",)),
        ("import generate_instruction, weight_diff, utils", ("torch", "openai")),
    ],
)
def test_heavy_packages_are_not_imported(statement, absent):
    """A missing or changed openai package once broke training; torch's import makes --help slow."""
    code = f"{statement}\nimport sys\nprint([name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
