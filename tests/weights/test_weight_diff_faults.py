"""weight_diff.py when something is wrong: flipped bytes, wrong bases, broken hardware, kills, two runs at once."""

import fcntl
import os
import random
import re
import shutil
from pathlib import Path

import kill_recover
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from test_weight_diff import save, tune

import weight_diff
from alpaca.common.errors import UserError
from alpaca.weights import difference as diff_tensors
from alpaca.weights import tensors as tensor_files
from alpaca.weights.difference import recover_tensor

FLIPS = 100


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Base, tuned (one more row, two shards, needing corrections), their diff and the recovered model."""
    folder = tmp_path_factory.mktemp("models")
    base = tiny_models.make_tiny_llama(folder / "base", hidden_size=32, intermediate_size=48)
    tuned = tune(base, folder / "tuned", extra_rows=1, max_shard_size="120KB")
    weight_diff.make_diff(base, tuned, folder / "diff")
    weight_diff.recover(base, folder / "diff", folder / "out")
    assert (folder / "diff" / "weight_diff_correction.safetensors").exists()
    return base, tuned, folder / "diff", folder / "out"


def flipped(folder: Path, seed: int, skip: tuple[str, ...] = ("run.json",), only: str = "*"):
    """Flips one random bit at FLIPS random places of the folder's files, one at a time; yields what lies there.

    Yields (file name, name of the tensor hit or None, whether it lies in a base's header, where nothing depends on
    every byte). Long files are hit more often, as a disk would; each file is hit at least once.
    """
    rng = random.Random(seed)
    files = sorted(path for path in folder.glob(only) if path.name not in skip)
    weights = [path.stat().st_size for path in files]
    for path in [*files, *rng.choices(files, weights, k=FLIPS - len(files))]:
        place, bit = rng.randrange(path.stat().st_size), 1 << rng.randrange(8)
        hit = None
        if path.suffix == ".safetensors":
            _, tensors = tensor_files.read_header(path)
            hit = next((t.name for t in tensors if t.offset <= place < t.offset + t.nbytes), None)
        original = path.read_bytes()
        path.write_bytes(original[:place] + bytes([original[place] ^ bit]) + original[place + 1 :])
        yield path.name, hit
        path.write_bytes(original)


def test_a_flipped_byte_in_the_base(tmp_path, models):
    """ "Naive integrity check failed', and no word which file: here the tensor is named, before any work."""
    base = Path(shutil.copytree(models[0], tmp_path / "base"))
    harmless = 0
    for file, tensor in flipped(base, 1, only="*.safetensors"):
        if tensor is None:  # the base's header: another spelling of the same tensors is no fault
            try:
                weight_diff.verify(path_diff=models[2], path_raw=base)
                harmless += 1
            except UserError as error:
                assert file in str(error) or "the base" in str(error)
            continue
        with pytest.raises(UserError) as caught:
            weight_diff.recover(base, models[2], tmp_path / "out")
        text = str(caught.value)
        assert text.startswith(f"{tensor} in the base") and len(re.findall(r"sha256 [0-9a-f]{64}", text)) == 2
        assert "damaged file" in text, text
        assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".*"))
    assert harmless < 5


def test_a_flipped_byte_in_the_diff(tmp_path, models):
    """Weights, corrections, headers, index, config, tokenizer, manifest, its checksum: all found and named."""
    diff = Path(shutil.copytree(models[2], tmp_path / "diff"))
    (diff / "README.md").unlink()  # the card is its publisher's
    for file, tensor in flipped(diff, 2):
        shutil.rmtree(tmp_path / ".out.recovering", ignore_errors=True)  # or its right shards would be gone on with
        with pytest.raises(UserError) as caught:
            weight_diff.recover(models[0], diff, tmp_path / "out")
        assert (tensor or file) in str(caught.value), (file, tensor, str(caught.value))
        if tensor:
            assert f"{tensor} of the diff" in str(caught.value) or f"{tensor} in the diff" in str(caught.value)
        assert not (tmp_path / "out").exists()
        with pytest.raises(UserError) as caught:
            weight_diff.verify(path_diff=diff)
        assert (tensor or file) in str(caught.value)
    weight_diff.recover(models[0], diff, tmp_path / "out")


