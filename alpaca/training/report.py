"""What a training run shows of itself: figures in every log line, a final report, a loss curve.

Not a command; train.py uses it. The figures of a run that has ended:

    python -c "import json; print(json.load(open('OUT/train_report.json'))['real_tokens_per_second'])"
"""

import json
import math
import platform
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from transformers import TrainerCallback

from alpaca.common.files import atomic_write, jdump, write_jsonl
from alpaca.common.journal import read_records
from alpaca.common.run_record import git_commit, package_versions
from alpaca.training.checkpoint import rows_per_step
from alpaca.training.data import count_tokens
from alpaca.training.internals import compilations
from alpaca.training.model import empty_model

# Dense bfloat16 (before Ampere: float16) TFLOPS of tensor cores with float32 sums, as the makers' data sheets give
# them; the first name that a card's own name contains. A card that is not listed shows no MFU rather than a wrong one.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.4,
    "H100 PCIe": 756.5,
    "H100 NVL": 835.5,
    "H100": 989.4,
    "H800": 989.4,
    "A100": 311.9,
    "A800": 311.9,
    "MI300X": 1307.4,
    "L40S": 362.0,
    "L4": 121.0,
    "A40": 149.7,
    "RTX A6000": 154.8,
    "RTX 4090": 165.2,
    "RTX 3090": 71.2,
    "V100": 125.0,
    "T4": 65.0,
}


def peak_tflops(card: str) -> float | None:
    """The card's peak; None where it is not in the table. A longer name decides before a shorter one within it."""
    words = card.replace("-", " ").split()
    for name, peak in PEAK_TFLOPS.items():
        parts = name.split()
        if all(part in words for part in parts):
            return peak
    return None


