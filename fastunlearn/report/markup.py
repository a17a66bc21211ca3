"""What every part of the report is written with: the models and their colours, figures as text, tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from typing import Any, TypeAlias, TypeVar

from fastunlearn.report import charts
from fastunlearn.report.charts import finite, numbers, shorten, text

Findings: TypeAlias = Mapping[str, Any]
Estimated: TypeAlias = Mapping[str, Any] | None
T = TypeVar("T")

MOST_CLASSES = 20
MOST_LAYERS = 40
MOST_ATTACKS = 4
MOST_SPECTRA = 6
MOST_SLOPES = 80
MOST_SETTINGS = 200
MOST_COLUMNS = 8
WORST = 5
SET_NAMES = {
    "forget": "forgotten",
    "retain": "retained",
    "test": "test",
    "test of forgotten": "test, forgotten classes",
}
ROLES = {
    "original": "before unlearning",
    "measured": "as it was given",
    "unlearned": "unlearned",
    "reference": "retrained without the data",
    "baseline": "baseline",
}


class View:
    """The findings with what every section asks of them: who the models are, their colours, names for charts.

    Attributes:
        models: as in the findings; ``original``, ``reference`` and ``unlearned`` are those of that role among them,
            ``tried`` the unlearned and the baselines.
        series: the colour and shape of each model by name; 0 is the original's, 1 the reference's.
    """

    def __init__(self, findings: Findings) -> None:
        self.findings = findings
        self.models: list[Mapping[str, Any]] = list(findings.get("models") or [])
        self.original = self._first("original")
        self.reference = self._first("reference")
        self.unlearned = [m for m in self.models if m.get("role") == "unlearned"]
        self.tried = [m for m in self.models if m.get("role") in ("unlearned", "baseline")]
        free = count(2)
        fixed = {"original": 0, "reference": 1}
        self.series: dict[str, int] = {}
        for model in self.models:
            own = fixed.get(model.get("role", ""), -1)
            self.series[model["name"]] = own if own >= 0 and own not in self.series.values() else next(free)
        self._idents = count(1)

    def _first(self, role: str) -> Mapping[str, Any] | None:
        return next((m for m in self.models if m.get("role") == role), None)

    def ident(self) -> str:
        return f"c{next(self._idents)}"

    def series_of(self, name: str) -> int:
        return self.series.setdefault(name, max([1, *self.series.values()]) + 1)

    def sets(self, key: str = "accuracy") -> list[str]:
        found = [s for m in self.models for s in m.get(key) or {}]
        return sorted(dict.fromkeys(found), key=lambda s: list(SET_NAMES).index(s) if s in SET_NAMES else 9)

    def attacks(self) -> list[str]:
        """The strongest first: whose AUC on an unlearned model is farthest from the retrained model's (or from 0.5)."""
        curves = (self.findings.get("roc") or {}).values()
        names = dict.fromkeys(
            [*(a for m in self.models for a in m.get("attacks") or {}), *(a for c in curves for a in c or {})]
        )
        judged = self.unlearned or [m for m in self.models if m is not self.reference]

        def strength(attack: str) -> float:
            target = mean_of(attack_of(self.reference, attack))
            known = numbers(mean_of(attack_of(m, attack)) for m in judged)
            return max((abs(auc - (0.5 if target is None else target)) for auc in known), default=0.0)

        return sorted(names, key=lambda a: -strength(a))

    def legend(self, names: Iterable[str], line: bool = False) -> str:
        items = "".join(f"<li>{charts.swatch(self.series_of(n), line)}<bdi>{text(n)}</bdi></li>" for n in names)
        return f'<ul class="legend">{items}</ul>'


def mean_of(estimate: Estimated) -> float | None:
    """The figure itself; None where it was not measured."""
    return finite(estimate.get("mean")) if estimate else None


def interval_of(estimate: Estimated) -> tuple[float, float] | None:
    """Both ends; None where there is no interval."""
    if not estimate:
        return None
    low, high = finite(estimate.get("low")), finite(estimate.get("high"))
    return None if low is None or high is None else (low, high)


def part_of(model: Mapping[str, Any] | None, key: str, part: str) -> Estimated:
    """``model[key][part]``, such as the accuracy on one set; None where any of them is missing."""
    found: Estimated = ((model or {}).get(key) or {}).get(part)
    return found


def attack_of(model: Mapping[str, Any] | None, attack: str, rate: str | None = None) -> Estimated:
    """AUC of an attack, or its true positive rate at the false positive rate ``rate``."""
    measured = ((model or {}).get("attacks") or {}).get(attack) or {}
    found: Estimated = measured.get("auc") if rate is None else (measured.get("tpr") or {}).get(rate)
    return found


def is_within(estimate: Estimated, reference: Estimated) -> bool:
    """Whether the mean lies in the reference's interval."""
    mean, interval = mean_of(estimate), interval_of(reference)
    return mean is not None and interval is not None and interval[0] <= mean <= interval[1]


# Numbers as they are written.


def signed(shown: str) -> str:
    """With a minus sign in place of the hyphen."""
    return shown.replace("-", "\N{MINUS SIGN}")


def as_decimals(places: int, factor: float = 1.0) -> Callable[[float], str]:
    """A writer of ``value * factor`` with so many places; what rounds to zero has no sign."""

    def write(value: float) -> str:
        shown = f"{value * factor:.{places}f}"
        return signed(shown[1:] if shown.startswith("-") and not shown.strip("-0.") else shown)

    return write


def as_digits(value: float) -> str:
    """Three significant digits."""
    return signed(f"{value + 0.0:#.3g}".removesuffix("."))  # no negative zero


def as_distance(value: float) -> str:
    """Of quantities around 1 in float64: 1e-17 is a zero that was rounded."""
    return as_digits(value if abs(value) >= 1e-12 else 0.0)


