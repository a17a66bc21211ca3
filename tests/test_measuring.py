"""What is measured of a model in a run: which sets, what is left out and why, and nothing that JSON can not hold."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Request, make_request
from torch import Tensor, nn

from fastunlearn import cli
from fastunlearn.evaluate.seeds import over_runs
from fastunlearn.jobs.config import Config
from fastunlearn.jobs.measuring import Known, answers, layer_changes, leaks, measure
from fastunlearn.jobs.task import FORGOTTEN_TEST, Task, applicable, open_task

FIRST = """
import torch
from torch import nn


class LengthFirst(nn.Module):
    # Rows of the image as a sequence [T, N, D]: what its layers return does not have the samples first.
    def __init__(self):
        super().__init__()
        self.read = nn.GRU(6, 8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        states, _ = self.read(x.transpose(0, 1))
        return self.head(torch.relu(self.mix(states)).mean(0))


def net():
    torch.manual_seed(0)
    return LengthFirst()
"""


@pytest.fixture(scope="module")
def request_files(tmp_path_factory: pytest.TempPathFactory) -> Request:
    return make_request(tmp_path_factory.mktemp("measuring"))


def opened(request: Request, **more: Any) -> Task:
    keys: dict[str, Any] = {
        "model": f"{request.path('net.py')}:net", "weights": request.path("weights.safetensors"),
        "data": request.path("train.npz"), "test": request.path("test.npz"), "forget": "class:1", "batch_size": 32,
        "bootstrap": 20, "relearn": 3,
    }  # fmt: skip
    return open_task(Config(**{key: value for key, value in (keys | more).items() if value is not None}))


def measured(task: Task, model: nn.Module | None = None, reference: nn.Module | None = None) -> dict[str, Any]:
    model = task.model if model is None else model
    return measure(task, model, reference, Known.of(task, task.model, reference), 0)


def arrays(request: Request, name: str) -> tuple[Tensor, Tensor]:
    file = np.load(request.path(f"{name}.npz"))
    return torch.tensor(file["x"]), torch.tensor(file["y"])


# ---------------------------------------------------------------------------------------------------------------------
# Sets.


@pytest.mark.parametrize(("forget", "labels"), [("class:1", [1]), ("class:0,3", [0, 3])])
def test_of_whole_classes_their_test_samples_are_measured_apart(
    request_files: Request, forget: str, labels: list[int]
) -> None:
    task = opened(request_files, forget=forget)
    x, y = arrays(request_files, "test")
    gone = torch.isin(y, torch.tensor(labels))
    assert task.whole_classes == labels
    assert {name: len(part) for name, part in task.sets.items()} == {
        "forget": 30 * len(labels), "retain": 120 - 30 * len(labels), "test": int((~gone).sum()),
        FORGOTTEN_TEST: int(gone.sum()),
    }  # fmt: skip
    with torch.no_grad():
        right = task.model(x).argmax(1) == y
    found = measured(task)
    assert found["accuracy"]["test"] == pytest.approx(100 * float(right[~gone].double().mean()))
    assert found["accuracy"][FORGOTTEN_TEST] == pytest.approx(100 * float(right[gone].double().mean()))
    assert set(found["per_class"][FORGOTTEN_TEST]) == {str(label) for label in labels}
    assert np.array(found["confusion"]).sum() == 80  # of both together
    assert set(found["probes"]) == {"1", "3"}


@pytest.mark.parametrize("rest", ["a part of a class", "a class that is retained in part"])
def test_of_single_samples_no_class_is_apart(request_files: Request, rest: str) -> None:
    if rest == "a part of a class":
        task = opened(request_files, forget=f"index:{request_files.path('forget.json')}")
    else:
        (request_files.folder / "most.py").write_text("def most(index, name, label):\n    return label == 1 and "
                                                      "index != 1\n")  # fmt: skip
        task = opened(request_files, forget=f"predicate:{request_files.path('most.py')}:most")
    assert task.whole_classes == [] and set(task.sets) == {"forget", "retain", "test"}
    found = measured(task)
    assert set(found["accuracy"]) == {"forget", "retain", "test"} and found["probes"] is None
    assert applicable(task)[1] == {"class-forgetting": "the forgotten samples are not whole classes"}
    assert "class-forgetting" in applicable(opened(request_files))[0]


def test_a_test_set_of_the_forgotten_class_alone_stays_whole(request_files: Request) -> None:
    x, y = arrays(request_files, "test")
    np.savez(request_files.folder / "ones.npz", x=x[y == 1].numpy(), y=y[y == 1].numpy())
    np.savez(request_files.folder / "others.npz", x=x[y != 1].numpy(), y=y[y != 1].numpy())
    for name, count in (("ones", 20), ("others", 60)):
        task = opened(request_files, test=request_files.path(f"{name}.npz"))
        assert len(task.sets["test"]) == count and FORGOTTEN_TEST not in task.sets
        found = measured(task)
        assert found["probes"] is None  # nothing to tell apart
        assert found["attacks"]["loss"]["auc"]["low"] is not None


def test_without_test_data_there_are_no_attacks(request_files: Request) -> None:
    task = opened(request_files, test=None)
    found = measured(task)
    assert (found["attacks"], found["roc"], found["svc"], found["confusion"]) == ({}, {}, None, None)
    assert found["probes"] is None and set(found["accuracy"]) == {"forget", "retain"}
    assert leaks(task, task.model, task.model, None) is None


def test_only_so_many_retained_samples_are_measured(request_files: Request) -> None:
    task = opened(request_files, measured=25)
    again = opened(request_files, measured=25)
    assert len(task.sets["retain"]) == 25 and len(task.retain) == 90
    assert torch.equal(task.measured.indices, again.measured.indices)
    assert not torch.equal(task.measured.indices, opened(request_files, measured=25, seed=1).measured.indices)
    assert torch.isin(task.measured.indices, task.retain.indices).all()
    classes = {name: c["samples"] for name, c in measured(task)["per_class"]["retain"].items()}
    assert sum(classes.values()) == 25


def test_measuring_changes_nothing_and_repeats_itself(request_files: Request) -> None:
    task = opened(request_files)
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    first, second = measured(task, reference=task.copy()), measured(task, reference=task.copy())
    assert first == second
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())
    assert not task.model.training and all(p.grad is None for p in task.model.parameters())


def test_answers_are_the_logits_of_every_set(request_files: Request) -> None:
    task = opened(request_files)
    x, y = arrays(request_files, "train")
    found = answers(task, task.model)
    with torch.no_grad():
        assert torch.allclose(found["forget"], task.model(x[y == 1]), atol=1e-5)
    assert {name: list(logits.shape) for name, logits in found.items()} == {
        "forget": [30, 4], "retain": [90, 4], "test": [60, 4], FORGOTTEN_TEST: [20, 4]
    }  # fmt: skip


def test_every_figure_is_json(request_files: Request) -> None:
    task = opened(request_files)
    for found in (measured(task), measured(task, reference=task.copy())):
        assert json.loads(json.dumps(found, allow_nan=False)) == found


# ---------------------------------------------------------------------------------------------------------------------
# What has no bound, and what can not be looked into.


def sure(task: Task, of: int, logit: float) -> nn.Module:
    """The model with one class ruled out or made certain for all samples."""
    model = task.copy()
    head = model.get_submodule("3")
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.weight[of] = 0
        head.bias[of] = logit
    return model


def test_an_infinite_divergence_becomes_none(request_files: Request) -> None:
    task = opened(request_files)
    never = sure(task, 0, float("-inf"))  # rules out what the reference does not
    found = measured(task, never, task.copy())
    assert all(value is None for value in found["kl"].values())
    assert all(0 < value <= math.log(2) for value in found["js"].values())  # has a bound
    assert found["loss"]["retain"] is None and math.isfinite(found["loss"]["forget"])
    assert found["per_class"]["retain"]["0"]["loss"] is None
    assert math.isfinite(found["per_class"]["retain"]["2"]["loss"])
    json.dumps(found, allow_nan=False)


def test_a_divergence_that_is_only_large_stays_a_number(request_files: Request) -> None:
    task = opened(request_files)
    found = measured(task, sure(task, 0, -300.0), task.copy())
    assert all(math.isfinite(value) for value in found["kl"].values())
    assert found["kl"]["retain"] > 10


@pytest.fixture
def length_first(tmp_path: Path) -> Request:
    request = make_request(tmp_path)
    (tmp_path / "first.py").write_text(FIRST)
    return request


def test_layers_without_the_samples_first_are_noted_and_the_rest_is_measured(length_first: Request) -> None:
    task = opened(length_first, model=f"{length_first.path('first.py')}:net", weights=None)
    torch.manual_seed(1)
    reference = task.copy()
    for p in reference.parameters():
        nn.init.normal_(p, std=0.1)
    found = measured(task, reference=reference)
    assert found["probes"] is None and found["activation_distance"] is None
    assert found["notes"][-2].startswith("No layer was probed: ")
    assert found["notes"][-1].startswith("Activations were not compared: ")
    for note in found["notes"]:
        assert note.endswith(".") and not note.endswith("..") and "\n" not in note
    x, y = arrays(length_first, "train")
    with torch.no_grad():
        right = task.model(x[y == 1]).argmax(1) == 1
    assert found["accuracy"]["forget"] == pytest.approx(100 * float(right.double().mean()))
    assert set(found["attacks"]) and found["kl"]["test"] > 0


def test_the_notes_are_among_the_limits_of_a_run(length_first: Request) -> None:
    flags = ["unlearn", "--model", f"{length_first.path('first.py')}:net", "--data", length_first.path("train.npz"),
             "--test", length_first.path("test.npz"), "--forget", "class:1", "--method", "gradient-ascent",
             "--bootstrap", "20", "--relearn", "2", "--no-pictures", "--out", length_first.path("out")]  # fmt: skip
    assert cli.main(flags) == 0
    out = length_first.folder / "out"
    findings, record = (json.loads((out / name).read_text()) for name in ("findings.json", "record.json"))
    assert findings["probes"] is None
    noted = [limit for limit in findings["limits"] if limit.startswith("No layer was probed: ")]
    assert len(noted) == 1 and noted[0] in record["limits"]  # once, though two models were measured


# ---------------------------------------------------------------------------------------------------------------------
# Relearning, leaks, layers.


def test_the_original_has_nothing_to_relearn_and_none_is_never(request_files: Request) -> None:
    task = opened(request_files)
    assert measured(task)["relearn"] == 0
    blank = task.copy()
    for p in blank.parameters():
        nn.init.zeros_(p)
    spread = opened(request_files, forget=f"index:{request_files.path('forget.json')}")
    assert measured(spread, blank)["relearn"] is None
    assert measured(opened(request_files, relearn=0))["relearn"] is None


def test_leak_scores_are_percents_with_one_of_each_per_sample(request_files: Request) -> None:
    task = opened(request_files)
    found = leaks(task, task.model, sure(task, 1, -50.0), task.copy())
    assert found is not None
    for part in found.values():
        assert len(part["ids"]) == len(part["before"]) == len(part["after"]) == len(part["reference"])
        assert all(0 <= score <= 100 for key in ("before", "after", "reference") for score in part[key])
        assert part["before"] == part["reference"]  # the same model
    assert len(found["forgotten"]["ids"]) == 30
    assert not set(found["forgotten"]["ids"]) & set(found["neighbours"]["ids"])
    alone = leaks(task, task.model, task.model, None)
    assert alone is not None and alone["forgotten"]["reference"] is None


def test_layer_changes_by_hand() -> None:
    before = {"a": torch.tensor([3.0, 4.0]), "b": torch.zeros(2), "n": torch.tensor(7)}
    after = {"a": torch.tensor([0.0, 4.0]), "b": torch.zeros(2), "n": torch.tensor(9)}
    assert layer_changes(before, after) == [
        {"name": "a", "changed": 1, "of": 2, "relative_change": pytest.approx(0.6)},
        {"name": "b", "changed": 0, "of": 2, "relative_change": 0.0},
        {"name": "n", "changed": 1, "of": 1, "relative_change": pytest.approx(2 / 9)},
    ]
    grown = layer_changes({"b": torch.zeros(2)}, {"b": torch.ones(2)})
    assert grown[0]["relative_change"] == pytest.approx(1.0)  # of nothing, all is new


def test_metrics_of_runs_join_as_the_library_s_own(request_files: Request) -> None:
    """``evaluate(seeds=...)`` and a comparison say the same of the same models."""
    from fastunlearn import evaluate
    from fastunlearn.jobs.findings import joined

    task = opened(request_files)
    models = [task.model, sure(task, 1, -3.0)]
    reference = sure(task, 1, -2.0)
    loaders = {name: part.loader(32) for name, part in task.sets.items() if name != FORGOTTEN_TEST}
    theirs = over_runs([evaluate(m, reference=reference, **loaders) for m in models])
    ours = joined([{k: measured(task, m, reference)[k] for k in ("accuracy", "gap", "tow")} for m in models])
    for name in loaders:
        assert ours["accuracy"][name]["mean"] == pytest.approx(theirs.accuracy[name].mean)
        assert theirs.gap is not None
        assert ours["gap"][name] == pytest.approx(theirs.gap[name].as_dict())
    assert theirs.tow is not None and ours["tow"]["mean"] == pytest.approx(theirs.tow.mean)
