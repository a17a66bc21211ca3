"""What every unlearning method is compared with: retraining, fine-tuning on what is kept, gradient ascent."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fastunlearn.data import Batches, LossFunction
from fastunlearn.hooks import Copies, device_of, preserved, require_finite, restored_on_error
from fastunlearn.methods.training import descend, training_share
from fastunlearn.outcome import Outcome
from fastunlearn.parallel.deal import together
from fastunlearn.parallel.ranks import counted, holders, local, sharing, unwrapped


@dataclass(frozen=True)
class Retrain:
    """Train from a fresh initialisation on the retained data alone: the yardstick of every other method.

    Args:
        epochs: passes over ``retain``.
        lr: peak of the one-cycle learning rate.
        weight_decay: of AdamW.
        build: returns a freshly initialised model of the same shape; default ``reset_parameters`` of every module, and
            for Hugging Face's models one more of their class and config, a copy in memory for as long as it is made.
        loss_fn: one loss per sample; default cross-entropy, for causal language models that of the next token.
        seed: of the initialisation and of whatever the model draws while training.
        progress: show a progress bar.
    """

    epochs: int = 20
    lr: float = 0.01
    weight_decay: float = 0.01
    build: Callable[[], nn.Module] | None = None
    loss_fn: LossFunction | None = None
    seed: int = 0
    progress: bool = False

    def unlearn(self, model: nn.Module, forget: Batches | None, retain: Batches) -> Outcome:
        """Retrain ``model`` in place; ``forget`` is only what it does not see, and may be None.

        Raises ValueError for an empty ``retain`` or a module that can not be initialised anew, before anything
        changes; whatever is raised later, the weights are put back. Cost: ``epochs`` forward and
        backward passes over ``retain``.

        On several ranks every rank calls this with its own share of the samples; of a model in shards ``build`` must
        return another one sharded alike.
        """
        outcome = Outcome("Retrain", _settings(self))
        device, ranks = device_of(model), sharing(model)
        if self.build is None and any(isinstance(p, DTensor) for p in model.parameters()):
            raise ValueError(
                "a sharded model is not initialised anew in place; pass build=, which returns one sharded alike"
            )
        steps = sum(1 for _ in together(training_share(retain), "retain", device, ranks)) * self.epochs
        with (
            preserved(model),
            restored_on_error(model) as before,
            outcome.measured(device),
            outcome.phase("train"),
        ):
            torch.manual_seed(self.seed)
            if self.build is not None:
                unwrapped(model).load_state_dict(unwrapped(self.build()).state_dict())
            else:
                _begin_anew(unwrapped(model))
            if ranks.rank:
                torch.manual_seed(self.seed + ranks.rank)  # so that ranks drop out other units
            model.train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=self.lr, weight_decay=self.weight_decay)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=self.lr, total_steps=steps)
            descend(
                model,
                retain,
                "retain",
                optimizer,
                self.epochs,
                self.loss_fn,
                schedule,
                progress=self.progress,
            )
        _count_changes(outcome, before, model)
        return outcome


@dataclass(frozen=True)
class FineTune:
    """Go on training on the retained data and hope that the rest fades (catastrophic forgetting as a method).

    Args:
        epochs: passes over ``retain``.
        lr, momentum: of SGD.
        loss_fn: one loss per sample; default cross-entropy, for causal language models that of the next token.
        progress: show a progress bar.
    """

    epochs: int = 1
    lr: float = 0.01
    momentum: float = 0.9
    loss_fn: LossFunction | None = None
    progress: bool = False

    def unlearn(self, model: nn.Module, forget: Batches | None, retain: Batches) -> Outcome:
        """Fine-tune ``model`` in place, in the mode it is in.

        Raises ValueError for an empty or malformed ``retain``; the weights are put back whatever is raised.
        """
        outcome = Outcome("FineTune", _settings(self))
        _step_over(
            outcome,
            model,
            retain,
            "retain",
            self.epochs,
            self.lr,
            self.momentum,
            self.loss_fn,
            1.0,
            self.progress,
        )
        return outcome


@dataclass(frozen=True)
class GradientAscent:
    """Climb the loss of the forgotten data.

    Args:
        epochs: passes over ``forget``.
        lr: of plain SGD.
        loss_fn: one loss per sample; default cross-entropy, for causal language models that of the next token.
        progress: show a progress bar.
    """

    epochs: int = 1
    lr: float = 0.001
    loss_fn: LossFunction | None = None
    progress: bool = False

    def unlearn(self, model: nn.Module, forget: Batches, retain: Batches | None = None) -> Outcome:
        """Ascend in place, in the mode the model is in.

        Raises ValueError for an empty or malformed ``forget``; the weights are put back whatever is raised.
        """
        outcome = Outcome("GradientAscent", _settings(self))
        _step_over(outcome, model, forget, "forget", self.epochs, self.lr, 0.0, self.loss_fn, -1.0, self.progress)
        return outcome


def _begin_anew(model: Any) -> None:
    """Hugging Face's models are initialised as a whole, by their config; all others module by module."""
    if any(cls.__name__ == "PreTrainedModel" for cls in type(model).__mro__):
        model.load_state_dict(type(model)(deepcopy(model.config)).state_dict())
    else:
        initialise(model)


def initialise(model: nn.Module) -> None:
    """Call ``reset_parameters`` of every module; raises ValueError, changing nothing, if one with weights has none."""
    resets: list[Callable[[], None]] = []
    for name, module in model.named_modules():
        # nn.MultiheadAttention spells it with an underscore.
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if callable(reset):
            resets.append(reset)
        elif any(p is not None for p in module._parameters.values()):
            raise ValueError(
                f"{name or 'the model'} ({type(module).__name__}) has weights but no reset_parameters(); "
                "pass build=, a function that returns a freshly initialised model"
            )
    for reset in resets:
        reset()


def _step_over(
    outcome: Outcome,
    model: nn.Module,
    batches: Batches,
    name: str,
    epochs: int,
    lr: float,
    momentum: float,
    loss_fn: LossFunction | None,
    sign: float,
    progress: bool,
) -> None:
    require_finite(model)
    device = device_of(model)
    with preserved(model), restored_on_error(model) as before, outcome.measured(device), outcome.phase("train"):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=momentum)
        descend(model, batches, name, optimizer, epochs, loss_fn, sign=sign, progress=progress)
    _count_changes(outcome, before, model)


def _count_changes(outcome: Outcome, before: Copies, model: nn.Module) -> None:
    """Of all ranks that hold a part of the weights."""
    ranks = holders(model)
    names = [name for name, _, _ in before]
    here = [counted(p, ranks) * (local(p.detach()) != local(old)).sum() for _, p, old in before]
    total = torch.stack(here)
    ranks.sum_(total)
    outcome.changed |= {name: count for name, count in zip(names, total.tolist(), strict=True) if count}


def _settings(method: Retrain | FineTune | GradientAscent) -> dict[str, object]:
    # Not asdict: it copies whatever ``build`` and ``loss_fn`` hold on to, a model or a process group.
    names = [field.name for field in fields(method) if field.name not in ("progress", "build", "loss_fn")]
    return {name: getattr(method, name) for name in names}
