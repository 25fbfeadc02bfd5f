"""What can be known to be wrong with a training run from its command line and its files; all of it is told at once.

Not a command; train.py calls `read_command_line` before it imports torch.
"""

import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alpaca.common.errors import UserError, did_you_mean
from alpaca.common.files import is_inside
from alpaca.common.tasks import TASK_FILES
from alpaca.training.arguments import (
    TRUNCATIONS,
    argv_pairs,
    is_true,
    modernise,
    named_paths,
    parse,
    print_help,
    read_mapping,
)
from alpaca.training.checkpoint import SEAL, checkpoints

# Flags whose values are paths, some of them several with commas between.
HOME_PATHS = {
    "model_name_or_path", "cache_dir", "data_path", "eval_data_path", "sample_tasks", "data_cache_dir", "output_dir",
    "resume_from_checkpoint",
}  # fmt: skip
DTYPES = ("auto", "float32", "bfloat16", "float16")


class CommandLine(NamedTuple):
    """The values of all flags by name, for ModelArguments, DataArguments and TrainingArguments."""

    model: dict[str, Any]
    data: dict[str, Any]
    run: dict[str, Any]


def read_command_line(argv: Sequence[str], say=print) -> CommandLine:
    """Reads and checks `argv`, says what spellings of 2023 mean today. Raises UserError that lists every problem."""
    if "--help" in argv or "-h" in argv:
        print_help(everything="all" in argv)
        sys.exit(0)
    notes: list[str] = []
    problems: list[str] = []
    pairs = modernise(argv_pairs(argv), int(os.environ.get("WORLD_SIZE", "1")), notes, problems)
    line = CommandLine(*parse(pairs, problems))
    if str(line.run["resume_from_checkpoint"]).lower() in ("false", "no", "none", "0"):
        line.run["resume_from_checkpoint"] = None
    expand_home(line)
    refuse(problems + check(*line))
    for note in notes:
        say(f"note: {note}")
    return line


def expand_home(line: CommandLine) -> None:
    """Replaces "~" at the start of paths, as a shell does, but for a run file's values and for --flag=~/path.

    transformers does so with the output folder, hence after what stands there was looked for.
    """
    for values in line:
        for name in HOME_PATHS & set(values):
            if values[name]:
                values[name] = re.sub(
                    r"(^|(?<=,))\s*~[^,]*", lambda path: os.path.expanduser(path[0].strip()), values[name]
                )


def refuse(problems: Sequence[str]) -> None:
    """Raises UserError with all of `problems`, where there are any."""
    if problems:
        listed = "\n".join(f"  {number}. {text}" for number, text in enumerate(problems, start=1))
        raise UserError(f"{len(problems)} problem{'s' * (len(problems) > 1)} with this run:\n{listed}")


