"""Load a model for answering: a full checkpoint, a LoRA adapter, a GGUF file, the embedded model.

Not a command; inference.py, evaluation.py and demo.py import it.

    model, tokenizer = load_model("./alpaca-7b")
"""

import difflib
import sys
from pathlib import Path
from typing import Any

from alpaca.common.errors import UserError
from alpaca.common.files import jload


def load_model(path: str, device: str | None = None, dtype: Any = None, adapter: str | None = None):
    """Loads a model for generation, with its tokenizer: (model, tokenizer).

    `path`: a checkpoint folder, a LoRA adapter's folder (its base comes from adapter_config.json), a GGUF file, a hub
    name, or "embedded". `adapter`: an adapter's folder to put on `path`. `device`: "cuda", "cpu", "auto" (spread over
    all GPUs); the first GPU where there is one by default. `dtype`: "float32", "bfloat16", ...; by default the
    checkpoint's own, and float32 where a float16 checkpoint meets a CPU.

    Raises UserError where the folder is no model, is a weight diff, lacks tensors, or does not fit its tokenizer.
    """
    import torch
    from transformers import GenerationConfig

    if adapter is None and (Path(path) / "adapter_config.json").is_file():
        path, adapter = _base_of_adapter(path), path
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(dtype, str):
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise UserError(f"--dtype {dtype} is no floating-point type. Use float32, bfloat16 or float16.")
        dtype = getattr(torch, dtype)

    if path == "embedded" or path.endswith(".gguf"):
        from alpaca.answers.gguf import find_gguf, load_gguf

        model, tokenizer = load_gguf(find_gguf(None if path == "embedded" else path), dtype or torch.float32)
        model = model.to("cuda" if device == "auto" else device)
    else:
        check_model_path(path)
        model = _load_weights(path, dtype, device)
        # An adapter trained with new tokens carries its own tokenizer.
        tokenizer = _load_tokenizer(adapter if adapter and _has_tokenizer(adapter) else path)
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


def check_model_path(path: str) -> None:
    """Raises UserError where `path` is neither a checkpoint's folder nor a hub's name, or holds a weight diff."""
    from alpaca.weights.manifest import is_weight_diff

    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            found = sorted(child.name for child in folder.iterdir())
            inside = [name for name in found if (folder / name / "config.json").is_file()]
            hint = f" Did you mean {folder / inside[-1]}?" if inside else ""
            listed = ", ".join(found[:8]) or "nothing"
            raise UserError(f"{folder} is no checkpoint: it has no config.json. It holds {listed}.{hint}")
        if is_weight_diff(folder):
            raise UserError(
                f"{folder} is a weight diff, not a model: its answers would be noise. First run\n"
                f"  python weight_diff.py recover --path_raw BASE --path_diff {folder} --path_tuned OUT"
            )
    elif path.startswith((".", "/", "~")) or path.count("/") != 1 or folder.parent.is_dir():
        near = []
        if folder.parent.is_dir():
            near = difflib.get_close_matches(folder.name, [child.name for child in folder.parent.iterdir()], n=1)
        hint = f" Did you mean {folder.parent / near[0]}?" if near else ""
        raise UserError(f"no model at {path}.{hint} Give a checkpoint's folder, or the word embedded.")


def _load_weights(path: str, dtype: Any, device: str):
    from transformers import AutoModelForCausalLM

    options = {"device_map": "auto"} if device == "auto" else {}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype or "auto", output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} cannot be loaded as a model: {error}") from error
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise UserError(
            f"{path}: {len(names)} tensors of the model are not in the checkpoint and would be random: "
            f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}. The checkpoint is incomplete."
        )
    return model if device == "auto" else model.to(device)


def _has_tokenizer(folder: str) -> bool:
    return any((Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def _load_tokenizer(path: str):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{path}: the tokenizer cannot be loaded: {error}") from error


def _base_of_adapter(path: str) -> str:
    base = jload(Path(path) / "adapter_config.json").get("base_model_name_or_path") or ""
    # A relative path was meant from where training ran, or from the adapter's own folder.
    for candidate in (Path(base), Path(path) / base):
        if base and (candidate.is_dir() or candidate.is_file()):
            return str(candidate)
    if base == "embedded" or base.count("/") == 1 and not base.startswith((".", "/")):
        return base
    raise UserError(
        f"{path} is a LoRA adapter of {base or 'an unnamed base model'}, which is not there. "
        f"Name its base: --model_name_or_path BASE --adapter {path}"
    )


def _apply_adapter(model, adapter: str):
    from peft import PeftModel
    from safetensors import safe_open

    folder = Path(adapter)
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{adapter} is no LoRA adapter: it has no adapter_config.json.")
    # Where training added tokens, the adapter holds whole embeddings, and the base needs as many rows to take them.
    weights = folder / "adapter_model.safetensors"
    if weights.is_file():
        with safe_open(weights, "pt") as tensors:
            saved = [tensors.get_slice(name).get_shape()[0] for name in tensors.keys() if "embed_tokens" in name]
        rows = [count for count in saved if count > model.get_input_embeddings().weight.shape[0]]
        if rows:
            model.resize_token_embeddings(max(rows), mean_resizing=False)
    try:
        return PeftModel.from_pretrained(model, adapter).merge_and_unload()
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"the adapter {adapter} does not fit its base model: {error}") from error


def quiet_bars() -> None:
    """No loading bars in log files and pipes."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
