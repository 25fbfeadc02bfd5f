"""transformers' Trainer, with a loss that is watched, held-out loss exact to the token, and saves that survive a kill.

Not a command; train.py uses it. Loop, sharding, precision, resuming are Trainer's.
"""

import inspect
import math
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import Trainer, TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

from alpaca.common.errors import UserError
from alpaca.training import checkpoint
from alpaca.training.attention import padding_free_collator, rows_stay_apart
from alpaca.training.data import Collator, PaddedCollator, without_adapters
from alpaca.training.held_out import fused_loss_error, loss_on_dataset
from alpaca.training.internals import decoder_layers, prepare_buffers_apart, stop_at_last_step
from alpaca.training.report import ReportCallback
from alpaca.training.sample_answers import SampleAnswers
from alpaca.training.saving import on_first_process


def make_trainer(model, tokenizer, model_args, data_args, args, train_set, eval_set, data_report, say=print):
    """(trainer, the callback that knows whether a signal ended training)."""
    padding_free = padding_free_collator(model, args, say) if data_args.padding_free else None
    if args.torch_compile:
        compile_layers(model, args)
    if args.use_liger_kernel and isinstance(model.get_output_embeddings(), BaseTunerLayer):
        say("note: Liger's loss reads the head's weights and not its adapters; training without --use_liger_kernel")
        args.use_liger_kernel = False
    # Old checkpoints go when the new one is sealed, not before: a kill in between must leave one.
    keep, args.save_total_limit = args.save_total_limit, None
    trainer = SupervisedTrainer(
        model=model, args=args, train_dataset=train_set, eval_dataset=eval_set,
        data_collator=Collator(padding_free, PaddedCollator(tokenizer.pad_token_id)), processing_class=tokenizer,
    )  # fmt: skip
    if args.fsdp:
        prepare_buffers_apart(trainer)
    stop_at_last_step(trainer)
    trainer.report = ReportCallback(trainer, data_report, adapters=bool(model_args.lora_r or model_args.qlora))
    samples = [SampleAnswers(trainer, tokenizer, data_args.sample_tasks, say)] if data_args.sample_tasks else []
    trainer.report.samples = samples[0] if samples else None
    stop = StopOnSignal(trainer)
    for callback in (
        StopOnLossThatIsNotFinite(trainer),
        SayShards(),
        SayNothingLeft(say),
        ProveRowsApart(trainer, say),
        ProveFusedLoss(trainer),
        HeldOutLoss(trainer),
        *samples,
        SealCheckpoints(trainer, keep),
        trainer.report,
        stop,
    ):
        trainer.add_callback(callback)
    # Trackers last: at the end of training they close, and the last held-out loss and answers go there too.
    for tracker in get_reporting_integration_callbacks(args.report_to):
        trainer.add_callback(trainer.pop_callback(tracker))
    return trainer, stop


def compile_layers(model, args) -> None:
    """torch.compile of each layer by itself, in place, before Trainer shards: checkpointing stays inside it.

    Layers share their graphs. torch sees from the second batch which sizes change and compiles for all of them then;
    told to expect that of every size (`dynamic=True`), it took four times as long, for the weights' sizes too.
    Accelerate, which would compile the model as a whole, is told to leave it.
    """
    for layer in decoder_layers(model):
        layer.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
    args.torch_compile_backend = None


