"""The sections of the report: each returns its HTML, or nothing when there is nothing to show."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from fastunlearn.report import charts, language
from fastunlearn.report.charts import Dot, Line, Slope, finite, numbers, shorten, text
from fastunlearn.report.markup import (
    AUC,
    MOST_ATTACKS,
    MOST_CLASSES,
    MOST_COLUMNS,
    MOST_LAYERS,
    MOST_SETTINGS,
    MOST_SLOPES,
    MOST_SPECTRA,
    PERCENT1,
    PERCENT2,
    SET_NAMES,
    WORST,
    Estimated,
    View,
    as_digits,
    as_distance,
    as_seconds,
    as_steps,
    attack_of,
    cell_of,
    confusion_shares,
    figure_of,
    grid_of,
    interval_of,
    mean_of,
    most_changed,
    name_of,
    part_of,
    plainly,
    row_of,
    table_of,
)


def _glance(view: View) -> str:
    """Every model on one axis per quantity, the retrained models' interval shaded."""
    figures = []
    if language.is_language(view):
        figures = [_compared(view, *figure) for figure in language.figures(view)]
    else:
        for name in view.sets():
            title = f"Accuracy on {_data(name)}, %"
            figures.append(_compared(view, title, partial(part_of, key="accuracy", part=name), PERCENT1, 4.0, (0, 100)))
    shared = [a for a in view.attacks() if sum(attack_of(m, a) is not None for m in view.models) > 1]
    for attack in shared[:1]:
        which = "Strongest attack" if attack == view.attacks()[0] else "Attack"
        title = f"{which} ({shorten(attack, 24)}), AUC"
        figures.append(_compared(view, title, partial(attack_of, attack=attack), AUC, 0.1, (0, 1)))
    figures = [figure for figure in figures if figure]
    shown = ["Whiskers are 95 % intervals."] if "whisker" in "".join(figures) else []
    if view.reference:
        shown.append("The line is the retrained model; shaded, its interval.")
    return (grid_of(figures) + (f'<p class="small">{" ".join(shown)}</p>' if shown else "")) if figures else ""


def _compared(
    view: View,
    title: str,
    value: Callable[[Mapping[str, Any]], Estimated],
    write: Callable[[float], str],
    least: float | None = None,
    limits: tuple[float, float] | None = None,
) -> str:
    """A figure with a row per model that has this value; nothing with fewer than two."""
    rows, written, said = [], [], []
    for model in view.models:
        estimate = value(model)
        mean, interval = mean_of(estimate), interval_of(estimate) or (None, None)
        if mean is None:
            continue
        note = f"{model['name']}: {plainly(estimate, write)}"
        rows.append((model["name"], [Dot(mean, view.series[model["name"]], interval[0], interval[1], note)]))
        written.append(write(mean))
        said.append(note)
    if len(rows) < 2:
        return ""
    reference = value(view.reference) if view.reference else None
    chart = charts.dot_chart(
        view.ident(), title, "; ".join(said), rows,
        band=interval_of(reference), line=mean_of(reference), written=written, least=least,
        limits=limits,
    )  # fmt: skip
    return figure_of(chart, text(title))


def _data(name: str) -> str:
    """A set as one speaks of it."""
    if name == "test of forgotten":
        return "test data of the forgotten classes"
    return f"{SET_NAMES.get(name, name)} data"


def _request(view: View) -> str:
    request = view.findings.get("request") or {}
    entries = []
    for key, name in (("forget", "forget"), ("retain", "retain"), ("data", "data"), ("model", "model")):
        if request.get(key) is not None:
            entries.append(f"<div><dt>{name}</dt><dd><bdi>{text(request[key])}</bdi></dd></div>")
    samples = {k: n for k, n in (request.get("samples") or {}).items() if n is not None}
    for key, n in samples.items():
        entries.append(f"<div><dt>{text(SET_NAMES.get(key, key))} samples</dt><dd>{_whole(n)}</dd></div>")
    share = ""
    forget, retain = finite(samples.get("forget")), finite(samples.get("retain"))
    if forget is not None and retain is not None and forget + retain > 0:
        part = 100 * forget / (forget + retain)
        share = f'<p class="small">{part:.3g}\u202f% of the training data is to be forgotten.</p>'
    return f'<dl class="pairs">{"".join(entries)}</dl>{share}' if entries else ""


