"""What class forgetting will hold, what its filters act on, which alphas to take, and where the weights moved."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastunlearn.figures import new_figure, save_figure
from fastunlearn.outcome import Outcome
from fastunlearn.subspace import Solver


@dataclass(frozen=True)
class LayerPlan:
    """One weight matrix.

    Attributes:
        name: of the layer (or of the projection of an attention).
        groups, dim: of its Gram matrices [groups, dim, dim].
        rows: at most so many of each set; None for no limit.
        solver: "auto" here means by rows or by Cholesky, whichever is smaller once the rows are counted.
        reason: why.
        ranks: eigenpairs of (retain, forget) that a low-rank solver keeps.
        held: bytes at most from the first batch to the update, of both sets.
    """

    name: str
    groups: int
    dim: int
    rows: int | None
    solver: Solver
    reason: str
    ranks: tuple[int, int]
    held: int


@dataclass(frozen=True)
class Plan:
    """The memory of a run, stated before it. ``print`` shows the table.

    Attributes:
        layers: in the order of the model.
        sample: bytes at most of one batch's share of sampled rows, over all layers.
        workspace: bytes at most of temporaries, of the layer that needs most.
        weights: bytes of the updated weights, all ready before the first is written.
        limit: bytes that "auto" may fill with Gram matrices; None for another solver, or if free memory is not known.
        untouched: layers left alone, and why.
    """

    layers: list[LayerPlan]
    sample: int
    workspace: int
    weights: int
    limit: int | None
    untouched: dict[str, str]

    @property
    def held(self) -> int:
        """Bytes at most of Gram matrices, kept rows and sketches, of all layers and both sets."""
        return sum(layer.held for layer in self.layers)

    @property
    def total(self) -> int:
        """Bytes at most beyond the model, its own forward pass, and what allocator and BLAS keep for themselves."""
        return self.held + self.sample + self.workspace + self.weights

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "total": self.total}

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers] + [9])
        lines = [f"{'layer':{width}}  {'groups':>6}  {'d':>6}  {'rows':>9}  {'MB held':>10}  solver"]
        for layer in self.layers:
            rows = "all" if layer.rows is None else f"<= {layer.rows:,}"
            solver: str = "rows or cholesky" if layer.solver == "auto" else layer.solver
            if layer.solver in ("rsvd", "sketch"):
                solver += f" of rank {layer.ranks[0]}, {layer.ranks[1]}"
            lines.append(
                f"{layer.name:{width}}  {layer.groups:6}  {layer.dim:6}  {rows:>9}  {layer.held / 1e6:10,.1f}  "
                f"{solver}: {layer.reason}"
            )
        for name, size in (
            ("held", self.held), ("sample", self.sample), ("workspace", self.workspace), ("weights", self.weights),
            ("at most", self.total),
        ):  # fmt: skip
            lines.append(f"{name:{width}}  {'':6}  {'':6}  {'':9}  {size / 1e6:10,.1f}")
        lines += [f"{name:{width}}  left alone: {reason}" for name, reason in self.untouched.items()]
        return "\n".join(line.rstrip() for line in lines)


@dataclass(frozen=True)
class LayerSpectrum:
    """Eigenvalue ratios r of one layer's Gram matrices, float64 [groups, k], from the largest down.

    Attributes:
        name: of the layer.
        dim: d, columns of a row; k is min(n, d), or the rank of a low-rank solver.
        rows: of retain and forget.
        retain, forget: the ratios.
    """

    name: str
    dim: int
    rows: tuple[int, int]
    retain: Tensor = field(repr=False)
    forget: Tensor = field(repr=False)

    def effective_rank(self, which: str) -> float:
        """1 / sum r^2, mean over groups: how many equal eigenvalues would be as concentrated; 0 without energy."""
        squares = getattr(self, which).square().sum(-1)
        return float(torch.where(squares > 0, 1 / squares.clamp(min=1e-300), squares).mean())

    def energy(self, which: str, k: int) -> float:
        """Share of the energy in the k largest directions, mean over groups."""
        return float(getattr(self, which)[:, :k].sum(-1).mean())

    def directions(self, which: str, energy: float) -> int:
        """The fewest directions that hold this share of the energy, in the group that needs most; k if none do."""
        ratios: Tensor = getattr(self, which)
        short = (ratios.cumsum(-1) < energy * (1 - 1e-12)).sum(-1)
        return min(int(short.max()) + 1, ratios.shape[-1])


@dataclass(frozen=True)
class Spectrum:
    """What the filters of each layer act on. ``print`` shows the table, a line per layer and set.

    Attributes:
        layers: in the order of the model.
        alpha_retain, alpha_forget: of the filter curves in the picture.
    """

    layers: list[LayerSpectrum]
    alpha_retain: float
    alpha_forget: float

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers] + [5])
        lines = [
            f"{'layer':{width}}  {'set':6}  {'d':>6}  {'rows':>8}  {'eff. rank':>9}  {'90 %':>5}  {'99 %':>5}  "
            f"{'in 1':>7}  {'in 10':>7}  {'in 100':>7}  {'passes':>7}"
        ]
        for layer in self.layers:
            for which, rows, alpha in zip(
                ("retain", "forget"), layer.rows, (self.alpha_retain, self.alpha_forget), strict=True
            ):
                ratios = getattr(layer, which)
                passes = float((alpha * ratios / ((alpha - 1) * ratios + 1)).sum(-1).mean())
                shares = "  ".join(f"{100 * layer.energy(which, k):5.1f} %" for k in (1, 10, 100))
                lines.append(
                    f"{layer.name:{width}}  {which:6}  {layer.dim:6}  {rows:8,}  "
                    f"{layer.effective_rank(which):9.1f}  {layer.directions(which, 0.9):5}  "
                    f"{layer.directions(which, 0.99):5}  {shares}  {passes:7.1f}"
                )
        lines.append("passes: the trace of the filter, how many directions' worth it lets through")
        return "\n".join(lines)

    def picture(self, path: str | Path) -> None:
        """Per layer both spectra and the filters' curves over them, as PNG, SVG or PDF by the suffix of ``path``."""
        columns = min(4, max(1, len(self.layers)))
        lines = max(1, math.ceil(len(self.layers) / columns))
        figure, axes = new_figure(columns, (3.2 * columns, 2.6 * lines), lines)
        for layer, axis in zip(self.layers, axes, strict=False):
            for which, alpha, color in (
                ("retain", self.alpha_retain, "#3b6ea5"), ("forget", self.alpha_forget, "#b5452c")
            ):  # fmt: skip
                ratios = getattr(layer, which).mean(0)
                gain = alpha * ratios / ((alpha - 1) * ratios + 1)
                order = torch.arange(1, len(ratios) + 1).numpy()
                floor = 1e-12  # a logarithmic axis has no zero
                axis.loglog(order, ratios.clamp(min=floor).numpy(), color=color, label=f"r, {which}")
                axis.loglog(
                    order, gain.clamp(min=floor).numpy(), color=color, linestyle=":", label=f"filter, alpha {alpha:g}"
                )
            axis.set_ylim(1e-9, 2)
            axis.set_xlabel("direction", fontsize=8)
            axis.set_title(f"{layer.name} (d = {layer.dim})", fontsize=9)
        for axis in axes[len(self.layers) :]:
            axis.set_axis_off()
        if self.layers:
            axes[0].legend(fontsize=7)
        save_figure(figure, path)


