"""Randomized SVD, Jacobi eigenproblems and single-pass sketches: their operators on every back end, and the whole."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Backend
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastunlearn as fu
from fastunlearn import ops, reference
from fastunlearn.lowrank import StreamingSketch, batched_eigh, batched_rsvd

DTYPES = [torch.float32, torch.float64]
# (rows, depth, columns): one, tiles +- 1, no rows, no depth, deeper than a piece, wider than a tile
PRODUCTS = [
    (1, 1, 1), (127, 15, 31), (129, 17, 33), (128, 16, 32), (0, 5, 3), (5, 0, 3), (3, 5, 0), (9, 2100, 7), (5, 4096, 1),
    (600, 3, 80),
]  # fmt: skip


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def on(backend: Backend, tensors: list[Tensor]) -> list[Tensor]:
    return [t.to(backend.device) for t in tensors]


def distance(found: Tensor, exact: Tensor) -> float:
    return float((found.double().cpu() - exact).norm())


# ----------------------------------------------------------------------------------------------- grouped products


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grouped_products_err_at_most_twice_as_much_as_torch(
    backend: Backend, dtype: torch.dtype, transpose: bool
) -> None:
    a = [random(*((d, r) if transpose else (r, d)), seed=i, dtype=dtype) for i, (r, d, _) in enumerate(PRODUCTS)]
    b = [random(d, c, seed=50 + i, dtype=dtype) for i, (_, d, c) in enumerate(PRODUCTS)]
    out = [torch.full((r, c), torch.nan, dtype=dtype, device=backend.device) for r, _, c in PRODUCTS]
    backend("grouped_mm_", out, on(backend, a), on(backend, b), transpose)
    for found, x, y in zip(out, a, b, strict=True):
        x = x.mT if transpose else x
        exact = x.double() @ y.double()
        unit = torch.finfo(dtype).eps / 2
        # In float64 torch's product is itself the exact one, up to rounding.
        theirs = distance(x @ y, exact) if dtype == torch.float32 else 4 * unit * float(x.norm() * y.norm())
        assert distance(found, exact) <= 2 * theirs + unit * float(exact.norm())


@pytest.mark.parametrize("transpose", [False, True])
def test_float32_factors_may_be_summed_in_float64(backend: Backend, transpose: bool) -> None:
    a = random(*((3000, 20) if transpose else (20, 3000)), dtype=torch.float32)
    b = random(3000, 9, seed=1, dtype=torch.float32)
    out = torch.empty(20, 9, dtype=torch.float64, device=backend.device)
    backend("grouped_mm_", [out], on(backend, [a]), on(backend, [b]), transpose)
    exact = (a.mT if transpose else a).double() @ b.double()
    assert distance(out, exact) < 1e-14 * float(a.norm() * b.norm())


def test_bits_of_a_product_do_not_depend_on_the_list(backend: Backend) -> None:
    a = [random(r, d, seed=i, dtype=torch.float32) for i, (r, d, _) in enumerate(PRODUCTS)]

    def sketched(order: list[int]) -> dict[int, Tensor]:
        out = [torch.empty(a[i].shape[0], 21, device=backend.device) for i in order]
        backend("sketch_", out, on(backend, [a[i] for i in order]), [7] * len(order))
        return dict(zip(order, out, strict=True))

    whole, turned = sketched(list(range(len(a)))), sketched(list(reversed(range(len(a)))))
    for i in range(len(a)):
        assert torch.equal(whole[i], turned[i]) and torch.equal(whole[i], sketched([i])[i])


def test_more_products_than_one_launch_holds(backend: Backend) -> None:
    a = [random(2, 3, seed=i, dtype=torch.float32) for i in range(903)]
    b = [random(3, 2, seed=i + 1, dtype=torch.float32) for i in range(903)]
    out = [torch.empty(2, 2, device=backend.device) for _ in a]
    backend("grouped_mm_", out, on(backend, a), on(backend, b))
    found = torch.stack(out).cpu()
    assert torch.allclose(found, torch.stack(a) @ torch.stack(b), rtol=1e-5, atol=1e-6)


def test_views_are_read_as_they_are(backend: Backend) -> None:
    a, b = random(9, 7, dtype=torch.float32).to(backend.device), random(9, 5, dtype=torch.float32).to(backend.device)
    out = torch.empty(7, 5, device=backend.device)
    backend("grouped_mm_", [out], [a.mT], [b])
    assert torch.allclose(out, a.mT @ b, atol=1e-5)


def test_planned_blocks_cover_every_product_once() -> None:
    shapes = [(r, d, c) for r, d, c in PRODUCTS] + [(1, 1, 1)] * 500
    launches = ops._C.plan_grouped(shapes)
    members = [i for launch in launches for i in launch["members"]]
    assert sorted(members) == [i for i, (r, _, c) in enumerate(shapes) if r and c]
    assert [shapes[i][1] for i in members] == sorted((shapes[i][1] for i in members), reverse=True)
    for launch in launches:
        assert len(launch["members"]) <= 400
        blocks = [
            math.ceil(shapes[i][0] / 128) * math.ceil(shapes[i][2] / 32) * max(1, math.ceil(shapes[i][1] / 2048))
            for i in launch["members"]
        ]
        assert launch["first_block"] == [0, *itertools.accumulate(blocks)]


# -------------------------------------------------------------------------------------------------------- sketches


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", [0, -3, 2**40 + 1])
def test_sketch_equals_the_product_with_the_normal_matrix(backend: Backend, seed: int, dtype: torch.dtype) -> None:
    for transpose in (False, True):
        matrices = [
            random(*((d, r) if transpose else (r, d)), seed=i, dtype=dtype) for i, (r, d, _) in enumerate(PRODUCTS)
        ]
        out = [torch.empty(r, 13, dtype=dtype, device=backend.device) for r, _, _ in PRODUCTS]
        backend("sketch_", out, on(backend, matrices), [seed] * len(out), transpose)
        for found, matrix in zip(out, matrices, strict=True):
            wide = (matrix.mT if transpose else matrix).double()
            exact = wide @ reference.normal_matrix(seed, wide.shape[1], 13)
            # The normal numbers are float32: a few units in the last place off the float64 reference.
            assert distance(found, exact) <= 1e-6 * math.sqrt(13) * float(wide.norm())


def omega(backend: Backend, seed: int, rows: int, columns: int) -> Tensor:
    out = torch.empty(rows, columns, device=backend.device)
    backend("sketch_", [out], [torch.eye(rows, device=backend.device)], [seed])
    return out.cpu()


def test_normal_numbers_are_the_same_bits_on_every_back_end(backend: Backend) -> None:
    out = torch.empty(50, 30)
    ops.sketch_([out], [torch.eye(50)], [11])
    assert torch.equal(omega(backend, 11, 50, 30), out)


def test_normal_numbers_are_normal_and_uncorrelated() -> None:
    x = reference.normal_matrix(5, 4000, 50)
    n = x.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((x**power).mean()) - moment) < 5 * math.sqrt(variance / n)
    correlation = torch.corrcoef(x.T) - torch.eye(50)
    assert float(correlation.abs().max()) < 5 / math.sqrt(4000)
    quads = x.reshape(1000, 4, 50).movedim(1, 0).reshape(4, -1)  # words of one counter
    assert float((torch.corrcoef(quads) - torch.eye(4)).abs().max()) < 5 / math.sqrt(50_000)


def test_more_columns_and_rows_keep_the_numbers_there_were(backend: Backend) -> None:
    assert torch.equal(omega(backend, 3, 40, 33)[:21, :5], omega(backend, 3, 21, 5))
    assert not torch.equal(omega(backend, 3, 8, 5), omega(backend, 4, 8, 5))


# -------------------------------------------------------------------------------------------------------- Cholesky


def gram(columns: Tensor) -> Tensor:
    return columns.mT @ columns


@pytest.mark.parametrize("k", [1, 2, 7, 33, 80])
def test_cholesky_inverse_equals_the_definition(backend: Backend, k: int) -> None:
    grams = torch.stack([gram(random(2 * k, k, seed=s)) for s in range(3)])
    r, (expected, expected_ranks) = grams.clone(), reference.cholesky_inverse_(wanted := grams.clone(), 1e-14)
    found = r.clone().to(backend.device)
    inverses, ranks = backend("cholesky_inverse_", found, 1e-14)
    assert torch.equal(ranks.cpu(), expected_ranks) and torch.equal(ranks.cpu(), torch.full((3,), k))
    assert torch.allclose(found.cpu(), wanted, rtol=1e-11, atol=1e-11)
    assert torch.allclose(inverses.cpu(), expected, rtol=1e-9, atol=1e-9)
    assert torch.allclose(found.cpu() @ inverses.cpu(), torch.eye(k).double().expand(3, k, k), atol=1e-11)


def test_dependent_columns_drop_out(backend: Backend) -> None:
    y = random(20, 6)
    y[:, 2] = y[:, 0] - 2 * y[:, 1]
    y[:, 4] = 0
    r = gram(y)[None].to(backend.device)
    inverses, ranks = backend("cholesky_inverse_", r, 1e-13)
    assert ranks.tolist() == [4]
    q = y @ inverses[0].cpu()
    assert torch.allclose(gram(q), torch.diag(torch.tensor([1.0, 1, 0, 1, 0, 1])).double(), atol=1e-12)
    assert not q[:, [2, 4]].any() and torch.allclose(q @ r[0].cpu(), y, atol=1e-12)


def test_a_gram_that_is_not_finite_leaves_the_others_alone(backend: Backend) -> None:
    grams = torch.stack([gram(random(9, 5, seed=s)) for s in range(3)])
    grams[1, 3, 3] = torch.nan
    alone = grams[2:].clone().to(backend.device)
    backend("cholesky_inverse_", alone, 1e-14)
    batch = grams.clone().to(backend.device)
    inverses, ranks = backend("cholesky_inverse_", batch, 1e-14)
    assert ranks.tolist() == [5, -1, 5] and not inverses[1].any()
    assert torch.equal(batch[2], alone[0])


# ---------------------------------------------------------------------------------------------------------- Jacobi


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 3, 8, 33])
def test_rotated_rows_are_orthogonal_and_rotate_back(backend: Backend, k: int, dtype: torch.dtype) -> None:
    a = torch.stack([random(k, k, seed=s, dtype=dtype) for s in range(3)])
    rows, rotation = a.clone().to(backend.device), torch.full_like(a, torch.nan, device=backend.device)
    sweeps = backend("orthogonal_rows_", rows, rotation)
    assert (sweeps >= 0).all() and (sweeps < 15).all()
    unit = torch.finfo(dtype).eps
    back = rotation.mT @ rows
    assert float((back.cpu() - a).abs().max()) <= 20 * k * unit * float(a.abs().max())
    normal = (rows / rows.norm(dim=-1, keepdim=True)).cpu()
    eye = torch.eye(k, dtype=dtype)
    assert float((normal @ normal.mT - eye).abs().max()) <= 10 * k * unit
    assert float((rotation @ rotation.mT - eye.to(backend.device)).abs().max()) <= 10 * k * unit
    values = rows.norm(dim=-1).sort(dim=-1, descending=True).values.cpu()
    assert torch.allclose(values, torch.linalg.svdvals(a), rtol=1e-4 if dtype == torch.float32 else 1e-12)


def test_a_matrix_too_large_for_shared_memory_is_rotated_in_place(backend: Backend) -> None:
    a = random(1, 121, 121)  # with its rotation 234,256 bytes, more than any GPU's shared memory
    rows, rotation = a.clone().to(backend.device), torch.empty_like(a, device=backend.device)
    assert backend("orthogonal_rows_", rows, rotation)[0] > 0
    assert torch.allclose((rotation.mT @ rows).cpu(), a, atol=1e-11)


def test_nan_in_one_matrix_does_not_spread(backend: Backend) -> None:
    a = torch.stack([random(6, 6, seed=s) for s in range(3)])
    alone = a[2:].clone().to(backend.device)
    backend("orthogonal_rows_", alone)
    a[1, 2, 3] = torch.nan
    batch = a.clone().to(backend.device)
    backend("orthogonal_rows_", batch)
    assert torch.equal(batch[2], alone[0]) and torch.isfinite(batch[0]).all()


@pytest.mark.parametrize("n", [2, 4, 6, 40])
def test_a_tournament_pairs_everyone_with_everyone_once(n: int) -> None:
    met = [
        [tuple(ops._C.tournament_pair(round_, index, n)) for index in range(n // 2)] for round_ in range(n - 1)
    ]  # fmt: skip
    for pairs in met:
        assert sorted(itertools.chain(*pairs)) == list(range(n))
    assert sorted(itertools.chain(*met)) == list(itertools.combinations(range(n), 2))


def test_jacobi_plans_fit_the_shared_memory_they_are_given() -> None:
    plan = ops._C.plan_jacobi
    assert plan(240, 4, False, 232448) == {"warps": 30, "shared_bytes": 230400}
    assert plan(241, 4, False, 232448)["shared_bytes"] == 0
    assert plan(118, 8, True, 232448)["shared_bytes"] == 222784
    assert plan(1, 8, True, 232448) == {"warps": 1, "shared_bytes": 16}
    for k in range(1, 300):
        warps, pairs = plan(k, 4, False, 232448)["warps"], max(1, (k + 1) // 2)
        assert warps <= 32 and math.ceil(pairs / warps) == math.ceil(pairs / 32)


# ----------------------------------------------------------------------------------- doors, opcheck, torch.compile

Call = Callable[[], Any]
e = torch.empty
REFUSED: dict[str, tuple[Call, str]] = {
    "counts": (lambda: ops.grouped_mm_([e(2, 2)], [e(2, 2)], []), "1 outputs, 1 matrices and 0 right factors"),
    "shapes": (lambda: ops.grouped_mm_([e(2, 2)], [e(2, 3)], [e(2, 2)]), "member 0 .* shapes do not fit"),
    "transposed": (lambda: ops.grouped_mm_([e(2, 2)], [e(2, 3)], [e(3, 2)], True), "transposed .* do not fit"),
    "dtypes": (lambda: ops.grouped_mm_([e(2, 2)], [e(2, 2)], [e(2, 2).double()]), "float32 or all float64"),
    "narrow": (lambda: ops.grouped_mm_([e(2, 2)], [e(2, 2).double()], [e(2, 2).double()]), "out as wide or float64"),
    "halves": (lambda: ops.sketch_([e(2, 2).half()], [e(2, 2).half()], [0]), "float32 or all float64"),
    "vectors": (lambda: ops.sketch_([e(2)], [e(2)], [0]), "matrices are needed"),
    "out twice": (lambda: (lambda x, y: ops.grouped_mm_([x, x], [y, y], [y, y]))(e(2, 2), e(2, 2)), "shares memory"),
    "overlap": (lambda: (lambda x: ops.grouped_mm_([x], [x], [x]))(e(2, 2)), "shares memory"),
    "strided out": (lambda: ops.sketch_([e(4, 2).mT], [e(2, 3)], [0]), "must be contiguous"),
    "seeds": (lambda: ops.sketch_([e(2, 2)], [e(2, 2)], [0, 1]), "2 seeds"),
    "gram dtype": (lambda: ops.cholesky_inverse_(e(1, 2, 2), 0.0), "float64 is needed"),
    "gram shape": (lambda: ops.cholesky_inverse_(e(2, 3).double(), 0.0), r"expected .* \[batch, k, k\]"),
    "rows shape": (lambda: ops.orthogonal_rows_(e(1, 2, 3)), r"expected .* \[batch, k, k\]"),
    "rotation": (lambda: ops.orthogonal_rows_(e(1, 2, 2), e(1, 3, 3)), "must be alike"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_arguments_are_refused_with_what_was_given(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(RuntimeError, match=message):
        call()


OPERATORS: dict[str, Callable[[str], tuple[Any, ...]]] = {
    "grouped_mm_": lambda d: ([e(3, 4, device=d)], [torch.ones(3, 5, device=d)], [torch.ones(5, 4, device=d)], False),
    "sketch_": lambda d: ([e(3, 4, device=d)], [torch.ones(3, 5, device=d)], [1], False),
    "cholesky_inverse_": lambda d: (
        torch.eye(3, device=d).double()[None],
        torch.zeros(1, 3, 3, device=d).double(),
        torch.zeros(1, dtype=torch.int64, device=d),
        0.0,
    ),
    "orthogonal_rows_": lambda d: (
        torch.eye(3, device=d)[None],
        torch.zeros(1, 3, 3, device=d),
        torch.zeros(1, dtype=torch.int64, device=d),
    ),
}


@pytest.mark.parametrize("op", OPERATORS)
def test_operators_pass_opcheck(op: str) -> None:
    torch.library.opcheck(getattr(torch.ops.fastunlearn, op), OPERATORS[op]("cpu"))


@pytest.mark.parametrize("op", OPERATORS)
def test_operators_compile_without_a_graph_break(op: str) -> None:
    def run(*args: Any) -> None:
        getattr(torch.ops.fastunlearn, op)(*args)

    plain, compiled = OPERATORS[op]("cpu"), OPERATORS[op]("cpu")
    run(*plain)
    torch.compile(run, fullgraph=True, backend="aot_eager")(*compiled)
    first = plain[0][0] if isinstance(plain[0], list) else plain[0]
    second = compiled[0][0] if isinstance(compiled[0], list) else compiled[0]
    assert torch.equal(first, second)


# --------------------------------------------------------------------------------------------------- batched_rsvd


def spectra(n: int) -> dict[str, Tensor]:
    i = torch.arange(n, dtype=torch.float64)
    return {
        "flat": torch.ones(n).double(),
        "low rank": (i < 5).double(),
        "low rank and noise": (i < 5) + 1e-3,
        "polynomial": 1 / (i + 1),
        "exponential": 10 ** (-i / 4),
        "step": torch.where(i < n // 3, 1.0, 1e-4),
        "clusters": 10.0 ** -(i // 8),
        "one huge": torch.where(i == 0, 1e3, 1 / (i + 1)),
    }


def matrix(m: int, n: int, values: Tensor, seed: int = 0) -> Tensor:
    left = torch.linalg.qr(random(m, len(values), seed=2 * seed)).Q
    return left * values @ torch.linalg.qr(random(n, len(values), seed=2 * seed + 1)).Q.mT


@pytest.mark.parametrize(("rate", "k"), [(2, 20), (2, 24), (1, 14)])
def test_float64_keeps_singular_values_far_below_the_largest(rate: int, k: int) -> None:
    values = 10.0 ** -(torch.arange(100).double() / rate)
    a = matrix(200, 100, values)
    found = batched_rsvd(a, rank=k)
    assert int(found.rank) == k
    tail = float((a - found.U * found.S @ found.Vh).square().sum())
    assert tail <= 1.1 * float(values[k:].square().sum()) + (1e-16 * k) ** 2 * k


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n"), [(120, 90), (60, 200), (400, 33), (30, 30)])
@pytest.mark.parametrize("name", spectra(9))
def test_rsvd_is_orthogonal_and_nearly_optimal(name: str, m: int, n: int, dtype: torch.dtype) -> None:
    k, u = 20, torch.finfo(dtype).eps / 2
    a = matrix(m, n, spectra(min(m, n))[name]).to(dtype)
    found = batched_rsvd(a, rank=k)
    assert isinstance(found.U, Tensor) and isinstance(found.S, Tensor) and isinstance(found.Vh, Tensor)
    assert (found.U.shape, found.S.shape, found.Vh.shape) == ((m, k), (k,), (k, n))
    rank, left, right = int(found.rank), found.U.double(), found.Vh.double().mT
    assert not left[:, rank:].any() and not right[:, rank:].any() and not found.S[rank:].any()
    for q in (left[:, :rank], right[:, :rank]):
        assert float((q.mT @ q - torch.eye(rank)).norm()) <= 10 * k * u
    values = torch.linalg.svdvals(a.double())
    assert rank >= int((values[:k] > 100 * u * values[0]).sum())
    tail = float((a.double() - left * found.S.double() @ right.mT).square().sum())
    floor = float((k * u * values[0]) ** 2) * k
    assert tail <= 1.1 * float(values[k:].square().sum()) + floor
    assert float((found.S.double() - values[:k]).abs().max()) <= 0.06 * float(values[k - 1]) + 50 * u * float(values[0])
    held = float(found.S.double().square().sum() / a.double().square().sum())
    assert abs(float(found.energy) - held) < 1e-5


def test_the_mean_error_over_seeds_satisfies_halko_martinsson_tropp() -> None:
    """E |A - Q Q^T A|_F <= sqrt(1 + k / (p - 1)) * tail, theorem 10.5, without power iterations."""
    for name in ("polynomial", "flat", "step", "exponential"):
        values = spectra(100)[name]
        a, k, p = matrix(150, 100, values), 10, 6
        errors = []
        for seed in range(30):
            # All k + p columns: the theorem is about the range, before it is cut to k.
            found = batched_rsvd(a, rank=k + p, oversample=0, power_iterations=0, seed=seed)
            errors.append(float((a - found.U * found.S @ found.Vh).norm()))
        assert sum(errors) / 30 <= math.sqrt(1 + k / (p - 1)) * float(values[k:].norm())
        assert min(errors) < max(errors)  # the seeds matter


def ragged() -> list[Tensor]:
    shapes = [(40, 27), (3, 90), (200, 64), (64, 200), (1, 1), (700, 30), (5, 5), (90, 3000)]
    return [matrix(m, n, 1 / (torch.arange(min(m, n)).double() + 1), i).float() for i, (m, n) in enumerate(shapes)]


def factors(found: fu.RSVD, i: int) -> list[Tensor]:
    return [part[i] for part in found[:3]]


@pytest.mark.parametrize("option", [{"rank": 12}, {"energy": 0.9}])
def test_bits_do_not_depend_on_batch_order_or_threads(option: dict[str, Any]) -> None:
    matrices = ragged()
    whole = batched_rsvd(matrices, **option)
    turned = batched_rsvd(matrices[::-1], **option)
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        other = batched_rsvd(matrices, **option)
    finally:
        torch.set_num_threads(threads)
    for i, one in enumerate(matrices):
        stacked = batched_rsvd(one[None], **{**option, **({"rank": min(12, *one.shape)} if "rank" in option else {})})
        for mine, reversed_, threaded, alone in zip(
            factors(whole, i), factors(turned, len(matrices) - 1 - i), factors(other, i), factors(stacked, 0),
            strict=True,
        ):  # fmt: skip
            assert torch.equal(mine, reversed_) and torch.equal(mine, threaded) and torch.equal(mine, alone)
    assert torch.equal(whole.rank, turned.rank.flip(0)) and torch.equal(whole.energy, turned.energy.flip(0))


def test_equal_seeds_give_equal_bits_and_others_others() -> None:
    a = matrix(60, 50, spectra(50)["flat"])
    one, same, other = (batched_rsvd(a, rank=5, power_iterations=0, seed=s) for s in (1, 1, 2))
    assert torch.equal(one.U, same.U) and not torch.equal(one.U, other.U)


def test_a_rank_above_a_members_sides_is_cut() -> None:
    found = batched_rsvd(ragged(), rank=30)
    assert [s.shape[0] for s in found.S] == [27, 3, 30, 30, 1, 30, 5, 30]
    for one, u, s, vh in zip(ragged(), *found[:3], strict=True):
        tail = torch.linalg.svdvals(one.double())[30:].norm()
        assert float((one - u * s @ vh).norm()) <= 1.05 * float(tail) + 1e-5 * float(one.norm())


def test_members_that_are_zero_empty_or_not_finite_leave_the_others_alone() -> None:
    good = matrix(40, 30, spectra(30)["polynomial"]).float()
    nan, inf = good.clone(), good.clone()
    nan[3, 4], inf[0, 0] = torch.nan, -torch.inf
    found = batched_rsvd([nan, good, torch.zeros(8, 9), inf, torch.zeros(0, 4), torch.zeros(4, 0)], rank=5)
    alone = batched_rsvd(good, rank=5)
    assert found.rank.tolist() == [-1, 5, 0, -1, 0, 0]
    assert torch.equal(found.U[1], alone.U) and torch.equal(found.Vh[1], alone.Vh)
    for i in (0, 3):
        assert all(part[i].isnan().all() and part[i].numel() for part in found[:3]) and found.energy[i].isnan()
    assert not any(part[2].any() for part in found[:3]) and found.energy[2] == 1
    assert [tuple(found.U[i].shape) for i in (2, 4, 5)] == [(8, 5), (0, 0), (4, 0)]


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999, 1.0])
def test_the_rank_for_an_energy_is_the_smallest_that_holds_it(energy: float) -> None:
    for name in ("polynomial", "exponential", "flat", "low rank"):
        values = spectra(150)[name]
        a = matrix(200, 150, values)
        found = batched_rsvd(a, energy=energy)
        k = found.S.shape[-1]
        held = found.S.square().cumsum(0) / a.square().sum()
        if energy < 1:
            assert held[-1] >= energy and (k == 1 or held[-2] < energy)
            exact = int((values.square().cumsum(0) / values.square().sum() < energy).sum()) + 1
            assert exact <= k <= 1.1 * exact + 1
        assert float((a - found.U * found.S @ found.Vh).square().sum()) <= (1 - energy + 1e-9) * float(a.square().sum())
        assert abs(float(found.energy) - float(held[-1])) < 1e-9


def test_a_stack_is_as_wide_as_its_widest_member_and_says_each_ones_rank() -> None:
    one, two = (matrix(50, 40, spectra(40)[name]) for name in ("exponential", "polynomial"))
    found = batched_rsvd(torch.stack([one, two, torch.zeros_like(one)]), energy=0.99)
    alone = [batched_rsvd(one, energy=0.99), batched_rsvd(two, energy=0.99)]
    assert found.rank.tolist() == [a.S.shape[0] for a in alone] + [0]
    assert found.S.shape == (3, max(found.rank.tolist()))
    for i, a in enumerate(alone):
        k = int(a.rank)
        assert torch.equal(found.U[i, :, :k], a.U) and not found.U[i, :, k:].any() and not found.Vh[i, k:].any()


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        *((torch.float32, scale) for scale in (1e-38, 1e-15, 1e15, 1e36)),
        (torch.float64, 1e-290),
        (torch.float64, 1e290),
    ],
)
def test_factors_do_not_depend_on_the_scale(dtype: torch.dtype, scale: float) -> None:
    a = matrix(40, 30, spectra(30)["polynomial"]).to(dtype)
    plain, scaled = batched_rsvd(a, rank=5), batched_rsvd(a * scale, rank=5)
    close = 1e-4 if scale == 1e-38 else 1e-5  # 1e-38 is on the edge of float32's full precision
    assert torch.allclose(plain.U, scaled.U, atol=close) and torch.allclose(plain.Vh, scaled.Vh, atol=close)
    assert torch.allclose(scaled.S.double() / scale, plain.S.double(), rtol=1e-4)


def test_the_largest_entry_of_every_right_vector_is_positive() -> None:
    for seed in range(3):
        vh = batched_rsvd(matrix(30, 20, spectra(20)["polynomial"]), rank=8, seed=seed).Vh
        assert (vh.gather(1, vh.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_computed_in_float32(dtype: torch.dtype) -> None:
    a = matrix(30, 20, spectra(20)["polynomial"]).to(dtype)
    found, wide = batched_rsvd(a, rank=4), batched_rsvd(a.float(), rank=4)
    assert found.U.dtype == dtype and torch.equal(found.U, wide.U.to(dtype)) and torch.equal(found.S, wide.S.to(dtype))


def test_stacks_keep_their_leading_axes_also_when_empty() -> None:
    a = random(2, 3, 9, 7)
    found = batched_rsvd(a, rank=7)
    assert found.U.shape == (2, 3, 9, 7) and found.S.shape == (2, 3, 7) and found.Vh.shape == (2, 3, 7, 7)
    assert torch.allclose(found.U * found.S[..., None, :] @ found.Vh, a, atol=1e-12)
    none = batched_rsvd(random(0, 4, 5), rank=2)
    assert none.U.shape[:2] == (0, 4) and none.rank.shape == (0,)
    assert batched_rsvd([], rank=2).U == []


@settings(deadline=None, max_examples=40)
@given(m=st.integers(1, 40), n=st.integers(1, 40), r=st.integers(1, 40), k=st.integers(1, 40))
def test_a_matrix_of_small_rank_is_recovered(m: int, n: int, r: int, k: int) -> None:
    r, k = min(r, m, n), min(k, m, n)
    a = matrix(m, n, torch.linspace(2, 1, r).double())
    found = batched_rsvd(a, rank=k)
    assert int(found.rank) == min(r, k)
    if r <= k:
        assert torch.allclose(found.U * found.S @ found.Vh, a, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: batched_rsvd(torch.ones(3)[None], rank=2), ValueError, "more than the smaller side"),
        (lambda: batched_rsvd(torch.ones(3), rank=1), ValueError, r"must be \[\.\.\., m, n\]"),
        (lambda: batched_rsvd([torch.ones(3)], rank=1), ValueError, r"number 0 has shape \[3\]"),
        (lambda: batched_rsvd([[1.0]], rank=1), TypeError, "number 0 is a list"),
        (lambda: batched_rsvd(torch.ones(2, 2).int(), rank=1), TypeError, "floating-point"),
        (lambda: batched_rsvd([torch.ones(2, 2), torch.ones(2, 2).double()], rank=1), ValueError, "one dtype"),
        (lambda: batched_rsvd(torch.ones(2, 2)), ValueError, "not neither"),
        (lambda: batched_rsvd(torch.ones(2, 2), rank=1, energy=0.5), ValueError, "not both"),
        (lambda: batched_rsvd(torch.ones(2, 2), rank=0), ValueError, "rank must be 1 or more"),
        (lambda: batched_rsvd(torch.ones(2, 2), energy=0.0), ValueError, "energy must be above 0"),
        (lambda: batched_rsvd(torch.ones(2, 2), energy=1.5), ValueError, "at most 1"),
        (lambda: batched_rsvd(torch.ones(2, 2), rank=1, oversample=-1), ValueError, "must not be negative"),
    ],
)
def test_bad_settings_are_refused(call: Call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# --------------------------------------------------------------------------------------------------- batched_eigh


def symmetric(values: Tensor, seed: int = 0) -> Tensor:
    q = torch.linalg.qr(random(len(values), len(values), seed=seed)).Q
    return q * values @ q.mT


EIGEN: dict[str, Tensor] = {
    "one": torch.tensor([-2.0]),
    "pair": torch.tensor([1.0, -1.0]),
    "opposite pairs": torch.tensor([3.0, -3.0, 2.0, -2.0, 0.0]),
    "zero": torch.zeros(6),
    "identity": torch.ones(7),
    "clusters": torch.tensor([1.0] * 4 + [1.0 + 1e-6] * 4 + [-5.0] * 3),
    "definite": torch.linspace(1, 10, 33),
    "negative definite": -torch.logspace(0, 3, 20),
    "wide": torch.logspace(-12, 0, 40),
    "indefinite": torch.linspace(-4, 7, 40),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EIGEN)
def test_eigh_errs_at_most_twice_as_much_as_torch(backend: Backend, name: str, dtype: torch.dtype) -> None:
    k = len(EIGEN[name])
    ours = theirs = 0.0
    unit = 3 * k * torch.finfo(dtype).eps  # of the results themselves, per seed: torch may be exact by luck
    with pytest.MonkeyPatch.context() as patch:
        if backend.name == "emulated":
            patch.setattr(ops, "_ops", torch.ops.fastunlearn_emulated)
        for seed in range(3):
            a = symmetric(EIGEN[name].double(), seed).to(dtype)
            a = (a + a.mT) / 2
            size = float(a.abs().max()) or 1.0
            for which, (values, vectors) in (
                ("ours", batched_eigh(a.to(backend.device))), ("theirs", torch.linalg.eigh(a))
            ):  # fmt: skip
                values, vectors = values.double().cpu(), vectors.double().cpu()
                assert (values.diff() >= 0).all()
                residual = float((a.double() @ vectors - vectors * values).norm()) / size
                residual += float((vectors.mT @ vectors - torch.eye(k)).norm())
                ours, theirs = (ours + residual, theirs) if which == "ours" else (ours, theirs + residual)
    assert ours <= 2 * theirs + unit


def test_eigh_reads_the_lower_triangle_and_keeps_leading_axes() -> None:
    a = random(2, 3, 5, 5)
    values, vectors = batched_eigh(a)
    expected = torch.linalg.eigh(a)
    assert torch.allclose(values, expected.eigenvalues, atol=1e-12)
    cosines = (vectors.mT @ expected.eigenvectors).abs()
    assert torch.allclose(cosines, torch.eye(5).double().expand(2, 3, 5, 5), atol=1e-8)
    assert batched_eigh(torch.zeros(0, 3, 3))[1].shape == (0, 3, 3)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_eigh_does_not_depend_on_the_scale(scale: float) -> None:
    a = symmetric(EIGEN["indefinite"].double()).float()
    values, _ = batched_eigh(a * scale)
    assert torch.allclose(values / scale, batched_eigh(a)[0], rtol=1e-5, atol=1e-5)


def test_a_bad_member_of_eigh_is_nan_and_the_others_are_as_alone() -> None:
    a = torch.stack([symmetric(EIGEN["definite"].double(), s) for s in range(3)])
    alone = batched_eigh(a[2])
    a[1, 4, 2] = torch.inf
    values, vectors = batched_eigh(a)
    assert values[1].isnan().all() and vectors[1].isnan().all()
    assert torch.equal(values[2], alone[0]) and torch.equal(vectors[2], alone[1])


def test_eigh_refuses_what_it_can_not_do() -> None:
    with pytest.raises(TypeError, match="float32 or float64"):
        batched_eigh(torch.eye(2).half())
    with pytest.raises(ValueError, match="must be square"):
        batched_eigh(torch.ones(2, 3))


# ------------------------------------------------------------------------------------------------ StreamingSketch


def test_a_sketch_of_rows_of_small_rank_is_exact() -> None:
    rows = matrix(300, 60, torch.tensor([4.0, 3.0, 2.0, 1.0]).double())
    values, vectors = StreamingSketch(60, 6).add_(rows).eigh()
    assert torch.allclose(values[0], torch.tensor([16.0, 9.0, 4.0, 1.0, 0, 0]).double(), atol=1e-9)
    assert not vectors[0, :, 4:].any()
    v = vectors[0, :, :4]
    assert torch.allclose(v * values[0, :4] @ v.mT, rows.mT @ rows, atol=1e-9)


@pytest.mark.parametrize("name", ["polynomial", "exponential", "one huge", "step"])
def test_the_tail_of_a_sketch_is_near_the_optimal_one(name: str) -> None:
    """Mean over seeds of the nuclear-norm error of rank k, 16 columns of oversampling."""
    k, root = 20, spectra(120)[name]
    rows = matrix(200, 120, root)
    exact = rows.mT @ rows
    errors = []
    for seed in range(5):
        values, vectors = StreamingSketch(120, k, seed=seed).add_(rows).eigh()
        left = exact - vectors[0] * values[0] @ vectors[0].mT
        errors.append(float(torch.linalg.eigvalsh(left).abs().sum()))
    assert sum(errors) / 5 <= 1.6 * float(root[k:].square().sum()) + 1e-9 * float(exact.trace())


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(cuts=st.lists(st.integers(0, 50), max_size=4), merged=st.booleans(), groups=st.integers(1, 3))
def test_any_split_of_the_stream_gives_the_same_sketch(cuts: list[int], merged: bool, groups: int) -> None:
    rows = random(groups, 50, 12)
    edges = sorted({0, 50, *cuts})
    total = StreamingSketch(12, 3, 2, groups=groups, seed=4)
    for i, j in itertools.pairwise(edges):
        if merged:
            total.merge_(StreamingSketch(12, 3, 2, groups=groups, seed=4).add_(rows[:, i:j]))
        else:
            total.add_(rows[:, i:j])
    whole = StreamingSketch(12, 3, 2, groups=groups, seed=4).add_(rows)
    assert total.rows_seen == whole.rows_seen == 50
    assert torch.allclose(total.product, whole.product, atol=1e-11) and torch.allclose(total.trace, whole.trace)
    assert torch.allclose(whole.trace, rows.square().sum((1, 2)))


def test_a_sketch_holds_no_square_of_its_width() -> None:
    sketch = StreamingSketch(200_000, 2, 2).add_(torch.randn(3, 200_000))
    assert sketch.product.shape == (1, 200_000, 4)
    assert sketch.eigh()[1].shape == (1, 200_000, 2)


def test_a_sketch_of_nothing_has_no_directions() -> None:
    values, vectors = StreamingSketch(5, 2).eigh()
    assert not values.any() and not vectors.any() and values.shape == (1, 2)


def test_rows_that_are_bad_leave_the_sketch_as_it_was() -> None:
    sketch = StreamingSketch(3, 1, groups=2)
    for bad, error in (
        (torch.ones(2, 3, 4), ValueError),
        (torch.ones(3, 3), ValueError),
        (torch.ones(2, 3, 3).half(), TypeError),
        (torch.full((2, 3, 3), torch.inf), ValueError),
    ):
        with pytest.raises(error):
            sketch.add_(bad)
    assert sketch.rows_seen == 0 and not sketch.product.any()
    with pytest.raises(ValueError, match="cannot merge"):
        sketch.merge_(StreamingSketch(3, 1, groups=2, seed=1))
    with pytest.raises(ValueError, match="must be 1 or more"):
        StreamingSketch(0, 1)
    with pytest.raises(TypeError, match="float32 or float64"):
        StreamingSketch(2, 1, dtype=torch.float16)
