"""CODEC and FOCI against the reference and textbook cases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastunlearn import reference
from fastunlearn.codec import Foci, codec, foci


def draw(n: int, p: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, p, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def reference_foci(x: Tensor, y: Tensor, count: int) -> Foci:
    """Greedy selection with every T computed from scratch."""
    chosen = Foci([], [])
    for _ in range(count):
        left = [j for j in range(x.shape[1]) if j not in chosen.indices and bool((x[:, j] != x[0, j]).any())]
        if not left:
            break
        given_ = x[:, chosen.indices] if chosen.indices else None
        scores = [reference.codec(y, x[:, [j]], given_) for j in left]
        best = max(range(len(left)), key=scores.__getitem__)
        chosen.indices.append(left[best])
        chosen.scores.append(scores[best])
    return chosen


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(2, 60),
    q=st.integers(1, 3),
    k=st.integers(0, 3),
    tied=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_codec_equals_the_reference_with_and_without_ties(n: int, q: int, k: int, tied: bool, seed: int) -> None:
    data = draw(n, q + k + 1, seed)
    data = data.mul(1.5).round() if tied else data
    y, z, x = data[:, 0], data[:, 1 : 1 + q], data[:, 1 + q :]
    assert codec(y, z, x if k else None) == reference.codec(y, z, x if k else None)


@settings(deadline=None, max_examples=40)
@given(n=st.integers(2, 60), p=st.integers(1, 5), tied=st.booleans(), seed=st.integers(0, 10**6))
def test_foci_equals_greedy_selection_with_the_reference(n: int, p: int, tied: bool, seed: int) -> None:
    data = draw(n, p + 1, seed)
    data = data.mul(1.5).round() if tied else data
    found = foci(data[:, 1:], data[:, 0], early_stop=False)
    assert found == reference_foci(data[:, 1:], data[:, 0], p)


@pytest.mark.parametrize("n", [63, 64, 65, 513])
@pytest.mark.parametrize("tied", [False, True])
def test_short_lists_of_nearest_rows_give_the_full_scan(n: int, tied: bool) -> None:
    x = draw(n, 40, n)
    x = x.mul(3).round() if tied else x * torch.logspace(-2, 2, 40, dtype=torch.float64)
    y = x[:, 20] * x[:, 21] + x[:, 22]
    some = x[:, 19:24]
    assert foci(some, y, early_stop=False, max_features=3) == reference_foci(some, y, 3)
    assert len(foci(x, y, early_stop=False, max_features=5).indices) == 5  # more features than are tried at once


def test_float32_features_of_small_integers_equal_the_reference() -> None:
    data = draw(80, 4).mul(4).round().float()
    assert codec(data[:, 0], data[:, 1:3], data[:, 3]) == reference.codec(data[:, 0], data[:, 1:3], data[:, 3])


def test_codec_is_near_zero_for_independence_and_near_one_for_a_function() -> None:
    x = draw(2000, 3)
    assert abs(codec(x[:, 0], x[:, 1])) < 0.06
    assert codec(x[:, 1].square(), x[:, 1]) > 0.95


def test_codec_sees_a_dependence_that_only_the_pair_carries() -> None:
    """Azadkia & Chatterjee: Y = X1 + X2 mod 1 is independent of each alone and a function of both."""
    u = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = u.sum(1) % 1
    assert abs(codec(y, u[:, 0])) < 0.06
    assert codec(y, u[:, 1], u[:, 0]) > 0.85
    assert abs(codec(u[:, 0], draw(2000, 1), u[:, 1])) < 0.1


def test_codec_by_hand() -> None:
    # y = 1, 2, 3 and z in the same order: neighbours 1, 0, 1 (a tie, the lowest index), so min(R, R_M) = 1,
    # 1, 2; sum(3 * (1 + 1 + 2)) - (9 + 4 + 1) = -2, over sum(L (3 - L)) = 0 + 2 + 2.
    assert codec([1, 2, 3], [1, 2, 3]) == -0.5


def test_foci_finds_the_markov_blanket_in_order_of_strength() -> None:
    x = draw(1000, 12)
    y = 3 * x[:, 4] + x[:, 9] ** 2 + 0.01 * draw(1000, 1, 1)[:, 0]
    found = foci(x, y)
    assert found.indices[:2] == [4, 9] and len(found.indices) <= 3
    assert found.scores[0] == codec(y, x[:, 4]) and found.scores[1] == codec(y, x[:, 9], x[:, 4])


def test_foci_stops_at_the_first_feature_that_adds_nothing() -> None:
    x = draw(300, 6)
    y = draw(300, 1, 5)[:, 0]
    stopped, all_ = foci(x, y), foci(x, y, early_stop=False)
    assert len(all_.indices) == 6 and sorted(all_.indices) == list(range(6))
    count = len(stopped.indices)
    assert stopped.indices == all_.indices[:count]
    assert all(score > 0 for score in stopped.scores) and all_.scores[count] <= 0
    assert foci(x, y, early_stop=False, max_features=2).indices == all_.indices[:2]
    assert foci(x, y, max_features=0) == Foci([], [])


def test_numpy_and_torch_give_the_same() -> None:
    x = draw(100, 3)
    y = x[:, 1].exp()
    assert foci(x.numpy(), y.numpy()) == foci(x, y)
    assert codec(y.numpy(), x[:, 0].numpy(), x[:, 1:].numpy()) == codec(y, x[:, 0], x[:, 1:])
    assert isinstance(codec(np.arange(5), np.arange(5)), float)


def test_views_give_the_same_as_copies() -> None:
    x = draw(60, 5)
    y = x[:, 1] * x[:, 3]
    array = x.numpy().copy()
    for noise in (0.0, 0.1):
        expected = foci(x, y, noise=noise, early_stop=False)
        assert foci(x.T.contiguous().T, y, noise=noise, early_stop=False) == expected
        backwards = np.ascontiguousarray(array[::-1, ::-1])[::-1, ::-1]
        assert foci(backwards, y.numpy()[::-1].copy()[::-1], noise=noise, early_stop=False) == expected
    array.flags.writeable = False
    assert foci(array, y) == foci(x, y)


def test_more_rows_than_the_operators_take_are_refused_by_foci() -> None:
    x = torch.arange(46_341.0)
    with pytest.raises(ValueError, match=r"46341 rows.*at most 46340"):
        foci(x, x)


def test_only_the_ranks_of_the_response_matter() -> None:
    x = draw(200, 4)
    y = x[:, 0] + x[:, 1]
    assert foci(x, y) == foci(x, y.exp() * 7) == foci(x, y.argsort().argsort())


def test_features_on_a_power_of_two_scale_give_the_same() -> None:
    x = draw(150, 4)
    y = x[:, 0] * x[:, 1]
    assert foci(x, y, early_stop=False) == foci(x * 2.0**20, y, early_stop=False)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_float32_distances_that_would_overflow_or_vanish_are_still_told_apart(scale: float) -> None:
    x = draw(150, 4, dtype=torch.float32)
    y = x[:, 0] * x[:, 1]
    assert foci(x * scale, y).indices == foci(x, y).indices


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_one_float32_column_of_another_scale_is_still_told_apart(scale: float) -> None:
    x = draw(300, 4, dtype=torch.float32)
    y = x[:, 0] + 0.3 * x[:, 1] ** 2
    x[:, 0] *= scale
    assert foci(x, y, early_stop=False) == foci(x.double(), y, early_stop=False)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "uint16", "uint32", "uint64", "int8", "float16"])
def test_any_real_dtype_of_the_response_is_ranked(dtype: str) -> None:
    x = draw(100, 3).numpy()
    y = np.round(x[:, 1] + 3).clip(0, 1 if dtype == "bool" else 6)
    narrow = y.astype(dtype)
    assert foci(x, narrow) == foci(x, torch.from_numpy(narrow)) == foci(x, y)
    assert codec(narrow, x[:, 1], x[:, 0]) == codec(y, x[:, 1], x[:, 0])


def test_unsigned_responses_beyond_int64_keep_their_order() -> None:
    z = np.arange(8)
    y = np.array([0, 2**64 - 1, 2**63, 1, 5, 2**63 - 1, 2**63 + 1, 2], dtype=np.uint64)
    assert codec(y, z) == codec(y.argsort().argsort(), z)
    eighth = torch.tensor([0.5, -2.0, 8.0, 1.0]).to(torch.float8_e4m3fn)
    assert codec(eighth, z[:4]) == codec(eighth.float(), z[:4])


def test_noise_is_seeded_and_breaks_ties_at_random() -> None:
    x = (draw(200, 6) > 1).double()
    y = x[:, 2] + 0.1 * draw(200, 1, 3)[:, 0]
    one, same, other = (foci(x, y, early_stop=False, noise=1e-3, seed=s) for s in (0, 0, 1))
    assert one == same and one.indices[0] == other.indices[0] == 2 and one.scores != other.scores


def test_noise_follows_the_spread_of_each_column() -> None:
    x = draw(300, 5)
    y = x[:, 0] + x[:, 1] ** 2
    wide = x * torch.tensor([1e-9, 1e9, 1.0, 1.0, 1.0], dtype=torch.float64)
    assert foci(wide, y, noise=1e-6, max_features=1).indices == foci(x, y, max_features=1).indices


def test_noise_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    foci(draw(20, 2), draw(20, 1), noise=0.1)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_constant_column_is_never_chosen() -> None:
    x = torch.cat([torch.zeros(100, 1).double(), draw(100, 1)], 1)
    # Row 0 has the largest response: by the lowest index alone, a constant would look like a function of it.
    y = torch.arange(100, 0, -1)
    for noise in (0.0, 0.1):
        assert 0 not in foci(x, y, early_stop=False, noise=noise).indices


def test_a_constant_response_depends_on_nothing() -> None:
    x = draw(30, 3)
    assert codec(torch.ones(30), x) == 0 and codec(torch.ones(30), x[:, 0], x[:, 1:]) == 0
    assert foci(x, torch.ones(30)) == Foci([], [])
    assert foci(x, torch.ones(30), early_stop=False) == Foci([0, 1, 2], [0, 0, 0])


def test_no_features_choose_nothing() -> None:
    assert foci(torch.zeros(5, 0), torch.arange(5)) == Foci([], [])
    assert codec(torch.arange(5), torch.arange(5), torch.zeros(5, 0)) == codec(torch.arange(5), torch.arange(5))


def test_two_rows_are_enough() -> None:
    assert codec([0, 1], [0, 1]) == reference.codec(torch.tensor([0, 1]), torch.tensor([0, 1]))
    assert foci([[0.0, 1.0], [1.0, 2.0]], [0, 1], early_stop=False).indices == [0, 1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_columns_are_named(bad: float) -> None:
    x = draw(9, 4)
    x[5, 2] = bad
    with pytest.raises(ValueError, match="column 2 of features"):
        foci(x, draw(9, 1))
    with pytest.raises(ValueError, match="column 2 of given"):
        codec(draw(9, 1), draw(9, 1), x)
    with pytest.raises(ValueError, match="response holds NaN or Inf"):
        codec(x[:, 2], draw(9, 1))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: codec([1], [1]), ValueError, "at least 2"),
        (lambda: foci(torch.zeros(1, 3), [1]), ValueError, "at least 2"),
        (lambda: codec([1, 2, 3], [1, 2]), ValueError, "response has 3 rows"),
        (lambda: codec([1, 2, 3], [1, 2, 3], [1, 2]), ValueError, "given has 2"),
        (lambda: foci(draw(4, 2), [1, 2, 3]), ValueError, "response has 3 rows"),
        (lambda: foci(draw(4, 2), draw(4, 2)), ValueError, "response must be"),
        (lambda: foci(torch.zeros(4, 2, 2), [1, 2, 3, 4]), ValueError, "features must be"),
        (lambda: foci(draw(4, 2), [1, 2, 3, 4], noise=-1.0), ValueError, "noise"),
        (lambda: foci(draw(4, 2), [1, 2, 3, 4], noise=float("nan")), ValueError, "noise"),
        (lambda: foci(draw(4, 2), [1, 2, 3, 4], max_features=-1), ValueError, "max_features"),
        (lambda: codec([1, 2, 3], torch.zeros(3, 0)), ValueError, "z has no columns"),
        (
            lambda: codec(draw(4, 1), draw(4, 2) * 1e160),
            ValueError,
            "column 0 of z reaches .*e\\+1.*, whose square over",
        ),
        (lambda: foci(np.array([[1, 1e151], [2, 3]]), [1, 2]), ValueError, "column 1 of features reaches 1e\\+151"),
        (lambda: codec([1, 2], torch.zeros(2, dtype=torch.complex64)), TypeError, "real"),
        (lambda: codec(torch.zeros(2, dtype=torch.complex64), [1, 2]), TypeError, "real"),
    ],
)
def test_bad_input_is_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
