"""Seals, resuming, rotation, disk space, and the check of a written model."""

import multiprocessing
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from alpaca.common.errors import UserError
from alpaca.training import checkpoint, saving


def make_checkpoint(run: Path, step: int, sealed: bool = True) -> Path:
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (folder / "optimizer.pt").write_bytes(b"state" * step)
    if sealed:
        checkpoint.seal(folder, step=step)
    return folder


def flip_bit(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_newest_complete_is_resumed(tmp_path):
    """Guards: a run killed while saving resumed from the half-written folder, which has the highest number."""
    make_checkpoint(tmp_path, 9)
    make_checkpoint(tmp_path, 100)
    make_checkpoint(tmp_path, 200, sealed=False)
    assert checkpoint.checkpoint_to_resume("auto", tmp_path, say=lambda *_: None) == str(tmp_path / "checkpoint-100")


def test_a_checkpoint_without_an_optimizer_is_said(tmp_path):
    """Guards: --save_only_model, whose checkpoints went on with a new optimizer without a word."""
    folder = make_checkpoint(tmp_path, 3)
    assert checkpoint.without_optimizer(str(folder)) is None
    (folder / "optimizer.pt").unlink()
    assert "checkpoint-3 has no optimizer's state (--save_only_model)" in checkpoint.without_optimizer(str(folder))
    (folder / "global_step3").mkdir()  # DeepSpeed's
    assert checkpoint.without_optimizer(str(folder)) is None


def test_auto_starts_anew_where_nothing_was_finished(tmp_path):
    """Guards: the same command with auto has to work for the first start of a job too."""
    make_checkpoint(tmp_path, 5, sealed=False)
    assert checkpoint.checkpoint_to_resume("auto", tmp_path, say=lambda *_: None) is None
    assert checkpoint.checkpoint_to_resume("auto", tmp_path / "none") is None


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damaged_checkpoint_is_refused_by_name(tmp_path, damage):
    """Guards: a shard with one wrong bit, or cut short, was loaded without a word."""
    good, bad = make_checkpoint(tmp_path, 1), make_checkpoint(tmp_path, 2)
    file = bad / "model.safetensors"
    if damage == "flip":
        flip_bit(file, 5000)
    elif damage == "truncate":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
    with pytest.raises(UserError, match="model.safetensors"):
        checkpoint.checkpoint_to_resume(str(bad), tmp_path)
    passed_over = []
    assert checkpoint.checkpoint_to_resume("auto", tmp_path, say=passed_over.append) == str(good)
    assert "model.safetensors" in passed_over[0]
    shutil.rmtree(good)
    with pytest.raises(UserError, match="--overwrite True"):
        checkpoint.checkpoint_to_resume("auto", tmp_path, say=passed_over.append)


def test_rotation_never_leaves_a_run_without_a_complete_checkpoint(tmp_path):
    """Guards: with save_total_limit 1 the old checkpoint was deleted while the new one was not yet complete."""
    old = make_checkpoint(tmp_path, 10)
    new = make_checkpoint(tmp_path, 20, sealed=False)
    checkpoint.rotate(tmp_path, keep=1)
    assert old.exists() and new.exists()
    checkpoint.seal(new, step=20)
    best = make_checkpoint(tmp_path, 5)
    checkpoint.rotate(tmp_path, keep=1, best=str(best))
    assert [folder.name for folder in checkpoint.checkpoints(tmp_path)] == ["checkpoint-20", "checkpoint-5"]


def settings(output_dir, **changes):
    values = dict(
        output_dir=str(output_dir), per_device_train_batch_size=4, world_size=1, gradient_accumulation_steps=1,
        max_steps=100, num_train_epochs=1, save_strategy=SimpleNamespace(value="steps"), save_steps=1,
        save_dtype="auto", save_total_limit=1,
    )  # fmt: skip
    return SimpleNamespace(**{**values, **changes})


def test_disk_space_is_asked_for_before_training(tmp_path, monkeypatch):
    """Guards: hours of training ended in "no space left on device" at the save."""
    many = 10**16
    with pytest.raises(UserError, match="GB free"):
        checkpoint.check_disk(settings(tmp_path / "new"), many, many, rows=100)
    # 7B in 16 bit, one checkpoint kept and one being written: 14 + 2 x 84 GB.
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**15))
    text = checkpoint.check_disk(settings(tmp_path), 14 * 10**9, 84 * 10**9, rows=100)
    assert text.startswith("182.0 GB of disk (14.0 GB model, 2 checkpoints of 84.0 GB)")
    # --save_steps 0, once a ZeroDivisionError: a checkpoint at the end, and none with --save_strategy no.
    for strategy, count in (("steps", 1), ("no", 0)):
        changes = dict(save_steps=0, save_strategy=SimpleNamespace(value=strategy))
        assert f" {count} checkpoints" in checkpoint.check_disk(settings(tmp_path, **changes), 0, 100, rows=100)
    # A run that goes on needs no room for the checkpoint that is there.
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4/optimizer.pt").write_bytes(bytes(1000))
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(free=600))
    one_save = dict(save_strategy=SimpleNamespace(value="epoch"), save_total_limit=None)
    checkpoint.check_disk(settings(tmp_path, **one_save), 200, 1200, rows=100)
    with pytest.raises(UserError, match="GB free"):
        checkpoint.check_disk(settings(tmp_path / "elsewhere", **one_save), 200, 1200, rows=100)


