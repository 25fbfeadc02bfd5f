"""Checks of a base, a diff and a tuned model, against the manifest or without one, and what a wrong one probably is."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np

from alpaca.common.errors import UserError
from alpaca.common.run_record import sha256_file
from alpaca.weights.manifest import bit_sum, bytes_bar, in_parallel, read_config, sha256_tensor, sha256_text
from alpaca.weights.tensors import (
    FLOATS,
    PIECE,
    Tensor,
    Weights,
    from_float32,
    open_weights,
    read,
    read_header,
    to_float32,
)

INV_FREQ = "rotary_emb.inv_freq"  # a buffer that checkpoints held in 2023; models now compute it from the config
# By (hidden size, layers, rows of the embedding); Alpaca-7B's, from the original script, holds within SUM_TOLERANCE.
PUBLISHED_SUMS = {(4096, 32, 32001): 50637.1836}
SUM_TOLERANCE = 1e-2


def wrong_tensors(expected: Mapping[str, tuple], weights: Weights, title: str) -> Iterator[tuple]:
    """Yields (name, the tensor or None, its sha256 or None) of each unlike `expected`: name -> (dtype, shape, sha).

    Types and shapes of all tensors first, which costs nothing, then the bytes, small tensors first.
    """
    alike = []
    for name, (dtype, shape, _) in expected.items():
        tensor = weights.get(name)
        if tensor is None or (tensor.dtype, list(tensor.shape)) != (dtype, shape):
            yield name, tensor, None
        else:
            alike.append((name, tensor))
    alike.sort(key=lambda pair: (pair[1].nbytes, pair[0]))
    tensors = [tensor for _, tensor in alike]
    with bytes_bar(title, tensors) as bar:
        for (name, tensor), found in zip(alike, in_parallel(sha256_tensor, tensors, bar), strict=True):
            if found != expected[name][2]:
                yield name, tensor, found


def base_problems(raw: Weights, manifest: dict) -> Iterator[str]:
    """Yields what makes `raw` another model than the diff's base, one text a tensor; nothing when it is the base."""
    expected = {
        name: (entry["raw_dtype"], entry["raw_shape"], entry["sha256_raw"])
        for name, entry in manifest["tensors"].items()
        if "sha256_raw" in entry
    }
    for name, tensor, found in wrong_tensors(expected, raw, "checking the base"):
        if tensor is None:
            hint = prefix_hint(raw.tensors, manifest["tensors"]) or quantised_hint(raw)
            yield (
                f"the base {raw.folder} has no tensor {name}; the diff's base ({manifest['raw']['name']}) has."
                + (hint or " Probably another architecture, or another naming: convert it to the transformers format.")
            )
            continue
        found = found or sha256_tensor(tensor)
        dtype, shape, sha256 = expected[name]
        yield (
            f"{name} of the base {raw.folder} is not the tensor that the diff was made from "
            f"({manifest['raw']['name']}).\n"
            f"  expected: {dtype} {shape}, sha256 {sha256}\n"
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
        return f"another model: a size or architecture that this diff does not fit.{quantised_hint(raw)}"
    if tensor.dtype != expected_dtype:
        both = {tensor.dtype, expected_dtype} <= set(FLOATS)
        same = both and sha256_tensor(tensor, dtype=expected_dtype) == entry["sha256_raw"]
        what = "the same weights in another dtype" if same else "a copy in another dtype, or another model"
        return f"{what}: the diff needs the {expected_dtype} files, these are {tensor.dtype}.{quantised_hint(raw)}"
    if bit_sum(tensor) == entry["bit_sum_raw"]:
        return "another conversion of the same weights: the same numbers in another order (see docs/weights.md)."
    others = [
        other
        for other in sorted(manifest["tensors"], key=lambda n: (np.prod(manifest["tensors"][n]["shape"]), n))
        if "sha256_raw" in manifest["tensors"][other] and other != name
    ][:8]
    differing = sum(sha256_tensor(raw.get(other)) != manifest["tensors"][other]["sha256_raw"] for other in others)
    if differing:
        return f"another model, or another training of it: {differing} of {len(others)} other tensors differ too."
    return f"a damaged file ({tensor.file.name}), or another conversion: {len(others)} other tensors are right."


def diff_problems(diff: Weights, corrections: Mapping[str, Tensor], manifest: dict) -> Iterator[str]:
    """Yields what is damaged among the diff's tensors and corrections, a sentence each. Headers are right by now."""
    entries = manifest["tensors"]
    expected = {n: (t.dtype, list(t.shape), entries[n]["sha256_diff"]) for n, t in diff.tensors.items()}
    yield from _texts(expected, diff, f"the diff {diff.folder}")
    expected = {n: (t.dtype, list(t.shape), entries[n]["sha256_corrections"]) for n, t in corrections.items()}
    yield from _texts(expected, dataclasses.replace(diff, tensors=corrections), "the corrections of the diff")


def tuned_problems(folder: Path, manifest: dict) -> Iterator[str]:
    """Yields what differs between the model in `folder` and the tuned model of the manifest, a sentence each."""
    try:
        tuned = open_weights(folder)
    except UserError as error:
        yield str(error)
        return
    for file, header in manifest["tuned"].items():
        if tuned.shards.get(file, header) != header:
            yield f"the header of {file} in {folder} is not the tuned model's."
    for name in sorted(set(tuned.tensors) - set(manifest["tensors"])):
        yield f"{name} in {folder} is not a tensor of the tuned model."
    expected = {n: (e["tuned_dtype"], e["shape"], e["sha256_tuned"]) for n, e in manifest["tensors"].items()}
    yield from _texts(expected, tuned, str(folder))
    yield from wrong_files(folder, {name: manifest["files"][stored] for name, stored in manifest["travels"].items()})


def wrong_files(folder: Path, expected: Mapping[str, str]) -> Iterator[str]:
    """Yields a sentence for each file that is missing or has another sha256 than the expected one."""
    for name, sha256 in expected.items():
        if not (folder / name).is_file():
            yield f"{name} is missing from {folder}."
        elif (found := sha256_file(folder / name)) != sha256:
            yield f"{name} in {folder} is damaged or another: sha256 {found}, the manifest says {sha256}."


def diff_file_problems(folder: Path, manifest: dict) -> Iterator[str]:
    """Yields what is wrong with the diff's small files and safetensors headers, a sentence each."""
    yield from wrong_files(folder, manifest["files"])
    for name, expected in manifest["diff"].items():
        try:
            found = sha256_text(read_header(folder / name)[0])
        except (UserError, OSError) as error:
            yield f"{name} in the diff: {error}"
            continue
        if found != expected:
            yield f"the header of {name} in the diff is damaged: sha256 {found}, the manifest says {expected}."


def _texts(expected: Mapping[str, tuple], weights: Weights, where: str) -> Iterator[str]:
    for name, tensor, found in wrong_tensors(expected, weights, where):
        dtype, shape, sha256 = expected[name]
        if tensor is None:
            yield f"{name} is missing from {where}."
        elif found is None:
            yield f"{name} in {where} is {tensor.dtype} {list(tensor.shape)}, not {dtype} {shape}."
        else:
            yield f"{name} in {where} ({tensor.file.name}) is not right: sha256 {found}, the manifest says {sha256}."


# ----------------------------------------------------------------------------------------------------------------------
# A diff without a manifest.


def check_looks_like_difference(raw: Weights, diff: Weights, entries: Mapping[str, Mapping]) -> None:
    """Raises UserError where the matrices of a float32 diff are too large for a difference, or do not fit this base.

    Fits: adding a difference to its own base gives numbers of the tuned model's type, so nearly every sum is exact in
    float32, float16 or bfloat16, and nearly none is where that type has fewer digits. On another base the exponents
    differ, and a share in between is exact: 0.57 to 0.95 where it was measured, against 0.98 or more and 0.15 or less.
    """
    judged, unfit = 0, []
    for name, entry in entries.items():
        tensor, base = diff.tensors[name], raw.get(name)
        if entry["how"] != "add" or not {tensor.dtype, base.dtype} <= set(FLOATS) or len(tensor.shape) < 2:
            continue
        values, delta = sample(base, tensor)
        if entry.get("raw_times") == 2:
            delta = delta + values
        size, base_size = (float(np.linalg.norm(x.astype(np.float64))) for x in (delta, values))
        if not np.isfinite(size):
            raise UserError(f"{name} of the diff holds NaN or infinity ({tensor.file}): it is damaged.")
        if size > 0.5 * base_size > 0:
            raise UserError(
                f"{name} of the diff {diff.folder} has {size / base_size:.2f} times the norm of the base's tensor: "
                "the size of a whole model, not of a difference. Give the diff, or use the model as it is. "
                "--check_integrity_naively False adds the two all the same."
            )
        changed = delta != 0
        if tensor.dtype == "F32" and np.count_nonzero(changed) >= 1000:
            shares = exact_shares(values[changed], delta[changed])
            judged += 1
            unfit += [name] * any(0.3 < share < 0.96 for share in shares)
    if len(unfit) > judged / 2:
        raise UserError(
            f"{raw.folder} is not the base that {diff.folder} was made from: in {len(unfit)} of {judged} matrices (the "
            f"first is {unfit[0]}) the sums have to be rounded to the tuned model's type, which does not happen on the "
            "right base. Give that base; --check_integrity_naively False adds the two all the same."
        )


def exact_shares(values: np.ndarray, delta: np.ndarray) -> list[float]:
    """The share of the sums values + delta that are exact in float32, that are float16 numbers, bfloat16 numbers."""
    with np.errstate(over="ignore", invalid="ignore"):
        total = values + delta
        exact = total - values == delta
    return [float(np.mean(exact & (to_float32(from_float32(total, dtype), dtype) == total))) for dtype in FLOATS]


def sample(base: Tensor, diff: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The elements in the middle of two float tensors, up to PIECE of them, as float32."""
    numel = min(base.numel, diff.numel)
    start, count = max(0, numel - PIECE) // 2, min(PIECE, numel)
    return to_float32(read(base, start, count), base.dtype), to_float32(read(diff, start, count), diff.dtype)


def check_sum(results: Mapping[str, Mapping], diff: Weights) -> None:
    """Prints the sum of all tensors; for a model whose sum was published, raises UserError where it is another.

    That sum was added up in float32, where the order shows: it is the order of the diff. It counts one
    rotary_emb.inv_freq buffer a layer, which models no longer store: they follow from the config.
    """
    config = read_config(diff.folder)
    hidden, layers, rows = (config.get(key) for key in ("hidden_size", "num_hidden_layers", "vocab_size"))
    published = PUBLISHED_SUMS.get((hidden, layers, rows)) if config.get("model_type") == "llama" else None
    if published is None:
        total = sum(result["sum"] for result in results.values())
        print(f"sum of all tensors: {total:.4f} (no sum was published for this model)")
        return
    width = hidden // config["num_attention_heads"]
    frequencies = 1.0 / config.get("rope_theta", 10000.0) ** (np.arange(0, width, 2, dtype=np.float32) / width)
    buffer = {"sum": float(frequencies.sum(dtype=np.float64))}
    names = [*diff.tensors, *(f"model.layers.{layer}.self_attn.{INV_FREQ}" for layer in range(layers))]
    sums = [results.get(name, buffer)["sum"] for name in dict.fromkeys(names)]
    exact, as_published = sum(sums), np.float32(0)
    for value in sums:
        as_published += np.float32(value)
    print(f"sum of all tensors: {exact:.4f}, in float32 {as_published:.4f}; published: {published}")
    if min(abs(exact - published), abs(float(as_published) - published)) > SUM_TOLERANCE:
        raise UserError(
            f"the sum of all tensors is {exact:.4f}, the published one {published}: the base or the diff is not the "
            "right one, or is damaged. LLaMA's weights are float16; a base in bfloat16 was rounded by its converter "
            "(convert_llama.py does not). Nothing was written to --path_tuned; --check_integrity_naively False would."
        )


# ----------------------------------------------------------------------------------------------------------------------
# What two models that do not fit probably are; each hint begins with a blank and is empty where it does not apply.


def prefix_hint(base: Collection[str], tuned: Collection[str]) -> str:
    """Names the prefix that one of two models has before the other's tensor names."""
    for which, names, others in (("tuned model", tuned, base), ("base", base, tuned)):
        for name in names:
            parts = name.split(".")
            for length in range(1, len(parts)):
                prefix, rest = ".".join(parts[:length]) + ".", ".".join(parts[length:])
                if rest in others:
                    wrapper = WRAPPERS.get(prefix, "another model class")
                    return (
                        f" The names of the {which} begin with {prefix!r} ({name}; {rest} in the other): it was saved "
                        f"from inside {wrapper}. Save it with save_pretrained of the plain model."
                    )
    return ""


WRAPPERS = {
    "module.": "DistributedDataParallel or DeepSpeed",
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FullyShardedDataParallel",
    "base_model.model.": "a peft model",
}


def quantised_hint(raw: Weights) -> str:
    """Says that the base is quantised, by its config or its types."""
    config = read_config(raw.folder)
    types = {tensor.dtype for tensor in raw.tensors.values()} & {"F8_E4M3", "F8_E5M2", "I8"}
    method = (config.get("quantization_config") or {}).get("quant_method") or ", ".join(sorted(types))
    if not method:
        return ""
    return f" The base {raw.folder} is quantised ({method}): give the unquantised base that was fine-tuned."