def _whole(n: Any) -> str:
    """A count, or the mean of one over runs."""
    mean = finite(n.get("mean")) if isinstance(n, Mapping) else None
    if mean is not None:
        return f"{mean:,.0f}" if mean == round(mean) else f"{mean:,.1f}"
    return f"{n:,}" if isinstance(n, int) else text(n)


def _models(view: View) -> str:
    sets = view.sets()
    if not view.models or not sets or language.is_language(view):
        return ""
    head = ["model", *(f"{text(SET_NAMES.get(s, s))}<small>accuracy, %</small>" for s in sets)]
    timed = any(mean_of(m.get("seconds")) is not None for m in view.models)
    head += ["time"] if timed else []
    rows = []
    for model in view.models:
        is_reference = model is view.reference
        cells = [
            cell_of(
                part_of(model, "accuracy", s),
                PERCENT1,
                None if is_reference else part_of(view.reference, "accuracy", s),
                None if is_reference else part_of(model, "gap", s),
            )
            for s in sets
        ]
        cells += [cell_of(model.get("seconds"), as_seconds)] if timed else []
        rows.append(row_of(name_of(view, model), cells, "reference" if is_reference else ""))
    main = table_of("Accuracy by model, and the gap to the retrained one", head, rows)
    return main + _within_note(view, "accuracy") + _finer(view) + _per_class(view)


def _language(view: View) -> str:
    body = language.section(view)
    return body and body + _within_note(view, "perplexity")


def _within_note(view: View, key: str) -> str:
    if view.reference is None:
        return ""
    known = [e for e in (view.reference.get(key) or {}).values() if e]
    if key == "attacks":
        known = [a.get("auc") for a in known]
    if any(interval_of(e) for e in known):
        return (
            '<p class="small"><b class="near">\u2248</b> marks a mean that lies within the 95 % interval of the '
            "retrained model; a wide interval, as of few runs, holds much. Small figures are 95 % intervals.</p>"
        )
    return (
        '<p class="small">The retrained model is a single run here: its own spread is unknown, so no figure is marked '
        "as within it.</p>"
    )


def _finer(view: View) -> str:
    """Losses and distances, a line each: what the accuracies do not show."""
    lines: list[tuple[str, Callable[[Mapping[str, Any]], Estimated], Callable[[float], str], bool]] = []
    for key, name in (("loss", "loss"), ("kl", "KL to retrained"), ("js", "JS to retrained")):
        for s in view.sets(key):
            label = f"{name}, {SET_NAMES.get(s, s)}"
            lines.append(
                (label, partial(part_of, key=key, part=s), as_digits if key == "loss" else as_distance, key == "loss")
            )
    lines.append(("ToW (1 is retrained)", lambda m: m.get("tow"), AUC, False))
    lines = [line for line in lines if any(mean_of(line[1](m)) is not None for m in view.models)]
    tables = []
    for models, title in _columns(view.models, "Losses and distances by model"):
        rows = []
        for label, value, write, marked in lines:
            reference = value(view.reference) if marked and view.reference else None
            cells = [cell_of(value(m), write, None if m is view.reference else reference) for m in models]
            rows.append(row_of(text(label), cells))
        head = ["measure", *(f"<bdi>{text(shorten(m['name'], 28))}</bdi>" for m in models)]
        tables.append(table_of(title, head, rows, "even"))
    return f"<h3>Losses and distances</h3>{''.join(tables)}" if lines else ""


def _columns(models: Sequence[Mapping[str, Any]], title: str) -> Iterable[tuple[Sequence[Mapping[str, Any]], str]]:
    """Models a table at a time, as many as a sheet of paper is wide, with the table's name."""
    for k in range(0, len(models), MOST_COLUMNS):
        yield models[k : k + MOST_COLUMNS], title + (", continued" if k else "")


