"""Publishes a fine-tuned model as its difference from the base, and recovers it from base and difference, to the bit.

    python weight_diff.py make_diff --path_raw llama-7b-hf --path_tuned alpaca-7b --path_diff alpaca-7b-diff
    python weight_diff.py recover --path_raw llama-7b-hf --path_diff alpaca-7b-diff --path_tuned alpaca-7b
    python weight_diff.py verify --path_tuned alpaca-7b --path_diff alpaca-7b-diff

One minute on a CPU, with the small model that local_llm.py carries (a diff of it from itself):

    python local_llm.py export_hf --output_dir base
    python weight_diff.py make_diff --path_raw base --path_tuned base --path_diff diff
    python weight_diff.py recover --path_raw base --path_diff diff --path_tuned again

Weights stream through in pieces of some megabytes, so memory does not grow with the model. The diff is what the
original script adds: float32 `tuned - raw`. Where adding it does not give the tuned bits back, a small second file
holds the right ones. A manifest holds the sha256 of every tensor of base, diff and result (weight_manifest.py).
"""

import dataclasses
import hashlib
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from alpaca.common.cli import run_cli
from alpaca.common.errors import UserError
from alpaca.common.files import jdump, jload
from alpaca.common.prompt import format_prompt
from alpaca.common.run_record import run_record, sha256_file
from alpaca.weights.difference import (
    correction_tensors,
    diff_tensor,
    gather_corrections,
    recover_tensor,
    subtracted_twice,
)
from alpaca.weights.folders import (
    PROGRESS,
    clear,
    copy_small_files,
    find_model,
    model_label,
    need_space,
    output_folder,
    progress_bar,
    publish,
    refuse_inside,
    refuse_taken,
    small_files,
    work_folder,
    write_index,
)
from alpaca.weights.manifest import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    NEW_ROWS,
    base_problems,
    check_small_files,
    diff_problems,
    in_parallel,
    is_weight_diff,
    load_manifest,
    sha256_tensor,
    tuned_problems,
    write_manifest,
)
from alpaca.weights.tensors import (
    FLOATS,
    INTEGERS,
    ShardWriter,
    Tensor,
    Weights,
    header_file_size,
    header_tensors,
    make_header,
    open_weights,
    read_header,
)

SMOKE_QUESTION = "List three technologies that make life easier."


# ----------------------------------------------------------------------------------------------------------------------
# Commands.


def make_diff(path_raw, path_tuned, path_diff, device="cpu"):
    """Writes the difference between a tuned model and its base to a new folder.

    Args:
        path_raw: the base model: a folder, or a name on the Hugging Face Hub.
        path_tuned: the tuned model: likewise.
        path_diff: the folder to make; one that already holds something is left alone and refused.
        device: kept from the original; the time goes into reading and hashing, which a GPU does not speed up.
    """
    if str(device) != "cpu":
        print(f"--device {device} is not used: make_diff reads, subtracts and hashes on the CPU.", file=sys.stderr)
    raw_folder, tuned_folder, target = find_model(path_raw), find_model(path_tuned), output_folder(path_diff)
    refuse_inside(target, raw_folder, tuned_folder)
    refuse_taken(target)
    for path in (raw_folder, tuned_folder):
        if is_weight_diff(path):
            raise UserError(f"{path} is itself a weight diff. Recover the model first.")
    raw, tuned = open_weights(raw_folder), untie_twins(open_weights(tuned_folder))
    entries = plan_diff(raw, tuned)
    tuned_headers = tuned.shards or new_headers(tuned)
    headers = {
        file: make_header((t.name, diff_dtype(entries[t.name]), t.shape) for t in header_tensors(text, Path()).values())
        for file, text in tuned_headers.items()
    }
    need_space(target, sum(map(header_file_size, headers.values())))

    settings = {"path_raw": path_raw, "path_tuned": path_tuned, "path_diff": path_diff}
    with work_folder(target, "making") as work:
        clear(work, keep=set())
        with run_record(work, settings), progress_bar("make_diff", raw_bytes(entries, raw) + tuned.nbytes) as progress:
            spool = work / "corrections"
            spool.mkdir()
            for file, header in headers.items():
                with ShardWriter(work / file, header) as writer:

                    def subtract(name, writer=writer):
                        diff_tensor(raw, tuned.tensors[name], entries[name], writer, spool, progress)

                    for _ in in_parallel(subtract, list(writer.tensors)):
                        pass
            manifest = {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "raw": {"name": model_label(path_raw), "only_here": sorted(set(raw.tensors) - set(entries))},
                "new_rows": NEW_ROWS,
                "tensors": entries,
                "tuned": tuned_headers,
                "diff": {file: hashlib.sha256(header.encode()).hexdigest() for file, header in headers.items()},
                "travels": {},
            }
            gather_corrections(spool, work, manifest)
            copy_small_files(tuned_folder, work, manifest)
            write_index(work, headers)
            manifest["files"] = {
                path.name: sha256_file(path)
                for path in sorted(work.iterdir())
                if path.name not in manifest["diff"] and path.name != "run.json"
            }
            write_manifest(work, manifest)
        publish(work, target)
    corrected = sum(entry["corrections"] for entry in entries.values())
    print(f"{target}: the difference of {len(entries)} tensors; {corrected:,} elements need a correction.")


