"""Which samples a model gives away, one by one: the forgotten ones, and those beside them that stayed.

An average attack may not move while single samples are exposed. Removing samples also changes who is an outlier:
samples that were hidden behind the removed ones can become the easiest to identify, layer after layer (Carlini et
al., The Privacy Onion Effect: Memorization is Relative, NeurIPS 2022). So the retained neighbours of what was
forgotten are looked at, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from fastunlearn.data import Batch, Batches, read
from fastunlearn.evaluate.attacks import share
from fastunlearn.evaluate.estimate import Estimate
from fastunlearn.evaluate.signals import Signals
from fastunlearn.hooks import Call, device_of, eager, preserved, recording

ENOUGH = 20  # test samples of a class that a percentile within the class is taken among
BLOCK = 1 << 20  # similarities held at a time: about 50 MB with what their order needs
_SHUFFLES = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
_GRID = 10**9  # similarities are compared at this resolution, far above the rounding of float32 features


@dataclass(frozen=True)
class NeighbourSet:
    """The retained samples that are most like the forgotten ones.

    Attributes:
        positions: in the retain set's order, int64 [k], ascending, each once.
        nearest: of each forgotten sample, its nearest retained ones, the nearest first, int64 [n, count].
        similarity: their cosines, float64 [n, count].
        layer: the Linear layer between whose inputs cosines were taken, or ``"logits"``.
    """

    positions: Tensor
    nearest: Tensor
    similarity: Tensor
    layer: str


def neighbours(model: nn.Module, forget: Batches, retain: Batches, count: int = 5) -> NeighbourSet:
    """For each forgotten sample its ``count`` nearest retained ones, by the cosine of what the model makes of them.

    Args:
        model: a classifier with logits [N, C], usually the original one; runs in eval mode and is unchanged.
        forget, retain: re-iterables of ``(inputs, targets)`` or of dicts; ``retain`` in a fixed order.
        count: how many per forgotten sample.

    Features are the inputs [N, D] of the last Linear called, if what it returns has the shape of the logits (the
    classifier's head), else the logits. Cosines that agree to 1e-9 are equal: the sample that comes first is the
    nearer one. A feature of zeros has the cosine 0 with everything.

    Raises:
        ValueError: ``count`` below 1 or above the number of retained samples, a retain loader that shuffles, whose
            positions would mean nothing, features that are NaN or infinite, malformed batches.

    Cost: one forward pass over each set; n m D multiply-adds in float64 on the CPU, the features of ``forget`` held
    and those of ``retain`` a batch at a time, never all n m similarities. 2 s for n = 1,000, m = 10,000, D = 512 on one
    core, without the passes.
    """
    if count < 1:
        raise ValueError(f"count must be 1 or more, got {count}")
    if isinstance(retain, DataLoader) and isinstance(retain.sampler, _SHUFFLES):
        raise ValueError("retain is a DataLoader that shuffles, so positions in it mean nothing; use shuffle=False")
    device = device_of(model)
    with preserved(model), torch.no_grad(), eager():
        model.eval()
        layer = _head(model, next(iter(read(forget, "forget", device))))
        ours = torch.cat(list(_directions(model, layer, forget, "forget")))
        best = torch.empty(len(ours), 0, dtype=torch.int64)
        total = 0
        for theirs in _directions(model, layer, retain, "retain"):
            for part in torch.split(theirs, max(1, BLOCK // len(ours))):
                best = _nearest(best, ours, part, total, count)
                total += len(part)
    if total < count:
        raise ValueError(f"count is {count}, but retain has {total} samples")
    nearest = _FAR - best % (_FAR + 1)
    similarity = torch.div(best, _FAR + 1, rounding_mode="floor").double() / _GRID
    return NeighbourSet(torch.unique(nearest), nearest, similarity, layer or "logits")


_FAR = (1 << 32) - 1  # one above the last position: with a similarity before it, a key fits in 63 bits


def _nearest(best: Tensor, ours: Tensor, theirs: Tensor, start: int, count: int) -> Tensor:
    """The largest keys so far: similarity on the grid, then the lower position, so that no two are equal."""
    similarity = ((ours @ theirs.T).clamp(-1, 1) * _GRID).round().long()
    keys = similarity * (_FAR + 1) + (_FAR - torch.arange(start, start + len(theirs)))
    keys = torch.cat([best, keys], 1)
    return keys.topk(min(count, keys.shape[1]), 1).values


def _head(model: nn.Module, batch: Batch) -> str | None:
    """The name of the last Linear called, if it takes [N, D] and returns the shape of the logits."""
    linears = [(module, name) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    names: dict[nn.Module, str] = dict(linears)
    calls: list[Call] = []
    with recording(names, calls.append):
        logits = batch.outputs(model)
    if not isinstance(logits, Tensor) or len(logits) != batch.size:
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"neighbours need logits with the {batch.size} samples first, got {shape}")
    if not calls or calls[-1].input.dim() != 2 or calls[-1].output.shape != logits.shape:
        return None
    return names[calls[-1].module]


def _directions(model: nn.Module, layer: str | None, batches: Batches, name: str) -> Iterator[Tensor]:
    """Features of each batch at unit length, float64 [N, D] on the CPU."""
    seen: list[Call] = []
    watched = [] if layer is None else [model.get_submodule(layer)]
    for batch in read(batches, name, device_of(model)):
        seen.clear()
        with recording(watched, seen.append):
            outputs = batch.outputs(model)
        features = (seen[-1].input if seen else outputs).flatten(1).cpu().double()
        if not bool(torch.isfinite(features).all()):
            raise ValueError(f"the features of a sample of {name} are NaN or infinite")
        yield F.normalize(features, dim=1)


def leak_scores(samples: Signals, test: Signals) -> Tensor:
    """How confidently each sample is taken for a member: percent of comparable test samples that look less like one.

    The percentile of its ``logit`` among the test samples of its own class, ties half; among all of them where the
    class has fewer than 20. A sample that the model never saw is as likely at any percentile; 100 is above all.

    Args:
        samples, test: signals of the same model; ``test`` was never trained on.

    Returns float64 [n], from 0 to 100. Raises ValueError without test samples. Cost: one sort per class.
    """
    if not len(test):
        raise ValueError("leak scores need test samples to compare with, got none")
    scores = torch.empty(len(samples), dtype=torch.float64)
    for target in torch.unique(samples.target).tolist():
        members = samples.target == target
        same = test.logit[test.target == target]
        pool = (same if len(same) >= ENOUGH else test.logit).sort().values
        values = samples.logit[members].contiguous()
        below, not_above = (torch.searchsorted(pool, values, right=right) for right in (False, True))
        scores[members] = 50 * (below + not_above).double() / len(pool)
    return scores


@dataclass(frozen=True)
class LeakReport:
    """Per-sample leak scores before and after unlearning, and of a retrained reference. ``print`` shows the summary.

    Attributes:
        ids: of the samples, such as positions or file names.
        before, after: scores of the original and the unlearned model, float64 [n], higher for a surer member: of
            :func:`leak_scores` in percent, or per-sample scores of LiRA.
        reference: of a model that never saw the forgotten samples, or None.
        which: ``"forgotten"`` or ``"neighbours"``. Scores of the forgotten should fall to the reference's; those of
            retained neighbours should not rise above the reference's, and where they do, forgetting some has
            exposed others.

    Raises ValueError unless all have one finite score per id.
    """

    ids: tuple[str, ...]
    before: Tensor
    after: Tensor
    reference: Tensor | None = None
    which: str = "forgotten"

    def __post_init__(self) -> None:
        if not self.ids:
            raise ValueError(f"a leak report of {self.which} needs at least one sample")
        for name, scores in (("before", self.before), ("after", self.after), ("reference", self.reference)):
            if scores is None:
                continue
            if scores.shape != (len(self.ids),):
                raise ValueError(
                    f"{name} must be one score per sample, [{len(self.ids)}] for {self.which}, got {list(scores.shape)}"
                )
            if not bool(torch.isfinite(scores).all()):
                raise ValueError(f"a score of {name} of {self.which} is NaN or infinite")

    @property
    def rose(self) -> Estimate:
        """Percent of the samples whose score is higher after than before, with Wilson's interval."""
        return share(int((self.after > self.before).sum()), len(self.ids))

    @property
    def median_change(self) -> float:
        """Median of after - before, in the unit of the scores."""
        return float((self.after - self.before).double().quantile(0.5))

    @property
    def median_excess(self) -> float | None:
        """Median of after - reference, in the unit of the scores; None without a reference."""
        return None if self.reference is None else float((self.after - self.reference).double().quantile(0.5))

    def worst(self, count: int = 10, by: str = "change") -> LeakReport:
        """The samples with the largest ``"change"`` (after - before), or the largest score ``"after"``, first.

        Ties keep their order. Raises ValueError for another ``by`` or ``count`` below 1.
        """
        if by not in ("change", "after"):
            raise ValueError(f"by must be 'change' or 'after', got {by!r}")
        if count < 1:
            raise ValueError(f"count must be 1 or more, got {count}")
        ranked = self.after - self.before if by == "change" else self.after
        order = ranked.argsort(descending=True, stable=True)[:count]
        reference = None if self.reference is None else self.reference[order]
        ids = tuple(self.ids[i] for i in order.tolist())
        return LeakReport(ids, self.before[order], self.after[order], reference, self.which)

    def summary(self) -> dict[str, Any]:
        """For JSON: samples, share that rose in percent, median change, median excess over the reference."""
        return {
            "which": self.which,
            "samples": len(self.ids),
            "rose": self.rose.as_dict(),
            "median_change": self.median_change,
            "median_excess": self.median_excess,
        }

    def as_dict(self) -> dict[str, Any]:
        """For JSON: ``ids``, ``before``, ``after`` and ``reference``."""
        reference = None if self.reference is None else self.reference.tolist()
        scores = {"before": self.before.tolist(), "after": self.after.tolist(), "reference": reference}
        return {"ids": list(self.ids), **scores}

    def __str__(self) -> str:
        text = f"{len(self.ids):,} {self.which}: {self.rose} % leak more, median change {self.median_change:+.4g}"
        excess = self.median_excess
        return text if excess is None else f"{text}, {excess:+.4g} from the reference"


def leak_report(
    before: tuple[Signals, Signals],
    after: tuple[Signals, Signals],
    reference: tuple[Signals, Signals] | None = None,
    ids: Sequence[Any] | None = None,
    which: str = "forgotten",
) -> LeakReport:
    """The report of :func:`leak_scores`: of each model, the signals of the samples and of the test set.

    ``ids`` name the samples; their positions by default. Raises ValueError as :class:`LeakReport` does.
    """
    scores = [leak_scores(*pair) for pair in (before, after)]
    names = range(len(before[0])) if ids is None else ids
    expected = None if reference is None else leak_scores(*reference)
    return LeakReport(tuple(map(str, names)), scores[0], scores[1], expected, which)
