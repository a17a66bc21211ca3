"""Threshold resetting: ours beside composed torch and beside a copy of the same bytes."""

from __future__ import annotations

from typing import Any

import torch

from fastunlearn import ops


def test_threshold_reset(versus: Any, device: str) -> None:
    sizes = [2_359_296] * 4 + [589_824] * 8 + [512] * 24
    weights, forget, retain = ([torch.rand(s, device=device) for s in sizes] for _ in range(3))
    big = torch.cat([*forget, *retain])
    target = torch.empty_like(big)

    def composed() -> None:
        for w, f, r in zip(weights, forget, retain, strict=True):
            reset = f / r > 3.0
            reset.sum()
            w.masked_fill_(reset, 0)

    versus(
        lambda: ops.threshold_reset_(weights, forget, retain, 3.0),
        composed_torch=composed,
        copy_of_importances=lambda: target.copy_(big),
    )
