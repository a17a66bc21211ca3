"""The same figures of several runs, each with its mean and 95 % interval over them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from torch.utils._pytree import tree_map

from fastunlearn.evaluate.estimate import Estimate

if TYPE_CHECKING:
    from fastunlearn.evaluate.metrics import Metrics

# The smallest and largest value that a figure can have, where it has any: an interval ends there.
RANGES: dict[str, tuple[float, float]] = {
    "accuracy": (0.0, 100.0),
    "gap": (-100.0, 100.0),
    "membership_auc": (0.0, 1.0),
    "membership_gap": (-1.0, 1.0),
    "kl": (0.0, math.inf),
    "js": (0.0, math.log(2)),
    "tow": (0.0, 1.0),
}
ANY = (-math.inf, math.inf)


@dataclass(frozen=True)
class ClassEstimates:
    """Of the samples of one class, over the runs that have some: accuracy in percent, mean loss, how many they are."""

    accuracy: Estimate
    loss: Estimate
    samples: Estimate


@dataclass(frozen=True)
class MetricsOverSeeds:
    """The fields of :class:`~fastunlearn.evaluate.Metrics`, each an :class:`~fastunlearn.evaluate.Estimate` over runs.

    The interval is Student's, of independent runs, and ends where the figure does (an accuracy at 100). Gaps,
    divergences and ToW are taken run by run, each run against its own reference, and then averaged. ``print`` shows a
    table.

    Attributes:
        runs: what was measured in each run, in the order of the seeds.
    """

    accuracy: dict[str, Estimate]
    loss: dict[str, Estimate]
    membership_auc: Estimate | None
    gap: dict[str, Estimate] | None
    membership_gap: Estimate | None
    per_class: dict[str, dict[int, ClassEstimates]]
    kl: dict[str, Estimate] | None
    js: dict[str, Estimate] | None
    tow: Estimate | None
    runs: list[Metrics]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: estimates as :meth:`Estimate.as_dict` has them, ``runs`` one by one; no NaN or infinity (None)."""
        found = {f.name: getattr(self, f.name) for f in fields(self)} | {"runs": [run.as_dict() for run in self.runs]}
        return tree_map(_plain, found)  # type: ignore[no-any-return]

    def __str__(self) -> str:
        runs = len(self.runs)
        told = "mean and 95 % interval (Student's t)" if runs > 1 else "no interval"
        return f"{summary(self)}\nof {runs} {'runs' if runs > 1 else 'run'}: {told}"


def over_runs(runs: Sequence[Metrics]) -> MetricsOverSeeds:
    """Mean and 95 % interval of every figure of ``runs``, metrics of the same sets with and without the same reference.

    Raises ValueError without runs, and for runs that were not measured alike, naming what differs. A class that does
    not occur in every run is averaged over the runs that have it (``runs`` of its estimates).
    """
    runs = list(runs)
    if not runs:
        raise ValueError("over_runs needs the metrics of one run or more, got none")
    return MetricsOverSeeds(
        accuracy=_per_set(runs, "accuracy") or {},
        loss=_per_set(runs, "loss") or {},
        membership_auc=_single(runs, "membership_auc"),
        gap=_per_set(runs, "gap"),
        membership_gap=_single(runs, "membership_gap"),
        per_class=_per_class(runs),
        kl=_per_set(runs, "kl"),
        js=_per_set(runs, "js"),
        tow=_single(runs, "tow"),
        runs=runs,
    )


def seed_numbers(seeds: int | Sequence[int]) -> list[int]:
    """The seeds 0 to k - 1 of a number k, or the given ones; raises TypeError or ValueError for anything else."""
    whole = isinstance(seeds, int) and not isinstance(seeds, bool)
    numbers = list(range(seeds)) if whole else seeds  # type: ignore[arg-type]
    if not isinstance(numbers, (list, tuple, range)) or any(not isinstance(s, int) for s in numbers):
        raise TypeError(f"seeds must be a number of runs or a sequence of integers, got {seeds!r}")
    if not numbers:
        raise ValueError(f"seeds must name one run or more, got {seeds!r}")
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"seeds must differ from one another, got {list(numbers)}; a repeated run is no new evidence")
    return list(numbers)


