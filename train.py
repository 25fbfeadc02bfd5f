"""Fine-tunes a causal language model on instruction data, as Stanford Alpaca did; any size, on one CPU or a cluster.

Full scale, as in 2023 (four GPUs of 80 GB, batch 128), then the same by run file:

    torchrun --nproc_per_node=4 train.py --model_name_or_path huggyllama/llama-7b --data_path ./alpaca_data.json \\
        --bf16 True --output_dir output/alpaca-7b --num_train_epochs 3 --per_device_train_batch_size 4 \\
        --gradient_accumulation_steps 8 --learning_rate 2e-5 --weight_decay 0. --warmup_steps 0.03 \\
        --lr_scheduler_type cosine --logging_steps 1 --fsdp True --tf32 True
    torchrun --nproc_per_node=4 train.py configs/llama_7b.yaml

One minute on a CPU (BASE: any small checkpoint, such as the one that local_llm.py exports):

    python train.py configs/quickstart_cpu.yaml --model_name_or_path BASE --output_dir output/try --max_steps 4
"""

import contextlib
import os
import sys
from pathlib import Path

from alpaca.common.errors import UserError
from alpaca.common.files import is_inside, jdump
from alpaca.common.prompt import PROMPT_DICT as PROMPT_DICT
from alpaca.common.run_record import run_record
from alpaca.training.arguments import DataArguments as DataArguments
from alpaca.training.arguments import ModelArguments as ModelArguments
from alpaca.training.model import DEFAULT_PAD_TOKEN as DEFAULT_PAD_TOKEN
from alpaca.training.model import smart_tokenizer_and_embedding_resize as smart_tokenizer_and_embedding_resize

# Names that other code imports from here: those written "as" above, and the ones below.
IGNORE_INDEX = -100