def recover(path_raw, path_diff, path_tuned=None, device="cpu", test_inference=False, check_integrity_naively=True):
    """Adds a diff to its base and writes the tuned model to a new folder; an interrupted run goes on where it was.

    Args:
        path_raw: the base model: a folder, or a name on the Hugging Face Hub.
        path_diff: the diff: likewise. One without a manifest (the official Alpaca-7B diff) is added plainly.
        path_tuned: the folder to make. Without it everything is computed and checked, and nothing is written.
        device: where the recovered model answers with --test_inference; adding is done on the CPU.
        test_inference: loads the whole recovered model into memory and answers one question.
        check_integrity_naively: for a diff without a manifest, the sum of all its tensors; for Alpaca-7B it must be
            the published one. A manifest's sha256 of every tensor is always checked.
    """
    raw_folder, diff_folder = find_model(path_raw), find_model(path_diff)
    target = None if path_tuned is None else output_folder(path_tuned)
    if target is not None:
        refuse_inside(target, raw_folder, diff_folder)
        refuse_taken(target)
    if is_weight_diff(raw_folder):
        raise UserError(f"--path_raw {path_raw} is a weight diff, not a base model. Are the two paths swapped?")
    manifest = load_manifest(diff_folder)
    for problem in check_small_files(diff_folder, manifest) if manifest else ():
        raise UserError(problem)
    raw, diff = open_weights(raw_folder), open_weights(diff_folder)
    if manifest is None:
        job = plan_plain(raw, untie_twins(diff))
    else:
        corrections, identity = correction_tensors(diff_folder, manifest), sha256_file(diff_folder / MANIFEST)
        job = Job(raw, diff, manifest["tensors"], manifest["tuned"], corrections, identity)
        with progress_bar("checking the base", raw_bytes(job.entries, raw)) as progress:
            for problem in base_problems(raw, manifest, progress):
                raise UserError(problem)

    def finish(results: Mapping[str, Mapping]) -> None:
        if manifest is None and check_integrity_naively:
            naive_check({name: result["sum"] for name, result in results.items()}, diff_folder)

    if target is None:
        with progress_bar("recover", diff.nbytes) as progress:
            found = in_parallel(lambda name: job.recover(name, None, progress), job.entries)
            finish(dict(zip(job.entries, found, strict=True)))
        print(f"{len(job.entries)} tensors come out right. Nothing is written without --path_tuned.")
        return
    need_space(target, sum(map(header_file_size, job.headers.values())))
    settings = {"path_raw": path_raw, "path_diff": path_diff, "path_tuned": path_tuned, "device": device}
    with work_folder(target, "recovering") as work:
        clear(work, keep={*job.headers, PROGRESS})
        with run_record(work, settings), progress_bar("recover", diff.nbytes) as progress:
            finish(recover_shards(job, work, progress))
            travels = manifest["travels"] if manifest else {path.name: path.name for path in small_files(diff_folder)}
            for name, stored_as in travels.items():
                shutil.copyfile(diff_folder / stored_as, work / name)
            write_index(work, job.headers)
        publish(work, target)
    proof = "each with the sha256 of the tuned one" if manifest else "by plain addition, since the diff has no manifest"
    print(f"{target}: {len(job.entries)} tensors recovered, {proof}.")
    if test_inference:
        print(smoke_answer(target, device))


