"""What the methods that compare Fisher information share: which weights may change, and their two importances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastunlearn import ops
from fastunlearn.data import Batches, FirstSamples, LossFunction, require_batches
from fastunlearn.fisher import Kind, fisher_diagonal
from fastunlearn.outcome import Outcome

Protected = str | type[nn.Module]


@dataclass(frozen=True)
class Importances:
    """Fisher diagonals on both sets, for the parameters that may change."""

    parameters: dict[str, nn.Parameter]
    forget: list[Tensor]
    retain: list[Tensor]

    @property
    def weights(self) -> list[Tensor]:
        return [p.data for p in self.parameters.values()]

    def floors(self, floor: float) -> Tensor:
        """``floor`` times the mean retained importance of each tensor, float64 [tensors]."""
        return floor * torch.stack([r.mean(dtype=torch.float64) for r in self.retain])

    def live(self) -> int:
        """Weights with any importance at all."""
        return int(ops.ratio_histogram(self.forget, self.retain).sum())


def check_protect(protect: Sequence[Protected]) -> None:
    """Raises TypeError for anything but a sequence of parameter names and module types."""
    good = not isinstance(protect, str) and all(
        isinstance(p, str) or (isinstance(p, type) and issubclass(p, nn.Module)) for p in protect
    )
    if not good:
        raise TypeError(f"protect must be a tuple of parameter names and module types, got {protect!r}")


def candidates(model: nn.Module, protect: Sequence[Protected]) -> dict[str, nn.Parameter]:
    """Parameters that require grad and are not protected by name or by the type of a module around them.

    A shared parameter is protected under any of its names. Raises ValueError for a name the model does not have, or
    if nothing is left.
    """
    types = tuple(kind for kind in protect if isinstance(kind, type))
    names = {name for name in protect if isinstance(name, str)}
    named = dict(model.named_parameters(remove_duplicate=False))
    if unknown := names - set(named):
        raise ValueError(f"protect names {sorted(unknown)}, which the model does not have")
    guarded = {id(p) for m in model.modules() if isinstance(m, types) for p in m.parameters()}
    guarded |= {id(named[name]) for name in names}
    found = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in guarded}
    if not found:
        raise ValueError("there is no weight to reset: all are protected or do not require grad")
    return found


def measure(
    outcome: Outcome,
    model: nn.Module,
    forget: Batches,
    retain: Batches,
    parameters: dict[str, nn.Parameter],
    kind: Kind,
    loss_fn: LossFunction | None,
    seed: int,
    progress: bool,
    samples: int | None,
) -> Importances:
    """Both Fisher passes, timed as phases ``fisher_forget`` and ``fisher_retain``; errors as of fisher_diagonal.

    ``samples`` bounds what is read of ``retain``.
    """
    require_batches(retain, "retain")
    found: list[list[Tensor]] = []
    for name, batches in (("forget", forget), ("retain", FirstSamples(retain, samples))):
        with outcome.phase(f"fisher_{name}"):
            fisher = fisher_diagonal(model, batches, loss_fn, kind, list(parameters), seed, progress, name)
        found.append([fisher[parameter] for parameter in parameters])
    return Importances(parameters, *found)


def check_samples(samples: int | None) -> None:
    if samples is not None and samples < 1:
        raise ValueError(f"fisher_samples must be 1 or more, or None for all, got {samples}")


def protected_names(protect: Sequence[Protected]) -> list[str]:
    """For the settings of an outcome."""
    return [kind if isinstance(kind, str) else kind.__name__ for kind in protect]
