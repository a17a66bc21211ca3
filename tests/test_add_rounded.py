"""Sums in bfloat16 with stochastic rounding, on every back end."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Backend
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastunlearn import ops, reference

SIZES = [1, 7, 8, 9, 0, 255, 257, 4096, 65536, 65545]
INF, NAN = float("inf"), float("nan")
BF16 = torch.finfo(torch.bfloat16)


def bits(tensor: Tensor) -> Tensor:
    """The patterns, so that NaN equals itself and -0 is not 0."""
    return tensor.cpu().contiguous().view(torch.int16)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True))


def problem(sizes: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Sums of either sign and addends far below, near and above them."""
    sums = [(torch.randn(n) * 10).bfloat16() for n in sizes]
    return sums, [torch.randn(n) * 10 ** torch.empty(n).uniform_(-5, 2) for n in sizes]


def on(device: str, tensors: list[Tensor]) -> list[Tensor]:
    return [t.clone().to(device) for t in tensors]


def call(backend: Backend, sums: list[Tensor], addends: list[Tensor], *numbers: Any) -> list[Tensor]:
    ours = on(backend.device, sums)
    backend("add_rounded_", ours, on(backend.device, addends), *numbers)
    return ours


def philox(key: int, counter: list[int]) -> list[int]:
    """Philox4x32-10 as Salmon et al. 2011 print it, in Python's integers."""
    x, k = list(counter), [key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        a, b = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [b >> 32 ^ x[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ x[3] ^ k[1], a & 0xFFFFFFFF]
        k = [k[0] + 0x9E3779B9 & 0xFFFFFFFF, k[1] + 0xBB67AE85 & 0xFFFFFFFF]
    return x


def test_random_bits_are_those_of_philox() -> None:
    # The known answers of the authors' test vectors (Random123, kat_vectors).
    assert philox(0, [0, 0, 0, 0]) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox(2**64 - 1, [2**32 - 1] * 4) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    for seed, step, offset in ((0, 0, 0), (-1, 2**63 - 1, 5), (2**40 + 3, -7, 8 * 2**33 + 3)):
        got = reference.rounding_bits(seed, step, offset, 20).tolist()
        for i, value in enumerate(got):
            octet, lane = divmod(offset + i, 8)
            words = philox(seed, [octet & 0xFFFFFFFF, octet >> 32, step & 0xFFFFFFFF, step >> 32 & 0xFFFFFFFF])
            assert value == words[lane // 2] >> 16 * (lane % 2) & 0xFFFF


def test_bits_are_those_of_integer_arithmetic_in_numpy(backend: Backend) -> None:
    torch.manual_seed(0)
    (total,), (addend,) = problem([5000])
    (got,) = call(backend, [total], [addend], 3, 4, [5])
    exact = total.float().numpy() + addend.numpy()
    random = reference.rounding_bits(3, 4, 5, 5000).numpy().astype(np.uint32)
    expected = ((exact.view(np.uint32) + random) >> 16).astype(np.uint16)
    assert np.array_equal(bits(got).numpy().view(np.uint16), expected)
    up = (expected != (exact.view(np.uint32) >> 16)).mean()
    assert 0.4 < up < 0.6


def test_same_bits_as_the_reference(backend: Backend) -> None:
    torch.manual_seed(1)
    sums, addends = problem(SIZES)
    offsets = [0, 3, 8, 2**33 + 1, 7, 16, 5, 2**62 - 1, 1, 4]
    expected = [s.clone() for s in sums]
    reference.add_rounded_(expected, addends, -5, 2**40 + 1, offsets)
    assert same(call(backend, sums, addends, -5, 2**40 + 1, offsets), expected)
    assert not same(call(backend, sums, addends, -5, 2**40, offsets), expected)
    assert not same(call(backend, sums, addends, -4, 2**40 + 1, offsets), expected)


def test_more_tensors_than_one_launch_takes_have_each_their_own_offset(backend: Backend) -> None:
    torch.manual_seed(2)
    sums, addends = problem([3 + i % 20 for i in range(450)])
    offsets = [100 * i + i % 9 for i in range(450)]
    expected = [s.clone() for s in sums]
    reference.add_rounded_(expected, addends, 1, 1, offsets)
    assert same(call(backend, sums, addends, 1, 1, offsets), expected)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(size=st.integers(0, 200), cuts=st.lists(st.integers(0, 200), max_size=5), offset=st.integers(0, 40))
def test_any_split_into_shards_gives_the_bits_of_the_whole(
    backend: Backend, size: int, cuts: list[int], offset: int
) -> None:
    (total,), (addend,) = problem([size])
    (whole,) = call(backend, [total], [addend], 7, 2, [offset])
    edges = [0, *sorted(min(c, size) for c in cuts), size]
    starts = list(pairwise(edges))
    offsets = [offset + a for a, _ in starts]
    copies = call(backend, [total[a:b] for a, b in starts], [addend[a:b] for a, b in starts], 7, 2, offsets)
    assert same([torch.cat(copies)], [whole])
    # And as views of one flat buffer, at whatever address they begin.
    flat, addend = total.clone().to(backend.device), addend.to(backend.device)
    backend("add_rounded_", [flat[a:b] for a, b in starts], [addend[a:b] for a, b in starts], 7, 2, offsets)
    assert same([flat], [whole])


def test_a_long_split_and_odd_addresses_give_the_bits_of_the_whole(backend: Backend) -> None:
    torch.manual_seed(3)
    (total,), (addend,) = problem([140_000])
    (whole,) = call(backend, [total], [addend], 7, 2, [16])
    for cut in (65_536, 65_541, 70_000):
        parts = call(backend, [total[:cut], total[cut:]], [addend[:cut], addend[cut:]], 7, 2, [16, 16 + cut])
        assert same([torch.cat(parts)], [whole])
    memory, other = torch.zeros(1003, dtype=torch.bfloat16), torch.zeros(1003)
    memory[3:], other[1:-2] = total[:1000], addend[:1000]
    memory, other = memory.to(backend.device), other.to(backend.device)
    backend("add_rounded_", [memory[3:]], [other[1:-2]], 7, 2, [16])
    assert same([memory[3:]], [whole[:1000]]) and not memory[:3].any()


def test_repetition_threads_and_block_order_change_nothing(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    sums, addends = problem([200_000, 70_001])
    results, threads = [], torch.get_num_threads()
    try:
        for order, count in (("forward", 1), ("reverse", 3)):
            monkeypatch.setenv("FASTUNLEARN_EMULATOR_ORDER", order)
            torch.set_num_threads(count)
            results.append(call(backend, sums, addends, 0, 0, [0, 200_000]))
    finally:
        torch.set_num_threads(threads)
    assert same(*results)


# ---------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("start", [1.0, -1.0])
@pytest.mark.parametrize("addend", [2**-10, -(2**-10), 3 * 2**-9, 2**-7 - 2**-12])
def test_the_average_is_the_exact_sum(backend: Backend, start: float, addend: float) -> None:
    n = 10_000
    (got,) = call(backend, [torch.full((n,), start).bfloat16()], [torch.full((n,), addend)], 11, 0, [0])
    exact = start + addend
    spacing = 2**-8 if abs(exact) < 1 else 2**-7
    up = abs(exact) / spacing % 1
    assert len(got.unique()) == 2
    sigma = spacing * (up * (1 - up) / n) ** 0.5
    assert abs(float(got.double().mean()) - exact) < 5 * sigma
    assert abs(addend) > 2**-8 or (start + torch.full((), addend)).bfloat16() == start  # what nearest makes of it


def test_the_average_is_the_exact_sum_among_subnormal_numbers(backend: Backend) -> None:
    n, spacing = 10_000, 2.0**-133
    addend = 2.0**-136 + 2.0**-149
    (got,) = call(backend, [torch.full((n,), spacing).bfloat16()], [torch.full((n,), addend)], 12, 0, [0])
    up = addend / spacing
    assert sorted(got.double().unique().tolist()) == [spacing, 2 * spacing]
    assert abs(float((got.double() == 2 * spacing).double().mean()) - up) < 5 * (up * (1 - up) / n) ** 0.5


def test_small_addends_repeated_add_up_where_rounding_to_nearest_stays(backend: Backend) -> None:
    """n additions of a make 1 + n a on average; the variance of one is at most a times the spacing it rounds to."""
    steps, elements, addend = 10_000, 64, 2.0**-10
    total = torch.ones(elements, dtype=torch.bfloat16, device=backend.device)
    part = torch.full((elements,), addend, device=backend.device)
    for step in range(steps):
        backend("add_rounded_", [total], [part], 5, step, [0])
    exact = 1 + steps * addend  # 10.8, where neighbours are 2**-4 apart
    sigma = (steps * addend * 2.0**-4 / elements) ** 0.5
    assert abs(float(total.double().mean()) - exact) < 5 * sigma
    nearest = torch.ones(1, dtype=torch.bfloat16)
    for _ in range(100):
        nearest.copy_(nearest.float() + addend)
    assert nearest == 1


def test_squares_of_repeated_batches_err_far_less_than_rounding_to_nearest(backend: Backend) -> None:
    torch.manual_seed(5)
    ours, nearest = (torch.zeros(512, dtype=torch.bfloat16, device=backend.device) for _ in range(2))
    exact = torch.zeros(512, dtype=torch.float64, device=backend.device)
    for step in range(1_000):
        squares = torch.randn(16, 512, device=backend.device).square().mean(0)
        backend("add_rounded_", [ours], [squares], 6, step, [0])
        nearest.copy_(nearest.float() + squares)
        exact += squares
    error, theirs = ((x.double() / exact - 1) for x in (ours, nearest))
    assert float(theirs.mean()) < -0.3  # stuck near 256, where half a spacing is 1
    assert float(error.square().mean().sqrt()) < float(theirs.square().mean().sqrt()) / 5
    assert abs(float(error.mean())) < 0.01  # 5 standard errors of 512 elements


def test_elements_steps_and_tensors_round_independently(backend: Backend) -> None:
    """Correlations of up and down between neighbours, steps and seeds stay within 5 standard errors."""
    n = 4096

    def ups(seed: int, step: int, offset: int) -> Tensor:
        (got,) = call(backend, [torch.ones(n).bfloat16()], [torch.full((n,), 2.0**-8)], seed, step, [offset])
        return (got.cpu().double() > 1).double() - 0.5

    base = ups(0, 0, 0)
    others = [ups(0, 1, 0), ups(1, 0, 0), ups(0, 0, n), *(base.roll(k) for k in (1, 2, 4, 8))]
    for other in others:
        assert abs(float((base * other).mean())) < 5 * 0.25 / n**0.5


# ---------------------------------------------------------------------------------------------- special numbers


def test_what_bfloat16_can_represent_stays_exact(backend: Backend) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    numbers = every[~every.isnan()]
    (got,) = call(backend, [numbers], [torch.zeros(len(numbers))], 1, 1, [3])
    assert torch.equal(got.cpu(), numbers)  # -0 + 0 is 0
    (got,) = call(backend, [numbers], [torch.full((len(numbers),), -0.0)], 1, 1, [3])
    assert same([got], [numbers])
    (got,) = call(backend, [torch.zeros(len(numbers)).bfloat16()], [numbers.float()], 1, 1, [3])
    assert torch.equal(got.cpu(), numbers)


def test_infinities_and_nan_propagate_and_never_become_one_another(backend: Backend) -> None:
    payloads = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    assert payloads.isnan().all()
    cases = [(INF, 1.0, INF), (-INF, 1.0, -INF), (1.0, INF, INF), (1.0, -INF, -INF), (INF, INF, INF), (INF, -INF, NAN),
             (NAN, 1.0, NAN), (1.0, NAN, NAN), (INF, NAN, NAN), *((1.0, float(p), NAN) for p in payloads)]  # fmt: skip
    for step in range(20):
        sums, addends = torch.tensor([c[0] for c in cases]), torch.tensor([c[1] for c in cases])
        addends[-4:] = payloads
        (got,) = call(backend, [sums.bfloat16()], [addends], 9, step, [step])
        want = torch.tensor([c[2] for c in cases])
        assert torch.equal(got.cpu().isnan(), want.isnan())
        assert torch.equal(got.cpu().float()[~want.isnan()], want[~want.isnan()])
        assert set(bits(got)[want.isnan()].tolist()) == {0x7FC0}


@pytest.mark.parametrize("sign", [1, -1])
def test_only_what_rounds_to_infinity_overflows(backend: Backend, sign: int) -> None:
    spacing = 2.0**120
    n = 256
    below, at, above = (torch.full((n,), sign * spacing * x) for x in (0.498, 0.5, 0.51))
    largest = torch.full((n,), sign * BF16.max).bfloat16()
    got = call(backend, [largest] * 3, [below, at, above], 1, 2, [0, n, 2 * n])
    assert bool((got[0] == sign * BF16.max).all())
    assert bool((got[1] == sign * INF).all()) and bool((got[2] == sign * INF).all())
    # One spacing lower it is random again, and finite.
    lower = torch.full((n,), sign * (BF16.max - spacing)).bfloat16()
    (got_lower,) = call(backend, [lower], [above], 1, 2, [0])
    assert set(got_lower.float().abs().tolist()) == {BF16.max - spacing, BF16.max}
    # Past float32's own range as well.
    (past,) = call(backend, [largest], [torch.full((n,), sign * 3e38)], 1, 2, [0])
    assert bool((past == sign * INF).all())


FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(pairs=st.lists(st.tuples(FLOATS, FLOATS), max_size=40), seed=st.integers(-(2**63), 2**63 - 1))
def test_any_numbers_give_a_neighbour_of_their_sum(
    backend: Backend, pairs: list[tuple[float, float]], seed: int
) -> None:
    values = torch.tensor(pairs, dtype=torch.float32).reshape(-1, 2)
    total, addend = values[:, 0].bfloat16(), values[:, 1].contiguous()
    (got,) = call(backend, [total], [addend], seed, 0, [0])
    (expected,) = reference.add_rounded_([total.clone()], [addend], seed, 0, [0])
    assert same([got], [expected])
    exact, got = total.double() + addend.double(), got.cpu()
    assert torch.equal(got.isnan(), exact.isnan())
    finite = got.isfinite() & exact.isfinite()
    spacing = torch.maximum(exact.abs() * 2.0**-7, torch.tensor(2.0**-133, dtype=torch.float64))
    assert bool(((got.double() - exact).abs() <= spacing)[finite].all())
    overflown = got.isinf() & exact.isfinite()
    assert bool((exact.abs()[overflown] >= BF16.max + 2.0**119 - 2.0**103).all())


# ------------------------------------------------------------------------------------------- doors and staging


def test_a_sum_that_is_not_contiguous_is_staged_and_refused_by_the_operator(backend: Backend) -> None:
    torch.manual_seed(6)
    memory, addend = torch.randn(9, 14).bfloat16(), torch.randn(7, 9)
    expected = memory[:, ::2].T.contiguous()
    reference.add_rounded_([expected], [addend], 1, 1, [5])
    ours = memory.clone().to(backend.device)
    backend("add_rounded_", [ours[:, ::2].T], [addend.to(backend.device)], 1, 1, [5])
    assert same([ours[:, ::2].T], [expected]) and same([ours[:, 1::2]], [memory[:, 1::2]])
    # An addend may lie as it likes.
    ours = memory[:, ::2].T.contiguous().to(backend.device)
    backend("add_rounded_", [ours], [addend.T.contiguous().to(backend.device).T], 1, 1, [5])
    assert same([ours], [expected])
    operators = torch.ops.fastunlearn_emulated if backend.name == "emulated" else torch.ops.fastunlearn
    with pytest.raises(RuntimeError, match=r"sum is written in place and must be contiguous, got BFloat16 \[3, 2\]"):
        operators.add_rounded_([torch.zeros(2, 3, dtype=torch.bfloat16, device=backend.device).T],
                               [torch.zeros(3, 2, device=backend.device)], 0, 0, [0])  # fmt: skip


def test_nothing_to_add_returns_at_once(backend: Backend) -> None:
    assert backend("add_rounded_", [], [], 0, 0, []) == []
    empty = torch.zeros(0, 3, dtype=torch.bfloat16, device=backend.device)
    assert backend("add_rounded_", [empty], [torch.zeros(0, 3, device=backend.device)], 0, 0, [0])[0] is empty


def test_what_does_not_fit_is_refused_with_its_shape_and_changes_nothing(backend: Backend) -> None:
    total, addend = torch.ones(4, 3, dtype=torch.bfloat16), torch.ones(4, 3)
    total, addend = total.to(backend.device), addend.to(backend.device)
    other = total.clone()
    one = [total], [addend]
    for sums, addends, offsets, message in (
        ([total, other], [addend], [0, 0], "2 sums but 1 addends"),
        (*one, [], "1 sums but 0 offsets"),
        ([other, total.float()], [addend, addend], [0, 0], r"sums\[1\] is Float \[4, 3\] on \w+.*; sums are bfloat16"),
        ([total], [addend.double()], [0], r"addends\[0\] is Double \[4, 3\].* but the sum is BFloat16 \[4, 3\]"),
        ([total], [addend.T], [0], r"addends\[0\] is Float \[3, 4\].* but the sum is BFloat16 \[4, 3\]"),
        (*one, [-1], r"offsets\[0\] is -1, expected a position from 0"),
        (*one, [2**62], r"offsets\[0\] is 4611686018427387904"),
        ([total, total], [addend, addend], [0, 12], r"sums\[1\] shares memory with sums\[0\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            backend("add_rounded_", sums, addends, 0, 0, offsets)
    memory = torch.zeros(30, device=backend.device)
    with pytest.raises(RuntimeError, match=r"addends\[0\] shares memory with sums\[0\]"):
        backend("add_rounded_", [memory.view(torch.bfloat16)[:20]], [memory[5:25]], 0, 0, [0])
    assert bool((total == 1).all()) and bool((other == 1).all()) and not memory.any()


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_opcheck_and_compile(device: str) -> None:
    torch.manual_seed(7)
    sums, addends = (on(device, part) for part in problem([40, 7]))
    torch.library.opcheck(torch.ops.fastunlearn.add_rounded_.default, (sums, addends, 1, 2, [0, 40]))

    def add(sums: list[Tensor], addends: list[Tensor]) -> Tensor:
        return ops.add_rounded_(sums, [a * 2 for a in addends], 1, 2, [0, 40])[0] * 2

    a, b = on(device, sums), on(device, sums)
    compiled = torch.compile(add, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(a, addends), add(b, addends))
    assert same(a, b)
