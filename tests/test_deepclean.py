"""DeepClean: what is reset, what stays, and what is refused."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import classifier, unchanged, weights
from torch import Tensor, nn
from torch.nn import functional as F

from fastunlearn import DeepClean, MaskedAdamW, MaskedSGD, SelectiveSynapticDampening, fisher_diagonal, ops, reference
from fastunlearn.evaluate import Metrics, evaluate
from fastunlearn.methods.baselines import initialise
from fastunlearn.methods.explanation import Sweep, SweepPoint
from fastunlearn.methods.importance import candidates
from fastunlearn.outcome import Outcome


def test_resets_exactly_the_weights_whose_ratio_passes_gamma() -> None:
    model, forget, retain = classifier()
    before = weights(model)
    forgotten, retained = fisher_diagonal(model, forget), fisher_diagonal(model, retain)
    outcome = DeepClean(gamma=2.0, floor=0.5, finetune_epochs=0).unlearn(model, forget, retain)
    for name, parameter in model.named_parameters():
        reset = reference.importance_ratio(forgotten[name], retained[name], 0.5 * float(retained[name].mean())) > 2
        assert torch.equal(parameter, before[name].masked_fill(reset, 0)), name
        assert outcome.changed.get(name, 0) == int(reset.sum())


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.9])
def test_fraction_counts_live_weights_over_all_tensors(fraction: float) -> None:
    model, forget, retain = classifier()
    outcome = DeepClean(fraction=fraction, finetune_epochs=0).unlearn(model, forget, retain)
    both = fisher_diagonal(model := classifier()[0], forget), fisher_diagonal(model, retain)
    live = sum(int(((both[0][name] > 0) | (both[1][name] > 0)).sum()) for name in both[0])
    assert live < sum(p.numel() for p in model.parameters())
    assert outcome.details["live"] == live == sum(count for _, count in outcome.details["ratios"])
    # Ratios are float32 numbers of a few hundred values of information: none is shared here.
    assert sum(outcome.changed.values()) == round(fraction * live)
    assert outcome.details["share_reset"] == pytest.approx(fraction, abs=1 / live)


def test_per_layer_takes_the_fraction_from_every_tensor() -> None:
    model, forget, retain = classifier()
    outcome = DeepClean(fraction=0.25, per_layer=True, finetune_epochs=0).unlearn(model, forget, retain)
    explanation = DeepClean(fraction=0.25, per_layer=True).explain(classifier()[0], forget, retain)
    for layer in explanation.layers:
        assert layer.reset == round(0.25 * layer.live) == outcome.changed.get(layer.name, 0)
    assert set(outcome.details["gamma"]) == set(dict(model.named_parameters()))


@pytest.mark.parametrize("reset", ["zero", "mean", "init"])
def test_what_reset_weights_are_reset_to(reset: Any) -> None:
    model, forget, retain = classifier()
    before = weights(model)
    state = torch.get_rng_state()
    outcome = DeepClean(fraction=0.3, reset=reset, finetune_epochs=0, seed=4).unlearn(model, forget, retain)
    assert torch.equal(torch.get_rng_state(), state)
    zeroed, *_ = classifier()
    DeepClean(fraction=0.3, finetune_epochs=0).unlearn(zeroed, forget, retain)
    torch.manual_seed(4)
    fresh, *_ = classifier()
    initialise(fresh)
    for name, parameter in model.named_parameters():
        mask = (zeroed.get_parameter(name) == 0) & (before[name] != 0)
        goal = {"zero": torch.zeros(()), "mean": before[name].mean(), "init": fresh.get_parameter(name)}[reset]
        assert torch.equal(parameter, torch.where(mask, goal, before[name])), name
    assert outcome.settings["reset"] == reset


TUNING: dict[str, dict[str, Any]] = {
    "SGD": {},
    "weight decay": {"weight_decay": 0.1},
    "AdamW": {"optimizer": "adamw", "weight_decay": 0.1, "lr": 1e-3},
    "cosine": {"cosine": True},
    "dropout": {"dropout": True},
    "autocast": {"autocast": torch.bfloat16},
    "init": {"reset": "init"},
}


@pytest.mark.parametrize("name", TUNING)
def test_only_reset_weights_move_in_fine_tuning(name: str) -> None:
    model, forget, retain = classifier()
    before = weights(model)
    untuned, *_ = classifier()
    reset = TUNING[name].get("reset", "zero")
    DeepClean(fraction=0.3, finetune_epochs=0, reset=reset).unlearn(untuned, forget, retain)
    DeepClean(fraction=0.3, finetune_epochs=3, **TUNING[name]).unlearn(model, forget, retain)
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


def test_fine_tuning_under_autocast_sees_every_step() -> None:
    """Autocast keeps its casts of the weights as long as its context is open."""
    losses = []
    for dtype in (None, torch.bfloat16):
        model, forget, retain = classifier()
        DeepClean(fraction=0.4, finetune_epochs=5, lr=0.05, autocast=dtype).unlearn(model, forget, retain)
        with torch.no_grad():
            losses.append(sum(float(F.cross_entropy(model(x), y, reduction="sum")) for x, y in retain))
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


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


def test_fisher_samples_bounds_what_is_read_of_the_retained_data() -> None:
    model, forget, retain = classifier()
    outcome = DeepClean(gamma=2.0, fisher_samples=33, finetune_epochs=0).unlearn(model, forget, retain)
    other, *_ = classifier()
    assert len(retain[0][1]) < 33 <= sum(len(y) for _, y in retain[:2])
    expected = DeepClean(gamma=2.0, finetune_epochs=0).unlearn(other, forget, retain[:2])
    assert outcome.changed == expected.changed
    assert unchanged(model, weights(other))


def test_dropout_fine_tunes_with_noise_from_the_seed() -> None:
    def tuned(**options: Any) -> dict[str, Tensor]:
        model, forget, retain = classifier()
        model.insert(6, nn.Dropout(0.5))
        model.eval()
        DeepClean(fraction=0.3, **options).unlearn(model, forget, retain)
        assert not any(m.training for m in model.modules())
        return weights(model)

    off, on, again, other = tuned(), tuned(dropout=True), tuned(dropout=True), tuned(dropout=True, seed=1)
    assert all(torch.equal(on[k], again[k]) for k in on)
    assert any(not torch.equal(on[k], off[k]) for k in on)
    assert any(not torch.equal(on[k], other[k]) for k in on)
    assert all(torch.equal(on[k], off[k]) for k in on if "running" in k or "batches" in k)


def test_early_stop_keeps_the_weights_with_the_lowest_validation_loss() -> None:
    model, forget, retain = classifier()
    rest = retain[1:]
    validation = [(x, torch.where(torch.arange(len(y)) % 4 == 0, (y + 1) % 4, y)) for x, y in retain[:1]]
    options: dict[str, Any] = {"fraction": 0.4, "lr": 0.02}
    outcome = DeepClean(**options, finetune_epochs=30, patience=2).unlearn(model, forget, rest, validation)
    losses = outcome.details["validation_loss"]
    best = losses.index(min(losses)) + 1
    assert outcome.details["epochs"] == len(losses) == best + 2 < 30
    same, *_ = classifier()
    DeepClean(**options, finetune_epochs=best).unlearn(same, forget, rest)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))


def small_vit() -> nn.Module:
    class Vit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(1, 8, 2, 2)
            self.position = nn.Parameter(0.1 * torch.randn(1, 9, 8))
            self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
            self.head = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block(self.patches(x).flatten(2).mT + self.position).mean(1))

    torch.manual_seed(0)
    return Vit().eval()


@pytest.mark.filterwarnings("ignore:.*sample by sample")
@pytest.mark.parametrize("samples", [1, 20])
def test_a_vision_transformer_and_a_single_sample(samples: int) -> None:
    _, forget, retain = classifier()
    forget = [(forget[0][0][:samples], forget[0][1][:samples])]
    model = small_vit()
    before = weights(model)
    outcome = DeepClean(fraction=0.2, finetune_epochs=2, dropout=True).unlearn(model, forget, retain)
    assert outcome.details["share_reset"] == pytest.approx(0.2, abs=0.01)
    reset = sum(outcome.changed.values())
    moved = sum(int((p != before[name]).sum()) for name, p in model.named_parameters())
    assert 0 < moved <= reset


def test_a_sweep_leaves_the_model_and_each_point_is_an_unlearning_of_its_own() -> None:
    model, forget, retain = classifier()
    before = weights(model)
    test = retain[-1:]
    method = DeepClean(finetune_epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sweep = method.sweep(model, forget, retain, gammas=[2.0], fractions=[0.1, 0.6], test=test)
    assert unchanged(model, before)
    for point, options in zip(sweep.points, [{"gamma": 2.0}, {"fraction": 0.1}, {"fraction": 0.6}], strict=True):
        alone, *_ = classifier()
        outcome = DeepClean(finetune_epochs=1, **options).unlearn(alone, forget, retain)
        assert point.outcome.changed == outcome.changed
        assert point.outcome.settings == outcome.settings
        assert point.metrics == evaluate(alone, forget=forget, retain=retain, test=test)
        assert point.retain_gap == abs(point.metrics.accuracy["retain"] - sweep.original.accuracy["retain"])
    assert str(sweep).count("\n") == 3
    assert json.loads(json.dumps(sweep.as_dict()))["points"][0]["settings"]["gamma"] == 2.0


def point(forget_gap: float, retain_gap: float) -> SweepPoint:
    return SweepPoint(Outcome("DeepClean", {}), Metrics({}, {}), forget_gap, retain_gap, None)


def test_the_front_holds_what_nothing_beats_in_both_gaps() -> None:
    points = [point(*gaps) for gaps in [(5, 1), (1, 5), (3, 3), (4, 4), (1, 6), (5, 0.5), (6, 0.5)]]
    front = Sweep(Metrics({}, {}), points, 0.0).front()
    assert [(p.forget_gap, p.retain_gap) for p in front] == [(1, 5), (3, 3), (5, 0.5)]


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        (Metrics({"forget": 60.0, "retain": 99.0}, {}, 0.5, {"forget": -25.0, "retain": 0.0}), "below the reference's"),
        (Metrics({"forget": 84.9, "retain": 99.0}, {}, 0.5, {"forget": -0.1, "retain": 0.0}), None),
        (Metrics({"forget": 90.0, "retain": 99.0, "test": 90.0}, {}, 0.40), "by their high loss"),
        (Metrics({"forget": 60.0, "retain": 99.0, "test": 90.0}, {}, 0.5), "below that on the test set"),
        (Metrics({"forget": 95.0, "retain": 99.0, "test": 90.0}, {}, 0.55), None),
    ],
)
def test_over_unlearning_is_warned_of(metrics: Metrics, expected: str | None) -> None:
    outcome = Outcome("DeepClean", {}, details={"gamma": 1.5})
    before = Metrics({"forget": 99.0, "retain": 99.0}, {})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = SweepPoint.of(outcome, metrics, before, samples=1000)
    if expected is None:
        assert made.warning is None and not caught
    else:
        assert made.warning is not None and expected in made.warning
        assert len(caught) == 1 and "over-unlearned" in str(caught[0].message)


@pytest.mark.parametrize(
    ("options", "message"), [({"gammas": [1.0]}, "how much is enough"), ({"test": []}, "nothing to sweep")]
)
def test_a_sweep_without_thresholds_or_yardstick_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeepClean().sweep(*classifier(), **options)


def test_explain_says_what_unlearn_would_reset(tmp_path: Path) -> None:
    model, forget, retain = classifier()
    before = weights(model)
    explanation = DeepClean(fraction=0.3).explain(model, forget, retain)
    assert unchanged(model, before)
    outcome = DeepClean(fraction=0.3, finetune_epochs=0).unlearn(model, forget, retain)
    assert {layer.name: layer.reset for layer in explanation.layers if layer.reset} == outcome.changed
    assert explanation.gamma == outcome.details["gamma"]
    assert sum(layer.live for layer in explanation.layers) == outcome.details["live"]
    for layer in explanation.layers:
        assert int(layer.histogram.sum()) == layer.live <= layer.weights
        assert layer.name in str(explanation)
    explanation.picture(tmp_path / "layers.svg")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        DeepClean(finetune_epochs=0).sweep(model, forget, retain, fractions=[0.1], test=retain).picture(
            tmp_path / "sweep.png"
        )
    assert (tmp_path / "layers.svg").read_text().count("<text") > 0
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_dampening_shrinks_what_passes_alpha_and_nothing_else() -> None:
    model, forget, retain = classifier()
    before = weights(model)
    forgotten, retained = fisher_diagonal(model, forget), fisher_diagonal(model, retain)
    outcome = SelectiveSynapticDampening(alpha=2.0, dampening=0.5).unlearn(model, forget, retain)
    for name, parameter in model.named_parameters():
        ratio = forgotten[name].double() / retained[name].double()
        expected = before[name].double() * torch.where(ratio > 2, (0.5 / ratio).clamp(max=1), 1.0)
        torch.testing.assert_close(parameter.double(), expected, rtol=1e-6, atol=0)
        assert torch.equal(parameter[~(ratio > 2)], before[name][~(ratio > 2)])
        assert outcome.changed.get(name, 0) == int((ratio > 2).sum())


@pytest.mark.parametrize("options", [{"alpha": 0.0}, {"dampening": -1.0}, {"floor": -1.0}, {"alpha": float("nan")}])
def test_dampening_refuses_settings_that_make_no_sense(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        SelectiveSynapticDampening(**options)


OPTIMIZERS: dict[str, tuple[Any, Any, dict[str, Any], int]] = {
    "SGD": (MaskedSGD, torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.01}, 0),
    "Nesterov": (MaskedSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, 1),
    "AdamW": (MaskedAdamW, torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}, 2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masked_optimizers_follow_torch_and_a_schedule(name: str) -> None:
    torch.manual_seed(0)
    ours_type, theirs_type, options, numbers = OPTIMIZERS[name]
    start, mask = torch.randn(7, 9), torch.rand(7, 9) < 0.5
    everywhere = torch.ones(3, dtype=torch.bool)
    ours, theirs = ([nn.Parameter(start.clone()), nn.Parameter(torch.ones(3))] for _ in range(2))
    mine = ours_type(ours, [ops.pack_mask(mask), ops.pack_mask(everywhere)], **options)
    other = theirs_type(theirs, **options)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (mine, other)]
    floats = [v for v in mine.state[ours[0]].values() if isinstance(v, Tensor) and v.is_floating_point()]
    assert sum(v.numel() for v in floats) == numbers * int(mask.sum())
    for step in range(6):
        for parameters in (ours, theirs):
            parameters[0].grad = torch.sin(start + step)
            # The second one comes late, so that both are at different steps.
            parameters[1].grad = None if step < 2 else torch.ones(3)
        loss = mine.step(lambda: 3.5)
        other.step()
        for schedule in schedules:
            schedule.step()
        if step == 3:  # a copy, and a saved state, go on where the original would
            assert copy.deepcopy(mine).state_dict().keys() == mine.state_dict().keys()
            again = ours_type(ours, [ops.pack_mask(mask), ops.pack_mask(everywhere)], **options)
            again.load_state_dict(mine.state_dict())
            schedules[0].optimizer = again
            mine = again
    assert loss == 3.5
    assert torch.equal(ours[0][~mask], start[~mask])
    torch.testing.assert_close(ours[0][mask], theirs[0][mask])
    torch.testing.assert_close(ours[1], theirs[1])


def test_a_copied_masked_optimizer_steps_and_half_precision_state_survives_loading() -> None:
    weight = nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
    optimizer = MaskedAdamW([weight], [ops.pack_mask(torch.arange(5) < 2)], lr=0.1)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state[weight]["exp_avg"].dtype == torch.float32
    assert optimizer.state[weight]["mask"].dtype == torch.int32
    optimizer.step()
    both = copy.deepcopy((weight, optimizer))
    both[0].grad = torch.ones_like(weight)
    before = both[0].clone()
    both[1].step()
    assert (both[0] != before).tolist() == [True, True, False, False, False]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: MaskedSGD([p], []), "1 parameters but 0 masks"),
        (lambda p: MaskedSGD([p], [ops.pack_mask(p > 0)], momentum=-3), "momentum must"),
        (lambda p: MaskedSGD([p], [ops.pack_mask(p > 0)], nesterov=True), "above 0 with nesterov"),
        (lambda p: MaskedSGD([p], [ops.pack_mask(p > 0)], weight_decay=-1), "weight_decay must"),
        (lambda p: MaskedAdamW([p], [ops.pack_mask(p > 0)], lr=-1.0), "lr must"),
        (lambda p: MaskedAdamW([p], [ops.pack_mask(p > 0)], betas=(1.0, 1.0)), "betas must"),
        (lambda p: MaskedSGD([p], [ops.pack_mask(p > 0)]).add_param_group({"params": [p.clone()]}), "second optimizer"),
    ],
)
def test_masked_optimizers_refuse_what_torch_refuses(make: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(nn.Parameter(torch.ones(3)))


def test_a_shared_weight_is_protected_under_any_of_its_names() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
    model[2].weight = model[0].weight
    assert "2.weight" not in candidates(model, ("2.weight",)) and "0.weight" not in candidates(model, ("2.weight",))
    for wrong in ("0.weight", (nn.Linear(2, 2),), (3,)):
        with pytest.raises(TypeError, match="parameter names and module types"):
            DeepClean(protect=wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="parameter names and module types"):
            SelectiveSynapticDampening(protect=wrong)  # type: ignore[arg-type]


def test_the_callers_autocast_holds_through_fine_tuning() -> None:
    seen = []

    class Watch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.is_autocast_enabled("cpu"))
            return x

    model, forget, retain = classifier()
    model.append(Watch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        DeepClean(fraction=0.3).unlearn(model, forget, retain)
    assert all(seen)


def test_cosine_counts_a_stream_without_a_length() -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(retain)

    model, forget, retain = classifier()
    same, *_ = classifier()
    method = DeepClean(fraction=0.3, cosine=True, finetune_epochs=2)
    method.unlearn(model, forget, torch.utils.data.DataLoader(Stream(), batch_size=None))
    method.unlearn(same, forget, retain)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))


class Counting(nn.Module):
    """Moves a buffer at every forward pass in train mode, as spectral norms and observers do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.passes += 1
        return x


