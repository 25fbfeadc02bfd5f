"""A GGUF model as a plain Hugging Face checkpoint, every tensor of which is read back and compared."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alpaca.answers.loading import load_gguf
from alpaca.common.files import usual_rights


def export(gguf: Path, folder: Path, dtype: str) -> int:
    """Writes `gguf` into `folder`; the number of parameters. Raises UserError where the file cannot be read."""
    model, tokenizer = load_gguf(gguf, getattr(torch, dtype))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):  # safetensors makes them readable by their owner alone
        usual_rights(weights)
    check_export(folder, model, tokenizer)
    return sum(p.numel() for p in model.parameters())


def check_export(folder: Path, model: Any, tokenizer: Any) -> None:
    """Loads the checkpoint in `folder` as a stranger would; RuntimeError where it is not `model`, bit for bit."""
    written, report = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    if problems := {what: names for what, names in report.items() if names}:
        raise RuntimeError(f"the exported checkpoint does not load cleanly: {problems}")
    expected, found = model.state_dict(), written.state_dict()
    if expected.keys() != found.keys():
        raise RuntimeError(f"the exported checkpoint has other tensors: {sorted(expected.keys() ^ found.keys())[:5]}")
    for name, tensor in expected.items():
        if tensor.dtype != found[name].dtype or not torch.equal(tensor, found[name]):
            raise RuntimeError(f"the exported tensor {name} differs from the one in memory")
    probe = "In 1920,\n\n12 don't,  und\tnaïve 中文 🙂.\n### Response:" + (tokenizer.eos_token or "")
    if AutoTokenizer.from_pretrained(folder)(probe)["input_ids"] != tokenizer(probe)["input_ids"]:
        raise RuntimeError("the exported tokenizer encodes differently from the one in memory")
