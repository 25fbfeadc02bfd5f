"""Checkpoints that can be trusted: sealed with checksums, and resumed from only where every byte is right.

Not a command; train.py uses it, and imports neither torch nor transformers for it:

    python train.py verify OUTPUT_DIR                       # a whole run: its model and its checkpoint-* folders
    python train.py verify OUTPUT_DIR/checkpoint-200        # one
"""

import contextlib
import json
import math
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from alpaca.common.cores import CORES
from alpaca.common.errors import UserError
from alpaca.common.files import jdump
from alpaca.common.run_record import sha256_file

SEAL = "checksums.json"
UNVERIFIED = "unverified_model"  # the folder of a final model that failed its check

# ----------------------------------------------------------------------------------------------------------------------
# Seals.


def seal(folder: str | os.PathLike, names: list[str] | None = None, **facts: Any) -> dict[str, Any]:
    """Writes `folder`/checksums.json with size and sha256 of `names` (default: every file below), and `facts`.

    The seal is written last, so a folder without one was never finished.
    """
    folder = Path(folder)
    if names is None:
        names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != SEAL)
    with ThreadPoolExecutor(max_workers=min(8, CORES)) as pool:  # hashing releases the GIL
        sums = list(pool.map(lambda name: sha256_file(folder / name), names))
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": digest}
        for name, digest in zip(names, sums, strict=True)
    }
    record = {**facts, "files": files}
    jdump(record, folder / SEAL)
    return record


def find_damage(folder: str | os.PathLike) -> list[str]:
    """What differs from the seal of `folder`: one line for each missing, truncated or changed file; [] where intact."""
    folder = Path(folder)
    try:
        files = json.loads((folder / SEAL).read_text(encoding="utf-8"))["files"]
    except (FileNotFoundError, NotADirectoryError):
        return [f"{folder} has no {SEAL}: it was never finished"]
    except (ValueError, KeyError, TypeError):
        return [f"{folder / SEAL} cannot be read"]

    def compare(item: tuple[str, dict[str, Any]]) -> str | None:
        path, expected = folder / item[0], item[1]
        if not path.is_file():
            return f"{path} is missing"
        if (size := path.stat().st_size) != expected["bytes"]:
            return f"{path} has {size:,} bytes instead of {expected['bytes']:,}"
        if sha256_file(path) != expected["sha256"]:
            return f"{path} was changed after it was written (its sha256 differs)"
        return None

    with ThreadPoolExecutor(max_workers=min(8, CORES)) as pool:
        return [line for line in pool.map(compare, files.items()) if line]


def checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """The checkpoint-STEP folders of a run, newest first."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]), reverse=True)


def checkpoint_to_resume(asked: str | None, output_dir: str, say=print) -> str | None:
    """The checkpoint that --resume_from_checkpoint means: None to start anew, or a folder whose every byte is right.

    `asked`: None, "auto" (or True: the newest complete checkpoint in `output_dir`, None where there is none yet), or a
    path. Raises UserError where the path is damaged, or where every finished checkpoint in `output_dir` is.
    """
    if asked is None:
        return None
    if asked.lower() not in ("auto", "true", "yes"):
        if damage := find_damage(asked):
            raise UserError(
                f"--resume_from_checkpoint {asked} cannot be trusted:\n  " + "\n  ".join(damage[:5])
                + "\nTry --resume_from_checkpoint auto, which takes the newest complete one."
            )  # fmt: skip
        if _facts(asked).get("kind", "checkpoint") != "checkpoint":
            raise UserError(
                f"--resume_from_checkpoint {asked} is a finished result without an optimizer's state. Go on from "
                "one of its checkpoint-N folders, or train it anew with --model_name_or_path."
            )
        return asked
    broken = []
    for folder in checkpoints(output_dir):
        if not (damage := find_damage(folder)):
            return str(folder)
        say(f"passed over: {damage[0]}")
        if (folder / SEAL).exists():
            broken += damage
    if broken:
        raise UserError(
            f"every finished checkpoint in {output_dir} is damaged:\n  " + "\n  ".join(broken[:5])
            + "\nTo start over, add --overwrite True in place of --resume_from_checkpoint."
        )  # fmt: skip
    return None


def _facts(folder: str | os.PathLike) -> dict[str, Any]:
    """What the seal of an intact folder says besides its files."""
    return json.loads((Path(folder) / SEAL).read_text(encoding="utf-8"))


def rows_per_step(args: Any) -> int:
    """Rows of one optimizer step over all processes and micro-batches."""
    return args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps


def changed_batch(folder: str, args: Any) -> str | None:
    """A sentence where the run of a checkpoint took other rows a step than `args` do; None where it is not known."""
    then, now = _facts(folder).get("rows_per_step"), rows_per_step(args)
    if then in (None, now):
        return None
    return (
        f"note: {Path(folder).name} was made with {then} rows a step, this run takes {now}: its steps count on, so "
        "another share of the data, and another place in the schedule, is taken as done"
    )


def without_optimizer(folder: str) -> str | None:
    """A sentence where a checkpoint has no optimizer's state, as with --save_only_model."""
    if any(True for pattern in ("optimizer*", "global_step*") for _ in Path(folder).glob(pattern)):
        return None
    return (
        f"note: {Path(folder).name} has no optimizer's state (--save_only_model): the optimizer and its learning-rate "
        "schedule start anew, so the steps from here are not those of a run that never stopped"
    )


