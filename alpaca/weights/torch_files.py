"""Where the tensors lie in a file of torch.save: pytorch_model*.bin of old checkpoints, Meta's consolidated.*.pth.

A module of its own, since importing torch takes 0.3 GB and two seconds, which safetensors files do not need.
"""

from pathlib import Path

import torch

from alpaca.common.errors import UserError, first_line
from alpaca.common.files import refuse_lfs_pointer

TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def torch_table(path: Path) -> list[tuple[str, str, tuple[int, ...], int]]:
    """(name, dtype, shape, offset) of each tensor in a torch.save file.

    The file is a zip whose members are not compressed, so each storage has one place in it. On the meta device torch
    unpickles the table of tensors alone (weights only, no code) and notes that place in `_checkpoint_offset`, which is
    the one way to learn it without mapping the file. Raises UserError where the file is damaged or holds other things.
    """
    refuse_lfs_pointer(path)
    try:
        state = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # noqa: BLE001 - torch raises what its zip reader and unpickler come upon
        reason = first_line(error)
        raise UserError(f"{path} cannot be read as a file of weights ({reason}). Fetch it again.") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}. Expected a state dict: names and tensors.")
    table = []
    for name, value in state.items():
        if not isinstance(value, torch.Tensor) or not isinstance(name, str):
            raise UserError(f"{path}: {name} is not a tensor. Expected a state dict: names and tensors.")
        offset = value.untyped_storage()._checkpoint_offset
        if offset is None or not value.is_contiguous() or value.dtype not in TYPES:
            raise UserError(
                f"{path}: {name} is not stored in one piece (written by torch before 1.6, or a view). Load the model "
                "with transformers and save_pretrained it once: that writes safetensors."
            )
        place = offset + value.storage_offset() * value.element_size()
        table.append((name, TYPES[value.dtype], tuple(value.shape), place))
    return table