class SupervisedTrainer(Trainer):
    """Trainer whose batches are rows of `input_ids` and `labels`, padded or end to end."""

    report: ReportCallback  # counts tokens, completes the log lines; set before training

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.micro_batches: list[tuple[torch.Tensor, dict[str, Any]]] = []  # of this step: loss, inputs

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.report.count(inputs)
        return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs, start_time=None):
        if "loss" in logs:
            self.report.add_figures(logs)
        super().log(logs, start_time)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Trainer's loss: the sum over answer tokens by their number in the global batch."""
        if torch.is_tensor(num_items_in_batch):
            # Trainer makes it a float32, which FSDP2 casts like any input: 265 tokens became 264 in bfloat16.
            num_items_in_batch = num_items_in_batch.long()
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if num_items_in_batch is not None and self.model_accepts_loss_kwargs:
            loss = loss - self.surplus_router_loss(outputs)
        self.micro_batches.append((loss.detach(), inputs))
        return (loss, outputs) if return_outputs else loss

    def surplus_router_loss(self, outputs) -> torch.Tensor | float:
        """What a mixture of experts has too much of its routers' balance loss in one micro-batch's loss.

        The answer tokens' part is a sum by the global batch's count, so that micro-batches and processes add up. The
        model adds the routers' part, a mean, whole to each: they would add up to as many times the coefficient.
        """
        router_loss = getattr(outputs, "aux_loss", None)
        if not isinstance(router_loss, torch.Tensor):
            return 0.0
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        model = without_adapters(model)
        holders = (model, model.config, model.config.get_text_config())
        names = ("router_aux_loss_coef", "aux_loss_coef")
        coefficient = next((getattr(h, n) for h in holders for n in names if getattr(h, n, None) is not None), 0.0)
        counted = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return (
            coefficient * router_loss.to(outputs.loss.device) * (counted - 1 / self.current_gradient_accumulation_steps)
        )

    def held_out_loss(self, dataset, max_batches: int | None = None) -> dict[str, Any]:
        args = self.args
        return loss_on_dataset(
            self.model_wrapped, dataset, self.data_collator, args.per_device_eval_batch_size, args.device,
            args.process_index, args.world_size, max_batches,
        )  # fmt: skip

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        begin = time.monotonic()
        found = self.held_out_loss(self.eval_dataset if eval_dataset is None else eval_dataset)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        metrics[f"{metric_key_prefix}_runtime"] = round(time.monotonic() - begin, 3)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def rounds(self) -> bool:
        """Whether weights or arithmetic are coarser than float32."""
        args, weights = self.args, next(self.model.parameters()).dtype
        return bool(weights != torch.float32 or args.bf16 or args.fp16 or args.tf32)

    def probe_logits(self, probe: torch.Tensor) -> torch.Tensor:
        """Float32 logits, on the CPU, of the model as it stands for the (1, n) token ids `probe`; all ranks call it."""
        model = self.model_wrapped
        model.eval()
        with torch.no_grad():
            return model(input_ids=probe.to(self.args.device)).logits.float().cpu()


def rows_of_batch(inputs: dict[str, Any], dataset: Any) -> list[int]:
    """Which of the rows that `dataset` was made from stand in a batch, padded or end to end, found by their tokens."""
    wanted = set(sequences(inputs))
    longest = max(map(len, wanted))
    candidates = (dataset[i] for i, length in enumerate(dataset["length"][:]) if length <= longest)
    return [int(row["row"]) for row in candidates if tuple(row["input_ids"].tolist()) in wanted]


def sequences(inputs: dict[str, Any]) -> Iterator[tuple[int, ...]]:
    ids = inputs["input_ids"].tolist()
    if (positions := inputs.get("position_ids")) is not None:
        starts = [i for i, p in enumerate(positions[0].tolist()) if p == 0]
        for begin, end in zip(starts, [*starts[1:], len(ids[0])], strict=True):
            yield tuple(ids[0][begin:end])
    else:
        for row, mask in zip(ids, inputs["attention_mask"].tolist(), strict=True):
            yield tuple(token for token, real in zip(row, mask, strict=True) if real)


class StopOnLossThatIsNotFinite(TrainerCallback):
    """Ends a run before the step that a loss of nan or infinity would make, hence before anything of it is saved.

    All losses of a step are read at once: each reading waits for the GPU, which has nothing to do meanwhile.
    """

    def __init__(self, trainer: SupervisedTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        losses = torch.stack([loss for loss, _ in self.trainer.micro_batches]).tolist()
        batches = [inputs for _, inputs in self.trainer.micro_batches]
        self.trainer.micro_batches = []
        for loss, inputs in zip(losses, batches, strict=True):
            if not math.isfinite(loss):
                rows = rows_of_batch(inputs, self.trainer.train_dataset)
                error = UserError(
                    f"the loss is {loss} at step {state.global_step + 1}; the batch held rows "
                    f"{', '.join(map(str, rows))} of the training rows (the first is 0). Often the learning rate is "
                    "too high, or the base's weights are broken; --save_steps decides what can be resumed."
                )
                if args.process_index:  # the first process speaks for all, but only this one has seen these rows
                    print(f"error: {error}", file=sys.stderr)
                raise error


class ProveRowsApart(TrainerCallback):
    """Before step 1: batches without padding must give the padded ones' losses; else the run goes on padded."""

    def __init__(self, trainer: SupervisedTrainer, say):
        self.trainer, self.say = trainer, say

    def on_train_begin(self, args, state, control, **kwargs):
        trainer, collator = self.trainer, self.trainer.data_collator
        if collator.padding_free is None:
            return
        same, apart, leak = rows_stay_apart(
            trainer.model_wrapped, collator.padding_free, collator.padded, trainer.train_dataset, args.device,
            exact=not trainer.rounds(),
            window=getattr(trainer.model.config.get_text_config(), "sliding_window", None),
        )  # fmt: skip
        if args.world_size > 1:  # all ranks must go the same way
            verdict = torch.tensor(float(not same), device=args.device)
            torch.distributed.all_reduce(verdict)
            same = verdict.item() == 0
        if not same:
            collator.pad()
            self.say(
                f"note: batches are padded: without padding two rows had other losses ({apart:.1g} apart; {leak:.1g} "
                "where the first row was another), so this model's attention does not keep rows apart"
            )


class ProveFusedLoss(TrainerCallback):
    """Before step 1: the loss of Liger's kernels must be the one of the model's logits; else the run ends."""

    def __init__(self, trainer: SupervisedTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        base = without_adapters(trainer.model)
        if "skip_logits" not in inspect.signature(base.forward).parameters:  # Liger does not know the model
            return
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(min(2, len(trainer.train_dataset)))])
        model = trainer.model_wrapped
        model.eval()
        error = fused_loss_error(model, batch, args.device)
        model.train()
        if not error < (0.05 if trainer.rounds() else 1e-3):
            raise UserError(
                f"under Liger's kernels the loss is {error:.2g} nats from the one without: --use_liger_kernel False"
            )


