"""The command lines of 2023 and the shipped run files, as they are typed."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import train_runs
import yaml

from alpaca.common.errors import UserError
from alpaca.common.ports import free_port
from alpaca.training import arguments, checks

ROOT = Path(__file__).resolve().parents[2]

# The README of 2023, but for its placeholders and, so that a test ends, the number of rows.
COMMAND = """
torchrun --nproc_per_node=4 --master_port={port} train.py --model_name_or_path {model} --data_path {data} --bf16 True --output_dir {out}
  --num_train_epochs 3 --per_device_train_batch_size 4 --per_device_eval_batch_size 4 --gradient_accumulation_steps 8
  --evaluation_strategy "no" --save_strategy "steps" --save_steps 2000 --save_total_limit 1 --learning_rate 2e-5 --weight_decay 0.
  --warmup_ratio 0.03 --lr_scheduler_type "cosine" --logging_steps 1 {sharding} --tf32 True
"""  # noqa: E501
LLAMA = """--fsdp "full_shard auto_wrap" --fsdp_transformer_layer_cls_to_wrap 'LlamaDecoderLayer'"""
OPT_OFFLOAD = """--fsdp "full_shard auto_wrap offload" --fsdp_transformer_layer_cls_to_wrap 'OPTDecoderLayer'"""
ZERO3 = """--deepspeed "./configs/default_offload_opt_param.json\""""


def typed(sharding, model, folder, rows=150) -> list[str]:
    data = tiny_models.write_tasks(folder / "alpaca_data.json", rows)
    text = COMMAND.format(port=free_port(), model=model, data=data, out=folder / "out", sharding=sharding)
    return shlex.split(text)


def check_result(output: str, out: Path, vocabulary: int) -> None:
    from transformers import AutoModelForCausalLM

    for line in (
        "--evaluation_strategy no is now --eval_strategy no",
        "--warmup_ratio 0.03 is now --warmup_steps 0.03",
        "--tf32 True needs an NVIDIA GPU",
    ):
        assert f"note: {line}" in output
    assert len(train_runs.losses(out)) == 6  # two batches, three times
    assert AutoModelForCausalLM.from_pretrained(out).config.vocab_size == vocabulary
    assert "each of 4 processes holds" in output and (out / "checkpoint-6/checksums.json").is_file()


def test_command_of_2023_under_torchrun(tiny_llama, tmp_path):
    """Guards: current parsers reject the flags of 2023, and its users' scripts still have them."""
    words = typed(LLAMA, tiny_llama, tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    check_result(done.stdout, tmp_path / "out", 801)  # the original's [PAD] row


@pytest.mark.parametrize("sharding", [OPT_OFFLOAD, ZERO3], ids=["opt_offload", "deepspeed"])
def test_other_commands_of_2023(sharding, tiny_llama, tiny_opt, tmp_path, monkeypatch):
    """Guards: OPT's spare rows, which the original cut off; the DeepSpeed file, which overrode the schedule and left
    saves without weights."""
    words = typed(sharding, tiny_llama if sharding is ZERO3 else tiny_opt, tmp_path, rows=40)
    words += ["--gradient_accumulation_steps", "2"]  # in place of 8, which shows no more
    monkeypatch.chdir(ROOT)
    run = train_runs.launch(words[words.index("train.py") + 1 :], tmp_path / "log", processes=4).ok()
    check_result(run.output, tmp_path / "out", 801 if sharding is ZERO3 else 520)
    assert ("FSDP's offload is left out" in run.output) == (sharding is OPT_OFFLOAD)  # here; on GPUs it is done
    rates = [json.loads(line) for line in (tmp_path / "out/train_log.jsonl").read_text().splitlines()]
    assert [line["learning_rate"] for line in rates if "loss" in line][-1] < 2e-6  # a cosine's end


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.yaml")), ids=lambda path: path.name)
def test_run_file_is_valid(path, tmp_path):
    """Guards: a shipped configuration with a flag that the script does not know."""
    problems, notes = [], []
    pairs = arguments.argv_pairs([str(path), "--model_name_or_path", str(tmp_path), "--data_path", str(path)])
    pairs = arguments.modernise(pairs, processes=4, notes=notes, problems=problems)
    model, data, run = arguments.parse(pairs, problems)
    assert not problems and not notes
    (tmp_path / "config.json").write_text("{}")
    run["output_dir"] = str(tmp_path / "out")
    assert checks.check(model, data, run) == []
    header = path.read_text()
    assert re.search(r"^#   (torchrun|python) .*configs/" + path.name, header, re.M)


def test_llama_run_files_hold_the_published_recipe():
    """Guards: a recipe that drifts: 7B 128 rows, 2e-5, 3 epochs; 13B 128 rows, 1e-5, 5 epochs; length 512, decay 0.

    With the 2,000 steps of 2023 between checkpoints a killed run had none.
    """
    for name, processes, rate, epochs in (
        ("llama_7b", 4, 2e-5, 3),
        ("llama_13b", 8, 1e-5, 5),
        ("opt_6.7b", 4, 2e-5, 3),
    ):
        recipe = yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text())
        rows = recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"] * processes
        assert (rows, recipe["learning_rate"], recipe["num_train_epochs"]) == (128, rate, epochs)
        assert (recipe["model_max_length"], recipe["weight_decay"]) == (512, 0.0)
        assert recipe["save_steps"] <= 52_002 * epochs / 128 / 3


