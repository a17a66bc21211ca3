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
        def one(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.to(device, dtype) if value.is_floating_point() else value.to(device)

        return tuple(map(one, self.args))


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
    theirs = definition(start.clone(), *inputs)
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


def test_planner_fills_the_gpu_and_no_more() -> None:
    plan = ops._C.plan_sq_grad
    # One tile on a GPU of 132 multiprocessors: as many splits as are worth their workspace.
    assert plan(1, 128, 9, 64, 27, 132) == {
        "tiles_out": 1, "tiles_in": 1, "splits": 16, "samples_per_split": 8, "blocks": 16,
    }  # fmt: skip
    # More tiles than the GPU holds: none.
    assert plan(1, 128, 9, 4096, 4096, 132)["splits"] == 1
    # Never more splits than samples, and no split without one.
    for samples in range(1, 40):
        got = plan(1, samples, 9, 64, 64, 132)
        assert (got["splits"] - 1) * got["samples_per_split"] < samples <= got["splits"] * got["samples_per_split"]
    assert plan(1, 0, 9, 64, 64, 132)["blocks"] == 0
    assert plan(2**20, 1, 1, 2**16, 2**16, 132)["blocks"] == 2**20 * 2**10 * 2**10


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
