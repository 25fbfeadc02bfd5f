"""The manifest of a weight diff, and the hashes in it.

weight_diff_manifest.json holds

    format, format_version
    raw       name of the base; the names of tensors that only it has
    new_rows  how rows that only the tuned model has were given a base value
    tensors   per tensor: how (add | stored), shapes, dtypes, sha256 of raw, tuned and diff bytes, corrections
    tuned     file name -> header text of each safetensors file that recover writes
    diff      file name -> sha256 of the header of each file of the diff
    files     file name -> sha256 of every small file of the diff
    travels   file name in the recovered folder -> file name in the diff
    whole_tensors   (only with --allow_whole_tensors) the tensors that are the tuned model's own, not a difference

and stands beside weight_diff_manifest.json.sha256, which `sha256sum -c` reads.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from alpaca.common.cores import CORES
from alpaca.common.errors import UserError
from alpaca.common.files import jdump, jload
from alpaca.common.run_record import sha256_file
from alpaca.weights.tensors import Tensor, bits_of, from_float32, parse_header, pieces, read, read_header, to_float32

FORMAT, FORMAT_VERSION = "alpaca weight diff", 1
MANIFEST = "weight_diff_manifest.json"
CORRECTION = "weight_diff_correction.safetensors"
NEW_ROWS = (
    "mean of all rows of the base tensor: blocks of 256 rows summed in float64 in order, divided by the number of "
    "rows, rounded to float32"
)


def in_parallel(function: Callable, tensors: Sequence[Tensor], bar: tqdm) -> Iterator:
    """function(tensor) for every tensor over the cores, results in order; the first error in order is raised.

    `bar` is moved on by each tensor's bytes. hashlib and numpy release Python's lock. After an error nothing new is
    started, and what is running is waited for.
    """
    pool = ThreadPoolExecutor(max_workers=min(8, CORES))
    try:
        for tensor, result in zip(tensors, pool.map(function, tensors), strict=True):
            bar.update(tensor.nbytes)
            yield result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def bytes_bar(title: str, tensors: Iterable[Tensor]) -> tqdm:
    """A bar over the bytes of these tensors, with rate and time left; on a terminal alone."""
    total = sum(tensor.nbytes for tensor in tensors)
    return tqdm(desc=title, total=total, unit="B", unit_scale=True, disable=None)


def sha256_tensor(tensor: Tensor, dtype: str | None = None) -> str:
    """Hex sha256 of a tensor's bytes as stored, or of its values rounded to `dtype` (floating types only)."""
    digest = hashlib.sha256()
    for start, count in pieces(tensor.numel):
        piece = read(tensor, start, count)
        digest.update(piece if dtype is None else from_float32(to_float32(piece, tensor.dtype), dtype))
    return digest.hexdigest()


def bit_sum(tensor: Tensor) -> int:
    """Sum of the elements' bits read as unsigned integers, modulo 2**64: the same for the same values in any order."""
    return sum(bit_sum_of(read(tensor, start, count)) for start, count in pieces(tensor.numel)) % 2**64


def bit_sum_of(piece: np.ndarray) -> int:
    return int(bits_of(piece).sum(dtype=np.uint64))


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def is_weight_diff(path: str | os.PathLike) -> bool:
    """Whether a local folder is a weight diff made by this project, not a model; cheap."""
    folder = Path(path)
    return (folder / MANIFEST).is_file() or "weight_diff" in read_config(folder)


def read_config(folder: Path) -> dict:
    """The model's config.json, {} where there is none; UserError where it is no JSON object."""
    path = folder / "config.json"
    config = jload(path) if path.is_file() else {}
    if not isinstance(config, dict):
        raise UserError(f"{path} holds a {type(config).__name__}, not the settings of a model.")
    return config


def write_manifest(folder: Path, manifest: dict) -> None:
    """Writes the manifest and the file with its sha256."""
    jdump(manifest, folder / MANIFEST, indent=1)
    jdump(f"{sha256_file(folder / MANIFEST)}  {MANIFEST}\n", folder / f"{MANIFEST}.sha256")


def load_manifest(folder: Path) -> dict | None:
    """The manifest of the diff in `folder`, or None for a diff that never had one.

    Raises UserError where it is damaged, lost, of a later format, or names files outside the folder.
    """
    path, beside = folder / MANIFEST, folder / f"{MANIFEST}.sha256"
    if not path.is_file():
        if is_weight_diff(folder):
            raise UserError(f"{folder} was made with a manifest, and {MANIFEST} is not there. Fetch it again.")
        return None
    if not beside.is_file() or beside.read_bytes() != f"{sha256_file(path)}  {MANIFEST}\n".encode():
        raise UserError(f"{path} and {beside.name} do not agree: one of them is damaged. Fetch both again.")
    manifest = jload(path)
    try:
        if manifest["format"] != FORMAT or manifest["format_version"] != FORMAT_VERSION:
            raise UserError(
                f"{path} is in format {manifest['format']!r} version {manifest['format_version']}; "
                f"this program reads {FORMAT!r} version {FORMAT_VERSION}. Use a newer one."
            )
        names = [*manifest["files"], *manifest["diff"], *manifest["tuned"], *manifest["travels"]]
        for name in [*names, *manifest["travels"].values()]:
            if name != Path(name).name or name in ("", ".", ".."):
                raise UserError(f"{path} names a file outside its folder: {name!r}. Do not use this diff.")
        written = {
            t.name: (t.dtype, list(t.shape)) for text in manifest["tuned"].values() for t in parse_header(text, path)
        }
        if written != {name: (entry["tuned_dtype"], entry["shape"]) for name, entry in manifest["tensors"].items()}:
            raise UserError(f"{path} describes its tensors in two ways. Do not use this diff.")
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path} is not a manifest of this program ({type(error).__name__}: {error}).") from error
    return manifest


def correction_tensors(folder: Path, manifest: Mapping) -> dict[str, Tensor]:
    """Where each tensor's corrections lie, by the tensor's name."""
    if CORRECTION not in manifest["diff"]:
        return {}
    return {tensor.name: tensor for tensor in read_header(folder / CORRECTION)[1]}
