"""Second moments of the patches under a convolution: ours, and what one composes from torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fastunlearn import ops

# images, channels, side, groups; 3 x 3 kernels with padding 1
CONV = {
    "d=2304": (100, 256, 8, 1),
    "d=576": (32, 64, 16, 1),
    "d=27": (100, 3, 32, 1),
    "depthwise": (32, 256, 14, 256),
}


@pytest.mark.parametrize("name", CONV)
def test_gram_accumulate_conv2d(versus: Any, device: str, name: str) -> None:
    """Beside unfold -> matmul, which holds every pixel nine times."""
    n, channels, side, groups = CONV[name]
    images = torch.randn(n, channels, side, side, device=device)
    d = 9 * channels // groups
    gram = torch.zeros(groups, d, d, device=device, dtype=torch.float64)

    def unfolded() -> None:
        patches = F.unfold(images, 3, padding=1).view(n, groups, d, side * side)
        rows = patches.permute(1, 2, 0, 3).reshape(groups, d, n * side * side)
        gram.add_(rows @ rows.mT)

    versus(lambda: ops.gram_accumulate_conv2d_(gram, images, (3, 3), padding=(1, 1)), unfold_matmul=unfolded)
