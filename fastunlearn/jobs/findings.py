"""What runs measured, joined: figures over seeds, and in one sentence whether the samples are forgotten."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastunlearn.evaluate.estimate import Estimate
from fastunlearn.evaluate.seeds import ANY, RANGES

Row = dict[str, Any]

NEAR_POINTS = 2.0  # points of accuracy that count as the same, beside what chance allows
NEAR_AUC = 0.05
NO_GAIN = 0.05  # points of accuracy that are no step towards the retrained model
_FROM_ZERO = (0.0, math.inf)
_SHARE = (0.0, 1.0)
_PERCENT = (0.0, 100.0)
_RANGES = {
    **RANGES, "loss": _FROM_ZERO, "auc": _SHARE, "tpr": _SHARE, "svc": _PERCENT, "relearn": _FROM_ZERO,
    "seconds": _FROM_ZERO, "perplexity": (1.0, math.inf), "factor": _FROM_ZERO, "overlap": _PERCENT,
    "rouge_l": _PERCENT, "exact": _PERCENT, "questions": _PERCENT,
}  # fmt: skip


def joined(values: Sequence[Any], limits: tuple[float, float] = ANY) -> Any:
    """The same tree as each of ``values`` with an :class:`Estimate` as a dict in place of every number.

    Of one run, an estimate made within it (a bootstrap's) is kept; of several, the interval is that over the runs.
    What is missing (None) in one run is missing. Intervals end at ``limits``, or where the figure of this name does.
    """
    first = values[0]
    if any(value is None for value in values):
        return None
    if _is_estimate(first):
        if len(values) > 1 and any(value["mean"] is None for value in values):
            return None  # one of them has no bound
        return first if len(values) == 1 else Estimate.over([v["mean"] for v in values], limits).as_dict()
    if isinstance(first, dict):
        shared = [key for key in first if all(key in v for v in values)]
        return {key: joined([v[key] for v in values], _RANGES.get(key, limits)) for key in shared}
    return Estimate.over(list(values), limits).as_dict()


def _is_estimate(value: Any) -> bool:
    return isinstance(value, dict) and {"mean", "runs"} <= set(value)


def model_row(name: str, role: str, rows: Sequence[Row]) -> Row:
    """One model's entry: ``rows`` are its measurements, one per run."""
    return {"name": name, "role": role, **joined(rows)}


def mean_roc(curves: Sequence[dict[str, list[float]]], points: int = 200) -> dict[str, list[float]]:
    """True positive rates averaged over runs at the same false positive rates; the curve itself for one run."""
    if len(curves) == 1:
        return curves[0]
    grid = sorted({rate for curve in curves for rate in curve["fpr"]})
    if len(grid) > points:
        grid = [grid[round(i * (len(grid) - 1) / (points - 1))] for i in range(points)]
    rates = [[_at(curve, rate) for rate in grid] for curve in curves]
    return {"fpr": grid, "tpr": [math.fsum(column) / len(curves) for column in zip(*rates, strict=True)]}


def _at(curve: dict[str, list[float]], fpr: float) -> float:
    """The largest true positive rate at no more false positives."""
    return max(t for f, t in zip(curve["fpr"], curve["tpr"], strict=True) if f <= fpr)


def verdict(unlearned: Row, original: Row, reference: Row | None, forgotten: int) -> str:
    """One sentence: is it forgotten, compared with never having seen it, and what did it cost?

    Where the original itself passes for a model that never saw the samples, these measures can tell nothing, and the
    sentence says so: with few samples chance alone makes anything alike.
    """
    name, accuracy = unlearned["name"], unlearned["accuracy"]
    cost = _cost(unlearned, original)
    if reference is None:
        return (
            f"{name} took the accuracy on the forgotten samples from {_percent(original['accuracy']['forget'])} to "
            f"{_percent(accuracy['forget'])}{cost}; without a retrained reference nothing here says how a model that "
            "never saw them behaves."
        )
    goal = reference["accuracy"]["forget"]
    # Two standard errors of the accuracy of so many samples.
    chance = 200 * math.sqrt(max(goal["mean"] * (100 - goal["mean"]), 0.0) / 100**2 / max(forgotten, 1))
    before, after = (abs(row["accuracy"]["forget"]["mean"] - goal["mean"]) for row in (original, unlearned))
    known_before, known = (gap > max(NEAR_POINTS, chance) for gap in (before, after))
    gaps_before, gaps = _auc_gaps(original, reference), _auc_gaps(unlearned, reference)
    told_before, told = _told(gaps_before), _told(gaps)
    if known or told:
        halved = known_before and (not known or after <= before / 2)
        shared = [gaps[name][0] for name in gaps_before if name in gaps]
        hidden = told_before and (not told or max(shared) <= max(gap for gap, _ in gaps_before.values()) / 2)
        word = "Partly forgotten" if halved or hidden else "Not forgotten"
    elif known_before or told_before:
        word = "Forgotten, as far as these measures see"
    else:
        word = "Undecided, these measures do not even tell the original from a model that never saw the samples"
    attack = f" and the strongest attack's AUC is {max(gaps.values())[0]:.3f} away from that model's" if gaps else ""
    return (
        f"{word}: after {name} the accuracy on the forgotten samples is {_percent(accuracy['forget'])}, where a model "
        f"that never saw them has {_percent(goal)} (before: {_percent(original['accuracy']['forget'])}){attack}{cost}."
    )


def sentences(limits: Iterable[str]) -> list[str]:
    """What the attacks say that they can not say, each once, as the report has it."""
    return sorted({limit[0].upper() + limit[1:] + "." for limit in limits})


def distance(row: Row) -> float:
    """Mean over the sets of the points of accuracy from the reference."""
    gaps = [abs(gap["mean"]) for gap in row["gap"].values()]
    return math.fsum(gaps) / len(gaps)


def closest(models: Sequence[Row]) -> Row:
    """The method whose accuracies are closest to the retrained model's; the first of several."""
    return min((m for m in models if m["role"] in ("unlearned", "baseline")), key=distance)


def comparison_verdict(models: Sequence[Row], best: Row) -> str:
    """One sentence: which method comes closest to never having seen the data, how close, and in what time."""
    original = next(m for m in models if m["role"] == "original")
    reference = next(m for m in models if m["role"] == "reference")
    tried = sum(m["role"] in ("unlearned", "baseline") for m in models)
    runs = best["accuracy"]["forget"]["runs"]
    over = f"over {runs} seeds" if runs > 1 else "with one seed"
    sets = len(best["gap"])
    spent = f", in {best['seconds']['mean']:.3g} s"
    if reference["seconds"] is not None:
        spent += f" where retraining takes {reference['seconds']['mean']:.3g} s"
    away = f"{distance(best):.2f} points away in accuracy, on average over {sets} sets"
    if distance(best) > distance(original) - NO_GAIN:
        return (
            f"None of {tried} methods {over} comes closer to a model that never saw the data than doing nothing, "
            f"{distance(original):.2f} points away in accuracy; the closest is {best['name']}: {away}{spent}."
        )
    return (
        f"Of {tried} methods {over}, {best['name']} comes closest to a model that never saw the data: {away} "
        f"(doing nothing: {distance(original):.2f}){spent}."
    )


def _percent(estimate: Row) -> str:
    return f"{estimate['mean']:.1f} %"


def _cost(unlearned: Row, original: Row) -> str:
    where = "test" if "test" in unlearned["accuracy"] else "retain"
    lost = original["accuracy"][where]["mean"] - unlearned["accuracy"][where]["mean"]
    what = "test" if where == "test" else "retained"
    if abs(lost) < 0.05:
        return f", with the same {what} accuracy"
    return f", at {abs(lost):.1f} points {'less' if lost >= 0 else 'more'} {what} accuracy"


def _auc_gaps(row: Row, reference: Row) -> dict[str, tuple[float, float]]:
    """Per attack, the distance of the AUC from the reference's, and how much of it chance allows at 95 %.

    U-LiRA has the retrained models on its other side: its distance is that from 0.5.
    """
    found = {}
    for name, attack in row["attacks"].items():
        if name in reference["attacks"]:
            ours, theirs = attack["auc"], reference["attacks"][name]["auc"]
            found[name] = (abs(ours["mean"] - theirs["mean"]), math.hypot(half_width(ours), half_width(theirs)))
        elif name == "U-LiRA":
            found[name] = (abs(attack["auc"]["mean"] - 0.5), half_width(attack["auc"]))
    return found


def _told(gaps: Mapping[str, tuple[float, float]]) -> bool:
    """Whether any attack tells the model from one that never saw the samples, by more than chance."""
    return any(gap > max(NEAR_AUC, chance) for gap, chance in gaps.values())


def half_width(estimate: Row) -> float:
    """Half of the interval's width; 0 without one."""
    return (estimate["high"] - estimate["low"]) / 2 if "high" in estimate else 0.0
