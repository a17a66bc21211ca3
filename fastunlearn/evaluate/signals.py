"""What a membership attack reads off a model's answer to one sample."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastunlearn.data import IGNORED, Batches, LossFunction, per_sample_loss, read
from fastunlearn.hooks import device_of, preserved


@dataclass(frozen=True)
class Signals:
    """One value per sample, float64 [n] on the CPU; of several models at once, [..., n].

    Attributes:
        loss: -log p_y, or what the caller's ``loss_fn`` returned.
        confidence: p_y, the probability of the true class.
        entropy: -sum_c p_c log p_c in nats; does not look at the label.
        modified_entropy: -(1 - p_y) log p_y - sum_{c != y} p_c log(1 - p_c), in nats (Song and Mittal, Systematic
            Evaluation of Privacy Risks of Machine Learning Models, USENIX Security 2021): 0 for certain and right,
            without bound for certain and wrong.
        logit: log p_y - log sum_{c != y} p_c, the scaled confidence of Carlini et al., Membership Inference Attacks
            From First Principles, IEEE S&P 2022: close to a normal distribution over models, which p_y is not.
        correct: whether the largest logit is the true class's (the first of equal ones), bool.
        target: the true class, int64.
    """

    loss: Tensor
    confidence: Tensor
    entropy: Tensor
    modified_entropy: Tensor
    logit: Tensor
    correct: Tensor
    target: Tensor

    def __len__(self) -> int:
        return self.loss.shape[-1]

    def __getitem__(self, samples: Tensor | slice) -> Signals:
        """Those of some samples: a slice, positions or a mask over the last axis."""
        return Signals(*(getattr(self, field.name)[..., samples] for field in fields(self)))


def signals(model: nn.Module, batches: Batches, name: str, loss_fn: LossFunction | None = None) -> Signals:
    """The signals of every sample of ``batches``, in their order; the model runs in eval mode and is unchanged.

    Args:
        model: a classifier with logits [N, C].
        batches: re-iterable of ``(inputs, targets)`` or of dicts; targets are class indices, int [N].
        name: what ``batches`` is called in messages.
        loss_fn: one loss per sample for ``loss``; the other signals are the softmax's.

    Raises TypeError or ValueError for malformed batches, and as :func:`signals_of` does. Cost: one forward pass; on
    the CPU a few passes over the logits in float64, a batch at a time.
    """
    device = device_of(model)
    found = []
    with preserved(model), torch.no_grad():
        model.eval()
        for batch in read(batches, name, device):
            logits = batch.outputs(model)
            if not isinstance(logits, Tensor) or logits.dim() != 2:
                shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise ValueError(f"membership signals of {name} need logits [N, C] of a classifier, got {shape}")
            part = _signals_of(logits, batch.targets, name)
            if loss_fn is not None:
                loss = per_sample_loss(loss_fn, logits, batch.targets, batch.size)
                part = replace(part, loss=loss.cpu().double())
            found.append(part)
    return Signals(*(torch.cat([getattr(part, field.name) for part in found]) for field in fields(Signals)))


def signals_of(logits: Tensor, targets: Tensor) -> Signals:
    """The signals of ``logits`` [N, C], or [..., N, C] for several models on the same samples, in float64.

    Args:
        logits: floating, C >= 2. A class may be masked by -inf; signals without a finite value are then infinite.
        targets: class indices from 0 to C - 1, an integer tensor [N].

    Raises:
        TypeError: logits are not floating, targets are not an integer tensor.
        ValueError: fewer than two classes; shapes that do not fit; a target out of range (-100, the label that
            cross-entropy leaves out, included); logits that are NaN, +inf, or -inf for every class of a sample.

    Small values keep their digits where p_y is within rounding of 1 (a loss of 1e-30 is not 0), so that certain
    samples are not tied. Cost: O(N C), several float64 copies of the logits.
    """
    return _signals_of(logits, targets, "logits")


def _signals_of(logits: Tensor, targets: Any, name: str) -> Signals:
    logits, target = _checked(logits, targets, name)
    top = logits.argmax(-1, keepdim=True)
    highest = logits.gather(-1, top)
    gap = highest - logits.scatter(-1, top, -torch.inf).logsumexp(-1, keepdim=True)  # log p_top - log(1 - p_top)
    log_top = -torch.log1p(torch.exp(-gap))  # log_softmax rounds this to 0 once gap > 37
    log_p = logits - highest + log_top
    p = log_p.exp()
    # log(1 - p): cancels for the most probable class alone, every other p is at most 1/2.
    log_rest = torch.log1p(-p).scatter(-1, top, log_top - gap)
    index = target[..., None]
    log_py, log_rest_y = log_p.gather(-1, index)[..., 0], log_rest.gather(-1, index)[..., 0]
    is_top = top[..., 0] == target
    surprise = torch.where(p > 0, -p * log_p, 0.0)  # 0 log 0 = 0
    doubt = (-p * log_rest).scatter(-1, index, 0.0)
    return Signals(
        loss=0 - log_py,  # no negative zero
        confidence=log_py.exp(),
        entropy=surprise.sum(-1),
        modified_entropy=-log_rest_y.exp() * log_py + doubt.sum(-1),
        logit=torch.where(is_top, gap[..., 0], log_py - log_rest_y),
        correct=is_top,
        target=target,
    )


def _checked(logits: Tensor, targets: Any, name: str) -> tuple[Tensor, Tensor]:
    """Logits in float64 and targets in int64 of their shape without classes, both on the CPU."""
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        kind = str(logits.dtype) if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"{name}: logits must be a floating tensor, got {kind}; give logits, not class indices")
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.dtype == torch.bool:
        kind = str(targets.dtype) if isinstance(targets, Tensor) else type(targets).__name__
        raise TypeError(f"{name}: targets must be class indices, a tensor of integers, got {kind}")
    if logits.dim() < 2 or targets.shape != logits.shape[-2:-1]:
        raise ValueError(
            f"{name}: logits {list(logits.shape)} and targets {list(targets.shape)} do not fit; "
            "expected logits [N, C] and one class index per sample, [N]"
        )
    classes = logits.shape[-1]
    if classes < 2:
        raise ValueError(f"{name}: membership signals need logits of two classes or more, got {classes}")
    logits, target = logits.detach().cpu().double(), targets.cpu().long()
    outside = (target < 0) | (target >= classes)
    if bool(outside.any()):
        first = int(outside.nonzero()[0])
        meant = " (left out by cross-entropy)" if int(target[first]) == IGNORED else ""
        raise ValueError(
            f"{name}: sample {first} has target {int(target[first])}{meant}, but classes go from 0 to {classes - 1}; "
            "take such samples out"
        )
    highest = logits.amax(-1)  # of NaN, NaN
    if not bool(torch.isfinite(highest).all()):
        bad = int((~torch.isfinite(highest)).sum())
        raise ValueError(f"{name}: the logits of {bad} of {highest.numel()} samples are NaN or infinite")
    return logits, target.expand(logits.shape[:-1])
