"""One tensor at a time: its difference from the base, its recovery from base and difference, and what corrects it.

Not a command; weight_diff.py imports it. A float tensor's difference is float32(tuned) - float32(raw), rounded to
float32; recovery is float32(raw) + difference, rounded to the tuned type. Where that misses the tuned bits (rounding,
-0.0, NaN payloads), the element's index and right bytes are kept as a correction.
"""

import contextlib
import hashlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from alpaca.common.errors import UserError
from alpaca.common.files import jload
from alpaca.weights.manifest import CORRECTION, bit_sum, bit_sum_of, sha256_tensor
from alpaca.weights.tensors import (
    FLOATS,
    PIECE,
    STORAGE,
    ShardWriter,
    Tensor,
    Weights,
    bits_of,
    from_float32,
    make_header,
    mean_row,
    pieces,
    read_header,
    to_float32,
)

Progress = Callable[[int], None]  # told the bytes just handled


def base_operand(
    base: Tensor, read: Callable[[int, int], np.ndarray], numel: int
) -> Callable[[int, int], tuple[np.ndarray, np.ndarray]]:
    """operand(start, count) -> (the base's stored elements of that range, what is subtracted or added there).

    The latter is float32 for float tensors, the elements themselves for integers. Where the tensor wanted has more
    rows than the base (`numel` elements in all), they are the mean of the base's rows.
    """
    floats = base.dtype in FLOATS
    new_row = mean_row(base) if numel > base.numel else None

    def operand(start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        stored = read(start, max(0, min(count, base.numel - start)))
        values = to_float32(stored, base.dtype) if floats else stored
        if len(values) < count:
            beyond = np.arange(start + len(values), start + count) - base.numel
            values = np.concatenate([values, new_row[beyond % len(new_row)]])
        return stored, values

    return operand


def add(operand: np.ndarray, diff: np.ndarray, dtype: str) -> np.ndarray:
    """The base's operand plus the difference, as stored elements of the tuned type."""
    with np.errstate(over="ignore", invalid="ignore"):
        total = operand + diff
    return from_float32(total, dtype) if dtype in FLOATS else total


def diff_tensor(raw: Weights, tuned: Tensor, entry: dict, writer: ShardWriter, spool: Path, progress: Progress) -> None:
    """Writes the difference of one tensor and completes its manifest entry (hashes, number of corrections).

    Corrections go to a file of their own in `spool`, since a tensor's worth of them may not fit in memory.
    """
    name, base = tuned.name, raw.get(tuned.name)
    if entry["how"] == "add":
        _subtract(base, tuned, entry, writer, spool, progress)
    else:
        hash_tuned = hashlib.sha256()
        with tuned.opened() as read:
            for start, count in pieces(tuned.numel):
                piece = read(start, count)
                hash_tuned.update(piece)
                writer.write(name, start, piece)
                progress(piece.nbytes)
        entry["sha256_tuned"] = entry["sha256_diff"] = hash_tuned.hexdigest()
        if base is not None:
            entry |= {"sha256_raw": sha256_tensor(base, progress), "bit_sum_raw": bit_sum(base)}


def _subtract(base: Tensor, tuned: Tensor, entry: dict, writer: ShardWriter, spool: Path, progress: Progress) -> None:
    floats = tuned.dtype in FLOATS
    hash_raw, hash_tuned, hash_diff, hash_corrections = (hashlib.sha256() for _ in range(4))
    bits, corrections = 0, None
    with contextlib.ExitStack() as stack:
        read_tuned, read_base = stack.enter_context(tuned.opened()), stack.enter_context(base.opened())
        operand = base_operand(base, read_base, tuned.numel)
        for start, count in pieces(tuned.numel):
            piece, (stored, values) = read_tuned(start, count), operand(start, count)
            with np.errstate(over="ignore", invalid="ignore"):
                diff = (to_float32(piece, tuned.dtype) if floats else piece) - values
            missed = bits_of(add(values, diff, tuned.dtype)) != bits_of(piece)
            if floats:  # what a NaN's payload becomes in a sum differs between processors
                missed |= ~np.isfinite(diff)
            wrong = np.flatnonzero(missed)
            if len(wrong):
                records = np.empty(len(wrong), correction_record(entry))
                records["index"], records["value"] = wrong + start, piece[wrong]
                if corrections is None:
                    corrections = stack.enter_context(open(spool / correction_file(tuned.name), "wb"))
                corrections.write(records.tobytes())
                hash_corrections.update(records.tobytes())
                entry["corrections"] += len(wrong)
            writer.write(tuned.name, start, diff)
            for digest, data in ((hash_tuned, piece), (hash_raw, stored), (hash_diff, diff)):
                digest.update(data)
            bits += bit_sum_of(stored)
            progress(piece.nbytes + stored.nbytes)
        for start in range(tuned.numel, base.numel, PIECE):  # rows that the tuned model no longer has
            stored = read_base(start, min(PIECE, base.numel - start))
            hash_raw.update(stored)
            bits += bit_sum_of(stored)
            progress(stored.nbytes)
    entry |= {"sha256_raw": hash_raw.hexdigest(), "bit_sum_raw": bits % 2**64}
    entry |= {"sha256_tuned": hash_tuned.hexdigest(), "sha256_diff": hash_diff.hexdigest()}
    if entry["corrections"]:
        entry["sha256_corrections"] = hash_corrections.hexdigest()


def recover_tensor(
    raw: Weights,
    diff: Tensor,
    corrections: Tensor | None,
    entry: Mapping,
    writer: ShardWriter | None,
    progress: Progress,
) -> dict:
    """Recovers one tensor into `writer` (None computes only); {"sha256": of the result, "sum": of its values}.

    The sum (float64) is taken for diffs without a manifest alone. Raises UserError where the diff's, the corrections'
    or the result's sha256 is not the entry's.
    """
    name, dtype = diff.name, entry["tuned_dtype"]
    base = raw.get(name) if entry["how"] == "add" else None
    known = "sha256_diff" in entry
    hash_diff, hash_result, total = hashlib.sha256(), hashlib.sha256(), 0.0
    with contextlib.ExitStack() as stack:
        read_diff = stack.enter_context(diff.opened())
        operand = base_operand(base, stack.enter_context(base.opened()), diff.numel) if base else None
        fixes = Corrections(stack.enter_context(corrections.opened()), entry) if corrections else None
        for start, count in pieces(diff.numel):
            piece = read_diff(start, count)
            if known:
                hash_diff.update(piece)
            result = piece
            if base:
                values = operand(start, count)[1]
                delta = to_float32(piece, diff.dtype) if diff.dtype in FLOATS else piece
                if entry.get("raw_times") == 2:
                    delta = delta + values
                result = add(values, delta, dtype)
            if fixes:
                fixes.apply(result, start)
            hash_result.update(result)
            if not known:
                numbers = to_float32(result, dtype) if dtype in FLOATS else result
                total += float(numbers.sum(dtype=np.float64))
            if writer:
                writer.write(name, start, result)
            progress(piece.nbytes)
    result = {"sha256": hash_result.hexdigest(), "sum": total}
    if known:
        _must_equal(f"{name} of the diff ({diff.file})", hash_diff.hexdigest(), entry["sha256_diff"])
        if fixes:
            where = f"the corrections of {name} in the diff ({corrections.file})"
            _must_equal(where, fixes.digest.hexdigest(), entry["sha256_corrections"])
        if result["sha256"] != entry["sha256_tuned"]:
            raise UserError(
                f"{name} came out with sha256 {result['sha256']}, the manifest says {entry['sha256_tuned']}, though "
                "base and diff were right when they were checked: a file changed meanwhile, or the memory is faulty."
            )
    return result


def _must_equal(what: str, found: str, expected: str) -> None:
    if found != expected:
        raise UserError(f"{what} is damaged: sha256 {found}, the manifest says {expected}. Fetch that file again.")


def subtracted_twice(diff: Tensor, base: Tensor, config_file: Path) -> bool:
    """Whether a diff of tied embeddings holds tuned - 2 raw, as the original's make_diff leaves it.

    Its state dict lists tied weights under two names, and it subtracts under both. Such a tensor is close to -raw,
    a right one is small beside raw.
    """
    config = jload(config_file) if config_file.is_file() else {}
    tied_by_default = config.get("model_type") in ("opt", "gpt2", "bloom", "gemma", "gpt_neo")
    if not config.get("tie_word_embeddings", tied_by_default) or not base.name.endswith(TIED_NAMES):
        return False
    count = min(base.numel, diff.numel, PIECE)
    with base.opened() as read_base, diff.opened() as read_diff:
        values = to_float32(read_base(0, count), base.dtype).astype(np.float64)
        delta = to_float32(read_diff(0, count), diff.dtype).astype(np.float64)
    return float(delta @ values) < -0.5 * float(values @ values)


TIED_NAMES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "lm_head.weight")


