"""ClassForgetting on a problem small enough to check by hand, and everything it must refuse."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastunlearn.methods.class_forgetting import ClassForgetting
from fastunlearn.outcome import Outcome
from fastunlearn.slots import layer_rows
from fastunlearn.subspace import spectral_filter

Pair = tuple[Tensor, Tensor]


def three_classes(n: int = 300, seed: int = 0) -> Pair:
    """8 x 8 images, one bright patch per class, with noise."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    x = 0.3 * torch.randn(n, 1, 8, 8, generator=generator)
    for c, (i, j) in enumerate(((0, 0), (4, 0), (0, 4))):
        x[y == c, 0, i : i + 4, j : j + 4] += 1
    return x, y


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3),
    ).to(dtype)  # fmt: skip


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    model, (x, y) = network(), three_classes()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval().requires_grad_(True)


def split(data: Pair, c: int = 0, size: int = 50) -> tuple[list[Pair], list[Pair]]:
    x, y = data
    forget, retain = y == c, y != c
    return (
        list(zip(x[forget].split(size), y[forget].split(size), strict=True)),
        list(zip(x[retain].split(size), y[retain].split(size), strict=True)),
    )


def accuracy(model: nn.Module, data: Pair, which: Callable[[Tensor], Tensor]) -> float:
    x, y = data
    keep = which(y)
    return float((model(x[keep]).argmax(1) == y[keep]).float().mean())


@pytest.mark.parametrize("c", [0, 1, 2])
def test_forgets_the_class_and_keeps_the_others(trained: nn.Module, c: int) -> None:
    model, test = copy.deepcopy(trained), three_classes(seed=1)
    assert accuracy(model, test, lambda y: y == c) > 0.97
    forget, retain = split(three_classes(), c)
    ClassForgetting().unlearn(model, forget, retain)
    assert accuracy(model, test, lambda y: y == c) <= 0.02
    assert accuracy(model, test, lambda y: y != c) >= 0.97


def test_update_is_the_formula_on_every_layer_and_group(trained: nn.Module) -> None:
    model = copy.deepcopy(trained).double()
    before = copy.deepcopy(model)
    forget, retain = split(three_classes())
    forget, retain = ([(x.double(), y) for x, y in part] for part in (forget, retain))
    outcome = ClassForgetting(alpha_retain=30.0, alpha_forget=2.0, max_patches=None).unlearn(model, forget, retain)
    inputs: dict[str, Tensor] = {}
    for name, layer in before.named_children():
        layer.register_forward_hook(lambda m, a, out, name=name: inputs.__setitem__(name, a[0].clone()))
    grams = {}
    for what, part in (("r", retain), ("f", forget)):
        before(torch.cat([x for x, _ in part]))
        grams[what] = {n: layer_rows(before.get_submodule(n), inputs[n]) for n in ("0", "4", "7", "9")}
    for name in ("0", "4", "7", "9"):
        w = before.get_submodule(name).weight
        m_r, m_f = (
            spectral_filter(a.mT @ a, alpha) for a, alpha in ((grams["r"][name], 30.0), (grams["f"][name], 2.0))
        )
        flat = w.reshape(m_r.shape[0], -1, m_r.shape[-1])
        expected = (flat - flat @ (torch.eye(m_r.shape[-1]).double() - m_r) @ m_f).reshape(w.shape)
        assert torch.allclose(model.get_submodule(name).weight, expected, rtol=0, atol=1e-12)
    assert set(outcome.changed) == {f"{name}.weight" for name in ("0", "4", "7", "9")}


def test_only_weights_of_layers_change_and_are_counted(trained: nn.Module) -> None:
    model = copy.deepcopy(trained)
    outcome = ClassForgetting().unlearn(model, *split(three_classes()))
    state = trained.state_dict()
    for name, value in model.state_dict().items():
        assert int((value != state[name]).sum()) == outcome.changed.get(name, 0)
    assert not any("bias" in name for name in outcome.changed)
    assert outcome.method == "ClassForgetting" and outcome.settings["alpha_retain"] == 100.0
    assert set(outcome.seconds) == {"gather", "solve", "write"} and outcome.peak_memory > 0
    assert outcome.details["rows"]["0"] == (10_000, 6400) and outcome.details["untouched"] == {}