def test_a_flipped_byte_in_the_output(tmp_path, models):
    """verify names the tensor or the file of a recovered model that was damaged since."""
    out = Path(shutil.copytree(models[3], tmp_path / "out"))
    for file, tensor in flipped(out, 3):
        with pytest.raises(UserError) as caught:
            weight_diff.verify(out, models[2])
        assert (tensor or file) in str(caught.value), (file, tensor, str(caught.value))
    weight_diff.verify(out, models[2])


def test_a_byte_flipped_on_the_way(tmp_path, models, monkeypatch):
    """Faulty memory while adding: the result's hash is checked before the folder appears."""
    add = diff_tensors.add
    monkeypatch.setattr(diff_tensors, "add", lambda values, diff, dtype: add(values, diff * 2, dtype))
    with pytest.raises(UserError, match="came out with sha256"):
        weight_diff.recover(*models[:3:2], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Wrong bases.


def llama_other_layout(state: dict, heads: int) -> dict:
    """The same weights with the rows of q_proj and k_proj in Meta's rotary order, as another conversion leaves them."""
    turned = {}
    for name, tensor in state.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            rows, columns = tensor.shape
            tensor = tensor.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)
        turned[name] = tensor
    return turned


def test_wrong_bases_are_refused_before_work(tmp_path, models):
    """A wrong base gave word salad without a warning. Each is named for what it is, with both hashes."""
    base, tuned, diff, _ = models
    state = load_file(base / "model.safetensors")
    other_seed = tiny_models.make_tiny_llama(tmp_path / "seed", seed=7, hidden_size=32, intermediate_size=48)
    wrong = {
        "another model, or another training": other_seed,
        "the same weights in another dtype.*needs the F32": None,
        "a copy in another dtype": save(tmp_path / "half", {k: v.half() for k, v in state.items()}),
        "another conversion": save(tmp_path / "layout", llama_other_layout(state, 4)),
        "the tuned model itself": tuned,
        r"resized to 802 rows \(its first rows are the base's": save(
            tmp_path / "twice",
            {k: torch.cat([v, v[:2]]) if len(v) == 800 else v for k, v in state.items()},
        ),
        "another model: a size": tiny_models.make_tiny_llama(tmp_path / "wide", hidden_size=64, intermediate_size=48),
        "norm.weight is missing from the base": save(
            tmp_path / "lacking", {k: v for k, v in state.items() if k != "model.norm.weight"}
        ),
    }
    half_base = save(tmp_path / "half_base", {k: v.half() for k, v in state.items()})
    weight_diff.make_diff(half_base, tuned, tmp_path / "half_diff")
    as_float = save(tmp_path / "as_float", {k: v.half().float() for k, v in state.items()})
    wrong["the same weights in another dtype.*needs the F32"] = as_float
    for number, (text, folder) in enumerate(wrong.items()):
        which, text = (tmp_path / "half_diff", text.replace("F32", "F16")) if folder == as_float else (diff, text)
        with pytest.raises(UserError, match=f"(?s){text}") as caught:
            weight_diff.recover(folder, which, tmp_path / f"out{number}")
        if "missing" not in text:
            assert len(set(re.findall(r"sha256 ([0-9a-f]{64})", str(caught.value)))) == 2, str(caught.value)
        assert not list(tmp_path.glob("out*")) and not list(tmp_path.glob(".*"))


def test_a_base_in_other_files_is_the_base(tmp_path, models):
    """Shards, .bin files and extra buffers do not make another base: tensors do."""
    base, _, diff, out = models
    state = load_file(base / "model.safetensors")
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    weight_diff.recover(save(tmp_path / "bin", state, file="pytorch_model.bin"), diff, tmp_path / "out")
    for path in out.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


# ----------------------------------------------------------------------------------------------------------------------
# Interruptions.


def fail_after(monkeypatch, calls: int):
    """recover_tensor raises at its `calls`+1st call; returns the list of names it was called for."""
    seen = []

    def stub(job, diff, write):
        seen.append(diff.name)
        if len(seen) > calls:
            raise KeyboardInterrupt
        return recover_tensor(job, diff, write)

    monkeypatch.setattr(diff_tensors, "recover_tensor", stub)
    return seen


