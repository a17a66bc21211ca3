"""CODEC and FOCI where the answer is known, and against the formulas and the public algorithm written out here.

Nothing of the package but ``codec`` and ``foci``: NumPy, float64, all pairwise distances for every candidate.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastunlearn.codec import codec, foci

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import peers_codec


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def nearest(points: Any) -> Any:
    """Nearest other row of every row of [n, q] by full pairwise Euclidean distance; the first of equals."""
    squares = ((points[:, None, :] - points[None, :, :]) ** 2).sum(2)
    np.fill_diagonal(squares, np.inf)
    return squares.argmin(1)


def codec2(y: Any, z: Any) -> float:
    """T(Y, Z) with R_i = #{y_j <= y_i} and L_i = #{y_j >= y_i}."""
    n = len(y)
    rank = (y[None, :] <= y[:, None]).sum(1).astype(float)
    above = (y[None, :] >= y[:, None]).sum(1).astype(float)
    numerator = (n * np.minimum(rank, rank[nearest(z)]) - above**2).sum()
    return float(numerator / (above * (n - above)).sum())


def codec3(y: Any, z: Any, x: Any) -> float:
    """T(Y, Z | X)."""
    rank = (y[None, :] <= y[:, None]).sum(1).astype(float)
    in_x = np.minimum(rank, rank[nearest(x)])
    in_both = np.minimum(rank, rank[nearest(np.concatenate([x, z], 1))])
    return float((in_both - in_x).sum() / (rank - in_x).sum())


def public_definition(x: Any, y: Any) -> tuple[list[int], list[float]]:
    """FOCI as published, for continuous data: R from argsort, every candidate from scratch, stop at T <= 0."""
    n, p = x.shape
    rank = np.empty(n, dtype=np.int64)
    rank[np.argsort(y)] = np.arange(1, n + 1)
    above = n + 1 - rank
    chosen: list[int] = []
    scores: list[float] = []
    while len(chosen) < p:
        best, best_score = -1, -np.inf
        for j in range(p):
            if j in chosen:
                continue
            # [n, n] distances of (X, Z), square roots taken as published.
            squares = sum((x[:, k, None] - x[None, :, k]) ** 2 for k in [*chosen, j])
            distance = np.sqrt(squares)
            np.fill_diagonal(distance, np.inf)
            in_both = np.minimum(rank, rank[distance.argmin(1)])
            if not chosen:
                score = (n * in_both - above**2).sum() / (above * (n - above)).sum()
            else:
                in_x = np.minimum(rank, rank[nearest(x[:, chosen])])
                score = (in_both - in_x).sum() / (rank - in_x).sum()
            if score > best_score:
                best, best_score = j, score
        if best_score <= 0:
            break
        chosen.append(best)
        scores.append(float(best_score))
    return chosen, scores


def problem(seed: int) -> tuple[Any, Any]:
    """Continuous features, correlated in some problems, and a response on two to four of them."""
    g = rng(seed, 7)
    n, p = int(g.integers(200, 401)), int(g.integers(8, 21))
    x = g.normal(size=(n, p)) if seed % 2 else g.random((n, p))
    if seed % 3 == 0:
        x[:, 1:] += 0.5 * x[:, :-1]
    a, b, c, d = x[:, g.choice(p, 4, replace=False)].T
    y = [a + b, a * b + c, np.sin(3 * a) + b**2, (a + b) % 1, a + b + c + d][seed % 5]
    return x, y + [0.0, 0.05, 0.5][seed % 3] * g.normal(size=n)


@pytest.mark.parametrize("seed", range(50))
def test_foci_chooses_as_the_public_algorithm_is_defined(seed: int) -> None:
    x, y = problem(seed)
    indices, scores = public_definition(x, y)
    found = foci(x, y)
    assert found.indices == indices
    np.testing.assert_allclose(found.scores, scores, rtol=1e-12)


def test_the_fifty_problems_choose_more_than_one_feature() -> None:
    counts = [len(foci(*problem(seed)).indices) for seed in range(50)]
    assert min(counts) >= 1 and np.mean([count >= 2 for count in counts]) > 0.8


@pytest.mark.parametrize("seed", range(6))
def test_foci_equals_its_peers_of_the_benchmark(seed: int) -> None:
    x, y = (torch.from_numpy(a) for a in problem(seed))
    found = foci(x, y, max_features=3).indices
    assert peers_codec.public_foci(x, y, 3) == found
    assert peers_codec.sklearn_foci(x, y, 3) == found


@pytest.mark.parametrize("n", [2, 3, 17, 64, 65, 257])
@pytest.mark.parametrize("q,k", [(1, 0), (3, 0), (1, 1), (2, 5)])
def test_codec_equals_the_formulas(n: int, q: int, k: int) -> None:
    for levels in (0, 1, 4):  # continuous; heavily and lightly tied in every column
        data = rng(n, q, k).normal(size=(n, 1 + q + k))
        data = np.round(levels * data) if levels else data
        y, z, x = data[:, 0], data[:, 1 : 1 + q], data[:, 1 + q :]
        if len(set(y)) == 1:
            continue
        if k == 0:
            assert codec(y, z) == pytest.approx(codec2(y, z), rel=1e-12, abs=1e-12)
        elif (y[nearest(x)] < y).any():  # else the denominator is 0, which is another test's
            assert codec(y, z, x) == pytest.approx(codec3(y, z, x), rel=1e-12, abs=1e-12)


