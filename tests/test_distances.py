"""Distances of weights and activations against plain float64 formulas, and layers of awkward kinds."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict

import pytest
import torch
from models import classifier, pairs, unchanged, weights
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from fastunlearn.evaluate.distances import RelativeDistance, activation_distance, weight_distance


def shifted(model: nn.Module, seed: int = 1) -> nn.Module:
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return other


def inputs(*shape: int, size: int = 4, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return pairs(x, torch.zeros(len(x)).long(), size)


def test_weight_distance_is_the_norm_of_the_difference() -> None:
    model, *_ = classifier()
    reference = shifted(model)
    found = weight_distance(model, reference)
    others = dict(reference.named_parameters())
    assert list(found) == [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        a, b = parameter.detach().double().numpy(), others[name].detach().double().numpy()
        assert found[name].distance == pytest.approx(float(((a - b) ** 2).sum() ** 0.5), rel=1e-12)
        assert found[name].relative == pytest.approx(
            float(((a - b) ** 2).sum() ** 0.5 / (b**2).sum() ** 0.5), rel=1e-12
        )


def test_weights_without_a_norm_and_without_a_value() -> None:
    model, reference = nn.Linear(2, 2), nn.Linear(2, 2)
    for m in (model, reference):
        nn.init.zeros_(m.weight)
        nn.init.zeros_(m.bias)
    assert weight_distance(model, reference)["weight"] == RelativeDistance(0.0, 0.0)
    nn.init.ones_(model.bias)
    assert weight_distance(model, reference)["bias"] == RelativeDistance(pytest.approx(2**0.5), math.inf)
    with torch.no_grad():
        reference.weight[0, 0] = math.nan
    found = weight_distance(model, reference)
    assert math.isnan(found["weight"].relative) and found["bias"].relative == math.inf


def test_models_of_another_structure_are_refused_with_the_names() -> None:
    small = nn.Sequential(OrderedDict(a=nn.Linear(3, 2), b=nn.Linear(2, 2)))
    other = nn.Sequential(OrderedDict(a=nn.Linear(4, 2), c=nn.Linear(2, 2, bias=False)))
    expected = (
        r"b\.weight \(only in the model\), b\.bias \(only in the model\), c\.weight \(only in the reference\), "
        r"a\.weight \(\[2, 3\] in the model, \[2, 4\] in the reference\)$"
    )
    with pytest.raises(ValueError, match=expected):
        weight_distance(small, other)
    with pytest.raises(ValueError, match=expected):
        activation_distance(small, other, inputs(3, 3))
    deep = nn.Sequential(*(nn.Linear(2, 2) for _ in range(9)))
    with pytest.raises(ValueError, match=r"and 11 more$"):
        weight_distance(deep, deep[:1])


def test_activation_distance_is_a_mean_over_samples_before_relu_overwrites_the_outputs() -> None:
    model, forget, retain = classifier()  # has an inplace ReLU, and a last batch of 12 of 140
    reference = shifted(model)
    found = activation_distance(model, reference, retain)
    assert list(found) == ["0", "1", "4", "6"]

    def outputs(m: nn.Module) -> dict[str, Tensor]:
        values, x = {}, torch.cat([x for x, _ in retain]).double()
        for name, layer in copy.deepcopy(m).double().named_children():
            x = layer.forward(x) if not isinstance(layer, nn.ReLU) else x.clamp(min=0)
            values[name] = x.detach().flatten(1)
        return values

    ours, theirs = outputs(model), outputs(reference)
    for name, distance in found.items():
        expected = (ours[name] - theirs[name]).norm(dim=1).mean() / theirs[name].norm(dim=1).mean()
        assert distance == pytest.approx(float(expected), rel=1e-5)
    assert list(activation_distance(model, reference, forget, layers=["6", "0"])) == ["0", "6"]


def test_a_model_is_at_no_distance_from_itself_and_neither_changes() -> None:
    model, forget, _ = classifier()
    model.train()
    reference = copy.deepcopy(model).eval()
    before, random = weights(model), torch.get_rng_state()
    assert set(activation_distance(model, reference, forget).values()) == {0.0}
    assert set(activation_distance(model, model, forget).values()) == {0.0}
    assert model.training and not reference.training and unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in (*model.parameters(), *reference.parameters()))
    assert not any(m._forward_hooks for m in (*model.modules(), *reference.modules()))


def test_only_the_layers_after_a_changed_one_move() -> None:
    model, forget, _ = classifier()
    reference = copy.deepcopy(model)
    with torch.no_grad():
        reference[4].weight.neg_()
    found = activation_distance(model, reference, forget)
    assert found["0"] == found["1"] == 0.0 < min(found["4"], found["6"])


def test_silent_layers_are_zero_or_infinitely_far() -> None:
    model, reference = nn.Linear(3, 2), nn.Linear(3, 2)
    for parameter in reference.parameters():
        nn.init.zeros_(parameter)
    assert activation_distance(model, reference, inputs(5, 3)) == {"": math.inf}
    assert activation_distance(reference, copy.deepcopy(reference), inputs(5, 3)) == {"": 0.0}


class Repeats(nn.Module):
    """One layer called twice, an LSTM with its tuple, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.recurrent, self.idle = nn.Linear(3, 3), nn.LSTM(3, 2, batch_first=True), nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.recurrent(self.again(self.again(x).tanh()))[0]
        return y.mean(1)


