"""The operators under CODEC and FOCI, on every back end, against the formulas written out in plain torch.

Features lie on a grid coarse enough that differences, squares and their sums are exact in float32: the results do not
hang on how an operator rounds, and ties are frequent unless a test asks for none.
"""

from __future__ import annotations

import pytest
import torch
from conftest import Backend
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastunlearn import ops, reference

DTYPES = [torch.float32, torch.float64]
NAN, INF = float("nan"), float("inf")


def grid(n: int, p: int, steps: float = 64, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    draws = torch.randn(n, p, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (draws.clamp(-4, 4) * steps).round().div(64).to(dtype)


def rank_terms(y: Tensor) -> Tensor:
    y = y.contiguous()
    ordered = y.sort().values
    return torch.stack([torch.searchsorted(ordered, y, right=True), len(y) - torch.searchsorted(ordered, y)]).int()


def same_rounds(backend: Backend, x: Tensor, y: Tensor, chosen: list[int], candidates: Tensor | None = None) -> None:
    """Scores before the first choice and after each, and what a choice writes, equal the reference's bit for bit."""
    terms, expected_terms = rank_terms(y).to(backend.device), rank_terms(y)
    distances = torch.zeros(len(x), len(x), dtype=x.dtype, device=backend.device)
    expected_distances = distances.cpu().clone()
    features = x.to(backend.device)
    mask = None if candidates is None else candidates.to(backend.device)
    for turn, c in enumerate([*chosen, -1]):
        held = None if turn == 0 else distances
        scores = backend("codec_scores", features, terms, held, mask)
        expected = reference.codec_scores(x, expected_terms, None if turn == 0 else expected_distances, candidates)
        torch.testing.assert_close(scores.cpu(), expected, rtol=0, atol=0, equal_nan=True)
        if c >= 0:
            backend("codec_choose_", distances, terms, features[:, c].contiguous())
            reference.codec_choose_(expected_distances, expected_terms, x[:, c])
            torch.testing.assert_close(terms.cpu(), expected_terms, rtol=0, atol=0)
            torch.testing.assert_close(distances.cpu(), expected_distances, rtol=0, atol=0, equal_nan=True)


# Around the tiles: 8 rows a warp, 64 a block, 16 a step; 64 candidates of a CPU tile, 128 of a block on CUDA.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "p"), [(2, 1), (3, 2), (7, 5), (8, 15), (9, 129), (16, 17), (17, 33), (33, 16), (65, 3)])
@pytest.mark.parametrize("steps", [64, 2], ids=["fine", "tied"])
def test_scores_and_choices_equal_the_reference(
    backend: Backend, n: int, p: int, steps: float, dtype: torch.dtype
) -> None:
    x = grid(n, p, steps, n + p, dtype)
    y = grid(n, 1, steps, n * p)[:, 0]
    same_rounds(backend, x, y, [0, p // 2, p - 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "p"), [(63, 63), (64, 64), (65, 65), (130, 129), (300, 3)])
@pytest.mark.parametrize("steps", [64, 2], ids=["fine", "tied"])
def test_shapes_too_large_for_a_sanitizer_equal_the_reference(
    backend: Backend, n: int, p: int, steps: float, dtype: torch.dtype
) -> None:
    test_scores_and_choices_equal_the_reference(backend, n, p, steps, dtype)


@settings(deadline=None, max_examples=25)
@given(n=st.integers(2, 90), p=st.integers(1, 20), steps=st.sampled_from([0.5, 2, 64]), seed=st.integers(0, 10**6))
def test_any_shape_equals_the_reference_on_the_cpu(n: int, p: int, steps: float, seed: int) -> None:
    x, y = grid(n, p, steps, seed), grid(n, 1, steps, seed + 1)[:, 0]
    same_rounds(Backend("cpu"), x, y, [seed % p, (seed + 1) % p])


def test_continuous_features_equal_the_reference_in_float64(backend: Backend) -> None:
    x = torch.randn(150, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = x[:, 3] * x[:, 4] + x[:, 7]
    terms = rank_terms(y)
    distances = torch.zeros(150, 150, dtype=torch.float64)
    for c in (3, 4):
        reference.codec_choose_(distances, terms, x[:, c])
        scores = backend("codec_scores", *(t.to(backend.device) for t in (x, terms, distances)))
        torch.testing.assert_close(scores.cpu(), reference.codec_scores(x, terms, distances), rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1e-3, 30.0], ids=["narrow", "wide"])
def test_candidates_far_narrower_or_wider_than_the_chosen_feature(backend: Backend, scale: float) -> None:
    """Then a row's nearest is the first of its list, or not in it at all."""
    x = grid(400 if backend.name == "cpu" else 120, 6)
    x[:, 1:] = (x[:, 1:] * scale * 2**14).round() / 2**14
    same_rounds(backend, x.double(), x[:, 2] + x[:, 0], [0])


def test_rows_far_from_all_others_find_their_nearest(backend: Backend) -> None:
    x = grid(300 if backend.name == "cpu" else 80, 4)
    x[:3] = torch.tensor([[200.0], [-300.0], [200.5]])
    same_rounds(backend, x.double(), x[:, 0] - x[:, 1], [0, 1])


def test_chosen_features_that_are_all_equal_leave_no_row_nearer(backend: Backend) -> None:
    """Every distance is 0, so that no list of near rows is short enough."""
    x = grid(200, 5)
    x[:, 0] = 1
    same_rounds(backend, x, x[:, 1], [0, 0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_distances_close_to_the_largest_number_are_searched_to_an_end(backend: Backend, dtype: torch.dtype) -> None:
    """A row to which all others are equally near, beyond the last power of two, has no list of the usual length."""
    x = grid(100, 3, dtype=dtype)
    x[0, 0] = 1.5 * 2.0 ** (63 if dtype == torch.float32 else 511)
    terms, distances = rank_terms(x[:, 1] + x[:, 2]), torch.zeros(100, 100, dtype=dtype)
    reference.codec_choose_(distances, terms, x[:, 0])
    scores = backend("codec_scores", *(t.to(backend.device) for t in (x, terms, distances)))
    assert torch.equal(scores.cpu(), reference.codec_scores(x, terms, distances))


def test_no_features_have_no_scores(backend: Backend) -> None:
    terms = rank_terms(grid(20, 1)[:, 0]).to(backend.device)
    for distances in (None, torch.zeros(20, 20, device=backend.device)):
        assert backend("codec_scores", torch.zeros(20, 0, device=backend.device), terms, distances).shape == (0,)


def test_many_equal_distances_beside_few_others(backend: Backend) -> None:
    x = grid(200, 5)
    x[:150, 0] = 0.5
    same_rounds(backend, x, x[:, 1], [0, 2])


def test_constant_and_duplicated_features(backend: Backend) -> None:
    x = grid(60, 6)
    x[:, 1] = 3
    x[:, 4] = x[:, 2]
    same_rounds(backend, x, x[:, 2], [2, 0, 4])
    scores = backend("codec_scores", x.to(backend.device), rank_terms(x[:, 2]).to(backend.device))
    assert scores[4] == scores[2] == scores.max()


def test_negative_zero_equals_zero(backend: Backend) -> None:
    x = grid(50, 2, 1)
    negative = torch.where(x == 0, -0.0, x)
    terms = rank_terms(grid(50, 1)[:, 0]).to(backend.device)
    assert torch.equal(
        backend("codec_scores", negative.to(backend.device), terms),
        backend("codec_scores", x.to(backend.device), terms),
    )


def test_a_tied_and_a_constant_response(backend: Backend) -> None:
    x = grid(70, 3)
    same_rounds(backend, x, grid(70, 1, 1)[:, 0], [1])
    same_rounds(backend, x, torch.zeros(70), [1])
    assert backend("codec_scores", x.to(backend.device), rank_terms(torch.zeros(70)).to(backend.device)).eq(0).all()


def test_features_that_are_no_candidates_score_minus_infinity(backend: Backend) -> None:
    x, y = grid(40, 70), grid(40, 1)[:, 0]
    candidates = torch.arange(70) % 3 == 0
    same_rounds(backend, x, y, [1], candidates)
    same_rounds(backend, x, y, [1], torch.zeros(70, dtype=torch.bool))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_bad_number_spoils_its_own_feature_only(backend: Backend, bad: float) -> None:
    x, y = grid(130, 9), grid(130, 1)[:, 0]
    spoiled = x.clone()
    spoiled[[5, 77], 3] = bad
    spoiled[:, 8] = bad
    terms = rank_terms(y)
    distances = torch.zeros(130, 130)
    good = torch.tensor([0, 1, 2, 4, 5, 6, 7])
    for held in (None, distances):
        args = [None if t is None else t.to(backend.device) for t in (terms, held)]
        scores = backend("codec_scores", spoiled.to(backend.device), *args)
        assert torch.equal(scores.cpu()[good], reference.codec_scores(x, terms, held)[good])
        assert torch.equal(scores.cpu(), reference.codec_scores(spoiled, terms, held))
        if held is None:
            reference.codec_choose_(distances, terms, x[:, 0])


def test_a_bad_number_in_the_distances_is_no_neighbour(backend: Backend) -> None:
    x, y = grid(90, 5), grid(90, 1)[:, 0]
    terms, distances = rank_terms(y), torch.zeros(90, 90)
    reference.codec_choose_(distances, terms, x[:, 0])
    distances[7, 8] = distances[8, 7] = NAN
    distances[9, :] = distances[:, 9] = INF
    scores = backend("codec_scores", *(t.to(backend.device) for t in (x, terms, distances)))
    assert torch.equal(scores.cpu(), reference.codec_scores(x, terms, distances))


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_bad_number_in_a_chosen_feature_is_nobodys_neighbour(backend: Backend, bad: float) -> None:
    x, y = grid(130, 5), grid(130, 1)[:, 0]
    x[[0, 70], 1] = bad
    same_rounds(backend, x, y, [1, 2])


def nearest_on_line(x: Tensor) -> Tensor:
    """Nearest other row of every row by one feature, from its distinct values; equally near ones by lowest row."""
    values, group = x.unique(return_inverse=True)
    order = group.sort(stable=True).indices
    counts = group.bincount()
    starts = counts.cumsum(0) - counts
    lowest = order[starts]
    gaps = torch.cat([x.new_full((1,), INF), values.diff(), x.new_full((1,), INF)])
    below, above = gaps[:-1], gaps[1:]
    left, right = lowest.roll(1), lowest.roll(-1)
    alone = torch.where(below < above, left, torch.where(above < below, right, torch.minimum(left, right)))[group]
    partner = torch.where(lowest[group] == torch.arange(len(x)), order[(starts + 1).clamp(max=len(x) - 1)][group], -1)
    together = torch.where(partner >= 0, partner, lowest[group])
    return torch.where(counts[group] > 1, together, alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_line_too_large_for_shared_memory_is_sorted_all_the_same(backend: Backend, dtype: torch.dtype) -> None:
    n = 17_000  # padded to 2^15 keys and rows: 256 KiB and more
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(0), dtype=dtype)
    x[::7, 1] = 0.25
    terms = rank_terms(x[:, 0].square())
    scores = backend("codec_scores", x.to(backend.device), terms.to(backend.device))
    rank, above = terms.long()
    for c in range(2):
        nearest = nearest_on_line(x[:, c])
        numerator = n * torch.minimum(rank, rank[nearest]).sum() - above.square().sum()
        assert scores[c].item() == (numerator.double() / (above * (n - above)).sum()).item()


def test_lines_are_planned_into_shared_memory_as_long_as_they_fit() -> None:
    plan = ops._C.plan_line
    hopper = 232448
    assert plan(1000, 300, 4, 132, hopper) == {
        "padded": 1024, "blocks": 300, "shared_bytes": 8192, "workspace_bytes": 0
    }  # fmt: skip
    assert plan(16384, 300, 8, 132, hopper)["shared_bytes"] == 16384 * 12
    long = plan(20000, 300, 4, 132, hopper)
    assert long == {"padded": 32768, "blocks": 264, "shared_bytes": 0, "workspace_bytes": 264 * 32768 * 8}
    assert plan(20000, 7, 4, 132, hopper)["blocks"] == 7
    for n in range(2, 5000):
        padded = plan(n, 1, 4, 132, hopper)["padded"]
        assert n <= padded < 2 * n and padded & (padded - 1) == 0


def test_orders_of_blocks_and_numbers_of_threads_give_the_same_bits(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(70, 140, generator=torch.Generator().manual_seed(0)).to(backend.device)
    terms = rank_terms(x[:, 0].cpu()).to(backend.device)
    distances = torch.zeros(70, 70, device=backend.device)
    backend("codec_choose_", distances, terms, x[:, 1].contiguous())
    results = []
    threads = torch.get_num_threads()
    for order, count in (("forward", 1), ("reverse", 2), ("forward", 3)):
        monkeypatch.setenv("FASTUNLEARN_EMULATOR_ORDER", order)
        torch.set_num_threads(count)
        try:
            results.append((backend("codec_scores", x, terms), backend("codec_scores", x, terms, distances)))
        finally:
            torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


def test_features_need_not_be_contiguous(backend: Backend) -> None:
    x, y = grid(40, 6).to(backend.device), grid(40, 1)[:, 0]
    terms = rank_terms(y).to(backend.device)
    view = torch.stack([x, x + 1], 2)[:, :, 0]
    assert torch.equal(backend("codec_scores", view, terms), backend("codec_scores", x, terms))
    assert torch.equal(backend("codec_scores", x.T.contiguous().T, terms), backend("codec_scores", x, terms))


# ------------------------------------------------------------------------------------------------ noise


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (4, 3), (5, 64), (6, 65), (300, 7), (0, 3), (3, 0)])
def test_noise_is_that_of_the_sketch_of_the_same_seed(
    backend: Backend, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """The identity sketched is the normal matrix itself: the same counters, whatever the operator."""
    n, p = shape
    scales = torch.linspace(0.5, 2, p, dtype=dtype) if p else torch.zeros(0, dtype=dtype)
    values = torch.zeros(n, p, dtype=dtype, device=backend.device)
    backend("add_column_noise_", values, scales.to(backend.device), 42)
    normal = ops.sketch_([torch.zeros(n, p, dtype=dtype)], [torch.eye(n, dtype=dtype)], [42])[0]
    assert torch.equal(values.cpu(), normal * scales)


def test_noise_does_not_depend_on_the_shape(backend: Backend) -> None:
    wide, part = torch.zeros(50, 40, device=backend.device), torch.zeros(13, 9, device=backend.device)
    for values in (wide, part):
        backend("add_column_noise_", values, torch.ones(values.shape[1], device=backend.device), 7)
    assert torch.equal(wide[:13, :9], part)
    other = torch.zeros_like(part)
    backend("add_column_noise_", other, torch.ones(9, device=backend.device), 8)
    assert not torch.equal(other, part)


# ------------------------------------------------------------------------------- doors, opcheck, torch.compile


def arguments(op: str, device: str = "cpu") -> list[object]:
    x = grid(20, 6).to(device)
    terms = rank_terms(grid(20, 1)[:, 0]).to(device)
    distances = torch.zeros(20, 20, device=device)
    if op == "codec_scores_":
        mask = torch.ones(6, dtype=torch.bool, device=device)
        return [torch.zeros(6, dtype=torch.float64, device=device), x, terms, distances, mask]
    if op == "codec_choose_":
        return [distances, terms, x[:, 0].contiguous()]
    return [x, torch.ones(6, device=device), 3]


@pytest.mark.parametrize("op", ["codec_scores_", "codec_choose_", "add_column_noise_"])
def test_opcheck(op: str) -> None:
    torch.library.opcheck(getattr(torch.ops.fastunlearn, op).default, tuple(arguments(op)))


def test_torch_compile_has_no_graph_break() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def one_round(x: Tensor, terms: Tensor, distances: Tensor, column: Tensor, scales: Tensor) -> Tensor:
        ops.add_column_noise_(x, scales, 1)
        ops.codec_choose_(distances, terms, column)
        return ops.codec_scores(x, terms, distances)

    x, terms = grid(20, 6), rank_terms(grid(20, 1)[:, 0])
    distances = torch.zeros(20, 20)
    compiled = one_round(x.clone(), terms.clone(), distances.clone(), x[:, 0].contiguous(), torch.ones(6))
    plain = ops.add_column_noise_(x.clone(), torch.ones(6), 1)
    ops.codec_choose_(distances, terms, x[:, 0].contiguous())
    assert torch.equal(compiled, ops.codec_scores(plain, terms, distances))


X, TERMS = grid(20, 6), rank_terms(grid(20, 1)[:, 0])
SQUARE = torch.zeros(20, 20)
BAD_SCORES = {
    "half features": ((X.half(), TERMS), "features is Half"),
    "a vector": ((X[:, 0], TERMS), "features is Float \\[20\\]"),
    "one row": ((X[:1], TERMS[:, :1]), "2 to 46340 rows"),
    "too many rows": ((torch.zeros(46341, 1), torch.zeros(2, 46341, dtype=torch.int32)), "2 to 46340 rows"),
    "wide ranks": ((X, TERMS.long()), "rank_terms is Long"),
    "ranks of other rows": ((X, TERMS[:, :19]), "expected int32 \\[2, 20\\]"),
    "distances of other rows": ((X, TERMS, SQUARE[:19, :19]), "one dtype, number of rows"),
    "distances not square": ((X, TERMS, SQUARE[:, :19]), "expected float32 or float64 \\[n, n\\]"),
    "distances in float64": ((X, TERMS, SQUARE.double()), "one dtype"),
    "candidates as numbers": ((X, TERMS, None, torch.ones(6)), "expected bool \\[6\\]"),
    "candidates of other features": ((X, TERMS, None, torch.ones(5, dtype=torch.bool)), "expected bool \\[6\\]"),
}


@pytest.mark.parametrize("case", BAD_SCORES)
def test_bad_input_to_codec_scores_is_refused(backend: Backend, case: str) -> None:
    args, message = BAD_SCORES[case]
    with pytest.raises(RuntimeError, match=message):
        backend("codec_scores", *(None if a is None else a.to(backend.device) for a in args))


BAD_CHOICES = {
    "distances not square": ((SQUARE[:, :19].clone(), TERMS, X[:, 0]), "expected float32 or float64 \\[n, n\\]"),
    "a transposed view": ((torch.zeros(40, 20).T[:, :20], TERMS, X[:, 0]), "written in place and must be contiguous"),
    "a column of other rows": ((SQUARE.clone(), TERMS, X[:19, 0]), "one number per row"),
    "a column in float64": ((SQUARE.clone(), TERMS, X[:, 0].double()), "one number per row"),
    "wide ranks": ((SQUARE.clone(), TERMS.long(), X[:, 0]), "rank_terms is Long"),
    "one row": ((SQUARE[:1, :1].clone(), TERMS[:, :1].clone(), X[:1, 0]), "2 to 46340 rows"),
}


@pytest.mark.parametrize("case", BAD_CHOICES)
def test_bad_input_to_codec_choose_changes_nothing(backend: Backend, case: str) -> None:
    args, message = BAD_CHOICES[case]
    tensors = [a.to(backend.device) for a in args]
    before = [t.clone() for t in tensors]
    with pytest.raises(RuntimeError, match=message):
        backend("codec_choose_", *tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_a_column_inside_the_distances_is_refused(backend: Backend) -> None:
    distances = torch.zeros(20, 20, device=backend.device)
    with pytest.raises(RuntimeError, match="share memory"):
        backend("codec_choose_", distances, TERMS.to(backend.device), distances[3])


def test_bad_noise_is_refused(backend: Backend) -> None:
    x = X.to(backend.device)
    for values, scales, message in (
        (x.half(), torch.ones(6), "values is Half"),
        (x.T, torch.ones(20), "must be contiguous"),
        (x, torch.ones(5), "one number per column"),
        (x, torch.ones(6).double(), "one number per column"),
    ):
        with pytest.raises(RuntimeError, match=message):
            backend("add_column_noise_", values, scales.to(backend.device), 0)
