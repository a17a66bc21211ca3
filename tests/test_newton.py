"""The damped Newton step against torch.linalg.solve, what it refuses, and removal where it has an exact answer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastunlearn.data import Batch
from fastunlearn.methods.block import Block, trainable_layers
from fastunlearn.methods.curvature import gradient, matrix, product
from fastunlearn.methods.newton import NewtonStep, Privacy, newton_step


def symmetric(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = len(eigenvalues)
    q, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    h = q * eigenvalues.double() @ q.mT
    return (h + h.mT) / 2


def vector(size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def solve(solver: str, h: Tensor, g: Tensor, damping: float, **settings: Any) -> NewtonStep:
    step = newton_step(h if solver == "cholesky" else lambda v: h @ v, g, damping, "forget sample 3", **settings)
    assert step.solver == solver and step.step.dtype == torch.float64
    assert step.residual == pytest.approx(
        float(((h @ step.step + step.damping * step.step) - g).norm() / g.norm()) if bool(g.any()) else 0.0,
        rel=1e-6,
        abs=1e-9,
    )
    return step


both = pytest.mark.parametrize("solver", ["cholesky", "cg"])


@both
@pytest.mark.parametrize("size", [1, 2, 17, 130])
def test_step_equals_the_direct_solution(solver: str, size: int) -> None:
    h, g = symmetric(torch.linspace(0.0, 5.0, size)), vector(size)
    found = solve(solver, h, g, 0.1, tolerance=1e-12)
    truth = torch.linalg.solve(h + 0.1 * torch.eye(size, dtype=torch.float64), g)
    assert (found.step - truth).norm() <= 1e-8 * truth.norm()
    assert found.damping == 0.1 and (found.iterations == 0) == (solver == "cholesky")


@both
def test_ill_conditioned_systems_are_solved_to_the_residual(solver: str) -> None:
    """Condition 1e8: the step's error may be 1e8 residuals, the residual may not."""
    h, g = symmetric(torch.logspace(-8, 0, 60)), vector(60)
    found = solve(solver, h, g, 1e-8, max_iterations=20_000)
    assert found.damping == 1e-8 and found.residual <= 1e-8


@both
def test_damping_rises_until_the_matrix_is_positive_definite(solver: str) -> None:
    h = torch.diag(torch.tensor([1.0, -5.0], dtype=torch.float64))
    found = solve(solver, h, torch.ones(2), 0.01)
    assert found.damping == pytest.approx(10.0)
    assert torch.allclose(found.step, torch.tensor([1 / 11, 1 / 5], dtype=torch.float64))


@both
@pytest.mark.parametrize("size", [1, 40])
def test_indefinite_systems_get_a_direction_of_ascent(solver: str, size: int) -> None:
    h, g = symmetric(torch.linspace(-3.0, 3.0, size) if size > 1 else torch.tensor([-3.0])), vector(size)
    found = solve(solver, h, g, 0.02, tolerance=1e-12)
    assert found.damping == pytest.approx(20.0)
    truth = torch.linalg.solve(h + found.damping * torch.eye(size, dtype=torch.float64), g)
    assert (found.step - truth).norm() <= 1e-8 * truth.norm()
    assert float(found.step @ g) > 0


@both
def test_a_zero_matrix_leaves_the_damped_gradient(solver: str) -> None:
    found = solve(solver, torch.zeros(5, 5, dtype=torch.float64), vector(5), 0.5)
    assert torch.allclose(found.step, 2 * vector(5)) and found.damping == 0.5


@both
def test_a_zero_gradient_gives_a_zero_step(solver: str) -> None:
    found = solve(solver, symmetric(torch.ones(4)), torch.zeros(4), 0.01)
    assert torch.equal(found.step, torch.zeros(4, dtype=torch.float64))
    assert found.residual == 0.0 and found.iterations == 0


@both
def test_nan_and_inf_are_refused_by_name(solver: str) -> None:
    h, g = symmetric(torch.ones(3)), vector(3)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="forget sample 3: the gradient holds NaN or Inf"):
            solve(solver, h, torch.where(torch.arange(3) == 1, bad, g), 0.01)
        with pytest.raises(ValueError, match=r"forget sample 3: the curvature.* holds NaN or Inf"):
            solve(solver, torch.full((3, 3), bad, dtype=torch.float64), g, 0.01)


