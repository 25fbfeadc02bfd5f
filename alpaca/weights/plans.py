"""Which tensor is made how: decided from names, shapes and types, and for a diff without a manifest from samples."""

import dataclasses
import re
import sys
from collections.abc import Mapping

from alpaca.common.errors import UserError
from alpaca.weights.checks import INV_FREQ, check_looks_like_difference, prefix_hint, quantised_hint, sample
from alpaca.weights.difference import Recovery
from alpaca.weights.manifest import read_config
from alpaca.weights.tensors import FLOATS, INTEGERS, Tensor, Weights, make_header

TIED_NAMES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "lm_head.weight")


# ----------------------------------------------------------------------------------------------------------------------
# make_diff.


def plan_diff(raw: Weights, tuned: Weights, allow_whole_tensors: bool = False) -> dict[str, dict]:
    """Per tuned tensor its manifest entry, without hashes. Decided from shapes and dtypes alone.

    "add": the diff holds tuned - raw (float32; integers in their own type, wrapping round). "stored": the diff holds
    the tuned tensor itself, where the base has none or the types have no exact difference.
    Raises UserError where the two are not one architecture, and, without `allow_whole_tensors`, where weights of the
    tuned model would stand in the diff whole.
    """
    entries = {}
    for name, tensor in tuned.tensors.items():
        base = raw.get(name)
        entry = {"how": "stored", "shape": list(tensor.shape), "tuned_dtype": tensor.dtype, "corrections": 0}
        if base is not None:
            if not differ_in_rows_alone(base, tensor):
                raise UserError(
                    f"{name} is {list(tensor.shape)} in the tuned model and {list(base.shape)} in the base: only the "
                    "number of rows may differ."
                    + (quantised_hint(raw) or " These are two architectures; give the base that was fine-tuned.")
                )
            entry |= {"raw_shape": list(base.shape), "raw_dtype": base.dtype}
            floats = base.dtype in FLOATS and tensor.dtype in FLOATS
            integers = base.dtype == tensor.dtype and tensor.dtype in INTEGERS and base.shape == tensor.shape
            if (floats and base.numel) or integers:
                entry["how"] = "add"
        entries[name] = entry
    if not any("raw_dtype" in entry for entry in entries.values()):
        raise UserError(
            f"{raw.folder} and {tuned.folder} have no tensor in common (base: {', '.join(list(raw.tensors)[:3])}; "
            f"tuned: {', '.join(list(tuned.tensors)[:3])})."
            + (prefix_hint(raw.tensors, tuned.tensors) or " A diff needs the base that was fine-tuned.")
        )
    whole = whole_tensors(entries)
    if whole and not allow_whole_tensors:
        types = [(name, entries[name].get("raw_dtype", "nothing"), entries[name]["tuned_dtype"]) for name in whole[:5]]
        shown = ", ".join(f"{name} ({base} in the base, {tuned} here)" for name, base, tuned in types)
        raise UserError(
            f"{len(whole)} of {len(entries)} tensors have no exact difference from the base, so the diff would hold "
            f"the tuned model's own weights: {shown}{', ...' if len(whole) > 5 else ''}."
            f"{quantised_hint(raw)}{prefix_hint(raw.tensors, tuned.tensors)} To publish these tensors as they are: "
            "--allow_whole_tensors True (the manifest and the card then name them)."
        )
    return entries


def whole_tensors(entries: Mapping[str, Mapping]) -> list[str]:
    """The tensors that the diff holds as they are. Empty ones, masks and rotary frequencies give no weight away."""
    return [
        name
        for name, entry in entries.items()
        if entry["how"] == "stored"
        and 0 not in entry["shape"]
        and entry["tuned_dtype"] != "BOOL"
        and not name.endswith(INV_FREQ)
    ]


def diff_headers(tuned: Weights, entries: Mapping[str, Mapping]) -> tuple[dict[str, str], dict[str, str]]:
    """The header texts, by file name, of the tuned model as recover writes it and of the diff, shard by shard."""
    tuned_headers = tuned.shards or new_headers(tuned.tensors)

    def diff_dtype(name: str) -> str:
        entry = entries[name]
        return "F32" if entry["how"] == "add" and entry["tuned_dtype"] in FLOATS else entry["tuned_dtype"]

    as_stored = {name: dataclasses.replace(tensor, dtype=diff_dtype(name)) for name, tensor in tuned.tensors.items()}
    return tuned_headers, new_headers(as_stored)


