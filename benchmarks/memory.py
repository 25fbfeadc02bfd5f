"""Memory of fine-tuning LLaMA-7B and 13B on usual hardware, as train.py estimates it before it loads a model.

    python benchmarks/memory.py                      # the table of docs/scaling.md; nothing is loaded or downloaded

Rows fill --model_max_length. What the estimate leaves out is said in alpaca/training/memory.py.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformers import LlamaConfig

from alpaca.common.cli import run_cli
from alpaca.training.memory import memory_estimate

SHAPES = {
    "7B": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
    "13B": dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40),
}
RUN = dict(
    bf16=True, fp16=False, world_size=1, deepspeed=None, fsdp=False, fsdp_config=None, optim="adamw_torch_fused",
    per_device_train_batch_size=4, model_max_length=512, activation_checkpointing=False, save_dtype="auto",
    gradient_accumulation_steps=8,
    accelerator_config=SimpleNamespace(gradient_accumulation_kwargs={"sync_each_batch": True}),
)  # fmt: skip
MODEL = dict(
    lora_r=0, qlora=False, dtype="float32", lora_target_modules=None, attn_implementation=None, merge_lora=False
)
OFFLOAD = {"cpu_offload": True}
ONE_GPU = dict(per_device_train_batch_size=8, activation_checkpointing=True)
# What a user types -> settings of the run, settings of the model.
WAYS = {
    "4 GPUs, FSDP": (dict(world_size=4, fsdp=True), {}),
    "4 GPUs, FSDP, checkpointing": (dict(world_size=4, fsdp=True, activation_checkpointing=True), {}),
    "8 GPUs, FSDP": (dict(world_size=8, fsdp=True), {}),
    "2 machines of 8, FSDP": (dict(world_size=16, fsdp=True), {}),
    "4 GPUs, FSDP with offload": (dict(world_size=4, fsdp=True, fsdp_config=OFFLOAD), {}),
    "1 GPU, LoRA, checkpointing, 8 rows": (ONE_GPU, dict(lora_r=16, dtype="bfloat16")),
    "1 GPU, QLoRA, checkpointing, 8 rows": (ONE_GPU, dict(lora_r=16, dtype="bfloat16", qlora=True)),
}


def table(models: str = "7B,13B", rows: int = 0) -> None:
    """Prints a Markdown table: GB of each process on its device and in host memory.

    Args:
        models: of 7B and 13B, comma-separated.
        rows: at once a process; 0 takes each way's own.
    """
    chosen = models.split(",")
    print("| way | " + " | ".join(f"{name}: device GB, host GB" for name in chosen) + " |")
    print("| --- |" + " ---: |" * len(chosen), flush=True)
    for way, (run, model) in WAYS.items():
        cells = []
        for name in chosen:
            settings = RUN | run | ({"per_device_train_batch_size": rows} if rows else {})
            config = LlamaConfig(vocab_size=32_001, max_position_embeddings=2048, **SHAPES[name])
            parts = memory_estimate(config, SimpleNamespace(**settings), SimpleNamespace(**MODEL | model))
            device, host = (sum(part[place] for part in parts) for place in (1, 2))
            cells.append(f"{device:.0f}, {host:.0f}")
        print(f"| {way} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    run_cli({"table": table}, default="table")
