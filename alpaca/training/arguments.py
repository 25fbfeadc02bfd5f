"""train.py's command line as plain values: flags, YAML or JSON run files, the spellings of 2023.

Not a command; `python train.py --help` prints what is declared here. Neither torch nor transformers is imported, so
that help and a refused command line come at once.
"""

import ast
import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from alpaca.common.errors import UserError, did_you_mean

TRUNCATIONS = ("cut", "cut_eos", "drop")
DEFAULT_PAD_TOKEN = "[PAD]"  # added where the base's tokenizer has no padding token


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
        None,
        "Attention kernel. Default: flash_attention_2 on a GPU where it is installed, else torch's varlen or sdpa.",
    )
    pad_to_multiple_of: int | None = flag(
        None, "Rounds the embedding's rows up to this multiple (64 is fast on GPUs). Default: LLaMA's faithful 32,001."
    )
    lora_r: int = flag(0, "Rank of LoRA adapters; 0 trains every weight.")
    lora_alpha: int | None = flag(None, "Scale of the adapters. Default: twice the rank.")
    lora_dropout: float = flag(0.05, "Dropout before the adapters.")
    lora_target_modules: str | None = flag(
        None,
        "Layers with adapters: names with commas between, or all-linear. Default: query, key and value.",
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
    sample_tasks: str | None = flag(
        None, "Files of tasks that the model answers at each evaluation and at the end, in log, tracker and report."
    )
    max_train_samples: int | None = flag(None, "Trains on the first so many rows only.")
    truncation: str = flag(
        "cut", "Rows longer than model_max_length: cut (as the original, no EOS), cut_eos (EOS stays last) or drop."
    )
    padding_free: bool = flag(
        True, "Rows of a batch stand end to end, with no padding between; same loss. False: padded batches of 2023."
    )
    data_cache_dir: str | None = flag(None, "Where tokenised data are kept. Default: ~/.cache/alpaca_tokens.")
    preprocessing_workers: int | None = flag(
        None, "Processes that tokenise. Default: one, whose tokenizer uses all cores."
    )


@dataclasses.dataclass
class RunArguments:
    """This project's additions to transformers.TrainingArguments, and the defaults that differ from its."""

    cache_dir: str | None = flag(None, "Where downloaded models are kept. Default: the Hugging Face cache.")
    optim: str = flag("adamw_torch_fused", "Optimizer. adamw_torch: AdamW without its fused kernel.")
    tf32: bool | None = flag(
        None, "TF32 for float32 products. Default: on GPUs that have it (Ampere or newer); False: full float32."
    )
    use_liger_kernel: bool | None = flag(
        None, "Liger's fused norms, rotary embedding and loss. Default: on NVIDIA GPUs where liger_kernel is installed."
    )
    torch_compile: bool = flag(
        False, "Compiles each layer by itself, for batches of any length: minutes at the start, faster steps."
    )
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
    "torch_dtype": "dtype",
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


TRUE, FALSE = ("true", "1", "yes", "y", "t", "on"), ("false", "0", "no", "n", "f", "off")


def is_true(values: Sequence[str]) -> bool:
    return not values or values[0].lower() in TRUE


def modernise(pairs: list[tuple[str, list[str]]], processes: int, notes: list[str], problems: list[str]):
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
        elif name == "fsdp" and value.lower() not in ("", *TRUE, *FALSE):
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
            modern.append(("fsdp", ["False" if values else "True"]))  # --fsdp "" was the way to say no
        elif name == "fsdp_transformer_layer_cls_to_wrap":
            notes.append(
                f"--fsdp_transformer_layer_cls_to_wrap {value} is found from the model; to override it: "
                f'--fsdp_config \'{{"transformer_layer_cls_to_wrap": ["{value}"]}}\''
            )
            fsdp_config["transformer_layer_cls_to_wrap"] = [part.strip() for part in value.split(",")]
        elif name == "fsdp_min_num_params":
            notes.append(f"--fsdp_min_num_params {value} is now a key of --fsdp_config")
            if value.isdecimal():
                fsdp_config |= {"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": int(value)}
            else:
                problems.append(f"--fsdp_min_num_params {value}: expected a whole number")
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
    if text.lstrip().startswith("{"):
        with contextlib.suppress(ValueError):
            return json.loads(text)  # before YAML, which reads 1e-5 as a text
    else:
        path = Path(text)
        if not path.is_file():
            hint = did_you_mean(path.name, [p.name for p in path.parent.glob("*.*")], f"{path.parent}/")
            raise UserError(f"{what}: no file {text}.{hint}")
        text = path.read_text(encoding="utf-8")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{what} is not valid YAML or JSON: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise UserError(f"{what}: expected names and values, found {type(value).__name__}")
    return value


def named_paths(value: str | None) -> list[str]:
    """The files, folders or data sets that a flag's value names: one, or several with commas between."""
    if value and Path(value).is_file():
        return [value]
    return [part.strip() for part in (value or "").split(",") if part.strip()]


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


class Flag(NamedTuple):
    kind: str  # the type annotation, as written
    default: Any
    help: str


def own_flags(cls: type) -> dict[str, Flag]:
    """The flags that a dataclass above declares."""
    return {
        field.name: Flag(
            field.type.__name__ if isinstance(field.type, type) else str(field.type),
            field.default,
            field.metadata["help"],
        )
        for field in dataclasses.fields(cls)
    }


@functools.cache
def trainer_flags() -> dict[str, Flag]:
    """The fields of transformers.TrainingArguments, read from its source file: importing the class imports torch.

    A default that is computed there is None here.
    """
    (package,) = importlib.util.find_spec("transformers").submodule_search_locations
    tree = ast.parse((Path(package) / "training_args.py").read_text(encoding="utf-8"))
    (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments")
    flags = {}
    for node in body:
        if isinstance(node, ast.AnnAssign) and not node.target.id.startswith("_"):
            given = {keyword.arg: keyword.value for keyword in node.value.keywords}
            about = given.get("metadata", ast.Dict([], []))
            about = {key.value: value for key, value in zip(about.keys, about.values, strict=True)}
            default = [] if "default_factory" in given else literal(given.get("default"))
            flags[node.target.id] = Flag(ast.unparse(node.annotation), default, literal(about.get("help")) or "")
    return flags


def literal(node: ast.expr | None) -> Any:
    """The value of a literal in source code, None for anything else."""
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return None


def all_flags() -> tuple[dict[str, Flag], ...]:
    """Those of ModelArguments, of DataArguments, and of TrainingArguments with this project's additions."""
    return own_flags(ModelArguments), own_flags(DataArguments), trainer_flags() | own_flags(RunArguments)


def read_value(kind: str, words: Sequence[str]) -> Any:
    """The value that `words` stand for under the type annotation `kind`; raises ValueError where they are none."""
    types = {part.strip() for part in kind.split("|")}
    if "bool" in types and (not words or len(words) == 1):
        if not words or words[0].lower() in TRUE + FALSE:
            return is_true(words)
        if not types - {"bool", "None"}:
            raise ValueError(f"{words[0]!r} is neither True nor False")
    if any(part.startswith("list") for part in types) and words:
        return list(words) if len(words) > 1 or not types & {"str"} else words[0]
    if len(words) != 1:
        raise ValueError(f"{' '.join(words)!r} is one value too many" if words else "a value is missing")
    if any(part.startswith("dict") for part in types) and words[0].lstrip().startswith("{"):
        return read_mapping(words[0], "the text")
    for name, read, what in (("int", int, "a whole number"), ("float", float, "a number")):
        if name in types:
            try:
                return read(words[0])
            except ValueError as error:
                raise ValueError(f"{words[0]!r} is not {what}") from error
    return words[0]


def parse(pairs: list[tuple[str, list[str]]], problems: list[str]) -> tuple[dict[str, Any], ...]:
    """Values of all flags: the model's, the data's, the run's; of a flag typed twice the last one holds.

    Unknown flags and unreadable values are added to `problems`.
    """
    groups = all_flags()
    values = tuple({name: flag.default for name, flag in group.items()} for group in groups)
    known = [name for group in groups for name in group]
    for name, words in pairs:
        if name.startswith("no_") and name not in known and not words:  # --no_padding_free
            name, words = name.removeprefix("no_"), ["False"]
        place = next((i for i, group in enumerate(groups) if name in group), None)
        if place is None:
            problems.append(f"no flag --{name}.{did_you_mean(name, known, '--')}")
            continue
        try:
            values[place][name] = read_value(groups[place][name].kind, words)
        except ValueError as error:
            problems.append(f"--{name}: {error}")
    return values


def print_help(everything: bool) -> None:
    """The project's own flags; with `everything` all settings of the Trainer too."""
    print(f"usage: {Path(sys.argv[0]).name} [RUN.yaml] [--flag value ...]\n")
    groups = {cls.__doc__.splitlines()[0]: own_flags(cls) for cls in (ModelArguments, DataArguments, RunArguments)}
    if everything:
        groups["The other settings of transformers.TrainingArguments."] = {
            name: flag for name, flag in trainer_flags().items() if name not in own_flags(RunArguments)
        }
    for title, flags in groups.items():
        print(title)
        for name, flag in flags.items():
            shown = "" if flag.default in (None, False, []) else f" [{flag.default}]"
            print(f"  --{name:<24} {' '.join(flag.help.split())}{shown}")
        print()
    if not everything:
        print("Every setting of transformers.TrainingArguments is a flag too: `train.py --help all` lists them.")
