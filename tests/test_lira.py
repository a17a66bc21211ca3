"""LiRA against a plain loop, and both attacks against planted truth: what must be found, and what is not there."""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor, nn

from fastunlearn import Retrain
from fastunlearn.evaluate.lira import lira, membership, u_lira
from fastunlearn.evaluate.roc import roc
from fastunlearn.evaluate.shadows import ShadowModels, balanced_subsets
from fastunlearn.evaluate.stacked import Recipe

RECIPE = Recipe(epochs=20, lr=0.02, batch_size=32)
FORGET = torch.arange(20, 50)
module = importlib.import_module("fastunlearn.evaluate.lira")


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(30, 32), nn.ReLU(), nn.Linear(32, 4))


def noise(n: int = 160) -> tuple[Tensor, Tensor]:
    """Labels without a pattern: what a model knows of a sample it has memorised."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 30, generator=generator), torch.randint(4, (n,), generator=generator)


@cache
def shadows(together: bool = False) -> ShadowModels:
    """16 models on halves of the noise; with all of ``FORGET`` or nothing of it."""
    models = ShadowModels(mlp, RECIPE, noise(), 16, seed=1, together=FORGET if together else None)
    models.train()
    return models


def retrained(model: nn.Module, forget: Any, retain: Any, seed: int) -> None:
    Retrain(RECIPE.epochs, RECIPE.lr, RECIPE.weight_decay, build=mlp, seed=seed).unlearn(model, None, retain)


def nothing(model: nn.Module, forget: Any, retain: Any, seed: int) -> None:
    pass


def wiped(model: nn.Module, forget: Any, retain: Any, seed: int) -> None:
    """Damage to every sample alike: the last layer is silenced."""
    for parameter in model[2].parameters():
        nn.init.zeros_(parameter)


# --- lira


def brute_force(target: Any, shadow: Any, member: Any, online: bool, fixed: bool) -> Any:
    """Example by example, as one would write the paper's algorithm down."""

    def deviation(rows: list[Any], i: int) -> float:
        if not fixed:
            return float(np.std(rows[i], ddof=1))
        residuals = np.concatenate([row - row.mean() for row in rows])
        return float(np.sqrt((residuals**2).sum() / (len(residuals) - len(rows))))

    inside = [shadow[member[:, i], i] for i in range(len(target))]
    outside = [shadow[~member[:, i], i] for i in range(len(target))]
    scores = []
    for i, score in enumerate(target):
        out = norm(outside[i].mean(), deviation(outside, i))
        if online:
            scores.append(norm.logpdf(score, inside[i].mean(), deviation(inside, i)) - out.logpdf(score))
        else:
            scores.append(-out.logsf(score))
    return np.array(scores)


@pytest.mark.parametrize("online", [True, False])
@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize(("count", "n"), [(4, 1), (7, 13), (66, 40)])
def test_lira_equals_a_plain_loop_over_examples(online: bool, fixed: bool, count: int, n: int) -> None:
    rng = np.random.default_rng(count)
    shadow = 3 * rng.normal(size=(count, n)) + rng.normal(size=n) - 5
    member = rng.permuted(np.arange(count)[:, None].repeat(n, 1), axis=0) < max(2, count // 3)
    shadow[member] += 2
    target = rng.normal(size=n) * 8  # some far out in the tails
    expected = brute_force(target, shadow, member, online, fixed)
    tensors = [torch.from_numpy(a) for a in (target, shadow, member)]
    found = lira(*tensors, online=online, fixed_variance=fixed)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10, atol=1e-10)
    if fixed == (count < 64):
        assert torch.equal(found, lira(*tensors, online=online))  # auto: one variance below 64 models


def test_scores_do_not_tie_at_the_ends() -> None:
    target = torch.tensor([40.0, 50.0, -40.0, -50.0], dtype=torch.float64)
    shadow = torch.tensor([-1.0, 0.0, 1.0, 2.0, 3.0], dtype=torch.float64)[:, None].expand(5, 4)
    member = torch.tensor([False, False, False, True, True])[:, None].expand(5, 4)
    for online in (True, False):
        scores = lira(target, shadow, member, online)
        assert bool(torch.isfinite(scores).all())
        assert len(set(scores[:2].tolist())) == 2
    assert float(scores[1]) > float(scores[0]) > float(scores[2])  # offline: the higher, the more surprising


def test_scores_that_never_vary_are_finite() -> None:
    member = torch.tensor([[True, False], [False, True]]).repeat(3, 1)
    shadow = torch.where(member, 1.0, 0.0)
    scores = lira(torch.tensor([1.0, 0.0]), shadow, member)
    assert bool(torch.isfinite(scores).all()) and float(scores[0]) > 0 > float(scores[1])
    assert lira(torch.zeros(2), torch.zeros(6, 2), member).tolist() == [0, 0]


