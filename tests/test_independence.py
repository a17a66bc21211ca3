"""The permutation tests of CODEC: level, power, ties, and what their p-values may not depend on."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from fastunlearn.codec import codec
from fastunlearn.independence import CodecTest, _local_permutations, codec_test


def generators(count: int) -> list[np.random.Generator]:
    return [np.random.default_rng(seed) for seed in range(count)]


def assert_uniform(p_values: list[float], permutations: int) -> None:
    """p-values on the grid k / (permutations + 1), spread over their cell so that a continuous test applies."""
    spread = np.random.default_rng(0).random(len(p_values)) / (permutations + 1)
    assert stats.kstest(np.array(p_values) - spread, "uniform").pvalue > 0.01


def level(p_values: list[float]) -> float:
    return float(np.mean(np.array(p_values) <= 0.1))


def test_p_values_are_uniform_under_independence() -> None:
    p = [codec_test(g.normal(size=50), g.normal(size=50), permutations=99, seed=i).p_value
         for i, g in enumerate(generators(400))]  # fmt: skip
    assert_uniform(p, 99)


@pytest.mark.parametrize("sorted_by_response", [False, True])
def test_level_holds_with_ties_and_rows_sorted_by_the_response(sorted_by_response: bool) -> None:
    """By row index, a tied Z in rows sorted by Y would have the row with the largest Y as everybody's neighbour."""
    p = []
    for seed, g in enumerate(generators(400)):
        y, z = g.integers(0, 5, 60), g.integers(0, 3, 60)
        y = -np.sort(-y) if sorted_by_response else y
        p.append(codec_test(y, z, permutations=99, seed=seed).p_value)
    # Equal statistics count as "as large", so tied p-values can only be larger than uniform ones. 3 standard errors.
    assert level(p) < 0.1 + 3 * np.sqrt(0.09 / 400)
    assert np.mean(p) > 0.45


@pytest.mark.parametrize("n", [30, 200])
def test_dependence_has_the_smallest_p_value_there_is(n: int) -> None:
    g = np.random.default_rng(n)
    z = g.normal(size=n)
    for y in (z**2, np.sin(3 * z) + 0.1 * g.normal(size=n), (z > 0).astype(int)):
        assert codec_test(y, z, permutations=199).p_value == 1 / 200


def test_dependence_of_labels_on_a_discrete_feature_is_seen() -> None:
    g = np.random.default_rng(0)
    z = g.integers(0, 3, 200)
    y = np.where(g.random(200) < 0.3, g.integers(0, 3, 200), z)
    assert codec_test(y, z, permutations=199).p_value == 1 / 200


def test_p_value_counts_the_permutations_that_reach_the_statistic() -> None:
    """With 4 rows every order of Y can be listed, so the p-value has a known limit."""
    y, z = [1.0, 2.0, 3.0, 4.0], [1.0, 2.1, 3.3, 4.6]
    observed = codec(y, z)
    exact = np.mean([codec(list(order), z) >= observed for order in permutations(y)])
    p = codec_test(y, z, permutations=20000).p_value
    assert abs(p - exact) < 4 * np.sqrt(exact * (1 - exact) / 20000)


def common_cause(g: np.random.Generator, n: int) -> tuple[Any, Any, Any]:
    x = g.normal(size=n)
    return x + g.normal(size=n), x + g.normal(size=n), x


def waves(g: np.random.Generator, n: int) -> tuple[Any, Any, Any]:
    x = g.random(n)
    return np.sin(6 * x) + g.normal(size=n) / 3, np.sin(6 * x + 0.5) + g.normal(size=n) / 3, x


def chain(g: np.random.Generator, n: int) -> tuple[Any, Any, Any]:
    z = g.normal(size=n)
    x = z + g.normal(size=n)
    return x + g.normal(size=n), z, x


def strata(g: np.random.Generator, n: int) -> tuple[Any, Any, Any]:
    x = g.integers(0, 3, n)
    return 2 * x + g.normal(size=n), 2 * x + g.normal(size=n), x


def labels(g: np.random.Generator, n: int) -> tuple[Any, Any, Any]:
    x = g.integers(0, 2, n)
    return x + g.integers(0, 2, n), x + g.integers(0, 2, n), x


