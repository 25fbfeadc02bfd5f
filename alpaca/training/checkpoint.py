"""Checkpoints that can be trusted: sealed with checksums, found by completeness, gathered, written and read back.

python checkpoint.py verify OUTPUT_DIR                       # a whole run: its model and its checkpoint-* folders
python checkpoint.py verify OUTPUT_DIR/checkpoint-200        # one
"""

import contextlib
import json
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from alpaca.common.errors import UserError, cli_errors
from alpaca.common.files import fsync_dir, jdump, jload, usual_rights
from alpaca.common.run_record import sha256_file

SEAL = "checksums.json"

# ----------------------------------------------------------------------------------------------------------------------
# Seals.


def seal(folder: str | os.PathLike, names: list[str] | None = None, **facts: Any) -> dict[str, Any]:
    """Writes `folder`/checksums.json with size and sha256 of `names` (default: every file below), and `facts`.

    The seal is written last, so a folder without one was never finished.
    """
    folder = Path(folder)
    if names is None:
        names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != SEAL)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:  # hashing releases the GIL
        sums = list(pool.map(lambda name: sha256_file(folder / name), names))
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": digest}
        for name, digest in zip(names, sums, strict=True)
    }
    record = {**facts, "files": files}
    jdump(record, folder / SEAL)
    return record