# ----------------------------------------------------------------------------------------------------------------------
# Corrections.


def correction_record(entry: Mapping) -> np.dtype:
    """One correction: the flat index of an element, then the bytes that belong there. Little endian, packed."""
    count = int(np.prod(entry["shape"], dtype=np.int64))
    return np.dtype([("index", "<u4" if count <= 2**32 else "<u8"), ("value", STORAGE[entry["tuned_dtype"]])])


def correction_file(name: str) -> str:
    """The spool file of a tensor's corrections; the hash keeps any tensor name a legal file name."""
    return hashlib.sha256(name.encode()).hexdigest()


class Corrections:
    """The corrections of one tensor, applied in the order of its pieces; `digest` is their sha256 in the end."""

    def __init__(self, read: Callable[[int, int], np.ndarray], entry: Mapping):
        self.read, self.record = read, correction_record(entry)
        self.left, self.at, self.digest = entry["corrections"], 0, hashlib.sha256()
        self.loaded = np.empty(0, self.record)

    def apply(self, piece: np.ndarray, start: int) -> None:
        """Sets the elements of `piece`, which begins at element `start` of the tensor."""
        while True:
            inside = int(np.searchsorted(self.loaded["index"], start + len(piece)))
            here, self.loaded = self.loaded[:inside], self.loaded[inside:]
            piece[here["index"] - start] = here["value"]
            if len(self.loaded) or not self.left:
                return
            count, size = min(self.left, PIECE // 4), self.record.itemsize
            data = self.read(self.at * size, count * size)
            self.digest.update(data)
            self.loaded, self.at, self.left = data.view(self.record), self.at + count, self.left - count


def gather_corrections(spool: Path, work: Path, manifest: dict) -> None:
    """Joins the spool files into one safetensors file of bytes, [corrections, bytes of a record] per tensor."""
    entries = {name: entry for name, entry in manifest["tensors"].items() if entry["corrections"]}
    if entries:
        header = make_header(
            (name, "U8", (entry["corrections"], correction_record(entry).itemsize)) for name, entry in entries.items()
        )
        manifest["diff"][CORRECTION] = hashlib.sha256(header.encode()).hexdigest()
        with ShardWriter(work / CORRECTION, header) as writer:
            for name, tensor in writer.tensors.items():
                spooled = Tensor(name, "U8", tensor.shape, spool / correction_file(name), 0)
                with spooled.opened() as read:
                    for start, count in pieces(tensor.numel):
                        writer.write(name, start, read(start, count))
    shutil.rmtree(spool)


def correction_tensors(folder: Path, manifest: Mapping) -> dict[str, Tensor]:
    """Where each tensor's corrections lie, by the tensor's name."""
    if CORRECTION not in manifest["diff"]:
        return {}
    return {tensor.name: tensor for tensor in read_header(folder / CORRECTION)[1]}
