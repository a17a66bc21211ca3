"""Gram matrices, randomized SVD, eigenproblems and the update of class forgetting: ours, and what others offer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastunlearn as fu
from fastunlearn import ops
from fastunlearn.subspace import GramAccumulator

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


def ragged(device: str) -> list[Tensor]:
    """64 matrices, 27 to 4608 wide, with spectra that fall as those of layer inputs do."""
    generator = torch.Generator().manual_seed(0)
    widths = (27, 64, 128, 147, 256, 288, 512, 576, 768, 1024, 1152, 1536, 2048, 2304, 3072, 4608)
    return [
        (torch.randn(m, d, generator=generator) * torch.arange(1, d + 1) ** -0.7).to(device)
        for m in (300, 512, 777, 1000)
        for d in widths
    ]


def relative_error(matrices: list[Tensor], factors: list[tuple[Tensor, Tensor, Tensor]]) -> float:
    """The mean of |A - U S Vh|_F / |A|_F, at rank 64."""
    errors = [
        float((a - u[:, :64] * s[:64] @ vh[:64]).norm() / a.norm())
        for a, (u, s, vh) in zip(matrices, factors, strict=True)
    ]
    return sum(errors) / len(errors)


def test_batched_rsvd(versus: Any, benchmark: Any, device: str) -> None:
    """64 ragged matrices at rank 64, beside torch.svd_lowrank and scikit-learn's randomized_svd, one by one."""
    from sklearn.utils.extmath import randomized_svd

    matrices = ragged(device)

    def as_tensor(x: Any) -> Tensor:
        return torch.from_numpy(x.copy()).to(device)

    def ours() -> list[tuple[Tensor, Tensor, Tensor]]:
        found = fu.batched_rsvd(matrices, rank=64)
        return list(zip(found.U, found.S, found.Vh, strict=True))

    def svd_lowrank() -> list[tuple[Tensor, Tensor, Tensor]]:
        found = [torch.svd_lowrank(a, q=min(80, *a.shape), niter=2) for a in matrices]
        return [(u, s, v.mT) for u, s, v in found]

    def scikit_learn() -> list[tuple[Tensor, Tensor, Tensor]]:
        options = {"n_oversamples": 16, "n_iter": 2, "random_state": 0}
        found = [randomized_svd(a.cpu().numpy(), min(64, *a.shape), **options) for a in matrices]
        return [(as_tensor(u), as_tensor(s), as_tensor(vh)) for u, s, vh in found]

    functions = {"ours": ours, "svd_lowrank": svd_lowrank, "scikit_learn": scikit_learn}
    errors = {name: relative_error(matrices, function()) for name, function in functions.items()}
    benchmark.extra_info["relative_errors"] = errors
    assert errors["ours"] <= 1.001 * min(errors.values()), errors
    versus(ours, rounds=5, svd_lowrank=svd_lowrank, scikit_learn=scikit_learn)


@pytest.mark.parametrize(("batch", "k"), [(500, 32), (64, 80), (16, 240)])
def test_batched_eigh(versus: Any, device: str, batch: int, k: int) -> None:
    """Beside torch.linalg.eigh of the whole batch."""
    x = torch.randn(batch, 2 * k, k, device=device)
    grams = x.mT @ x
    versus(lambda: fu.batched_eigh(grams), rounds=5, torch_eigh=lambda: torch.linalg.eigh(grams))


# (outputs, d) of every different layer
LAYERS = {
    "VGG11-BN": [(64, 27), (128, 576), (256, 1152), (256, 2304), (512, 2304), (512, 4608), (512, 512), (10, 512)],
    "ViT-B/16": [(768, 768), (2304, 768), (3072, 768), (768, 3072), (1000, 768)],
}
ROWS = 10_000  # of each set and layer, as many as the paper takes


@pytest.mark.parametrize("model", LAYERS)
def test_class_forgetting_update(versus: Any, device: str, model: str) -> None:
    """W - W (I - M_retain) M_forget from rows, every different layer once, beside the SVD of the rows in float32."""
    generator = torch.Generator().manual_seed(0)
    layers = []
    for p, d in LAYERS[model]:
        mix = torch.randn(d, d, generator=generator) / d**0.5
        sets = [(torch.randn(ROWS, d, generator=generator) @ mix).relu().to(device) for _ in range(2)]
        layers.append((torch.randn(p, d, generator=generator).to(device), *sets))

    def ours() -> None:
        for weight, retain, forget in layers:
            w = weight[None].double()
            kept, gone = (GramAccumulator(w.shape[2]).add_(rows) for rows in (retain, forget))
            w -= gone.filter(w - kept.filter(w, 100.0), 3.0)

    def projector(rows: Tensor, alpha: float) -> Tensor:
        _, s, vh = torch.linalg.svd(rows, full_matrices=False)
        r = s.square() / s.square().sum()
        return vh.mT * (alpha * r / ((alpha - 1) * r + 1)) @ vh

    def svd() -> None:
        for weight, retain, forget in layers:
            kept, gone = projector(retain, 100.0), projector(forget, 3.0)
            _ = weight - (weight - weight @ kept) @ gone

    versus(ours, rounds=1, warm_up=False, svd=svd)
