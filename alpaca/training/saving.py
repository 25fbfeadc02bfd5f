"""The final model: gathered from all processes, written, read back, and only then seen in the output folder.

Not a command; train.py uses it.
"""

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from alpaca.common.errors import UserError
from alpaca.common.files import fsync_dir, jdump, jload, usual_rights
from alpaca.common.prompt import alpaca_chat_template
from alpaca.training.checkpoint import SEAL, UNVERIFIED, seal
from alpaca.training.internals import decoder_layers, unsharded
from alpaca.training.model import merge_adapters


def save(trainer, tokenizer, config, model_args, args, say=print) -> None:
    """Gathers the weights on the first process's CPU, writes them and reads them back (`write_verified`)."""
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

    def write() -> None:
        plain, tensors = merge_adapters(model, weights, dtype) if model_args.merge_lora else (model, weights)
        coarse = args.bf16 or args.fp16 or args.tf32 or dtype != torch.float32
        coarse = coarse or model_args.dtype not in ("float32", "auto")
        # Adapters of a 4-bit base are opened on the whole one, which 4 bits are no fine copy of.
        rounding = 0.5 if model_args.qlora else 5e-2 if coarse else 1e-3
        done = write_verified(
            plain, tensors, dtype, tokenizer, args.output_dir, probe, expected, rounding, args.cache_dir
        )
        # Of adapters the logits alone are compared.
        compared = "" if (Path(args.output_dir) / "adapter_config.json").exists() else "every tensor as in memory, "
        say(
            f"saved to {args.output_dir} in {done['dtype']}: {done['files']} files, {done['bytes'] / 1e9:.2f} GB; read "
            f"back, {compared}logits within {done['difference']:.1e} of the trained model's"
        )

    on_first_process(args, write)
    trainer.save_state()


def gather_weights(model: Any, accelerator: Any, dtype: Any) -> dict[str, Any]:
    """All weights of `model` on the CPU of rank 0 in `dtype`, one tensor at a time; {} on the other ranks.

    Every rank must call it. `model`: what Trainer trains, sharded (FSDP, ZeRO) or not. Tied weights appear under
    every name that the model's own state dict gives them.
    """
    main, weights = accelerator.is_main_process, {}
    kind = str(accelerator.distributed_type).rsplit(".", 1)[-1]

    def keep(name: str, tensor: Any) -> None:
        if main:
            target = dtype if tensor.is_floating_point() else tensor.dtype
            weights[name] = tensor.detach().to("cpu", target, copy=True).contiguous()

    if kind == "DEEPSPEED":
        import deepspeed  # optional, and seconds to import
        from deepspeed.utils import safe_get_full_fp32_param

        inner = accelerator.unwrap_model(model, keep_torch_compile=False)
        for name, parameter in inner.named_parameters(remove_duplicate=False):
            # The float32 master copy where there is one: 16-bit shards are only its rounding.
            master = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
            if master is not None:
                keep(name, master.view(getattr(parameter, "ds_shape", parameter.shape)))
            else:
                with deepspeed.zero.GatheredParameters([parameter]):
                    keep(name, parameter)
        saved_buffers = set(inner.state_dict())
        for name, buffer in inner.named_buffers():
            if name in saved_buffers:
                keep(name, buffer)
    elif kind == "FSDP" and not accelerator.is_fsdp2:
        for name, tensor in accelerator.get_state_dict(model).items():
            keep(name, tensor)
    else:
        for name, tensor in accelerator.unwrap_model(model, keep_torch_compile=False).state_dict().items():
            if hasattr(tensor, "full_tensor"):  # a DTensor; offloaded ones pass through the device for the gather
                tensor = tensor.to(accelerator.device).full_tensor()
            keep(name, tensor)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return weights


