"""weight_diff.py on what others made: the official layout, the original's diffs, .bin files, Meta's own checkpoints."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from test_weight_diff import bits, round_trip, save, tune

import convert_llama
import weight_diff
from alpaca.common.errors import UserError
from alpaca.weights import checks
from alpaca.weights import tensors as tensor_files


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
        tuned[name] = torch.randn(height, *tensor.shape[1:], generator=generator) * 0.001
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
    monkeypatch.setitem(checks.PUBLISHED_SUMS, (64, 2, rows), published)
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

    monkeypatch.setitem(checks.PUBLISHED_SUMS, (64, 2, rows), published + 0.02)
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


def test_alpaca_7b_is_recognised(tmp_path, capsys):
    """The published figure belongs to 32 layers of 4,096 and 32,001 rows, and counts a buffer of 7.46 a layer."""
    config = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "vocab_size": 32001}
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_attention_heads": 32}))
    diff = SimpleNamespace(folder=tmp_path, tensors={"lm_head.weight": None})
    checks.check_sum({"lm_head.weight": {"sum": 50637.1836 - 32 * 7.46}}, diff)
    assert "published: 50637.1836" in capsys.readouterr().out
    with pytest.raises(UserError, match="the published one 50637.1836"):
        checks.check_sum({"lm_head.weight": {"sum": 50637.1836}}, diff)


def test_base_with_inv_freq_counts_its_own(tmp_path, monkeypatch):
    """A base converted in 2023 holds the buffers too: they are added, counted once, and stay in the result."""
    base, diff, tuned = official_layout(tmp_path)
    state = load_file(base / "model.safetensors")
    for layer in range(2):
        state[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = 1.0 / 10000 ** (torch.arange(0, 16, 2) / 16)
    old = save(tmp_path / "old_base", state, file="pytorch_model.bin")
    monkeypatch.setitem(checks.PUBLISHED_SUMS, (64, 2, len(tuned["lm_head.weight"])), float(tuned["sum"]))
    weight_diff.recover(old, diff, tmp_path / "out")
    names = [name for file in (tmp_path / "out").glob("*.safetensors") for name in load_file(file)]
    assert sum(name.endswith("inv_freq") for name in names) == 2


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
        assert tensor_files.read(tensor, 0, tensor.numel).tobytes() == bits(state[name]), name
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