def verify(path_tuned=None, path_diff=None, path_raw=None):
    """Checks a diff, and the tuned model or the base where given, against the diff's manifest; names all that is wrong.

    Args:
        path_tuned: a tuned or recovered model: a folder, or a name on the Hugging Face Hub.
        path_diff: the diff, with its manifest.
        path_raw: the base.
    """
    if path_diff is None:
        raise UserError("verify needs --path_diff: the manifest in it says what is right.")
    diff_folder = find_model(path_diff)
    manifest = load_manifest(diff_folder)
    if manifest is None:
        raise UserError(f"{diff_folder} has no {MANIFEST}, so there is nothing to check against.")
    problems = check_small_files(diff_folder, manifest)
    if not problems:
        problems += diff_problems(diff_folder, manifest)
    if path_raw is not None:
        raw = open_weights(find_model(path_raw))
        with progress_bar("base", raw_bytes(manifest["tensors"], raw)) as progress:
            problems += base_problems(raw, manifest, progress)
    if path_tuned is not None:
        problems += tuned_problems(find_model(path_tuned), manifest)
    if problems:
        raise UserError(f"{len(problems)} found wrong:\n" + "\n".join(problems))
    checked = [f"{what} {path}" for what, path in (("base", path_raw), ("tuned model", path_tuned)) if path is not None]
    print(f"all {len(manifest['tensors'])} tensors are right: " + ", ".join([*checked, f"diff {path_diff}"]))


# ----------------------------------------------------------------------------------------------------------------------
# Plans: which tensor is made how.


def plan_diff(raw: Weights, tuned: Weights) -> dict[str, dict]:
    """Per tuned tensor how it will be stored; hashes are filled in while it is. Decided from shapes and dtypes alone.

    "add": the diff holds tuned - raw (float32; integers in their own type, wrapping round). "stored": the diff holds
    the tuned tensor itself, where the base has none or the types have no exact difference.
    Raises UserError where the two are not one architecture.
    """
    entries = {}
    for name, tensor in tuned.tensors.items():
        base = raw.get(name)
        entry = {"how": "stored", "shape": list(tensor.shape), "tuned_dtype": tensor.dtype, "corrections": 0}
        if base is not None:
            if base.shape[1:] != tensor.shape[1:] or len(base.shape) != len(tensor.shape):
                raise UserError(
                    f"{name} is {list(tensor.shape)} in the tuned model and {list(base.shape)} in the base: only the "
                    "number of rows may differ. These are two architectures; give the base that was fine-tuned."
                )
            entry |= {"raw_shape": list(base.shape), "raw_dtype": base.dtype}
            floats = base.dtype in FLOATS and tensor.dtype in FLOATS
            integers = base.dtype == tensor.dtype and tensor.dtype in INTEGERS and base.shape == tensor.shape
            if (floats and base.numel) or integers:
                entry["how"] = "add"
        entries[name] = entry
    if not any(entry["how"] == "add" for entry in entries.values()):
        raise UserError(
            f"{raw.folder} and {tuned.folder} have no tensor in common (base: {', '.join(list(raw.tensors)[:3])}; "
            f"tuned: {', '.join(list(tuned.tensors)[:3])}). A diff needs the base that was fine-tuned."
        )
    return entries


