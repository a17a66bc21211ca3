"""Gradients, curvature matrices and products of a block against torch.func and plain loops, in float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastunlearn.data import Batch, cross_entropy
from fastunlearn.methods import curvature
from fastunlearn.methods.block import Block, trainable_layers
from fastunlearn.methods.curvature import KINDS, gradient, matrix, product

Units = list[tuple[str, int]]


class Attention(nn.Module):
    """nn.MultiheadAttention reads ``out_proj.weight`` itself, without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(3, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        result: Tensor = self.head((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))
        return result


class Projections(nn.Module):
    """Causal attention over separate projections, time before samples on the way in."""

    def __init__(self, time_first: bool) -> None:
        super().__init__()
        self.time_first = time_first
        self.enter, self.q, self.k, self.v = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.enter(x.transpose(0, 1) if self.time_first else x))
        q, k, v = (
            (layer(x).transpose(0, 1) if self.time_first else layer(x)).unflatten(-1, (2, 2)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        result: Tensor = self.head(seen.transpose(1, 2).flatten(2).mean(1))
        return result


class Shared(nn.Module):
    """One weight in two layers with biases of their own, one layer called twice, and the weight read once more."""

    def __init__(self, read: bool) -> None:
        super().__init__()
        self.read = read
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.b(torch.tanh(self.a(torch.tanh(self.a(x))))))
        if self.read:
            x = x @ self.a.weight.square()
        result: Tensor = self.head(x)
        return result


class Sequence(nn.Module):
    """Convolutions over time, with everything that a convolution can be asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv1d(2, 4, 3, stride=2, padding=1)
        self.b = nn.Conv1d(4, 4, 3, dilation=2, padding="same")
        self.c = nn.Conv1d(4, 4, 2, groups=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(torch.tanh(self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))).mean(2))
        return result


@dataclass
class Case:
    model: nn.Module
    units: Units
    x: Tensor
    y: Tensor
    loss_fn: Callable[[Any, Any], Tensor] | None = None
    index: Tensor | None = None

    def __post_init__(self) -> None:
        self.model.double().eval()
        self.x = self.x.double()
        self.block = Block(trainable_layers(self.model, None), self.units, None)
        assert self.block.size > 1

    def batches(self, size: int = 4) -> list[Batch]:
        return [Batch((x,), {}, y, len(x)) for x, y in zip(self.x.split(size), self.y.split(size), strict=True)]

    def losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        return (self.loss_fn or cross_entropy)(outputs, y)

    def of_slice(self, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """``function`` of the outputs as a function of the block's weights alone."""
        names = [next(n for n, p in self.model.named_parameters() if p is q) for q in self.block.parameters]

        def call(weights: Tensor) -> Tensor:
            values = {}
            pieces = weights.split(self.block.sizes)
            for name, (p, rows), piece in zip(names, self.block.parts, pieces, strict=True):
                values[name] = p.detach().index_copy(0, rows, piece.view(len(rows), *p.shape[1:]))
            with sdpa_kernel(SDPBackend.MATH):
                return function(torch.func.functional_call(self.model, values, (self.x,)))

        return call


def mse(outputs: Tensor, y: Tensor) -> Tensor:
    return (outputs - F.one_hot(y, 3)).square().sum(1)


def coupled(outputs: Tensor, y: Tensor) -> Tensor:
    """A loss whose samples see one another: sample by sample, it is another one."""
    return cross_entropy(outputs - outputs.mean(0) ** 2, y)


def mlp() -> Case:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Softplus(), nn.Linear(4, 3))
    return Case(model, [("2", 1), ("0", 3), ("0", 0), ("4", 2)], torch.randn(9, 5), torch.arange(9) % 3)


def last_layer() -> Case:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3, bias=False))
    return Case(model, [("2", 2), ("2", 0), ("2", 1)], torch.randn(9, 5), torch.arange(9) % 3)


def squared_error() -> Case:
    case = mlp()
    return Case(case.model, case.units, case.x, case.y, mse)


