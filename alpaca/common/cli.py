"""Command lines: functions served with python-fire, their flags checked before anything starts."""

import difflib
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from alpaca.common.errors import UserError, cli_errors


def run_cli(commands: Mapping[str, Callable], default: str | None = None) -> None:
    """Serves `commands` (name -> function) with python-fire; `default` runs when the line names no command.

    Fire calls a function first and complains about a misspelt flag afterwards, when the job has already run on
    defaults: flags and command names are therefore checked here before anything starts.
    """
    argv = sys.argv[1:]
    with cli_errors():
        wants_help = any(arg in ("--help", "-h") for arg in argv)
        if argv and not argv[0].startswith("-"):
            if argv[0] not in commands:
                near = difflib.get_close_matches(argv[0], commands, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise UserError(f"no command {argv[0]!r}.{hint} Commands: {', '.join(commands)}.")
        elif default is not None and not wants_help:
            argv = [default, *argv]
        if not wants_help and argv and argv[0] in commands:
            _check_flags(argv[0], commands[argv[0]], argv[1:])
        import fire

        # Fire sends help through a pager on a terminal; plain text is what a reader of --help expects.
        os.environ.setdefault("PAGER", "cat")
        for function in commands.values() if not wants_help else ():  # help would list what the decorator leaves
            # Fire reads values as Python: "red, blue" would become a tuple and "7" a number. A text stays a text.
            parameters = inspect.signature(function).parameters.values()
            texts = {p.name: str for p in parameters if p.annotation in (str, str | None, "str", "str | None")}
            # And "false" would be a text, which is true.
            switches = {p.name: _truth(p.name) for p in parameters if isinstance(p.default, bool)}
            fire.decorators.SetParseFns(**texts, **switches)(function)
        result = fire.Fire(dict(commands), command=argv, name=Path(sys.argv[0]).name, serialize=lambda _: None)
    if isinstance(result, int) and not isinstance(result, bool):
        sys.exit(result)  # a command may return its exit status


def _truth(name: str) -> Callable[[str], bool]:
    """Reads the value of the switch --`name`."""

    def read(value: str) -> bool:
        if value.lower() not in ("true", "yes", "1", "on", "false", "no", "0", "off"):
            raise UserError(f"--{name} takes True or False, found {value!r}.")
        return value.lower() in ("true", "yes", "1", "on")

    return read


def _check_flags(name: str, function: Callable, args: Sequence[str]) -> None:
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for arg in args:
        if arg == "--":
            return
        flag = re.match(r"--([A-Za-z][\w-]*)", arg)
        if not flag:
            continue
        spelled = flag[1].replace("-", "_")
        if spelled in parameters or (spelled.startswith("no") and spelled[2:] in parameters):
            continue
        near = difflib.get_close_matches(spelled, parameters, n=1)
        hint = f" Did you mean --{near[0]}?" if near else ""
        raise UserError(f"{name} has no flag --{flag[1]}.{hint} `{Path(sys.argv[0]).name} {name} --help` lists them.")