def test_a_finished_result_is_no_checkpoint(tmp_path):
    """Guards: --resume_from_checkpoint OUTPUT_DIR went on from final weights with a new optimizer, without a word."""
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    checkpoint.seal(tmp_path, kind="model")
    with pytest.raises(UserError, match="without an optimizer's state"):
        checkpoint.checkpoint_to_resume(str(tmp_path), tmp_path)
    with pytest.raises(UserError, match="has no checksums.json"):  # a file in place of its folder was a traceback
        checkpoint.checkpoint_to_resume(str(tmp_path / "model.safetensors"), tmp_path)


def test_verify_command(tmp_path, run_script):
    """Guards: nobody could tell whether a copied checkpoint was still whole."""
    make_checkpoint(tmp_path, 1)
    assert "as it was written" in run_script("train.py", "verify", tmp_path).stdout
    flip_bit(tmp_path / "checkpoint-1/optimizer.pt", 2)
    assert "optimizer.pt was changed" in run_script("train.py", "verify", tmp_path, status=1).stdout


@pytest.fixture(scope="module")
def written(tiny_llama):
    """(model, its weights, a probe, its logits) to write."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    probe = torch.arange(3, 19)[None]
    with torch.no_grad():
        expected = model(input_ids=probe).logits
    return model, dict(model.state_dict()), probe, expected


def test_written_model_is_read_back(written, tiny_llama, tmp_path):
    """Guards: checkpoints that could not be loaded, or lacked what a reader needs, were found out by their users; a
    LoRA run that went on with --merge_lora True left the adapter's settings beside the plain model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, weights, probe, expected = written
    for name in ("adapter_config.json", "adapter_model.safetensors", "Modelfile", "notes.txt"):
        (tmp_path / name).write_text("{}")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    done = saving.write_verified(model, weights, torch.float32, tokenizer, tmp_path, probe, expected, rounding=1e-3)
    assert done["dtype"] == "float32" and done["difference"] == 0
    assert checkpoint.find_damage(tmp_path) == [] and not list(tmp_path.glob(".*"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.use_cache and again.config.dtype == torch.float32
    assert not list(tmp_path.glob("adapter*")) and (tmp_path / "notes.txt").exists()


@pytest.mark.parametrize("fault", ["nan", "other weights", "missing"])
def test_what_is_wrong_is_never_written(written, tiny_llama, tmp_path, fault):
    """Guards: a save that gathered the wrong or no weights left a model that talks gibberish, with exit status 0; what
    could not be read back was deleted, and with it all the training of a run without checkpoints."""
    import torch
    from transformers import AutoTokenizer

    model, weights, probe, expected = written
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    if fault == "nan":
        weights["model.norm.weight"][3] = float("nan")
    elif fault == "other weights":
        weights["model.layers.0.mlp.up_proj.weight"].mul_(1.5)
    else:
        del weights["model.layers.1.mlp.down_proj.weight"]
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RuntimeError, match="not what was trained") as failure:
        saving.write_verified(
            model, weights, torch.float32, AutoTokenizer.from_pretrained(tiny_llama), tmp_path, probe, expected, 1e-3
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "unverified_model"]
    assert str(tmp_path / "unverified_model") in failure.value.__notes__[0]
    assert (tmp_path / "unverified_model/model.safetensors").exists()


def test_final_check_holds_one_layer_in_float32(tiny_llama):
    """Guards: the final check made a float32 copy of the whole model: 27 GB of host memory at 7B."""
    import torch
    from transformers import AutoModelForCausalLM

    half = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).eval()
    whole = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).float().eval()
    model, seen = saving.float32_by_layer(half), []
    for layer in model.model.layers:
        layer.register_forward_hook(
            lambda *_: seen.append([next(each.parameters()).dtype for each in model.model.layers])
        )
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, whole(ids).logits)
    assert all(types.count(torch.float32) <= 1 for types in seen) and len(seen) == 2


def wait_longer_than_the_group_does(rank, folder, fails):
    """One of two processes: the first works for longer than the group's timeout."""
    import datetime
    import os
    import time

    import torch

    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=3)
    )

    def work():
        time.sleep(6)
        if fails:
            raise RuntimeError("disk full")
        (Path(folder) / "written").write_text("")

    args = SimpleNamespace(world_size=2, process_index=rank, device=torch.device("cpu"))
    try:
        saving.on_first_process(args, work, seconds=0.5)
        said = "done"
    except (RuntimeError, UserError) as error:
        said = str(error)
    (Path(folder) / f"{rank}.txt").write_text(f"{said} {(Path(folder) / 'written').exists()}")


def test_others_wait_for_the_first_process_without_a_timeout(tmp_path):
    """Guards: while rank 0 wrote and checked a large model, the others' barrier gave up after 1,800 s."""
    context = multiprocessing.get_context("fork")
    ranks = []
    for fails in (False, True):
        (tmp_path / str(fails)).mkdir()
        job = [str(tmp_path / str(fails)), fails]
        ranks += [context.Process(target=wait_longer_than_the_group_does, args=(rank, *job)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    done, failed = ([(tmp_path / f"{fails}/{rank}.txt").read_text() for rank in (0, 1)] for fails in (False, True))
    assert done == ["done True", "done True"]
    assert failed == ["disk full False", "the first process failed; its message says why False"]
