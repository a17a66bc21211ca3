"""Conditional dependence of a response on features (CODEC) and the greedy selection built on it (FOCI).

Sources: Azadkia & Chatterjee, "A simple measure of conditional dependence", Annals of Statistics 2021 (CODEC,
FOCI); Mehta, Pal, Singh & Ravi, "Deep Unlearning via Randomized Conditionally Independent Hessians", CVPR
2022 (L-CODEC, arXiv 2204.07655). With n rows, R_i the rank of y_i, L_i the number of y_j >= y_i, N(i) and
M(i) the nearest neighbours of row i in X and in (X, Z):

    T(Y, Z)     = sum(n min(R_i, R_M(i)) - L_i^2) / sum(L_i (n - L_i))
    T(Y, Z | X) = sum(min(R_i, R_M(i)) - min(R_i, R_N(i))) / sum(R_i - min(R_i, R_N(i)))

Squared distances add up over features, so a round of FOCI needs only the distances over the chosen features
and one fused multiply-add per pair of rows and candidate: ``fastunlearn.ops.codec_scores``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastunlearn import ops

# Pairwise distances worked on at once: 2^20 of them stay within the caches of a CPU core pair.
_BLOCK = 1 << 20
# n^3 has to fit an int64, n^2 an int32: the operators' limit.
_MOST_ROWS = 46_340


@dataclass(frozen=True)
class Foci:
    """Chosen feature columns, in the order chosen, and the dependence T that each had when it was chosen."""

    indices: list[int]
    scores: list[float]


def codec(response: Any, z: Any, given: Any | None = None) -> float:
    """Conditional dependence T(Y, Z | X), or T(Y, Z) without ``given``: 0 independent, 1 a function of Z.

    An estimate: it can fall below 0 and, without ``given``, its expectation is exact only as n grows. Ties
    are broken by the lowest row index among equally near neighbours and ranks count all equal values; heavily
    tied columns (the zeros of a ReLU) are better given a little noise first, as ``foci(noise=...)`` does.
    Where the denominator is 0 (constant Y, or Y already a function of X at every row) the dependence is 0.

    Args:
        response: Y [n] (or [n, 1]); NumPy or torch, any real dtype. Only its ranks matter.
        z: Z [n] or [n, q].
        given: X [n] or [n, k]; None or k = 0 for the unconditional T.

    Raises:
        ValueError: fewer than 2 rows, different numbers of rows, Z without columns, or NaN, Inf or 1e150 and more
            (the column is named).
        TypeError: complex or non-numeric input.

    Cost: n log n for one column of Z alone, else n^2 (q + k) multiply-adds; distances in float32 where all features
    are, else float64; O(n) memory and one block of 2^20 distances. Source: Azadkia & Chatterjee 2021.
    """
    z_columns = _columns(z, "z")
    y = _response(response, len(z_columns), z_columns.device)
    if z_columns.shape[1] == 0:
        raise ValueError("z has no columns, so Y can not depend on it")
    rank, above = _ranks(y)
    x_columns = z_columns[:, :0] if given is None else _columns(given, "given").to(z_columns.device)
    n = len(z_columns)
    if len(x_columns) != n:
        raise ValueError(f"z has {n} rows and given has {len(x_columns)}; one row per sample in both")
    # Integers throughout, so that the sums are exact up to n = 2e6 rows.
    if x_columns.shape[1]:
        dtype = torch.promote_types(z_columns.dtype, x_columns.dtype)
        both = torch.cat([x_columns.to(dtype), z_columns.to(dtype)], 1)
        closest = torch.minimum(rank, rank[_neighbours(x_columns)])
        numerator = (torch.minimum(rank, rank[_neighbours(both)]) - closest).sum()
        denominator = (rank - closest).sum()
    elif z_columns.shape[1] == 1 and n <= _MOST_ROWS:
        return float(ops.codec_scores(z_columns, torch.stack([rank, above]).int()))
    else:
        numerator = (n * torch.minimum(rank, rank[_neighbours(z_columns)]) - above.square()).sum()
        denominator = (above * (n - above)).sum()
    return int(numerator) / int(denominator) if denominator else 0.0


def foci(
    features: Any,
    response: Any,
    early_stop: bool = True,
    noise: float = 0.0,
    seed: int = 0,
    max_features: int | None = None,
) -> Foci:
    """Greedy selection: add the feature with the largest T(Y, feature | chosen) until none adds anything.

    Features are compared as they are: scale them first if their units differ. The lowest column wins a tie. A
    constant column tells nothing about Y and is never chosen. A constant response has no score above 0.

    Args:
        features: [n, p] (or [n]); NumPy or torch. float32 keeps its distances in float32 unless the largest
            magnitude of some column is outside 1e-12 to 1e12, half precision is widened to float32, all else to
            float64.
        response: Y [n] (or [n, 1]).
        early_stop: stop when the best T is 0 or less; otherwise go on to ``max_features``.
        noise: standard deviation of Gaussian noise added to each column, as a share of the column's own
            standard deviation; breaks ties at random instead of by row index.
        seed: of that noise, which is counter-based: the same on every device.
        max_features: how many to choose at most; all by default.

    Returns:
        :class:`Foci`; its first score is the unconditional T(Y, feature).

    Raises:
        ValueError: fewer than 2 rows or more than 46,340, different numbers of rows, NaN, Inf or 1e150 and more
            (the column is named), ``noise`` < 0 or not finite, ``max_features`` < 0.
        TypeError: complex or non-numeric input.

    Cost: n p log n for the first feature; n^2 p fused multiply-adds for each further one on CUDA, and at most about
    2 n^2 p on a CPU, far fewer where rows settle among their nearest: as many as a sample says. n^2 distances are
    held, on a CPU also those lists, at worst as many entries again with their rows. On CUDA one copy of two numbers
    to the host per feature. Source: Azadkia & Chatterjee 2021, section 5; Mehta et al. 2022
    for the noise.
    """
    if not 0 <= noise < float("inf"):
        raise ValueError(f"noise must be a finite number of 0 or more, got {noise}")
    if max_features is not None and max_features < 0:
        raise ValueError(f"max_features must be 0 or more, or None for all, got {max_features}")
    x = _columns(features, "features")
    n, p = x.shape
    if n > _MOST_ROWS:
        raise ValueError(f"features has {n} rows; all their distances are held, so at most {_MOST_ROWS} are accepted")
    y = _response(response, n, x.device)
    candidates = x.amin(0) != x.amax(0)
    if noise and p:
        # Centred first: beside a large mean, a float32 column would round the noise away.
        x = (x - x.mean(0)).contiguous()
        ops.add_column_noise_(x, noise * x.std(0, correction=0), seed)
    x = x.contiguous()  # once, not in every round
    terms = torch.stack(_ranks(y)).int()
    distances: Tensor | None = None
    chosen = Foci([], [])
    limit = p if max_features is None else min(max_features, p)
    while len(chosen.indices) < limit:
        scores = ops.codec_scores(x, terms, distances, candidates)
        best = scores.argmax(0, keepdim=True)  # the first of equals
        score, column = torch.cat([scores[best], best.double()]).tolist()
        if score == -float("inf") or (early_stop and score <= 0):
            break
        chosen.indices.append(int(column))
        chosen.scores.append(score)
        if len(chosen.indices) == limit:
            break
        candidates[best] = False
        if distances is None:
            distances = x.new_zeros(n, n)
        ops.codec_choose_(distances, terms, x[:, best].flatten())
    return chosen


def _tensor(values: Any) -> Tensor:
    if isinstance(values, np.ndarray):  # torch takes neither negative strides nor read-only memory
        values = np.require(values, requirements=["C", "W"])
    return torch.as_tensor(values).detach()


def _columns(values: Any, name: str) -> Tensor:
    """values as [n, columns] in float32 or float64, every column finite."""
    columns = _tensor(values)
    if columns.is_complex():
        raise TypeError(f"{name} must be real, got {columns.dtype}")
    if columns.dim() not in (1, 2):
        raise ValueError(f"{name} must be [n] or [n, columns], got shape {list(columns.shape)}")
    half = columns.dtype in (torch.float16, torch.bfloat16)
    dtype = torch.float32 if half or columns.dtype == torch.float32 else torch.float64
    columns = columns.reshape(len(columns), -1).to(dtype) if columns.numel() else columns.reshape(len(columns), 0)
    if len(columns) < 2:
        raise ValueError(f"{name} has {len(columns)} row(s); a nearest neighbour needs at least 2")
    largest = torch.maximum(columns.amax(0), -columns.amin(0))  # NaN where there is one; no copy of the columns
    bad = ~torch.isfinite(largest)
    if bool(bad.any()):
        raise ValueError(f"column {int(bad.nonzero()[0])} of {name} holds NaN or Inf")
    # Squares beyond these would overflow, or vanish and look like ties: in any column, not just in the largest.
    if columns.dtype == torch.float32 and bool(((largest >= 1e12) | (largest <= 1e-12) & (largest > 0)).any()):
        columns = columns.double()
    elif bool((large := largest >= 1e150).any()):
        column = int(large.nonzero()[0])
        raise ValueError(
            f"column {column} of {name} reaches {float(largest[column]):.0e}, whose square overflows; scale"
        )
    return columns


def _response(values: Any, rows: int, device: torch.device) -> Tensor:
    """Y as [n] in its own precision: ranks must not depend on any rounding of ours."""
    y = _tensor(values).to(device)
    if y.is_complex():
        raise TypeError(f"response must be real, got {y.dtype}")
    if y.dim() == 0 or y.numel() != len(y):
        raise ValueError(f"response must be [n] or [n, 1], got shape {list(y.shape)}")
    if len(y) != rows:
        raise ValueError(f"response has {len(y)} rows and the features have {rows}; one row per sample in both")
    # torch sorts and searches neither bool, nor unsigned, nor 8-bit floating-point numbers; what follows is exact.
    if y.is_floating_point():
        y = y.float() if y.element_size() < 4 else y
    elif y.dtype == torch.uint64:
        y = y.view(torch.int64) ^ torch.iinfo(torch.int64).min  # the order of the unsigned numbers
    else:
        y = y.long()
    if y.is_floating_point() and not bool(torch.isfinite(y).all()):
        raise ValueError("response holds NaN or Inf")
    return y.reshape(-1).contiguous()


def _ranks(y: Tensor) -> tuple[Tensor, Tensor]:
    """R_i = how many y_j <= y_i and L_i = how many y_j >= y_i, int64."""
    ordered = y.sort().values
    return torch.searchsorted(ordered, y, right=True), len(y) - torch.searchsorted(ordered, y)


def _neighbours(columns: Tensor) -> Tensor:
    """Nearest other row of every row of [n, q], the lowest index among equals; in blocks, never n x n."""
    n = len(columns)
    block = max(1, _BLOCK // n)
    nearest = []
    for start in range(0, n, block):
        rows = columns[start : start + block]
        distance = torch.zeros(len(rows), n, dtype=columns.dtype, device=columns.device)
        distance.diagonal(offset=start).fill_(torch.inf)
        for j in range(columns.shape[1]):
            distance += (rows[:, j, None] - columns[None, :, j]).square_()
        nearest.append(distance.argmin(1))
    return torch.cat(nearest)
