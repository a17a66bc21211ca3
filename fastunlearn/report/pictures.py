"""The report's main charts as PNG and SVG files, for slides and papers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastunlearn.figures import new_figure
from fastunlearn.files import replacing
from fastunlearn.report.charts import finite, numbers, shorten
from fastunlearn.report.markup import MOST_ATTACKS, MOST_CLASSES, MOST_LAYERS, View, confusion_shares, most_changed

# The page's light colours (report.css --s0 to --s8): the original model's, the reference's, then the others'.
COLOURS = ("#75807d", "#14201e", "#c74a00", "#0068ad", "#007a59", "#a03f84", "#8a6400", "#3b7fc4", "#8c3b2a")


def write_pictures(findings: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Write ``roc``, ``layers``, ``confusion`` and ``leaks`` as ``.png`` and ``.svg`` into ``folder``; their paths.

    Parts that ``findings`` lacks have no picture; long ones are cut as in the report. Every file is whole or absent.
    Raises ImportError with the command to install when matplotlib is missing, OSError when ``folder`` can not be
    written. Cost: about a second.
    """
    drawn = {"roc": _roc, "layers": _layers, "confusion": _confusion, "leaks": _leaks}
    written = []
    for name, draw in drawn.items():
        figure = draw(findings)
        for kind in ("png", "svg") if figure is not None else ():
            path = Path(folder) / f"{name}.{kind}"
            _save(figure, path, kind)
            written.append(path)
    return written


def _save(figure: Any, path: Path, kind: str) -> None:
    """Without a date and with fixed ids, so that the same findings give the same bytes."""
    import matplotlib

    # Text stays text.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastunlearn"}), replacing(path) as file:
        figure.savefig(file, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {})
    figure.set_layout_engine("none")  # the other kind gets the same layout, which is half of the time


def _plain(name: object, length: int = 28) -> str:
    """A name that matplotlib does not read as a formula."""
    return shorten(name, length).replace("$", r"\$")


def _colour(series: int) -> str:
    return COLOURS[series if series < len(COLOURS) else 2 + (series - 2) % (len(COLOURS) - 2)]


def _tidy(axis: Any, title: str) -> None:
    axis.set_title(title, fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def _roc(findings: Mapping[str, Any]) -> Any:
    """A panel per attack, a line per model, both axes by decades."""
    curves = {name: found for name, found in (findings.get("roc") or {}).items() if found}
    view = View(findings)
    attacks = [a for a in view.attacks() if any(a in found for found in curves.values())][:MOST_ATTACKS]
    if not attacks:
        return None
    figure, axes = new_figure(len(attacks), (3.6 * len(attacks) + 0.4, 3.8))
    for axis, attack in zip(axes, attacks, strict=True):
        axis.plot([1e-4, 1], [1e-4, 1], color="#75807d", linewidth=0.8, linestyle=":")
        for name, found in curves.items():
            if attack not in found:
                continue
            colour = _colour(view.series_of(name))
            pairs = [
                (max(float(x), 1e-4), max(float(y), 1e-4))
                for x, y in zip(found[attack]["fpr"], found[attack]["tpr"], strict=True)
                if finite(x) is not None and finite(y) is not None
            ]
            xs, ys = [x for x, _ in pairs], [y for _, y in pairs]
            axis.step(xs, ys, where="post", color=colour, linewidth=1.4, label=_plain(name))
        axis.set(xscale="log", yscale="log", xlim=(1e-4, 1), ylim=(1e-4, 1))
        axis.set_xlabel("false positive rate (test data)", fontsize=8)
        axis.set_ylabel("true positive rate (forgotten data)", fontsize=8)
        _tidy(axis, _plain(attack))
    axes[0].legend(fontsize=7, frameon=False)
    return figure


def _layers(findings: Mapping[str, Any]) -> Any:
    every = list(findings.get("layers") or [])
    if not every:
        return None

    def share(layer: Mapping[str, Any]) -> float:
        return 100 * (finite(layer.get("changed")) or 0.0) / max(finite(layer.get("of")) or 0.0, 1.0)

    def moved(layer: Mapping[str, Any]) -> float:
        return finite(layer.get("relative_change")) or 0.0

    shown = most_changed(every, lambda y: moved(y) or share(y), MOST_LAYERS)
    figure, axes = new_figure(2, (9, 1.2 + 0.22 * len(shown)))
    for axis, value, title in ((axes[0], share, "weights changed, %"), (axes[1], moved, "relative change")):
        axis.barh(range(len(shown)), [value(y) for y in shown], color=COLOURS[2])
        axis.invert_yaxis()
        axis.set_yticks(range(len(shown)), [_plain(y["name"]) for y in shown] if axis is axes[0] else [""] * len(shown))
        _tidy(axis, title)
    if len(shown) < len(every):
        figure.supxlabel(f"the {len(shown)} that changed most, of {len(every)}", fontsize=8)
    return figure


def _confusion(findings: Mapping[str, Any]) -> Any:
    found = findings.get("confusion")
    if not found:
        return None
    shown, columns, matrices = confusion_shares(found)
    classes = [_plain(found["classes"][k], 14) for k in shown]
    figure, axes = new_figure(len(matrices), (3.8 * len(matrices) + 0.6, 4.2))
    image = None
    for axis, (name, rows) in zip(axes, matrices.items(), strict=True):
        image = axis.imshow([[100 * v for v in row] for row in rows], cmap="Blues", vmin=0, vmax=100)
        axis.set_xticks(range(len(columns)), [_plain(c, 14) for c in columns], rotation=90)
        axis.set_yticks(range(len(classes)), classes)
        axis.set_xlabel("predicted", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.set_title(name, fontsize=10, loc="left")
    axes[0].set_ylabel("true class", fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.8, label="% of the true class")
    if len(shown) < len(found["classes"]):
        figure.supxlabel(f"the {MOST_CLASSES} classes that changed most, of {len(found['classes'])}", fontsize=8)
    return figure


def _leaks(findings: Mapping[str, Any]) -> Any:
    """Score after against score before, a dot per sample; on the line nothing has changed."""
    leaks = findings.get("leaks") or {}
    groups = [(t, leaks[k]) for k, t in (("forgotten", "forgotten"), ("neighbours", "neighbours")) if leaks.get(k)]
    if not groups:
        return None
    figure, axes = new_figure(len(groups), (4 * len(groups), 3.8))
    for axis, (title, found) in zip(axes, groups, strict=True):
        pairs = [
            (x, y)
            for x, y in zip(map(finite, found["before"]), map(finite, found["after"]), strict=True)
            if x is not None and y is not None
        ]
        ends = numbers(v for pair in pairs for v in pair) or [0.0, 1.0]
        axis.plot([min(ends), max(ends)], [min(ends), max(ends)], color="#75807d", linewidth=0.8, linestyle=":")
        axis.scatter([x for x, _ in pairs], [y for _, y in pairs], s=14, color=COLOURS[2], alpha=0.7, linewidths=0)
        axis.set_xlabel("leak score before", fontsize=8)
        axis.set_ylabel("leak score after", fontsize=8)
        _tidy(axis, f"{title}, {len(pairs):,} samples")
    return figure
