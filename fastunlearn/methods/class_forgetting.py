"""Class forgetting by one projection per layer: gradient-free, a few hundred samples, seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import cast

import torch
from torch import Tensor, nn

from fastunlearn.data import Batches, require_batches
from fastunlearn.hooks import device_of, require_finite, require_separable
from fastunlearn.outcome import Outcome
from fastunlearn.subspace import (
    SOLVERS,
    GramAccumulator,
    Solver,
    choose_layers,
    collect_grams,
    layer_groups,
    supported_layers,
)


@dataclass(frozen=True)
class ClassForgetting:
    """Remove the activation subspace of a class: W <- W - W (I - M_retain) M_forget, layer by layer.

    M_retain and M_forget are the spectral filters (:func:`fastunlearn.spectral_filter`) of each layer's
    inputs over the retain and the forget samples. Every Linear, Conv1d and Conv2d is updated once; biases,
    norm layers and everything else stay. Source: Kodge, Saha & Roy, TMLR 2024 (arXiv 2312.00761). Its public
    settings (samples, alpha_retain, alpha_forget): CIFAR-10 VGG11-BN 900, 100, 3; CIFAR-100 990, 1000, 30;
    ImageNet 999, 100, 10. They are not the best of every model: search from 0.25 to 1000.

    Attributes:
        alpha_retain: > 0; larger protects more of what the retain samples use.
        alpha_forget: > 0; larger removes more of what the forget samples use.
        solver: "auto" (n x n solve for fewer rows than columns, Cholesky otherwise), "cholesky" or "eigh".
        max_patches: rows of input sampled per layer and set; None for all.
        layers: names of the layers to update; all by default.
        seed: of that sample.
        progress: show progress bars.
    """

    alpha_retain: float = 100.0
    alpha_forget: float = 3.0
    solver: Solver = "auto"
    max_patches: int | None = 10_000
    layers: Sequence[str] | None = None
    seed: int = 0
    progress: bool = False

    def __post_init__(self) -> None:
        for name, alpha in (("alpha_retain", self.alpha_retain), ("alpha_forget", self.alpha_forget)):
            if not 0 < alpha < float("inf"):
                raise ValueError(f"{name} must be a finite number above 0, got {alpha}")
        if self.solver not in SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {self.solver!r}")
        if self.max_patches is not None and self.max_patches < 1:
            raise ValueError(f"max_patches must be 1 or more, or None for no limit, got {self.max_patches}")

    def unlearn(self, model: nn.Module, forget: Batches, retain: Batches) -> Outcome:
        """Forget in place what only ``forget`` needs; the model runs in eval mode meanwhile, then as before.

        Args:
            model: any module; weights in float64, float32, bfloat16 or float16 (halves are computed in
                float32).
            forget: re-iterable batches of the samples to forget; targets are not used.
            retain: re-iterable batches of samples to protect; about as many as in ``forget`` suffice.

        Returns:
            An :class:`~fastunlearn.outcome.Outcome`. ``details``: ``rows`` (per layer, input rows used of
            retain and forget), ``relative_change`` (per layer, norm of the update over norm of the weight)
            and ``untouched`` (per layer left alone, the reason).

        Raises:
            TypeError: ``forget`` or ``retain`` cannot be iterated twice.
            ValueError: one of them is empty or malformed; the model has NaN or Inf in a weight or a layer's
                input, a BatchNorm in train mode, an unknown name in ``layers``; an update that is not finite.
            The model is untouched whenever this raises, also when its own forward pass does.

        Cost: a forward pass over both sets, per layer rows * d^2 + d^3 / 3 + 4 p d^2 multiply-adds, one copy
        of the weights and two Gram matrices per layer.
        """
        require_batches(forget, "forget")
        require_batches(retain, "retain")
        require_finite(model)
        require_separable(model)
        outcome = Outcome("ClassForgetting", asdict(self))
        with outcome.measured(device_of(model)):
            names, untouched = _updatable(model, self.layers)
            with outcome.phase("gather"):
                retained = self._collect(model, retain, names, "retain")
                forgotten = self._collect(model, forget, names, "forget")
            with outcome.phase("solve"), torch.no_grad():
                updates, rows, change = self._solve(model, names, retained, forgotten, untouched)
            with outcome.phase("write"), torch.no_grad():
                parameters = {id(p): key for key, p in model.named_parameters()}
                for weight, updated in updates:
                    outcome.count(parameters[id(weight)], weight, updated)
                    weight.copy_(updated)
        outcome.details.update(rows=rows, relative_change=change, untouched=untouched)
        return outcome

    def _collect(
        self, model: nn.Module, batches: Batches, names: list[list[str]], what: str
    ) -> dict[str, GramAccumulator]:
        """One accumulator per weight, under its first layer's name: uses of a shared weight add up."""
        flat = [name for group in names for name in group]
        grams = collect_grams(model, batches, flat, self.max_patches, self.seed, what, self.progress)
        for first, *others in names:
            for other in others:
                grams[first].merge_(grams[other])
        return grams

    def _solve(
        self,
        model: nn.Module,
        names: list[list[str]],
        retained: dict[str, GramAccumulator],
        forgotten: dict[str, GramAccumulator],
        untouched: dict[str, str],
    ) -> tuple[list[tuple[Tensor, Tensor]], dict[str, tuple[int, int]], dict[str, float]]:
        """All updated weights, each checked to be finite, before the first is written."""
        updates: list[tuple[Tensor, Tensor]] = []
        rows: dict[str, tuple[int, int]] = {}
        change: dict[str, float] = {}
        modules = dict(model.named_modules())
        for group in names:
            key = group[0]
            retain, forget = retained[key], forgotten[key]
            if not retain.rows_seen or not forget.rows_seen:
                missing = " and ".join(
                    what for what, gram in (("retain", retain), ("forget", forget)) if not gram.rows_seen
                )
                # A zero Gram matrix would pass for "nothing to protect": no rows is no evidence, not evidence
                # of none.
                untouched.update(dict.fromkeys(group, f"the forward pass over {missing} never called it"))
                continue
            weight = cast(Tensor, modules[key].weight)
            w = weight.to(retain.dtype).reshape(retain.groups, -1, retain.dim)  # [groups, Co / groups, d]
            try:
                unprotected = w - retain.filter(w, self.alpha_retain, self.solver)
                delta = forget.filter(unprotected, self.alpha_forget, self.solver)
            except ValueError as error:
                raise ValueError(f"layer {key}: {error}") from error
            updated = (w - delta).reshape(weight.shape).to(weight.dtype)
            if not bool(torch.isfinite(updated).all()):
                raise ValueError(f"the update of layer {key} is not finite; no weight was changed")
            updates.append((weight, updated))
            rows[key] = (retain.rows_seen, forget.rows_seen)
            change[key] = float(delta.norm() / w.norm().clamp(min=torch.finfo(w.dtype).tiny))
        return updates, rows, change


