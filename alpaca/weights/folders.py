"""The folders of a weight diff: finding models, the work folder, small files that travel, the diff's card and index.

Not a command; weight_diff.py imports it. Outputs are put together in a hidden folder beside their place and renamed
when all is right, so a folder under the name that the user gave is always a finished one.
"""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from alpaca.common.errors import UserError
from alpaca.common.files import fsync_dir, jdump, jload
from alpaca.weights.manifest import FORMAT_VERSION, MANIFEST
from alpaca.weights.tensors import INDEX, SINGLE, header_tensors

# Small files that make a folder of weights a model. Code (.py) and the training run's own records stay behind.
TRAVELLING = (".json", ".model", ".txt", ".jinja", ".tiktoken")
STAYING = ("run.json", "train_report.json", "trainer_state.json", "all_results.json", "train_results.json")
# The diff has files of these names of its own, or they speak of the tuned weights: there they are called tuned_*.
RENAMED = ("config.json", INDEX, "checksums.json", "README.md")
PROGRESS = "progress.json"  # in the work folder: per finished shard, the sha256 and sum of its tensors


def find_model(path: str | os.PathLike) -> Path:
    """A local folder, or the downloaded snapshot of a Hub name; UserError where it is neither."""
    folder = Path(str(path)).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) or str(path).startswith("."):
        near = ", ".join(sorted(p.name for p in folder.parent.glob("*/"))[:8]) if folder.parent.is_dir() else ""
        raise UserError(f"no folder {path}." + (f" {folder.parent} holds: {near}." if near else ""))
    from huggingface_hub import snapshot_download

    small = [f"*{suffix}" for suffix in TRAVELLING]
    try:
        found = Path(snapshot_download(str(path), allow_patterns=[*small, "*.safetensors", f"{MANIFEST}.sha256"]))
        if not any(found.glob("model*.safetensors")):
            found = Path(snapshot_download(str(path), allow_patterns=[*small, "pytorch_model*.bin"]))
    except Exception as error:  # noqa: BLE001 - network, rights, names: the hub client has many kinds
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path} is neither a folder nor a model that the Hub hands out: {reason}") from error
    return found


def model_label(path: str | os.PathLike) -> str:
    """The name under which a published diff speaks of a model: a Hub name, or a folder's name without its path."""
    return Path(str(path)).resolve().name if Path(str(path)).is_dir() else str(path)


def output_folder(path: str | os.PathLike) -> Path:
    """The absolute path of a folder to make."""
    return Path(str(path)).expanduser().resolve()


def refuse_inside(target: Path, *inputs: Path) -> None:
    """Raises UserError where the output is an input, lies in one, or holds one."""
    for path in (path.resolve() for path in inputs):
        if target == path or target in path.parents or path in target.parents:
            raise UserError(f"the output {target} and the input {path} are the same, or one inside the other.")


def refuse_taken(target: Path) -> None:
    """Raises UserError where `target` holds something: nothing is ever overwritten or deleted."""
    if any(target.iterdir()) if target.is_dir() else target.exists():
        raise UserError(f"{target} already exists and is left alone. Choose another path, or move it away.")


def need_space(target: Path, nbytes: int) -> None:
    """Raises UserError where the disk of `target` has less than `nbytes` and a little free."""
    folder = next(parent for parent in target.parents if parent.exists())
    held = sum(path.stat().st_size for path in target.parent.glob(f".{target.name}.*/*") if path.is_file())
    free = shutil.disk_usage(folder).free + held  # what an interrupted run wrote is kept or written over
    needed = nbytes + 64 * 2**20
    if free < needed:
        raise UserError(f"{target} needs {needed / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB free.")


@contextlib.contextmanager
def work_folder(target: Path, doing: str) -> Iterator[Path]:
    """A hidden folder beside `target` where it is put together, by one process at a time; it outlives a failure."""
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.parent / f".{target.name}.{doing}"
    work.mkdir(exist_ok=True)
    lock = os.open(work, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = work.is_dir() and os.path.samestat(os.stat(work), os.fstat(lock))
        except BlockingIOError:
            ours = False
        if not ours:  # held by another process, or finished and renamed by one this very moment
            raise UserError(f"another process is {doing} {target} right now. Wait for it, or stop it.")
        try:
            yield work
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise UserError(f"the disk of {target} is full. Make room and run the same command again.") from error
            raise
        finally:
            if work.exists():
                print(f"unfinished work is kept in {work}; the same command uses it again.", file=sys.stderr)
    finally:
        os.close(lock)


def clear(work: Path, keep: set[str]) -> None:
    """Removes from our own work folder what an interrupted run left there and this one does not go on with."""
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in keep:
            path.unlink()


def publish(work: Path, target: Path) -> None:
    """Syncs the finished folder and gives it its name; until then nothing stands there."""
    for path in work.iterdir():
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
    refuse_taken(target)
    (work / PROGRESS).unlink(missing_ok=True)
    fsync_dir(work)
    os.replace(work, target)
    fsync_dir(target.parent)


def small_files(folder: Path) -> list[Path]:
    """The files beside the weights that belong to the model: config, tokenizer, generation settings, templates."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.suffix in TRAVELLING
        and path.name not in STAYING
        and not path.name.endswith((".index.json", ".run.json"))
    ]


def copy_small_files(tuned_folder: Path, work: Path, manifest: dict) -> None:
    """Copies the tuned model's small files into the diff, marks the diff's config, writes its card."""
    extra = [tuned_folder / name for name in (INDEX, "README.md", "LICENSE", "NOTICE")]
    for path in [*small_files(tuned_folder), *filter(Path.is_file, extra)]:
        stored_as = f"tuned_{path.name}" if path.name in RENAMED else path.name
        shutil.copyfile(path, work / stored_as)
        manifest["travels"][path.name] = stored_as
    mark = {
        "is": "a difference of weights, not a model: run weight_diff.py recover",
        "base": manifest["raw"]["name"],
        "manifest": MANIFEST,
        "format_version": FORMAT_VERSION,
    }
    jdump({**jload(tuned_folder / "config.json"), "weight_diff": mark}, work / "config.json", indent=2)
    jdump(CARD.format(base=manifest["raw"]["name"], manifest=MANIFEST), work / "README.md")


CARD = """# A weight diff, not a model

These files hold the difference between a fine-tuned model and its base, `{base}`. Loaded as a model they answer
nonsense. Whoever has the base gets the fine-tuned model back, every tensor bit for bit:

    python weight_diff.py recover --path_raw BASE_FOLDER --path_diff THIS_FOLDER --path_tuned NEW_FOLDER

`{manifest}` holds the sha256 of every tensor of base, difference and result. Recovering
checks them all and stops at the first that is wrong.
"""


def write_index(work: Path, headers: Mapping[str, str]) -> None:
    """Writes the index of a model in several shards, unless the tuned model's own came along."""
    if (work / INDEX).exists() or list(headers) == [SINGLE]:
        return
    tensors = {file: header_tensors(text, Path()).values() for file, text in headers.items()}
    size = sum(tensor.nbytes for held in tensors.values() for tensor in held)
    weight_map = {tensor.name: file for file, held in tensors.items() for tensor in held}
    jdump({"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}, work / INDEX, indent=2)


@contextlib.contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields a function that threads tell the bytes just handled; on a terminal a bar shows rate and time left."""
    from tqdm import tqdm

    lock = threading.Lock()
    with tqdm(desc=title, total=total, unit="B", unit_scale=True, disable=None) as bar:

        def progress(nbytes: int) -> None:
            with lock:
                bar.update(nbytes)

        yield progress
