"""Loads a model for answering: a full checkpoint, a LoRA adapter, a GGUF file, the embedded model.

model, tokenizer = load_model("./alpaca-7b")
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from safetensors import safe_open
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from alpaca.answers.model_paths import check_model, find_gguf, is_gguf
from alpaca.common.errors import UserError, first_line


def load_model(path: str, device: str | None = None, dtype: str | None = None, adapter: str | None = None):
    """Loads a model for generation, with its tokenizer: (model, tokenizer).

    `path`: a checkpoint folder, a LoRA adapter's folder (its base comes from adapter_config.json), a GGUF file, a hub
    name, or "embedded". `adapter`: an adapter's folder to put on `path`. `device`: "cuda", "cpu", "auto" (spread over
    all GPUs); by default the GPU with this process's LOCAL_RANK where there is one. `dtype`: "float32", "bfloat16",
    ...; by default the checkpoint's own, and float32 where a float16 checkpoint meets a CPU.

    Raises UserError where there is no model or no such device, it is a weight diff, its files are damaged, tensors are
    missing, or it does not fit its tokenizer.
    """
    if not sys.stderr.isatty():  # no loading bars in log files and pipes
        transformers.utils.logging.disable_progress_bar()
    path, adapter = check_model(path, adapter)
    device = find_device(device)
    torch_dtype = getattr(torch, dtype, None) if dtype else None
    if dtype and not (isinstance(torch_dtype, torch.dtype) and torch_dtype.is_floating_point):
        raise UserError(f"--dtype {dtype} is no floating-point type. Use float32, bfloat16 or float16.")

    if is_gguf(path):
        model, tokenizer = load_gguf(find_gguf(None if path == "embedded" else path), torch_dtype or torch.float32)
        model = model.to(find_device(None) if device == "auto" else device)
    else:
        model = _load_weights(path, torch_dtype, device)
        # An adapter trained with new tokens carries its own tokenizer.
        has_own = adapter and any((Path(adapter) / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
        tokenizer_path = adapter if has_own else path
        with loading(tokenizer_path, "a tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    if adapter:
        model = _apply_adapter(model, adapter)
    if model.dtype == torch.float16 and model.device.type == "cpu" and dtype is None:
        model = model.float()

    rows = model.get_input_embeddings().weight.shape[0]
    if rows < len(tokenizer):
        raise UserError(
            f"{path}: the model has {rows} rows of embeddings, its tokenizer {len(tokenizer)} entries: they belong to "
            "different checkpoints (a base model beside a fine-tuned tokenizer?). Use the folder train.py wrote."
        )
    # A checkpoint's own sampling defaults (temperature, penalties) must not leak into greedy answers.
    stops = model.generation_config.eos_token_id
    stops = {*(stops if isinstance(stops, list) else [stops]), tokenizer.eos_token_id} - {None}
    if not stops:
        raise UserError(f"{path}: neither the tokenizer nor the model names an end-of-sequence token.")
    # The filler of padded positions, which the attention mask hides; no token has to be added for it.
    filler = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else min(stops)
    model.generation_config = GenerationConfig(eos_token_id=sorted(stops), pad_token_id=filler)
    return model.eval(), tokenizer


def find_device(device: str | None) -> str:
    """The device that a model goes to: this process's GPU for "cuda", and for None where there is one, else the CPU.

    Raises UserError where torch has no such device here.
    """
    if device in (None, "cuda"):
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else device or "cpu"
    if device != "auto":
        try:
            torch.zeros(1, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = first_line(error)
            raise UserError(f"--device {device} cannot be used here ({reason}). Leave it out, or use cpu.") from error
    return device


@contextlib.contextmanager
def loading(path: str | Path, what: str) -> Iterator[None]:
    """Turns whatever the libraries raise about damaged, truncated or foreign files into a UserError naming `path`."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        raise UserError(f"{path} cannot be loaded as {what}; is a file damaged or incomplete?\n{reason}") from error


def _load_weights(path: str, dtype: torch.dtype | None, device: str):
    options = {"device_map": "auto"} if device == "auto" else {}
    with loading(path, "a model"):
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype or "auto", output_loading_info=True, **options
        )
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise UserError(
            f"{path}: {len(names)} tensors of the model are not in the checkpoint and would be random: "
            f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}. The checkpoint is incomplete."
        )
    return model if device == "auto" else model.to(device)


def _apply_adapter(model, adapter: str):
    with loading(adapter, "an adapter of this base model"):
        # Where training added tokens, the adapter holds whole embeddings, and the base needs as many rows to take them.
        weights = Path(adapter) / "adapter_model.safetensors"
        if weights.is_file():
            with safe_open(weights, "pt") as tensors:
                saved = [tensors.get_slice(name).get_shape()[0] for name in tensors.keys() if "embed_tokens" in name]
            if max(saved, default=0) > model.get_input_embeddings().weight.shape[0]:
                model.resize_token_embeddings(max(saved), mean_resizing=False)
        return PeftModel.from_pretrained(model, adapter).merge_and_unload()


def load_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model (plain, on the CPU) and the tokenizer that the GGUF file `path` holds.

    Raises UserError where the file is damaged or holds an architecture that transformers cannot read, and where the
    package that reads it is missing.
    """
    try:
        from gguf import GGUFReader  # only where requirements-quickstart.txt is installed
    except ImportError as error:
        raise UserError(f"{path} needs the package gguf. Type: pip install -r requirements-quickstart.txt") from error
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    with loading(path, "a GGUF model"):
        unpacked = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
        kind = GGUFReader(path).fields.get("tokenizer.ggml.pre")
    if kind and kind.contents() == "smollm":
        # transformers reads the vocabulary and forgets this rule: digits are cut off before anything else. Without it
        # a blank line before a digit becomes two tokens where the model was trained on one.
        split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)

    # The unpacked model counts as quantised and refuses to be saved: its weights move into one that never was.
    config = unpacked.config
    del config.quantization_config
    config.dtype = dtype
    plain = type(unpacked)._from_config(config, dtype=dtype)
    plain.load_state_dict(unpacked.state_dict())
    plain.generation_config = unpacked.generation_config
    return plain.eval(), tokenizer


def not_finite(model) -> UserError:
    """The error for a model whose scores are not finite: it names the first tensor that is the reason."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and (bad := int((~torch.isfinite(tensor)).sum())):
            return UserError(
                f"the model's scores are not finite (nan or inf), so it cannot answer. Its weights are damaged: "
                f"{bad:,} of {tensor.numel():,} values of {name} are not finite. Load or train it again."
            )
    return UserError(
        f"the model's scores are not finite (nan or inf), so it cannot answer. Its weights are finite, so the numbers "
        f"overflow in {str(model.dtype).removeprefix('torch.')}: choose --dtype float32 or bfloat16."
    )
