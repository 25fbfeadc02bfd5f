"""TrainingArguments, and a command line's values made ready for this machine: what its hardware lacks is replaced.

Not a command; train.py uses it.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy

from alpaca.common.cores import CORES
from alpaca.common.ports import free_port
from alpaca.training import internals
from alpaca.training.arguments import DataArguments, ModelArguments, RunArguments, is_true, read_mapping
from alpaca.training.checks import CommandLine, is_installed, refuse


@dataclasses.dataclass
class TrainingArguments(RunArguments, transformers.TrainingArguments):
    """transformers.TrainingArguments and the fields of arguments.RunArguments, whose defaults win."""


def arguments_for_this_machine(line: CommandLine, say=print) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """The arguments of a checked command line. Settings that the hardware lacks are replaced and said so.

    Raises UserError for what cannot be replaced. Starts the process group where torchrun started this process.
    """
    run = dict(line.run)
    has_gpu = torch.accelerator.is_available() and not run["use_cpu"]
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    refuse(missing_hardware(line, has_gpu))
    if not has_gpu:
        if run["deepspeed"]:
            internals.prepare_deepspeed_on_cpu()
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(sensible_threads(int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    notes = adapt_to_hardware(run, has_gpu)
    set_defaults(run, has_gpu, notes)
    for note in notes:
        say(f"note: {note}")
    if run["deepspeed"] and processes == 1:
        # DeepSpeed looks for a process group even where there is one process.
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
            os.environ.setdefault(name, value)
        os.environ.setdefault("MASTER_PORT", str(free_port()))
    try:
        args = TrainingArguments(**run)
    except (ValueError, ImportError, OSError) as error:
        refuse([str(error)])
    if processes == 1 and args.n_gpu > 1:
        say(f"note: one process trains on one of {args.n_gpu} GPUs; torchrun --nproc_per_node={args.n_gpu} takes all")
        internals.use_one_gpu(args)
    if args.fsdp and (args.bf16 or args.fp16):
        args.fsdp_plugin_args["mixed_precision_policy"] = fsdp_precision(args)
    if args.fsdp and not has_gpu:
        internals.present_processes_as_devices()
    return ModelArguments(**line.model), DataArguments(**line.data), args


def missing_hardware(line: CommandLine, has_gpu: bool) -> list[str]:
    problems = []
    if line.model["qlora"] and not has_gpu:
        problems.append("--qlora needs an NVIDIA GPU; without one use --lora_r 8 alone")
    if line.run["fp16"] and not has_gpu:
        problems.append("--fp16 needs a GPU (a CPU has no loss scaling): leave it out, or use --bf16 True")
    return problems


def adapt_to_hardware(run: dict[str, Any], has_gpu: bool) -> list[str]:
    """Changes `run` into what this machine can do; returns a note for each change."""
    notes = []
    cuda = torch.cuda.is_available()
    if run["bf16"] and not has_gpu and not internals.cpu_has_bf16():
        notes.append("--bf16 True: this CPU has no bfloat16 instructions and would be slower; computing in float32")
        run["bf16"] = False
    elif run["bf16"] and has_gpu and cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        notes.append("--bf16 True: this GPU has no bfloat16 (it is older than Ampere); computing in fp16 instead")
        run["bf16"], run["fp16"] = False, True
    if run["tf32"] and not has_gpu:
        notes.append("--tf32 True needs an NVIDIA GPU (Ampere or newer); this CPU computes in float32")
        run["tf32"] = None
    elif run["tf32"] and not (cuda and torch.cuda.get_device_capability()[0] >= 8):
        notes.append("--tf32 True: this GPU has no TF32; computing without")
        run["tf32"] = None
    if run["tf32"] is None and has_gpu and cuda and torch.cuda.get_device_capability()[0] >= 8:
        notes.append("float32 products are computed in TF32; in full: --tf32 False")
        run["tf32"] = True
    if run["use_liger_kernel"] and not has_gpu:
        notes.append("--use_liger_kernel True: its kernels run on GPUs alone; this CPU goes on with torch's")
        run["use_liger_kernel"] = False
    elif run["use_liger_kernel"] is None:
        # Where it was asked for nowhere: not beside ZeRO-3, which gathers the head's weights for the head's own call,
        # nor beside torch.compile, which fuses the same operations.
        alone = not run["deepspeed"] and not run["torch_compile"] and not run["torch_compile_backend"]
        run["use_liger_kernel"] = has_gpu and cuda and alone and is_installed("liger_kernel")
        if run["use_liger_kernel"]:
            notes.append("Liger's kernels are used; without: --use_liger_kernel False")
    return notes


def set_defaults(run: dict[str, Any], has_gpu: bool, notes: list[str]) -> None:
    """Sets in `run` what this project means by Trainer's defaults."""
    if not has_gpu:
        run["use_cpu"] = True
        run["dataloader_pin_memory"] = False
    run["fsdp"] = is_true([str(run["fsdp"])])
    if run["fsdp"]:
        run["fsdp_config"] = fsdp_settings(run["fsdp_config"] or {}, has_gpu, notes)
        # Between micro-batches FSDP would keep every gradient whole, in float32: 27 GB a process at 7B.
        config = run["accelerator_config"] or {}
        config = read_mapping(config, "--accelerator_config") if isinstance(config, str) else dict(config)
        config.setdefault("gradient_accumulation_kwargs", {"sync_each_batch": True})
        run["accelerator_config"] = config
    run["logging_nan_inf_filter"] = False  # the trainer stops on a loss that is not finite, and names the rows
    if run["ddp_find_unused_parameters"] is None:
        run["ddp_find_unused_parameters"] = False  # every weight of these models takes part in each step
    run["remove_unused_columns"] = False  # the collators take what they need


