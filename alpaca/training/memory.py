"""How much memory each process of a training run will need, worked out before anything is loaded.

Not a command; `train.py --dry_run True` prints the table, and so does every run before it loads the model:

    print(memory_table(memory_estimate(config, training_args, model_args, padding_free=True)))
"""

import contextlib
import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from alpaca.training import attention, internals
from alpaca.training.model import adapter_targets, empty_model

GB = 1e9


def memory_estimate(
    config: Any, args: Any, model_args: Any, padding_free: bool = True
) -> list[tuple[str, float, float]]:
    """(part, GB on the accelerator, GB in host memory) of one process, for the largest micro-batch: all rows full.

    Shapes come from `config` alone; weights are never loaded. Activations are what autograd keeps of one forward pass,
    found by running it on tensors without memory. Not counted: the allocator's fragments, kernels' workspaces, the few
    hundred MB of a CUDA context. On a CPU "the accelerator" is host memory too.
    """
    weights = count_weights(config, model_args)
    adapters = bool(model_args.lora_r or model_args.qlora)
    stored = _weight_dtype(config, model_args).itemsize
    half = args.bf16 or args.fp16
    compute = 2 if half else stored
    world = args.world_size
    zero3 = bool(args.deepspeed) and args.hf_deepspeed_config.is_zero3()
    shards = world if args.fsdp or zero3 else 1
    trained = weights["adapters"] if adapters else weights["all"]

    parts: dict[str, float] = {}
    if zero3:
        # DeepSpeed keeps weights and gradients in 16 bit and fp32 masters with Adam's moments in the optimizer.
        parts["weights"] = weights["all"] * compute / shards
        parts["gradients"] = trained * compute / shards
        parts["optimizer"] = trained * (_optimizer_bytes(args, 4) + (4 if half else 0)) / shards
    else:
        base = weights["linear"] * 0.55 + (weights["all"] - weights["linear"]) * 2 if model_args.qlora else None
        parts["weights"] = (base or weights["all"] * stored) / shards + (adapters and trained * 4 / shards)
        parts["gradients"] = trained * (4 if adapters else stored) / shards
        parts["optimizer"] = trained * _optimizer_bytes(args, 4 if adapters else stored) / shards
    on_host = _offloaded(args, zero3)
    accelerator = getattr(args, "accelerator_config", None)
    synced = (getattr(accelerator, "gradient_accumulation_kwargs", None) or {}).get("sync_each_batch", False)

    live = {}
    if zero3:
        live["weights gathered for a moment"] = min(weights["all"], 1e9) * compute
    elif args.fsdp:
        # The layer at work and the one fetched ahead, the embeddings, and one layer's gradients before they are cut.
        live["weights gathered for a moment"] = (2 * weights["layer"] + weights["outside"]) * compute
        live["gradients of one layer, whole"] = 0 if adapters else weights["layer"] * compute
        if args.gradient_accumulation_steps > 1 and not synced:
            # Summed in float32 (training_arguments.fsdp_precision); sync_each_batch does without them.
            live["gradients between micro-batches, whole"] = trained * (4 if half else stored)
    elif world > 1:
        live["DDP's buckets"] = trained * stored
    rows, length = args.per_device_train_batch_size, args.model_max_length
    kept = activation_bytes(config, args, model_args, rows, length, padding_free)
    constant = activation_bytes(config, args, model_args, 1, 8, padding_free)
    if half and not shards > 1:
        live["16-bit copies of the weights"] = constant["layers"] + constant["outside"]
    inside = kept["layers"] - constant["layers"]
    layers = kept["count"]
    if args.activation_checkpointing:
        # Each layer keeps its input; one layer at a time is computed again.
        inside = layers * rows * length * weights["hidden"] * compute + inside / layers
    vocabulary = rows * length * weights["vocabulary"]
    live["activations of the layers"] = inside
    # In the compute type, in float32, its log-softmax, and the gradient of that.
    live["logits and loss"] = vocabulary * (compute + 3 * 4 if half else 3 * 4)
    table = []
    for part, size in parts.items():
        table.append((part, 0.0, size / GB) if part in on_host else (part, size / GB, 0.0))
    table += [(part, size / GB, 0.0) for part, size in live.items() if size]
    loading = weights["all"] * torch.empty(0, dtype=_weight_dtype(config, model_args)).element_size()
    saved = saved_itemsize(config, args)
    # The gathered weights, the model that is opened again, and one layer and the ends of it in float32.
    checking = 2 * weights["all"] * saved + 4 * (weights["layer"] + weights["outside"])
    if adapters and not model_args.merge_lora:
        checking = weights["all"] * saved + 4 * (weights["layer"] + weights["outside"])
    if shards > 1:
        table.append(("while loading, first process only", 0.0, loading / GB))
    return [*table, ("final check, first process only", 0.0, checking / GB)]


def saved_itemsize(config: Any, args: Any) -> int:
    """Bytes of a weight in the saved model."""
    return ((config.dtype or torch.float32) if args.save_dtype == "auto" else getattr(torch, args.save_dtype)).itemsize


