"""Metrics against independent computations and planted truth."""

from __future__ import annotations

import pytest
import torch
from models import classifier, pairs
from torch import nn

from fastunlearn import evaluate
from fastunlearn.evaluate import membership_auc


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
    assert evaluate(model, forget=forget, test=retain, reference=theirs) == metrics
    with pytest.raises(ValueError, match="reference was not measured on retain"):
        evaluate(model, forget=forget, retain=retain, reference=theirs)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_nothing_to_evaluate_on_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to evaluate on"):
        evaluate(nn.Linear(2, 2))
