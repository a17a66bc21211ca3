"""LCodec against closed forms and full Hessians, and everything it must refuse."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastunlearn.data import Batch, cross_entropy
from fastunlearn.methods.lcodec import (
    LCodec,
    _Block,
    _exact_hessian,
    _gauss_newton,
    _newton_step,
    _trainable_layers,
)

Pair = tuple[Tensor, Tensor]
QUICK: dict[str, Any] = {"perturbations": 120, "hessian_samples": 32}


def regression(n: int, d: int, seed: int = 0) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    y = x @ torch.randn(d, generator=generator, dtype=torch.float64)
    return x, y + torch.randn(n, generator=generator, dtype=torch.float64)


class Ridge:
    """Linear regression with a squared penalty inside every sample's loss: its optimum has a closed form."""

    def __init__(self, d: int, penalty: float) -> None:
        self.model = nn.Linear(d, 1).double()
        self.penalty = penalty

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        weights = torch.cat([self.model.weight[0], self.model.bias])
        return 0.5 * (outputs[:, 0] - targets) ** 2 + 0.5 * self.penalty * weights.square().sum()

    def optimum(self, x: Tensor, y: Tensor) -> Tensor:
        a = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
        return torch.linalg.solve(a.mT @ a + len(x) * self.penalty * torch.eye(a.shape[1], dtype=x.dtype), a.mT @ y)

    def set(self, weights: Tensor) -> None:
        with torch.no_grad():
            self.model.weight[0], self.model.bias[0] = weights[:-1], weights[-1]

    def get(self) -> Tensor:
        return torch.cat([self.model.weight[0], self.model.bias]).detach()


# Gauss-Newton sees a loss through the outputs only, so not a penalty on the weights.
@pytest.mark.parametrize(("hessian", "penalty"), [("exact", 0.0), ("exact", 0.1), ("gauss_newton", 0.0)])
@pytest.mark.parametrize("removed", [1, 3])
def test_removal_from_a_ridge_regression_lands_on_the_retrained_optimum(
    penalty: float, hessian: Any, removed: int
) -> None:
    (x, y), ridge = regression(60, 5), Ridge(5, penalty)
    ridge.set(ridge.optimum(x, y))
    goal = ridge.optimum(x[removed:], y[removed:])
    distance = (ridge.get() - goal).norm()
    outcome = LCodec(
        perturbations=200, damping=1e-12, hessian=hessian, hessian_samples=1000, loss_fn=ridge.losses
    ).unlearn(ridge.model, [(x[:removed], y[:removed])], [(x[removed:], y[removed:])])
    assert (ridge.get() - goal).norm() < 1e-6 * distance  # exact: a quadratic takes one Newton step
    assert all(r["loss_after"] > r["loss_before"] for r in outcome.details["removals"])
    assert [r["units"] for r in outcome.details["removals"]] == [[("", 0)]] * removed


def test_a_sample_of_hessian_samples_still_gets_close() -> None:
    (x, y), ridge = regression(2000, 5), Ridge(5, 0.0)
    ridge.set(ridge.optimum(x, y))
    goal = ridge.optimum(x[1:], y[1:])
    distance = (ridge.get() - goal).norm()
    LCodec(perturbations=50, damping=1e-12, hessian_samples=500, loss_fn=ridge.losses).unlearn(
        ridge.model, [(x[:1], y[:1])], list(zip(x[1:].split(300), y[1:].split(300), strict=True))
    )
    assert (ridge.get() - goal).norm() < 0.3 * distance


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return (
        nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 4, 3, groups=2), nn.Tanh(),
            nn.Flatten(),
            nn.Linear(16, 6), nn.Softplus(), nn.Linear(6, 3, bias=False),
        )
        .to(dtype)
        .eval()
    )  # fmt: skip


def images(n: int = 60, dtype: torch.dtype = torch.float64) -> Pair:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 3
    x = 0.3 * torch.randn(n, 1, 6, 6, generator=generator, dtype=torch.float64)
    x[torch.arange(n), 0, y * 2, :] += 1
    return x.to(dtype), y


