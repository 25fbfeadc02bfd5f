"""Attention for rows that stand end to end: each row attends within itself, and no work is done between rows.

Not a command; train.py chooses among three kernels for such batches: flash attention where it is installed, torch's own
`varlen_attn` on GPUs in 16 bits, and transformers' sdpa row by row everywhere else. Plain sdpa knows such a batch only
as one long row under a mask and computes all of it: at batch 16 sixteen times the products that are needed, and a mask
of tokens x tokens that every layer keeps for its backward pass.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from alpaca.training.data import PaddingFreeCollator, takes_logits_to_keep, without_adapters
from alpaca.training.held_out import answer_losses
from alpaca.training.internals import attention_kernel, hands_arguments_to_attention, supports_flash_attention

ROWS, VARLEN = "sdpa_rows", "varlen_rows"
VARLEN_TYPES = (torch.bfloat16, torch.float16)


def register(name: str = ROWS) -> str:
    """Makes a kernel of this module known to transformers; returns its name, for `attn_implementation`."""
    AttentionInterface.register(name, {ROWS: row_attention, VARLEN: varlen_attention}[name])
    AttentionMaskInterface.register(name, rows_mask)
    return name


def rows_mask(q_length, kv_length, attention_mask=None, allow_is_causal_skip=True, **kwargs):
    """sdpa's mask for calls without row borders (padded batches, generation); none for rows that stand end to end.

    transformers recognises the latter by their positions, and forbids to leave the mask out.
    """
    if attention_mask is None and not allow_is_causal_skip and q_length == kv_length > 1:
        return None
    return sdpa_mask(
        q_length=q_length, kv_length=kv_length, attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip, **kwargs,
    )  # fmt: skip


@torch.compiler.disable  # its loop would be compiled anew for each batch's row lengths
def row_attention(
    module, query, key, value, attention_mask, row_lengths: Sequence[int] | None = None, sliding_window=None, **kwargs
):
    """transformers' sdpa for each row of `row_lengths` by itself; query, key, value: [1, heads, tokens, width].

    Where `row_lengths` are given the batch's mask is not used: each row is causal within itself, and sees the
    `sliding_window` tokens up to itself where the layer has one.
    """
    if row_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    masks = [window_mask(length, sliding_window, query.device) for length in row_lengths]
    rows = zip(*(tensor.split(row_lengths, dim=2) for tensor in (query, key, value)), masks, strict=True)
    return torch.cat([sdpa_attention_forward(module, *row, **kwargs)[0] for row in rows], dim=1), None


def window_mask(length: int, window: int | None, device: Any) -> torch.Tensor | None:
    """[1, 1, length, length]: whether a token sees another one, at most `window` - 1 places before it; None: all do."""
    if window is None or length <= window:
        return None
    places = torch.arange(length, device=device)
    behind = places[:, None] - places
    return ((behind >= 0) & (behind < window))[None, None]


def varlen_attention(
    module, query, key, value, attention_mask, cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None, scaling: float | None = None, sliding_window: int | None = None,
    dropout: float = 0.0, **kwargs,
):  # fmt: skip
    """torch's flash kernel on all rows at once; query, key, value: [1, heads, tokens, width], on a GPU.

    `cu_seq_lens_q`: int32 [rows + 1], the place where each row begins, and the end. The kernel computes in 16 bits, so
    it takes the type of autocast, as sdpa does. What it cannot compute (float32, dropout, heads wider than 256) goes
    row by row.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    device = query.device.type
    half = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    width = query.shape[-1]
    if half not in VARLEN_TYPES or dropout or width > 256 or width % 8 or value.shape[-1] != width:
        lengths = cu_seq_lens_q.diff().tolist()
        return row_attention(
            module, query, key, value, None, lengths, sliding_window, scaling=scaling, dropout=dropout, **kwargs
        )
    rows = [tensor[0].transpose(0, 1).to(half) for tensor in (query, key, value)]
    # The kernel counts the tokens before a token, transformers the token too.
    window = (sliding_window - 1, 0) if sliding_window else (-1, 0)
    found = varlen_attn(
        *rows, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling, window_size=window,
        enable_gqa=True,
    )  # fmt: skip
    return found[None], None


def has_varlen(args: Any, weights: torch.dtype) -> bool:
    """Whether torch's kernel can run: an NVIDIA GPU of Ampere or newer, computing in 16 bits."""
    half = args.bf16 or args.fp16 or weights in VARLEN_TYPES
    return half and args.device.type == "cuda" and torch.cuda.get_device_capability(args.device)[0] >= 8


def fits(model: Any, max_length: int) -> bool:
    """Whether causal attention within rows is all that each layer of `model` does, and the rows' ends reach it.

    Not so for position biases (ALiBi), for layers that hand on a state from token to token (convolutions, linear
    attention), for models that do not hand their call's arguments down to the attention, and for chunks shorter than
    `max_length`, the longest row. Sliding windows as short reach it in models that flash attention is made for.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention", "sliding_attention", "chunked_attention"} or getattr(config, "alibi", False):
        return False
    window, chunk = (getattr(config, name, None) or math.inf for name in ("sliding_window", "attention_chunk_size"))
    return (
        hands_arguments_to_attention(model)
        and chunk >= max_length
        and (window >= max_length or supports_flash_attention(model))
    )


def padding_free_collator(model, args, say=print) -> PaddingFreeCollator | None:
    """Batches without padding for `model`, whose attention becomes one that does no work between their rows.

    None, and a note, where that attention cannot be had. The mask that transformers would build from restarting
    positions is no way out: not every model hands them to it, and OPT's rows then see each other.
    """
    base = without_adapters(model)
    kernel = attention_kernel(base) or ""
    flash = kernel.startswith("flash_attention")
    if not flash and kernel != "sdpa":
        say(f"note: batches are padded: padding-free ones need flash attention or sdpa, and the attention is {kernel}")
        return None
    if not fits(base, args.model_max_length):
        say(f"note: batches are padded: not every layer of {type(base).__name__} is plain causal attention over a row")
        return None
    varlen = not flash and has_varlen(args, next(base.parameters()).dtype)
    if not flash:
        base.set_attn_implementation(register(VARLEN if varlen else ROWS))
    name = kernel if flash else "torch's varlen_attn" if varlen else "sdpa, row by row"
    say(f"attention over the rows of a batch, which stand end to end: {name}")
    return PaddingFreeCollator(
        takes_logits_to_keep(base), borders=flash or varlen, row_lengths=not flash and not varlen
    )


def rows_stay_apart(
    model, padding_free: Callable, padded: Callable, dataset, device, exact: bool, window: int | None = None
) -> tuple[bool, float, float]:
    """Whether two short rows have the same losses end to end as padded: rule and kernel, proved on the model itself.

    Where the model has a sliding `window`, the second row is the shortest one that is longer, if there is one.
    Also returns the two differences: the mean one from the padded batch's losses (nats), and the largest one in the
    second row's losses when the first row's tokens are replaced. Their limits allow for rounding: `exact` says that
    weights and arithmetic are float32. All processes of a sharded model call it.
    """
    lengths = np.asarray(dataset["length"][:])
    places = np.argsort(lengths, kind="stable")
    longer = np.searchsorted(lengths[places], window or 0, side="right")
    first, second = dataset[int(places[0])], dataset[int(places[min(max(longer, 1), len(places) - 1)])]
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