def images() -> Case:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Softplus(), nn.Conv2d(4, 4, (3, 2), stride=(1, 2)),
        nn.ReLU(inplace=True), nn.Conv2d(4, 2, 2, groups=2), nn.Tanh(), nn.Conv2d(2, 4, 1), nn.Flatten(),
        nn.Linear(12, 3),
    )  # fmt: skip
    model[1].running_mean += torch.randn(4)
    model[1].running_var += torch.rand(4)
    units = [("9", 1), ("3", 2), ("0", 0), ("3", 0), ("5", 1), ("7", 3)]
    return Case(model, units, torch.randn(5, 2, 6, 5), torch.arange(5) % 3)


def grouped() -> Case:
    case = images()
    return Case(case.model, [("5", 0), ("9", 2)], case.x, case.y)


def over_time() -> Case:
    units = [("a", 1), ("b", 2), ("c", 3), ("head", 0)]
    return Case(Sequence(), units, torch.randn(5, 2, 8), torch.arange(5) % 3)


def attention() -> Case:
    units = [("enter", 1), ("attention.out_proj", 2), ("head", 0)]
    return Case(Attention(), units, torch.randn(6, 4, 3), torch.arange(6) % 3)


def projections() -> Case:
    units = [("enter", 1), ("q", 3), ("k", 0), ("v", 2), ("head", 0)]
    return Case(Projections(False), units, torch.randn(6, 3, 3), torch.arange(6) % 3)


def time_first() -> Case:
    """As many positions as samples per batch: their axes cannot be told apart by length."""
    units = [("enter", 1), ("q", 3), ("v", 2)]
    return Case(Projections(True), units, torch.randn(8, 4, 3), torch.arange(8) % 3)


def encoder() -> Case:
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, activation="gelu")
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(12, 3))
    units = [("0.linear1", 5), ("0.linear2", 1), ("2", 0)]
    return Case(model, units, torch.randn(5, 3, 4), torch.arange(5) % 3)


def shared() -> Case:
    units = [("b", 1), ("a", 1), ("a", 3), ("head", 0)]
    return Case(Shared(False), units, torch.randn(6, 4), torch.arange(6) % 3)


def shared_and_read() -> Case:
    return Case(Shared(True), [("a", 2), ("head", 1)], torch.randn(6, 4), torch.arange(6) % 3)


def samples_that_interact() -> Case:
    case = mlp()
    return Case(case.model, case.units, case.x[:4], case.y[:4], coupled)


CASES = [
    mlp, last_layer, squared_error, images, grouped, over_time, attention, projections, time_first, encoder, shared,
    shared_and_read,
]  # fmt: skip


@pytest.fixture(params=CASES, ids=lambda c: c.__name__)
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    made: Case = request.param()
    return made


def close(found: Tensor, truth: Tensor) -> bool:
    assert found.dtype == torch.float64 and found.shape == truth.shape
    if not truth.numel():
        return True
    truth = truth.detach()
    return float((found - truth).abs().max()) <= 1e-11 * max(1.0, float(truth.abs().max()))


def hessian(case: Case) -> Tensor:
    result: Tensor = torch.func.hessian(case.of_slice(lambda out: case.losses(out, case.y).mean()))(case.block.values())
    return result


def test_gradient_equals_that_of_the_mean_loss(case: Case) -> None:
    truth = torch.func.grad(case.of_slice(lambda out: case.losses(out, case.y).mean()))(case.block.values())
    assert close(gradient(case.model, case.block, case.batches(), case.loss_fn), truth)


def test_exact_matrix_equals_the_block_of_the_full_hessian(case: Case) -> None:
    found = matrix(case.model, case.block, case.batches(), case.loss_fn, "exact")
    assert close(found, hessian(case))
    assert torch.equal(found, found.mT)


def test_gauss_newton_matrix_equals_the_jacobian_product(case: Case) -> None:
    jacobian = torch.func.jacrev(case.of_slice(lambda out: out))(case.block.values())
    outputs = case.model(case.x).detach()

    def one(out: Tensor, y: Tensor) -> Tensor:
        return case.losses(out[None], y[None])[0]

    bend = torch.stack([torch.func.hessian(one)(o, y) for o, y in zip(outputs, case.y, strict=True)])
    truth = torch.einsum("nas,nab,nbt->st", jacobian, bend, jacobian) / len(outputs)
    assert close(matrix(case.model, case.block, case.batches(), case.loss_fn, "gauss_newton"), truth)


