"""Every operator on every back end against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import Backend
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fastunlearn import _library, ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACCUMULATING = ["sq_grad_linear", "sq_grad_conv2d", "sq_grad_affine", "sq_grad_bias", "sq_grad_embedding"]


@dataclass(frozen=True)
class Case:
    """Arguments of an accumulating operator after ``out``; the tensors among them are floats or indices."""

    op: str
    shape: tuple[int, ...]  # of out
    args: tuple[Any, ...]

    def cast(self, dtype: torch.dtype, device: str = "cpu") -> tuple[Any, ...]:
        return self.cast_of(self.args, dtype, device)

    @staticmethod
    def cast_of(args: tuple[Any, ...], dtype: torch.dtype, device: str = "cpu") -> tuple[Any, ...]:
        def one(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.to(device, dtype) if value.is_floating_point() else value.to(device)

        return tuple(map(one, args))


def linear(n: int, t: tuple[int, ...], d: int, p: int) -> Case:
    return Case("sq_grad_linear", (p, d), (torch.randn(n, *t, d), torch.randn(n, *t, p)))


def conv(
    n: int,
    channels: tuple[int, int],
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Case:
    shape = (channels[1], channels[0] // groups, *kernel)
    x = torch.randn(n, channels[0], *size)
    positions = F.conv2d(x[:1], torch.zeros(shape), None, stride, padding, dilation, groups).shape[2:]
    g = torch.randn(n, channels[1], *positions)
    return Case("sq_grad_conv2d", shape, (x, g, list(stride), list(padding), list(dilation), groups))


def affine(*shape: int, channel_dim: int = -1) -> Case:
    return Case("sq_grad_affine", (shape[channel_dim],), (torch.randn(shape), torch.randn(shape), channel_dim))


def bias(*shape: int, channel_dim: int = -1) -> Case:
    return Case("sq_grad_bias", (shape[channel_dim],), (torch.randn(shape), channel_dim))


def embedding(n: int, t: tuple[int, ...], rows: int, d: int, padding_idx: int | None = None) -> Case:
    return Case("sq_grad_embedding", (rows, d), (torch.randint(rows, (n, *t)), torch.randn(n, *t, d), padding_idx))


CASES: dict[str, Callable[[], Case]] = {
    "linear 2-d": lambda: linear(5, (), 7, 3),
    "linear one sample": lambda: linear(1, (9,), 5, 4),
    "linear one position": lambda: linear(33, (1,), 66, 65),
    "linear more samples than a panel": lambda: linear(130, (), 5, 4),
    "linear two leading axes": lambda: linear(3, (2, 5), 6, 7),
    "linear tile": lambda: linear(2, (16,), 64, 64),
    "linear tile + 1": lambda: linear(2, (17,), 65, 65),
    "linear tile - 1": lambda: linear(2, (15,), 63, 63),
    "linear long": lambda: linear(2, (300,), 10, 11),
    "linear one by one": lambda: linear(4, (3,), 1, 1),
    "linear many samples": lambda: linear(40, (3,), 5, 6),
    "linear no samples": lambda: linear(0, (3,), 5, 6),
    "linear no positions": lambda: linear(3, (0,), 5, 6),
    "linear no features": lambda: linear(3, (2,), 0, 6),
    "conv": lambda: conv(3, (4, 5), (7, 6), (3, 3)),
    "conv 1x1": lambda: conv(2, (5, 6), (4, 4), (1, 1)),
    "conv one position": lambda: conv(6, (3, 4), (3, 2), (3, 2)),
    "conv everything": lambda: conv(2, (6, 9), (11, 8), (3, 2), (2, 1), (1, 2), (2, 3), 3),
    "conv depthwise": lambda: conv(2, (8, 8), (6, 6), (3, 3), padding=(1, 1), groups=8),
    "conv more than a tile": lambda: conv(2, (8, 66), (5, 5), (3, 3), padding=(1, 1)),
    "conv no samples": lambda: conv(0, (2, 2), (4, 4), (3, 3)),
    "affine channels last": lambda: affine(3, 5, 33),
    "affine no positions between": lambda: affine(4, 6),
    "affine channels first": lambda: affine(3, 9, 5, 7, channel_dim=1),
    "affine in the middle": lambda: affine(2, 3, 4, 5, channel_dim=2),
    "affine long": lambda: affine(2, 300, 33),
    "affine long rows": lambda: affine(2, 33, 40, 41, channel_dim=1),
    "affine many samples": lambda: affine(50, 2, 3),
    "bias": lambda: bias(3, 5, 34),
    "bias 2-d": lambda: bias(9, 33),
    "bias conv": lambda: bias(2, 9, 4, 5, channel_dim=1),
    "bias no samples": lambda: bias(0, 3, 4),
    "embedding": lambda: embedding(3, (6,), 4, 5),
    "embedding wide": lambda: embedding(2, (3,), 3, 130),
    "embedding padding": lambda: embedding(3, (2, 3), 5, 4, padding_idx=2),
    "embedding padding from the end": lambda: embedding(3, (6,), 5, 4, padding_idx=-1),
    "embedding 1-d": lambda: embedding(5, (), 4, 3),
    "embedding unused rows": lambda: embedding(2, (2,), 50, 3),
    "embedding no samples": lambda: embedding(0, (2,), 3, 3),
}


def error(value: Tensor, exact: Tensor) -> float:
    return float((value.double().cpu() - exact).norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_error_is_at_most_twice_that_of_torch(backend: Backend, name: str, dtype: torch.dtype) -> None:
    """Against float64, on the same rounded inputs; torch's own is the reference computed in the accumulator's dtype."""
    torch.manual_seed(0)
    case = CASES[name]()
    inputs = case.cast(dtype)
    start = torch.rand(case.shape)
    definition = getattr(reference, case.op)
    exact = definition(start.double(), *Case(case.op, case.shape, inputs).cast(torch.float64))
    theirs = by_torch(backend, case, inputs, start)
    out = start.clone().to(backend.device)
    backend(case.op, out, *case.cast(dtype, backend.device))
    # One rounding of the result itself is free: torch may be exact by luck on a tiny case.
    unit = float(exact.norm()) * torch.finfo(out.dtype).eps / 2
    assert error(out, exact) <= 2 * error(theirs, exact) + unit


@pytest.mark.parametrize("name", CASES)
def test_float64_is_kept_in_float64(backend: Backend, name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]()
    expected = getattr(reference, case.op)(torch.zeros(case.shape, dtype=torch.float64), *case.cast(torch.float64))
    out = torch.zeros(case.shape, dtype=torch.float64, device=backend.device)
    backend(case.op, out, *case.cast(torch.float64, backend.device))
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_repetition_gives_the_same_bits(backend: Backend, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    case = CASES[name]()
    args = case.cast(torch.float32, backend.device)
    results = []
    for order in ("forward", "reverse"):  # only the emulated GPU reads it
        monkeypatch.setenv("FASTUNLEARN_EMULATOR_ORDER", order)
        results.append(torch.zeros(case.shape, device=backend.device))
        backend(case.op, results[-1], *args)
    assert torch.equal(*results)


@pytest.mark.parametrize("op", ACCUMULATING)
def test_inputs_need_not_be_contiguous(backend: Backend, op: str) -> None:
    torch.manual_seed(0)
    case = next(build() for build in CASES.values() if build().op == op)
    out = torch.zeros(case.shape)
    strided = [
        v.transpose(0, -1).contiguous().transpose(0, -1).to(backend.device) if isinstance(v, Tensor) else v
        for v in case.args
    ]
    expected = getattr(reference, op)(out.double(), *case.cast(torch.float64))
    actual = out.to(backend.device)
    backend(op, actual, *strided)
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=1e-5, atol=1e-6)


def test_overlapping_inputs_are_read_as_they_look(backend: Backend) -> None:
    """An expanded gradient has one copy in memory and many in meaning."""
    g = torch.randn(3, 1, 4).expand(3, 5, 4)
    x = torch.randn(3, 5, 6)
    out = torch.zeros(4, 6, device=backend.device)
    backend("sq_grad_linear", out, x.to(backend.device), g.to(backend.device))
    expected = reference.sq_grad_linear(torch.zeros(4, 6, dtype=torch.float64), x, g)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_value_stays_in_its_own_outputs(backend: Backend, bad: float) -> None:
    """Output features and channels that never meet the value are as without it."""
    torch.manual_seed(0)
    x, g = torch.randn(3, 5, 70), torch.randn(3, 5, 66)
    clean = torch.zeros(66, 70, device=backend.device)
    backend("sq_grad_linear", clean, x.to(backend.device), g.to(backend.device))
    g[1, 2, 3] = bad
    out = torch.zeros(66, 70, device=backend.device)
    backend("sq_grad_linear", out, x.to(backend.device), g.to(backend.device))
    others = [p for p in range(66) if p != 3]
    assert torch.equal(out[others], clean[others])
    assert not out[3].isfinite().any()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_convolution(backend: Backend, data: st.DataObject) -> None:
    """Random geometry, against the reference."""
    draw = data.draw
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    groups, kernel, stride, dilation = draw(st.integers(1, 3)), draw(pair), draw(pair), draw(pair)
    padding = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    size = tuple(max(1, dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i]) + draw(st.integers(0, 4)) for i in range(2))
    channels = (groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3)))
    case = conv(draw(st.integers(1, 3)), channels, size, kernel, stride, padding, dilation, groups)
    out = torch.zeros(case.shape, dtype=torch.float64, device=backend.device)
    backend(case.op, out, *case.cast(torch.float64, backend.device))
    expected = reference.sq_grad_conv2d(torch.zeros(case.shape, dtype=torch.float64), *case.cast(torch.float64))
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(n=st.integers(0, 5), t=st.integers(0, 40), d=st.integers(1, 70), p=st.integers(1, 70))
def test_any_linear(backend: Backend, n: int, t: int, d: int, p: int) -> None:
    case = linear(n, (t,), d, p)
    out = torch.zeros(case.shape, dtype=torch.float64, device=backend.device)
    backend(case.op, out, *case.cast(torch.float64, backend.device))
    expected = reference.sq_grad_linear(torch.zeros(case.shape, dtype=torch.float64), *case.cast(torch.float64))
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-12, atol=1e-12)


# ---- tensor cores: kernel, operands. The emulated GPU has four multiprocessors.

MMA_CASES: dict[str, tuple[str, Callable[[], Case]]] = {
    "two positions": ("mma", lambda: linear(3, (2,), 64, 64)),
    "step - 1": ("mma", lambda: linear(2, (15,), 63, 65)),
    "step": ("mma", lambda: linear(2, (16,), 72, 64)),
    "step + 1": ("mma", lambda: linear(2, (17,), 65, 63)),
    "stage + 1": ("mma", lambda: linear(2, (33,), 64, 8)),
    "one long sample": ("mma", lambda: linear(1, (130,), 64, 72)),
    "one unaligned sample": ("mma", lambda: linear(1, (130,), 7, 9)),
    "rows of 8 bytes": ("mma", lambda: linear(2, (20,), 68, 12)),
    "rows of 4 bytes": ("mma", lambda: linear(2, (20,), 66, 10)),
    "only the input is aligned": ("mma", lambda: linear(2, (20,), 64, 67)),
    "only the gradient is aligned": ("mma", lambda: linear(2, (20,), 67, 64)),
    "splits": ("mma", lambda: linear(40, (3,), 24, 16)),
    "splits of blocks of samples": ("mma", lambda: linear(205, (2,), 24, 17)),
    "one split of blocks of samples": ("mma", lambda: linear(40, (2,), 200, 200)),
    "wide": ("mma_wide", lambda: linear(2, (17,), 384, 384)),
    "wide tile + 1": ("mma_wide", lambda: linear(2, (34,), 385, 257)),
    "wide tile - 1": ("mma_wide", lambda: linear(1, (5,), 511, 255)),
    "wide blocks of samples": ("mma_wide", lambda: linear(35, (2,), 392, 264)),
    "tall patches": ("mma_tall", lambda: conv(3, (8, 66), (9, 7), (3, 3), padding=(1, 1))),
    "patches": ("mma", lambda: conv(2, (7, 63), (5, 7), (3, 2))),
    "patches of aligned planes": ("mma", lambda: conv(2, (8, 16), (8, 8), (3, 3), padding=(1, 1))),
    "patches of groups": ("mma", lambda: conv(2, (12, 24), (12, 9), (3, 2), (2, 1), (1, 2), (1, 2), 2)),
    "patches, blocks of samples": ("mma_tall", lambda: conv(18, (16, 260), (4, 3), (3, 3), padding=(1, 1))),
    "strided pixels": ("mma", lambda: conv(2, (20, 24), (7, 9), (1, 1), (2, 2))),
    "aligned pixels": ("mma", lambda: conv(3, (20, 24), (4, 8), (1, 1))),
    "unaligned pixels of groups": ("mma", lambda: conv(3, (40, 66), (5, 5), (1, 1), groups=2)),
    "tall aligned pixels": ("mma_tall", lambda: conv(2, (16, 130), (4, 8), (1, 1))),
    "tall pixels of 8 bytes": ("mma_tall", lambda: conv(2, (9, 65), (6, 6), (1, 1))),
    "tall unaligned pixels": ("mma_tall", lambda: conv(2, (9, 65), (3, 3), (1, 1))),
    "depthwise": ("direct", lambda: conv(3, (8, 8), (9, 9), (3, 3), padding=(1, 1), groups=8)),
    "depthwise, 25 taps": ("direct", lambda: conv(2, (3, 3), (8, 9), (5, 5), (2, 1), (2, 2), groups=3)),
    "depthwise, two outputs each": ("direct", lambda: conv(2, (4, 8), (6, 7), (3, 2), dilation=(2, 3), groups=4)),
    "depthwise, blocks of samples": ("direct", lambda: conv(34, (130, 130), (4, 4), (3, 3), groups=130)),
}
MMA_DTYPES = ["bfloat16", "float16", "tf32"]


@pytest.fixture(params=MMA_DTYPES)
def mma_dtype(request: pytest.FixtureRequest) -> Any:
    """A dtype that tensor cores take; float32 with TF32 allowed."""
    before = torch.get_float32_matmul_precision()
    if request.param == "tf32":
        torch.set_float32_matmul_precision("high")
        yield torch.float32
        torch.set_float32_matmul_precision(before)
    else:
        yield getattr(torch, request.param)


def to_tf32(value: Any) -> Any:
    """The nearest float32 with 10 bits of mantissa, ties away from zero, as TF32 is rounded."""
    if not (isinstance(value, Tensor) and value.dtype == torch.float32):
        return value
    return ((value.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def assert_twice_as_good_as_torch(backend: Backend, case: Case, dtype: torch.dtype) -> None:
    """The rule of test_error_is_at_most_twice_that_of_torch, also where float32 may be TF32."""
    inputs = case.cast(dtype)
    definition = getattr(reference, case.op)
    exact = definition(torch.zeros(case.shape, dtype=torch.float64), *case.cast_of(inputs, torch.float64))
    theirs = by_torch(backend, case, inputs)
    out = torch.zeros(case.shape, device=backend.device)
    backend(case.op, out, *case.cast_of(inputs, dtype, backend.device))
    unit = float(exact.norm()) * torch.finfo(out.dtype).eps / 2
    assert error(out, exact) <= 2 * error(theirs, exact) + unit


def by_torch(backend: Backend, case: Case, inputs: tuple[Any, ...], start: Tensor | None = None) -> Tensor:
    """The reference in the accumulator's dtype, on tensor cores where ours runs on them.

    They cut sums off where other cores round. TF32 holds every bfloat16 and float16, so that torch's matrix product
    in TF32 has exact products too, and that one weakness in common with ours. Without a GPU, TF32 is float32 on
    rounded inputs.
    """
    tf32 = torch.get_float32_matmul_precision() != "highest"
    rounded = inputs[0].dtype == torch.float32 and tf32
    on_tensor_cores = rounded or inputs[0].dtype in (torch.bfloat16, torch.float16)
    values = tuple(map(to_tf32, inputs)) if rounded else inputs
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if backend.name == "cuda" and on_tensor_cores else "highest")
    try:
        out = torch.zeros(case.shape) if start is None else start.clone()
        on_device = case.cast_of(values, inputs[0].dtype, backend.device)
        return getattr(reference, case.op)(out.to(backend.device), *on_device)
    finally:
        torch.set_float32_matmul_precision(before)


def kernel_of(case: Case) -> str:
    """What the emulated GPU runs."""
    x, g = case.args[:2]
    if case.op == "sq_grad_linear":
        shape = (1, x.shape[0], x.shape[1:-1].numel(), *case.shape)
    else:
        groups = case.args[-1]
        shape = (groups, x.shape[0], g.shape[2:].numel(), case.shape[0] // groups, torch.Size(case.shape[1:]).numel())
    return str(plan(*shape, convolution=case.op == "sq_grad_conv2d", multiprocessors=4)["kernel"])


@pytest.mark.parametrize("name", MMA_CASES)
def test_tensor_core_error_is_at_most_twice_that_of_torch(backend: Backend, name: str, mma_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    kernel, build = MMA_CASES[name]
    case = build()
    assert kernel_of(case) == kernel
    assert_twice_as_good_as_torch(backend, case, mma_dtype)


@pytest.mark.parametrize("name", MMA_CASES)
def test_tensor_cores_repeat_their_bits(
    backend: Backend, name: str, mma_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    case = MMA_CASES[name][1]()
    results = []
    for order in ("forward", "reverse"):
        monkeypatch.setenv("FASTUNLEARN_EMULATOR_ORDER", order)
        results.append(torch.zeros(case.shape, device=backend.device))
        backend(case.op, results[-1], *case.cast(mma_dtype, backend.device))
    assert torch.equal(*results)


def test_float32_is_exact_unless_tf32_is_allowed(backend: Backend) -> None:
    """1 + 2^-12 has no TF32."""
    case = Case("sq_grad_linear", (8, 8), (torch.full((1, 2, 8), 1 + 2**-12), torch.ones(1, 2, 8)))
    fine, coarse = torch.zeros(2, 8, 8, device=backend.device)
    backend(case.op, fine, *case.cast(torch.float32, backend.device))
    torch.set_float32_matmul_precision("high")
    try:
        backend(case.op, coarse, *case.cast(torch.float32, backend.device))
    finally:
        torch.set_float32_matmul_precision("highest")
    exact = 4 * (1 + 2**-12) ** 2
    assert torch.allclose(fine.cpu(), torch.tensor(exact), rtol=1e-7, atol=0)
    assert torch.equal(coarse.cpu(), fine.cpu() if backend.name == "cpu" else torch.full((8, 8), 4.0))


def test_a_row_may_begin_anywhere(backend: Backend, mma_dtype: torch.dtype) -> None:
    """Rows of 16 bytes that are not aligned to 16."""
    torch.manual_seed(0)
    x, g = torch.randn(2 * 5 * 16 + 1), torch.randn(2 * 5 * 24 + 1)
    expected, out = torch.zeros(2, 24, 16, device=backend.device)
    args = x[1:].view(2, 5, 16), g[1:].view(2, 5, 24)
    case = Case("sq_grad_linear", (24, 16), args)
    backend(case.op, expected, *case.cast(mma_dtype, backend.device))
    x, g = (flat.to(backend.device, mma_dtype) for flat in (x, g))
    backend(case.op, out, x[1:].view(2, 5, 16), g[1:].view(2, 5, 24))
    assert torch.equal(out, expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["step + 1", "wide", "patches", "tall patches", "aligned pixels", "depthwise"])
def test_tensor_cores_keep_a_bad_value_in_its_own_outputs(
    backend: Backend, name: str, bad: float, mma_dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    case = MMA_CASES[name][1]()
    clean = torch.zeros(case.shape, device=backend.device)
    backend(case.op, clean, *case.cast(mma_dtype, backend.device))
    g = case.args[1]
    if case.op == "sq_grad_linear":
        g[1, 2, 3] = bad
    else:
        g[1, 3, 1, 2] = bad
    out = torch.zeros(case.shape, device=backend.device)
    backend(case.op, out, *case.cast(mma_dtype, backend.device))
    others = [p for p in range(case.shape[0]) if p != 3]
    assert torch.equal(out[others], clean[others])
    assert not out[3].isfinite().any()


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(n=st.integers(0, 4), t=st.integers(1, 40), d=st.integers(1, 140), p=st.integers(1, 140), seed=st.integers(0, 99))
def test_any_linear_on_tensor_cores(
    backend: Backend, mma_dtype: torch.dtype, n: int, t: int, d: int, p: int, seed: int
) -> None:
    torch.manual_seed(seed)
    assert_twice_as_good_as_torch(backend, linear(n, (t,), d, p), mma_dtype)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_convolution_on_tensor_cores(backend: Backend, mma_dtype: torch.dtype, data: st.DataObject) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 99)))
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    groups, kernel, stride, dilation = draw(st.integers(1, 3)), draw(pair), draw(pair), draw(pair)
    padding = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    size = tuple(max(1, dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i]) + draw(st.integers(0, 9)) for i in range(2))
    channels = (groups * draw(st.integers(1, 20)), groups * draw(st.integers(1, 70)))
    case = conv(draw(st.integers(1, 3)), channels, size, kernel, stride, padding, dilation, groups)
    assert_twice_as_good_as_torch(backend, case, mma_dtype)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


REFUSED: dict[str, tuple[str, tuple[Any, ...], str]] = {
    "features": ("sq_grad_linear", (zeros(3, 4), zeros(2, 5), zeros(2, 3)), r"expected \[3, 5\]"),
    "leading axes": ("sq_grad_linear", (zeros(3, 4), zeros(2, 4), zeros(5, 3)), "leading axes"),
    "axes": ("sq_grad_linear", (zeros(3, 4), zeros(4), zeros(3)), "leading axes"),
    "dtypes differ": (
        "sq_grad_linear",
        (zeros(3, 4), zeros(2, 4), zeros(2, 3, dtype=torch.bfloat16)),
        "one dtype",
    ),
    "integer inputs": (
        "sq_grad_linear",
        (zeros(3, 4), zeros(2, 4, dtype=torch.int64), zeros(2, 3)),
        "float32, bfloat16",
    ),
    "half sums": (
        "sq_grad_linear",
        (zeros(3, 4, dtype=torch.float16), zeros(2, 4), zeros(2, 3)),
        "sums of squares are kept in float32",
    ),
    "float64 into float32": (
        "sq_grad_linear",
        (zeros(3, 4), zeros(2, 4, dtype=torch.float64), zeros(2, 3, dtype=torch.float64)),
        "sums are kept in Double",
    ),
    "out not contiguous": ("sq_grad_linear", (zeros(4, 3).T, zeros(2, 4), zeros(2, 3)), "must be contiguous"),
    "out overlaps itself": (
        "sq_grad_linear",
        (zeros(3, 1).expand(3, 4), zeros(2, 4), zeros(2, 3)),
        "contiguous",
    ),
    "positions": (
        "sq_grad_conv2d",
        (zeros(2, 3, 3, 3), zeros(1, 3, 5, 5), zeros(1, 2, 4, 3), [1, 1], [0, 0], [1, 1], 1),
        "give 3 x 3 positions",
    ),
    "groups": (
        "sq_grad_conv2d",
        (zeros(2, 3, 1, 1), zeros(1, 3, 2, 2), zeros(1, 2, 2, 2), [1, 1], [0, 0], [1, 1], 2),
        "groups = 2 must divide",
    ),
    "stride": (
        "sq_grad_conv2d",
        (zeros(2, 3, 1, 1), zeros(1, 3, 2, 2), zeros(1, 2, 2, 2), [0, 1], [0, 0], [1, 1], 1),
        "must be positive",
    ),
    "channel axis": ("sq_grad_bias", (zeros(3), zeros(3, 4), 0), "after the first"),
    "channels": ("sq_grad_bias", (zeros(3), zeros(2, 4), -1), r"expected \[4\]"),
    "normalized": ("sq_grad_affine", (zeros(4), zeros(2, 5), zeros(2, 4), -1), "grad_output is"),
    "index": (
        "sq_grad_embedding",
        (zeros(3, 2), torch.tensor([[0, 3]]), zeros(1, 2, 2), None),
        "run from 0 to 3 but out has 3 rows",
    ),
    "padding": ("sq_grad_embedding", (zeros(3, 2), torch.tensor([0]), zeros(1, 2), 3), "padding_idx = 3"),
    "float indices": ("sq_grad_embedding", (zeros(3, 2), zeros(1), zeros(1, 2), None), "int64 or int32"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_arguments_are_refused_with_the_reason(backend: Backend, name: str) -> None:
    if name == "index" and backend.name == "cuda":
        pytest.skip("on a GPU a bad index traps in the kernel and takes the process's GPU with it")
    op, args, message = REFUSED[name]
    args = tuple(a.to(backend.device) if isinstance(a, Tensor) else a for a in args)
    with pytest.raises(RuntimeError, match=message):
        backend(op, *args)
    assert not args[0].any()


def test_memory_shared_with_the_result_is_refused(backend: Backend) -> None:
    out = torch.zeros(3, 3, device=backend.device)
    with pytest.raises(RuntimeError, match="shares memory with out"):
        backend("sq_grad_linear", out, out, torch.zeros(3, 3, device=backend.device))


@pytest.mark.parametrize("name", ["linear 2-d", "conv", "affine channels last", "bias", "embedding padding"])
def test_opcheck(name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]()
    for device in ("cpu", *(("cuda",) if torch.cuda.is_available() else ())):
        args = (torch.zeros(case.shape, device=device), *case.cast(torch.float32, device))
        torch.library.opcheck(getattr(torch.ops.fastunlearn, case.op).default, args)


@pytest.mark.parametrize("op", ACCUMULATING)
def test_compiles_without_a_break(op: str) -> None:
    case = next(build() for build in CASES.values() if build().op == op)
    function = getattr(ops, op)
    compiled = torch.compile(lambda out, *args: function(out, *args) * 2, fullgraph=True, backend="aot_eager")
    expected = 2 * function(torch.zeros(case.shape), *case.args)
    torch.testing.assert_close(compiled(torch.zeros(case.shape), *case.args), expected)


def plan(
    groups: int,
    samples: int,
    positions: int,
    out_features: int,
    in_features: int,
    convolution: bool = False,
    tensor_cores: bool = True,
    multiprocessors: int = 132,
    max_shared_bytes: int = 227 * 1024,
) -> dict[str, Any]:
    return ops._C.plan_sq_grad(
        groups, samples, positions, out_features, in_features, convolution, tensor_cores, multiprocessors,
        max_shared_bytes,
    )  # fmt: skip


def test_planner_fills_the_gpu_and_no_more() -> None:
    # One tile on a GPU of 132 multiprocessors: as many splits as are worth their workspace.
    assert plan(1, 128, 9, 64, 27, tensor_cores=False) == {
        "kernel": "simt", "tiles_out": 1, "tiles_in": 1, "splits": 16, "samples_per_split": 8, "blocks": 16,
    }  # fmt: skip
    # More tiles than the GPU holds: none.
    assert plan(1, 128, 9, 4096, 4096, tensor_cores=False)["splits"] == 1
    assert plan(1, 128, 9, 4096, 4096)["splits"] == 1
    for options in ({"tensor_cores": False}, {}, {"convolution": True}):
        # Never more splits than samples, and no split without one.
        for samples in range(1, 40):
            got = plan(1, samples, 9, 64, 64, **options)
            assert (got["splits"] - 1) * got["samples_per_split"] < samples <= got["splits"] * got["samples_per_split"]
        assert plan(1, 0, 9, 64, 64, **options)["blocks"] == 0
    assert plan(2**20, 1, 1, 2**16, 2**16, tensor_cores=False)["blocks"] == 2**20 * 2**10 * 2**10


def test_planner_chooses_the_kernel() -> None:
    def kernel(*shape: int, **options: Any) -> str:
        return str(plan(*shape, **options)["kernel"])

    assert kernel(1, 32, 128, 768, 768) == "mma"
    assert kernel(1, 32, 128, 768, 768, tensor_cores=False) == "simt"
    # Wide tiles from two for each multiprocessor on, where they fit into shared memory.
    assert kernel(1, 32, 128, 2048, 2176) == "mma_wide"  # 16 x 17
    assert kernel(1, 32, 128, 2048, 2048) == "mma"  # 16 x 16
    assert kernel(1, 32, 128, 4096, 4096) == "mma_wide"
    assert kernel(1, 32, 128, 4096, 4096, max_shared_bytes=99 * 1024) == "mma"
    assert kernel(1, 32, 128, 4096, 4096, tensor_cores=False) == "simt"
    # One position per sample has no product to accumulate.
    for options in ({}, {"tensor_cores": False}, {"convolution": True}):
        assert kernel(1, 32, 1, 768, 768, **options) == "pointwise"
    # Patches are gathered once for 128 output features, and a small group needs no tile.
    assert kernel(1, 32, 196, 64, 576, convolution=True) == "mma"
    assert kernel(1, 32, 196, 65, 576, convolution=True) == "mma_tall"
    assert kernel(1, 32, 196, 4096, 4096, convolution=True) == "mma_tall"
    assert kernel(1, 32, 196, 4096, 4096, convolution=True, max_shared_bytes=64 * 1024) == "mma"
    assert kernel(64, 32, 196, 1, 9, convolution=True) == "direct"
    assert kernel(64, 32, 196, 1, 9, convolution=True, tensor_cores=False) == "direct"
    assert kernel(32, 32, 196, 4, 32, convolution=True) == "direct"  # 128 outputs
    assert kernel(32, 32, 196, 4, 36, convolution=True) == "mma"
    assert kernel(32, 32, 196, 4, 36, convolution=True, tensor_cores=False) == "simt"
    assert kernel(1, 32, 196, 1, 9) == "mma"


def test_planner_of_the_direct_kernel_gives_every_sixteen_outputs_a_warp() -> None:
    got = plan(512, 256, 196, 1, 25, convolution=True)
    assert (got["tiles_out"], got["tiles_in"]) == (1, 2)  # 25 taps are two warps
    assert got["splits"] == 4  # 4 blocks of 8 warps for each of 132 multiprocessors
    assert got["blocks"] == 512 * 2 * 4 // 8
    assert plan(3, 1, 4, 1, 1, convolution=True)["blocks"] == 1  # spare warps in one block


def test_channel_planner_covers_every_sample_once() -> None:
    for samples in (1, 7, 300, 5000):
        for inner in (1, 49):
            got = ops._C.plan_sq_grad_channels(samples, 4, 100, inner, 132)
            assert got["blocks"] == got["tiles"] * got["splits"]
            covered = got["splits"] * got["samples_per_split"]
            assert samples <= covered < samples + got["samples_per_split"]


def test_build_info_names_compiler_and_targets() -> None:
    info = ops._C.build_info()
    assert info["torch_target"] == "2.11"
    assert bool(info["cuda"]) == bool(info["cuda_architectures"])


def test_a_library_for_another_python_is_explained(tmp_path: Any) -> None:
    assert "not built" in _library._explain(tmp_path, "")
    (tmp_path / "_C.cpython-27-sparc.so").touch()
    assert "built for _C.cpython-27-sparc.so, this is Python" in _library._explain(tmp_path, "")
