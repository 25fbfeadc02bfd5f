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
holds the right ones. A manifest holds the sha256 of every tensor of base, diff and result (alpaca/weights/manifest.py).
"""

import shutil
import sys
from pathlib import Path

from alpaca.common.cli import run_cli
from alpaca.common.errors import UserError
from alpaca.common.run_record import sha256_file
from alpaca.weights import checks, folders, plans
from alpaca.weights.difference import PROGRESS, Recovery, make_shards, recover_shards
from alpaca.weights.manifest import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    NEW_ROWS,
    correction_tensors,
    is_weight_diff,
    load_manifest,
    read_config,
    sha256_text,
    write_manifest,
)
from alpaca.weights.tensors import open_weights


def make_diff(
    path_raw: str, path_tuned: str, path_diff: str, device: str = "cpu", allow_whole_tensors: bool = False
) -> None:
    """Writes the difference between a tuned model and its base to a new folder.

    Args:
        path_raw: the base model: a folder, or a name on the Hugging Face Hub.
        path_tuned: the tuned model: likewise.
        path_diff: the folder to make; one that already holds something is left alone and refused.
        device: kept from the original; the time goes into reading and hashing, which a GPU does not speed up.
        allow_whole_tensors: publishes tensors that have no exact difference from the base as they are; without it
            make_diff names them and stops.
    """
    if device != "cpu":
        print(f"--device {device} is not used: make_diff reads, subtracts and hashes on the CPU.", file=sys.stderr)
    raw_folder, tuned_folder = folders.find_model(path_raw), folders.find_model(path_tuned)
    target = folders.output_folder(path_diff, raw_folder, tuned_folder)
    for path in (raw_folder, tuned_folder):
        if is_weight_diff(path):
            raise UserError(f"{path} is itself a weight diff. Recover the model first.")
    raw, tuned = open_weights(raw_folder), plans.untie_twins(open_weights(tuned_folder))
    need_config(tuned_folder)
    entries = plans.plan_diff(raw, tuned, allow_whole_tensors)
    base, whole = folders.model_label(path_raw), plans.whole_tensors(entries)
    tuned_headers, headers = plans.diff_headers(tuned, entries)

    settings = {"path_raw": path_raw, "path_tuned": path_tuned, "path_diff": path_diff}
    folders.need_space(target, headers)
    with folders.new_folder(target, "making", settings) as work:
        written = make_shards(raw, tuned, entries, headers, work)
        travels = folders.copy_small_files(tuned_folder, work, base, whole)
        folders.write_index(work, headers)
        # The card is the publisher's to edit.
        small = [path for path in sorted(work.iterdir()) if path.name not in {*written, "run.json", "README.md"}]
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "raw": {"name": base, "only_here": sorted(set(raw.tensors) - set(entries))},
            "new_rows": NEW_ROWS,
            "tensors": entries,
            "tuned": tuned_headers,
            "diff": {file: sha256_text(header) for file, header in written.items()},
            "travels": travels,
            "files": {path.name: sha256_file(path) for path in small},
        }
        write_manifest(work, manifest | ({"whole_tensors": whole} if whole else {}))
    corrected = sum(entry["corrections"] for entry in entries.values())
    print(f"{target}: the difference of {len(entries) - len(whole)} tensors; {corrected:,} elements need a correction.")
    if whole:
        print(f"{len(whole)} tensors are not a difference: the diff holds the tuned model's own, and its card says so.")


def recover(
    path_raw: str,
    path_diff: str,
    path_tuned: str | None = None,
    device: str = "cpu",
    test_inference: bool = False,
    check_integrity_naively: bool = True,
) -> None:
    """Adds a diff to its base and writes the tuned model to a new folder; an interrupted run goes on where it was.

    Args:
        path_raw: the base model: a folder, or a name on the Hugging Face Hub.
        path_diff: the diff: likewise. One without a manifest (the official Alpaca-7B diff) is added plainly.
        path_tuned: the folder to make. Without it everything is computed and checked, and nothing is written.
        device: where the recovered model answers with --test_inference; adding is done on the CPU.
        test_inference: loads the whole recovered model into memory and answers one question.
        check_integrity_naively: for a diff without a manifest: whether it looks like a difference from this base, and
            the sum of all its tensors; for Alpaca-7B it must be the published one. A manifest's sha256 of every tensor
            is always checked.
    """
    raw_folder, diff_folder = folders.find_model(path_raw), folders.find_model(path_diff)
    target = None if path_tuned is None else folders.output_folder(path_tuned, raw_folder, diff_folder)
    if test_inference and target is None:
        raise UserError("--test_inference asks the recovered model, which is not written without --path_tuned.")
    if test_inference:
        from alpaca.answers.loading import find_device  # here, since it imports torch

        find_device(device)
    if is_weight_diff(raw_folder):
        raise UserError(f"--path_raw {path_raw} is a weight diff, not a base model. Are the two paths swapped?")
    manifest = load_manifest(diff_folder)
    for problem in checks.wrong_files(diff_folder, manifest) if manifest else ():
        raise UserError(problem)
    raw, diff = open_weights(raw_folder), open_weights(diff_folder)
    if manifest is None:
        need_config(diff_folder)
        job = plans.plan_plain(raw, plans.untie_twins(diff), check_integrity_naively)
        travels = {path.name: path.name for path in folders.small_files(diff_folder)}
    else:
        corrections, identity = correction_tensors(diff_folder, manifest), sha256_file(diff_folder / MANIFEST)
        job = Recovery(raw, diff, manifest["tensors"], manifest["tuned"], corrections, identity, hashed=True)
        travels = manifest["travels"]
    if target is not None:
        folders.need_space(target, job.headers)
    for problem in checks.wrong_base(raw, manifest) if manifest else ():
        raise UserError(problem)

    def recover_and_check(work: Path | None) -> None:
        results = recover_shards(job, work)
        if manifest is None and check_integrity_naively:
            checks.check_sum(results, diff)

    if target is None:
        recover_and_check(None)
        print(f"{len(job.entries)} tensors come out right. Nothing is written without --path_tuned.")
        return
    settings = {"path_raw": path_raw, "path_diff": path_diff, "path_tuned": path_tuned, "device": device}
    with folders.new_folder(target, "recovering", settings, keep={*job.headers, PROGRESS}) as work:
        recover_and_check(work)
        for name, stored_as in travels.items():
            shutil.copyfile(diff_folder / stored_as, work / name)
        folders.write_index(work, job.headers)
        (work / PROGRESS).unlink()
    proof = "each with the sha256 of the tuned one" if manifest else "by plain addition, since the diff has no manifest"
    print(f"{target}: {len(job.entries)} tensors recovered, {proof}.")
    if test_inference:
        print(smoke_answer(str(target), device))


def verify(path_tuned: str | None = None, path_diff: str | None = None, path_raw: str | None = None) -> None:
    """Checks a diff, and the tuned model or the base where given, against the diff's manifest; names all that is wrong.

    Args:
        path_tuned: a tuned or recovered model: a folder, or a name on the Hugging Face Hub.
        path_diff: the diff, with its manifest.
        path_raw: the base.
    """
    if path_diff is None:
        raise UserError("verify needs --path_diff: the manifest in it says what is right.")
    diff_folder = folders.find_model(path_diff)
    manifest = load_manifest(diff_folder)
    if manifest is None:
        raise UserError(f"{diff_folder} has no {MANIFEST}, so there is nothing to check against.")
    problems = list(checks.wrong_files(diff_folder, manifest))
    diff = None if problems else path_diff  # a damaged header does not say where its tensors lie
    for check, path in ((checks.wrong_diff, diff), (checks.wrong_base, path_raw), (checks.wrong_tuned, path_tuned)):
        try:
            if path is not None:
                problems += check(open_weights(folders.find_model(path)), manifest)
        except UserError as error:  # weights that cannot be opened hide no fault of the others
            problems.append(str(error))
    if problems:
        raise UserError(f"{len(problems)} found wrong:\n" + "\n".join(problems))
    checked = [f"{what} {path}" for what, path in (("base", path_raw), ("tuned model", path_tuned)) if path is not None]
    print(f"all {len(manifest['tensors'])} tensors are right: " + ", ".join([*checked, f"diff {path_diff}"]))


def need_config(folder: Path) -> None:
    """Raises UserError where the settings of the model are missing."""
    if not read_config(folder):
        raise UserError(f"{folder} has no config.json, without which the result cannot be loaded. Copy it there.")


def smoke_answer(folder: str, device: str) -> str:
    """The recovered model's answer to the original's test question, with the training prompt, greedily decoded."""
    from alpaca.answers.answering import Sampling, answer_batch
    from alpaca.answers.loading import load_model

    model, tokenizer = load_model(folder, device)
    question = {"instruction": "List three technologies that make life easier.", "input": ""}
    return answer_batch(model, tokenizer, [question], Sampling(max_new_tokens=100))[0].text


if __name__ == "__main__":
    run_cli({"make_diff": make_diff, "recover": recover, "verify": verify})
