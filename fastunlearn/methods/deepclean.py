"""DeepClean: reset the weights that matter more to the forgotten data than to the retained, fine-tune only those.

Shi, Gourgoulias, Buford, Moran, Ghalyan: DeepClean, ECCV Workshops 2024 (arXiv 2311.10448).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastunlearn import ops
from fastunlearn.data import Batches, LossFunction
from fastunlearn.fisher import FisherDiagonal, Kind, fisher_diagonal
from fastunlearn.hooks import device_of, preserved, restored_on_error
from fastunlearn.methods.training import descend
from fastunlearn.outcome import Outcome

DEFAULT_FRACTION = 0.3


@dataclass(frozen=True)
class DeepClean:
    """Weights whose ratio of Fisher information forget / (retain + floor * mean of the tensor) passes gamma are set
    to zero and fine-tuned on retained data; all others stay exactly as they are.

    Args:
        gamma: the threshold on the ratio; give this or ``fraction``.
        fraction: share of the weights to reset, from the largest ratio down, over all tensors together;
            default 0.3 if neither is given. The paper names no value of gamma: search on held-back data.
        floor: added to the retained information, in units of its mean over the tensor. Without it the largest
            ratios belong to dead weights, whose information is near zero on both sides, and resetting them
            forgets nothing.
        protect: parameter names, or module types, never reset (and therefore frozen).
        finetune_epochs: passes over ``retain`` afterwards; 0 leaves the reset weights at zero.
        lr, momentum: of SGD. The model is fine-tuned in eval mode: no dropout, BatchNorm statistics untouched.
        fisher: ``"empirical"`` or ``"monte_carlo"``, see :func:`fastunlearn.fisher_diagonal`.
        loss_fn: one loss per sample; default cross-entropy.
        seed: of the Monte-Carlo labels.
        progress: show progress bars.
    """

    gamma: float | None = None
    fraction: float | None = None
    floor: float = 0.1
    protect: tuple[str | type[nn.Module], ...] = ()
    finetune_epochs: int = 1
    lr: float = 0.01
    momentum: float = 0.9
    fisher: Kind = "empirical"
    loss_fn: LossFunction | None = None
    seed: int = 0
    progress: bool = False

    def __post_init__(self) -> None:
        if self.gamma is not None and self.fraction is not None:
            raise ValueError("give gamma or fraction, not both")
        if self.gamma is not None and not (math.isfinite(self.gamma) and self.gamma > 0):
            raise ValueError(f"gamma must be a positive number, got {self.gamma}")
        if self.fraction is not None and not 0 < self.fraction < 1:
            raise ValueError(f"fraction must lie between 0 and 1, got {self.fraction}")
        if self.floor < 0 or self.finetune_epochs < 0:
            raise ValueError("floor and finetune_epochs must not be negative")

    def unlearn(self, model: nn.Module, forget: Batches, retain: Batches) -> Outcome:
        """Make ``model`` forget, in place.

        Args:
            model: in eval mode if it has BatchNorm; weights that do not require grad are left alone.
            forget, retain: re-iterables of ``(inputs, targets)`` batches.

        Returns:
            An :class:`Outcome`; ``changed`` counts the reset weights per parameter, ``details`` holds gamma.

        Raises:
            TypeError, ValueError: as :func:`fastunlearn.fisher_diagonal`, before any weight changes;
                FloatingPointError if fine-tuning diverges. Weights are put back whatever is raised, and when.

        Cost: one Fisher pass over each set, one launch for the reset, ``finetune_epochs`` passes over ``retain``;
        memory: four numbers per weight.
        """
        outcome = Outcome("DeepClean", self._settings())
        device = device_of(model)
        parameters = self._candidates(model)
        with outcome.measured(device), restored_on_error(model, parameters.values()):
            forgotten, retained = (
                self._fisher(outcome, model, batches, name, list(parameters))
                for batches, name in ((forget, "forget"), (retain, "retain"))
            )
            with outcome.phase("reset"), torch.no_grad():
                limits = {name: value + self.floor * value.mean() for name, value in retained.items()}
                gamma = self.gamma if self.gamma is not None else self._select_gamma(forgotten, limits)
                masks, counts = ops.threshold_reset_(
                    [p.data for p in parameters.values()],
                    [forgotten[name] for name in parameters],
                    [limits[name] for name in parameters],
                    gamma,
                )
            resets = dict(zip(parameters, counts.tolist(), strict=True))
            outcome.changed = {name: count for name, count in resets.items() if count}
            total = sum(p.numel() for p in parameters.values())
            outcome.details = {"gamma": gamma, "share_reset": sum(resets.values()) / total}
            with outcome.phase("finetune"):
                self._finetune(model, parameters, dict(zip(parameters, masks, strict=True)), retain)
        return outcome

    def _fisher(
        self, outcome: Outcome, model: nn.Module, batches: Batches, name: str, params: list[str]
    ) -> FisherDiagonal:
        with outcome.phase(f"fisher_{name}"):
            return fisher_diagonal(model, batches, self.loss_fn, self.fisher, params, self.seed, self.progress, name)

    def _candidates(self, model: nn.Module) -> dict[str, nn.Parameter]:
        types = tuple(kind for kind in self.protect if isinstance(kind, type))
        names = {name for name in self.protect if isinstance(name, str)}
        unknown = names - set(dict(model.named_parameters()))
        if unknown:
            raise ValueError(f"protect names {sorted(unknown)}, which the model does not have")
        guarded = {id(p) for m in model.modules() if isinstance(m, types) for p in m.parameters()}
        found = {
            name: p
            for name, p in model.named_parameters()
            if p.requires_grad and name not in names and id(p) not in guarded
        }
        if not found:
            raise ValueError("there is no weight to reset: all are protected or do not require grad")
        return found

    def _select_gamma(self, forgotten: FisherDiagonal, limits: dict[str, Tensor]) -> float:
        ratios = torch.cat([(forgotten[name] / limits[name]).nan_to_num(nan=0.0).flatten() for name in limits])
        wanted = self.fraction if self.fraction is not None else DEFAULT_FRACTION
        keep = ratios.numel() - round(wanted * ratios.numel())
        gamma = float(ratios.kthvalue(max(keep, 1)).values)
        if not (math.isfinite(gamma) and gamma > 0):
            raise ValueError(
                f"the ratio below which {1 - wanted:.0%} of the weights lie is {gamma}: too few weights carry any "
                "information on the forgotten data; lower fraction or give gamma"
            )
        return gamma

    def _finetune(
        self, model: nn.Module, parameters: dict[str, nn.Parameter], masks: dict[str, Tensor], retain: Batches
    ) -> None:
        chosen = [name for name in parameters if bool(masks[name].any())]
        if not chosen or self.finetune_epochs == 0:
            return

        def freeze() -> None:
            used = [name for name in chosen if parameters[name].grad is not None]
            ops.mask_grads_([parameters[n].grad for n in used], [masks[n] for n in used])  # type: ignore[misc]

        with preserved(model):
            model.eval()
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            for name in chosen:
                parameters[name].requires_grad_(True)
            # No weight decay: it would move the frozen weights.
            optimizer = torch.optim.SGD([parameters[n] for n in chosen], lr=self.lr, momentum=self.momentum)
            descend(
                model, retain, "retain", optimizer, self.finetune_epochs, self.loss_fn,
                before_step=freeze, progress=self.progress,
            )  # fmt: skip

    def _settings(self) -> dict[str, Any]:
        return {
            "gamma": self.gamma,
            "fraction": self.fraction if self.gamma is not None or self.fraction else DEFAULT_FRACTION,
            "floor": self.floor,
            "protect": [kind if isinstance(kind, str) else kind.__name__ for kind in self.protect],
            "finetune_epochs": self.finetune_epochs,
            "lr": self.lr,
            "momentum": self.momentum,
            "fisher": self.fisher,
            "seed": self.seed,
        }
