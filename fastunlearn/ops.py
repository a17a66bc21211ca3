"""The kernels themselves, as typed functions over ``torch.ops.fastunlearn.*``.

Every operator exists for CPU and, in a CUDA build, for CUDA tensors; :mod:`fastunlearn.reference` has the same
functions in plain torch. Samples lie along the first axis. Sums of squares are kept in float32 for float32,
bfloat16 and float16 inputs and in float64 for float64 ones, in a fixed order: equal inputs give equal bits.
Operators write only to the tensors named first, and to nothing when they raise (RuntimeError, with the shapes
that were given). Inputs that are not contiguous are copied; tensors that are written must be contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastunlearn import _library
from fastunlearn.reference import pack_mask, unpack_mask

_C = _library.load()
_ops = torch.ops.fastunlearn

__all__ = [
    "mask_grads_",
    "pack_mask",
    "sq_grad_affine",
    "sq_grad_bias",
    "sq_grad_conv2d",
    "sq_grad_embedding",
    "sq_grad_linear",
    "threshold_reset_",
    "unpack_mask",
]


def sq_grad_linear(out: Tensor, input: Tensor, grad_output: Tensor) -> Tensor:
    """Add the squared per-sample weight gradients of a linear layer to ``out`` and return it.

    out[p, d] += sum_n (sum_t grad_output[n, t, p] * input[n, t, d])**2, with nothing of size N x P x D stored.

    Args:
        out: [P, D], float32 (float64 for float64 inputs).
        input: [N, D] or [N, ..., D]; all axes between are positions t of one sample.
        grad_output: [N, P] or [N, ..., P], same dtype and leading axes as ``input``.

    Cost: 2 N T P D FLOPs, as the ordinary weight gradient, and one multiply-add per weight and sample; on CUDA a
    workspace of at most 16 x P x D. Source: the empirical Fisher diagonal, as DeepClean (Shi et al. 2024) uses it.
    """
    _ops.sq_grad_linear(out, input, grad_output)
    return out


def sq_grad_conv2d(
    out: Tensor,
    input: Tensor,
    grad_output: Tensor,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Add the squared per-sample weight gradients of a 2-d convolution to ``out`` and return it.

    Args:
        out: [Co, Ci / groups, kh, kw], float32 (float64 for float64 inputs).
        input: [N, Ci, H, W], as the layer saw it; zeros are padded by ``padding`` on both sides.
        grad_output: [N, Co, Ho, Wo], same dtype as ``input``.
        stride, padding, dilation: pairs (vertical, horizontal).
        groups: divides Ci and Co.

    Cost: 2 N Ho Wo Co (Ci / groups) kh kw FLOPs; patches are unfolded tile by tile and never stored.
    """
    _ops.sq_grad_conv2d(out, input, grad_output, list(stride), list(padding), list(dilation), groups)
    return out


def sq_grad_affine(out: Tensor, normalized: Tensor, grad_output: Tensor, channel_dim: int = -1) -> Tensor:
    """Add the squared per-sample gradients of a norm layer's weight to ``out`` and return it.

    out[c] += sum_n (sum over all other axes of grad_output * normalized)**2.

    Args:
        out: [C], float32 (float64 for float64 inputs).
        normalized: [N, ..., C, ...], the layer's input after normalisation, before weight and bias.
        grad_output: same shape and dtype.
        channel_dim: the axis of length C, not the first.

    Cost: one read of both inputs.
    """
    _ops.sq_grad_affine(out, normalized, grad_output, channel_dim)
    return out


def sq_grad_bias(out: Tensor, grad_output: Tensor, channel_dim: int = -1) -> Tensor:
    """Add the squared per-sample gradients of a bias to ``out`` and return it.

    out[c] += sum_n (sum over all other axes of grad_output)**2.

    Args:
        out: [C], float32 (float64 for float64 inputs).
        grad_output: [N, ..., C, ...].
        channel_dim: the axis of length C, not the first.

    Cost: one read of ``grad_output``.
    """
    _ops.sq_grad_bias(out, grad_output, channel_dim)
    return out


def sq_grad_embedding(out: Tensor, indices: Tensor, grad_output: Tensor, padding_idx: int | None = None) -> Tensor:
    """Add the squared per-sample gradients of an embedding table to ``out`` and return it.

    out[v, :] += sum_n (sum over t with indices[n, t] == v of grad_output[n, t, :])**2.

    Args:
        out: [V, D], float32 (float64 for float64 inputs).
        indices: [N, ...] int64 or int32, in [0, V); on CUDA an index outside traps in the kernel, as torch's does.
        grad_output: [N, ..., D].
        padding_idx: row whose gradient is zero; negative values count from the end.

    Cost: one stable sort of the indices and one read of ``grad_output``; rows no index names are not touched.
    """
    _ops.sq_grad_embedding(out, indices, grad_output, padding_idx)
    return out


def threshold_reset_(
    weights: Sequence[Tensor], forget: Sequence[Tensor], retain: Sequence[Tensor], gamma: float
) -> tuple[list[Tensor], Tensor]:
    """Set weights to zero where forget / retain > gamma, for a whole list of tensors in one launch.

    The test is ``forget > gamma * retain`` with the product rounded once, so 0/0 keeps, x/0 resets, and a NaN
    on either side keeps.

    Args:
        weights: written in place; any mix of float32, bfloat16, float16 and float64, on one device. Those that are
            not contiguous (channels_last) are staged through a copy.
        forget, retain: importances shaped like the weights, float32 or float64.
        gamma: positive.

    Returns:
        masks: per tensor the reset weights as bits, int32 [ceil(numel / 32)] (see :func:`unpack_mask`).
        counts: int64 [len(weights)], exact.

    Cost: one read of both importances, a write where something changes. Source: DeepClean, Shi et al. 2024.
    """
    staged = [w if w.is_contiguous() else w.contiguous() for w in weights]
    masks = [w.new_empty((w.numel() + 31) // 32, dtype=torch.int32) for w in weights]
    counts = torch.empty(len(weights), dtype=torch.int64, device=weights[0].device if weights else "cpu")
    _ops.threshold_reset_(staged, list(forget), list(retain), gamma, masks, counts)
    _write_back(weights, staged)
    return masks, counts


def mask_grads_(grads: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Set gradients to zero wherever the mask bit is 0 (NaN included), in one launch.

    Args:
        grads: written in place, as ``weights`` of :func:`threshold_reset_`.
        masks: int32 bit masks as returned there, in row-major order of each gradient.
    """
    if not grads and not masks:
        return  # nothing that could tell the dispatcher a device
    staged = [g if g.is_contiguous() else g.contiguous() for g in grads]
    _ops.mask_grads_(staged, list(masks))
    _write_back(grads, staged)


def _write_back(tensors: Sequence[Tensor], staged: Sequence[Tensor]) -> None:
    with torch.no_grad():  # parameters are leaves
        for tensor, copy in zip(tensors, staged, strict=True):
            if copy is not tensor:
                tensor.copy_(copy)


def _nothing(*args: object, **kwargs: object) -> None:
    """The fake kernel of every operator here: they write into their arguments and return nothing."""


for _name in (
    "sq_grad_linear", "sq_grad_conv2d", "sq_grad_affine", "sq_grad_bias", "sq_grad_embedding",
    "threshold_reset_", "mask_grads_",
):  # fmt: skip
    torch.library.register_fake(f"fastunlearn::{_name}", _nothing)
