"""Linear probes: planted truth, scikit-learn's own ridge classifier, and layers of several kinds."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict

import pytest
import torch
from models import Pairs, classifier, pairs, unchanged, weights
from sklearn.linear_model import RidgeClassifier
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional as F

from fastunlearn import evaluate
from fastunlearn.activations import unit_activations
from fastunlearn.evaluate.probes import linear_probe


def split(retain: Pairs) -> tuple[Pairs, Pairs]:
    return retain[:3], retain[3:]  # 96 and 44 samples, the last batch of 12


def chance(positives: int, others: int) -> float:
    """Three standard errors of the AUC of scores that know nothing (Mann-Whitney)."""
    return 3 * math.sqrt((positives + others + 1) / (12 * positives * others))


def test_a_layer_that_has_the_class_finds_it_and_one_that_lost_it_does_not() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(600) % 2
    x = torch.randn(600, 8, generator=generator)
    x[:, 0] += 8.0 * y
    model = nn.Sequential(OrderedDict(keeps=nn.Linear(8, 8), loses=nn.Linear(8, 8), lost=nn.Linear(8, 8)))
    with torch.no_grad():
        for layer in model:
            nn.init.eye_(layer.weight)
        model.loses.weight[0, 0] = 0.0
    found = linear_probe(model, pairs(x[:300], y[:300]), pairs(x[300:], y[300:]), 1)
    assert list(found) == ["keeps", "loses", "lost"]
    assert found["keeps"] > 0.999
    for name in ("loses", "lost"):
        assert abs(found[name] - 0.5) < chance(150, 150)


def test_labels_without_a_pattern_are_found_in_no_layer() -> None:
    model, _, retain = classifier()
    generator = torch.Generator().manual_seed(3)
    x = torch.cat([x for x, _ in retain])
    x = torch.cat([x, x.flip(2), x.flip(3)])
    y = torch.randint(2, (len(x),), generator=generator)
    found = linear_probe(model, pairs(x[:200], y[:200]), pairs(x[200:], y[200:]), 1)
    positives = int(y[200:].sum())
    for auc in found.values():
        assert abs(auc - 0.5) < chance(positives, len(y) - 200 - positives)


def test_a_silenced_head_leaves_the_layers_before_it_telling() -> None:
    model, _, retain = classifier()
    fit, test = split(retain)
    silenced = copy.deepcopy(model)
    with torch.no_grad():
        silenced[6].weight[2], silenced[6].bias[2] = 0.0, -100.0
    assert evaluate(silenced, test=test).per_class["test"][2].accuracy == 0.0
    before, after = (linear_probe(m, fit, test, 2) for m in (model, silenced))
    assert {name: before[name] for name in ("0", "4")} == {name: after[name] for name in ("0", "4")}
    assert after["4"] > 0.98


@pytest.mark.parametrize("transform", [None, torch.relu])
def test_the_auc_is_that_of_scikit_learn_s_ridge_classifier(transform: object) -> None:
    model, _, retain = classifier()
    fit, test = split(retain)
    found = linear_probe(model, fit, test, 1, transform=transform, ridge=0.05)  # type: ignore[arg-type]

    def features(batches: Pairs) -> dict[str, Tensor]:
        x = torch.cat([x for x, _ in batches])
        convolved = model[0](x)
        hidden = model[4](model[:4](x))
        values = {"0": convolved, "4": hidden, "6": model[6](hidden.relu())}
        shown = {name: F.relu(v) if transform else v for name, v in values.items()}
        return {name: v.detach().double().flatten(2).mean(2) if v.dim() == 4 else v.detach().double()
                for name, v in shown.items()}  # fmt: skip

    known, unseen = features(fit), features(test)
    y, expected = (torch.cat([y for _, y in batches]) == 1 for batches in (fit, test))
    for name, auc in found.items():
        scaler = StandardScaler().fit(known[name])
        # Its deviation divides by n, ours by n - 1: the same penalty in other units.
        probe = RidgeClassifier(alpha=0.05 * len(y) * len(y) / (len(y) - 1))
        probe.fit(scaler.transform(known[name]), y)
        assert auc == pytest.approx(roc_auc_score(expected, probe.decision_function(scaler.transform(unseen[name]))))


class Reader(nn.Module):
    """Words, an encoder layer with the samples first, a head on the mean; one linear layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.again = nn.Embedding(12, 8), nn.Linear(8, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.idle = nn.Linear(1, 1)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.again(self.again(self.words(ids)).tanh())
        y: Tensor = self.layer(x, src_key_padding_mask=attention_mask == 0)
        return y.mean(1)


def sentences(seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(12, (40, 6), generator=generator)
    lengths = torch.randint(1, 7, (40,), generator=generator)
    mask = (torch.arange(6) < lengths[:, None]).long()
    whole = {"ids": ids, "attention_mask": mask, "labels": torch.stack([ids[:, 0], lengths], 1)}
    return [{key: value[part] for key, value in whole.items()} for part in torch.arange(40).split(16)]


def test_attention_projections_and_padding_are_read_as_unit_activations_reads_them() -> None:
    model, fit, test = Reader().double(), sentences(0), sentences(1)  # no rounding between two orders of summing

    def starts_low(targets: Tensor) -> Tensor:
        return targets[:, 0] < 6

    found = linear_probe(model, fit, test, starts_low)
    assert list(found) == ["again", "layer.self_attn.in_proj", "layer.self_attn.out_proj", "layer.linear1",
                           "layer.linear2"]  # fmt: skip

    def features(batches: list[dict[str, Tensor]], layer: str) -> Tensor:
        from fastunlearn.data import read

        return torch.cat(
            [unit_activations(model, batch, [layer]).values for batch in read(batches, "x", torch.device("cpu"))]
        ).double()

    y, expected = (torch.cat([starts_low(b["labels"]) for b in batches]) for batches in (fit, test))
    for layer, auc in found.items():
        known, unseen = features(fit, layer), features(test, layer)
        a, b = ((x - known.mean(0)) / known.std(0) for x in (known, unseen))
        weight = torch.linalg.solve(a.T @ a + 0.4 * torch.eye(a.shape[1]).double(), a.T @ (2.0 * y.double() - 1))
        assert auc == pytest.approx(roc_auc_score(expected, b @ weight), abs=1e-12), layer
    assert list(linear_probe(model, fit, test, starts_low, layers=["layer.linear2", "again"])) == [
        "again",
        "layer.linear2",
    ]


def test_a_unit_that_was_constant_when_fitted_decides_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(80) % 2
    x = torch.randn(80, 3, generator=generator)
    x[:, 0] += 6.0 * y
    x[:40, 2] = 0.1  # and anything on the held-back samples
    x[40:, 2] = 1e6 * torch.randn(40, generator=generator)
    model = nn.Linear(3, 3, bias=False)
    nn.init.eye_(model.weight)
    assert linear_probe(model, pairs(x[:40], y[:40]), pairs(x[40:], y[40:]), 1)[""] > 0.99


def test_outputs_that_are_not_finite_are_nan_for_their_layer_alone() -> None:
    model, _, retain = classifier()
    fit, test = split(retain)
    clean = linear_probe(model, fit, test, 0)
    with torch.no_grad():
        model[6].weight[1, 1] = math.inf
    found = linear_probe(model, fit, test, 0)
    assert math.isnan(found.pop("6"))
    assert found == {name: clean[name] for name in found}


def test_more_units_than_samples_and_half_precision() -> None:
    y = torch.tensor([0, 1, 0, 1, 1])
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)) + 5.0 * y[:, None]
    model = nn.Linear(4, 64).bfloat16()
    nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(1))
    batches = pairs(x.bfloat16(), y, 2)  # the last batch has one sample
    assert linear_probe(model, batches, batches, 1) == {"": 1.0}


