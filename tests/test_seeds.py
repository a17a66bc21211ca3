"""Figures over several runs: means and Student's intervals of them, and what does not belong together."""

from __future__ import annotations

import json
import math

import pytest
import scipy.stats
import torch
from models import Pairs, classifier
from torch import nn

from fastunlearn import evaluate
from fastunlearn.evaluate.estimate import Estimate
from fastunlearn.evaluate.metrics import Metrics
from fastunlearn.evaluate.seeds import over_runs


def noisy(seed: int) -> nn.Module:
    """The trained classifier with noise of its own on the last layer."""
    model, *_ = classifier()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model[6].weight += 0.5 * torch.randn(model[6].weight.shape, generator=generator)
    return model


def sets() -> dict[str, Pairs]:
    _, forget, retain = classifier()
    return {"forget": forget, "retain": retain[:3], "test": retain[3:]}


def interval(values: list[float]) -> tuple[float, float, float]:
    mean = sum(values) / len(values)
    low, high = scipy.stats.t.interval(0.95, len(values) - 1, loc=mean, scale=scipy.stats.sem(values))
    return mean, low, high


def test_every_figure_is_the_mean_of_the_runs_with_student_s_interval() -> None:
    reference, *_ = classifier()
    found = evaluate(noisy, **sets(), reference=reference, seeds=3)
    runs = [evaluate(noisy(seed), **sets(), reference=reference) for seed in range(3)]
    assert found.runs == runs

    def check(estimate: Estimate | None, values: list[float], ends: tuple[float, float]) -> None:
        assert estimate is not None
        mean, low, high = interval(values)
        expected = (mean, max(low, ends[0]), min(high, ends[1]))
        assert (estimate.mean, estimate.low, estimate.high) == pytest.approx(expected)
        assert estimate.runs == 3

    for name in ("forget", "retain", "test"):
        for part, ends in (("accuracy", (0, 100)), ("loss", (-math.inf, math.inf)), ("gap", (-100, 100)),
                           ("kl", (0, math.inf)), ("js", (0, math.log(2)))):  # fmt: skip
            check(getattr(found, part)[name], [getattr(run, part)[name] for run in runs], ends)
        for cls in range(4):
            of_runs = [run.per_class[name][cls] for run in runs]
            check(found.per_class[name][cls].accuracy, [c.accuracy for c in of_runs], (0, 100))
            check(found.per_class[name][cls].loss, [c.loss for c in of_runs], (-math.inf, math.inf))
    for part, ends in (("membership_auc", (0, 1)), ("membership_gap", (-1, 1)), ("tow", (0, 1))):
        check(getattr(found, part), [getattr(run, part) for run in runs], ends)
    assert found.loss["test"].low is not None and found.loss["test"].low < found.loss["test"].mean


def test_an_interval_ends_where_the_figure_does() -> None:
    values = [100.0, 97.0]
    mean, low, high = interval(values)
    assert low < 80 and high > 110
    assert Estimate.over(values) == Estimate(mean, low, high, 2)
    assert Estimate.over(values, (0, 100)) == Estimate(mean, low, 100, 2)
    assert Estimate.over([1.0, 0.0], (0, 1)) == Estimate(0.5, 0, 1, 2)
    assert Estimate.over([101.0, 101.0], (0, 100)) == Estimate(101, 101, 101, 2)  # never beside its mean

    runs = [Metrics({"test": a}, {"test": -a}, auc, kl={"test": kl}, js={"test": kl}, tow=auc)
            for a, auc, kl in ((100.0, 0.9, 0.1), (50.0, 0.1, 0.5))]  # fmt: skip
    found = over_runs(runs)
    assert found.kl is not None and found.js is not None and found.tow is not None
    assert (found.accuracy["test"].low, found.accuracy["test"].high) == (0, 100)
    assert found.membership_auc == Estimate(0.5, 0, 1, 2) == found.tow
    assert (found.kl["test"].low, found.js["test"].low, found.js["test"].high) == (0, 0, math.log(2))
    assert found.kl["test"].high == pytest.approx(interval([0.1, 0.5])[2])
    assert found.loss["test"].low == pytest.approx(interval([-100.0, -50.0])[1])  # a caller's loss may be anything


def test_references_are_paired_with_the_runs_seed_by_seed() -> None:
    _, _, retain = classifier()
    models = [noisy(5), noisy(2)]
    same = evaluate(models, test=retain, reference=[noisy(5), noisy(2)], seeds=[5, 2])
    assert same.kl == {"test": Estimate(0.0, 0.0, 0.0, 2)}
    assert same.gap == {"test": Estimate(0.0, 0.0, 0.0, 2)}
    assert evaluate(noisy, test=retain, reference=noisy, seeds=[5, 2]) == same
    swapped = evaluate(models, test=retain, reference=[noisy(2), noisy(5)], seeds=2)
    assert swapped.kl is not None and swapped.kl["test"].mean > 0.01
    known = [evaluate(noisy(seed), test=retain) for seed in (5, 2)]
    assert evaluate(noisy, test=retain, reference=known, seeds=[5, 2]).gap == same.gap


