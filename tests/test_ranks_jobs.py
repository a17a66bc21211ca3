"""A classifier forgotten by two ranks, replicated or sharded: the findings of one process, or one line that refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Request, make_request
from ranks import on_ranks
from torch import nn

from fastunlearn.checkpoint import State, load_weights, save_weights
from fastunlearn.jobs.config import Config
from fastunlearn.jobs.deletion import unlearn
from fastunlearn.jobs.task import open_task
from fastunlearn.jobs.workspace import KEPT, Workspace
from fastunlearn.parallel.ranks import ALONE, local, world

COMPARED = ("models", "probes", "activation_distance", "confusion", "spectra", "leaks", "histograms", "limits")


@pytest.fixture(scope="module")
def request_files(tmp_path_factory: pytest.TempPathFactory) -> Request:
    return make_request(tmp_path_factory.mktemp("classes"))


def config_of(request: Request, out: str, **more: Any) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "model": request.path("net.py") + ":net", "weights": request.path("weights.safetensors"),
        "data": request.path("train.npz"), "test": request.path("test.npz"), "forget": "class:1", "batch_size": 16,
        "bootstrap": 20, "relearn": 0, "pictures": False, "out": request.path(out), "log": request.path(out) + ".jsonl",
    }  # fmt: skip
    return keys | more


def _unlearned(rank: int, config: dict[str, Any]) -> str:
    """What refused it; "" where nothing did."""
    try:
        unlearn(Config(**config), False, lambda _: None, ALONE if rank < 0 else world())
    except ValueError as error:
        return str(error)
    return ""


def figures(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in a JSON value that is no time, by its place."""
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if key != "seconds":
                yield from figures(item, f"{where}/{key}")
    else:
        yield where, value


@pytest.mark.parametrize(
    ("method", "parallel", "more"),
    [
        ("class-forgetting", "fsdp", {"reference": "weights.safetensors"}),
        ("lcodec", "ddp", {"settings": {"hessian_samples": 16, "group": True}, "forget": "index:few.json"}),
        ("finetune", "ddp", {"reference": "retrain", "training": {"epochs": 1}}),
    ],
)
def test_two_ranks_find_what_one_process_finds(
    request_files: Request, method: str, parallel: str, more: dict[str, Any]
) -> None:
    Path(request_files.path("few.json")).write_text("[3, 9]")
    if more.get("reference", "retrain") != "retrain":
        more = {**more, "reference": request_files.path(more["reference"])}
    if "forget" in more:
        more = {**more, "forget": f"index:{request_files.path('few.json')}"}
    found = []
    for out, ranks in ((f"{method}-one", 1), (f"{method}-two", 2)):
        config = config_of(request_files, out, method=method, parallel=parallel, **more)
        assert set([_unlearned(-1, config)] if ranks == 1 else on_ranks(2, _unlearned, config)) == {""}
        kept = json.loads((Path(config["out"]) / "findings.json").read_text())
        found.append(dict(figures({key: kept[key] for key in COMPARED})))
    one, two = found
    assert one.keys() == two.keys()
    for place, value in one.items():
        assert two[place] == (pytest.approx(value, rel=1e-3, abs=1e-3) if isinstance(value, float) else value), place


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"method": "retrain"}, "method: retrain trains a new model in one process"),
        ({"method": "finetune", "reference": "retrain"}, "reference: retrain makes a model that every process has"),
        ({"method": "finetune", "shadows": 8}, "shadow models are trained in one process"),
        ({"method": "finetune", "reference": "other.safetensors"}, "--reference: "),
    ],
)
def test_what_ranks_can_not_do_is_refused_before_anything_is_written(
    request_files: Request, more: dict[str, Any], problem: str
) -> None:
    save_weights(request_files.path("other.safetensors"), {"weight": torch.ones(2)})
    if more.get("reference", "retrain") != "retrain":
        more = {**more, "reference": request_files.path(more["reference"])}
    said = on_ranks(2, _unlearned, config_of(request_files, "refused", **more))
    assert said[0] == said[1] and said[0].startswith(problem) and "\n" not in said[0]
    assert not list(request_files.folder.glob("*refused*"))


def _held(rank: int, config: dict[str, Any]) -> tuple[list[bool], bool, State]:
    """Whether parameters had memory when a copy was built; whether the copy has the shards; what it is of."""
    from fastunlearn.jobs import task as module

    task, built, build = open_task(Config(**config), world()), [], module.build_model

    def building(*args: Any) -> nn.Module:
        model = build(*args)
        built.extend(not p.is_meta for p in model.parameters())
        return model

    module.build_model = building
    other = task.copy()
    pairs = zip(other.parameters(), task.model.parameters(), strict=True)
    same = all(torch.equal(local(a), local(b)) for a, b in pairs)
    assert task.reference is not None
    return built, same, {name: type(task.reference).__name__ for name in task.reference}  # type: ignore[misc]


def test_no_rank_makes_or_reads_the_whole_of_a_sharded_model(request_files: Request) -> None:
    weights = request_files.path("weights.safetensors")
    for built, same, reference in on_ranks(2, _held, config_of(request_files, "held", reference=weights)):
        assert built and not any(built) and same
        assert reference == dict.fromkeys(load_weights(weights), "_OnDisk")


def test_weights_of_one_process_take_the_place_of_a_cut_off_folder(tmp_path: Path) -> None:
    space = Workspace(tmp_path / "out", {"seed": 1}, False)
    left = space.path / KEPT / "unlearned"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"of ranks that were killed")
    save_weights(space.place_for("unlearned"), {"a": torch.ones(2)})
    assert load_weights(space.weights("unlearned"))["a"].tolist() == [1, 1]
    space.close()
