"""Selective synaptic dampening: shrink the weights that matter more to the forgotten data; no training.

Foster, Schoepf, Brintrup: Fast Machine Unlearning Without Retraining Through Selective Synaptic Dampening, AAAI 2024
(arXiv 2308.07707).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastunlearn import ops
from fastunlearn.data import Batches, LossFunction
from fastunlearn.fisher import Kind
from fastunlearn.hooks import device_of, restored_on_error
from fastunlearn.methods.importance import Protected, candidates, check_protect, check_samples, measure, protected_names
from fastunlearn.outcome import Outcome


@dataclass(frozen=True)
class SelectiveSynapticDampening:
    """w <- w * min(1, dampening * I_retain / I_forget) where I_forget > alpha * I_retain.

    I is the exact per-sample Fisher diagonal; the authors' code squares the gradient of a batch instead, so its alpha
    is not ours. They take I over the whole training set where ``retain`` stands here: pass that to follow them.

    Args:
        alpha: > 0, the threshold on I_forget / I_retain; the paper's is 10 for ResNet-18.
        dampening: > 0, the paper's lambda; 1 there.
        floor: added to the retained information, in units of its mean over the tensor, as in DeepClean; 0 in the paper.
        protect: parameter names, or module types, never dampened.
        fisher: ``"empirical"``, ``"monte_carlo"`` or ``"exact"``, see :func:`fastunlearn.fisher_diagonal`.
        fisher_samples: how many samples of ``retain`` are read for its information, rounded up to whole batches, the
            first of an iteration (shuffle them); None for all.
        loss_fn: one loss per sample; default cross-entropy, for causal language models that of the next token.
        seed: of Monte-Carlo labels, and of the rounding of bfloat16 information.
        progress: show progress bars.
        fisher_dtype: torch.bfloat16 holds the information in half of the memory; None for float32.
    """

    alpha: float = 10.0
    dampening: float = 1.0
    floor: float = 0.0
    protect: tuple[Protected, ...] = ()
    fisher: Kind = "empirical"
    fisher_samples: int | None = None
    loss_fn: LossFunction | None = None
    seed: int = 0
    progress: bool = False
    fisher_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("dampening", self.dampening)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, got {value}")
        if self.fisher_dtype not in (None, torch.bfloat16):
            raise ValueError(f"fisher_dtype must be torch.bfloat16 or None, got {self.fisher_dtype}")
        if not (math.isfinite(self.floor) and self.floor >= 0):
            raise ValueError(f"floor must not be negative, got {self.floor}")
        check_samples(self.fisher_samples)
        check_protect(self.protect)

    def unlearn(self, model: nn.Module, forget: Batches, retain: Batches) -> Outcome:
        """Make ``model`` forget, in place; model and batches as :meth:`fastunlearn.DeepClean.unlearn`.

        Returns an :class:`Outcome`; ``changed`` counts the dampened weights per parameter (those above alpha; with
        ``dampening`` above alpha some of them keep their value). ``details``: ``share_dampened`` of the live weights.

        Raises TypeError or ValueError as :func:`fastunlearn.fisher_diagonal`; weights are put back whatever is raised.

        Cost: one Fisher pass over each set and one launch; memory: three numbers per weight.
        """
        outcome = Outcome("SelectiveSynapticDampening", self._settings())
        parameters = candidates(model, self.protect)
        with outcome.measured(device_of(model)), restored_on_error(model, parameters.values()):
            importances = measure(
                outcome,
                model,
                forget,
                retain,
                parameters,
                self.fisher,
                self.loss_fn,
                self.seed,
                self.progress,
                self.fisher_samples,
                self.fisher_dtype,
            )
            with outcome.phase("dampen"), torch.no_grad():
                _, counts = ops.threshold_reset_(
                    importances.weights, importances.forget, importances.retain, self.alpha, "dampen",
                    importances.floors(self.floor), lambda_=self.dampening,
                )  # fmt: skip
            # Inside: what a GPU has to say against the launch, it says when the counts are read.
            dampened = dict(zip(parameters, importances.total(counts).tolist(), strict=True))
            outcome.changed = {name: count for name, count in dampened.items() if count}
            outcome.details = {"share_dampened": sum(dampened.values()) / max(importances.live(), 1)}
        return outcome

    def _settings(self) -> dict[str, Any]:
        return {
            "alpha": self.alpha,
            "dampening": self.dampening,
            "floor": self.floor,
            "protect": protected_names(self.protect),
            "fisher": self.fisher,
            "fisher_samples": self.fisher_samples,
            "fisher_dtype": None if self.fisher_dtype is None else str(self.fisher_dtype),
            "seed": self.seed,
        }
