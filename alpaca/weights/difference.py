"""make_diff and recover, tensor by tensor: read, subtract or add, correct, hash, write.

A float tensor's difference is float32(tuned) - float32(raw), rounded to float32; recovery is float32(raw) + difference,
rounded to the tuned type. Where that misses the tuned bits (rounding, -0.0, NaN payloads), the element's index and its
right bytes are kept as a correction.
"""

import bisect
import contextlib
import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from alpaca.common.errors import UserError
from alpaca.common.files import jdump, jload
from alpaca.weights.manifest import CORRECTION, bit_sum_of, bytes_bar, in_parallel, sha256_tensor
from alpaca.weights.tensors import (
    FLOATS,
    STORAGE,
    Tensor,
    Weights,
    Write,
    bits_of,
    from_float32,
    make_header,
    mean_row,
    new_shard,
    parse_header,
    pieces,
    read,
    read_header,
    to_float32,
)

PROGRESS = "progress.json"  # in the work folder: per finished shard, the sha256 and sum of its tensors


# ----------------------------------------------------------------------------------------------------------------------
# Arithmetic on one piece of a tensor.


def new_row(base: Tensor | None, numel: int) -> np.ndarray | None:
    """The base's value for each row that a tensor of `numel` elements has and the base has not; None without such."""
    return mean_row(base) if base and numel > base.numel else None


def base_values(stored: np.ndarray, base: Tensor, row: np.ndarray | None, start: int, count: int) -> np.ndarray:
    """What is subtracted or added at elements `start` to `start + count`: float32, or integers as they are stored.

    stored: the base's elements there, fewer than `count` where the base ends; each row beyond is `row`.
    """
    values = to_float32(stored[:count], base.dtype) if base.dtype in FLOATS else stored[:count]
    if len(values) < count:
        beyond = np.arange(start + len(values), start + count) - base.numel
        values = np.concatenate([values, row[beyond % len(row)]])
    return values


def add(values: np.ndarray, diff: np.ndarray, dtype: str) -> np.ndarray:
    """The base's values plus the difference, as stored elements of the tuned type; integers wrap round."""
    with np.errstate(over="ignore", invalid="ignore"):
        total = values + diff
    return from_float32(total, dtype) if dtype in FLOATS else total


def subtract(piece: np.ndarray, values: np.ndarray, start: int, entry: Mapping) -> tuple[np.ndarray, np.ndarray]:
    """A piece of the tuned tensor minus the base's values, and the records of what adding that again would miss."""
    floats = entry["tuned_dtype"] in FLOATS
    with np.errstate(over="ignore", invalid="ignore"):
        diff = (to_float32(piece, entry["tuned_dtype"]) if floats else piece) - values
    missed = bits_of(add(values, diff, entry["tuned_dtype"])) != bits_of(piece)
    if floats:  # what a NaN's payload becomes in a sum differs between processors
        missed |= ~np.isfinite(diff)
    wrong = np.flatnonzero(missed)
    records = np.empty(len(wrong), correction_record(entry))
    records["index"], records["value"] = wrong + start, piece[wrong]
    return diff, records


def correction_record(entry: Mapping) -> np.dtype:
    """One correction: the flat index of an element, then the bytes that belong there. Little endian, packed."""
    count = int(np.prod(entry["shape"], dtype=np.int64))
    return np.dtype([("index", "<u4" if count <= 2**32 else "<u8"), ("value", STORAGE[entry["tuned_dtype"]])])


# ----------------------------------------------------------------------------------------------------------------------
# make_diff.


