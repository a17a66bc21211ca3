"""The per-example attacks of a run: LiRA on each model and U-LiRA on the method, by shadow models kept for the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastunlearn.data import FirstSamples
from fastunlearn.draws import derived_seed
from fastunlearn.evaluate.lira import Lira, ULira, membership, u_lira
from fastunlearn.evaluate.shadows import ShadowModels
from fastunlearn.evaluate.stacked import Mode
from fastunlearn.jobs.config import ConfigError, Say
from fastunlearn.jobs.findings import sentences
from fastunlearn.jobs.methods import entry, make_method
from fastunlearn.jobs.task import FORGOTTEN_TEST, Part, Task


@dataclass(frozen=True)
class Pool:
    """The samples of several parts, one part after another, read by index."""

    parts: list[Part]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """``(inputs, targets)`` of these samples, int64 [k], in their order."""
        order, found, start = [], [], 0
        for part in self.parts:
            mine = ((indices >= start) & (indices < start + len(part))).nonzero().flatten()
            if len(mine):
                order.append(mine)
                found.append(part.samples.batch(part.indices[indices[mine] - start]))
            start += len(part)
        back = torch.cat(order).argsort()
        inputs, targets = (torch.cat(both)[back] for both in zip(*found, strict=True))
        return inputs, targets

    def of(self, which: int) -> Tensor:
        """Indices of one of the parts."""
        start = sum(map(len, self.parts[:which]))
        return torch.arange(start, start + len(self.parts[which]))


def require_attackable(task: Task) -> None:
    """Raise ConfigError, naming the key, where shadow models can not be made."""
    if task.config.shadows % 2 or task.config.shadows < 8:
        raise ConfigError(f"shadows must be an even number of 8 or more, got {task.config.shadows}")
    if task.test is None:
        raise ConfigError("shadows: LiRA compares with samples that the model never saw; give --test")
    if isinstance(task.forget.samples.batch(task.forget.indices[:1]), dict):
        raise ConfigError("shadows: models of text are not trained here")


def shadow_attacks(task: Task, models: Mapping[str, nn.Module], cache: Path, say: Say) -> dict[str, Any]:
    """LiRA on every model by role, forgotten samples against test samples, and U-LiRA on the method.

    The shadow models are trained on halves of training and test data together, of which each sees all of the forgotten
    samples or none, so that those without are what retraining makes. Where whole classes are forgotten, it is all of
    the classes or nothing, their test samples with them, and these are forgotten by the shadow models, too: a model
    that knows a class from its test samples is not one that never saw it. They depend on the data, the recipe and the
    seed and not on the method, and are kept in ``cache``: another method's run trains none. Cost: ``config.shadows``
    trainings on half of the data, stated before they start; a run of the method on each that saw the forgotten samples.
    """
    config = task.config
    assert config.method is not None and task.test is not None
    others = task.sets.get(FORGOTTEN_TEST, task.test)
    rest = Part("test", task.test.samples, task.test.indices[~torch.isin(task.test.indices, others.indices)])
    # In a drawn order, so that a method that takes the first so many gets some of every class.
    order = torch.randperm(
        len(task.forget), generator=torch.Generator().manual_seed(derived_seed(config.seed, "forget"))
    )
    forgotten = replace(task.forget, indices=task.forget.indices[order])
    pool = Pool([forgotten, task.retain, others, *([rest] if len(rest) else [])])
    forget = pool.of(0)
    of_classes = bool(torch.isin(others.labels, torch.tensor(task.whole_classes, dtype=torch.int64)).all())
    together = torch.cat([forget, pool.of(2)]) if of_classes else forget
    mode = cast(Mode, config.stack)  # checked when the configuration was made
    shadows = ShadowModels(
        task.fresh, task.recipe, pool, config.shadows, config.seed, cache, 0.5, together, mode, task.device
    )
    say(str(shadows.plan()))
    shadows.train()
    kind = entry(config.method)
    count = config.method_samples or kind.samples
    _, _, held = task.batches(config.method, config.seed)
    extra = {} if held is None else {"validation": held}

    def unlearn(model: nn.Module, forget: Any, retain: Any, seed: int) -> object:
        assert config.method is not None
        method = make_method(config.method, config.settings, seed, task.fresh)
        forget, retain = FirstSamples(forget, count), FirstSamples(retain, count)
        return method.unlearn(model.eval(), forget=forget, retain=retain, **extra)

    say(f"U-LiRA: {config.method} on the shadow models")
    validation = None if held is None else held.samples.digest()
    settings = {**config.settings, "samples": count, "validation": validation}
    found = u_lira(shadows, unlearn, together, config.method, settings, models["unlearned"], seed=config.seed)
    attack = partial(membership, shadows=shadows, members=forget, others=pool.of(2), seed=config.seed)
    results = {role: {"LiRA": attack(model, resamples=config.bootstrap)} for role, model in models.items()}
    limits = [*found.limits, *(limit for attacks in results.values() for a in attacks.values() for limit in a.limits)]
    per_role: dict[str, dict[str, Lira | ULira]] = {role: dict(attacks) for role, attacks in results.items()}
    per_role["unlearned"]["U-LiRA"] = found
    return {
        "attacks": {role: {n: _figures(a) for n, a in attacks.items()} for role, attacks in per_role.items()},
        "roc": {role: {n: a.roc.thinned().as_dict() for n, a in attacks.items()} for role, attacks in per_role.items()},
        "limits": sentences(limits),
    }


def _figures(attack: Lira | ULira) -> dict[str, Any]:
    return {"auc": attack.auc.as_dict(), "tpr": {f"{rate:g}": tpr.as_dict() for rate, tpr in attack.tpr.items()}}
