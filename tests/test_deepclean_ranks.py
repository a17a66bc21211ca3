"""DeepClean on several ranks resets exactly the weights that it resets on one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from ranks import on_ranks
from test_fisher_ranks import MODELS, batches_for, place, whole
from torch import Tensor, nn

import fastunlearn as fu
from fastunlearn.parallel.deal import deal
from fastunlearn.parallel.ranks import local, unwrapped

FORGET, RETAIN = [3, 2], [4, 3, 4, 2, 1]
SETTINGS: dict[str, dict[str, Any]] = {
    "reset": {"fraction": 0.2, "finetune_epochs": 0},
    "sgd": {"fraction": 0.2, "finetune_epochs": 2, "lr": 0.05},
    "adamw": {"fraction": 0.1, "per_layer": True, "optimizer": "adamw", "lr": 0.01},
    "mean": {"gamma": 1.5, "reset": "mean", "finetune_epochs": 0, "passes": 3},
    "bfloat16": {"fraction": 0.2, "fisher_dtype": torch.bfloat16, "finetune_epochs": 0, "fisher_samples": 5},
}


def sets(name: str, spread: Any) -> tuple[Any, Any]:
    forget, retain = batches_for(name, FORGET), batches_for(name, [*FORGET, *RETAIN])[2:]
    return spread(forget), spread(retain)


def unlearned(model: nn.Module, name: str, settings: dict[str, Any], spread: Any) -> tuple[dict[str, Tensor], Any, Any]:
    forget, retain = sets(name, spread)
    outcome = fu.DeepClean(**settings).unlearn(model, forget, retain)
    weights = {n: whole(p.detach()).clone() for n, p in unwrapped(model).named_parameters()}
    return weights, outcome.changed, outcome.details


def on_rank(rank: int, name: str, how: str, cases: list[str]) -> Any:
    return {case: unlearned(place(MODELS[name](), how), name, SETTINGS[case], deal) for case in cases}


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_masks_and_gamma_are_those_of_one_process(name: str, how: str, size: int) -> None:
    """Masks and gamma bit for bit, weights too where nothing is trained afterwards; else to rounding."""
    cases = list(SETTINGS) if size < 4 else ["sgd", "bfloat16"]
    found = on_ranks(size, on_rank, name, how, cases)
    for case in cases:
        alone, changed, details = unlearned(MODELS[name](), name, SETTINGS[case], list)
        for ranks in found:
            weights, resets, said = ranks[case]
            assert resets == changed
            assert said == details
            for key, value in alone.items():
                if case == "sgd" or case == "adamw":
                    untouched = value == dict(MODELS[name]().named_parameters())[key]
                    assert torch.equal(weights[key][untouched], value[untouched])
                    torch.testing.assert_close(weights[key], value, rtol=2e-4, atol=2e-6)
                elif case != "mean":
                    assert torch.equal(weights[key], value), (case, key)
                else:
                    torch.testing.assert_close(weights[key], value, rtol=1e-6, atol=1e-8)