def make_tensor(base: Tensor | None, tuned: Tensor, entry: dict, write: Write, spooled: Path) -> None:
    """Writes the difference of one tensor, its corrections to a file of their own, and completes its manifest entry."""
    adds = entry["how"] == "add"
    row = new_row(base, tuned.numel) if adds else None
    sha, bits = {of: hashlib.sha256() for of in ("raw", "tuned", "diff", "corrections")}, 0
    with open(spooled, "wb") as spool:
        for start, count in pieces(max(tuned.numel, base.numel if base else 0)):
            piece = diff = read(tuned, start, count)
            stored = read(base, start, count) if base else np.empty(0, np.uint8)
            if adds and len(piece):
                diff, records = subtract(piece, base_values(stored, base, row, start, len(piece)), start, entry)
                spool.write(records.tobytes())
                sha["corrections"].update(records.tobytes())
                entry["corrections"] += len(records)
            for of, data in (("raw", stored), ("tuned", piece), ("diff", diff)):
                sha[of].update(data)
            bits += bit_sum_of(stored)
            write(tuned.name, start, diff)
    if base:
        entry |= {"sha256_raw": sha["raw"].hexdigest(), "bit_sum_raw": bits % 2**64}
    entry |= {"sha256_tuned": sha["tuned"].hexdigest(), "sha256_diff": sha["diff"].hexdigest()}
    if entry["corrections"]:
        entry["sha256_corrections"] = sha["corrections"].hexdigest()


def make_shards(raw: Weights, tuned: Weights, entries: dict[str, dict], headers: dict[str, str], work: Path) -> dict:
    """Writes the diff's safetensors files, and that of the corrections, into `work`; completes the entries.

    Returns {file name: header text} of all of them.
    """
    spool = work / "corrections"  # how many corrections a tensor has, which the header says, is known at the end alone
    spool.mkdir()

    def spooled(name: str) -> Path:
        return spool / hashlib.sha256(name.encode()).hexdigest()  # any name makes a legal file name

    with bytes_bar("make_diff", tuned.tensors.values()) as bar:
        for file, header in headers.items():
            tensors = [tuned.tensors[tensor.name] for tensor in parse_header(header, work / file)]
            with new_shard(work / file, header) as write:

                def make(t: Tensor, write=write) -> None:
                    make_tensor(raw.get(t.name), t, entries[t.name], write, spooled(t.name))

                for _ in in_parallel(make, tensors, bar):
                    pass
    corrected = {name: entry for name, entry in entries.items() if entry["corrections"]}
    if corrected:
        shapes = {name: (entry["corrections"], correction_record(entry).itemsize) for name, entry in corrected.items()}
        headers = {**headers, CORRECTION: make_header((name, "U8", shape) for name, shape in shapes.items())}
        with new_shard(work / CORRECTION, headers[CORRECTION]) as write:
            for name, shape in shapes.items():
                records = Tensor(name, "U8", shape, spooled(name), 0)
                for start, count in pieces(records.numel):
                    write(name, start, read(records, start, count))
    shutil.rmtree(spool)
    return headers


# ----------------------------------------------------------------------------------------------------------------------
# recover.


@dataclass(frozen=True)
class Recovery:
    """What each tensor is made of (`entries`), and the header of each file that will hold them.

    `corrections`: where each tensor's records lie. `identity` tells this job from another with the same target: only
    its own unfinished work is gone on with. `hashed`: whether the entries hold hashes, from a manifest.
    """

    raw: Weights
    diff: Weights
    entries: Mapping[str, Mapping]
    headers: Mapping[str, str]
    corrections: Mapping[str, Tensor]
    identity: str | dict
    hashed: bool


