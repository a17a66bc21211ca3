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
    "one lane, one row": (40, 3, 1, 1),
}
CONV = {  # samples, in, out, size, kernel, stride, padding, dilation, groups
    "read in place": (9, 5, 40, (9, 7), (3, 2), (1, 1), (0, 0), (1, 1), 1),
    "padded": (9, 5, 33, (9, 7), (3, 3), (2, 1), (1, 2), (1, 2), 1),
    "one position": (40, 6, 20, (3, 3), (3, 3), (1, 1), (0, 0), (1, 1), 1),
    "more than a chain": (2, 3, 17, (30, 31), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "several chunks": (300, 40, 70, (12, 12), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "two groups": (5, 8, 36, (6, 6), (3, 3), (1, 1), (1, 1), (1, 1), 2),
    "depthwise": (19, 40, 40, (9, 8), (3, 3), (1, 1), (1, 1), (1, 1), 40),
    "depthwise, more than a chain": (3, 17, 17, (30, 30), (3, 3), (1, 1), (1, 1), (1, 1), 17),
    "depthwise, many taps, strided": (3, 18, 54, (15, 14), (5, 4), (2, 3), (2, 2), (2, 1), 18),
    "groups of several channels": (4, 48, 80, (7, 7), (3, 3), (1, 1), (0, 1), (1, 1), 16),
    "half the lanes filled with groups": (4, 8, 64, (5, 5), (2, 2), (1, 1), (1, 0), (1, 1), 8),
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
    """Float64 to its last digits; others to twice the error of torch's float32 on the same rounded values."""
    torch.manual_seed(0)
    shape, args = linear(name) if op == "sq_grad_linear" else conv(name)
    args = cast(args, dtype)
    of = getattr(reference, op)
    expected = of(torch.zeros(shape, dtype=torch.float64), *cast(args, torch.float64))
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    ours = getattr(ops, op)(torch.ones(shape, dtype=sums), *args) - 1
    if dtype == torch.float64:
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
        return
    ours = getattr(ops, op)(torch.zeros(shape), *args)
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


@pytest.mark.parametrize(("op", "name"), CASES)
def test_a_bad_sample_stays_in_its_features(op: str, name: str) -> None:
    """NaN in one output feature's gradient reaches that feature's weights, and no other's."""
    torch.manual_seed(0)
    shape, args = linear(name) if op == "sq_grad_linear" else conv(name)
    grad = args[1]
    clean = getattr(ops, op)(torch.zeros(shape), *args)
    feature = (0, 0, -1) if op == "sq_grad_linear" else (0, -1, 0, 0)
    grad[feature] = torch.nan
    dirty = getattr(ops, op)(torch.zeros(shape), *args)
    assert dirty[-1].isnan().any()
    assert torch.equal(dirty[:-1], clean[:-1])


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