def test_fisher_matrix_equals_the_loop_over_samples(case: Case) -> None:
    truth = torch.zeros(case.block.size, case.block.size, dtype=torch.float64)
    for x, y in zip(case.x, case.y, strict=True):
        case.model.zero_grad(set_to_none=True)
        case.losses(case.model(x[None]), y[None]).sum().backward()
        g = case.block.flat([p.grad for p in case.block.parameters])  # type: ignore[misc]
        truth += g[:, None] * g / len(case.x)
    case.model.zero_grad(set_to_none=True)
    assert close(matrix(case.model, case.block, case.batches(), case.loss_fn, "fisher"), truth)


def reference(case: Case) -> Tensor:
    def gradients() -> list[Tensor]:
        loss = case.losses(case.model(case.x), case.y).mean()
        return list(torch.autograd.grad(loss, case.block.parameters))

    old = [p.detach().clone() for p in case.block.parameters]
    first = gradients()
    with torch.no_grad():
        for p, g in zip(case.block.parameters, first, strict=True):
            p -= 1e-3 * g
    moved, second = case.block.flat([p.detach() for p in case.block.parameters]), gradients()
    with torch.no_grad():
        for p, o in zip(case.block.parameters, old, strict=True):
            p.copy_(o)
    y = case.block.flat(first) - case.block.flat(second)
    return torch.outer(y, y) / (case.block.flat(old) - moved).abs().sum()


def test_reference_matrix_equals_its_formula_and_puts_the_weights_back(case: Case) -> None:
    truth = reference(case)
    before = {name: value.clone() for name, value in case.model.state_dict().items()}
    found = matrix(case.model, case.block, case.batches(), case.loss_fn, "reference")
    assert (found - truth).norm() <= 1e-9 * truth.norm()  # y is a difference of nearly equal gradients
    assert all(torch.equal(value, before[name]) for name, value in case.model.state_dict().items())


