"""threshold_reset_ and mask_grads_ on every back end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import Backend
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastunlearn import ops, reference

SIZES = [1, 31, 32, 33, 255, 257, 4096, 0, 65536, 65537]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def problem(sizes: list[int], dtype: torch.dtype | None = None) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Weights, forget and retain importances; every dtype in turn unless one is named."""
    weights, forget, retain = [], [], []
    for i, size in enumerate(sizes):
        weights.append(torch.randn(size).to(dtype or DTYPES[i % len(DTYPES)]))
        wide = torch.float64 if i % 3 == 2 else torch.float32
        f, r = torch.rand(size, dtype=wide).square(), torch.rand(size, dtype=wide).square()
        f[torch.rand(size) < 0.1] = 0
        r[torch.rand(size) < 0.1] = 0
        forget.append(f)
        retain.append(r)
    return weights, forget, retain


def on(device: str, tensors: list[Tensor]) -> list[Tensor]:
    return [t.clone().to(device) for t in tensors]


def test_same_weights_masks_and_counts_as_the_reference(backend: Backend) -> None:
    torch.manual_seed(0)
    weights, forget, retain = problem(SIZES)
    expected = [w.clone() for w in weights]
    masks, counts = reference.threshold_reset_(expected, forget, retain, 1.7)
    ours = on(backend.device, weights)
    got_masks, got_counts = backend.threshold_reset_(ours, on(backend.device, forget), on(backend.device, retain), 1.7)
    assert got_counts.tolist() == counts.tolist()
    for ours_i, expected_i, mask, expected_mask in zip(ours, expected, got_masks, masks, strict=True):
        assert torch.equal(ours_i.cpu(), expected_i)
        assert torch.equal(mask.cpu(), expected_mask)


def test_more_tensors_than_one_launch_takes(backend: Backend) -> None:
    torch.manual_seed(0)
    weights, forget, retain = problem([3 + i % 5 for i in range(150)])
    expected = [w.clone() for w in weights]
    _, counts = reference.threshold_reset_(expected, forget, retain, 0.8)
    ours = on(backend.device, weights)
    _, got = backend.threshold_reset_(ours, on(backend.device, forget), on(backend.device, retain), 0.8)
    assert got.tolist() == counts.tolist()
    assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, expected, strict=True))