def _updatable(model: nn.Module, layers: Sequence[str] | None) -> tuple[list[list[str]], dict[str, str]]:
    """The chosen layers, those that share a weight together; and the ones to leave alone, with the reason."""
    chosen = choose_layers(model, layers)
    users: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), []).append((name, module))
    known = supported_layers(model)
    untouched = {
        name: "its weight is computed from other parameters"
        for name, module in model.named_modules()
        if layers is None and isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)) and name not in known
    }
    if layers is None:
        untouched |= {
            name: "the input projection of nn.MultiheadAttention is not a layer of its own"
            for name, module in model.named_modules()
            if isinstance(module, nn.MultiheadAttention)
        }
    names: list[list[str]] = []
    done: set[int] = set()
    for name, module in chosen.items():
        weight = cast(Tensor, module.weight)
        if id(weight) in done:
            continue
        done.add(id(weight))
        # Every use of a shared weight counts, also those in layers that were not named.
        uses = users[id(weight)]
        foreign = [
            f"{use} ({type(user).__name__})"
            for use, user in uses
            if use not in known or layer_groups(user) != layer_groups(module)
        ]
        if foreign:
            untouched[name] = f"its weight is also used by {', '.join(foreign)}"
        else:
            names.append([name, *(use for use, _ in uses if use != name)])
    return names, untouched
