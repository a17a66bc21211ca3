"""What the methods that compare Fisher information share: which weights may change, and their two importances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fastunlearn import ops
from fastunlearn.data import Batches, FirstSamples, LossFunction, require_batches
from fastunlearn.fisher import Kind, fisher_diagonal
from fastunlearn.outcome import Outcome
from fastunlearn.parallel.deal import Dealt
from fastunlearn.parallel.ranks import ALONE, Ranks, counted, holders, local, sharing, unwrapped

Protected = str | type[nn.Module]


@dataclass(frozen=True)
class Importances:
    """Fisher diagonals on both sets, for the parameters that may change; of sharded ones this rank's part.

    Attributes:
        holders: the ranks over which parts add up.
    """

    parameters: dict[str, nn.Parameter]
    forget: list[Tensor]
    retain: list[Tensor]
    holders: Ranks = ALONE

    @property
    def weights(self) -> list[Tensor]:
        return [local(p.data) for p in self.parameters.values()]

    def means(self, values: list[Tensor]) -> Tensor:
        """Of each tensor as a whole, float64 [tensors]."""
        if self.holders.size == 1:
            return torch.stack([v.mean(dtype=torch.float64) for v in values])
        sums = torch.stack([v.sum(dtype=torch.float64) for v in self._counted(values)])
        self._add_up(sums)
        sizes = [max(1, p.numel()) for p in self.parameters.values()]
        return sums / torch.tensor(sizes, dtype=torch.float64, device=sums.device)

    def floors(self, floor: float) -> Tensor:
        """``floor`` times the mean retained importance of each tensor, float64 [tensors]."""
        return floor * self.means(self.retain)

    def select_gamma(self, fraction: float, floors: Tensor, per_tensor: bool) -> Tensor:
        """:func:`ops.select_gamma` over the weights of all holders: tables of counts are added up, nothing else."""
        forget, retain = self._counted(self.forget), self._counted(self.retain)
        return ops.select_gamma(forget, retain, fraction, floors, per_tensor, self._add_up)

    def histogram(self, floors: Tensor | float = 0.0, per_tensor: bool = False) -> Tensor:
        """:func:`ops.ratio_histogram` over the weights of all holders."""
        counts = ops.ratio_histogram(self._counted(self.forget), self._counted(self.retain), floors, per_tensor)
        counts = counts.contiguous()
        self._add_up(counts)
        return counts

    def total(self, counts: Tensor) -> Tensor:
        """Counts per tensor, int64 [tensors], of this rank's parts: added up over the holders."""
        here = [counted(p, self.holders) for p in self.parameters.values()]
        total = counts * torch.tensor(here, device=counts.device)
        self._add_up(total)
        return total

    def live(self) -> int:
        """Weights with any importance at all."""
        return int(self.histogram().sum())

    def _add_up(self, table: Tensor) -> None:
        """Over the holders, whose collectives are on the device of the weights, where the importances may not be."""
        sent = table.to(next(iter(self.parameters.values())).device)
        self.holders.sum_(sent)
        table.copy_(sent)

    def _counted(self, values: list[Tensor]) -> list[Tensor]:
        """Empty where another rank's copy is the one that counts."""
        pairs = zip(values, self.parameters.values(), strict=True)
        return [v if counted(p, self.holders) else v.flatten()[:0] for v, p in pairs]


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
    holders(model)  # whose weights are in their shards now
    model = unwrapped(model)
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
    dtype: torch.dtype | None = None,
    offload: bool = False,
) -> Importances:
    """Both Fisher passes, timed as phases ``fisher_forget`` and ``fisher_retain``; errors as of fisher_diagonal.

    ``samples`` bounds what is read of ``retain``, by all ranks together.
    """
    require_batches(retain, "retain")
    found: list[list[Tensor]] = []
    for name, batches in (("forget", forget), ("retain", first_samples(retain, samples, sharing(model)))):
        with outcome.phase(f"fisher_{name}"):
            fisher = fisher_diagonal(
                model, batches, loss_fn, kind, list(parameters), seed, progress, name, dtype=dtype, offload=offload
            )  # fmt: skip
        found.append([local(fisher[parameter]) for parameter in parameters])
    return Importances(parameters, found[0], found[1], holders(model))


def first_samples(batches: Batches, samples: int | None, ranks: Ranks) -> Batches:
    """The first ``samples`` of all ranks, in whole batches: of dealt ones the same on any number of ranks."""
    if isinstance(batches, Dealt):
        return replace(batches, batches=FirstSamples(batches.batches, samples))
    return FirstSamples(batches, None if samples is None else -(-samples // ranks.size))


def check_samples(samples: int | None) -> None:
    if samples is not None and samples < 1:
        raise ValueError(f"fisher_samples must be 1 or more, or None for all, got {samples}")


def protected_names(protect: Sequence[Protected]) -> list[str]:
    """For the settings of an outcome."""
    return [kind if isinstance(kind, str) else kind.__name__ for kind in protect]
