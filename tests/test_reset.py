"""The reset operators on every back end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import BACKENDS, Backend
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
        wide = (torch.float32, torch.bfloat16, torch.float64)[i % 3]
        f, r = torch.rand(size).square().to(wide), torch.rand(size).square().to(wide)
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
    got_masks, got_counts = backend(
        "threshold_reset_", ours, on(backend.device, forget), on(backend.device, retain), 1.7
    )
    assert got_counts.tolist() == counts.tolist()
    for ours_i, expected_i, mask, expected_mask in zip(ours, expected, got_masks, masks, strict=True):
        assert torch.equal(ours_i.cpu(), expected_i)
        assert torch.equal(mask.cpu(), expected_mask)


MODES: dict[str, dict[str, Any]] = {
    "zero": {},
    "mean": {"mode": "mean"},
    "dampen": {"mode": "dampen", "lambda_": 0.7},
    "dampen harder than gamma": {"mode": "dampen", "lambda_": 5.0},
    "eps": {"eps": 0.05},
    "one rule per tensor": {"eps": [0.01 * i for i in range(len(SIZES))]},
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_equals_the_reference(backend: Backend, name: str) -> None:
    torch.manual_seed(1)
    weights, forget, retain = problem(SIZES)
    gamma: Any = [0.5 + i for i in range(len(SIZES))] if "per tensor" in name else 1.3
    expected = [w.clone() for w in weights]
    masks, counts = reference.threshold_reset_(expected, forget, retain, gamma, **MODES[name])
    ours = on(backend.device, weights)
    got, got_counts = backend(
        "threshold_reset_", ours, on(backend.device, forget), on(backend.device, retain), gamma, **MODES[name]
    )
    assert got_counts.tolist() == counts.tolist()
    assert sum(counts.tolist()) > 0
    for ours_i, expected_i, mask, expected_mask in zip(ours, expected, got, masks, strict=True):
        assert torch.equal(mask.cpu(), expected_mask)
        assert torch.equal(ours_i.cpu(), expected_i)


def test_reset_to_initial_values(backend: Backend) -> None:
    torch.manual_seed(2)
    weights, forget, retain = problem(SIZES)
    fresh = [torch.randn_like(w) for w in weights]
    expected = [w.clone() for w in weights]
    reference.threshold_reset_(expected, forget, retain, 1.3, "init", init=fresh)
    ours = on(backend.device, weights)
    backend(
        "threshold_reset_", ours, on(backend.device, forget), on(backend.device, retain), 1.3, "init",
        init=on(backend.device, fresh),
    )  # fmt: skip
    assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, expected, strict=True))


def test_a_gamma_on_the_device_is_used_as_it_is(backend: Backend) -> None:
    torch.manual_seed(3)
    weights, forget, retain = problem([1000, 2000, 33])
    forget, retain = on(backend.device, forget), on(backend.device, retain)
    gamma = backend("select_gamma", forget, retain, 0.25, eps=0.01, per_tensor=True)
    assert gamma.device.type == backend.device
    _, counts = backend("threshold_reset_", on(backend.device, weights), forget, retain, gamma, eps=0.01)
    live = [int(((f > 0) | (r > 0)).sum()) for f, r in zip(forget, retain, strict=True)]
    ties = 0.02 * 2000  # the second pair is in bfloat16
    assert all(n * 0.25 - ties <= c <= round(n * 0.25) for n, c in zip(live, counts.tolist(), strict=True))
    assert counts[0] == round(live[0] * 0.25)


def test_weights_and_importances_at_odd_addresses(backend: Backend) -> None:
    torch.manual_seed(4)
    (weight,), (forget,), (retain,) = problem([1001], torch.float32)
    ours, f, r = weight.to(backend.device)[3:], forget.to(backend.device)[2:-1], retain.to(backend.device)[1:-2]
    expected = weight.clone()[3:]
    _, counts = reference.threshold_reset_([expected], [forget[2:-1]], [retain[1:-2]], 0.9)
    assert ours.data_ptr() % 16 and f.data_ptr() % 16
    _, got = backend("threshold_reset_", [ours], [f], [r], 0.9)
    assert got.tolist() == counts.tolist()
    assert torch.equal(ours.cpu(), expected)


def test_more_tensors_than_one_launch_takes(backend: Backend) -> None:
    torch.manual_seed(0)
    weights, forget, retain = problem([3 + i % 5 for i in range(900)])
    expected = [w.clone() for w in weights]
    _, counts = reference.threshold_reset_(expected, forget, retain, 0.8)
    ours = on(backend.device, weights)
    _, got = backend("threshold_reset_", ours, on(backend.device, forget), on(backend.device, retain), 0.8)
    assert got.tolist() == counts.tolist()
    assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, expected, strict=True))


def test_zero_over_zero_keeps_and_anything_over_zero_resets(backend: Backend) -> None:
    nan, inf = float("nan"), float("inf")
    forget = torch.tensor([0.0, 1.0, 1e-38, nan, 1.0, inf, inf, 2.0, 2.0])
    retain = torch.tensor([0.0, 0.0, 0.0, 1.0, nan, inf, 1.0, 1.0, inf])
    weight = torch.ones(9, device=backend.device)
    (mask,), counts = backend(
        "threshold_reset_", [weight], [forget.to(backend.device)], [retain.to(backend.device)], 2.0
    )
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
        masks, counts = backend("threshold_reset_", ours, on(backend.device, forget), on(backend.device, retain), 1.3)
        results.append([*ours, *masks, counts])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(sizes=st.lists(st.integers(0, 100), min_size=1, max_size=6), gamma=st.floats(1e-3, 1e3))
def test_any_list(backend: Backend, sizes: list[int], gamma: float) -> None:
    weights, forget, retain = problem(sizes)
    expected = [w.clone() for w in weights]
    masks, counts = reference.threshold_reset_(expected, forget, retain, gamma)
    ours = on(backend.device, weights)
    got_masks, got = backend("threshold_reset_", ours, on(backend.device, forget), on(backend.device, retain), gamma)
    assert got.tolist() == counts.tolist()
    assert all(torch.equal(a.cpu(), b) for a, b in zip([*ours, *got_masks], [*expected, *masks], strict=True))


def bits(value: Tensor) -> int:
    """The pattern, so that NaN equals itself."""
    return int(value.cpu().view(torch.int32))


@pytest.mark.parametrize("fraction", [1e-6, 0.01, 0.3, 0.5, 0.999999])
@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_selection_is_exact(backend: Backend, fraction: float, eps: float) -> None:
    torch.manual_seed(5)
    _, forget, retain = problem(SIZES)
    expected = reference.select_gamma(forget, retain, fraction, eps)
    got = backend("select_gamma", on(backend.device, forget), on(backend.device, retain), fraction, eps)
    assert got.dtype == torch.float32 and got.dim() == 0
    assert bits(got) == bits(expected)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    pairs=st.lists(
        st.tuples(
            st.sampled_from([0.0, -0.0, 1e-45, 1e-38, 0.5, 1.0, 1.5, 3e38, float("inf"), float("nan")]),
            st.sampled_from([0.0, 1e-45, 1e-38, 0.5, 1.0, 3.0, 3e38, float("inf"), float("nan")]),
        ),
        max_size=80,
    ),
    fraction=st.floats(0.001, 0.999),
)
def test_selection_among_ties_zeros_infinities_and_nan(
    backend: Backend, pairs: list[tuple[float, float]], fraction: float
) -> None:
    forget, retain = torch.tensor(pairs, dtype=torch.float32).reshape(-1, 2).T.contiguous()
    got = backend("select_gamma", [forget.to(backend.device)], [retain.to(backend.device)], fraction)
    expected = reference.select_gamma([forget], [retain], fraction)
    assert bits(got) == bits(expected) or bool(expected == got)  # -0 equals 0


def test_selected_gamma_cuts_exactly_the_fraction_of_live_weights(backend: Backend) -> None:
    torch.manual_seed(6)
    forget, retain = torch.rand(50_000), torch.rand(50_000)
    forget[:20_000] = 0
    retain[:10_000] = 0  # 10,000 dead weights, 10,000 with a ratio of zero
    f, r = [forget.to(backend.device)], [retain.to(backend.device)]
    for fraction in (0.1, 0.25, 0.5):
        gamma = float(backend("select_gamma", f, r, fraction))
        _, counts = backend("threshold_reset_", [torch.ones(50_000, device=backend.device)], f, r, gamma)
        assert counts.item() == round(fraction * 40_000)


def test_one_gamma_per_tensor_is_that_of_the_tensor_alone(backend: Backend) -> None:
    torch.manual_seed(7)
    _, forget, retain = problem(SIZES)
    got = backend("select_gamma", on(backend.device, forget), on(backend.device, retain), 0.3, per_tensor=True)
    alone = [reference.select_gamma([f], [r], 0.3) for f, r in zip(forget, retain, strict=True)]
    assert [bits(g) if g == g else None for g in got] == [bits(a) if a == a else None for a in alone]
    assert got[SIZES.index(0)].isnan()


def test_histogram_counts_every_live_ratio_in_its_bin(backend: Backend) -> None:
    torch.manual_seed(8)
    _, forget, retain = problem(SIZES)
    forget[0], retain[0] = torch.tensor([1.0]), torch.tensor([0.0])  # a ratio of infinity
    edges = ops.ratio_edges()
    assert edges[0] == 0 and edges[-1] == torch.inf and bool((edges.diff() > 0).all())
    ones = (edges >= 1) & (edges < 2)
    assert int(ones.sum()) == 8  # an octave
    got = backend("ratio_histogram", on(backend.device, forget), on(backend.device, retain), per_tensor=True).cpu()
    for row, f, r in zip(got, forget, retain, strict=True):
        ratio = reference.importance_ratio(f, r)
        ratio = ratio[ratio >= 0]
        expected = torch.bincount(torch.bucketize(ratio, edges, right=True) - 1, minlength=len(edges))
        assert torch.equal(row, expected)
    assert got[0, -1] == 1
    whole = backend("ratio_histogram", on(backend.device, forget), on(backend.device, retain)).cpu()
    assert torch.equal(whole, got.sum(0))


def masked_problem() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    weights = [torch.randn(size).to(DTYPES[i % len(DTYPES)]) for i, size in enumerate(SIZES)]
    grads = [torch.randn_like(w) for w in weights]
    masks = [torch.rand(size) < share for size, share in zip(SIZES, [0.4] * 6 + [0.0, 0.4, 1.0, 0.4], strict=True)]
    return weights, grads, masks


STEPS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "SGD": ("SGD", {"lr": 0.1}, {}),
    "SGD with decay": ("SGD", {"lr": 0.1, "weight_decay": 0.02}, {}),
    "momentum": ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}, {}),
    "Nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}, {}),
    "AdamW": ("AdamW", {"lr": 0.01, "weight_decay": 0.1}, {"betas": (0.8, 0.99)}),
}


@pytest.mark.parametrize("name", STEPS)
def test_masked_steps_are_those_of_torch_where_the_bit_is_set(backend: Backend, name: str) -> None:
    torch.manual_seed(9)
    kind, options, more = STEPS[name]
    weights, grads, masks = masked_problem()
    theirs = [nn.Parameter(w.to(torch.float64, copy=True)) for w in weights]
    optimizer = getattr(torch.optim, kind)(theirs, **options, **more)
    ours = on(backend.device, weights)
    words = on(backend.device, [reference.pack_mask(m) for m in masks])
    starts = [ops.mask_starts(w, n) for w, n in zip(words, SIZES, strict=True)]
    assert [int(s[-1]) for s in starts] == [int(m.sum()) for m in masks]
    wide = [torch.float64 if w.dtype == torch.float64 else torch.float32 for w in weights]
    state = [
        [torch.zeros(int(s[-1]), dtype=d, device=backend.device) for s, d in zip(starts, wide, strict=True)]
        for _ in range(2)
    ]
    for step in range(1, 4):
        for p, g in zip(theirs, grads, strict=True):
            p.grad = (g * step).double()
        optimizer.step()
        scaled = on(backend.device, [g * step for g in grads])
        if kind == "SGD":
            backend("masked_sgd_", ours, scaled, words, starts, state[0], **options)
        else:
            beta1, beta2 = more["betas"]
            backend(
                "masked_adamw_", ours, scaled, words, starts, *state, beta1=beta1, beta2=beta2, step=step, **options
            )
    for got, want, before, mask in zip(ours, theirs, weights, masks, strict=True):
        assert torch.equal(got.cpu()[~mask], before[~mask])  # bit for bit
        # Three roundings of the weight to its own type, and the arithmetic between them.
        unit = torch.finfo(before.dtype).eps
        torch.testing.assert_close(got.cpu()[mask].double(), want[mask], rtol=8 * unit, atol=8 * unit)


def test_masked_steps_do_not_read_gradients_outside_the_mask(backend: Backend) -> None:
    mask = torch.tensor([True, False, True])
    weight, grad = torch.ones(3, device=backend.device), torch.tensor([1.0, torch.nan, 2.0], device=backend.device)
    words = reference.pack_mask(mask).to(backend.device)
    backend("masked_sgd_", [weight], [grad], [words], [ops.mask_starts(words, 3)],
            [torch.zeros(2, device=backend.device)], lr=0.5)  # fmt: skip
    assert weight.tolist() == [0.5, 1.0, 0.0]


def test_bits_beyond_the_end_of_a_mask_move_nothing(backend: Backend) -> None:
    """An inverted mask has them set."""
    for size in (3, 33, 65535):
        memory = torch.ones(size + 64, device=backend.device)
        weight, grad = memory[32 : 32 + size], torch.ones(size, device=backend.device)
        words = ~reference.pack_mask(torch.arange(size) % 2 == 0).to(backend.device)
        starts = ops.mask_starts(words, size)
        assert int(starts[-1]) == size // 2
        state = [torch.zeros(size // 2, device=backend.device) for _ in range(2)]
        backend("masked_sgd_", [weight], [grad], [words], [starts], state[:1], lr=0.5, momentum=0.9)
        backend("masked_adamw_", [weight], [grad], [words], [starts], state[:1], state[1:], lr=0.5)
        backend("mask_grads_", [grad], [words])
        moved = (memory != 1).cpu()
        assert int(moved.sum()) == size // 2
        assert torch.equal(moved[32 : 32 + size], torch.arange(size) % 2 == 1)


def test_many_tensors_have_each_their_own_rule_and_state(backend: Backend) -> None:
    """More than one launch takes, so that an index into the launch is not one into the list."""
    torch.manual_seed(10)
    sizes = [3 + i % 40 for i in range(900)]
    weights, forget, retain = problem(sizes)
    gammas, floors = [0.5 + i / 300 for i in range(900)], [i / 9000 for i in range(900)]
    expected = [w.clone() for w in weights]
    masks, counts = reference.threshold_reset_(expected, forget, retain, gammas, eps=floors)
    f, r, ours = (on(backend.device, part) for part in (forget, retain, weights))
    got_masks, got = backend("threshold_reset_", ours, f, r, gammas, eps=floors)
    assert got.tolist() == counts.tolist()
    assert all(torch.equal(a.cpu(), b) for a, b in zip([*ours, *got_masks], [*expected, *masks], strict=True))
    selected = backend("select_gamma", f, r, 0.3, eps=floors, per_tensor=True)
    alone = [reference.select_gamma([a], [b], 0.3, e) for a, b, e in zip(forget, retain, floors, strict=True)]
    assert [bits(g) for g in selected] == [bits(a) for a in alone]
    rows = backend("ratio_histogram", f, r, eps=floors, per_tensor=True)
    assert rows.sum(1).tolist() == [int(((a > 0) | (b > 0)).sum()) for a, b in zip(forget, retain, strict=True)]

    starts = [ops.mask_starts(m, n) for m, n in zip(got_masks, sizes, strict=True)]
    wide = [torch.float64 if w.dtype == torch.float64 else torch.float32 for w in weights]
    state = [
        [torch.zeros(int(s[-1]), dtype=d, device=backend.device) for s, d in zip(starts, wide, strict=True)]
        for _ in range(2)
    ]
    theirs = [[x.cpu().clone() for x in part] for part in state]
    grads = [torch.randn_like(w) for w in weights]
    backend("masked_adamw_", ours, on(backend.device, grads), got_masks, starts, *state, lr=0.1)
    reference.masked_adamw_(expected, grads, masks, [s.cpu() for s in starts], *theirs, lr=0.1)
    for a, b in zip([*ours, *state[0], *state[1]], [*expected, *theirs[0], *theirs[1]], strict=True):
        unit = torch.finfo(b.dtype).eps
        torch.testing.assert_close(a.cpu(), b, rtol=8 * unit, atol=8 * unit)


@pytest.mark.parametrize("cut", ["transposed", "every second", "odd address"])
def test_strided_and_unaligned_tensors_everywhere(backend: Backend, cut: str) -> None:
    def view(x: Tensor) -> Tensor:
        return {"transposed": x.T, "every second": x[:, ::2], "odd address": x.view(-1)[1:]}[cut]

    torch.manual_seed(11)
    memory = [torch.rand(37, 54).to(backend.device) for _ in range(4)]
    weight, forget, retain, grad = map(view, memory)
    plain = [x.contiguous().cpu().clone() for x in (weight, forget, retain, grad)]
    gamma = backend("select_gamma", [forget], [retain], 0.4)
    assert bits(gamma) == bits(reference.select_gamma([plain[1]], [plain[2]], 0.4))
    # On CUDA and CPU the wrapper stages what is not contiguous; nothing outside the view may change.
    outside = memory[0].clone()
    view(outside).zero_()
    (mask,), counts = backend("threshold_reset_", [weight], [forget], [retain], gamma, eps=0.0)
    expected, expected_counts = reference.threshold_reset_([plain[0]], [plain[1]], [plain[2]], float(gamma))
    assert torch.equal(mask.cpu(), expected[0]) and counts.tolist() == expected_counts.tolist()
    assert torch.equal(weight.cpu(), plain[0])
    starts = ops.mask_starts(mask, weight.numel())
    buffer = torch.zeros(int(starts[-1]), device=backend.device)
    backend("masked_sgd_", [weight], [grad], [mask], [starts], [buffer], lr=0.1, momentum=0.9)
    theirs = torch.zeros_like(buffer.cpu())
    reference.masked_sgd_([plain[0]], [plain[3]], expected, [starts.cpu()], [theirs], 0.1, 0.9)
    torch.testing.assert_close(weight.cpu(), plain[0])
    backend("mask_grads_", [grad], [mask])
    reference.mask_grads_([plain[3]], expected)
    assert torch.equal(grad.cpu(), plain[3])
    view(memory[0]).zero_()
    assert torch.equal(memory[0], outside)


def test_memory_that_is_written_is_shared_with_nothing(backend: Backend) -> None:
    a, b = (torch.ones(40, device=backend.device) for _ in range(2))
    ones = [torch.ones(20, device=backend.device) for _ in range(2)]
    with pytest.raises(RuntimeError, match=r"forget\[1\] shares memory with weights\[0\]"):
        backend("threshold_reset_", [a[:20], b[:20]], [ones[0], a[10:30]], ones, 1.0)
    with pytest.raises(RuntimeError, match=r"initial\[0\] shares memory with weights\[1\]"):
        backend("threshold_reset_", [a[:20], b[:20]], ones, ones, 1.0, "init", init=[b[19:39], ones[0]])
    words = torch.ones(1, dtype=torch.int32, device=backend.device)
    starts, state = ops.mask_starts(words, 20), torch.zeros(1, device=backend.device)
    with pytest.raises(RuntimeError, match=r"squares\[0\] shares memory with means\[0\]"):
        backend("masked_adamw_", [a[:20]], [b[:20]], [words], [starts], [state], [state], lr=0.1)
    with pytest.raises(RuntimeError, match=r"grads\[0\] shares memory with weights\[0\]"):
        backend("masked_sgd_", [a[:20]], [a[19:39]], [words], [starts], [state], lr=0.1)
    # Side by side is not shared.
    backend("threshold_reset_", [a[:20], a[20:]], [b[:20], b[20:]], ones, 1.0)


# On CUDA the caller is trusted: see ops.masked_sgd_.
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "cuda"], indirect=True)
def test_starts_of_another_mask_are_refused(backend: Backend) -> None:
    few, more = (ops.pack_mask(torch.arange(2000) % n == 0) for n in (3, 2))
    with pytest.raises(RuntimeError, match=r"starts\[0\] is not that of masks\[0\]"):
        backend("masked_sgd_", [torch.ones(2000)], [torch.ones(2000)], [more], [ops.mask_starts(few, 2000)],
                [torch.zeros(667)], lr=0.1)  # fmt: skip


def test_a_state_of_the_wrong_length_is_refused() -> None:
    words = ops.pack_mask(torch.tensor([True, False, True]))
    with pytest.raises(RuntimeError, match=r"momentum_buffers\[0\] is Float \[3\]"):
        ops.masked_sgd_([torch.ones(3)], [torch.ones(3)], [words], [ops.mask_starts(words, 3)], [torch.zeros(3)], 0.1)
    with pytest.raises(RuntimeError, match="expected contiguous Float"):
        ops.masked_sgd_(
            [torch.ones(3)], [torch.ones(3)], [words], [ops.mask_starts(words, 3)], [torch.zeros(2).double()], 0.1
        )
    with pytest.raises(ValueError, match="counts from 1"):
        ops.masked_adamw_([], [], [], [], [], [], 0.1, step=0)


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


REFUSED: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    "gamma zero": ((one(), one(), one(), 0.0), ValueError, "gamma must be finite and positive, got 0"),
    "gamma negative": ((one(), one(), one(), -1.0), ValueError, "got -1"),
    "gamma NaN": ((one(), one(), one(), float("nan")), ValueError, "got nan"),
    "two gammas": ((one(), one(), one(), [1.0, 2.0]), ValueError, "one for each of 1 tensors"),
    "mode": ((one(), one(), one(), 1.0, "half"), ValueError, "mode must be one of zero, mean, init, dampen"),
    "eps": ((one(), one(), one(), 1.0, "zero", -1.0), ValueError, "eps must be finite and not negative"),
    "init missing": ((one(), one(), one(), 1.0, "init"), ValueError, "belong together"),
    "init shape": ((one(), one(), one(), 1.0, "init", 0.0, [torch.ones(4)]), RuntimeError, r"initial\[0\] is Float"),
    "init left over": ((one(), one(), one(), 1.0, "zero", 0.0, one()), ValueError, "belong together"),
    "lambda": ((one(), one(), one(), 1.0, "dampen", 0.0, None, 0.0), ValueError, "lambda_ must be a positive"),
    "lengths": ((one(), [], one(), 1.0), RuntimeError, "0 forget importances but 1 retain"),
    "fewer importances": ((one(), [], [], 1.0), RuntimeError, "1 weights but 0 forget importances"),
    "shapes": ((one(), [torch.ones(4)], [torch.ones(4)], 1.0), RuntimeError, r"forget\[0\] is Float \[4\]"),
    "importance dtype": (
        (one(), [torch.ones(3).half()], [torch.ones(3).half()], 1.0),
        RuntimeError,
        "importances are float32, bfloat16 or float64",
    ),
    "importances differ": ((one(), [torch.ones(3).double()], one(), 1.0), RuntimeError, "but retain"),
    "integer weights": (([torch.ones(3, dtype=torch.int64)], one(), one(), 1.0), RuntimeError, "float32, bfloat16"),
    "an expanded weight": (
        ([torch.ones(1).expand(3)], one(), one(), 1.0),
        RuntimeError,
        r"must be contiguous|single memory location",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_arguments_are_refused_and_nothing_changes(backend: Backend, name: str) -> None:
    args, error, message = REFUSED[name]
    moved = tuple([t.to(backend.device) if isinstance(t, Tensor) else t for t in a] if isinstance(a, list) else a
                  for a in args)  # fmt: skip
    before = [w.clone() for w in moved[0]]
    with pytest.raises(error, match=message):
        backend("threshold_reset_", *moved)
    assert all(torch.equal(w, b) for w, b in zip(moved[0], before, strict=True))


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_a_fraction_that_is_none_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        ops.select_gamma(one(), one(), fraction)


def test_no_weights_at_all(backend: Backend) -> None:
    masks, counts = backend("threshold_reset_", [], [], [], 1.0)
    assert masks == [] and counts.tolist() == []
    ops.mask_grads_([], [])


def test_a_tied_weight_is_refused(backend: Backend) -> None:
    weight = torch.ones(4, device=backend.device)
    ones = [torch.ones(4, device=backend.device)] * 2
    with pytest.raises(RuntimeError, match=r"weights\[1\] shares memory with weights\[0\]"):
        backend("threshold_reset_", [weight, weight], ones, ones, 1.0)


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
    assert [len(launch["tensors"]) for launch in plan([1] * 1000)] == [400, 400, 200]
    assert len(plan([2048] * 148)) == 1  # as many as GPT-2 has, in one launch
    # 400 million weights, and more than 2**31 in one tensor: block counts, not element counts, are 32-bit.
    assert plan([400_000_000]) == [{"tensors": [0], "blocks": 6104}]
    assert plan([2**33]) == [{"tensors": [0], "blocks": 2**17}]
    assert [launch["blocks"] for launch in plan([65536 * 3, 65536 * 3], 4)] == [3, 3]


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_opcheck_and_compile(device: str) -> None:
    torch.manual_seed(0)
    weights, forget, retain = (on(device, part) for part in problem([40, 7], torch.float32))
    retain, forget = [r.float() for r in retain], [f.float() for f in forget]
    masks, counts = ops.threshold_reset_(on(device, weights), forget, retain, 1.5)
    starts = [ops.mask_starts(m, w.numel()) for m, w in zip(masks, weights, strict=True)]
    state = [torch.zeros(int(s[-1]), device=device) for s in starts]
    second = [torch.zeros_like(s) for s in state]
    rules, grads = torch.ones(2, 3, dtype=torch.float64, device=device), [torch.ones_like(w) for w in weights]
    histogram = torch.zeros(1, 2048, dtype=torch.int64, device=device)
    prefix = torch.zeros(1, dtype=torch.int32, device=device)
    operators = torch.ops.fastunlearn
    for operator, args in (
        (operators.threshold_reset_, (weights, forget, retain, rules, 0, 1.0, [], masks, counts)),
        (operators.ratio_histogram_, (histogram, forget, retain, rules[:, 0].contiguous(), prefix, 0)),
        (operators.mask_grads_, (grads, masks)),
        (operators.masked_sgd_, (weights, grads, masks, starts, state, 0.1, 0.9, 0.0, False)),
        (operators.masked_adamw_, (weights, grads, masks, starts, state, second, 0.1, 0.9, 0.99, 1e-8, 0.0, 1)),
    ):
        torch.library.opcheck(operator.default, args)

    def clean(weights: list[Tensor], forget: list[Tensor], retain: list[Tensor]) -> Tensor:
        gamma = ops.select_gamma(forget, retain, 0.3)
        masks, counts = ops.threshold_reset_(weights, forget, retain, gamma)
        ops.mask_grads_(weights, masks)
        return counts

    compiled = torch.compile(clean, fullgraph=True, backend="aot_eager")
    a, b = on(device, weights), on(device, weights)
    assert torch.equal(compiled(b, forget, retain), clean(a, forget, retain))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