def plan_plain(raw: Weights, diff: Weights) -> "Job":
    """The job for a diff without a manifest: raw + diff, in the diff's types and shards."""
    entries = {}
    for name, tensor in diff.tensors.items():
        base = raw.get(name)
        entry = {"how": "add", "shape": list(tensor.shape), "tuned_dtype": tensor.dtype, "corrections": 0}
        if base is None and name.endswith(INV_FREQ):
            continue  # a buffer that checkpoints held in 2023; models now compute it
        if base is None:
            print(f"{name} is in the diff alone and is taken over as it is.", file=sys.stderr)
            entry["how"] = "stored"
        elif base.shape[1:] != tensor.shape[1:] or len(base.shape) != len(tensor.shape):
            raise UserError(
                f"{name} is {list(base.shape)} in the base {raw.folder} and {list(tensor.shape)} in the diff: "
                "this is not the base that the diff was made from."
            )
        elif base.dtype != tensor.dtype and not {base.dtype, tensor.dtype} <= set(FLOATS):
            raise UserError(
                f"{name} is {base.dtype} in the base and {tensor.dtype} in the diff: these cannot be added."
            )
        elif subtracted_twice(tensor, base, diff.folder / "config.json"):
            print(f"{name}: the diff holds tuned - 2 raw (tied weights, original script); raw is added twice.")
            entry["raw_times"] = 2
        entries[name] = entry
    if all(entry["how"] == "stored" for entry in entries.values()):
        raise UserError(f"no tensor of the diff {diff.folder} is in the base {raw.folder}: this is not its base.")
    kept = dataclasses.replace(diff, tensors={name: diff.tensors[name] for name in entries})
    files = {tensor.file.resolve() for weights in (raw, diff) for tensor in weights.tensors.values()}
    identity = {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(files)}
    return Job(raw, kept, entries, new_headers(kept), {}, identity)


def diff_dtype(entry: Mapping) -> str:
    return "F32" if entry["how"] == "add" and entry["tuned_dtype"] in FLOATS else entry["tuned_dtype"]


def untie_twins(weights: Weights) -> Weights:
    """Gives back their own entry to names that share storage in a .bin file, unless the model's config ties them."""
    if not weights.aliases:
        return weights
    from transformers import AutoConfig

    if AutoConfig.from_pretrained(weights.folder).tie_word_embeddings:
        return weights
    twins = {name: dataclasses.replace(weights.tensors[other], name=name) for name, other in weights.aliases.items()}
    return dataclasses.replace(weights, tensors={**weights.tensors, **twins}, aliases={})


def new_headers(weights: Weights) -> dict[str, str]:
    """Headers of safetensors shards with the same tensors as `weights`, shard by shard; .bin names become ours."""
    headers = {}
    for file, names in weights.by_file().items():
        renamed = re.sub(r"^pytorch_model(.*)\.bin$", r"model\1.safetensors", file)
        headers[renamed] = make_header((n, weights.tensors[n].dtype, weights.tensors[n].shape) for n in names)
    return headers


def raw_bytes(entries: Mapping[str, Mapping], raw: Weights) -> int:
    return sum(tensor.nbytes for name in entries if (tensor := raw.get(name)) is not None)


# ----------------------------------------------------------------------------------------------------------------------
# Recovering, shard by shard.


@dataclasses.dataclass(frozen=True)
class Job:
    """A recovery: what each tensor is made of (`entries`), the header of each file that will hold them.

    `identity` tells it from another job with the same target: only its own unfinished work is gone on with.
    """

    raw: Weights
    diff: Weights
    entries: Mapping[str, Mapping]
    headers: Mapping[str, str]
    corrections: Mapping[str, Tensor]
    identity: str | dict

    def recover(self, name: str, writer: ShardWriter | None, progress: Callable[[int], None]) -> dict:
        if name not in self.diff.tensors:
            raise UserError(f"the diff {self.diff.folder} lacks {name}. Fetch it again.")
        correction = self.corrections.get(name)
        return recover_tensor(self.raw, self.diff.tensors[name], correction, self.entries[name], writer, progress)


def recover_shards(job: Job, work: Path, progress: Callable[[int], None]) -> dict[str, dict]:
    """Recovers all shards into `work`; those that an interrupted run left there whole are kept. Results by tensor."""
    state = jload(work / PROGRESS) if (work / PROGRESS).is_file() else {}
    if state.get("of") != job.identity:
        state = {"of": job.identity, "shards": {}}
    results: dict[str, dict] = {}
    for file, header in job.headers.items():
        done = state["shards"].get(file)
        if done is None or not shard_is_whole(work / file, header, done):
            done = {}
            with ShardWriter(work / file, header) as writer:
                names = list(writer.tensors)
                found = in_parallel(lambda name, writer=writer: job.recover(name, writer, progress), names)
                done = dict(zip(names, found, strict=True))
            state["shards"][file] = done
            jdump(state, work / PROGRESS)
        else:
            progress(sum(job.diff.tensors[name].nbytes for name in done))
        results |= done
    return results


