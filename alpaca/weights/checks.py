"""Checks of a base, a diff and a tuned model, against the manifest or without one, and what a wrong one probably is."""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import numpy as np

from alpaca.common.errors import UserError
from alpaca.common.run_record import sha256_file
from alpaca.weights.manifest import (
    bit_sum,
    bytes_bar,
    correction_tensors,
    in_parallel,
    read_config,
    sha256_tensor,
    sha256_text,
)
from alpaca.weights.tensors import (
    FLOATS,
    PIECE,
    Tensor,
    Weights,
    from_float32,
    read,
    read_header,
    to_float32,
)

INV_FREQ = "rotary_emb.inv_freq"  # a buffer that checkpoints held in 2023; models now compute it from the config
# By (hidden size, layers, rows of the embedding); Alpaca-7B's, from the original script, holds within SUM_TOLERANCE.
PUBLISHED_SUMS = {(4096, 32, 32001): 50637.1836}
SUM_TOLERANCE = 1e-2


def wrong_tensors(
    what: str, weights: Weights, expected: Mapping[str, tuple], cause: Callable[..., str] | None = None
) -> Iterator[str]:
    """Yields a text for each tensor of `weights` that is not as expected: name -> (dtype, shape, sha256).

    Types and shapes of all tensors first, which costs nothing, then the bytes, small tensors first. `cause`(name, the
    tensor or None, its sha256 or None) says what is probably wrong.
    """

    def text(name: str, tensor: Tensor | None, found: str | None) -> str:
        dtype, shape, sha256 = expected[name]
        told = f"{name} is missing from {what} {weights.folder}."
        if tensor:
            found = found or sha256_tensor(tensor)
            told = (
                f"{name} in {what} ({tensor.file}) is not right.\n  expected: {dtype} {shape}, sha256 {sha256}\n"
                f"  found:    {tensor.dtype} {list(tensor.shape)}, sha256 {found}"
            )
        return told + (f"\n  probably: {cause(name, tensor, found)}" if cause else "")

    alike = []
    for name, (dtype, shape, _) in expected.items():
        tensor = weights.get(name)
        if tensor and (tensor.dtype, list(tensor.shape)) == (dtype, shape):
            alike.append((tensor.nbytes, name, tensor))
        else:
            yield text(name, tensor, None)
    alike.sort(key=lambda item: item[:2])
    tensors = [tensor for _, _, tensor in alike]
    with bytes_bar(f"checking {what}", tensors) as bar:
        for (_, name, tensor), found in zip(alike, in_parallel(sha256_tensor, tensors, bar), strict=True):
            if found != expected[name][2]:
                yield text(name, tensor, found)


def wrong_base(raw: Weights, manifest: dict) -> Iterator[str]:
    """Yields what makes `raw` another model than the diff's base, one text a tensor; nothing when it is the base."""
    entries = {name: entry for name, entry in manifest["tensors"].items() if "sha256_raw" in entry}
    expected = {name: (e["raw_dtype"], e["raw_shape"], e["sha256_raw"]) for name, e in entries.items()}

    def cause(*found) -> str:
        return f"{probable_cause(raw, manifest, *found)}\n  the diff was made from {manifest['raw']['name']}"

    return wrong_tensors("the base", raw, expected, cause)


def probable_cause(raw: Weights, manifest: dict, name: str, tensor: Tensor | None, found: str | None) -> str:
    """What a base probably is whose tensor `name` is another than the diff was made from."""
    if tensor is None:
        hint = prefix_hint(raw.tensors, manifest["tensors"]) or quantised_hint(raw)
        return hint.strip() or "another architecture, or another naming: convert it to the transformers format first."
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
        if "sha256_raw" in manifest["tensors"][other] and other != name and raw.get(other)
    ][:8]
    differing = sum(sha256_tensor(raw.get(other)) != manifest["tensors"][other]["sha256_raw"] for other in others)
    if differing:
        return f"another model, or another training of it: {differing} of {len(others)} other tensors differ too."
    return f"a damaged file ({tensor.file.name}), or another conversion: {len(others)} other tensors are right."


def wrong_diff(diff: Weights, manifest: dict) -> Iterator[str]:
    """Yields what is damaged among the diff's tensors and corrections. Headers are right by now."""
    corrections = correction_tensors(diff.folder, manifest)
    for what, weights, key in (
        ("the diff", diff, "sha256_diff"),
        ("the corrections of the diff", dataclasses.replace(diff, tensors=corrections), "sha256_corrections"),
    ):
        expected = {
            name: (tensor.dtype, list(tensor.shape), manifest["tensors"][name][key])
            for name, tensor in weights.tensors.items()
        }
        yield from wrong_tensors(what, weights, expected)


def wrong_tuned(tuned: Weights, manifest: dict) -> Iterator[str]:
    """Yields what differs between a model and the tuned model of the manifest."""
    for file, header in manifest["tuned"].items():
        if tuned.shards.get(file, header) != header:
            yield f"the header of {file} in {tuned.folder} is not the tuned model's."
    for name in sorted(set(tuned.tensors) - set(manifest["tensors"])):
        yield f"{name} in {tuned.folder} is not a tensor of the tuned model."
    expected = {n: (e["tuned_dtype"], e["shape"], e["sha256_tuned"]) for n, e in manifest["tensors"].items()}
    yield from wrong_tensors("the tuned model", tuned, expected)
    for name, stored_as in manifest["travels"].items():
        yield from wrong_file(tuned.folder / name, manifest["files"][stored_as])


def wrong_files(folder: Path, manifest: dict) -> Iterator[str]:
    """Yields what is wrong with the diff's small files and the headers of its safetensors files."""
    for name, sha256 in manifest["files"].items():
        yield from wrong_file(folder / name, sha256)
    for name, sha256 in manifest["diff"].items():
        try:
            found = sha256_text(read_header(folder / name)[0])
        except UserError as error:
            yield str(error)
            continue
        if found != sha256:
            yield f"the header of {folder / name} is damaged: sha256 {found}, the manifest says {sha256}."


def wrong_file(path: Path, sha256: str) -> Iterator[str]:
    if not path.is_file():
        yield f"{path} is missing."
    elif (found := sha256_file(path)) != sha256:
        yield f"{path} is damaged or another file: sha256 {found}, the manifest says {sha256}."


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
