"""FOCI as others compute it, for benchmarks/test_codec.py: every candidate's nearest neighbours from scratch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor


def public_foci(features: Tensor, response: Tensor, max_features: int) -> list[int]:
    """The public algorithm of L-CODEC (Mehta et al. 2022) in torch: all pairwise distances for every candidate.

    As its authors compute it: ranks from argsort, torch.cdist with its matrix product, T in torch's float32, the
    first feature kept whatever its T. X, [n, k], is compared anew for every candidate too.
    """
    return _greedy(features, response, max_features, _pairwise_neighbours)


def sklearn_foci(features: Tensor, response: Tensor, max_features: int) -> list[int]:
    """The same with scikit-learn's nearest neighbours (a k-d tree, or brute force in many dimensions)."""
    return _greedy(features, response, max_features, _sklearn_neighbours)


def _greedy(features: Tensor, response: Tensor, max_features: int, neighbours: Callable[[Tensor], Tensor]) -> list[int]:
    chosen: list[int] = []
    left = list(range(features.shape[1]))
    while left and len(chosen) < max_features:
        best, best_score = -1, -float("inf")
        for j in left:
            if chosen:
                score = _codec3(features[:, [j]], response, features[:, chosen], neighbours)
            else:
                score = _codec2(features[:, [j]], response, neighbours)
            if score > best_score:
                best, best_score = j, score
        if chosen and best_score <= 0:
            break
        chosen.append(best)
        left.remove(best)
    return chosen


def _codec2(z: Tensor, y: Tensor, neighbours: Callable[[Tensor], Tensor]) -> Any:
    """T(Y, Z)."""
    n = len(y)
    rank = _ranks(y)
    above = n + 1 - rank
    numerator = (n * torch.minimum(rank, rank[neighbours(z)]) - above**2).sum()
    return (numerator / torch.dot(above, n - above)).item()


def _codec3(z: Tensor, y: Tensor, x: Tensor, neighbours: Callable[[Tensor], Tensor]) -> Any:
    """T(Y, Z | X)."""
    rank = _ranks(y)
    in_x = torch.minimum(rank, rank[neighbours(x)])
    in_both = torch.minimum(rank, rank[neighbours(torch.hstack((x, z)))])
    return ((in_both - in_x).sum() / (rank - in_x).sum()).item()


def _ranks(y: Tensor) -> Tensor:
    rank = torch.empty(len(y), dtype=torch.int64, device=y.device)
    rank[torch.argsort(y)] = torch.arange(1, len(y) + 1, device=y.device)
    return rank


def _pairwise_neighbours(points: Tensor) -> Tensor:
    distances = torch.cdist(points, points)
    distances.fill_diagonal_(torch.inf)
    return torch.argmin(distances, dim=1)


def _sklearn_neighbours(points: Tensor) -> Tensor:
    array = points.cpu().numpy()
    _, nearest = NearestNeighbors(n_neighbors=2).fit(array).kneighbors(array)
    return torch.from_numpy(nearest[:, 1]).to(points.device)
