"""The same job done in every way: one process, DDP, FSDP2, ZeRO-3, padded or not; equal losses, smaller shards.

`python tests/training/test_train_sharded.py` writes golden_losses.json anew, after a change
that is meant to change losses.
"""

import json
import os
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import architectures  # noqa: E402
import tiny_models  # noqa: E402
import train_runs  # noqa: E402

from alpaca.common.files import read_jsonl  # noqa: E402
from alpaca.training import checkpoint  # noqa: E402

GOLDEN = Path(__file__).with_name("golden_losses.json")
DEEPSPEED = ROOT / "configs/default_offload_opt_param.json"
STEPS = 20
# The global batch is 8 rows everywhere: rows x processes x accumulation.
WAYS = {
    "one process": (1, 4, ["--eval_on_start", "True"]),
    "padded": (1, 4, ["--padding_free", "False"]),
    "DDP": (2, 2, []),
    "FSDP2": (2, 2, ["--fsdp", "full_shard auto_wrap", "--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer"]),
    "ZeRO-3": (2, 2, ["--deepspeed", DEEPSPEED]),
}


def words(base, data, eval_data, output_dir, rows, *more):
    return [
        "--model_name_or_path", base, "--data_path", data, "--eval_data_path", eval_data, "--output_dir", output_dir,
        "--max_steps", STEPS, "--per_device_train_batch_size", rows, "--gradient_accumulation_steps", 2,
        "--learning_rate", "1e-3", "--lr_scheduler_type", "cosine", "--warmup_ratio", "0.1", "--logging_steps", 1,
        "--save_strategy", "no", "--disable_tqdm", "True", "--data_cache_dir", Path(output_dir).parent / "tokens",
        *more,
    ]  # fmt: skip


def run_way(way, base, folder, *more):
    processes, rows, flags = WAYS[way]
    folder.mkdir(parents=True, exist_ok=True)
    data = tiny_models.write_tasks(folder / "train.json", 200)
    eval_data = tiny_models.write_tasks(folder / "eval.json", 21, seed=5)
    name = way.replace(" ", "_")
    argv = words(base, data, eval_data, folder / name, rows, *flags, *more)
    return train_runs.launch(argv, folder / f"{name}.log", processes).ok(), folder / name


@pytest.fixture(scope="module")
def ways(tiny_llama, tmp_path_factory):
    """way -> (Run, output folder); each is run once."""
    folder = tmp_path_factory.mktemp("ways")
    tasks = tiny_models.write_tasks(folder / "tasks.json", 3, seed=6)
    return {way: run_way(way, tiny_llama, folder, "--sample_tasks", tasks) for way in WAYS}


@pytest.mark.parametrize("way", WAYS)
def test_loss_curve_is_the_golden_one(ways, way):
    """Guards: a rank whose optimizer updated one weight only, losses averaged per rank, padding counted as tokens."""
    golden = json.loads(GOLDEN.read_text())["losses"]
    assert train_runs.losses(ways[way][1]) == pytest.approx(golden, rel=2e-5)


@pytest.mark.parametrize("way", WAYS)
def test_sample_answers_are_those_of_inference(ways, way):
    """Guards: processes that wait for each other in a gather, answers of padded prompts, or of half a model."""
    from alpaca.answers.answering import answer_batch
    from alpaca.answers.loading import load_model
    from alpaca.answers.sampling import Sampling

    run, out = ways[way]
    rows = read_jsonl(out / "sample_answers.jsonl")
    assert len(rows) == (6 if way == "one process" else 3)  # --eval_on_start, and at the end
    report = json.loads((out / "train_report.json").read_text())
    last = report["sample_answers"]
    assert last == rows[-3:] and last[0]["step"] == report["steps"]
    model, tokenizer = load_model(str(out))
    for row in last:
        (answer,) = answer_batch(model, tokenizer, [row], Sampling(max_new_tokens=64))
        assert (row["answer"], row["ended"]) == (answer.text, answer.finish_reason == "stop")
        assert row["instruction"][:80] in run.output and row["instruction"] in (out / "README.md").read_text()


def test_held_out_loss_is_the_same_number(ways):
    """Guards: evaluation that weighs batches and not tokens, or counts rows twice to fill the last rank's batch."""
    found = {}
    for way, (_, output_dir) in ways.items():
        lines = [json.loads(line) for line in (output_dir / "train_log.jsonl").read_text().splitlines()]
        found[way] = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert len(found["one process"]) == 2 and found["one process"][0] > found["one process"][1]
    for way, values in found.items():
        assert values[-1] == pytest.approx(found["one process"][-1], rel=2e-5), way


@pytest.mark.parametrize("way", ["FSDP2", "ZeRO-3"])
def test_each_process_holds_half(ways, way):
    """Guards: accelerate falls back to DDP on CPUs without a word."""
    held, total = re.search(r"each of 2 processes holds ([\d,]+) of ([\d,]+) weights", ways[way][0].output).groups()
    held, total = int(held.replace(",", "")), int(total.replace(",", ""))
    assert total > 180_000 and total / 2 <= held < 0.51 * total