# Where names that need torch or transformers live: importing train stays cheap, and they come when asked for.
_LATE = {
    "TrainingArguments": "alpaca.training.training_arguments",
    "DataCollatorForSupervisedDataset": "alpaca.training.data",
    "SupervisedDataset": "alpaca.training.data",
    "make_supervised_data_module": "alpaca.training.data",
    "preprocess": "alpaca.training.data",
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
    from alpaca.training.arguments import read_arguments

    model_args, data_args, args = read_arguments(sys.argv[1:] if argv is None else argv, say)

    from alpaca.training import data as train_data
    from alpaca.training import report as train_report
    from alpaca.training.checkpoint import nothing_lost, to_resume_from
    from alpaca.training.memory import memory_estimate, memory_table
    from alpaca.training.model import check_wrap_class, load_config, load_model, load_tokenizer

    # ---- what to start from ------------------------------------------------------------------------------------------
    resume = to_resume_from(args.resume_from_checkpoint, args.output_dir, say)
    if args.resume_from_checkpoint:
        say(f"resuming from {resume}" if resume else f"no finished checkpoint in {args.output_dir}: starting anew")
    config = load_config(model_args.model_name_or_path, args.cache_dir)
    check_wrap_class(config, args.fsdp_config)
    tokenizer = load_tokenizer(model_args.model_name_or_path, args.model_max_length, args.cache_dir)

    # ---- data --------------------------------------------------------------------------------------------------------
    with args.main_process_first(desc="tokenisation"):
        train_set, eval_set = load_data(data_args, args, tokenizer)
    if args.process_index == 0:
        say(train_data.describe_example(train_set[0], tokenizer), "\n")
        say(train_report.dataset_statistics(train_set), "\n")
        try:
            say(memory_table(memory_estimate(config, args, model_args, data_args.padding_free)), "\n")
        except Exception as error:  # some models' code does not run on tensors without values; training goes on
            say(f"note: no memory estimate for {config.model_type}: {type(error).__name__}: {error}\n")
    if args.dry_run:
        return

    # ---- training ----------------------------------------------------------------------------------------------------
    settings = {**vars(model_args), **vars(data_args), **args.to_sanitized_dict()}
    inputs = [path for path in (data_args.data_path, data_args.eval_data_path) if path]
    with recorded(args, settings, inputs), nothing_lost(args.output_dir, say):
        say(check_disk_space(config, model_args, args, len(train_set)))
        # A checkpoint in there that the run goes on from is not given up.
        goes_on = resume and is_inside(resume, args.output_dir)
        if args.overwrite and args.should_save and not goes_on:
            clear_result(args.output_dir)
        model = load_model(model_args, args, tokenizer, say)
        trainer, stop = make_trainer(model, tokenizer, model_args, data_args, args, train_set, eval_set)
        trainer.train(resume_from_checkpoint=resume)
        if stop.stopped:
            raise Stopped
        save(trainer, tokenizer, config, model_args, args)
        if args.process_index == 0:
            card = train_report.model_card(model_args.model_name_or_path, inputs, settings, trainer.report.final)
            jdump(card, Path(args.output_dir) / "README.md")


def load_data(data_args, args, tokenizer):
    """(tokenised training rows, tokenised held-out rows or None)."""
    from alpaca.training import data as train_data

    rows = train_data.load_rows(data_args.data_path, data_args.max_train_samples)
    held_out = None
    if data_args.eval_data_path:
        held_out = train_data.load_rows(data_args.eval_data_path)
        known = {(row["instruction"], row["input"]) for row in held_out}
        seen, rows = len(rows), [row for row in rows if (row["instruction"], row["input"]) not in known]
        if len(rows) < seen:
            say(f"{seen - len(rows)} rows of --data_path are in --eval_data_path too and are not trained on")
    elif data_args.val_size:
        rows, held_out = train_data.split_validation(rows, data_args.val_size, args.seed)
    how = dict(
        max_length=args.model_max_length, truncation=data_args.truncation, cache_dir=data_args.data_cache_dir,
        num_proc=data_args.preprocessing_workers,
    )  # fmt: skip
    train_set = train_data.tokenize_dataset(rows, tokenizer, **how)
    return train_set, train_data.tokenize_dataset(held_out, tokenizer, **how) if held_out else None


def make_trainer(model, tokenizer, model_args, data_args, args, train_set, eval_set):
    """(trainer, the callback that knows whether a signal ended training)."""
    from alpaca.training.data import PaddedCollator
    from alpaca.training.report import ReportCallback
    from alpaca.training.trainer import HeldOutLoss, SayShards, SealCheckpoints, StopOnSignal, SupervisedTrainer

    collator = padding_free_collator(model, args) if data_args.padding_free else None
    collator = collator or PaddedCollator(tokenizer.pad_token_id)
    # Old checkpoints go when the new one is sealed, not before: a kill in between must leave one.
    keep, args.save_total_limit = args.save_total_limit, None
    trainer = SupervisedTrainer(
        model=model, args=args, train_dataset=train_set, eval_dataset=eval_set, data_collator=collator,
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.report = ReportCallback(trainer, train_set.report, adapters=bool(model_args.lora_r or model_args.qlora))
    stop = StopOnSignal(trainer)
    for callback in (SayShards(), HeldOutLoss(trainer), SealCheckpoints(trainer, keep), trainer.report, stop):
        trainer.add_callback(callback)
    return trainer, stop


def padding_free_collator(model, args):
    """Batches without padding for `model`, whose attention becomes one that does no work between their rows.

    None, and a note, where that attention cannot be had. The mask that transformers would build from restarting
    positions is no way out: not every model hands them to it, and OPT's rows then see each other.
    """
    from alpaca.training import attention as row_attention
    from alpaca.training.data import PaddingFreeCollator, takes_logits_to_keep

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    flash = base.config._attn_implementation.startswith("flash_attention")
    if flash:
        return PaddingFreeCollator(takes_logits_to_keep(base), flash_attention=True)
    # torch.compile would make its code anew for each batch's row lengths.
    if args.torch_compile or base.config._attn_implementation != "sdpa":
        say("note: batches are padded: without flash attention, padding-free ones need sdpa and no --torch_compile")
    elif not row_attention.fits(base, args.model_max_length):
        say(f"note: batches are padded: not every layer of {type(base).__name__} is plain causal attention over a row")
    else:
        base.set_attn_implementation(row_attention.register())
        return PaddingFreeCollator(takes_logits_to_keep(base), row_attention=True)
    return None


def check_disk_space(config, model_args, args, rows: int) -> str:
    import math

    from alpaca.training.checkpoint import check_disk
    from alpaca.training.model import empty_model

    parameters = empty_model(config).num_parameters()
    trainable = parameters // 100 if model_args.lora_r or model_args.qlora else parameters
    per_step = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    steps = args.max_steps if args.max_steps > 0 else math.ceil(rows / per_step * args.num_train_epochs)
    strategy, every = args.save_strategy.value, args.save_steps
    saves = {"no": 0, "epoch": math.ceil(args.num_train_epochs)}.get(strategy)
    if saves is None:
        saves = math.ceil(steps / (every if every >= 1 else every * steps))
    save_bytes = 4 if args.save_dtype == "float32" else 2
    return check_disk(args.output_dir, parameters, save_bytes, saves, args.save_total_limit, trainable)


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
    import shutil

    from alpaca.training.checkpoint import checkpoints

    for folder in checkpoints(output_dir):
        shutil.rmtree(folder)
    for pattern in ("*.safetensors", "*.safetensors.index.json", "checksums.json", "config.json", "train_log.jsonl"):
        for file in Path(output_dir).glob(pattern):
            file.unlink()


def save(trainer, tokenizer, config, model_args, args) -> None:
    """Gathers the weights on the first process's CPU, writes them and reads them back (checkpoint.write_verified)."""
    import torch

    from alpaca.common.prompt import alpaca_chat_template
    from alpaca.training.checkpoint import gather_weights, write_verified
    from alpaca.training.model import merge_adapters

    # Chat servers then feed the checkpoint what it was trained on.
    adds_bos = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    tokenizer.chat_template = alpaca_chat_template(adds_bos)
    base = config.dtype or torch.float32
    dtype = base if args.save_dtype == "auto" else getattr(torch, args.save_dtype)
    probe = torch.from_numpy(trainer.train_dataset[0]["input_ids"][None, :64])
    expected = trainer.probe_logits(probe)
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    weights = gather_weights(
        trainer.model_wrapped, trainer.accelerator, torch.float32 if model_args.merge_lora else dtype
    )
    if args.process_index == 0:
        if model_args.merge_lora:
            model, weights = merge_adapters(model, weights, dtype)
        coarse = args.bf16 or args.fp16 or args.tf32 or dtype != torch.float32
        coarse = coarse or model_args.dtype not in ("float32", "auto")
        # Adapters of a 4-bit base are opened on the whole one, which 4 bits are no fine copy of.
        rounding = 0.5 if model_args.qlora else 5e-2 if coarse else 1e-3
        done = write_verified(model, weights, dtype, tokenizer, args.output_dir, probe, expected, rounding)
        say(
            f"saved to {args.output_dir} in {done['dtype']}: {done['files']} files, {done['bytes'] / 1e9:.2f} GB; read "
            f"back, every tensor as in memory, logits within {done['difference']:.1e} of the trained model's"
        )
    trainer.accelerator.wait_for_everyone()
    trainer.save_state()


class Stopped(KeyboardInterrupt):
    """SIGTERM came, and a checkpoint was saved."""


def main() -> int:
    """train() as a command: status 0; 2 for what the user can put right; 130 after Ctrl-C; 143 after SIGTERM."""
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