def test_offline_needs_no_model_that_saw_the_example() -> None:
    shadow = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    unseen = torch.zeros(6, 3, dtype=torch.bool)
    assert lira(torch.zeros(3), shadow, unseen, online=False).shape == (3,)
    with pytest.raises(ValueError, match="0 of 6 shadow models saw example 0, 1 or more are needed"):
        lira(torch.zeros(3), shadow, unseen)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.zeros(4)}, r"got \[4\], \[6, 3\] and \[6, 3\]"),
        ({"shadow": torch.zeros(5, 3)}, r"got \[3\], \[5, 3\] and \[6, 3\]"),
        ({"member": torch.zeros(6, 3)}, "member must be bool, got torch.float32"),
        ({"target": torch.tensor([0.0, torch.nan, 0.0])}, "1 of the target scores are NaN or infinite"),
        ({"shadow": torch.full((6, 3), torch.inf)}, "18 of the shadow scores"),
        ({"member": ~torch.eye(6, 3, dtype=torch.bool), "fixed_variance": False}, "1 of 6 shadow models did not see"),
        ({"member": ~torch.eye(6, 3, dtype=torch.bool)}, "one shadow model per example did not see"),
    ],
)
def test_scores_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    member = balanced_subsets(3, 6)
    given: dict[str, Any] = {"target": torch.zeros(3), "shadow": torch.zeros(6, 3), "member": member} | change
    with pytest.raises(ValueError, match=message):
        lira(**given)


# --- a model


@pytest.mark.parametrize("online", [True, False])
def test_an_overfitted_model_is_detected(online: bool) -> None:
    """The model is one of the shadow models, attacked with those outside its block."""
    models = shadows()
    saw = models.keep[4]
    members, others = saw.nonzero().flatten(), (~saw).nonzero().flatten()
    found = membership(models.model(4), models, members, others, online, leave_out=[4, 5])
    assert found.auc.mean >= 0.9
    assert found.auc.low is not None and found.auc.low > 0.8
    assert found.models_used == 14
    assert (len(found.members), len(found.others)) == (80, 80)
    assert found.auc.mean == roc(found.members, found.others).auc == found.roc.auc


