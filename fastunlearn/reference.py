"""Every operator in plain torch: the specification, and the oracle of the tests.

The functions have the contracts of :mod:`fastunlearn.ops`, run on any device and dtype (float64 included) and
favour being obviously right over being fast: some hold one gradient per sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def sq_grad_linear(out: Tensor, input: Tensor, grad_output: Tensor) -> Tensor:
    """out[p, d] += sum_n (sum_t grad_output[n, t, p] * input[n, t, d])**2."""
    a, g = _positions(input.to(out.dtype)), _positions(grad_output.to(out.dtype))
    return out.add_(torch.einsum("ntp,ntd->npd", g, a).square().sum(0))


def _positions(values: Tensor) -> Tensor:
    """[N, ..., features] -> [N, T, features], also of no elements."""
    return values.reshape(values.shape[0], values.shape[1:-1].numel(), values.shape[-1])


def sq_grad_conv2d(
    out: Tensor,
    input: Tensor,
    grad_output: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The same over unfolded patches: out [Co, Ci/groups, kh, kw], input [N, Ci, H, W], grad_output [N, Co, Ho, Wo]."""
    samples, channels = input.shape[:2]
    patches = F.unfold(
        input.to(out.dtype), tuple(out.shape[2:]), tuple(dilation), tuple(padding), tuple(stride)
    )  # [N, Ci * kh * kw, T]
    a = patches.reshape(samples, groups, channels // groups * out.shape[2] * out.shape[3], patches.shape[2])
    g = grad_output.to(out.dtype).reshape(samples, groups, out.shape[0] // groups, patches.shape[2])
    return out.add_(torch.einsum("ngpt,ngdt->ngpd", g, a).square().sum(0).reshape(out.shape))


def sq_grad_affine(out: Tensor, normalized: Tensor, grad_output: Tensor, channel_dim: int = -1) -> Tensor:
    """out[c] += sum_n (sum_t grad_output[n, t, c] * normalized[n, t, c])**2, t over every other axis."""
    g = grad_output.to(out.dtype) * normalized.to(out.dtype)
    return sq_grad_bias(out, g, channel_dim)


def sq_grad_bias(out: Tensor, grad_output: Tensor, channel_dim: int = -1) -> Tensor:
    """out[c] += sum_n (sum_t grad_output[n, t, c])**2, t over every other axis."""
    g = grad_output.to(out.dtype).movedim(channel_dim, -1)
    return out.add_(_positions(g).sum(1).square().sum(0))


def sq_grad_embedding(out: Tensor, indices: Tensor, grad_output: Tensor, padding_idx: int | None = None) -> Tensor:
    """out[v, :] += sum_n (sum over t with indices[n, t] == v of grad_output[n, t, :])**2, v != padding_idx."""
    for ids, g in zip(indices, grad_output, strict=True):
        flat = ids.reshape(-1)
        rows = torch.zeros_like(out).index_add_(0, flat, g.reshape(flat.numel(), -1).to(out.dtype))
        if padding_idx is not None:
            rows[padding_idx] = 0
        out.add_(rows.square())
    return out


def threshold_reset_(
    weights: Sequence[Tensor], forget: Sequence[Tensor], retain: Sequence[Tensor], gamma: float
) -> tuple[list[Tensor], Tensor]:
    """weight = 0 where forget > gamma * retain, the product rounded once in the dtype of the importances."""
    masks, counts = [], []
    for w, f, r in zip(weights, forget, retain, strict=True):
        reset = f > torch.tensor(gamma, dtype=r.dtype, device=r.device) * r
        w.masked_fill_(reset, 0)
        masks.append(pack_mask(reset))
        counts.append(reset.sum())
    return masks, torch.stack(counts) if counts else torch.zeros(0, dtype=torch.int64)


def mask_grads_(grads: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """grad = 0 wherever the mask bit is 0; a NaN there is overwritten too."""
    for g, mask in zip(grads, masks, strict=True):
        g.masked_fill_(~unpack_mask(mask, g.shape), 0)


def pack_mask(mask: Tensor) -> Tensor:
    """bool [any shape] -> int32 [ceil(numel / 32)]; bit j of word i is element 32 i + j in row-major order."""
    flat = mask.reshape(-1).to(torch.int64)
    bits = F.pad(flat, (0, -flat.numel() % 32)).reshape(-1, 32)
    words = (bits << torch.arange(32, device=mask.device)).sum(1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack_mask(words: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of :func:`pack_mask`: int32 words -> bool of ``shape``."""
    count = torch.Size(shape).numel()
    bits = words.to(torch.int64)[:, None] >> torch.arange(32, device=words.device)
    return (bits & 1).to(torch.bool).reshape(-1)[:count].reshape(tuple(shape))


def spectral_filter(gram: Tensor, alpha: float) -> Tensor:
    """U diag(alpha r / ((alpha - 1) r + 1)) U^T with gram = U diag(s) U^T and r = s / sum(s); zero for a zero gram.

    The literal form of Kodge et al. 2024, from an eigendecomposition; ``fastunlearn.spectral_filter`` needs none.
    """
    values, vectors = torch.linalg.eigh(gram)
    total = gram.trace()  # the sum of the eigenvalues; of the clamped ones it would count rounding as energy
    ratio = values.clamp(min=0) / total if total > 0 else torch.zeros_like(values)
    kept = alpha * ratio / ((alpha - 1) * ratio + 1)
    return torch.matmul(vectors * kept, vectors.mT)


def codec(response: Tensor, z: Tensor, given: Tensor | None = None) -> float:
    """Conditional dependence T(Y, Z | X) of Azadkia & Chatterjee 2021 from all pairwise distances, in float64.

    response [n], z [n, q], given [n, k] or None. Nearest neighbours and equal ranks at the lowest index.
    """
    y, z = response.double(), z.double().reshape(len(response), -1)
    n = len(y)
    rank = (y[None, :] <= y[:, None]).sum(1).double()  # R_i: how many are no larger
    above = (y[None, :] >= y[:, None]).sum(1).double()  # L_i: how many are no smaller

    def neighbour(points: Tensor) -> Tensor:
        distance = (points[:, None, :] - points[None, :, :]).square().sum(-1)
        return distance.fill_diagonal_(torch.inf).argmin(1)

    if given is None:
        m = torch.minimum(rank, rank[neighbour(z)])
        denominator = (above * (n - above)).sum()
        numerator = (n * m - above.square()).sum()
    else:
        x = given.double().reshape(n, -1)
        closest = torch.minimum(rank, rank[neighbour(x)])
        numerator = (torch.minimum(rank, rank[neighbour(torch.cat([x, z], 1))]) - closest).sum()
        denominator = (rank - closest).sum()
    return float(numerator / denominator) if denominator != 0 else 0.0
