"""One training loop for everything that trains: retraining, fine-tuning, gradient ascent."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastunlearn.data import Batches, LossFunction, count_batches, per_sample_loss
from fastunlearn.hooks import device_of
from fastunlearn.language import loss_for
from fastunlearn.outcome import track
from fastunlearn.parallel.deal import Dealt, together
from fastunlearn.parallel.ranks import Ranks, replicas, sharing


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

    On several ranks a step takes the samples of all of them at once, each counting the same; of dealt batches every
    rank takes a part of each, so that steps are those of one process. DistributedDataParallel in torch.compile trains
    uncompiled.
    """
    ranks, batches = sharing(model), training_share(batches)
    device = device_of(model)
    running = _engine(model)
    loss_fn = loss_for(model, loss_fn)
    for epoch in _epochs(epochs, name, progress):
        for batch, counts in together(batches, name, device, ranks):
            losses = per_sample_loss(loss_fn, batch.outputs(running), batch.targets, batch.size)
            loss, reported = _joint(losses, counts, ranks)
            if not torch.isfinite(reported):
                raise FloatingPointError(
                    f"the loss on {name} is {reported.item()} in epoch {epoch}; lower the learning rate"
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


def training_share(batches: Batches) -> Batches:
    """What this rank trains on: of dealt batches a part of each, of others all."""
    return batches.split if isinstance(batches, Dealt) else batches


def count_steps(model: nn.Module, batches: Batches) -> int:
    """Of :func:`descend` in an epoch: as many on every rank as the one with the most batches has."""
    steps: list[int] = sharing(model).gather(count_batches(training_share(batches)))
    return max(steps)


def _engine(model: nn.Module) -> nn.Module:
    """DistributedDataParallel made anew, for the parameters that require grad now; any other model as it is."""
    ddp = replicas(model)
    if ddp is None:
        return model
    return DistributedDataParallel(
        ddp.module, device_ids=ddp.device_ids, process_group=ddp.process_group, broadcast_buffers=ddp.broadcast_buffers,
        find_unused_parameters=ddp.find_unused_parameters, gradient_as_bucket_view=ddp.gradient_as_bucket_view,
        static_graph=ddp.static_graph,
    )  # fmt: skip


def _joint(losses: Tensor, counts: bool, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """The loss to differentiate, and the mean over the samples of all ranks.

    The engines average gradients over the ranks, whose shares may differ: each rank's sum is scaled by ranks over
    samples, so that the average is that of the samples. What does not count weighs nothing.
    """
    if ranks.size == 1:
        mean = losses.mean()
        return mean, mean
    weight = float(counts)
    sums = torch.stack([losses.detach().double().sum() * weight, losses.new_tensor(len(losses) * weight).double()])
    ranks.sum_(sums)
    return losses.sum() * (weight * ranks.size / sums[1].to(losses.dtype)), sums[0] / sums[1]


def autocast_to(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """torch.autocast of ``dtype``; for None, whatever the caller has chosen."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def _epochs(epochs: int, name: str, progress: bool) -> Iterable[int]:
    return track(range(1, epochs + 1), f"epochs over {name}", progress)
