"""What a model still knows: accuracy, loss, how well its loss betrays membership, its distance from a reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fastunlearn.data import Batch, Batches, LossFunction, cross_entropy_by_position, per_sample_loss
from fastunlearn.evaluate.seeds import MetricsOverSeeds, each_run, over_runs, seed_numbers, summary
from fastunlearn.hooks import device_of, preserved
from fastunlearn.language import is_causal_lm, loss_for, predictions, scored
from fastunlearn.parallel.deal import dealt_back, together
from fastunlearn.parallel.ranks import reshard, sharing, unwrapped

_MOST_LOGITS = 1 << 22  # of one model at a time in float64, when divergences are computed


@dataclass(frozen=True)
class ClassMetrics:
    """Of the samples of one class: accuracy in percent, mean loss, and how many they are.

    Where the targets are classes of positions, ``samples`` counts positions, and ``loss`` is NaN under a loss function
    of the caller's own, which has one loss per sample.
    """

    accuracy: float
    loss: float
    samples: int


@dataclass(frozen=True)
class Metrics:
    """Shares are in percent, losses are means over samples, divergences are in nats. ``print`` shows a table.

    Attributes:
        accuracy, loss: per set (``forget``, ``retain``, ``test``, those that were given).
        membership_auc: how often the loss of a forgotten sample is below that of a test sample: 0.5 says that a
            loss threshold can not tell them apart; only with ``forget`` and ``test``.
        gap: accuracy minus the reference's, per set, in points; only with a reference.
        membership_gap: membership AUC minus the reference's.
        per_class: per set, the same by class index, of the classes that occur there; empty for language models.
        kl: per set, the mean of KL(reference || model) = sum over classes of r log(r / m); infinite where the model
            rules out what the reference does not; only with a reference that is a module.
        js: per set, the mean of the Jensen-Shannon divergence (not its square root), from 0 to log 2; likewise.
        tow: Tug-of-War, the product over the three sets of 1 - |accuracy - the reference's|, as fractions: 1 is
            indistinguishable by accuracy; only with a reference and all three sets. Source: arXiv 2406.01257.
    """

    accuracy: dict[str, float]
    loss: dict[str, float]
    membership_auc: float | None = None
    gap: dict[str, float] | None = None
    membership_gap: float | None = None
    per_class: dict[str, dict[int, ClassMetrics]] = field(default_factory=dict)
    kl: dict[str, float] | None = None
    js: dict[str, float] | None = None
    tow: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return summary(self)


@overload
def evaluate(
    model: nn.Module,
    *,
    forget: Batches | None = None,
    retain: Batches | None = None,
    test: Batches | None = None,
    reference: nn.Module | Metrics | None = None,
    loss_fn: LossFunction | None = None,
    seeds: None = None,
) -> Metrics: ...


@overload
def evaluate(
    model: Callable[[int], nn.Module] | Sequence[nn.Module],
    *,
    forget: Batches | None = None,
    retain: Batches | None = None,
    test: Batches | None = None,
    reference: nn.Module | Metrics | Callable[[int], nn.Module | Metrics] | Sequence[nn.Module | Metrics] | None = None,
    loss_fn: LossFunction | None = None,
    seeds: int | Sequence[int],
) -> MetricsOverSeeds: ...


def evaluate(
    model: Any,
    *,
    forget: Batches | None = None,
    retain: Batches | None = None,
    test: Batches | None = None,
    reference: Any = None,
    loss_fn: LossFunction | None = None,
    seeds: int | Sequence[int] | None = None,
) -> Metrics | MetricsOverSeeds:
    """Measure ``model`` in eval mode on the given sets, and its distance from a ``reference`` retrained without.

    Args:
        model: a classifier with logits [N, C]; unchanged. Further axes of logits are positions, each counted, those
            with a negative target (such as -100) left out; a sample's loss is then the mean over its positions. A
            causal language model of Hugging Face is measured on the labelled tokens of its texts, each under the logits
            [N, T, V] one position before. With ``seeds``, a function from a seed to a model, called once per seed and
            asked for one model at a time, or a sequence of models, one per seed.
        forget, retain, test: re-iterables of ``(inputs, targets)``; any may be left out, not all. Targets are int64
            [N] or [N, ...].
        reference: the yardstick, usually retrained on ``retain`` alone, or what it measured on the same sets (then
            without divergences, which need both models' logits). With ``seeds`` also a function or a sequence as
            ``model``, paired with it seed by seed.
        loss_fn: one loss per sample; default cross-entropy, for causal language models that of the next token.
        seeds: k for the seeds 0 to k - 1, or the seeds themselves: the runs are then reported as means with 95 %
            intervals. The function that is given the seed is what sets it.

    Raises TypeError or ValueError for malformed batches, outputs, targets or losses, for a reference with logits of
    another shape, for models that do not match ``seeds``.

    Cost: one forward pass per set and model; the reference runs beside the model batch by batch, and no logits are
    kept. A population attack like this one overstates protection; it is a floor on leakage, not a proof.
    """
    sets = {name: b for name, b in (("forget", forget), ("retain", retain), ("test", test)) if b is not None}
    if not sets:
        raise ValueError("nothing to evaluate on: give forget=, retain= or test=")
    if seeds is None:
        return _evaluate(model, sets, reference, loss_fn)
    numbers = seed_numbers(seeds)
    if isinstance(model, nn.Module):
        raise TypeError(
            f"with seeds= model must be a function from a seed to a model or a sequence of {len(numbers)} models, "
            f"got one {type(model).__name__}; leave seeds= out to measure one model"
        )
    one_reference = reference is None or isinstance(reference, (nn.Module, Metrics))
    references = [reference] * len(numbers) if one_reference else each_run(reference, numbers, "reference")
    models = each_run(model, numbers, "model")
    return over_runs([_evaluate(m, sets, r, loss_fn) for m, r in zip(models, references, strict=True)])


def _evaluate(
    model: nn.Module, sets: Mapping[str, Batches], reference: nn.Module | Metrics | None, loss_fn: LossFunction | None
) -> Metrics:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}; for several runs give seeds=")
    if not isinstance(reference, (nn.Module, Metrics, type(None))):
        raise TypeError(f"reference must be an nn.Module or its Metrics, got {type(reference).__name__}")
    if isinstance(reference, Metrics) and (missing := sorted(set(sets) - set(reference.accuracy))):
        raise ValueError(f"the reference was not measured on {', '.join(missing)}")
    yardstick = reference if isinstance(reference, nn.Module) else None
    causal, loss_fn = is_causal_lm(model), loss_for(model, loss_fn)
    passes = {name: _pass(model, yardstick, batches, name, loss_fn) for name, batches in sets.items()}
    ours = _summed({name: p.model for name, p in passes.items()}, not causal)
    if reference is None:
        return ours
    kl = js = None
    if isinstance(reference, Metrics):
        theirs = reference
    else:
        theirs = _summed({name: p.reference for name, p in passes.items() if p.reference is not None}, not causal)
        kl = {name: float(p.kl.mean()) for name, p in passes.items()}
        js = {name: float(p.js.mean()) for name, p in passes.items()}
    gap = {name: ours.accuracy[name] - theirs.accuracy[name] for name in ours.accuracy}
    auc, their_auc = ours.membership_auc, theirs.membership_auc
    membership_gap = None if auc is None or their_auc is None else auc - their_auc
    tow = math.prod(1 - abs(points) / 100 for points in gap.values()) if len(gap) == 3 else None
    return Metrics(ours.accuracy, ours.loss, auc, gap, membership_gap, ours.per_class, kl, js, tow)


@dataclass(frozen=True)
class _Scores:
    """Of one model on one set: P classified samples or positions, and n samples."""

    classes: Tensor  # int64 [P], negative where it does not count
    correct: Tensor  # bool [P]
    losses: Tensor  # float [P]
    sample_losses: Tensor  # float [n]


@dataclass(frozen=True)
class _Pass:
    model: _Scores
    reference: _Scores | None
    kl: Tensor  # float64, of what counts; empty without a reference
    js: Tensor


def _pass(
    model: nn.Module, reference: nn.Module | None, batches: Batches, name: str, loss_fn: LossFunction | None
) -> _Pass:
    """Both models over one set, side by side, in eval mode."""
    device, causal, ranks = device_of(model), is_causal_lm(model), sharing(model)
    if ranks.size > 1 and reference is not None:
        raise ValueError(
            "a model on several ranks is measured alone: give the reference's own metrics, "
            "reference=evaluate(reference, ...)"
        )
    ours: list[_Scores] = []
    theirs: list[_Scores] = []
    kl: list[Tensor] = []
    js: list[Tensor] = []
    with preserved(model), preserved(reference if reference is not None else model), torch.no_grad():
        model.eval()
        if reference is not None:
            reference.eval()
        for batch, counts in together(batches, name, device, ranks):
            logits = batch.outputs(unwrapped(model))
            if counts:
                ours.append(_scores(logits, batch, name, loss_fn, causal))
            if reference is None:
                continue
            other = moved(batch, device_of(reference))
            expected = other.outputs(reference)
            theirs.append(_scores(expected, other, name, loss_fn, causal))
            if expected.shape != logits.shape:
                raise ValueError(
                    f"the reference's logits {list(expected.shape)} differ in shape from the model's "
                    f"{list(logits.shape)}; for the accuracy gap alone give the reference's own metrics, "
                    "reference=evaluate(reference, ...)"
                )
            if causal:  # one row per prediction: all of a text are many at once in float64
                expected, logits = (x[:, :-1].flatten(0, 1) for x in (expected, logits))
            counted = (ours[-1].classes >= 0).view(len(logits), -1)
            for part, (k, j) in _divergences(expected.to(device), logits):
                kl.append(k[counted[part]])
                js.append(j[counted[part]])
    reshard(model)
    nothing = torch.zeros(0, dtype=torch.float64)
    return _Pass(
        _joined(dealt_back(ranks, ours)),
        _joined(theirs) if theirs else None,
        torch.cat(kl).cpu() if kl else nothing,
        torch.cat(js).cpu() if js else nothing,
    )


def _scores(logits: Any, batch: Batch, name: str, loss_fn: LossFunction | None, causal: bool) -> _Scores:
    targets = batch.targets
    sample_losses = per_sample_loss(loss_fn, logits, targets, batch.size)
    if causal:
        logits, targets = predictions(logits, targets)
    if not isinstance(logits, Tensor) or logits.dim() < 2:
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the model must return logits [N, C, ...] on {name}, got {found}")
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.is_complex():
        kind = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise TypeError(f"targets of {name} must be class indices, a tensor of integers, got {kind}")
    predicted = logits.argmax(1)
    if predicted.shape != targets.shape:
        raise ValueError(
            f"on {name} logits {list(logits.shape)} need targets of shape {list(predicted.shape)}, "
            f"got {list(targets.shape)}"
        )
    if logits.dim() == 2:
        losses = sample_losses
    elif loss_fn is None:
        losses = cross_entropy_by_position(logits, targets)
    else:
        losses = torch.full(targets.shape, math.nan)
    right = _right(logits, targets)
    return _Scores(targets.flatten().long(), right.flatten(), losses.flatten().float(), sample_losses.float())


def _right(logits: Tensor, targets: Tensor) -> Tensor:
    """Whether the largest logit is the target's; where one is NaN, which argmax takes for the largest, none is."""
    highest, predicted = logits.max(1)
    return (predicted == targets) & ~highest.isnan()


def _joined(batches: Sequence[_Scores]) -> _Scores:
    return _Scores(
        *(
            torch.cat([getattr(b, part).cpu() for b in batches])
            for part in ("classes", "correct", "losses", "sample_losses")
        )
    )


def _summed(sets: Mapping[str, _Scores], by_class: bool) -> Metrics:
    accuracy = {name: 100 * float(s.correct[s.classes >= 0].double().mean()) for name, s in sets.items()}
    loss = {name: float(s.sample_losses.double().mean()) for name, s in sets.items()}
    auc = None
    if "forget" in sets and "test" in sets:
        auc = membership_auc(sets["forget"].sample_losses, sets["test"].sample_losses)
    return Metrics(accuracy, loss, auc, per_class={name: _per_class(s) for name, s in sets.items() if by_class})


def _per_class(scores: _Scores) -> dict[int, ClassMetrics]:
    counted = scores.classes >= 0
    classes = scores.classes[counted]
    samples = torch.bincount(classes)
    occur = samples.nonzero().flatten()
    # Sums by class, so that a sample without a finite loss is seen in its own class alone.
    correct, loss = (
        (torch.bincount(classes, values[counted].double()) / samples)[occur].tolist()
        for values in (scores.correct, scores.losses)
    )
    rows = zip(occur.tolist(), correct, loss, samples[occur].tolist(), strict=True)
    return {cls: ClassMetrics(100 * share, mean, number) for cls, share, mean, number in rows}


def _divergences(reference: Tensor, model: Tensor) -> Iterator[tuple[slice, tuple[Tensor, Tensor]]]:
    """KL(reference || model) and Jensen-Shannon of logits [N, C, ...], float64 [n, positions], some samples a time."""
    step = max(1, _MOST_LOGITS // max(1, model[0].numel()))
    for start in range(0, len(model), step):
        part = slice(start, start + step)
        r, m = (x[part].double().log_softmax(1).reshape(len(x[part]), x.shape[1], -1) for x in (reference, model))
        middle = torch.logaddexp(r, m) - math.log(2)
        yield part, (_relative_entropy(r, m), (_relative_entropy(r, middle) + _relative_entropy(m, middle)) / 2)


def _relative_entropy(p: Tensor, q: Tensor) -> Tensor:
    """sum over axis 1 of exp(p) (p - q), of log probabilities; a term of probability zero is zero, whatever q is."""
    terms = torch.where(p == -math.inf, 0.0, p.exp() * (p - q))
    return terms.sum(1).clamp(min=0)  # rounding may leave -1e-17


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch on another device."""
    args, kwargs, targets = tree_map_only(Tensor, lambda t: t.to(device), (batch.args, batch.kwargs, batch.targets))
    return Batch(args, kwargs, targets, batch.size)


def predict(
    model: nn.Module, batches: Batches, name: str, loss_fn: LossFunction | None = None
) -> tuple[Tensor, Tensor]:
    """Per sample whether the largest logit is the target (bool [n]), and the loss (float [n]); in eval mode.

    Of a causal language model, whether it is at every labelled token of a text. On several ranks the samples of all.
    """
    device, causal, loss_fn = device_of(model), is_causal_lm(model), loss_for(model, loss_fn)
    ranks = sharing(model)
    correct: list[Tensor] = []
    losses: list[Tensor] = []
    with preserved(model), torch.no_grad():
        model.eval()
        for batch, counts in together(batches, name, device, ranks):
            outputs = batch.outputs(unwrapped(model))
            if not counts:
                continue
            losses.append(per_sample_loss(loss_fn, outputs, batch.targets, batch.size).float())
            if causal:
                right = _right(*predictions(outputs, batch.targets))
                correct.append((right | ~scored(batch.targets)[:, 1:]).all(1))
            else:
                correct.append(_right(outputs, batch.targets))
    reshard(model)
    return torch.cat(dealt_back(ranks, correct)), torch.cat(dealt_back(ranks, losses))


def membership_auc(members: Tensor, others: Tensor) -> float:
    """P(loss of a member < loss of another) + P(equal) / 2, from ranks; losses [n] and [m]. NaN if a loss is NaN."""
    from sklearn.metrics import roc_auc_score

    scores = -torch.cat([members, others]).double().cpu()
    if bool(scores.isnan().any()):
        return math.nan
    scores = scores.nan_to_num()  # infinite losses keep their rank; scikit-learn takes none
    return float(roc_auc_score([1] * len(members) + [0] * len(others), scores.numpy()))
