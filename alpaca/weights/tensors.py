"""Weights on disk, read and written piece by piece: where each tensor lies, its bytes, and float32 arithmetic on them.

The safetensors library checks a file's header; the bytes that it points at are read with plain reads. The library's own
reads map the file, whose pages then count as the process's memory, and need torch for bfloat16 and float8.
"""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from alpaca.common.errors import UserError
from alpaca.common.files import jload, refuse_lfs_pointer

# safetensors' names of the types, and the numpy type that holds their bytes. numpy has no bfloat16 and no float8:
# those are read as unsigned integers.
STORAGE = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "C64": "<c8",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1",
    "BOOL": "u1", "F8_E4M3": "u1", "F8_E5M2": "u1", "F8_E8M0": "u1",
}  # fmt: skip
FLOATS = ("F32", "F16", "BF16")  # every value of these is a float32 too
INTEGERS = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8")
PIECE = 1 << 19  # elements handled at once: 2 MB of float32, some 15 MB with all that is made of them
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN_SINGLE, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


@dataclass(frozen=True)
class Tensor:
    """Where one tensor's bytes lie. `dtype` is safetensors' name for it, `offset` counts from the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * itemsize(self.dtype)


@dataclass(frozen=True)
class Weights:
    """A model's tensors by name; `shards` holds each safetensors file's header text ({} for .bin files).

    `aliases` maps a name in a .bin that shares its storage with another (tied weights) to that other name.
    """

    folder: Path
    tensors: dict[str, Tensor]
    shards: dict[str, str]
    aliases: dict[str, str]

    def get(self, name: str) -> Tensor | None:
        """The tensor of that name, or of the name that it is tied to."""
        return self.tensors.get(self.aliases.get(name, name))


def itemsize(dtype: str) -> int:
    """Bytes of one element."""
    return np.dtype(STORAGE[dtype]).itemsize


def pieces(numel: int) -> Iterator[tuple[int, int]]:
    """(start, count) of each piece of a tensor of `numel` elements."""
    for start in range(0, numel, PIECE):
        yield start, min(PIECE, numel - start)


# ----------------------------------------------------------------------------------------------------------------------
# Reading.


def read(tensor: Tensor, start: int, count: int) -> np.ndarray:
    """Elements `start` to `start + count` of a tensor, as stored, one-dimensional; fewer where the tensor ends."""
    count = max(0, min(count, tensor.numel - start))
    place = tensor.offset + start * itemsize(tensor.dtype)
    piece = np.fromfile(tensor.file, STORAGE[tensor.dtype], count, offset=place)
    if len(piece) < count:
        raise UserError(f"{tensor.file} ends inside {tensor.name}: the file is cut short. Fetch it again.")
    return piece


def open_weights(folder: str | os.PathLike) -> Weights:
    """Finds every tensor of the model in `folder`; reads headers and indexes only.

    Raises UserError where the folder holds no weights, a shard is missing, a file is damaged or a git-lfs pointer, or
    the index and the shards disagree.
    """
    folder = Path(folder)
    index_name = next((name for name in (INDEX, SINGLE, BIN_INDEX, BIN_SINGLE) if (folder / name).is_file()), None)
    if index_name is None:
        raise UserError(_no_weights(folder))
    index = _read_index(folder / index_name) if index_name in (INDEX, BIN_INDEX) else {}
    tensors: dict[str, Tensor] = {}
    shards, aliases = {}, {}
    for file in sorted(set(index.values())) or [index_name]:
        if file.endswith(".bin"):
            found, tied = read_torch_file(folder / file)
            aliases |= tied
        else:
            shards[file], found = read_header(folder / file)
        for tensor in found:
            if tensor.name in tensors:
                raise UserError(f"{tensor.name} is in both {tensors[tensor.name].file} and {tensor.file}.")
            tensors[tensor.name] = tensor
    for name in sorted(set(index) - set(tensors) - set(aliases)):
        raise UserError(f"{folder / index_name} promises {name} in {index[name]}, which does not hold it.")
    return Weights(folder, tensors, shards, aliases)


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index of a model in several files, which are all there."""
    index = jload(path)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places:
        raise UserError(f"{path} has no weight_map.")
    for file in places.values():
        if not isinstance(file, str) or file != Path(file).name:
            raise UserError(f"{path} points outside its folder: {file!r}.")
    files = sorted(set(places.values()))
    missing = [file for file in files if not (path.parent / file).is_file()]
    if missing:
        held = f"{len(missing)} of {len(files)} shards"
        raise UserError(f"{path} names {held} that are not there: {', '.join(missing)}. Fetch them.")
    return places


def _no_weights(folder: Path) -> str:
    held = ", ".join(sorted(path.name for path in folder.iterdir())[:12]) or "nothing"
    text = f"{folder} holds no weights: expected {SINGLE}, {INDEX} or {BIN_SINGLE}; found {held}."
    meta = sorted(folder.glob("consolidated.*.pth")) or sorted(folder.glob("*/consolidated.*.pth"))
    if meta:
        text += (
            " These are Meta's own files. Convert them first:\n"
            f"  python convert_llama.py --input_dir {meta[0].parent} --output_dir llama-hf"
        )
    elif (folder / "adapter_config.json").is_file():
        text += (
            " It is a LoRA adapter. Train with --merge_lora True, or merge it into its base first:\n"
            f"  python inference.py serve --model_name_or_path {folder} --merged_dir MERGED"
        )
    elif any(folder.glob("*.gguf")):
        text += " A GGUF file is a model quantised for llama.cpp: give the model in the transformers format."
    return text


