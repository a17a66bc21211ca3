"""Resetting and selecting over whole models: ours beside composed torch and beside a copy of the same bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastunlearn import ops

GAMMA, FRACTION = 3.0, 0.3


def resnet50() -> list[tuple[int, ...]]:
    """161 tensors, 25.6 million weights."""

    def convolution(out: int, into: int, size: int) -> list[tuple[int, ...]]:
        return [(out, into, size, size), (out,), (out,)]  # and its batch norm

    shapes, channels = convolution(64, 3, 7), 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [
                *convolution(width, channels, 1),
                *convolution(width, width, 3),
                *convolution(4 * width, width, 1),
            ]
            if block == 0:
                shapes += convolution(4 * width, channels, 1)
            channels = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def transformer() -> list[tuple[int, ...]]:
    """GPT-2's: 148 tensors, 124 million weights."""
    d = 768
    block: list[tuple[int, ...]] = [
        (d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,), (d,), (d,), (d, 4 * d), (4 * d,), (4 * d, d), (d,),
    ]  # fmt: skip
    return [(50257, d), (1024, d), *12 * block, (d,), (d,)]


MODELS = {"resnet50": resnet50, "transformer": transformer, "400M": lambda: [(20_000, 10_000), *20 * [(10_000, 1000)]]}


@pytest.fixture(params=MODELS)
def lists(request: pytest.FixtureRequest, device: str) -> list[list[Tensor]]:
    """Weights, forget and retain importances; about one ratio in six passes GAMMA."""
    torch.manual_seed(0)
    shapes = MODELS[request.param]()
    return [[torch.rand(shape, device=device) for shape in shapes] for _ in range(3)]


def test_threshold_reset(versus: Any, lists: list[list[Tensor]]) -> None:
    weights, forget, retain = lists
    total = sum(w.numel() for w in weights)
    # As many bytes as a CPU moves: two importances read, and the weights read and written, because nearly every cache
    # line of 16 holds one that passes. A GPU writes sectors of 32 bytes and reads none: there `moved` flatters.
    source = torch.cat([t.flatten() for t in (*forget, *retain)])
    target = torch.empty_like(source)

    def composed(weights: list[Tensor], forget: list[Tensor], retain: list[Tensor]) -> list[Tensor]:
        counts = []
        for w, f, r in zip(weights, forget, retain, strict=True):
            reset = f / r > GAMMA
            counts.append(reset.sum())
            w.masked_fill_(reset, 0)
        return counts

    def foreach() -> list[Tensor]:
        resets = [ratio > GAMMA for ratio in torch._foreach_div(forget, retain)]
        torch._foreach_mul_(weights, [~reset for reset in resets])
        return [reset.sum() for reset in resets]

    # The compiler takes minutes over 148 tensors, so its peer gets them as one.
    compiled = torch.compile(composed)
    flat = lists if len(weights) <= 32 else [[torch.cat([t.flatten() for t in part])] for part in lists]
    versus(
        lambda: ops.threshold_reset_(weights, forget, retain, GAMMA),
        moved=16 * total,
        composed_torch=lambda: composed(weights, forget, retain),
        foreach=foreach,
        copy_of_as_many_bytes=lambda: target.copy_(source),
        compiled_as_one_tensor=lambda: compiled(*flat),
    )


def test_select_gamma(versus: Any, lists: list[list[Tensor]]) -> None:
    _, forget, retain = lists
    total = sum(f.numel() for f in forget)

    def ratios() -> Tensor:
        return torch.cat([(f / r).flatten() for f, r in zip(forget, retain, strict=True)])

    def kthvalue() -> Tensor:
        return ratios().kthvalue(total - round(FRACTION * total)).values

    def topk() -> Tensor:
        return ratios().topk(round(FRACTION * total) + 1).values[-1]

    assert ops.select_gamma(forget, retain, FRACTION) == kthvalue()
    read = torch.empty(2 * total, device=forget[0].device)
    versus(
        lambda: ops.select_gamma(forget, retain, FRACTION),
        rounds=3,
        moved=3 * 8 * total,
        kthvalue=kthvalue,
        topk=topk,
        one_read_of_both=lambda: read.sum(),
    )


def test_masked_step(versus: Any, device: str) -> None:
    torch.manual_seed(0)
    shapes = resnet50()
    weights, grads = ([torch.rand(shape, device=device) for shape in shapes] for _ in range(2))
    masks = [ops.pack_mask(torch.rand(shape, device=device) < FRACTION) for shape in shapes]
    starts = [ops.mask_starts(m, w.numel()) for m, w in zip(masks, weights, strict=True)]
    buffers = [torch.zeros(int(start[-1]), device=device) for start in starts]
    dense = [w.clone().requires_grad_() for w in weights]
    optimizer = torch.optim.SGD(dense, lr=0.01, momentum=0.9, foreach=True)

    def mask_and_step() -> None:
        for parameter, grad in zip(dense, grads, strict=True):
            parameter.grad = grad
        ops.mask_grads_(grads, masks)
        optimizer.step()

    versus(
        lambda: ops.masked_sgd_(weights, grads, masks, starts, buffers, 0.01, 0.9),
        mask_grads_then_sgd=mask_and_step,
    )
