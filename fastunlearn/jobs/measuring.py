"""What is measured of each model of a run, as plain numbers that can be kept and joined over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastunlearn.data import read
from fastunlearn.evaluate import Metrics, confusion_matrix, evaluate
from fastunlearn.evaluate.attacks import svc_attack, threshold_attacks
from fastunlearn.evaluate.distances import activation_distance
from fastunlearn.evaluate.leaks import leak_report, neighbours
from fastunlearn.evaluate.probes import linear_probe
from fastunlearn.evaluate.relearn import relearn_time
from fastunlearn.evaluate.signals import Signals, signals, signals_of
from fastunlearn.hooks import preserved
from fastunlearn.jobs import language
from fastunlearn.jobs.findings import sentences
from fastunlearn.jobs.language import KnownTexts
from fastunlearn.jobs.task import FORGOTTEN_TEST, Part, Task

PROBED = 2000  # samples at most that a probe is fitted on, and as many that it is judged by
LEAKS_SHOWN = 200  # samples at most of the leak reports
RELEARN_LR = 0.01


@dataclass(frozen=True)
class Known:
    """What is the same for all models of a run.

    Attributes:
        goal: the original's accuracy on the forgotten samples in percent, which relearning aims at.
        reference: the logits of the reference, from :func:`answers`; None without one.
    """

    goal: float
    reference: dict[str, Tensor] | None

    @classmethod
    def of(cls, task: Task, original: nn.Module, reference: nn.Module | None) -> Known:
        """Cost: a pass over the forgotten samples, and one over every set through the reference."""
        forget = evaluate(original, forget=task.forget.loader(task.config.batch_size))
        return cls(forget.accuracy["forget"], None if reference is None else answers(task, reference))


class _Answering(nn.Module):
    """Stands for a model whose logits are known: a batch's inputs are those of several, [N, models, C]."""

    def __init__(self, which: int) -> None:
        super().__init__()
        self.which = which
        self.device = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, logits: Tensor) -> Tensor:
        return logits[:, self.which]


def known_of(task: Task, original: nn.Module, reference: nn.Module | None) -> Known | KnownTexts:
    """What measuring the models of a run needs to know of these two; costs as :class:`Known`."""
    return (KnownTexts if task.language else Known).of(task, original, reference)


def answers(task: Task, model: nn.Module) -> dict[str, Tensor]:
    """The model's logits on every set that is measured, float32 [n, C] on the CPU: one forward pass for everything."""
    found = {}
    for name, part in task.sets.items():
        batches = read(part.loader(task.config.batch_size), name, task.device)
        with preserved(model), torch.no_grad():
            model.eval()
            found[name] = torch.cat([batch.outputs(model).float().cpu() for batch in batches])
    return found


def measure(
    task: Task,
    model: nn.Module,
    reference: nn.Module | None,
    known: Known | KnownTexts,
    seed: int,
) -> dict[str, Any]:
    """Everything about one model; JSON, with estimates as dicts where one run has an interval.

    Args:
        reference: the model that never saw the forgotten data, if there is one; measured against itself, its own gaps
            are zero.
        known: what is the same for all models of a run.

    Cost: a forward pass over each set; one over the forgotten samples for activations; the probes one over at most
    2,000 + 2,000 samples; relearning ``config.relearn`` steps at most. Of language models what
    :func:`fastunlearn.jobs.language.measure` says.
    """
    if isinstance(known, KnownTexts):
        return {name: _finite(value) for name, value in language.measure(task, model, known, seed).items()}
    ours, theirs = answers(task, model), known.reference
    stacked = {
        name: [(torch.stack([logits] if theirs is None else [logits, theirs[name]], 1), task.sets[name].labels)]
        for name, logits in ours.items()
    }
    judge, yardstick = _Answering(0), None if theirs is None else _Answering(1)
    metrics = evaluate(
        judge, forget=stacked["forget"], retain=stacked["retain"], test=stacked.get("test"), reference=yardstick
    )
    found = _by_set(task, metrics)
    if FORGOTTEN_TEST in stacked:
        more = _by_set(task, evaluate(judge, test=stacked[FORGOTTEN_TEST], reference=yardstick))
        for name, values in more.items():
            if values is not None:
                found[name][FORGOTTEN_TEST] = values["test"]
    found["tow"] = metrics.tow
    found |= attacks(task, {name: signals_of(logits, task.sets[name].labels) for name, logits in ours.items()}, seed)
    found["confusion"] = _confusion(task, judge, [stacked[name] for name in stacked if name.startswith("test")])
    found["relearn"] = _relearn(task, model, known.goal, seed)
    found["notes"] += task.not_relearned
    found["probes"] = found["activation_distance"] = None
    if (drawn := len(task.measured)) < (there := len(task.retain)):
        found["notes"].append(f"Of the {there:,} retained samples {drawn:,}, drawn at random, were measured.")
    if task.test is not None and not bool(torch.isin(task.test.labels, task.forget.labels).any()):
        found["notes"].append("No test sample is of a forgotten class: attacks may tell them apart by the class alone.")
    # Layers that do not keep their samples on the first axis can not be looked into; the rest still can be said.
    try:
        found["probes"] = _probes(task, model)
    except ValueError as error:
        found["notes"].append(f"No layer was probed: {error}.")
    try:
        if reference is not None:
            forget = task.forget.loader(task.config.batch_size)
            found["activation_distance"] = activation_distance(model, reference, forget)
    except ValueError as error:
        found["notes"].append(f"Activations were not compared: {error}.")
    return {name: _finite(value) for name, value in found.items()}


