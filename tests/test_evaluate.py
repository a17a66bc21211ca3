"""Metrics against independent computations and planted truth."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.stats
import torch
from models import Pairs, classifier, pairs, unchanged, weights
from sklearn.metrics import accuracy_score, log_loss
from torch import Tensor, nn

from fastunlearn import evaluate
from fastunlearn.evaluate import membership_auc, metrics, predict
from fastunlearn.evaluate.metrics import ClassMetrics, Metrics


def test_a_sample_whose_logits_are_nan_is_not_right() -> None:
    nan = math.nan
    logits = torch.tensor([[nan, nan, nan], [0.0, nan, 2.0], [3.0, 1.0, 2.0], [-math.inf, math.inf, 0.0]])
    identity = nn.PReLU(init=1.0)
    found = evaluate(identity, forget=[(logits, torch.tensor([0, 1, 0, 1]))])
    assert found.accuracy["forget"] == 50 and math.isnan(found.loss["forget"])
    assert {cls: m.accuracy for cls, m in found.per_class["forget"].items()} == {0: 50, 1: 50}


def test_accuracy_and_loss_are_means_over_samples() -> None:
    model, forget, retain = classifier()
    metrics = evaluate(model, forget=forget, retain=retain)
    x, y = (torch.cat(parts) for parts in zip(*retain, strict=True))
    logits = model(x).detach()
    assert metrics.accuracy["retain"] == pytest.approx(100 * float((logits.argmax(1) == y).double().mean()))
    assert metrics.loss["retain"] == pytest.approx(float(nn.functional.cross_entropy(logits, y)), rel=1e-5)
    assert metrics.membership_auc is None
    assert metrics.gap is None


def test_auc_counts_pairs() -> None:
    torch.manual_seed(0)
    members, others = torch.randn(30).round(decimals=1), torch.randn(40).round(decimals=1)
    wins = (members[:, None] < others).double() + 0.5 * (members[:, None] == others).double()
    assert membership_auc(members, others) == pytest.approx(float(wins.mean()))


def test_a_memorising_model_is_detected_and_an_ignorant_one_is_not() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(400, 50), torch.randint(2, (400,))  # labels without a pattern: only memory helps
    seen, unseen = pairs(x[:200], y[:200], 200), pairs(x[200:], y[200:], 200)
    model = nn.Sequential(nn.Linear(50, 256), nn.ReLU(), nn.Linear(256, 2))
    ignorant = evaluate(model, forget=seen, test=unseen).membership_auc
    assert ignorant is not None and abs(ignorant - 0.5) < 0.06  # two standard errors
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[:200]), y[:200]).backward()
        optimizer.step()
    memorising = evaluate(model, forget=seen, test=unseen).membership_auc
    assert memorising is not None and memorising > 0.9


def test_gap_is_measured_from_the_reference_and_no_model_changes() -> None:
    model, forget, retain = classifier()
    other, *_ = classifier()
    nn.init.zeros_(other[6].weight)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    metrics = evaluate(model, forget=forget, test=retain, reference=other)
    theirs = evaluate(other, forget=forget, test=retain)
    assert metrics.gap is not None
    assert metrics.gap["test"] == metrics.accuracy["test"] - theirs.accuracy["test"]
    # Metrics hold no logits, so there are no divergences from them.
    assert evaluate(model, forget=forget, test=retain, reference=theirs) == replace(metrics, kl=None, js=None)
    with pytest.raises(ValueError, match="reference was not measured on retain"):
        evaluate(model, forget=forget, retain=retain, reference=theirs)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_nothing_to_evaluate_on_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to evaluate on"):
        evaluate(nn.Linear(2, 2))


class Table(nn.Module):
    """Looks its logits up: sample i is the number i."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.logits[x]


def numbered(targets: Tensor, size: int = 32) -> Pairs:
    return pairs(torch.arange(len(targets)), targets, size)


def test_classes_are_measured_one_by_one_as_scikit_learn_does() -> None:
    torch.manual_seed(0)
    y = torch.tensor([0, 0, 3, 3, 3, 1, 0, 3, 1, 4, 4])  # five classes of logits, no sample of class 2
    logits = torch.randn(11, 5)
    found = evaluate(Table(logits), test=numbered(y, 4)).per_class["test"]
    assert list(found) == [0, 1, 3, 4]
    p = logits.double().softmax(1).numpy()
    for cls, of_class in found.items():
        own = (y == cls).numpy()
        assert of_class.samples == own.sum()
        assert of_class.accuracy == pytest.approx(100 * accuracy_score(y[own], p[own].argmax(1)))
        assert of_class.loss == pytest.approx(log_loss(y[own], p[own], labels=range(5)), rel=1e-6)


