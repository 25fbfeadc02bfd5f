"""What every script shares: the Alpaca prompt, JSON in and out, run records, errors for people, and the OpenAI call.

Not a command; the other scripts import it. It imports nothing heavier than the standard library at the top.

    from utils import PROMPT_DICT, format_prompt, jload, jdump
    tasks = load_tasks("alpaca_data.json")
    print(format_prompt(tasks[0]))
"""

import contextlib
import dataclasses
import difflib
import hashlib
import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# ----------------------------------------------------------------------------------------------------------------------
# The Alpaca prompt. Models in the wild were trained on exactly these bytes: LF line ends, nothing after the last colon.

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


# ----------------------------------------------------------------------------------------------------------------------
# Errors for people, and command lines.


class UserError(ValueError):
    """Something the user can put right. Command lines print its text alone, without a traceback, and exit 2."""


@contextlib.contextmanager
def cli_errors() -> Iterator[None]:
    """Turns a UserError into its message on stderr and exit status 2, and Ctrl-C into status 130."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


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


# ----------------------------------------------------------------------------------------------------------------------
# Files that appear whole or not at all.


def fsync_dir(path: str | os.PathLike) -> None:
    """Makes a rename or a new name in the folder `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def usual_rights(path: str | os.PathLike) -> None:
    """Gives a file or folder the rights that the user's umask means; what tempfile and safetensors make is private."""
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, (0o777 if os.path.isdir(path) else 0o666) & ~umask)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "w") -> Iterator[Any]:
    """Opens a file beside `path` for writing and renames it to `path` only when the block ends well.

    Text is UTF-8 with LF. On an error the old file is untouched and the half-written one is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    descriptor, beside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(descriptor, mode, **options) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        usual_rights(beside)
        os.replace(beside, path)
        fsync_dir(path.parent)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_dir(path: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """Yields a new folder beside `path`, which takes the name `path` only when the block ends well.

    Raises UserError before the block where `path` holds something and `overwrite` is false. With `overwrite` the old
    folder is set aside until the new one stands in its place.
    """
    path = Path(path)
    refuse_existing(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        yield beside
        for file in beside.rglob("*"):
            if file.is_file():
                with open(file, "rb") as stream:
                    os.fsync(stream.fileno())
        usual_rights(beside)
        replaced = None
        if path.exists():
            replaced = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".replaced", dir=path.parent))
            os.replace(path, replaced)
        os.replace(beside, path)
        fsync_dir(path.parent)
        if replaced:
            shutil.rmtree(replaced)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def is_inside(path: str | os.PathLike, folder: str | os.PathLike) -> bool:
    """Whether `path` is `folder` or lies below it."""
    return Path(path).resolve().is_relative_to(Path(folder).resolve())


def refuse_existing(path: str | os.PathLike, overwrite: bool = False) -> None:
    """Raises UserError where `path` is a file or a folder that holds something, unless `overwrite`."""
    path = Path(path)
    occupied = any(path.iterdir()) if path.is_dir() else path.exists()
    if occupied and not overwrite:
        raise UserError(f"{path} already exists and is left alone. Choose another path, or add --overwrite True.")


# ----------------------------------------------------------------------------------------------------------------------
# JSON and JSONL.


def _open_for(f: Any, mode: str) -> Any:
    return contextlib.nullcontext(f) if isinstance(f, io.IOBase) else open(f, mode, encoding="utf-8")


def jload(f: Any, mode: str = "r") -> Any:
    """Reads one JSON document from a path or an open file; a broken one is a UserError that names file and line."""
    with _open_for(f, mode) as stream:
        try:
            return json.load(stream)
        except ValueError as error:
            raise UserError(f"{getattr(stream, 'name', f)} is not valid JSON: {error}") from error


def jdump(obj: Any, f: Any, mode: str = "w", indent: int | None = 4, default: Callable = str) -> None:
    """Writes `obj` as JSON, or a string as it is, to a path (atomically) or an open file. UTF-8, no \\u escapes."""
    if not isinstance(obj, str | dict | list):
        raise ValueError(f"jdump writes a dict, a list or a str, not {type(obj).__name__}")
    text = obj if isinstance(obj, str) else json.dumps(obj, indent=indent, default=default, ensure_ascii=False)
    if isinstance(f, io.IOBase):
        f.write(text)
    elif "a" in mode:
        with open(f, mode, encoding="utf-8") as stream:
            stream.write(text)
    else:
        with atomic_write(f, mode) as stream:
            stream.write(text)


def read_jsonl(path: str | os.PathLike) -> list[Any]:
    """All objects of a JSONL file; blank lines are skipped, a broken line is a UserError with its number."""
    rows = []
    with open(path, encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except ValueError as error:
                    raise UserError(f"{path}, line {number} is not valid JSON: {error}") from error
    return rows


def write_jsonl(path: str | os.PathLike, rows: Sequence[Any]) -> None:
    """Writes one JSON object a line, atomically."""
    with atomic_write(path) as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


def load_tasks(path: str | os.PathLike, require_output: bool = True) -> list[dict[str, Any]]:
    """Tasks from alpaca_data.json, regen.json, a JSONL file of either, or seed_tasks.jsonl (`instances`).

    Returns a list of dicts with str `instruction`, `input` ("" where missing or null) and `output` (left out where it
    is missing and `require_output` is false); other fields stay. Raises UserError listing up to ten bad rows by file
    and row (the first row is 1).
    """
    return check_tasks(read_rows(path), path, require_output)


def read_rows(path: str | os.PathLike) -> list[Any]:
    """The rows of a JSON list or of a JSONL file as they stand, whatever they are; UserError where there are none."""
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.json*")], n=1)
        hint = f" Did you mean {path.parent / near[0]}?" if near else ""
        raise UserError(f"no file {path}.{hint}")
    with open(path, encoding="utf-8") as stream:
        is_list = stream.read(4096).lstrip("\ufeff \t\r\n").startswith("[")
    return jload(path) if is_list else read_jsonl(path)


def check_tasks(rows: Sequence[Any], path: str | os.PathLike, require_output: bool = True) -> list[dict[str, Any]]:
    """Rows read from `path`, as `load_tasks` returns them and with its errors."""
    problems, tasks = [], []
    for number, row in enumerate(rows, start=1):
        task, problem = read_task(row, require_output)
        if problem:
            problems.append(f"  row {number}: {problem}")
        else:
            tasks.append(task)
    if problems:
        more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise UserError(
            f"{path}: {len(problems)} of {len(rows)} rows cannot be read:\n" + "\n".join(problems[:10]) + more
        )
    if not tasks:
        raise UserError(f"{path} holds no rows.")
    return tasks


def read_task(row: Any, require_output: bool = True) -> tuple[dict[str, Any], str | None]:
    """One row as `load_tasks` returns it and None, or an empty dict and what is wrong with the row."""
    if not isinstance(row, dict):
        return {}, f"expected an object with instruction, input, output; found {type(row).__name__}"
    instances = row.get("instances")
    if isinstance(instances, list) and instances and isinstance(instances[0], dict):
        row = {**{key: value for key, value in row.items() if key != "instances"}, **instances[0]}
    task = dict(row)
    for field in ("instruction", "input", "output"):
        value = row.get(field)
        if value is None:
            if field == "instruction" or (field == "output" and require_output):
                return {}, f"{field!r} is missing or null (fields: {', '.join(row) or 'none'})"
            if field == "input":
                task["input"] = ""
            else:
                task.pop("output", None)
        elif not isinstance(value, str):
            return {}, f"{field!r} must be a string, found {type(value).__name__}: {str(value)[:40]!r}"
        else:
            task[field] = value.encode("utf-8", "replace").decode()  # a lone surrogate is no character
    if not task["instruction"].strip():
        return {}, "'instruction' is blank"
    return task, None


def sha256_file(path: str | os.PathLike) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# What a run leaves behind.


@contextlib.contextmanager
def run_record(
    output_dir: str | os.PathLike,
    settings: Mapping[str, Any],
    inputs: Sequence[str | os.PathLike] = (),
    file_name: str = "run.json",
) -> Iterator[dict[str, Any]]:
    """Keeps `output_dir`/`file_name`: command, settings, commit, package versions, seed, input hashes, times, outcome.

    Written with outcome "running" when the block begins and again when it ends ("finished", "interrupted" or the
    error). The block may add its own figures to the dict that it gets. Settings whose name says that they hold a
    secret, and secrets on the command line, are not written. A record of another command that stands in the folder
    stays: this one then becomes, for example, evaluation.report.run.json.
    """
    target, begin = Path(output_dir) / file_name, time.monotonic()
    record = {
        "command": _without_secrets(sys.argv),
        "settings": {k: v for k, v in settings.items() if not _SECRET.search(k)},
        "seed": settings.get("seed"),
        "commit": git_commit(),
        "packages": package_versions(),
        "inputs": {str(path): sha256_file(path) for path in inputs if Path(path).is_file()},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "outcome": "running",
    }
    program = _program(record["command"])
    if target.is_file() and not _same_program(_program(_command_of(target)), program):
        target = target.with_name(f"{'.'.join(program)}.{file_name}")
    jdump(record, target)
    try:
        yield record
        record["outcome"] = "finished"
    except KeyboardInterrupt:
        record["outcome"] = "interrupted"
        raise
    except BaseException as error:
        record["outcome"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        record["finished"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        record["seconds"] = round(time.monotonic() - begin, 3)
        jdump(record, target)


def _command_of(path: Path) -> list[str]:
    try:
        return jload(path)["command"]
    except (UserError, KeyError, TypeError):
        return []


def _program(command: Sequence[str]) -> list[str]:
    """Script and subcommand of a command line, without their path and endings: ["evaluation", "report"]."""
    words = [Path(command[0]).stem, *command[1:2]] if command else []
    return [word for word in words if re.fullmatch(r"[A-Za-z_]\w*", word)]


def _same_program(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether two come from the same script; a subcommand that one leaves out is the default, hence the other's."""
    return one[:1] == other[:1] and (len(one) < 2 or len(other) < 2 or one[1] == other[1])


_SECRET = re.compile(r"(?i)api_?key|token$|secret|password")


def _without_secrets(argv: Sequence[str]) -> list[str]:
    shown, hide_next = [], False
    for arg in argv:
        flag, equals, _ = arg.partition("=")
        secret = flag.startswith("-") and bool(_SECRET.search(flag))
        shown.append("***" if hide_next else f"{flag}=***" if secret and equals else arg)
        hide_next = secret and not equals
    return shown


def git_commit() -> str | None:
    """The project's commit, with "-dirty" where tracked files differ from it; None outside a git checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()


def package_versions() -> dict[str, str]:
    """Python's version and those of the libraries that decide a result, as far as they are installed."""
    from importlib import metadata

    versions = {"python": sys.version.split()[0]}
    for name in (
        "torch", "transformers", "tokenizers", "accelerate", "peft", "deepspeed", "datasets", "safetensors", "openai",
        "rapidfuzz", "numpy", "xllamacpp",
    ):  # fmt: skip
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


# ----------------------------------------------------------------------------------------------------------------------
# The OpenAI call of the original, for code that imports it. The work is done in teacher.py.


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
    fields. OPENAI_BASE_URL and OPENAI_API_KEY choose the server; `model_name` defaults to teacher.DEFAULT_MODEL.
    Requests run at the same time and wait as long as the server says: `sleep_time` has no use any more, and
    `batch_size` only bounds `max_instances` through `max_batches`.
    Raises UserError, with the server's reason, where a request cannot be answered.
    """
    import teacher

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
    completions = teacher.complete_all(wanted, model_name or teacher.DEFAULT_MODEL, settings)
    if return_text:
        completions = [[choice.text for choice in choices] for choices in completions]
    if decoding_args.n == 1:
        completions = [choices[0] for choices in completions]
    return completions[0] if single else completions
