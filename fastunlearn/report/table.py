"""The models of a run as a table for a terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table


def models_table(findings: dict[str, Any]) -> Table:
    """One line per model: accuracies with the distance from the retrained one, the strongest attack, seconds."""
    models = findings["models"]
    sets = list(models[0]["accuracy"])
    runs = models[0]["accuracy"][sets[0]]["runs"]
    title = "accuracy in %"
    if models[0]["gap"]:
        title += ", in brackets the distance from the retrained model in points"
    view = Table(title=title + (f"; means of {runs} runs" if runs > 1 else ""), box=box.SIMPLE, show_edge=False)
    for heading in ("model", *sets, "attack AUC", "TPR at 1 %", "seconds"):
        view.add_column(heading, justify="left" if heading == "model" else "right", overflow="fold",
                        no_wrap=heading == "model")  # fmt: skip
    for model in models:
        cells = [_cell(model["accuracy"][name], (model["gap"] or {}).get(name)) for name in sets]
        attacks = model["attacks"].values()
        auc = max((a["auc"]["mean"] for a in attacks), key=lambda found: abs(found - 0.5), default=None)
        rate = max((a["tpr"]["0.01"]["mean"] for a in attacks), default=None)
        seconds = model["seconds"]
        view.add_row(
            model["name"],
            *cells,
            "" if auc is None else f"{auc:.3f}",
            "" if rate is None else f"{100 * rate:.1f} %",
            "" if seconds is None else f"{seconds['mean']:.2f}",
        )
    return view


def _cell(accuracy: dict[str, Any], gap: dict[str, Any] | None) -> str:
    mean = accuracy["mean"]
    # The longer side: an interval that ends at 0 or 100 % is cut short on the other.
    spread = f" ±{max(accuracy['high'] - mean, mean - accuracy['low']):.1f}" if "high" in accuracy else ""
    return f"{mean:.1f}{spread}" + ("" if gap is None else f" ({gap['mean']:+.1f})")