def as_steps(value: float) -> str:
    """Whole steps, or a mean of few of them with one decimal."""
    return f"{value:,.0f}" if value == round(value) or value >= 100 else f"{value:.1f}"


def as_points(value: float) -> str:
    """Points of accuracy with their sign."""
    return signed(f"{value:+.1f}") if abs(value) >= 0.05 else "0.0"


def as_seconds(value: float) -> str:
    """In seconds, minutes or hours, whichever reads best."""
    if value < 100:
        return signed(f"{value:.3g}\u202fs")
    minutes = round(value / 60)
    return (
        f"{round(value)}\u202fs"
        if value < 600
        else f"{minutes}\u202fmin"
        if value < 7200
        else f"{value / 3600:.1f}\u202fh"
    )


PERCENT1, PERCENT2, AUC = as_decimals(1), as_decimals(2, 100.0), as_decimals(3)


def plainly(estimate: Estimated, write: Callable[[float], str]) -> str:
    """Mean and interval in a row, for charts and sentences; empty when there is no mean."""
    mean, interval = mean_of(estimate), interval_of(estimate)
    if mean is None:
        return ""
    return write(mean) + (f" ({write(interval[0])} to {write(interval[1])})" if interval else "")


def cell_of(
    estimate: Estimated,
    write: Callable[[float], str],
    reference: Estimated = None,
    gap: Estimated = None,
    note: str = "",
) -> str:
    """A table cell: mean, interval, gap or another ``note``, one under the other; marked when within the reference's
    interval."""
    mean, interval = mean_of(estimate), interval_of(estimate)
    if mean is None:
        return '<td class="none"><span aria-label="not measured">\N{EN DASH}</span></td>'
    near = is_within(estimate, reference)
    sign = '<abbr title="within the interval of the retrained models">\u2248</abbr>' if near else ""
    shown = f'<span class="mean">{sign}{write(mean)}</span>'
    if interval:
        shown += f"<small>{write(interval[0])} to {write(interval[1])}</small>"
    difference = mean_of(gap)
    if difference is not None:
        note = f"{as_points(difference)} points"
    if note:
        shown += f'<small class="gap">{note}</small>'
    return f'<td class="{"near" if near else ""}">{shown}</td>'


def table_of(caption: str, head: Sequence[str], rows: Iterable[str], kind: str = "") -> str:
    """A table in a box of its own, which scrolls where the page is too narrow; ``caption`` names it."""
    cells = "".join(f'<th scope="col">{h}</th>' for h in head)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{caption}"><table class="{kind}">'
        f"<caption>{caption}</caption><thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def row_of(name: str, cells: Iterable[str], kind: str = "") -> str:
    """A table row under the name of what it is about."""
    return f'<tr class="{kind}"><th scope="row">{name}</th>{"".join(cells)}</tr>'


def name_of(view: View, model: Mapping[str, Any], roles: bool = True) -> str:
    """The model with its colour, and under it its role and number of runs."""
    shown = charts.swatch(view.series[model["name"]]) + f"<bdi>{text(shorten(model['name'], 60))}</bdi>"
    shown = f'<span class="who">{shown}</span>'
    if not roles:
        return shown
    role = str(model.get("role", ""))
    if role == "original" and not view.tried:
        role = "measured"  # nothing was unlearned here
    runs = max((int(e.get("runs") or 1) for e in (model.get("accuracy") or {}).values() if e), default=1)
    return f"{shown}<small>{text(ROLES.get(role, role))}{f', {runs} runs' if runs > 1 else ''}</small>"


def figure_of(chart: str, caption: str = "", kind: str = "") -> str:
    """A chart with its caption."""
    note = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure class="{kind}">{note}{chart}</figure>'


def grid_of(figures: Iterable[str]) -> str:
    """Figures side by side where there is room."""
    return f'<div class="grid">{"".join(figures)}</div>'


def most_changed(items: Sequence[T], key: Callable[[T], float], most: int) -> list[T]:
    """The ``most`` items with the largest ``key``, in the order they came in."""
    kept = sorted(range(len(items)), key=lambda k: -key(items[k]))[:most]
    return [items[k] for k in sorted(kept)]


def confusion_shares(confusion: Mapping[str, Any]) -> tuple[list[int], list[str], dict[str, list[list[float]]]]:
    """Rows of the confusion matrices as shares of their sums: classes shown, column names, matrices by name.

    Of more than 20 classes those whose predictions changed most are shown, and the others are one last column.
    """
    first = "before" if confusion.get("after") else "the model"
    named = (("before", first), ("after", "after"), ("reference", "retrained"))
    matrices = {name: _shares(confusion[key]) for key, name in named if confusion.get(key)}
    classes = [str(c) for c in confusion["classes"]]
    before, after = matrices.get(first), matrices.get("after") or matrices.get("retrained")

    def moved(cls: int) -> float:
        if not before or not after:
            return 0.0
        return sum(abs(a - b) for a, b in zip(before[cls], after[cls], strict=True))

    shown = most_changed(range(len(classes)), moved, MOST_CLASSES)
    columns = [classes[k] for k in shown]
    cut = {name: [[shares[k][j] for j in shown] for k in shown] for name, shares in matrices.items()}
    if len(shown) < len(classes):
        columns.append("all other")
        for name, rows in cut.items():
            for k, row in zip(shown, rows, strict=True):
                row.append(max(0.0, sum(matrices[name][k]) - sum(row)))
    return shown, columns, cut


def _shares(counts: Sequence[Sequence[int]]) -> list[list[float]]:
    """Each row as shares of its sum; zeros for a class without samples."""
    return [[n / total if total else 0.0 for n in row] for row in counts for total in [sum(row)]]
