"""Optimizers that move only the weights of a bit mask, and keep state for no others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastunlearn import ops


class _MaskedOptimizer(torch.optim.Optimizer):
    """State is one number per mask bit and moment; masks are as :func:`fastunlearn.ops.threshold_reset_` returns."""

    _moments: tuple[str, ...]

    def __init__(self, params: Iterable[nn.Parameter], masks: Sequence[Tensor], defaults: dict[str, Any]) -> None:
        params = list(params)
        if len(masks) != len(params):
            raise ValueError(f"{len(params)} parameters but {len(masks)} masks; one of each is needed")
        if not 0 <= defaults["lr"] < float("inf"):
            raise ValueError(f"lr must be a number from 0 up, got {defaults['lr']}")
        super().__init__(params, defaults)
        self._masks = {id(p): (mask, ops.mask_starts(mask)) for p, mask in zip(params, masks, strict=True)}
        for p in params:
            length = int(self._masks[id(p)][1][-1])
            dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
            self.state[p] = {name: torch.zeros(length, dtype=dtype, device=p.device) for name in self._moments}

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One launch per parameter group; parameters without a gradient are left out, as in torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            moments = [[self.state[p][name] for p in params] for name in self._moments]
            masks, starts = [self._masks[id(p)][0] for p in params], [self._masks[id(p)][1] for p in params]
            self._launch([p.data for p in params], [p.grad for p in params], masks, starts, moments, group)
        return loss

    def _launch(
        self,
        weights: list[Tensor],
        grads: list[Tensor],
        masks: list[Tensor],
        starts: list[Tensor],
        moments: list[list[Tensor]],
        group: dict[str, Any],
    ) -> None:
        raise NotImplementedError


class MaskedSGD(_MaskedOptimizer):
    """torch.optim.SGD on the weights whose mask bit is 1: the others keep every bit and have no momentum buffer.

    Args:
        params: parameters, in the order of ``masks``.
        masks: int32 [ceil(numel / 32)] each, as :func:`fastunlearn.ops.threshold_reset_` returns them.
        lr, momentum, weight_decay, nesterov: as in torch.optim.SGD.

    Raises ValueError for a negative lr or a different number of masks. Memory: one number per set bit.
    """

    _moments = ("momentum_buffer",)

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        masks: Sequence[Tensor],
        lr: float = 0.01,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(params, masks, defaults)

    def _launch(
        self,
        weights: list[Tensor],
        grads: list[Tensor],
        masks: list[Tensor],
        starts: list[Tensor],
        moments: list[list[Tensor]],
        group: dict[str, Any],
    ) -> None:
        ops.masked_sgd_(
            weights, grads, masks, starts, moments[0],
            float(group["lr"]), float(group["momentum"]), group["weight_decay"], group["nesterov"],
        )  # fmt: skip


class MaskedAdamW(_MaskedOptimizer):
    """torch.optim.AdamW on the weights whose mask bit is 1: the others keep every bit and have no moments.

    Args and errors as :class:`MaskedSGD`; ``betas``, ``eps`` and ``weight_decay`` as in torch.optim.AdamW.
    Memory: two numbers per set bit.
    """

    _moments = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        masks: Sequence[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            params, masks, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0}
        )  # fmt: skip

    def _launch(
        self,
        weights: list[Tensor],
        grads: list[Tensor],
        masks: list[Tensor],
        starts: list[Tensor],
        moments: list[list[Tensor]],
        group: dict[str, Any],
    ) -> None:
        group["step"] += 1
        beta1, beta2 = group["betas"]
        ops.masked_adamw_(
            weights, grads, masks, starts, moments[0], moments[1],
            float(group["lr"]), float(beta1), float(beta2), group["eps"], group["weight_decay"], group["step"],
        )  # fmt: skip
