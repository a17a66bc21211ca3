"""One number from several runs: its mean and how far it may be off."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval. ``print`` shows ``85.30 (84.90 to 85.70)``.

    Attributes:
        mean: of the runs, or the figure itself.
        low, high: ends of the interval; None where one run says nothing about it.
        runs: how many runs the interval is over (1 for an interval within a run, such as a bootstrap's).
    """

    mean: float
    low: float | None = None
    high: float | None = None
    runs: int = 1

    @classmethod
    def over(cls, values: Sequence[float], limits: tuple[float, float] = (-math.inf, math.inf)) -> Estimate:
        """Of independent runs: mean and Student's t interval, mean +- t(0.975, k - 1) s / sqrt(k).

        ``limits`` are the smallest and largest values that the figure can have: an interval ends there, which leaves
        out nothing that it could have held. Raises ValueError without values. One value has no interval.
        """
        if not values:
            raise ValueError("an estimate needs at least one run")
        mean = math.fsum(values) / len(values)
        if len(values) == 1 or not math.isfinite(mean):
            return cls(mean, runs=len(values))
        from scipy.stats import t

        error = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
        half = float(t.ppf(0.975, len(values) - 1)) * error
        return cls(mean, max(mean - half, min(mean, limits[0])), min(mean + half, max(mean, limits[1])), len(values))

    @classmethod
    def bootstrapped(cls, value: float, resampled: torch.Tensor) -> Estimate:
        """Of one run: ``value`` with the 2.5 and 97.5 percentiles of the same figure on resampled data [B]."""
        low, high = torch.quantile(resampled.double(), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return cls(value, low, high)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: ``mean`` and ``runs``, and ``low`` and ``high`` where there is an interval; no NaN (None)."""
        found: dict[str, Any] = {"mean": self.mean if math.isfinite(self.mean) else None, "runs": self.runs}
        if self.low is not None and self.high is not None:
            found |= {"low": self.low, "high": self.high}
        return found

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:.4g}"
        return f"{self.mean:.4g} ({self.low:.4g} to {self.high:.4g})"
