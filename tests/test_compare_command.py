"""``compare`` as a user runs it: every method and retraining over seeds, with intervals that are recomputed here."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import yaml
from commands import QUICK, Request, make_request
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn import functional as F

import fastunlearn as fu
from fastunlearn import cli
from fastunlearn.demo import Digits, digits_test, digits_train
from fastunlearn.evaluate.stacked import Recipe, train_models
from fastunlearn.inputs import Loader, open_samples
from fastunlearn.jobs import comparison

SEED = 3
FILES = {"report.html", "findings.json", "config.yaml"}
METHODS = [name for name in QUICK if name != "retrain"]
SETS = ("forget", "retain", "test", "test of forgotten")


def small_net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 24), nn.ReLU(), nn.Linear(24, 4))


def settings_of(method: str) -> dict[str, Any]:
    return {key: yaml.safe_load(value) for key, value in (pair.split("=") for pair in QUICK[method])}


def write_request(request: Request, name: str, **more: Any) -> str:
    """A configuration of all methods with quick settings; ``more`` wins, None leaves a key out."""
    keys: dict[str, Any] = {
        "model": f"{request.path('net.py')}:net", "weights": request.path("weights.safetensors"),
        "data": request.path("train.npz"), "test": request.path("test.npz"), "forget": "class:1",
        "methods": [{"method": method, "settings": settings_of(method)} for method in METHODS],
        "training": {"epochs": 4, "lr": 0.02}, "seeds": 2, "seed": SEED, "bootstrap": 20, "relearn": 3,
        "batch_size": 32, "pictures": False,
    }  # fmt: skip
    path = request.folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in (keys | more).items() if v is not None}))
    return str(path)


def compare(request: Request, name: str, **more: Any) -> dict[str, Any]:
    config = write_request(request, name, **more)
    assert cli.main(["compare", "--config", config, "--out", request.path(name)]) == 0
    return findings_in(request.folder / name)


def findings_in(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "findings.json").read_text())
    return found


def by_name(findings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {model["name"]: model for model in findings["models"]}


def sets_of(request: Request) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Of the request for class 1, as documented: test samples of a class forgotten whole are apart."""
    files = {name: np.load(request.path(f"{name}.npz")) for name in ("train", "test")}
    (x, y), (tx, ty) = ((torch.tensor(f["x"]), torch.tensor(f["y"])) for f in files.values())
    return {"forget": (x[y == 1], y[y == 1]), "retain": (x[y != 1], y[y != 1]),
            "test": (tx[ty != 1], ty[ty != 1]), "test of forgotten": (tx[ty == 1], ty[ty == 1])}  # fmt: skip


def student(values: list[float], least: float, most: float) -> dict[str, float]:
    """Mean and 95 % interval by scipy, cut where the figure ends; of equal values, the value."""
    mean, error = float(np.mean(values)), scipy.stats.sem(values)
    low, high = scipy.stats.t.interval(0.95, len(values) - 1, mean, error) if error else (mean, mean)
    return {"mean": mean, "low": max(low, least), "high": min(high, most), "runs": len(values)}


@pytest.fixture(scope="module")
def request_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Request, dict[str, str]]:
    request = make_request(tmp_path_factory.mktemp("compare"))
    x, y = sets_of(request)["retain"]
    torch.manual_seed(1)
    model = small_net()
    fu.Retrain(epochs=10, lr=0.02).unlearn(model, None, [(x, y)])
    save_file(model.state_dict(), request.path("reference.safetensors"))
    return request, request.hashes()


@pytest.fixture(scope="module")
def given(request_files: tuple[Request, dict[str, str]]) -> dict[str, Any]:
    """All methods from one checkpoint, beside one retrained model, both from files."""
    request = request_files[0]
    return compare(request, "given", reference=request.path("reference.safetensors"), seeds=3)


@pytest.fixture(scope="module")
def trained(request_files: tuple[Request, dict[str, str]]) -> dict[str, Any]:
    """The same without weights: originals and references are trained, with every seed."""
    return compare(request_files[0], "trained", weights=None)


