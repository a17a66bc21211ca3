"""One training loop for everything that trains: retraining, fine-tuning, gradient ascent."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from fastunlearn.data import Batches, LossFunction, per_sample_loss, read
from fastunlearn.hooks import device_of
from fastunlearn.language import loss_for
from fastunlearn.outcome import track


def descend(
    model: nn.Module,
    batches: Batches,
    name: str,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    loss_fn: LossFunction | None = None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    sign: float = 1.0,
    after_epoch: Callable[[int], bool] | None = None,
    progress: bool = False,
) -> None:
    """Step the optimizer on the mean loss of every batch, ``epochs`` times over; ``sign=-1`` ascends.

    ``after_epoch`` is told the number of epochs done and returns whether to stop. The loop changes no mode: call it
    with the model in the mode it should train in. Raises FloatingPointError when the loss is no longer finite.
    """
    device = device_of(model)
    loss_fn = loss_for(model, loss_fn)
    for epoch in _epochs(epochs, name, progress):
        for batch in read(batches, name, device):
            loss = per_sample_loss(loss_fn, batch.outputs(model), batch.targets, batch.size).mean()
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"the loss on {name} is {loss.item()} in epoch {epoch}; lower the learning rate"
                )
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(sign * loss)
            optimizer.step()
            torch.clear_autocast_cache()  # a context around the loop would go on with casts of the old weights
            if scheduler is not None:
                scheduler.step()
        if after_epoch is not None and after_epoch(epoch):
            break
    optimizer.zero_grad(set_to_none=True)


def autocast_to(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """torch.autocast of ``dtype``; for None, whatever the caller has chosen."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def _epochs(epochs: int, name: str, progress: bool) -> Iterable[int]:
    return track(range(1, epochs + 1), f"epochs over {name}", progress)