def test_flags_after_a_run_file_override_it(tmp_path):
    """Guards: the file's value won over the one typed."""
    path = tmp_path / "run.json"
    path.write_text('{"learning_rate": 1, "fsdp_config": {"version": 2}, "run_name": null, "report_to": ["none"]}')
    pairs = arguments.argv_pairs([str(path), "--learning-rate=3e-4"])
    assert pairs == [
        ("learning_rate", ["1"]),
        ("fsdp_config", ['{"version": 2}']),
        ("report_to", ["none"]),
        ("learning_rate", ["3e-4"]),
    ]


def modern(*words, processes=2):
    notes, problems = [], []
    pairs = arguments.modernise(arguments.argv_pairs(words), processes, notes, problems)
    return dict(pairs), notes, problems


def test_spellings_of_2023():
    """Guards: each removed flag maps to what it meant, with one line that says so."""
    pairs, notes, problems = modern(
        "--fsdp", "shard_grad_op auto_wrap offload", "--fsdp_transformer_layer_cls_to_wrap", "GPT2Block",
        "--group_by_length", "--logging_dir", "logs", "--overwrite_output_dir", "True", "--no_cuda", "True",
        "--save_safetensors", "False", "--adafactor", "True",
    )  # fmt: skip
    config = json.loads(pairs.pop("fsdp_config")[0])
    assert config == {
        "reshard_after_forward": False,
        "cpu_offload": True,
        "transformer_layer_cls_to_wrap": ["GPT2Block"],
    }
    assert pairs == {
        "fsdp": ["True"], "train_sampling_strategy": ["group_by_length"], "overwrite": ["True"], "use_cpu": ["True"],
        "optim": ["adafactor"],
    }  # fmt: skip
    assert arguments.os.environ["TENSORBOARD_LOGGING_DIR"] == "logs" and not problems
    assert len(notes) == 8


def test_a_result_survives_resuming_and_overwriting(tmp_path, run_script):
    """Guards: --resume_from_checkpoint auto replaced a finished model that has no checkpoints, or the base itself."""
    out = tmp_path / "out"
    (out / "checkpoint-4").mkdir(parents=True)
    assert "already holds" in checks.output_problem(out, None, False)
    assert checks.output_problem(out, "auto", False) is None
    (out / "config.json").write_text("{}")
    assert checks.output_problem(out, "auto", False) is None
    assert checks.output_problem(out, str(out / "checkpoint-4"), False) is None
    assert "another run's result" in checks.output_problem(out, str(tmp_path / "other/checkpoint-4"), False)
    (out / "checkpoint-4").rmdir()
    assert "another run's result" in checks.output_problem(out, "auto", False)
    (out / "config.json").unlink()
    (out / "run.json").write_text("{}")  # of a run that was killed before its first checkpoint
    assert checks.output_problem(out, "auto", False) is None
    (out / "config.json").write_text("{}")
    assert checks.output_problem(out, "auto", True) is None
    done = run_script(
        "train.py", "--model_name_or_path", out, "--data_path", "seed_tasks.jsonl", "--output_dir", out,
        "--overwrite", "True", "--resume_from_checkpoint", "False", status=2,
    )  # fmt: skip
    assert "would remove the base" in done.stderr and (out / "config.json").exists()