def fsdp_settings(given: str | dict[str, Any], has_gpu: bool, notes: list[str]) -> dict[str, Any]:
    config = read_mapping(given, "--fsdp_config") if isinstance(given, str) else given
    config = {name.removeprefix("fsdp_"): value for name, value in config.items()}
    # One full copy while loading, and each rank writes its own shard of a checkpoint: nobody gathers 84 GB.
    config.setdefault("cpu_ram_efficient_loading", True)
    config.setdefault("state_dict_type", "SHARDED_STATE_DICT")
    if has_gpu:
        # What accelerate's own launcher sets, so that tensors offloaded to the CPU get a gloo group beside NCCL.
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        os.environ["FSDP_OFFLOAD_PARAMS"] = str(bool(config.get("cpu_offload"))).lower()
        return config
    if config.pop("cpu_offload", False):
        notes.append("FSDP's offload is left out: without a GPU the weights are in the CPU's memory already")
    if int(config.get("version", 2)) == 1:
        notes.append("FSDP1 needs GPUs: these CPU processes shard with FSDP2, to the same losses")
        config["version"] = 2
    return config


def fsdp_precision(args: TrainingArguments) -> Any:
    """16-bit weights in the computation, gradients summed in float32, a loss that nothing rounds to 16 bits.

    accelerate's own policy does all three in 16 bits.
    """
    half = torch.bfloat16 if args.bf16 else torch.float16
    if args.fsdp_plugin_args["fsdp_version"] == 1:
        return MixedPrecision(param_dtype=half, reduce_dtype=torch.float32, buffer_dtype=torch.float32)
    return MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)


def sensible_threads(processes_here: int) -> int:
    """Compute threads for one of `processes_here` processes: the cores that this container may really use, shared.

    Reads the affinity mask and the cgroup's CPU quota; torch looks at the machine's cores alone, and 64 threads on a
    quota of 2 are many times slower than 2.
    """
    cores = float(CORES)
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        limit, period = quota.read_text().split()
        if limit != "max":
            cores = min(cores, int(limit) / int(period))
    return max(1, int(cores) // processes_here)