@pytest.mark.parametrize("example", [common_cause, waves, chain, strata, labels])
def test_conditional_level_is_about_right_where_the_given_separates(example: Any) -> None:
    p, marginal = [], []
    for seed, g in enumerate(generators(200)):
        y, z, x = example(g, 80)
        p.append(codec_test(y, z, x, permutations=49, seed=seed).p_value)
        marginal.append(codec_test(y, z, permutations=49, seed=seed).p_value)
    assert level(p) < 0.1 + 3 * np.sqrt(0.09 / 200)
    assert np.mean(p) > 0.4
    assert level(marginal) > 0.4  # without the given, they do depend


@pytest.mark.parametrize("shape", ["collider", "product", "sum", "modulo", "strata"])
def test_conditional_dependence_has_power(shape: str) -> None:
    for g in generators(5):
        y, z, u = g.normal(size=(3, 150))
        x = {"collider": y + z + 0.3 * u, "product": y * z + 0.3 * u}.get(shape, u)
        if shape == "sum":
            y = x + z
        if shape == "modulo":
            x, z = g.random((2, 150))
            y = (x + z) % 1
        if shape == "strata":
            x, z = g.integers(0, 3, (2, 150))
            y = x + z + 0.3 * y
        assert codec_test(y, z, x, permutations=99).p_value == 0.01


def test_multivariate_z_and_given() -> None:
    g = np.random.default_rng(0)
    z, x = g.normal(size=(150, 2)), g.normal(size=(150, 2))
    y = z[:, 0] * z[:, 1] + x[:, 0]
    assert codec_test(y, z, permutations=99).p_value == 0.01
    assert codec_test(y, z, x, permutations=99).p_value == 0.01
    assert codec_test(x[:, 0], z, x, permutations=19).statistic == codec(x[:, 0], z, x)


@pytest.mark.parametrize("n", [2, 3, 10, 64, 150])
@pytest.mark.parametrize("columns", [1, 2])
def test_one_column_of_z_tests_as_it_does_beside_a_constant_one(n: int, columns: int) -> None:
    """All permuted copies at once, as candidates beside X, against one search per permutation."""
    g = np.random.default_rng(n)
    x = g.normal(size=(n, columns))
    z = np.round(x[:, 0] + g.normal(size=n), 1)
    y = z + g.normal(size=n)
    beside = np.stack([z, np.zeros(n)], 1)
    assert codec_test(y, z, x, permutations=99) == codec_test(y, beside, x, permutations=99)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 7, 63, 200])
def test_statistic_without_ties_is_codec(n: int) -> None:
    # Three columns of distinct values; a grid of them would have equal distances.
    y, z, x = np.random.default_rng(n).normal(size=(3, n))
    assert codec_test(y, z, permutations=1).statistic == codec(y, z)
    assert codec_test(y, z, x, permutations=1).statistic == codec(y, z, x)
    assert codec_test(y, z, np.empty((n, 0)), permutations=9) == codec_test(y, z, permutations=9)


@pytest.mark.parametrize("beside", [0, 1])
def test_a_response_that_the_given_explains_gives_no_evidence(beside: int) -> None:
    """Neighbours in X have one Y, so T is 0 by its definition, permuted or not."""
    g = np.random.default_rng(0)
    y = np.repeat(np.arange(12), 2)
    x = 10 * y + g.random(24)
    z = np.stack([g.normal(size=24)] + [np.zeros(24)] * beside, 1)
    assert codec_test(y, z, x, permutations=99) == CodecTest(0.0, 1.0, 99)


def test_order_of_rows_changes_nothing_without_ties() -> None:
    y, z, x = np.random.default_rng(0).normal(size=(3, 60))
    order = np.argsort(y)
    assert codec_test(y, z, x, 9).statistic == codec_test(y[order], z[order], x[order], 9).statistic


