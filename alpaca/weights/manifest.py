"""What a weight diff promises: its manifest, the checks against it, and what a wrong base probably is.

Not a command; weight_diff.py imports it. The manifest, weight_diff_manifest.json, holds

    format, format_version
    raw       name of the base; the names of tensors that only it has
    new_rows  how rows that only the tuned model has were given a base value
    tensors   per tensor: how (add | stored), shapes, dtypes, sha256 of raw, tuned and diff bytes, corrections
    tuned     file name -> header text of each safetensors file that recover writes
    diff      file name -> sha256 of the header of each file of the diff
    files     file name -> sha256 of every small file of the diff
    travels   file name in the recovered folder -> file name in the diff

and stands beside weight_diff_manifest.json.sha256, which `sha256sum -c` reads.
"""

import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from alpaca.common.errors import UserError
from alpaca.common.files import jdump, jload
from alpaca.common.run_record import sha256_file
from alpaca.weights.tensors import (
    FLOATS,
    Tensor,
    Weights,
    bits_of,
    from_float32,
    open_weights,
    pieces,
    read_header,
    to_float32,
)

FORMAT, FORMAT_VERSION = "alpaca weight diff", 1
MANIFEST = "weight_diff_manifest.json"
CORRECTION = "weight_diff_correction.safetensors"
NEW_ROWS = (
    "mean of all rows of the base tensor: blocks of 256 rows summed in float64 in order, divided by the number of "
    "rows, rounded to float32"
)


# ----------------------------------------------------------------------------------------------------------------------
# Hashes, several tensors at once (hashlib and numpy release Python's lock; each tensor is one thread's).


def in_parallel(function: Callable, items: Iterable) -> Iterable:
    """function(item) for every item over the cores, results in order; the first error in order is raised.

    After an error nothing new is started, and what is running is waited for.
    """
    pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))
    try:
        for future in [pool.submit(function, item) for item in items]:
            yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def sha256_tensor(tensor: Tensor, progress: Callable[[int], None] = lambda _: None, dtype: str | None = None) -> str:
    """Hex sha256 of a tensor's bytes as stored, or of its values rounded to `dtype` (floating types only)."""
    digest = hashlib.sha256()
    with tensor.opened() as read:
        for start, count in pieces(tensor.numel):
            piece = read(start, count)
            digest.update(piece if dtype is None else from_float32(to_float32(piece, tensor.dtype), dtype))
            progress(piece.nbytes)
    return digest.hexdigest()


def bit_sum(tensor: Tensor) -> int:
    """Sum of the elements' bits read as unsigned integers, modulo 2**64: the same for the same values in any order."""
    total = 0
    with tensor.opened() as read:
        for start, count in pieces(tensor.numel):
            total += bit_sum_of(read(start, count))
    return total % 2**64


def bit_sum_of(piece: np.ndarray) -> int:
    return int(bits_of(piece).sum(dtype=np.uint64))


# ----------------------------------------------------------------------------------------------------------------------
# The manifest on disk.


def is_weight_diff(path: str | os.PathLike) -> bool:
    """Whether a local folder is a weight diff made by this project, not a model; cheap."""
    folder = Path(path)
    if (folder / MANIFEST).is_file():
        return True
    config = folder / "config.json"
    return config.is_file() and "weight_diff" in jload(config)


def write_manifest(folder: Path, manifest: dict) -> None:
    """Writes the manifest and the file with its sha256."""
    jdump(manifest, folder / MANIFEST, indent=1)
    jdump(f"{sha256_file(folder / MANIFEST)}  {MANIFEST}\n", folder / f"{MANIFEST}.sha256")