@dataclass(frozen=True)
class AlphaPoint:
    """One pair of alphas: accuracies in percent per set, and the norm of all updates over that of all weights."""

    alpha_retain: float
    alpha_forget: float
    accuracy: dict[str, float]
    change: float


@dataclass(frozen=True)
class AlphaSearch:
    """A grid of alphas from one pass and one eigendecomposition per layer and set. A star marks :meth:`best`.

    Attributes:
        original: accuracies of the model before, percent.
        points: by alpha_retain, then alpha_forget, as asked for.
        seconds: of the pass and the decompositions that all points share.
    """

    original: dict[str, float]
    points: list[AlphaPoint]
    seconds: float

    def best(self, max_forget: float = 1.0) -> AlphaPoint:
        """Of the points with at most ``max_forget`` percent on the forgotten data, the one with the highest retained
        accuracy; of equal ones the smallest change.

        Raises ValueError when no point forgets as much.
        """
        enough = [point for point in self.points if point.accuracy["forget"] <= max_forget]
        if not enough:
            lowest = min(self.points, key=lambda point: point.accuracy["forget"])
            raise ValueError(
                f"no pair of alphas brings the forgotten data to {max_forget:g} %; the lowest is "
                f"{lowest.accuracy['forget']:.2f} % at alpha_retain = {lowest.alpha_retain:g}, alpha_forget = "
                f"{lowest.alpha_forget:g}: raise alpha_forget or lower alpha_retain"
            )
        return max(enough, key=lambda point: (point.accuracy["retain"], -point.change))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        names = list(self.original)
        head = ["alpha retain", "alpha forget", *(f"{name} %" for name in names), "change"]
        lines = ["  ".join(f"{title:>12}" for title in head)]
        cells = ["original", "", *(f"{self.original[name]:.2f}" for name in names), ""]
        lines.append("  ".join(f"{cell:>12}" for cell in cells).rstrip())
        best = self._best_or_none()
        for point in self.points:
            cells = [f"{point.alpha_retain:g}", f"{point.alpha_forget:g}"]
            cells += [f"{point.accuracy[name]:.2f}" for name in names] + [f"{point.change:.3f}"]
            lines.append("  ".join(f"{cell:>12}" for cell in cells) + (" *" if point is best else ""))
        return "\n".join(lines)

    def picture(self, path: str | Path) -> None:
        """Heat maps of forgotten and retained accuracy over the grid, as PNG, SVG or PDF by the suffix of ``path``."""
        retain = sorted({point.alpha_retain for point in self.points})
        forget = sorted({point.alpha_forget for point in self.points})
        figure, axes = new_figure(2, (2 * (2.2 + 0.55 * len(forget)), 1.8 + 0.45 * len(retain)))
        best = self._best_or_none()
        for axis, name in zip(axes, ("forget", "retain"), strict=True):
            grid = torch.full((len(retain), len(forget)), math.nan)
            for point in self.points:
                grid[retain.index(point.alpha_retain), forget.index(point.alpha_forget)] = point.accuracy[name]
            axis.imshow(grid.numpy(), cmap="viridis", vmin=0, vmax=100, origin="lower", aspect="auto")
            for i in range(len(retain)):
                for j in range(len(forget)):
                    value = float(grid[i, j])
                    color = "white" if value < 60 else "black"
                    axis.text(j, i, f"{value:.1f}", ha="center", va="center", color=color, fontsize=8)
            if best is not None:
                place = (forget.index(best.alpha_forget), retain.index(best.alpha_retain))
                axis.plot(*place, marker="s", markersize=24, fillstyle="none", color="#b5452c")
            axis.set_xticks(range(len(forget)), [f"{alpha:g}" for alpha in forget])
            axis.set_yticks(range(len(retain)), [f"{alpha:g}" for alpha in retain])
            axis.set_xlabel("alpha forget")
            axis.set_ylabel("alpha retain")
            axis.set_title(f"{name} accuracy, % (before: {self.original[name]:.1f})", fontsize=10)
        save_figure(figure, path)

    def _best_or_none(self) -> AlphaPoint | None:
        try:
            return self.best()
        except ValueError:
            return None


