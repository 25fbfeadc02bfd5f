"""torch's varlen_attn without a GPU: the same signature, computed by plain sdpa for each row under an explicit mask.

An operator of its own, as torch's is, so that torch.compile sees one node and not a loop. Slow.
"""

import itertools

import torch


@torch.library.custom_op("alpaca_tests::varlen", mutates_args=())
def varlen_rows(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, borders: torch.Tensor, scale: float | None,
    left: int, right: int,
) -> torch.Tensor:  # fmt: skip
    return by_row(query, key, value, borders, scale, left, right)


@varlen_rows.register_fake
def _(query, key, value, borders, scale, left, right):
    return torch.empty_like(query)


def keep_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.rest = inputs[4:]


@torch.library.custom_op("alpaca_tests::varlen_backward", mutates_args=())
def varlen_backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, borders: torch.Tensor,
    scale: float | None, left: int, right: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    # By hand: no gradients are recorded inside an operator.
    scale = scale or query.shape[-1] ** -0.5
    parts = []
    for (q, k, v, seen), (g, *_) in zip(
        rows_of(query, key, value, borders, left, right), rows_of(grad, grad, grad, borders, left, right), strict=True
    ):
        weights = ((q @ k.mT) * scale).masked_fill(~seen, -torch.inf).softmax(-1)
        into_weights = g @ v.mT
        into_scores = weights * (into_weights - (into_weights * weights).sum(-1, keepdim=True)) * scale
        into = into_scores @ k, into_scores.mT @ q, weights.mT @ g
        shared = [tensor.shape[1] for tensor in (query, key, value)]
        parts.append(
            [t[0].unflatten(0, (heads, -1)).sum(1).transpose(0, 1) for t, heads in zip(into, shared, strict=True)]
        )
    return tuple(torch.cat(rows).contiguous() for rows in zip(*parts, strict=True))


@varlen_backward.register_fake
def _(grad, query, key, value, borders, scale, left, right):
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def backward(ctx, grad):
    return *varlen_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.rest), None, None, None, None


varlen_rows.register_autograd(backward, setup_context=keep_inputs)


def rows_of(query, key, value, borders, left, right):
    """Each row's query, key and value, [1, heads, length, width] with as many heads each, and who sees whom.

    A token sees `left` tokens before it and `right` after it; -1: all.
    """
    groups = query.shape[1] // key.shape[1]
    for begin, end in itertools.pairwise(borders.tolist()):
        q, k, v = (tensor[begin:end].transpose(0, 1)[None] for tensor in (query, key, value))
        places = torch.arange(end - begin)
        behind = places[:, None] - places
        seen = (behind <= (left if left >= 0 else end)) & (-behind <= (right if right >= 0 else end))
        yield q, k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1), seen


def by_row(query, key, value, borders, scale, left, right):
    """[tokens, heads, width] -> the same shape."""
    sdpa = torch.nn.functional.scaled_dot_product_attention
    rows = rows_of(query, key, value, borders, left, right)
    return torch.cat([sdpa(*row, attn_mask=seen, scale=scale)[0].transpose(0, 1) for *row, seen in rows]).contiguous()


def varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    assert query.shape[1] == key.shape[1] or enable_gqa
    assert cu_seq_q.dtype == torch.int32 and query.dtype == key.dtype == value.dtype
    return varlen_rows(query.contiguous(), key.contiguous(), value.contiguous(), cu_seq_q, scale, *window_size)