def test_home_is_expanded_before_the_checks(tmp_path, monkeypatch):
    """Guards: "~" in a run file's output_dir, which no shell expands, got round the protection of what stands there."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("out/config.json", "base/config.json", "a.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "run.yaml").write_text("output_dir: ~/out\nmodel_name_or_path: ~/base\ndata_path: ~/a.json, ~/a.json\n")
    with pytest.raises(UserError) as refused:
        checks.read_command_line([str(tmp_path / "run.yaml")])
    assert "1 problem" in str(refused.value) and f"{tmp_path}/out already holds something" in str(refused.value)
    line = checks.read_command_line([str(tmp_path / "run.yaml"), "--output_dir=~/new"])
    assert line.run["output_dir"] == f"{tmp_path}/new"
    assert line.model["model_name_or_path"] == f"{tmp_path}/base"
    assert line.data["data_path"] == f"{tmp_path}/a.json,{tmp_path}/a.json"


@pytest.mark.parametrize("kind", ["bloom", "mixtral"])
def test_other_models_train_too(kind, tiny_tied, tmp_path):
    """Guards: models without sdpa, or whose code cannot run on tensors without values, ended in a traceback before
    training, at the memory estimate that is only for information."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, MixtralConfig

    tokenizer = AutoTokenizer.from_pretrained(tiny_tied)
    sizes = dict(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, n_layer=2, n_head=4)
    experts = dict(num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, num_local_experts=2)
    config = BloomConfig(**sizes) if kind == "bloom" else MixtralConfig(**sizes, **experts)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    data = tiny_models.write_tasks(tmp_path / "train.json", 8)
    argv = ["--model_name_or_path", tmp_path / "base", "--data_path", data, "--output_dir", tmp_path / "out"]
    argv += ["--max_steps", 2, "--per_device_train_batch_size", 2, "--save_strategy", "no", "--bf16", "True"]
    run = train_runs.launch([*argv, "--data_cache_dir", tmp_path / "tokens"], tmp_path / "log").ok()
    assert "read back, every tensor as in memory" in run.output
    assert ("batches are padded" in run.output) == (kind == "bloom")


def test_gpu_settings_are_left_out_on_a_cpu():
    """Guards: a cluster's command tried on a laptop failed in a Triton kernel after the model was loaded."""
    from alpaca.training.training_arguments import adapt_to_hardware

    run = {"use_liger_kernel": True, "tf32": True, "bf16": False}
    notes = adapt_to_hardware(run, has_gpu=False)
    assert not any(run.values()) and "NVIDIA" in notes[0] and "GPUs alone" in notes[1]


def test_fast_settings_are_the_default_on_a_gpu(monkeypatch):
    """Guards: the fast kernels lay unused unless asked for; asked against, they were used; nobody was told."""
    import torch

    from alpaca.training import training_arguments
    from alpaca.training.arguments import RunArguments

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(training_arguments, "is_installed", lambda name: name == "liger_kernel")

    def adapted(**given):
        run = {"tf32": None, "use_liger_kernel": None, "bf16": False, "deepspeed": None, "torch_compile": False}
        run |= {"torch_compile_backend": None, **given}
        return run, "\n".join(training_arguments.adapt_to_hardware(run, has_gpu=True))

    run, notes = adapted()
    assert run["tf32"] and run["use_liger_kernel"] and "--tf32 False" in notes and "--use_liger_kernel False" in notes
    run, notes = adapted(tf32=False, use_liger_kernel=False)
    assert not run["tf32"] and not run["use_liger_kernel"] and not notes
    assert not adapted(deepspeed="zero3.json")[0]["use_liger_kernel"]
    assert RunArguments().optim == "adamw_torch_fused"


