"""What a model still knows: accuracy, loss, and how well its loss betrays membership."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastunlearn.data import Batches, LossFunction, per_sample_loss, read
from fastunlearn.hooks import device_of, preserved


@dataclass(frozen=True)
class Metrics:
    """Shares are in percent, losses are means over samples.

    Attributes:
        accuracy, loss: per set (``forget``, ``retain``, ``test``, those that were given).
        membership_auc: how often the loss of a forgotten sample is below that of a test sample: 0.5 says that a
            loss threshold can not tell them apart; only with ``forget`` and ``test``.
        gap: accuracy minus the reference's, per set, in points; only with a reference.
        membership_gap: membership AUC minus the reference's.
    """

    accuracy: dict[str, float]
    loss: dict[str, float]
    membership_auc: float | None = None
    gap: dict[str, float] | None = None
    membership_gap: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    model: nn.Module,
    *,
    forget: Batches | None = None,
    retain: Batches | None = None,
    test: Batches | None = None,
    reference: nn.Module | Metrics | None = None,
    loss_fn: LossFunction | None = None,
) -> Metrics:
    """Measure ``model`` in eval mode on the given sets, and its distance from a ``reference`` retrained without.

    Args:
        model: a classifier with logits [N, C]; unchanged.
        forget, retain, test: re-iterables of ``(inputs, targets)``; any may be left out, not all.
        reference: the yardstick, usually retrained on ``retain`` alone, or what it measured on the same sets.
        loss_fn: one loss per sample; default cross-entropy.

    Raises TypeError or ValueError for malformed batches, outputs or losses. Cost: one forward pass per set and
    model. A population attack like this one overstates protection; it is a floor on leakage, not a proof.
    """
    sets = {name: b for name, b in (("forget", forget), ("retain", retain), ("test", test)) if b is not None}
    if not sets:
        raise ValueError("nothing to evaluate on: give forget=, retain= or test=")
    accuracy: dict[str, float] = {}
    loss: dict[str, float] = {}
    losses: dict[str, Tensor] = {}
    for name, batches in sets.items():
        correct, losses[name] = predict(model, batches, name, loss_fn)
        accuracy[name] = 100 * float(correct.double().mean())
        loss[name] = float(losses[name].double().mean())
    auc = membership_auc(losses["forget"], losses["test"]) if {"forget", "test"} <= set(losses) else None
    if reference is None:
        return Metrics(accuracy, loss, auc)
    theirs = reference
    if not isinstance(theirs, Metrics):
        theirs = evaluate(theirs, forget=forget, retain=retain, test=test, loss_fn=loss_fn)
    if missing := sorted(set(accuracy) - set(theirs.accuracy)):
        raise ValueError(f"the reference was not measured on {', '.join(missing)}")
    gap = {name: accuracy[name] - theirs.accuracy[name] for name in accuracy}
    membership_gap = None if auc is None or theirs.membership_auc is None else auc - theirs.membership_auc
    return Metrics(accuracy, loss, auc, gap, membership_gap)


def predict(
    model: nn.Module, batches: Batches, name: str, loss_fn: LossFunction | None = None
) -> tuple[Tensor, Tensor]:
    """Per sample whether the largest logit is the target (bool [n]), and the loss (float [n]); in eval mode."""
    device = device_of(model)
    correct, losses = [], []
    with preserved(model), torch.no_grad():
        model.eval()
        for batch in read(batches, name, device):
            outputs = batch.outputs(model)
            losses.append(per_sample_loss(loss_fn, outputs, batch.targets, batch.size).float())
            correct.append(outputs.argmax(1) == batch.targets)
    return torch.cat(correct), torch.cat(losses)


def membership_auc(members: Tensor, others: Tensor) -> float:
    """P(loss of a member < loss of another) + P(equal) / 2, from ranks; losses [n] and [m]."""
    from sklearn.metrics import roc_auc_score

    scores = -torch.cat([members, others]).double().cpu()
    return float(roc_auc_score([1] * len(members) + [0] * len(others), scores.numpy()))