@pytest.mark.parametrize("solver", ["cholesky", "eigh"])
def test_solvers_agree(trained: nn.Module, solver: Any) -> None:
    one, other = (copy.deepcopy(trained).double() for _ in range(2))
    forget, retain = ([(x.double(), y) for x, y in part] for part in split(three_classes(24)))
    ClassForgetting().unlearn(one, forget, retain)
    ClassForgetting(solver=solver).unlearn(other, forget, retain)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-9)


def test_two_runs_are_bitwise_equal(trained: nn.Module) -> None:
    models = [copy.deepcopy(trained) for _ in range(2)]
    for model in models:
        ClassForgetting(max_patches=100, seed=7).unlearn(model, *split(three_classes()))
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_are_computed_in_float32_and_keep_their_dtype(trained: nn.Module, dtype: torch.dtype) -> None:
    model, full = copy.deepcopy(trained).to(dtype), copy.deepcopy(trained)
    forget, retain = split(three_classes())
    ClassForgetting().unlearn(full, forget, retain)
    ClassForgetting().unlearn(model, [(x.to(dtype), y) for x, y in forget], [(x.to(dtype), y) for x, y in retain])
    for a, b in zip(model.parameters(), full.parameters(), strict=True):
        assert a.dtype == dtype
        assert (a - b).norm() <= 8 * torch.finfo(dtype).eps * b.norm()


def test_only_the_named_layers_change(trained: nn.Module) -> None:
    outcome = ClassForgetting(layers=["7"]).unlearn(copy.deepcopy(trained), *split(three_classes()))
    assert set(outcome.changed) == {"7.weight"}


class Shared(nn.Module):
    """One weight in two layers, one in a layer called twice, one never called, one tied to an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4, bias=False)
        self.b.weight = self.a.weight
        self.unused = nn.Linear(4, 4)
        self.embedding = nn.Embedding(3, 4)
        self.head = nn.Linear(4, 3, bias=False)
        self.head.weight = self.embedding.weight
        self.computed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.computed(self.b(self.a(x).relu())))
        return result


def shared_data() -> tuple[list[Pair], list[Pair]]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 4, generator=generator, dtype=torch.float64), torch.zeros(20)
    return [(x[:5], y[:5])], [(x[5:], y[5:])]


@pytest.mark.parametrize("layers", [None, ["b"], ["a", "b"]])
def test_a_shared_weight_is_updated_once_from_all_its_uses(layers: list[str] | None) -> None:
    torch.manual_seed(0)
    model = Shared().double()
    before = copy.deepcopy(model)
    forget, retain = shared_data()
    outcome = ClassForgetting(layers=layers).unlearn(model, forget, retain)
    grams = []
    for x in (retain[0][0], forget[0][0]):
        a = torch.cat([x, before.a(x).relu()])
        grams.append(a.mT @ a)
    m_r, m_f = spectral_filter(grams[0], 100.0), spectral_filter(grams[1], 3.0)
    w = before.a.weight
    assert torch.allclose(model.a.weight, w - w @ (torch.eye(4).double() - m_r) @ m_f, atol=1e-12)
    assert model.b.weight is model.a.weight
    assert outcome.changed == {"a.weight": 16}


def test_what_cannot_be_updated_is_left_alone_and_listed() -> None:
    model = Shared().double()
    before = copy.deepcopy(model.state_dict())
    outcome = ClassForgetting().unlearn(model, *shared_data())
    untouched = outcome.details["untouched"]
    assert set(untouched) == {"unused", "head", "computed"}
    assert "never called" in untouched["unused"]
    assert "embedding (Embedding)" in untouched["head"]
    assert "computed from other parameters" in untouched["computed"]
    for name, value in model.state_dict().items():
        assert name in ("a.weight", "b.weight") or torch.equal(value, before[name])


def test_inputs_that_are_all_zero_change_nothing() -> None:
    model = nn.Linear(4, 3)
    before = model.weight.clone()
    ClassForgetting().unlearn(model, [(torch.zeros(2, 4), torch.zeros(2))], [(torch.ones(2, 4), torch.zeros(2))])
    assert torch.equal(model.weight, before)


def test_modes_hooks_gradients_and_random_state_are_put_back(trained: nn.Module) -> None:
    model = copy.deepcopy(trained)
    model[7].weight.requires_grad_(False)
    model[6].train()
    state = torch.get_rng_state()
    ClassForgetting(max_patches=10).unlearn(model, *split(three_classes()))
    assert model[6].training and not model[0].training
    assert [p.requires_grad for p in model[7].parameters()] == [False, True]
    assert not any(module._forward_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def once(batches: list[Pair]) -> Iterator[Pair]:
    yield from batches


def refused(
    model: nn.Module, forget: Any, retain: Any, error: type[BaseException], message: str, **settings: Any
) -> None:
    """``unlearn`` raises, and the model is as it was: weights, buffers, modes, hooks."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    with pytest.raises(error, match=message):
        outcome: Outcome = ClassForgetting(**settings).unlearn(model, forget, retain)
        del outcome
    assert all(torch.equal(value, before[name]) or value.isnan().any() for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())


