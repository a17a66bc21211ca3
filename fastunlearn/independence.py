"""A p-value for CODEC: permutation tests of independence and of conditional independence.

Sources: Azadkia & Chatterjee, "A simple measure of conditional dependence", Annals of Statistics 2021 (the
statistic T); Runge, "Conditional independence testing based on a nearest-neighbor estimator of conditional mutual
information", AISTATS 2018 (local permutations); Phipson & Smyth, "Permutation p-values should never be zero", 2010.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastunlearn import ops
from fastunlearn.codec import _MOST_ROWS, _columns, _neighbours, _ranks, _response

# Permuted ranks, or pairwise distances, held at once.
_BLOCK = 1 << 20
_STREAM = 0xC0DEC

Integers = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class CodecTest:
    """Outcome of a permutation test: T as observed, its p-value, and the number of permutations behind it."""

    statistic: float
    p_value: float
    permutations: int


def codec_test(
    response: Any, z: Any, given: Any | None = None, permutations: int = 999, seed: int = 0, k_perm: int = 5
) -> CodecTest:
    """Test whether Y is independent of Z, or of Z given X, by permuting and computing T again.

    p = (1 + #{T permuted >= T}) / (1 + permutations), one-sided: dependence raises T. It is never below
    1 / (1 + permutations).

    Without ``given`` the test is exact: for independent rows under independence P(p <= a) <= a, whatever the
    distributions, ties included. Permuting Y leaves all neighbours as they are, so one search serves all.

    With ``given``, Z is shuffled among rows that are close in X (Runge 2018), which keeps Z's dependence on X and
    breaks any other. That is exact only where X is discrete: ``k_perm`` or more rows with equal X are shuffled
    among themselves. Otherwise it assumes that the distribution of Z given X changes little within ``k_perm``
    neighbours: continuous and smooth in X, rows dense enough (few columns in X, and on comparable scales), and
    Z's own scatter given X wider than the change of its mean across those neighbours. Where Z is nearly a function
    of X that fails, and p can be too small.

    With ties the statistic can differ from :func:`fastunlearn.codec`: rows are put in a seeded random order first,
    and the neighbour of a row with duplicates is the next of them in that order, so ties are broken at random as in
    the paper. By row index an order of rows that follows Y would look like dependence. Without ties both are equal.

    Args:
        response: Y [n] (or [n, 1]); NumPy or torch, any real dtype. Only its ranks matter.
        z: Z [n] or [n, q].
        given: X [n] or [n, k]; None or k = 0 for the unconditional test.
        permutations: how many; 999 resolves p to 0.001.
        seed: of the order of rows and of the permutations.
        k_perm: rows, itself included, among which a row's Z is drawn; used with ``given`` alone. Few keep Z's
            dependence on X, many break more of what is to be tested; Runge finds 5 to 10 good.

    Raises:
        ValueError: fewer than 2 rows, different numbers of rows, NaN or Inf (the column is named), Z without
            columns, ``permutations`` < 1, ``k_perm`` < 2.
        TypeError: complex or non-numeric input.

    Cost: one search of n^2 q multiply-adds and O(permutations n) after it; with ``given``, permutations + 2 searches
    of n^2 (q + k) and 13 bytes * permutations * n held. For one column of Z and no two rows equal in X they are one
    call of :func:`fastunlearn.ops.codec_scores`, each permuted copy a candidate beside X: n^2 distances, that
    operator's lists and 24 bytes * permutations * n held.
    Searches run on Z's device, permutations on the CPU.
    """
    if permutations < 1:
        raise ValueError(f"permutations must be 1 or more, got {permutations}")
    if k_perm < 2:
        raise ValueError(f"k_perm must be 2 or more, a row and a neighbour to swap with, got {k_perm}")
    z_columns = _columns(z, "z")
    if z_columns.shape[1] == 0:
        raise ValueError("z has no columns, so there is nothing to test")
    y = _response(response, len(z_columns), z_columns.device)
    x_columns = z_columns[:, :0] if given is None else _columns(given, "given").to(z_columns.device)
    if len(x_columns) != len(z_columns):
        raise ValueError(f"z has {len(z_columns)} rows and given has {len(x_columns)}; one row per sample in both")
    dtype = torch.promote_types(z_columns.dtype, x_columns.dtype)
    # Not default_rng(seed) itself: data drawn from that would share its stream with the permutations.
    generator = np.random.default_rng([seed, _STREAM])
    order = torch.from_numpy(generator.permutation(len(y))).to(y.device)
    z_columns, x_columns = z_columns[order].to(dtype), x_columns[order].to(dtype)
    rank, above = (t.cpu().numpy() for t in _ranks(y[order]))
    if x_columns.shape[1]:
        return _conditional_test(rank, z_columns, x_columns, permutations, k_perm, generator)
    return _unconditional_test(rank, above, z_columns, permutations, generator)


def _unconditional_test(
    rank: Integers, above: Integers, z: Tensor, permutations: int, generator: np.random.Generator
) -> CodecTest:
    n = len(rank)
    neighbour = _neighbours_in_ties(z)
    # T is increasing in sum(min(R_i, R_M(i))), and all else in it stays as it is: integers are compared, not floats.
    observed = int(np.minimum(rank, rank[neighbour]).sum())
    as_large, left, block = 0, permutations, max(1, _BLOCK // n)
    while left:
        permuted = generator.permuted(np.tile(rank, (min(block, left), 1)), axis=1)
        as_large += int((np.minimum(permuted, permuted[:, neighbour]).sum(1) >= observed).sum())
        left -= len(permuted)
    denominator = int((above * (n - above)).sum())
    numerator = n * observed - int((above**2).sum())
    return CodecTest(numerator / denominator if denominator else 0.0, (1 + as_large) / (1 + permutations), permutations)


def _conditional_test(
    rank: Integers, z: Tensor, x: Tensor, permutations: int, k_perm: int, generator: np.random.Generator
) -> CodecTest:
    def joined(rows: Tensor) -> int:
        """sum(min(R_i, R_M(i))) with the given rows of Z beside X."""
        return int(np.minimum(rank, rank[_neighbours_in_ties(torch.cat([x, z[rows]], 1))]).sum())

    n = len(z)
    shuffles = torch.from_numpy(_local_permutations(x, permutations, k_perm, generator)).to(z.device)
    if z.shape[1] == 1 and n <= _MOST_ROWS and len(_groups(x)[1]) == n:
        distances = x.new_zeros(n, n)
        terms = torch.from_numpy(np.stack([rank, rank]).astype(np.int32)).to(z.device)
        for column in x.T:
            ops.codec_choose_(distances, terms, column.contiguous())
        # T is increasing in the integer sum behind it, which decides alone: equal sums give equal bits.
        first, *others = ops.codec_scores(torch.cat([z.T, z[:, 0][shuffles]]).T, terms, distances).tolist()
        as_large = sum(other >= first for other in others)
        return CodecTest(first, (1 + as_large) / (1 + permutations), permutations)
    closest = np.minimum(rank, rank[_neighbours_in_ties(x)])
    denominator = int((rank - closest).sum())
    if denominator == 0:  # Y is a function of X already: T is 0, whatever the permutation
        return CodecTest(0.0, 1.0, permutations)
    observed = joined(torch.arange(n, device=z.device))
    as_large = sum(joined(rows) >= observed for rows in shuffles)
    return CodecTest((observed - int(closest.sum())) / denominator, (1 + as_large) / (1 + permutations), permutations)


def _neighbours_in_ties(columns: Tensor) -> Integers:
    """Nearest other row of every row of [n, q]; of a row with duplicates, the next of them, the last's the first."""
    nearest = _neighbours(columns)
    tied = (columns[nearest] == columns).all(1).nonzero().flatten()
    if len(tied):
        order, size = _groups(columns[tied])
        start, size = np.repeat(np.cumsum(size) - size, size), np.repeat(size, size)
        following = order[start + (np.arange(len(order)) - start + 1) % size]
        nearest[tied[order]] = tied[following]
    found: Integers = nearest.cpu().numpy()
    return found


def _groups(columns: Tensor) -> tuple[Integers, Integers]:
    """All rows of [n, q], equal ones beside each other and in their own order, and how many of each there are."""
    values = columns.cpu().numpy()
    order = np.lexsort(values.T)
    changes = (values[order[1:]] != values[order[:-1]]).any(1)
    ends = np.append(np.flatnonzero(changes) + 1, len(order))
    return order, np.diff(ends, prepend=0)


def _local_permutations(x: Tensor, count: int, k_perm: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """[count, n]: the row whose Z each row gets.

    ``k_perm`` or more rows equal in X are shuffled among themselves. Every other row, in random order, draws from
    its ``k_perm`` nearest (itself included) one that nobody drew yet, or any where all are taken (Runge 2018,
    algorithm 1). All ``count`` are drawn side by side, row after row.
    """
    n = len(x)
    shuffle = np.empty((count, n), dtype=np.int64)
    order, size = _groups(x)
    end = np.cumsum(size)
    for g in np.flatnonzero(size >= k_perm):
        rows = order[end[g] - size[g] : end[g]]
        shuffle[:, rows] = generator.permuted(np.tile(rows, (count, 1)), axis=1)
    alone = order[np.repeat(size < k_perm, size)]
    near = _nearest_rows(x[torch.from_numpy(alone).to(x.device)], k_perm)
    visits = generator.permuted(np.tile(np.arange(len(alone), dtype=np.int32), (count, 1)), axis=1)
    taken = np.zeros((count, len(alone)), dtype=bool)
    each = np.arange(count)
    for row in visits.T:
        choices = near[row]  # [count, k]
        # A random one of those left; with 1 added, those taken come after all of them.
        first = (generator.random(choices.shape) + taken[each[:, None], choices]).argmin(1)
        drawn = choices[each, first]
        taken[each, drawn] = True
        shuffle[each, alone[row]] = alone[drawn]
    return shuffle


def _nearest_rows(x: Tensor, k: int) -> Integers:
    """[n, min(k, n)]: the rows nearest to each row of x [n, columns], itself among them; never n x n at once."""
    n = len(x)
    k = min(k, n)
    blocks = [
        torch.cdist(rows, x, compute_mode="donot_use_mm_for_euclid_dist").topk(k, 1, largest=False).indices
        for rows in torch.split(x, max(1, _BLOCK // max(1, n)))
    ]
    nearest: Integers = torch.cat(blocks).cpu().numpy()
    return nearest
