"""Units of a model as features: what is averaged, in which order, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastunlearn.activations import unit_activations


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.line = nn.Conv1d(3, 2, 1)
        self.head = nn.Linear(2, 4)
        self.unused = nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.line(self.drop(self.conv(x)).relu().flatten(2))
        return self.head(h.mean(2)) + self.head(-h.mean(2)).relu_()


def test_units_are_means_over_positions_and_calls_in_model_order() -> None:
    model, x = Net(), torch.randn(5, 1, 4, 4)
    found = unit_activations(model, x)
    assert found.units == [(name, i) for name, n in (("conv", 3), ("line", 2), ("head", 4)) for i in range(n)]
    model.eval()
    conv = model.conv(x)
    line = model.line(conv.relu().flatten(2))
    head = (model.head(line.mean(2)) + model.head(-line.mean(2))) / 2
    expected = torch.cat([conv.mean((2, 3)), line.mean(2), head], 1)
    assert torch.allclose(found.values, expected, atol=1e-6)
    assert torch.equal(found.outputs, model(x))
    assert unit_activations(model, x, ["line"]).units == [("line", 0), ("line", 1)]


def test_units_of_a_sequence_are_means_over_its_positions() -> None:
    model, x = nn.Linear(3, 2), torch.randn(4, 6, 3)
    assert torch.allclose(unit_activations(model, x).values, model(x).mean(1), atol=1e-6)


def test_unit_activations_put_modes_hooks_and_random_state_back_after_an_exception() -> None:
    model = Net().train()
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError):
        unit_activations(model, torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(0)))
    assert model.training and model.drop.training
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_unit_activations_refuse_what_they_cannot_attribute() -> None:
    with pytest.raises(ValueError, match="'drop' is not a Linear"):
        unit_activations(Net(), torch.zeros(2, 1, 4, 4), ["drop"])
    with pytest.raises(ValueError, match="called none"):
        unit_activations(Net(), torch.zeros(2, 1, 4, 4), ["unused"])

    class Merged(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.reshape(1, -1, 3))

    with pytest.raises(ValueError, match="samples along its first axis"):
        unit_activations(Merged(3, 2), torch.zeros(4, 3))
