"""ClassForgetting on a problem small enough to check by hand, and everything it must refuse."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastunlearn import AlphaSearch, confusion_matrix, layer_change
from fastunlearn.methods.class_forgetting import ClassForgetting, _updatable
from fastunlearn.methods.subspace_report import AlphaPoint
from fastunlearn.outcome import Outcome
from fastunlearn.slots import layer_rows
from fastunlearn.subspace import collect_grams, spectral_filter

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


def test_several_classes_are_forgotten_at_once(trained: nn.Module) -> None:
    model, test = copy.deepcopy(trained), three_classes(seed=1)
    x, y = three_classes()
    forget, retain = y != 2, y == 2
    ClassForgetting().unlearn(model, [(x[forget], y[forget])], [(x[retain], y[retain])])
    assert accuracy(model, test, lambda y: y != 2) <= 0.02 and accuracy(model, test, lambda y: y == 2) >= 0.97


def test_classes_are_forgotten_one_after_another(trained: nn.Module) -> None:
    model, test = copy.deepcopy(trained), three_classes(seed=1)
    x, y = three_classes()
    left = y >= 0
    for c in (0, 1):
        left &= y != c  # what was forgotten before must not be protected
        ClassForgetting().unlearn(model, [(x[y == c], y[y == c])], [(x[left], y[left])])
        for gone in range(c + 1):
            assert accuracy(model, test, lambda y, gone=gone: y == gone) <= 0.02
    assert accuracy(model, test, lambda y: y == 2) >= 0.97
    assert confusion_matrix(model, [test]).where(0)[2] >= 98


def test_a_streaming_loader_without_a_length_gives_the_same_update(trained: nn.Module) -> None:
    class Stream:
        def __init__(self, batches: list[Pair]) -> None:
            self.batches = batches

        def __iter__(self) -> Iterator[Pair]:
            yield from self.batches

    forget, retain = split(three_classes())
    one, other = copy.deepcopy(trained), copy.deepcopy(trained)
    ClassForgetting(max_patches=300).unlearn(one, forget, retain)
    ClassForgetting(max_patches=300).unlearn(other, Stream(forget), Stream(retain))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_how_each_layer_was_solved_and_why_is_said(trained: nn.Module) -> None:
    forget, retain = split(three_classes(24))  # 8 and 16 samples: the Linear layers have 32 columns
    outcome = ClassForgetting().unlearn(copy.deepcopy(trained), forget, retain)
    solvers = outcome.details["solver"]
    assert list(solvers) == ["0", "4", "7", "9"]
    assert solvers["0"][0] == "cholesky" and "condition 100 at most" in solvers["0"][1]
    assert solvers["7"][0] == "rows" and "16 rows are fewer than 32 columns" in solvers["7"][1]
    forget, retain = split(three_classes(54))  # 18 and 36
    solver, reason = ClassForgetting().unlearn(copy.deepcopy(trained), forget, retain).details["solver"]["7"]
    assert solver == "cholesky for retain, rows for forget" and "18 rows are fewer" in reason
    outcome = ClassForgetting(solver="eigh").unlearn(copy.deepcopy(trained), forget, retain)
    assert set(outcome.details["solver"].values()) == {("eigh", "asked for")}


@pytest.mark.parametrize("max_patches", [1, 20, 100, None])
@pytest.mark.parametrize("samples", [6, 60, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_run_holds_no_more_than_its_plan_says(
    trained: nn.Module, max_patches: int | None, samples: int, dtype: torch.dtype
) -> None:
    model = copy.deepcopy(trained).to(dtype)
    forget, retain = ([(x.to(dtype), y) for x, y in part] for part in split(three_classes(samples), size=7))
    method = ClassForgetting(max_patches=max_patches)
    plan = method.plan(model, forget, retain)
    found = [collect_grams(model, batches, None, max_patches) for batches in (forget, retain)]
    assert [layer.name for layer in plan.layers] == ["0", "4", "7", "9"]
    for layer in plan.layers:
        for grams in found:
            gram = grams[layer.name]
            tensors = gram._rows if gram._gram is None else [gram._gram]
            assert 2 * sum(t.numel() * t.element_size() for t in tensors) <= layer.held
            assert gram.elements <= layer.groups * min(gram.rows_seen, layer.dim) * layer.dim
    assert plan.total == plan.held + plan.sample + plan.workspace + plan.weights
    if max_patches is None:
        assert plan.sample == 0 and plan.held == 2 * 8 * (9 * 9 + 2 * 36 * 36 + 2 * 32 * 32)


def test_the_plan_states_the_sample_of_the_largest_batch() -> None:
    model = nn.Linear(30, 4)
    batches = [(torch.randn(n, 30), torch.zeros(n)) for n in (3, 5, 2)]
    plan = ClassForgetting(max_patches=7).plan(model, batches, batches)
    assert plan.sample == 4 * 30 * 4  # ceil(7 * 5 / 10) rows of 30 float32
    assert plan.held == 2 * 7 * 30 * 4 and plan.weights == 4 * 30 * 4
    assert "rows or cholesky: 7 rows at most" in str(plan) and "at most" in str(plan).splitlines()[-1]


def test_a_plan_says_what_is_left_alone_and_takes_the_small_layers_first() -> None:
    model = Shared()
    data = [(torch.zeros(2, 4), torch.zeros(2))]
    plan = ClassForgetting().plan(model, data, data)
    assert "embedding (Embedding)" in plan.untouched["head"] and "left alone" in str(plan)
    wide = nn.Sequential(nn.Linear(2000, 40), nn.ReLU(), nn.Linear(40, 3))
    plan = ClassForgetting(memory_limit=1_000_000, max_patches=None).plan(wide, data, data)
    assert [(layer.name, layer.solver) for layer in plan.layers] == [("0", "sketch"), ("2", "cholesky")]
    assert plan.limit == 1_000_000 and plan.layers[0].held < 2 * 8 * 2000**2
    assert "the limit is 1.0 MB" in str(plan) and plan.layers[0].ranks == (400, 64)
    plan = ClassForgetting(memory_limit=0, max_patches=None, rank=5000).plan(wide, data, data)
    assert {layer.solver for layer in plan.layers} == {"cholesky"}  # a sketch would hold no less


def test_no_product_of_columns_by_columns_is_formed_for_few_rows() -> None:
    """40,000 columns would take 12.8 GB a matrix."""
    model = nn.Linear(40_000, 2)
    x = torch.randn(6, 40_000)
    before = model.weight.detach().clone()
    method = ClassForgetting(max_patches=100)
    assert method.plan(model, [(x[:2], torch.zeros(2))], [(x[2:], torch.zeros(4))]).total < 1e9
    method.unlearn(model, [(x[:2], torch.zeros(2))], [(x[2:], torch.zeros(4))])
    assert (model(x[:2]) - before @ x[:2].mT).norm() > 0 and not torch.equal(model.weight, before)


DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("samples", [24, 300])
def test_every_device_gives_the_same_update_search_and_spectrum(trained: nn.Module, samples: int, device: str) -> None:
    here, there = copy.deepcopy(trained).double(), copy.deepcopy(trained).double().to(device)
    forget, retain = ([(x.double(), y) for x, y in part] for part in split(three_classes(samples)))
    method = ClassForgetting(max_patches=500)
    grids = [method.search(model, forget, retain, **GRID) for model in (here, there)]
    for one, other in zip(*(grid.points for grid in grids), strict=True):
        assert one.accuracy == other.accuracy and one.change == pytest.approx(other.change, rel=1e-9)
    spectra = [method.spectrum(model, forget, retain) for model in (here, there)]
    for a, b in zip(*(spectrum.layers for spectrum in spectra), strict=True):
        assert torch.allclose(a.retain, b.retain, rtol=0, atol=1e-11)
    assert (
        str(method.plan(here, forget, retain)).splitlines()[0]
        == str(method.plan(there, forget, retain)).splitlines()[0]
    )
    for model in (here, there):
        method.unlearn(model, forget, retain)
    for p, q in zip(here.parameters(), there.parameters(), strict=True):
        assert torch.allclose(p, q.cpu(), rtol=0, atol=1e-10)
    assert torch.equal(*(confusion_matrix(model, [*forget, *retain]).counts for model in (here, there)))


GRID = {"alphas_retain": (0.25, 100.0, 1000.0), "alphas_forget": (0.25, 3.0, 30.0)}


@pytest.mark.parametrize("samples", [24, 300])
def test_every_point_of_a_search_is_the_run_with_its_alphas(trained: nn.Module, samples: int) -> None:
    model = copy.deepcopy(trained).double()
    forget, retain = ([(x.double(), y) for x, y in part] for part in split(three_classes(samples)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen: list[list[Tensor]] = []

    def score(measured: nn.Module) -> dict[str, float]:
        seen.append([p.detach().clone() for p in measured.parameters()])
        return {"forget": 0.0, "retain": 0.0}

    search = ClassForgetting().search(model, forget, retain, **GRID, score=score)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [(p.alpha_retain, p.alpha_forget) for p in search.points] == [
        (r, f) for r in GRID["alphas_retain"] for f in GRID["alphas_forget"]
    ]
    for point, found in zip(search.points, seen[1:], strict=True):
        other = copy.deepcopy(model)
        outcome = ClassForgetting(point.alpha_retain, point.alpha_forget).unlearn(other, forget, retain)
        for a, b in zip(found, other.parameters(), strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-11)
        names = outcome.details["relative_change"]
        norms = {name: float(model.get_submodule(name).weight.detach().norm()) for name in names}
        total = math.sqrt(sum((change * norms[name]) ** 2 for name, change in names.items()))
        assert point.change == pytest.approx(total / math.sqrt(sum(n**2 for n in norms.values())), rel=1e-9)


def test_a_search_decomposes_each_layer_and_set_once(trained: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    plain = torch.linalg.eigh

    def counted(matrix: Tensor) -> Any:
        calls.append(tuple(matrix.shape))
        return plain(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", counted)
    forget, retain = split(three_classes())
    ClassForgetting().search(copy.deepcopy(trained), forget, retain, **GRID)
    assert len(calls) == 2 * 4


def test_a_search_finds_alphas_that_forget_on_held_back_samples(trained: nn.Module, tmp_path: Path) -> None:
    model = copy.deepcopy(trained)
    forget, retain = split(three_classes())
    held = split(three_classes(seed=3))
    method = ClassForgetting()
    search = method.search(
        model, forget, retain, forget_measured=held[0], retain_measured=held[1], test=[three_classes(seed=1)]
    )
    assert len(search.points) == 36 and set(search.original) == {"forget", "retain", "test"}
    best = search.best()
    assert best.accuracy["forget"] <= 1 and best.accuracy["retain"] >= 97 and best.change > 0
    replace(method, alpha_retain=best.alpha_retain, alpha_forget=best.alpha_forget).unlearn(model, forget, retain)
    assert accuracy(model, three_classes(seed=1), lambda y: y == 0) <= 0.02
    assert str(search).count(" *") == 1 and "original" in str(search)
    assert len(search.as_dict()["points"]) == 36
    search.picture(tmp_path / "grid.svg")
    assert "alpha retain" in (tmp_path / "grid.svg").read_text()


def test_best_is_the_most_retained_among_those_that_forget_and_of_equals_the_smallest_change() -> None:
    def point(alpha: float, forget: float, retain: float, change: float) -> AlphaPoint:
        return AlphaPoint(alpha, 1.0, {"forget": forget, "retain": retain}, change)

    points = [point(1, 5, 99, 0.1), point(2, 1, 90, 0.5), point(3, 0, 90, 0.2), point(4, 0, 80, 0.1)]
    search = AlphaSearch({"forget": 100.0, "retain": 99.0}, points, 0.1)
    assert search.best().alpha_retain == 3 and search.best(max_forget=5).alpha_retain == 1
    with pytest.raises(ValueError, match=r"lowest is 0\.00 %"):
        search.best(max_forget=-1)


def test_a_search_that_cannot_start_or_measure_is_refused(trained: nn.Module) -> None:
    model = copy.deepcopy(trained)
    forget, retain = split(three_classes())
    method = ClassForgetting()
    with pytest.raises(ValueError, match="at least one alpha"):
        method.search(model, forget, retain, alphas_retain=())
    with pytest.raises(ValueError, match="alphas_forget must be"):
        method.search(model, forget, retain, alphas_forget=(1.0, -1.0))
    with pytest.raises(ValueError, match="'forget' and 'retain'"):
        method.search(model, forget, retain, score=lambda model: {"test": 1.0})
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trained.parameters(), strict=True))


def test_spectra_hold_all_energy_and_their_pictures_the_filters(trained: nn.Module, tmp_path: Path) -> None:
    model = copy.deepcopy(trained)
    forget, retain = split(three_classes())
    spectrum = ClassForgetting().spectrum(model, forget, retain)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trained.parameters(), strict=True))
    assert [(layer.name, layer.dim, len(layer.retain)) for layer in spectrum.layers] == [
        ("0", 9, 1), ("4", 36, 2), ("7", 32, 1), ("9", 32, 1),
    ]  # fmt: skip
    grams = collect_grams(model, retain, None, 10_000)
    for layer in spectrum.layers:
        for which in ("retain", "forget"):
            ratios = getattr(layer, which)
            assert torch.allclose(ratios.sum(-1), torch.ones(()).double()) and (ratios.diff() <= 0).all()
            assert layer.energy(which, layer.dim) == pytest.approx(1)
            k = layer.directions(which, 0.9)
            assert float(ratios[:, :k].sum(-1).min()) >= 0.9 - 1e-9 > float(ratios[:, : k - 1].sum(-1).min())
            assert 1 <= layer.effective_rank(which) <= layer.dim
        values = torch.linalg.eigvalsh(grams[layer.name].gram).flip(-1)
        assert torch.allclose(layer.retain, values / values.sum(-1, keepdim=True), rtol=0, atol=1e-12)
    table = str(spectrum).splitlines()
    assert len(table) == 2 + 2 * 4 and table[1].startswith("0      retain       9    10,000")
    spectrum.picture(tmp_path / "spectrum.svg")
    drawn = (tmp_path / "spectrum.svg").read_text()
    assert "filter, alpha 100" in drawn and "4 (d = 36)" in drawn


def test_layer_change_is_a_table_and_a_picture_of_where_the_weights_moved(trained: nn.Module, tmp_path: Path) -> None:
    outcome = ClassForgetting().unlearn(copy.deepcopy(trained), *split(three_classes()))
    change = layer_change(outcome)
    assert dict(change.layers) == outcome.details["relative_change"]
    lines = str(change).splitlines()
    largest = max(range(4), key=lambda i: change.layers[i][1])
    assert len(lines) == 5 and lines[1 + largest].count("█") == 20
    change.picture(tmp_path / "change.svg")
    assert "norm of the update" in (tmp_path / "change.svg").read_text()
    with pytest.raises(ValueError, match="DeepClean has no relative change"):
        layer_change(Outcome("DeepClean", {}))


def test_the_shares_of_one_weight_are_told_apart_by_its_uses() -> None:
    uses, untouched = _updatable(Shared(), None)
    assert [[slot.name for slot in group] for group in uses] == [["a", "b"], ["unused"]]
    assert set(untouched) == {"head", "computed"}


def test_low_rank_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="rank must be 1 or more"):
        ClassForgetting(rank=0)
    with pytest.raises(ValueError, match="memory_limit counts bytes"):
        ClassForgetting(memory_limit=-1)


def test_a_model_with_an_adapter_is_changed_there_alone_and_a_frozen_one_as_a_whole(trained: nn.Module) -> None:
    forget, retain = split(three_classes())
    part, whole = copy.deepcopy(trained), copy.deepcopy(trained).requires_grad_(False)
    part.requires_grad_(False)[7].requires_grad_(True)
    outcome = ClassForgetting().unlearn(part, forget, retain)
    assert set(outcome.changed) == {"7.weight"}
    assert "does not require grad" in outcome.details["untouched"]["9"]
    assert set(ClassForgetting(layers=["9"]).unlearn(part, forget, retain).changed) == {"9.weight"}
    assert {"0.weight", "9.weight"} <= set(ClassForgetting().unlearn(whole, forget, retain).changed)
