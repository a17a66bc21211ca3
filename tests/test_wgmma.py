"""The Hopper kernel of ``sq_grad_linear``: its planner, and the kernel itself on emulated hardware or a GPU.

The kernel is off unless ``FASTUNLEARN_WGMMA=1``. A GPU reads that once, so there these tests run only when it is set
for the whole process; the emulated GPU reads it at every call.
"""

from __future__ import annotations

import os
from itertools import product

import pytest
import torch
from conftest import BACKENDS, Backend
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastunlearn import ops, reference

plan = ops._C.plan_sq_grad_wgmma
EMULATED_MULTIPROCESSORS = 4
SAMPLE_BLOCK = 16

# [N, T, P, D]: every tile and cluster, ragged everywhere, one position more and less than a stage and a step, rings
# that go round several times, splits, more samples than one block of the sum.
SHAPES = [
    (1, 2, 8, 8),
    (2, 16, 64, 64),
    (1, 17, 136, 72),
    (9, 15, 8, 136),
    (3, 65, 72, 120),
    (2, 200, 128, 128),
    (7, 33, 264, 56),
    (1, 500, 384, 128),
    (5, 64, 128, 192),
    (1, 63, 120, 520),
    (9, 48, 640, 384),
    (2, 129, 256, 576),
    (4, 31, 128, 256),
    (2, 400, 128, 1024),
    (3, 97, 384, 264),
    (2, 300, 256, 256),
    (35, 3, 136, 200),
    (40, 20, 640, 512),
    (70, 2, 8, 8),
    (18, 250, 256, 512),
]
TYPES = [torch.bfloat16, torch.float16]
WGMMA_BACKENDS = [name for name in BACKENDS if name == "emulated"] + [
    name for name in BACKENDS if name == "cuda" and os.environ.get("FASTUNLEARN_WGMMA") == "1"
]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTUNLEARN_WGMMA", "1")


@pytest.fixture(params=WGMMA_BACKENDS)
def hopper(request: pytest.FixtureRequest, asked: None) -> Backend:
    if request.param == "emulated":
        from conftest import load_emulated

        load_emulated()
    return Backend(request.param)


def draw(n: int, t: int, p: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.rand(p, d), torch.randn(n, t, d).to(dtype), torch.randn(n, t, p).to(dtype)


def run(backend: Backend, start: Tensor, x: Tensor, g: Tensor) -> Tensor:
    out = start.clone().to(backend.device)
    backend("sq_grad_linear", out, x.to(backend.device), g.to(backend.device))
    return out.cpu()


def by_torch(backend: Backend, start: Tensor, x: Tensor, g: Tensor) -> Tensor:
    """The reference in float32, on a GPU by tensor cores too: they cut sums off where other cores round, and TF32 holds
    every bfloat16 and float16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if backend.name == "cuda" else "highest")
    try:
        device = backend.device
        return reference.sq_grad_linear(start.clone().to(device), x.to(device), g.to(device)).cpu()
    finally:
        torch.set_float32_matmul_precision(before)


def assert_as_good_as_torch(backend: Backend, start: Tensor, x: Tensor, g: Tensor) -> None:
    assert_as_close_as_torch(run(backend, start, x, g), backend, start, x, g)


def assert_as_close_as_torch(out: Tensor, backend: Backend, start: Tensor, x: Tensor, g: Tensor) -> None:
    exact = reference.sq_grad_linear(start.double(), x.double(), g.double())
    theirs = by_torch(backend, start, x, g)
    unit = float(exact.norm()) * torch.finfo(torch.float32).eps / 2
    assert float((out.double() - exact).norm()) <= 2 * float((theirs.double() - exact).norm()) + unit


def launches(text: str) -> list[str]:
    """Kernels of 384 threads, as FASTUNLEARN_EMULATOR_TRACE shows them."""
    return [line for line in text.splitlines() if "blocks of 384 threads" in line]


# -------------------------------------------------------------------------------------- the planner


def test_shapes_that_the_copy_engine_cannot_address_are_left_to_others() -> None:
    assert plan(4, 100, 64, 64, 132)["tile_in"] > 0
    for n, t, p, d in [(4, 100, 63, 64), (4, 100, 64, 60), (0, 100, 64, 64), (4, 0, 64, 64), (4, 100, 0, 64)]:
        assert plan(n, t, p, d, 132)["tile_in"] == 0
    assert plan(4, 1, 64, 64, 132)["tile_in"] == 0  # nothing to sum: the pointwise loop is faster
    assert plan(2**31, 2, 64, 64, 132)["tile_in"] == 0


def test_large_layers_get_large_tiles_in_clusters() -> None:
    """4096 x 4096 from 2048 positions: 4 waves of 128 x 256 tiles, L2 read once for two blocks."""
    got = plan(8, 2048, 4096, 4096, 132)
    assert (got["tile_in"], got["cluster"], got["blocks"], got["splits"]) == (256, 2, 512, 1)


def test_short_samples_keep_their_squares_in_registers() -> None:
    """At 197 positions a pass over 128 KB of shared memory would cost half as much as the products."""
    for features in (768, 4096):
        assert plan(32, 197, features, features, 132)["tile_in"] == 192


def test_a_small_layer_is_split_over_samples() -> None:
    got = plan(128, 64, 128, 128, 132)
    assert (got["splits"], got["samples_per_split"], got["blocks"]) == (16, 8, 16)


@pytest.mark.parametrize("multiprocessors", [1, 4, 132])
def test_plans_cover_every_sample_and_feature_once_and_fit(multiprocessors: int) -> None:
    for n, t, p, d in product((1, 7, 40), (2, 197, 2048), (8, 136, 1000, 4096), (8, 200, 1024, 4096)):
        got = plan(n, t, p, d, multiprocessors)
        assert got["shared_bytes"] <= 232448
        assert 1 <= got["splits"] <= 16
        assert (got["splits"] - 1) * got["samples_per_split"] < n <= got["splits"] * got["samples_per_split"]
        assert p <= got["tiles_out"] * 128 < p + 128 * got["cluster"]
        assert d <= got["tiles_in"] * got["tile_in"] < d + got["tile_in"]
        assert got["tiles_out"] % got["cluster"] == 0 and (got["cluster"] == 1 or p > 128)
        assert got["blocks"] == got["tiles_out"] * got["tiles_in"] * got["splits"]


def test_the_shapes_below_meet_every_kernel() -> None:
    plans = [plan(*shape, EMULATED_MULTIPROCESSORS) for shape in SHAPES]
    assert {(got["tile_in"], got["cluster"]) for got in plans} == set(product((128, 192, 256), (1, 2)))
    assert any(got["splits"] > 1 for got in plans)
    # The second level of the sum, with and without a workspace.
    assert any(got["samples_per_split"] > SAMPLE_BLOCK for got in plans if got["splits"] == 1)
    assert any(got["samples_per_split"] > SAMPLE_BLOCK for got in plans if got["splits"] > 1)
    assert any(got["samples_per_split"] > SAMPLE_BLOCK for got in plans if got["tile_in"] == 256)


# --------------------------------------------------------------------------------------- the kernel


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_twice_that_of_torch(hopper: Backend, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    start, x, g = draw(*shape, dtype)
    assert_as_good_as_torch(hopper, start, x, g)


def test_what_runs_is_the_hopper_kernel(
    hopper: Backend, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its sibling would pass every other test here."""
    start, x, g = draw(2, 200, 128, 128, torch.bfloat16)
    if hopper.name == "emulated":
        monkeypatch.setenv("FASTUNLEARN_EMULATOR_TRACE", "1")
        run(hopper, start, x, g)
        assert len(launches(capfd.readouterr().err)) == 1
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run(hopper, start, x, g)
    assert any("sq_grad_wgmma_kernel" in event.key for event in profile.key_averages())


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    n=st.integers(1, 9),
    t=st.integers(1, 200),
    p=st.integers(1, 40),
    d=st.integers(1, 70),
    dtype=st.sampled_from(TYPES),
)
def test_any_shape(hopper: Backend, n: int, t: int, p: int, d: int, dtype: torch.dtype) -> None:
    start, x, g = draw(n, t, 8 * p, 8 * d, dtype)
    assert_as_good_as_torch(hopper, start, x, g)