def test_the_model_and_the_random_state_are_left_alone() -> None:
    model, _, retain = classifier()
    model.train()
    fit, test = split(retain)
    before, random = weights(model), torch.get_rng_state()
    linear_probe(model, fit, test, 3)
    assert model.training and unchanged(model, before) and torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_what_can_not_be_probed_is_refused_by_name() -> None:
    model, forget, retain = classifier()
    fit, test = split(retain)
    with pytest.raises(ValueError, match=r"fit must hold positive samples and others, got 0 positive of 96"):
        linear_probe(model, fit, test, 9)
    with pytest.raises(ValueError, match=r"test must hold positive samples and others, got 1 positive of 1"):
        linear_probe(model, fit, [(forget[0][0][:1], forget[0][1][:1])], 0)
    with pytest.raises(ValueError, match=r"'1' is not a Linear.* the model has '0', '4', '6'"):
        linear_probe(model, fit, test, 0, layers=["1"])
    with pytest.raises(ValueError, match=r"ridge must be above 0, got 0"):
        linear_probe(model, fit, test, 0, ridge=0)
    floats = [(x, y.float()) for x, y in fit]
    with pytest.raises(TypeError, match=r"targets of fit must be class indices.*got torch\.float32"):
        linear_probe(model, floats, test, 0)
    assert linear_probe(model, floats, test, lambda y: y > 1.5)["6"] > 0.9
    with pytest.raises(TypeError, match=r"positive must return a tensor of booleans.*got torch\.float32"):
        linear_probe(model, floats, test, lambda y: y)
    with pytest.raises(ValueError, match=r"positive must tell samples apart, shape \[32\], got \[32, 1\]"):
        linear_probe(model, fit, test, lambda y: (y == 0)[:, None])
    with pytest.raises(ValueError, match=r"called none of the layers"):
        linear_probe(model, fit, test, 0, layers=[])
    with pytest.raises(TypeError, match=r"fit is an iterator"):
        linear_probe(model, iter(fit), test, 0)
