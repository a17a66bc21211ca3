"""LCodec against closed forms, what it chooses and when it stops, and everything it must refuse."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections import UserDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import Conv1D
from torch import Tensor, nn
from torch.nn import functional as F

from fastunlearn.data import Batch, cross_entropy, read
from fastunlearn.hooks import full_precision
from fastunlearn.methods.block import Block, trainable_layers
from fastunlearn.methods.budget import Budget
from fastunlearn.methods.curvature import gradient, matrix
from fastunlearn.methods.lcodec import LCodec
from fastunlearn.methods.newton import Privacy
from fastunlearn.methods.samples import drawn

Pair = tuple[Tensor, Tensor]
QUICK: dict[str, Any] = {"perturbations": 120, "hessian_samples": 32}
RAISES = pytest.mark.filterwarnings("ignore:LCodec raised the damping")


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


def full_hessian(model: nn.Module, x: Tensor, y: Tensor, block: Block) -> Tensor:
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


def test_step_is_the_formula(trained: nn.Module) -> None:
    """(1 / (n - 1)) (H_S + damping I)^-1 grad, H_S = (n H - hess(z)) / (n - 1), H the mean over all n."""
    model, (x, y) = copy.deepcopy(trained), images()
    forget, retain = split(1)
    outcome = LCodec(**{**QUICK, "hessian_samples": 1000, "damping": 10.0}).unlearn(model, forget, retain)
    (removal,) = outcome.details["removals"]
    block = Block(trainable_layers(trained, None), removal["units"], None)
    mean, own = full_hessian(trained, x, y, block) / 60, full_hessian(trained, x[:1], y[:1], block)
    h = (60 * mean - own) / 59
    gradient = block.flat(torch.autograd.grad(F.cross_entropy(trained(x[:1]), y[:1]), block.parameters))
    step = torch.linalg.solve(h + 10.0 * torch.eye(len(h)), gradient) / 59
    change = Block(trainable_layers(model, None), removal["units"], None).values() - block.values()
    assert torch.allclose(change, step, rtol=1e-7, atol=1e-12)
    assert removal["step_norm"] == pytest.approx(float(step.norm()), rel=1e-7)
    assert removal["damping"] == 10.0 and removal["block"] == block.size


def test_the_single_sample_update_is_a_full_step_on_the_samples_own_curvature(trained: nn.Module) -> None:
    """The public code's "CR": w_S <- w_S + (hess_S loss(z) + damping I)^-1 grad_S loss(z), for any n."""
    model = copy.deepcopy(trained)
    forget, retain = split(1)
    sample = next(read(forget, "forget", torch.device("cpu")))
    settings: dict[str, Any] = {**QUICK, "hessian": "gauss_newton", "update": "single_sample", "damping": 0.5}
    chosen = LCodec(**{**settings, "select": "all", "layers": ["8"]}).unlearn(model, forget, retain)
    block = Block(trainable_layers(trained, None), chosen.details["removals"][0]["units"], None)
    with torch.enable_grad():
        h, g = matrix(trained, block, [sample], None, "gauss_newton"), gradient(trained, block, [sample], None)
    step = torch.linalg.solve(h + 0.5 * torch.eye(len(h)), g)
    change = Block(trainable_layers(model, None), block.units, None).values() - block.values()
    assert torch.allclose(change, step, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("hessian", ["exact", "gauss_newton"])
@pytest.mark.parametrize("update", ["sekhari", "single_sample"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@RAISES
def test_removal_raises_the_losses_of_the_removed_and_keeps_the_rest(
    trained: nn.Module, hessian: Any, update: Any, dtype: torch.dtype
) -> None:
    model = copy.deepcopy(trained).to(dtype)
    forget, retain = split(4, dtype)
    outcome = LCodec(**QUICK, hessian=hessian, update=update).unlearn(model, forget, retain)
    removals = outcome.details["removals"]
    assert [r["samples"] for r in removals] == [[0], [1], [2], [3]]
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


def weights_after_removal(model: nn.Module) -> Tensor:
    LCodec(**QUICK).unlearn(model, *split(2, next(model.parameters()).dtype))
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def test_autocast_around_a_removal_changes_nothing(trained: nn.Module) -> None:
    plain = weights_after_removal(copy.deepcopy(trained).float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(weights_after_removal(copy.deepcopy(trained).float()), plain)
        assert torch.is_autocast_enabled("cpu")


def test_inference_mode_around_a_removal_changes_nothing(trained: nn.Module) -> None:
    plain, model = weights_after_removal(copy.deepcopy(trained)), copy.deepcopy(trained)
    with torch.inference_mode():
        weights = weights_after_removal(model)
    assert torch.equal(weights, plain)


@pytest.mark.parametrize("used", [False, True])
def test_a_compiled_model_runs_its_python_code(trained: nn.Module, used: bool) -> None:
    plain, model = weights_after_removal(copy.deepcopy(trained)), copy.deepcopy(trained)
    compiled: Any = torch.compile(model, backend="eager")
    if used:  # a graph from before calls no hooks
        with torch.no_grad():
            compiled(split(2)[0][0][0])
    assert torch.equal(weights_after_removal(compiled), plain)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_products_are_in_full_precision_meanwhile_and_as_chosen_afterwards(device: str) -> None:
    known: Any = torch.backends
    backends = {
        "cpu": (known.mkldnn.conv, known.mkldnn.matmul, known.mkldnn.rnn),
        "cuda": (known.cudnn.conv, known.cuda.matmul, known.cudnn.rnn),
    }[device]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        chosen = [b.fp32_precision for b in backends]
        with full_precision(torch.device(device)):
            assert [b.fp32_precision for b in backends] == ["ieee"] * 3
        assert [b.fp32_precision for b in backends] == chosen != ["ieee"] * 3
    finally:
        torch.set_float32_matmul_precision(before)


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
    refused(trained, forget, [(x / 0, y) for x, y in retain], ValueError, "forget sample 0: the curvature holds NaN")


def test_integer_inputs_are_refused(trained: nn.Module) -> None:
    forget, retain = split()
    refused(
        trained, [(x.long(), y) for x, y in forget], retain, TypeError, "an input is integer but not one of token ids"
    )


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


def test_a_model_withouttrainable_layers_is_refused(trained: nn.Module) -> None:
    refused(copy.deepcopy(trained).requires_grad_(False), *split(), ValueError, "the model has no trainable")
    refused(trained, *split(), ValueError, "'1' has no trainable", layers=["1"])


def test_a_failure_half_way_undoes_the_removals_before_it(trained: nn.Module) -> None:
    calls = 0

    def failing(outputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 11:  # the second removal has begun
            raise KeyboardInterrupt("stop")
        return cross_entropy(outputs, targets)

    refused(copy.deepcopy(trained), *split(), KeyboardInterrupt, "stop", loss_fn=failing)
    assert calls == 12


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
        ({"tokens": 0}, "tokens"),
        ({"solver": "lu"}, 'solver must be one of "auto", "cholesky", "cg"'),
        ({"select": "last"}, "select"),
        ({"reuse_hessian": True, "solver": "cg"}, "reuse_hessian keeps matrices"),
        ({"reuse_hessian": True, "update": "single_sample"}, "reuse_hessian keeps matrices"),
        (
            {"privacy": Privacy(0.5, 0.01, 1.0, 1.0, 1.0), "update": "single_sample"},
            "privacy bounds the step of update",
        ),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LCodec(**settings)


def test_a_mapping_of_another_class_is_moved_to_the_device() -> None:
    batch: UserDict[str, Tensor] = UserDict(input_ids=torch.zeros(2, 3), labels=torch.zeros(2))
    (found,) = read([batch], "forget", torch.device("meta"))
    assert found.kwargs["input_ids"].device.type == found.targets.device.type == "meta"


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


# Where removal has an exact answer


@pytest.mark.parametrize("solver", ["cholesky", "cg"])
@pytest.mark.parametrize("n", [40, 1000])
def test_distance_to_the_retrained_ridge_regression_falls_a_hundredfold(n: int, solver: Any) -> None:
    (x, y), ridge = regression(n, 8), Ridge(8, 0.05)
    ridge.set(ridge.optimum(x, y))
    goal = ridge.optimum(x[1:], y[1:])
    distance = (ridge.get() - goal).norm()
    method = LCodec(select="all", damping=1e-10, hessian_samples=n, loss_fn=ridge.losses, solver=solver)
    method.unlearn(ridge.model, [(x[:1], y[:1])], [(x[1:], y[1:])])
    assert (ridge.get() - goal).norm() < distance / 100


def logistic_optimum(x: Tensor, y: Tensor, penalty: float) -> tuple[nn.Linear, Any]:
    """A softmax regression with its penalty inside every sample's loss, at its minimum to rounding."""
    model = nn.Linear(x.shape[1], 3).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)

    def losses(outputs: Tensor, targets: Tensor) -> Tensor:
        norm = model.weight.square().sum() + model.bias.square().sum()
        return F.cross_entropy(outputs, targets, reduction="none") + 0.5 * penalty * norm

    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=500, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = losses(model(x), y).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.zero_grad()
    return model, losses


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("removed", [1, 5])
def test_distance_to_the_retrained_logistic_regression_falls_tenfold(removed: int, group: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    y = torch.randint(0, 3, (300,), generator=generator)
    x = torch.randn(300, 6, generator=generator, dtype=torch.float64)
    x[torch.arange(300), y] += 1
    model, losses = logistic_optimum(x, y, 0.02)
    goal, _ = logistic_optimum(x[removed:], y[removed:], 0.02)

    def distance() -> float:
        pairs = zip(model.parameters(), goal.parameters(), strict=True)
        return math.sqrt(sum(float((a - b).detach().square().sum()) for a, b in pairs))

    before = distance()
    method = LCodec(select="all", damping=1e-10, hessian_samples=1000, loss_fn=losses, group=group)
    outcome = method.unlearn(model, [(x[:removed], y[:removed])], [(x[removed:], y[removed:])])
    assert distance() < before / 10
    assert all(r["units"] == [("", 0), ("", 1), ("", 2)] and r["scores"] == [] for r in outcome.details["removals"])


@pytest.mark.parametrize("select", ["all", "foci"])
def test_a_group_leaves_a_ridge_regression_in_one_exact_step(select: Any) -> None:
    (x, y), ridge = regression(60, 5), Ridge(5, 0.1)
    ridge.set(ridge.optimum(x, y))
    start = ridge.get()
    goal = ridge.optimum(x[5:], y[5:])
    method = LCodec(
        perturbations=100, group=True, select=select, damping=1e-12, hessian_samples=55, loss_fn=ridge.losses
    )
    outcome = method.unlearn(ridge.model, [(x[:2], y[:2]), (x[2:5], y[2:5])], [(x[5:], y[5:])])
    assert (ridge.get() - goal).norm() < 1e-9 * (start - goal).norm()
    (removal,) = outcome.details["removals"]
    assert removal["samples"] == [0, 1, 2, 3, 4] and outcome.details["hessian_samples"] == 55
    # (1 / (n - m)) H^-1 times the sum of the gradients, H over the 55 others
    a = torch.cat([x, torch.ones(60, 1, dtype=x.dtype)], 1)
    h = a[5:].mT @ a[5:] / 55 + 0.1 * torch.eye(6, dtype=x.dtype)
    gradient = a[:5].mT @ (a[:5] @ start - y[:5]) + 5 * 0.1 * start
    assert torch.allclose(ridge.get() - start, torch.linalg.solve(h, gradient) / 55, rtol=1e-8, atol=1e-14)
    residuals = a[:5] @ start - y[:5]
    before = 0.5 * residuals.square().mean() + 0.05 * start.square().sum()
    assert removal["loss_before"] == pytest.approx(float(before))
    assert removal["gradient_norm_before"] == pytest.approx(float(gradient.norm()) / 5)


@RAISES
def test_a_group_is_chosen_by_the_mean_loss_of_jointly_perturbed_samples(trained: nn.Module) -> None:
    """Of a group of one and the sample alone the data are the same, so are the units and the step."""
    alone, group = copy.deepcopy(trained), copy.deepcopy(trained)
    one = LCodec(**QUICK, reuse_hessian=True).unlearn(alone, *split(1))
    other = LCodec(**QUICK, group=True).unlearn(group, *split(1))
    first, second = ({**o.details["removals"][0], "seconds": 0} for o in (one, other))
    assert first == second
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), group.parameters(), strict=True))
    several = LCodec(**QUICK, group=True).unlearn(copy.deepcopy(trained), *split(4)).details["removals"]
    assert len(several) == 1 and several[0]["samples"] == [0, 1, 2, 3] and several[0]["units"]
    assert several[0]["loss_after"] > several[0]["loss_before"]


def test_a_reused_hessian_is_that_of_the_first_removal() -> None:
    """Of a quadratic it is not stale, so five removals one after another land as close as with new ones."""
    (x, y), ridge = regression(60, 5), Ridge(5, 0.1)
    ridge.set(ridge.optimum(x, y))
    start = ridge.get()
    settings: dict[str, Any] = {"select": "all", "damping": 1e-12, "hessian_samples": 60, "loss_fn": ridge.losses}
    batches = [(x[:5], y[:5])], [(x[5:], y[5:])]
    LCodec(**settings, reuse_hessian=True).unlearn(ridge.model, *batches)
    a = torch.cat([x, torch.ones(60, 1, dtype=x.dtype)], 1)
    h = a[5:].mT @ a[5:] / 55 + 0.1 * torch.eye(6, dtype=x.dtype)
    w = start
    for i in range(5):
        w = w + torch.linalg.solve(h, a[i] * (a[i] @ w - y[i]) + 0.1 * w) / (59 - i)
    assert torch.allclose(ridge.get(), w, rtol=1e-9, atol=0)


def test_a_hessian_is_reused_only_for_the_same_units(trained: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastunlearn.methods import removal

    made: list[list[tuple[str, int]]] = []
    whole = removal.matrix

    def counting(model: nn.Module, block: Block, *rest: Any) -> Tensor:
        made.append(sorted(block.units))
        return whole(model, block, *rest)

    monkeypatch.setattr(removal, "matrix", counting)
    settings: dict[str, Any] = {**QUICK, "layers": ["8"], "max_units": 2, "damping": 1.0}
    outcome = LCodec(**settings, reuse_hessian=True).unlearn(copy.deepcopy(trained), *split(8))
    chosen = [sorted(r["units"]) for r in outcome.details["removals"]]
    assert len(made) == len({tuple(units) for units in made}) < 8 and all(units in made for units in chosen)
    made.clear()
    LCodec(**settings).unlearn(copy.deepcopy(trained), *split(8))
    assert len(made) == 8


# What is chosen, and how it is solved


@pytest.mark.parametrize("hessian", ["exact", "gauss_newton", "fisher", "reference"])
def test_conjugate_gradients_take_the_step_of_cholesky(trained: nn.Module, hessian: Any) -> None:
    steps = []
    for solver in ("cholesky", "cg"):
        model = copy.deepcopy(trained)
        method = LCodec(**QUICK, hessian=hessian, solver=solver, damping=1.0)
        (removal,) = method.unlearn(model, *split(1)).details["removals"]
        assert removal["solver"] == solver and (removal["iterations"] > 0) == (solver == "cg")
        assert removal["residual"] < 1e-7
        steps.append(
            torch.cat(
                [(p - q).detach().flatten() for p, q in zip(model.parameters(), trained.parameters(), strict=True)]
            )
        )
    assert torch.allclose(steps[0], steps[1], rtol=0, atol=1e-7 * float(steps[0].abs().max()))


@RAISES
def test_auto_takes_conjugate_gradients_for_a_large_block_only() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 12), nn.Tanh(), nn.Linear(12, 3))
    x, y = torch.randn(20, 300), torch.arange(20) % 3
    batches = [(x[:1], y[:1])], [(x[1:], y[1:])]
    settings: dict[str, Any] = {"select": "random", "layers": ["0"], "damping": 1.0, "hessian_samples": 8}
    for units, reuse, solver in ((1, False, "cholesky"), (2, False, "cg"), (6, True, "cholesky"), (7, True, "cg")):
        method = LCodec(**settings, max_units=units, reuse_hessian=reuse)
        (removal,) = method.unlearn(model, *batches).details["removals"]
        assert removal["block"] == 301 * units and removal["solver"] == solver and removal["left_out"] == 0
    method = LCodec(select="all", layers=["0"], solver="cholesky", damping=1.0, hessian_samples=1)
    (removal,) = method.unlearn(model, *batches).details["removals"]
    assert removal["block"] == 301 * 6 and removal["left_out"] == 6  # 2,048 weights at most


def test_random_units_are_seeded_and_of_all_layers(trained: nn.Module) -> None:
    def chosen(seed: int) -> list[Any]:
        method = LCodec(select="random", max_units=3, hessian_samples=8, damping=1.0, seed=seed)
        return [r["units"] for r in method.unlearn(copy.deepcopy(trained), *split(8)).details["removals"]]

    assert chosen(0) == chosen(0) != chosen(1)
    assert all(len(units) == 3 for units in chosen(0))
    assert {name for units in chosen(0) for name, _ in units} == {"0", "3", "6", "8"}


def test_all_units_are_taken_in_the_order_of_the_model(trained: nn.Module) -> None:
    method = LCodec(select="all", hessian_samples=8, damping=1.0, layers=["8", "3"])
    (removal,) = method.unlearn(copy.deepcopy(trained), *split(1)).details["removals"]
    assert removal["units"] == [("3", i) for i in range(4)] + [("8", i) for i in range(3)]


@RAISES
def test_the_record_has_the_norms_of_the_sample_s_whole_gradient(trained: nn.Module) -> None:
    model, (x, y) = copy.deepcopy(trained), images()

    def norm(net: nn.Module) -> float:
        found = torch.autograd.grad(F.cross_entropy(net(x[:1]), y[:1]), list(net.parameters()))
        return float(torch.cat([g.flatten() for g in found]).norm())

    before = norm(model)
    (removal,) = LCodec(**QUICK).unlearn(model, *split(1)).details["removals"]
    assert removal["gradient_norm_before"] == pytest.approx(before, rel=1e-12)
    assert removal["gradient_norm_after"] == pytest.approx(norm(model), rel=1e-12) != pytest.approx(before)
    assert removal["seconds"] > 0


# A budget


@RAISES
def test_a_budget_rolls_the_last_removal_back_bit_by_bit_and_says_retrain_now(trained: nn.Module) -> None:
    """The weights are those of a run that was asked for only the samples before it."""
    forget, retain = split(6)
    settings: dict[str, Any] = {**QUICK, "update": "single_sample", "damping": 1e-3, "max_units": 8}
    free = LCodec(**settings).unlearn(copy.deepcopy(trained), forget, retain).details["removals"]
    limit = sum(r["step_norm"] for r in free[:3]) + 0.5 * free[3]["step_norm"]
    model, shorter = copy.deepcopy(trained), copy.deepcopy(trained)
    budget = Budget(max_drop=None, max_step_norm=limit)
    with pytest.warns(UserWarning, match="retrain now: the steps add up .* 3 of 6 samples are still in"):
        outcome = LCodec(**settings, budget=budget).unlearn(model, forget, retain)
    LCodec(**settings).unlearn(
        shorter, [(x[:3], y[:3]) for x, y in forget], [*retain, (forget[0][0][3:], forget[0][1][3:])]
    )
    details = outcome.details
    assert [r["samples"] for r in details["removals"]] == [[0], [1], [2]] and details["not_removed"] == [3, 4, 5]
    assert [r["samples"] for r in details["rolled_back"]] == [[3]] and "steps add up" in details["retrain_now"]
    for (name, value), other in zip(model.state_dict().items(), shorter.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
        changed = int((value != trained.state_dict()[name]).sum())
        assert outcome.changed.get(name, 0) == changed


def test_a_removal_from_every_layer_is_rolled_back_from_every_layer(trained: nn.Module) -> None:
    model = copy.deepcopy(trained)
    method = LCodec(**QUICK, select="all", hessian="gauss_newton", budget=Budget(max_drop=None, max_step_norm=0.0))
    with pytest.warns(UserWarning, match="retrain now"):
        outcome = method.unlearn(model, *split(1))
    assert len({name for name, _ in outcome.details["rolled_back"][0]["units"]}) > 1
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), trained.parameters(), strict=True))
    assert not any(outcome.changed.values())