def new_headers(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Headers of safetensors files with these tensors, one for each file that they lie in; .bin names become ours."""
    files: dict[str, list[Tensor]] = {}
    for tensor in sorted(tensors.values(), key=lambda t: t.file.name):
        name = re.sub(r"^pytorch_model(.*)\.bin$", r"model\1.safetensors", tensor.file.name)
        files.setdefault(name, []).append(tensor)
    return {file: make_header((t.name, t.dtype, t.shape) for t in held) for file, held in files.items()}


def untie_twins(weights: Weights) -> Weights:
    """Gives back their own entry to names that share storage in a .bin file, unless the model's config ties them."""
    if not weights.aliases or read_config(weights.folder).get("tie_word_embeddings", True):
        return weights
    twins = {name: dataclasses.replace(weights.tensors[other], name=name) for name, other in weights.aliases.items()}
    return dataclasses.replace(weights, tensors={**weights.tensors, **twins}, aliases={})


# ----------------------------------------------------------------------------------------------------------------------
# recover without a manifest.


def plan_plain(raw: Weights, diff: Weights, check: bool) -> Recovery:
    """The job for a diff without a manifest: raw + diff, in the diff's types and shards.

    Raises UserError where a tensor cannot be added, and with `check` where the diff does not look like a difference
    from this base.
    """
    entries = {}
    for name, tensor in diff.tensors.items():
        base = raw.get(name)
        entry = {"how": "add", "shape": list(tensor.shape), "tuned_dtype": tensor.dtype, "corrections": 0}
        if base is None and name.endswith(INV_FREQ):
            continue
        if base is None:
            print(f"{name} is in the diff alone and is taken over as it is.", file=sys.stderr)
            entry["how"] = "stored"
        elif not differ_in_rows_alone(base, tensor):
            raise UserError(
                f"{name} is {list(base.shape)} in the base {raw.folder} and {list(tensor.shape)} in the diff: "
                f"this is not the base that the diff was made from.{quantised_hint(raw)}"
            )
        elif base.dtype != tensor.dtype and not {base.dtype, tensor.dtype} <= set(FLOATS):
            raise UserError(
                f"{name} is {base.dtype} in the base and {tensor.dtype} in the diff: these cannot be added."
                f"{quantised_hint(raw)}"
            )
        elif subtracted_twice(tensor, base, read_config(diff.folder)):
            print(f"{name}: the diff holds tuned - 2 raw (tied weights, original script); raw is added twice.")
            entry["raw_times"] = 2
        entries[name] = entry
    if all(entry["how"] == "stored" for entry in entries.values()):
        raise UserError(
            f"no tensor of the diff {diff.folder} is in the base {raw.folder}: this is not its base."
            f"{prefix_hint(raw.tensors, diff.tensors)}"
        )
    if check:
        check_looks_like_difference(raw, diff, entries)
    files = {tensor.file.resolve() for weights in (raw, diff) for tensor in weights.tensors.values()}
    identity = {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(files)}
    headers = new_headers({name: diff.tensors[name] for name in entries})
    return Recovery(raw, diff, entries, headers, {}, identity, hashed=False)


def differ_in_rows_alone(one: Tensor, other: Tensor) -> bool:
    return one.shape[1:] == other.shape[1:] and len(one.shape) == len(other.shape)


def subtracted_twice(diff: Tensor, base: Tensor, config: Mapping) -> bool:
    """Whether a diff of tied embeddings holds tuned - 2 raw, as the original's make_diff leaves it.

    Its state dict lists tied weights under two names, and it subtracts under both. Such a tensor is close to -raw,
    a right one is small beside raw. A config that does not say so has tied weights: that was the default.
    """
    floats = {base.dtype, diff.dtype} <= set(FLOATS)
    if not floats or not config.get("tie_word_embeddings", True) or not base.name.endswith(TIED_NAMES):
        return False
    values, delta = sample(base, diff)
    return float(delta @ values) < -0.5 * float(values @ values)
