"""DeepClean: what is reset, what stays, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import classifier, unchanged, weights
from torch import Tensor, nn
from torch.nn import functional as F

from fastunlearn import DeepClean, fisher_diagonal


def test_resets_exactly_the_weights_whose_ratio_passes_gamma() -> None:
    model, forget, retain = classifier()
    before = weights(model)
    forgotten, retained = fisher_diagonal(model, forget), fisher_diagonal(model, retain)
    outcome = DeepClean(gamma=2.0, floor=0.5, finetune_epochs=0).unlearn(model, forget, retain)
    for name, parameter in model.named_parameters():
        reset = forgotten[name] > 2.0 * (retained[name] + 0.5 * retained[name].mean())
        assert torch.equal(parameter, before[name].masked_fill(reset, 0)), name
        assert outcome.changed.get(name, 0) == int(reset.sum())


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.9])
def test_fraction_counts_over_all_tensors(fraction: float) -> None:
    model, forget, retain = classifier()
    outcome = DeepClean(fraction=fraction, finetune_epochs=0).unlearn(model, forget, retain)
    total = sum(p.numel() for p in model.parameters())
    # A ratio shared by several weights can not be split, so fewer may go; gamma * retain and forget / retain are
    # rounded differently, so one or two at the threshold itself may go beyond.
    assert fraction - 0.1 < outcome.details["share_reset"] <= fraction + 2 / total


def test_only_reset_weights_move_in_fine_tuning() -> None:
    model, forget, retain = classifier()
    before = weights(model)
    untuned, *_ = classifier()
    DeepClean(fraction=0.3, finetune_epochs=0).unlearn(untuned, forget, retain)
    DeepClean(fraction=0.3, finetune_epochs=3).unlearn(model, forget, retain)
    tuned = 0
    for name, parameter in model.named_parameters():
        frozen = dict(untuned.named_parameters())[name] == before[name]
        assert torch.equal(parameter[frozen], before[name][frozen]), name
        tuned += int((parameter != dict(untuned.named_parameters())[name]).sum())
    assert tuned > 0
    assert all(torch.equal(model.state_dict()[n], before[n]) for n in before if "running" in n or "batches" in n)


def test_fine_tuning_lowers_the_loss_on_retained_data() -> None:
    losses = []
    for epochs in (0, 5):
        model, forget, retain = classifier()
        DeepClean(fraction=0.4, finetune_epochs=epochs, lr=0.05).unlearn(model, forget, retain)
        with torch.no_grad():
            losses.append(sum(float(F.cross_entropy(model(x), y, reduction="sum")) for x, y in retain))
    assert losses[1] < losses[0] / 2


def test_protected_weights_are_never_reset() -> None:
    model, forget, retain = classifier()
    before = weights(model)
    outcome = DeepClean(fraction=0.5, protect=(nn.BatchNorm2d, "4.weight"), finetune_epochs=1).unlearn(
        model, forget, retain
    )
    assert not {"1.weight", "1.bias", "4.weight"} & set(outcome.changed)
    assert all(torch.equal(model.state_dict()[n], before[n]) for n in ("1.weight", "1.bias", "4.weight"))


def test_modes_gradients_and_random_state_are_put_back_and_runs_repeat() -> None:
    results = []
    for _ in range(2):
        model, forget, retain = classifier()
        model[0].bias.requires_grad_(False)
        state = torch.get_rng_state()
        DeepClean(fraction=0.3, fisher="monte_carlo", seed=3).unlearn(model, forget, retain)
        assert torch.equal(torch.get_rng_state(), state)
        assert not any(m.training for m in model.modules())
        assert [p.requires_grad for p in model.parameters()] == [True, False] + [True] * 6
        assert all(p.grad is None for p in model.parameters())
        results.append(weights(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_bfloat16_weights() -> None:
    model, forget, retain = classifier()
    model = model.bfloat16()
    forget, retain = ([(x.bfloat16(), y) for x, y in part] for part in (forget, retain))
    outcome = DeepClean(fraction=0.3).unlearn(model, forget, retain)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert outcome.details["share_reset"] == pytest.approx(0.3, abs=0.01)


class ArgMax(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).argmax(1)


def with_nan(model: nn.Module) -> nn.Module:
    next(model.parameters()).data.view(-1)[0] = torch.nan
    return model


def mean_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets)


Change = Callable[[nn.Module, Any, Any], tuple[nn.Module, Any, Any]]
BAD: dict[str, tuple[dict[str, Any], Change, type[Exception], str]] = {
    "empty forget": ({}, lambda m, f, r: (m, [], r), ValueError, "forget is empty"),
    "empty retain": ({}, lambda m, f, r: (m, f, []), ValueError, "retain is empty"),
    "retain read once": ({}, lambda m, f, r: (m, f, iter(r)), TypeError, "retain is an iterator"),
    "scalar loss": ({"loss_fn": mean_loss}, lambda m, f, r: (m, f, r), ValueError, "one loss per sample"),
    "integer outputs": ({}, lambda m, f, r: (ArgMax(m), f, r), TypeError, "class indices"),
    "NaN weights": ({}, lambda m, f, r: (with_nan(m), f, r), ValueError, "holds NaN"),
    "train mode": ({}, lambda m, f, r: (m.train(), f, r), ValueError, "model.eval"),
    "mismatched shapes": ({}, lambda m, f, r: (m, [(x, y[:-1]) for x, y in f], r), ValueError, "first axis"),
    "mismatched dtypes": (
        {},
        lambda m, f, r: (m, f, [(x.double(), y) for x, y in r]),
        RuntimeError,
        "dtype|type",
    ),
    "unknown name": ({"protect": ("nowhere",)}, lambda m, f, r: (m, f, r), ValueError, "nowhere"),
    "all protected": (
        {"protect": (nn.Module,)},
        lambda m, f, r: (m, f, r),
        ValueError,
        "no weight to reset",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_any_weight_changes(name: str) -> None:
    options, change, error, message = BAD[name]
    model, forget, retain = change(*classifier())
    before = weights(model)
    with pytest.raises(error, match=message):
        DeepClean(fraction=0.3, **options).unlearn(model, forget, retain)
    assert unchanged(model, before)


def test_an_interrupt_while_fine_tuning_puts_the_weights_back() -> None:
    model, forget, retain = classifier()
    before = weights(model)
    passes = 0

    class Interrupted(list[Any]):
        def __iter__(self) -> Any:
            nonlocal passes
            passes += 1
            for i, batch in enumerate(super().__iter__()):
                if passes == 2 and i == 2:  # the first pass is for the Fisher information
                    raise KeyboardInterrupt
                yield batch

    with pytest.raises(KeyboardInterrupt):
        DeepClean(fraction=0.3, finetune_epochs=2).unlearn(model, forget, Interrupted(retain))
    assert passes == 2
    assert unchanged(model, before)
    assert not any(m.training for m in model.modules())


def test_a_model_on_two_devices_is_refused() -> None:
    model, forget, retain = classifier()
    model[4].to("meta")
    with pytest.raises(ValueError, match="on one device, found cpu, meta"):
        DeepClean().unlearn(model, forget, retain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 0.0}, "gamma must be a positive number"),
        ({"gamma": -1.0}, "gamma must be"),
        ({"gamma": float("nan")}, "gamma must be"),
        ({"gamma": 1.0, "fraction": 0.1}, "not both"),
        ({"fraction": 0.0}, "between 0 and 1"),
        ({"fraction": 1.0}, "between 0 and 1"),
        ({"floor": -1.0}, "not be negative"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeepClean(**options)
