"""weight_diff.py: exact round trips of every kind of tensor and file, what the original can read, what is refused."""

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

import convert_llama
import diff_tensors
import tensor_files
import weight_diff
import weight_manifest
from utils import UserError

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
            parameter.add_((torch.randn(parameter.shape) * 1e-2).to(parameter.dtype))
    model.save_pretrained(folder, **saving)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def round_trip(raw: Path, tuned: Path, folder: Path) -> tuple[Path, Path]:
    """make_diff, recover and verify; asserts that every file of weights is the tuned one byte for byte."""
    diff, out = folder / "diff", folder / "out"
    weight_diff.make_diff(raw, tuned, diff)
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


def test_smoke_prompt_is_the_training_prompt(tmp_path, tiny_llama, monkeypatch):
    """The original asks its test question with CRLF, a prompt that no model was trained on."""
    asked = []
    monkeypatch.setattr(weight_diff, "format_prompt", lambda task: asked.append(task) or "text")
    assert isinstance(weight_diff.smoke_answer(tiny_llama, "cpu"), str)
    assert asked == [{"instruction": "List three technologies that make life easier.", "input": ""}]


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
    diff, out = round_trip(save(tmp_path / "raw", raw), save(tmp_path / "tuned", tuned), tmp_path)
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
    for module in (tensor_files, diff_tensors):
        monkeypatch.setattr(module, "PIECE", 41)
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
# Old checkpoints, and diffs without a manifest.


def original_diff(raw_state: dict, tuned_state: dict) -> dict:
    """What the original's make_diff saves: float32, new rows from the mean, before the subtraction."""
    diff = {}
    for name, tensor in tuned_state.items():
        base = raw_state[name].float()
        if len(tensor) > len(base):
            base = torch.cat([base, base.mean(dim=0, keepdim=True)])
        diff[name] = tensor.float() - base
    return diff


def official_layout(tmp_path: Path, layers: int = 2, hidden: int = 64, heads: int = 4) -> tuple[Path, Path, dict]:
    """Base (fp16) and diff in the layout of the official Alpaca-7B diff, built small; and the tuned tensors."""
    base = tiny_models.make_tiny_llama(tmp_path / "base", dtype="float16")
    raw = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    tuned = {}
    for name, tensor in raw.items():
        height = len(tensor) + (name in ("model.embed_tokens.weight", "lm_head.weight"))
        tuned[name] = torch.randn(height, *tensor.shape[1:], generator=generator) * 0.02
        tuned[name][: len(tensor)] += tensor.float()
    width = hidden // heads
    frequencies = 1.0 / 10000 ** (torch.arange(0, width, 2).float() / width)
    diff = original_diff(raw, tuned)
    for layer in range(layers):
        diff[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.zeros_like(frequencies)
    folder = tmp_path / "official"
    folder.mkdir()
    names = sorted(diff)
    weight_map = {}
    for number, part in enumerate((names[:9], names[9:]), start=1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: diff[name] for name in part}, folder / file)
        weight_map |= {name: file for name in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = json.loads((base / "config.json").read_text()) | {"vocab_size": len(tuned["lm_head.weight"])}
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(base / "tokenizer.json", folder)
    tuned["sum"] = sum(tensor.double().sum() for tensor in tuned.values()) + layers * frequencies.double().sum()
    return base, folder, tuned


def test_official_layout_and_its_sum(tmp_path, monkeypatch, capsys):
    """fp32, one more row, .bin with inv_freq buffers, no manifest: added plainly, and the published sum counts the
    buffers that models no longer store. The constant is scaled to the small model; the code path is Alpaca-7B's."""
    base, diff, tuned = official_layout(tmp_path)
    published = float(tuned.pop("sum"))
    rows = len(tuned["lm_head.weight"])
    monkeypatch.setitem(weight_diff.PUBLISHED_SUMS, (64, 2, rows), published)
    weight_diff.recover(base, diff, tmp_path / "out")
    assert "published" in capsys.readouterr().out
    out = tensor_files.open_weights(tmp_path / "out")
    assert set(out.tensors) == set(tuned) and len(out.shards) == 2
    for path in (tmp_path / "out").glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert tensor.dtype == torch.float32
            torch.testing.assert_close(tensor, tuned[name], atol=1e-6, rtol=0)

    from transformers import AutoModelForCausalLM

    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))

    monkeypatch.setitem(weight_diff.PUBLISHED_SUMS, (64, 2, rows), published + 0.02)
    with pytest.raises(UserError, match="the published one"):
        weight_diff.recover(base, diff, tmp_path / "wrong_sum")
    assert not (tmp_path / "wrong_sum").exists()
    weight_diff.recover(base, diff, tmp_path / "unchecked", check_integrity_naively=False)
    assert (tmp_path / "unchecked" / "config.json").exists()


