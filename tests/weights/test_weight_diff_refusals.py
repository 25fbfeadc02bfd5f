"""weight_diff.py and convert_llama.py on inputs that are not what they are given as: each is named before any work."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from test_weight_diff import save, tune
from test_weight_diff_original import meta_files

import convert_llama
import weight_diff
from alpaca.common.errors import UserError
from alpaca.weights import tensors as tensor_files
from alpaca.weights.manifest import MANIFEST

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 13476939516\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A float16 base, a tuned model with one more row of embeddings, and their diff; only read here."""
    folder = tmp_path_factory.mktemp("models")
    base = tiny_models.make_tiny_llama(folder / "base", dtype="float16")
    tuned = tune(base, folder / "tuned", extra_rows=1)
    weight_diff.make_diff(base, tuned, folder / "diff")
    return base, tuned, folder / "diff"


def matrices(seed: int, dtype: torch.dtype = torch.float32, scale: float = 0.02) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(64, 64, generator=generator) * scale).to(dtype) for name in ("a", "b", "c")}


# ----------------------------------------------------------------------------------------------------------------------
# make_diff.


@pytest.mark.parametrize("quantised", ["fp8", "int8"])
def test_a_diff_does_not_hold_tuned_weights_in_clear(tmp_path, capsys, quantised):
    """On an fp8 or int8 base 14 of 21 tensors were published whole, while the output and the card said difference."""
    as_stored = {
        "fp8": lambda t: t.to(torch.float8_e4m3fn),
        "int8": lambda t: (t * 127 / t.abs().max()).round().to(torch.int8),
    }
    plain = matrices(0)
    raw = {"a": as_stored[quantised](plain["a"]), "b": as_stored[quantised](plain["b"]), "c": plain["c"]}
    tuned = {name: tensor + 1e-3 for name, tensor in plain.items()} | {"mask": torch.tensor([True, False])}
    raw, tuned = save(tmp_path / "raw", raw), save(tmp_path / "tuned", tuned)
    with pytest.raises(UserError, match=r"2 of 4 tensors.*: a \((F8_E4M3|I8) in the base, F32 here\), b.*is quantised"):
        weight_diff.make_diff(raw, tuned, tmp_path / "diff")
    assert not (tmp_path / "diff").exists()

    weight_diff.make_diff(raw, tuned, tmp_path / "diff", allow_whole_tensors=True)
    said = capsys.readouterr().out
    assert "the difference of 2 tensors" in said and "2 tensors are not a difference" in said
    assert json.loads((tmp_path / "diff" / MANIFEST).read_text())["whole_tensors"] == ["a", "b"]
    assert json.loads((tmp_path / "diff" / "config.json").read_text())["weight_diff"]["whole_tensors"] == 2
    card = (tmp_path / "diff" / "README.md").read_text()
    assert "answer\nnonsense" not in card and card.endswith("- `a`\n- `b`\n")
    weight_diff.recover(raw, tmp_path / "diff", tmp_path / "out")
    weight_diff.verify(tmp_path / "out", tmp_path / "diff", raw)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model."])
@pytest.mark.parametrize("which", ["raw", "tuned"])
def test_a_wrapper_prefix_is_named(tmp_path, prefix, which):
    """ "no tensor in common" left the user to find out that DDP or torch.compile had put something before the names."""
    state = {"model.norm.weight": torch.ones(4), "lm_head.weight": torch.ones(4, 4)}
    wrapped = {prefix + name: tensor for name, tensor in state.items()}
    raw = save(tmp_path / "raw", wrapped if which == "raw" else state)
    tuned = save(tmp_path / "tuned", wrapped if which == "tuned" else state)
    model = {"raw": "base", "tuned": "tuned model"}[which]
    with pytest.raises(UserError, match=rf"no tensor in common.*The names of the {model} begin with '{prefix}'"):
        weight_diff.make_diff(raw, tuned, tmp_path / "diff")


def test_a_quantised_base_is_not_two_architectures(tmp_path):
    """A bitsandbytes base packs its matrices, so its shapes differ: the message blamed the architecture."""
    raw = save(tmp_path / "raw", {"a": torch.zeros(32, 1, dtype=torch.uint8)},
               {"model_type": "llama", "quantization_config": {"quant_method": "bitsandbytes"}})  # fmt: skip
    tuned = save(tmp_path / "tuned", {"a": torch.zeros(8, 8)})
    with pytest.raises(UserError, match=r"quantised \(bitsandbytes\): give the unquantised base"):
        weight_diff.make_diff(raw, tuned, tmp_path / "diff")
    plain = save(tmp_path / "plain", {"a": torch.zeros(8, 8)})
    diff = save(tmp_path / "plain_diff", {"a": torch.zeros(8, 8)})
    weight_diff.make_diff(plain, tuned, tmp_path / "diff")
    for given in (diff, tmp_path / "diff"):
        with pytest.raises(UserError, match=r"quantised \(bitsandbytes\)"):
            weight_diff.recover(raw, given, tmp_path / "out")


