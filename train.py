"""Fine-tunes a causal language model on instruction data, as Stanford Alpaca did; any size, on one CPU or a cluster.

Full scale, as in 2023 (four GPUs of 80 GB, batch 128), then the same by run file:

    torchrun --nproc_per_node=4 train.py --model_name_or_path huggyllama/llama-7b --data_path ./alpaca_data.json \\
        --bf16 True --output_dir output/alpaca-7b --num_train_epochs 3 --per_device_train_batch_size 4 \\
        --gradient_accumulation_steps 8 --learning_rate 2e-5 --weight_decay 0. --warmup_steps 0.03 \\
        --lr_scheduler_type cosine --logging_steps 1 --fsdp True --tf32 True
    torchrun --nproc_per_node=4 train.py configs/llama_7b.yaml

One minute on a CPU (BASE: any small checkpoint, such as the one that local_llm.py exports):

    python train.py configs/quickstart_cpu.yaml --model_name_or_path BASE --output_dir output/try --max_steps 4

Whether a result and its checkpoints are still as they were written:

    python train.py verify output/try
"""

import contextlib
import os
import shutil
import sys
from pathlib import Path

from alpaca.common.errors import UserError, cli_errors
from alpaca.common.files import is_inside
from alpaca.common.prompt import IGNORE_INDEX as IGNORE_INDEX
from alpaca.common.prompt import PROMPT_DICT as PROMPT_DICT
from alpaca.common.run_record import run_record
from alpaca.training.arguments import DEFAULT_PAD_TOKEN as DEFAULT_PAD_TOKEN
from alpaca.training.arguments import DataArguments as DataArguments
from alpaca.training.arguments import ModelArguments as ModelArguments
from alpaca.training.arguments import named_paths
from alpaca.training.checkpoint import (
    UNVERIFIED,
    changed_batch,
    check_disk,
    checkpoint_to_resume,
    checkpoints,
    nothing_lost,
    verify,
    without_optimizer,
)
from alpaca.training.checks import read_command_line

# Names that other code imports from here: those written "as" above, and these, which need torch, on demand.
_LATE = {
    "TrainingArguments": "alpaca.training.training_arguments",
    "DataCollatorForSupervisedDataset": "alpaca.training.data",
    "SupervisedDataset": "alpaca.training.data",
    "make_supervised_data_module": "alpaca.training.data",
    "preprocess": "alpaca.training.data",
    "smart_tokenizer_and_embedding_resize": "alpaca.training.model",
}


