"""Attention for rows that stand end to end: each row attends within itself, and no work is done between rows.

Not a command; train.py chooses it where flash attention, which has a kernel for such batches, is not installed.
torch's own attention knows such a batch only as one long row under a mask and computes all of it: at batch 16 sixteen
times the products that are needed, and a mask of tokens x tokens that every layer keeps for its backward pass.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from alpaca.training.data import PaddingFreeCollator, takes_logits_to_keep
from alpaca.training.held_out import answer_losses
from alpaca.training.internals import attention_kernel, hands_arguments_to_attention

NAME = "sdpa_rows"


def register() -> str:
    """Makes the kernel known to transformers; returns its name, for `attn_implementation`."""
    AttentionInterface.register(NAME, row_attention)
    # Calls without `row_lengths` (evaluation of padded batches, generation) are plain sdpa and need its mask.
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def row_attention(module, query, key, value, attention_mask, row_lengths: Sequence[int] | None = None, **kwargs):
    """transformers' sdpa for each row of `row_lengths` by itself; query, key, value: [1, heads, tokens, width].

    Where `row_lengths` are given the batch's mask is not used: each row is causal within itself.
    """
    if row_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    rows = zip(*(tensor.split(row_lengths, dim=2) for tensor in (query, key, value)), strict=True)
    return torch.cat([sdpa_attention_forward(module, *row, None, **kwargs)[0] for row in rows], dim=1), None


def fits(model: Any, max_length: int | None = None) -> bool:
    """Whether causal attention within rows is all that each layer of `model` does, and the rows' ends reach it.

    Not so for position biases (ALiBi), for layers that hand on a state from token to token (convolutions, linear
    attention) and for models that do not hand their call's arguments down to the attention. `max_length`: the longest
    row, for a kernel that knows no sliding window or chunks; these must then be at least as long.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention", "sliding_attention", "chunked_attention"} or getattr(config, "alibi", False):
        return False
    windows = [getattr(config, name, None) or math.inf for name in ("sliding_window", "attention_chunk_size")]
    return hands_arguments_to_attention(model) and (max_length is None or min(windows) >= max_length)


def padding_free_collator(model, args, say=print) -> PaddingFreeCollator | None:
    """Batches without padding for `model`, whose attention becomes one that does no work between their rows.

    None, and a note, where that attention cannot be had. The mask that transformers would build from restarting
    positions is no way out: not every model hands them to it, and OPT's rows then see each other.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    kernel = attention_kernel(base) or ""
    flash = kernel.startswith("flash_attention")
    # torch.compile would make its code anew for each batch's row lengths.
    if not flash and (args.torch_compile or kernel != "sdpa"):
        say("note: batches are padded: without flash attention, padding-free ones need sdpa and no --torch_compile")
        return None
    if not fits(base, None if flash else args.model_max_length):
        say(f"note: batches are padded: not every layer of {type(base).__name__} is plain causal attention over a row")
        return None
    if not flash:
        base.set_attn_implementation(register())
    return PaddingFreeCollator(takes_logits_to_keep(base), flash_attention=flash, row_attention=not flash)


def rows_stay_apart(
    model, padding_free: Callable, padded: Callable, dataset, device, exact: bool
) -> tuple[bool, float, float]:
    """Whether two short rows have the same losses end to end as padded: rule and kernel, proved on the model itself.

    Also returns the two differences: the mean one from the padded batch's losses (nats), and the largest one in the
    second row's losses when the first row's tokens are replaced. Their limits allow for rounding: `exact` says that
    weights and arithmetic are float32. All processes of a sharded model call it.
    """
    places = np.argsort(dataset["length"][:], kind="stable")[:2]
    first, second = dataset[int(places[0])], dataset[int(places[-1])]
    other = {**first, "input_ids": np.resize(second["input_ids"][::-1], len(first["input_ids"]))}
    was_training = model.training
    model.eval()
    wanted = answer_losses(model, padded([first, second]), device)
    found = answer_losses(model, padding_free([first, second]), device)
    beside_other = answer_losses(model, padding_free([other, second]), device)
    model.train(was_training)
    answer = int(second["length"] - second["prompt_length"])
    apart = (found - wanted).abs().mean().item()
    leak = (beside_other - found)[-answer:].abs().max().item()
    limits = (1e-3, 1e-4) if exact else (0.1, 1e-2)
    return apart <= limits[0] and leak <= limits[1], apart, leak