@pytest.mark.parametrize("with_manifest", [True, False])
def test_an_interrupted_run_goes_on(tmp_path, models, monkeypatch, with_manifest, capsys):
    """Finished shards are kept, checked and not computed again; a damaged one is; the result is the same."""
    base, tuned, diff, out = models
    if not with_manifest:
        diff = tmp_path / "plain"
        diff.mkdir()
        for path in [*models[2].glob("model*"), models[2] / "tuned_config.json"]:
            shutil.copy(path, diff / path.name.removeprefix("tuned_"))
        weight_diff.recover(base, diff, tmp_path / "whole")
        out = tmp_path / "whole"
    layout = [len(tensor_files.read_header(path)[1]) for path in sorted(diff.glob("model-*.safetensors"))]
    assert len(layout) > 2
    fail_after(monkeypatch, layout[0] + layout[1])
    with pytest.raises(KeyboardInterrupt):
        weight_diff.recover(base, diff, tmp_path / "out")
    work = tmp_path / ".out.recovering"
    assert not (tmp_path / "out").exists() and len(list(work.glob("*.safetensors"))) == 2
    assert "the same command uses it again" in capsys.readouterr().err
    first = sorted(work.glob("*.safetensors"))[0]
    damaged = bytearray(first.read_bytes())
    damaged[-1] ^= 1
    first.write_bytes(damaged)
    seen = fail_after(monkeypatch, 10**6)
    capsys.readouterr()
    weight_diff.recover(base, diff, tmp_path / "out")
    assert len(seen) == sum(layout) - layout[1]
    sums = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sum")]
    assert len(sums) == (not with_manifest)
    for path in out.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    assert not work.exists()


def test_leftovers_of_another_job_are_not_mixed_in(tmp_path, models, monkeypatch):
    """Work that was begun with another diff is not gone on with, and its files do not reach the result."""
    base, tuned, diff, _ = models
    fail_after(monkeypatch, 12)
    with pytest.raises(KeyboardInterrupt):
        weight_diff.recover(base, diff, tmp_path / "out")
    monkeypatch.undo()
    single = tune(base, tmp_path / "single")
    weight_diff.make_diff(base, single, tmp_path / "other_diff")
    weight_diff.recover(base, tmp_path / "other_diff", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    weight_diff.verify(tmp_path / "out", tmp_path / "other_diff")


def test_two_runs_at_once(tmp_path, models):
    """A second recover into the same folder is told to wait instead of writing into the first one's files."""
    work = tmp_path / ".out.recovering"
    work.mkdir()
    lock = os.open(work, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another process is recovering"):
        weight_diff.recover(models[0], models[2], tmp_path / "out")
    os.close(lock)
    weight_diff.recover(models[0], models[2], tmp_path / "out")


def test_a_failed_make_diff_leaves_no_diff(tmp_path, models):
    """A tuned model that cannot be read to its end leaves nothing at --path_diff; the next run starts clean."""
    tuned = Path(shutil.copytree(models[1], tmp_path / "tuned"))
    (tuned / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        weight_diff.make_diff(models[0], tuned, tmp_path / "diff")
    assert not (tmp_path / "diff").exists()
    shutil.copy(models[1] / "config.json", tuned)
    weight_diff.make_diff(models[0], tuned, tmp_path / "diff")
    for path in models[2].iterdir():
        if path.name != "run.json":
            assert path.read_bytes() == (tmp_path / "diff" / path.name).read_bytes(), path.name


def test_sigkill_during_recover():
    """kill -9 at random moments: nothing that looks finished, and the next run goes on and equals the tuned model."""
    seen = kill_recover.kill_recover(kills=6, seed=1)
    assert seen["killed"] == 6 and seen["let through"] >= 2


def test_our_files_are_the_librarys(tmp_path):
    """Headers written here are, byte for byte, those of the safetensors library, order and padding included."""
    state = {"b": torch.arange(6.0), "a": torch.arange(3).half(), "c": torch.arange(4), "é": torch.zeros(2, 2, 2)}
    save_file(state, tmp_path / "x.safetensors", {"format": "pt"})
    names = {torch.float32: "F32", torch.float16: "F16", torch.int64: "I64"}
    ours = tensor_files.make_header((n, names[t.dtype], tuple(t.shape)) for n, t in state.items())
    assert ours == tensor_files.read_header(tmp_path / "x.safetensors")[0]
