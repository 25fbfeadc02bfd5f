"""Reads train.py's command line: flags, YAML or JSON run files, the spellings of 2023; fits it to the machine.

Not a command; `python train.py --help` prints what is declared here.
"""

import dataclasses
import difflib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alpaca.common.errors import UserError


def flag(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass
class ModelArguments:
    """The base model, and how much of it is trained."""

    model_name_or_path: str | None = flag(
        "facebook/opt-125m", "A folder with a checkpoint, or a Hugging Face model name."
    )
    dtype: str = flag(
        "float32", "Type of the trained weights. float32 keeps updates of 2e-5 that bfloat16 rounds away; or 'auto'."
    )
    attn_implementation: str | None = flag(
        None, "Attention kernel. Default: flash_attention_2 on a GPU where it is installed, else sdpa."
    )
    pad_to_multiple_of: int | None = flag(
        None, "Rounds the embedding's rows up to this multiple (64 is fast on GPUs). Default: LLaMA's faithful 32,001."
    )
    lora_r: int = flag(0, "Rank of LoRA adapters; 0 trains every weight.")
    lora_alpha: int | None = flag(None, "Scale of the adapters. Default: twice the rank.")
    lora_dropout: float = flag(0.05, "Dropout before the adapters.")
    lora_target_modules: str | None = flag(
        None, "Comma-separated layer names that get adapters. Default: the model's query, key and value projections."
    )
    merge_lora: bool = flag(False, "Adds the trained adapters into the weights, so that the result is a plain model.")
    qlora: bool = flag(False, "LoRA on a base in 4 bits (a GPU and bitsandbytes are needed).")


@dataclasses.dataclass
class DataArguments:
    """What is trained on."""

    data_path: str | None = flag(
        None, "alpaca_data.json, regen.json, JSONL or a Hugging Face dataset name; several with commas between."
    )
    eval_data_path: str | None = flag(None, "Rows for the held-out loss, in the same formats.")
    val_size: float = flag(0.0, "Rows kept out of data_path for the held-out loss: a count, or below 1 a share.")
    max_train_samples: int | None = flag(None, "Trains on the first so many rows only.")
    truncation: str = flag(
        "cut", "Rows longer than model_max_length: cut (as the original, no EOS), cut_eos (EOS stays last) or drop."
    )
    padding_free: bool = flag(
        True, "Rows of a batch stand end to end, with no padding between; same loss. False: padded batches of 2023."
    )
    data_cache_dir: str | None = flag(None, "Where tokenised data are kept. Default: ~/.cache/alpaca_tokens.")
    preprocessing_workers: int | None = flag(None, "Processes that tokenise. Default: all cores.")


@dataclasses.dataclass
class RunArguments:
    """This project's additions to transformers.TrainingArguments, and the defaults that differ from its."""

    cache_dir: str | None = flag(None, "Where downloaded models are kept. Default: the Hugging Face cache.")
    optim: str = flag("adamw_torch", "Optimizer; adamw_torch_fused is the fast one.")
    model_max_length: int = flag(512, "Longest row in tokens, prompt and answer together.")
    save_dtype: str = flag("auto", "Type of the saved weights: auto (the base's own), float32, bfloat16 or float16.")
    overwrite: bool = flag(False, "Replaces the result of an earlier run in output_dir.")
    dry_run: bool = flag(False, "Prints data statistics, one example and the memory needed; trains nothing.")
    resume_from_checkpoint: str | None = flag(
        None, "'auto' goes on from the newest complete checkpoint in output_dir, or names one."
    )


# ----------------------------------------------------------------------------------------------------------------------
# Spellings of 2023.

RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "overwrite_output_dir": "overwrite",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "torchdynamo": "torch_compile_backend",
}
# Settings of 2023 whose effect is now always on, or gone from the libraries: (why nothing is lost by leaving them out).
DROPPED = {
    "save_safetensors": "weights are always safetensors",
    "fp16_backend": "torch's own is used",
    "half_precision_backend": "torch's own is used",
    "fp16_opt_level": "torch's own mixed precision is used",
    "jit_mode_eval": "the libraries removed it",
    "use_ipex": "torch has it built in",
    "use_mps_device": "found by itself",
    "xpu_backend": "named by --ddp_backend",
    "tpu_num_cores": "the libraries removed it",
    "past_index": "causal models have none",
    "ray_scope": "the libraries removed it",
    "include_inputs_for_metrics": "only the loss is measured",
}
FSDP_WORDS = {
    "full_shard": {"reshard_after_forward": True},
    "shard_grad_op": {"reshard_after_forward": False},
    "offload": {"cpu_offload": True},
    "auto_wrap": {},
}


