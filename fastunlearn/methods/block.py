"""The weights of chosen units, as one vector: rows of Linear weights, filters of convolutions, and their biases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn


class Block:
    """The weights of chosen units, as slices of parameters, in the model's order of layers.

    Units are taken in the order given while they fit into ``limit`` weights, the first one always; a unit of
    a weight that two layers share counts once.

    Attributes:
        units: the (layer, unit) pairs taken.
        parts: (parameter, rows of it) pairs; a bias follows its weight.
        sizes: weights per part.
        size: weights in the block.
        parameters: the parameter of every part.
        device: of the parameters.

    Raises ValueError for a unit that its layer does not have.
    """

    def __init__(self, layers: dict[str, nn.Module], units: Sequence[tuple[str, int]], limit: int | None) -> None:
        self.units: list[tuple[str, int]] = []
        rows: dict[int, list[int]] = {}  # per parameter: two layers may share one
        size = 0
        for name, unit in units:
            module = layers[name]
            weight = cast(nn.Parameter, module.weight)
            if not 0 <= unit < len(weight):
                raise ValueError(f"layer {name!r} has units 0 to {len(weight) - 1}, not {unit}")
            new = [p for p in (weight, trainable_bias(module)) if p is not None and unit not in rows.get(id(p), [])]
            extra = sum(p[0].numel() for p in new)
            if all(p is not weight for p in new) or (self.units and limit is not None and size + extra > limit):
                continue
            for parameter in new:
                rows.setdefault(id(parameter), []).append(unit)
            size += extra
            self.units.append((name, unit))
        self.parts: list[tuple[nn.Parameter, Tensor]] = []
        for module in layers.values():
            for own in (cast(nn.Parameter, module.weight), trainable_bias(module)):
                if own is not None and id(own) in rows:
                    self.parts.append((own, torch.tensor(sorted(rows.pop(id(own))), device=own.device)))
        self.parameters = [parameter for parameter, _ in self.parts]
        self.sizes = [len(picked) * parameter[0].numel() for parameter, picked in self.parts]
        self.size = sum(self.sizes)
        self.device = self.parameters[0].device if self.parameters else torch.device("cpu")

    def flat(self, tensors: Sequence[Tensor]) -> Tensor:
        """The block's entries of tensors shaped like its parameters, as one vector [size]."""
        return torch.cat([t[picked].reshape(-1) for t, (_, picked) in zip(tensors, self.parts, strict=True)])

    def values(self) -> Tensor:
        """A copy of the block's weights, [size] in float64."""
        if not self.parts:
            return torch.zeros(0, dtype=torch.float64)
        return self.flat([p.detach() for p in self.parameters]).double()

    @torch.no_grad()
    def add_(self, step: Tensor) -> None:
        """Add ``step`` [size] to the block's weights, rounded to their dtype."""
        for (parameter, picked), part in zip(self.parts, torch.split(step, self.sizes), strict=True):
            parameter[picked] += part.reshape(len(picked), *parameter.shape[1:]).to(parameter.dtype)


def trainable_layers(model: nn.Module, names: Sequence[str] | None) -> dict[str, nn.Module]:
    """The Linear, Conv1d and Conv2d layers whose weight requires grad, by name in the model's order.

    ``names`` keeps only these. Raises ValueError when one of them is no such layer or there is none at all,
    TypeError for a weight in half precision.
    """
    found: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d))
        and (weight := module._parameters.get("weight")) is not None
        and weight.requires_grad
    }
    unknown = [name for name in names or () if name not in found]
    if unknown or not found:
        raise ValueError(
            f"{', '.join(map(repr, unknown)) or 'the model'} has no trainable Linear or convolution weight; "
            f"trainable layers: {', '.join(map(repr, found)) or 'none'}"
        )
    chosen = found if names is None else {name: found[name] for name in found if name in set(names)}
    for name, module in chosen.items():
        dtype = cast(Tensor, module.weight).dtype
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"layer {name} is {dtype}; second derivatives need float32 or float64: model.float()")
    return chosen


def trainable_bias(module: nn.Module) -> nn.Parameter | None:
    """The layer's bias if it has one that requires grad."""
    bias = module._parameters.get("bias")
    return bias if bias is not None and bias.requires_grad else None
