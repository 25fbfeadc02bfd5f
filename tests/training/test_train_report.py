"""Figures of a run: log lines, final report, curve, card, memory estimate, dataset statistics."""

import json
import re
import shutil
import sys
import time
from types import SimpleNamespace

import pytest
import tiny_models
import train_runs
from conftest import ROOT
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from alpaca.common.files import jload, read_jsonl, write_jsonl
from alpaca.common.prompt import PROMPT_DICT, format_prompt
from alpaca.training import card
from alpaca.training.data import load_rows, tokenize_dataset
from alpaca.training.memory import checkpoint_bytes, memory_estimate, memory_table
from alpaca.training.report import Flops, ReportCallback, peak_tflops

sys.path.append(str(ROOT / "benchmarks"))

import architectures  # noqa: E402

ROWS = 24


@pytest.fixture(scope="module")
def finished(tiny_llama, tmp_path_factory):
    """One epoch of 24 rows in one process: 3 steps of 4 rows x 2 micro-batches."""
    folder = tmp_path_factory.mktemp("finished")
    data = tiny_models.write_tasks(folder / "data.json", ROWS)
    cache = {"XDG_CACHE_HOME": str(folder / "cache")}
    run = train_runs.launch(command(tiny_llama, data, folder / "out", 4, 2)[1:], folder / "log", environment=cache).ok()
    return folder, data, run.output


def command(model, data, out, rows, accumulation, *more):
    return [
        "train.py", "--model_name_or_path", model, "--data_path", data, "--output_dir", out, "--num_train_epochs", 1,
        "--per_device_train_batch_size", rows, "--gradient_accumulation_steps", accumulation, "--logging_steps", 1,
        "--save_strategy", "no", *more,
    ]  # fmt: skip


def real_tokens(tiny_llama, data, folder) -> int:
    from transformers import AutoTokenizer

    rows = load_rows(str(data))
    dataset = tokenize_dataset(
        rows, AutoTokenizer.from_pretrained(tiny_llama), 512, cache_dir=folder / "cache" / "alpaca_tokens"
    )
    return int(dataset["length"][:].sum())


