"""Attention for rows that stand end to end: each row attends within itself, and no work is done between rows.

Not a command; train.py chooses it where flash attention, which has a kernel for such batches, is not installed.
torch's own attention knows such a batch only as one long row under a mask and computes all of it: at batch 16 sixteen
times the products that are needed, and a mask of tokens x tokens that every layer keeps for its backward pass.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from alpaca.training.data import PaddingFreeCollator, takes_logits_to_keep
from alpaca.training.library_internals import attention_kernel, hands_arguments_to_attention

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


def fits(model: Any, max_length: int) -> bool:
    """Whether causal attention within rows of up to `max_length` tokens is all that each layer of `model` does.

    Not so for a sliding window or chunks that are shorter than the rows, for position biases (ALiBi), for layers that
    hand a state from token to token, and for models that do not hand their call's arguments down to the attention.
    """
    config = model.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    kinds = set(getattr(config, "layer_types", None) or ())
    plain = kinds <= {"full_attention", "sliding_attention", "chunked_attention"}
    plain = plain and not getattr(config, "alibi", False)
    return plain and hands_arguments_to_attention(model) and all(not size or size >= max_length for size in windows)


def padding_free_collator(model, args, say=print):
    """Batches without padding for `model`, whose attention becomes one that does no work between their rows.

    None, and a note, where that attention cannot be had. The mask that transformers would build from restarting
    positions is no way out: not every model hands them to it, and OPT's rows then see each other.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    flash = attention_kernel(base).startswith("flash_attention")
    if flash:
        return PaddingFreeCollator(takes_logits_to_keep(base), flash_attention=True)
    # torch.compile would make its code anew for each batch's row lengths.
    if args.torch_compile or attention_kernel(base) != "sdpa":
        say("note: batches are padded: without flash attention, padding-free ones need sdpa and no --torch_compile")
    elif not fits(base, args.model_max_length):
        say(f"note: batches are padded: not every layer of {type(base).__name__} is plain causal attention over a row")
    else:
        base.set_attn_implementation(register())
        return PaddingFreeCollator(takes_logits_to_keep(base), row_attention=True)
    return None
