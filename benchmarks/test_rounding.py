"""Adding float32 squares to bfloat16 sums of whole models, beside torch: to nearest, and at random as one writes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_reset import resnet50
from torch import Tensor

from fastunlearn import ops

LISTS = {"resnet50": resnet50, "one of 32M": lambda: [(4096, 8192)]}


@pytest.mark.parametrize("name", LISTS)
def test_add_rounded(versus: Any, device: str, name: str) -> None:
    torch.manual_seed(0)
    shapes = LISTS[name]()
    sums = [torch.rand(shape, device=device).bfloat16() for shape in shapes]
    addends = [torch.rand(shape, device=device) * 2.0**-10 for shape in shapes]
    sizes = [s.numel() for s in sums]
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    wide = [torch.rand(shape, device=device) for shape in shapes]

    def nearest(sums: list[Tensor], addends: list[Tensor]) -> None:
        for total, addend in zip(sums, addends, strict=True):
            total.copy_(total.float() + addend)

    def random(sums: list[Tensor], addends: list[Tensor]) -> None:
        for total, addend in zip(sums, addends, strict=True):
            bits = (total.float() + addend).view(torch.int32)
            noise = torch.randint_like(bits, 1 << 16)
            total.copy_(((bits + noise) & -65536).view(torch.float32))  # infinities and NaN left out

    compiled = torch.compile(random)
    flat = [[torch.cat([t.flatten() for t in part])] for part in (sums, addends)]
    versus(
        lambda: ops.add_rounded_(sums, addends, 0, 0, offsets),
        moved=8 * sum(sizes),
        to_nearest=lambda: nearest(sums, addends),
        at_random_in_torch=lambda: random(sums, addends),
        at_random_compiled_as_one_tensor=lambda: compiled(*flat),
        float32_sums=lambda: torch._foreach_add_(wide, addends),
    )
