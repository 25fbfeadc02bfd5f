"""Weights on disk, read and written piece by piece: safetensors shards, and pytorch_model*.bin of old checkpoints.

Not a command; weight_diff.py imports it. It needs numpy alone (torch only to open a .bin), so a process that streams
a model stays at some 100 MB. safetensors' own `safe_open` maps whole files, and mapped pages count as the process's
memory; here the header is read (8 bytes of length, then JSON) and the bytes it points at are read with plain reads.

    weights = open_weights("model_folder")
    for name, tensor in weights.tensors.items():
        with tensor.opened() as read:
            first = read(0, 10)             # the first ten elements
"""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alpaca.common.errors import UserError
from alpaca.common.files import jload

# safetensors' names of the types, and the numpy type that holds their bytes. numpy has no bfloat16 and no float8:
# those travel as unsigned integers.
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
_LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit


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

    @contextlib.contextmanager
    def opened(self) -> Iterator[Callable[[int, int], np.ndarray]]:
        """Yields read(start, count) -> `count` elements from element `start` on, one-dimensional, as stored."""
        descriptor = os.open(self.file, os.O_RDONLY)
        size = itemsize(self.dtype)

        def read(start: int, count: int) -> np.ndarray:
            piece = np.empty(count, STORAGE[self.dtype])
            view, done = memoryview(piece).cast("B") if count else b"", 0
            while done < len(view):
                got = os.preadv(descriptor, [view[done:]], self.offset + start * size + done)
                if not got:
                    raise UserError(f"{self.file} ends inside {self.name}: the file is cut short. Fetch it again.")
                done += got
            return piece

        try:
            yield read
        finally:
            os.close(descriptor)


@dataclass(frozen=True)
class Weights:
    """A model's tensors by name; `shards` holds each safetensors file's header text ({} for .bin files).

    `aliases` maps a name in a .bin that shares its storage with another (tied weights) to that other name.
    """

    folder: Path
    tensors: dict[str, Tensor]
    shards: dict[str, str]
    aliases: dict[str, str]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def get(self, name: str) -> Tensor | None:
        """The tensor of that name, or of the name that it is tied to."""
        return self.tensors.get(self.aliases.get(name, name))

    def by_file(self) -> dict[str, list[str]]:
        """File name -> the names of its tensors, both in order."""
        files: dict[str, list[str]] = {}
        for tensor in sorted(self.tensors.values(), key=lambda t: (t.file.name, t.offset)):
            files.setdefault(tensor.file.name, []).append(tensor.name)
        return files


def itemsize(dtype: str) -> int:
    """Bytes of one element."""
    return np.dtype(STORAGE[dtype]).itemsize


def pieces(numel: int) -> Iterator[tuple[int, int]]:
    """(start, count) of each piece of a tensor of `numel` elements."""
    for start in range(0, numel, PIECE):
        yield start, min(PIECE, numel - start)


# ----------------------------------------------------------------------------------------------------------------------
# Reading.


def open_weights(folder: str | os.PathLike) -> Weights:
    """Finds every tensor of the model in `folder`; reads headers and indexes only.

    Raises UserError where the folder holds no weights, a shard is missing, a file is damaged or the index and the
    shards disagree.
    """
    folder = Path(folder)
    if (folder / INDEX).is_file():
        files, index = _indexed_files(folder, INDEX)
    elif (folder / SINGLE).is_file():
        files, index = [SINGLE], None
    elif (folder / BIN_INDEX).is_file():
        files, index = _indexed_files(folder, BIN_INDEX)
    elif (folder / BIN_SINGLE).is_file():
        files, index = [BIN_SINGLE], None
    else:
        held = ", ".join(sorted(path.name for path in folder.iterdir())[:12]) or "nothing"
        hint = ""
        if (folder / "adapter_config.json").is_file():
            hint = " It is a LoRA adapter: merge it into its base first (train.py writes the merged model)."
        raise UserError(f"{folder} holds no weights: expected {SINGLE}, {INDEX} or {BIN_SINGLE}; found {held}.{hint}")

    tensors: dict[str, Tensor] = {}
    shards, aliases = {}, {}
    for file in files:
        if file.endswith(".bin"):
            found, tied = open_torch_file(folder / file)
            aliases.update(tied)
        else:
            shards[file], found = read_header(folder / file)
        for tensor in found:
            if tensor.name in tensors:
                raise UserError(f"{tensor.name} is in both {tensors[tensor.name].file} and {tensor.file}.")
            tensors[tensor.name] = tensor
    if index is not None:
        lacking = sorted(set(index) - set(tensors) - set(aliases))
        if lacking:
            name = INDEX if shards else BIN_INDEX
            raise UserError(f"{folder / name} promises {lacking[0]} in {index[lacking[0]]}, which does not hold it.")
    return Weights(folder, tensors, shards, aliases)


def _indexed_files(folder: Path, index_name: str) -> tuple[list[str], dict[str, str]]:
    index = jload(folder / index_name)
    if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
        raise UserError(f"{folder / index_name} has no weight_map.")
    files = sorted(set(index["weight_map"].values()))
    for file in files:
        if file != Path(file).name:
            raise UserError(f"{folder / index_name} points outside its folder: {file!r}.")
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        held = f"{len(missing)} of {len(files)} shards"
        raise UserError(f"{folder / index_name} names {held} that are not there: {', '.join(missing)}. Fetch them.")
    return files, index["weight_map"]