@dataclass(frozen=True)
class WeightChange:
    """Norm of each layer's update over the norm of its weight, as in figure 5 of the paper. ``print`` shows the table.

    Attributes:
        layers: (name, relative change), in the order of the model.
    """

    layers: list[tuple[str, float]]

    def __str__(self) -> str:
        width = max([len(name) for name, _ in self.layers] + [5])
        largest = max([change for _, change in self.layers] + [1e-300])
        lines = [f"{'layer':{width}}  {'change':>8}"]
        for name, change in self.layers:
            lines.append(f"{name:{width}}  {100 * change:6.2f} %  {'█' * round(20 * change / largest)}".rstrip())
        return "\n".join(lines)

    def picture(self, path: str | Path) -> None:
        """A bar per layer, the first on top, as PNG, SVG or PDF by the suffix of ``path``."""
        figure, (axis,) = new_figure(1, (6, 1.2 + 0.22 * len(self.layers)))
        axis.barh([name for name, _ in self.layers], [100 * change for _, change in self.layers], color="#3b6ea5")
        axis.invert_yaxis()
        axis.set_xlabel("norm of the update, % of the weight's")
        save_figure(figure, path)


def layer_change(outcome: Outcome) -> WeightChange:
    """Where a run of :class:`fastunlearn.ClassForgetting` moved the weights, from its outcome.

    Raises ValueError for the outcome of another method.
    """
    if "relative_change" not in outcome.details:
        raise ValueError(f"the outcome of {outcome.method} has no relative change per layer; ClassForgetting's has")
    return WeightChange(list(outcome.details["relative_change"].items()))
