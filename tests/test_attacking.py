"""The shadow models of a request: what each of them may have seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import make_request

from fastunlearn.evaluate.lira import u_lira
from fastunlearn.evaluate.shadows import ShadowModels
from fastunlearn.jobs import attacking
from fastunlearn.jobs.config import Config
from fastunlearn.jobs.task import open_task
from fastunlearn.methods.baselines import Retrain


@pytest.mark.parametrize("forget", ["class:1", "index:forget.json"])
def test_a_shadow_model_sees_all_that_is_forgotten_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget: str
) -> None:
    """Of whole classes with their test samples: else every shadow model would know the class from those. And then a
    retrained model, which saw neither side, is told from neither: its AUC is near 0.5."""
    request = make_request(tmp_path)
    seen: dict[str, Any] = {}

    def watched(shadows: ShadowModels, unlearn: Any, forgotten: torch.Tensor, *args: Any, **more: Any) -> Any:
        seen.update(keep=shadows.keep, labels=shadows.samples.batch(torch.arange(len(shadows.samples)))[1])
        seen["forgotten"] = forgotten
        return u_lira(shadows, unlearn, forgotten, *args, **more)

    monkeypatch.setattr(attacking, "u_lira", watched)
    config = Config(
        model=f"{request.path('net.py')}:net", weights=request.path("weights.safetensors"),
        data=request.path("train.npz"), test=request.path("test.npz"), method="finetune", shadows=8, bootstrap=20,
        training={"epochs": 8}, forget=forget.replace("forget.json", request.path("forget.json")),
    )  # fmt: skip
    task = open_task(config)
    torch.manual_seed(0)
    retrained = task.fresh()
    Retrain(epochs=8).unlearn(retrained, None, task.retain.loader(64))
    found = attacking.shadow_attacks(task, {"unlearned": task.model, "reference": retrained}, tmp_path, print)
    of_class = seen["labels"] == 1
    keep = seen["keep"]
    if forget == "class:1":
        assert of_class.sum() == 30 + 20
        assert torch.equal(seen["forgotten"], of_class.nonzero().flatten())
        assert set(keep[:, of_class].sum(1).tolist()) == {0, 50}
    else:
        listed = json.loads(Path(request.path("forget.json")).read_text())
        assert torch.equal(seen["forgotten"], torch.arange(len(listed)))
        assert set(keep[:, : len(listed)].sum(1).tolist()) == {0, len(listed)}
        assert 0 < int(keep[0, len(listed) :].sum()) < keep.shape[1] - len(listed)
    assert set(found["attacks"]["unlearned"]) == {"LiRA", "U-LiRA"} and set(found["attacks"]["reference"]) == {"LiRA"}
    auc = found["attacks"]["reference"]["LiRA"]["auc"]
    assert auc["low"] < 0.5 < auc["high"]