def _per_class(view: View) -> str:
    sets = view.sets("per_class")
    if not sets:
        return ""
    chosen = "test" if "test" in sets else sets[0]
    both = (*(["test of forgotten"] if chosen == "test" else []), chosen)  # of other classes each; forgotten ones first
    measured = {
        m["name"]: {c: found for s in both for c, found in ((m.get("per_class") or {}).get(s) or {}).items()}
        for m in view.models
    }
    classes = list(dict.fromkeys(c for found in measured.values() for c in found))
    first = measured.get(view.original["name"], {}) if view.original else {}

    def accuracy(found: Mapping[str, Any], cls: str) -> float | None:
        return mean_of((found.get(cls) or {}).get("accuracy"))

    def change(cls: str) -> float:
        before = accuracy(first, cls) or 0.0
        return max((abs((accuracy(measured[m["name"]], cls) or 0.0) - before) for m in view.unlearned), default=0.0)

    shown = most_changed(classes, change, MOST_CLASSES)
    note = _left_out(len(shown), len(classes), "classes whose accuracy changed most")
    models = [m for m in view.models if measured[m["name"]]]
    title = text(f"Accuracy per class on {_data(chosen)}, %")
    tables = []
    for part, caption in _columns(models, title):
        rows = []
        for cls in shown:
            samples = next((f[cls].get("samples") for f in measured.values() if f.get(cls)), None)
            cells = ["<td></td>" if samples is None else f"<td>{_whole(samples)}</td>"]
            cells += [cell_of((measured[m["name"]].get(cls) or {}).get("accuracy"), PERCENT1) for m in part]
            rows.append(row_of(f"<bdi>{text(shorten(cls, 60))}</bdi>", cells))
        head = ["class", "samples", *(f"<bdi>{text(shorten(m['name'], 28))}</bdi>" for m in part)]
        tables.append(table_of(caption, head, rows, "even"))
    return f"<h3>{title}</h3>{''.join(tables)}{note}"


def _left_out(shown: int, every: int, what: str) -> str:
    """A sentence about what is not shown, where something is not."""
    if shown == every:
        return ""
    return f'<p class="small">Shown are the {shown} {what}, of {every:,}; {every - shown:,} are left out.</p>'


def _attacks(view: View) -> str:
    attacks = view.attacks()
    names = [m["name"] for m in view.models]
    curves = view.findings.get("roc") or {}
    rates = sorted(
        {r for m in view.models for a in (m.get("attacks") or {}).values() for r in (a or {}).get("tpr") or {}},
        key=float,
    )
    drawable = [a for a in attacks if any(a in (found or {}) for found in curves.values())]
    figures = [_roc(view, a, rates) for a in drawable[:MOST_ATTACKS]]
    body = ""
    if figures:
        drawn = [n for n in names if curves.get(n)] + [n for n in curves if n not in names]
        left = len(drawable) - MOST_ATTACKS
        note = f'<p class="small">Curves of the {MOST_ATTACKS} strongest attacks; {left} more in the table.</p>'
        body += view.legend(drawn, line=True) + grid_of(figures) + (note if left > 0 else "")
    rows = []
    for attack in attacks:
        if all(attack_of(m, attack) is None for m in view.models):
            continue
        rows.append(
            f'<tr class="group"><th scope="rowgroup" colspan="{2 + len(rates)}"><bdi>{text(attack)}</bdi></th></tr>'
        )
        for model in view.models:
            if attack_of(model, attack) is None:
                continue
            pairs = [
                (attack_of(model, attack, r), attack_of(view.reference, attack, r), PERCENT2) for r in [None, *rates]
            ]
            cells = [
                cell_of(mine, AUC if k == 0 else write, None if model is view.reference else theirs)
                for k, (mine, theirs, write) in enumerate(pairs)
            ]
            rows.append(row_of(name_of(view, model, roles=False), cells))
    if rows:
        head = ["model", "AUC", *(f"TPR, %<small>at {_rate(r)} FPR</small>" for r in rates)]
        body += table_of("Membership attacks by model", head, rows) + _within_note(view, "attacks")
    title = "SVC confidence attack: forgotten samples taken for members, %"
    svc = _compared(view, title, lambda m: m.get("svc"), PERCENT1, 4.0, (0, 100))
    return body + (grid_of([svc]) if svc else "")


