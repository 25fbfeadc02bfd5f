"""Training and batched inference on a GPU: the original's way beside every way of this project, as one table.

    bash benchmarks/gpu.sh              # under ten minutes on one card; all cards take part in the FSDP2 row
    bash benchmarks/gpu.sh --tiny       # two minutes on a CPU: everything but CUDA's kernels

Each row of the table is a process of its own that trains random weights with train.py's own parts: same weights, same
rows in the same order, 32 a step. Rows have the lengths of the released data: 127 tokens in the mean, 97 of 52,002
longer than 512 (and cut there), half of it response. Figures leave out the first two steps. MFU counts real tokens
alone. Where a row cannot run, its last cell says why.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import datasets
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models

from alpaca.answers import answering, loading
from alpaca.answers.sampling import Sampling
from alpaca.common.cli import run_cli
from alpaca.common.errors import UserError
from alpaca.common.files import jdump, jload
from alpaca.common.prompt import IGNORE_INDEX
from alpaca.common.run_record import git_commit, package_versions
from alpaca.training import attention
from alpaca.training.checks import is_installed, read_command_line
from alpaca.training.data import data_report
from alpaca.training.memory import memory_estimate
from alpaca.training.model import load_config, load_model
from alpaca.training.trainer import make_trainer
from alpaca.training.training_arguments import arguments_for_this_machine

ROOT = Path(__file__).resolve().parent.parent
ROWS_A_STEP = 32
WARM_UP = 2
SECONDS = 570.0  # for all rows together; a row that would begin later is left out


class Shape(NamedTuple):
    """A Llama: sizes, and the memory (GB) of the smallest card that trains all its float32 weights with AdamW."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    least_gb: float


# The first that the card holds is measured; then as many layers of 7B as it holds, in two ways.
SHAPES = (
    Shape("3B", 3072, 8192, 28, 24, 8, 32000, 70),
    Shape("1.1B", 2048, 8192, 16, 32, 8, 32000, 38),
    Shape("0.5B", 1536, 4096, 16, 16, 8, 32000, 20),
)
SHAPES_7B = (
    Shape("8 layers of 7B", 4096, 11008, 8, 32, 32, 32000, 70),
    Shape("4 layers of 7B", 4096, 11008, 4, 32, 32, 32000, 38),
    Shape("1 layer of 7B", 4096, 11008, 1, 32, 32, 32000, 20),
)
TINY = Shape("tiny", 64, 128, 2, 4, 2, 512, 0)


class Way(NamedTuple):
    """A row of the table: flags of train.py, and what it needs.

    On a GPU all but the first and the flash_attn row take torch's varlen kernel, unless `by_row`.
    """

    name: str
    flags: list[str]
    by_row: bool = False
    cuda: bool = False
    package: str | None = None
    all_cards: bool = False