def test_float32_products_end_at_their_rounding() -> None:
    h, g = symmetric(torch.logspace(-2, 2, 80)), vector(80)
    rounded = h.float()
    found = newton_step(lambda v: (rounded @ v.float()).double(), g, 0.01, "x", tolerance=1e-12)
    truth = torch.linalg.solve(rounded.double() + 0.01 * torch.eye(80, dtype=torch.float64), g)
    assert (found.step - truth).norm() <= 1e-3 * truth.norm()


def test_a_product_that_is_no_symmetric_matrix_is_refused() -> None:
    turn = torch.tensor([[1.0, 9.0, 0.0], [-9.0, 1.0, 9.0], [0.0, -9.0, 1.0]], dtype=torch.float64)
    with pytest.raises(RuntimeError, match="forget sample 3: conjugate gradients left a residual"):
        newton_step(lambda v: turn @ v, vector(3), 0.01, "forget sample 3")
    with pytest.raises(RuntimeError, match=r"forget sample 3: the solve left a residual.*symmetric"):
        newton_step(turn, vector(3), 0.01, "forget sample 3")


def test_too_few_iterations_are_refused_not_returned() -> None:
    h, g = symmetric(torch.linspace(0.0, 5.0, 50)), vector(50)
    with pytest.raises(RuntimeError, match=r"forget sample 3: .* after 4 products; raise the damping or max_iter"):
        solve("cg", h, g, 0.01, max_iterations=3)


@both
@pytest.mark.parametrize("damping", [0.0, -1.0, math.nan, math.inf])
def test_bad_damping_is_refused(solver: str, damping: float) -> None:
    with pytest.raises(ValueError, match="damping must be a finite number above 0"):
        solve(solver, symmetric(torch.ones(3)), vector(3), damping)


def test_bad_shapes_and_settings_are_refused() -> None:
    h = symmetric(torch.ones(3))
    with pytest.raises(ValueError, match=r"a matrix \[3, 3\] for a gradient of 2 entries"):
        newton_step(h, vector(2), 0.1, "x")
    with pytest.raises(ValueError, match=r"must be a vector, got shape \[3, 3\]"):
        newton_step(h, h, 0.1, "x")
    with pytest.raises(ValueError, match="tolerance must be"):
        newton_step(h, vector(3), 0.1, "x", tolerance=0.0)
    with pytest.raises(ValueError, match="max_iterations must be 1 or more, got 0"):
        newton_step(lambda v: v, vector(3), 0.1, "x", max_iterations=0)


# Removal where the retrained optimum is known


class Penalised:
    """A linear model on 5 features with a squared penalty inside every sample's loss."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor], penalty: float) -> None:
        self.model = nn.Linear(5, 1).double()
        self.loss, self.penalty = loss, penalty

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        square = self.model.weight.square().sum() + self.model.bias.square().sum()
        return self.loss(outputs[:, 0], targets) + 0.5 * self.penalty * square

    def fit(self, x: Tensor, y: Tensor) -> Tensor:
        """Newton's method to convergence; returns the optimum."""
        for _ in range(30):
            loss = self.losses(self.model(x), y).mean()
            weights = [self.model.weight, self.model.bias]
            slopes = torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights, create_graph=True)])
            h = torch.stack([torch.cat([r.flatten() for r in torch.autograd.grad(s, weights, retain_graph=True)])
                             for s in slopes])  # fmt: skip
            step = torch.linalg.solve(h, slopes.detach())
            with torch.no_grad():
                self.model.weight -= step[None, :-1]
                self.model.bias -= step[-1:]
        assert float(slopes.detach().norm()) < 1e-12
        return self.get()

    def get(self) -> Tensor:
        return torch.cat([self.model.weight[0], self.model.bias]).detach()


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs - targets) ** 2


def logistic(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs, (targets > 0).to(outputs), reduction="none")