def test_what_can_be_known_is_refused_at_the_start(tmp_path, models, run_script):
    """These failed after all the work, or with a traceback."""
    base, tuned, diff = models
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(tuned / "model.safetensors", bare)
    with pytest.raises(UserError, match=r"bare has no config\.json"):
        weight_diff.make_diff(base, bare, tmp_path / "out")
    with pytest.raises(UserError, match=r"bare has no config\.json"):
        weight_diff.recover(base, bare, tmp_path / "out")
    (bare / "config.json").write_text("[1]")
    with pytest.raises(UserError, match=r"config\.json holds a list"):
        weight_diff.make_diff(base, bare, tmp_path / "out")
    (bare / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="not valid JSON"):
        weight_diff.make_diff(base, bare, tmp_path / "out")
    file = tmp_path / "file"
    file.write_text("")
    for below in (file / "out", file / "deep" / "out"):
        with pytest.raises(UserError, match=r"file is a file\. Choose another path"):
            weight_diff.recover(base, diff, below)
    with pytest.raises(UserError, match="is a file. Give the folder"):
        weight_diff.recover(base / "model.safetensors", diff, tmp_path / "out")
    with pytest.raises(UserError, match="without --path_tuned"):
        weight_diff.recover(base, diff, test_inference=True)
    with pytest.raises(UserError, match="--device cuda:9 cannot be used here"):
        weight_diff.recover(base, diff, tmp_path / "out", device="cuda:9", test_inference=True)
    refused = run_script("weight_diff.py", "recover", "--path_raw", base, "--path_diff", diff, "--path_tuned",
                         tmp_path / "out", "--test_inference", "perhaps", status=2)  # fmt: skip
    assert "--test_inference takes True or False, found 'perhaps'" in refused.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "file"]


# ----------------------------------------------------------------------------------------------------------------------
# Diffs without a manifest.


@pytest.mark.parametrize("place", ["everywhere", "one element of a matrix", "one element of a vector"])
def test_a_diff_of_nan_is_not_added(tmp_path, place):
    """An all-NaN diff was added, and its sum printed as nan."""
    raw = {"vector": torch.ones(5), **matrices(0)}
    diff = {name: torch.full_like(tensor, 1e-3) for name, tensor in raw.items()}
    if place == "everywhere":
        diff = {name: torch.full_like(tensor, torch.nan) for name, tensor in raw.items()}
    else:
        diff["vector" if "vector" in place else "b"].flatten()[3] = torch.nan if "vector" in place else torch.inf
    raw, diff = save(tmp_path / "raw", raw), save(tmp_path / "diff", diff)
    with pytest.raises(UserError, match="NaN or infinity"):
        weight_diff.recover(raw, diff, tmp_path / "out")
    with pytest.raises(UserError, match="would hold NaN or infinity"):
        weight_diff.recover(raw, diff, tmp_path / "out", check_integrity_naively=False)
    assert not (tmp_path / "out").exists()