FOUR, SIXTEEN = (
    ["--per_device_train_batch_size", str(rows), "--gradient_accumulation_steps", str(ROWS_A_STEP // rows)]
    for rows in (4, 16)
)
PLAIN = ["--use_liger_kernel", "False"]
FLASH = ["--attn_implementation", "flash_attention_2"]
ORIGINAL = "the original's: padded, 4 rows at a time"
ZERO3 = ["--deepspeed", "configs/default_offload_opt_param.json"]
WAYS = (
    Way(ORIGINAL, [*FOUR, *PLAIN, "--padding_free", "False", "--optim", "adamw_torch"]),
    Way("sdpa, row by row", [*SIXTEEN, *PLAIN], by_row=True),
    Way("varlen", [*SIXTEEN, *PLAIN], cuda=True),
    Way("compiled layers", [*SIXTEEN, *PLAIN, "--torch_compile", "True"]),
    Way("Liger", [*SIXTEEN, "--use_liger_kernel", "True"], cuda=True, package="liger_kernel"),
    Way("flash_attn", [*SIXTEEN, *PLAIN, *FLASH], cuda=True, package="flash_attn"),
    Way("LoRA, rank 16", [*SIXTEEN, *PLAIN, "--lora_r", "16", "--dtype", "bfloat16"]),
    Way("QLoRA", [*SIXTEEN, *PLAIN, "--qlora", "True"], cuda=True, package="bitsandbytes"),
    Way("ZeRO-3, offloaded to the host", [*SIXTEEN, *PLAIN, *ZERO3], package="deepspeed"),
    Way("FSDP2", [*PLAIN, "--fsdp", "True"], all_cards=True),
)  # fmt: skip
IN_7B = (ORIGINAL, "compiled layers")


# ----------------------------------------------------------------------------------------------------------------------
# Weights and rows.


def make_base(shape: Shape, folder: Path) -> Path:
    """A random Llama in bfloat16 (its file), with a tokenizer that only names the special tokens."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        max_position_embeddings=2048, dtype="bfloat16", pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    del model
    if device == "cuda":
        torch.cuda.empty_cache()  # the rows' processes need the card
    return folder


def make_tokenizer() -> Any:
    names = {"[PAD]": 0, "<s>": 1, "</s>": 2, "[UNK]": 3}
    backend = Tokenizer(models.WordLevel(names, unk_token="[UNK]"))
    special = dict(pad_token="[PAD]", bos_token="<s>", eos_token="</s>", unk_token="[UNK]")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def made_up_rows(count: int, vocabulary: int, max_length: int = 512, seed: int = 0) -> datasets.Dataset:
    """`count` rows of random tokens, as data.tokenize_dataset gives them.

    Their lengths are log-normal: 127 in the mean and 97 of 52,002 above 512 fix its two parameters.
    """
    draw = np.random.default_rng(seed)
    lengths = np.clip(draw.lognormal(np.log(110.4), 0.529, count).round(), 8, max_length).astype(int)
    prompts = np.maximum((lengths * draw.uniform(0.25, 0.75, count)).astype(int), 1)
    rows = []
    for place, (length, prompt) in enumerate(zip(lengths.tolist(), prompts.tolist(), strict=True)):
        ids = draw.integers(4, vocabulary, length).tolist()
        labels = [IGNORE_INDEX] * prompt + ids[prompt:]
        row = dict(input_ids=ids, labels=labels, length=length, prompt_length=prompt)
        rows.append({**row, "row": place, "straddles": False, "cut": False})
    return datasets.Dataset.from_list(rows).with_format("numpy")


# ----------------------------------------------------------------------------------------------------------------------
# One row, in a process of its own.


def train_row(folder: str, base: str, flags: str, steps: int, by_row: bool = False) -> None:
    """Trains `steps` steps of `base` with train.py's `flags` (JSON) and writes FOLDER/figures.json."""
    if by_row:
        attention.has_varlen = lambda *_: False
    words = [
        "--model_name_or_path", base, "--data_path", "made-up", "--output_dir", f"{folder}/out", "--overwrite", "True",
        "--bf16", "True", "--max_steps", str(steps), "--logging_steps", "1", "--save_strategy", "no",
        "--learning_rate", "2e-5", "--lr_scheduler_type", "constant", "--disable_tqdm", "True", *json.loads(flags),
    ]  # fmt: skip
    model_args, data_args, args = arguments_for_this_machine(read_command_line(words))
    config, tokenizer = load_config(base), transformers.AutoTokenizer.from_pretrained(base)
    rows = made_up_rows(ROWS_A_STEP * steps, config.vocab_size)
    estimate = sum(device for _, device, _ in memory_estimate(config, args, model_args, data_args.padding_free))
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    model = load_model(model_args, args, tokenizer)
    counts = data_report(rows, [{"output": "x"}] * len(rows))
    trainer, _ = make_trainer(model, tokenizer, model_args, data_args, args, rows, None, counts)
    trainer.train()
    if args.process_index == 0:
        lines = [line for line in trainer.report.lines if "loss" in line]
        timed = lines[WARM_UP:]
        seconds = sum(line["seconds_per_step"] for line in timed)
        figures = {
            "tokens_per_second": sum(line["seconds_per_step"] * line["tokens_per_second"] for line in timed) / seconds,
            "mfu": np.mean([line["mfu"] for line in timed]).item() if "mfu" in timed[0] else None,
            "peak_gb": trainer.report.final["peak_memory_gb_per_process"],
            "estimate_gb": estimate,
            "losses": [line["loss"] for line in lines],
            "compilations": lines[-1].get("compilations"),
        }
        jdump(figures, Path(folder) / "figures.json")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def inference_row(folder: str, base: str, rows: int, new_tokens: int) -> None:
    """Batched answers of `new_tokens` tokens each to `rows` prompts of released-like lengths."""
    model, _ = loading.load_model(base)
    settings = model.generation_config
    settings.pad_token_id, settings.eos_token_id = 0, [model.config.vocab_size]  # none ends before the last token
    data = made_up_rows(rows, model.config.vocab_size)
    prompts = [row["input_ids"][: row["prompt_length"]].tolist() for row in data]
    answering.generate(model, prompts, Sampling(max_new_tokens=4), range(rows))
    begin = time.perf_counter()
    found = answering.generate(model, prompts, Sampling(max_new_tokens=new_tokens), range(rows))
    seconds = time.perf_counter() - begin
    peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None
    figures = {"tokens_per_second": sum(len(new) for new, _ in found) / seconds, "peak_gb": peak}
    jdump(figures, Path(folder) / "figures.json")


def measure(words: list[str], folder: Path, processes: int, seconds: float) -> dict[str, Any]:
    """The figures of one row's process, or {"why": what ended it}."""
    folder.mkdir(parents=True)
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    log = folder / "log"
    with open(log, "w", encoding="utf-8") as stream:
        try:
            command = [*start, __file__, *words]
            done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, timeout=seconds, cwd=ROOT)
        except subprocess.TimeoutExpired:
            return {"why": f"not done within {seconds:.0f} s"}
    if done.returncode == 0:
        return jload(folder / "figures.json")
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if "rror" in line.split(" ")[0]] or lines or ["no output"]
    return {"why": told[0 if processes > 1 else -1][:160]}