def _confusion(task: Task, judge: nn.Module, tests: list[list[tuple[Tensor, Tensor]]]) -> list[list[int]] | None:
    """Over all test samples."""
    if not tests:
        return None
    size = max(len(task.classes), tests[0][0][0].shape[-1])
    counts = confusion_matrix(judge, [batch for test in tests for batch in test], size).counts
    rows: list[list[int]] = counts[: len(task.classes), : len(task.classes)].tolist()
    return rows


def _by_set(task: Task, metrics: Metrics) -> dict[str, Any]:
    """What there is of each set."""
    per_class = {
        name: {
            task.classes[c]: {"accuracy": m.accuracy, "loss": m.loss, "samples": m.samples} for c, m in found.items()
        }
        for name, found in metrics.per_class.items()
    }
    return {"accuracy": metrics.accuracy, "loss": metrics.loss, "gap": metrics.gap, "per_class": per_class,
            "kl": metrics.kl, "js": metrics.js}  # fmt: skip


def _finite(value: Any) -> Any:
    """JSON has no infinity: a divergence or a loss without bound is None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def attacks(task: Task, of: Mapping[str, Signals], seed: int) -> dict[str, Any]:
    """Forgotten samples as members against test samples of the same classes, if there are any."""
    nothing: dict[str, Any] = {"attacks": {}, "roc": {}, "svc": None, "notes": []}
    if "test" not in of:
        return nothing
    others = of.get(FORGOTTEN_TEST) or _like(of["test"], of["forget"])
    found = threshold_attacks(of["forget"], others, task.config.bootstrap, seed)
    enough = min(len(of["retain"]), len(of["test"])) > 1
    svc = svc_attack(of["retain"], of["test"], of["forget"], seed=seed) if enough else None
    notes = sentences(limit for a in found.values() for limit in a.limits)
    if svc is None:
        notes.append("The SVC attack needs two retained and two test samples or more, and was not run.")
    return {
        "attacks": {name: a.as_dict() for name, a in found.items()},
        "roc": {name: a.roc.thinned().as_dict() for name, a in found.items()},
        "svc": None if svc is None else svc.forget_as_member.as_dict(),
        "notes": notes,
    }


def _like(test: Signals, forget: Signals) -> Signals:
    """The test samples of the classes that are forgotten: others would be told apart by their class alone."""
    same = torch.isin(test.target, torch.unique(forget.target))
    return test[same] if bool(same.any()) else test


def _relearn(task: Task, model: nn.Module, goal: float, seed: int) -> float | None:
    """Steps until the forgotten samples are known as well as to the original, less a point; None if never."""
    if not task.config.relearn or task.sharded:
        return None
    loader = task.forget.loader(task.config.batch_size, shuffle=True, seed=seed)
    return relearn_time(model, loader, threshold=goal, margin=1.0, lr=RELEARN_LR, max_steps=task.config.relearn).steps


def _probes(task: Task, model: nn.Module) -> dict[str, float] | None:
    """Of a class request: how well each layer tells the forgotten classes from the others, on test samples."""
    if not (task.config.probes and task.whole_classes and task.test is not None):
        return None
    fit = _joined(task.forget.at_most(PROBED // 2, 0), task.measured.at_most(PROBED // 2, 0))
    if fit is None:
        return None
    wanted = torch.tensor(task.whole_classes)

    def positive(targets: Tensor) -> Tensor:
        return torch.isin(targets, wanted.to(targets.device))

    test = task.test.evenly(PROBED, 0)
    labels = positive(test.labels)
    if not bool(labels.any()) or bool(labels.all()):
        return None
    size = task.config.batch_size
    return linear_probe(model, fit.loader(size), test.loader(size), positive)


def _joined(first: Part, second: Part) -> Part | None:
    """Both as one; None where they come from different data."""
    if first.samples is not second.samples:
        return None
    return Part("probe", first.samples, torch.cat([first.indices, second.indices]).sort().values)


def leaks(task: Task, original: nn.Module, unlearned: nn.Module, reference: nn.Module | None) -> dict[str, Any] | None:
    """Per-sample leak scores of the forgotten and of the retained samples beside them; None without test data, and for
    language models.

    Ids are the samples' own: this part of the findings is for the report, which stays with who made the request.
    """
    if task.test is None or task.language:
        return None
    size = task.config.batch_size
    forget = task.forget.at_most(LEAKS_SHOWN, 0)
    near = neighbours(original, forget.loader(size), task.measured.loader(size), count=min(5, len(task.measured)))
    beside = Part("neighbours", task.measured.samples, task.measured.indices[near.positions]).at_most(LEAKS_SHOWN, 0)
    models = [m for m in (original, unlearned, reference) if m is not None]
    test = [signals(m, task.test.loader(size), "test") for m in models]
    found = {}
    for part, which in ((forget, "forgotten"), (beside, "neighbours")):
        pairs = [(signals(m, part.loader(size), which), t) for m, t in zip(models, test, strict=True)]
        third = pairs[2] if len(pairs) > 2 else None
        found[which] = leak_report(pairs[0], pairs[1], third, part.ids, which).as_dict()
    return found


def layer_changes(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Of every tensor of the model, in its order: entries changed, entries, and the norm of the change over the
    larger of the norms before and after."""
    found = []
    for name, old in before.items():
        new = after[name].to(old.device)
        norm = max(float(old.double().norm()), float(new.double().norm()))
        change = float((new.double() - old.double()).norm())
        found.append({"name": name, "changed": int((old != new).sum()), "of": old.numel(),
                      "relative_change": change / norm if norm else 0.0})  # fmt: skip
    return found
