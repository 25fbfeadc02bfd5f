"""Command lines: functions served with python-fire; flags and values are checked before anything starts.

run_cli({"make_diff": make_diff, "recover": recover})       # python weight_diff.py recover --path_raw ...
"""

import contextlib
import inspect
import math
import re
import shlex
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from alpaca.common.errors import UserError, cli_errors, did_you_mean


def run_cli(commands: Mapping[str, Callable], default: str | None = None) -> None:
    """Serves `commands` (name -> function) with python-fire; `default` runs when the line names no command.

    Values are read by the type in the function's signature (the default's type where it has none; a text else): "7" for
    a text stays a text. A function may return its exit status. Fire itself calls a function first and complains about
    a misspelt flag afterwards, when the job has run on defaults; here such a line is refused before.
    """
    argv = sys.argv[1:]
    with cli_errors():
        wants_help = any(arg in ("--help", "-h") for arg in argv)
        if argv and not argv[0].startswith("-"):
            if argv[0] not in commands:
                hint = did_you_mean(argv[0], commands)
                raise UserError(f"no command {argv[0]!r}.{hint} Commands: {', '.join(commands)}.")
        elif default is not None:
            argv = [default, *argv]
            if wants_help and len(commands) > 1:
                others = ", ".join(name for name in commands if name != default)
                print(f"Commands: {default} (runs when none is named), {others}. `COMMAND --help` shows its flags.\n")
        if not wants_help and argv:
            argv = [argv[0], *join_values(argv[1:])]
            check_line(argv[0], commands[argv[0]], argv[1:])
        import fire

        # Fire sends help to stderr and through a pager; plain text on stdout is what a reader of --help expects.
        fire.core.Display = lambda lines, out: print(*lines, sep="\n", file=sys.stdout if wants_help else out)
        for function in commands.values() if not wants_help else ():  # help would list what the decorator leaves
            readers = {name: reader(name, kind) for name, kind in value_types(function).items()}
            fire.decorators.SetParseFns(**readers)(function)
        result = fire.Fire(dict(commands), command=argv, name=Path(sys.argv[0]).name, serialize=lambda _: None)
    if isinstance(result, int) and not isinstance(result, bool):
        sys.exit(result)


def check_line(command: str, function: Callable, args: Sequence[str]) -> None:
    """Raises UserError that lists every unknown flag, missing flag and unreadable value of a command's line."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    program, types_of, problems = Path(sys.argv[0]).name, value_types(function), []
    given, positional = set(), 0
    for flag, value in flags_and_values(join_values(args)):
        if flag is None:
            name = list(parameters)[positional] if positional < len(parameters) else None
            positional += 1
        else:
            name = flag.replace("-", "_")
            if name not in parameters and name.startswith("no") and name[2:] in parameters and value is None:
                given.add(name[2:])  # Fire's spelling for False
                continue
            if name not in parameters:
                problems.append(f"{command} has no flag --{flag}.{did_you_mean(name, parameters, '--')}")
                continue
        if name is None:
            problems.append(f"{command} takes no further value {value!r}.")
            continue
        given.add(name)
        if value is None and types_of[name] is not bool:
            dash = f" Type --{name}=VALUE for one that begins with a dash." if types_of[name] is str else ""
            problems.append(f"--{name} needs a value.{dash}")
        elif value is not None:
            try:
                reader(name, types_of[name])(value)
            except UserError as error:
                problems.append(str(error))
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in given:
            problems.append(f"{command} needs --{name}.")
    if problems:
        problems[-1] += f" `{program} {command} --help` lists the flags."
        raise UserError("\n".join(problems))


def join_values(args: Sequence[str]) -> list[str]:
    """The words of a line with each `--flag value` as one, `--flag=value`.

    Fire takes any value that begins with a dash for a flag. Here it is one where it has the form of a flag: a list with
    dashes, or a question about -x, is a value.
    """
    end = args.index("--") if "--" in args else len(args)
    words, joined = list(args[:end]), []
    while words:
        word = words.pop(0)
        takes_value = words and not re.fullmatch(r"(?s)--?[A-Za-z][\w-]*(=.*)?", words[0])
        if takes_value and re.fullmatch(r"--[A-Za-z][\w-]*", word):
            word = f"{word}={words.pop(0)}"
        joined.append(word)
    return joined + list(args[end:])


def flags_and_values(args: Sequence[str]) -> Iterator[tuple[str | None, str | None]]:
    """(flag without dashes, its value or None) of the words of `join_values`, and (None, value) for a word that belongs
    to no flag."""
    words = list(args[: args.index("--")] if "--" in args else args)
    while words:
        word = words.pop(0)
        if flag := re.match(r"(?s)--([A-Za-z][\w-]*)(?:=(.*))?", word):
            yield flag[1], flag[2]
        elif re.match(r"-[A-Za-z]", word):  # Fire's short flags, which it checks itself
            if words and not words[0].startswith("-"):
                words.pop(0)
        else:
            yield None, word


def value_types(function: Callable) -> dict[str, Any]:
    """The type that each parameter's value is read as, optional ones without their None."""
    hints = {}
    with contextlib.suppress(NameError):
        hints = typing.get_type_hints(function)
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        kind = hints.get(name, str if parameter.default in (None, parameter.empty) else type(parameter.default))
        if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
            kind = next(part for part in typing.get_args(kind) if part is not type(None))
        found[name] = kind
    return found


def reader(name: str, kind: Any) -> Callable[[str], Any]:
    """The function that reads a value of the flag --`name`. It raises UserError where the text is no `kind`."""

    def read(text: str) -> Any:
        if text == "None":
            return None
        if kind is bool:
            if text.lower() not in TRUE + FALSE:
                raise UserError(f"--{name} takes True or False, found {text!r}.")
            return text.lower() in TRUE
        if kind in (int, float):
            with contextlib.suppress(ValueError):
                value = float(text)
                if math.isfinite(value) and (kind is float or value == int(value)):
                    return value if kind is float else int(value) if re.search("[eE.]", text) else int(text)
            what = "a whole number" if kind is int else "a number"
            raise UserError(f"--{name} takes {what}, found {text!r}.{_as_number(text, kind)}")
        return text

    return read


TRUE, FALSE = ("true", "yes", "1", "on"), ("false", "no", "0", "off")


def _as_number(text: str, kind: type) -> str:
    """Says how "52k", "$20" or "1,000" is typed."""
    found = re.fullmatch(r"[$€£]?\s*(\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d*\.?\d+)\s*([kKmM]?)", text)
    if not found:
        return ""
    value = float(found[1].replace(",", "")) * {"": 1, "k": 1e3, "m": 1e6}[found[2].lower()]
    return f" Type {int(value) if value == int(value) else value}." if kind is float or value == int(value) else ""


def at_least_one(**flags: int | None) -> None:
    """Raises UserError that names each flag below 1; None stands for one that was not given."""
    if low := {name: value for name, value in flags.items() if value is not None and value < 1}:
        raise UserError("\n".join(f"--{name} must be at least 1, found {value}." for name, value in low.items()))


def command_with(argv: Sequence[str], **flags: Any) -> str:
    """A command line as it was typed, with other values for these flags."""
    command = shlex.join(["python", *argv])
    for name, value in flags.items():
        flag = f"--{name} {value}"
        command, found = re.subn(rf"--{name}[= ]\S+", flag, command)
        command += "" if found else f" {flag}"
    return command
