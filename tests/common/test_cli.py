"""Every command refuses misspelt flags and values of the wrong type by name, before it does anything."""

import inspect
import runpy
import subprocess
import sys

import pytest
from conftest import ROOT

from alpaca.common import cli
from alpaca.common.errors import UserError, cli_errors

SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if path.stem not in ("utils", "train"))  # train has its own


def commands_of(script: str, monkeypatch) -> dict:
    served = {}
    monkeypatch.setattr(cli, "run_cli", lambda commands, default=None: served.update(commands))
    runpy.run_path(str(ROOT / script), run_name="__main__")
    return served


@pytest.mark.parametrize("script", SCRIPTS)
def test_values_of_the_wrong_type(script, monkeypatch):
    """`--num_instructions_to_generate many` and `--max_new_tokens abc` ended in a traceback, hours later in places."""
    checked = 0
    for name, function in commands_of(script, monkeypatch).items():
        required = [
            f"--{parameter.name}=1"
            for parameter in inspect.signature(function).parameters.values()
            if parameter.default is parameter.empty
        ]
        for flag, kind in cli.value_types(function).items():
            if kind is str:
                continue
            assert kind in (bool, int, float), f"{script} {name} --{flag}: no reader for {kind}"
            with pytest.raises(UserError, match=f"--{flag} takes .*'many'"):
                cli.check_line(name, function, [*required, f"--{flag}", "many"])
            checked += 1
        with pytest.raises(UserError, match="no flag --outptu_dir"):
            cli.check_line(name, function, [*required, "--outptu_dir", "x"])
    assert checked or script in ("weight_diff.py", "convert_llama.py")


def job(output_dir: str, rows: int = 10, rate: float | None = None, note: str | None = None, fast: bool = False):
    return None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--output_dir o --rows 52k", "--rows takes a whole number, found '52k'. Type 52000."),
        ("--output_dir o --rows 7.5", "--rows takes a whole number"),
        ("--output_dir o --rate $20", "--rate takes a number, found '$20'. Type 20."),
        ("--output_dir o --rate nan", "--rate takes a number"),
        ("--output_dir o --rows 1,000", "Type 1000."),
        ("--output_dir o --fast maybe", "--fast takes True or False"),
        ("--output_dir o --rows", "--rows needs a value"),
        ("--output_dir o --note -x", "--note needs a value. Type --note=VALUE for one that begins with a dash."),
        ("--rows 5", "job needs --output_dir"),
        ("--output_dir o --row 5", "Did you mean --rows?"),
        ("a 5 0.5 b True c", "takes no further value 'c'"),
    ],
)
def test_refusals(line, message):
    with pytest.raises(UserError) as error:
        cli.check_line("job", job, line.split())
    assert message in str(error.value)


def test_all_problems_are_told_at_once():
    with pytest.raises(UserError) as error:
        cli.check_line("job", job, "--rows many --rate fast --fasst".split())
    assert all(part in str(error.value) for part in ("--rows", "--rate", "--fasst", "--output_dir"))


@pytest.mark.parametrize(
    "line",
    [
        "--output_dir o --rows 1e3 --rate -1 --fast",
        "--output-dir=o --nofast --note=7",
        "o 5",
        "--output_dir o --rate None",
    ],
)
def test_lines_that_are_right(line):
    cli.check_line("job", job, line.split())


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("output_dir", "7", "7"), ("rows", "1e3", 1000), ("rows", "52_000", 52000), ("rate", "2", 2.0),
        ("fast", "false", False), ("note", "red, blue", "red, blue"), ("note", "None", None),
    ],
)  # fmt: skip
def test_values_are_read_by_the_signature(name, text, value):
    """A folder called 7 became a number, "red, blue" a tuple, and `--overwrite false` was true."""
    found = cli.reader(name, cli.value_types(job)[name])(text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "words",
    [
        ["--note", "-x is what?"], ["--note", "--- translate this"], ["--note", "-"], ["--note", "- a\n- b=1"],
        ["--note=-x"], ["--note", "--all of them = none"], ["--note", "plain"],
    ],
)  # fmt: skip
def test_values_that_begin_with_a_dash(words, monkeypatch):
    """ "-x is what?" was no value, and "--- translate this" passed the check and ended in Fire's usage."""
    seen = []

    def job(output_dir: str, note: str | None = None, fast: bool = False):
        seen.append((output_dir, note, fast))

    monkeypatch.setattr(sys, "argv", ["job.py", "job", "--output_dir", "o", *words, "--fast"])
    cli.run_cli({"job": job})
    assert seen == [("o", "=".join(words).removeprefix("--note="), True)]


def test_help_of_the_first_command_shows_its_flags(run_script):
    """`python generate_instruction.py --help` listed command names alone."""
    shown = run_script("generate_instruction.py", "--help").stdout
    assert "--num_instructions_to_generate" in shown and "rebuild" in shown


def test_a_reader_that_has_seen_enough():
    """`--help | head` ended in a BrokenPipeError traceback."""
    line = f"{sys.executable} generate_instruction.py --help | head -1"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("Commands: ") and "Error" not in done.stderr, done.stderr


@pytest.mark.parametrize("command", ["a_file", "read_only"])
def test_paths_that_cannot_be_written(command, tmp_path, capsys):
    """A path below a file and a folder without the right to write ended in a chained traceback."""
    (tmp_path / "a_file").write_text("x")
    with pytest.raises(SystemExit) as end, cli_errors():
        if command == "a_file":
            (tmp_path / "a_file" / "below").mkdir()
        raise PermissionError(13, "Permission denied", str(tmp_path))
    assert end.value.code == 2 and str(tmp_path) in capsys.readouterr().err


def test_other_errors_keep_their_traceback():
    with pytest.raises(ConnectionError), cli_errors():
        raise ConnectionError("a bug, or the network")


def test_wrong_command_names_the_nearest(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["job.py", "jbo"])
    with pytest.raises(SystemExit) as end:
        cli.run_cli({"job": job, "other": job})
    assert end.value.code == 2 and "Did you mean job?" in capsys.readouterr().err