@pytest.mark.skipif("emulated" not in WGMMA_BACKENDS, reason="chooses the moments of emulated hardware")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_order_of_emulated_blocks_copies_and_products_changes_a_bit(
    asked: None, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from conftest import load_emulated

    load_emulated()
    monkeypatch.setenv("FASTUNLEARN_EMULATOR_TRACE", "1")
    start, x, g = draw(*shape, torch.bfloat16)
    results = []
    for moment, order in product(("late", "early"), ("forward", "reverse")):
        monkeypatch.setenv("FASTUNLEARN_EMULATOR_ASYNC", moment)
        monkeypatch.setenv("FASTUNLEARN_EMULATOR_ORDER", order)
        results.append(run(Backend("emulated"), start, x, g))
    assert len(launches(capfd.readouterr().err)) == 4
    assert all(torch.equal(results[0], other) for other in results)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_value_stays_in_its_own_outputs(hopper: Backend, bad: float) -> None:
    start, x, g = draw(3, 21, 136, 72, torch.bfloat16)
    clean = run(hopper, start, x, g)
    g[1, 20, 3] = bad  # the last position: the rows of zeros beyond it must not meet it
    out = run(hopper, start, x, g)
    others = [p for p in range(136) if p != 3]
    assert torch.equal(out[others], clean[others])
    assert not out[3].isfinite().any()


@pytest.mark.skipif("emulated" not in WGMMA_BACKENDS, reason="sees launches of emulated kernels only")
@pytest.mark.parametrize(
    "case", ["not asked for", "float32", "odd features", "one position", "input off 16 bytes", "out off 8 bytes"]
)
def test_what_the_emulated_kernel_cannot_do_goes_to_its_sibling(
    case: str, asked: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from conftest import load_emulated

    load_emulated()
    monkeypatch.setenv("FASTUNLEARN_EMULATOR_TRACE", "1")
    start, x, g = draw(3, 1 if case == "one position" else 20, 16, 24, torch.bfloat16)
    if case == "not asked for":
        monkeypatch.delenv("FASTUNLEARN_WGMMA")
    if case == "float32":
        x, g = x.float(), g.float()
    if case == "odd features":
        x, start = x[..., :23].contiguous(), start[:, :23].contiguous()
    if case == "input off 16 bytes":
        x = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    out = start.clone()
    if case == "out off 8 bytes":
        out = torch.cat([start.new_zeros(1), start.flatten()])[1:].view(start.shape)
    Backend("emulated")("sq_grad_linear", out, x, g)
    assert not launches(capfd.readouterr().err)
    assert_as_close_as_torch(out, Backend("emulated"), start, x, g)
