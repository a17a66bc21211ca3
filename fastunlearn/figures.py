"""Matplotlib figures without its global state; imported only when a picture is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def new_figure(columns: int, size: tuple[float, float], lines: int = 1) -> tuple[Any, Any]:
    """A figure of ``size`` inches and its axes, row by row; raises ImportError with the command to install."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install fastunlearn[report]") from error
    figure = Figure(figsize=size, layout="constrained")
    return figure, [figure.add_subplot(lines, columns, i + 1) for i in range(lines * columns)]


def save_figure(figure: Any, path: str | Path) -> None:
    """As PNG, SVG or PDF by the suffix of ``path``; makes the folder."""
    import matplotlib

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text stays text
        figure.savefig(path, dpi=150)