def rotate(output_dir: str | os.PathLike, keep: int | None, best: str | None = None) -> None:
    """Deletes all but the newest `keep` sealed checkpoints, unfinished ones older than those, and never `best`."""
    if not keep:
        return
    sealed = [folder for folder in checkpoints(output_dir) if (folder / SEAL).exists()]
    for folder in checkpoints(output_dir):
        kept = folder in sealed[:keep] or (best and Path(best).resolve() == folder.resolve())
        older = sealed and int(folder.name.split("-")[1]) < int(sealed[0].name.split("-")[1])
        if older and not kept:
            shutil.rmtree(folder)


def verify(path: str) -> int:
    """Checks a sealed folder, or an output_dir with its checkpoints; prints a line for each and returns 0 or 1."""
    if not Path(path).is_dir():
        raise UserError(f"no folder {path}")
    folders = checkpoints(path)
    if (Path(path) / SEAL).exists() or not folders:
        folders.insert(0, Path(path))
    status = 0
    for folder in folders:
        damage = find_damage(folder)
        print(f"{folder}: {'every file is as it was written' if not damage else 'NOT INTACT'}")
        for line in damage:
            print(f"  {line}")
        status = 1 if damage else status
    return status


@contextlib.contextmanager
def nothing_lost(output_dir: str, say=print):
    """Names the newest complete checkpoint when the block fails, so that the way on is on the screen."""
    try:
        yield
    except BaseException:
        newest = next((folder for folder in checkpoints(output_dir) if (folder / SEAL).exists()), None)
        if newest:
            say(f"{newest} is complete. The same command with --resume_from_checkpoint auto goes on from there.")
        raise


# ----------------------------------------------------------------------------------------------------------------------
# Disk space.


def check_disk(args: Any, final: int, each: int, rows: int) -> str:
    """Says how much disk the run of TrainingArguments `args` needs; raises UserError where less is free.

    `final`: bytes of the result; `each`: of a checkpoint (`memory.checkpoint_bytes`); `rows`: of the training data.
    """
    steps = args.max_steps if args.max_steps > 0 else math.ceil(rows / rows_per_step(args) * args.num_train_epochs)
    steps_per_save = args.save_steps if args.save_steps >= 1 else args.save_steps * steps
    saves = math.ceil(steps / steps_per_save) if steps_per_save > 0 else 1  # --save_steps 0: at the end
    saves = {"no": 0, "epoch": math.ceil(args.num_train_epochs)}.get(str(args.save_strategy.value), saves)
    keep, output_dir = args.save_total_limit, args.output_dir
    # One more than is kept: the old one goes only when the new one is sealed.
    held = min(saves, keep + 1) if keep else saves
    needed = final + held * each
    folder = Path(output_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    # The checkpoints of a run that goes on are among those that it is going to hold.
    there = sum(file.stat().st_size for old in checkpoints(output_dir) for file in old.rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free + there
    text = f"{needed / 1e9:.1f} GB of disk ({final / 1e9:.1f} GB model, {held} checkpoints of {each / 1e9:.1f} GB)"
    if needed > free:
        raise UserError(
            f"the run needs {text}, and {folder} has {free / 1e9:.1f} GB free. "
            "Lower --save_total_limit, raise --save_steps, or choose another --output_dir."
        )
    return f"{text}; {free / 1e9:.1f} GB free"
