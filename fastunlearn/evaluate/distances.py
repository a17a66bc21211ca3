"""How far a model is from another of the same structure: weight by weight, and layer by layer in what it computes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_leaves

from fastunlearn import attention
from fastunlearn.activations import attended_positions
from fastunlearn.data import Batch, Batches, read
from fastunlearn.evaluate.metrics import moved
from fastunlearn.hooks import Call, device_of, eager, preserved, recording, without_fused_attention


@dataclass(frozen=True)
class RelativeDistance:
    """A distance from a reference, and the same divided by the reference's norm.

    Attributes:
        distance: L2 norm of the difference.
        relative: ``distance`` over the L2 norm of the reference; where that is zero, 0 for no difference and infinite
            for any.
    """

    distance: float
    relative: float


def weight_distance(model: nn.Module, reference: nn.Module) -> dict[str, RelativeDistance]:
    """L2 distance of every parameter from the reference's of the same name, in the model's order.

    A parameter that is shared under several names is there once. Buffers, such as BatchNorm's running statistics, are
    not weights and left out. NaN in either parameter gives NaN for it alone.

    Raises ValueError naming the parameters that only one of the models has, or has in another shape.

    Cost: one pass over the weights; two float64 copies of one parameter at a time. The reference may be on another
    device.
    """
    _require_same_structure(model, reference)
    others = dict(reference.named_parameters())
    found = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            other = others[name].to(parameter.device).double()
            distance, norm = ((parameter.double() - other).norm(), other.norm())
            found[name] = RelativeDistance(float(distance), _relative(float(distance), float(norm)))
    return found


def activation_distance(
    model: nn.Module, reference: nn.Module, batches: Batches, layers: Sequence[str] | None = None
) -> dict[str, float]:
    """How far what the layers return is from what the reference's return, relative to the reference's norm.

    For each layer, the mean over samples of the L2 distance between both models' outputs for the sample, all positions
    together, divided by the mean over samples of the L2 norm of the reference's: 0 is the same, and sqrt(2) is what
    unrelated outputs of the same norm have. Where the reference returns zeros only, 0 or infinite as in
    :class:`RelativeDistance`.

    Both models run in eval mode without gradients and are unchanged. Where the batch has an ``attention_mask`` [N, T],
    outputs [N, T, ...] count at the attended positions only. A layer that runs more than once per pass has all its
    outputs of a sample taken together; of a layer that returns several things (LSTM, MultiheadAttention) the first
    floating-point tensor counts; an output [1, ...] for N samples, such as of an embedding of positions, is every
    sample's.

    Args:
        model, reference: of the same structure; may be on different devices.
        batches: re-iterable of ``(inputs, targets)`` or of dicts; targets are not looked at.
        layers: names of layers; by default the innermost modules with parameters of their own, and MultiheadAttention.

    Returns:
        By layer name, in the model's order; layers that the forward pass never calls are absent.

    Raises:
        ValueError: the structures differ, an unknown layer, a layer whose output does not have the samples first or
            has another shape in the reference, or no layer was called; each names it.
        TypeError: a layer without a floating-point tensor in its output, ``batches`` that can be read only once.

    Cost: one forward pass per model; the outputs of the model's layers for one batch are held.
    """
    _require_same_structure(model, reference)
    ours, theirs = (_chosen(m, layers) for m in (model, reference))
    sums: dict[str, tuple[float, float]] = {}
    settings = (preserved(model), preserved(reference), torch.no_grad(), without_fused_attention(), eager())
    with settings[0], settings[1], settings[2], settings[3], settings[4]:
        model.eval()
        reference.eval()
        for batch in read(batches, "batches", device_of(model)):
            for name, (distance, norm) in _of_batch(model, reference, ours, theirs, batch).items():
                before = sums.get(name, (0.0, 0.0))
                sums[name] = (before[0] + distance, before[1] + norm)
    if not sums:
        raise ValueError("the forward pass called none of the layers, so there are no outputs to compare")
    return {name: _relative(*sums[name]) for name in ours if name in sums}


def _of_batch(
    model: nn.Module,
    reference: nn.Module,
    ours: Mapping[str, nn.Module],
    theirs: Mapping[str, nn.Module],
    batch: Batch,
) -> dict[str, tuple[float, float]]:
    """By layer, sums over the samples of the distance and of the reference's norm."""
    held: dict[str, list[Tensor]] = {name: [] for name in ours}
    squares: dict[str, Tensor] = {}  # [2, N]: of the distance and of the reference's norm
    names = {module: name for layers in (ours, theirs) for name, module in layers.items()}
    device, attended = device_of(model), attended_positions(batch)

    def keep(call: Call) -> None:
        name = names[call.module]
        held[name].append(_rows(name, call, batch.size, attended))

    def compare(call: Call) -> None:
        name = names[call.module]
        other = _rows(name, call, batch.size, attended).to(device)
        if not held[name]:
            raise ValueError(f"layer {name} runs more often in the reference than in the model")
        mine = held[name].pop(0)
        if mine.shape != other.shape:
            raise ValueError(
                f"layer {name} returns {mine.shape[1]} values per sample, and {other.shape[1]} in the reference"
            )
        both = torch.stack([_square_sums(mine - other), _square_sums(other)])
        squares[name] = squares[name] + both if name in squares else both

    with recording(ours.values(), keep):
        batch.outputs(model)
    with recording(theirs.values(), compare):
        moved(batch, device_of(reference)).outputs(reference)
    if left := [name for name, rows in held.items() if rows]:
        raise ValueError(f"layer {left[0]} runs more often in the model than in the reference")
    totals = {name: both.sqrt().sum(1) for name, both in squares.items()}
    return {name: (float(distance), float(norm)) for name, (distance, norm) in totals.items()}