@pytest.mark.parametrize("online", [True, False])
def test_a_model_that_never_saw_the_data_is_not_detected(online: bool) -> None:
    """Trained as the others, on other noise: which half is called members says nothing."""
    x, y = (t[160:] for t in noise(240))
    strangers = ShadowModels(mlp, RECIPE, (x, y), 2, seed=9)
    strangers.train()
    models = shadows()
    saw = models.keep[4]
    members, others = saw.nonzero().flatten(), (~saw).nonzero().flatten()
    found = membership(strangers.model(0), models, members, others, online)
    assert found.auc.low is not None and found.auc.high is not None
    assert found.auc.low <= 0.5 <= found.auc.high
    assert found.auc.high - found.auc.low < 0.25  # an interval that says something
    assert set(found.tpr) == {0.001, 0.01} and len(found.limits) == 2


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (torch.tensor([3, 160]), "members holds the index 160, but there are 160 samples"),
        (torch.tensor([3, 3]), "members holds an index twice"),
        (torch.tensor([0.5]), "members must be indices, int64"),
        (torch.empty(0, dtype=torch.int64), "with one or more"),
    ],
)
def test_indices_that_do_not_fit_are_refused(members: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        membership(mlp(), shadows(), members, torch.tensor([1, 2]))


# --- an unlearning method


@pytest.mark.parametrize("together", [True, False])
def test_exact_retraining_is_not_detected(together: bool) -> None:
    found = u_lira(shadows(together), retrained, FORGET, "retrain")
    assert found.auc.low is not None and found.auc.high is not None
    assert found.auc.low <= 0.5 <= found.auc.high
    assert found.auc.high - found.auc.low < 0.4
    assert (found.models_used, found.forget_size, len(found.per_example)) == (16, 30, 30)


@pytest.mark.parametrize("together", [True, False])
def test_doing_nothing_is_detected(together: bool) -> None:
    found = u_lira(shadows(together), nothing, FORGET, "nothing")
    assert found.auc.mean >= 0.9
    assert found.auc.low is not None and found.auc.low > 0.8
    assert float((found.per_example > 0).double().mean()) > 0.9


def test_damage_to_every_sample_alike_shows_beside_retrained_models() -> None:
    beside_retrained = u_lira(shadows(True), wiped, FORGET, "wiped")
    assert beside_retrained.auc.mean > 0.9
    beside_its_like = u_lira(shadows(False), wiped, FORGET, "wiped")
    assert beside_its_like.auc.mean == 0.5  # as the docstring says
    assert any("together=forget" in limit for limit in beside_its_like.limits)
    assert not any("together=forget" in limit for limit in beside_retrained.limits)


def test_a_target_is_judged_example_by_example() -> None:
    x, y = noise()
    whole = ShadowModels(mlp, RECIPE, (x, y), 2, seed=7)  # two more models on halves: one saw an example, one did not
    whole.train()
    forget = whole.keep[0].nonzero().flatten()[:30]
    kept, unseen = (u_lira(shadows(), nothing, forget, "nothing", target=whole.model(m)).per_example for m in (0, 1))
    assert roc(kept, unseen).auc > 0.9
    assert float(kept.median()) > 0 > float(unseen.median())


def test_unlearned_models_are_kept_and_a_stopped_run_goes_on(tmp_path: Path) -> None:
    def fresh() -> ShadowModels:
        return ShadowModels(mlp, RECIPE, noise(), 8, cache=tmp_path, together=FORGET, mode="sequential")

    fresh().train()
    calls = []

    def counted(model: nn.Module, forget: Any, retain: Any, seed: int) -> None:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(seed)
        retrained(model, forget, retain, seed)

    with pytest.raises(KeyboardInterrupt):
        u_lira(fresh(), counted, FORGET, "retrain", {"epochs": 20})
    stopped = u_lira(fresh(), retrained, FORGET, "retrain", {"epochs": 20})
    with patch.object(module, "Shuffled", side_effect=AssertionError("unlearned again")):
        again = u_lira(fresh(), nothing, FORGET, "retrain", {"epochs": 20})
    uninterrupted = u_lira(shadows_in_memory(), retrained, FORGET, "retrain", {"epochs": 20})
    assert torch.equal(stopped.per_example, again.per_example)
    assert torch.equal(stopped.per_example, uninterrupted.per_example)
    assert len(set(calls)) == 2
    for change in ({"method": "other"}, {"settings": {"epochs": 21}}, {"seed": 1}, {"forget": FORGET[:20]}):
        given: dict[str, Any] = {"forget": FORGET, "method": "retrain", "settings": {"epochs": 20}} | change
        assert u_lira(fresh(), nothing, **given).auc.mean > 0.8  # not the retrained models


def shadows_in_memory() -> ShadowModels:
    models = ShadowModels(mlp, RECIPE, noise(), 8, together=FORGET, mode="sequential")
    models.train()
    return models


def test_the_method_is_given_what_the_model_saw() -> None:
    models, x = shadows(), noise()[0]
    given = []

    def look(model: nn.Module, forget: Any, retain: Any, seed: int) -> None:
        assert not model.training
        rows = [torch.cat([inputs for inputs, _ in batches]) for batches in (forget, retain, retain)]
        given.append(rows)

    u_lira(models, look, FORGET, "look")
    for keep, (forget, retain, again) in zip(models.keep, given, strict=True):
        seen = FORGET[keep[FORGET]]
        rest = keep.clone()
        rest[seen] = False
        assert torch.equal(forget, x[seen])
        assert not torch.equal(retain, again)  # another order
        assert all(torch.equal(t.sort(0).values, x[rest].sort(0).values) for t in (retain, again))


@pytest.mark.parametrize("together", [True, False])
def test_where_there_is_nothing_to_find_the_auc_is_a_half_and_its_interval_says_so(together: bool) -> None:
    """Scores of 8 models with an effect of the model and of the example, but none of membership, many times over."""
    generator = torch.Generator().manual_seed(3)
    examples = torch.arange(15)
    found = []
    for seed in range(60):
        member = balanced_subsets(40, 8, 0.5, seed, examples if together else None)[:, examples]
        effects = (torch.randn(15, generator=generator), torch.randn(8, 1, generator=generator) / 2)
        scores = (torch.randn(8, 15, generator=generator) + effects[0] + effects[1]).double()
        found.append(module._estimates(scores, member, torch.arange(8) // 2, "auto")[1])
    means = torch.tensor([auc.mean for auc in found])
    assert abs(float(means.mean()) - 0.5) < 3 * float(means.std()) / 60**0.5
    assert sum((auc.low or 0) <= 0.5 <= (auc.high or 0) for auc in found) >= 54  # 57 of 60 are 95 %


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"settings": {"loss": nn.ReLU()}}, TypeError, "settings must be JSON"),
        ({"forget": torch.tensor([160])}, ValueError, "forget holds the index 160"),
        ({"forget": torch.arange(160)}, ValueError, "nothing to retain"),
    ],
)
def test_requests_that_can_not_be_met_are_refused(change: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        u_lira(shadows(), nothing, **({"forget": FORGET, "method": "x"} | change))


def test_too_few_models_and_untrained_ones_are_refused() -> None:
    few = ShadowModels(mlp, RECIPE, noise(), 6)
    with pytest.raises(ValueError, match="6 shadow models are 3 blocks of 2, U-LiRA needs 4 or more: count=8"):
        u_lira(few, nothing, FORGET, "nothing")
    with pytest.raises(RuntimeError, match=r"shadow model 0 is not trained yet; call train\(\)"):
        membership(mlp(), few, FORGET, FORGET + 40)