def accuracies(state: dict[str, torch.Tensor], request: Request) -> dict[str, float]:
    model = small_net()
    model.load_state_dict(state)
    with torch.no_grad():
        return {n: 100 * float((model(x).argmax(1) == y).double().mean()) for n, (x, y) in sets_of(request).items()}


def unlearned_by(method: str, request: Request, seed: int) -> dict[str, torch.Tensor]:
    """What the library's method makes of the checkpoint in Python."""
    kinds = {"deepclean": fu.DeepClean, "class-forgetting": fu.ClassForgetting, "lcodec": fu.LCodec,
             "ssd": fu.SelectiveSynapticDampening, "finetune": fu.FineTune,
             "gradient-ascent": fu.GradientAscent}  # fmt: skip
    own = {"seed": seed} if method not in ("finetune", "gradient-ascent") else {}
    data = open_samples(request.path("train.npz"))
    forget = Loader(data, (data.labels == 1).nonzero().flatten(), 32)
    shuffle = method in ("deepclean", "finetune")
    retain = Loader(data, (data.labels != 1).nonzero().flatten(), 32, shuffle=shuffle, seed=seed)
    model = small_net()
    model.load_state_dict(load_file(request.path("weights.safetensors")))
    torch.manual_seed(seed)
    kinds[method](**settings_of(method), **own).unlearn(model.eval(), forget=forget, retain=retain)
    return dict(model.state_dict())


def test_every_method_and_the_two_ends_are_compared(given: dict[str, Any], trained: dict[str, Any]) -> None:
    for findings in (given, trained):
        assert [m["name"] for m in findings["models"]] == ["original", *METHODS, "retrained"]
        roles = {m["name"]: m["role"] for m in findings["models"]}
        assert (roles["original"], roles["deepclean"], roles["retrained"]) == ("original", "unlearned", "reference")
        assert roles["finetune"] == roles["gradient-ascent"] == "baseline"
        assert findings["leaks"] is None and findings["layers"] == []
        assert all(set(m["accuracy"]) == set(SETS) for m in findings["models"])
    assert given["settings"]["seeds"] == [3, 4, 5] and trained["settings"]["seeds"] == [3, 4]
    assert given["settings"]["deepclean"] == {"method": "deepclean", "fraction": 0.3, "lr": 0.01}
    assert given["settings"]["training"] == "not needed"


@pytest.mark.parametrize("method", METHODS)
def test_intervals_are_student_s_over_runs_computed_in_python(
    given: dict[str, Any], request_files: tuple[Request, dict[str, str]], method: str
) -> None:
    request = request_files[0]
    states = [unlearned_by(method, request, seed) for seed in (3, 4, 5)]
    runs = [accuracies(state, request) for state in states]
    goal = accuracies(load_file(request.path("reference.safetensors")), request)
    row = by_name(given)[method]
    for name in SETS:
        values = [run[name] for run in runs]
        assert row["accuracy"][name] == pytest.approx(student(values, 0, 100), abs=1e-9)
        assert row["gap"][name] == pytest.approx(student([v - goal[name] for v in values], -100, 100), abs=1e-9)
    tow = [np.prod([1 - abs(run[n] - goal[n]) / 100 for n in ("forget", "retain", "test")]) for run in runs]
    assert row["tow"] == pytest.approx(student(tow, 0, 1), abs=1e-9)
    losses = []
    aucs = []
    model = small_net()
    sets = sets_of(request)
    for state in states:
        model.load_state_dict(state)
        with torch.no_grad():
            of = [F.cross_entropy(model(sets[n][0]).double(), sets[n][1], reduction="none") for n in (SETS[0], SETS[3])]
        losses.append(float(of[0].mean()))
        labels = [1] * len(of[0]) + [0] * len(of[1])
        aucs.append(float(roc_auc_score(labels, (-torch.cat(of)).numpy())))
    assert row["loss"]["forget"]["mean"] == pytest.approx(np.mean(losses), rel=1e-4, abs=1e-6)
    # float32 logits in batches of another size may swap two of 30 x 20 pairs
    assert row["attacks"]["loss"]["auc"] == pytest.approx(student(aucs, 0, 1), abs=0.02)
    assert row["seconds"]["runs"] == 3 and row["seconds"]["mean"] > 0


