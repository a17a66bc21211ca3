"""Optimizers that move only the weights of a bit mask, and keep state for no others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastunlearn import ops
from fastunlearn.parallel.ranks import local


class _MaskedOptimizer(torch.optim.Optimizer):
    """State is one number per mask bit and moment; masks are as :func:`fastunlearn.ops.threshold_reset_` returns."""

    _moments: tuple[str, ...]

    def __init__(self, params: Iterable[nn.Parameter], masks: Sequence[Tensor], defaults: dict[str, Any]) -> None:
        params = list(params)
        if len(masks) != len(params):
            raise ValueError(f"{len(params)} parameters but {len(masks)} masks; one of each is needed")
        for name in ("lr", "weight_decay"):
            if not 0 <= defaults[name] < float("inf"):
                raise ValueError(f"{name} must be a number from 0 up, got {defaults[name]}")
        super().__init__(params, defaults)
        kept = self._moments if defaults.get("momentum", True) else ()
        for p, mask in zip(params, masks, strict=True):
            starts = ops.mask_starts(mask, local(p).numel())
            length = int(starts[-1])
            dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
            moments = {name: torch.zeros(length, dtype=dtype, device=p.device) for name in kept}
            self.state[p] = {"mask": mask, "starts": starts, "step": 0, **moments}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """The parameters of one list with their masks; no more afterwards."""
        if self.param_groups:
            raise ValueError("masks are given with all parameters at once; make a second optimizer for others")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but masks stay integers and the moments of half-precision weights stay float32."""
        super().load_state_dict(state_dict)
        ours = [p for group in self.param_groups for p in group["params"]]
        theirs = [key for group in state_dict["param_groups"] for key in group["params"]]
        for p, key in zip(ours, theirs, strict=True):
            for name, value in state_dict["state"][key].items():
                self.state[p][name] = value.to(p.device, copy=True) if isinstance(value, Tensor) else value

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One launch for all parameters that are at the same step; those without a gradient are left out."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            at_step: dict[int, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["step"] += 1
                    at_step.setdefault(self.state[p]["step"], []).append(p)
            for step, params in at_step.items():
                names = self.state[params[0]].keys() - {"step"}
                state = {name: [self.state[p][name] for p in params] for name in names}
                grads = [_held_grad(p, p.grad) for p in params if p.grad is not None]
                self._launch([local(p.data) for p in params], grads, state, group, step)
        return loss

    def _launch(
        self,
        weights: list[Tensor],
        grads: list[Tensor],
        state: dict[str, list[Tensor]],
        group: dict[str, Any],
        step: int,
    ) -> None:
        raise NotImplementedError


def _held_grad(parameter: nn.Parameter, grad: Tensor) -> Tensor:
    """The gradient of what this rank holds: tensor parallelism leaves that of a table as sums yet to be added up."""
    if isinstance(parameter, DTensor) and isinstance(grad, DTensor):
        grad = grad.redistribute(placements=parameter.placements)
    return local(grad)


class MaskedSGD(_MaskedOptimizer):
    """torch.optim.SGD on the weights whose mask bit is 1: the others keep every bit and have no momentum buffer.

    Args:
        params: parameters, in the order of ``masks``; of DTensors this rank's shard is meant, by mask and step.
        masks: int32 [ceil(numel / 32)] each, as :func:`fastunlearn.ops.threshold_reset_` returns them.
        lr, momentum, weight_decay, nesterov: as in torch.optim.SGD.

    Raises ValueError for settings torch refuses or a different number of masks. Memory: one number per set bit, none
    without momentum.
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
        if not 0 <= momentum < float("inf") or (nesterov and not momentum):
            raise ValueError(f"momentum must be a number from 0 up, above 0 with nesterov, got {momentum}")
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(params, masks, defaults)

    def _launch(
        self,
        weights: list[Tensor],
        grads: list[Tensor],
        state: dict[str, list[Tensor]],
        group: dict[str, Any],
        step: int,
    ) -> None:
        none = [w.new_empty(0, dtype=torch.float64 if w.dtype == torch.float64 else torch.float32) for w in weights]
        ops.masked_sgd_(
            weights, grads, state["mask"], state["starts"], state.get("momentum_buffer", none),
            float(group["lr"]), float(group["momentum"]), group["weight_decay"], group["nesterov"],
        )  # fmt: skip


class MaskedAdamW(_MaskedOptimizer):
    """torch.optim.AdamW on the weights whose mask bit is 1: the others keep every bit and have no moments.

    Args and errors as :class:`MaskedSGD`; ``betas`` and ``eps`` as in torch.optim.AdamW, ``weight_decay`` too, but 0
    by default.
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
        if not all(0 <= beta < 1 for beta in betas) or not 0 <= eps < float("inf"):
            raise ValueError(f"betas must lie from 0 to below 1 and eps from 0 up, got {betas} and {eps}")
        super().__init__(params, masks, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _launch(
        self,
        weights: list[Tensor],
        grads: list[Tensor],
        state: dict[str, list[Tensor]],
        group: dict[str, Any],
        step: int,
    ) -> None:
        beta1, beta2 = group["betas"]
        ops.masked_adamw_(
            weights, grads, state["mask"], state["starts"], state["exp_avg"], state["exp_avg_sq"],
            float(group["lr"]), float(beta1), float(beta2), group["eps"], group["weight_decay"], step,
        )  # fmt: skip
