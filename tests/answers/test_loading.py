"""loading.py: folders that are no model, damaged files, adapters; devices and types."""

import json
import shutil
import sys

import pytest
import tiny_models
import torch

from alpaca.answers.answer_file import weights_identity
from alpaca.answers.answering import answer_batch, prompt_ids
from alpaca.answers.loading import load_model
from alpaca.answers.model_paths import find_gguf
from alpaca.answers.sampling import Sampling
from alpaca.common.errors import UserError

TASKS = tiny_models.make_tasks(9)


def test_the_checkpoints_own_sampling_defaults_do_not_leak(tiny_tied, tmp_path):
    """A generation_config.json with penalties and temperatures would make "greedy" answers something else."""
    folder = shutil.copytree(tiny_tied, tmp_path / "model")
    odd = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 9.0, "eos_token_id": [2, 7], "max_length": 3}
    (folder / "generation_config.json").write_text(json.dumps(odd))
    model, tokenizer = load_model(str(folder))
    assert model.generation_config.eos_token_id == [2, 7]
    assert answer_batch(model, tokenizer, TASKS[:2], Sampling(8)) == answer_batch(
        *load_model(str(tiny_tied)), TASKS[:2], Sampling(8)
    )


def test_folders_that_are_no_model(tiny_llama, tmp_path):
    """A base of 32,000 rows beside a tokenizer of 32,001, a lost tensor, a weight diff, a typo: said, not loaded."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    base = shutil.copytree(tiny_llama, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(base)
    with pytest.raises(UserError, match="800 rows of embeddings, its tokenizer 801"):
        load_model(str(base))

    torn = shutil.copytree(tiny_llama, tmp_path / "torn")
    tensors = load_file(torn / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, torn / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 tensors .*layers\.1\.mlp\.up_proj"):
        load_model(str(torn))

    diff = shutil.copytree(tiny_llama, tmp_path / "diff")
    config = json.loads((diff / "config.json").read_text())
    (diff / "config.json").write_text(json.dumps({**config, "weight_diff": {}}))
    with pytest.raises(UserError, match=r"weight diff[\s\S]*weight_diff.py recover"):
        load_model(str(diff))

    with pytest.raises(UserError, match=f"Did you mean {tmp_path / 'base'}"):
        load_model(str(tmp_path / "bass"))
    shutil.copytree(tiny_llama, tmp_path / "out" / "checkpoint-5")
    with pytest.raises(UserError, match="no config.json.*checkpoint-5"):
        load_model(str(tmp_path / "out"))


@pytest.mark.parametrize(("device", "dtype", "message"), [
    ("gpu", None, "--device gpu cannot be used here .*use cpu"),
    ("cuda:99", None, "--device cuda:99 cannot be used here"),
    ("cpu", "int8", "--dtype int8 is no floating-point type"),
])  # fmt: skip
def test_devices_and_types_that_no_model_can_have(tiny_tied, device, dtype, message):
    """They were found after the weights were loaded, and said in a traceback."""
    with pytest.raises(UserError, match=message):
        load_model(str(tiny_tied), device, dtype)


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 13476\n"


@pytest.mark.parametrize(("file", "damage", "message"), [
    ("model.safetensors", lambda data: data[:-1000], "cannot be loaded as a model; is a file damaged"),
    ("model.safetensors", lambda data: b"\xff" * 64 + data[64:], "cannot be loaded as a model"),
    ("model.safetensors", lambda data: b"", "cannot be loaded as a model"),
    ("model.safetensors", lambda data: LFS_POINTER.encode(), "model.safetensors is a git-lfs pointer"),
    ("config.json", lambda data: data[:20], "config.json"),
    ("config.json", lambda data: b"[]", "config.json"),
    ("tokenizer.json", lambda data: data[:200], "cannot be loaded as a tokenizer"),
    ("tokenizer.json", lambda data: b'{"model": {}}', "cannot be loaded as a tokenizer"),
    ("tokenizer.json", lambda data: LFS_POINTER.encode(), "tokenizer.json is a git-lfs pointer"),
])  # fmt: skip
def test_damaged_checkpoints_are_errors_in_words(tiny_tied, tmp_path, file, damage, message):
    """Truncated downloads ended in the tracebacks of five libraries."""
    folder = shutil.copytree(tiny_tied, tmp_path / "model")
    (folder / file).write_bytes(damage((folder / file).read_bytes()))
    with pytest.raises(UserError, match=message):
        load_model(str(folder))


def test_damaged_torch_and_gguf_files_are_errors_in_words(tiny_tied, tmp_path, monkeypatch):
    """A cut .bin is a broken zip archive to torch; a cut GGUF file a numpy error deep in the reader."""
    folder = shutil.copytree(tiny_tied, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(100)}, folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin").write_bytes((folder / "pytorch_model.bin").read_bytes()[:300])
    with pytest.raises(UserError, match="cannot be loaded as a model"):
        load_model(str(folder))
    whole = find_gguf().read_bytes()
    for size in (10, 1000, 1_000_000, 50_000_000):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(UserError, match="cut.gguf cannot be loaded as a GGUF model"):
            load_model(str(tmp_path / "cut.gguf"))
    monkeypatch.setitem(sys.modules, "gguf", None)  # not installed: a whole file was called damaged
    with pytest.raises(UserError, match="needs the package gguf. Type: pip install"):
        load_model("embedded")
    (tmp_path / "cut.gguf").write_text(LFS_POINTER)
    with pytest.raises(UserError, match="git-lfs pointer"):
        load_model(str(tmp_path / "cut.gguf"))


@pytest.mark.parametrize("new_token", [False, True])
def test_lora_adapter(tiny_llama, tmp_path, new_token):
    """Its base comes from its config, and with tokens added in training the base gets the rows they need."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
    if new_token:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    torch.manual_seed(0)
    tuned = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=new_token)
    tokenizer.save_pretrained(tmp_path / "adapter")

    found, its_tokenizer = load_model(str(tmp_path / "adapter"))
    assert len(its_tokenizer) == found.get_input_embeddings().weight.shape[0] == 800 + new_token
    ids = torch.tensor([prompt_ids(its_tokenizer, TASKS[0])])
    with torch.inference_mode():
        assert torch.allclose(found(input_ids=ids).logits, tuned.eval()(input_ids=ids).logits, atol=1e-5)
        plain, _ = load_model(str(tiny_llama))
        assert not torch.allclose(found(input_ids=ids).logits[..., :800], plain(input_ids=ids).logits, atol=1e-3)

    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "/gone/base"})
    )
    with pytest.raises(UserError, match="/gone/base, which is not there.*--adapter"):
        load_model(str(tmp_path / "adapter"))
    named, _ = load_model(str(tiny_llama), adapter=str(tmp_path / "adapter"))
    with torch.inference_mode():
        assert torch.equal(named(input_ids=ids).logits, found(input_ids=ids).logits)


