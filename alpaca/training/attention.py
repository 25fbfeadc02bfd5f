"""Attention for rows that stand end to end: each row attends within itself, and no work is done between rows.

Not a command; train.py chooses it where flash attention, which has a kernel for such batches, is not installed.
torch's own attention knows such a batch only as one long row under a mask and computes all of it: at batch 16 sixteen
times the products that are needed, and a mask of tokens x tokens that every layer keeps for its backward pass.
"""

from collections.abc import Sequence
from typing import Any

NAME = "sdpa_rows"


def register() -> str:
    """Makes the kernel known to transformers; returns its name, for `attn_implementation`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, row_attention)
    # Calls without `row_lengths` (evaluation of padded batches, generation) are plain sdpa and need its mask.
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def row_attention(module, query, key, value, attention_mask, row_lengths: Sequence[int] | None = None, **kwargs):
    """transformers' sdpa for each row of `row_lengths` by itself; query, key, value: [1, heads, tokens, width].

    The batch's mask is not looked at where `row_lengths` are given: causal within the row is all that they mean.
    """
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

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
    return plain and model._supports_attention_backend and all(not size or size >= max_length for size in windows)