def test_a_model_given_as_a_diff_is_not_added(tmp_path, models):
    """A base plus a tuned model was written as if it were the tuned model; the flag still does it."""
    base, tuned, _ = models
    for model in (tuned, base):
        with pytest.raises(UserError, match=r"has 1\.\d\d times the norm.*--check_integrity_naively False"):
            weight_diff.recover(base, model, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    weight_diff.recover(base, tuned, tmp_path / "out", check_integrity_naively=False)
    name = "model.layers.0.mlp.up_proj.weight"
    states = [load_file(folder / "model.safetensors") for folder in (base, tuned, tmp_path / "out")]
    assert torch.equal(states[0][name] + states[1][name], states[2][name])


@pytest.mark.parametrize("raw_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tuned_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_wrong_base_without_a_manifest(tmp_path, raw_dtype, tuned_dtype):
    """A difference was added to any base of its shapes. On the right one the sums are numbers of the tuned type."""
    raw = matrices(0, raw_dtype)
    diff = {
        name: (raw[name].float() + change).to(tuned_dtype).float() - raw[name].float()
        for name, change in matrices(1, scale=4e-4).items()
    }
    diff["b"][3:] = 0  # rows that training left alone say nothing
    right, wrong = save(tmp_path / "right", raw), save(tmp_path / "wrong", matrices(2, raw_dtype))
    diff = save(tmp_path / "diff", diff)
    weight_diff.recover(right, diff, tmp_path / "out")
    with pytest.raises(UserError, match="wrong is not the base that .*diff was made from: in [23] of [23] matrices"):
        weight_diff.recover(wrong, diff, tmp_path / "wrong_out")
    assert not (tmp_path / "wrong_out").exists()
    weight_diff.recover(wrong, diff, tmp_path / "wrong_out", check_integrity_naively=False)


# ----------------------------------------------------------------------------------------------------------------------
# Files and folders that are something else.


def test_damaged_headers_are_sentences(tmp_path):
    """Every way a safetensors header can be wrong is a sentence with the file's name, not a traceback."""
    good = save(tmp_path / "good", {"a": torch.arange(6.0), "b": torch.arange(4)}) / "model.safetensors"
    text, _ = tensor_files.read_header(good)
    body = good.read_bytes()[8 + len(text) :]
    header = json.loads(text)
    variants = {
        "not JSON": text.replace("{", "[", 1),
        "100,000 brackets": "[" * 100_000,
        "100,000 brackets inside": '{"a":' + "[" * 100_000,
        "unknown type": json.dumps(header | {"a": header["a"] | {"dtype": "F3"}}),
        "type of later libraries": json.dumps({"a": {"dtype": "F4", "shape": [112], "data_offsets": [0, 56]}}),
        "overlap": json.dumps(header | {"a": header["a"] | {"data_offsets": [8, 32]}}),
        "shape": json.dumps(header | {"a": header["a"] | {"shape": [7]}}),
        "negative shape": json.dumps(header | {"a": header["a"] | {"shape": [-1]}}),
        "shape of fractions": json.dumps(header | {"a": header["a"] | {"shape": [6.0]}}),
        "no shape": json.dumps(header | {"a": {"dtype": "F32"}}),
        "a list": json.dumps([1, 2]),
    }
    contents = {name: len(v.encode()).to_bytes(8, "little") + v.encode() + body for name, v in variants.items()}
    contents |= {"empty": b"", "short": b"\0" * 5, "huge": b"\xff" * 8 + body, "longer": good.read_bytes() + b"\0"}
    contents |= {"page": b"<!DOCTYPE html><html>Not found</html>", "pointer": POINTER.encode()}
    for name, content in contents.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        with pytest.raises(UserError, match=re.escape(path.name)):
            tensor_files.read_header(path)


def test_git_lfs_pointers_are_called_pointers(tmp_path, models):
    """A clone without git-lfs holds small texts under the names of the weights: they were called damaged."""
    base, tuned, diff = models
    for folder, file in (
        (base, "model.safetensors"), (base, "config.json"), (diff, "model.safetensors"), (diff, MANIFEST),
        (diff, "tokenizer.json"),
    ):  # fmt: skip
        copy = Path(shutil.copytree(folder, tmp_path / "copy"))
        (copy / file).write_text(POINTER)
        given = (copy, diff) if folder == base else (base, copy)
        with pytest.raises(UserError, match=rf"{file} is a git-lfs pointer"):
            weight_diff.recover(*given, tmp_path / "out")
        shutil.rmtree(copy)
    old = tmp_path / "old"
    old.mkdir()
    (old / "pytorch_model.bin").write_text(POINTER)
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a git-lfs pointer"):
        tensor_files.open_weights(old)


def test_folders_of_other_kinds_are_named(tmp_path):
    """ "holds no weights" for Meta's own files or a GGUF did not say what to type next."""
    meta = tmp_path / "LLaMA" / "7B"
    meta.mkdir(parents=True)
    (meta / "consolidated.00.pth").write_bytes(b"")
    for folder in (meta, meta.parent):
        with pytest.raises(UserError, match=rf"(?s)Meta's own files.*convert_llama\.py --input_dir {meta} "):
            tensor_files.open_weights(folder)
    gguf = tmp_path / "gguf"
    gguf.mkdir()
    (gguf / "model.Q4_1.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="quantised for llama.cpp"):
        tensor_files.open_weights(gguf)


def test_indexes_that_are_wrong(tmp_path):
    """An index is someone else's file: its names are checked before they are opened."""
    for content, text in (
        ("{}", "has no weight_map"), ('{"weight_map": {"a": 5}}', "points outside its folder: 5"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "points outside its folder"), ("[" * 100_000, "not valid JSON"),
        ('{"weight_map": {"a": "x.safetensors"}}', "names 1 of 1 shards that are not there: x.safetensors"),
    ):  # fmt: skip
        (tmp_path / tensor_files.INDEX).write_text(content)
        with pytest.raises(UserError, match=text):
            tensor_files.open_weights(tmp_path)


def test_convert_llama_names_what_is_wrong(tmp_path, models):
    """A checkpoint already converted, the folder above, a part that is missing, a damaged or unfetched file."""
    out, folder = tmp_path / "out", tmp_path / "LLaMA" / "13B"
    folder.mkdir(parents=True)
    with pytest.raises(UserError, match="in the transformers format already"):
        convert_llama.convert(models[0], out)
    with pytest.raises(UserError, match="does not hold Meta's files: expected consolidated.00.pth and params.json"):
        convert_llama.convert(tmp_path / "nothing", out)
    params = {"dim": 8, "n_heads": 2, "n_layers": 1, "norm_eps": 1e-6}
    halves = {
        "tok_embeddings.weight": torch.zeros(4, 4),
        "norm.weight": torch.ones(8),
        "output.weight": torch.ones(2, 8),
    }
    torch.save(halves, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(params))
    (folder / "tokenizer.model").write_text(POINTER)
    with pytest.raises(UserError, match=rf"Did you mean --input_dir {folder}\?"):
        convert_llama.convert(folder.parent, out)
    with pytest.raises(UserError, match=r"tokenizer\.model is a git-lfs pointer"):
        convert_llama.convert(folder, out)
    shutil.copy(models[0] / "tokenizer.model", folder)
    with pytest.raises(UserError, match="hold 4 of 8 columns of tok_embeddings.weight: fetch the others"):
        convert_llama.convert(folder, out)
    torch.save(halves, folder / "consolidated.02.pth")
    with pytest.raises(UserError, match="lacks one of Meta's files: found consolidated.00.pth, consolidated.02.pth"):
        convert_llama.convert(folder, out)
    (folder / "consolidated.02.pth").unlink()
    for content, text in (
        ("{}", "has no number dim"), (json.dumps(params | {"n_kv_heads": 1}), "1 key heads for 2"),
        (json.dumps(params | {"rope_theta": 1e6}), "has rope_theta 1000000.0: these are a later model's"),
        (json.dumps(params | {"dim": 4096, "norm_eps": 1e-5}), "has norm_eps 1e-05: these are a later model's"),
    ):  # fmt: skip
        (folder / "params.json").write_text(content)
        with pytest.raises(UserError, match=text):
            convert_llama.convert(folder, out)
    (folder / "params.json").write_text(json.dumps(params))
    for content, text in (
        (POINTER.encode(), "is a git-lfs pointer"),
        (b"PK\3\4 cut short", "cannot be read as a file"),
    ):
        (folder / "consolidated.00.pth").write_bytes(content)
        with pytest.raises(UserError, match=rf"consolidated\.00\.pth {text}"):
            convert_llama.convert(folder, out)
    source = meta_files(models[0], tmp_path / "meta", 1)
    (source.parent / "tokenizer.model").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"tokenizer\.model cannot be read as LLaMA's tokenizer"):
        convert_llama.convert(source, out)
    assert not out.exists()


def test_a_strangers_manifest_is_a_sentence(tmp_path, models):
    """A manifest whose checksum is right and whose content is not was a KeyError."""
    from alpaca.weights.manifest import write_manifest

    base, _, diff = models
    right = json.loads((diff / MANIFEST).read_text())
    for change in ({"tensors": {}}, {"tuned": {"model.safetensors": "{"}}, {"tensors": []}, {"travels": None}):
        evil = Path(shutil.copytree(diff, tmp_path / "evil"))
        write_manifest(evil, right | change)
        with pytest.raises(UserError, match="not a manifest of this program|describes its tensors in two ways"):
            weight_diff.recover(base, evil, tmp_path / "out")
        shutil.rmtree(evil)


def test_torch_still_notes_where_a_storage_lies(tmp_path):
    """The one private name of torch that the readers of .bin files use: `_checkpoint_offset` of a storage on meta."""
    values = torch.arange(12.0)
    torch.save({"a": values[4:8]}, tmp_path / "x.bin")
    storage = torch.load(tmp_path / "x.bin", map_location="meta", weights_only=True)["a"].untyped_storage()
    found = np.fromfile(tmp_path / "x.bin", "<f4", 12, offset=storage._checkpoint_offset)
    assert np.array_equal(found, values.numpy())
