"""Several models trained at once are the models trained one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastunlearn import Retrain
from fastunlearn.evaluate.stacked import (
    Mode,
    Recipe,
    Shuffled,
    TensorSamples,
    batch_sizes,
    initial_model,
    train_models,
)

RECIPE = Recipe(epochs=3, lr=0.01, weight_decay=0.02, batch_size=8)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(inplace=True), nn.Linear(16, 3))


def normed_cnn() -> nn.Module:
    """Two batch norms; without biases before them, whose true gradient is zero and whose computed one is rounding."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 5, 2, bias=False), nn.BatchNorm2d(5, momentum=0.3), nn.Flatten(), nn.Linear(45, 3),
    )  # fmt: skip


class Odd(nn.Module):
    """Tied weights, a frozen one, one without a gradient, a buffer that is not saved, and a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(36, 12), nn.Linear(36, 12), nn.Linear(12, 3)
        self.down.weight = self.up.weight
        self.norm = nn.LayerNorm(12)
        self.frozen = nn.Parameter(torch.randn(12), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(2, 3))
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        x = x.flatten(1)
        return self.head(self.norm(torch.tanh(self.up(x)) * self.frozen + self.down(x)))


class Undecided(nn.Module):
    """Looks at its numbers while it runs, which vmap can not follow."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x.flatten(1))
        return out if out.sum().item() > 0 else 2 * out


def double(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: build().double()


def data(n: int = 60) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    y = torch.randint(3, (n,), generator=generator)
    x = torch.randn(n, 1, 6, 6, generator=generator, dtype=torch.float64)
    x[:, 0, 0, 0] += y
    return x, y


def subsets(sizes: list[int], n: int = 60) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    keep = torch.zeros(len(sizes), n, dtype=torch.bool)
    for row, size in zip(keep, sizes, strict=True):
        row[torch.randperm(n, generator=generator)[:size]] = True
    return keep


def distance(a: nn.Module, b: nn.Module) -> float:
    """Largest relative difference of a tensor of the state, and of the buffers that are not saved."""
    pairs = [*zip(a.parameters(), b.parameters(), strict=True), *zip(a.buffers(), b.buffers(), strict=True)]
    return max(
        float((p.detach().double() - q.detach()).abs().max() / q.detach().double().abs().max().clamp(min=1e-12))
        for p, q in pairs
    )


@pytest.mark.parametrize("build", [mlp, normed_cnn, Odd], ids=lambda b: b.__name__)
@pytest.mark.parametrize(
    "sizes",
    # the last batches of an epoch differ, some with one sample; steps an epoch differ; fewer samples than a batch; one
    [[30, 26, 27, 30], [40, 16, 41, 60, 18, 33], [5, 24, 5], [21]],
    ids=["uneven_tails", "uneven_steps", "less_than_a_batch", "one_model"],
)
def test_a_stacked_model_equals_its_sequentially_trained_twin(build: Any, sizes: list[int]) -> None:
    x, y = data()
    arguments = double(build), RECIPE, x, y, subsets(sizes), range(len(sizes))
    stacked, report = train_models(*arguments, mode="stacked")
    alone, _ = train_models(*arguments, mode="sequential")
    assert report.mode == "stacked"
    assert not any(model.training for model in stacked)
    for ours, twin, seed in zip(stacked, alone, range(len(sizes)), strict=True):
        assert distance(ours, twin) < 1e-9
        assert distance(ours, initial_model(double(build), seed)) > 1e-3


def test_a_model_trained_alone_is_what_retrain_makes_bit_for_bit() -> None:
    x, y = data()
    keep = subsets([30, 21])
    models, _ = train_models(double(normed_cnn), RECIPE, x, y, keep, [5, 6], mode="sequential")
    for row, seed, ours in zip(keep, [5, 6], models, strict=True):
        twin = double(normed_cnn)()
        retrain = Retrain(3, 0.01, 0.02, build=double(normed_cnn), seed=seed)
        retrain.unlearn(twin, None, Shuffled(TensorSamples(x, y), row.nonzero().flatten(), 8, seed))
        assert all(
            torch.equal(a, b) for a, b in zip(ours.state_dict().values(), twin.state_dict().values(), strict=True)
        )


@pytest.mark.parametrize("mode", ["stacked", "sequential"])
def test_runs_repeat_also_with_dropout_and_leave_the_random_state_alone(mode: Any) -> None:
    x, y = data()

    def build() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Dropout(0.5), nn.Linear(16, 3)).double()

    keep = subsets([30, 30, 25])
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    first, _ = train_models(build, RECIPE, x, y, keep, [1, 2, 3], mode=mode)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    again, _ = train_models(build, RECIPE, x, y, keep, [1, 2, 3], mode=mode)
    assert all(distance(a, b) == 0 for a, b in zip(first, again, strict=True))


def test_stacked_models_drop_out_different_units() -> None:
    x, y = data()

    def build() -> nn.Module:
        torch.manual_seed(0)  # the same weights whatever the seed
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Dropout(0.5), nn.Linear(16, 3)).double()

    everything = torch.ones(2, len(x), dtype=torch.bool)
    one_batch = Recipe(epochs=5, batch_size=len(x))
    (a, b), _ = train_models(build, one_batch, x, y, everything, [1, 2], mode="stacked")
    assert distance(a, b) > 1e-3
    without = lambda: nn.Sequential(*[m for m in build() if not isinstance(m, nn.Dropout)])  # noqa: E731
    (a, b), _ = train_models(without, one_batch, x, y, everything, [1, 2], mode="stacked")
    assert distance(a, b) < 1e-9