def read_header(path: Path) -> tuple[str, list[Tensor]]:
    """A safetensors file's header text and its tensors in the order of their bytes.

    Raises UserError where the library finds the header damaged, or the file longer or shorter than it says.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing. Fetch it.")
    refuse_lfs_pointer(path)
    try:
        with safe_open(path, "np"):
            pass
    except SafetensorError as error:
        raise UserError(f"{path} is cut short or its header is damaged ({error}). Fetch the file again.") from error
    with open(path, "rb") as stream:
        text = stream.read(int.from_bytes(stream.read(8), "little")).decode()
    return text, parse_header(text, path)


def read_torch_file(path: Path) -> tuple[list[Tensor], dict[str, str]]:
    """The tensors of a torch.save file, and the names that share their storage with another: name -> that other name.

    Raises UserError where the file is damaged, or holds other things than tensors.
    """
    from alpaca.weights.torch_files import torch_table  # here, where such a file is met: it imports torch

    tensors, aliases, by_place = [], {}, {}
    for name, dtype, shape, offset in torch_table(path):
        tensor = Tensor(name, dtype, shape, path, offset)
        twin = by_place.setdefault((offset, shape, dtype), tensor)
        if twin is not tensor and tensor.numel:
            aliases[name] = twin.name
        else:
            tensors.append(tensor)
    return tensors, aliases


def parse_header(text: str, path: Path) -> list[Tensor]:
    """The tensors of a safetensors file at `path`, which need not exist yet, with this header text, in its order."""
    start, tensors = 8 + len(text.encode()), []
    for name, spec in json.loads(text).items():
        if name == "__metadata__":
            continue
        if spec["dtype"] not in STORAGE:
            raise UserError(f"{name} in {path} is of the type {spec['dtype']}, which this program does not know.")
        tensors.append(Tensor(name, spec["dtype"], tuple(spec["shape"]), path, start + spec["data_offsets"][0]))
    return sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes))


# ----------------------------------------------------------------------------------------------------------------------
# Writing.


def make_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> str:
    """The header text of a safetensors file that holds (name, dtype, shape) tensors, in the library's order.

    Wider types first, then by name, so that every tensor is aligned; padded with blanks to a multiple of 8 bytes.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, dtype, shape in sorted(tensors, key=lambda t: (-itemsize(t[1]), t[0])):
        begin, end = end, end + math.prod(shape) * itemsize(dtype)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
    return text + " " * (-len(text.encode()) % 8)


def file_size(header: str) -> int:
    """Bytes of the safetensors file with this header text."""
    return 8 + len(header.encode()) + sum(tensor.nbytes for tensor in parse_header(header, Path()))


Write = Callable[[str, int, np.ndarray], None]


@contextlib.contextmanager
def new_shard(path: Path, header: str) -> Iterator[Write]:
    """Makes the safetensors file `path` with this header text.

    Yields write(name, start, piece), which puts a one-dimensional piece at element `start` of a tensor; threads may
    write different tensors at once. The bytes go to `path`.partial, which is synced and renamed when the block ends
    well.
    """
    partial, tensors = path.with_name(path.name + ".partial"), {t.name: t for t in parse_header(header, path)}
    encoded = header.encode()
    with open(partial, "wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        stream.truncate(file_size(header))
        stream.flush()

        def write(name: str, start: int, piece: np.ndarray) -> None:
            offset, data = tensors[name].offset + start * piece.itemsize, memoryview(piece.view(np.uint8))
            while data:
                done = os.pwrite(stream.fileno(), data, offset)
                data, offset = data[done:], offset + done

        yield write
        os.fsync(stream.fileno())
    os.replace(partial, path)


# ----------------------------------------------------------------------------------------------------------------------
# Arithmetic that comes out the same on every machine.


_HALVES = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)


def to_float32(piece: np.ndarray, dtype: str) -> np.ndarray:
    """The stored elements of an F32, F16 or BF16 tensor as float32; exact."""
    if dtype == "BF16":
        return (piece.astype(np.uint32) << 16).view(np.float32)
    if dtype == "F16":  # a table of all 65,536 values: twice as fast as numpy's cast
        return np.take(_HALVES, piece.view(np.uint16), mode="clip")
    return piece


def from_float32(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values rounded to nearest, ties to even, as stored elements of an F32, F16 or BF16 tensor."""
    if dtype == "F32":
        return values
    if dtype == "F16":
        with np.errstate(over="ignore", invalid="ignore"):
            return values.astype(np.float16)
    bits = values.view(np.uint32)
    rounded = bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))
    rounded >>= 16
    not_a_number = np.isnan(values)
    if not_a_number.any():  # the carry would turn some into zero or infinity
        rounded[not_a_number] = 0x7FC0
    return rounded.astype(np.uint16)


def bits_of(piece: np.ndarray) -> np.ndarray:
    """The same bytes as unsigned integers, so that -0.0 and 0.0, or two NaNs, are told apart."""
    return piece.view(f"u{min(piece.itemsize, 8)}")


def mean_row(tensor: Tensor) -> np.ndarray:
    """The mean of all rows of an F32, F16 or BF16 tensor, as float32 [elements of a row].

    Blocks of 256 rows are summed in float64 in the order of the file, so the result does not depend on the machine,
    on threads or on PIECE; float32 sums would. Source of the rule: the original's embedding resize.
    """
    rows, width = tensor.shape[0], tensor.numel // tensor.shape[0]
    total = np.zeros(width, np.float64)
    for first in range(0, rows, 256):
        block = to_float32(read(tensor, first * width, 256 * width), tensor.dtype).reshape(-1, width)
        total += block.sum(axis=0, dtype=np.float64)
    return (total / rows).astype(np.float32)