class HeldOutLoss(TrainerCallback):
    """Two batches of the held-out rows before step 1, so that evaluation cannot fail first after hours; all at the end.

    `--eval_on_start True` measures all of them before step 1 too.
    """

    def __init__(self, trainer: SupervisedTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if self.trainer.eval_dataset is not None and not args.eval_on_start:
            self.trainer.held_out_loss(self.trainer.eval_dataset, max_batches=2 * args.world_size)

    def on_train_end(self, args, state, control, **kwargs):
        finished = state.global_step >= state.max_steps and not args.load_best_model_at_end  # its loss is known
        measured = any("eval_loss" in line and line["step"] == state.global_step for line in state.log_history)
        if self.trainer.eval_dataset is not None and finished and not measured:
            self.trainer.evaluate()


class SayShards(TrainerCallback):
    """Says how much of the model each process holds, so that sharding that did not happen is seen at once."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if (args.fsdp or args.deepspeed) and args.process_index == 0:
            held, total = local_and_total(model)
            print(f"each of {args.world_size} processes holds {held:,} of {total:,} weights", flush=True)


class SayNothingLeft(TrainerCallback):
    """Says that the checkpoint which a run goes on from has all its steps, so that only the end is left to do."""

    def __init__(self, say):
        self.say = say

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            self.say(f"all {state.max_steps} steps were made before: nothing is trained, the model is saved")


def local_and_total(model) -> tuple[int, int]:
    """Weights of `model` in this process's memory, and in all: FSDP2's DTensors, ZeRO-3's partitions, or whole ones."""
    held = total = 0
    for weight in model.parameters():
        total += getattr(weight, "ds_numel", weight.numel())
        local = weight.to_local() if hasattr(weight, "to_local") else getattr(weight, "ds_tensor", weight)
        held += local.numel()
    return held, total


class SealCheckpoints(TrainerCallback):
    """Checksums into each checkpoint once every rank has written; only then do older ones go."""

    def __init__(self, trainer: SupervisedTrainer, keep: int | None):
        self.trainer, self.keep = trainer, keep

    def on_save(self, args, state, control, **kwargs):
        self.trainer.accelerator.wait_for_everyone()
        facts = {
            "step": state.global_step,
            "processes": args.world_size,
            "rows_per_step": checkpoint.rows_per_step(args),
        }

        def seal() -> None:
            checkpoint.seal(f"{args.output_dir}/checkpoint-{state.global_step}", kind="checkpoint", **facts)
            checkpoint.rotate(args.output_dir, self.keep, state.best_model_checkpoint)

        on_first_process(args, seal)


class StopOnSignal(TrainerCallback):
    """SIGTERM (a scheduler's warning) finishes the step, saves a checkpoint and ends training on all ranks together."""

    def __init__(self, trainer: SupervisedTrainer):
        self.trainer, self.asked, self.stopped = trainer, False, False

    def on_train_begin(self, args, state, control, **kwargs):
        def remember(number, frame):
            self.asked = True

        self.previous = signal.signal(signal.SIGTERM, remember)

    def on_step_end(self, args, state, control, **kwargs):
        asked = self.asked
        if args.world_size > 1:
            # The signal reaches the ranks in different steps; a save needs all of them in the same one.
            asked = bool(self.trainer.accelerator.reduce(torch.tensor(float(asked), device=args.device)).item())
        if asked and not self.stopped:
            self.stopped = True
            control.should_log = control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        # After a stop a launcher that ends its processes sends more of them, and this one still has to write run.json.
        if not self.stopped:
            signal.signal(signal.SIGTERM, self.previous)
