"""The models of a run as a table for a terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table

from fastunlearn.report.language import as_perplexity
from fastunlearn.report.markup import mean_of, part_of


def models_table(findings: dict[str, Any]) -> Table:
    """One line per model: accuracies with the distance from the retrained one, the strongest attack, seconds."""
    models = findings["models"]
    if models[0].get("perplexity"):
        return _language_table(models)
    sets = list(models[0]["accuracy"])
    runs = models[0]["accuracy"][sets[0]]["runs"]
    title = "accuracy in %"
    if models[0]["gap"]:
        title += ", in brackets the distance from the retrained model in points"
    view = _empty(title, runs, sets)
    for model in models:
        cells = [_cell(model["accuracy"][name], (model["gap"] or {}).get(name)) for name in sets]
        view.add_row(model["name"], *cells, *_attacked(model))
    return view


def _language_table(models: list[dict[str, Any]]) -> Table:
    """Of language models: perplexities with their factor over the retrained one's, and what is recited."""
    sets = list(models[0]["perplexity"])
    reference = next((m for m in models if m["role"] == "reference"), None)
    title = "perplexity"
    if reference is not None:
        title += ", in brackets its factor over the retrained model's"
    recited = list(models[0]["extraction"] or {})
    view = _empty(title, models[0]["perplexity"][sets[0]]["runs"], [*sets, *(f"recited of {s}" for s in recited)])
    for model in models:
        cells = []
        for name in sets:
            mean = mean_of(part_of(model, "perplexity", name))
            factor = None if model is reference else mean_of(part_of(model, "factor", name))
            shown = "no bound" if mean is None else as_perplexity(mean)
            cells.append(shown + ("" if factor is None else f" (x {as_perplexity(factor)})"))
        cells += [f"{model['extraction'][name]['overlap']['mean']:.1f} %" for name in recited]
        view.add_row(model["name"], *cells, *_attacked(model))
    return view


def _empty(title: str, runs: int, columns: list[str]) -> Table:
    view = Table(title=title + (f"; means of {runs} runs" if runs > 1 else ""), box=box.SIMPLE, show_edge=False)
    for heading in ("model", *columns, "attack AUC", "TPR at 1 %", "seconds"):
        view.add_column(heading, justify="left" if heading == "model" else "right", overflow="fold",
                        no_wrap=heading == "model")  # fmt: skip
    return view


def _attacked(model: dict[str, Any]) -> tuple[str, str, str]:
    """The strongest attack's AUC, the most it finds, and the seconds that the model took."""
    attacks = model["attacks"].values()
    auc = max((a["auc"]["mean"] for a in attacks), key=lambda found: abs(found - 0.5), default=None)
    rate = max((a["tpr"]["0.01"]["mean"] for a in attacks), default=None)
    seconds = model["seconds"]
    return (
        "" if auc is None else f"{auc:.3f}",
        "" if rate is None else f"{100 * rate:.1f} %",
        "" if seconds is None else f"{seconds['mean']:.2f}",
    )


def _cell(accuracy: dict[str, Any], gap: dict[str, Any] | None) -> str:
    mean = accuracy["mean"]
    # The longer side: an interval that ends at 0 or 100 % is cut short on the other.
    spread = f" ±{max(accuracy['high'] - mean, mean - accuracy['low']):.1f}" if "high" in accuracy else ""
    return f"{mean:.1f}{spread}" + ("" if gap is None else f" ({gap['mean']:+.1f})")