def test_hessian_samples_are_a_seeded_draw_from_retained_and_not_yet_removed_samples() -> None:
    retain = [(torch.arange(40.0)[:, None], torch.zeros(40, dtype=torch.long))]
    forget = [Batch((torch.tensor([[100.0 + i]]),), {}, torch.zeros(1), 1) for i in range(40)]
    draws = [drawn(retain, forget, 80, 20, seed, torch.device("cpu")) for seed in (0, 0, 1)]
    first, again, other = ([batch.args[0].item() for _, batch in draw] for draw in draws)
    assert first == again != other
    assert all(
        origin == (-1 if value < 40 else value - 100) for (origin, _), value in zip(draws[0], first, strict=True)
    )
    assert len({v for v in first if v < 40}) == 20 and {v for v in first if v >= 100} == {100.0 + i for i in range(40)}
    assert 8 <= sum(v < 40 for v in first[:32]) <= 24  # of a uniform draw, half
    assert max(v for v in first[:32] if v < 40) > 20  # not the first batches


def test_validation_alone_sets_the_budget_of_a_drop_of_a_twentieth(trained: nn.Module) -> None:
    forget, retain = split(1)
    model = copy.deepcopy(trained)
    settings: dict[str, Any] = {**QUICK, "select": "all", "layers": ["8"], "hessian": "fisher", "damping": 1e-9}
    with pytest.warns(UserWarning, match="retrain now: the validation score dropped"):
        outcome = LCodec(**settings, update="single_sample").unlearn(model, forget, retain, retain)
    assert outcome.details["removals"] == [] and outcome.details["not_removed"] == [0] and outcome.changed == {}
    assert outcome.details["score_before"] - outcome.details["score"] > 0.05
    assert outcome.settings["budget"]["max_drop"] == 0.05
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trained.parameters(), strict=True))