def shard_is_whole(path: Path, header: str, expected: Mapping[str, Mapping]) -> bool:
    """Whether the file has this header and each tensor the sha256 that was noted when it was written."""
    if not path.is_file() or path.stat().st_size != header_file_size(header):
        return False
    try:
        text, tensors = read_header(path)
    except UserError:
        return False
    hashes = in_parallel(sha256_tensor, tensors)
    return text == header and all(expected[t.name]["sha256"] == h for t, h in zip(tensors, hashes, strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# The sum that was published instead of hashes.

INV_FREQ = "rotary_emb.inv_freq"
# By (hidden size, layers, rows of the embedding); Alpaca-7B's, from the original script, holds within SUM_TOLERANCE.
PUBLISHED_SUMS = {(4096, 32, 32001): 50637.1836}
SUM_TOLERANCE = 1e-2
# The state dict of 2023 in its order: the published figure was added up in float32, where order shows.
LAYER_ORDER = (
    "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.o_proj.weight",
    f"self_attn.{INV_FREQ}", "mlp.gate_proj.weight", "mlp.down_proj.weight", "mlp.up_proj.weight",
    "input_layernorm.weight", "post_attention_layernorm.weight",
)  # fmt: skip


def naive_check(sums: dict[str, float], diff_folder: Path) -> None:
    """Prints the sum of all tensors; for a model whose sum was published, raises UserError where it is another.

    That sum counts one rotary_emb.inv_freq buffer a layer, which models no longer store: they follow from the config.
    """
    config = jload(diff_folder / "config.json") if (diff_folder / "config.json").is_file() else {}
    hidden, layers, rows = (config.get(key) for key in ("hidden_size", "num_hidden_layers", "vocab_size"))
    published = PUBLISHED_SUMS.get((hidden, layers, rows)) if config.get("model_type") == "llama" else None
    if published is None:
        print(f"sum of all tensors: {sum(sums.values()):.4f} (no sum was published for this model)")
        return
    width = hidden // config["num_attention_heads"]
    theta = config.get("rope_theta", 10000.0)
    buffer = float((1.0 / theta ** (np.arange(0, width, 2, dtype=np.float32) / width)).sum(dtype=np.float64))
    for layer in range(layers):
        sums.setdefault(f"model.layers.{layer}.self_attn.{INV_FREQ}", buffer)

    def place(name: str) -> tuple:
        layer = re.match(r"model\.layers\.(\d+)\.(.*)", name)
        if layer:
            return 1, int(layer[1]), LAYER_ORDER.index(layer[2]) if layer[2] in LAYER_ORDER else len(LAYER_ORDER)
        return {"model.embed_tokens.weight": 0, "model.norm.weight": 2}.get(name, 3), 0, 0

    as_published = np.float32(0)
    for name in sorted(sums, key=place):
        as_published += np.float32(sums[name])
    exact = sum(sums.values())
    print(f"sum of all tensors: {exact:.4f}, in float32 {as_published:.4f}; published: {published}")
    if min(abs(exact - published), abs(float(as_published) - published)) > SUM_TOLERANCE:
        raise UserError(
            f"the sum of all tensors is {exact:.4f}, the published one {published}: the base or the diff is not the "
            "right one, or is damaged. LLaMA's weights are float16; a base in bfloat16 was rounded by its converter "
            "(convert_llama.py does not). Nothing was written to --path_tuned; --check_integrity_naively False would."
        )


def smoke_answer(folder: Path, device: str) -> str:
    """The recovered model's answer to the original's test question, with the training prompt, greedily decoded."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device).eval()
    prompt = format_prompt({"instruction": SMOKE_QUESTION, "input": ""})
    tokens = tokenizer(prompt, return_tensors="pt").to(device)
    answer = model.generate(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], do_sample=False,
                            max_new_tokens=100, pad_token_id=tokenizer.eos_token_id)  # fmt: skip
    return tokenizer.decode(answer[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    run_cli({"make_diff": make_diff, "recover": recover, "verify": verify})