def test_a_micro_batch_does_not_wait_for_the_device(tiny_llama, tmp_path, monkeypatch):
    """Guards: the check of each micro-batch's loss waited for the GPU, which then waited for the next one's kernels."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from alpaca.training.trainer import SupervisedTrainer

    class Readings(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
                print("a reading of the device's memory", flush=True)
            return function(*args, **(kwargs or {}))

    plain = SupervisedTrainer.compute_loss

    def watched(self, *args, **kwargs):
        with Readings():
            return plain(self, *args, **kwargs)

    monkeypatch.setattr(SupervisedTrainer, "compute_loss", watched)
    data = tiny_models.write_tasks(tmp_path / "train.json", 20)
    argv = ["--model_name_or_path", tiny_llama, "--data_path", data, "--output_dir", tmp_path / "out", "--max_steps", 1]
    argv += ["--gradient_accumulation_steps", 3, "--per_device_train_batch_size", 2, "--save_strategy", "no"]
    run = train_runs.launch([*argv, "--data_cache_dir", tmp_path / "tokens"], tmp_path / "log").ok()
    # One each is transformers' own, which looks in the positions for rows that stand end to end.
    assert run.output.count("a reading of the device's memory") <= 3, run.output


def test_old_spellings_after_a_run_file_override_it():
    """Guards: a run file's --warmup_steps beat a --warmup_ratio typed after it, and the note said otherwise."""
    pairs = [("warmup_steps", ["0.03"]), ("warmup_ratio", ["0.1"]), ("group_by_length", ["True"])]
    found = arguments.modernise([*pairs, ("group_by_length", ["False"])], 1, [], [])
    assert [values for name, values in found if name == "warmup_steps"][-1] == ["0.1"]
    assert [values for name, values in found if name == "train_sampling_strategy"][-1] == ["random"]


def test_fsdp_without_a_value():
    """Guards: a bare --fsdp was dropped without a word, and an empty one did not switch a run file's off."""
    assert modern("--fsdp")[0]["fsdp"] == ["True"] and modern("--fsdp", "")[0]["fsdp"] == ["False"]


@pytest.mark.parametrize("off", ["False", "", "no"])
def test_deepspeed_in_place_of_a_run_files_fsdp(off, tmp_path, monkeypatch):
    """Guards: --fsdp False after a run file's True was a text, and so true, beside --deepspeed."""
    monkeypatch.chdir(ROOT)
    words = ["configs/llama_7b.yaml", "--fsdp", off, "--deepspeed", "configs/default_offload_opt_param.json"]
    problems = []
    pairs = arguments.modernise(arguments.argv_pairs(words), 4, [], problems)
    parsed = arguments.parse(pairs, problems)
    parsed[2]["output_dir"] = str(tmp_path / "out")
    assert not [text for text in problems + checks.check(*parsed) if "fsdp" in text]


@pytest.mark.parametrize(
    "flags",
    [
        ("--truncation", "Drop"),
        ("--per_device_eval_batch_size", "0"),
        ("--fsdp_min_num_params", "1e8"),
    ],
)
def test_values_that_nothing_checked(flags, tmp_path, tiny_llama, run_script):
    """Guards: a misspelt --truncation trained as "cut"; the others were tracebacks, one after the model was loaded."""
    data = tiny_models.write_tasks(tmp_path / "data.json", 3)
    done = run_script(
        "train.py", "--model_name_or_path", tiny_llama, "--data_path", data, "--output_dir", tmp_path / "out", *flags,
        status=2,
    )  # fmt: skip
    assert " ".join(flags) in done.stderr and "Traceback" not in done.stderr


def test_one_process_needs_no_sharding():
    """Guards: the 2023 command with one process raised "fsdp only works in distributed training"."""
    pairs, notes, _ = modern("--fsdp", "full_shard auto_wrap", processes=1)
    assert pairs == {} and "one process has nothing to shard" in notes[-1]


def test_all_problems_are_told_at_once(tmp_path, run_script):
    """Guards: one error a start, each after a minute of loading; a misspelt flag was a usage text of 150 flags."""
    tiny_models.write_tasks(tmp_path / "alpaca_data.json", 3)
    done = run_script(
        "train.py", "--data_path", tmp_path / "alpaca_dta.json", "--model_name_or_path", tmp_path / "none",
        "--num_train_epoch", "3", "--learning_rate", "fast", "--evaluation_strategy", "steps", "--save_dtype", "int8",
        "--qlora", "True", "--fsdp", "full_shard", "--deepspeed", tmp_path / "none.json", status=2,
        env={"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"},
    )  # fmt: skip
    for text in (
        "12 problems with this run", "no flag --num_train_epoch. Did you mean --num_train_epochs?", "--learning_rate",
        "--output_dir is missing", "Did you mean " + str(tmp_path / "alpaca_data.json"), "no folder",
        "--save_dtype int8", "--qlora needs bitsandbytes", "--fsdp and --deepspeed",
        "no file " + str(tmp_path / "none.json"), "--eval_strategy steps needs held-out rows",
    ):  # fmt: skip
        assert text in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_deepspeed_file_that_saves_no_weights_is_refused(tmp_path):
    """Guards: the original's file says gather false, and its users' checkpoints had no weights."""
    path = tmp_path / "old.json"
    path.write_text(
        '{"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": false}}', encoding="utf-8"
    )
    assert "set it to true" in checks.check_deepspeed(str(path))[0]
    assert checks.check_deepspeed(str(ROOT / "configs/default_offload_opt_param.json")) == []