def find_damage(folder: str | os.PathLike) -> list[str]:
    """What differs from the seal of `folder`: one line for each missing, truncated or changed file; [] where intact."""
    folder = Path(folder)
    try:
        files = json.loads((folder / SEAL).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return [f"{folder} has no {SEAL}: it was never finished"]
    except (ValueError, KeyError, TypeError):
        return [f"{folder / SEAL} cannot be read"]

    def compare(item: tuple[str, dict[str, Any]]) -> str | None:
        path, expected = folder / item[0], item[1]
        if not path.is_file():
            return f"{path} is missing"
        if (size := path.stat().st_size) != expected["bytes"]:
            return f"{path} has {size:,} bytes instead of {expected['bytes']:,}"
        if sha256_file(path) != expected["sha256"]:
            return f"{path} was changed after it was written (its sha256 differs)"
        return None

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return [line for line in pool.map(compare, files.items()) if line]


def checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """The checkpoint-STEP folders of a run, newest first."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]), reverse=True)


def to_resume_from(wish: str | None, output_dir: str, say=print) -> str | None:
    """The checkpoint that --resume_from_checkpoint means: None to start anew, or a folder whose every byte is right.

    `wish`: None, "auto" (or True: the newest complete checkpoint in `output_dir`, None where there is none yet), or a
    path. Raises UserError where the path is damaged, or where every finished checkpoint in `output_dir` is.
    """
    if wish is None or wish.lower() in ("false", "no", "none"):
        return None
    if wish.lower() not in ("auto", "true", "yes"):
        if damage := find_damage(wish):
            raise UserError(
                f"--resume_from_checkpoint {wish} cannot be trusted:\n  " + "\n  ".join(damage[:5])
                + "\nTry --resume_from_checkpoint auto, which takes the newest complete one."
            )  # fmt: skip
        return wish
    broken = []
    for folder in checkpoints(output_dir):
        if not (damage := find_damage(folder)):
            return str(folder)
        say(f"passed over: {damage[0]}")
        if (folder / SEAL).exists():
            broken += damage
    if broken:
        raise UserError(
            f"every finished checkpoint in {output_dir} is damaged:\n  " + "\n  ".join(broken[:5])
            + "\nTo start over, add --overwrite True in place of --resume_from_checkpoint."
        )  # fmt: skip
    return None


def rotate(output_dir: str | os.PathLike, keep: int | None, best: str | None = None) -> None:
    """Deletes all but the newest `keep` sealed checkpoints, unfinished ones older than those, and never `best`."""
    if not keep:
        return
    sealed = [folder for folder in checkpoints(output_dir) if (folder / SEAL).exists()]
    for folder in checkpoints(output_dir):
        kept = folder in sealed[:keep] or (best and Path(best).resolve() == folder.resolve())
        older = sealed and int(folder.name.split("-")[1]) < int(sealed[0].name.split("-")[1])
        if older and not kept:
            shutil.rmtree(folder)


# ----------------------------------------------------------------------------------------------------------------------
# Disk space.


def check_disk(output_dir: str, parameters: int, save_bytes: int, saves: int, keep: int | None, trainable: int) -> str:
    """Says how much disk the run needs; raises UserError where less is free.

    `parameters`: of the model; `save_bytes`: bytes of one saved weight; `saves`: checkpoints during the run; `keep`:
    --save_total_limit; `trainable`: parameters with optimizer state (float32 weight and two Adam moments).
    """
    final = parameters * save_bytes
    # One more than is kept: the old one goes only when the new one is sealed.
    held = min(saves, keep + 1) if keep else saves
    each = 4 * parameters * (trainable == parameters) + 12 * trainable if trainable < parameters else 12 * parameters
    needed = final + held * each
    folder = Path(output_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    # The checkpoints of a run that goes on are among those that it is going to hold.
    there = sum(file.stat().st_size for each in checkpoints(output_dir) for file in each.rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free + there
    text = f"{needed / 1e9:.1f} GB of disk ({final / 1e9:.1f} GB model, {held} checkpoints of {each / 1e9:.1f} GB)"
    if needed > free:
        raise UserError(
            f"the run needs {text}, and {folder} has {free / 1e9:.1f} GB free. "
            "Lower --save_total_limit, raise --save_steps, or choose another --output_dir."
        )
    return f"{text}; {free / 1e9:.1f} GB free"


# ----------------------------------------------------------------------------------------------------------------------
# The final save.


def gather_weights(model: Any, accelerator: Any, dtype: Any) -> dict[str, Any]:
    """All weights of `model` on the CPU of rank 0 in `dtype`, one tensor at a time; {} on the other ranks.

    Every rank must call it. `model`: what Trainer trains, sharded (FSDP, ZeRO) or not. Tied weights appear under
    every name that the model's own state dict gives them, except under ZeRO, which knows the first name only.
    """
    import torch

    main, weights = accelerator.is_main_process, {}
    kind = str(accelerator.distributed_type).rsplit(".", 1)[-1]

    def keep(name: str, tensor: Any) -> None:
        if main:
            target = dtype if tensor.is_floating_point() else tensor.dtype
            name = name.replace("_orig_mod.", "")  # torch.compile's wrapper, around the model or around each layer
            weights[name] = tensor.detach().to("cpu", target, copy=True).contiguous()

    if kind == "DEEPSPEED":
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        inner = accelerator.unwrap_model(model, keep_torch_compile=False)
        for name, parameter in inner.named_parameters():
            # The float32 master copy where there is one: 16-bit shards are only its rounding.
            master = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
            if master is not None:
                keep(name, master.view(getattr(parameter, "ds_shape", parameter.shape)))
            else:
                with deepspeed.zero.GatheredParameters([parameter]):
                    keep(name, parameter)
        saved_buffers = set(inner.state_dict())
        for name, buffer in inner.named_buffers():
            if name in saved_buffers:
                keep(name, buffer)
    elif kind == "FSDP" and not accelerator.is_fsdp2:
        for name, tensor in accelerator.get_state_dict(model).items():
            keep(name, tensor)
    else:
        for name, tensor in accelerator.unwrap_model(model, keep_torch_compile=False).state_dict().items():
            if hasattr(tensor, "full_tensor"):  # a DTensor; offloaded ones pass through the device for the gather
                tensor = tensor.to(accelerator.device).full_tensor()
            keep(name, tensor)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return weights


def write_verified(
    model: Any, weights: dict[str, Any], dtype: Any, tokenizer: Any, output_dir: str, probe: Any, expected: Any,
    rounding: float,
) -> dict[str, Any]:  # fmt: skip
    """Writes a plain Hugging Face checkpoint into `output_dir`, reads it back, and only then lets it be seen there.

    Called on rank 0. `model`: a PreTrainedModel or PeftModel whose class and settings describe `weights` (its own
    tensors are not read); `probe`: (1, n) token ids; `expected`: (1, n, vocabulary) float32 logits of the model that
    was trained; `rounding`: how far, relatively, the written model's may be from them. The files are made in a folder
    beside, checked there (see `check_model`), moved one by one and sealed. Raises RuntimeError that names the first
    thing that is wrong; `output_dir` is then as before.
    """
    output_dir = Path(output_dir)
    beside = output_dir / ".model.partial"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        # A tied head is stored once, as in the base: in a diff of the two it would count twice.
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        weights = {name: tensor for name, tensor in weights.items() if tied.get(name) not in weights}
        model.save_pretrained(beside, state_dict=weights, max_shard_size="5GB")
        tokenizer.save_pretrained(beside)
        for file in beside.iterdir():
            usual_rights(file)
        is_adapter = (beside / "adapter_config.json").exists()
        if not is_adapter:
            # save_pretrained writes the dtype that the model has in memory, and Trainer has switched the cache off.
            config = jload(beside / "config.json")
            config |= {"dtype": str(dtype).removeprefix("torch."), "use_cache": True}
            jdump(config, beside / "config.json", indent=2)
        difference = check_model(beside, None if is_adapter else weights, probe, expected, rounding)
        names = sorted(p.name for p in beside.iterdir() if p.name != "README.md")  # train.py writes its own card
        for old in output_dir.glob("*.safetensors*"):
            if old.name not in names:
                old.unlink()
        (output_dir / SEAL).unlink(missing_ok=True)
        # config.json last: until then nothing there can be loaded as a model.
        for name in sorted(names, key=lambda name: name in ("config.json", "adapter_config.json")):
            os.replace(beside / name, output_dir / name)
        seal(output_dir, names, kind="adapter" if is_adapter else "model")
        fsync_dir(output_dir)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    total = sum((output_dir / name).stat().st_size for name in names)
    return {"files": len(names), "bytes": total, "dtype": str(dtype).removeprefix("torch."), "difference": difference}


def check_model(folder: Path, weights: dict[str, Any] | None, probe: Any, expected: Any, rounding: float) -> float:
    """Opens a written checkpoint as a stranger would and compares it with what was meant.

    Every tensor of the files: the name and bits of `weights` (where given), finite; a model from the files: one forward
    pass on `probe`. Returns the relative difference |logits - expected| / |expected|; raises RuntimeError where it is
    above `rounding` or anything else is wrong.
    """
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    from alpaca.training.model import unsharded

    def wrong(text: str) -> None:
        raise RuntimeError(f"the written checkpoint is not what was trained: {text}")

    seen: set[str] = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                tensor = tensors.get_tensor(name)
                seen.add(name)
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    wrong(f"{file.name}: {name} holds values that are not finite")
                meant = (weights or {}).get(name)
                if meant is not None and (meant.dtype != tensor.dtype or not torch.equal(meant, tensor)):
                    wrong(f"{file.name}: {name} differs from the tensor in memory")
    if not seen:
        wrong("no tensor was written")
    if (folder / "adapter_config.json").exists():
        from peft import AutoPeftModelForCausalLM

        with unsharded():
            model, report = AutoPeftModelForCausalLM.from_pretrained(folder), {}
    else:
        with unsharded():
            model, report = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, report.get(what, ()))):
            wrong(f"{what.replace('_', ' ')}: {', '.join(names[:5])}")
    model = model.float().eval()
    with torch.no_grad():
        logits = model(input_ids=probe.cpu()).logits.float()
    difference = ((logits - expected.cpu()).norm() / expected.cpu().norm()).item()
    if not difference <= rounding:  # also where it is nan
        wrong(f"its logits differ from the trained model's by {difference:.2%} (at most {rounding:.1%} is rounding)")
    return difference


def verify(path: str) -> int:
    """Checks a sealed folder, or an output_dir with its checkpoints; prints a line for each and returns 0 or 1."""
    if not Path(path).is_dir():
        raise UserError(f"no folder {path}")
    folders = checkpoints(path)
    if (Path(path) / SEAL).exists() or not folders:
        folders.insert(0, Path(path))
    status = 0
    for folder in folders:
        damage = find_damage(folder)
        print(f"{folder}: {'every file is as it was written' if not damage else 'NOT INTACT'}")
        for line in damage:
            print(f"  {line}")
        status = 1 if damage else status
    return status


@contextlib.contextmanager
def nothing_lost(output_dir: str, say=print):
    """Names the newest complete checkpoint when the block fails, so that the way on is on the screen."""
    try:
        yield
    except BaseException:
        newest = next((folder for folder in checkpoints(output_dir) if (folder / SEAL).exists()), None)
        if newest:
            say(f"{newest} is complete. The same command with --resume_from_checkpoint auto goes on from there.")
        raise


if __name__ == "__main__":
    with cli_errors():
        if len(sys.argv) != 3 or sys.argv[1] != "verify":
            raise UserError("usage: python checkpoint.py verify FOLDER")
        sys.exit(verify(sys.argv[2]))
