"""DeepClean on several ranks resets exactly the weights that it resets on one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import on_ranks
from test_fisher_ranks import MODELS, batches_for, gpt2, llama, mlp, place, whole
from torch import Tensor, nn

import fastunlearn as fu
from fastunlearn import ops
from fastunlearn.methods.baselines import FineTune, GradientAscent, Retrain
from fastunlearn.methods.training import descend
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


WAYS = [
    (size, name, how) for size in (1, 2, 4) for name in MODELS for how in ("ddp", "fsdp") if size > 1 or name == "gpt2"
]


@pytest.mark.parametrize(("size", "name", "how"), WAYS)
def test_masks_and_gamma_are_those_of_one_process(size: int, name: str, how: str) -> None:
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


def others_on_rank(rank: int, how: str) -> Any:
    return [other(place(mlp(), how), method, deal) for method in OTHERS]


def other(model: nn.Module, method: Any, spread: Any) -> tuple[dict[str, Tensor], dict[str, int]]:
    forget, retain = sets("mlp", spread)
    outcome = method.unlearn(model, forget=forget, retain=retain)
    return {n: whole(p.detach()).clone() for n, p in unwrapped(model).named_parameters()}, outcome.changed


OTHERS = [
    fu.SelectiveSynapticDampening(alpha=1.2),
    FineTune(epochs=2, lr=0.05),
    GradientAscent(epochs=1, lr=0.01),
    fu.DeepClean(fraction=0.3, offload=True, finetune_epochs=0),
]


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_other_methods_end_where_one_process_ends(how: str) -> None:
    alone = [other(mlp(), method, list) for method in OTHERS]
    for found in on_ranks(3, others_on_rank, how):
        for (weights, changed), (truth, count) in zip(found, alone, strict=True):
            assert changed == count
            for key, value in truth.items():
                torch.testing.assert_close(weights[key], value, rtol=1e-4, atol=1e-6)


def validated_on_rank(rank: int, how: str) -> Any:
    return validated(place(mlp(), how), deal)


def validated(model: nn.Module, spread: Any) -> Any:
    forget, retain = sets("mlp", spread)
    method = fu.DeepClean(fraction=0.3, finetune_epochs=6, lr=0.3, patience=1)
    outcome = method.unlearn(model, forget, retain, validation=spread(batches_for("mlp", [2, 3])))
    return outcome.details["epochs"], outcome.details["validation_loss"]


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_patience_looks_at_the_validation_samples_of_all_ranks(how: str) -> None:
    epochs, losses = validated(mlp(), list)
    for found in on_ranks(3, validated_on_rank, how):
        assert found[0] == epochs
        assert found[1] == pytest.approx(losses, rel=1e-5)


def diverging_on_rank(rank: int, how: str) -> Any:
    model = place(mlp(), how)
    before = {n: whole(p.detach()).clone() for n, p in unwrapped(model).named_parameters()}
    forget, retain = sets("mlp", deal)
    with pytest.raises(FloatingPointError) as error:
        fu.DeepClean(fraction=0.3, finetune_epochs=9, lr=1e30).unlearn(model, forget, retain)
    after = {n: whole(p.detach()) for n, p in unwrapped(model).named_parameters()}
    return str(error.value), all(torch.equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_diverging_puts_every_shard_back_and_raises_on_every_rank(how: str) -> None:
    messages = on_ranks(2, diverging_on_rank, how)
    assert all(restored for _, restored in messages)
    assert len({message for message, _ in messages}) == 1
    assert "lower the learning rate" in messages[0][0]


def parallel_on_rank(rank: int) -> Any:
    """What was reset, and what one process resets by the information that the ranks found."""
    forget, retain = (batches_for("llama", sizes) for sizes in (FORGET, RETAIN))
    found = [
        {n: whole(v) for n, v in fu.fisher_diagonal(place(llama(), "tp"), part).items()} for part in (forget, retain)
    ]
    model = place(llama(), "tp")
    outcome = fu.DeepClean(fraction=0.2, finetune_epochs=0).unlearn(model, forget, retain)
    plain = dict(llama().named_parameters())
    names = list(plain)
    of = [[part[name] for name in names] for part in found]
    floors = 0.1 * torch.stack([r.mean(dtype=torch.float64) for r in of[1]])
    gamma = ops.select_gamma(of[0], of[1], 0.2, floors)
    weights = [plain[name].detach() for name in names]
    _, counts = ops.threshold_reset_(weights, of[0], of[1], gamma, eps=floors)
    same = all(torch.equal(whole(model.get_parameter(n).detach()), w) for n, w in zip(names, weights, strict=True))
    kept = {n: c for n, c in zip(names, counts.tolist(), strict=True) if c}
    return same, outcome.changed == kept, outcome.details["gamma"] == float(gamma)


def test_tensor_parallel_ranks_count_a_weight_once() -> None:
    """Sharded ones where they are, those that every rank holds on the first."""
    assert on_ranks(2, parallel_on_rank) == [(True, True, True)] * 2


def refused_on_rank(rank: int) -> str:
    with pytest.raises(ValueError) as error:
        fu.DeepClean(fraction=0.3, reset="init").unlearn(place(mlp(), "fsdp"), *sets("mlp", deal))
    return str(error.value)


def test_fresh_values_are_refused_for_shards() -> None:
    assert all('reset="init"' in message for message in on_ranks(2, refused_on_rank))


@pytest.mark.parametrize("passes", [2, 5, 99])
def test_passes_reset_what_one_pass_resets(passes: int) -> None:
    forget, retain = sets("gpt2", list)
    settings: dict[str, Any] = {"gamma": 1.3, "finetune_epochs": 0}
    one, several = gpt2(), gpt2()
    said = fu.DeepClean(**settings).unlearn(one, forget, retain)
    found = fu.DeepClean(**settings, passes=passes).unlearn(several, forget, retain)
    assert (found.changed, found.details) == (said.changed, said.details)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), several.parameters(), strict=True))


def test_passes_need_a_gamma_of_their_own() -> None:
    with pytest.raises(ValueError, match="give gamma, or per_layer"):
        fu.DeepClean(fraction=0.1, passes=2)


def scheduled_on_rank(rank: int, how: str) -> Any:
    """Dealt batches, then a rank with one batch of its own beside another with four."""
    dealt = scheduled(place(mlp(), how), deal)
    own = scheduled(place(mlp(), how), lambda batches: batches[:1] if rank == 0 else batches[1:])
    return dealt, own


def scheduled(model: nn.Module, spread: Any) -> dict[str, Tensor]:
    forget, retain = sets("mlp", spread)
    fu.DeepClean(fraction=0.3, finetune_epochs=3, lr=0.05, cosine=True).unlearn(model, forget, retain)
    return {n: whole(p.detach()).clone() for n, p in unwrapped(model).named_parameters()}


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_learning_rates_fall_alike_on_all_ranks(how: str) -> None:
    """Over the steps that are taken, which are more than the batches of one rank."""
    alone = scheduled(mlp(), list)
    (dealt, own), (_, others) = on_ranks(2, scheduled_on_rank, how)
    for key, value in alone.items():
        torch.testing.assert_close(dealt[key], value, rtol=2e-4, atol=2e-6)
        assert torch.equal(own[key], others[key])


def retrained_on_rank(rank: int, how: str) -> Any:
    model = place(mlp(), how)
    if how == "fsdp":
        with pytest.raises(ValueError, match="pass build="):
            retrained(model, deal, None)
    return retrained(model, deal, lambda: place(mlp(), how))


def retrained(model: nn.Module, spread: Any, build: Any) -> dict[str, Tensor]:
    Retrain(epochs=2, build=build).unlearn(model, None, spread(batches_for("mlp", RETAIN)))
    return {n: whole(p.detach()).clone() for n, p in unwrapped(model).named_parameters()}


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_retraining_takes_the_steps_of_one_process(how: str) -> None:
    alone = retrained(mlp(), list, mlp)
    for weights in on_ranks(2, retrained_on_rank, how):
        for key, value in alone.items():
            torch.testing.assert_close(weights[key], value, rtol=1e-3, atol=1e-4)


class Spare(nn.Module):
    """Half of its weights are never used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used, self.spare = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.used(x)
        return found