def test_zero_over_zero_keeps_and_anything_over_zero_resets(backend: Backend) -> None:
    nan, inf = float("nan"), float("inf")
    forget = torch.tensor([0.0, 1.0, 1e-38, nan, 1.0, inf, inf, 2.0, 2.0])
    retain = torch.tensor([0.0, 0.0, 0.0, 1.0, nan, inf, 1.0, 1.0, inf])
    weight = torch.ones(9, device=backend.device)
    (mask,), counts = backend.threshold_reset_([weight], [forget.to(backend.device)], [retain.to(backend.device)], 2.0)
    assert weight.tolist() == [1, 0, 0, 1, 1, 1, 0, 1, 1]
    assert ops.unpack_mask(mask, weight.shape).tolist() == [w == 0 for w in weight.tolist()]
    assert counts.tolist() == [3]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_outside_the_mask_become_zero(backend: Backend, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    grads, masks = [], []
    for size in SIZES:
        grads.append(torch.randn(size).to(dtype))
        masks.append(torch.rand(size) < 0.3)
    if grads[3].numel():
        grads[3][0], masks[3][0] = float("nan"), False
    ours = on(backend.device, grads)
    backend("mask_grads_", ours, on(backend.device, [reference.pack_mask(m) for m in masks]))
    for got, grad, mask in zip(ours, grads, masks, strict=True):
        assert torch.equal(got.cpu(), grad.masked_fill(~mask, 0))


def test_repetition_and_block_order_change_nothing(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weights, forget, retain = problem([200_000, 70_000])
    results = []
    for order in ("forward", "reverse"):
        monkeypatch.setenv("FASTUNLEARN_EMULATOR_ORDER", order)
        ours = on(backend.device, weights)
        masks, counts = backend.threshold_reset_(ours, on(backend.device, forget), on(backend.device, retain), 1.3)
        results.append([*ours, *masks, counts])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(sizes=st.lists(st.integers(0, 100), min_size=1, max_size=6), gamma=st.floats(1e-3, 1e3))
def test_any_list(backend: Backend, sizes: list[int], gamma: float) -> None:
    weights, forget, retain = problem(sizes)
    expected = [w.clone() for w in weights]
    masks, counts = reference.threshold_reset_(expected, forget, retain, gamma)
    ours = on(backend.device, weights)
    got_masks, got = backend.threshold_reset_(ours, on(backend.device, forget), on(backend.device, retain), gamma)
    assert got.tolist() == counts.tolist()
    assert all(torch.equal(a.cpu(), b) for a, b in zip([*ours, *got_masks], [*expected, *masks], strict=True))


def test_weights_in_channels_last_are_reset_in_place() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    forget, retain = torch.rand(4, 3, 2, 2), torch.rand(4, 3, 2, 2)
    expected = weight.clone().masked_fill(forget > retain, 0)
    address = weight.data_ptr()
    (mask,), _ = ops.threshold_reset_([weight], [forget], [retain], 1.0)
    assert torch.equal(weight, expected)
    assert weight.data_ptr() == address
    grad = torch.ones_like(weight)
    ops.mask_grads_([grad], [mask])
    assert torch.equal(grad, (forget > retain).float())


def test_parameters_in_channels_last_are_reset_like_any_leaf() -> None:
    weight = nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    ones = torch.ones(4, 3, 2, 2)
    _, counts = ops.threshold_reset_([weight], [2 * ones], [ones], 1.0)
    assert counts.tolist() == [48]
    assert not weight.any()


def test_masks_pack_and_unpack() -> None:
    for shape in [(0,), (1,), (31,), (32,), (5, 13), (64,)]:
        mask = torch.rand(shape) < 0.5
        assert torch.equal(ops.unpack_mask(ops.pack_mask(mask), shape), mask)
    assert ops.pack_mask(torch.tensor([True, False, True])).tolist() == [5]
    assert ops.pack_mask(torch.ones(32, dtype=torch.bool)).tolist() == [-1]


def one() -> list[Tensor]:
    return [torch.ones(3)]


REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "gamma zero": ((one(), one(), one(), 0.0), "gamma = 0 must be a positive number"),
    "gamma negative": ((one(), one(), one(), -1.0), "gamma = -1"),
    "gamma NaN": ((one(), one(), one(), float("nan")), "gamma = "),
    "lengths": ((one(), [], one(), 1.0), "1 weights but 0 forget importances"),
    "shapes": ((one(), [torch.ones(4)], one(), 1.0), r"forget\[0\] is Float \[4\]"),
    "importance dtype": ((one(), [torch.ones(3).half()], one(), 1.0), "importances are float32 or float64"),
    "importances differ": ((one(), [torch.ones(3).double()], one(), 1.0), "but retain"),
    "integer weights": (([torch.ones(3, dtype=torch.int64)], one(), one(), 1.0), "float32, bfloat16"),
    "an expanded weight": (
        ([torch.ones(1).expand(3)], one(), one(), 1.0),
        r"must be contiguous|single memory location",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_arguments_are_refused_and_nothing_changes(backend: Backend, name: str) -> None:
    args, message = REFUSED[name]
    moved = tuple([t.to(backend.device) for t in a] if isinstance(a, list) else a for a in args)
    before = [w.clone() for w in moved[0]]
    with pytest.raises(RuntimeError, match=message):
        backend.threshold_reset_(*moved)
    assert all(torch.equal(w, b) for w, b in zip(moved[0], before, strict=True))


def test_no_weights_at_all(backend: Backend) -> None:
    masks, counts = backend.threshold_reset_([], [], [], 1.0)
    assert masks == [] and counts.tolist() == []
    ops.mask_grads_([], [])


def test_a_tied_weight_is_refused(backend: Backend) -> None:
    weight = torch.ones(4, device=backend.device)
    ones = [torch.ones(4, device=backend.device)] * 2
    with pytest.raises(RuntimeError, match=r"weights\[1\] shares memory with weights\[0\]"):
        backend.threshold_reset_([weight, weight], ones, ones, 1.0)


def test_a_mask_of_the_wrong_length_is_refused(backend: Backend) -> None:
    with pytest.raises(RuntimeError, match=r"expected Int \[2\]"):
        backend(
            "mask_grads_",
            [torch.ones(33, device=backend.device)],
            [torch.ones(1, dtype=torch.int32, device=backend.device)],
        )


def test_list_planner_splits_where_a_launch_is_full() -> None:
    plan = ops._C.plan_tensor_list
    assert plan([]) == []
    assert plan([0, 5, 0]) == [{"tensors": [1], "blocks": 1}]
    assert [len(launch["tensors"]) for launch in plan([1] * 150)] == [64, 64, 22]
    # 400 million weights, and more than 2**31 in one tensor: block counts, not element counts, are 32-bit.
    assert plan([400_000_000]) == [{"tensors": [0], "blocks": 6104}]
    assert plan([2**33]) == [{"tensors": [0], "blocks": 2**17}]
    assert [launch["blocks"] for launch in plan([65536 * 3, 65536 * 3], 4)] == [3, 3]


def test_opcheck_and_compile() -> None:
    torch.manual_seed(0)
    for device in ("cpu", *(("cuda",) if torch.cuda.is_available() else ())):
        weights, forget, retain = (on(device, part) for part in problem([40, 7], torch.float32))
        retain, forget = [r.float() for r in retain], [f.float() for f in forget]
        masks, counts = ops.threshold_reset_(on(device, weights), forget, retain, 1.5)
        torch.library.opcheck(
            torch.ops.fastunlearn.threshold_reset_.default, (weights, forget, retain, 1.5, masks, counts)
        )
        torch.library.opcheck(torch.ops.fastunlearn.mask_grads_.default, (weights, masks))
    compiled = torch.compile(ops.threshold_reset_, fullgraph=True, backend="aot_eager")
    a, b = on("cpu", weights), on("cpu", weights)
    _, expected = ops.threshold_reset_(a, forget, retain, 1.5)
    assert torch.equal(compiled(b, forget, retain, 1.5)[1], expected)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