def test_within_the_budget_nothing_is_said(trained: nn.Module) -> None:
    forget, retain = split(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outcome = LCodec(**QUICK, hessian="gauss_newton").unlearn(copy.deepcopy(trained), forget, retain, retain)
    assert outcome.details["not_removed"] == [] and "retrain_now" not in outcome.details
    assert outcome.details["score"] > outcome.details["score_before"] - 0.05
    free = copy.deepcopy(trained)
    assert LCodec(**QUICK).unlearn(free, forget, retain).settings["budget"] is None


def test_an_error_while_validating_undoes_every_removal(trained: nn.Module) -> None:
    calls = 0

    def score(outputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 2 * 3:  # before any removal and after the first: three batches each
            raise KeyboardInterrupt("stop")
        return outputs[:, 0]

    model = copy.deepcopy(trained)
    forget, retain = split()
    with pytest.raises(KeyboardInterrupt):
        LCodec(**QUICK, damping=1.0, budget=Budget(max_drop=9.0, score=score)).unlearn(model, forget, retain, retain)
    assert calls == 7
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trained.parameters(), strict=True))


def test_a_budget_and_its_validation_go_together(trained: nn.Module) -> None:
    forget, retain = split()
    refused(trained, forget, retain, ValueError, "give validation=", budget=Budget())
    with pytest.raises(TypeError, match="validation is an iterator"):
        LCodec(**QUICK).unlearn(trained, forget, retain, once(retain))
    with pytest.raises(ValueError, match="validation is empty"):
        LCodec(**QUICK).unlearn(trained, forget, retain, [])