def _rows(name: str, call: Call, size: int, attended: Tensor | None) -> Tensor:
    """[N, values] of one call, a copy in float32 or wider: what follows may change the output in place."""
    output = next((x for x in tree_leaves(call.output) if isinstance(x, Tensor) and x.is_floating_point()), None)
    if output is None:
        raise TypeError(
            f"layer {name} returns {type(call.output).__name__} without a floating-point tensor; "
            "name the layers to compare in layers="
        )
    if isinstance(call.module, nn.MultiheadAttention):
        output = attention.samples_first(call.module, output)
    if output.dim() == 0 or len(output) not in (1, size):
        raise ValueError(
            f"layer {name} returns {list(output.shape)} for a batch of {size} samples; activations are compared with "
            "the samples along the first axis: name the layers that have them there in layers="
        )
    rows = output.detach().to(torch.promote_types(output.dtype, torch.float32), copy=True)
    rows = rows.expand(size, *rows.shape[1:])
    if attended is not None and rows.dim() == 3 and rows.shape[1] == attended.shape[1]:
        rows = rows.masked_fill(~attended.to(rows.device)[..., None], 0)
    return rows.reshape(size, -1)


def _square_sums(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return norms.square()


def _relative(distance: float, norm: float) -> float:
    if norm == 0:
        return 0.0 if distance == 0 else math.nan if math.isnan(distance) else math.inf
    return distance / norm


def _chosen(model: nn.Module, layers: Sequence[str] | None) -> dict[str, nn.Module]:
    known = {
        name: module
        for name, module in model.named_modules()
        if _is_layer(module) and "parametrizations" not in name.split(".")  # those are called on weights
    }
    unknown = [name for name in layers or () if name not in known]
    if unknown:
        raise ValueError(
            f"{', '.join(map(repr, unknown))} is not a layer with weights; the model has "
            f"{', '.join(map(repr, known)) or 'none'}"
        )
    return known if layers is None else {name: known[name] for name in known if name in layers}


def _is_layer(module: nn.Module) -> bool:
    if is_parametrized(module) or isinstance(module, nn.MultiheadAttention):
        return True  # they have children, which are not called on the data
    return not any(True for _ in module.children()) and any(p is not None for p in module._parameters.values())


def _require_same_structure(model: nn.Module, reference: nn.Module) -> None:
    ours, theirs = ({name: list(p.shape) for name, p in m.named_parameters()} for m in (model, reference))
    differing: list[Any] = [f"{name} (only in the model)" for name in ours if name not in theirs]
    differing += [f"{name} (only in the reference)" for name in theirs if name not in ours]
    differing += [
        f"{name} ({shape} in the model, {theirs[name]} in the reference)"
        for name, shape in ours.items()
        if theirs.get(name, shape) != shape
    ]
    if differing:
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise ValueError(f"the models differ in structure: {', '.join(differing[:5])}{more}")
