"""README and docs say what is true: every command's script and flags exist, every file and test that is named, too."""

import re
import runpy
import shlex

import pytest
from conftest import ROOT

from alpaca.common import cli

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "datasheet.md", "model_card.md")]
# What commands of the pages make.
MADE = ("data/stanford", "data/teacher_rows.json", "data/teacher_rejections.md")
PAGES += sorted((ROOT / "docs").glob("*.md"))


def commands(text: str) -> list[str]:
    """The command lines of a page: in code blocks, continued lines joined, and between backticks."""
    found = []
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        found += block.replace("\\\n", " ").splitlines()
    found += re.findall(r"`((?:python3?|torchrun|make) [^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))
    return [line.strip() for line in found if re.match(r"\s*(python3?|torchrun|make) ", line)]


def cases():
    for page in PAGES:
        for number, line in enumerate(commands(page.read_text(encoding="utf-8"))):
            yield pytest.param(line, id=f"{page.name}-{number}")


@pytest.fixture(scope="module")
def served():
    """Script name -> (its commands, the default one), without running them."""
    known = {}

    def find(script: str):
        if script not in known:
            taken, original = {}, cli.run_cli
            cli.run_cli = lambda commands, default=None: taken.update(commands=commands, default=default)
            try:
                runpy.run_path(str(ROOT / script), run_name="__main__")
            finally:
                cli.run_cli = original
            known[script] = taken["commands"], taken["default"]
        return known[script]

    return find


def train_flags() -> set[str]:
    from transformers import HfArgumentParser

    from train import DataArguments, ModelArguments, TrainingArguments  # noqa: F401

    parser = HfArgumentParser([ModelArguments, DataArguments, TrainingArguments], allow_abbrev=False)
    return {option.lstrip("-") for action in parser._actions for option in action.option_strings}


# Spellings of 2023 that train.py maps to today's.
OLD_FLAGS = {"evaluation_strategy", "warmup_ratio", "fsdp_transformer_layer_cls_to_wrap"}


@pytest.mark.parametrize("line", list(cases()))
def test_commands_are_real(line, served):
    """A reader's first command must not end in "no flag --x" or "no such file"."""
    words = shlex.split(re.sub(r"(\s#.*|\s*\.\.\.\s*)", " ", line.rstrip("&").split("<")[0].split("|")[0]))
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets, words[1]
        return
    script = next((word for word in words[1:] if word.endswith(".py")), None)
    if script is None:
        assert words[1] in ("-m", "-c"), line
        if words[1] == "-m" and words[2].startswith("alpaca."):
            assert (ROOT / f"{words[2].replace('.', '/')}.py").is_file()
        return
    assert (ROOT / script).is_file(), f"no script {script}"
    rest = words[words.index(script) + 1 :]
    if script == "train.py":
        flags = train_flags() | OLD_FLAGS
        for word in rest:
            if word.startswith("--"):
                assert word[2:].partition("=")[0] in flags, word
            elif word.startswith("configs/"):
                assert (ROOT / word).is_file(), word
        return
    if "run_cli" not in (ROOT / script).read_text(encoding="utf-8"):
        return  # a script without flags of this kind, which its own test runs
    known, default = served(script)
    if "--help" in rest:
        return
    command = rest.pop(0) if rest and not rest[0].startswith("-") and rest[0] in known else default
    assert command in known, f"{script} has no command for {line!r}"
    cli.check_line(command, known[command], rest)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or (page.parent / target).exists(), f"{page.name} links to {target}"
    for name in re.findall(r"`((?:alpaca|tests|benchmarks|configs|docs|data)/[\w./-]+)`", text):
        assert name.startswith(MADE) or (ROOT / name).exists(), f"{page.name} names {name}"


def test_named_tests_exist():
    """docs/differences.md promises a test for each of the original's complaints."""
    written = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", (ROOT / "docs/differences.md").read_text(encoding="utf-8")):
        assert re.search(rf"^def {name}\(", written, re.MULTILINE), name
