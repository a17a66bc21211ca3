"""The demo's record, table and picture, all three from the same dictionary."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

SETS = ("forget", "retain", "test")


def write_record(
    out: Path, seed: int, device: torch.device, rows: list[dict[str, Any]], seconds: float
) -> dict[str, Any]:
    """Write ``record.json`` and return it."""
    record = {
        "data": "scikit-learn digits",
        "seed": seed,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "requests": rows,
        "seconds": seconds,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "record.json").write_text(json.dumps(record, indent=2) + "\n")
    return record


def table(record: dict[str, Any]) -> Table:
    """One block of lines per request: the original model, the method, the model retrained without the data."""
    title = "accuracy in %, in brackets the distance from the retrained model in points"
    view = Table(title=title, box=box.SIMPLE, show_edge=False, pad_edge=False)
    for heading in ("forgotten", "model", *SETS, "forget loss", "attack AUC", "seconds", "x faster"):
        view.add_column(heading, justify="left" if heading in ("forgotten", "model") else "right", no_wrap=True)
    for row in record["requests"]:
        seconds = {row["method"]["method"]: sum(row["method"]["seconds"].values())}
        seconds["retrained"] = row["retrain_seconds"]
        for name, metrics in row["models"].items():
            cells = [f"{metrics['accuracy'][s]:.1f} ({metrics['gap'][s]:+.1f})" for s in SETS]
            spent = seconds.get(name)
            view.add_row(
                row["request"] if name == "original" else "",
                name,
                *cells,
                f"{metrics['loss']['forget']:.4f}",
                f"{metrics['membership_auc']:.3f}",
                "" if spent is None else f"{spent:.2f}",
                "" if spent is None else f"{row['retrain_seconds'] / spent:.1f}",
            )
        view.add_section()
    return view


def picture(record: dict[str, Any], out: Path, console: Console) -> None:
    """Write ``picture.png``: accuracy of the three models on the three sets, per request. Needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        console.print("no picture: matplotlib is missing; pip install 'fastunlearn[report]'", markup=False)
        return
    rows = record["requests"]
    figure = Figure(figsize=(4 * len(rows), 3.6), layout="constrained")
    colours = ("#9aa5b1", "#c2410c", "#1d4ed8")
    for axis, row in zip(figure.subplots(1, len(rows), sharey=True, squeeze=False)[0], rows, strict=True):
        for i, (name, metrics) in enumerate(row["models"].items()):
            heights = [metrics["accuracy"][s] for s in SETS]
            bars = axis.bar([k + 0.27 * (i - 1) for k in range(3)], heights, 0.25, color=colours[i], label=name)
            axis.bar_label(bars, fmt="%.0f", fontsize=7)
        axis.set_xticks(range(3), SETS)
        axis.set_title(f"forget {row['request']}", fontsize=10)
        axis.set_ylim(0, 115)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=7, ncols=3, loc="upper center", frameon=False)
    figure.supylabel("accuracy in %", fontsize=9)
    figure.savefig(out / "picture.png", dpi=150)
    console.print(f"picture: {out / 'picture.png'}")