def is_true(values: Sequence[str]) -> bool:
    return not values or values[0].lower() in ("true", "1", "yes", "y", "t", "on")


def modernise(pairs: list[tuple[str, list[str]]], has_gpu: bool, processes: int, notes: list[str], problems: list[str]):
    """Rewrites flags that current libraries no longer know; each change leaves one line in `notes`.

    `pairs`: (flag without dashes, its values) in the order typed. Returns the list in today's spelling.
    """
    fsdp_config: dict[str, Any] = {}
    modern = []
    for name, values in pairs:
        value = " ".join(values)
        if name in RENAMED:
            notes.append(f"--{name} {value} is now --{RENAMED[name]} {value}")
            modern.append((RENAMED[name], values))
        elif name in DROPPED:
            notes.append(f"--{name} is left out: {DROPPED[name]}")
        elif name == "warmup_ratio":
            notes.append(f"--warmup_ratio {value} is now --warmup_steps {value} (below 1 it is a share of all steps)")
            modern.append(("warmup_steps", values))
        elif name == "group_by_length":
            strategy = "group_by_length" if is_true(values) else "random"
            notes.append(f"--group_by_length {value} is now --train_sampling_strategy {strategy}")
            modern.append(("train_sampling_strategy", [strategy]))
        elif name == "adafactor":
            if is_true(values):
                notes.append("--adafactor True is now --optim adafactor")
                modern.append(("optim", ["adafactor"]))
        elif name == "logging_dir":
            notes.append(f"--logging_dir {value} is now the environment variable TENSORBOARD_LOGGING_DIR={value}")
            os.environ["TENSORBOARD_LOGGING_DIR"] = value
        elif name == "fsdp" and value.lower() not in ("", "true", "false", "1", "0"):
            words = value.split()
            unknown = [word for word in words if word not in FSDP_WORDS]
            if unknown:
                problems.append(f"--fsdp: unknown word {unknown[0]!r}; known: {', '.join(FSDP_WORDS)}")
            for word in words:
                fsdp_config |= FSDP_WORDS.get(word, {})
            shown = f" --fsdp_config '{json.dumps(fsdp_config)}'" if fsdp_config else ""
            notes.append(f'--fsdp "{value}" is now --fsdp True{shown}')
            modern.append(("fsdp", ["True"]))
        elif name == "fsdp" and not value:
            continue  # --fsdp "" was the way to say no
        elif name == "fsdp_transformer_layer_cls_to_wrap":
            notes.append(
                f"--fsdp_transformer_layer_cls_to_wrap {value} is found from the model; to override it: "
                f'--fsdp_config \'{{"transformer_layer_cls_to_wrap": ["{value}"]}}\''
            )
            fsdp_config["transformer_layer_cls_to_wrap"] = [part.strip() for part in value.split(",")]
        elif name == "fsdp_min_num_params":
            notes.append(f"--fsdp_min_num_params {value} is now a key of --fsdp_config")
            fsdp_config |= {"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": int(value)}
        elif name == "tf32" and is_true(values) and not has_gpu:
            notes.append("--tf32 True needs an NVIDIA GPU (Ampere or newer); this CPU computes in float32")
        elif name == "use_liger_kernel" and is_true(values) and not has_gpu:
            notes.append("--use_liger_kernel True: its kernels run on GPUs alone; this CPU goes on with torch's")
        else:
            modern.append((name, values))

    if fsdp_config:
        typed = [values[0] for name, values in modern if name == "fsdp_config" and values]
        modern = [(name, values) for name, values in modern if name != "fsdp_config"]
        if typed:
            try:
                fsdp_config |= read_mapping(typed[-1], "--fsdp_config")
            except UserError as error:
                problems.append(str(error))
        modern.append(("fsdp_config", [json.dumps(fsdp_config)]))
    if processes == 1 and any(name == "fsdp" and is_true(values) for name, values in modern):
        notes.append("--fsdp is left out: one process has nothing to shard. torchrun --nproc_per_node=N starts more")
        modern = [(name, values) for name, values in modern if name not in ("fsdp", "fsdp_config")]
    return modern


# ----------------------------------------------------------------------------------------------------------------------
# From words to values.


