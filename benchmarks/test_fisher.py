"""Squared per-sample gradients: ours, what one composes from torch, and the backward pass it stands beside."""

from __future__ import annotations

from os import environ
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastunlearn import fisher_diagonal, ops

LINEAR = {"T=1": (256, 1, 512, 512), "T=64": (32, 64, 256, 256), "T=512": (4, 512, 768, 768)}


@pytest.mark.parametrize("name", LINEAR)
def test_sq_grad_linear(versus: Any, device: str, name: str) -> None:
    """Beside bmm -> square -> sum (holds N x P x D numbers) and the ordinary weight gradient."""
    n, t, d, p = LINEAR[name]
    a, g = torch.randn(n, t, d, device=device), torch.randn(n, t, p, device=device)
    out = torch.zeros(p, d, device=device)
    versus(
        lambda: ops.sq_grad_linear(out, a, g),
        bmm_square_sum=lambda: torch.bmm(g.mT, a).square().sum(0),
        weight_gradient=lambda: g.flatten(0, 1).T @ a.flatten(0, 1),
    )


# What tensor cores take, in sizes that fill a GPU.
ON_GPU = environ.get("FASTUNLEARN_BENCH_DEVICE", "cpu") == "cuda"
LARGE = ((256, 1, 4096, 4096), (32, 128, 768, 768), (32, 128, 4096, 4096), (256, 16, 4096, 4096))
TENSOR_CORES = {
    f"T={t} {p} x {d} {dtype}": (n, t, d, p, dtype)
    for n, t, d, p in (LARGE if ON_GPU else ((32, 64, 256, 256),))
    for dtype in ("bfloat16", "tf32")
}


@pytest.mark.parametrize("name", TENSOR_CORES)
def test_sq_grad_linear_on_tensor_cores(versus: Any, device: str, name: str) -> None:
    n, t, d, p, kind = TENSOR_CORES[name]
    dtype = torch.float32 if kind == "tf32" else getattr(torch, kind)
    a, g = torch.randn(n, t, d, device=device, dtype=dtype), torch.randn(n, t, p, device=device, dtype=dtype)
    out = torch.zeros(p, d, device=device)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    try:
        versus(
            lambda: ops.sq_grad_linear(out, a, g),
            bmm_square_sum=lambda: torch.bmm(g.mT, a).float().square().sum(0),
            weight_gradient=lambda: g.flatten(0, 1).T @ a.flatten(0, 1),
        )
    finally:
        torch.set_float32_matmul_precision(before)


def test_sq_grad_conv2d(versus: Any, device: str) -> None:
    """Beside unfold -> bmm -> square -> sum."""
    x, g = torch.randn(32, 64, 16, 16, device=device), torch.randn(32, 64, 16, 16, device=device)
    out = torch.zeros(64, 64, 3, 3, device=device)

    def unfolded() -> Tensor:
        return torch.bmm(g.flatten(2), F.unfold(x, 3, padding=1).mT).square().sum(0)

    versus(lambda: ops.sq_grad_conv2d(out, x, g, (1, 1), (1, 1)), unfold_bmm_square_sum=unfolded)


def test_fisher_diagonal_of_a_small_cnn(versus: Any, device: str) -> None:
    """Beside one plain forward and backward pass, a loop over samples, and vmap(grad)."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 64, 128), nn.ReLU(), nn.Linear(128, 10),
    ).to(device)  # fmt: skip
    x, y = torch.randn(32, 3, 32, 32, device=device), torch.randint(10, (32,), device=device)
    parameters = dict(model.named_parameters())

    def plain() -> None:
        torch.autograd.grad(F.cross_entropy(model(x), y), list(parameters.values()))

    def loop() -> None:
        sums = [torch.zeros_like(p) for p in parameters.values()]
        for n in range(len(x)):
            loss = F.cross_entropy(model(x[n : n + 1]), y[n : n + 1])
            for total, grad in zip(sums, torch.autograd.grad(loss, list(parameters.values())), strict=True):
                total.add_(grad.square())

    def sample_loss(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, weights, (image[None],))
        return F.cross_entropy(logits, label[None])

    detached = {name: p.detach() for name, p in parameters.items()}
    per_sample = torch.func.vmap(torch.func.grad(sample_loss), (None, 0, 0))

    def vmap() -> None:
        for grad in per_sample(detached, x, y).values():
            grad.square().sum(0)

    versus(lambda: fisher_diagonal(model, [(x, y)]), plain_backward=plain, loop=loop, vmap=vmap)
