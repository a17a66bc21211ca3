"""The CPU kernels of the squared per-sample gradient where their loops turn: chunks of samples, blocks of samples,
chains of positions, tiles, and groups in the lanes of a register."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastunlearn import ops, reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LINEAR = {  # samples, positions, in, out
    "one position, many blocks": (100, 1, 70, 13),
    "a block of samples and a half": (24, 4, 33, 7),
    "block of one sample": (5, 129, 33, 6),
    "a chain of positions": (2, 128, 17, 5),
    "more than a chain": (2, 1100, 9, 7),
    "several chunks": (700, 16, 300, 50),
    "a sample larger than a chunk": (2, 3000, 360, 5),
    "several tiles": (3, 5, 300, 110),
    "thousands of samples of one position": (5000, 1, 16, 8),
    "thousands of samples of two positions": (4800, 2, 16, 8),
    "one lane, one row": (40, 3, 1, 1),
}
CONV = {  # samples, in, out, size, kernel, stride, padding, dilation, groups
    "read in place": (9, 5, 40, (9, 7), (3, 2), (1, 1), (0, 0), (1, 1), 1),
    "padded": (9, 5, 33, (9, 7), (3, 3), (2, 1), (1, 2), (1, 2), 1),
    "one position": (40, 6, 20, (3, 3), (3, 3), (1, 1), (0, 0), (1, 1), 1),
    "more than a chain": (2, 3, 17, (30, 31), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "several chunks, read in place": (300, 5, 20, (7, 7), (3, 3), (1, 1), (0, 0), (1, 1), 1),
    "several chunks": (300, 40, 70, (12, 12), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "two groups": (5, 8, 36, (6, 6), (3, 3), (1, 1), (1, 1), (1, 1), 2),
    "depthwise": (19, 40, 40, (9, 8), (3, 3), (1, 1), (1, 1), (1, 1), 40),
    "depthwise, more than a chain": (3, 17, 17, (30, 30), (3, 3), (1, 1), (1, 1), (1, 1), 17),
    "depthwise, many taps, strided": (3, 18, 54, (15, 14), (5, 4), (2, 3), (2, 2), (2, 1), 18),
    "depthwise, slices of samples, many taps": (70, 16, 16, (7, 7), (4, 4), (1, 1), (2, 2), (1, 1), 16),
    "groups of several channels": (4, 48, 80, (7, 7), (3, 3), (1, 1), (0, 1), (1, 1), 16),
    "half the lanes filled with groups": (4, 8, 64, (5, 5), (2, 2), (1, 1), (1, 0), (1, 1), 8),
    "groups whose images leave the cache": (3, 512, 8, (16, 16), (1, 1), (1, 1), (0, 0), (1, 1), 8),
    "too few groups for the lanes": (4, 6, 6, (5, 5), (2, 2), (1, 1), (1, 0), (1, 1), 3),
}


def linear(name: str) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    n, t, d, p = LINEAR[name]
    return (p, d), (torch.randn(n, t, d), torch.randn(n, t, p))


def conv(name: str) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    n, ci, co, size, kernel, stride, padding, dilation, groups = CONV[name]
    positions = [
        (s + 2 * p - d * (k - 1) - 1) // step + 1
        for s, k, step, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    ]
    geometry = (list(stride), list(padding), list(dilation), groups)
    return (co, ci // groups, *kernel), (torch.randn(n, ci, *size), torch.randn(n, co, *positions), *geometry)


def cast(args: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    return tuple(a.to(dtype) if isinstance(a, Tensor) else a for a in args)


CASES = [("sq_grad_linear", name) for name in LINEAR] + [("sq_grad_conv2d", name) for name in CONV]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "name"), CASES)
def test_equals_the_reference(op: str, name: str, dtype: torch.dtype) -> None:
    """Float64 to its last digits; others to twice the error of torch's float32 on the same rounded values, or to the
    rounding of one number."""
    torch.manual_seed(0)
    shape, args = linear(name) if op == "sq_grad_linear" else conv(name)
    args = cast(args, dtype)
    of = getattr(reference, op)
    expected = of(torch.zeros(shape, dtype=torch.float64), *cast(args, torch.float64))
    if dtype == torch.float64:
        ours = getattr(ops, op)(torch.ones(shape, dtype=dtype), *args) - 1
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
        return
    ours = getattr(ops, op)(torch.zeros(shape), *args)
    torch.testing.assert_close(getattr(ops, op)(ours.clone(), *args), 2 * ours, rtol=1e-5, atol=1e-6)
    theirs = of(torch.zeros(shape), *cast(args, torch.float32))
    error = (ours - expected).norm() / expected.norm()
    assert error <= 2 * (theirs - expected).norm() / expected.norm() + 1e-7


@pytest.mark.parametrize(("op", "name"), CASES)
def test_same_bits_for_any_number_of_threads(op: str, name: str) -> None:
    torch.manual_seed(0)
    shape, args = linear(name) if op == "sq_grad_linear" else conv(name)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(getattr(ops, op)(torch.zeros(shape), *args))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, name in CASES if name != "one lane, one row"])
def test_nan_stays_in_its_features(op: str, name: str) -> None:
    """NaN in one output feature's gradient reaches its weights and no other's; in an input feature, alike."""
    torch.manual_seed(0)
    shape, (input, grad, *geometry) = linear(name) if op == "sq_grad_linear" else conv(name)
    run = getattr(ops, op)
    clean = run(torch.zeros(shape), input, grad, *geometry)
    feature = -1 if op == "sq_grad_linear" else 1
    bad = grad.clone()
    bad.select(feature, -1).select(0, 0).fill_(torch.nan)
    dirty = run(torch.zeros(shape), input, bad, *geometry)
    assert dirty[-1].isnan().any()
    assert torch.equal(dirty[:-1], clean[:-1])
    bad = input.clone()
    bad.select(feature, -1).select(0, 0).fill_(torch.nan)
    dirty = run(torch.zeros(shape), bad, grad, *geometry)
    assert dirty[-1, -1].isnan().any()
    # The weights of the channel are the last of axis 1 in the rows of the last group.
    kept = torch.ones(shape, dtype=torch.bool)
    kept[-(shape[0] // (geometry[-1] if geometry else 1)) :, -1] = False
    assert torch.equal(dirty[kept], clean[kept])


def test_norms_biases_and_tables_have_the_same_bits_for_any_number_of_threads() -> None:
    torch.manual_seed(0)
    rows, planes, ids = torch.randn(2, 20, 7, 130), torch.randn(2, 9, 33, 70), torch.randint(50, (20, 7))
    runs = [
        lambda: ops.sq_grad_affine(torch.zeros(130), *rows, -1),
        lambda: ops.sq_grad_bias(torch.zeros(130), rows[0], -1),
        lambda: ops.sq_grad_affine(torch.zeros(33), *planes, 1),
        lambda: ops.sq_grad_embedding(torch.zeros(50, 130), ids, rows[0]),
    ]
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append([run() for run in runs])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_long_sums_are_as_close_as_torch() -> None:
    """A hundred thousand terms in one sum: chained, float32 would lose four digits and more."""
    torch.manual_seed(0)
    many, long, table = torch.rand(60_000, 8), torch.rand(4, 100_000, 8), torch.rand(1, 70_000, 8)
    ids = torch.zeros(1, 70_000, dtype=torch.int64)
    cases = [
        (ops.sq_grad_bias(torch.zeros(8), many, 1), lambda x: x(many).square().sum(0)),
        (ops.sq_grad_bias(torch.zeros(8), long, 2), lambda x: x(long).sum(1).square().sum(0)),
        (ops.sq_grad_bias(torch.zeros(8), long.mT.contiguous(), 1), lambda x: x(long).sum(1).square().sum(0)),
        (ops.sq_grad_embedding(torch.zeros(2, 8), ids, table)[0], lambda x: x(table).sum(1).square()[0]),
    ]
    for ours, by_torch in cases:
        exact = by_torch(Tensor.double)
        theirs = (by_torch(Tensor.float) - exact).norm()
        assert (ours - exact).norm() <= 2 * theirs + torch.finfo(torch.float32).eps / 2 * exact.norm()


@pytest.mark.parametrize("positions", [1, 3, 64, 5000])
@pytest.mark.parametrize("packed", [10, 10_000, 10_000_000])
def test_planner(positions: int, packed: int) -> None:
    plans = [ops._C.plan_sq_grad_cpu(2, 1000, positions, 70, 300, packed, 4, threads) for threads in (1, 2, 64)]
    for plan in plans:
        assert plan["row_tiles"] * plan["subtiles"] * 6 >= 70
        assert plan["lane_tiles"] * plan["panels"] * 32 >= 300
        assert plan["chunk"] % plan["block"] == 0 and plan["block"] <= 16
        assert plan["chunk"] == plan["block"] or (plan["chunk"] <= 256 and plan["chunk"] * packed * 4 <= 4 << 20)
        # Bits depend on these two, which therefore do not depend on the number of threads.
        assert (plan["chunk"], plan["block"]) == (plans[0]["chunk"], plans[0]["block"])
    tasks = [plan["row_tiles"] * plan["lane_tiles"] for plan in plans]
    assert tasks == sorted(tasks) and tasks[-1] > tasks[0]


def test_an_image_padded_beyond_what_offsets_hold_is_refused() -> None:
    x = torch.zeros(1, 1, 1, 1)
    with pytest.raises(RuntimeError, match=r"padded to 46401 x 46401"):
        ops.sq_grad_conv2d(torch.zeros(1, 1, 1, 1), x, torch.zeros(1, 1, 3, 3), (23200, 23200), (23200, 23200))


@pytest.mark.parametrize(("outer", "channels", "inner"), [(3, 37, 1), (40, 5, 1), (1, 5, 130), (2, 17, 2100)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_and_biases(outer: int, channels: int, inner: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    normalized, grad = torch.randn(2, 6, outer, channels, inner).to(dtype)
    exact = (normalized.double() * grad.double()).sum((1, 3)).square().sum(0), grad.double().sum((1, 3)).square().sum(0)
    single = (normalized.float() * grad.float()).sum((1, 3)).square().sum(0), grad.float().sum((1, 3)).square().sum(0)
    out = torch.zeros(channels, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    ours = ops.sq_grad_affine(out.clone(), normalized, grad, 2), ops.sq_grad_bias(out.clone(), grad, 2)
    for mine, true, theirs in zip(ours, exact, single, strict=True):
        if dtype == torch.float64:
            torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-12)
        else:
            assert (mine - true).norm() <= 2 * (theirs - true).norm() + 1e-7 * true.norm()
