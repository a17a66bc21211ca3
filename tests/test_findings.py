"""What runs measured, joined, and said in one sentence: against values worked out by hand."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
from rich.console import Console

from fastunlearn.jobs.findings import closest, comparison_verdict, distance, joined, mean_roc, model_row, verdict
from fastunlearn.report.table import models_table

T2, T3 = 12.706204736, 4.30265273  # Student's t at 97.5 % with one and with two degrees of freedom


def one(mean: float, half: float | None = None, runs: int = 1) -> dict[str, Any]:
    return {"mean": mean, "runs": runs} | ({} if half is None else {"low": mean - half, "high": mean + half})


def row(
    name: str,
    forget: float,
    test: float,
    role: str = "unlearned",
    aucs: dict[str, dict[str, Any]] | None = None,
    reference: tuple[float, float] | None = None,
    seconds: float | None = 2.0,
    runs: int = 1,
) -> dict[str, Any]:
    gap = None if reference is None else {"forget": one(forget - reference[0]), "test": one(test - reference[1])}
    rate = {"0.001": one(0.0), "0.01": one(0.04)}
    return {
        "name": name, "role": role, "accuracy": {"forget": one(forget, runs=runs), "test": one(test, runs=runs)},
        "gap": gap, "attacks": {attack: {"auc": auc, "tpr": rate} for attack, auc in (aucs or {}).items()},
        "seconds": None if seconds is None else one(seconds),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Joining runs.


def test_numbers_of_one_run_become_estimates_without_an_interval() -> None:
    assert joined([{"a": 3, "b": {"c": 0.5}}]) == {"a": one(3), "b": {"c": one(0.5)}}


def test_numbers_of_several_runs_get_student_s_interval() -> None:
    found = joined([{"a": 1.0}, {"a": 3.0}])["a"]
    assert found == pytest.approx({"mean": 2.0, "runs": 2, "low": 2 - T2, "high": 2 + T2})  # s / sqrt(2) = 1
    found = joined([4.0, 5.0, 9.0])  # s^2 = 7
    half = T3 * math.sqrt(7 / 3)
    assert found == pytest.approx({"mean": 6.0, "runs": 3, "low": 6 - half, "high": 6 + half})


def test_an_interval_within_a_run_gives_way_to_that_over_runs() -> None:
    first, second = one(0.6, 0.05), one(0.61, 0.01)
    assert joined([{"auc": first}]) == {"auc": first}
    half = 0.005 * T2
    assert joined([{"auc": first}, {"auc": second}])["auc"] == pytest.approx(
        {"mean": 0.605, "runs": 2, "low": 0.605 - half, "high": 0.605 + half}
    )


def test_an_interval_ends_where_the_figure_does() -> None:
    found = joined([{"auc": 0.9, "accuracy": {"test": 1.0}, "gap": {"test": 1.0}, "kl": {"test": 0.0}},
                    {"auc": 1.0, "accuracy": {"test": 3.0}, "gap": {"test": 3.0}, "kl": {"test": 1.0}}])  # fmt: skip
    assert (found["auc"]["high"], found["accuracy"]["test"]["low"], found["kl"]["test"]["low"]) == (1.0, 0.0, 0.0)
    assert found["auc"]["low"] == pytest.approx(0.95 - 0.05 * T2)
    assert found["gap"]["test"]["low"] == pytest.approx(2 - T2)  # a gap may be below zero


def test_what_is_missing_in_one_run_is_missing() -> None:
    assert joined([{"kl": 0.5, "tow": 1.0}, {"kl": None, "tow": 1.0}])["kl"] is None
    assert joined([None, None]) is None
    assert joined([{"a": 1.0, "b": 2.0}, {"a": 1.0}]) == {"a": {"mean": 1.0, "runs": 2, "low": 1.0, "high": 1.0}}
    assert joined([{}]) == {}


def test_a_row_has_its_name_and_role_as_they_are() -> None:
    found = model_row("ssd", "unlearned", [{"relearn": 3, "svc": None}, {"relearn": 5, "svc": None}])
    assert (found["name"], found["role"], found["svc"]) == ("ssd", "unlearned", None)
    assert found["relearn"]["mean"] == 4


def test_curves_are_averaged_at_the_same_false_positive_rates() -> None:
    first = {"fpr": [0.0, 0.5, 1.0], "tpr": [0.2, 0.6, 1.0]}
    second = {"fpr": [0.0, 0.25, 1.0], "tpr": [0.0, 0.8, 1.0]}
    assert mean_roc([first]) == first
    found = mean_roc([first, second])
    assert found["fpr"] == [0.0, 0.25, 0.5, 1.0]
    assert found["tpr"] == pytest.approx([0.1, 0.5, 0.7, 1.0])  # a curve keeps its rate until its next point


def test_where_a_curve_rises_straight_up_its_top_counts() -> None:
    steep = {"fpr": [0.0, 0.0, 0.0, 1.0], "tpr": [0.0, 0.3, 0.7, 1.0]}
    flat = {"fpr": [0.0, 1.0], "tpr": [0.0, 1.0]}
    assert mean_roc([steep, flat]) == {"fpr": [0.0, 1.0], "tpr": [0.35, 1.0]}


def test_a_long_curve_is_thinned_and_keeps_its_ends() -> None:
    curves = [{"fpr": [(i + shift) / 1000 for i in range(1000)] + [1.0], "tpr": [i / 1000 for i in range(1000)] + [1.0]}
              for shift in (0, 0)]  # fmt: skip
    found = mean_roc(curves, points=50)
    assert len(found["fpr"]) == 50 and (found["fpr"][0], found["fpr"][-1]) == (0.0, 1.0)
    assert found["fpr"] == sorted(found["fpr"]) and found["tpr"] == sorted(found["tpr"])
    assert found["tpr"] == pytest.approx(found["fpr"])


# ---------------------------------------------------------------------------------------------------------------------
# The verdict.


def said(forget: float, aucs: tuple[float, float] | None = None, goal: float = 80.0, samples: int = 10_000) -> str:
    """Of a model that had 100 % before, where the retrained one has ``goal``; AUCs of ours and of the retrained."""
    ours, theirs = ({} if aucs is None else {"loss": one(auc)} for auc in (aucs or (0.0, 0.0)))
    original = row("original", 100.0, 90.0, "original")
    reference = row("retrained", goal, 89.0, "reference", theirs)
    return verdict(row("DeepClean", forget, 88.5, aucs=ours), original, reference, samples)


def test_near_the_retrained_model_in_accuracy_and_attacks_is_forgotten() -> None:
    text = said(81.0, (0.52, 0.5))
    assert text == (
        "Forgotten, as far as these measures see: after DeepClean the accuracy on the forgotten samples is 81.0 %, "
        "where a model that never saw them has 80.0 % (before: 100.0 %) and the strongest attack's AUC is 0.020 away "
        "from that model's, at 1.5 points less test accuracy."
    )


@pytest.mark.parametrize(
    ("forget", "aucs", "word"),
    [
        (78.1, (0.5, 0.5), "Forgotten"),
        (77.9, (0.5, 0.5), "Partly"),  # 2.1 points away, more than 2, which is less than half of 20
        (80.0, (0.56, 0.5), "Partly"),  # an attack finds them
        (80.0, (0.44, 0.5), "Partly"),  # or finds that they are odd
        (80.0, None, "Forgotten"),
        (90.0, (0.5, 0.5), "Partly"),  # half of the way
        (90.1, (0.5, 0.5), "Not forgotten"),
        (100.0, (0.9, 0.5), "Not forgotten"),
        (50.0, (0.5, 0.5), "Not forgotten"),  # farther away than before, on the other side
    ],
)
def test_how_far_is_forgotten(forget: float, aucs: tuple[float, float] | None, word: str) -> None:
    assert said(forget, aucs).startswith(word)


def test_of_few_samples_chance_is_allowed_for() -> None:
    """Two standard errors of 80 % over 16 samples are 20 points."""
    assert said(95.0, samples=16).startswith("Undecided")  # the original is within 20 points, too
    assert said(75.5, samples=256, goal=80.0).startswith("Forgotten")  # 5 points
    assert said(95.0, samples=400).startswith("Not forgotten")  # 4 points


def test_an_attack_is_allowed_its_own_interval() -> None:
    original, reference = row("original", 100.0, 90.0), row("retrained", 80.0, 90.0, aucs={"loss": one(0.5, 0.06)})
    wide, narrow = (row("ssd", 80.0, 90.0, aucs={"loss": one(0.59, half)}) for half in (0.08, 0.01))
    assert verdict(wide, original, reference, 100).startswith("Forgotten")  # hypot(0.06, 0.08) = 0.1
    assert verdict(narrow, original, reference, 100).startswith("Partly")


def test_u_lira_is_compared_with_chance() -> None:
    original, reference = row("original", 100.0, 90.0), row("retrained", 80.0, 90.0)
    text = verdict(row("ssd", 80.0, 90.0, aucs={"U-LiRA": one(0.6)}), original, reference, 100)
    assert text.startswith("Partly") and "AUC is 0.100 away" in text


def test_without_a_reference_nothing_is_claimed() -> None:
    text = verdict(row("SSD", 12.0, 91.0), row("original", 100.0, 90.0), None, 100)
    assert text == (
        "SSD took the accuracy on the forgotten samples from 100.0 % to 12.0 %, at 1.0 points more test accuracy; "
        "without a retrained reference nothing here says how a model that never saw them behaves."
    )
    assert "orgotten, as far" not in text


def test_without_test_data_the_cost_is_on_what_was_retained() -> None:
    rows = [row("ssd", 12.0, 91.0), row("original", 100.0, 90.0)]
    for each in rows:
        each["accuracy"]["retain"] = each["accuracy"].pop("test")
    assert "at 1.0 points more retained accuracy" in verdict(rows[0], rows[1], None, 100)


# ---------------------------------------------------------------------------------------------------------------------
# A comparison.


def compared(runs: int = 3) -> list[dict[str, Any]]:
    goal = (80.0, 90.0)
    return [
        row("original", 100.0, 91.0, "original", reference=goal, runs=runs),  # 20 and 1 points away
        row("ssd", 70.0, 88.0, reference=goal, runs=runs, seconds=0.25),  # 10 and 2
        row("deepclean", 83.0, 91.0, reference=goal, runs=runs, seconds=1.5),  # 3 and 1
        row("finetune", 77.0, 89.0, "baseline", reference=goal, runs=runs),  # 3 and 1, too
        row("retrained", *goal, "reference", reference=goal, runs=runs, seconds=60.0),
    ]


def test_the_closest_has_the_smallest_mean_distance_and_comes_first() -> None:
    models = compared()
    assert [distance(m) for m in models] == pytest.approx([10.5, 6.0, 2.0, 2.0, 0.0])
    assert closest(models)["name"] == "deepclean"  # neither an original nor the reference wins
    models[3]["gap"]["test"]["mean"] = 0.5
    assert closest(models)["name"] == "finetune"


def test_the_verdict_of_a_comparison() -> None:
    models = compared()
    assert comparison_verdict(models, closest(models)) == (
        "Of 3 methods over 3 seeds, deepclean comes closest to a model that never saw the data: 2.00 points away in "
        "accuracy, on average over 2 sets (doing nothing: 10.50), in 1.5 s where retraining takes 60 s."
    )


def test_doing_nothing_may_be_closest() -> None:
    models = compared()
    models[0]["gap"] = {"forget": one(1.0), "test": one(0.0)}
    text = comparison_verdict(models, closest(models))
    assert text == (
        "None of 3 methods over 3 seeds comes closer to a model that never saw the data than doing nothing, 0.50 "
        "points away in accuracy; the closest is deepclean: 2.00 points away in accuracy, on average over 2 sets, in "
        "1.5 s where retraining takes 60 s."
    )


def test_a_given_reference_has_no_time() -> None:
    models = compared()
    models[-1]["seconds"] = None
    assert comparison_verdict(models, closest(models)).endswith("(doing nothing: 10.50), in 1.5 s.")


# ---------------------------------------------------------------------------------------------------------------------
# The table.


def shown(models: list[dict[str, Any]], width: int) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(models_table({"models": models}))
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_the_table_has_a_line_for_each_model_and_cuts_nothing() -> None:
    models = compared()
    models[2]["attacks"] = {
        "loss": {"auc": one(0.55), "tpr": {"0.01": one(0.02)}}, "entropy": {"auc": one(0.4), "tpr": {"0.01": one(0.03)}}
    }  # fmt: skip
    text = shown(models, 200)
    line = next(line for line in text.splitlines() if "deepclean" in line)
    assert line.split() == ["deepclean", "83.0", "(+3.0)", "91.0", "(+1.0)", "0.400", "3.0", "%", "1.50"]
    narrow = shown(models, 64)
    assert "…" not in narrow
    for word in ("original", "deepclean", "finetune", "retrained", "(+20.0)", "0.400"):
        assert word in narrow