def test_calls_of_a_layer_are_taken_together_and_tuples_by_their_first_tensor() -> None:
    torch.manual_seed(0)
    model, batches = Repeats(), inputs(5, 6, 3)
    reference = shifted(model)
    found = activation_distance(model, reference, batches)
    assert list(found) == ["again", "recurrent"]
    x = torch.cat([x for x, _ in batches])

    def both(m: Repeats) -> Tensor:
        first = m.again(x)
        return torch.cat([first, m.again(first.tanh())], 1).detach().double().flatten(1)

    ours, theirs = both(model), both(reference)  # type: ignore[arg-type]
    expected = (ours - theirs).norm(dim=1).mean() / theirs.norm(dim=1).mean()
    assert found["again"] == pytest.approx(float(expected), rel=1e-5)


class Attends(nn.Module):
    """Positions embedded once for all samples, an attention with the samples second, a parametrized layer, no mask."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(9, 4), nn.Embedding(5, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.head = weight_norm(nn.Linear(4, 3))

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = (self.words(ids) + self.places(torch.arange(5)[None])).transpose(0, 1)
        x = self.attention(x, x, x, key_padding_mask=attention_mask == 0)[0].transpose(0, 1)
        y: Tensor = self.head((x * attention_mask[..., None]).sum(1))
        return y


def test_embeddings_attention_and_padding() -> None:
    torch.manual_seed(0)
    model = Attends()
    reference = shifted(model)
    ids, mask = torch.randint(9, (3, 5)), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    batch = {"ids": ids, "attention_mask": mask, "labels": torch.zeros(3).long()}
    found = activation_distance(model, reference, [batch])
    assert list(found) == ["words", "places", "attention", "head"]
    # What stands in the padding does not count.
    padded = ids.where(mask > 0, (ids + 1) % 9)
    assert activation_distance(model, reference, [batch | {"ids": padded}]) == found
    table, other = model.places.weight.detach().double(), reference.places.weight.detach().double()  # type: ignore[union-attr]
    ours, theirs = ((t * mask[..., None]).flatten(1) for t in (table, other))
    expected = (ours - theirs).norm(dim=1).mean() / theirs.norm(dim=1).mean()
    assert found["places"] == pytest.approx(float(expected), rel=1e-6)


def test_layers_that_can_not_be_compared_are_named() -> None:
    class Odd(nn.Module):
        def __init__(self, body: nn.Module, calls: int = 1) -> None:
            super().__init__()
            self.body, self.calls = body, calls

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(self.calls):
                self.body(x.transpose(0, 1))
            return x

    batches = inputs(4, 3, 2)
    with pytest.raises(ValueError, match=r"layer body returns \[3, 4, 5\] for a batch of 4 samples"):
        model = Odd(nn.Linear(2, 5))
        activation_distance(model, model, batches)
    body = nn.Linear(2, 5)
    square = inputs(3, 3, 2)
    with pytest.raises(ValueError, match=r"body runs more often in the model than in the reference"):
        activation_distance(Odd(body, 2), Odd(body), square)
    with pytest.raises(ValueError, match=r"body runs more often in the reference than in the model"):
        activation_distance(Odd(body), Odd(body, 2), square)
    with pytest.raises(ValueError, match=r"called none of the layers"):
        activation_distance(Odd(body, 0), Odd(body, 0), square)
    with pytest.raises(ValueError, match=r"'head' is not a layer with weights; the model has 'body'"):
        activation_distance(Odd(body), Odd(body), square, layers=["head"])

    class Says(nn.Linear):
        def forward(self, x: Tensor) -> str:  # type: ignore[override]
            return "nothing"

    with pytest.raises(TypeError, match=r"layer body returns str without a floating-point tensor"):
        activation_distance(Odd(Says(2, 2)), Odd(Says(2, 2)), square)
