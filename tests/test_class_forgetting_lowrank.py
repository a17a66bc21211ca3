"""ClassForgetting with solver="rsvd" and "sketch": exact at full rank, bounded below it, no d x d."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastunlearn import ClassForgetting
from fastunlearn.slots import supported_layers
from fastunlearn.subspace import collect_grams, low_rank, moments_eigenpairs

Pair = tuple[Tensor, Tensor]
SOLVERS: list[Any] = ["rsvd", "sketch"]


def blobs(n: int = 200, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[list[Pair], list[Pair]]:
    """Class 0 to forget and classes 1, 2 to retain, 1 x 6 x 6 images."""
    generator = torch.Generator().manual_seed(7)
    centres = 2 * torch.randn(3, 1, 6, 6, generator=generator).to(dtype)
    generator.manual_seed(seed)
    y = torch.arange(n) % 3
    x = centres[y] + 0.5 * torch.randn(n, 1, 6, 6, generator=generator).to(dtype)
    return [(x[y == 0], y[y == 0])], [(x[y == 1], y[y == 1]), (x[y == 2], y[y == 2])]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 24),
        nn.ReLU(), nn.Linear(24, 3),
    ).double()  # fmt: skip


def decaying(d: int, n: int, seed: int, rate: float = 5.0) -> Tensor:
    """Float64 rows whose singular values fall by e every ``rate``."""
    generator = torch.Generator().manual_seed(seed)
    v, _ = torch.linalg.qr(torch.randn(d, d, generator=generator).double())
    return torch.randn(n, d, generator=generator).double() * (-torch.arange(d) / rate).exp() @ v.mT


def linear_case(d: int, n: int) -> tuple[nn.Linear, list[Pair], list[Pair]]:
    torch.manual_seed(0)
    forget, retain = decaying(d, n, 1), decaying(d, n, 2)
    return nn.Linear(d, 7).double(), [(forget, torch.zeros(n))], [(retain, torch.zeros(n))]


@pytest.mark.parametrize("samples", [18, 200])  # fewer rows than columns in the Linear layers, and more
@pytest.mark.parametrize("solver", SOLVERS)
def test_at_full_rank_they_agree_with_cholesky(solver: Any, samples: int) -> None:
    one, other = network(), network()
    forget, retain = blobs(samples)
    ClassForgetting(solver="cholesky").unlearn(one, forget, retain)
    ClassForgetting(solver=solver, rank=1000).unlearn(other, forget, retain)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6 * float(a.detach().abs().max()))


@pytest.mark.parametrize("n", [40, 500])
@pytest.mark.parametrize("rank", [5, 10, 25])
@pytest.mark.parametrize("solver", SOLVERS)
def test_below_full_rank_the_update_errs_by_no_more_than_what_is_said(solver: Any, rank: int, n: int) -> None:
    """Of W (I - M_r) M_f: |W| times the gains that the two filters drop, which ``details`` states."""
    exact, forget, retain = linear_case(120, n)
    found = copy.deepcopy(exact)
    norm = float(torch.linalg.matrix_norm(exact.weight.detach(), 2))
    ClassForgetting(solver="cholesky", max_patches=None).unlearn(exact, forget, retain)
    method = ClassForgetting(solver=solver, rank=rank, max_patches=None)
    outcome = method.unlearn(found, forget, retain)
    bound = 0.0
    for batches, alpha in ((retain, 100.0), (forget, 3.0)):
        sketched = {name: rank for name in supported_layers(found)} if solver == "sketch" else {}
        moments = collect_grams(found, batches, sketched=sketched)[""]
        pairs = moments_eigenpairs(moments, rank if solver == "rsvd" else None)
        assert pairs.values.shape == (1, rank)
        stated = pairs.dropped_gain(alpha)
        assert 0 < stated <= alpha / (alpha + rank)
        assert f"{stated:.2g}" in outcome.details["solver"][""][1]
        bound += stated
    error = torch.linalg.matrix_norm(found.weight.detach() - exact.weight.detach(), 2)
    assert float(error) <= norm * bound
    assert outcome.details["solver"][""][0] == solver


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_class_is_forgotten_and_the_others_kept(solver: Any) -> None:
    model = network()
    forget, retain = blobs()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        sum(F.cross_entropy(model(x), y) for x, y in (*forget, *retain)).backward()  # type: ignore[union-attr]
        optimizer.step()
    ClassForgetting(solver=solver, rank=20).unlearn(model, forget, retain)
    forget, retain = blobs(seed=1)
    assert float((model(forget[0][0]).argmax(1) == 0).double().mean()) <= 0.02
    for x, y in retain:
        assert float((model(x).argmax(1) == y).double().mean()) >= 0.97


def tensors_of(sketch: Any) -> int:
    """Bytes of all tensors that a sketch holds, in itself or in lists."""
    values = [item for value in vars(sketch).values() for item in (value if isinstance(value, list) else [value])]
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))


@pytest.mark.parametrize("max_patches", [None, 60])
def test_a_sketch_holds_no_more_than_planned_and_grows_with_d_not_its_square(max_patches: int | None) -> None:
    held = []
    for d in (500, 1000, 2000):
        model, forget, retain = linear_case_of_noise(d)
        method = ClassForgetting(solver="sketch", rank=10, max_patches=max_patches)
        plan = method.plan(model, forget, retain)
        assert plan.layers[0].solver == "sketch" and plan.layers[0].ranks == (10, 10)
        sketches = [collect_grams(model, part, None, max_patches, sketched={"": 10}) for part in (forget, retain)]
        held.append(sum(tensors_of(sketch[""]) for sketch in sketches))
        assert held[-1] <= plan.layers[0].held < 2 * 8 * d * d
    assert held[1] <= 2.1 * held[0] and held[2] <= 2.1 * held[1]


def linear_case_of_noise(d: int) -> tuple[nn.Linear, list[Pair], list[Pair]]:
    torch.manual_seed(0)
    x = torch.randn(2, 80, d)
    return nn.Linear(d, 3), [(x[0], torch.zeros(80))], [(x[1], torch.zeros(80))]


def test_auto_sketches_what_exceeds_the_memory_limit_and_says_so() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(900, 20), nn.ReLU(), nn.Linear(20, 3))
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(60, 900)
    forget, retain = [(x[:20], torch.zeros(20))], [(x[20:], torch.zeros(40))]
    method = ClassForgetting(memory_limit=100_000, rank=30)
    outcome = method.unlearn(model, forget, retain)
    assert outcome.details["solver"]["0"][0] == "sketch"
    assert "the limit is 0.1 MB" in outcome.details["solver"]["0"][1]
    assert outcome.details["solver"]["2"][0] == "cholesky"
    assert set(outcome.changed) == {"0.weight", "2.weight"}
    assert torch.equal(model[0].bias, before["0.bias"])


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_search_by_low_rank_is_the_runs_with_its_alphas(solver: Any) -> None:
    model = network()
    forget, retain = blobs()
    seen: list[list[Tensor]] = []

    def score(measured: nn.Module) -> dict[str, float]:
        seen.append([p.detach().clone() for p in measured.parameters()])
        return {"forget": 0.0, "retain": 0.0}

    method = ClassForgetting(solver=solver, rank=12)
    search = method.search(model, forget, retain, (10.0, 100.0), (1.0, 3.0), score=score)
    for point, found in zip(search.points, seen[1:], strict=True):
        other = network()
        ClassForgetting(point.alpha_retain, point.alpha_forget, solver=solver, rank=12).unlearn(other, forget, retain)
        for a, b in zip(found, other.parameters(), strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_shared_weight_is_updated_from_all_its_uses(solver: Any) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(6, 6).double(), nn.Linear(6, 6).double()
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).relu())  # type: ignore[no-any-return]

    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)).double()
    forget, retain = [(x[:10], torch.zeros(10))], [(x[10:], torch.zeros(30))]
    one, other = Twice(), Twice()
    ClassForgetting(solver="cholesky").unlearn(one, forget, retain)
    ClassForgetting(solver=solver, rank=6).unlearn(other, forget, retain)
    assert torch.allclose(one.a.weight, other.a.weight, rtol=0, atol=1e-7)


@pytest.mark.parametrize("solver", SOLVERS)
def test_two_runs_with_one_seed_are_bitwise_equal(solver: Any) -> None:
    models = [network() for _ in range(2)]
    for model in models:
        ClassForgetting(solver=solver, rank=6, seed=3).unlearn(model, *blobs())
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))


@pytest.mark.parametrize("solver", SOLVERS)
def test_bad_inputs_are_refused_and_the_layer_named(solver: Any) -> None:
    model, (forget, retain) = network(), blobs()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"layer 0: .* NaN"):
        ClassForgetting(solver=solver, rank=4).unlearn(model, [(forget[0][0] / 0, forget[0][1])], retain)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("solver", SOLVERS)
def test_inputs_that_are_all_zero_change_nothing(solver: Any) -> None:
    model = nn.Linear(4, 3)
    before = model.weight.clone()
    zero, one = [(torch.zeros(2, 4), torch.zeros(2))], [(torch.ones(2, 4), torch.zeros(2))]
    ClassForgetting(solver=solver, rank=2).unlearn(model, zero, one)
    assert torch.equal(model.weight, before)


def test_without_a_rank_it_follows_alpha() -> None:
    assert [low_rank(5000, alpha) for alpha in (0.25, 3.0, 100.0, 1000.0)] == [64, 64, 400, 4000]
    assert low_rank(100, 1000.0) == 100
    model, forget, retain = linear_case(600, 50)
    assert ClassForgetting(solver="rsvd").plan(model, forget, retain).layers[0].ranks == (400, 64)