def load_manifest(folder: Path) -> dict | None:
    """The manifest of the diff in `folder`, or None for a diff that never had one.

    Raises UserError where it is damaged, lost, or of a later format.
    """
    path, beside = folder / MANIFEST, folder / f"{MANIFEST}.sha256"
    if not path.is_file():
        if is_weight_diff(folder):
            raise UserError(f"{folder} was made with a manifest, and {MANIFEST} is not there. Fetch it again.")
        return None
    if not beside.is_file() or beside.read_bytes() != f"{sha256_file(path)}  {MANIFEST}\n".encode():
        raise UserError(f"{path} and {beside.name} do not agree: one of them is damaged. Fetch both again.")
    manifest = jload(path)
    if manifest.get("format") != FORMAT or manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path} is in format {manifest.get('format')!r} version {manifest.get('format_version')}; "
            f"this program reads {FORMAT!r} version {FORMAT_VERSION}. Use a newer one."
        )
    names = [*manifest["files"], *manifest["diff"], *manifest["tuned"], *manifest["travels"]]
    for name in [*names, *manifest["travels"].values()]:
        if name != Path(name).name or name in ("", ".", ".."):
            raise UserError(f"{path} names a file outside its folder: {name!r}. Do not use this diff.")
    return manifest


def check_small_files(folder: Path, manifest: dict) -> list[str]:
    """What is wrong with the diff's small files and safetensors headers, a sentence each."""
    problems = []
    for name, expected in manifest["files"].items():
        if not (folder / name).is_file():
            problems.append(f"{name} is missing from the diff {folder}.")
        elif (found := sha256_file(folder / name)) != expected:
            problems.append(f"{name} in the diff {folder} is damaged: sha256 {found}, the manifest says {expected}.")
    for name, expected in manifest["diff"].items():
        try:
            header, _ = read_header(folder / name)
        except (UserError, OSError) as error:
            problems.append(f"{name} in the diff: {error}")
            continue
        found = hashlib.sha256(header.encode()).hexdigest()
        if found != expected:
            problems.append(
                f"the header of {name} in the diff is damaged: sha256 {found}, the manifest says {expected}."
            )
    return problems


# ----------------------------------------------------------------------------------------------------------------------
# The base.


def base_problems(raw: Weights, manifest: dict, progress: Callable[[int], None]) -> Iterable[str]:
    """Yields what makes `raw` another model than the diff's base, one text a tensor; nothing when it is the base.

    Names, shapes and dtypes of all tensors first, which costs nothing, then the bytes, small tensors first.
    """
    needed = {name: entry for name, entry in manifest["tensors"].items() if "sha256_raw" in entry}
    wrong_shape = False
    for name, entry in needed.items():
        tensor = raw.get(name)
        if tensor is None or list(tensor.shape) != entry["raw_shape"] or tensor.dtype != entry["raw_dtype"]:
            wrong_shape = True
            yield _base_text(raw, manifest, name, tensor)
    if wrong_shape:
        return

    def check(name: str) -> str | None:
        tensor = raw.get(name)
        found = sha256_tensor(tensor, progress)
        if found != needed[name]["sha256_raw"]:
            return _base_text(raw, manifest, name, tensor, found)
        return None

    smallest_first = sorted(needed, key=lambda name: (raw.get(name).nbytes, name))
    for text in in_parallel(check, smallest_first):
        if text:
            yield text


def _base_text(raw: Weights, manifest: dict, name: str, tensor: Tensor | None, found: str | None = None) -> str:
    entry = manifest["tensors"][name]
    if tensor is None:
        return (
            f"the base {raw.folder} has no tensor {name}; the diff's base ({manifest['raw']['name']}) has. "
            "Probably another architecture, or another naming: convert it to the transformers format first."
        )
    if found is None:
        found = sha256_tensor(tensor)
    return (
        f"{name} of the base {raw.folder} is not the tensor that the diff was made from ({manifest['raw']['name']}).\n"
        f"  expected: {entry['raw_dtype']} {entry['raw_shape']}, sha256 {entry['sha256_raw']}\n"
        f"  found:    {tensor.dtype} {list(tensor.shape)}, sha256 {found}\n"
        f"  probably: {_probable_cause(raw, manifest, name, tensor, found)}"
    )