def each_run(given: Any, seeds: Sequence[int], name: str) -> Iterable[Any]:
    """What belongs to each seed: of a function, made when its turn comes; of a sequence, the one in its place."""
    if isinstance(given, Sequence):
        if len(given) != len(seeds):
            raise ValueError(f"{name} has {len(given)} entries for {len(seeds)} seeds; give one for each")
        return given
    if not callable(given):
        raise TypeError(
            f"with seeds= {name} must be a function of the seed or a sequence, one entry per seed, "
            f"got {type(given).__name__}"
        )
    return _made(given, seeds)


def _made(function: Callable[[int], Any], seeds: Sequence[int]) -> Iterator[Any]:
    for seed in seeds:
        yield function(seed)


def summary(found: Metrics | MetricsOverSeeds) -> str:
    """A table with a row per set and a column per field, and the fields that no set has below it."""
    columns: list[tuple[str, Mapping[str, float | Estimate] | None, str]] = [
        ("accuracy", found.accuracy, ".2f"),
        ("gap", found.gap, "+.2f"),
        ("loss", found.loss, ".4f"),
        ("kl", found.kl, ".4f"),
        ("js", found.js, ".4f"),
    ]
    shown = [(title, values, form) for title, values, form in columns if values is not None]
    rows = [["", *(title for title, _, _ in shown)]]
    rows += [[name, *(_text(values[name], form) for _, values, form in shown)] for name in found.accuracy]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    if found.membership_auc is not None:
        gap = "" if found.membership_gap is None else f", gap {_text(found.membership_gap, '+.3f')}"
        lines.append(f"membership_auc {_text(found.membership_auc, '.3f')}{gap}")
    if found.tow is not None:
        lines.append(f"tow {_text(found.tow, '.4f')}")
    return "\n".join(line.rstrip() for line in lines)


def _text(value: float | Estimate, form: str) -> str:
    if not isinstance(value, Estimate):
        return f"{value:{form}}"
    if value.low is None or value.high is None:
        return f"{value.mean:{form}}"
    return f"{value.mean:{form}} ({value.low:{form}} to {value.high:{form}})"


def _single(runs: Sequence[Metrics], name: str) -> Estimate | None:
    values = [getattr(run, name) for run in runs]
    if not _in_all_or_none(values, name):
        return None
    return Estimate.over(values, RANGES.get(name, ANY))


def _per_set(runs: Sequence[Metrics], name: str) -> dict[str, Estimate] | None:
    values = [getattr(run, name) for run in runs]
    if not _in_all_or_none(values, name):
        return None
    odd = next((v for v in values if v.keys() != values[0].keys()), None)
    if odd is not None:
        raise ValueError(f"the runs were measured on different sets: {', '.join(values[0])} and {', '.join(odd)}")
    return {each: Estimate.over([v[each] for v in values], RANGES.get(name, ANY)) for each in values[0]}


def _in_all_or_none(values: Sequence[object], name: str) -> bool:
    present = sum(v is not None for v in values)
    if present not in (0, len(values)):
        raise ValueError(
            f"{name} was measured in {present} of {len(values)} runs; measure all of them against a reference of the "
            "same kind, or none"
        )
    return present > 0


def _per_class(runs: Sequence[Metrics]) -> dict[str, dict[int, ClassEstimates]]:
    found: dict[str, dict[int, ClassEstimates]] = {}
    for name in dict.fromkeys(name for run in runs for name in run.per_class):
        of_set = [run.per_class.get(name, {}) for run in runs]
        found[name] = {}
        for cls in sorted({cls for classes in of_set for cls in classes}):
            of_class = [classes[cls] for classes in of_set if cls in classes]
            found[name][cls] = ClassEstimates(
                *(
                    Estimate.over([getattr(c, part) for c in of_class], RANGES.get(part, ANY))
                    for part in ("accuracy", "loss", "samples")
                )
            )
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, ClassEstimates):
        return {f.name: getattr(value, f.name).as_dict() for f in fields(value)}
    if isinstance(value, Estimate):
        return value.as_dict()
    return None if isinstance(value, float) and not math.isfinite(value) else value