def test_sum_of_another_model_is_printed(tmp_path, capsys):
    """The original fails on every model but Alpaca-7B, even on its own diff."""
    base, diff, tuned = official_layout(tmp_path)
    weight_diff.recover(base, diff, tmp_path / "out")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("sum of all tensors"))
    buffers = 2 * float((1.0 / 10000 ** (torch.arange(0, 16, 2).float() / 16)).double().sum())
    assert abs(float(line.split()[4]) - (float(tuned["sum"]) - buffers)) < 1e-3


def test_alpaca_7b_is_recognised():
    """The published figure belongs to 32 layers of 4,096 and 32,001 rows."""
    assert weight_diff.PUBLISHED_SUMS == {(4096, 32, 32001): 50637.1836}
    width = 4096 // 32
    buffer = (1.0 / 10000 ** (np.arange(0, width, 2) / width)).sum()
    assert abs(buffer - 7.46) < 0.01


def test_base_with_inv_freq_counts_its_own(tmp_path, monkeypatch):
    """A base converted in 2023 holds the buffers too: they are added, counted once, and stay in the result."""
    base, diff, tuned = official_layout(tmp_path)
    state = load_file(base / "model.safetensors")
    for layer in range(2):
        state[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = 1.0 / 10000 ** (torch.arange(0, 16, 2) / 16)
    old = save(tmp_path / "old_base", state, file="pytorch_model.bin")
    monkeypatch.setitem(weight_diff.PUBLISHED_SUMS, (64, 2, len(tuned["lm_head.weight"])), float(tuned["sum"]))
    weight_diff.recover(old, diff, tmp_path / "out")


def test_the_originals_recover_reads_our_diff(tmp_path):
    """The stored difference is what the original adds: both models as float32, resized, name by name."""
    from transformers import AutoModelForCausalLM

    base = tiny_models.make_tiny_llama(tmp_path / "base", dtype="float16")
    tuned = tune(base, tmp_path / "tuned", extra_rows=1, max_shard_size="300KB")
    diff, _ = round_trip(base, tuned, tmp_path)
    raw, added = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (base, diff))
    raw.resize_token_embeddings(801, mean_resizing=False)
    for layer in (raw.get_input_embeddings(), raw.get_output_embeddings()):
        layer.weight.data[-1:] = layer.weight.data[:-1].mean(dim=0, keepdim=True)
    expected = AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32).state_dict()
    for name, tensor in added.state_dict().items():
        assert torch.equal((tensor + raw.state_dict()[name]).half(), expected[name].half()), name


def test_plain_diff_of_tied_weights_from_the_original(tmp_path, tiny_tied, capsys):
    """A fork's diff of a tied model holds tuned - 2 raw; plain addition would give tuned - raw."""
    config = json.loads((tiny_tied / "config.json").read_text())
    raw = load_file(tiny_tied / "model.safetensors")
    tuned = {name: tensor + 1e-3 * torch.randn_like(tensor) for name, tensor in raw.items()}
    name = "model.embed_tokens.weight"
    for times in (1, 2):
        state = {key: tensor - raw[key] * (times if key == name else 1) for key, tensor in tuned.items()}
        diff = save(tmp_path / f"diff{times}", state, config)
        weight_diff.recover(tiny_tied, diff, tmp_path / f"out{times}")
        out = load_file(tmp_path / f"out{times}" / "model.safetensors")
        torch.testing.assert_close(out[name], tuned[name], atol=1e-7, rtol=0)
        assert ("raw is added twice" in capsys.readouterr().out) == (times == 2)


@pytest.mark.parametrize("tied", [True, False])
def test_bin_files_with_shared_storage(tmp_path, tiny_tied, tied):
    """A .bin lists tied weights under two names: stored once if the config ties them, both kept if it does not."""
    config = json.loads((tiny_tied / "config.json").read_text()) | {"tie_word_embeddings": tied}

    def with_head(folder, seed):
        state = load_file(tiny_tied / "model.safetensors")
        torch.manual_seed(seed)
        state = {name: tensor + 1e-3 * torch.randn_like(tensor) for name, tensor in state.items()}
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
        return save(folder, state, config, "pytorch_model.bin"), state

    (raw, _), (tuned, state) = with_head(tmp_path / "raw", 1), with_head(tmp_path / "tuned", 2)
    _, out = round_trip(raw, tuned, tmp_path)
    recovered = load_file(out / "model.safetensors")
    assert set(recovered) == set(state) - ({"lm_head.weight"} if tied else set())
    assert all(bits(tensor) == bits(state[name]) for name, tensor in recovered.items())