def _probable_cause(raw: Weights, manifest: dict, name: str, tensor: Tensor, found: str) -> str:
    entry = manifest["tensors"][name]
    expected_dtype, expected_shape = entry["raw_dtype"], tuple(entry["raw_shape"])
    if found == entry["sha256_tuned"] and found != entry["sha256_raw"]:
        return "the tuned model itself, not its base."
    if tensor.shape != expected_shape:
        if tensor.shape[1:] == expected_shape[1:]:
            first = Tensor(name, tensor.dtype, expected_shape, tensor.file, tensor.offset)
            same = tensor.shape[0] > expected_shape[0] and sha256_tensor(first) == entry["sha256_raw"]
            rest = "its first rows are the base's" if same else "its rows are not the base's either"
            return (
                f"a model whose vocabulary was resized to {tensor.shape[0]:,} rows ({rest}). Give the base as "
                f"published, with {expected_shape[0]:,} rows: new rows are added here."
            )
        return "another model: a size or architecture that this diff does not fit."
    if tensor.dtype != expected_dtype:
        both = {tensor.dtype, expected_dtype} <= set(FLOATS)
        same = both and sha256_tensor(tensor, dtype=expected_dtype) == entry["sha256_raw"]
        what = "the same weights in another dtype" if same else "a copy in another dtype, or another model"
        return f"{what}: the diff needs the {expected_dtype} files, these are {tensor.dtype}."
    if bit_sum(tensor) == entry["bit_sum_raw"]:
        return "another conversion of the same weights: the same numbers in another order. Convert as the README says."
    others = [
        other
        for other in sorted(manifest["tensors"], key=lambda n: (np.prod(manifest["tensors"][n]["shape"]), n))
        if "sha256_raw" in manifest["tensors"][other] and other != name
    ][:8]
    differing = sum(sha256_tensor(raw.get(other)) != manifest["tensors"][other]["sha256_raw"] for other in others)
    if differing:
        return f"another model, or another training of it: {differing} of {len(others)} other tensors differ too."
    return f"a damaged file ({tensor.file.name}), or another conversion: {len(others)} other tensors are right."


# ----------------------------------------------------------------------------------------------------------------------
# The diff's tensors, and a tuned or recovered model.


def diff_problems(folder: Path, manifest: dict) -> list[str]:
    """What is damaged among the diff's tensors and corrections, a sentence each. Headers are right by now."""
    checks = []
    for file in manifest["diff"]:
        field, what = ("sha256_diff", "") if file != CORRECTION else ("sha256_corrections", "corrections of ")
        for tensor in read_header(folder / file)[1]:
            checks.append(
                (f"{what}{tensor.name} in the diff ({file})", tensor, manifest["tensors"][tensor.name][field])
            )
    return _wrong_hashes(checks)


def tuned_problems(folder: Path, manifest: dict) -> list[str]:
    """What differs between the model in `folder` and the tuned model of the manifest, a sentence each."""
    try:
        tuned = open_weights(folder)
    except UserError as error:
        return [str(error)]
    problems, checks = [], []
    for file, header in manifest["tuned"].items():
        if file in tuned.shards and tuned.shards[file] != header:
            problems.append(f"the header of {file} in {folder} is not the tuned model's.")
    for name in sorted(set(tuned.tensors) - set(manifest["tensors"])):
        problems.append(f"{name} in {folder} is not a tensor of the tuned model.")
    for name, entry in manifest["tensors"].items():
        tensor = tuned.get(name)
        if tensor is None:
            problems.append(f"{name} is missing from {folder}.")
        elif (tensor.dtype, list(tensor.shape)) != (entry["tuned_dtype"], entry["shape"]):
            found = f"{tensor.dtype} {list(tensor.shape)}"
            problems.append(f"{name} in {folder} is {found}, not {entry['tuned_dtype']} {entry['shape']}.")
        else:
            checks.append((f"{name} in {folder} ({tensor.file.name})", tensor, entry["sha256_tuned"]))
    problems += _wrong_hashes(checks)
    for name, stored_as in manifest["travels"].items():
        if not (folder / name).is_file():
            problems.append(f"{name} is missing from {folder}.")
        elif (found := sha256_file(folder / name)) != manifest["files"][stored_as]:
            problems.append(f"{name} in {folder} has sha256 {found}, the manifest {manifest['files'][stored_as]}.")
    return problems


def _wrong_hashes(checks: list[tuple[str, Tensor, str]]) -> list[str]:
    hashes = in_parallel(lambda check: sha256_tensor(check[1]), checks)
    return [
        f"{what} is not right: sha256 {found}, the manifest says {expected}."
        for (what, _, expected), found in zip(checks, hashes, strict=True)
        if found != expected
    ]
