"""Second moments of rows and of patches, on every back end, against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import Backend
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastunlearn import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Pair = tuple[int, int]


@dataclass(frozen=True)
class Case:
    """A call of one of the two operators: gram [groups, d, d], then the rows or images, options and weights."""

    op: str
    groups: int
    d: int
    values: Tensor
    options: tuple[Any, ...] = ()
    weights: Tensor | None = None

    def zeros(self, dtype: torch.dtype, device: str = "cpu") -> Tensor:
        return torch.zeros(self.groups, self.d, self.d, dtype=dtype, device=device)

    def args(self, dtype: torch.dtype, device: str = "cpu") -> tuple[Any, ...]:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        weights = None if self.weights is None else self.weights.to(device, wide)
        return (self.values.to(device, dtype), *self.options, weights)

    def reference(self, gram: Tensor, values_as: torch.dtype) -> Tensor:
        """On the values as ``values_as`` rounds them, in the dtype of ``gram``."""
        function: Callable[..., Tensor] = getattr(reference, self.op)
        return function(gram, *self.args(values_as))


def rows(groups: int, n: int, d: int, weighted: bool = False) -> Case:
    weights = torch.randn(n) if weighted else None
    return Case("gram_accumulate_", groups, d, torch.randn(groups, n, d), weights=weights)


def conv(
    n: int,
    channels: int,
    size: Pair,
    kernel: Pair = (3, 3),
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    weighted: bool = False,
) -> Case:
    return Case(
        "gram_accumulate_conv2d_",
        groups,
        channels // groups * kernel[0] * kernel[1],
        torch.randn(n, channels, *size),
        (list(kernel), list(stride), list(padding), list(dilation)),
        torch.randn(n) if weighted else None,
    )


CASES: dict[str, Callable[[], Case]] = {
    "rows": lambda: rows(1, 50, 7),
    "rows groups": lambda: rows(3, 20, 5),
    "rows one": lambda: rows(1, 1, 6),
    "rows chunk + 1": lambda: rows(1, 4097, 9),
    "rows weighted": lambda: rows(2, 5000, 4, weighted=True),
    "rows none": lambda: rows(1, 0, 5),
    "conv": lambda: conv(3, 4, (7, 6)),
    "conv one image": lambda: conv(1, 3, (9, 9), padding=(1, 1)),
    "conv 1x1": lambda: conv(2, 5, (4, 4), (1, 1)),
    "conv one position": lambda: conv(20, 3, (3, 2), (3, 2)),
    "conv one column": lambda: conv(5, 3, (9, 2), (2, 2)),
    "conv stride": lambda: conv(3, 4, (9, 8), stride=(2, 3)),
    "conv dilation": lambda: conv(3, 3, (9, 11), dilation=(2, 3)),
    "conv padding": lambda: conv(2, 3, (4, 5), padding=(2, 1)),
    "conv padding wider than the image": lambda: conv(2, 2, (1, 2), (3, 5), (1, 2), (3, 6)),
    "conv everything": lambda: conv(2, 6, (11, 8), (3, 2), (2, 1), (1, 2), (2, 3), 3, weighted=True),
    "conv depthwise": lambda: conv(2, 20, (6, 6), padding=(1, 1), groups=20),
    "conv groups": lambda: conv(3, 12, (6, 5), padding=(1, 1), groups=2),
    "conv weighted": lambda: conv(7, 3, (6, 6), padding=(1, 1), weighted=True),
    "conv tile - 1": lambda: conv(2, 63, (5, 5), (1, 1)),
    "conv tile": lambda: conv(2, 64, (4, 4), (1, 1)),
    "conv tile + 1": lambda: conv(2, 65, (4, 4), (1, 1)),
    "conv panel + 1": lambda: conv(3, 49, (4, 4), (1, 1)),
    "conv two tiles + 1": lambda: conv(2, 97, (6, 6), (1, 1)),
    "conv three tiles": lambda: conv(2, 32, (5, 5), padding=(1, 1)),
    "conv more than a core's tiles": lambda: conv(2, 33, (12, 12), padding=(1, 1), weighted=True),
    "conv more than a core's tiles, groups": lambda: conv(3, 66, (5, 5), padding=(1, 1), groups=2),
    "conv layer - 1": lambda: conv(1, 20, (15, 17), (1, 1)),
    "conv layer + 1": lambda: conv(1, 20, (1, 257), (1, 1)),
    "conv long": lambda: conv(9, 1, (40, 40), (2, 2), weighted=True),
    "conv long, many features": lambda: conv(5, 33, (30, 30), padding=(1, 1)),
    "conv no images": lambda: conv(0, 2, (4, 4)),
}
CONVOLUTIONS = [name for name in CASES if name.startswith("conv")]


def error(value: Tensor, exact: Tensor) -> float:
    return float((value.double().cpu() - exact).norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_error_is_at_most_twice_that_of_torch(backend: Backend, name: str, dtype: torch.dtype) -> None:
    """Against float64, on the same rounded inputs; torch's own is the product of unfolded patches in float32."""
    torch.manual_seed(0)
    case = CASES[name]()
    start = case.zeros(torch.float32).uniform_()
    exact = case.reference(start.double(), dtype)
    theirs = case.reference(start.clone(), dtype)
    gram = start.clone().to(backend.device)
    backend(case.op, gram, *case.args(dtype, backend.device))
    # One rounding of the result itself is free: torch may be exact by luck on a tiny case.
    unit = float(exact.norm()) * torch.finfo(gram.dtype).eps / 2
    assert error(gram, exact) <= 2 * error(theirs, exact) + unit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_float64_master_holds_sums_as_good_as_torchs(backend: Backend, name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    case = CASES[name]()
    exact = case.reference(case.zeros(torch.float64), dtype)
    theirs = case.reference(case.zeros(torch.float32), dtype)
    gram = case.zeros(torch.float64, backend.device)
    backend(case.op, gram, *case.args(dtype, backend.device))
    unit = float(exact.norm()) * torch.finfo(torch.float32).eps / 2
    assert error(gram, exact) <= 2 * error(theirs, exact) + unit


@pytest.mark.parametrize("name", CASES)
def test_float64_is_kept_in_float64(backend: Backend, name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]()
    expected = case.reference(case.zeros(torch.float64), torch.float64)
    gram = case.zeros(torch.float64, backend.device)
    backend(case.op, gram, *case.args(torch.float64, backend.device))
    torch.testing.assert_close(gram.cpu(), expected, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_repetition_gives_the_same_bits(backend: Backend, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    case = CASES[name]()
    args = case.args(torch.float32, backend.device)
    results = []
    for order in ("forward", "reverse"):  # only the emulated GPU reads it
        monkeypatch.setenv("FASTUNLEARN_EMULATOR_ORDER", order)
        results.append(case.zeros(torch.float32, backend.device))
        backend(case.op, results[-1], *args)
    assert torch.equal(*results)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_number_of_threads_does_not_change_a_bit(threads: None, name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]()
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(case.zeros(torch.float64))
        ops.gram_accumulate_conv2d_(results[-1], *case.args(torch.float32))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("master", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_what_is_added_is_exactly_symmetric(backend: Backend, name: str, master: torch.dtype) -> None:
    torch.manual_seed(0)
    case = CASES[name]()
    gram = case.zeros(master, backend.device)
    for _ in range(2):
        backend(case.op, gram, *case.args(torch.float32, backend.device))
    assert torch.equal(gram, gram.mT)


def test_a_gram_that_is_not_symmetric_is_added_to_all_the_same(backend: Backend) -> None:
    torch.manual_seed(0)
    case = CASES["conv two tiles + 1"]()
    start = torch.randn(1, case.d, case.d, dtype=torch.float64)
    gram = start.clone().to(backend.device)
    backend(case.op, gram, *case.args(torch.float64, backend.device))
    torch.testing.assert_close(gram.cpu(), case.reference(start, torch.float64), rtol=1e-12, atol=1e-12)


def test_a_float64_master_does_not_drift(backend: Backend) -> None:
    """A thousand batches have the relative error of one."""
    case = conv(2, 2, (5, 5))
    args = case.args(torch.float32, backend.device)
    once, often = case.zeros(torch.float64, backend.device), case.zeros(torch.float64, backend.device)
    backend(case.op, once, *args)
    for _ in range(1000):
        backend(case.op, often, *args)
    torch.testing.assert_close(often, 1000 * once, rtol=1e-12, atol=0)


@pytest.mark.parametrize("op", ["gram_accumulate_", "gram_accumulate_conv2d_"])
def test_a_long_call_does_not_drift_either(backend: Backend, op: str) -> None:
    """All terms positive, so that a float32 sum would round ever more coarsely: sums of 4,096 are as good as one."""
    torch.manual_seed(0)
    n = 40 * 4096
    values = torch.rand(n, 2) if op == "gram_accumulate_" else torch.rand(n // 4096, 2, 64, 64)
    options = () if op == "gram_accumulate_" else ((1, 1),)
    function: Callable[..., Tensor] = getattr(reference, op)

    def relative_error(values: Tensor) -> float:
        exact = function(torch.zeros(1, 2, 2, dtype=torch.float64), values, *options)
        gram = torch.zeros(1, 2, 2, dtype=torch.float64, device=backend.device)
        backend(op, gram, values.to(backend.device), *options)
        return error(gram, exact) / float(exact.norm())

    short = max(relative_error(part) for part in values.split(len(values) // 40))
    assert relative_error(values) <= short


@pytest.mark.parametrize("name", ["conv everything", "conv weighted", "conv more than a core's tiles", "conv long"])
def test_any_split_of_the_images_gives_the_same_sum(backend: Backend, name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]()
    images, *options, weights = case.args(torch.float64, backend.device)
    whole, parts = case.zeros(torch.float64, backend.device), case.zeros(torch.float64, backend.device)
    backend(case.op, whole, images, *options, weights)
    for i in range(len(images)):
        backend(case.op, parts, images[i : i + 1], *options, None if weights is None else weights[i : i + 1])
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-10)


def test_images_need_not_be_contiguous(backend: Backend) -> None:
    torch.manual_seed(0)
    case = conv(4, 6, (7, 5), weighted=True)
    expected = case.reference(case.zeros(torch.float64), torch.float64)
    images, *options, weights = case.args(torch.float64, backend.device)
    strided = images.transpose(0, -1).contiguous().transpose(0, -1)
    every_other = weights.repeat_interleave(2)[::2]
    for view in (images.to(memory_format=torch.channels_last), strided):
        gram = case.zeros(torch.float64, backend.device)
        backend(case.op, gram, view, *options, every_other)
        torch.testing.assert_close(gram.cpu(), expected, rtol=1e-12, atol=1e-12)
    expanded = images[:1].expand(4, -1, -1, -1)  # one copy in memory, four in meaning
    gram = case.zeros(torch.float64, backend.device)
    backend(case.op, gram, expanded, *options)
    once = case.zeros(torch.float64, backend.device)
    backend(case.op, once, images[:1], *options)
    torch.testing.assert_close(gram, 4 * once, rtol=1e-12, atol=1e-12)


def test_rows_of_one_group_need_no_axis_for_it(backend: Backend) -> None:
    x = torch.randn(9, 4, device=backend.device)
    with_axis, without = (torch.zeros(1, 4, 4, device=backend.device) for _ in range(2))
    backend("gram_accumulate_", with_axis, x[None])
    backend("gram_accumulate_", without, x)
    assert torch.equal(with_axis, without)


def test_a_1x1_convolution_is_a_linear_layer_over_positions(backend: Backend) -> None:
    torch.manual_seed(0)
    images = torch.randn(3, 5, 4, 4, dtype=torch.float64, device=backend.device)
    gram = torch.zeros(1, 5, 5, dtype=torch.float64, device=backend.device)
    backend("gram_accumulate_conv2d_", gram, images, (1, 1))
    as_rows = backend("gram_accumulate_", torch.zeros_like(gram), images.movedim(1, -1).reshape(-1, 5))
    torch.testing.assert_close(gram, as_rows, rtol=1e-12, atol=1e-12)


def test_the_result_is_gram_itself(backend: Backend) -> None:
    case = CASES["conv"]()
    gram = case.zeros(torch.float32, backend.device)
    assert backend(case.op, gram, *case.args(torch.float32, backend.device)) is gram
    flat = torch.zeros(1, 3, 3, device=backend.device)
    assert backend("gram_accumulate_", flat, torch.ones(2, 3, device=backend.device)) is flat


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("channels", [9, 40])
def test_a_bad_value_stays_in_the_moments_of_its_channel(backend: Backend, channels: int, bad: float) -> None:
    torch.manual_seed(0)
    images = torch.randn(3, channels, 5, 5)
    d = 9 * channels
    grams = []
    for _ in range(2):
        grams.append(torch.zeros(1, d, d, device=backend.device))
        backend("gram_accumulate_conv2d_", grams[-1], images.to(backend.device), (3, 3))
        images[1, 4, 2, 2] = bad
    clean, spoilt = (g.view(channels, 9, channels, 9) for g in grams)
    others = [c for c in range(channels) if c != 4]
    assert torch.equal(spoilt[others][:, :, others], clean[others][:, :, others])
    assert not spoilt[4].isfinite().any()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_convolution(backend: Backend, data: st.DataObject) -> None:
    """Random geometry, against the reference."""
    draw = data.draw
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    groups, kernel, stride, dilation = draw(st.integers(1, 3)), draw(pair), draw(pair), draw(pair)
    padding = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    least = [max(1, dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i]) for i in range(2)]
    size = (least[0] + draw(st.integers(0, 6)), least[1] + draw(st.integers(0, 6)))
    channels = groups * draw(st.integers(1, 12))
    case = conv(draw(st.integers(0, 4)), channels, size, kernel, stride, padding, dilation, groups, draw(st.booleans()))
    expected = case.reference(case.zeros(torch.float64), torch.float64)
    gram = case.zeros(torch.float64, backend.device)
    backend(case.op, gram, *case.args(torch.float64, backend.device))
    torch.testing.assert_close(gram.cpu(), expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(groups=st.integers(1, 3), n=st.integers(0, 40), d=st.integers(1, 30), weighted=st.booleans())
def test_any_rows(backend: Backend, groups: int, n: int, d: int, weighted: bool) -> None:
    case = rows(groups, n, d, weighted)
    expected = case.reference(case.zeros(torch.float64), torch.float64)
    gram = case.zeros(torch.float64, backend.device)
    backend(case.op, gram, *case.args(torch.float64, backend.device))
    torch.testing.assert_close(gram.cpu(), expected, rtol=1e-12, atol=1e-12)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


IMAGES = ones(2, 3, 5, 4)
ROWS_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "width": ((zeros(1, 4, 4), ones(5, 3)), r"rows are float32 \[5, 3\] on .*, expected \[1, n, 4\] or \[n, 4\]"),
    "groups": ((zeros(2, 4, 4), ones(3, 5, 4)), r"expected \[2, n, 4\] for gram"),
    "no axis of groups": ((zeros(2, 4, 4), ones(5, 4)), r"rows are float32 \[5, 4\]"),
    "gram not square": ((zeros(1, 4, 3), ones(5, 4)), r"gram is float32 \[1, 4, 3\] on .*, expected \[groups, d, d\]"),
    "half gram": ((zeros(1, 4, 4, dtype=torch.float16), ones(5, 4)), "kept in float32 or float64"),
    "float64 into float32": ((zeros(1, 4, 4), ones(5, 4, dtype=torch.float64)), "need a float64 gram"),
    "integers": ((zeros(1, 4, 4), ones(5, 4, dtype=torch.int64)), "rows are int64"),
    "weights": (
        (zeros(1, 4, 4), ones(5, 4), ones(4)),
        r"weights are float32 \[4\] on .*, expected torch.float32 \[5\]",
    ),
    "half weights": ((zeros(1, 4, 4), ones(5, 4), ones(5, dtype=torch.float16)), "one per row"),
}
CONV_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "features": ((zeros(1, 26, 26), IMAGES, (3, 3)), r"gram is Float \[1, 26, 26\] .* D = 3 / groups \* 3 \* 3"),
    "groups": ((zeros(2, 9, 9), IMAGES, (3, 3)), r"expected gram \[groups, D, D\]"),
    "gram without groups": ((zeros(27, 27), IMAGES, (3, 3)), r"expected \[groups, D, D\]"),
    "gram not square": ((zeros(1, 27, 3), IMAGES, (3, 3)), r"expected \[groups, D, D\]"),
    "gram not contiguous": ((zeros(1, 27, 54)[:, :, ::2], IMAGES, (3, 3)), "must be contiguous"),
    "gram overlaps itself": ((zeros(1, 27, 1).expand(1, 27, 27), IMAGES, (3, 3)), "must be contiguous"),
    "half gram": ((zeros(1, 27, 27, dtype=torch.float16), IMAGES, (3, 3)), "kept in float32 or float64"),
    "float64 into float32": ((zeros(1, 27, 27), IMAGES.double(), (3, 3)), "need a float64 gram, got Float"),
    "integers": ((zeros(1, 27, 27), IMAGES.long(), (3, 3)), "images are Long"),
    "unbatched": ((zeros(1, 27, 27), IMAGES[0], (3, 3)), r"expected \[N, C, H, W\]"),
    "kernel": ((zeros(1, 27, 27), IMAGES, (0, 3)), "kernel_size is a pair"),
    "kernel too large": ((zeros(1, 36, 36), IMAGES, (2, 6), (1, 1), (0, 0)), r"smaller than a kernel of 2 x 6"),
    "stride": ((zeros(1, 27, 27), IMAGES, (3, 3), (0, 1)), "must be positive"),
    "padding": ((zeros(1, 27, 27), IMAGES, (3, 3), (1, 1), (0, -1)), "padding not negative"),
    "dilation": ((zeros(1, 27, 27), IMAGES, (3, 3), (1, 1), (0, 0), (1, 0)), "must be positive"),
    "huge padding": ((zeros(1, 27, 27), IMAGES, (3, 3), (1, 1), (2**30, 0)), r"padding or dilation is as large"),
    "weights": ((zeros(1, 27, 27), IMAGES, (3, 3), (1, 1), (0, 0), (1, 1), ones(3)), r"expected Float \[2\]"),
    "half weights": (
        (zeros(1, 27, 27), IMAGES, (3, 3), (1, 1), (0, 0), (1, 1), ones(2, dtype=torch.float16)),
        "weights are Half",
    ),
}
REFUSED = {
    **{f"rows {name}": ("gram_accumulate_", *call) for name, call in ROWS_REFUSED.items()},
    **{f"conv {name}": ("gram_accumulate_conv2d_", *call) for name, call in CONV_REFUSED.items()},
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_arguments_are_refused_with_the_reason(backend: Backend, name: str) -> None:
    op, args, message = REFUSED[name]
    args = tuple(a.to(backend.device) if isinstance(a, Tensor) else a for a in args)
    with pytest.raises(RuntimeError, match=message):
        backend(op, *args)
    assert not args[0].any()


def test_memory_shared_with_the_result_is_refused(backend: Backend) -> None:
    gram = torch.zeros(1, 4, 4, device=backend.device)
    with pytest.raises(RuntimeError, match="images shares memory with gram"):
        backend("gram_accumulate_conv2d_", gram, gram.view(1, 4, 2, 2), (1, 1))
    with pytest.raises(RuntimeError, match="weights shares memory with gram"):
        images = torch.ones(4, 4, 1, 1, device=backend.device)
        backend("gram_accumulate_conv2d_", gram, images, (1, 1), (1, 1), (0, 0), (1, 1), gram[0, 0])
    assert not gram.any()


@pytest.mark.parametrize("name", ["conv everything", "conv depthwise", "conv no images"])
def test_opcheck(name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]()
    for device in ("cpu", *(("cuda",) if torch.cuda.is_available() else ())):
        for master in (torch.float32, torch.float64):
            args = (case.zeros(master, device), *case.args(torch.float32, device))
            torch.library.opcheck(torch.ops.fastunlearn.gram_accumulate_conv2d_.default, args)


@pytest.mark.parametrize("name", ["rows weighted", "conv everything"])
def test_compiles_without_a_break(name: str) -> None:
    case = CASES[name]()
    function: Callable[..., Tensor] = getattr(ops, case.op)
    compiled = torch.compile(lambda gram, *args: function(gram, *args) * 2, fullgraph=True, backend="aot_eager")
    args = case.args(torch.float32)
    expected = 2 * function(case.zeros(torch.float64), *args)
    torch.testing.assert_close(compiled(case.zeros(torch.float64), *args), expected)


def test_tiles_cover_the_upper_triangle_once() -> None:
    tiles = [ops._C.upper_tile(i) for i in range(37 * 36 // 2)]
    assert sorted(tiles) == [(row, column) for row in range(36) for column in range(row, 36)]


def test_planner_fills_the_gpu_and_no_more() -> None:
    plan = ops._C.plan_gram_conv2d
    # One tile on a GPU of 132 multiprocessors: as many splits as are worth their workspace.
    assert plan(1, 27, 100, 1024, 132) == {"tiles": 1, "splits": 16, "patches_per_split": 6400, "blocks": 16}
    # 36 tiles a side, of which 666 lie on or above the diagonal: none.
    assert plan(1, 2304, 100, 64, 132) == {"tiles": 666, "splits": 1, "patches_per_split": 6400, "blocks": 666}
    # Never more than 16 splits, none of them empty, every patch in one.
    for samples in (1, 2, 37, 400):
        for positions in (1, 49, 1024):
            got = plan(3, 65, samples, positions, 132)
            covered = got["splits"] * got["patches_per_split"]
            assert got["splits"] <= 16
            assert covered - got["patches_per_split"] < samples * positions <= covered
            assert got["blocks"] == 3 * got["tiles"] * got["splits"]
    assert plan(1, 27, 0, 64, 132)["blocks"] == 0
