"""How soon a model knows again what it forgot: what was only hidden comes back in a few steps."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

from fastunlearn.data import Batch, Batches, LossFunction, per_sample_loss, read, require_batches
from fastunlearn.evaluate.metrics import evaluate
from fastunlearn.hooks import device_of, preserved
from fastunlearn.language import loss_for


@dataclass(frozen=True)
class Relearn:
    """Relearning of one model.

    Attributes:
        steps: optimiser steps until the threshold was reached, 0 where it already was, None where it never was.
        curve: (steps done, accuracy in percent or mean loss on the forget set) wherever it was measured.
        threshold: what was to be reached, the margin included.
        by: "accuracy" or "loss".
    """

    steps: int | None
    curve: list[tuple[int, float]]
    threshold: float
    by: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON; no NaN or infinity in the curve (None)."""
        return asdict(self) | {"curve": [[step, v if math.isfinite(v) else None] for step, v in self.curve]}


def relearn_time(
    model: nn.Module,
    forget: Batches,
    *,
    threshold: float,
    margin: float = 0.0,
    by: Literal["accuracy", "loss"] = "accuracy",
    retain: Batches | None = None,
    lr: float = 0.01,
    momentum: float = 0.9,
    batch_size: int | None = None,
    max_steps: int = 100,
    every: int = 1,
    loss_fn: LossFunction | None = None,
    seed: int = 0,
) -> Relearn:
    """Train a copy of ``model`` on ``forget`` until it is back at ``threshold``, and count the optimiser steps.

    The copy trains with SGD in eval mode: BatchNorm keeps its statistics and Dropout is off, so that the steps tell
    what the weights still hold, and a set of one sample can be relearnt. ``model`` is unchanged. Compare with the steps
    that a model retrained without the data needs (:func:`anamnesis_index`): an unlearned model that is faster has kept
    something. Models with a cuDNN RNN can be relearnt on the CPU only, cuDNN has no gradients in eval mode.

    Args:
        model: a classifier as :func:`fastunlearn.evaluate` takes it; parameters that do not require grad stay.
        forget: re-iterable of ``(inputs, targets)`` or of dicts; read once and held in memory, its batches are the
            steps, over and over in the same order.
        threshold: accuracy on ``forget`` in percent, usually the original model's, or with ``by="loss"`` a mean loss.
        margin: how far from the threshold is near enough: accuracy from ``threshold - margin`` on, loss from
            ``threshold + margin`` down.
        by: what is measured on ``forget``.
        retain: if given, each step takes the mean of the loss on a batch of ``forget`` and on one of ``retain``.
        lr, momentum: of SGD.
        batch_size: larger batches are split into steps of so many samples; by default as they come.
        max_steps: after so many steps the model counts as not having relearnt.
        every: steps between two measurements; ``steps`` of the result is then a multiple of it or ``max_steps``.
        loss_fn: one loss per sample; default cross-entropy, for causal language models that of the next token.
        seed: of whatever ``retain`` draws from torch's global generator, such as its order.

    Returns:
        :class:`Relearn`. Where the loss is no longer finite the run ends and counts as not relearnt.

    Raises:
        ValueError: a threshold, margin, number of steps or batch size that makes no sense; no parameter requires grad;
            an empty or malformed set.
        TypeError: targets are not integers, sets that can be read only once.

    Cost: per step a forward and backward pass over a batch, and every ``every`` steps a forward pass over ``forget``;
    one copy of the model. Source: Chundawat et al., Zero-Shot Machine Unlearning, 2023, arXiv 2201.05629.
    """
    goal = _goal(threshold, margin, by)
    for name, value in (("max_steps", max_steps), ("every", every), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}")
    require_batches(forget, "forget")
    held = list(forget)
    student = copy.deepcopy(model)
    trained = [p for p in student.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("no parameter of the model requires grad, so it can not relearn; call requires_grad_(True)")
    optimizer = torch.optim.SGD(trained, lr=lr, momentum=momentum)
    curve: list[tuple[int, float]] = []

    def reached(step: int) -> bool:
        metrics = evaluate(student, forget=held, loss_fn=loss_fn)
        value = metrics.accuracy["forget"] if by == "accuracy" else metrics.loss["forget"]
        curve.append((step, value))
        return value >= goal if by == "accuracy" else value <= goal

    with preserved(student), torch.enable_grad():
        torch.manual_seed(seed)
        student.eval()
        if reached(0):
            return Relearn(0, curve, goal, by)
        device = device_of(student)
        lessons = _endless(held, "forget", device, batch_size)
        rehearsals = None if retain is None else _endless(retain, "retain", device, batch_size)
        for step in range(1, max_steps + 1):
            batches = [next(lessons)] if rehearsals is None else [next(lessons), next(rehearsals)]
            if not _step(student, batches, optimizer, loss_fn):
                break
            if (step % every == 0 or step == max_steps) and reached(step):
                return Relearn(step, curve, goal, by)
    return Relearn(None, curve, goal, by)


def anamnesis_index(unlearned: Relearn, retrained: Relearn) -> float | None:
    """Steps that an unlearned model needs to relearn, over those that a model retrained without the data needs.

    1 is ideal; well below 1 the unlearned model has kept something; well above 1 it was driven so far off that this
    gives away what was forgotten. None where either did not relearn in time, or the retrained one needed no step. Both
    should come of the same :func:`relearn_time` settings.

    Raises ValueError for different thresholds. Source: Chundawat et al., Zero-Shot Machine Unlearning, 2023, arXiv
    2201.05629.
    """
    if (unlearned.threshold, unlearned.by) != (retrained.threshold, retrained.by):
        raise ValueError(
            f"the models were to reach different thresholds: {unlearned.by} {unlearned.threshold:g} and "
            f"{retrained.by} {retrained.threshold:g}"
        )
    if unlearned.steps is None or not retrained.steps:
        return None
    return unlearned.steps / retrained.steps


def _goal(threshold: float, margin: float, by: str) -> float:
    if by not in ("accuracy", "loss"):
        raise ValueError(f'by must be "accuracy" or "loss", got {by!r}')
    if not (math.isfinite(threshold) and math.isfinite(margin) and margin >= 0):
        raise ValueError(f"threshold must be finite and margin not negative, got {threshold} and {margin}")
    if by == "loss":
        return threshold + margin
    if not 0 <= threshold <= 100:
        raise ValueError(f'threshold is an accuracy in percent, 0 to 100, got {threshold}; for a loss give by="loss"')
    return threshold - margin


def _endless(batches: Batches, name: str, device: torch.device, batch_size: int | None) -> Iterator[Batch]:
    while True:
        for batch in read(batches, name, device):
            for start in range(0, batch.size, batch_size or batch.size):
                yield batch[start : start + (batch_size or batch.size)]


def _step(
    model: nn.Module, batches: list[Batch], optimizer: torch.optim.Optimizer, loss_fn: LossFunction | None
) -> bool:
    """One step on the mean of the batches' mean losses, unless that is not finite."""
    loss_fn = loss_for(model, loss_fn)
    means = [per_sample_loss(loss_fn, b.outputs(model), b.targets, b.size).mean() for b in batches]
    loss = torch.stack(means).mean()
    if not bool(torch.isfinite(loss)):
        return False
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    optimizer.step()
    torch.clear_autocast_cache()  # a context around the loop would go on with casts of the old weights
    return True
