"""Relearn time: a hand-written loop, planted truth, and sets and models of awkward kinds."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator

import pytest
import torch
from models import Pairs, classifier, pairs, unchanged, weights
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fastunlearn import evaluate
from fastunlearn.evaluate.relearn import Relearn, anamnesis_index, relearn_time
from fastunlearn.methods.baselines import initialise


def task(cls: int = 2) -> tuple[nn.Module, Pairs, Pairs]:
    """The trained classifier, the samples of one class, and those of the others."""
    model, forget, retain = classifier()
    x, y = (torch.cat(parts) for parts in zip(*forget, *retain, strict=True))
    return model, pairs(x[y == cls], y[y == cls], 16), pairs(x[y != cls], y[y != cls], 16)


def silenced(model: nn.Module, cls: int = 2) -> nn.Module:
    quiet = copy.deepcopy(model)
    with torch.no_grad():
        quiet[6].weight[cls] = 0.0
        quiet[6].bias[cls] = -5.0
    return quiet


def test_a_class_whose_head_was_silenced_comes_back_sooner_than_it_is_learnt_afresh() -> None:
    model, forget, retain = task()
    goal = evaluate(model, forget=forget).accuracy["forget"]
    quiet = silenced(model)
    assert evaluate(quiet, forget=forget).accuracy["forget"] == 0.0
    back = relearn_time(quiet, forget, threshold=goal, margin=5.0, retain=retain, lr=0.001)
    assert back.steps is not None and back.steps > 3
    for seed in range(3):
        fresh = copy.deepcopy(model)
        torch.manual_seed(seed)
        initialise(fresh)
        afresh = relearn_time(fresh, forget, threshold=goal, margin=5.0, retain=retain, lr=0.001)
        assert afresh.steps is not None and back.steps < afresh.steps / 2
        assert anamnesis_index(back, afresh) == back.steps / afresh.steps


def test_the_steps_are_those_of_a_hand_written_loop() -> None:
    model, forget, retain = task()
    quiet = silenced(model)
    found = relearn_time(quiet, forget, threshold=90.0, retain=retain, lr=0.002, momentum=0.5, max_steps=60)

    student = copy.deepcopy(quiet).eval()
    x, y = (torch.cat(parts) for parts in zip(*forget, strict=True))
    curve, speed = [], [torch.zeros_like(p) for p in student.parameters()]
    for step in range(61):
        curve.append((step, 100 * float((student(x).argmax(1) == y).double().mean())))
        if curve[-1][1] >= 90.0:
            break
        (a, b), (c, d) = forget[step % len(forget)], retain[step % len(retain)]
        loss = (F.cross_entropy(student(a), b) + F.cross_entropy(student(c), d)) / 2
        with torch.no_grad():
            for p, v, g in zip(
                student.parameters(), speed, torch.autograd.grad(loss, student.parameters()), strict=True
            ):
                p -= 0.002 * v.mul_(0.5).add_(g)
    assert found.steps == len(curve) - 1 > 3
    assert found.curve == curve


def test_a_threshold_on_the_loss() -> None:
    model, forget, _ = task()
    goal = evaluate(model, forget=forget).loss["forget"]
    found = relearn_time(silenced(model), forget, threshold=goal, margin=0.1, by="loss", max_steps=200)
    assert found.steps == found.curve[-1][0]
    losses = [loss for _, loss in found.curve]
    assert losses[-1] <= goal + 0.1 < min(losses[:-1])
    assert losses[0] == evaluate(silenced(model), forget=forget).loss["forget"]


def test_what_was_never_forgotten_takes_no_step_and_what_never_comes_back_has_no_number() -> None:
    model, forget, _ = task()
    accuracy = evaluate(model, forget=forget).accuracy["forget"]
    assert relearn_time(model, forget, threshold=accuracy).steps == 0
    slow = relearn_time(silenced(model), forget, threshold=accuracy, lr=1e-6, max_steps=5)
    assert slow.steps is None
    assert slow.curve == [(step, 0.0) for step in range(6)]
    assert anamnesis_index(slow, relearn_time(model, forget, threshold=accuracy)) is None


def test_measuring_every_few_steps_changes_nothing_but_the_resolution() -> None:
    model, forget, _ = task()
    fine, coarse = (relearn_time(silenced(model), forget, threshold=80.0, lr=0.0005, every=n) for n in (1, 3))
    assert fine.steps is not None and coarse.steps == 3 * math.ceil(fine.steps / 3)
    assert coarse.curve[:-1] == fine.curve[:-1:3][: len(coarse.curve) - 1]
    last = relearn_time(silenced(model), forget, threshold=100.0, lr=1e-6, every=3, max_steps=4)
    assert [step for step, _ in last.curve] == [0, 3, 4]


def test_batches_are_split_into_steps_of_the_asked_size() -> None:
    model, forget, _ = task()  # 40 samples in batches of 16, 16 and 8
    split = relearn_time(silenced(model), forget, threshold=95.0, lr=0.0002, batch_size=6)
    pieces = [piece for x, y in forget for piece in pairs(x, y, 6)]
    assert [len(y) for _, y in pieces] == [6, 6, 4, 6, 6, 4, 6, 2]
    given = relearn_time(silenced(model), pieces, threshold=95.0, lr=0.0002)
    assert split.steps == given.steps is not None and len(pieces) < split.steps
    assert split.curve == given.curve


def test_a_shuffled_loader_gives_the_same_run_twice_and_leaves_the_random_state() -> None:
    model, forget, retain = task()
    x, y = (torch.cat(parts) for parts in zip(*retain, strict=True))
    loader = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
    random = torch.get_rng_state()

    def run(seed: int) -> Relearn:
        return relearn_time(
            silenced(model), forget, threshold=1e-4, by="loss", retain=loader, max_steps=20, lr=0.005, seed=seed
        )

    first = run(0)
    torch.manual_seed(5)
    assert run(0) == first != run(1)
    torch.set_rng_state(random)
    run(0)
    assert torch.equal(torch.get_rng_state(), random)


def test_the_model_is_untouched() -> None:
    model, forget, retain = task()
    quiet = silenced(model).train()
    quiet[6].bias.grad = grad = torch.ones(4)
    before = weights(quiet)
    with torch.no_grad():
        found = relearn_time(quiet, forget, threshold=90.0, retain=retain)
    assert found.steps
    assert quiet.training and unchanged(quiet, before) and quiet[6].bias.grad is grad
    assert all(p.grad is None for name, p in quiet.named_parameters() if name != "6.bias")


def test_one_sample_behind_batch_norm_and_dropout_in_a_dict() -> None:
    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.body(x)
            return y

    sample = [{"x": torch.ones(1, 3), "labels": torch.tensor([1])}]
    model = Called()
    with torch.no_grad():
        model.body[3].bias.copy_(torch.tensor([3.0, 0.0]))
    found = relearn_time(model, sample, threshold=100.0)
    assert found.steps and found.curve[0] == (0, 0.0) and found.curve[-1] == (found.steps, 100.0)


def test_frozen_parameters_stay_and_a_frozen_model_is_refused() -> None:
    model, forget, _ = task()
    quiet = silenced(model)
    for name, parameter in quiet.named_parameters():
        parameter.requires_grad_(name == "6.bias")
    # Only the bias can move: the class comes back by being said of everything.
    assert relearn_time(quiet, forget, threshold=90.0, max_steps=300, lr=0.05).steps
    with pytest.raises(ValueError, match=r"no parameter of the model requires grad"):
        relearn_time(quiet.requires_grad_(False), forget, threshold=90.0)


def test_a_run_that_diverges_has_not_relearnt() -> None:
    model, forget, _ = task()
    found = relearn_time(silenced(model), forget, threshold=1e-9, by="loss", lr=1e20, max_steps=50)
    assert found.steps is None and len(found.curve) < 50
    back = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert back["curve"][0] == [0, found.curve[0][1]] and back["by"] == "loss"


def test_anamnesis_index_needs_the_same_threshold() -> None:
    fast, slow = Relearn(3, [], 90.0, "accuracy"), Relearn(12, [], 90.0, "accuracy")
    assert anamnesis_index(fast, slow) == 0.25
    assert anamnesis_index(slow, Relearn(0, [], 90.0, "accuracy")) is None
    with pytest.raises(ValueError, match=r"different thresholds: accuracy 90 and loss 90"):
        anamnesis_index(fast, Relearn(12, [], 90.0, "loss"))


def test_what_makes_no_sense_is_refused() -> None:
    model, forget, _ = task()

    def once() -> Iterator[tuple[Tensor, Tensor]]:
        yield from forget

    with pytest.raises(ValueError, match=r'accuracy in percent, 0 to 100, got 101.*by="loss"'):
        relearn_time(model, forget, threshold=101.0)
    with pytest.raises(ValueError, match=r"threshold must be finite and margin not negative, got nan"):
        relearn_time(model, forget, threshold=math.nan)
    with pytest.raises(ValueError, match=r"margin not negative, got 90.0 and -1"):
        relearn_time(model, forget, threshold=90.0, margin=-1.0)
    with pytest.raises(ValueError, match=r"by must be"):
        relearn_time(model, forget, threshold=90.0, by="auc")  # type: ignore[arg-type]
    for name in ("max_steps", "every", "batch_size"):
        with pytest.raises(ValueError, match=rf"{name} must be 1 or more, got 0"):
            relearn_time(model, forget, threshold=90.0, **{name: 0})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"forget is an iterator"):
        relearn_time(model, once(), threshold=90.0)
    with pytest.raises(ValueError, match=r"forget is empty"):
        relearn_time(model, [], threshold=90.0)
    with pytest.raises(ValueError, match=r"retain is empty"):
        relearn_time(silenced(model), forget, threshold=90.0, retain=[])
    with pytest.raises(TypeError, match=r"targets of forget must be class indices"):
        relearn_time(model, [(x, F.one_hot(y, 4).float()) for x, y in forget], threshold=90.0)
