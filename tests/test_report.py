"""The report: charts put points where they belong, the page shows what was found, and a real browser agrees."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from findings import compare_findings, estimate, layers, model, unlearn_findings
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastunlearn.report import charts
from fastunlearn.report.charts import Dot, Line, Scale, Slope
from fastunlearn.report.html import render, write_report
from fastunlearn.report.pictures import write_pictures
from fastunlearn.report.sections import SECTIONS

OUT = Path(__file__).parent.parent / "out"
ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
NS = "{http://www.w3.org/2000/svg}"
HOSTILE = "<script>alert('x')</script>\"&amp;\u202egnp.exe \x00\ud800 \u65e5\u672c $\\frac{1}{0}$ " + "w" * 300
SAMPLES = {"unlearn": unlearn_findings, "compare": compare_findings}


def parsed(chart: str) -> ElementTree.Element:
    """The chart as XML: well formed, named, and without a number that is none."""
    root = ElementTree.fromstring(chart)
    assert not re.search(r"\b(nan|inf|None)\b", re.sub(r"<(title|desc|text)\b.*?</\1>", "", chart))
    assert root.get("role") == "img"
    title, description = root.find(f"{NS}title"), root.find(f"{NS}desc")
    assert title is not None and title.text and description is not None
    assert root.get("aria-labelledby") == title.get("id") and root.get("aria-describedby") == description.get("id")
    return root


def found(root: ElementTree.Element, tag: str, kind: str) -> list[ElementTree.Element]:
    return [e for e in root.iter(f"{NS}{tag}") if kind in (e.get("class") or "").split()]


# Charts


def test_a_scale_is_a_straight_line_or_one_through_the_logarithms() -> None:
    straight, log = Scale(10, 20, 100, 300), Scale(1e-4, 1, 300, 20, log=True)
    assert [straight(v) for v in (10, 12.5, 20)] == [100, 150, 300]
    assert [log(v) for v in (1e-4, 1e-2, 1)] == pytest.approx([300, 160, 20])
    assert straight(-5) == 100 and straight(99) == 300 and log(0) == 300


@pytest.mark.parametrize(("low", "high", "log"), [(1, 1, False), (2, 1, False), (0, 1, True), (0, math.inf, False)])
def test_a_scale_without_extent_is_refused(low: float, high: float, log: bool) -> None:
    with pytest.raises(ValueError, match=r"scale"):
        Scale(low, high, 0, 1, log)


@pytest.mark.parametrize(
    ("scale", "labels"),
    [
        (Scale(0, 1, 0, 1), ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (Scale(84.6, 85.6, 0, 1), ["84.6", "84.8", "85.0", "85.2", "85.4", "85.6"]),
        (Scale(-1, 1, 0, 1), ["\u22121.0", "\u22120.5", "0", "0.5", "1.0"]),
        (Scale(0, 100_000, 0, 1), ["0", "20k", "40k", "60k", "80k", "100k"]),
        (Scale(0, 9e6, 0, 1), ["0", "2M", "4M", "6M", "8M"]),
        (Scale(1e-4, 1, 0, 1, True), ["10\u207b\u2074", "0.001", "0.01", "0.1", "1"]),
        (Scale(1e-3, 1, 0, 1, True, True), ["0.1\u202f%", "1\u202f%", "10\u202f%", "100\u202f%"]),
    ],
)
def test_ticks_are_round_numbers_with_the_decimals_they_need(scale: Scale, labels: list[str]) -> None:
    assert [label for _, label in scale.ticks()] == labels


AWKWARD = st.floats(allow_nan=True, allow_infinity=True) | st.none()


@settings(max_examples=150, deadline=None)
@given(st.lists(AWKWARD, max_size=6), st.booleans())
@example([5e-324], True)
def test_every_domain_has_an_extent_holds_its_values_and_few_distinct_ticks(values: list[Any], log: bool) -> None:
    known = [v for v in charts.numbers(values) if not log or v > 0]
    scale = Scale(*charts.domain(values, log=log), 0, 100, log)
    if log:
        assert not known or max(known) <= scale.high * (1 + 1e-9)
    else:
        slack = 1e-8 * (scale.high - scale.low)
        assert all(scale.low - slack <= v <= scale.high + slack for v in known)
    ticks = scale.ticks()
    assert 1 <= len(ticks) <= 12 and len({v for v, _ in ticks}) == len(ticks)
    assert all(-1e-6 <= scale(v) <= 100 + 1e-6 for v, _ in ticks)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(AWKWARD, AWKWARD), max_size=8), st.booleans())
def test_no_chart_writes_a_number_that_is_none(points: list[tuple[Any, Any]], log: bool) -> None:
    xs, ys = [x for x, _ in points], [y for _, y in points]
    parsed(charts.line_chart("a", "t", "d", [Line(xs, ys, steps=log)], "x", "y", log=log, diagonal=True))
    rows = [("row", [Dot(x, 2, y, y)]) for x, y in points if x is not None]
    parsed(charts.dot_chart("b", "t", "d", rows, band=(0.1, 0.2), line=math.nan))
    parsed(charts.bars("c", "t", "d", [("row", x, "1") for x in xs]))
    parsed(charts.heat_map("d", "t", "d", [ys], ["row"], [str(k) for k in range(len(ys))]))
    parsed(charts.slope_chart("e", "t", "d", ["before", "after"], [Slope(p) for p in points], "y"))
    parsed(
        charts.histogram("f", "t", "d", list(range(len(xs) + 1)) if xs else [0, 1], xs or [1], "x", mark=ys and ys[0])
    )


def test_a_line_goes_through_its_points_on_both_kinds_of_axis() -> None:
    line = Line([1e-3, 1e-2, 1], [1e-3, 0.1, 1], 3, "steps", steps=True)
    ends = (1e-3, 1.0)
    root = parsed(charts.line_chart("a", "t", "d", [line], "x", "y", x=ends, y=ends, log=True, diagonal=True))
    left, right, bottom, top = 46, charts.WIDTH - 20, 262, 30
    x1, y1 = left + (right - left) / 3, bottom - (bottom - top) * 2 / 3
    wanted = f"M{left:.1f} {bottom:.1f}H{x1:.1f}V{y1:.1f}H{right:.1f}V{top:.1f}"
    assert [p.get("d") for p in found(root, "path", "line")] == [wanted]
    assert [p.get("d") for p in found(root, "path", "guide")] == [f"M{left:.1f} {bottom:.1f}L{right:.1f} {top:.1f}"]
    slanted = Line([0, 5, None, 10], [0, 1, 7, 2], 2)
    root = parsed(charts.line_chart("a", "t", "d", [slanted], "x", "y", x=(0, 10), y=(0, 2)))
    assert found(root, "path", "line")[0].get("d") == f"M46.0 262.0L{(left + right) / 2:.1f} 146.0L{right:.1f} 30.0"


def test_a_dot_its_interval_and_the_band_lie_on_one_axis() -> None:
    rows = [("one", [Dot(0.0, 0, -1.0, 1.0)]), ("two", [Dot(10.0, 0)])]
    root = parsed(charts.dot_chart("a", "t", "d", rows, band=(0.0, 10.0), line=5.0, written=["0", "10"]))
    left, right = 112.0, charts.WIDTH - 46
    margin = 0.04 * 11

    def at(value: float) -> float:
        return left + (value + 1 + margin) / (11 + 2 * margin) * (right - left)

    assert found(root, "path", "whisker")[0].get("d") == f"M{at(-1):.1f} 17.0H{at(1):.1f}"
    dots = [str(m.get("d")) for m in found(root, "path", "mark")]
    assert dots[0].startswith(f"M{at(0) - 4:.1f} 17.0") and dots[1].startswith(f"M{at(10) - 4:.1f} 39.0")
    band = found(root, "rect", "band")[0]
    assert float(str(band.get("x"))) == pytest.approx(at(0), abs=0.06)
    assert float(str(band.get("width"))) == pytest.approx(at(10) - at(0), abs=0.06)
    assert str(found(root, "path", "reference")[0].get("d")).startswith(f"M{at(5):.1f} ")


def test_small_differences_look_small() -> None:
    rows = [("a", [Dot(97.0)]), ("b", [Dot(97.1)])]
    wide = parsed(charts.dot_chart("a", "t", "d", rows, least=4.0))
    x = [float(re.findall(r"[\d.]+", str(m.get("d")))[0]) for m in found(wide, "path", "mark")]
    assert 0 < x[1] - x[0] < 8


def test_an_axis_ends_where_values_can_not_go() -> None:
    rows = [("a", [Dot(100.0, 0, 98.0, 109.0)]), ("b", [Dot(100.0)])]
    root = parsed(charts.dot_chart("a", "t", "d", rows, band=(95.0, 120.0), least=4.0, limits=(0.0, 100.0)))
    labels = [str(t.text) for t in found(root, "text", "tick")]
    assert labels == ["96", "98", "100"]
    end = re.findall(r"M([\d.]+) ", str(found(root, "path", "mark")[0].get("d")))[0]
    assert str(found(root, "path", "whisker")[0].get("d")).endswith(f"H{float(end) + 4:.1f}")
    parsed(charts.dot_chart("a", "t", "d", [("a", [Dot(100.0)])], limits=(0.0, 100.0)))


def test_bars_are_as_long_as_their_values_and_never_negative() -> None:
    rows = [("a", 1.0, "1"), ("b", 0.25, "0.25"), ("c", None, ""), ("d", -3.0, "-3")]
    widths = [float(str(r.get("width"))) for r in found(parsed(charts.bars("a", "t", "d", rows)), "rect", "bar")]
    assert widths == pytest.approx([172, 43, 0, 0], abs=0.06)


def test_a_histogram_is_cut_where_its_mark_is() -> None:
    root = parsed(charts.histogram("a", "t", "d", [0, 1, 2, 3], [5, 10, 0], "x", mark=1.5, mark_label="half"))
    left, right, bottom, top = 46.0, charts.WIDTH - 20, 202.0, 30.0
    unit = (right - left) / 3
    columns = [[float(str(r.get(k))) for k in ("x", "width", "height")] for r in found(root, "rect", "column")]
    wanted = [
        [left, unit - 0.4, (bottom - top) / 2],
        [left + unit, unit / 2 - 0.4, bottom - top],
        [left + 1.5 * unit, unit / 2 - 0.4, bottom - top],
    ]
    assert columns == [pytest.approx(w, abs=0.06) for w in wanted]
    assert ["beyond" in str(r.get("class")) for r in found(root, "rect", "column")] == [False, False, True]
    assert "half" in "".join(root.itertext())


@pytest.mark.parametrize(("edges", "counts"), [([0, 1], [1, 2]), ([0, 1, 1], [1, 2]), ([0, math.nan, 2], [1, 2])])
def test_a_histogram_whose_edges_do_not_fit_is_refused(edges: list[float], counts: list[float]) -> None:
    with pytest.raises(ValueError, match=r"edge"):
        charts.histogram("a", "t", "d", edges, counts, "x")


def test_a_heat_map_is_as_dark_as_its_shares() -> None:
    root = parsed(charts.heat_map("a", "t", "d", [[1.0, 0.0], [0.25, 0.75]], ["a", "b"], ["a", "b"]))
    cells = found(root, "rect", "cell")
    assert [float(str(c.get("fill-opacity"))) for c in cells] == [1, 0, 0.25, 0.75]
    assert ["own" in str(c.get("class")) for c in cells] == [True, False, False, True]
    assert [t.text for t in found(root, "text", "heat")] == ["100", "25", "75"]
    assert len(found(root, "text", "high")) == 2


def test_a_slope_leads_from_before_to_after() -> None:
    slopes = [Slope([4, 0], "worst one", "worst"), Slope([0, None], "gone"), Slope([2, 2])]
    root = parsed(charts.slope_chart("a", "t", "d", ["before", "after"], slopes, "y"))
    paths = [str(g.find(f"{NS}path").get("d")) for g in found(root, "g", "slope")]  # type: ignore[union-attr]
    assert paths == ["M78.0 254.0", "M78.0 144.0L320.0 144.0", "M78.0 34.0L320.0 254.0"]  # the worst last, on top


def test_names_are_escaped_and_cut_in_the_middle() -> None:
    root = parsed(charts.bars("a", HOSTILE, HOSTILE, [(HOSTILE, 1.0, HOSTILE)]))
    assert "<script>alert('x')</script>" in "".join(root.itertext())  # as text, not as an element
    assert "\u202e" not in "".join(root.itertext())
    assert charts.shorten("features.0.weight", 9) == "feat\u2026ight" and charts.shorten("short", 9) == "short"
    assert len(charts.shorten("w" * 500, 12)) == 12


def test_series_differ_in_shape_or_colour_up_to_the_twentieth() -> None:
    signs = {re.sub(r"M[\d. -]+", "", charts.marker(k, 0, 0)) for k in range(20)}
    assert len(signs) == 20


# The page


class Balanced(HTMLParser):
    """Fails on a tag that closes nothing or stays open; collects tags, ids and what links lead to."""

    VOID = ("meta", "link", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(str(value))
            elif key in ("src", "href", "action", "data", "poster", "background"):
                self.references.append(str(value))
            assert not key.startswith("on"), f"{tag} has {key}"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"


def read(page: str) -> Balanced:
    parser = Balanced()
    parser.feed(page)
    parser.close()
    assert not parser.open and len(set(parser.ids)) == len(parser.ids)
    for chart in re.findall(r"<svg viewBox.*?</svg>", page, re.DOTALL):
        parsed(chart)
    return parser


def sections(page: str) -> list[str]:
    return re.findall(r'<section id="(\w+)"', page)


def words(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))


def test_a_run_of_unlearn_shows_every_part_it_has() -> None:
    page = render(unlearn_findings())
    read(page)
    assert sections(page) == [key for key, *_ in SECTIONS if key not in ("spectra", "language")]
    shown = words(page)
    for figure in (
        unlearn_findings()["verdict"], "Unlearning 2,500 images from vgg11_bn", "+2.6 points", "\u22121.0 points",
        "88.1", "99.6", "47,500", "5 % of the training data", "41.3 s", "21 min", "31 times as long",
        "736,560 of 3,331,712 weights", "\u03b3 = 1.7", "finetune.momentum", "not a proof of erasure",
        unlearn_findings()["record"]["sha256"],
    ):  # fmt: skip
        assert figure in shown, figure


def test_a_comparison_shows_intervals_and_names_the_method_it_speaks_of() -> None:
    page = render(compare_findings())
    read(page)
    assert "spectra" in sections(page) and "histograms" not in sections(page) and "leaks" not in sections(page)
    assert "ClassForgetting , of 6 methods the one whose accuracies are nearest to the retrained model" in words(page)
    assert "61.4 60.8 to 62.0 +61.4 points" in words(page) and "3 runs" in page


def test_the_mark_stands_exactly_where_a_mean_is_in_the_interval_of_the_retrained_models() -> None:
    findings = compare_findings()
    reference = next(m for m in findings["models"] if m["role"] == "reference")
    wanted = 0
    for m in findings["models"]:
        if m is reference:
            continue
        pairs = [(m[k][s], reference[k][s]) for k in ("accuracy", "loss") for s in m[k]]
        for attack, measured in m["attacks"].items():
            theirs = reference["attacks"][attack]
            pairs += [
                (measured["auc"], theirs["auc"]),
                *((measured["tpr"][r], theirs["tpr"][r]) for r in theirs["tpr"]),
            ]
        wanted += sum("low" in r and r["low"] <= e["mean"] <= r["high"] for e, r in pairs)
    assert wanted > 5 and render(findings).count('<td class="near">') == wanted


def test_the_cards_speak_of_the_method_that_is_nearest_over_all_sets() -> None:
    findings = compare_findings()
    tried = [m for m in findings["models"] if m["role"] in ("unlearned", "baseline")]
    for m in tried:
        m["gap"] = {s: estimate(9.0 if s == "forget" else -8.0, 1.0, 3) for s in m["accuracy"]}
    tried[4]["gap"]["test"] = estimate(0.5, 1.0, 3)  # a baseline
    assert f"{tried[4]['name']} , of 6 methods the one" in words(render(findings))


def test_cards_and_confusion_speak_of_the_method_that_the_verdict_names() -> None:
    """Also where that is a baseline and one method alone is not: the cards would seem to be about the baseline."""
    findings = compare_findings()
    findings["models"] = [m for m in findings["models"] if m["role"] != "unlearned" or m["name"] == "DeepClean"]
    best = next(m["name"] for m in findings["models"] if m["role"] == "baseline")
    page = render(findings | {"closest": best})
    assert f"{best} , of " in words(page)
    assert f"<figcaption>After <bdi>{best}</bdi></figcaption>" in page


def test_where_nothing_was_unlearned_there_is_no_before_and_no_after() -> None:
    findings = unlearn_findings()
    findings["models"] = [m for m in findings["models"] if m["role"] in ("original", "reference")]
    findings["confusion"] |= {"after": None}
    page = render(findings)
    read(page)
    shown = words(page)
    assert "as it was given" in shown and "before unlearning" not in shown and "Is it forgotten?" not in shown
    captions = re.findall("<figcaption>(Before|After|The model|Retrained)", page)
    assert captions == ["The model", "Retrained"]
    assert "before unlearning" in words(render(unlearn_findings()))


def test_classes_that_are_forgotten_whole_stand_first_in_the_table_of_classes() -> None:
    findings = unlearn_findings()
    for k, m in enumerate(findings["models"]):
        of_class = {"accuracy": estimate(31.5 + k), "loss": estimate(1.0), "samples": 77}
        m["per_class"] |= {"test of forgotten": {"3 itself": of_class}, "forget": {}}
    table = words(re.findall(r'aria-label="Accuracy per class on test data, %">.*?</table>', render(findings))[0])
    assert re.search(r"^[^0-9]*3 itself 77 31\.5 32\.5", table.split("samples", 1)[1]), table


def test_whiskers_are_explained_where_there_are_any() -> None:
    findings = unlearn_findings()
    assert "Whiskers" in render(findings)
    for m in findings["models"]:
        m["accuracy"] = {s: {"mean": e["mean"], "runs": 1} for s, e in m["accuracy"].items()}
        m["attacks"] = {}
    page = render(findings)
    glance = page[page.index('<section id="glance"') : page.index('<section id="request"')]
    assert "Whiskers" not in glance and "The line is the retrained model" in glance


def test_rounding_is_not_shown_as_a_distance_and_zero_has_no_sign() -> None:
    findings = unlearn_findings()
    findings["models"][-1]["js"] = {"forget": estimate(6.59e-18), "retain": estimate(-0.0), "test": estimate(2e-6)}
    shown = words(render(findings))
    assert "e\u221218" not in shown and "\u22120.00" not in shown and "2.00e\u221206" in shown


def test_an_attack_on_one_model_alone_leaves_room_for_one_that_compares() -> None:
    findings = unlearn_findings()
    findings["models"][1]["attacks"]["alone"] = {"auc": estimate(0.999, 0.001), "tpr": {}}
    page = render(findings)
    glance = words(page[page.index('<section id="glance"') : page.index('<section id="request"')])
    assert "AUC of the strongest attack, alone ;" in words(page)
    assert re.search(r"\bAttack \([^)]+\), AUC", glance) and "Strongest attack" not in glance


def test_the_strongest_attack_is_the_one_that_tells_unlearned_from_retrained_best() -> None:
    findings = unlearn_findings()
    findings["models"][1]["attacks"]["entropy"]["auc"] = estimate(0.41, 0.02)  # below a coin toss gives away as well
    assert "AUC of the strongest attack, entropy ;" in words(render(findings))


def test_counts_that_were_averaged_over_runs_are_counts() -> None:
    findings = compare_findings()
    for m in findings["models"]:
        for cls in m["per_class"]["test"].values():
            cls["samples"] = {"mean": 1234.0, "runs": 3, "low": 1234.0, "high": 1234.0}
    page = render(findings)
    assert "1,234" in page and "mean&#x27;" not in page


def test_test_samples_of_forgotten_classes_have_a_column_and_a_name() -> None:
    findings = compare_findings()
    for m in findings["models"]:
        m["accuracy"]["test of forgotten"] = estimate(12.3, 1.0, 3)
    page = words(render(findings))
    assert "Accuracy on test data of the forgotten classes, %" in page and "test, forgotten classes" in page


def test_one_run_of_the_reference_marks_no_accuracy_and_says_why() -> None:
    page = render(unlearn_findings())
    part = page[page.index('<section id="models"') : page.index('<section id="attacks"')]
    assert "near" not in part and "single run" in part


def test_without_a_reference_the_page_says_what_that_means() -> None:
    findings = unlearn_findings()
    findings["models"] = [m for m in findings["models"] if m["role"] != "reference"]
    page = render(findings)
    read(page)
    assert 'class="warning"' in page and "never having seen" in words(page)
    assert 'class="warning"' not in render(unlearn_findings())


# What goes with a part of the findings that is not there.
GONE = {
    "request": {"request"}, "models": {"glance", "models", "relearn"}, "layers": {"layers"}, "confusion": {"confusion"},
    "histograms": {"histograms"}, "leaks": {"leaks"}, "limits": {"limits"}, "record": {"record"},
}  # fmt: skip


@pytest.mark.parametrize("key", unlearn_findings())
@pytest.mark.parametrize("how", ["absent", "none"])
def test_any_part_may_be_missing(key: str, how: str) -> None:
    findings = unlearn_findings() | {key: None}
    if how == "absent":
        del findings[key]
    page = render(findings)
    read(page)
    assert set(sections(render(unlearn_findings()))) - set(sections(page)) == GONE.get(key, set())


def test_a_model_that_did_not_relearn_is_named() -> None:
    findings = compare_findings()
    assert "known again in time" not in words(render(findings))
    findings["models"][2]["relearn"] = {"mean": None, "runs": 3}
    assert "Not measured, or not known again in time: DeepClean" in words(render(findings))


def test_nothing_at_all_is_still_a_page() -> None:
    page = render({})
    read(page)
    assert sections(page) == [] and "Unlearning report" in page


def test_figures_that_could_not_be_measured_are_dashes() -> None:
    findings = unlearn_findings()
    for m in findings["models"]:
        m.update(loss={}, gap=None, kl=None, js=None, tow=None, per_class=None, svc=None, relearn=None, attacks={})
        m["accuracy"]["forget"] = {"mean": None, "runs": 1}
    page = render(findings)
    read(page)
    assert page.count("not measured") >= 3 and "relearn" not in sections(page)


def hostile(value: Any) -> Any:
    """Every string, keys of the names' dictionaries included, replaced by something nasty."""
    if isinstance(value, dict):
        return {k: hostile(v) for k, v in value.items()}
    if isinstance(value, list):
        return [hostile(v) for v in value]
    return f"{HOSTILE} {value}" if isinstance(value, str) else value