# ----------------------------------------------------------------------------------------------------------------------
# The table.


def bench(tiny: bool = False, steps: int = 8, only: str | None = None) -> None:
    """Prints the tables as Markdown. `tiny`: a tiny model, on the CPU too. `only`: rows whose names hold this text."""
    cuda = torch.cuda.is_available()
    if not cuda and not tiny:
        raise UserError("no NVIDIA GPU is found here; --tiny runs everything but its kernels on the CPU")
    cards = torch.cuda.device_count()
    memory = torch.cuda.get_device_properties(0).total_memory / 1e9 if cuda else 0.0
    versions = package_versions()
    print(
        f"{f'{cards} x {torch.cuda.get_device_name()}, {memory:.0f} GB' if cuda else 'CPU: no GPU was measured here'}; "
        f"{time.strftime('%Y-%m-%d')}, commit {git_commit()}, torch {versions['torch']}, transformers "
        f"{versions['transformers']}; {steps} steps of {ROWS_A_STEP} rows, the first {WARM_UP} not timed"
    )
    end = time.monotonic() + SECONDS
    sizes = [[TINY]] if tiny else [[s for s in shapes if s.least_gb <= memory][:1] for shapes in (SHAPES, SHAPES_7B)]
    if not all(sizes):
        raise UserError(f"the card has {memory:.0f} GB; the smallest shape needs {SHAPES[-1].least_gb} GB. Try --tiny")
    with tempfile.TemporaryDirectory() as work:
        for (shape,) in sizes:
            base = make_base(shape, Path(work) / "base")
            ways = [way for way in WAYS if shape in (*SHAPES, TINY) or way.name in IN_7B]
            ways = [way for way in ways if only is None or only in way.name]
            training_table(shape, base, ways, Path(work) / "rows", steps, end, max(cards, 1 if cuda else 2), tiny)
            if shape in (*SHAPES, TINY) and (only is None or only in "inference"):
                inference_table(base, Path(work) / "rows", end, tiny)


