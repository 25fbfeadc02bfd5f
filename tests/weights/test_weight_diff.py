"""weight_diff.py: exact round trips of every kind of tensor and file, and what is refused."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

import weight_diff
from alpaca.common.errors import UserError, cli_errors
from alpaca.weights import manifest as weight_manifest
from alpaca.weights import tensors as tensor_files

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def save(folder: Path, state: dict, config: dict | None = None, file: str = "model.safetensors") -> Path:
    """A folder with the given tensors and a config: a model as far as weight_diff.py is concerned."""
    folder.mkdir(parents=True)
    if file.endswith(".bin"):
        torch.save(state, folder / file)
    else:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / file, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    return folder


def tune(base: Path, folder: Path, extra_rows: int = 0, dtype=None, **saving) -> Path:
    """A model some random steps away from `base`, with `extra_rows` more embeddings, saved by transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype or "auto")
    torch.manual_seed(1)
    if extra_rows:
        model.resize_token_embeddings(model.get_input_embeddings().weight.shape[0] + extra_rows, mean_resizing=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((torch.randn(parameter.shape) * 5e-3).to(parameter.dtype))
    model.save_pretrained(folder, **saving)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def round_trip(raw: Path, tuned: Path, folder: Path, **options) -> tuple[Path, Path]:
    """make_diff, recover and verify; asserts that every file of weights is the tuned one byte for byte."""
    diff, out = folder / "diff", folder / "out"
    weight_diff.make_diff(raw, tuned, diff, **options)
    weight_diff.recover(raw, diff, out)
    weight_diff.verify(out, diff, raw)
    for path in tuned.glob("*.safetensors"):
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name
    return diff, out


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


# ----------------------------------------------------------------------------------------------------------------------
# Round trips.


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_resized_llama_in_shards(tmp_path, dtype, capsys):
    """fp32 (t - r) + r is not always exact, and 32001 rows against 32000 were a size mismatch for many."""
    base = tiny_models.make_tiny_llama(tmp_path / "base", dtype=dtype)
    tuned = tune(base, tmp_path / "tuned", extra_rows=1, max_shard_size="300KB")
    assert len(list(tuned.glob("*.safetensors"))) > 1
    diff, out = round_trip(base, tuned, tmp_path)
    assert "each with the sha256 of the tuned one" in capsys.readouterr().out
    # Everything that makes the folder a model is there, byte for byte, and nothing is marked as a diff.
    for path in tuned.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    assert weight_diff.is_weight_diff(diff) and not weight_diff.is_weight_diff(out)
    assert not weight_diff.is_weight_diff(base)
    assert json.loads((out / "run.json").read_text())["outcome"] == "finished"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_command_line(tmp_path, tiny_llama, run_script):
    """The commands as they are typed, with the answer to the test question from the recovered model."""
    tuned, diff, out = tune(tiny_llama, tmp_path / "tuned"), tmp_path / "diff", tmp_path / "out"
    run_script("weight_diff.py", "make_diff", "--path_raw", tiny_llama, "--path_tuned", tuned, "--path_diff", diff)
    done = run_script("weight_diff.py", "recover", "--path_raw", tiny_llama, "--path_diff", diff, "--path_tuned", out,
                      "--test_inference", "True")  # fmt: skip
    assert "sha256" in done.stdout and len(done.stdout.strip().splitlines()) >= 2
    run_script("weight_diff.py", "verify", "--path_tuned", out, "--path_diff", diff)
    wrong = run_script("weight_diff.py", "verify", "--path_tuned", tiny_llama, "--path_diff", diff, status=2)
    assert "is not right" in wrong.stderr and "Traceback" not in wrong.stderr


@pytest.mark.parametrize("raw_dtype", DTYPES)
@pytest.mark.parametrize("tuned_dtype", DTYPES)
def test_any_bits_come_back(tmp_path, raw_dtype, tuned_dtype):
    """NaN payloads, infinities, -0.0, subnormals and wild differences: every pair of types, random bit patterns."""

    def random_bits(dtype: str, seed: int) -> torch.Tensor:
        numbers = np.random.default_rng(seed).integers(0, 256, 20000 * tensor_files.itemsize(dtype), dtype=np.uint8)
        return torch.from_numpy(numbers).view(DTYPES[dtype]).reshape(200, 100)

    near = torch.randn(100, 50, generator=torch.Generator().manual_seed(0))
    raw = {
        "wild": random_bits(raw_dtype, 1),
        "near": near.to(DTYPES[raw_dtype]),
        "zero": torch.zeros(3, 2, dtype=DTYPES[raw_dtype]),
    }
    tuned = {
        "wild": random_bits(tuned_dtype, 2),
        "near": (near * 1.01 + 1e-3).to(DTYPES[tuned_dtype]),
        "zero": (-torch.zeros(3, 2)).to(DTYPES[tuned_dtype]),
    }
    diff, _ = round_trip(save(tmp_path / "raw", raw), save(tmp_path / "tuned", tuned), tmp_path)
    entries = json.loads((diff / weight_diff.MANIFEST).read_text())["tensors"]
    assert entries["wild"]["corrections"] > 0 and entries["zero"]["corrections"] in (0, 6)
    assert all(tensor.dtype == torch.float32 for tensor in load_file(diff / "model.safetensors").values())


def test_odd_tensors(tmp_path):
    """Integers that wrap round, bool, float64, scalars, empty ones, tensors of one side, rows added and taken away."""
    generator = torch.Generator().manual_seed(0)

    def rows(count, dtype=torch.float16):
        return torch.randn(count, 8, generator=generator).to(dtype)

    raw = {
        "int64": torch.tensor([2**62, -(2**62), 7]), "uint8": torch.tensor([250, 3], dtype=torch.uint8),
        "bool": torch.tensor([True, False]), "float64": torch.randn(5, generator=generator, dtype=torch.float64),
        "scalar": torch.tensor(1.5), "empty": torch.zeros(0, 8), "grown": rows(10), "bias": torch.arange(10.0),
        "shrunk": rows(10), "raw_only": rows(2), "int_grown": torch.arange(6).reshape(3, 2), "recast": rows(4),
        "float_to_int": rows(2),
    }  # fmt: skip
    tuned = {
        "int64": torch.tensor([-(2**62) - 9, 2**62 + 5, -1]), "uint8": torch.tensor([2, 255], dtype=torch.uint8),
        "bool": torch.tensor([False, False]), "float64": torch.randn(5, generator=generator, dtype=torch.float64),
        "scalar": torch.tensor(-2.5), "empty": torch.zeros(0, 8), "grown": rows(13), "bias": torch.arange(12.0) * 1.1,
        "shrunk": rows(7), "tuned_only": rows(3, torch.bfloat16), "int_grown": torch.arange(8).reshape(4, 2),
        "recast": rows(4, torch.float32), "float_to_int": torch.arange(16).reshape(2, 8),
    }  # fmt: skip
    raw, changed = save(tmp_path / "raw", raw), save(tmp_path / "tuned", tuned)
    diff, out = round_trip(raw, changed, tmp_path, allow_whole_tensors=True)
    manifest = json.loads((diff / weight_diff.MANIFEST).read_text())
    how = {name: entry["how"] for name, entry in manifest["tensors"].items()}
    stored = {name for name, kind in how.items() if kind == "stored"}
    assert stored == {"bool", "float64", "empty", "tuned_only", "int_grown", "float_to_int"}
    assert manifest["raw"]["only_here"] == ["raw_only"]
    assert {name: bits(tensor) for name, tensor in load_file(out / "model.safetensors").items()} == {
        name: bits(tensor) for name, tensor in tuned.items()
    }


def test_tied_embeddings(tmp_path, tiny_tied):
    """The original lists tied weights twice and leaves tuned - 2 raw in the diff; here they are stored once, right."""
    tuned = tune(tiny_tied, tmp_path / "tuned")
    diff, out = round_trip(tiny_tied, tuned, tmp_path)
    difference = load_file(diff / "model.safetensors")
    assert "lm_head.weight" not in difference
    name = "model.embed_tokens.weight"
    expected = load_file(tuned / "model.safetensors")[name] - load_file(tiny_tied / "model.safetensors")[name]
    assert torch.equal(difference[name], expected)


def test_opt_with_padded_vocabulary(tmp_path, tiny_opt):
    """An embedding with more rows than the tokenizer has entries keeps its height."""
    round_trip(tiny_opt, tune(tiny_opt, tmp_path / "tuned", dtype=torch.bfloat16), tmp_path)


def test_corrections_over_many_pieces(tmp_path, monkeypatch):
    """Pieces end inside rows, and corrections are read in pieces of their own."""
    generator = torch.Generator().manual_seed(3)
    raw = save(tmp_path / "raw", {"a": torch.randn(50, 37, generator=generator) * 1e4})
    tuned = save(tmp_path / "tuned", {"a": torch.randn(53, 37, generator=generator)})
    diff, _ = round_trip(raw, tuned, tmp_path / "whole")
    assert json.loads((diff / weight_diff.MANIFEST).read_text())["tensors"]["a"]["corrections"] > 100
    monkeypatch.setattr(tensor_files, "PIECE", 41)
    pieced, _ = round_trip(raw, tuned, tmp_path / "pieces")
    for path in diff.glob("*.safetensors"):
        assert path.read_bytes() == (pieced / path.name).read_bytes()
    weight_diff.recover(raw, diff, tmp_path / "other_pieces")


def test_mean_of_the_old_rows(tmp_path):
    """New rows start from the mean of the old ones, as the original's; float64 makes it the same everywhere."""
    rows = torch.randn(700, 33, generator=torch.Generator().manual_seed(4)).half()
    folder = save(tmp_path / "raw", {"a": rows})
    mean = tensor_files.mean_row(tensor_files.open_weights(folder).tensors["a"])
    assert mean.dtype == np.float32
    np.testing.assert_allclose(mean, rows.float().mean(dim=0).numpy(), atol=1e-7)


# ----------------------------------------------------------------------------------------------------------------------
# What is refused, and what is left alone.


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Base, tuned, diff: small folders that the tests below only read."""
    folder = tmp_path_factory.mktemp("models")
    base = tiny_models.make_tiny_llama(folder / "base", dtype="float16")
    tuned = tune(base, folder / "tuned", extra_rows=1, max_shard_size="300KB")
    weight_diff.make_diff(base, tuned, folder / "diff")
    return base, tuned, folder / "diff"


def test_outputs_are_never_overwritten_nor_mixed_with_inputs(tmp_path, models):
    """Nothing is deleted: an existing result, and an output in, around or equal to an input, are refused."""
    base, tuned, diff = (Path(shutil.copytree(path, tmp_path / path.name)) for path in models)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for out in (base, diff, base / "inside", diff / "inside", tmp_path):
        with pytest.raises(UserError, match="inside the other"):
            weight_diff.recover(base, diff, out)
    with pytest.raises(UserError, match="left alone"):
        weight_diff.recover(base, diff, tuned)
    with pytest.raises(UserError, match="left alone"):
        weight_diff.make_diff(base, base, tuned)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path / "empty").mkdir()
    weight_diff.recover(base, diff, tmp_path / "empty")
    weight_diff.verify(tmp_path / "empty", diff)


def test_mixed_up_folders(tmp_path, models):
    """A diff given as a model, a model given as a diff, folders that are neither: each is told what it is."""
    base, tuned, diff = models
    with pytest.raises(UserError, match="paths swapped"):
        weight_diff.recover(diff, base, tmp_path / "out")
    with pytest.raises(UserError, match="itself a weight diff"):
        weight_diff.make_diff(base, diff, tmp_path / "out")
    with pytest.raises(UserError, match="nothing to check against"):
        weight_diff.verify(path_diff=tuned)
    with pytest.raises(UserError, match="needs --path_diff"):
        weight_diff.verify(tuned)
    with pytest.raises(UserError, match="no folder .*base, diff, tuned"):
        weight_diff.recover(base.parent / "bse", diff, tmp_path / "out")
    with pytest.raises(UserError, match="holds no weights"):
        weight_diff.recover(Path(__file__).parent, diff, tmp_path / "out")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    (tmp_path / "lora" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="LoRA adapter"):
        weight_diff.make_diff(base, tmp_path / "lora", tmp_path / "out")
    other = save(tmp_path / "other", {"x": torch.zeros(2)})
    with pytest.raises(UserError, match="no tensor in common"):
        weight_diff.make_diff(base, other, tmp_path / "out")
    narrow = save(tmp_path / "narrow", {"model.norm.weight": torch.zeros(64, 2)})
    with pytest.raises(UserError, match="two architectures"):
        weight_diff.make_diff(base, narrow, tmp_path / "out")
    with pytest.raises(UserError, match="not its base"):
        weight_diff.recover(base, other, tmp_path / "out")
    with pytest.raises(UserError, match="not the base"):
        weight_diff.recover(base, narrow, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_hub_name_that_cannot_be_had(tmp_path, models):
    """A Hub name is tried on the Hub; without a network the error says so in a sentence."""
    with pytest.raises(UserError, match="nobody/nothing is neither a folder nor a model"):
        weight_diff.recover("nobody/nothing", models[2], tmp_path / "out")


def test_hub_names(tmp_path, models, monkeypatch):
    """A Hub name is fetched without pickles where there are safetensors, and is the base's name in the manifest."""
    import huggingface_hub

    base, tuned, _ = models
    asked = []

    def fetch(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(base)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    weight_diff.make_diff("someone/base", tuned, tmp_path / "diff")
    assert [name for name, _ in asked] == ["someone/base"] and not any("bin" in pattern for pattern in asked[0][1])
    assert json.loads((tmp_path / "diff" / weight_diff.MANIFEST).read_text())["raw"]["name"] == "someone/base"


def test_a_diff_from_the_hub(tmp_path, models, monkeypatch):
    """Guards: the card stood in the manifest's list of files, and was neither fetched nor free to be edited: every diff
    on the Hub was refused as damaged."""
    import fnmatch

    import huggingface_hub

    base, tuned, _ = models
    (tmp_path / "tuned").mkdir()
    for file in [*tuned.iterdir()]:
        shutil.copy(file, tmp_path / "tuned")
    for name in ("README.md", "LICENSE", "NOTICE.txt"):
        (tmp_path / "tuned" / name).write_text(name)
    weight_diff.make_diff(base, tmp_path / "tuned", tmp_path / "diff")
    with open(tmp_path / "diff/README.md", "a") as card:
        card.write("\nAsk us.\n")

    def fetch(name, allow_patterns):
        fetched = tmp_path / "fetched"
        fetched.mkdir(exist_ok=True)
        for file in (tmp_path / "diff").iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, fetched)
        return str(fetched)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    weight_diff.recover(base, "someone/diff", tmp_path / "out")
    for file in (tmp_path / "tuned").glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_incomplete_downloads(tmp_path, models):
    """A shard that is missing or cut short is named before any work."""
    base, tuned, diff = models
    broken = Path(shutil.copytree(diff, tmp_path / "diff"))
    shard = sorted(broken.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match=shard.name):
        weight_diff.recover(base, broken, tmp_path / "out")
    shard.unlink()
    with pytest.raises(UserError, match=shard.name):
        weight_diff.recover(base, broken, tmp_path / "out")
    lost = Path(shutil.copytree(diff, tmp_path / "lost"))
    (lost / weight_diff.MANIFEST).unlink()
    with pytest.raises(UserError, match="made with a manifest"):
        weight_diff.recover(base, lost, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_verify_names_all_that_is_wrong(tmp_path, models):
    """Guards: the first shard that could not be opened hid every other fault, and all of the tuned model's."""
    _, tuned, diff = models
    broken, other = Path(shutil.copytree(diff, tmp_path / "diff")), Path(shutil.copytree(tuned, tmp_path / "tuned"))
    shards = sorted(broken.glob("model-*.safetensors"))[:2]
    for shard in shards:
        shard.write_bytes(shard.read_bytes()[:-100])
    weights = sorted(other.glob("*.safetensors"))[0]
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x3c")
    with pytest.raises(UserError) as told:
        weight_diff.verify(other, broken)
    assert all(str(path) in str(told.value) for path in (*shards, weights))


def test_disk_space(tmp_path, models, monkeypatch, capsys):
    """Room is looked for before the work, and a disk that fills up on the way is a sentence, not a traceback."""
    base, tuned, diff = models
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    for command, other in ((weight_diff.recover, diff), (weight_diff.make_diff, tuned)):
        with pytest.raises(UserError, match=r"needs 0\.0\d GB"):
            command(base, other, tmp_path / "out")
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(SystemExit, match="2"), cli_errors():
        weight_diff.recover(base, diff, tmp_path / "out")
    assert "the disk is full" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_strangers_manifest_cannot_write_outside(tmp_path, models):
    """File names in a manifest are names, not paths."""
    base, _, diff = models
    evil = Path(shutil.copytree(diff, tmp_path / "evil"))
    manifest = json.loads((evil / weight_diff.MANIFEST).read_text())
    manifest["travels"]["../../escaped.json"] = "generation_config.json"
    weight_manifest.write_manifest(evil, manifest)
    with pytest.raises(UserError, match="outside its folder"):
        weight_diff.recover(base, evil, tmp_path / "out")


def test_later_format(tmp_path, models):
    """A diff of a later format asks for a newer program instead of being misread."""
    newer = Path(shutil.copytree(models[2], tmp_path / "newer"))
    manifest = json.loads((newer / weight_diff.MANIFEST).read_text())
    weight_manifest.write_manifest(newer, manifest | {"format_version": 2})
    with pytest.raises(UserError, match="newer"):
        weight_diff.recover(models[0], newer, tmp_path / "out")


def test_without_path_tuned_nothing_is_written(tmp_path, models, capsys):
    """recover without --path_tuned checks everything and leaves no file."""
    base, _, diff = models
    before = set(diff.parent.rglob("*"))
    weight_diff.recover(base, diff)
    assert "Nothing is written" in capsys.readouterr().out
    assert set(diff.parent.rglob("*")) == before


def test_card_and_config_say_diff(models):
    """A diff on the Hub must not be taken for a model."""
    diff = models[2]
    assert (diff / "README.md").read_text().startswith("# A weight diff, not a model")
    assert json.loads((diff / "config.json").read_text())["weight_diff"]["base"] == "base"
    check = subprocess.run(["sha256sum", "-c", f"{weight_diff.MANIFEST}.sha256"], cwd=diff, capture_output=True)
    assert check.returncode == 0


# ----------------------------------------------------------------------------------------------------------------------
# Light.


def test_import_is_cheap():
    """Recovering needs neither torch nor transformers; nor does it need what the hub client loads."""
    heavy = ("torch", "transformers", "huggingface_hub.file_download")
    code = f"import weight_diff, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_memory_does_not_grow_with_the_model(tmp_path):
    """The original holds two float32 models; here one tensor of 60 MB needs no more memory than one of 6 MB."""
    code = (
        "import sys, weight_diff; weight_diff.make_diff(*sys.argv[1:4]); "
        "weight_diff.recover(sys.argv[1], sys.argv[3], sys.argv[4]); assert 'torch' not in sys.modules; "
        "print([line for line in open('/proc/self/status') if line.startswith('VmHWM')][0].split()[1])"
    )
    peaks = []
    for rows in (3000, 30000):
        state = {"a": torch.randn(rows, 1000).half(), "b": torch.randn(rows, 1000).half()}
        raw = save(tmp_path / f"raw{rows}", state)
        tuned = save(tmp_path / f"tuned{rows}", {name: tensor + 0.001 for name, tensor in state.items()})
        folders = [raw, tuned, tmp_path / f"diff{rows}", tmp_path / f"out{rows}"]
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, folders)], capture_output=True, text=True, check=True
        )
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    assert peaks[1] < peaks[0] + 15 and peaks[1] < 250, peaks