def check(model: dict[str, Any], data: dict[str, Any], run: dict[str, Any]) -> list[str]:
    """Every problem that the values alone and the files show, each with its way out."""
    problems = []

    problem = problems.append

    output_dir = run["output_dir"]
    if not output_dir:
        problem("--output_dir is missing: the folder for the result")
    elif not run["dry_run"]:
        if text := output_problem(Path(output_dir), run["resume_from_checkpoint"], run["overwrite"]):
            problem(text)
    if not data["data_path"]:
        problem("--data_path is missing: for example --data_path ./alpaca_data.json")
    for name in ("data_path", "eval_data_path", "sample_tasks"):
        for path in named_paths(data[name]):
            if not Path(path).exists() and (path.endswith(TASK_FILES) or path.startswith((".", "/"))):
                folder = Path(path).parent
                near = did_you_mean(Path(path).name, [p.name for p in folder.glob("*.*")], f"{folder}/")
                problem(f"--{name}: no file {path}.{near}")
    base = model["model_name_or_path"]
    if not base:
        problem("--model_name_or_path is missing: a checkpoint's folder or a Hugging Face model name")
    elif Path(base).is_dir() and not (Path(base) / "config.json").is_file():
        problem(f"--model_name_or_path: {base} has no config.json, so it is not a Hugging Face checkpoint")
    elif output_dir and run["overwrite"] and Path(base).is_dir() and is_inside(base, output_dir):
        problem(f"--overwrite True would remove the base {base} itself: choose another --output_dir")
    elif not Path(base).exists() and (base.startswith((".", "/", "~")) or base.count("/") > 1):
        problem(f"--model_name_or_path: no folder {base}; a checkpoint's folder holds config.json and the weights")

    for name, value in (("dtype", model["dtype"]), ("save_dtype", run["save_dtype"])):
        if value not in DTYPES:
            problem(f"--{name} {value}: expected one of {', '.join(DTYPES)}")
    if model["merge_lora"] and not (model["lora_r"] or model["qlora"]):
        problem("--merge_lora True needs adapters: add --lora_r 8")
    fsdp = is_true([str(run["fsdp"])])  # a text: a run file's True that a typed False overrides
    if model["qlora"]:
        if not is_installed("bitsandbytes"):
            problem("--qlora needs bitsandbytes (and an NVIDIA GPU): pip install bitsandbytes")
        if model["merge_lora"]:
            problem(
                "--merge_lora True cannot merge into 4-bit weights: leave it out; `python inference.py serve "
                "--model_name_or_path OUT --merged_dir DIR` then writes and serves the plain model"
            )
        if fsdp:
            problem(
                "--qlora and --fsdp do not go together: only the first process would hold 4-bit weights. Train 4-bit "
                "adapters in one process, or 16-bit ones with --lora_r 16 --dtype bfloat16 --fsdp True"
            )
        if run["deepspeed"]:
            problem("--qlora and --deepspeed do not go together: ZeRO-3 cannot shard 4-bit weights")
    if fsdp and run["deepspeed"]:
        problem("--fsdp and --deepspeed both shard the model: leave one out")
    if run["deepspeed"] and isinstance(run["deepspeed"], str):
        problems += check_deepspeed(run["deepspeed"])

    has_eval = bool(data["eval_data_path"]) or bool(data["val_size"])
    for name in ("eval_strategy", "eval_on_start"):
        if (value := run[name]) not in (False, "no") and not has_eval:
            problem(f"--{name} {value} needs held-out rows: add --eval_data_path FILE or --val_size 200")
    metric = run["metric_for_best_model"]
    if metric not in (None, "loss", "eval_loss"):
        problem(f"--metric_for_best_model {metric}: only the held-out loss is measured; leave it out, or say eval_loss")
    if run["push_to_hub"] and is_true([os.environ.get("HF_HUB_OFFLINE", "0")]):
        problem("--push_to_hub True cannot reach the hub: HF_HUB_OFFLINE is set. Leave the flag out or unset it")
    if data["eval_data_path"] and data["val_size"]:
        problem("--eval_data_path and --val_size both name the held-out rows: leave one out")
    if data["val_size"] < 0 or (data["val_size"] > 1 and data["val_size"] != int(data["val_size"])):
        problem(f"--val_size {data['val_size']}: expected a count of rows, or a share below 1")
    if data["truncation"] not in TRUNCATIONS:
        problem(f"--truncation {data['truncation']}: expected one of {', '.join(TRUNCATIONS)}")
    counts = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
    sizes = {name: run[name] for name in counts}
    sizes |= {"model_max_length": run["model_max_length"], "max_train_samples": data["max_train_samples"]}
    for name, value in sizes.items():
        if value is not None and value < 1:
            problem(f"--{name} {value}: expected at least 1")
    if run["label_smoothing_factor"] and data["padding_free"]:
        problem("--label_smoothing_factor needs the logits of every token: add --padding_free False")
    if run["fp16"] and run["bf16"]:
        problem("--fp16 and --bf16 cannot both be on")
    problems += check_packages(run)
    for name in ("warmup_steps", "learning_rate", "weight_decay"):
        if run[name] < 0:
            problem(f"--{name} {run[name]}: expected 0 or more")
    return problems