def spread(values: list[float], about: float) -> float:
    """Root mean square distance to the limit."""
    return float(np.sqrt(np.mean((np.array(values) - about) ** 2)))


def rate(case: Any, about: float, sizes: tuple[int, ...] = (125, 500, 2000), repetitions: int = 12) -> list[float]:
    return [spread([case(rng(n, s), n) for s in range(repetitions)], about) for n in sizes]


def test_independence_goes_to_zero_as_one_over_root_n() -> None:
    errors = rate(lambda g, n: codec(g.normal(size=n), g.normal(size=n)), 0)
    # Two fourfold steps in n halve the error twice; a repetition of 12 knows its spread to a fifth.
    assert errors[0] < 0.15 and errors[2] < 0.04 and 2 < errors[0] / errors[2] < 8


@pytest.mark.parametrize("function", [np.square, np.exp, lambda z: np.sin(4 * z), np.abs, lambda z: -z])
def test_a_function_goes_to_one_as_one_over_n(function: Any) -> None:
    def case(g: Any, n: int) -> float:
        z = g.random(n)
        return codec(function(z), z)

    errors = rate(case, 1)
    assert errors[2] < 0.01 and errors[0] / errors[2] > 8  # 16 by the rate


def test_a_function_of_many_classes_goes_to_one() -> None:
    g = rng(0)
    z = g.random(2000)
    assert codec(np.floor(5 * z), z) > 0.98


def test_modulo_each_alone_goes_to_zero_and_together_to_one() -> None:
    def draw(g: Any, n: int) -> tuple[Any, Any]:
        x = g.random((n, 2))
        return x.sum(1) % 1, x

    def alone(column: int) -> Any:
        def case(g: Any, n: int) -> float:
            y, x = draw(g, n)
            return codec(y, x[:, column])

        return case

    def together(g: Any, n: int) -> float:
        return codec(*draw(g, n))

    def given_the_first(g: Any, n: int) -> float:
        y, x = draw(g, n)
        return codec(y, x[:, 1], x[:, 0])

    for column in (0, 1):
        assert rate(alone(column), 0)[2] < 0.04
    for case in (together, given_the_first):
        errors = rate(case, 1)
        # Neighbours in two dimensions are 1 / sqrt(n) apart, and so is what T lacks of 1.
        assert errors[2] < 0.08 and 2.5 < errors[0] / errors[2] < 6


def test_foci_on_modulo_needs_no_third_feature() -> None:
    g = rng(1)
    x = g.random((1000, 6))
    y = (x[:, 4] + x[:, 2]) % 1
    first = foci(x[:, [4, 2]], y, early_stop=False)
    assert abs(first.scores[0]) < 0.1 and first.scores[1] > 0.85


def test_a_chain_is_cut_by_its_middle() -> None:
    """X -> Z -> Y: Y depends on X, and given Z no more; given X it still depends on Z."""

    def chain(g: Any, n: int) -> tuple[Any, Any, Any]:
        x = g.normal(size=n)
        z = x + g.normal(size=n)
        return x, z, z + g.normal(size=n)

    def cut(g: Any, n: int) -> float:
        x, z, y = chain(g, n)
        return codec(y, x, z)

    errors = rate(cut, 0)
    assert errors[2] < 0.06 and 2 < errors[0] / errors[2]
    x, z, y = chain(rng(3), 2000)
    assert codec(y, x) > 0.1 and codec(y, z, x) > 0.2
    assert foci(np.stack([x, z], 1), y, max_features=1).indices == [1]


def test_a_collider_is_opened_by_its_effect() -> None:
    y, z, u = rng(4).normal(size=(3, 2000))
    effect = y + z + 0.1 * u
    assert abs(codec(y, z)) < 0.06 and codec(y, z, effect) > 0.5


def test_a_common_cause_explains_away() -> None:
    x, u, v = rng(5).normal(size=(3, 2000))
    y, z = x + u, x + v
    assert codec(y, z) > 0.1 and abs(codec(y, z, x)) < 0.08


def test_noise_lowers_the_dependence_step_by_step() -> None:
    z, u = rng(6).normal(size=(2, 2000))
    scores = [codec(z + scale * u, z) for scale in (0, 0.1, 0.3, 1, 3, 30)]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > 0.99 and abs(scores[-1]) < 0.05


def test_gaussian_dependence_has_its_known_value() -> None:
    """T(Y, Z) of a bivariate normal, by its definition as variances of P(Y >= t | Z), integrated on a grid."""
    from scipy import stats

    for rho in (0.3, 0.6, 0.9):
        t = stats.norm.ppf((np.arange(400) + 0.5) / 400)  # equally likely under Y
        conditional = stats.norm.sf((t[:, None] - rho * t[None, :]) / np.sqrt(1 - rho**2))  # [t, z]
        marginal = stats.norm.sf(t)
        truth = conditional.var(1).mean() / (marginal * (1 - marginal)).mean()
        z, u = rng(8).normal(size=(2, 8000))
        assert codec(rho * z + np.sqrt(1 - rho**2) * u, z) == pytest.approx(truth, abs=0.025)
