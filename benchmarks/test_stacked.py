"""Small models trained at once, beside the same models one after another: whole trainings, the same weights."""

from __future__ import annotations

from typing import Any

import torch
from conftest import DEVICE, Versus
from torch import Tensor, nn

from fastunlearn.demo import small_cnn
from fastunlearn.evaluate.stacked import Build, Mode, Recipe, train_models


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def compare(versus: Versus, benchmark: Any, build: Build, models: int, x: Tensor, y: Tensor) -> None:
    """Half of the samples each; also kept: what ``mode="auto"`` takes and the seconds a step by which it chooses."""
    generator = torch.Generator().manual_seed(0)
    keep = torch.stack([torch.randperm(len(y), generator=generator) < len(y) // 2 for _ in range(models)])
    x, y = x.to(DEVICE), y.to(DEVICE)

    def train(mode: Mode, epochs: int = 5) -> Any:
        return train_models(build, Recipe(epochs=epochs), x, y, keep, range(models), mode=mode, device=DEVICE)

    _, report = train("auto", 1)
    benchmark.extra_info |= {"auto": report.mode, "seconds_per_step": report.seconds_per_step}
    versus(lambda: train("stacked"), rounds=5, sequential=lambda: train("sequential"))


def test_eight_small_cnns(versus: Versus, benchmark: Any) -> None:
    """The demo's network on 1,400 images of 8 x 8."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.rand(1400, 1, 8, 8, generator=generator), torch.randint(10, (1400,), generator=generator)
    compare(versus, benchmark, small_cnn, 8, x, y)


def test_sixteen_mlps(versus: Versus, benchmark: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.rand(1400, 64, generator=generator), torch.randint(10, (1400,), generator=generator)
    compare(versus, benchmark, mlp, 16, x, y)
