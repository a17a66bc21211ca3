"""Conditional dependence of a response on features (CODEC), and the greedy selection built on it (FOCI).

Sources: Azadkia & Chatterjee, "A simple measure of conditional dependence", Annals of Statistics 2021 (CODEC,
FOCI); Mehta, Pal, Singh & Ravi, "Deep Unlearning via Randomized Conditionally Independent Hessians", CVPR
2022 (L-CODEC, arXiv 2204.07655). With n rows, R_i the rank of y_i, L_i the number of y_j >= y_i, N(i) and
M(i) the nearest neighbours of row i in X and in (X, Z):

    T(Y, Z)     = sum(n min(R_i, R_M(i)) - L_i^2) / sum(L_i (n - L_i))
    T(Y, Z | X) = sum(min(R_i, R_M(i)) - min(R_i, R_N(i))) / sum(R_i - min(R_i, R_N(i)))

Squared distances add up over features, so a round of FOCI needs only the distances over the chosen features
and one fused multiply-add per pair of rows and candidate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Rows of pairwise distances worked on at once: 2^20 of them stay within the caches of a CPU core pair.
_BLOCK = 1 << 20
# Features tried at once, and lengths of the lists of nearest rows tried before a full scan.
_CHUNK = 32
_LISTS = (32, 256)


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
        ValueError: fewer than 2 rows, different numbers of rows, or NaN or Inf (the column is named).
        TypeError: complex or non-numeric input.

    Cost: n^2 (q + k) multiply-adds, distances in float32 where all features are, else float64; O(n) memory
    and one block of 2^20 distances. Source: Azadkia & Chatterjee 2021.
    """
    z_columns = _columns(z, "z")
    y = _response(response, len(z_columns), z_columns.device)
    rank, above = _ranks(y)
    if given is None:
        return _unconditional(rank, above, _neighbours(z_columns)[None])[0]
    x_columns = _columns(given, "given").to(z_columns.device)
    if len(x_columns) != len(z_columns):
        raise ValueError(f"z has {len(z_columns)} rows and given has {len(x_columns)}; one row per sample in both")
    if x_columns.shape[1] == 0:
        return _unconditional(rank, above, _neighbours(z_columns)[None])[0]
    dtype = torch.promote_types(z_columns.dtype, x_columns.dtype)
    both = torch.cat([x_columns.to(dtype), z_columns.to(dtype)], 1)
    closest = torch.minimum(rank, rank[_neighbours(x_columns)])
    return _conditional(rank, closest, _neighbours(both)[None])[0]


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
        features: [n, p] (or [n]); NumPy or torch. float32 keeps its distances in float32, half precision is
            widened to float32, all else to float64.
        response: Y [n] (or [n, 1]).
        early_stop: stop when the best T is 0 or less; otherwise go on to ``max_features``.
        noise: standard deviation of Gaussian noise added to each column, as a share of the column's own
            standard deviation; breaks ties at random instead of by row index.
        seed: of that noise.
        max_features: how many to choose at most; all by default.

    Returns:
        :class:`Foci`; its first score is the unconditional T(Y, feature).

    Raises:
        ValueError: fewer than 2 rows, different numbers of rows, NaN or Inf (the column is named),
            ``noise`` < 0 or not finite, ``max_features`` < 0.
        TypeError: complex or non-numeric input.

    Cost: per feature chosen at most n^2 p multiply-adds, n p log n for the first; most rows settle among
    their 256 nearest. n^2 + 2^20 distances held.
    Source: Azadkia & Chatterjee 2021, section 5; Mehta et al. 2022 for the noise.
    """
    if not 0 <= noise < float("inf"):
        raise ValueError(f"noise must be a finite number of 0 or more, got {noise}")
    if max_features is not None and max_features < 0:
        raise ValueError(f"max_features must be 0 or more, or None for all, got {max_features}")
    x = _columns(features, "features")
    y = _response(response, len(x), x.device)
    n, p = x.shape
    candidates = [j for j in range(p) if bool((x[:, j] != x[0, j]).any())]
    if noise:
        generator = torch.Generator().manual_seed(seed)
        # Centred first: beside a large mean, a float32 column would round the noise away.
        x = x - x.mean(0)
        draws = torch.randn(n, p, generator=generator, dtype=x.dtype).to(x.device)
        x = x + noise * x.std(0, correction=0) * draws
    columns = x.T.contiguous()  # [p, n]: a feature is read as a whole
    rank, above = _ranks(y)
    distance = torch.zeros(n, n, dtype=x.dtype, device=x.device)
    distance.fill_diagonal_(torch.inf)
    chosen = Foci([], [])
    limit = len(candidates) if max_features is None else min(max_features, len(candidates))
    closest: Tensor | None = None  # min(R_i, R_N(i)) over the chosen features
    while len(chosen.indices) < limit:
        scan = _Nearest(distance) if chosen.indices else None
        best, score, best_neighbours = -1, -float("inf"), rank
        for start in range(0, len(candidates), _CHUNK):
            part = candidates[start : start + _CHUNK]
            neighbours = _nearest_on_lines(columns[part]) if scan is None else scan.joined_by(columns[part])
            if closest is None:
                values = _unconditional(rank, above, neighbours)
            else:
                values = _conditional(rank, closest, neighbours)
            top = max(range(len(part)), key=values.__getitem__)  # the first of equals
            if values[top] > score:
                best, score, best_neighbours = part[top], values[top], neighbours[top]
        if early_stop and score <= 0:
            break
        chosen.indices.append(best)
        chosen.scores.append(score)
        candidates.remove(best)
        closest = torch.minimum(rank, rank[best_neighbours])
        for start in range(0, n, _CHUNK):
            rows = columns[best, start : start + _CHUNK, None] - columns[best]
            distance[start : start + _CHUNK].addcmul_(rows, rows)
    return chosen


def _columns(values: Any, name: str) -> Tensor:
    """values as [n, columns] in float32 or float64, every column finite."""
    columns = torch.as_tensor(values).detach()
    if columns.is_complex():
        raise TypeError(f"{name} must be real, got {columns.dtype}")
    if columns.dim() not in (1, 2):
        raise ValueError(f"{name} must be [n] or [n, columns], got shape {list(columns.shape)}")
    half = columns.dtype in (torch.float16, torch.bfloat16)
    dtype = torch.float32 if half or columns.dtype == torch.float32 else torch.float64
    columns = columns.reshape(len(columns), -1).to(dtype) if columns.numel() else columns.reshape(len(columns), 0)
    if len(columns) < 2:
        raise ValueError(f"{name} has {len(columns)} row(s); a nearest neighbour needs at least 2")
    bad = ~torch.isfinite(columns).all(0)
    if bool(bad.any()):
        raise ValueError(f"column {int(bad.nonzero()[0])} of {name} holds NaN or Inf")
    # Squares of float32 beyond these would overflow, or vanish and look like ties.
    if columns.dtype == torch.float32 and columns.numel() and not 1e-12 < float(columns.abs().max()) < 1e12:
        columns = columns.double()
    return columns


def _response(values: Any, rows: int, device: torch.device) -> Tensor:
    """Y as [n] in its own precision: ranks must not depend on any rounding of ours."""
    y = torch.as_tensor(values).detach().to(device)
    if y.is_complex():
        raise TypeError(f"response must be real, got {y.dtype}")
    if y.dim() == 0 or y.numel() != len(y):
        raise ValueError(f"response must be [n] or [n, 1], got shape {list(y.shape)}")
    if len(y) != rows:
        raise ValueError(f"response has {len(y)} rows and the features have {rows}; one row per sample in both")
    if y.is_floating_point() and not bool(torch.isfinite(y).all()):
        raise ValueError("response holds NaN or Inf")
    return y.reshape(-1).contiguous()


def _ranks(y: Tensor) -> tuple[Tensor, Tensor]:
    """R_i = how many y_j <= y_i and L_i = how many y_j >= y_i, int64."""
    ordered = y.sort().values
    return torch.searchsorted(ordered, y, right=True), len(y) - torch.searchsorted(ordered, y)


def _unconditional(rank: Tensor, above: Tensor, neighbours: Tensor) -> list[float]:
    """T(Y, Z) for every row of ``neighbours`` [c, n]."""
    # Integers throughout, so the sums are exact up to n = 2e6 rows.
    n = len(rank)
    denominator = int((above * (n - above)).sum())
    numerators = (n * torch.minimum(rank, rank[neighbours]) - above.square()).sum(1).tolist()
    return [numerator / denominator if denominator else 0.0 for numerator in numerators]


def _conditional(rank: Tensor, closest: Tensor, neighbours: Tensor) -> list[float]:
    """T(Y, Z | X) for every row of ``neighbours`` [c, n]; ``closest`` is min(R_i, R_N(i))."""
    denominator = int((rank - closest).sum())
    numerators = (torch.minimum(rank, rank[neighbours]) - closest).sum(1).tolist()
    return [numerator / denominator if denominator else 0.0 for numerator in numerators]


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


def _nearest_on_lines(columns: Tensor) -> Tensor:
    """Nearest other row by one feature alone, for every feature of [c, n]; ties go to the lowest index.

    Neighbours on a line are adjacent in sorted order: n log n instead of n^2. Columns with equal values take
    the general path, where ties are broken.
    """
    count = len(columns)
    values, order = columns.sort(1)
    gap = values.diff(dim=1).square()  # [c, n - 1], of sorted neighbours
    end = gap.new_full((count, 1), torch.inf)
    left, right = torch.cat([end, gap], 1), torch.cat([gap, end], 1)
    before, after = order.roll(1, 1), order.roll(-1, 1)
    take_left = (left < right) | ((left == right) & (before < after))
    nearest = torch.empty_like(order).scatter_(1, order, torch.where(take_left, before, after))
    for j in (gap == 0).any(1).nonzero().flatten().tolist():
        nearest[j] = _neighbours(columns[j, :, None])
    return nearest


class _Nearest:
    """Nearest rows once one more feature joins those behind ``distance`` [n, n] (its diagonal infinite).

    A new feature only adds distance. So if the best of a row's k nearest is, with the feature, still closer
    than the k-th was without, no row outside those k can beat or equal it. Short lists settle most rows,
    longer ones most of the rest, and only what then remains is scanned in full. The answer is exactly the
    full scan's.
    """

    def __init__(self, distance: Tensor) -> None:
        self.distance = distance
        n = len(distance)
        self.lists: list[tuple[Tensor, Tensor, Tensor]] = []
        lengths = [k for k in _LISTS if k < n // 2]
        if lengths:
            near, index = distance.topk(lengths[-1], 1, largest=False, sorted=True)
            for k in lengths:
                # In order of index, because argmin returns the first of equals.
                ordered, position = index[:, :k].sort(1)
                self.lists.append((ordered, near[:, :k].gather(1, position), near[:, k - 1]))

    def joined_by(self, columns: Tensor) -> Tensor:
        """[c, n]: the nearest neighbours with each of the features [c, n] joined alone."""
        count, n = columns.shape
        nearest = torch.empty(count, n, dtype=torch.int64, device=columns.device)
        feature, row = (
            t.flatten()
            for t in torch.meshgrid(
                torch.arange(count, device=columns.device),
                torch.arange(n, device=columns.device),
                indexing="ij",
            )
        )
        for index, near, radius in self.lists:
            left = []
            for f, r in self._blocks(feature, row, index.shape[1]):
                others = index[r]
                difference = columns[f[:, None], others] - columns[f, r, None]
                joined = torch.addcmul(near[r], difference, difference)
                best = joined.argmin(1, keepdim=True)
                nearest[f, r] = others.gather(1, best)[:, 0]
                left.append(joined.gather(1, best)[:, 0] >= radius[r])
            unsettled = torch.cat(left)
            feature, row = feature[unsettled], row[unsettled]
            if not len(row):
                return nearest
        for f, r in self._blocks(feature, row, n):
            difference = columns[f] - columns[f, r, None]
            nearest[f, r] = torch.addcmul(self.distance[r], difference, difference).argmin(1)
        return nearest

    @staticmethod
    def _blocks(feature: Tensor, row: Tensor, width: int) -> Iterator[tuple[Tensor, Tensor]]:
        size = max(1, _BLOCK // width)
        yield from zip(torch.split(feature, size), torch.split(row, size), strict=True)