def _rate(rate: object) -> str:
    return f"{100 * float(str(rate)):.3g}\u202f%"


def _roc(view: View, attack: str, rates: Sequence[str]) -> str:
    lines, dots, said = [], [], []
    lowest: list[float] = []
    known = {m["name"]: m for m in view.models}
    for name, found in (view.findings.get("roc") or {}).items():
        curve = (found or {}).get(attack)
        if not curve:
            continue
        series = view.series_of(name)
        lines.append(Line(curve["fpr"], curve["tpr"], series, name, steps=True))
        lowest += [v for v in numbers(curve["fpr"]) if v > 0][:1]
        for rate in rates:
            value = mean_of(attack_of(known.get(name), attack, rate))
            if value is not None:
                dots.append((float(rate), value, series))
        auc = mean_of(attack_of(known.get(name), attack))
        said.append(f"{name}: AUC {AUC(auc)}" if auc is not None else name)
    low = min(1e-3, 10.0 ** math.floor(math.log10(min(lowest, default=1e-3)) + 1e-9))
    ends = (max(low, 1e-5), 1.0)
    chart = charts.line_chart(
        view.ident(), f"ROC of the attack {attack}, both axes by decades", "; ".join(said), lines,
        "false positives (test data)", "true positives (forgotten data)", x=ends, y=ends, log=True, percent=True,
        diagonal=True, verticals=[(float(r), "") for r in rates], dots=dots,
    )  # fmt: skip
    return figure_of(chart, f"<bdi>{text(shorten(attack, 60))}</bdi>")


def _leaks(view: View) -> str:
    leaks = view.findings.get("leaks") or {}
    groups = (("forgotten", "Forgotten samples"), ("neighbours", "Retained neighbours"))
    parts = [_leak(view, name, leaks[key], key == "neighbours") for key, name in groups if leaks.get(key)]
    return grid_of(parts) if parts else ""


