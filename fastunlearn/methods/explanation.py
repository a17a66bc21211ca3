"""What DeepClean would reset and where, and what many thresholds do: numbers, a table, a picture."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fastunlearn.evaluate import Metrics
from fastunlearn.figures import new_figure, save_figure
from fastunlearn.outcome import Outcome


@dataclass(frozen=True)
class LayerShare:
    """One parameter: its weights, how many are live, how many would be reset, and the histogram of their ratios."""

    name: str
    weights: int
    live: int
    reset: int
    histogram: Tensor = field(repr=False)  # int64, the bins of ops.ratio_edges()

    @property
    def share(self) -> float:
        """Reset over live; 0 where nothing lives."""
        return self.reset / self.live if self.live else 0.0


@dataclass(frozen=True)
class Explanation:
    """Which layers hold the forgotten data. ``print`` shows the table.

    Attributes:
        gamma: the threshold, or one per parameter.
        layers: in the order of the model.
        edges: float32, lower edges of the bins of every histogram.
    """

    gamma: float | dict[str, float]
    layers: list[LayerShare]
    edges: Tensor = field(repr=False)

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        lines = [f"{'parameter':{width}}  {'weights':>11}  {'live':>11}  {'reset':>11}  of live"]
        for layer in self.layers:
            bar = "█" * round(20 * layer.share)
            lines.append(
                f"{layer.name:{width}}  {layer.weights:11,}  {layer.live:11,}  {layer.reset:11,}  "
                f"{100 * layer.share:5.1f} %  {bar}"
            )
        live, reset = (sum(getattr(layer, what) for layer in self.layers) for what in ("live", "reset"))
        share = 100 * reset / live if live else 0.0
        weights = sum(layer.weights for layer in self.layers)
        lines.append(f"{'all':{width}}  {weights:11,}  {live:11,}  {reset:11,}  {share:5.1f} %")
        return "\n".join(line.rstrip() for line in lines)

    def picture(self, path: str | Path) -> None:
        """Share reset per parameter beside the ratios of all weights, as PNG, SVG or PDF by the suffix of ``path``."""
        figure, (left, right) = new_figure(2, (11, 1.5 + 0.22 * len(self.layers)))
        left.barh([layer.name for layer in self.layers], [100 * layer.share for layer in self.layers], color="#3b6ea5")
        left.invert_yaxis()
        left.set_xlabel("reset, % of live weights")
        counts = sum(layer.histogram for layer in self.layers)
        assert isinstance(counts, Tensor)
        edges = self.edges.log2()
        inside = (counts > 0) & edges.isfinite()
        right.bar(edges[inside].numpy(), counts[inside].numpy(), width=1 / 8, align="edge", color="#8a8a8a")
        if isinstance(self.gamma, float):
            right.axvline(math.log2(self.gamma), color="#b5452c", label=f"gamma = {self.gamma:.3g}")
            right.legend()
        right.set_xlabel("log2 of forget / (retain + floor)")
        right.set_ylabel("weights per bin")
        save_figure(figure, path)


@dataclass(frozen=True)
class SweepPoint:
    """One threshold of a sweep.

    Attributes:
        outcome: settings, gamma, share reset and seconds, as ``unlearn`` returns them.
        metrics: of the model at this threshold.
        forget_gap: points between its forget accuracy and the yardstick's: the reference's, or without one its own
            on the test set.
        retain_gap: points between its retain accuracy and the reference's, or without one the original model's.
        warning: why this point has forgotten too much, or None.
    """

    outcome: Outcome
    metrics: Metrics
    forget_gap: float
    retain_gap: float
    warning: str | None

    @classmethod
    def of(cls, outcome: Outcome, metrics: Metrics, before: Metrics, samples: int) -> SweepPoint:
        """``before`` is of the original model, ``samples`` the number of forgotten ones."""
        if metrics.gap is not None:
            goal, whose = metrics.accuracy["forget"] - metrics.gap["forget"], "the reference's"
            retain_gap = abs(metrics.gap["retain"])
        else:
            goal, whose = metrics.accuracy["test"], "that on the test set"
            retain_gap = abs(metrics.accuracy["retain"] - before.accuracy["retain"])
        forget_gap = metrics.accuracy["forget"] - goal
        # Of the accuracy of `samples` samples, in points.
        error = 100 * math.sqrt(max(goal * (100 - goal), 0.0) / 100**2 / max(samples, 1))
        reasons = []
        if forget_gap < -2 * error:
            reasons.append(f"forget accuracy {metrics.accuracy['forget']:.1f} % is below {whose} {goal:.1f} %")
        auc = metrics.membership_auc
        # Hanley & McNeil's standard error at 0.5, for as many test samples as forgotten ones.
        if auc is not None and auc < 0.5 - 2 * math.sqrt(1 / (6 * max(samples, 1))):
            reasons.append(f"an attack finds the forgotten samples by their high loss (AUC {auc:.3f})")
        warning = "over-unlearned: " + "; ".join(reasons) if reasons else None
        if warning:
            warnings.warn(f"gamma {outcome.details['gamma']}: {warning}", stacklevel=3)
        return cls(outcome, metrics, abs(forget_gap), retain_gap, warning)


@dataclass(frozen=True)
class Sweep:
    """Many thresholds from one pair of Fisher passes. ``print`` shows the table, a star marks the front.

    Attributes:
        original: metrics of the model before.
        points: one per threshold, as asked for.
        fisher_seconds: of the two passes that all points share.
    """

    original: Metrics
    points: list[SweepPoint]
    fisher_seconds: float

    def front(self) -> list[SweepPoint]:
        """The points that no other beats in both gaps, from the smallest forget gap on."""
        chosen: list[SweepPoint] = []
        for point in sorted(self.points, key=lambda p: (p.forget_gap, p.retain_gap)):
            if not chosen or point.retain_gap < chosen[-1].retain_gap:
                chosen.append(point)
        return chosen

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        points = [
            {
                **point.outcome.as_dict(),
                "metrics": point.metrics.as_dict(),
                "forget_gap": point.forget_gap,
                "retain_gap": point.retain_gap,
                "warning": point.warning,
            }
            for point in self.points
        ]
        return {"original": self.original.as_dict(), "points": points, "fisher_seconds": self.fisher_seconds}

    def __str__(self) -> str:
        front = {id(point) for point in self.front()}
        sets = list(self.original.accuracy)
        head = ["gamma", "reset", *(f"{name} %" for name in sets), "AUC", "forget gap", "retain gap"]
        lines = ["  ".join(f"{title:>10}" for title in head)]
        for point in self.points:
            gamma = point.outcome.details["gamma"]
            cells = ["per layer" if isinstance(gamma, dict) else f"{gamma:.4g}"]
            cells.append(f"{100 * point.outcome.details['share_reset']:.1f} %")
            cells += [f"{point.metrics.accuracy[name]:.2f}" for name in sets]
            auc = point.metrics.membership_auc
            cells += ["" if auc is None else f"{auc:.3f}", f"{point.forget_gap:.2f}", f"{point.retain_gap:.2f}"]
            mark = " *" if id(point) in front else ""
            lines.append("  ".join(f"{cell:>10}" for cell in cells) + mark + (f"  {point.warning or ''}").rstrip())
        return "\n".join(lines)

    def picture(self, path: str | Path) -> None:
        """Forget gap against retain gap, the front joined, as PNG, SVG or PDF by the suffix of ``path``."""
        figure, (axes,) = new_figure(1, (6, 4.2))
        front = self.front()
        axes.plot([p.forget_gap for p in front], [p.retain_gap for p in front], color="#3b6ea5", zorder=1)
        for point in self.points:
            color = "#b5452c" if point.warning else "#3b6ea5"
            axes.scatter(point.forget_gap, point.retain_gap, color=color, zorder=2)
            share = f"{100 * point.outcome.details['share_reset']:.0f} %"
            axes.annotate(share, (point.forget_gap, point.retain_gap), xytext=(4, 4), textcoords="offset points")
        axes.set_xlabel("forget gap, points")
        axes.set_ylabel("retain gap, points")
        axes.set_title("share of live weights reset; red: over-unlearned", fontsize=10)
        save_figure(figure, path)