# Noise


def test_noise_has_the_deviation_of_the_constants_and_is_no_certificate() -> None:
    (x, y) = regression(200, 400)
    quiet = nn.Linear(400, 1).double()
    noisy = copy.deepcopy(quiet)
    privacy = Privacy(epsilon=0.5, delta=0.01, lipschitz=20.0, hessian_lipschitz=3.0, strong_convexity=0.5)
    settings: dict[str, Any] = {"select": "all", "loss_fn": lambda out, y: (out[:, 0] - y) ** 2, "damping": 1.0,
                                "hessian_samples": 20}  # fmt: skip
    batches = [(x[:1], y[:1])], [(x[1:], y[1:])]
    LCodec(**settings).unlearn(quiet, *batches)
    outcome = LCodec(**settings, privacy=privacy).unlearn(noisy, *batches)
    noise = torch.cat([(noisy.weight - quiet.weight)[0], noisy.bias - quiet.bias]).detach()
    (removal,) = outcome.details["removals"]
    assert removal["deviation"] == pytest.approx(privacy.deviation(1, 200)) and removal["deviation"] > 0
    assert float(noise.std()) == pytest.approx(removal["deviation"], rel=0.1)
    assert "not a certificate" in outcome.details["privacy"]


# Other architectures


class Encoder(nn.Module):
    """A small BERT: words, positions, two encoder layers, a head on the first position."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(30, 8, padding_idx=0)
        self.positions = nn.Embedding(12, 8)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.words(input_ids) + self.positions(torch.arange(input_ids.shape[1]))
        result: Tensor = self.head(self.encoder(x, src_key_padding_mask=attention_mask == 0)[:, 0])
        return result


def texts(n: int = 24) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 30, (n, 9), generator=generator)
    ids[:, 0] = 1
    length = torch.randint(4, 10, (n, 1), generator=generator)
    mask = (torch.arange(9) < length).long()
    labels = torch.arange(n) % 3
    ids[torch.arange(n), 1] = 3 + labels  # the word that says the class
    return [{"input_ids": ids * mask, "attention_mask": mask, "labels": labels}]


def test_a_text_encoder_loses_one_sample() -> None:
    torch.manual_seed(0)
    model, (data,) = Encoder(), texts()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(data["input_ids"], data["attention_mask"]), data["labels"]).backward()
        optimizer.step()
    optimizer.zero_grad()
    forget, retain = ([{k: v[part] for k, v in data.items()}] for part in (slice(1), slice(1, None)))
    chosen = set()
    for layers in (None, ["encoder.layers.1.self_attn.in_proj"], ["encoder.layers.1.self_attn.out_proj"]):
        copied = copy.deepcopy(model)
        method = LCodec(**QUICK, protected=(1,), tokens=2, damping=0.1, hessian="gauss_newton", layers=layers)
        outcome = method.unlearn(copied, forget, retain, retain)
        (removal,) = outcome.details["removals"]
        assert removal["loss_after"] > removal["loss_before"]
        chosen |= {name for name, _ in removal["units"]}
        if layers:
            attention = layers[0].removesuffix(".in_proj").removesuffix(".out_proj")
            kind = "out_proj." if layers[0].endswith("out_proj") else "in_proj_"
            assert set(outcome.changed) == {f"{attention}.{kind}weight", f"{attention}.{kind}bias"}
            assert outcome.changed[f"{attention}.{kind}weight"] == 8 * len(removal["units"])
    assert {"encoder.layers.1.self_attn.in_proj", "encoder.layers.1.self_attn.out_proj"} <= chosen


def test_two_runs_on_texts_are_bitwise_equal_and_the_record_is_plain() -> None:
    torch.manual_seed(0)
    model, (data,) = Encoder(), texts()
    forget, retain = ([{k: v[part] for k, v in data.items()}] for part in (slice(2), slice(2, None)))
    settings: dict[str, Any] = {**QUICK, "vocabulary": range(3, 30), "damping": 1.0, "hessian": "gauss_newton"}
    models = [copy.deepcopy(model) for _ in range(3)]
    for net, seed in zip(models, (0, 0, 1), strict=True):
        torch.manual_seed(seed + 7)
        outcome = LCodec(**settings, seed=seed, budget=Budget(max_drop=1.0)).unlearn(net, forget, retain, retain)
    first, second, third = (torch.cat([p.flatten() for p in m.parameters()]) for m in models)
    assert torch.equal(first, second) and not torch.equal(first, third)
    record = json.loads(json.dumps(outcome.as_dict()))
    assert record["settings"]["vocabulary"] == "range(3, 30)" and record["settings"]["budget"]["max_drop"] == 1.0


@pytest.mark.parametrize("hessian", ["exact", "gauss_newton", "fisher"])
def test_columns_of_a_transposed_linear_move_as_rows_of_a_linear_do(hessian: Any) -> None:
    torch.manual_seed(0)
    turned = nn.Sequential(Conv1D(7, 5), nn.Tanh(), Conv1D(3, 7)).double()
    plain = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    for i in (0, 2):
        plain[i].weight.data, plain[i].bias.data = turned[i].weight.data.T.clone(), turned[i].bias.data.clone()
    x, y = torch.randn(40, 5).double(), torch.arange(40) % 3
    removals = []
    for model in (turned, plain):
        method = LCodec(**QUICK, hessian=hessian, damping=0.5)
        outcome = method.unlearn(model, [(x[:2], y[:2])], [(x[2:], y[2:])])
        removals.append([(r["units"], r["block"]) for r in outcome.details["removals"]])
    assert removals[0] == removals[1]
    for i in (0, 2):
        assert torch.allclose(turned[i].weight.T, plain[i].weight, rtol=0, atol=1e-10)
        assert torch.allclose(turned[i].bias, plain[i].bias, rtol=0, atol=1e-10)


def test_filters_in_three_dimensions_move() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3)).double()
    x, y = torch.randn(20, 1, 3, 3, 3).double(), torch.arange(20) % 3
    outcome = LCodec(**QUICK, layers=["0"], damping=0.5).unlearn(model, [(x[:1], y[:1])], [(x[1:], y[1:])])
    (removal,) = outcome.details["removals"]
    assert removal["loss_after"] > removal["loss_before"]
    assert outcome.changed["0.weight"] == 8 * len(removal["units"])