def test_numpy_and_torch_give_the_same_and_a_seed_repeats() -> None:
    y, z, x = np.random.default_rng(1).normal(size=(3, 40))
    for given in (None, x):
        as_torch = None if given is None else torch.from_numpy(given)
        one = codec_test(y, z, given, 49)
        assert one == codec_test(torch.from_numpy(y), torch.from_numpy(z), as_torch, 49)
        assert one.permutations == 49 and 1 / 50 <= one.p_value <= 1
        assert len({codec_test(y, z, given, 49, seed=s).p_value for s in range(8)}) > 1
        assert {codec_test(y, z, given, 49, seed=s).statistic for s in range(3)} == {one.statistic}


def test_random_states_are_left_alone() -> None:
    state, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()
    codec_test([1.0, 3.0, 2.0], [1.0, 2.0, 5.0], [2.0, 1.0, 7.0], 9)
    assert torch.equal(torch.get_rng_state(), state) and (np.random.get_state()[1] == legacy).all()


def test_only_ranks_of_the_response_matter() -> None:
    y, z, x = np.random.default_rng(2).normal(size=(3, 50))
    assert codec_test(y, z, x, 19) == codec_test(np.exp(y), z, x, 19)


def test_a_constant_has_no_evidence() -> None:
    z, x = np.random.default_rng(0).normal(size=(2, 30))
    assert codec_test(np.ones(30), z, permutations=19) == CodecTest(0.0, 1.0, 19)
    assert codec_test(np.ones(30), z, x, permutations=19) == CodecTest(0.0, 1.0, 19)
    assert codec_test(z, np.ones(30), permutations=999).p_value > 0.01
    assert codec_test(z, np.ones(30), x, permutations=19).p_value == 1  # all its local permutations are alike


@pytest.mark.parametrize("n", [2, 3, 5, 6, 40])
def test_local_permutations_draw_from_the_nearest_rows_and_seldom_twice(n: int) -> None:
    x = torch.from_numpy(np.random.default_rng(n).permutation(n).astype(float)[:, None])
    shuffles = _local_permutations(x, 50, 5, np.random.default_rng(0))
    assert shuffles.shape == (50, n)
    # On the line 0, 1, ..., n-1 the 5 nearest are at most 2 away inside and 4 at the ends.
    assert np.abs(x.numpy()[shuffles, 0] - x.numpy()[:, 0]).max() <= 4
    distinct = np.mean([len(set(row)) for row in shuffles]) / n
    assert distinct == 1 if n <= 5 else distinct > 0.8


def test_rows_equal_in_the_given_are_shuffled_among_themselves_evenly() -> None:
    x = torch.tensor([[0.0]] * 6 + [[1.0]] * 2 + [[2.0]])
    shuffles = _local_permutations(x, 6000, 5, np.random.default_rng(0))
    assert (np.sort(shuffles[:, :6], 1) == np.arange(6)).all() and (np.sort(shuffles[:, 6:], 1) == [6, 7, 8]).all()
    for row in range(6):
        assert stats.chisquare(np.bincount(shuffles[:, row], minlength=9)[:6]).pvalue > 1e-4


def test_bad_input_is_named() -> None:
    y = np.arange(5.0)
    bad = np.array([[0.0, 1], [1, 2], [2, np.nan], [4, 5], [5, 7]])
    with pytest.raises(ValueError, match="column 1 of z holds NaN"):
        codec_test(y, bad)
    with pytest.raises(ValueError, match="column 1 of given holds NaN"):
        codec_test(y, y, bad)
    with pytest.raises(ValueError, match="response holds NaN"):
        codec_test(bad[:, 1], y)
    with pytest.raises(ValueError, match="z has 5 rows and given has 4"):
        codec_test(y, y, y[:4])
    with pytest.raises(ValueError, match="response has 4 rows"):
        codec_test(y[:4], y)
    with pytest.raises(ValueError, match="at least 2"):
        codec_test([1], [1])
    with pytest.raises(ValueError, match="z has no columns"):
        codec_test(y, np.empty((5, 0)))
    with pytest.raises(ValueError, match="permutations must be 1 or more, got 0"):
        codec_test(y, y, permutations=0)
    with pytest.raises(ValueError, match="k_perm must be 2 or more"):
        codec_test(y, y, y, k_perm=1)
    with pytest.raises(TypeError, match="z must be real"):
        codec_test(y, y + 1j)