@pytest.mark.parametrize("removed", [1, 5])
@pytest.mark.parametrize("solver", ["cholesky", "cg"])
@pytest.mark.parametrize(
    ("loss", "penalty", "closer"), [(squared, 0.1, 1e6), (squared, 0.0, 1e6), (logistic, 0.01, 10)]
)
def test_the_exact_step_lands_at_the_retrained_optimum(
    loss: Callable[[Tensor, Tensor], Tensor], penalty: float, closer: float, solver: str, removed: int
) -> None:
    """Damping 1e-9; a quadratic takes one Newton step, so only damping is left of the distance."""
    torch.manual_seed(0)
    x = torch.randn(200, 5).double()
    y = x @ torch.randn(5).double() + torch.randn(200).double()
    problem = Penalised(loss, penalty)
    goal = problem.fit(x[removed:], y[removed:])
    start = problem.fit(x, y)
    block = Block(trainable_layers(problem.model, None), [("", 0)], None)
    gone, rest = (Batch((x[s],), {}, y[s], len(y[s])) for s in (slice(0, removed), slice(removed, None)))
    g = gradient(problem.model, block, [gone], problem.losses) * removed / (200 - removed)
    make = matrix if solver == "cholesky" else product
    step = newton_step(make(problem.model, block, [rest], problem.losses, "exact"), g, 1e-9, "z", tolerance=1e-12)
    block.add_(step.step)
    assert (start - goal).norm() > 1e-3
    assert (problem.get() - goal).norm() * closer <= (start - goal).norm()


class Residual(nn.Module):
    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.short = nn.Conv2d(before, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(inner + self.short(x))


@pytest.mark.parametrize("kind", ["exact", "gauss_newton", "fisher"])
def test_both_solvers_agree_on_filters_of_a_residual_network(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), Residual(6, 12, 2), Residual(12, 24, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10),
    ).double().eval()  # fmt: skip
    units = [("4.conv1", 3), ("4.conv2", 7), ("4.conv2", 20), ("7", 2), ("3.conv1", 1), ("4.short", 0)]
    block = Block(trainable_layers(model, None), units, None)
    assert block.size == 108 + 2 * 216 + 25 + 54 + 12
    batches = [Batch((torch.randn(8, 3, 12, 12).double(),), {}, torch.arange(8) % 10, 8) for _ in range(2)]
    g = gradient(model, block, batches[:1], None)
    dense = newton_step(matrix(model, block, batches, None, kind), g, 0.1, "z")
    iterated = newton_step(product(model, block, batches, None, kind), g, 0.1, "z", tolerance=1e-11)
    assert dense.damping == iterated.damping == 0.1 and 0 < iterated.iterations < 200
    assert (dense.step - iterated.step).norm() <= 1e-8 * dense.step.norm()


# The Gaussian mechanism


def test_deviation_is_the_formula() -> None:
    privacy = Privacy(epsilon=0.5, delta=1e-5, lipschitz=3.0, hessian_lipschitz=2.0, strong_convexity=0.1)
    expected = 2 * 4**2 * 2.0 * 3.0**2 / (0.1**3 * 1000**2) * math.sqrt(2 * math.log(1.25e5)) / 0.5
    assert privacy.deviation(4, 1000) == pytest.approx(expected, rel=1e-12)
    assert privacy.deviation(8, 1000) == pytest.approx(4 * expected, rel=1e-12)
    assert privacy.deviation(4, 2000) == pytest.approx(expected / 4, rel=1e-12)


def test_a_quadratic_loss_needs_no_noise() -> None:
    assert Privacy(0.5, 1e-5, 3.0, 0.0, 0.1).deviation(1, 10) == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epsilon": 1.0}, "epsilon must be above 0 and below 1"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"delta": 0.0}, "delta"),
        ({"delta": 1.0}, "delta"),
        ({"epsilon": math.nan}, "epsilon"),
        ({"lipschitz": 0.0}, "lipschitz"),
        ({"lipschitz": math.inf}, "lipschitz"),
        ({"hessian_lipschitz": -1.0}, "hessian_lipschitz"),
        ({"hessian_lipschitz": math.nan}, "hessian_lipschitz"),
        ({"strong_convexity": 0.0}, "strong_convexity"),
    ],
)
def test_constants_out_of_range_are_refused(change: dict[str, float], message: str) -> None:
    good = {"epsilon": 0.5, "delta": 1e-5, "lipschitz": 1.0, "hessian_lipschitz": 1.0, "strong_convexity": 0.1}
    with pytest.raises(ValueError, match=message):
        Privacy(**{**good, **change})


@pytest.mark.parametrize(("removed", "n"), [(0, 10), (10, 10), (-1, 5)])
def test_removing_none_or_all_is_refused(removed: int, n: int) -> None:
    with pytest.raises(ValueError, match="removed must be 1 or more and below n"):
        Privacy(0.5, 1e-5, 1.0, 1.0, 0.1).deviation(removed, n)