def test_an_iterator_is_refused(trained: nn.Module) -> None:
    forget, retain = split(three_classes())
    refused(trained, once(forget), retain, TypeError, "forget is an iterator")
    refused(trained, forget, once(retain), TypeError, "retain is an iterator")


def test_an_empty_loader_is_refused(trained: nn.Module) -> None:
    forget, retain = split(three_classes())
    refused(trained, [], retain, ValueError, "forget is empty")
    refused(trained, forget, [], ValueError, "retain is empty")
    refused(trained, forget, [], ValueError, "retain is empty", max_patches=None)


def test_shapes_that_do_not_match_are_refused(trained: nn.Module) -> None:
    forget, retain = split(three_classes())
    refused(trained, [(forget[0][0], forget[0][1][:3])], retain, ValueError, "share a first axis")
    refused(trained, [(torch.zeros(2, 3, 8, 8), torch.zeros(2))], retain, RuntimeError, "channels")
    refused(trained, [(torch.zeros(2, 1, 9, 20), torch.zeros(2))], retain, RuntimeError, "shapes")


def test_nan_weights_are_refused(trained: nn.Module) -> None:
    model = copy.deepcopy(trained)
    with torch.no_grad():
        model[7].bias[0] = float("nan")
    refused(model, *split(three_classes()), ValueError, r"7\.bias holds NaN")


def test_nan_inputs_are_refused_and_the_layer_named(trained: nn.Module) -> None:
    forget, retain = split(three_classes())
    x, y = forget[-1]
    refused(trained, [(x / 0, y)], retain, ValueError, "layer 0")


def test_batchnorm_in_train_mode_is_refused(trained: nn.Module) -> None:
    refused(copy.deepcopy(trained).train(), *split(three_classes()), ValueError, r"model\.eval\(\)")


def test_unknown_layers_are_refused(trained: nn.Module) -> None:
    refused(trained, *split(three_classes()), ValueError, "'1' is not a Linear", layers=["1"])


def test_a_model_that_raises_half_way_is_left_as_it_was(trained: nn.Module) -> None:
    def boom(module: nn.Module, args: Any) -> None:
        raise RuntimeError("boom")

    model = copy.deepcopy(trained)
    model[9].register_forward_pre_hook(boom)
    refused(model, *split(three_classes()), RuntimeError, "boom")


def test_an_update_that_overflows_its_dtype_is_refused() -> None:
    """Found before anything is written: the first layer's update is fine, and is not written either."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)).double()
    with torch.no_grad():
        model[1].weight.fill_(1.7e308)
    x = torch.tensor([[1.0, 0.5]], dtype=torch.float64) * 1e-3
    forget, retain = [(x, torch.zeros(1))], [(x.flip(1), torch.zeros(1))]
    refused(model, forget, retain, ValueError, "layer 1", solver="eigh")


@pytest.mark.parametrize("alpha", [0.0, -3.0, float("nan"), float("inf")])
def test_alpha_must_be_finite_and_positive(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha_retain"):
        ClassForgetting(alpha_retain=alpha)
    with pytest.raises(ValueError, match="alpha_forget"):
        ClassForgetting(alpha_forget=alpha)


def test_other_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="solver must be one of"):
        ClassForgetting(solver="svd")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_patches"):
        ClassForgetting(max_patches=0)
