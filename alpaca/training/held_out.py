"""Loss on rows that are not trained on; train.py and evaluation.py measure it with the same function.

Not a command.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from alpaca.common.prompt import IGNORE_INDEX


def answer_losses(model: Any, batch: dict[str, Any], device: Any) -> torch.Tensor:
    """Negative log-likelihood (nats) of each answer token of a collated batch, in its order: float32 [tokens].

    Computed from the logits: the model's own loss holds the routers' balance too in mixtures of experts.
    """
    batch = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
    labels = batch.pop("labels")
    targets = batch.pop("shift_labels") if "shift_labels" in batch else labels[:, 1:]
    with torch.no_grad():
        logits = model(**batch).logits[:, : targets.shape[1]]
        kept = targets != IGNORE_INDEX
        return torch.nn.functional.cross_entropy(logits[kept].float(), targets[kept], reduction="none")


def fused_loss_error(model: Any, batch: dict[str, Any], device: Any) -> float:
    """How far the loss of a model under Liger's kernels, which make no logits, is from its logits' (nats)."""
    wanted = answer_losses(model, batch, device).mean()
    batch = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
    with torch.no_grad():
        return (model(**batch, skip_logits=True).loss - wanted).abs().item()


def loss_on_dataset(
    model: Any, dataset: Any, collate: Callable, batch_size: int, device: Any, rank: int = 0, world: int = 1,
    max_batches: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Mean negative log-likelihood (nats) of every answer token of `dataset`, and their number: {"loss", "tokens"}.

    `dataset`: rows of data.tokenize_dataset; `collate`: either collator of data. The number depends neither on the
    batch size nor on the kind of batch nor on `world`, the number of processes, which all call it: process `rank`
    takes batches rank, rank + world, ... Where one runs out of batches it repeats one that counts nothing, since a
    sharded model needs every process in each forward pass. Where there is no answer token, the loss is nan.
    """
    starts = list(range(0, len(dataset), batch_size))[:max_batches]
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    for turn in range(math.ceil(len(starts) / world)):
        mine = turn * world + rank
        start = starts[mine if mine < len(starts) else 0]
        rows = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
        losses = answer_losses(model, collate(rows), device).double()
        if mine < len(starts):
            sums += torch.stack([losses.sum(), torch.tensor(float(len(losses)), dtype=torch.float64, device=device)])
    model.train(was_training)
    if world > 1:
        torch.distributed.all_reduce(sums)
    return {"loss": (sums[0] / sums[1]).item(), "tokens": int(sums[1])}
