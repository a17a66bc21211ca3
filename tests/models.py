"""A small trained classifier and its data, and a layer of other libraries, for the tests of the methods."""

from __future__ import annotations

import copy
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Pairs = list[tuple[Tensor, Tensor]]


class Conv1D(nn.Module):
    """As ``transformers.pytorch_utils.Conv1D``, GPT-2's linear layer: weight [in, out]."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.nf)


@cache
def _trained() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    centres = 2 * torch.randn(4, 1, 6, 6)
    y = torch.arange(160) % 4
    x = centres[y] + torch.randn(160, 1, 6, 6)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(96, 16), nn.ReLU(),
        nn.Linear(16, 4),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval(), x, y


def classifier() -> tuple[nn.Module, Pairs, Pairs]:
    """A fresh copy of a trained network with batch norm in eval mode, 20 samples to forget and 140 to retain."""
    model, x, y = _trained()
    return copy.deepcopy(model), pairs(x[:20], y[:20]), pairs(x[20:], y[20:])


def pairs(x: Tensor, y: Tensor, size: int = 32) -> Pairs:
    return list(zip(x.split(size), y.split(size), strict=True))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return all(torch.equal(after[name].nan_to_num(), value.nan_to_num()) for name, value in before.items())
