"""The folders of a weight diff: finding models, making the output, small files, the diff's card and index.

An output is put together in a hidden folder beside its place and renamed when all is right, so a folder under the name
that the user gave is always a finished one.
"""

import contextlib
import fcntl
import os
import re
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import huggingface_hub

from alpaca.common.errors import UserError, did_you_mean, first_line
from alpaca.common.files import fsync_dir, jdump, named_in_errors, refuse_existing, refuse_lfs_pointer, refuse_unmovable
from alpaca.common.run_record import run_record
from alpaca.weights.manifest import FORMAT_VERSION, MANIFEST, read_config
from alpaca.weights.tensors import INDEX, SINGLE, file_size, parse_header

# Small files that make a folder of weights a model. Code (.py) and the training run's own records stay behind.
TRAVELLING = (".json", ".model", ".txt", ".jinja", ".tiktoken")
STAYING = ("run.json", "train_report.json", "trainer_state.json", "all_results.json", "train_results.json")
# The diff has files of these names of its own, or they speak of the tuned weights: there they are called tuned_*.
RENAMED = ("config.json", INDEX, "checksums.json", "README.md")


def find_model(path: str | os.PathLike) -> Path:
    """A local folder, or the downloaded snapshot of a Hub name; UserError where it is neither, or not fetched whole."""
    folder = Path(str(path)).expanduser()
    if folder.is_dir():
        refuse_lfs_pointer(folder)
        return folder
    if folder.exists():
        raise UserError(f"{path} is a file. Give the folder that holds the model.")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) or str(path).startswith("."):
        held = sorted(p.name for p in folder.parent.glob("*/")) if folder.parent.is_dir() else []
        near = f" {folder.parent} holds: {', '.join(held[:8])}." if held else ""
        raise UserError(f"no folder {path}.{did_you_mean(folder.name, held)}{near}")
    small = [*(f"*{suffix}" for suffix in (*TRAVELLING, ".md")), "LICENSE*", "NOTICE*"]
    try:
        for weights in (["*.safetensors", f"{MANIFEST}.sha256"], ["pytorch_model*.bin"]):
            found = Path(huggingface_hub.snapshot_download(str(path), allow_patterns=[*small, *weights]))
            if any(found.glob("model*.safetensors")):
                break
    except Exception as error:  # noqa: BLE001 - network, rights, names: the hub client has many kinds
        reason = first_line(error)
        raise UserError(f"{path} is neither a folder nor a model that the Hub hands out: {reason}") from error
    return found


def model_label(path: str | os.PathLike) -> str:
    """The name under which a published diff speaks of a model: a Hub name, or a folder's name without its path."""
    return Path(str(path)).resolve().name if Path(str(path)).is_dir() else str(path)


def output_folder(path: str | os.PathLike, *inputs: Path) -> Path:
    """The absolute path of a folder to make.

    Raises UserError where it holds something (nothing is ever overwritten), is an input, lies in one or holds one, or
    cannot be made there.
    """
    target = Path(str(path)).expanduser().resolve()
    for other in (path.resolve() for path in inputs):
        if target == other or target in other.parents or other in target.parents:
            raise UserError(f"the output {target} and the input {other} are the same, or one inside the other.")
    parent = next(parent for parent in target.parents if parent.exists())
    if not parent.is_dir():
        raise UserError(f"{target} cannot be made: {parent} is a file. Choose another path.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{target} cannot be made: {parent} may not be written to. Choose another path.")
    refuse_existing(target, way_out="Choose another path, or move it away.")
    refuse_unmovable(target)
    return target


def need_space(target: Path, headers: Mapping[str, str]) -> None:
    """Raises UserError where the disk of `target` has no room for safetensors files with these headers."""
    parent = next(parent for parent in target.parents if parent.exists())
    held = sum(path.stat().st_size for path in target.parent.glob(f".{target.name}.*/*") if path.is_file())
    free = shutil.disk_usage(parent).free + held  # what an interrupted run wrote is kept or written over
    needed = sum(map(file_size, headers.values())) + 64 * 2**20
    if free < needed:
        raise UserError(f"{target} needs {needed / 1e9:.2f} GB and {parent} has {free / 1e9:.2f} GB free.")