def test_bin_read_places(tmp_path):
    """A .bin is read at the offsets of its storages: views of a larger one, several types; no code is unpickled."""
    generator = torch.Generator().manual_seed(6)
    big = torch.randn(6, 4, generator=generator)
    state = {"view": big[2:5], "half": big.half(), "brain": big.bfloat16(), "int": torch.arange(5), "all": big}
    weights = tensor_files.open_weights(save(tmp_path / "m", state, file="pytorch_model.bin"))
    assert set(weights.tensors) == set(state)
    for name, tensor in weights.tensors.items():
        with tensor.opened() as read:
            assert read(0, tensor.numel).tobytes() == bits(state[name]), name
    for bad, text in (({"turned": big.t()}, "not stored in one piece"), ({"path": Path("x")}, "cannot be read")):
        folder = save(tmp_path / text.replace(" ", "_"), bad, file="pytorch_model.bin")
        with pytest.raises(UserError, match=text):
            tensor_files.open_weights(folder)


def meta_files(base: Path, folder: Path, count: int) -> Path:
    """The tiny llama in `base` as Meta would hand it out: other names, q and k in its rotary order, `count` files."""
    meta = {"self_attn.q_proj": ("attention.wq", 0), "self_attn.k_proj": ("attention.wk", 0),
            "self_attn.v_proj": ("attention.wv", 0), "self_attn.o_proj": ("attention.wo", 1),
            "mlp.gate_proj": ("feed_forward.w1", 0), "mlp.down_proj": ("feed_forward.w2", 1),
            "mlp.up_proj": ("feed_forward.w3", 0), "input_layernorm": ("attention_norm", None),
            "post_attention_layernorm": ("ffn_norm", None), "embed_tokens": ("tok_embeddings", 1),
            "norm": ("norm", None), "lm_head": ("output", 0)}  # fmt: skip
    files: list[dict] = [{"rope.freqs": torch.zeros(8)} for _ in range(count)]
    for name, tensor in load_file(base / "model.safetensors").items():
        name = name.removeprefix("model.").removesuffix(".weight")
        layer, short = (
            (f"{name[: name.index('.', 7)]}.", name[name.index(".", 7) + 1 :]) if "layers." in name else ("", name)
        )
        new, along = meta[short]
        if short in ("self_attn.q_proj", "self_attn.k_proj"):  # 4 heads of 16 rows: halves become neighbours
            tensor = torch.stack([tensor[16 * h + i + 8 * j] for h in range(4) for i in range(8) for j in range(2)])
        for number, file in enumerate(files):
            part = tensor if along is None else tensor.chunk(count, dim=along)[number].clone()
            file[f"{layer}{new}.weight"] = part
    (folder / "7B").mkdir(parents=True)
    for number, file in enumerate(files):
        torch.save(file, folder / "7B" / f"consolidated.{number:02}.pth")
    params = {"dim": 64, "multiple_of": 32, "n_heads": 4, "n_layers": 2, "norm_eps": 1e-6, "vocab_size": -1}
    (folder / "7B" / "params.json").write_text(json.dumps(params))
    shutil.copy(base / "tokenizer.model", folder)
    return folder / "7B"


@pytest.mark.parametrize("count", [1, 2])
def test_convert_llama(tmp_path, run_script, monkeypatch, count):
    """transformers' last converters round Meta's float16 to bfloat16: then no diff of a float16 base fits."""
    from transformers import AutoTokenizer

    base = tiny_models.make_tiny_llama(tmp_path / "base", dtype="float16")
    tuned = tune(base, tmp_path / "tuned", extra_rows=1)
    weight_diff.make_diff(base, tuned, tmp_path / "diff")
    source = meta_files(base, tmp_path / "meta", count)
    run_script("convert_llama.py", "--input_dir", source, "--output_dir", tmp_path / "converted")
    weight_diff.recover(tmp_path / "converted", tmp_path / "diff", tmp_path / "out")
    texts = ["a dog, 12 cats\n### Response:", " - one"]
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (base, tmp_path / "converted")]
    assert tokenizers[0](texts).input_ids == tokenizers[1](texts).input_ids

    monkeypatch.setattr(convert_llama, "SHARD_BYTES", 100_000)
    convert_llama.convert(source, tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    weight_diff.verify(path_diff=tmp_path / "diff", path_raw=tmp_path / "sharded")
    with pytest.raises(UserError, match="expected consolidated.00.pth"):
        convert_llama.convert(tmp_path / "meta", tmp_path / "none")


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


def test_disk_space(tmp_path, models, monkeypatch):
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
    with pytest.raises(UserError, match="is full"):
        weight_diff.recover(base, diff, tmp_path / "out")
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
    """Recovering needs neither torch nor transformers, and importing the script needs no tqdm or hub client either."""
    heavy = ("torch", "transformers", "tqdm", "huggingface_hub")
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