def split(n: int = 3, dtype: torch.dtype = torch.float64) -> tuple[list[Pair], list[Pair]]:
    x, y = images(dtype=dtype)
    return [(x[:n], y[:n])], list(zip(x[n:].split(20), y[n:].split(20), strict=True))


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    model, (x, y) = network().train(), images()
    optimizer = torch.optim.Adam(model.parameters(), 2e-2)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval()


UNITS = [("6", 1), ("0", 2), ("8", 0), ("3", 3), ("8", 2), ("0", 0)]


def full_hessian(model: nn.Module, x: Tensor, y: Tensor, block: _Block) -> Tensor:
    """The block of the whole Hessian, from one functional call per weight of the model."""
    names = [next(n for n, p in model.named_parameters() if p is q) for q in block.parameters]
    sizes = [p.numel() for p in block.parameters]

    def loss(flat: Tensor) -> Tensor:
        values = {n: v.view_as(p) for n, v, p in zip(names, flat.split(sizes), block.parameters, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, values, (x,)), y, reduction="sum")

    flat = torch.cat([p.detach().reshape(-1) for p in block.parameters])
    index = torch.arange(len(flat)).split(sizes)
    picked = torch.cat([i.view_as(p)[rows].reshape(-1) for i, (p, rows) in zip(index, block.parts, strict=True)])
    return torch.autograd.functional.hessian(loss, flat)[picked][:, picked]


def test_block_hessian_equals_the_block_of_the_full_hessian(trained: nn.Module) -> None:
    x, y = images(12)
    block = _Block(_trainable_layers(trained, None), UNITS, 10**6)
    assert block.size == 17 + 2 * 10 + 2 * 6 + 19
    found = _exact_hessian(block, F.cross_entropy(trained(x), y, reduction="sum"))
    assert torch.allclose(found, full_hessian(trained, x, y, block), rtol=0, atol=1e-10)


def test_gauss_newton_equals_the_jacobian_product(trained: nn.Module) -> None:
    x, y = images(7)
    block = _Block(_trainable_layers(trained, None), UNITS, 10**6)
    outputs = trained(x)
    found = _gauss_newton(block, outputs, lambda out: F.cross_entropy(out, y, reduction="sum"))
    jacobian = torch.stack([block.flat(block.gradients(o, False)) for o in outputs.reshape(-1)]).view(7, 3, -1)
    p = outputs.softmax(1)
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    assert torch.allclose(found, torch.einsum("nas,nab,nbt->st", jacobian, curvature, jacobian), rtol=0, atol=1e-12)


def test_units_are_taken_in_order_while_the_block_has_room(trained: nn.Module) -> None:
    modules = _trainable_layers(trained, None)
    assert _Block(modules, [("6", 1), ("6", 2), ("8", 0)], 24).units == [("6", 1), ("8", 0)]
    assert _Block(modules, [("6", 1), ("8", 0)], 1).units == [("6", 1)]
    assert _Block(modules, [], 10).size == 0


def test_a_unit_of_a_weight_shared_by_two_layers_counts_once() -> None:
    a, b = nn.Linear(3, 2), nn.Linear(3, 2)
    b.weight = a.weight
    block = _Block({"a": a, "b": b}, [("b", 1), ("a", 1), ("a", 0)], 100)
    assert block.units == [("b", 1), ("a", 0)] and block.sizes == [6, 2]


def test_step_is_the_formula(trained: nn.Module) -> None:
    """(1 / (n - 1)) (H_S + damping I)^-1 grad, H_S = (n H - hess(z)) / (n - 1), H the mean over all n."""
    model, (x, y) = copy.deepcopy(trained), images()
    forget, retain = split(1)
    outcome = LCodec(**{**QUICK, "hessian_samples": 1000, "damping": 10.0}).unlearn(model, forget, retain)
    (removal,) = outcome.details["removals"]
    block = _Block(_trainable_layers(trained, None), removal["units"], 10**6)
    mean, own = full_hessian(trained, x, y, block) / 60, full_hessian(trained, x[:1], y[:1], block)
    h = (60 * mean - own) / 59
    gradient = block.flat(block.gradients(F.cross_entropy(trained(x[:1]), y[:1]), False))
    step = torch.linalg.solve(h + 10.0 * torch.eye(len(h)), gradient) / 59
    block.parameters = [dict(model.named_parameters())[n] for n, p in trained.named_parameters()
                        for q in block.parameters if p is q]  # fmt: skip
    after = block.flat([p.detach() for p in block.parameters])
    before = block.flat([p.detach() for p, _ in block.parts])
    assert torch.allclose(after - before, step, rtol=1e-7, atol=1e-12)
    assert removal["step_norm"] == pytest.approx(float(step.norm()), rel=1e-7)
    assert removal["damping"] == 10.0 and removal["block"] == block.size