def read_header(path: Path) -> tuple[str, list[Tensor]]:
    """A safetensors file's header text and its tensors in the order of their bytes.

    Raises UserError where the header cannot be read, or does not describe exactly the bytes that follow it.
    """
    size = path.stat().st_size
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
            raise UserError(f"{path} is not a whole safetensors file: it is cut short, or its first bytes are damaged.")
        raw = stream.read(length)
    try:
        text = raw.decode("utf-8")
        tensors = [
            Tensor(name, spec["dtype"], tuple(spec["shape"]), path, 8 + length + spec["data_offsets"][0])
            for name, spec in json.loads(text).items()
            if name != "__metadata__"
        ]
        tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise UserError(f"the header of {path} is damaged ({type(error).__name__}: {error}).") from error
    end = 8 + length
    for tensor in tensors:
        if tensor.offset != end:
            raise UserError(f"the header of {path} is damaged: {tensor.name} does not follow the tensor before it.")
        end += tensor.nbytes
    if end != size:
        raise UserError(f"{path} holds {size:,} bytes, its header describes {end:,}: it is cut short or damaged.")
    return text, tensors


def open_torch_file(path: Path) -> tuple[list[Tensor], dict[str, str]]:
    """Tensors of a torch.save file, which is a zip whose members are not compressed: each has one place in the file.

    On the meta device torch unpickles (weights only, no code) the table of tensors and notes each storage's offset.
    """
    import torch

    try:
        state = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # noqa: BLE001 - torch raises what its zip reader and unpickler come upon
        reason = str(error).split("\n")[0]
        raise UserError(f"{path} cannot be read as a file of weights ({reason}). Fetch it again.") from error
    names = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
             torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
             torch.bool: "BOOL"}  # fmt: skip
    found, aliases = {}, {}
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise UserError(f"{path}: {name} is not a tensor. Expected a state dict: names and tensors.")
        offset = value.untyped_storage()._checkpoint_offset
        if offset is None or not value.is_contiguous() or value.dtype not in names:
            raise UserError(
                f"{path}: {name} is not stored in one piece (written by torch before 1.6, or a view). Load the model "
                "with transformers and save_pretrained it once: that writes safetensors."
            )
        place = offset + value.storage_offset() * value.element_size()
        tensor = Tensor(name, names[value.dtype], tuple(value.shape), path, place)
        twin = found.get((place, tensor.shape, tensor.dtype))
        if twin is not None and tensor.numel:
            aliases[name] = twin.name
        else:
            found[(place, tensor.shape, tensor.dtype)] = tensor
    return list(found.values()), aliases


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


def header_tensors(text: str, path: Path) -> dict[str, Tensor]:
    """The tensors that a header of this text describes, in a file at `path` (which need not exist)."""
    start = 8 + len(text.encode())
    return {
        name: Tensor(name, spec["dtype"], tuple(spec["shape"]), path, start + spec["data_offsets"][0])
        for name, spec in json.loads(text).items()
        if name != "__metadata__"
    }


def header_file_size(text: str) -> int:
    """Bytes of the file with this header."""
    return 8 + len(text.encode()) + sum(tensor.nbytes for tensor in header_tensors(text, Path()).values())


class ShardWriter:
    """Writes a safetensors file with the given header; threads may write different tensors at once.

    The bytes go to `path`.partial, which is synced and given its name when the `with` block ends well.
    """

    def __init__(self, path: Path, header: str):
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        self.tensors = header_tensors(header, path)
        self.descriptor = os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        encoded = header.encode()
        self._write(len(encoded).to_bytes(8, "little") + encoded, 0)
        os.ftruncate(self.descriptor, header_file_size(header))

    def write(self, name: str, start: int, piece: np.ndarray) -> None:
        """Puts `piece` (one-dimensional, in the storage type of the tensor) at element `start` of tensor `name`."""
        tensor = self.tensors[name]
        self._write(memoryview(piece).cast("B"), tensor.offset + start * itemsize(tensor.dtype))

    def _write(self, data, offset: int) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self.descriptor, data[done:], offset + done)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, failed, *_) -> None:
        try:
            if not failed:
                os.fsync(self.descriptor)
        finally:
            os.close(self.descriptor)
        if not failed:
            os.replace(self.partial, self.path)


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
    if piece.dtype.itemsize == 1:
        return piece.view(np.uint8)
    width = min(piece.dtype.itemsize, 8)
    return piece.view(f"<u{width}")


def mean_row(tensor: Tensor) -> np.ndarray:
    """The mean of all rows of an F32, F16 or BF16 tensor, as float32 [elements of a row].

    Blocks of 256 rows are summed in float64 in the order of the file, so the result does not depend on the machine,
    on threads or on PIECE; float32 sums would. Source of the rule: the original's embedding resize.
    """
    rows, width = tensor.shape[0], tensor.numel // tensor.shape[0]
    total = np.zeros(width, np.float64)
    with tensor.opened() as read:
        for first in range(0, rows, 256):
            count = min(256, rows - first)
            block = to_float32(read(first * width, count * width), tensor.dtype).reshape(count, width)
            total += block.sum(axis=0, dtype=np.float64)
    return (total / rows).astype(np.float32)
