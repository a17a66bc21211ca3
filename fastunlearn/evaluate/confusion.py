"""Where the samples of a class are put: confusion matrices, before and after forgetting."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastunlearn.data import Batches, read
from fastunlearn.figures import new_figure, save_figure
from fastunlearn.hooks import device_of, preserved


@dataclass(frozen=True)
class Confusion:
    """Counts of samples by true class (rows) and predicted class (columns). ``print`` shows percent of each row.

    Attributes:
        counts: int64 [C, C], on the CPU.
    """

    counts: Tensor

    @property
    def accuracy(self) -> float:
        """Percent of all samples on the diagonal; NaN without samples."""
        return 100 * float(self.counts.diagonal().sum()) / total if (total := int(self.counts.sum())) else float("nan")

    @property
    def rows(self) -> Tensor:
        """Share of each true class by predicted class, float64 [C, C]; zero for a class without samples."""
        return self.counts.double() / self.counts.sum(1, keepdim=True).clamp(min=1)

    def where(self, cls: int) -> dict[int, float]:
        """Where the samples of class ``cls`` went: predicted class to percent, the most frequent first, no zeros.

        Raises ValueError for a class that the matrix does not have. Cost: one row.
        """
        if not 0 <= cls < len(self.counts):
            raise ValueError(f"cls must be one of the {len(self.counts)} classes from 0 on, got {cls}")
        order = self.counts[cls].argsort(descending=True, stable=True).tolist()
        return {c: 100 * float(self.rows[cls, c]) for c in order if self.counts[cls, c]}

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"counts": self.counts.tolist(), "accuracy": self.accuracy}

    def __str__(self) -> str:
        classes = range(len(self.counts))
        lines = ["".join([f"{'true':>6}", *(f"{c:>7}" for c in classes), f"{'samples':>9}"])]
        for c in classes:
            cells = "".join(f"{100 * share:7.1f}" if share else f"{'.':>7}" for share in self.rows[c].tolist())
            lines.append(f"{c:>6}{cells}{int(self.counts[c].sum()):9,}")
        return "\n".join(lines)

    def picture(self, path: str | Path, after: Confusion | None = None) -> None:
        """Heat map of the shares, with ``after`` beside it, as PNG, SVG or PDF by the suffix of ``path``."""
        shown = [("before", self), ("after", after)] if after is not None else [("", self)]
        size = 1.6 + 0.32 * len(self.counts)
        figure, axes = new_figure(len(shown), (len(shown) * (size + 0.4), size))
        for axis, (title, confusion) in zip(axes, shown, strict=True):
            assert confusion is not None
            image = axis.imshow(100 * confusion.rows.numpy(), cmap="Blues", vmin=0, vmax=100)
            every = range(0, len(confusion.counts), max(1, len(confusion.counts) // 20))
            axis.set_xticks(every)
            axis.set_yticks(every)
            axis.set_xlabel("predicted class")
            axis.set_ylabel("true class")
            axis.set_title(f"{title} {confusion.accuracy:.1f} % right".strip(), fontsize=10)
        figure.colorbar(image, ax=axes, shrink=0.8, label="% of the true class")
        save_figure(figure, path)


def confusion_matrix(model: nn.Module, batches: Batches, classes: int | None = None) -> Confusion:
    """Count true against predicted classes over ``batches``, in eval mode; the model is unchanged.

    Args:
        model: a classifier with logits [N, C, ...]; further axes are positions, each counted, those with a negative
            target (such as -100) left out.
        batches: re-iterable of ``(inputs, targets)`` or of dicts; targets int64 [N, ...].
        classes: C; by default as many as the model has logits.

    Raises:
        TypeError: ``batches`` cannot be read twice, targets are not integers.
        ValueError: no batch, a malformed one, targets of another shape or beyond C; fewer ``classes`` than logits.

    Cost: one forward pass; C^2 counts.
    """
    device = device_of(model)
    counts: Tensor | None = None
    with preserved(model), torch.no_grad():
        model.eval()
        for batch in read(batches, "batches", device):
            logits, targets = batch.outputs(model), batch.targets
            if not isinstance(targets, Tensor) or targets.is_floating_point():
                raise TypeError("targets must be class indices, a tensor of integers")
            predicted = logits.argmax(1)
            if predicted.shape != targets.shape:
                raise ValueError(
                    f"logits {list(logits.shape)} need targets of shape {list(predicted.shape)}, "
                    f"got {list(targets.shape)}"
                )
            size = logits.shape[1] if classes is None else classes
            if size < logits.shape[1]:
                raise ValueError(f"the model has {logits.shape[1]} classes, more than classes = {size}")
            if counts is None:
                counts = torch.zeros(size * size, dtype=torch.int64, device=device)
            true = targets.flatten().long()
            counted = true >= 0
            if bool((true >= size).any()):
                raise ValueError(f"a target is {int(true.max())}, but there are {size} classes from 0 on")
            counts += torch.bincount(true[counted] * size + predicted.flatten()[counted], minlength=size * size)
    assert counts is not None  # read() refuses an empty set
    side = int(len(counts) ** 0.5 + 0.5)
    return Confusion(counts.view(side, side).cpu())