@pytest.mark.parametrize("hessian", ["exact", "gauss_newton"])
@pytest.mark.parametrize("update", ["sekhari", "single_sample"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.filterwarnings("ignore:LCodec raised the damping")
def test_removal_raises_the_losses_of_the_removed_and_keeps_the_rest(
    trained: nn.Module, hessian: Any, update: Any, dtype: torch.dtype
) -> None:
    model = copy.deepcopy(trained).to(dtype)
    forget, retain = split(4, dtype)
    outcome = LCodec(**QUICK, hessian=hessian, update=update).unlearn(model, forget, retain)
    removals = outcome.details["removals"]
    assert [r["sample"] for r in removals] == [0, 1, 2, 3]
    assert all(r["loss_after"] > r["loss_before"] for r in removals)
    assert all(0 < len(r["units"]) == len(r["scores"]) <= 4 and r["block"] > 0 for r in removals)
    x, y = images(dtype=dtype)
    assert float((model(x[4:]).argmax(1) == y[4:]).float().mean()) > 0.95
    old = trained.to(dtype).state_dict()
    for name, value in model.state_dict().items():
        assert int((value != old[name]).sum()) == outcome.changed.get(name, 0)
    trained.double()


def test_two_runs_are_bitwise_equal_and_the_seed_matters(trained: nn.Module) -> None:
    models = [copy.deepcopy(trained) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        torch.manual_seed(seed + 7)  # the global state plays no part
        LCodec(**QUICK, seed=seed).unlearn(model, *split(2))
    first, second, third = (torch.cat([p.reshape(-1) for p in m.parameters()]) for m in models)
    assert torch.equal(first, second) and not torch.equal(first, third)


def test_modes_hooks_gradients_and_random_state_are_put_back(trained: nn.Module) -> None:
    model = copy.deepcopy(trained)
    model[0].weight.requires_grad_(False)
    model[5].train()
    state = torch.get_rng_state()
    outcome = LCodec(**QUICK).unlearn(model, *split(1))
    assert model[5].training and not model[0].training
    assert not model[0].weight.requires_grad and all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert "0.weight" not in outcome.changed
    with torch.no_grad():
        LCodec(**QUICK).unlearn(model, *split(1))


def test_only_units_of_the_named_layers_are_chosen(trained: nn.Module) -> None:
    outcome = LCodec(**QUICK, layers=["8"]).unlearn(copy.deepcopy(trained), *split(2))
    assert {name for r in outcome.details["removals"] for name, _ in r["units"]} == {"8"}
    assert set(outcome.changed) == {"8.weight"}


def test_attention_has_second_derivatives() -> None:
    torch.manual_seed(0)

    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.head(self.block(x).mean(1))
            return result

    model = Tiny().eval()
    x, y = torch.randn(20, 5, 8), torch.arange(20) % 3
    outcome = LCodec(**QUICK, damping=0.5).unlearn(model, [(x[:1], y[:1])], [(x[1:], y[1:])])
    (removal,) = outcome.details["removals"]
    assert removal["loss_after"] > removal["loss_before"]


def test_damping_rises_until_the_block_is_positive_definite() -> None:
    h = torch.diag(torch.tensor([1.0, -5.0], dtype=torch.float64))
    step, damping = _newton_step(h, torch.ones(2, dtype=torch.float64), 0.01, 0)
    assert damping == pytest.approx(10.0)
    assert torch.allclose(step, torch.tensor([1 / 11, 1 / 5], dtype=torch.float64))


def test_raised_damping_is_recorded_and_warned_about_once() -> None:
    model = nn.Linear(3, 1).double()
    x = torch.randn(30, 3, generator=torch.Generator().manual_seed(0)).double()

    def concave(outputs: Tensor, targets: Tensor) -> Tensor:
        return -(outputs[:, 0] ** 2)

    with pytest.warns(UserWarning, match="raised the damping from 0.01") as caught:
        outcome = LCodec(**QUICK, loss_fn=concave).unlearn(model, [(x[:2], x[:2, 0])], [(x[2:], x[2:, 0])])
    assert len([w for w in caught if "damping" in str(w.message)]) == 1
    assert outcome.details["damping_raised"] == 2
    assert all(r["damping"] > 0.01 and r["loss_after"] > r["loss_before"] for r in outcome.details["removals"])


def test_no_warning_when_damping_suffices(trained: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LCodec(**QUICK, hessian="gauss_newton").unlearn(copy.deepcopy(trained), *split(1))


def test_a_loss_that_depends_on_no_unit_changes_nothing(trained: nn.Module) -> None:
    model = copy.deepcopy(trained)
    outcome = LCodec(**QUICK, loss_fn=lambda out, y: out.sum(1) * 0 + 1).unlearn(model, *split(1))
    (removal,) = outcome.details["removals"]
    assert removal["units"] == [] and removal["block"] == 0 and outcome.changed == {}


def test_gaussian_mechanism_has_the_stated_deviation() -> None:
    settings: dict[str, Any] = {**QUICK, "loss_fn": lambda out, y: (out[:, 0] - y) ** 2}
    private = LCodec(**settings, epsilon=0.5, delta=0.01, sensitivity=2.0)
    draws = private._mechanism(torch.zeros(20_000, dtype=torch.float64), torch.Generator().manual_seed(0))
    assert float(draws.std()) == pytest.approx(2.0 * math.sqrt(2 * math.log(125)) / 0.5, rel=0.02)
    z = torch.ones(10, 1).double()
    quiet = nn.Linear(1, 1).double()
    noisy = copy.deepcopy(quiet)
    for method, model in ((LCodec(**settings), quiet), (private, noisy)):
        method.unlearn(model, [(z[:1], z[:1, 0])], [(z[1:], z[1:, 0])])
    assert not torch.equal(quiet.weight, noisy.weight)


def once(batches: list[Pair]) -> Iterator[Pair]:
    yield from batches


def refused(
    model: nn.Module, forget: Any, retain: Any, error: type[BaseException], message: str, **settings: Any
) -> None:
    """``unlearn`` raises, and the model is as it was: weights, buffers, modes, hooks."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    trainable = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=message):
        LCodec(**QUICK, **settings).unlearn(model, forget, retain)
    for name, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num())
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert not any(module._forward_hooks for module in model.modules())


def test_an_iterator_is_refused(trained: nn.Module) -> None:
    forget, retain = split()
    refused(trained, once(forget), retain, TypeError, "forget is an iterator")
    refused(trained, forget, once(retain), TypeError, "retain is an iterator")


def test_an_empty_loader_is_refused(trained: nn.Module) -> None:
    forget, retain = split()
    refused(trained, [], retain, ValueError, "forget is empty")
    refused(trained, forget, [], ValueError, "retain is empty")


def test_shapes_that_do_not_match_are_refused(trained: nn.Module) -> None:
    forget, retain = split()
    refused(trained, [(forget[0][0], forget[0][1][:2])], retain, ValueError, "share a first axis")
    refused(trained, [(torch.zeros(2, 3, 6, 6).double(), torch.zeros(2).long())], retain, RuntimeError, "channels")


def test_nan_weights_are_refused(trained: nn.Module) -> None:
    model = copy.deepcopy(trained)
    with torch.no_grad():
        model[6].weight[0, 0] = float("nan")
    refused(model, *split(), ValueError, r"6\.weight holds NaN")


def test_nan_inputs_are_refused(trained: nn.Module) -> None:
    forget, retain = split()
    bad = forget[0][0].clone()
    bad[2] = float("nan")
    refused(trained, [(bad, forget[0][1])], retain, ValueError, "forget sample 2 has NaN or Inf")


def test_nan_in_a_retain_sample_is_refused(trained: nn.Module) -> None:
    forget, retain = split()
    refused(trained, forget, [(x / 0, y) for x, y in retain], ValueError, "forget sample 0 holds NaN")


def test_integer_inputs_are_refused(trained: nn.Module) -> None:
    forget, retain = split()
    refused(trained, [(x.long(), y) for x, y in forget], retain, TypeError, "an input is torch.int64; token")


class Classifier(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x).argmax(1)
        return result


def test_integer_outputs_are_refused(trained: nn.Module) -> None:
    refused(Classifier(trained), *split(), TypeError, "return logits, not class indices")


def test_a_scalar_loss_is_refused(trained: nn.Module) -> None:
    refused(trained, *split(), ValueError, 'reduction="none"', loss_fn=F.cross_entropy)


def test_batchnorm_in_train_mode_is_refused(trained: nn.Module) -> None:
    refused(copy.deepcopy(trained).train(), *split(), ValueError, r"model\.eval\(\)")


def test_half_precision_is_refused(trained: nn.Module) -> None:
    refused(copy.deepcopy(trained).bfloat16(), *split(), TypeError, r"model\.float\(\)")


def test_a_model_without_trainable_layers_is_refused(trained: nn.Module) -> None:
    refused(copy.deepcopy(trained).requires_grad_(False), *split(), ValueError, "the model has no trainable")
    refused(trained, *split(), ValueError, "'1' has no trainable", layers=["1"])


def test_a_failure_half_way_undoes_the_removals_before_it(trained: nn.Module) -> None:
    calls = 0

    def failing(outputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 8:  # the second removal has begun
            raise KeyboardInterrupt("stop")
        return cross_entropy(outputs, targets)

    refused(copy.deepcopy(trained), *split(), KeyboardInterrupt, "stop", loss_fn=failing)
    assert calls == 9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"perturbations": 1}, "perturbations"),
        ({"noise": 0.0}, "noise"),
        ({"noise": float("nan")}, "noise"),
        ({"damping": 0.0}, "damping"),
        ({"damping": -1.0}, "damping"),
        ({"hessian": "diagonal"}, "hessian"),
        ({"update": "cr"}, "update"),
        ({"hessian_samples": 0}, "hessian_samples"),
        ({"max_units": 0}, "max_units"),
        ({"max_block": 0}, "max_block"),
        ({"batch_size": 0}, "batch_size"),
        ({"epsilon": 0.1}, "go together"),
        ({"epsilon": 2.0, "delta": 0.01, "sensitivity": 1.0}, "epsilon < 1"),
        ({"epsilon": 0.1, "delta": 0.0, "sensitivity": 1.0}, "delta"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LCodec(**settings)


def test_dict_batches_work() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, pixel_values: Tensor) -> Tensor:
            result: Tensor = self.layer(pixel_values)
            return result

    x, y = torch.randn(12, 4), torch.arange(12) % 3
    batches = [{"pixel_values": x[i : i + 4], "labels": y[i : i + 4]} for i in (0, 4, 8)]
    outcome = LCodec(**QUICK).unlearn(Named(), batches[:1], batches[1:])
    assert len(outcome.details["removals"]) == 4 and outcome.details["n"] == 12
    assert isinstance(Batch((x,), {}, y, 12)[0:1], Batch)


@pytest.mark.parametrize("shape", [(5, 7, 3), (40, 3, 2)])
def test_batched_products_of_dense_layers_equal_the_full_hessian(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    a, b, c = shape
    model = nn.Sequential(nn.Linear(a, b), nn.Tanh(), nn.Linear(b, c)).double()
    x, y = torch.randn(9, a).double(), torch.arange(9) % c
    units = [("0", i) for i in range(b)] + [("2", 1)]
    block = _Block(_trainable_layers(model, None), units, 10**6)
    found = _exact_hessian(block, F.cross_entropy(model(x), y, reduction="sum"))
    assert torch.allclose(found, full_hessian(model, x, y, block), rtol=0, atol=1e-10)