class ReportCallback(TrainerCallback):
    """Adds figures to Trainer's log lines and keeps them; the Trainer calls `count` and `add_figures`.

    Per log line: seconds_per_step, tokens_per_second (real tokens of all processes), padding_share, mfu (where the
    card's peak is known and the arithmetic is 16 bit), tokens (real ones since the run began, resumed parts included),
    and under --torch_compile compilations (graphs made so far).
    Time spent in evaluation and saving is not training time.
    """

    samples: Any = None  # the SampleAnswers of --sample_tasks

    def __init__(self, trainer, data_report: Mapping[str, Any], adapters: bool = False):
        """`data_report`: the counts of data.load_data. `adapters`: the base's weights are frozen."""
        self.trainer, self.data_report = trainer, dict(data_report)
        self.flops = Flops(empty_model(trainer.model.config), frozen=adapters)
        self.log_file = Path(trainer.args.output_dir) / "train_log.jsonl"
        self.interval = [0, 0, 0]  # real tokens, places, positions with logits of this process since the last line
        self.totals = {"tokens": 0, "places": 0, "seconds": 0.0, "steps": 0}
        self.peak = peak_of(trainer.args, trainer.model)

    # ---- what Trainer calls ------------------------------------------------------------------------------------------

    def count(self, inputs: Mapping[str, Any]) -> None:
        """Adds one micro-batch of this process. Costs no synchronisation with a GPU."""
        real, places = count_tokens(inputs)
        kept = inputs["logits_to_keep"].numel() if "logits_to_keep" in inputs else real
        self.interval = [sum(pair) for pair in zip(self.interval, (real, places, kept), strict=True)]

    def add_figures(self, logs: dict[str, Any]) -> None:
        """Completes a training log line in place. Every process calls it: the counts are summed over all."""
        args, state = self.trainer.args, self.trainer.state
        counts = torch.tensor([int(count) for count in self.interval], dtype=torch.int64, device=args.device)
        if args.world_size > 1:
            torch.distributed.all_reduce(counts)
        real, places, kept = counts.tolist()
        now = time.monotonic()
        seconds, steps = now - self.since, state.global_step - self.last_step
        self.interval, self.since, self.last_step = [0, 0, 0], now, state.global_step
        self.step_ended = now
        for name, value in {"tokens": real, "places": places, "seconds": seconds, "steps": steps}.items():
            self.totals[name] += value
        logs["seconds_per_step"] = round(seconds / max(steps, 1), 4)
        logs["tokens_per_second"] = round(real / seconds, 1)
        logs["padding_share"] = round(1 - real / max(places, 1), 4)
        if self.peak:
            logs["mfu"] = round(self.flops.of(real, kept) / (seconds * self.peak * 1e12 * args.world_size), 4)
        logs["tokens"] = self.tokens_before + self.totals["tokens"]
        if args.torch_compile:
            logs["compilations"] = compilations()

    # ---- events ------------------------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, **kwargs):
        self.since = self.step_ended = time.monotonic()
        self.last_step = state.global_step
        # A resumed run keeps the lines up to its checkpoint and writes the rest anew: one line a step.
        # A power cut may have torn the last one.
        lines = read_records(self.log_file) if state.global_step and self.log_file.is_file() else []
        self.lines = [line for line in lines if line["step"] <= state.global_step]
        self.tokens_before = max((line.get("tokens", 0) for line in self.lines), default=0)
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if args.process_index == 0:
            write_jsonl(self.log_file, self.lines)

    def on_step_end(self, args, state, control, **kwargs):
        self.step_ended = time.monotonic()
        # Else what came after the last multiple of --logging_steps, or a whole short run, would be in no figure.
        control.should_log |= state.global_step >= state.max_steps

    def on_evaluate(self, args, state, control, **kwargs):
        self._leave_out_pause()

    def on_save(self, args, state, control, **kwargs):
        self._leave_out_pause()

    def _leave_out_pause(self) -> None:
        now = time.monotonic()
        self.since += now - self.step_ended
        self.step_ended = now

    def on_log(self, args, state, control, logs=None, **kwargs):
        line = {"step": state.global_step, **(logs or {})}
        self.lines.append(line)
        if args.process_index == 0:
            with open(self.log_file, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(line, default=str) + "\n")

    def on_train_end(self, args, state, control, **kwargs):
        memory = peak_memory_gb(args)
        if args.process_index == 0:
            self.final = report = self.report(args, state, memory)
            jdump(report, self.log_file.with_name("train_report.json"))
            draw_loss_curve(self.lines, self.log_file.with_name("loss_curve.png"))
            print("\n" + as_table("Training report", report_rows(report)), flush=True)

    def report(self, args, state, memory: float) -> dict[str, Any]:
        """The final report as plain values; seconds and GB as their names say. Figures are of this session's steps."""
        losses = [line["loss"] for line in self.lines if "loss" in line]
        held_out = [line["eval_loss"] for line in self.lines if "eval_loss" in line]
        totals, seconds = self.totals, max(self.totals["seconds"], 1e-9)
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        saved = int(best.rsplit("-", 1)[1]) if best else state.global_step
        saved_losses = [line["eval_loss"] for line in self.lines if "eval_loss" in line and line["step"] == saved]
        mfus = [line["mfu"] for line in self.lines if "mfu" in line]
        return {
            "steps": state.global_step,
            "steps_of_this_session": totals["steps"],
            "epochs": round(state.epoch or 0, 4),
            "rows_per_step": rows_per_step(args),
            "processes": args.world_size,
            "hardware": hardware_name(args),
            "seconds": round(totals["seconds"], 4),
            "seconds_per_step": round(seconds / max(totals["steps"], 1), 4),
            "real_tokens": self.tokens_before + totals["tokens"],
            "real_tokens_per_second": round(totals["tokens"] / seconds, 1),
            "padded_tokens": totals["places"],
            "padding_share": round(1 - totals["tokens"] / max(totals["places"], 1), 4),
            "mfu": round(sum(mfus) / len(mfus), 4) if mfus else None,
            "first_loss": losses[0] if losses else None,
            "last_loss": losses[-1] if losses else None,
            "mean_loss_of_last_tenth": mean(losses[-max(len(losses) // 10, 1) :]),
            "eval_loss_first": held_out[0] if held_out else None,
            "eval_loss_last": held_out[-1] if held_out else None,
            "saved_step": saved,
            "eval_loss_of_saved_step": saved_losses[-1] if saved_losses else None,
            "peak_memory_gb_per_process": memory,
            "sample_answers": self.samples.last if self.samples else [],
            "sample_answers_seconds": round(self.samples.seconds, 4) if self.samples else None,
            "data": self.data_report,
            "packages": package_versions(),
            "commit": git_commit(),
        }


def report_rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The report's lines for people; what was not measured is left out."""
    data = report["data"]
    lines = [
        ("steps", f"{report['steps']:,} ({report['epochs']:g} epochs, {report['rows_per_step']} rows a step)"),
        ("hardware", f"{report['processes']} x {report['hardware']}"),
        ("time", f"{report['seconds']:,.1f} s, {report['seconds_per_step']:.2f} s a step"),
        ("tokens", f"{report['real_tokens']:,} real, {report['padding_share']:.1%} padding beside them"),
        ("speed", f"{report['real_tokens_per_second']:,.0f} real tokens/s"),
        ("MFU", f"{report['mfu']:.1%}" if report["mfu"] is not None else ""),
        (
            "loss",
            f"{report['first_loss']:.4f} -> {report['last_loss']:.4f}" if report["first_loss"] is not None else "",
        ),
        (
            "held-out loss",
            f"{report['eval_loss_first']:.4f} -> {report['eval_loss_last']:.4f}"
            if report["eval_loss_first"] is not None
            else "",
        ),
        (
            "saved",
            f"step {report['saved_step']:,}, the best one: held-out loss {report['eval_loss_of_saved_step']:.4f}"
            if report["saved_step"] != report["steps"] and report["eval_loss_of_saved_step"] is not None
            else "",
        ),
        ("peak memory", f"{report['peak_memory_gb_per_process']:.2f} GB a process"),
        ("rows", f"{data['kept']:,} of {data['rows']:,} trained on; {data['dropped']} dropped, {data['cut']} cut"),
    ]
    return [line for line in lines if line[1]]


def as_table(title: str, lines: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in lines)
    return "\n".join([title, "-" * 72, *(f"{name:<{width}}  {value}" for name, value in lines)])


def mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


# ----------------------------------------------------------------------------------------------------------------------
# Arithmetic, memory, hardware.


class Flops:
    """Floating-point operations of training a model, from its shapes: 2 a weight and token forward, 4 backward.

    Embedding look-ups count nothing, the output projection only where logits were made, and recomputation under
    activation checkpointing never (Chowdhery et al., 2022, "model FLOPs"). Attention's own products are left out: they
    are below 1 % for rows of 512 tokens in a 7B model.
    """

    def __init__(self, model, frozen: bool = False):
        """`model`: any device, "meta" included. `frozen`: its weights get no gradient (LoRA): 2 forward, 2 backward."""
        head = model.get_output_embeddings().weight
        table = model.get_input_embeddings().weight
        every = {id(weight): weight.numel() for weight in model.parameters()}
        self.head = head.numel()
        self.body = sum(every.values()) - table.numel() - (0 if head is table else self.head)
        self.per_weight = 4 if frozen else 6

    def of(self, tokens: int, tokens_with_logits: int) -> float:
        return self.per_weight * (self.body * float(tokens) + self.head * float(tokens_with_logits))


def peak_of(args, model) -> float | None:
    """Peak TFLOPS of this process's card for the run's arithmetic; None on CPUs, unknown cards and in float32."""
    half = args.bf16 or args.fp16 or next(model.parameters()).dtype in (torch.bfloat16, torch.float16)
    return peak_tflops(torch.cuda.get_device_name(args.device)) if args.device.type == "cuda" and half else None


def peak_memory_gb(args) -> float:
    """Highest memory of any process in GB (1e9 bytes): allocated on the GPU, else resident. Every process calls it."""
    if args.device.type == "cuda":
        peak = float(torch.cuda.max_memory_allocated())
    else:
        peak = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        peak *= 1 if sys.platform == "darwin" else 1024
    value = torch.tensor(peak, device=args.device)
    if args.world_size > 1:
        torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX)
    return round(value.item() / 1e9, 3)


def hardware_name(args) -> str:
    if args.device.type == "cuda":
        return torch.cuda.get_device_name(args.device)
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).is_file():
        models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = models[0] if models else cpu
    return f"{cpu}, {torch.get_num_threads()} threads"


# ----------------------------------------------------------------------------------------------------------------------
# Pictures and texts.


def draw_loss_curve(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Loss of each log line, its running mean over a twentieth of the run, and held-out losses, as a PNG."""
    train = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    held_out = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats a response token)")
    axes.grid(alpha=0.3)
    if train:
        steps, losses = zip(*train, strict=True)
        window = max(len(losses) // 20, 1)
        smooth = [mean(losses[max(0, place - window + 1) : place + 1]) for place in range(len(losses))]
        axes.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=0.8, marker="." if len(steps) < 50 else "")
        axes.plot(steps, smooth, color="tab:blue", label=f"training, mean of {window}")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="tab:orange", marker="o", label="held out")
    if train or held_out:
        axes.legend()
    with atomic_write(path, "wb") as stream:
        figure.savefig(stream, format="png", dpi=120)


def dataset_statistics(dataset, report: Mapping[str, Any]) -> str:
    """A table of a tokenised dataset and its `report` (data.load_data): rows, tokens, what padding would waste."""
    lengths = dataset["length"][:]
    answers = lengths - dataset["prompt_length"][:]

    def spread(values) -> str:
        low, middle, high = np.percentile(values, (5, 50, 95))
        return (
            f"mean {values.mean():.0f}, 5 % up to {low:.0f}, half {middle:.0f}, 95 % {high:.0f}, longest {values.max()}"
        )

    shuffled = np.random.default_rng(0).permutation(lengths)
    lines = [
        ("rows", f"{report['kept']:,} of {report['rows']:,}"),
        ("dropped", f"{report['dropped']:,} (no answer token within {report['max_length']} tokens)"),
        ("cut", f"{report['cut']:,} (--truncation {report['truncation']})"),
        ("empty outputs", f"{report['empty_outputs']:,}"),
        ("split at the prompt's end", f"{report['straddling']:,} (a token would have straddled it)"),
        ("tokens", f"{report['tokens']:,}, of which {report['response_tokens']:,} are trained on"),
        ("row", spread(lengths)),
        ("answer", spread(answers)),
    ]
    for size in (4, 8, 16, 32):
        if size <= len(lengths):
            batches = shuffled[: len(shuffled) // size * size].reshape(-1, size)
            share = 1 - batches.sum() / (batches.max(axis=1).sum() * size)
            lines.append((f"padding, batches of {size}", f"{share:.1%} (none with --padding_free True)"))
    return as_table("Training data", lines)
