"""A removal budget: what it measures, when it stops, and what it takes back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastunlearn.methods.budget import Account, Budget, accuracy


def model() -> nn.Linear:
    """Says class 1 where x > 0; every sample of :func:`validation` is right."""
    layer = nn.Linear(1, 2, bias=False)
    layer.weight.data = torch.tensor([[0.0], [1.0]])
    return layer


def validation() -> list[tuple[Tensor, Tensor]]:
    x = torch.tensor([[1.0], [-1.0], [2.0], [-2.0]])
    return [(x[:3], torch.tensor([1, 0, 1])), (x[3:], torch.tensor([0]))]


def move(account: Account, layer: nn.Linear, weight: float, **spent: Any) -> Any:
    account.keep([layer.weight])
    layer.weight.data[1] = weight
    return account.settle(**{"step_norm": 1.0, "gradient_norm": 1.0, "last": False, **spent})


def test_a_drop_takes_back_the_removal_that_caused_it_and_no_other() -> None:
    layer = model()
    account = Account(Budget(), layer, validation())
    assert account.score_before == 1.0
    assert move(account, layer, 0.1 + 0.2) is None
    good = layer.weight.detach().clone()
    verdict = move(account, layer, -1.0)
    assert "dropped by 1, above 0.05" in verdict.reason and verdict.undone == 1
    assert torch.equal(layer.weight, good) and account.score == 0.0 and account.step_norms == [1.0]


def test_a_drop_of_just_the_limit_is_within_it() -> None:
    layer = model()
    account = Account(Budget(max_drop=1.0), layer, validation())
    assert move(account, layer, -1.0) is None


def test_a_twentieth_of_the_validation_set_is_within_a_drop_of_a_twentieth() -> None:
    layer = model()
    x = torch.tensor([[0.0]] * 19 + [[1.0]])
    account = Account(Budget(), layer, [(x, x[:, 0].long())])
    assert move(account, layer, -1.0) is None  # 1 - 0.95 is above 0.05 by a rounding
    assert account.score == 0.95


def test_with_rare_checks_every_removal_since_the_last_check_is_taken_back() -> None:
    layer = model()
    account = Account(Budget(check_every=3), layer, validation())
    assert [move(account, layer, w) for w in (2.0, 3.0, 4.0)] == [None] * 3
    assert move(account, layer, -1.0) is None  # not looked at yet
    assert move(account, layer, -2.0) is None
    verdict = move(account, layer, -3.0)
    assert verdict.undone == 3 and layer.weight[1].item() == 4.0 and len(account.step_norms) == 3


def test_the_last_removal_is_always_checked() -> None:
    layer = model()
    account = Account(Budget(check_every=100), layer, validation())
    assert move(account, layer, -1.0) is None
    assert move(account, layer, -1.0, last=True).undone == 2
    assert layer.weight[1].item() == 1.0


def test_step_norms_add_up() -> None:
    layer = model()
    account = Account(Budget(max_drop=None, max_step_norm=2.5), layer, None)
    assert move(account, layer, 2.0) is None and move(account, layer, 3.0) is None
    verdict = move(account, layer, 4.0)
    assert "add up to a norm of 3, above 2.5" in verdict.reason and verdict.undone == 1
    assert layer.weight[1].item() == 3.0 and account.score is None


@pytest.mark.parametrize("norm", [3.0, float("nan")])
def test_a_gradient_past_its_limit_or_not_a_number_stops(norm: float) -> None:
    layer = model()
    account = Account(Budget(max_drop=None, max_gradient_norm=2.0), layer, None)
    assert move(account, layer, 2.0, gradient_norm=2.0) is None
    assert "gradient has a norm" in move(account, layer, 3.0, gradient_norm=norm).reason
    assert layer.weight[1].item() == 2.0


def test_a_stop_for_another_reason_still_checks_the_removals_that_would_stand() -> None:
    layer = model()
    account = Account(Budget(check_every=9, max_gradient_norm=2.0), layer, validation())
    assert move(account, layer, -1.0) is None  # spoils the score unseen
    verdict = move(account, layer, 5.0, gradient_norm=3.0)
    assert verdict.undone == 2 and layer.weight[1].item() == 1.0
    assert "gradient" in verdict.reason and "validation score" in verdict.reason


def test_a_parameter_changed_twice_goes_back_to_its_first_value() -> None:
    layer = model()
    account = Account(Budget(check_every=2), layer, validation())
    move(account, layer, 7.0)
    move(account, layer, -7.0)
    assert layer.weight[1].item() == 1.0


def test_another_score_may_be_given_and_a_score_that_is_nan_stops() -> None:
    layer = model()

    def score(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs[:, 1].abs().sqrt()

    account = Account(Budget(max_drop=0.1, score=score), layer, validation())
    assert account.score_before == pytest.approx((2 + 2 * 2**0.5) / 4)
    assert move(account, layer, 1.2) is None and move(account, layer, 0.5).undone == 1
    assert move(account, layer, float("nan")).undone == 1
    with pytest.raises(ValueError, match=r"one number per sample, shape \[3\], got \[\]"):
        Account(Budget(score=lambda out, y: out.mean()), layer, validation())
    layer.weight.data[1] = float("nan")
    with pytest.raises(ValueError, match="nan before any removal"):
        Account(Budget(score=score), layer, validation())


def test_modes_are_put_back_after_a_check() -> None:
    net = nn.Sequential(nn.Dropout(0.9), model()).train()
    Account(Budget(), net, validation())
    assert net.training and net[0].training


def test_accuracy_of_positions_leaves_out_the_unlabelled() -> None:
    logits = torch.tensor([[[9.0, 0, 9, 0], [0, 9, 0, 9]]]).repeat(2, 1, 1)
    targets = torch.tensor([[0, 1, 1, -100], [-100] * 4])
    assert accuracy(logits, targets).tolist() == [pytest.approx(2 / 3), 0.0]
    assert accuracy(torch.eye(3), torch.tensor([0, 1, 1])).tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("targets", [torch.zeros(3), torch.zeros(2).long(), torch.zeros(3, 1).long(), None])
def test_targets_that_are_no_classes_ask_for_a_score(targets: Any) -> None:
    with pytest.raises(ValueError, match="Budget\\(score="):
        accuracy(torch.zeros(3, 2), targets)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_drop": -0.1}, "max_drop"),
        ({"max_step_norm": float("inf")}, "max_step_norm"),
        ({"max_gradient_norm": float("nan")}, "max_gradient_norm"),
        ({"check_every": 0}, "check_every"),
        ({"max_drop": None}, "without any limit"),
    ],
)
def test_bad_limits_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget(**settings)


def test_a_drop_needs_validation_and_validation_needs_a_drop() -> None:
    with pytest.raises(ValueError, match="give validation="):
        Account(Budget(), model(), None)
    with pytest.raises(ValueError, match="would not look at it"):
        Account(Budget(max_drop=None, max_step_norm=1.0), model(), validation())
