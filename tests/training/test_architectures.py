"""Models of other architectures than Llama: rows that stay apart, mixtures of experts, the whole loop on some of 41."""

import sys
from types import SimpleNamespace

import pytest
import tiny_models
import train_runs
from conftest import ROOT

from alpaca.training import attention

sys.path.append(str(ROOT / "benchmarks"))

import architectures  # noqa: E402

# One of each kind: fused projections, mixture of experts, position biases, states across tokens, short windows.
IN_CI = ["gpt_bigcode", "qwen3_moe", "falcon_alibi", "qwen3_next", "gemma3_short_window"]


@pytest.mark.parametrize("name", IN_CI)
def test_trains_saves_and_opens_again(name, tmp_path):
    """Guards: models that end in a traceback, or whose rows see each other without padding. All: benchmarks."""
    found = architectures.try_architecture(name, tmp_path)
    assert not found["failed"]
    assert found["padding_free"] == pytest.approx(found["padded"], abs=1e-4)
    assert found["pads"] == (name in ("falcon_alibi", "qwen3_next"))
    assert found["padding_free_logits"] < 1e-3 and found["lora_logits"] < 1e-3


def model_of(name, tmp_path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(architectures.make_base(name, tmp_path / name))


def test_flash_attention_only_where_rows_stay_apart(tmp_path):
    """Guards: flash attention was taken unasked for GPT-J, whose attention takes no row borders (6.4156 for 6.4171)."""
    args, said = SimpleNamespace(model_max_length=512), []
    for name, apart in (("llama", True), ("mistral_short_window", True), ("gptj", False), ("qwen3_next", False)):
        model = model_of(name, tmp_path)
        model.config._attn_implementation = "flash_attention_2"
        collator = attention.padding_free_collator(model, args, said.append)
        assert (collator is not None and collator.borders) == apart, name
    assert len(said) == 4 and "flash_attention_2" in said[0] and "GPTJForCausalLM" in said[2]


def test_flash_attention_is_chosen_only_where_it_can_run(tmp_path, monkeypatch):
    """Guards: an installed flash_attn was taken for models without it, and for float32, and loading failed."""
    import torch

    from alpaca.training import model as base_model

    monkeypatch.setattr(base_model.importlib.util, "find_spec", lambda name: name)
    gpu = SimpleNamespace(device=torch.device("cuda"), bf16=True, fp16=False)
    configs = {name: model_of(name, tmp_path).config for name in ("llama", "bloom")}
    pick = base_model.pick_attention
    assert pick(None, configs["llama"], torch.float32, gpu) == "flash_attention_2"
    assert pick(None, configs["bloom"], torch.float32, gpu) is None
    assert pick(None, configs["llama"], torch.float32, SimpleNamespace(**{**vars(gpu), "bf16": False})) is None
    assert pick("eager", configs["llama"], torch.float32, gpu) == "eager"


@pytest.mark.parametrize("processes", [1, 2])
def test_a_wrong_rule_is_found_out_before_step_1(processes, tmp_path, monkeypatch):
    """Guards: whatever kernel was chosen, rows that see each other trained on in silence. Here the rule says yes to
    layers with states across tokens."""
    base, data = (
        architectures.make_base("qwen3_next", tmp_path / "base"),
        tiny_models.write_tasks(tmp_path / "train.json", 40),
    )
    more = ["--per_device_train_batch_size", 4 // processes]
    argv = architectures.words(base, data, tmp_path / "padded", "--padding_free", "False", *more)
    train_runs.launch(argv, tmp_path / "padded.log", processes).ok()
    monkeypatch.setattr(attention, "fits", lambda *_: True)
    argv = architectures.words(base, data, tmp_path / "free", *more)
    run = train_runs.launch(argv, tmp_path / "free.log", processes).ok()
    assert "batches are padded: without padding two rows had other losses" in run.output
    assert train_runs.losses(tmp_path / "free") == pytest.approx(train_runs.losses(tmp_path / "padded"), abs=1e-6)


def test_router_loss_counts_once(tmp_path):
    """Guards: the balance loss of mixtures of experts counted for each micro-batch and process: 7.256 for 6.651."""
    base = architectures.make_base("mixtral_router_loss", tmp_path / "base")
    data, found = tiny_models.write_tasks(tmp_path / "train.json", 40), {}
    for processes, rows, micro_batches in ((1, 8, 1), (1, 2, 4), (2, 2, 2)):
        out = tmp_path / f"{processes}_{rows}"
        more = ["--per_device_train_batch_size", rows, "--gradient_accumulation_steps", micro_batches]
        train_runs.launch(architectures.words(base, data, out, *more), tmp_path / f"{out.name}.log", processes).ok()
        found[out.name] = train_runs.losses(out)
    assert found["1_2"] == pytest.approx(found["1_8"], abs=5e-3)  # the balance of two rows is not that of eight
    assert found["2_2"] == pytest.approx(found["1_2"], abs=1e-4)
