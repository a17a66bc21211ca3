"""Retraining, fine-tuning and gradient ascent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import classifier, unchanged, weights
from torch import nn

from fastunlearn import FineTune, GradientAscent, Retrain, evaluate

METHODS = {"Retrain": Retrain(epochs=3), "FineTune": FineTune(), "GradientAscent": GradientAscent(lr=0.01)}


def test_retraining_starts_anew_and_learns_the_retained_data() -> None:
    model, forget, retain = classifier()
    outcome = Retrain(epochs=20).unlearn(model, forget, retain)
    assert evaluate(model, retain=retain).accuracy["retain"] > 95
    assert outcome.changed["0.weight"] == model[0].weight.numel()


def test_retraining_does_not_depend_on_the_weights_it_replaces() -> None:
    model, forget, retain = classifier()
    other, *_ = classifier()
    torch.nn.init.zeros_(other[4].weight)
    for m in (model, other):
        Retrain(epochs=2, seed=5).unlearn(m, forget, retain)
    assert unchanged(other, weights(model))


def test_retraining_takes_a_builder() -> None:
    model, forget, retain = classifier()
    built, *_ = classifier()
    Retrain(epochs=1, lr=1e-12, weight_decay=0, build=lambda: built).unlearn(model, forget, retain)
    torch.testing.assert_close(model[4].weight, built[4].weight, rtol=1e-4, atol=1e-6)


def test_a_module_without_reset_parameters_is_named() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(1))

    model, forget, retain = classifier()
    model = nn.Sequential(model, Scale())
    before = weights(model)
    with pytest.raises(ValueError, match=r"1 \(Scale\) has weights but no reset_parameters"):
        Retrain().unlearn(model, forget, retain)
    assert unchanged(model, before)


def test_ascent_raises_the_loss_on_the_forgotten_data() -> None:
    model, forget, retain = classifier()
    before = evaluate(model, forget=forget).loss["forget"]
    GradientAscent(epochs=3, lr=0.05).unlearn(model, forget, retain)
    assert evaluate(model, forget=forget).loss["forget"] > before


def test_fine_tuning_lowers_the_loss_on_the_retained_data() -> None:
    model, forget, retain = classifier()
    before = evaluate(model, retain=retain).loss["retain"]
    FineTune(epochs=3).unlearn(model, forget, retain)
    assert evaluate(model, retain=retain).loss["retain"] < before


@pytest.mark.parametrize("name", METHODS)
def test_runs_repeat_and_modes_are_put_back(name: str) -> None:
    results = []
    for _ in range(2):
        model, forget, retain = classifier()
        METHODS[name].unlearn(model, forget, retain)
        assert not any(m.training for m in model.modules())
        assert all(p.grad is None for p in model.parameters())
        results.append(weights(model))
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])


@pytest.mark.parametrize("name", METHODS)
def test_an_exception_half_way_puts_the_weights_back(name: str) -> None:
    model, _, retain = classifier()
    before = weights(model)
    broken = [*retain, (retain[0][0], retain[0][1][:-1])]  # the last batch is malformed
    with pytest.raises(ValueError, match="first axis"):
        METHODS[name].unlearn(model, broken, broken)
    assert unchanged(model, before)
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("batches", [[], iter([])], ids=["empty", "iterator"])
def test_bad_batches_change_nothing(name: str, batches: Any) -> None:
    model, *_ = classifier()
    before = weights(model)
    with pytest.raises((ValueError, TypeError), match=r"empty|only once"):
        METHODS[name].unlearn(model, batches, batches)
    assert unchanged(model, before)
    assert not any(m.training for m in model.modules())