def hostile_findings() -> dict[str, Any]:
    findings = unlearn_findings()
    roles = [m["role"] for m in findings["models"]]
    found: dict[str, Any] = hostile(findings)
    for m, role in zip(found["models"], roles, strict=True):
        m["role"] = role
        m["attacks"] = {f"{HOSTILE} {a}": v for a, v in m["attacks"].items()}
    for key in ("roc", "probes", "activation_distance"):
        found[key] = {f"{HOSTILE} {n}": v for n, v in found[key].items()}
    found["roc"] = {n: {f"{HOSTILE} {a}": v for a, v in c.items()} for n, c in found["roc"].items()}
    found["settings"] = {HOSTILE: {HOSTILE: [HOSTILE]}}
    return found


def test_no_name_becomes_markup() -> None:
    page = render(hostile_findings())
    tags = read(page).tags
    assert "script" not in tags and set(tags) == set(read(render(unlearn_findings())).tags)
    assert "\x00" not in page and "\u202e" not in page
    page.encode()  # no half of a surrogate pair is left


@pytest.mark.parametrize("name", SAMPLES)
def test_the_page_needs_nothing_else(name: str) -> None:
    page = render(SAMPLES[name]())
    parser = read(page)
    assert "script" not in parser.tags
    assert all(r == "data:," or (r[:1] == "#" and r[1:] in parser.ids) for r in parser.references)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(", page)
    assert "default-src 'none'" in page


def huge_findings() -> dict[str, Any]:
    classes = 1000
    before = [[10 if i == j else 0 for j in range(classes)] for i in range(classes)]
    after = [list(row) for row in before]
    for k in range(25):  # 25 classes change, some more than others
        after[40 * k][40 * k] = 5 - (k % 5)
        after[40 * k][40 * k + 1] = 5 + (k % 5)
    names = ["original", "unlearned", "retrained"]
    probed = [f"layer{k}" for k in range(300)]
    models = [model(n, r, (50.0, 60.0, 70.0), (50.0, 60.0, 70.0), 0.1) for n, r in zip(
        [*names, *(f"baseline {k}" for k in range(20))], ["original", "unlearned", "reference", *["baseline"] * 20],
        strict=True)]  # fmt: skip
    for k, m in enumerate(models):
        m["per_class"] = {
            "test": {
                str(c): {"accuracy": estimate((c * 37 + k) % 101), "loss": None, "samples": 10} for c in range(classes)
            }
        }
    return unlearn_findings() | {
        "models": models,
        "layers": layers(300),
        "probes": {n: {p: 0.5 + i * k / 1000 for k, p in enumerate(probed)} for i, n in enumerate(names)},
        "confusion": {"classes": [f"class {k}" for k in range(classes)], "before": before, "after": after},
        "histograms": [{"title": "h", "xlabel": "x", "edges": list(range(5001)), "counts": [2] * 5000, "mark": None}],
        "spectra": [{"layer": p, "retain": [1 / (k + 1) for k in range(4096)], "forget": []} for p in probed],
        "settings": {f"key{k}": "v" * 5000 for k in range(1000)},
    }  # fmt: skip


def test_what_is_huge_is_cut_and_says_so() -> None:
    page = render(huge_findings())
    read(page)
    shown = words(page)
    assert len(page) < 3_000_000
    assert "the 20 classes whose predictions changed most, of 1,000; 980 are left out" in shown
    assert "the 20 classes whose accuracy changed most, of 1,000" in shown
    assert "the 40 that changed most; the other 260 hold" in shown
    assert "the 40 layers in which the models differ most, of 300; 260 are left out" in shown
    assert "6 of 300 layers" in shown and "800 more are in the record" in shown
    heat = page[page.index('<section id="confusion"') : page.index('<section id="histograms"')]
    assert heat.count('<rect class="cell') == 2 * 20 * 21 and "class 160" in heat and "class 2<" not in heat
    assert 'aria-label="Losses and distances by model, continued"' in page


def test_what_is_cut_is_counted_in_full() -> None:
    findings = unlearn_findings() | {"layers": layers(300)}
    changed, of = (sum(y[k] for y in findings["layers"]) for k in ("changed", "of"))
    kept = sorted(findings["layers"], key=lambda y: -y["relative_change"])[:40]
    rest = changed - sum(y["changed"] for y in kept)
    shown = words(render(findings))
    assert f"{changed:,} of {of:,} weights changed" in shown and f"the other 260 hold {rest:,} changed weights" in shown


def test_the_same_findings_give_the_same_page_and_are_left_alone(tmp_path: Path) -> None:
    findings = compare_findings()
    before = json.dumps(findings)
    write_report(findings, tmp_path / "new" / "report.html")
    assert (tmp_path / "new" / "report.html").read_text() == render(findings) == render(json.loads(before))
    assert json.dumps(findings) == before


def test_a_report_that_can_not_be_written_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError):
        write_report(unlearn_findings(), tmp_path / "file" / "report.html")
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(ValueError, match="edge"):
        write_report({"histograms": [{"edges": [1, 2, 3], "counts": [1]}]}, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == "mine" and len(list(tmp_path.iterdir())) == 2


# Pictures


def test_pictures_are_whole_files_in_both_kinds(tmp_path: Path) -> None:
    from PIL import Image

    paths = write_pictures(hostile_findings(), tmp_path / "p")
    assert [p.name for p in paths] == [
        f"{n}.{k}" for n in ("roc", "layers", "confusion", "leaks") for k in ("png", "svg")
    ]
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == sorted(p.name for p in paths)
    for path in paths:
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert min(image.size) > 300 and len(image.convert("RGB").getcolors(1 << 24) or []) > 20
        else:
            assert any(e.tag == f"{NS}text" for e in ElementTree.parse(path).iter())


def test_the_same_findings_give_the_same_pictures(tmp_path: Path) -> None:
    findings = unlearn_findings() | {"confusion": None, "roc": None, "layers": []}
    first, second = (write_pictures(findings, tmp_path / k) for k in "ab")
    assert [p.name for p in first] == ["leaks.png", "leaks.svg"]
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    assert write_pictures({}, tmp_path / "c") == []


def test_a_thousand_classes_make_a_small_picture(tmp_path: Path) -> None:
    findings = {"confusion": huge_findings()["confusion"]}
    assert [p.name for p in write_pictures(findings, tmp_path)] == ["confusion.png", "confusion.svg"]
    assert "the 20 classes that changed most, of 1000" in (tmp_path / "confusion.svg").read_text()


def test_pictures_without_matplotlib_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install fastunlearn\[report\]"):
        write_pictures(unlearn_findings(), tmp_path)
    assert not list(tmp_path.iterdir())


# A real browser


def chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    return os.environ.get("CHROMIUM") or next((path for name in names if (path := shutil.which(name))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = chromium()
    if path is None:
        pytest.skip("no Chromium on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        yield launched
        launched.close()


@contextmanager
def opened(browser: Any, page_html: str, folder: Path, name: str, keep: Path = OUT) -> Iterator[Any]:
    """The page in the browser, which must stay silent and ask for nothing; a screenshot is kept if anything fails."""
    path = folder / "report.html"
    path.write_text(page_html)
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    passed = False
    try:
        page.goto(path.as_uri())
        yield page
        assert said == []
        assert asked == [path.as_uri()]
        passed = True
    finally:
        if not passed:
            keep.mkdir(exist_ok=True)
            page.screenshot(path=keep / f"report-failure-{name}.png", full_page=True)
        context.close()


# Elements that stick out of the page, unless inside a box that scrolls by itself.
OVERFLOW = """() => {
  const wide = document.documentElement.clientWidth;
  return [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, svg') || e.matches('.scroll'))
    .filter(e => e.getBoundingClientRect().right > wide + 0.5 || e.getBoundingClientRect().left < -0.5)
    .map(e => e.outerHTML.slice(0, 100)).concat(
      document.documentElement.scrollWidth > wide ? ['page ' + document.documentElement.scrollWidth] : []);
}"""

# Contrast of every text with what it stands on (WCAG 2): a heat map's cell for its figure, else the nearest background.
CONTRAST = """() => {
  const rgba = c => { const m = c.match(/[\\d.]+/g).map(Number); return m.length > 3 ? m : [...m, 1]; };
  const over = (a, b) => [0, 1, 2].map(k => a[k] * a[3] + b[k] * (1 - a[3])).concat([1]);
  const linear = v => v / 255 <= .04045 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4;
  const light = c => { const [r, g, b] = c.map(linear);
    return .2126 * r + .7152 * g + .0722 * b; };
  const behind = e => { const layers = [];
    for (let a = e; a; a = a.parentElement) { const c = rgba(getComputedStyle(a).backgroundColor);
      if (c[3]) layers.push(c);
      if (c[3] === 1) break; }
    return layers.reduceRight((below, c) => over(c, below), [255, 255, 255, 1]); };
  const found = [];
  for (const e of document.querySelectorAll('body *')) {
    if (!['title', 'desc'].includes(e.tagName) && e.tagName !== 'CAPTION'
        && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) {
      const style = getComputedStyle(e), drawn = e.namespaceURI.endsWith('svg');
      let ground = behind(e);
      if (drawn && e.classList.contains('heat')) {
        const cell = getComputedStyle(e.previousElementSibling), c = rgba(cell.fill);
        ground = over([c[0], c[1], c[2], Number(cell.fillOpacity)], ground);
      }
      const [a, b] = [light(over(rgba(drawn ? style.fill : style.color), ground)), light(ground)];
      found.push([(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.outerHTML.slice(0, 120)]);
    }
  }
  return found.sort((a, b) => a[0] - b[0]);
}"""


@pytest.mark.parametrize("name", [*SAMPLES, "hostile", "huge"])
def test_nothing_sticks_out_at_any_width(browser: Any, tmp_path: Path, name: str) -> None:
    more = {"hostile": hostile_findings, "huge": huge_findings}
    with opened(browser, render((SAMPLES | more)[name]()), tmp_path, f"width-{name}") as page:
        for width in (360, 768, 1280):
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate(OVERFLOW) == [], width


@pytest.mark.parametrize("name", SAMPLES)
def test_text_stands_out_in_light_and_dark(browser: Any, tmp_path: Path, name: str) -> None:
    findings = SAMPLES[name]()
    findings["confusion"]["after"] = [[10 * i + j for j in range(10)] for i in range(10)]
    findings["confusion"]["before"] = [[100 if i == j else 11 * (j == 0) * i for j in range(10)] for i in range(10)]
    with opened(browser, render(findings), tmp_path, f"contrast-{name}") as page:
        grounds = set()
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            found = page.evaluate(CONTRAST)
            assert len(found) > 200 and found[0][0] >= 4.5, found[:5]
            grounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert len(grounds) == 2


def test_lines_and_dots_stand_out_in_light_and_dark(browser: Any, tmp_path: Path) -> None:
    colours = """() => [...Array(9).keys()].map(k => { const e = document.createElement('i'); document.body.append(e);
      e.style.color = `var(--s${k})`; const c = getComputedStyle(e).color; e.remove(); return c; })
      .concat(getComputedStyle(document.body).backgroundColor)"""

    def light(colour: str) -> float:
        parts = [int(v) / 255 for v in re.findall(r"\d+", colour)[:3]]
        r, g, b = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    with opened(browser, render(unlearn_findings()), tmp_path, "colours") as page:
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            *series, paper = page.evaluate(colours)
            assert len(set(series)) == 9
            for colour in series:
                low, high = sorted((light(colour), light(paper)))
                assert (high + 0.05) / (low + 0.05) >= 3, (scheme, colour)


@pytest.mark.parametrize("name", SAMPLES)
def test_everything_is_seen_and_has_a_name(browser: Any, tmp_path: Path, name: str) -> None:
    findings = SAMPLES[name]()
    with opened(browser, render(findings), tmp_path, f"names-{name}") as page:
        assert page.title() == findings["title"] and page.locator("h1").inner_text() == findings["title"]
        assert page.get_by_text(findings["verdict"]).is_visible()
        shown = sections(render(findings))
        assert len(shown) >= 10 and all(page.locator(f"#{key} h2").is_visible() for key in shown)
        page.locator(f'nav a[href="#{shown[-1]}"]').click()
        assert page.evaluate("scrollY > 1000") and page.url.endswith(f"#{shown[-1]}")
        texts = page.locator("svg[role=img] text")
        assert texts.count() > 100 and page.get_by_text("false positives (test data)").first.is_visible()
        tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
        named = [
            (n["role"]["value"], n.get("name", {}).get("value", ""))
            for n in tree
            if not n["ignored"] and n["role"]["value"] in ("image", "img", "table", "region", "navigation", "heading")
        ]
        assert [n for n in named if not n[1].strip()] == []
        drawn = [n for role, n in named if role in ("image", "img")]
        assert len(drawn) == page.locator("svg[role=img]").count() and len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("name", [*SAMPLES, "hostile", "huge"])
def test_on_paper_it_is_light_and_whole(browser: Any, tmp_path: Path, name: str) -> None:
    more = {"hostile": hostile_findings, "huge": huge_findings}
    with opened(browser, render((SAMPLES | more)[name]()), tmp_path, f"print-{name}") as page:
        page.emulate_media(color_scheme="dark")
        pdf = page.pdf(format="A4")
        assert pdf.startswith(b"%PDF") and len(re.findall(rb"/Type\s*/Page\b", pdf)) >= 1
        page.emulate_media(media="print", color_scheme="dark")
        page.set_viewport_size({"width": 688, "height": 1000})  # A4 within its margins
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert page.evaluate(OVERFLOW) == []
        cut = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length"
        assert page.evaluate(cut) == 0
        kept = "[...document.querySelectorAll('figure, tr')].every(e => getComputedStyle(e).breakInside === 'avoid')"
        assert page.evaluate(kept)


def test_a_failure_leaves_a_screenshot(browser: Any, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="as it should"):
        with opened(browser, "<p>fails</p>", tmp_path, "itself", keep=tmp_path / "out"):
            raise AssertionError("as it should")
    assert (tmp_path / "out" / "report-failure-itself.png").read_bytes().startswith(b"\x89PNG")


def test_a_page_that_asks_for_more_is_caught(browser: Any, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        with opened(browser, '<img src="other.png">', tmp_path, "itself", keep=tmp_path / "out"):
            pass