def test_a_function_is_asked_for_one_model_at_a_time() -> None:
    events: list[str] = []
    _, _, retain = classifier()

    def build(seed: int) -> nn.Module:
        events.append(f"build {seed}")
        model = noisy(seed)
        model[0].register_forward_hook(lambda *_: events.append(f"run {seed}"))
        return model

    evaluate(build, test=retain[:1], seeds=(7, 4))
    assert events == ["build 7", "run 7", "build 4", "run 4"]


def test_runs_are_printed_with_their_intervals_and_go_into_json() -> None:
    _, forget, retain = classifier()
    found = evaluate(noisy, forget=forget, test=retain, seeds=3)
    text = str(found)
    for name in ("forget", "test"):
        accuracy = found.accuracy[name]
        assert f"{accuracy.mean:.2f} ({accuracy.low:.2f} to {accuracy.high:.2f})" in text
    assert "of 3 runs: mean and 95 % interval" in text
    back = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert back["loss"]["test"] == found.loss["test"].as_dict()
    assert back["per_class"]["forget"]["0"]["samples"] == {"mean": 5.0, "runs": 3, "low": 5.0, "high": 5.0}
    assert [run["accuracy"] for run in back["runs"]] == [run.accuracy for run in found.runs]
    assert back["kl"] is None


def test_one_run_has_no_interval_and_says_so() -> None:
    _, _, retain = classifier()
    found = evaluate(noisy, test=retain, seeds=1)
    assert found.accuracy["test"].low is None
    assert str(found).endswith("of 1 run: no interval")


def test_a_class_that_only_some_runs_have_is_averaged_over_those() -> None:
    runs = [evaluate(noisy(0), forget=[(x, y)]) for x, y in sets()["retain"]]
    x, y = sets()["retain"][0]
    runs.append(evaluate(noisy(0), forget=[(x[y == 2], y[y == 2])]))
    found = over_runs(runs)
    assert found.per_class["forget"][2].accuracy.runs == 4
    assert found.per_class["forget"][1].accuracy.runs == 3


def test_infinities_and_nan_are_none_in_json() -> None:
    runs = [Metrics({"test": 50.0}, {"test": math.nan}, kl={"test": math.inf}) for _ in range(2)]
    back = over_runs(runs).as_dict()
    assert back["loss"]["test"]["mean"] is back["kl"]["test"]["mean"] is back["runs"][0]["kl"]["test"] is None
    json.dumps(back, allow_nan=False)


def test_what_does_not_belong_together_is_refused() -> None:
    model, _, retain = classifier()
    with pytest.raises(TypeError, match=r"function from a seed to a model or a sequence of 2 models, got one Sequent"):
        evaluate(model, test=retain, seeds=2)
    with pytest.raises(ValueError, match=r"model has 2 entries for 3 seeds"):
        evaluate([model, model], test=retain, seeds=3)
    with pytest.raises(ValueError, match=r"reference has 1 entries for 2 seeds"):
        evaluate([model, model], test=retain, reference=[model], seeds=2)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got NoneType"):
        evaluate(lambda seed: None, test=retain, seeds=2)  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match=r"seeds= model must be a function of the seed or a sequence.*got int"):
        evaluate(3, test=retain, seeds=2)  # type: ignore[call-overload]
    for wrong in (0, []):
        with pytest.raises(ValueError, match=r"seeds must name one run or more"):
            evaluate(noisy, test=retain, seeds=wrong)
    with pytest.raises(ValueError, match=r"seeds must differ from one another, got \[1, 1\]"):
        evaluate(noisy, test=retain, seeds=[1, 1])
    for odd in (True, 2.0, ["0"]):
        with pytest.raises(TypeError, match=r"seeds must be a number of runs or a sequence of integers"):
            evaluate(noisy, test=retain, seeds=odd)  # type: ignore[arg-type]
    alone, compared = evaluate(model, test=retain), evaluate(model, test=retain, reference=model)
    with pytest.raises(ValueError, match=r"gap was measured in 1 of 2 runs"):
        over_runs([alone, compared])
    with pytest.raises(ValueError, match=r"different sets: test and retain"):
        over_runs([alone, evaluate(model, retain=retain)])
    with pytest.raises(ValueError, match=r"got none"):
        over_runs([])