@pytest.mark.parametrize("kept", [curvature.KEPT, 0], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kind", KINDS)
def test_product_equals_the_matrix_times_the_vector(case: Case, kind: str, kept: int) -> None:
    dense = matrix(case.model, case.block, case.batches(), case.loss_fn, kind)
    times = product(case.model, case.block, case.batches(), case.loss_fn, kind, kept)
    v = torch.randn(3, case.block.size, dtype=torch.float64)
    assert close(times(v), v @ dense)
    assert close(times(v[0]), dense @ v[0])
    assert close(times(torch.zeros_like(v[:0])), torch.zeros_like(v[:0]))


def test_samples_that_see_one_another_fall_back_to_products() -> None:
    torch.manual_seed(0)
    case = samples_that_interact()
    truth = hessian(case)
    assert close(matrix(case.model, case.block, case.batches(), coupled, "exact"), truth)
    times = product(case.model, case.block, case.batches(), coupled, "exact")
    assert close(times(torch.eye(case.block.size, dtype=torch.float64)), truth)


@pytest.mark.parametrize(
    ("make", "kind"),
    [(make, kind) for make in (mlp, shared) for kind in ("exact", "gauss_newton", "fisher")] + [(images, "exact")],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_samples_that_do_not_see_one_another_take_no_second_way(
    make: Callable[[], Case], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a wrong short way would go unnoticed: its result is thrown away, only slowly."""
    torch.manual_seed(0)
    case, verdicts, real = make(), [], curvature._close

    def close_to(*args: Any) -> bool:
        verdicts.append(real(*args))
        return verdicts[-1]

    monkeypatch.setattr(curvature, "_close", close_to)
    matrix(case.model, case.block, case.batches(), case.loss_fn, kind)
    assert verdicts and all(verdicts)


class Centred(nn.Module):
    """Subtracts a share of the batch's mean, so that samples see one another."""

    def __init__(self, layer: nn.Module, share: float) -> None:
        super().__init__()
        self.layer, self.share = layer, share

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y - self.share * y.mean(0)


def whole_hessian(model: nn.Module, block: Block, x: Tensor, y: Tensor, losses: Callable[..., Tensor]) -> Tensor:
    """Of the mean loss, for a block of whole layers in the model's order."""
    names, shapes = zip(*[(name, p.shape) for name, p in model.named_parameters()], strict=True)

    def mean(vector: Tensor) -> Tensor:
        pieces = vector.split([shape.numel() for shape in shapes])
        weights = {n: v.view(shape) for n, v, shape in zip(names, pieces, shapes, strict=True)}
        return losses(torch.func.functional_call(model, weights, (x,)), y).mean()

    result: Tensor = torch.func.hessian(mean)(block.values())
    return result


def squares(outputs: Tensor, y: Tensor) -> Tensor:
    return (outputs - y).square().flatten(1).sum(1)


@pytest.mark.parametrize("sign", [1, -1])
def test_samples_that_see_one_another_are_noticed_beside_a_feature_given_twice(sign: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 1, dtype=torch.float64)
    x, y = torch.cat([x, sign * x], 1), torch.randn(6, 1, dtype=torch.float64)
    model = Centred(nn.Linear(2, 1, bias=False), 0.9).double()
    block = Block(trainable_layers(model, None), [("layer", 0)], None)
    found = matrix(model, block, [Batch((x,), {}, y, 6)], squares, "exact")
    assert close(found, whole_hessian(model, block, x, y, squares))


def test_a_faint_influence_of_samples_on_one_another_is_noticed() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randint(3, (6,))
    model = Centred(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), 1e-5).double()
    block = Block(
        trainable_layers(model, None), [("layer.0", u) for u in range(4)] + [("layer.2", u) for u in range(3)], None
    )
    found = matrix(model, block, [Batch((x,), {}, y, 6)], None, "exact")
    assert close(found, whole_hessian(model, block, x, y, cross_entropy))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_that_see_one_another_in_a_small_layer_are_noticed_beside_a_large_one(dtype: torch.dtype) -> None:
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.large, self.small = nn.Linear(3, 2), Centred(nn.Linear(3, 2), 2.0)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([40 * torch.tanh(self.large(x)), torch.tanh(self.small(x))], 1)

    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    model = Two().double()
    units = [("large", 0), ("large", 1), ("small.layer", 0), ("small.layer", 1)]
    truth = whole_hessian(model, Block(trainable_layers(model, None), units, None), x, y, squares)[8:, 8:]
    model = model.to(dtype)
    batch = Batch((x.to(dtype),), {}, y.to(dtype), 6)
    found = matrix(model, Block(trainable_layers(model, None), units, None), [batch], squares, "exact")[8:, 8:]
    assert (found - truth).norm() <= 1e4 * torch.finfo(dtype).eps * truth.norm()


def test_gauss_newton_of_losses_that_see_other_samples_equals_its_products() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))
    block = Block({"": model}, [("", u) for u in range(3)], None)

    def losses(outputs: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(outputs - outputs.mean(0), y)

    # Of a linear model the Gauss-Newton matrix is the Hessian.
    found = matrix(model, block, [Batch((x,), {}, y, 6)], losses, "gauss_newton")
    assert close(found, whole_hessian(model, block, x, y, losses))


class Tagger(nn.Module):
    """Linear outputs per position in one of the layouts that models return."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layer, self.layout = nn.Linear(8, 3), layout

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)  # [N, T, C]
        layouts = {
            "classes second": y.transpose(1, 2),
            "classes second of images": y.unsqueeze(1).permute(0, 3, 1, 2),
            "flat": y.flatten(0, 1),
            "time first": y.transpose(0, 1),
        }
        return layouts[self.layout]


@pytest.mark.parametrize("samples", [4, 5])
@pytest.mark.parametrize("layout", ["classes second", "classes second of images", "flat", "time first"])
def test_gauss_newton_takes_outputs_in_any_layout(layout: str, samples: int) -> None:
    torch.manual_seed(0)
    model = Tagger(layout).double()
    x, y = torch.randn(samples, 5, 8, dtype=torch.float64), torch.randint(3, (samples, 5))
    block = Block(trainable_layers(model, None), [("layer", u) for u in range(3)], None)

    def losses(outputs: Tensor, y: Tensor) -> Tensor:
        shaped = {
            "classes second": lambda: outputs,
            "classes second of images": lambda: outputs.squeeze(2),
            "flat": lambda: outputs.view(*y.shape, 3).transpose(1, 2),
            "time first": lambda: outputs.permute(1, 2, 0),
        }[layout]()
        return cross_entropy(shaped, y)

    found = matrix(model, block, [Batch((x,), {}, y, samples)], losses, "gauss_newton")
    assert close(found, whole_hessian(model, block, x, y, losses))


@pytest.mark.parametrize("captured", [False, True])
def test_a_penalty_on_the_weights_inside_the_loss_is_seen(captured: bool) -> None:
    torch.manual_seed(0)
    case = mlp()
    layer, parameters = case.model[2], list(case.model.parameters())

    def penalised(outputs: Tensor, y: Tensor) -> Tensor:
        weights = parameters if captured else [layer.weight, layer.bias]
        return cross_entropy(outputs, y) + sum(w.pow(4).sum() for w in weights)

    plain = matrix(case.model, case.block, case.batches(), None, "exact")
    weights = case.block.values()
    bend = 12 * weights.square()
    if not captured:
        inside = [torch.full((len(piece),), p is layer.weight or p is layer.bias)
                  for p, piece in zip(case.block.parameters, weights.split(case.block.sizes), strict=True)]  # fmt: skip
        bend = bend * torch.cat(inside)
    assert close(matrix(case.model, case.block, case.batches(), penalised, "exact"), plain + torch.diag(bend))


@pytest.mark.parametrize("kind", KINDS)
def test_float32_models_are_close_to_float64_ones(kind: str) -> None:
    torch.manual_seed(0)
    case = images()
    truth = matrix(case.model, case.block, case.batches(), None, kind)
    case.model.float()
    single = [Batch((b.args[0].float(),), {}, b.targets, b.size) for b in case.batches()]
    found = matrix(case.model, case.block, single, None, kind)
    if kind == "reference":  # rounding of the weights and of both gradients swamps so short a step
        assert found.shape == truth.shape
    else:
        assert (found - truth).norm() <= 1e-5 * truth.norm()
    v = torch.randn(case.block.size, dtype=torch.float64)
    hv = product(case.model, case.block, single, None, kind)(v)
    assert (hv - found @ v).norm() <= 1e-5 * found.norm() * v.norm()


def test_a_mean_is_over_samples_not_over_batches(case: Case) -> None:
    for kind in ("exact", "gauss_newton", "fisher"):
        uneven = matrix(case.model, case.block, case.batches(), case.loss_fn, kind)
        assert close(matrix(case.model, case.block, case.batches(100), case.loss_fn, kind), uneven)
        assert close(matrix(case.model, case.block, case.batches(1), case.loss_fn, kind), uneven)


def test_a_whole_model_is_a_block_and_its_hessian_comes_in_one_piece() -> None:
    torch.manual_seed(0)
    case = mlp()
    layers = trainable_layers(case.model, None)
    every = [(name, u) for name, module in layers.items() for u in range(len(module.weight))]
    whole = Case(case.model, every, case.x, case.y)
    assert whole.block.size == sum(p.numel() for p in case.model.parameters())
    assert close(matrix(whole.model, whole.block, whole.batches(), None, "exact"), hessian(whole))


@pytest.mark.parametrize("pass_bytes", [1, 3000])
@pytest.mark.parametrize("kind", ["exact", "gauss_newton", "fisher"])
@pytest.mark.parametrize("make", [images, over_time, projections])
def test_small_passes_give_the_same(
    make: Callable[[], Case], kind: str, pass_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    case = make()
    truth = matrix(case.model, case.block, case.batches(), None, kind)
    monkeypatch.setattr(curvature, "_PASS", pass_bytes)
    assert close(matrix(case.model, case.block, case.batches(), None, kind), truth)
    v = torch.randn(2, case.block.size, dtype=torch.float64)
    assert close(product(case.model, case.block, case.batches(), None, kind)(v), v @ truth)


def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the calls of torch.autograd.grad."""
    count = [0]
    plain = torch.autograd.grad

    def counted(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return plain(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    return count


def test_a_filter_costs_one_pass_per_output_position_not_per_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Tanh(), nn.Conv2d(4, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))
    case = Case(model, [("2", 1)], torch.randn(4, 3, 4, 4), torch.arange(4) % 3)
    truth = hessian(case)
    count = passes(monkeypatch)
    assert close(matrix(case.model, case.block, case.batches(), None, "exact"), truth)
    assert case.block.size == 37 and count[0] == 1 + 4 + 1  # gradient, 2 x 2 positions, check


def test_products_on_a_kept_graph_run_no_forward_pass() -> None:
    torch.manual_seed(0)
    case = images()
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    handle = case.model.register_forward_hook(count)
    times = product(case.model, case.block, case.batches(), None, "exact")
    built, v = calls, torch.randn(case.block.size, dtype=torch.float64)
    times(v), times(v)
    assert calls == built
    one = product(case.model, case.block, case.batches(), None, "exact", kept=0)
    built = calls
    one(v), one(v)
    assert calls == built + 2 * len(case.batches())
    handle.remove()


def test_layers_before_the_block_have_no_graph() -> None:
    torch.manual_seed(0)
    case = images()
    late = Case(case.model, [("9", 0), ("7", 1)], case.x, case.y)
    seen: dict[str, bool] = {}
    for name, module in case.model.named_children():
        module.register_forward_hook(lambda m, a, out, name=name: seen.__setitem__(name, out.requires_grad))
    gradient(late.model, late.block, late.batches(), None)
    assert [name for name, graph in seen.items() if graph] == ["7", "8", "9"]


@pytest.mark.parametrize("kind", KINDS)
def test_everything_is_put_back_also_after_an_exception(kind: str) -> None:
    torch.manual_seed(0)
    case = images()
    model = case.model
    model[3].weight.requires_grad_(False)
    model[9].bias.grad = torch.ones(3, dtype=torch.float64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainable, state = [p.requires_grad for p in model.parameters()], torch.get_rng_state()
    calls, fail_at = 0, 0

    def failing(outputs: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == fail_at:
            raise KeyboardInterrupt("stop")
        return cross_entropy(outputs, y)

    def intact() -> bool:
        return (
            all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
            and [p.requires_grad for p in model.parameters()] == trainable
            and [name for name, p in model.named_parameters() if p.grad is not None] == ["9.bias"]
            and torch.equal(torch.get_rng_state(), state)
            and not torch.overrides._get_current_function_mode_stack()
        )

    with torch.no_grad():
        matrix(model, case.block, case.batches(), failing, kind)
    assert intact()
    for call in range(1, calls + 1):
        calls, fail_at = 0, call
        with pytest.raises(KeyboardInterrupt, match="stop"):
            matrix(model, case.block, case.batches(), failing, kind)
        assert intact()


def test_a_sample_that_holds_nan_shows() -> None:
    torch.manual_seed(0)
    case = mlp()
    case.x[1, 1] = float("nan")
    for kind in ("exact", "gauss_newton", "fisher"):
        assert bool(matrix(case.model, case.block, case.batches(), None, kind).isnan().any())


def test_a_constant_loss_has_no_curvature() -> None:
    torch.manual_seed(0)
    case = mlp()
    zero = torch.zeros(case.block.size, case.block.size, dtype=torch.float64)

    def constant(outputs: Tensor, y: Tensor) -> Tensor:
        return torch.ones(len(y), dtype=torch.float64)

    for kind in ("exact", "gauss_newton", "fisher"):
        assert torch.equal(matrix(case.model, case.block, case.batches(), constant, kind), zero)
        assert torch.equal(product(case.model, case.block, case.batches(), constant, kind)(zero), zero)
    with pytest.raises(ValueError, match="too small to move the block"):
        matrix(case.model, case.block, case.batches(), constant, "reference")


def test_bad_requests_are_refused() -> None:
    torch.manual_seed(0)
    case = images()
    with pytest.raises(ValueError, match="one of exact, gauss_newton, fisher, reference, got 'diagonal'"):
        matrix(case.model, case.block, case.batches(), None, "diagonal")
    with pytest.raises(ValueError, match="got 'kfac'"):
        product(case.model, case.block, case.batches(), None, "kfac")
    with pytest.raises(ValueError, match="no sample"):
        gradient(case.model, case.block, [], None)
    with pytest.raises(ValueError, match="block is empty"):
        gradient(case.model, Block(trainable_layers(case.model, None), [], None), case.batches(), None)
    with pytest.raises(ValueError, match="one loss per sample"):
        matrix(case.model, case.block, case.batches(), F.cross_entropy, "exact")
    times = product(case.model, case.block, case.batches(), None, "exact")
    with pytest.raises(ValueError, match=r"expected a vector \[\d+\].*got \[3\]"):
        times(torch.zeros(3))
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        matrix(case.model.train(), case.block, case.batches(), None, "exact")


def test_gauss_newton_needs_one_tensor() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.layer(x), x

    model = Pair()
    block = Block(trainable_layers(model, None), [("layer", 0)], None)
    batch = Batch((torch.randn(4, 2),), {}, torch.arange(4) % 3, 4)
    for make in (matrix, product):
        with pytest.raises(TypeError, match="one tensor, got tuple"):
            make(model, block, [batch], lambda out, y: cross_entropy(out[0], y), "gauss_newton")


def test_changed_weights_are_noticed_by_a_kept_graph() -> None:
    torch.manual_seed(0)
    case = mlp()
    times = product(case.model, case.block, case.batches(), None, "exact")
    case.block.add_(torch.ones(case.block.size, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        times(torch.ones(case.block.size))


# The block itself


def test_units_are_taken_in_order_while_the_block_has_room() -> None:
    layers = trainable_layers(mlp().model, None)
    assert Block(layers, [("0", 1), ("2", 2), ("4", 0)], 11).units == [("0", 1), ("2", 2)]
    assert Block(layers, [("0", 1), ("2", 2), ("4", 0)], 10).units == [("0", 1)]
    assert Block(layers, [("2", 2), ("0", 1), ("4", 0)], 10).units == [("2", 2), ("4", 0)]
    assert Block(layers, [("0", 1), ("4", 0)], 1).units == [("0", 1)]
    assert Block(layers, [("0", 1), ("0", 1)], None).units == [("0", 1)]
    empty = Block(layers, [], 10)
    assert empty.size == 0 and empty.values().shape == (0,)


def test_a_unit_that_does_not_exist_is_refused() -> None:
    layers = trainable_layers(mlp().model, None)
    for unit in (-1, 4):
        with pytest.raises(ValueError, match="'0' has units 0 to 3"):
            Block(layers, [("0", unit)], None)


def test_a_unit_of_a_weight_shared_by_two_layers_counts_once_with_its_own_bias() -> None:
    a, b = nn.Linear(3, 2), nn.Linear(3, 2)
    b.weight = a.weight
    block = Block({"a": a, "b": b}, [("b", 1), ("a", 1), ("a", 0)], 100)
    assert block.units == [("b", 1), ("a", 0)] and block.sizes == [6, 1, 1]
    assert [p is q for p, q in zip(block.parameters, (a.weight, a.bias, b.bias), strict=True)] == [True] * 3
    assert [rows.tolist() for _, rows in block.parts] == [[0, 1], [0], [1]]


def test_values_flat_and_add_agree() -> None:
    torch.manual_seed(0)
    block = images().block
    before = block.values()
    assert before.dtype == torch.float64 and before.shape == (block.size,)
    others = [p.detach().clone() for p in block.parameters]
    block.add_(torch.arange(block.size, dtype=torch.float64))
    assert torch.equal(block.values(), before + torch.arange(block.size))
    for p, old, rows in zip(block.parameters, others, [r for _, r in block.parts], strict=True):
        assert set((p != old).nonzero()[:, 0].tolist()) <= set(rows.tolist())


def test_layers_without_a_trainable_weight_are_refused() -> None:
    model = mlp().model
    with pytest.raises(ValueError, match="'1' has no trainable"):
        trainable_layers(model, ["1"])
    with pytest.raises(TypeError, match=r"model\.float\(\)"):
        trainable_layers(model.bfloat16(), None)
    with pytest.raises(ValueError, match="the model has no trainable"):
        trainable_layers(model.float().requires_grad_(False), None)


def test_frozen_biases_stay_out_of_the_block() -> None:
    torch.manual_seed(0)
    case = mlp()
    case.model[2].bias.requires_grad_(False)
    frozen = Case(case.model, case.units, case.x, case.y)
    assert frozen.block.size == case.block.size - 1
    assert close(matrix(frozen.model, frozen.block, frozen.batches(), None, "exact"), hessian(frozen))


def test_nothing_warns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for make in (images, attention):
            case = make()
            for kind in KINDS:
                matrix(case.model, case.block, case.batches(), None, kind)