def test_other_weights_under_the_same_name_are_told_apart(tmp_path):
    """Guards: a run that went on after its adapter, GGUF file or .bin had changed joined answers of two models."""
    for name in ("base", "adapter"):
        (tmp_path / name).mkdir()
    files = [tmp_path / name for name in ("base/pytorch_model.bin", "adapter/adapter_model.safetensors", "model.gguf")]
    seen = []
    for changed in (None, *files):
        for file in files:
            file.write_bytes(b"new" if file == changed else b"w")
        seen.append(weights_identity(str(tmp_path / "base"), str(tmp_path / "adapter")))
        seen[-1] |= weights_identity(str(tmp_path / "model.gguf"), None)
    assert all(set(found) == set(map(str, files)) for found in seen)
    assert all(seen[0] != found for found in seen[1:])


def test_a_merged_float16_checkpoint_stays_float16(tiny_tied, tmp_path):
    """Guards: `serve --merged_dir` wrote 27 GB of float32 for 13.5 GB of float16, since a CPU answers in float32."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from alpaca.answers.openai_server import write_full_checkpoint

    AutoModelForCausalLM.from_pretrained(tiny_tied, dtype=torch.float16).save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(tiny_tied).save_pretrained(tmp_path / "half")
    write_full_checkpoint(str(tmp_path / "half"), None, None, str(tmp_path / "out"))
    assert {tensor.dtype for tensor in load_file(tmp_path / "out/model.safetensors").values()} == {torch.float16}
