"""Models that others have hooked into, and models that are hard to take apart, against the per-sample loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_fisher import assert_equals_loop, images
from torch import Tensor, nn

from fastunlearn.fisher import fisher_diagonal


class Einsum(nn.Module):
    """A weight without a rule, a scale that a parent may set."""

    def __init__(self) -> None:
        super().__init__()
        self.weight3, self.scale = nn.Parameter(torch.randn(6, 6, 3) / 3), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nd,dpk->npk", x * self.scale, self.weight3).sin().sum(-1)


class TwoOutputs(nn.Module):
    """Returns a tensor and something computed from it, as encoders do that return what their decoder reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Einsum(), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.a(x)
        return h, (h * self.b).tanh() + h


class Forces(nn.Module):
    """A gradient inside the forward pass: the backward graph uses the same transposed weight again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        energy = self.b(self.a(x).tanh()).sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0]


class Experts(nn.Module):
    """One of two linear layers per token: rows of all samples are picked together."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts, self.head = (
            nn.Linear(6, 2),
            nn.ModuleList([nn.Linear(6, 6) for _ in "ab"]),
            nn.Linear(6, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        chosen, out = weights.argmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            mask = chosen == i
            if mask.any():
                out[mask] = expert(x[mask]).tanh() * weights[mask][:, i : i + 1]
        return self.head(out.sum(1))


class Then(nn.Module):
    """Any function of a few modules."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def scaled_gradient(model: Any, x: Tensor) -> Tensor:
    hidden = model.first(x)
    hidden.register_hook(lambda grad: grad / 2)
    return model.head(hidden.tanh())


def other_weight(model: Any, x: Tensor) -> Tensor:
    weights = {"weight": model.first.weight * 2, "bias": model.first.bias}
    return model.head(torch.func.functional_call(model.first, weights, x).tanh())


def set_between(model: Any, x: Tensor) -> Tensor:
    model.first.scale = 1.0
    x = model.first(x)
    model.first.scale = 2.0
    return model.head(model.first(x))


def hooked_einsum() -> nn.Module:
    module = Einsum()
    module.register_forward_hook(lambda module, args, output: 2 * output)
    return module


def first_and_head(function: Callable[[Any, Tensor], Tensor], first: nn.Module) -> nn.Module:
    return Then(function, first=first, head=nn.Linear(6, 4))


HARD: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "a hook on an activation": lambda: (first_and_head(scaled_gradient, nn.Linear(6, 6)), (6,)),
    "another weight put in a layer's place": lambda: (first_and_head(other_weight, nn.Linear(6, 6)), (6,)),
    "a scale set between two calls": lambda: (first_and_head(set_between, Einsum()), (6,)),
    "a hook on a module without a rule": lambda: (
        first_and_head(lambda model, x: model.head(model.first(x)), hooked_einsum()),
        (6,),
    ),
    "an output made of another output": lambda: (
        first_and_head(lambda model, x: model.head(model.first(x)[1]), TwoOutputs()),
        (6,),
    ),
    "gradients inside the forward pass": lambda: (
        first_and_head(lambda model, x: model.head(model.first(x)), Forces()),
        (6,),
    ),
    "mixture of experts": lambda: (Experts(), (3, 6)),
}


@pytest.mark.filterwarnings("ignore:no kernel for")
@pytest.mark.parametrize("name", HARD)
def test_hard_models_equal_the_loop(name: str) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        model, shape = HARD[name]()
        assert_equals_loop(model, images(*shape))


@pytest.mark.parametrize("sizes", [(5, 3), (1, 4)])
@pytest.mark.parametrize("mix", [lambda x: x - x.mean(0), lambda x: x.cumsum(0), lambda x: x + 0.1 * x.roll(1, 0)])
def test_company_is_refused_also_after_a_batch_of_one(mix: Callable[[Tensor], Tensor], sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = Then(lambda model, x: model.head(mix(x)), head=nn.Linear(6, 4)).double()
    with pytest.raises(ValueError, match="samples influence one another"):
        fisher_diagonal(model, images(6, sizes=sizes))


def test_what_can_not_be_right_is_refused_by_name() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4)).double()
    handle = model[0].weight.register_hook(lambda grad: 2 * grad)
    with pytest.raises(ValueError, match=r"0\.weight has hooks"):
        fisher_diagonal(model, images(6))
    handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        with pytest.raises(ValueError, match="hooks of all modules"):
            fisher_diagonal(model, images(6))
    finally:
        handle.remove()
    model.register_parameter("phase", nn.Parameter(torch.ones(2, dtype=torch.complex128)))
    with pytest.raises(ValueError, match="phase is complex"):
        fisher_diagonal(model, images(6))