def test_packages_that_a_flag_needs(tmp_path):
    """Guards: a missing optional package, or a misspelt tracker, was found out after the model was loaded."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(checks.TRACKERS) == set(INTEGRATION_TO_CALLBACK)
    assert checks.check_packages({"report_to": ["none"]}) == checks.check_packages({"report_to": "all"}) == []
    problems = checks.check_packages({"report_to": ["mlflow", "azure_ml", "tensorbord"]})
    assert "--report_to tensorbord: no such tracker" in problems[0] and "Did you mean tensorboard?" in problems[0]
    assert problems[1:] == [
        "--report_to mlflow needs mlflow: pip install mlflow",
        "--report_to azure_ml needs azureml-core: pip install azureml-core",
    ]
    absent = [("use_liger_kernel", ["True"]), ("report_to", ["wandb", "tensorboard"])]
    problems = checks.check_packages(dict(absent), installed=lambda name: name == "tensorboard")
    assert problems == [
        "--use_liger_kernel True needs liger-kernel: pip install liger-kernel",
        "--report_to wandb needs wandb: pip install wandb",
    ]


def test_wrong_wrap_class_lists_the_right_one(tiny_opt):
    """Guards: "Could not find the transformer layer class to wrap" named no class that would do."""
    from alpaca.training import model as base_model

    config = base_model.load_config(str(tiny_opt))
    with pytest.raises(UserError, match="right for it: OPTDecoderLayer"):
        base_model.check_wrap_class(config, {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]})
    base_model.check_wrap_class(config, {"transformer_layer_cls_to_wrap": ["OPTDecoderLayer"]})


def test_torch_dtype_is_dtype():
    """Guards: the name that transformers and its guides used until 2025 was an unknown flag."""
    pairs, notes, _ = modern("--torch_dtype", "bfloat16")
    assert pairs == {"dtype": ["bfloat16"]} and "--torch_dtype bfloat16 is now --dtype bfloat16" in notes[0]


def test_optimizers_of_other_packages():
    """Guards: --optim adamw_bnb_8bit without bitsandbytes failed after the model was loaded."""
    for optimizer, package in (
        ("adamw_bnb_8bit", "bitsandbytes"), ("lion_32bit", "bitsandbytes"), ("adamw_torch_8bit", "torchao"),
        ("galore_adamw_8bit", "galore-torch"), ("schedule_free_adamw", "schedulefree"),
    ):  # fmt: skip
        (problem,) = checks.check_packages({"optim": optimizer}, installed=lambda name: False)
        assert f"--optim {optimizer} needs {package}" in problem
    for optimizer in ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "rmsprop"):
        assert checks.check_packages({"optim": optimizer}, installed=lambda name: False) == []


def test_settings_that_fail_late_are_refused_first(tmp_path, run_script):
    """Guards: a metric that nobody measures, a hub that cannot be reached and 4-bit weights that only the first process
    would have were found out after hours, or never."""
    data = tiny_models.write_tasks(tmp_path / "alpaca_data.json", 3)
    done = run_script(
        "train.py", "--data_path", data, "--output_dir", tmp_path / "out", "--metric_for_best_model", "eval_bleu",
        "--push_to_hub", "True", "--qlora", "True", "--fsdp", "full_shard", "--max_train_samples", -1, status=2,
        env={"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    for text in (
        "only the held-out loss is measured",
        "--max_train_samples -1: expected at least 1",
        "HF_HUB_OFFLINE is set",
        "--qlora and --fsdp do not go together",
    ):
        assert text in done.stderr, done.stderr


def test_models_that_are_no_text_models_are_refused(tmp_path):
    """Guards: a vision model, or an encoder, ended in a traceback after the data was tokenised."""
    from transformers import BertConfig, LlavaConfig, T5Config

    from alpaca.training.model import load_config

    for config, reason in ((LlavaConfig(), "has a part for pictures"), (T5Config(), "is not a causal language model")):
        config.save_pretrained(tmp_path / config.model_type)
        with pytest.raises(UserError, match=reason):
            load_config(str(tmp_path / config.model_type))
    BertConfig().save_pretrained(tmp_path / "bert")  # has a causal head: transformers' business
    assert load_config(str(tmp_path / "bert")).model_type == "bert"


def test_two_bos_are_said(tiny_llama, tmp_path):
    """Guards: a tokenizer that puts BOS twice trains prompts that no server will send."""
    from tokenizers import processors

    from alpaca.training.data import load_data
    from alpaca.training.model import load_tokenizer

    tokenizer, said = load_tokenizer(str(tiny_llama), 512), []
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> <s> $A", special_tokens=[("<s>", 1)]
    )
    data = tiny_models.write_tasks(tmp_path / "alpaca_data.json", 3)
    settings = arguments.DataArguments(data_path=str(data), data_cache_dir=str(tmp_path / "tokens"))
    load_data(settings, 512, 0, tokenizer, said.append)
    assert said == ["note: the tokenizer itself puts 2 BOS before every text"]


@pytest.mark.parametrize("targets", ["q_proj", "lm_head", "embed_tokens,q_proj", "all-linear"])
def test_adapters_of_a_tied_model_are_merged(targets, tiny_tied, tmp_path):
    """Guards: with tied embeddings the merged model lacked its head, which was found out after all the training."""
    from transformers import AutoModelForCausalLM

    data = tiny_models.write_tasks(tmp_path / "train.json", 8)
    run = train_runs.launch(
        [
            "--model_name_or_path", tiny_tied, "--data_path", data, "--output_dir", tmp_path / "out", "--max_steps", 2,
            "--per_device_train_batch_size", 2, "--learning_rate", "1e-2", "--save_strategy", "no", "--lora_r", 4,
            "--merge_lora", "True", "--lora_target_modules", targets, "--data_cache_dir", tmp_path / "tokens",
        ],
        tmp_path / "log",
    ).ok()  # fmt: skip
    assert "read back, every tensor as in memory" in run.output
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert model.config.tie_word_embeddings == (targets in ("q_proj", "all-linear"))
    if targets == "all-linear":
        assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in run.output


def test_adapters_of_a_base_in_another_cache(tiny_llama, tmp_path):
    """Guards: with --cache_dir the base of the written adapters was looked for elsewhere, after all the training."""
    base = tmp_path / "cache/models--someone--base"
    shutil.copytree(tiny_llama, base / "snapshots/0123abcd")
    (base / "refs").mkdir()
    (base / "refs/main").write_text("0123abcd")
    data = tiny_models.write_tasks(tmp_path / "train.json", 8)
    argv = ["--model_name_or_path", "someone/base", "--cache_dir", tmp_path / "cache", "--data_path", data]
    argv += ["--output_dir", tmp_path / "out", "--max_steps", 1, "--lora_r", 4, "--save_strategy", "no"]
    run = train_runs.launch([*argv, "--data_cache_dir", tmp_path / "tokens"], tmp_path / "log").ok()
    assert "read back" in run.output and (tmp_path / "out/adapter_config.json").exists()


def test_adapters_on_tied_ends_under_fsdp_are_refused(tiny_tied, tmp_path):
    """Guards: accelerate's KeyError about an attribute that already exists, after loading."""
    data = tiny_models.write_tasks(tmp_path / "train.json", 8)
    argv = ["--model_name_or_path", tiny_tied, "--data_path", data, "--output_dir", tmp_path / "out", "--max_steps", 1]
    argv += ["--fsdp", "True", "--lora_r", 4, "--lora_target_modules", "lm_head", "--data_cache_dir", tmp_path / "t"]
    run = train_runs.launch(argv, tmp_path / "log", processes=2)
    assert run.status == 2 and "FSDP2 cannot shard it" in run.output and "Traceback" not in run.output