def test_auto_takes_what_was_faster_and_says_so() -> None:
    x, y = data()
    models, report = train_models(double(mlp), RECIPE, x, y, subsets([30] * 8), range(8))
    assert len(models) == 8
    assert set(report.seconds_per_step) == {"stacked", "sequential"}
    assert report.mode == min(report.seconds_per_step, key=report.seconds_per_step.__getitem__)
    assert "times as fast" in report.reason


def test_a_model_that_vmap_can_not_do_is_trained_alone_and_the_reason_is_kept() -> None:
    x, y = data()
    arguments = double(Undecided), RECIPE, x, y, subsets([30, 30]), [1, 2]
    models, report = train_models(*arguments)
    assert report.mode == "sequential"
    assert "vmap" in report.reason and "item()" in report.reason
    twins, _ = train_models(*arguments, mode="sequential")
    assert all(distance(a, b) == 0 for a, b in zip(models, twins, strict=True))
    with pytest.raises(ValueError, match=r"item\(\).*train with mode='auto'"):
        train_models(*arguments, mode="stacked")


@pytest.mark.parametrize("mode", ["stacked", "sequential"])
def test_data_read_by_index_gives_the_same_models(mode: Any) -> None:
    x, y = data()

    class Folder:
        labels = y

        def __len__(self) -> int:
            return len(y)

        def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
            return torch.stack([x[int(i)] for i in indices]), y[indices]

    keep = subsets([20, 17])
    a, _ = train_models(double(mlp), RECIPE, x, y, keep, [1, 2], mode=mode)
    b, _ = train_models(double(mlp), RECIPE, Folder(), None, keep, [1, 2], mode=mode)
    assert all(distance(m, twin) == 0 for m, twin in zip(a, b, strict=True))


@pytest.mark.parametrize("mode", ["stacked", "sequential"])
def test_a_loss_that_is_not_finite_is_an_error(mode: Any) -> None:
    x, y = data()
    x[3] = torch.nan
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        train_models(double(mlp), RECIPE, x, y, torch.ones(2, 60, dtype=torch.bool), [1, 2], mode=mode)


def test_errors_of_the_model_are_not_taken_for_vmaps() -> None:
    x, y = data()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        train_models(lambda: nn.Linear(5, 3).double(), RECIPE, x.flatten(1), y, subsets([30, 30]), [1, 2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": subsets([30, 30]).int()}, r"keep must be bool \[2 seeds, 60 samples\]"),
        ({"keep": subsets([30, 30, 30])}, r"got torch.bool \[3, 60\]"),
        ({"keep": subsets([30, 0])}, "model 1 has no samples"),
        ({"seeds": []}, "of one model or more"),
        ({"y": data(59)[1]}, r"x \[60, 1, 6, 6\] needs a y with as many rows, got \[59\]"),
        ({"mode": "fast"}, "mode must be 'auto', 'stacked' or 'sequential', got 'fast'"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    x, y = data()
    given: dict[str, Any] = {"x": x, "y": y, "keep": subsets([30, 30]), "seeds": [1, 2], "mode": "auto"} | change
    with pytest.raises(ValueError, match=message):
        train_models(double(mlp), RECIPE, **given)


@pytest.mark.parametrize(
    "change", [{"epochs": 0}, {"batch_size": 0}, {"lr": 0.0}, {"lr": float("nan")}, {"weight_decay": -1.0}]
)
def test_a_recipe_with_impossible_numbers_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Recipe(**change)


def test_every_order_is_a_permutation_and_its_own() -> None:
    x, y = data()
    shuffled = Shuffled(TensorSamples(x, y), torch.arange(10, 35), 8, seed=3)
    orders = [torch.cat(shuffled.order(epoch)) for epoch in range(3)]
    assert all(torch.equal(order.sort().values, torch.arange(10, 35)) for order in orders)
    assert not torch.equal(orders[0], orders[1])
    assert len(shuffled) == 3  # 25 samples: 8, 8 and 9
    read = [torch.cat([inputs for inputs, _ in shuffled]) for _ in range(2)]
    assert all(torch.equal(found, x[order]) for found, order in zip(read, orders, strict=False))


@pytest.mark.parametrize(
    ("samples", "sizes"), [(1, [1]), (4, [4]), (5, [5]), (8, [4, 4]), (9, [4, 5]), (10, [4, 4, 2])]
)
def test_a_single_sample_that_is_left_joins_the_batch_before_it(samples: int, sizes: list[int]) -> None:
    assert batch_sizes(samples, 4) == sizes
    shuffled = Shuffled(TensorSamples(torch.rand(12, 2), torch.zeros(12)), torch.arange(samples), 4, seed=0)
    assert [len(batch) for batch in shuffled.order(3)] == sizes and len(shuffled) == len(sizes)
    assert torch.equal(torch.cat(shuffled.order(3)).sort().values, torch.arange(samples))
    assert Recipe(epochs=3, batch_size=4).steps(samples) == 3 * len(sizes)


@pytest.mark.parametrize("mode", ["stacked", "sequential"])
def test_batch_norm_learns_from_one_sample_more_than_whole_batches(mode: Mode) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))

    x, y = torch.rand(9, 3), torch.arange(9) % 2
    keep = torch.ones(2, 9, dtype=torch.bool)
    models, _ = train_models(build, Recipe(epochs=2, batch_size=4), x, y, keep, [0, 1], mode)
    assert all(bool(torch.isfinite(model(x)).all()) for model in models)
