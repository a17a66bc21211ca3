"""How far removals may go before retraining is the better answer, and the way back from the one that went too far."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastunlearn.data import IGNORED, Batches, read
from fastunlearn.hooks import device_of, preserved, without_fused_attention

ScoreFunction = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Budget:
    """Limits on a run of removals; past any of them it stops with "retrain now".

    Attributes:
        max_drop: of the validation score below the one before the first removal; None for no such limit.
        max_step_norm: on the sum of the norms of all steps, a bound on how far the weights have moved.
        max_gradient_norm: on the norm of a removed sample's gradient over all trainable weights after its removal. A
            sample that was never trained on has a larger one than a member, but not without end: far above that the
            step has overshot.
        check_every: removals per pass over the validation set; the last removal is always followed by one.
        score: (outputs, targets) -> one number per sample, the higher the better; accuracy by default (of the
            largest logit along axis 1, over a sample's labelled positions where targets are [N, ...]).

    Raises ValueError for a limit that is negative or not finite, or when there is no limit at all.
    Source: a removal counts as "retrain" in arXiv 2204.07655 when validation accuracy drops by more than 0.05.
    """

    max_drop: float | None = 0.05
    max_step_norm: float | None = None
    max_gradient_norm: float | None = None
    check_every: int = 1
    score: ScoreFunction | None = None

    def __post_init__(self) -> None:
        limits = {name: getattr(self, name) for name in ("max_drop", "max_step_norm", "max_gradient_norm")}
        for name, limit in limits.items():
            if limit is not None and not 0 <= limit < math.inf:
                raise ValueError(f"{name} must be a finite number, 0 or more, or None, got {limit}")
        if all(limit is None for limit in limits.values()):
            raise ValueError("a budget without any limit stops nothing; give max_drop, max_step_norm or the like")
        if self.check_every < 1:
            raise ValueError(f"check_every must be 1 or more, got {self.check_every}")


@dataclass(frozen=True)
class Verdict:
    """Why removals must stop, and how many of the last ones have been taken back."""

    reason: str
    undone: int


class Account:
    """What removals have spent of a budget, and the weights to go back to.

    Call :meth:`keep` before a removal writes and :meth:`settle` after it. Raises ValueError where ``max_drop`` is
    given without ``validation`` or the reverse, and for a score that is not one finite number per sample.

    Attributes:
        score_before, score: the validation score before the first removal and at the last check; None without
            ``max_drop``.
    """

    def __init__(self, budget: Budget, model: nn.Module, validation: Batches | None) -> None:
        if (budget.max_drop is None) != (validation is None):
            raise ValueError(
                "a budget with max_drop is measured on validation batches: give validation=, or max_drop=None"
                if validation is None
                else "validation is given, but the budget has max_drop=None and would not look at it"
            )
        self.budget, self.model, self.validation = budget, model, validation
        self.step_norms: list[float] = []  # of the removals that stand
        self.undo: list[list[tuple[nn.Parameter, Tensor]]] = []  # per removal since the last check
        self.score_before = self.score = None if validation is None else self._measured(validation)
        if self.score_before is not None and not math.isfinite(self.score_before):
            raise ValueError(f"the validation score is {self.score_before} before any removal, so no drop can be seen")

    def keep(self, parameters: Sequence[nn.Parameter]) -> None:
        """Remember these parameters as they are; memory: a copy of each until the next check."""
        self.undo.append([(p, p.detach().clone()) for p in parameters])

    def settle(self, step_norm: float, gradient_norm: float, last: bool) -> Verdict | None:
        """Check the limits after a removal; when one is passed, undo bit by bit and say why.

        A step or gradient norm past its limit undoes the last removal. A drop undoes every removal since the score
        was last seen within its limit: the last one alone with ``check_every=1``.
        """
        self.step_norms.append(step_norm)
        reasons, undone, budget = [], 0, self.budget
        total = math.fsum(self.step_norms)
        if budget.max_step_norm is not None and not total <= budget.max_step_norm:
            reasons.append(f"the steps add up to a norm of {total:.4g}, above {budget.max_step_norm:g}")
        if budget.max_gradient_norm is not None and not gradient_norm <= budget.max_gradient_norm:
            reasons.append(
                f"the removed sample's gradient has a norm of {gradient_norm:.4g}, above {budget.max_gradient_norm:g}"
            )
        if reasons:
            undone += self._undo(1)
        due = reasons or last or len(self.undo) >= budget.check_every
        if self.validation is not None and self.score_before is not None and any(self.undo) and due:
            self.score = self._measured(self.validation)
            drop = self.score_before - self.score
            # 0.9 - 0.85 is above 0.05 by a rounding.
            if not (budget.max_drop is not None and drop <= budget.max_drop + 1e-12):
                reasons.append(f"the validation score dropped by {drop:.4g}, above {budget.max_drop:g}")
                undone += self._undo(len(self.undo))
        if due:
            self.undo.clear()
        return Verdict("; ".join(reasons), undone) if reasons else None

    @torch.no_grad()
    def _undo(self, removals: int) -> int:
        for _ in range(removals):
            self.step_norms.pop()
            for parameter, copy in self.undo.pop():
                parameter.copy_(copy)
        return removals

    def _measured(self, validation: Batches) -> float:
        """The mean score over the validation set, in eval mode."""
        total, count = 0.0, 0
        with preserved(self.model), torch.no_grad(), without_fused_attention():
            self.model.eval()
            for batch in read(validation, "validation", device_of(self.model)):
                scores = (self.budget.score or accuracy)(batch.outputs(self.model), batch.targets)
                if not isinstance(scores, Tensor) or scores.shape != (batch.size,):
                    shape = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
                    raise ValueError(f"score must return one number per sample, shape [{batch.size}], got {shape}")
                total += float(scores.double().sum())
                count += batch.size
        return total / count


def accuracy(outputs: Any, targets: Any) -> Tensor:
    """Per sample whether the largest logit along axis 1 is the target; the share of labelled positions, if many.

    Raises ValueError for targets that are no classes of these outputs.
    """
    if (
        not isinstance(outputs, Tensor)
        or not isinstance(targets, Tensor)
        or targets.is_floating_point()
        or outputs.dim() < 2
        or targets.shape != outputs.shape[:1] + outputs.shape[2:]
    ):
        shapes = [list(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in (outputs, targets)]
        raise ValueError(
            f"accuracy needs logits [N, C, ...] and integer targets [N, ...], got {shapes[0]} and {shapes[1]}; give "
            "Budget(score=...), a function of outputs and targets"
        )
    counted = (targets != IGNORED).reshape(len(targets), -1)
    correct = (outputs.argmax(1) == targets).reshape(len(targets), -1) & counted
    return correct.sum(1).double() / counted.sum(1).clamp(min=1)