def recover_tensor(job: Recovery, diff: Tensor, write: Write) -> dict:
    """Recovers one tensor; {"sha256": of the result, "sum": of its values}.

    The sum (float64) is taken for diffs without a manifest alone. Raises UserError where the sha256 of the difference,
    of the corrections or of the result is not the entry's, and, without a manifest, where the result is not finite.
    """
    name, entry = diff.name, job.entries[diff.name]
    dtype, base = entry["tuned_dtype"], job.raw.get(name) if entry["how"] == "add" else None
    row, corrections = new_row(base, diff.numel), read_corrections(job.corrections.get(name), entry)
    sha_diff, sha_result, total = hashlib.sha256(), hashlib.sha256(), 0.0
    for start, count in pieces(diff.numel):
        result = piece = read(diff, start, count)
        if base:
            values = base_values(read(base, start, count), base, row, start, count)
            delta = to_float32(piece, diff.dtype) if diff.dtype in FLOATS else piece
            result = add(values, delta + values if entry.get("raw_times") == 2 else delta, dtype)
        if corrections is not None:
            correct(result, start, corrections)
        sha_result.update(result)
        if job.hashed:
            sha_diff.update(piece)
        else:
            total += float((to_float32(result, dtype) if dtype in FLOATS else result).sum(dtype=np.float64))
        write(name, start, result)
    sha256 = sha_result.hexdigest()
    if job.hashed:
        _must_equal(f"{name} of the diff ({diff.file})", sha_diff.hexdigest(), entry["sha256_diff"])
        if sha256 != entry["sha256_tuned"]:
            raise UserError(
                f"{name} came out with sha256 {sha256}, the manifest says {entry['sha256_tuned']}, though base and "
                "diff were right when they were checked: a file changed meanwhile, or the memory is faulty."
            )
    elif not np.isfinite(total):
        raise UserError(
            f"{name} would hold NaN or infinity: the diff ({diff.file}) or the base is damaged. Fetch both again."
        )
    return {"sha256": sha256, "sum": total}


def read_corrections(tensor: Tensor | None, entry: Mapping) -> np.ndarray | None:
    """A tensor's corrections as records, mapped from the file; UserError where their sha256 is not the entry's."""
    if tensor is None:
        return None
    where = f"the corrections of {tensor.name} in the diff ({tensor.file})"
    _must_equal(where, sha256_tensor(tensor), entry["sha256_corrections"])
    record = correction_record(entry)
    return np.memmap(tensor.file, record, "r", tensor.offset, tensor.nbytes // record.itemsize)


def correct(piece: np.ndarray, start: int, corrections: np.ndarray) -> None:
    """Sets the elements of `piece`, which begins at element `start` of its tensor, that have a correction."""
    index = corrections["index"]
    here = corrections[bisect.bisect_left(index, start) : bisect.bisect_left(index, start + len(piece))]
    piece[here["index"] - start] = here["value"]


def _must_equal(what: str, found: str, expected: str) -> None:
    if found != expected:
        raise UserError(f"{what} is damaged: sha256 {found}, the manifest says {expected}. Fetch that file again.")


def recover_shards(job: Recovery, work: Path | None) -> dict[str, dict]:
    """Recovers all shards into `work` (None: nowhere); those that an interrupted run left there whole are kept.

    Returns recover_tensor's results by name.
    """
    results: dict[str, dict] = {}
    state = jload(work / PROGRESS) if work and (work / PROGRESS).is_file() else {}
    if state.get("of") != job.identity:
        state = {"of": job.identity, "shards": {}}
    with bytes_bar("recover", [job.diff.tensors[name] for name in job.entries]) as bar:
        for file, header in job.headers.items():
            done = state["shards"].get(file)
            if done is None or not shard_is_whole(work / file, header, done, bar):
                tensors = [job.diff.tensors[tensor.name] for tensor in parse_header(header, Path(file))]
                with new_shard(work / file, header) if work else contextlib.nullcontext(lambda *_: None) as write:
                    found = in_parallel(lambda diff, write=write: recover_tensor(job, diff, write), tensors, bar)
                    done = {tensor.name: result for tensor, result in zip(tensors, found, strict=True)}
                state["shards"][file] = done
                if work:
                    jdump(state, work / PROGRESS)
            results |= done
    return results


def shard_is_whole(path: Path, header: str, expected: Mapping[str, Mapping], bar: tqdm) -> bool:
    """Whether the file has this header and each tensor the sha256 that was noted when it was written."""
    try:
        text, tensors = read_header(path)
    except UserError:
        return False
    hashes = in_parallel(sha256_tensor, tensors, bar)
    return text == header and all(expected[t.name]["sha256"] == h for t, h in zip(tensors, hashes, strict=True))