def _leak(view: View, name: str, found: Mapping[str, Any], by_rise: bool) -> str:
    columns = ["before", "after"] + (["reference"] if found.get("reference") else [])
    series = [list(found.get(c) or []) for c in columns]
    ids = [str(i) for i in found.get("ids") or []]
    size = min(len(ids), *(len(s) for s in series))
    values = [[finite(s[k]) for s in series] for k in range(size)]
    known = [k for k in range(size) if values[k][1] is not None]
    if not known:
        return ""

    def badness(k: int) -> float:
        before, after = values[k][0], values[k][1] or 0.0
        return after - (before or 0.0) if by_rise else after

    order = sorted(known, key=badness, reverse=True)
    worst = order[:WORST]
    rest = order[WORST:]
    stride = max(1, -(-len(rest) // MOST_SLOPES))
    slopes = [Slope(values[k], ids[k]) for k in rest[::stride]]
    slopes += [Slope(values[k], ids[k], "worst") for k in worst]
    middle = [_median(numbers(values[k][c] for k in known)) for c in range(len(columns))]
    slopes.append(Slope(middle, "median", "middle"))
    headings = ["before", "after", "retrained"][: len(columns)]
    said = ", ".join(f"{h} {as_digits(v)}" for h, v in zip(headings, middle, strict=True) if v is not None)
    title = f"{name}: leak score before and after"
    chart = charts.slope_chart(
        view.ident(),
        title,
        f"Median of {len(known):,}: {said}",
        headings,
        slopes,
        "leak score (higher gives away more)",
    )
    rows = [
        row_of(
            f"<code>{text(shorten(ids[k], 28))}</code>",
            ["<td>\N{EN DASH}</td>" if v is None else f"<td>{as_digits(v)}</td>" for v in values[k]],
        )
        for k in worst
    ]
    kind = "whose score rose most" if by_rise else "with the highest score after"
    table = table_of(f"{name}: the {len(rows)} {kind}", ["sample", *headings], rows)
    thinned = f" {len(slopes) - 1:,} of {len(known):,} drawn." if len(slopes) - 1 < len(known) else ""
    caption = f"{name} <small>thick: median ({said}); coloured: the {len(worst)} {kind}.{thinned}</small>"
    return f'<div class="stack">{figure_of(chart, caption)}{table}</div>'


def _median(values: Sequence[float]) -> float | None:
    ordered = sorted(values)
    half = len(ordered) // 2
    if not ordered:
        return None
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def _layers(view: View) -> str:
    every = list(view.findings.get("layers") or [])
    if not every:
        return ""

    def share(layer: Mapping[str, Any]) -> float:
        return (finite(layer.get("changed")) or 0.0) / max(finite(layer.get("of")) or 0.0, 1.0)

    shown = most_changed(every, lambda y: finite(y.get("relative_change")) or share(y), MOST_LAYERS)
    changed, of = (sum(int(finite(y.get(k)) or 0) for y in every) for k in ("changed", "of"))
    part = 100 * changed / max(of, 1)
    total = f"{changed:,} of {of:,} weights changed ({part:.3g}\u202f%), in {len(every):,} tensors."
    if len(shown) < len(every):
        kept = {id(y) for y in shown}
        left = [y for y in every if id(y) not in kept]
        rest = sum(int(finite(y.get("changed")) or 0) for y in left)
        total += (
            f" Shown are the {len(shown)} that changed most; the other {len(left):,} hold {rest:,} changed weights."
        )
    shares = [(y["name"], share(y), f"{100 * share(y):.3g}\u202f%") for y in shown]
    moved = [(y["name"], v, as_digits(v)) for y in shown if (v := finite(y.get("relative_change"))) is not None]
    series = view.series[view.unlearned[0]["name"]] if view.unlearned else 2
    chart = charts.bars(view.ident(), "Share of weights changed, by layer", total, shares, series=series, top=1.0)
    figures = [figure_of(chart, "Weights changed")]
    if moved:
        said = "Norm of the change over the larger of the norms before and after, in the model's order"
        chart = charts.bars(view.ident(), "Relative change, by layer", said, moved, series=series)
        figures.append(
            figure_of(
                chart,
                "Relative change <small>\u2016\u0394w\u2016 over the larger of \u2016w\u2016 before and after</small>",
            )
        )
    return f"<p>{total}</p>{grid_of(figures)}"


def _by_layer(view: View, found: Mapping[str, Mapping[str, Any]] | None, title: str, chance: float | None) -> str:
    """A row per layer, a dot per model."""
    found = {name: layers for name, layers in (found or {}).items() if layers}
    every = list(dict.fromkeys(layer for layers in found.values() for layer in layers))
    if not every:
        return ""

    def values(layer: str) -> list[float]:
        return numbers(layers.get(layer) for layers in found.values())

    def spread(layer: str) -> float:
        known = values(layer)
        return max(known) - min(known) if known else 0.0

    shown = most_changed(every, spread, MOST_LAYERS)
    note = _left_out(len(shown), len(every), "layers in which the models differ most")
    rows = []
    for layer in shown:
        dots = [
            Dot(v, view.series_of(name), note=f"{name}, {layer}: {as_digits(v)}")
            for name, layers in found.items()
            if (v := finite(layers.get(layer))) is not None
        ]
        rows.append((layer, dots))
    said = "; ".join(
        f"{name}: {as_digits(min(known))} to {as_digits(max(known))}"
        for name, layers in found.items()
        if (known := numbers(layers.values()))
    )
    chart = charts.dot_chart(view.ident(), title, said, rows, line=chance, row=20.0)
    return figure_of(chart, text(title)) + note


def _probes(view: View) -> str:
    probes, distance = (view.findings.get(k) or {} for k in ("probes", "activation_distance"))
    figures = [
        _by_layer(view, probes, "Linear probe for the forgotten data, AUC by layer", 0.5),
        _by_layer(view, distance, "Distance of the activations from the retrained model's, by layer", None),
    ]
    names = [n for n in view.series if n in probes or n in distance]
    names += [n for n in dict.fromkeys([*probes, *distance]) if n not in names]
    shown = [f'<div class="stack">{f}</div>' for f in figures if f]
    return view.legend(names) + grid_of(shown) if shown else ""


def _confusion(view: View) -> str:
    confusion = view.findings.get("confusion")
    if not confusion:
        return ""
    shown, columns, matrices = confusion_shares(confusion)
    classes = [str(confusion["classes"][k]) for k in shown]
    closest = view.findings.get("closest")
    figures = []
    for name, rows in matrices.items():
        said = "; ".join(
            f"{c}: {100 * row[k]:.0f} % right" for k, (c, row) in enumerate(zip(classes, rows, strict=True))
        )
        chart = charts.heat_map(view.ident(), f"Confusion {name}", said, rows, classes, columns)
        whose = f" <bdi>{text(shorten(closest, 40))}</bdi>" if closest and name == "after" else ""
        figures.append(figure_of(chart, name.capitalize() + whose))
    note = _left_out(len(shown), len(confusion["classes"]), "classes whose predictions changed most")
    return grid_of(figures) + note if figures else ""


def _histograms(view: View) -> str:
    figures = []
    for found in view.findings.get("histograms") or []:
        edges, counts = list(found["edges"]), list(found["counts"])
        merged = -(-len(counts) // 120)
        edges = [*edges[:-1:merged], edges[-1]]
        counts = [sum(numbers(counts[k : k + merged])) for k in range(0, len(counts), merged)]
        mark = finite(found.get("mark"))
        said = f"{sum(counts):,} values from {edges[0]:.3g} to {edges[-1]:.3g}"
        label = "" if mark is None else f"\u03b3 = {mark:.3g}"
        chart = charts.histogram(
            view.ident(), str(found.get("title") or ""), said, edges, counts, str(found.get("xlabel") or ""),
            mark=mark, mark_label=label,
        )  # fmt: skip
        figures.append(figure_of(chart, text(found.get("title") or "")))
    return grid_of(figures) if figures else ""


def _spectra(view: View) -> str:
    every = [s for s in view.findings.get("spectra") or [] if s.get("retain") or s.get("forget")]
    if not every:
        return ""
    last = min(len(every), MOST_SPECTRA) - 1
    shown = [every[round(k * (len(every) - 1) / last)] for k in range(last + 1)] if last else every[:1]
    figures = []
    for found in shown:
        lines = []
        for series, key in ((1, "retain"), (2, "forget")):
            values = list(found.get(key) or [])
            stride = -(-len(values) // 200) or 1
            lines.append(Line(range(1, len(values) + 1, stride), values[::stride], series, f"{SET_NAMES[key]} data"))
        above = [v for line in lines for v in numbers(line.ys) if v > 0]
        low, high = charts.domain(above, log=True)
        name = str(found.get("layer", ""))
        said = "; ".join(f"{line.name}: {len(numbers(line.ys))} values" for line in lines)
        chart = charts.line_chart(
            view.ident(), f"Spectrum of the inputs of {name}", said, lines, "direction, by rank", "share of the energy",
            y=(max(low, high * 1e-8), high), log=True, height=240.0,
        )  # fmt: skip
        figures.append(figure_of(chart, f"<bdi>{text(shorten(name, 60))}</bdi>"))
    legend = "".join(f"<li>{charts.swatch(s, True)}{name} data</li>" for s, name in ((1, "retained"), (2, "forgotten")))
    left = len(every) - len(shown)
    note = (
        f'<p class="small">Shown are {len(shown)} of {len(every):,} layers, evenly through the model.</p>'
        if left
        else ""
    )
    return f'<ul class="legend">{legend}</ul>{grid_of(figures)}{note}'


def _relearn(view: View) -> str:
    chart = _compared(view, "Steps until the forgotten data is known again", lambda m: m.get("relearn"), as_steps)
    if not chart:
        return ""
    without = [m["name"] for m in view.models if mean_of(m.get("relearn")) is None]
    names = ", ".join(f"<bdi>{text(shorten(name, 40))}</bdi>" for name in without)
    note = f'<p class="small">Not measured, or not known again in time: {names}.</p>' if without else ""
    return grid_of([chart]) + note


def _limits(view: View) -> str:
    limits = view.findings.get("limits") or []
    return f'<ul class="limits">{"".join(f"<li>{text(limit)}</li>" for limit in limits)}</ul>' if limits else ""


def _flat(value: Any, name: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple) and not any(isinstance(v, Mapping | list | tuple) for v in value):
        yield name, ", ".join(map(str, value)) or "none"
    else:
        yield name, "none" if value is None else str(value)


def _settings(view: View) -> str:
    parts = []
    for key, name in (("settings", "Settings"), ("versions", "Versions"), ("device", "Device")):
        pairs = list(_flat(view.findings.get(key) or {}, ""))
        pairs = [(k, v) for k, v in pairs if k]
        left = len(pairs) - MOST_SETTINGS
        entries = "".join(
            f"<div><dt>{text(shorten(k, 80))}</dt><dd><bdi>{text(shorten(v, 400))}</bdi></dd></div>"
            for k, v in pairs[:MOST_SETTINGS]
        )
        note = f'<p class="small">{left:,} more are in the record.</p>' if left > 0 else ""
        if entries:
            parts.append(f'<div><h3>{name}</h3><dl class="pairs">{entries}</dl>{note}</div>')
    return "".join(parts)


def _record(view: View) -> str:
    record = view.findings.get("record") or {}
    entries = [
        f"<div><dt>{name}</dt><dd><code>{text(record[key])}</code></dd></div>"
        for key, name in (("id", "record"), ("sha256", "SHA-256"))
        if record.get(key)
    ]
    check = (
        '<p class="small">Check it with <code>fastunlearn verify record.json --weights \u2026</code></p>'
        if entries
        else ""
    )
    return f'<dl class="pairs">{"".join(entries)}</dl>{check}' if entries else ""


# Key, name, how to read it, and the function that writes it; in the order of the page.
SECTIONS: tuple[tuple[str, str, str, Callable[[View], str]], ...] = (
    ("glance", "At a glance", "The nearer to the retrained model, the better: not the lower, not the higher.", _glance),
    ("request", "Request", "What was to be forgotten, and from what.", _request),
    (
        "models",
        "Models",
        "Share of samples put in their right class. The gap is to a model trained anew without the forgotten data.",
        _models,
    ),
    (
        "language",
        "Language",
        "How well the next token is known, and how much of a text comes back from its beginning. Compare with a model "
        "trained without the forgotten texts, or with texts that no model saw.",
        _language,
    ),
    (
        "attacks",
        "Membership attacks",
        "Can forgotten samples be told from test samples, which no model ever saw? On the diagonal they can not. What "
        "counts is the left end: few false alarms.",
        _attacks,
    ),
    (
        "leaks",
        "Single samples",
        "Averages hide the one sample that stays. Retained neighbours may become more exposed when others leave.",
        _leaks,
    ),
    ("layers", "What changed", "Weights of the unlearned model against the original, in the model's order.", _layers),
    (
        "probes",
        "Inside the layers",
        "Did only the head go quiet? Then a probe finds the forgotten data in a layer better than in the retrained "
        "model, whose features tell what it never saw apart, too; 0.5 is a coin toss.",
        _probes,
    ),
    (
        "confusion",
        "Confusion",
        "Where the test samples of each class (rows) are put (columns), in % of the row.",
        _confusion,
    ),
    ("histograms", "How weights were chosen", "Coloured: beyond the threshold.", _histograms),
    (
        "spectra",
        "Spectra",
        "How the energy of a layer's inputs spreads over directions. Both axes by decades.",
        _spectra,
    ),
    (
        "relearn",
        "Relearning",
        "Fewer steps than the retrained model needs: a trace was left.",
        _relearn,
    ),
    ("limits", "Limits", "What these figures do not show.", _limits),
    ("settings", "How it was run", "With config.yaml, which lies beside this file, enough to run it again.", _settings),
    ("record", "Record", "The file beside this report holds every figure.", _record),
)