def output_problem(folder: Path, resume: str | None, overwrite: bool) -> str | None:
    """Why a run may not write into `folder`: it holds something that neither `resume` goes on from nor `overwrite`
    gives up."""
    if folder.is_file():
        return f"--output_dir {folder} is a file"
    if overwrite or not folder.is_dir() or not any(folder.iterdir()):
        return None
    if not resume:
        return (
            f"--output_dir {folder} already holds something and is left alone: choose another, go on from its "
            "checkpoints with --resume_from_checkpoint auto, or replace its result with --overwrite True"
        )
    finished = any((folder / name).is_file() for name in ("config.json", "adapter_config.json", SEAL))
    automatic = resume.lower() in ("auto", "true", "yes")
    its_own = bool(checkpoints(folder)) if automatic else is_inside(resume, folder)
    if (finished or checkpoints(folder)) and not its_own:
        return (
            f"--output_dir {folder} holds another run's result, which --resume_from_checkpoint {resume} does not go on "
            "from: choose another folder, or replace that result with --overwrite True"
        )
    return None


# Optimizers of other packages: the part of the name that tells -> the package to import.
OPTIMIZER_PACKAGES = {
    "8bit": "bitsandbytes", "paged": "bitsandbytes", "bnb": "bitsandbytes", "ademamix": "bitsandbytes",
    "lion": "bitsandbytes", "anyprecision": "torchdistx",
    "apex": "apex", "galore": "galore_torch", "apollo": "apollo_torch", "lomo": "lomo_optim", "grokadamw": "grokadamw",
    "schedule_free": "schedulefree", "stable_adamw": "optimi", "torch_4bit": "torchao", "torch_8bit": "torchao",
}  # fmt: skip


# What --report_to takes beside "all" and "none" -> the package to import; None where it is none.
TRACKERS = {
    "azure_ml": "azureml.core", "clearml": "clearml", "codecarbon": "codecarbon", "comet_ml": "comet_ml",
    "dagshub": "dagshub", "dvclive": "dvclive", "flyte": "flytekit", "kubeflow": None, "mlflow": "mlflow",
    "neptune": "neptune", "swanlab": "swanlab", "tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb",
}  # fmt: skip


def is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package that `name` is a part of
        return False


def check_packages(run: dict[str, Any], installed=is_installed) -> list[str]:
    """The optional packages that flags ask for and that are not there, and trackers that do not exist."""
    trackers = run.get("report_to") or []
    trackers = [trackers] if isinstance(trackers, str) else trackers
    trackers = [] if trackers in (["all"], ["none"]) else trackers
    unknown = [
        f"--report_to {name}: no such tracker; known: {', '.join(TRACKERS)}.{did_you_mean(name, TRACKERS)}"
        for name in trackers
        if name not in TRACKERS
    ]
    wanted = [(f"--report_to {name}", TRACKERS[name]) for name in trackers if TRACKERS.get(name)]
    optimizer = run.get("optim") or ""
    # The longest part decides: adamw_torch_8bit is torchao's.
    found = max((part for part in OPTIMIZER_PACKAGES if part in optimizer), key=len, default=None)
    if found:
        wanted.append((f"--optim {optimizer}", OPTIMIZER_PACKAGES[found]))
    if run.get("use_liger_kernel"):
        wanted.insert(0, ("--use_liger_kernel True", "liger_kernel"))
    missing = [(what, re.sub("[._]", "-", name)) for what, name in wanted if not installed(name)]
    return unknown + [f"{what} needs {package}: pip install {package}" for what, package in missing]


def check_deepspeed(path: str) -> list[str]:
    """What is wrong with a DeepSpeed file, or with this machine for it."""
    try:
        config = read_mapping(path, "--deepspeed")
    except UserError as error:
        return [str(error)]
    problems = []
    if not is_installed("deepspeed"):
        problems.append("--deepspeed: the package is not installed; pip install deepspeed")
    zero = config.get("zero_optimization", {})
    if zero.get("stage") == 3 and zero.get("stage3_gather_16bit_weights_on_model_save") is False:
        # The original's file says so, and its users' saved models had no weights in them.
        problems.append(
            f'--deepspeed {path}: "stage3_gather_16bit_weights_on_model_save": false leaves checkpoints without '
            "weights; set it to true"
        )
    return problems