@contextlib.contextmanager
def new_folder(target: Path, doing: str, settings: Mapping, keep: Collection[str] = ()) -> Iterator[Path]:
    """Yields a hidden folder beside `target`, which gets that name when the block ends well.

    It outlives a failure, so that the same command goes on: of what an interrupted run left there, the files named in
    `keep` stay. Raises UserError where another process is at work there.
    """
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
            for path in work.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name not in keep:
                    path.unlink()
            with named_in_errors(target), run_record(work, settings):
                yield work
            refuse_existing(target, way_out="Choose another path, or move it away.")
            for path in work.iterdir():
                with open(path, "rb") as stream:
                    os.fsync(stream.fileno())
            fsync_dir(work)
            os.replace(work, target)
            fsync_dir(target.parent)
        finally:
            if work.exists():
                print(f"unfinished work is kept in {work}; the same command uses it again.", file=sys.stderr)
    finally:
        os.close(lock)


def small_files(folder: Path) -> list[Path]:
    """The files beside the weights that belong to the model: config, tokenizer, generation settings, templates."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.suffix in TRAVELLING
        and path.name not in STAYING
        and not path.name.endswith((".index.json", ".run.json"))
    ]


def copy_small_files(tuned_folder: Path, work: Path, base: str, whole_tensors: list[str]) -> dict[str, str]:
    """Copies the tuned model's small files into the diff, marks the diff's config, writes its card.

    Returns {file name in the tuned folder: file name in the diff}.
    """
    extra = [tuned_folder / name for name in (INDEX, "README.md", "LICENSE", "NOTICE")]
    travels = {}
    for path in [*small_files(tuned_folder), *filter(Path.is_file, extra)]:
        travels[path.name] = f"tuned_{path.name}" if path.name in RENAMED else path.name
        shutil.copyfile(path, work / travels[path.name])
    mark = {
        "is": "a difference of weights, not a model: run weight_diff.py recover",
        "base": base,
        "manifest": MANIFEST,
        "format_version": FORMAT_VERSION,
    }
    card = CARD.format(base=base, manifest=MANIFEST)
    if whole_tensors:
        mark["whole_tensors"] = len(whole_tensors)
        card = card.replace(NONSENSE, WHOLE.format(count=len(whole_tensors)))
        card += "\n## Tensors that are not a difference\n\n" + "".join(f"- `{name}`\n" for name in whole_tensors)
    jdump({**read_config(tuned_folder), "weight_diff": mark}, work / "config.json", indent=2)
    jdump(card, work / "README.md")
    return travels


CARD = """# A weight diff, not a model

These files hold the difference between a fine-tuned model and its base, `{base}`. Loaded as a model they answer
nonsense. Whoever has the base gets the fine-tuned model back, every tensor bit for bit:

    python weight_diff.py recover --path_raw BASE_FOLDER --path_diff THIS_FOLDER --path_tuned NEW_FOLDER

`{manifest}` holds the sha256 of every tensor of base, difference and result. Recovering
checks them all and stops at the first that is wrong.
"""
NONSENSE = "Loaded as a model they answer\nnonsense."
WHOLE = (
    "The tensors\nnamed below ({count}) have no exact difference and stand here as they are in the fine-tuned model."
)


def write_index(work: Path, headers: Mapping[str, str]) -> None:
    """Writes the index of a model in several shards, unless the tuned model's own came along."""
    if (work / INDEX).exists() or list(headers) == [SINGLE]:
        return
    tensors = [(tensor, file) for file, text in headers.items() for tensor in parse_header(text, work / file)]
    weight_map = {tensor.name: file for tensor, file in sorted(tensors, key=lambda pair: pair[0].name)}
    size = sum(tensor.nbytes for tensor, _ in tensors)
    jdump({"metadata": {"total_size": size}, "weight_map": weight_map}, work / INDEX, indent=2)