def read_mapping(text: str, what: str) -> dict[str, Any]:
    """A mapping from JSON text, or from a YAML or JSON file. Raises UserError where it is neither."""
    import yaml

    if not text.lstrip().startswith("{"):
        path = Path(text)
        if not path.is_file():
            near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.*")], n=1)
            hint = f" Did you mean {path.parent / near[0]}?" if near else ""
            raise UserError(f"{what}: no file {text}.{hint}")
        text = path.read_text(encoding="utf-8")
    try:
        value = yaml.safe_load(text)  # JSON is YAML
    except yaml.YAMLError as error:
        raise UserError(f"{what} is not valid YAML or JSON: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise UserError(f"{what}: expected names and values, found {type(value).__name__}")
    return value


def config_pairs(path: str) -> list[tuple[str, list[str]]]:
    """The flags that a run file stands for; null leaves a flag out, mappings become JSON."""
    pairs = []
    for name, value in read_mapping(path, path).items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        pairs.append((str(name), [json.dumps(v) if isinstance(v, dict) else str(v) for v in values]))
    return pairs


def argv_pairs(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Splits words into (flag, values): a run file first, then --name value ..., --name=value, with - or _."""
    pairs: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            pairs.append((name.replace("-", "_"), [value] if equals else []))
        elif pairs:
            pairs[-1][1].append(word)
        elif word.endswith((".yaml", ".yml", ".json")):
            pairs += config_pairs(word)
        else:
            raise UserError(f"unexpected word {word!r}: expected a run file such as configs/llama_7b.yaml, or --flags")
    return pairs


def parse(pairs: list[tuple[str, list[str]]], classes: Sequence[type], problems: list[str]) -> list[dict[str, Any]]:
    """Values for each of the dataclasses `classes`; unknown flags and unreadable values are added to `problems`."""
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message):  # argparse would print 150 flags and leave
            raise UserError(message)

    parser = Parser(classes, add_help=False, allow_abbrev=False)
    known = {option.lstrip("-"): action for action in parser._actions for option in action.option_strings}
    words: list[str] = []
    for name, values in pairs:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            problems.append(f"no flag --{name}." + (f" Did you mean --{near[0]}?" if near else ""))
            continue
        try:
            _, rest = parser.parse_known_args([f"--{name}", *values])
            if rest:
                raise UserError(f"argument --{name}: {' '.join(rest)!r} is one value too many")
            words += [f"--{name}", *values]
        except UserError as error:
            problems.append(re.sub(r"argument (--\w+)\S*:", r"\1:", " ".join(str(error).split())))
    namespace = vars(parser.parse_args(words))
    return [{f.name: namespace[f.name] for f in dataclasses.fields(c) if f.init} for c in classes]


def print_help(argv: Sequence[str]) -> None:
    """The project's own flags at once; with `--help all` every flag of the Trainer too (that needs torch's import)."""
    if "all" in argv:
        from transformers import HfArgumentParser

        from alpaca.training.training_arguments import TrainingArguments

        HfArgumentParser([ModelArguments, DataArguments, TrainingArguments], prog="train.py").print_help()
        return
    print(f"usage: {Path(sys.argv[0]).name} [RUN.yaml] [--flag value ...]\n")
    for cls in (ModelArguments, DataArguments, RunArguments):
        print(cls.__doc__.splitlines()[0])
        for field in dataclasses.fields(cls):
            shown = "" if field.default in (None, False) else f" [{field.default}]"
            print(f"  --{field.name:<24} {field.metadata['help']}{shown}")
        print()
    print("Every setting of transformers.TrainingArguments is a flag too: `train.py --help all` lists them.")


# ----------------------------------------------------------------------------------------------------------------------
# The arguments of a run, for this machine.


def read_arguments(argv: Sequence[str], say=print) -> tuple[ModelArguments, DataArguments, Any]:
    """(ModelArguments, DataArguments, TrainingArguments) for a command line, ready for this machine.

    Raises UserError that lists every problem found. Settings that the hardware lacks are replaced and said so.
    Starts the process group where torchrun started this process.
    """
    if "--help" in argv or "-h" in argv:
        print_help(argv)
        sys.exit(0)
    import torch

    from alpaca.training import cpu_cluster
    from alpaca.training.run_checks import check

    notes: list[str] = []
    problems: list[str] = []
    pairs = argv_pairs(argv)
    wants_cpu = ([False] + [is_true(values) for name, values in pairs if name in ("use_cpu", "no_cuda")])[-1]
    has_gpu = torch.accelerator.is_available() and not wants_cpu
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    pairs = modernise(pairs, has_gpu, processes, notes, problems)
    uses_deepspeed = any(name == "deepspeed" and values for name, values in pairs)
    if not has_gpu:
        if uses_deepspeed and importlib.util.find_spec("deepspeed"):
            cpu_cluster.prepare_deepspeed()
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(cpu_cluster.sensible_threads(processes_here))

    from alpaca.training.training_arguments import TrainingArguments

    model, data, run = parse(pairs, (ModelArguments, DataArguments, TrainingArguments), problems)
    if str(run["resume_from_checkpoint"]).lower() in ("false", "no", "none", "0"):
        run["resume_from_checkpoint"] = None
    problems += check(model, data, run, has_gpu)
    adapt_to_hardware(run, has_gpu, processes, notes)
    for line in notes:
        say(f"note: {line}")
    if not problems:
        try:
            args = TrainingArguments(**run)
        except (ValueError, ImportError, OSError) as error:
            problems.append(str(error))
    if problems:
        listed = "\n".join(f"  {number}. {text}" for number, text in enumerate(problems, start=1))
        raise UserError(f"{len(problems)} problem{'s' * (len(problems) > 1)} with this run:\n{listed}")
    if processes == 1 and args.n_gpu > 1:
        # Trainer would fall back on DataParallel, which is slow and cannot split rows that stand end to end.
        say(f"note: one process trains on one of {args.n_gpu} GPUs; torchrun --nproc_per_node={args.n_gpu} takes all")
        args._n_gpu = 1
    if args.fsdp and not has_gpu:
        cpu_cluster.present_processes_as_devices()
    return ModelArguments(**model), DataArguments(**data), args


def adapt_to_hardware(run: dict[str, Any], has_gpu: bool, processes: int, notes: list[str]) -> None:
    """Changes `run` into what this machine can do, and Trainer's defaults into what this project means by them."""
    import torch

    if not has_gpu:
        run["use_cpu"] = True
        run["dataloader_pin_memory"] = False
        if run["bf16"] and not cpu_has_bf16():
            notes.append("--bf16 True: this CPU has no bfloat16 instructions and would be slower; computing in float32")
            run["bf16"] = False
    elif run["bf16"] and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        notes.append("--bf16 True: this GPU has no bfloat16 (it is older than Ampere); computing in fp16 instead")
        run["bf16"], run["fp16"] = False, True
    if run["tf32"] and has_gpu and not (
        torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8
    ):  # fmt: skip
        notes.append("--tf32 True: this GPU has no TF32; computing without")
        run["tf32"] = None
    run["fsdp"] = is_true([str(run["fsdp"])])
    if run["fsdp"]:
        config = run["fsdp_config"] or {}
        config = read_mapping(config, "--fsdp_config") if isinstance(config, str) else dict(config)
        # One full copy while loading, and each rank writes its own shard of a checkpoint: nobody gathers 84 GB.
        config.setdefault("cpu_ram_efficient_loading", True)
        config.setdefault("state_dict_type", "SHARDED_STATE_DICT")
        if not has_gpu and config.pop("cpu_offload", config.pop("fsdp_cpu_offload", False)):
            notes.append("FSDP's offload is left out: without a GPU the weights are in the CPU's memory already")
        if not has_gpu and int(config.get("version", 2)) == 1:
            notes.append("FSDP1 needs GPUs: these CPU processes shard with FSDP2, to the same losses")
            config["version"] = 2
        run["fsdp_config"] = config
        if has_gpu:
            # What accelerate's own launcher sets, so that tensors offloaded to the CPU get a gloo group beside NCCL.
            os.environ["ACCELERATE_USE_FSDP"] = "true"
            os.environ["FSDP_OFFLOAD_PARAMS"] = str(bool(config.get("cpu_offload"))).lower()
    if run["deepspeed"] and processes == 1:
        # DeepSpeed looks for a process group even where there is one process.
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
            os.environ.setdefault(name, value)
        os.environ.setdefault("MASTER_PORT", str(free_port()))
    run["logging_nan_inf_filter"] = False  # the trainer stops on a loss that is not finite, and names the rows
    if run["ddp_find_unused_parameters"] is None:
        run["ddp_find_unused_parameters"] = False  # every weight of these models takes part in each step
    run["remove_unused_columns"] = False  # the rows hold nothing else


def cpu_has_bf16() -> bool:
    import torch

    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
