"""ROC curves against scikit-learn, bootstrap intervals against a plain loop and against known truth."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

from fastunlearn.evaluate.metrics import membership_auc
from fastunlearn.evaluate.roc import Roc, bootstrap, roc

TIED = st.lists(st.sampled_from([-3.5, -1.0, 0.0, 0.25, 1.0, 2.0]), min_size=1, max_size=40)
ANY = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40)


def sklearn_curve(members: Tensor, others: Tensor) -> tuple[np.ndarray, np.ndarray, float]:
    y = [1] * len(members) + [0] * len(others)
    scores = torch.cat([members, others]).double().numpy()
    fpr, tpr, _ = roc_curve(y, scores, drop_intermediate=False)
    return fpr, tpr, float(roc_auc_score(y, scores))


@given(st.one_of(st.tuples(TIED, TIED), st.tuples(ANY, ANY)))
@settings(max_examples=150, deadline=None)
def test_curve_and_area_equal_scikit_learns(scores: tuple[list[float], list[float]]) -> None:
    members, others = (torch.tensor(side, dtype=torch.float64) for side in scores)
    found = roc(members, others)
    fpr, tpr, auc = sklearn_curve(members, others)
    assert found.fpr.dtype == found.tpr.dtype == torch.float64
    np.testing.assert_allclose(found.fpr, fpr, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.tpr, tpr, rtol=0, atol=1e-12)
    assert found.auc == pytest.approx(auc, abs=1e-12)
    assert found.auc == pytest.approx(membership_auc(-members, -others), abs=1e-12)


@given(st.tuples(TIED, TIED), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_tpr_at_is_the_best_of_all_thresholds_that_keep_the_rate(
    scores: tuple[list[float], list[float]], fpr: float
) -> None:
    members, others = (np.array(side) for side in scores)
    thresholds = [np.inf, *members, *others]
    best = max(np.mean(members >= t) for t in thresholds if np.mean(others >= t) <= fpr)
    assert roc(torch.from_numpy(members), torch.from_numpy(others)).tpr_at(fpr) == best


def test_a_rate_that_one_sample_has_exactly_is_allowed_that_sample() -> None:
    for count in (10, 100, 1000):
        others = torch.arange(count).double()
        members = torch.tensor([count - 1.5, count + 1.0])
        assert roc(members, others).tpr_at(1 / count) == 1.0
        assert roc(members, others).tpr_at(0.999 / count) == 0.5


def test_one_score_for_all_is_a_coin_and_infinities_are_scores() -> None:
    constant = roc(torch.zeros(3), torch.zeros(4))
    assert constant.auc == 0.5
    assert constant.fpr.tolist() == constant.tpr.tolist() == [0, 1]
    infinite = roc(torch.tensor([torch.inf, torch.inf, 0.0]), torch.tensor([-torch.inf, torch.inf]))
    assert infinite.auc == pytest.approx((2 * (1 + 0.5) + 1) / 6)


def test_other_scores_than_a_vector_of_numbers_are_refused_by_name() -> None:
    fine = torch.zeros(3)
    for bad, error, message in (
        (torch.tensor([0.0, math.nan, math.nan]), ValueError, "2 of the 3 scores of others are NaN"),
        (torch.zeros(0), ValueError, "others must be scores"),
        (torch.zeros(2, 2), ValueError, r"others must be scores .* got shape \[2, 2\]"),
        ([0.0], TypeError, "others must be a tensor"),
    ):
        with pytest.raises(error, match=message):
            roc(fine, bad)  # type: ignore[arg-type]
        with pytest.raises(error, match=message):
            bootstrap(fine, bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scores of members are NaN"):
        roc(torch.tensor([math.nan]), fine)
    with pytest.raises(ValueError, match="fpr is a share"):
        roc(fine, fine).tpr_at(1.5)
    with pytest.raises(ValueError, match="resamples must be 2 or more"):
        bootstrap(fine, fine, resamples=1)


def test_a_thinned_curve_keeps_its_shape_on_log_axes() -> None:
    torch.manual_seed(0)
    full = roc(torch.randn(20_000) + 1, torch.randn(20_000))
    thin = full.thinned(200)
    assert 100 <= len(thin.fpr) <= 200
    assert set(zip(thin.fpr.tolist(), thin.tpr.tolist(), strict=True)) <= set(
        zip(full.fpr.tolist(), full.tpr.tolist(), strict=True)
    )
    assert [float(end) for end in (thin.fpr[0], thin.tpr[0], thin.fpr[-1], thin.tpr[-1])] == [0, 0, 1, 1]
    for fpr in (0.001, 0.01, 0.1):
        assert thin.tpr_at(fpr) == full.tpr_at(fpr)
    assert thin.auc == pytest.approx(full.auc, abs=2e-3)
    for fpr in np.geomspace(1e-4, 1, 50):  # never above, and below by no more than a step of the grid
        assert full.tpr_at(fpr / 1.2) <= thin.tpr_at(float(fpr)) <= full.tpr_at(float(fpr))


@given(st.tuples(TIED, TIED), st.integers(10, 30))
@settings(max_examples=50, deadline=None)
def test_thinning_a_short_curve_never_leaves_more_points_than_asked(
    scores: tuple[list[float], list[float]], points: int
) -> None:
    full = roc(*(torch.tensor(side, dtype=torch.float64) for side in scores))
    long = Roc(torch.linspace(0, 1, 97).double(), torch.linspace(0, 1, 97).double().sqrt())
    for curve in (full, long):
        thin = curve.thinned(points)
        assert len(thin.fpr) <= points
        assert bool((thin.fpr.diff() >= 0).all()) and bool((thin.tpr.diff() >= 0).all())


def test_thinning_to_fewer_than_ten_points_is_refused() -> None:
    with pytest.raises(ValueError, match="10 or more"):
        roc(torch.zeros(2), torch.ones(2)).thinned(9)


def test_bootstrap_equals_a_plain_loop_over_scikit_learn() -> None:
    torch.manual_seed(1)
    members, others = (torch.randn(37) + 0.7).round(decimals=1), torch.randn(50).round(decimals=1)
    found = bootstrap(members, others, resamples=60, seed=5, fprs=(0.06, 0.3))  # 3 and 15 of 50, exactly
    ours, theirs = (np.random.default_rng(s) for s in np.random.SeedSequence(5).spawn(2))
    aucs, tprs = [], []
    for _ in range(60):
        drawn = members[ours.integers(0, 37, 37)], others[theirs.integers(0, 50, 50)]
        fpr, tpr, auc = sklearn_curve(*drawn)
        aucs.append(auc)
        tprs.append([tpr[fpr <= rate].max() for rate in (0.06, 0.3)])
    for estimate, values in zip([found["auc"], *found["tpr"].values()], [aucs, *np.transpose(tprs)], strict=True):
        assert (estimate.low, estimate.high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])), abs=1e-12)
    curve = roc(members, others)
    assert found["auc"].mean == curve.auc
    assert {fpr: tpr.mean for fpr, tpr in found["tpr"].items()} == {r: curve.tpr_at(r) for r in (0.06, 0.3)}


def test_the_same_seed_gives_the_same_interval_whatever_the_size_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    members, others = torch.randn(40) + 1, torch.randn(50)
    found = bootstrap(members, others, 50, seed=1)
    assert bootstrap(members, others, 50, seed=2) != found
    monkeypatch.setattr(sys.modules[roc.__module__], "BLOCK", 1)
    assert bootstrap(members, others, 50, seed=1) == found


def test_intervals_hold_the_true_value_as_often_as_they_say() -> None:
    """Scores N(1, 1) against N(0, 1): AUC = Phi(1 / sqrt 2), TPR at 20 % = Phi(1 - z(0.8)), known exactly."""
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1)
    auc = float(normal.cdf(torch.tensor(0.5).double().sqrt()))
    tpr = float(normal.cdf(1 - normal.icdf(torch.tensor(0.8).double())))
    generator = torch.Generator().manual_seed(0)
    runs, held = 500, np.zeros(2)
    for run in range(runs):
        members = torch.randn(150, generator=generator) + 1
        found = bootstrap(members, torch.randn(150, generator=generator), 250, seed=run, fprs=(0.2,))
        for i, (estimate, truth) in enumerate(((found["auc"], auc), (found["tpr"][0.2], tpr))):
            assert estimate.low is not None and estimate.high is not None
            held[i] += estimate.low <= truth <= estimate.high
    assert (held / runs >= 0.925).all(), held / runs  # 0.95 less 2.5 standard errors
    assert (held / runs <= 0.975).all(), held / runs


def test_too_few_others_for_a_rate_are_said_to_be_too_few() -> None:
    members = torch.randn(50)
    assert bootstrap(members, torch.randn(1000), 10)["limits"] == []
    limits = bootstrap(members, torch.randn(999), 10)["limits"]
    assert len(limits) == 1
    assert "at 0.1 % false positives" in limits[0] and "999 non-members" in limits[0] and "1,000" in limits[0]
    assert len(bootstrap(members, torch.randn(99), 10)["limits"]) == 2


def test_pictures_are_drawn_also_of_perfect_and_of_hopeless_attacks(tmp_path: Path) -> None:
    perfect, hopeless = roc(torch.ones(5), torch.zeros(5)), roc(torch.zeros(5), torch.ones(5))
    perfect.picture(tmp_path / "roc.svg", {"hopeless": hopeless}, name="perfect")
    text = (tmp_path / "roc.svg").read_text()
    assert "perfect: AUC 1.000" in text and "hopeless: AUC 0.000" in text and "true positive rate" in text
    hopeless.picture(tmp_path / "roc.png")
    assert (tmp_path / "roc.png").read_bytes().startswith(b"\x89PNG")