def checkpoint_bytes(config: Any, args: Any, model_args: Any, trained: int) -> int:
    """Bytes of one checkpoint: the `trained` weights and, without --save_only_model, the optimizer's state of them."""
    adapters = bool(model_args.lora_r or model_args.qlora)
    weight = 4 if adapters else _weight_dtype(config, model_args).itemsize
    state = _optimizer_bytes(args, weight)
    if args.deepspeed:
        weight = 2 if args.bf16 or args.fp16 else weight
        # Float32 masters beside the moments; below stage 3 the weights are in DeepSpeed's own files too.
        state = 4 + _optimizer_bytes(args, 4) + (0 if args.hf_deepspeed_config.is_zero3() else weight)
    return trained * (weight if args.save_only_model else weight + state)


def memory_table(estimate: list[tuple[str, float, float]]) -> str:
    width = max(len(part) for part, _, _ in estimate)
    lines = [f"{part:<{width}}  {device:9.3f}  {host:9.3f}" for part, device, host in estimate]
    total = [sum(column) for column in list(zip(*estimate, strict=True))[1:]]
    return "\n".join(
        [
            f"{'Memory of one process, at most':<{width}}  {'device GB':>9}  {'host GB':>9}",
            *lines,
            f"{'all':<{width}}  {total[0]:9.3f}  {total[1]:9.3f}",
        ]
    )


def _weight_dtype(config: Any, model_args: Any) -> Any:
    return config.dtype or torch.float32 if model_args.dtype == "auto" else getattr(torch, model_args.dtype)


def _optimizer_bytes(args: Any, width: int) -> int:
    """Bytes of optimizer state per trained weight of `width` bytes."""
    name = getattr(args.optim, "value", str(args.optim))
    if "8bit" in name:
        return 2
    if name in ("sgd", "adafactor"):
        return 0
    return width if "lion" in name or name in ("rmsprop", "adagrad") else 2 * width


def _offloaded(args: Any, zero3: bool) -> set[str]:
    if zero3:
        zero = args.hf_deepspeed_config.config["zero_optimization"]
        away = {"weights"} if zero.get("offload_param", {}).get("device", "none") != "none" else set()
        if zero.get("offload_optimizer", {}).get("device", "none") != "none":
            away |= {"optimizer", "gradients"}
        return away
    if args.fsdp and (args.fsdp_config or {}).get("cpu_offload"):
        return {"weights", "gradients", "optimizer"}
    return set()


# ----------------------------------------------------------------------------------------------------------------------
# Shapes.


def count_weights(config: Any, model_args: Any) -> dict[str, int]:
    """Weights of the model (tied ones once): all, in linear layers, in one layer, outside the layers, in adapters."""
    model = empty_model(config)
    layers = internals.decoder_layers(model)
    everything = model.num_parameters()
    inside = sum(weight.numel() for layer in layers for weight in layer.parameters())
    linear = [m for layer in layers for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    adapters = 0
    if model_args.lora_r or model_args.qlora:
        targets = adapter_targets(model, model_args)
        for name, module in model.named_modules():
            if name.rsplit(".", 1)[-1] in targets:
                adapters += (model_args.lora_r or 16) * sum(module.weight.shape)
    head = model.get_output_embeddings().weight
    return {
        "all": everything,
        "linear": sum(module.weight.numel() for module in linear),
        "layer": inside // len(layers),
        "outside": everything - inside,
        "adapters": adapters,
        "hidden": head.shape[1],
        "vocabulary": head.shape[0],
    }


def activation_bytes(
    config: Any, args: Any, model_args: Any, rows: int, length: int, padding_free: bool
) -> dict[str, int]:
    """Bytes that autograd keeps of a forward pass on `rows` of `length` tokens, weights apart: in the layers, outside.

    The pass runs on fake tensors: shapes and types go through the real model's code, no memory is taken.
    """
    half = torch.bfloat16 if args.bf16 or args.fp16 else None
    cast = torch.autocast("cpu", dtype=torch.bfloat16) if half else contextlib.nullcontext()
    counted = {"layers": 0, "outside": 0, "count": 0}
    eager = {"attn_implementation": "eager"} if model_args.attn_implementation == "eager" else {}
    with internals.unsharded(), internals.fake_tensors(), no_init_weights():
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=_weight_dtype(config, model_args), **eager
        )
        model.train()
        if model_args.lora_r or model_args.qlora:
            model.requires_grad_(False)
            model.enable_input_require_grads()
        counted["count"] = len(internals.decoder_layers(model))
        if padding_free and internals.attention_kernel(model) == "sdpa" and attention.fits(model, length):
            model.set_attn_implementation(attention.register())
            shape, boundaries = (1, rows * length), {"row_lengths": (length,) * rows}
        else:
            shape, boundaries = (rows, length), {}
        ids = torch.zeros(shape, dtype=torch.long)
        with cast, internals.count_saved_tensors(model, internals.decoder_layers(model), counted):
            model.get_decoder()(input_ids=ids, use_cache=False, **boundaries)
    return counted