def write_verified(
    model: Any, weights: dict[str, Any], dtype: Any, tokenizer: Any, output_dir: str, probe: Any, expected: Any,
    rounding: float, cache_dir: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Writes a plain Hugging Face checkpoint into `output_dir`, reads it back, and only then lets it be seen there.

    Called on rank 0. `model`: a PreTrainedModel or PeftModel whose class and settings describe `weights` (its own
    tensors are not read); `probe`: (1, n) token ids; `expected`: (1, n, vocabulary) float32 logits of the model that
    was trained; `rounding`: how far, relatively, the written model's may be from them; `cache_dir`: where an adapter's
    base was downloaded to. The files are made in a folder beside, checked there (see `check_model`), moved one by one
    and sealed. Raises RuntimeError that names the first thing that is wrong; the result in `output_dir` is then as
    before, and the new files lie in its folder "unverified_model".
    """
    output_dir = Path(output_dir)
    beside, unverified = output_dir / ".model.partial", output_dir / UNVERIFIED
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        # A tied head is stored once, as in the base: in a diff of the two it would count twice.
        is_tied = model.config.get_text_config().tie_word_embeddings
        tied = getattr(model, "all_tied_weights_keys", None) or {} if is_tied else {}
        weights = {name: tensor for name, tensor in weights.items() if tied.get(name) not in weights}
        model.save_pretrained(beside, state_dict=weights, max_shard_size="5GB")
        tokenizer.save_pretrained(beside)
        for file in beside.iterdir():
            usual_rights(file)
        is_adapter = (beside / "adapter_config.json").exists()
        if not is_adapter:
            # save_pretrained writes the dtype that the model has in memory, and Trainer has switched the cache off.
            config = jload(beside / "config.json")
            config |= {"dtype": str(dtype).removeprefix("torch."), "use_cache": True}
            jdump(config, beside / "config.json", indent=2)
        try:
            difference = check_model(beside, None if is_adapter else weights, probe, expected, rounding, cache_dir)
        except Exception as error:
            # Without checkpoints this is all that is left of the training.
            shutil.rmtree(unverified, ignore_errors=True)
            os.replace(beside, unverified)
            error.add_note(f"The model as it was written, which failed this check, is kept in {unverified}")
            raise
        names = sorted(p.name for p in beside.iterdir() if p.name != "README.md")  # train.py writes its own card
        # A plain model beside an old adapter_config.json, and an adapter beside a config.json, cannot be loaded.
        settings = ("config.json", "adapter_config.json", "generation_config.json", "Modelfile", SEAL)
        for old in (*output_dir.glob("*.safetensors*"), *(output_dir / name for name in settings)):
            if old.name not in names:
                old.unlink(missing_ok=True)
        # config.json last: until then nothing there can be loaded as a model.
        for name in sorted(names, key=lambda name: name in ("config.json", "adapter_config.json")):
            os.replace(beside / name, output_dir / name)
        seal(output_dir, names, kind="adapter" if is_adapter else "model")
        fsync_dir(output_dir)
        shutil.rmtree(unverified, ignore_errors=True)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    total = sum((output_dir / name).stat().st_size for name in names)
    return {"files": len(names), "bytes": total, "dtype": str(dtype).removeprefix("torch."), "difference": difference}


def check_model(
    folder: Path, weights: dict[str, Any] | None, probe: Any, expected: Any, rounding: float,
    cache_dir: str | None = None,
) -> float:  # fmt: skip
    """Opens a written checkpoint as a stranger would and compares it with what was meant.

    Every tensor of the files: the name and bits of `weights` (where given), finite; a model from the files: one forward
    pass on `probe`. Returns the relative difference |logits - expected| / |expected|; raises RuntimeError where it is
    above `rounding` or anything else is wrong.
    """

    def wrong(text: str) -> None:
        raise RuntimeError(f"the written checkpoint is not what was trained: {text}")

    seen: set[str] = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                tensor = tensors.get_tensor(name)
                seen.add(name)
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    wrong(f"{file.name}: {name} holds values that are not finite")
                meant = (weights or {}).get(name)
                if meant is not None and (meant.dtype != tensor.dtype or not torch.equal(meant, tensor)):
                    wrong(f"{file.name}: {name} differs from the tensor in memory")
    if not seen:
        wrong("no tensor was written")
    if (folder / "adapter_config.json").exists():
        with unsharded():
            model, report = AutoPeftModelForCausalLM.from_pretrained(folder, cache_dir=cache_dir), {}
    else:
        with unsharded():
            model, report = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, report.get(what, ()))):
            wrong(f"{what.replace('_', ' ')}: {', '.join(names[:5])}")
    model = float32_by_layer(model).eval()
    with torch.no_grad():
        logits = model(input_ids=probe.cpu()).logits.float()
    difference = ((logits - expected.cpu()).norm() / expected.cpu().norm()).item()
    if not difference <= rounding:  # also where it is nan
        wrong(f"its logits differ from the trained model's by {difference:.2%} (at most {rounding:.1%} is rounding)")
    return difference


def float32_by_layer(model: Any) -> Any:
    """`model` made to compute in float32 while only one of its layers at a time is held in float32."""
    layers = decoder_layers(model)
    inside = {id(weight) for layer in layers for weight in layer.parameters()}
    for weight in model.parameters():
        if weight.is_floating_point() and id(weight) not in inside:
            weight.data = weight.data.float()
    for layer in layers:
        stored = next(layer.parameters()).dtype
        layer.register_forward_pre_hook(lambda layer, _: layer.float() and None)
        layer.register_forward_hook(lambda layer, *_, stored=stored: layer.to(stored) and None)
    return model


def on_first_process(args: Any, work: Callable[[], None], seconds: float = 10.0) -> None:
    """Runs `work` on the first process while the others wait for it, however long it takes.

    A barrier gives up after --ddp_timeout (1,800 s), which writing, checking or uploading a large model may take. Here
    all meet every few seconds. Raises on every process where `work` fails: UserError on those that only waited.
    """
    if args.world_size == 1:
        return work()
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(work) if args.process_index == 0 else None
        state = torch.zeros(1, device=args.device)  # 0: at work, 1: done, 2: failed
        while not state.item():
            if job is not None:
                wait_for([job], timeout=seconds)
                state.fill_(0 if not job.done() else 2 if job.exception() else 1)
            torch.distributed.broadcast(state, src=0)
        if job is not None:
            job.result()
        elif state.item() == 2:
            raise UserError("the first process failed; its message says why")
