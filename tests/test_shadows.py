"""Shadow models: the subsets, what they are kept under, and that a stopped run goes on as if it had not been."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from fastunlearn.evaluate.shadows import GROUP, ShadowModels, balanced_subsets
from fastunlearn.evaluate.signals import signals_of
from fastunlearn.evaluate.stacked import Recipe

RECIPE = Recipe(epochs=2, batch_size=8)
module = importlib.import_module("fastunlearn.evaluate.shadows")


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


def data(n: int = 48) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 6, generator=generator), torch.randint(3, (n,), generator=generator)


def shadows(cache: Path | None = None, count: int = 6, **change: Any) -> ShadowModels:
    return ShadowModels(**({"build": build, "recipe": RECIPE, "data": data(), "count": count, "cache": cache} | change))


def states(models: ShadowModels) -> list[dict[str, Tensor]]:
    return [models.model(m).state_dict() for m in range(models.count)]


def same(a: list[dict[str, Tensor]], b: list[dict[str, Tensor]]) -> bool:
    return all(torch.equal(s[k], t[k]) for s, t in zip(a, b, strict=True) for k in s)


def files(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.safetensors"))


# --- subsets


@pytest.mark.parametrize("n", [2, 7, 48, 101])
@pytest.mark.parametrize("count", [2, 6, 16])
def test_every_sample_is_in_exactly_half_of_the_models_and_halves_are_equal(n: int, count: int) -> None:
    keep = balanced_subsets(n, count, seed=3)
    assert keep.sum(0).tolist() == [count // 2] * n
    assert set(keep.sum(1).tolist()) <= {n // 2, n - n // 2}
    assert torch.equal(keep[0::2], ~keep[1::2])


@pytest.mark.parametrize(("share", "count"), [(0.25, 8), (0.75, 4), (1 / 3, 6), (0.4, 10)])
def test_other_shares_are_exact_too(share: float, count: int) -> None:
    keep = balanced_subsets(53, count, share, seed=1)
    assert keep.sum(0).tolist() == [round(share * count)] * 53
    assert float((keep.sum(1) - share * 53).abs().max()) < count


def test_a_block_goes_together_and_the_rest_is_shared_out_as_without_it() -> None:
    block = torch.tensor([40, 3, 17])
    keep = balanced_subsets(47, 8, seed=2, together=block)
    assert keep.sum(0).tolist() == [4] * 47
    inside = keep[:, block]
    assert torch.equal(inside.all(1), inside.any(1))
    rest = keep.sum(1) - inside.sum(1)
    assert rest.tolist() == [22] * 8


def test_pairs_of_samples_meet_as_often_as_chance_has_it() -> None:
    keep = balanced_subsets(30, 2000, seed=0).double()
    together = (keep.T @ keep / len(keep)).masked_select(~torch.eye(30, dtype=torch.bool))
    # of 30 samples, 15 are drawn: 1/2 * 14/29; a pair of models is one draw, so the standard error is that of 1000
    assert float((together - 14 / 58).abs().max()) < 5 * (0.24 / 1000) ** 0.5


def test_more_models_add_to_those_that_are_there() -> None:
    assert torch.equal(balanced_subsets(20, 6, seed=4), balanced_subsets(20, 10, seed=4)[:6])
    assert not torch.equal(balanced_subsets(20, 6, seed=4), balanced_subsets(20, 6, seed=5))
    assert shadows(count=4).keys == shadows(count=6).keys[:4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 5), "5 models can not hold every sample in a share of 0.5"),
        ((10, 0), "0 models"),
        ((10, 4, 1.0), "share of 1"),
        ((10, 4, 0.3), "share of 0.3"),
        ((1, 4), "1 samples are too few for 2 parts"),
        ((10, 4, 0.5, 0, [3, 10]), "different indices from 0 to 9"),
        ((10, 4, 0.5, 0, [3, 3]), "different indices from 0 to 9"),
    ],
)
def test_designs_that_can_not_be_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        balanced_subsets(*arguments)


# --- the cache


@pytest.mark.parametrize("mode", ["stacked", "sequential"])
def test_a_second_run_trains_nothing_and_has_the_same_models(tmp_path: Path, mode: Any) -> None:
    first = shadows(tmp_path, mode=mode)
    first.train()
    again = shadows(tmp_path, mode=mode)
    assert again.plan().seconds == 0 and again.plan().cached == 6
    with patch.object(module, "train_models", side_effect=AssertionError("trained again")):
        again.train()
    assert same(states(first), states(again))
    assert len(files(tmp_path)) == 6


@pytest.mark.parametrize("mode", ["stacked", "sequential"])
def test_a_partial_cache_resumes_to_the_same_bits(tmp_path: Path, mode: Any) -> None:
    whole = shadows(tmp_path / "whole", mode=mode)
    whole.train()
    part = shadows(tmp_path / "part", mode=mode)
    part.train()
    for m in (1, 4):
        part.cache.path(part.keys[m]).unlink()
    (tmp_path / "part" / ".left.by.a.kill.part").write_bytes(b"half")
    kept = part.cache.path(part.keys[0]).stat()
    resumed = shadows(tmp_path / "part", mode=mode)
    assert resumed.plan().cached == 4
    resumed.train()
    assert same(states(whole), states(resumed))
    assert part.cache.path(part.keys[0]).stat().st_mtime_ns == kept.st_mtime_ns


def test_a_run_that_is_killed_between_groups_resumes_to_the_same_bits(tmp_path: Path) -> None:
    count = GROUP + 4
    whole = shadows(tmp_path / "whole", count=count, mode="stacked")
    whole.train()
    train, calls = module.train_models, 0

    def killed(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return train(*arguments, **options)

    with patch.object(module, "train_models", killed), pytest.raises(KeyboardInterrupt):
        shadows(tmp_path / "part", count=count, mode="stacked").train()
    assert len(files(tmp_path / "part")) == GROUP
    resumed = shadows(tmp_path / "part", count=count, mode="stacked")
    resumed.train()
    assert same(states(whole), states(resumed))


def test_the_choice_of_auto_is_kept_so_that_a_resumed_run_takes_the_same_way(tmp_path: Path) -> None:
    chosen = shadows(tmp_path).plan().training
    with patch.object(module, "choose_mode", side_effect=AssertionError("timed again")):
        assert shadows(tmp_path).plan().training == chosen
    (timing,) = tmp_path.glob("*.timing.json")
    for broken in ('{"mode": "st', json.dumps({"mode": "both", "reason": "", "seconds_per_step": {}})):
        timing.write_text(broken)
        with pytest.warns(UserWarning, match="timed anew"):
            assert shadows(tmp_path).plan().training is not None


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "foreign", "unsigned"])
def test_a_damaged_or_foreign_file_is_noticed_and_made_anew(tmp_path: Path, damage: str) -> None:
    models = shadows(tmp_path, mode="sequential")
    models.train()
    before = states(models)
    path = models.cache.path(models.keys[2])
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "flipped":
        content[-3] ^= 1
        path.write_bytes(content)
    elif damage == "foreign":
        path.write_bytes(models.cache.path(models.keys[3]).read_bytes())
    else:
        from safetensors.torch import save_file

        save_file(before[2], path)
    again = shadows(tmp_path, mode="sequential")
    with pytest.warns(UserWarning, match=f"{path.name}.*made anew"):
        again.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(states(again), before)


def test_any_setting_changes_every_key() -> None:
    x, y = data()
    wider = lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))  # noqa: E731
    smoother = lambda: nn.Sequential(*[nn.GELU() if isinstance(m, nn.ReLU) else m for m in build()])  # noqa: E731
    nudged = x.clone()
    nudged[7, 2] += 1e-6
    changes: list[dict[str, Any]] = [
        {},
        *({"recipe": replace(RECIPE, **{name: value})} for name, value in (("epochs", 3), ("lr", 0.02))),
        *({"recipe": replace(RECIPE, **{name: value})} for name, value in (("weight_decay", 0.0), ("batch_size", 9))),
        {"seed": 1},
        {"data": (nudged, y)},
        {"data": (x, y.roll(1))},
        {"build": wider},
        {"build": smoother},
        {"together": [0, 1]},
    ]
    keys = [key for change in changes for key in shadows(count=4, **change).keys]
    with patch.object(torch, "__version__", "9.9"):
        keys += shadows(count=4).keys
    assert len(set(keys)) == 4 * (len(changes) + 1)
    assert shadows(count=4).keys == keys[:4]


def _train_in(cache: Path) -> None:
    shadows(cache, count=24, mode="sequential").train()


def test_two_processes_on_one_cache_do_not_disturb_each_other(tmp_path: Path) -> None:
    alone = shadows(tmp_path / "alone", count=24, mode="sequential")
    alone.train()
    worker = multiprocessing.get_context("spawn").Process(target=_train_in, args=(tmp_path / "shared",))
    worker.start()
    while worker.is_alive() and not files(tmp_path / "shared"):
        time.sleep(0.001)
    shared = shadows(tmp_path / "shared", count=24, mode="sequential")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # neither sees half a file of the other
        while worker.is_alive():
            for key in shared.keys[::5]:  # and what is taken away comes back
                shared.cache.path(key).unlink(missing_ok=True)
            shared.train()
        worker.join()
        assert worker.exitcode == 0
        assert same(states(shared), states(alone))
    assert not list((tmp_path / "shared").glob(".*"))


def test_without_a_folder_everything_stays_in_memory() -> None:
    models = shadows()
    with pytest.raises(RuntimeError, match=r"shadow model 0 is not trained yet; call train\(\)"):
        models.model(0)
    models.train()
    assert models.plan().cached == 6
    assert models.signals().shape == (6, 48)


# --- what it costs, what it says


@pytest.mark.parametrize("mode", ["stacked", "sequential"])
def test_the_estimate_is_within_a_factor_of_three_of_the_time_taken(tmp_path: Path, mode: Any) -> None:
    """Each of three trials has an estimate of its own: what else runs on the machine may change within one of them."""
    wide = lambda: nn.Sequential(nn.Linear(6, 256), nn.ReLU(), nn.Linear(256, 3))  # noqa: E731
    ratios = []
    for trial in range(3):
        folder = tmp_path / str(trial)
        models = shadows(
            folder, count=8, mode=mode, recipe=Recipe(epochs=10, batch_size=16), data=data(320), build=wide
        )
        cost = models.plan()
        start = time.perf_counter()
        models.train()
        ratios.append(cost.seconds / (time.perf_counter() - start))
        assert cost.bytes <= sum(path.stat().st_size for path in files(folder)) < 1.5 * cost.bytes
        assert str(cost).startswith(f"8 shadow models, 0 cached; 8 to train, {mode}: about ")
        if 1 / 3 < ratios[-1] < 3:
            break
    assert 1 / 3 < ratios[-1] < 3, ratios


def test_signals_are_those_of_every_model_and_are_asked_for_once(tmp_path: Path) -> None:
    models = shadows(tmp_path)
    models.train()
    x, y = data(600)  # more than a batch, and another pool
    with torch.no_grad():
        expected = torch.stack([signals_of(models.model(m)(x), y).logit for m in range(6)])
    torch.testing.assert_close(models.signals(x, y), expected, rtol=1e-4, atol=1e-5)
    assert models.signals().shape == (6, 48)
    with patch.object(module, "signals", side_effect=AssertionError("asked again")):
        again = shadows(tmp_path)
        torch.testing.assert_close(again.signals(x, y), expected, rtol=1e-4, atol=1e-5)
        assert again.signals().dtype == torch.float64


def test_data_read_by_index_has_the_models_of_the_tensors(tmp_path: Path) -> None:
    x, y = data()

    class Folder:
        labels = y

        def __len__(self) -> int:
            return len(y)

        def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
            return x[indices], y[indices]

    of_tensors, of_folder = shadows(mode="sequential"), shadows(mode="sequential", data=Folder())
    of_tensors.train()
    of_folder.train()
    assert same(states(of_tensors), states(of_folder))
    assert torch.equal(of_tensors.signals(), of_folder.signals())


def test_a_model_that_can_not_be_stacked_says_so_when_it_is_asked_for() -> None:
    class Undecided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) if x.sum().item() > 0 else -self.linear(x)

    cost = shadows(build=Undecided).plan()
    assert cost.training is not None and cost.training.mode == "sequential" and "item()" in cost.training.reason
    with pytest.raises(ValueError, match=r"item\(\).*train with mode='auto'"):
        shadows(build=Undecided, mode="stacked").train()
