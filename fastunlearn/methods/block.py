"""The weights of chosen units, as one vector: rows of linear weights, filters of convolutions, and their biases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastunlearn.activations import layers_with_units
from fastunlearn.slots import is_transposed


@dataclass(frozen=True)
class Slab:
    """A parameter that has one slice per unit: unit ``first + i`` of its layer is its i-th slice along ``axis``."""

    parameter: nn.Parameter
    axis: int = 0
    first: int = 0

    @property
    def count(self) -> int:
        return self.parameter.shape[self.axis]


def unit_parameters(module: nn.Module) -> list[Slab]:
    """The trainable parameters that the units of a layer consist of, weights first.

    The weight and the bias; of an attention those of its input projection (``a.in_proj``): the packed weight, or the
    weights of queries, keys and values one after another, and their bias.
    """
    slabs: list[tuple[str, int, int]] = [("weight", 1 if is_transposed(module) else 0, 0), ("bias", 0, 0)]
    if isinstance(module, nn.MultiheadAttention):
        size = module.embed_dim
        projections = [(f"{name}_proj_weight", 0, i * size) for i, name in enumerate("qkv")]
        slabs = [("in_proj_weight", 0, 0), *projections, ("in_proj_bias", 0, 0)]
    found = [(module._parameters.get(name), axis, first) for name, axis, first in slabs]
    return [Slab(p, axis, first) for p, axis, first in found if p is not None and p.requires_grad]


def unit_count(module: nn.Module) -> int:
    """Units of a layer of :func:`trainable_layers`."""
    return max(slab.first + slab.count for slab in unit_parameters(module))


class Block:
    """The weights of chosen units, as slices of parameters, in the model's order of layers.

    Units are taken in the order given while they fit into ``limit`` weights, the first one always; a unit of
    a weight that two layers share counts once.

    Attributes:
        units: the (layer, unit) pairs taken.
        parts: (parameter, indices of its slices) pairs; a bias follows its weight.
        axes: per part the axis that the indices count along: 1 for a weight [in, out], else 0.
        sizes: weights per part.
        size: weights in the block.
        parameters: the parameter of every part.
        device: of the parameters.

    Raises ValueError for a unit that its layer does not have.
    """

    def __init__(self, layers: dict[str, nn.Module], units: Sequence[tuple[str, int]], limit: int | None) -> None:
        self.units: list[tuple[str, int]] = []
        rows: dict[nn.Parameter, set[int]] = {}  # two layers may share one
        slabs = {name: unit_parameters(layers[name]) for name in dict.fromkeys(name for name, _ in units)}
        counts = {name: unit_count(layers[name]) for name in slabs}
        size = 0
        for name, unit in units:
            own = [(s.parameter, s.axis, unit - s.first) for s in slabs[name] if 0 <= unit - s.first < s.count]
            if not 0 <= unit < counts[name]:
                raise ValueError(f"layer {name!r} has units 0 to {counts[name] - 1}, not {unit}")
            new = [(p, axis, row) for p, axis, row in own if row not in rows.get(p, ())]
            extra = sum(p.numel() // p.shape[axis] for p, axis, _ in new)
            # A weight that is in already has its unit in, whatever the bias.
            known = not own or all(p is not own[0][0] for p, _, _ in new)
            if known or (self.units and limit is not None and size + extra > limit):
                continue
            for parameter, _, row in new:
                rows.setdefault(parameter, set()).add(row)
            size += extra
            self.units.append((name, unit))
        self.parts: list[tuple[nn.Parameter, Tensor]] = []
        self.axes: list[int] = []
        for slab in (slab for name, module in layers.items() if name in slabs for slab in slabs[name]):
            if slab.parameter in rows:
                picked = sorted(rows.pop(slab.parameter))
                self.parts.append((slab.parameter, torch.tensor(picked, device=slab.parameter.device)))
                self.axes.append(slab.axis)
        self.parameters = [parameter for parameter, _ in self.parts]
        self.sizes = [
            len(picked) * (parameter.numel() // parameter.shape[axis])
            for (parameter, picked), axis in zip(self.parts, self.axes, strict=True)
        ]
        self.size = sum(self.sizes)
        self.device = self.parameters[0].device if self.parameters else torch.device("cpu")

    def take(self, part: int, tensor: Tensor) -> Tensor:
        """A copy of the part's slices of a tensor shaped like its parameter, the units along axis 0."""
        return tensor.movedim(self.axes[part], 0)[self.parts[part][1]]

    def flat(self, tensors: Sequence[Tensor]) -> Tensor:
        """The block's entries of tensors shaped like its parameters, as one vector [size]."""
        if len(tensors) != len(self.parts):
            raise ValueError(f"expected {len(self.parts)} tensors, got {len(tensors)}")
        return torch.cat([self.take(part, t).reshape(-1) for part, t in enumerate(tensors)])

    def values(self) -> Tensor:
        """A copy of the block's weights, [size] in float64."""
        if not self.parts:
            return torch.zeros(0, dtype=torch.float64)
        return self.flat([p.detach() for p in self.parameters]).double()

    @torch.no_grad()
    def add_(self, step: Tensor) -> None:
        """Add ``step`` [size] to the block's weights, rounded to their dtype."""
        for (parameter, picked), axis, change in zip(self.parts, self.axes, torch.split(step, self.sizes), strict=True):
            rows = parameter.movedim(axis, 0)
            rows[picked] += change.reshape(len(picked), *rows.shape[1:]).to(parameter.dtype)


def trainable_layers(model: nn.Module, names: Sequence[str] | None) -> dict[str, nn.Module]:
    """The layers of :func:`~fastunlearn.activations.layers_with_units` with a weight that requires grad, in order.

    ``names`` keeps only these. Raises ValueError when one of them is no such layer or there is none at all,
    TypeError for a weight in half precision.
    """
    found = {name: module for name, module in layers_with_units(model).items() if _has_trainable_weight(module)}
    unknown = [name for name in names or () if name not in found]
    if unknown or not found:
        raise ValueError(
            f"{', '.join(map(repr, unknown)) or 'the model'} has no trainable linear, convolution or attention weight; "
            f"trainable layers: {', '.join(map(repr, found)) or 'none'}"
        )
    chosen = found if names is None else {name: found[name] for name in found if name in set(names)}
    for name, module in chosen.items():
        for slab in unit_parameters(module):
            if slab.parameter.dtype not in (torch.float32, torch.float64):
                raise TypeError(
                    f"layer {name} is {slab.parameter.dtype}; second derivatives need float32 or float64: model.float()"
                )
    return chosen


def _has_trainable_weight(module: nn.Module) -> bool:
    return any(slab.parameter.dim() > 1 for slab in unit_parameters(module))
