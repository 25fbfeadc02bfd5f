"""run.json, which every output folder holds: command, settings, commit, versions, inputs, times, outcome."""

import contextlib
import hashlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from alpaca.common.errors import UserError
from alpaca.common.files import jdump, jload
from alpaca.common.paths import ROOT


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def sha256_file(path: str | os.PathLike) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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
        "settings": {k: v for k, v in settings.items() if not is_secret(k)},
        "seed": settings.get("seed"),
        "commit": git_commit(),
        "packages": package_versions(),
        "inputs": {str(path): sha256_file(path) for path in inputs if Path(path).is_file()},
        "started": now(),
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
        record["finished"] = now()
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


def is_secret(name: str) -> bool:
    """Whether a flag, setting or parameter of this name holds a key or a password."""
    return bool(re.search(r"(?i)(?:^|api|[-_])key$|token$|secret|password|signature|^sig$", name))


def _without_secrets(argv: Sequence[str]) -> list[str]:
    shown, hide_next = [], False
    for arg in argv:
        flag, equals, _ = arg.partition("=")
        secret = flag.startswith("-") and is_secret(flag.lstrip("-"))
        shown.append("***" if hide_next else f"{flag}=***" if secret and equals else arg)
        hide_next = secret and not equals
    return shown


def git_commit() -> str | None:
    """The project's commit, with "-dirty" where tracked files differ from it; None outside a git checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=ROOT, capture_output=True, text=True, check=True, timeout=10,
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