@pytest.mark.filterwarnings("ignore:gamma")
def test_a_sweep_puts_every_buffer_back() -> None:
    model, forget, retain = classifier()
    model.append(Counting()).eval()
    before = weights(model)
    DeepClean(dropout=True).sweep(model, forget, retain, fractions=[0.2], test=retain)
    assert unchanged(model, before)
    DeepClean(dropout=True, fraction=0.2).unlearn(model, forget, retain)
    assert model[7].passes == len(retain)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("phase", ["fisher", "dampen", "count"])
def test_dampening_killed_in_any_phase_leaves_the_model(
    phase: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, forget, retain = classifier()
    before = weights(model)
    changed_when_killed = []
    reset = ops.threshold_reset_

    def kill(*args: Any, **options: Any) -> None:
        if phase == "dampen":
            reset(*args, **options)
        changed_when_killed.append(not unchanged(model, before))
        raise error

    target = {"fisher": "methods.importance.fisher_diagonal", "dampen": "ops.threshold_reset_"}
    monkeypatch.setattr("fastunlearn." + target.get(phase, "methods.importance.Importances.live"), kill)
    with pytest.raises(error):
        SelectiveSynapticDampening(alpha=2.0).unlearn(model, forget, retain)
    assert changed_when_killed == [phase != "fisher"]
    assert unchanged(model, before)


@pytest.mark.parametrize("when", ["finetune", "evaluate"])
def test_a_sweep_killed_at_its_second_threshold_leaves_the_model(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, forget, retain = classifier()
    before = weights(model)
    calls = []
    original = {"finetune": DeepClean._finetune, "evaluate": evaluate}[when]

    def second(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2 + (when == "evaluate"):  # the model as it was is evaluated first
            assert not unchanged(model, before)
            raise KeyboardInterrupt
        return original(*args, **options)

    if when == "finetune":
        monkeypatch.setattr(DeepClean, "_finetune", second)
    else:
        monkeypatch.setattr("fastunlearn.methods.deepclean.evaluate", second)
    with pytest.raises(KeyboardInterrupt), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        DeepClean().sweep(model, forget, retain, fractions=[0.1, 0.2], test=retain)
    assert unchanged(model, before)


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


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("phase", ["fisher_forget", "fisher_retain", "reset", "finetune", "last step"])
def test_killed_in_any_phase_the_model_is_untouched(
    phase: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, forget, retain = classifier()
    before = weights(model)
    grads = [torch.ones_like(p) for p in model.parameters()]
    for p, grad in zip(model.parameters(), grads, strict=True):
        p.grad = grad
    changed_when_killed = []

    def kill(*_: Any, **__: Any) -> None:
        changed_when_killed.append(not unchanged(model, before))
        raise error

    class Killing(list[Any]):
        """Kills during the first pass over it, after one batch."""

        def __iter__(self) -> Any:
            yield self[0]
            kill()

    if phase == "fisher_forget":
        forget = Killing(forget)
    elif phase == "fisher_retain":
        retain = Killing(retain)
    elif phase == "reset":
        unpack, calls = ops.unpack_mask, []

        def unpack_and_die(*args: Any) -> torch.Tensor:
            """Once for each parameter while weights are chosen; then the second one is about to be written."""
            calls.append(args)
            if len(calls) == len(grads) + 2:
                kill()
            return unpack(*args)

        monkeypatch.setattr(ops, "unpack_mask", unpack_and_die)
    elif phase == "finetune":
        steps = iter(range(3))
        monkeypatch.setattr(ops, "masked_sgd_", lambda *_: next(steps, None) is None and kill())
    else:
        monkeypatch.setattr("fastunlearn.methods.deepclean.predict", kill)
    with pytest.raises(error):
        DeepClean(fraction=0.3, finetune_epochs=2).unlearn(model, forget, retain, validation=retain)
    assert changed_when_killed == [phase in ("reset", "finetune", "last step")]
    assert unchanged(model, before)
    assert not any(m.training for m in model.modules())
    assert all(p.requires_grad and p.grad is g and bool((g == 1).all())
               for p, g in zip(model.parameters(), grads, strict=True))  # fmt: skip


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
        ({"floor": float("inf")}, "not be negative"),
        ({"gamma": 1.0, "per_layer": True}, "give fraction"),
        ({"reset": "half"}, "reset must be one of zero, mean, init"),
        ({"optimizer": "lion"}, "optimizer must be one of sgd, adamw"),
        ({"patience": 0}, "from 1"),
        ({"fisher_samples": 0}, "1 or more"),
        ({"lr": -0.1}, "lr must"),
        ({"momentum": float("nan")}, "momentum must"),
        ({"autocast": torch.float16}, "torch.bfloat16 or None"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeepClean(**options)