def test_one_sample_of_one_class_in_dict_batches() -> None:
    class Called(Table):
        def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(ids)

    found = evaluate(
        Called(torch.tensor([[0.0, 1.0]])), forget=[{"ids": torch.tensor([0]), "labels": torch.ones(1).long()}]
    )
    assert found.per_class == {"forget": {1: ClassMetrics(100.0, pytest.approx(math.log1p(math.exp(-1))), 1)}}


def test_a_sample_without_finite_logits_is_seen_in_its_own_class_alone() -> None:
    torch.manual_seed(0)
    logits, y = torch.randn(12, 3), torch.arange(12) % 3
    clean = evaluate(Table(logits), forget=numbered(y), test=numbered(y))
    logits[4] = math.nan  # of class 1
    spoilt = evaluate(Table(logits), forget=numbered(y), test=numbered(y), reference=Table(torch.zeros(12, 3)))
    assert math.isnan(spoilt.per_class["test"][1].loss)
    assert [spoilt.per_class["test"][c] for c in (0, 2)] == [clean.per_class["test"][c] for c in (0, 2)]
    assert spoilt.membership_auc is not None and math.isnan(spoilt.membership_auc)
    assert spoilt.kl is not None and math.isnan(spoilt.kl["test"])


@pytest.mark.parametrize("at_once", [1 << 22, 7])
def test_divergences_are_those_of_scipy_with_the_reference_first(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_MOST_LOGITS", at_once)
    torch.manual_seed(0)
    logits, expected, y = 4 * torch.randn(13, 5), 4 * torch.randn(13, 5), torch.arange(13) % 5
    expected[2, 3] = -math.inf  # probability zero of the reference alone: its term is zero
    expected[3, 1] = logits[3, 1] = -math.inf  # and of both
    found = evaluate(Table(logits), test=numbered(y, 5), reference=Table(expected))
    m, r = (x.double().softmax(1).numpy() for x in (logits, expected))
    assert found.kl is not None and found.js is not None
    assert found.kl["test"] == pytest.approx(scipy.stats.entropy(r, m, axis=1).mean(), rel=1e-9)
    js = [scipy.spatial.distance.jensenshannon(a, b) ** 2 for a, b in zip(r, m, strict=True)]
    assert found.js["test"] == pytest.approx(np.mean(js), rel=1e-9)
    assert not math.isclose(found.kl["test"], scipy.stats.entropy(m, r, axis=1).mean(), rel_tol=0.01)


def test_divergences_at_their_ends() -> None:
    sure, other = torch.tensor([[0.0, -math.inf]]), torch.tensor([[-math.inf, 0.0]])
    y = torch.zeros(1, dtype=torch.int64)
    apart = evaluate(Table(sure), forget=numbered(y), reference=Table(other))
    assert apart.kl == {"forget": math.inf} and apart.js == {"forget": pytest.approx(math.log(2))}
    logits = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    same = evaluate(Table(logits), forget=numbered(torch.zeros(9).long()), reference=Table(logits.clone()))
    assert same.kl == {"forget": 0.0} and same.js is not None and 0 <= same.js["forget"] < 1e-15
    # Logits that differ by 1,000 keep a finite KL: the log-probabilities are never exponentiated and taken back.
    far = evaluate(Table(torch.tensor([[1000.0, 0.0]])), forget=numbered(y), reference=Table(torch.zeros(1, 2)))
    assert far.kl == {"forget": pytest.approx(500 - math.log(2))}


def test_positions_with_a_target_are_counted_and_padding_is_not() -> None:
    torch.manual_seed(0)
    logits, expected = torch.randn(5, 3, 4), torch.randn(5, 3, 4)  # [N, C, T]
    y = torch.randint(3, (5, 4))
    y[0, 2:] = y[3] = -100
    batches = numbered(y, 2)
    found = evaluate(Table(logits), test=batches, reference=Table(expected))
    counted = y >= 0
    right = (logits.argmax(1) == y)[counted]
    assert found.accuracy["test"] == pytest.approx(100 * float(right.double().mean()))
    assert found.loss["test"] == pytest.approx(float(predict(Table(logits), batches, "test")[1].mean()))
    losses = nn.functional.cross_entropy(logits, y, reduction="none")
    for cls, of_class in found.per_class["test"].items():
        own = y == cls
        assert of_class.samples == int(own.sum())
        assert of_class.loss == pytest.approx(float(losses[own].mean()), rel=1e-5)
    m, r = (x.double().softmax(1).movedim(1, -1)[counted].numpy() for x in (logits, expected))
    assert found.kl is not None and found.kl["test"] == pytest.approx(scipy.stats.entropy(r, m, axis=1).mean())

    def own(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets, reduction="none").sum(1)

    theirs = evaluate(Table(logits), test=batches, loss_fn=own)
    assert theirs.loss["test"] == pytest.approx(float(losses.sum(1).mean()), rel=1e-5)
    assert all(math.isnan(c.loss) for c in theirs.per_class["test"].values())


def test_tug_of_war_is_the_product_over_three_sets() -> None:
    # Of four samples each, the model has 4, 3, 2 right and the reference 1, 3, 3.
    y = torch.zeros(4, dtype=torch.int64)

    def model(*right: int) -> Table:
        rows = [[1.0, 0.0]] * right[0] + [[0.0, 1.0]] * (4 - right[0])
        for number in right[1:]:
            rows += [[1.0, 0.0]] * number + [[0.0, 1.0]] * (4 - number)
        return Table(torch.tensor(rows))

    forget, retain, test = ([(torch.arange(4 * i, 4 * i + 4), y)] for i in range(3))
    mine, reference = model(4, 3, 2), model(1, 3, 3)
    found = evaluate(mine, forget=forget, retain=retain, test=test, reference=reference)
    assert found.tow == pytest.approx((1 - 0.75) * 1 * (1 - 0.25))
    known = evaluate(reference, forget=forget, retain=retain, test=test)
    assert known.tow is None
    assert evaluate(mine, forget=forget, retain=retain, test=test, reference=known).tow == found.tow
    assert evaluate(mine, forget=forget, test=test, reference=reference).tow is None


def test_one_forward_pass_per_batch_and_model_and_nothing_left_behind() -> None:
    y = torch.arange(10) % 2
    model, reference = Table(torch.randn(10, 2)), Table(torch.randn(10, 2))
    model.train()
    reference.eval()
    model.logits.grad = grad = torch.ones(10, 2)
    before, random = weights(model), torch.get_rng_state()
    evaluate(model, forget=numbered(y, 4), test=numbered(y, 4), reference=reference)
    assert (model.calls, reference.calls) == (6, 6)
    assert model.training and not reference.training
    assert model.logits.grad is grad and reference.logits.grad is None
    assert unchanged(model, before) and torch.equal(torch.get_rng_state(), random)


def test_what_can_not_be_measured_is_refused_by_name() -> None:
    y = torch.zeros(3, dtype=torch.int64)
    model = Table(torch.randn(3, 2))
    with pytest.raises(TypeError, match=r"targets of test must be class indices.*float32"):
        evaluate(model, test=numbered(torch.zeros(3, 2)))  # probabilities, which cross-entropy would take
    with pytest.raises(ValueError, match=r"on retain logits \[3, 2\] need targets of shape \[3\], got \[3, 1\]"):
        evaluate(model, retain=numbered(y[:, None]), loss_fn=lambda outputs, _: outputs.sum(1))
    with pytest.raises(ValueError, match="must return logits"):
        evaluate(Table(torch.randn(3)), retain=numbered(y), loss_fn=lambda outputs, _: outputs)
    with pytest.raises(ValueError, match=r"logits \[3, 3\] differ in shape from the model's \[3, 2\]"):
        evaluate(model, test=numbered(y), reference=Table(torch.randn(3, 3)))
    with pytest.raises(TypeError, match=r"reference must be an nn\.Module or its Metrics, got str"):
        evaluate(model, test=numbered(y), reference="reference.pt")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got list; for several runs give seeds="):
        evaluate([model], test=numbered(y))  # type: ignore[call-overload]


def test_metrics_are_printed_as_a_table_and_go_into_json() -> None:
    model, forget, retain = classifier()
    reference, *_ = classifier()
    found = evaluate(model, forget=forget, retain=retain, test=retain, reference=reference)
    lines = str(found).splitlines()
    assert lines[0].split() == ["accuracy", "gap", "loss", "kl", "js"]
    assert [line.split()[0] for line in lines[1:4]] == ["forget", "retain", "test"]
    assert lines[5] == "tow 1.0000"
    assert json.loads(json.dumps(found.as_dict()))["per_class"]["forget"]["0"]["samples"] == 5
    assert "gap" not in str(Metrics({"test": 50.0}, {"test": 1.0}))