def spare_on_rank(rank: int) -> Any:
    model = nn.parallel.DistributedDataParallel(Spare(), find_unused_parameters=True)
    return FineTune(epochs=2).unlearn(model, None, deal(batches_for("mlp", RETAIN))).changed


def test_replicas_may_leave_weights_unused_if_their_engine_was_told() -> None:
    assert on_ranks(2, spare_on_rank) == [{"used.weight": 15, "used.bias": 3}] * 2


def tuned_in_parallel_on_rank(rank: int) -> Any:
    """All weights, the table among them: how far they are from those of one process, and whether all have moved."""
    batches = batches_for("llama", RETAIN)
    models = place(llama(), "tp"), llama()
    for model in models:
        masks = [torch.full((-(-local(p).numel() // 32),), -1, dtype=torch.int32) for p in model.parameters()]
        descend(model, batches, "retain", fu.MaskedSGD(list(model.parameters()), masks, lr=0.1), 2)
    pairs = list(zip(*(model.parameters() for model in models), llama().parameters(), strict=True))
    for found, truth, _ in pairs:
        torch.testing.assert_close(whole(found.detach()), truth.detach(), rtol=1e-3, atol=1e-5)
    return all(not torch.equal(truth, before) for _, truth, before in pairs)


def test_tensor_parallel_weights_are_tuned_as_on_one_process() -> None:
    assert on_ranks(2, tuned_in_parallel_on_rank) == [True, True]