def test_a_model_beside_itself_has_no_gap(given: dict[str, Any], trained: dict[str, Any]) -> None:
    for findings in (given, trained):
        row = by_name(findings)["retrained"]
        assert all(e["mean"] == e.get("low", 0) == e.get("high", 0) == 0 for e in row["gap"].values())
        assert {e["runs"] for e in row["gap"].values()} == {1 if findings is given else 2}  # a file is one model
        assert row["tow"]["mean"] == 1
        assert all(abs(e["mean"]) < 1e-12 for e in (*row["kl"].values(), *row["js"].values()))


def test_without_weights_every_seed_trains_its_own(
    trained: dict[str, Any], request_files: tuple[Request, dict[str, str]]
) -> None:
    """Up to rounding what the recipe makes one after another; so small a difference may move one sample."""
    request = request_files[0]
    data = open_samples(request.path("train.npz"))
    recipe = Recipe(epochs=4, lr=0.02)
    for name, keep in (("original", torch.ones(120, dtype=torch.bool)), ("retrained", data.labels != 1)):
        models, _ = train_models(
            small_net, recipe, data, None, keep.expand(2, -1).contiguous(), [3, 4], mode="sequential"
        )
        runs = [accuracies(dict(model.state_dict()), request) for model in models]
        row = by_name(trained)[name]
        for part in SETS:
            least = 100 / len(sets_of(request)[part][1])
            assert row["accuracy"][part]["mean"] == pytest.approx(np.mean([run[part] for run in runs]), abs=least)
        assert row["seconds"]["mean"] > 0
    assert by_name(trained)["retrained"]["accuracy"]["forget"]["mean"] == 0
    assert by_name(trained)["original"]["accuracy"]["forget"]["mean"] > 90
    assert trained["settings"]["training"].split(":")[0] in ("stacked", "sequential")  # whichever was faster


def test_the_folder_the_report_and_the_verdict(
    given: dict[str, Any], request_files: tuple[Request, dict[str, str]]
) -> None:
    request, before = request_files
    out = request.folder / "given"
    assert {path.name for path in out.iterdir()} == FILES
    report = (out / "report.html").read_text()
    assert all(f">{name}" in report or f"{name}<" in report for name in ["original", *METHODS, "retrained"])
    assert given["verdict"].replace("&", "&amp;") in report or given["verdict"] in report
    assert request.hashes() == before
    gaps = {m["name"]: np.mean([abs(g["mean"]) for g in m["gap"].values()]) for m in given["models"]}
    best = min(METHODS, key=lambda name: gaps[name])
    assert f"Of 6 methods over 3 seeds, {best} comes closest" in given["verdict"]
    assert f"{gaps[best]:.2f} points away" in given["verdict"]
    assert any("over 3 runs with other seeds" in limit for limit in given["limits"])


def test_curves_and_probes_are_means_over_the_seeds(given: dict[str, Any]) -> None:
    for name, row in by_name(given).items():
        assert set(given["probes"][name]) == {"1", "3"}
        for attack, curve in given["roc"][name].items():
            assert curve["fpr"] == sorted(curve["fpr"]) and curve["tpr"] == sorted(curve["tpr"])
            assert (curve["fpr"][-1], curve["tpr"][-1]) == (1, 1)
            area = np.trapezoid(curve["tpr"], curve["fpr"])
            assert area == pytest.approx(row["attacks"][attack]["auc"]["mean"], abs=0.06)  # of steps, averaged
    before, after = (np.array(given["confusion"][when]).sum() for when in ("before", "after"))
    assert (before, after) == (80, 3 * 80)  # test samples, added up over the seeds of what differs between them


