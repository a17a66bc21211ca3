"""What is said in one sentence of the figures, and that it claims no more than they show."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from commands import make_request

from fastunlearn.cli import main
from fastunlearn.jobs.findings import joined, model_row, verdict


def row(accuracy: float, auc: float, half: float = 0.01, **more: tuple[float, float]) -> dict[str, Any]:
    """A model's figures; ``more`` are further attacks, (AUC, half of its interval)."""
    attacks = {"loss": (auc, half)} | {name.replace("_", "-"): figures for name, figures in more.items()}
    found = {
        "accuracy": {"forget": accuracy, "test": 90.0},
        "attacks": {
            name: {"auc": {"mean": mean, "low": mean - h, "high": mean + h, "runs": 1}, "tpr": {}}
            for name, (mean, h) in attacks.items()
        },
    }
    return model_row("X", "unlearned", [found])


ORIGINAL, RETRAINED = row(100, 0.8), row(88, 0.5)


@pytest.mark.parametrize(
    ("unlearned", "word"),
    [
        (row(88.5, 0.51), "Forgotten, as far as these measures see"),
        (row(88.5, 0.7), "Partly forgotten"),  # by accuracy, but the attack tells
        (row(100, 0.51), "Partly forgotten"),  # the attack does not tell, but all of it is known
        (row(93, 0.8), "Partly forgotten"),  # more than half of the way in accuracy
        (row(98, 0.64), "Partly forgotten"),  # of the way of the attack
        (row(98, 0.7), "Not forgotten"),
        (row(100, 0.8), "Not forgotten"),
        (row(60, 0.5), "Partly forgotten"),  # not known by any attack, but far below a model that never saw them
        (row(60, 0.1), "Not forgotten"),  # nor is an attack that is wrong too often
        (row(88.5, 0.51, U_LiRA=(0.9, 0.05)), "Partly forgotten"),
    ],
)
def test_the_verdict_compares_with_the_retrained_and_with_the_original(unlearned: dict[str, Any], word: str) -> None:
    assert verdict(unlearned, ORIGINAL, RETRAINED, 2500).startswith(f"{word}: after X the accuracy")


def test_what_changed_nothing_is_never_called_forgotten() -> None:
    """Neither where accuracies were alike from the start, nor where samples are so few that all is chance."""
    for accuracy, auc, goal, samples, half in (
        (100.0, 0.62, 98.5, 2500, 0.01),  # told by the attack alone
        (100.0, 0.9, 75.0, 4, 0.4),  # four samples
        (0.0, 0.56, 0.0, 143, 0.05),  # a model that was never trained
        (50.0, 0.5, 50.0, 1, 0.5),
    ):
        nothing_done = row(accuracy, auc, half)
        said = verdict(nothing_done, nothing_done, row(goal, 0.5, half), samples)
        assert said.startswith(("Not forgotten", "Undecided")), said


def test_where_the_original_passes_for_retrained_nothing_is_decided() -> None:
    said = verdict(row(50, 0.5, 0.4), row(100, 0.9, 0.4), row(75, 0.5, 0.4), 4)
    assert said.startswith("Undecided, these measures do not even tell the original from a model that never saw")


def test_intervals_over_runs_end_where_the_figures_do() -> None:
    def run(percent: float, part: float) -> dict[str, Any]:
        figure = {"mean": part, "runs": 1}
        return {
            "accuracy": {"forget": percent},
            "per_class": {"forget": {"loss": {"accuracy": percent, "samples": percent}}},  # a class of an odd name
            "loss": {"forget": part},
            "js": {"forget": part},
            "tow": part,
            "attacks": {"loss": {"auc": figure, "tpr": {"0.01": figure}}},
            "svc": {"mean": percent, "runs": 1},
            "relearn": part,
            "seconds": part,
            "gap": {"forget": percent - 50},
            "other": percent,
        }

    runs = [run(0, 0), run(100, 0.5)]
    found = joined(runs)

    def ends(estimate: dict[str, Any]) -> tuple[float, float]:
        return estimate["low"], estimate["high"]

    for percent in (found["accuracy"]["forget"], found["per_class"]["forget"]["loss"]["accuracy"], found["svc"]):
        assert ends(percent) == (0, 100)
    for share in (found["tow"], found["attacks"]["loss"]["auc"], found["attacks"]["loss"]["tpr"]["0.01"]):
        assert ends(share) == (0, 1)
    assert ends(found["js"]["forget"]) == (0, math.log(2))
    assert ends(found["gap"]["forget"]) == (-100, 100)
    for above in (found["loss"]["forget"], found["relearn"], found["seconds"]):
        assert above["low"] == 0 and above["high"] > 3
    assert found["other"]["low"] < -500 and found["other"]["high"] > 600


def test_evaluate_speaks_of_what_it_measured_and_of_how_many_samples(tmp_path: Path) -> None:
    """Class 1 alone is attacked with, by the 20 test samples that are like the forgotten; nothing was unlearned."""
    request = make_request(tmp_path)
    flags = ["--model", f"{request.path('net.py')}:net", "--weights", request.path("weights.safetensors"),
             "--reference", request.path("weights.safetensors"), "--data", request.path("train.npz"),
             "--test", request.path("test.npz"), "--forget", "class:1", "--bootstrap", "20", "--relearn", "0",
             "--out", request.path("out")]  # fmt: skip
    assert main(["evaluate", *flags]) == 0
    found = json.loads((tmp_path / "out" / "findings.json").read_text())
    assert found["request"]["samples"]["test of forgotten"] == 20 and found["request"]["samples"]["test"] == 60
    limits = " ".join(found["limits"])
    for rate, least in (("0.1 %", "1,000"), ("1 %", "100")):
        assert f"The true positive rate at {rate} false positives rests on none at all: there are 20 " in limits
        assert f"{least} are the fewest" in limits
    assert "60 test samples" not in limits
    assert "were changed" not in limits and "approximate" not in limits and "not a proof of erasure" in limits
    assert found["confusion"]["after"] is None and sum(map(sum, found["confusion"]["before"])) == 80
    assert set(found["activation_distance"]) == {"model", "retrained"}
    assert set(found["activation_distance"]["model"].values()) == {0}


def test_a_comparison_says_that_its_choice_is_made_by_its_own_figures(tmp_path: Path) -> None:
    request = make_request(tmp_path)
    flags = ["--model", f"{request.path('net.py')}:net", "--weights", request.path("weights.safetensors"),
             "--reference", request.path("weights.safetensors"), "--data", request.path("train.npz"),
             "--test", request.path("test.npz"), "--forget", "class:1", "--bootstrap", "20", "--relearn", "0",
             "--seeds", "1"]  # fmt: skip
    assert main(["compare", *flags, "--methods", "finetune,gradient-ascent", "--out", request.path("two")]) == 0
    found = json.loads((tmp_path / "two" / "findings.json").read_text())
    assert found["closest"] in ("finetune", "gradient-ascent")
    assert f"{found['closest']} was chosen by these very figures, which flatters it." in found["limits"]
    assert "None of 2 methods with one seed comes closer" in found["verdict"]  # the original is the reference here
    assert f"the closest is {found['closest']}" in found["verdict"]
    assert main(["compare", *flags, "--methods", "finetune", "--out", request.path("one")]) == 0
    assert "flatters" not in (tmp_path / "one" / "findings.json").read_text()