@pytest.mark.parametrize("way", WAYS)
def test_saved_model_loads_by_itself(ways, way):
    """Guards: sharded saves without weights, with the wrong names, or with a cache switched off for ever."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output_dir = ways[way][1]
    model, report = AutoModelForCausalLM.from_pretrained(output_dir, output_loading_info=True)
    reference = AutoModelForCausalLM.from_pretrained(ways["one process"][1])
    assert not any(report.values()) and model.config.use_cache and len(AutoTokenizer.from_pretrained(output_dir)) == 801
    ids = torch.arange(5, 60)[None]
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, reference(ids).logits, atol=1e-4)
    assert "read back, every tensor as in memory" in ways[way][0].output


def test_tied_head_stays_tied(tiny_tied, tmp_path):
    """Guards: a head tied to the embedding trained by itself under ZeRO-3, and its loss went another way."""
    wanted = train_runs.losses(run_way("one process", tiny_tied, tmp_path, "--max_steps", 4)[1])
    for way in ("FSDP2", "ZeRO-3"):
        found = train_runs.losses(run_way(way, tiny_tied, tmp_path, "--max_steps", 4)[1])
        assert found == pytest.approx(wanted, rel=2e-5), way


def test_every_process_may_load_the_whole_model(ways, tiny_llama, tmp_path):
    """Guards: with cpu_ram_efficient_loading false the other processes trained uninitialised weights: loss nan."""
    more = ["--fsdp_config", '{"fsdp_cpu_ram_efficient_loading": "false"}', "--max_steps", 3]
    run_way("FSDP2", tiny_llama, tmp_path, *more)
    assert train_runs.losses(tmp_path / "FSDP2")[0] == pytest.approx(train_runs.losses(ways["DDP"][1])[0], rel=2e-5)


def test_buffers_that_are_saved_are_sharded_too(tmp_path):
    """Guards: DeepSeek-V3's router bias is a buffer: 'Tensor' object has no attribute 'device_mesh' under FSDP2."""
    import torch
    from safetensors.torch import load_file, save_file

    base = architectures.make_base("deepseek_v3", tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    (bias,) = (name for name in weights if "e_score_correction_bias" in name)
    weights[bias] = torch.arange(len(weights[bias])).flip(0) / 10  # zeros would not show that it was lost
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    for way, more in (
        ("one process", []),
        ("FSDP2", ["--fsdp_transformer_layer_cls_to_wrap", "DeepseekV3DecoderLayer"]),
    ):
        _, output_dir = run_way(way, base, tmp_path, "--max_steps", 3, *more)
        assert load_file(output_dir / "model.safetensors")[bias].equal(weights[bias])
    assert train_runs.losses(tmp_path / "FSDP2") == pytest.approx(train_runs.losses(tmp_path / "one_process"), rel=2e-5)


def test_losses_are_not_rounded_to_16_bits(tiny_llama, tmp_path, monkeypatch):
    """Guards: under FSDP2 losses and gradient sums were bfloat16 (6.4395 for 6.4180), and so was the count of tokens:
    265 became 264, which made losses and gradients larger by as much."""
    from alpaca.training import internals

    monkeypatch.setattr(internals, "cpu_has_bf16", lambda: True)
    found = {}
    for way in ("one process", "FSDP2", "ZeRO-3"):
        _, output_dir = run_way(way, tiny_llama, tmp_path, "--max_steps", 3, "--bf16", "True")
        found[way] = train_runs.losses(output_dir), read_jsonl(output_dir / "train_log.jsonl")[-1]["eval_loss"]
    losses, held_out = found.pop("one process")
    for way, values in found.items():
        assert values[0] == pytest.approx(losses, rel=3e-4), way
        assert values[1] == pytest.approx(held_out, rel=1e-4), way


@pytest.mark.parametrize("way", ["one process", "FSDP2", "ZeRO-3"])
def test_lora_merged(tiny_llama, tmp_path, way):
    """Guards: adapters gathered or merged wrongly; the merged model is a plain one with the base's vocabulary."""
    from transformers import AutoModelForCausalLM

    task = tiny_models.write_tasks(tmp_path / "task.json", 1, seed=6)
    more = ["--max_steps", 3, "--lora_r", 4, "--merge_lora", "True", "--sample_tasks", task]
    run, output_dir = run_way(way, tiny_llama, tmp_path, *more)
    assert "LoRA rank 4 on q_proj, k_proj, v_proj" in run.output
    model, report = AutoModelForCausalLM.from_pretrained(output_dir, output_loading_info=True)
    assert not any(report.values()) and model.config.vocab_size == 800
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    changed = {n for n, p in model.named_parameters() if not p.equal(base.get_parameter(n))}
    assert changed == {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(2) for p in "qkv"}


def test_lora_adapter_is_whole(tiny_llama, tmp_path):
    """Guards: peft's model card was sealed and then replaced, so that every adapter counted as damaged."""
    from alpaca.answers.loading import load_model

    run, output_dir = run_way("one process", tiny_llama, tmp_path, "--max_steps", 2, "--lora_r", 4)
    assert checkpoint.find_damage(output_dir) == [] and (output_dir / "README.md").is_file()
    model, _ = load_model(str(output_dir))
    assert model.config.vocab_size == 800 and "read back, logits within" in run.output


if __name__ == "__main__":
    import tempfile

    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    with tempfile.TemporaryDirectory() as place:
        model = tiny_models.make_tiny_llama(Path(place) / "model")
        curve = train_runs.losses(run_way("one process", model, Path(place) / "run")[1])
    GOLDEN.write_text(json.dumps({"steps": STEPS, "losses": curve}, indent=1) + "\n")
    print(curve)