def test_the_same_method_with_other_settings_has_its_own_label(
    request_files: tuple[Request, dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    request = request_files[0]
    methods: list[Any] = [{"method": "ssd", "label": f"ssd at {alpha:g}", "settings": {"alpha": alpha}}
                          for alpha in (1.0, 100000.0)]  # fmt: skip
    more = {"methods": methods, "reference": request.path("reference.safetensors")}
    found = compare(request, "labels", **more)
    rows = by_name(found)
    assert list(rows) == ["original", "ssd at 1", "ssd at 100000", "retrained"]
    for part, figure in rows["ssd at 100000"]["accuracy"].items():  # a threshold that nothing passes
        assert figure["mean"] == rows["original"]["accuracy"][part]["mean"]
    assert rows["ssd at 1"]["accuracy"]["forget"]["mean"] < 50
    assert found["settings"]["ssd at 1"] == {"method": "ssd", "alpha": 1.0}
    capsys.readouterr()
    config = write_request(request, "twice", methods=["ssd", *methods[:1], "ssd"])
    assert cli.main(["compare", "--config", config, "--out", request.path("twice")]) == 2
    assert "ssd is there twice; give one of them another label" in capsys.readouterr().err
    assert not (request.folder / "twice").exists()


def test_class_forgetting_is_left_out_with_the_reason(request_files: tuple[Request, dict[str, str]]) -> None:
    request = request_files[0]
    more = {"forget": f"index:{request.path('forget.json')}", "methods": None, "seeds": 1, "method_samples": 20}
    found = compare(request, "samples", **more, reference=request.path("reference.safetensors"))
    assert "class-forgetting" not in by_name(found) and "ssd" in by_name(found)
    assert "class-forgetting was left out: the forgotten samples are not whole classes." in found["limits"]
    assert set(by_name(found)["ssd"]["accuracy"]) == {"forget", "retain", "test"}
    assert found["probes"] is None
    assert all("low" not in e for e in by_name(found)["ssd"]["accuracy"].values())  # of one run there is no interval


def without_times(findings: dict[str, Any]) -> dict[str, Any]:
    models = [{k: v for k, v in model.items() if k != "seconds"} for model in findings["models"]]
    return {**findings, "models": models, "verdict": findings["verdict"].split(", in ")[0]}


def test_resume_repeats_nothing(
    request_files: tuple[Request, dict[str, str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    request = request_files[0]
    config = write_request(request, "resumed", weights=None)
    arguments = ["compare", "--config", config, "--out", request.path("resumed")]
    calls: list[str] = []
    run_method, train, measure = comparison.run_method, comparison.train, comparison.measure

    def counted_run(task: Any, name: str, method: Any, model: Any, seed: int) -> Any:
        if len(calls) == stop:
            raise KeyboardInterrupt
        calls.append(f"{seed}-{name}")
        return run_method(task, name, method, model, seed)

    def counted_train(*arguments: Any) -> Any:
        calls.append("train")
        return train(*arguments)

    def counted_measure(*arguments: Any) -> Any:
        calls.append("measure")
        return measure(*arguments)

    monkeypatch.setattr(comparison, "run_method", counted_run)
    monkeypatch.setattr(comparison, "train", counted_train)
    monkeypatch.setattr(comparison, "measure", counted_measure)
    stop = 2 + 2 * 6 + 2 + 2  # two trainings; seed 3: six methods, each measured, and two models; seed 4: one method
    first: list[str] = []
    assert cli.main(arguments) == 130
    assert "interrupted" in capsys.readouterr().err
    first, calls = calls, []
    assert not (request.folder / "resumed").exists()
    assert cli.main(arguments) == 1  # a run was interrupted: say so, and how to go on
    assert "--resume" in capsys.readouterr().err and not calls
    stop = -1
    assert cli.main([*arguments, "--resume"]) == 0
    assert "train" not in calls and first.count("train") == 2
    methods = [c for c in first + calls if c not in ("train", "measure")]
    assert methods == [f"{seed}-{name}" for seed in (3, 4) for name in METHODS]  # each once
    assert (first + calls).count("measure") == 2 * 8
    assert cli.main([*arguments, "--resume"]) == 1  # it is finished: nothing to go on with
    capsys.readouterr()
    found = findings_in(request.folder / "resumed")
    assert [m["name"] for m in found["models"]] == ["original", *METHODS, "retrained"]


def test_two_runs_from_the_same_files_agree(
    given: dict[str, Any], request_files: tuple[Request, dict[str, str]]
) -> None:
    request = request_files[0]
    again = compare(request, "again", reference=request.path("reference.safetensors"), seeds=3)
    assert without_times(again) == without_times(given)


# ---------------------------------------------------------------------------------------------------------------------
# Digits.


def test_digits_are_data_that_the_command_line_takes() -> None:
    expected = Digits.load(torch.device("cpu"), 0)
    for function, (x, y) in ((digits_train, expected.train), (digits_test, expected.test)):
        inputs, targets = function()
        assert torch.equal(inputs, x) and torch.equal(targets, y)
        assert (inputs.dtype, targets.dtype) == (torch.float32, torch.int64)
    assert digits_train()[0].shape == (1400, 1, 8, 8) and digits_test()[0].shape == (397, 1, 8, 8)
    data = open_samples("fastunlearn.demo:digits_train")
    assert torch.equal(data.batch(torch.tensor([7, 3]))[0], digits_train()[0][[7, 3]])
    assert not set(map(bytes, digits_train()[0].numpy().reshape(1400, -1))) & set(
        map(bytes, digits_test()[0].numpy().reshape(397, -1))
    )


def test_digits_over_three_seeds_in_less_than_five_minutes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All methods and retraining, from nothing: three originals and three references are trained, too."""
    config = {
        "model": "fastunlearn.demo:small_cnn", "data": "fastunlearn.demo:digits_train",
        "test": "fastunlearn.demo:digits_test", "forget": "class:3",
        "methods": [
            {"method": "deepclean",
             "settings": {"fraction": 0.3, "protect": ["BatchNorm2d"], "finetune_epochs": 2, "lr": 0.05}},
            {"method": "class-forgetting", "settings": {"alpha_retain": 30.0, "alpha_forget": 10.0}},
            {"method": "lcodec",
             "settings": {"damping": 0.001, "group": True, "perturbations": 100, "hessian_samples": 64}},
            "ssd", "finetune", "gradient-ascent",
        ],
        "training": {"epochs": 6}, "bootstrap": 100,
    }  # fmt: skip
    (tmp_path / "digits.yaml").write_text(yaml.safe_dump(config))
    start = time.perf_counter()
    assert cli.main(["compare", "--config", str(tmp_path / "digits.yaml"), "--out", str(tmp_path / "out")]) == 0
    seconds = time.perf_counter() - start
    assert seconds < 300
    said = capsys.readouterr()
    findings = findings_in(tmp_path / "out")
    rows = by_name(findings)
    assert list(rows) == ["original", *METHODS, "retrained"]
    for name, row in rows.items():
        line = next(line for line in said.out.splitlines() if line.strip().startswith(name))
        assert f"{row['accuracy']['forget']['mean']:.1f}" in line and f"({row['gap']['forget']['mean']:+.1f})" in line
        assert f"{max(a['tpr']['0.01']['mean'] for a in row['attacks'].values()):.1%}".replace("%", " %") in line
        assert row["accuracy"]["forget"]["runs"] == 3
    assert "…" not in said.out and "attack AUC" in said.out and "test of forgotten" in said.out
    assert all(gap["mean"] == 0 for gap in rows["retrained"]["gap"].values())
    assert rows["retrained"]["accuracy"]["forget"]["mean"] == 0
    assert rows["original"]["accuracy"]["forget"]["mean"] > 99
    for name in ("deepclean", "class-forgetting"):
        assert abs(rows[name]["gap"]["forget"]["mean"]) <= 2
        assert abs(rows[name]["gap"]["test"]["mean"]) <= 6
    assert rows["finetune"]["accuracy"]["forget"]["mean"] > 90  # one epoch forgets nothing
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES | {"pictures"}