def training_table(
    shape: Shape, base: Path, ways: list[Way], work: Path, steps: int, end: float, ranks: int, tiny: bool
) -> None:
    """Measures and prints one model's ways, each as soon as it is done."""
    print(f"\n**Training, {shape.name}** ({shape.layers} layers of width {shape.hidden})\n")
    print("| way | real tokens/s | times as fast | MFU | peak GB | estimated GB | mean loss | largest difference | |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |", flush=True)
    first: dict[str, Any] = {}
    for number, way in enumerate(ways):
        name, why = way.name, why_not(way)
        if way.all_cards:
            name = f"{way.name}, {ranks} rank{'s' * (ranks > 1)}"
            if ranks == 1:
                why = "one card has nothing to shard"
        flags = way.flags
        if way.all_cards:
            rows = min(16, max(1, ROWS_A_STEP // ranks))
            more = [
                "--per_device_train_batch_size",
                rows,
                "--gradient_accumulation_steps",
                ROWS_A_STEP // rows // ranks,
            ]
            flags = [*flags, *map(str, more)]
        if tiny and "--torch_compile" in flags:
            flags = [*flags, "--torch_compile_backend", "aot_eager"]  # machine code for a tiny model is not worth it
        left = end - time.monotonic()
        if why is None and left < 20:
            why = "no time left"
        if why is None:
            words = ["train_row", str(work / f"{shape.name}_{number}"), str(base), json.dumps(flags), str(steps)]
            words += ["--by_row"] * way.by_row
            found = measure(words, work / f"{shape.name}_{number}", ranks if way.all_cards else 1, min(left, 180.0))
            why = found.get("why")
        if why is not None:
            print(f"| {name} | | | | | | | | not measured here: {why} |", flush=True)
            continue
        first = first or found
        adapted = "LoRA" in name
        pairs = list(zip(found["losses"], first["losses"], strict=True))[: 1 if adapted else None]
        note = "the first step's loss: adapters are trained" if adapted else ""
        if found["compilations"]:
            note = f"{found['compilations']} graphs compiled"
        print(
            f"| {name} | {found['tokens_per_second']:,.0f} | "
            f"{found['tokens_per_second'] / first['tokens_per_second']:.2f} | "
            f"{'' if found['mfu'] is None else format(found['mfu'], '.1%')} | {found['peak_gb']:.2f} | "
            f"{found['estimate_gb']:.2f} | {np.mean([loss for loss, _ in pairs]):.4f} | "
            f"{max(abs(a - b) for a, b in pairs):.1e} | {note} |",
            flush=True,
        )


def why_not(way: Way) -> str | None:
    """Why this machine cannot run a way; None where it can."""
    if way.cuda and not torch.cuda.is_available():
        return "its kernels need an NVIDIA GPU"
    if way.package and not is_installed(way.package):
        return f"{way.package} is not installed"
    return None


def inference_table(base: Path, work: Path, end: float, tiny: bool) -> None:
    print("\n**Batched inference**, bfloat16 on a GPU, float32 on a CPU\n")
    print("| rows at once | new tokens/s | peak GB | |\n| ---: | ---: | ---: | --- |", flush=True)
    for rows in (2,) if tiny else (1, 16, 64):
        folder, left = work / f"inference_{rows}", end - time.monotonic()
        words = ["inference_row", str(folder), str(base), str(rows), "8" if tiny else "128"]
        found = measure(words, folder, 1, min(left, 90.0)) if left > 20 else {"why": "no time left"}
        if "why" in found:
            print(f"| {rows} | | | not measured here: {found['why']} |", flush=True)
        else:
            peak = "" if found["peak_gb"] is None else f"{found['peak_gb']:.2f}"
            print(f"| {rows} | {found['tokens_per_second']:,.0f} | {peak} | |", flush=True)


if __name__ == "__main__":
    sys.exit(run_cli({"bench": bench, "train_row": train_row, "inference_row": inference_row}, default="bench"))