def test_every_log_line_has_the_figures(finished, tiny_llama):
    """Users asked how fast it is and got a 24 h estimate; counts must be those of the rows, accumulation included."""
    folder, data, output = finished
    lines = [line for line in read_jsonl(folder / "out" / "train_log.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert {"loss", "learning_rate", "grad_norm", "seconds_per_step", "tokens_per_second", "padding_share"} <= set(
            line
        )
        assert "mfu" not in line, "a CPU's peak is not known: no MFU rather than a wrong one"
        assert line["padding_share"] == 0
    assert lines[-1]["tokens"] == real_tokens(tiny_llama, data, folder)
    assert "'tokens_per_second'" in output


def test_final_report(finished):
    """Tokens, time, speed, loss and memory of the whole run in one place, for people and for programs."""
    folder, _, output = finished
    report = json.loads((folder / "out" / "train_report.json").read_text())
    assert report["steps"] == 3 and report["rows_per_step"] == 8 and report["processes"] == 1
    assert report["real_tokens"] == report["padded_tokens"]
    assert report["real_tokens_per_second"] == pytest.approx(report["real_tokens"] / report["seconds"], rel=0.01)
    assert 0.1 < report["peak_memory_gb_per_process"] < 10
    assert report["data"]["rows"] == ROWS and report["mfu"] is None
    assert "Training report" in output and "real tokens/s" in output
    assert (folder / "out" / "loss_curve.png").read_bytes().startswith(b"\x89PNG")


def test_steps_after_the_last_log_line_count(finished, tiny_llama, tmp_path):
    """A run shorter than --logging_steps (500 by default) reported 0 tokens, no loss and "100% padding"."""
    folder, data, _ = finished
    argv = [*command(tiny_llama, data, tmp_path / "out", 4, 2)[1:], "--logging_steps", 2]
    train_runs.launch([*argv, "--data_cache_dir", folder / "cache" / "alpaca_tokens"], tmp_path / "log").ok()
    lines = [line for line in read_jsonl(tmp_path / "out" / "train_log.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == [2, 3]
    report = json.loads((tmp_path / "out" / "train_report.json").read_text())
    assert report["real_tokens"] == real_tokens(tiny_llama, data, folder) and report["steps_of_this_session"] == 3


def test_report_names_the_step_that_is_saved(tiny_llama, tmp_path):
    """With load_best_model_at_end the folder holds the best model, and the report gave the last step's figures.

    The base's own repetition penalty is none of the answers'. Of two training files neither was in run.json, and the
    card named both, with this machine's folders, as one data set.
    """
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    settings = {**jload(base / "generation_config.json"), "repetition_penalty": 9.0}
    (base / "generation_config.json").write_text(json.dumps(settings))
    data = tiny_models.write_tasks(tmp_path / "data.json", 40)
    halves = [tmp_path / "first.json", tmp_path / "second.json"]
    for place, half in enumerate(halves):
        half.write_text(json.dumps(jload(data)[20 * place : 20 * place + 20]))
    held_out = tiny_models.write_tasks(tmp_path / "held_out.json", 8, seed=5)
    asked = [tiny_models.write_tasks(tmp_path / f"asked_{seed}.json", 3, seed=seed) for seed in (6, 7)]
    # The rate is far too high, so that the first step is the best.
    more = [
        "--eval_data_path", held_out, "--eval_strategy", "steps", "--eval_steps", 1, "--save_strategy", "steps",
        "--save_steps", 1, "--load_best_model_at_end", "True", "--learning_rate", "0.3", "--lr_scheduler_type",
        "constant", "--data_cache_dir", tmp_path / "tokens", "--sample_tasks", f"{asked[0]}, {asked[1]}",
    ]  # fmt: skip
    paths = ", ".join(map(str, halves))
    run = train_runs.launch([*command(base, paths, tmp_path / "out", 4, 2)[1:], *more], tmp_path / "log").ok()
    report = json.loads((tmp_path / "out" / "train_report.json").read_text())
    lines = [line for line in read_jsonl(tmp_path / "out" / "train_log.jsonl") if "eval_loss" in line]
    best = min(lines, key=lambda line: line["eval_loss"])
    assert best["step"] < report["steps"] == 5 and len(lines) == 5
    assert report["saved_step"] == best["step"] and report["eval_loss_of_saved_step"] == best["eval_loss"]
    assert f"step {best['step']}, the best one: held-out loss {best['eval_loss']:.4f}" in run.output
    card = ModelCard.load(tmp_path / "out" / "README.md").data
    assert card.datasets == ["first.json", "second.json"]
    assert set(jload(tmp_path / "out" / "run.json")["inputs"]) == {str(path) for path in (*halves, held_out, *asked)}
    (result,) = card.eval_results
    assert (result.metric_type, result.metric_value) == ("loss", round(best["eval_loss"], 4))
    from alpaca.answers.answering import answer_batch
    from alpaca.answers.held_out_loss import held_out_loss
    from alpaca.answers.loading import load_model
    from alpaca.answers.sampling import Sampling

    model, tokenizer = load_model(str(tmp_path / "out"))
    assert jload(tmp_path / "out" / "generation_config.json")["repetition_penalty"] == 9.0
    shown = report["sample_answers"]
    assert len(shown) == 6
    assert {row["step"] for row in shown} == {best["step"]}
    assert len(read_jsonl(tmp_path / "out" / "sample_answers.jsonl")) == 5 * 6
    for row in shown:
        (answer,) = answer_batch(model, tokenizer, [row], Sampling(max_new_tokens=64))
        assert row["answer"] == answer.text
    saved = held_out_loss(model, tokenizer, load_rows(str(held_out)))["loss"]
    assert saved == pytest.approx(best["eval_loss"], rel=1e-4)


def test_model_card(finished, tiny_llama):
    """A checkpoint must say what it is, how to prompt it and under which licence."""
    folder, data, _ = finished
    card = ModelCard.load(folder / "out" / "README.md")
    assert card.data.base_model == tiny_llama.name and card.data.datasets == [data.name]
    assert card.data.eval_results is None
    assert PROMPT_DICT["prompt_no_input"] in card.text
    assert str(data) in card.text and "CC BY-NC 4.0" in card.text and "`learning_rate`" in card.text


@pytest.mark.parametrize("held_out", [0, 4])
def test_what_comes_last_reaches_tensorboard(held_out, tiny_llama, tmp_path):
    """Guards: a tracker closed before the last answers, which ended the run with no model saved; a last held-out loss
    in a second file or run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    data = tiny_models.write_tasks(tmp_path / "data.json", ROWS)
    tasks = tiny_models.write_tasks(tmp_path / "tasks.json", 2, seed=6)
    more = ["--sample_tasks", tasks, "--report_to", "tensorboard", "--val_size", held_out]
    train_runs.launch([*command(tiny_llama, data, tmp_path / "out", 4, 2)[1:], *more], tmp_path / "log").ok()
    assert (tmp_path / "out" / "model.safetensors").is_file()
    report = json.loads((tmp_path / "out" / "train_report.json").read_text())
    assert len(report["sample_answers"]) == 2 and report["sample_answers_seconds"] > 0
    (file,) = (tmp_path / "out").rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    (event,) = events.Tensors("sample_answers/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert event.step == report["steps"] and ("eval/loss" in events.Tags()["scalars"]) == bool(held_out)
    assert all(row["instruction"] in text and row["answer"] in text for row in report["sample_answers"])


def rendered(template: str, **values: str) -> str:
    """What Go's text/template makes of {{ .Name }} and of one {{ if .Name }} ... {{ else }} ... {{ end }}."""
    condition, name, yes, no, rest = re.fullmatch(
        r"({{ if \.(\w+) }})(.*){{ else }}(.*){{ end }}(.*)", template, re.DOTALL
    ).groups()
    return re.sub(r"{{ \.(\w+) }}", lambda found: values[found[1]], (yes if values[name] else no) + rest)


def test_modelfile_gives_the_training_prompt(finished):
    """Guards: exported models that are asked in other bytes than they were trained on, and that do not stop."""
    folder, _, _ = finished
    text = (folder / "out" / "Modelfile").read_text()
    template = re.search(r'^TEMPLATE """(.*?)"""$', text, re.DOTALL | re.MULTILINE)[1]
    for context in ("", "2 and 3\n{{ .Prompt }}"):
        prompt = rendered(template, System=context, Prompt="Add {the} numbers.", Response="")
        assert prompt == format_prompt({"instruction": "Add {the} numbers.", "input": context})
    assert stops_of(text) == ["</s>", "\n\n### Instruction:"] and "\nFROM .\n" in text
    # Ollama strips quotes and nothing else: escapes gave stop strings that no answer holds.
    assert (
        stops_of(card.modelfile(SimpleNamespace(eos_token="<｜end▁of▁sentence｜>"), 512))[0] == "<｜end▁of▁sentence｜>"
    )


def stops_of(modelfile: str) -> list[str]:
    return re.findall(r'^PARAMETER stop """(.*?)"""$', modelfile, re.DOTALL | re.MULTILINE)


def test_counts_are_of_all_processes(finished, tiny_llama, tmp_path):
    """Two processes, padded batches: the log counted the first process's tokens alone, and padding as tokens."""
    folder, data, _ = finished
    argv = command(tiny_llama, data, tmp_path / "out", 2, 2, "--padding_free", "False")[1:]
    cache = {"XDG_CACHE_HOME": str(folder / "cache")}
    train_runs.launch(argv, tmp_path / "log", processes=2, environment=cache).ok()
    logs = [line for line in read_jsonl(tmp_path / "out" / "train_log.jsonl") if "loss" in line]
    alone = [line for line in read_jsonl(folder / "out" / "train_log.jsonl") if "loss" in line]
    assert [line["tokens"] for line in logs] == [line["tokens"] for line in alone]
    assert all(0 < line["padding_share"] < 0.6 for line in logs)
    report = json.loads((tmp_path / "out" / "train_report.json").read_text())
    assert report["processes"] == 2 and report["padded_tokens"] > report["real_tokens"] == alone[-1]["tokens"]


def test_dry_run_trains_nothing(finished, tiny_llama, tmp_path):
    """Which GPU do I need? The answer came as an out-of-memory error, after loading."""
    argv = command(tiny_llama, finished[1], tmp_path / "out", 4, 2, "--dry_run", "True")[1:]
    run = train_runs.launch(argv, tmp_path / "log").ok()
    for text in ("Memory of one process", "gradients", "Training data", "padding, batches of 8", "--- trained"):
        assert text in run.output
    assert not (tmp_path / "out").exists()


def callback_for(tmp_path, device="cpu", **args):
    """A ReportCallback on a stand-in for Trainer, for events that a real run cannot time."""
    import torch

    model = torch.nn.Linear(2, 2)
    settings = dict(
        output_dir=str(tmp_path), device=torch.device(device), world_size=1, process_index=0, bf16=False, fp16=False,
        torch_compile=False,
        per_device_train_batch_size=1, gradient_accumulation_steps=1,
    )  # fmt: skip
    trainer = SimpleNamespace(
        args=SimpleNamespace(**{**settings, **args}),
        model=model,
        state=SimpleNamespace(global_step=0, max_steps=9, epoch=0.0),
    )
    callback = ReportCallback.__new__(ReportCallback)
    callback.__dict__.update(
        trainer=trainer, data_report={}, flops=None, log_file=tmp_path / "train_log.jsonl", interval=[0, 0, 0],
        totals={"tokens": 0, "places": 0, "seconds": 0.0, "steps": 0}, peak=None,
    )  # fmt: skip
    return callback, trainer


def test_resumed_run_keeps_one_line_a_step(tmp_path):
    """Steps after the last checkpoint are done again; their first lines would stay in the log twice."""
    write_jsonl(tmp_path / "train_log.jsonl", [{"step": i, "loss": 1.0, "tokens": 10 * i} for i in range(1, 6)])
    callback, trainer = callback_for(tmp_path)
    trainer.state.global_step = 3
    callback.on_train_begin(trainer.args, trainer.state, None)
    trainer.state.global_step = 4
    callback.count({"input_ids": __import__("torch").ones(1, 7)})
    logs = {"loss": 0.5}
    callback.add_figures(logs)
    callback.on_log(trainer.args, trainer.state, None, logs=logs)
    lines = read_jsonl(tmp_path / "train_log.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["tokens"] == 37


def test_a_torn_log_line_does_not_stop_a_resumed_run(tmp_path):
    """Half a line, left by a power cut, made --resume_from_checkpoint auto fail for good."""
    callback, trainer = callback_for(tmp_path)
    trainer.state.global_step = 2
    (tmp_path / "train_log.jsonl").write_text('{"step": 1, "loss": 2.0, "tokens": 7}\n{"step": 2, "lo')
    callback.on_train_begin(trainer.args, trainer.state, None)
    assert [line["step"] for line in callback.lines] == [1] and callback.tokens_before == 7


def test_pauses_are_not_training_time(tmp_path, monkeypatch):
    """Evaluation and saving between two log lines made the run look slow."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    callback, trainer = callback_for(tmp_path)
    args, state, control = trainer.args, trainer.state, SimpleNamespace(should_log=False)
    callback.on_train_begin(args, state, control)
    for step in (1, 2):
        clock.now += 2
        state.global_step = step
        callback.on_step_end(args, state, control)
        if step == 1:
            clock.now += 30
            callback.on_evaluate(args, state, control)
            clock.now += 50
            callback.on_save(args, state, control)
    callback.count({"input_ids": __import__("torch").ones(1, 40)})
    logs = {"loss": 1.0}
    callback.add_figures(logs)
    assert logs["seconds_per_step"] == 2 and logs["tokens_per_second"] == 10


def test_peaks_of_cards():
    """An unknown card shows no MFU; H100 PCIe is not H100 SXM, L40S is not L4, A100 is not A10."""
    peaks = {
        "NVIDIA H100 80GB HBM3": 989.4, "NVIDIA H100 PCIe": 756.5, "NVIDIA A100-SXM4-80GB": 311.9, "NVIDIA L40S": 362.0,
        "NVIDIA L4": 121.0, "Tesla T4": 65.0, "NVIDIA A10G": None, "NVIDIA L40": None, "Quadro P600": None,
        "NVIDIA H200": 989.4, "NVIDIA GeForce RTX 4090": 165.2,
    }  # fmt: skip
    assert {name: peak_tflops(name) for name in peaks} == peaks


def test_flops_of_a_llama(tiny_llama):
    """Six operations a weight and token; looking up costs nothing, the output projection only where it is used."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    flops = Flops(model)
    table = model.get_input_embeddings().weight.numel()
    assert flops.of(10, 10) == 6 * 10 * (model.num_parameters() - table)
    assert flops.of(10, 0) == 6 * 10 * (model.num_parameters() - 2 * table)
    assert Flops(model, frozen=True).of(1, 1) * 6 == flops.of(1, 1) * 4


# ---- memory ----------------------------------------------------------------------------------------------------------


def run_settings(**changes):
    settings = dict(
        bf16=False, fp16=False, world_size=1, deepspeed=None, fsdp=False, fsdp_config=None, optim="adamw_torch",
        per_device_train_batch_size=4, model_max_length=64, activation_checkpointing=False, save_dtype="auto",
        gradient_accumulation_steps=1,
    )  # fmt: skip
    return SimpleNamespace(**{**settings, **changes})


def model_settings(**changes):
    settings = dict(
        lora_r=0, qlora=False, dtype="float32", lora_target_modules=None, attn_implementation=None, merge_lora=False
    )  # fmt: skip
    return SimpleNamespace(**{**settings, **changes})


def estimate(folder, args=None, model_args=None, **how) -> dict[str, tuple[float, float]]:
    """Part -> (device bytes, host bytes)."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    rows = memory_estimate(config, args or run_settings(), model_args or model_settings(), **how)
    return {part: (device * 1e9, host * 1e9) for part, device, host in rows}


@pytest.fixture(scope="session")
def tiny_experts(tmp_path_factory):
    return architectures.make_base("qwen3_moe", tmp_path_factory.mktemp("models") / "tiny_experts")


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_opt", "tiny_tied", "tiny_experts"])
def test_estimate_equals_what_a_model_takes(request, name):
    """The estimate is of this very model: weights, gradients, moments exactly, activations as autograd keeps them."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = request.getfixturevalue(name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    size = 4 * model.num_parameters()
    parts = estimate(folder, padding_free=False)
    assert parts["weights"][0] == parts["gradients"][0] == size
    assert parts["optimizer"][0] == 2 * size
    kept = {weight.untyped_storage().data_ptr(): 0 for weight in model.parameters()}
    tensors = []

    def pack(tensor):
        tensors.append(tensor)
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        return tensor

    ids = torch.randint(3, 500, (4, 64))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.get_decoder()(input_ids=ids, use_cache=False)
    assert parts["activations of the layers"][0] == pytest.approx(sum(kept.values()), rel=0.15)


def test_estimate_under_sharding_and_adapters(tiny_llama):
    """Each way of saving memory must show in the table where it saves it."""
    whole = estimate(tiny_llama)
    sharded = estimate(tiny_llama, run_settings(world_size=4, fsdp=True, fsdp_config={}))
    assert sharded["weights"][0] == whole["weights"][0] / 4 and sharded["optimizer"][0] == whole["optimizer"][0] / 4
    assert sharded["while loading, first process only"][1] == whole["weights"][0]
    away = estimate(tiny_llama, run_settings(world_size=4, fsdp=True, fsdp_config={"cpu_offload": True}))
    assert away["optimizer"] == (0, sharded["optimizer"][0])
    offload = {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
    zero = SimpleNamespace(is_zero3=lambda: True, config={"zero_optimization": offload})
    zero3 = estimate(tiny_llama, run_settings(world_size=4, bf16=True, deepspeed="file", hf_deepspeed_config=zero))
    assert zero3["weights"] == (0, whole["weights"][0] / 8)
    assert zero3["optimizer"] == (0, whole["weights"][0] * 3 / 4)
    lora = estimate(tiny_llama, model_args=model_settings(lora_r=4))
    assert lora["optimizer"][0] == 8 * 4 * (64 + 64) * 3 * 2
    assert lora["activations of the layers"][0] < whole["activations of the layers"][0]
    checkpointed = estimate(tiny_llama, run_settings(activation_checkpointing=True))
    assert checkpointed["activations of the layers"][0] < 0.7 * whole["activations of the layers"][0]
    copies = estimate(tiny_llama, run_settings(bf16=True))
    assert 0 < copies["16-bit copies of the weights"][0] < whole["weights"][0] / 2


def test_estimate_names_what_saves_and_micro_batches_take(tiny_llama):
    """27 GB of whole gradients between micro-batches, and as much for a float32 copy in the final check, both at 7B,
    were in no line of the table."""
    whole = estimate(tiny_llama)["weights"][0]
    plain = run_settings(world_size=4, fsdp=True, fsdp_config={}, gradient_accumulation_steps=8)
    assert estimate(tiny_llama, plain)["gradients between micro-batches, whole"][0] == whole
    synced = SimpleNamespace(gradient_accumulation_kwargs={"sync_each_batch": True})
    plain.accelerator_config = synced
    assert "gradients between micro-batches, whole" not in estimate(tiny_llama, plain)
    check = estimate(tiny_llama, run_settings(save_dtype="bfloat16"))["final check, first process only"][1]
    assert whole < check < 2 * whole  # two 16-bit copies; of the layers one at a time in float32


def test_checkpoint_bytes_of_a_weight(tiny_llama, tmp_path):
    """Guards: 12 bytes a weight for every run: too few for ZeRO-3 (16, as measured in float32), too many for the rest,
    which were refused on disks that would have held them."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(tiny_llama)

    def bytes_each(model_args=None, **changes):
        args = run_settings(**{"save_only_model": False, **changes})
        return checkpoint_bytes(config, args, model_args or model_settings(), 1)

    zero3, zero2 = (
        {"deepspeed": "file", "hf_deepspeed_config": SimpleNamespace(is_zero3=lambda stage=stage: stage == 3)}
        for stage in (3, 2)
    )
    half = model_settings(dtype="bfloat16")
    assert (bytes_each(), bytes_each(half), bytes_each(model_settings(lora_r=4, dtype="bfloat16"))) == (12, 6, 12)
    assert (bytes_each(**zero3), bytes_each(**zero3, bf16=True), bytes_each(**zero2, bf16=True)) == (16, 14, 16)
    assert (bytes_each(save_only_model=True), bytes_each(half, save_only_model=True)) == (4, 2)
    assert (bytes_each(optim="adamw_bnb_8bit"), bytes_each(half, optim="adafactor")) == (6, 2)
    data = tiny_models.write_tasks(tmp_path / "data.json", 8)
    more = ["--dtype", "bfloat16", "--save_strategy", "epoch", "--optim", "adafactor"]
    train_runs.launch([*command(tiny_llama, data, tmp_path / "out", 4, 2)[1:], *more], tmp_path / "log").ok()
    files = [*tmp_path.glob("out/checkpoint-1/model*"), *tmp_path.glob("out/checkpoint-1/optim*")]
    assert len(files) == 2
    trained = sum(weight.numel() for weight in load_file(files[0]).values())
    assert sum(file.stat().st_size for file in files) == pytest.approx(2 * trained, rel=0.2)


def test_estimate_of_7b_loads_nothing():
    """LLaMA-7B's table in seconds on a laptop: 27 GB of fp32 weights, and no memory taken for them."""
    import resource

    from transformers import LlamaConfig

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = memory_estimate(LlamaConfig(), run_settings(bf16=True), model_settings())
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024)
    assert dict((part, device) for part, device, _ in rows)["weights"] == pytest.approx(26.95, abs=0.01)
    assert grown < 1e9
    assert "device GB" in memory_table(rows)