def __getattr__(name: str):
    if name in _LATE:
        import importlib

        return getattr(importlib.import_module(_LATE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def say(*parts: str) -> None:
    """Prints once a job, however many processes it has."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(*parts, flush=True)


def train(argv: list[str] | None = None) -> None:
    """Runs train.py's command line `argv` (default: sys.argv). Raises UserError for what the user can put right."""
    line = read_command_line(sys.argv[1:] if argv is None else argv, say)

    from alpaca.training.card import describe
    from alpaca.training.data import describe_example, load_data
    from alpaca.training.hub import HubRepository
    from alpaca.training.memory import checkpoint_bytes, memory_estimate, memory_table, saved_itemsize
    from alpaca.training.model import check_wrap_class, empty_model, load_config, load_model, load_tokenizer
    from alpaca.training.report import dataset_statistics
    from alpaca.training.saving import on_first_process, save
    from alpaca.training.trainer import make_trainer
    from alpaca.training.training_arguments import arguments_for_this_machine

    # ---- what to start from ------------------------------------------------------------------------------------------
    model_args, data_args, args = arguments_for_this_machine(line, say)
    resume = checkpoint_to_resume(args.resume_from_checkpoint, args.output_dir, say)
    if args.resume_from_checkpoint:
        say(f"resuming from {resume}" if resume else f"no finished checkpoint in {args.output_dir}: starting anew")
        for note in (changed_batch(resume, args), without_optimizer(resume)) if resume else ():
            if note:
                say(note)
    config = load_config(model_args.model_name_or_path, args.cache_dir)
    check_wrap_class(config, args.fsdp_config if args.fsdp else None)
    tokenizer = load_tokenizer(model_args.model_name_or_path, args.model_max_length, args.cache_dir)

    # ---- data --------------------------------------------------------------------------------------------------------
    with args.main_process_first(desc="tokenisation"):
        train_set, eval_set, counts = load_data(data_args, args.model_max_length, args.seed, tokenizer, say)
    if args.process_index == 0:
        say(describe_example(train_set[0], tokenizer), "\n")
        say(dataset_statistics(train_set, counts), "\n")
        try:
            say(memory_table(memory_estimate(config, args, model_args, data_args.padding_free)), "\n")
        except Exception as error:  # some models' code does not run on tensors without values; training goes on
            say(f"note: no memory estimate for {config.model_type}: {type(error).__name__}: {error}\n")
    if args.dry_run:
        return

    # ---- training ----------------------------------------------------------------------------------------------------
    settings = {**vars(model_args), **vars(data_args), **args.to_sanitized_dict()}
    data_paths = named_paths(data_args.data_path)
    inputs = data_paths + named_paths(data_args.eval_data_path) + named_paths(data_args.sample_tasks)
    hub = HubRepository(args, say)
    with recorded(args, settings, inputs), nothing_lost(args.output_dir, say):
        parameters = empty_model(config).num_parameters()
        trained = parameters // 100 if model_args.lora_r or model_args.qlora else parameters
        final = (parameters if model_args.merge_lora else trained) * saved_itemsize(config, args)
        say(check_disk(args, final, checkpoint_bytes(config, args, model_args, trained), len(train_set)))
        model = load_model(model_args, args, tokenizer, say)
        trainer, stop = make_trainer(model, tokenizer, model_args, data_args, args, train_set, eval_set, counts, say)
        # Only now that the new run can begin; and a checkpoint in there that it goes on from is not given up.
        goes_on = resume and is_inside(resume, args.output_dir)
        if args.overwrite and args.should_save and not goes_on:
            clear_result(args.output_dir)
        trainer.train(resume_from_checkpoint=resume)
        if stop.stopped:
            raise Stopped
        save(trainer, tokenizer, config, model_args, args, say)
        if args.process_index == 0:
            describe(
                args.output_dir, model_args.model_name_or_path, data_paths, settings, trainer.report.final, tokenizer
            )
    on_first_process(args, hub.push)


@contextlib.contextmanager
def recorded(args, settings, inputs):
    """run.json in the output folder, by the first process alone."""
    if args.process_index == 0:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        with run_record(args.output_dir, settings, inputs) as record:
            yield record
    else:
        yield {}


def clear_result(output_dir: str) -> None:
    """Removes what an earlier run left in `output_dir`, and nothing that no run writes."""
    for folder in checkpoints(output_dir):
        shutil.rmtree(folder)
    shutil.rmtree(Path(output_dir) / UNVERIFIED, ignore_errors=True)
    weights = ("*.safetensors", "*.safetensors.index.json", "checksums.json", "config.json", "adapter_config.json")
    for pattern in (*weights, "Modelfile", "train_log.jsonl", "sample_answers.jsonl"):
        for file in Path(output_dir).glob(pattern):
            file.unlink()


class Stopped(KeyboardInterrupt):
    """SIGTERM came, and a checkpoint was saved."""


def main() -> int:
    """train() as a command: status 0; 2 for what the user can put right; 130 after Ctrl-C; 143 after SIGTERM."""
    if sys.argv[1:2] == ["verify"]:
        with cli_errors():
            if len(sys.argv) != 3:
                raise UserError("usage: python train.py verify OUTPUT_DIR")
            return verify(sys.argv[2])
    try:
        train()
    except UserError as error:
        # Every process finds what is wrong with a command line or a file; it is said once.
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped:
        say("stopped by SIGTERM after saving; --resume_from_checkpoint auto goes on from there")
        leave_together()
        return 143
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    leave_together()
    return 0


def leave_together() -> None:
    """Ends the process group when all are done: a launcher takes the first one that leaves as the end of all."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
