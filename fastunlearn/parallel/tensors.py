"""Tensor parallelism: what of a layer's inputs and output gradients belongs to the part of it that a rank holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils._pytree import tree_map_only

from fastunlearn.hooks import Call
from fastunlearn.slots import is_transposed
from fastunlearn.uses import Table, Use

Grads = tuple[Tensor | None, ...]


def is_parallel(call: Call, grads: Grads) -> bool:
    """Whether the layer ran on DTensors."""
    return any(isinstance(t, DTensor) for t in (*call.args, *call.kwargs.values(), *grads))


def on_this_rank(module: nn.Module, local: str, call: Call, grads: Grads) -> tuple[Call, Grads]:
    """The call and its output gradients as plain tensors: all positions and samples, and the features that this rank's
    shard of the parameter ``local`` of ``module`` multiplies.

    Nothing is sent where the layer was parallelised as its weights are, column- or row-wise; what lies elsewhere (a
    sequence-parallel norm's positions) is gathered. Raises ValueError for a parameter sharded in another way.
    """
    given, returned = _features(module, local)

    def place(tensor: DTensor, features: int | None) -> Tensor:
        whole = Replicate() if features is None else Shard(tensor.dim() - 1)
        found: Tensor = tensor.redistribute(placements=[whole]).to_local()
        return found

    args, kwargs = tree_map_only(DTensor, lambda t: place(t, given), (call.args, call.kwargs))
    return replace(call, args=args, kwargs=kwargs), tuple(
        place(g, returned) if isinstance(g, DTensor) else g for g in grads
    )


def looked_up_here(use: Use, parameter: Tensor) -> Use:
    """A table whose rows are cut among the ranks: indices of other ranks' rows add nothing."""
    if not (isinstance(use, Table) and isinstance(parameter, DTensor) and parameter.placements == (Shard(0),)):
        return use
    rows = len(parameter.to_local())
    step = -(-parameter.shape[0] // parameter.device_mesh.size())
    first = step * parameter.device_mesh.get_local_rank()
    padding = None if use.padding_idx is None else use.padding_idx - first

    def gather(chunk: slice, gather: Callable[[slice], tuple[Tensor, Tensor]] = use.gather) -> tuple[Tensor, Tensor]:
        indices, grads = gather(chunk)
        indices = indices - first
        elsewhere = (indices < 0) | (indices >= rows)
        return indices.masked_fill(elsewhere, 0), grads.masked_fill(elsewhere[..., None], 0)

    size = use.bytes_per_sample
    here = padding if padding is not None and 0 <= padding < rows else None
    return Table(gather, use.samples, size, here)


def _features(module: nn.Module, local: str) -> tuple[int | None, int | None]:
    """Which axis of the shard meets the features given, and which those returned; None where all of them are needed."""
    parameter: Any = module._parameters[local]
    placement = parameter.placements[0] if isinstance(parameter, DTensor) else Replicate()
    if isinstance(parameter, DTensor) and len(parameter.placements) > 1:
        raise ValueError(f"{local} of a {type(module).__name__} is on a mesh of several dimensions; one is supported")
    if isinstance(placement, Replicate):
        return None, None
    if isinstance(placement, Shard):
        axis = placement.dim % parameter.dim()
        if isinstance(module, nn.Embedding):
            return None, axis if axis == 1 else None
        if isinstance(module, nn.Linear) or is_transposed(module):
            if local == "bias":
                return None, 0
            outwards = axis == (1 if is_transposed(module) else 0)
            return (None, axis) if outwards else (axis, None)
    raise ValueError(
        f"{local} of a {type(module).__name__} is placed as {placement}; tensor parallelism is supported for linear "
        "layers and embeddings, with everything else on every rank"
    )
