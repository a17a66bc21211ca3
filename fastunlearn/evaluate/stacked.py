"""Several small models trained at once: their weights stacked, one vectorised pass and one optimiser for all.

A small model leaves most of a processor idle. M of them, each with its own samples in its own order, are one call of
``torch.func.vmap`` per step; whether that is faster depends on the model and the machine, so it is measured.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils._pytree import tree_map_only

from fastunlearn.data import Batch, per_sample_loss, read
from fastunlearn.draws import derived_seed
from fastunlearn.hooks import preserved
from fastunlearn.methods.baselines import Retrain
from fastunlearn.methods.training import descend
from fastunlearn.outcome import track

Mode = Literal["auto", "stacked", "sequential"]
Build = Callable[[], nn.Module]

WARM_UP_STEPS = 3
TIMED_STEPS = 20
TIMED_SECONDS = 0.3  # after at least three steps


class Samples(Protocol):
    """Data that is read by index: all that training a model on a subset needs."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> tuple[Any, Any]:
        """``(inputs, targets)`` of these samples, int64 [k]; the first axis of every tensor is k."""


@dataclass(frozen=True)
class TensorSamples:
    """Samples that lie in memory: ``inputs`` [n, ...] and ``labels`` [n, ...]."""

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.inputs[indices.to(self.inputs.device)], self.labels[indices.to(self.labels.device)]


def as_samples(x: Tensor | Samples, y: Tensor | None = None) -> Samples:
    """Two tensors, or what can be read by index as it is; raises ValueError for tensors of different lengths."""
    if isinstance(x, Tensor):
        if y is None or x.dim() == 0 or y.dim() == 0 or len(x) != len(y):
            shape = None if y is None else list(y.shape)
            raise ValueError(f"x {list(x.shape)} needs a y with as many rows, got {shape}")
        return TensorSamples(x, y)
    if not callable(getattr(x, "batch", None)) or not hasattr(x, "__len__"):
        raise TypeError(f"data must be two tensors or have batch(indices) and len(), got {type(x).__name__}")
    return x


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: AdamW under a one-cycle schedule, as :class:`fastunlearn.Retrain` does it.

    Args:
        epochs: passes over the model's own samples.
        lr: peak of the one-cycle learning rate.
        weight_decay: of AdamW.
        batch_size: samples a step; the last step of an epoch takes what is left, see :func:`batch_sizes`.

    Raises ValueError for numbers that can not be.
    """

    epochs: int = 20
    lr: float = 0.01
    weight_decay: float = 0.01
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(f"epochs and batch_size must be 1 or more, got {self.epochs} and {self.batch_size}")
        if not (math.isfinite(self.lr) and self.lr > 0 and math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"lr must be above 0 and weight_decay not below, got {self.lr} and {self.weight_decay}")

    def steps(self, samples: int) -> int:
        """Optimiser steps that one model on so many samples takes."""
        return self.epochs * len(batch_sizes(samples, self.batch_size))


def batch_sizes(samples: int, batch_size: int) -> list[int]:
    """Of one epoch: full batches, then what is left; a single one that is left joins the batch before it, for batch
    norm has no statistics of one sample."""
    full, left = divmod(samples, batch_size)
    sizes = [batch_size] * full + [left] * (left > 0)
    if full and left == 1:
        sizes[-2:] = [batch_size + 1]
    return sizes


@dataclass(frozen=True)
class TrainingReport:
    """Which way several models were trained, and why.

    Attributes:
        mode: ``stacked`` or ``sequential``.
        reason: in words; what ``vmap`` said where the model can not be stacked.
        seconds_per_step: of one step of all models, by way (``stacked``, ``sequential``); empty if nothing was timed.
    """

    mode: str
    reason: str
    seconds_per_step: dict[str, float] = field(default_factory=dict)


class Shuffled:
    """Batches of some of the samples, in a new seeded order each time they are read.

    The order of pass e depends on ``seed`` and e alone. Pass 0 is the one in which :class:`Retrain` counts the steps.
    """

    def __init__(self, samples: Samples, indices: Tensor, batch_size: int, seed: int) -> None:
        self.samples, self.indices, self.batch_size, self.seed = samples, indices, batch_size, seed
        self.passes = 0

    def order(self, epoch: int) -> tuple[Tensor, ...]:
        """The indices of every batch of pass ``epoch``."""
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "order", epoch))
        shuffled = self.indices[torch.randperm(len(self.indices), generator=generator)]
        return torch.split(shuffled, batch_sizes(len(shuffled), self.batch_size))

    def __len__(self) -> int:
        return len(batch_sizes(len(self.indices), self.batch_size))

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        epoch, self.passes = self.passes, self.passes + 1
        for indices in self.order(epoch):
            yield self.samples.batch(indices)


def train_models(
    build: Build,
    recipe: Recipe,
    x: Tensor | Samples,
    y: Tensor | None,
    keep: Tensor,
    seeds: Sequence[int],
    mode: Mode = "auto",
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> tuple[list[nn.Module], TrainingReport]:
    """M models of one shape, each trained on its own subset in its own order.

    Model m is what ``Retrain(epochs, lr, weight_decay, build=build, seed=seeds[m])`` makes of its subset in that order,
    bit for bit when trained one after another and up to rounding when stacked (dropout draws other masks there).
    Subsets of unequal size are exact: models with equally many steps an epoch are stacked together and share a
    schedule, and in the last step of an epoch only models with equally many samples left go through ``vmap`` together.
    Nothing is padded, so batch norm sees what it would see alone.

    Args:
        build: returns a freshly initialised model; all of the same shape. Torch is seeded by each of ``seeds``.
        recipe: how they are trained.
        x: inputs [n, ...], or anything with ``batch(indices) -> (inputs, targets)`` and a length (then ``y`` is None).
        y: targets [n, ...].
        keep: bool [M, n], the samples of each model.
        seeds: M of them, of the initial weights, the order and the dropout.
        mode: ``auto`` times a few steps of both ways on the real shapes and takes the faster.
        device: where they are trained.
        progress: show a progress bar.

    Returns:
        the models in eval mode on ``device``, and how they were trained.

    Raises:
        ValueError: shapes that do not fit, a model without samples; with ``mode="stacked"``, a model that ``vmap`` can
            not do (``auto`` trains it one after another and keeps the reason).
        FloatingPointError: a loss that is no longer finite.

    Cost: ``epochs`` forward and backward passes over each subset. Stacked: the memory of M models and of M batches.
    """
    samples, subsets, seeds = _checked(recipe, as_samples(x, y), keep, seeds, mode)
    device = torch.device(device)
    report = choose_mode(build, recipe, samples, subsets, seeds, mode, device)
    if report.mode == "stacked":
        return _stacked(build, recipe, samples, subsets, seeds, device, progress), report
    pairs = list(zip(subsets, seeds, strict=True))
    return [
        _alone(build, recipe, samples, subset, seed, device) for subset, seed in track(pairs, "models", progress)
    ], report


def _checked(
    recipe: Recipe, samples: Samples, keep: Tensor, seeds: Sequence[int], mode: str
) -> tuple[Samples, list[Tensor], list[int]]:
    if mode not in ("auto", "stacked", "sequential"):
        raise ValueError(f"mode must be 'auto', 'stacked' or 'sequential', got {mode!r}")
    if keep.dtype != torch.bool or keep.shape != (len(seeds), len(samples)) or not len(seeds):
        raise ValueError(
            f"keep must be bool [{len(seeds)} seeds, {len(samples)} samples] of one model or more, "
            f"got {keep.dtype} {list(keep.shape)}"
        )
    subsets = [row.nonzero().flatten() for row in keep.cpu()]
    if empty := [m for m, subset in enumerate(subsets) if not len(subset)]:
        raise ValueError(f"model {empty[0]} has no samples: row {empty[0]} of keep is all False")
    return samples, subsets, [int(seed) for seed in seeds]


def initial_model(build: Build, seed: int, device: torch.device | str = "cpu") -> nn.Module:
    """What ``build`` returns with torch seeded by ``seed``, on ``device``; the caller's random state is put back."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        return build().to(device)


def choose_mode(
    build: Build,
    recipe: Recipe,
    samples: Samples,
    subsets: Sequence[Tensor],
    seeds: Sequence[int],
    mode: Mode,
    device: torch.device,
) -> TrainingReport:
    """Time a few steps of both ways on throw-away models and take the faster.

    With ``mode="stacked"`` one step of each is taken, to see that the model can do it. Errors of the model or the data
    are raised from the way in which models are trained one after another.
    """
    if mode == "sequential":
        return TrainingReport("sequential", "asked for")
    members = max(_cohorts(recipe, subsets), key=len)
    steps = TIMED_STEPS if mode == "auto" else 0
    alone = _time_alone(build, recipe, samples, subsets[members[0]], seeds[members[0]], device, steps)
    seconds = {"sequential": alone * len(subsets)}
    try:
        together = _time_stack(
            build, recipe, samples, [subsets[m] for m in members], [seeds[m] for m in members], device, steps
        )
    except (RuntimeError, ValueError, TypeError) as error:  # the same steps have just worked one model at a time
        reason = f"vmap can not do this model: {type(error).__name__}: {str(error).splitlines()[0].split('. ')[0]}"
        if mode == "stacked":
            raise ValueError(f"{reason}; train with mode='auto' or 'sequential'") from error
        return TrainingReport("sequential", reason, seconds)
    if mode == "stacked":
        return TrainingReport("stacked", "asked for")
    seconds["stacked"] = together * len(subsets) / len(members)
    faster = min(seconds, key=lambda way: seconds[way])
    ratio = max(seconds.values()) / min(seconds.values())
    return TrainingReport(faster, f"{ratio:.2f} times as fast in a few timed steps", seconds)


def _cohorts(recipe: Recipe, subsets: Sequence[Tensor]) -> list[list[int]]:
    """Models with equally many steps an epoch, those with equally large subsets side by side."""
    cohorts: dict[int, list[int]] = {}
    for m in sorted(range(len(subsets)), key=lambda m: len(subsets[m])):
        cohorts.setdefault(recipe.steps(len(subsets[m])), []).append(m)
    return list(cohorts.values())


def _alone(
    build: Build, recipe: Recipe, samples: Samples, subset: Tensor, seed: int, device: torch.device
) -> nn.Module:
    model = initial_model(build, seed, device).train()
    retrain = Retrain(recipe.epochs, recipe.lr, recipe.weight_decay, build, seed=seed)
    retrain.unlearn(model, None, Shuffled(samples, subset, recipe.batch_size, seed))
    return model.eval()


def _stacked(
    build: Build,
    recipe: Recipe,
    samples: Samples,
    subsets: Sequence[Tensor],
    seeds: Sequence[int],
    device: torch.device,
    progress: bool,
) -> list[nn.Module]:
    trained: dict[int, nn.Module] = {}
    for members in _cohorts(recipe, subsets):
        stack = _Stack.of(
            [initial_model(build, seeds[m], device).train() for m in members], recipe, len(subsets[members[0]])
        )
        orders = [Shuffled(samples, subsets[m], recipe.batch_size, seeds[m]) for m in members]
        with preserved(stack.models[0]):
            torch.manual_seed(derived_seed("stack", [seeds[m] for m in members]))
            for epoch in track(range(1, recipe.epochs + 1), f"epochs of {len(members)} models", progress):
                for batches in zip(*(order.order(epoch) for order in orders), strict=True):
                    stack.step(samples, batches)
        trained |= zip(members, stack.unstacked(), strict=True)
    return [trained[m].eval() for m in range(len(subsets))]


@dataclass(frozen=True)
class _Stack:
    """Models that take their steps together. The first one lends its code; its own weights are not used meanwhile."""

    models: list[nn.Module]
    parameters: dict[str, Tensor]  # [M, ...] each
    buffers: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    losses: Callable[..., Tensor]

    @classmethod
    def of(cls, models: list[nn.Module], recipe: Recipe, samples: int) -> _Stack:
        parameters, buffers = stack_module_state(models)
        optimizer = torch.optim.AdamW(
            [p for p in parameters.values() if p.requires_grad],
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            fused=all(p.device.type in ("cpu", "cuda") for p in parameters.values()),
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=recipe.lr, total_steps=recipe.steps(samples))

        def loss(weights: Any, state: Any, args: Any, kwargs: Any, targets: Any) -> Tensor:
            outputs = functional_call(models[0], (weights, state), args, kwargs)
            outputs = getattr(outputs, "logits", outputs)
            return per_sample_loss(None, outputs, targets, len(targets)).mean()

        return cls(models, parameters, buffers, optimizer, schedule, vmap(loss, randomness="different"))

    def step(self, samples: Samples, batches: Sequence[Tensor]) -> None:
        """One step of every model, each on the samples of its own batch."""
        names = [name for name, p in self.parameters.items() if p.requires_grad]
        runs = _runs([len(indices) for indices in batches])
        grads = [self._gradients(samples, batches[first:last], slice(first, last), names) for first, last in runs]
        for name, *parts in zip(names, *grads, strict=True):
            found = [part for part in parts if part is not None]
            p = self.parameters[name]
            # torch's fused AdamW for CPUs walks a gradient in the order of its parameter, whatever the strides say;
            # vmap hands out transposed ones for linear layers.
            p.grad = torch.empty_like(p).copy_(torch.cat(found)) if found else None
        self.optimizer.step()
        torch.clear_autocast_cache()
        self.schedule.step()

    def _gradients(
        self, samples: Samples, batches: Sequence[Tensor], which: slice, names: Sequence[str]
    ) -> Sequence[Tensor | None]:
        everyone = len(batches) == len(self.models)
        # A slice of a leaf would have its gradient padded to all models; a leaf of its own shares the memory.
        weights = {
            name: p if everyone else p.detach()[which].requires_grad_(p.requires_grad)
            for name, p in self.parameters.items()
        }
        state = {name: b[which] for name, b in self.buffers.items()}
        batch = _stacked_batch(samples, batches, next(iter(weights.values())).device)
        losses = self.losses(weights, state, batch.args, batch.kwargs, batch.targets)
        if not bool(torch.isfinite(losses).all()):
            worst = int((~torch.isfinite(losses)).nonzero()[0])
            raise FloatingPointError(
                f"one of {len(self.models)} stacked models has the loss {losses[worst].item()}; lower the learning rate"
            )
        return torch.autograd.grad(losses.sum(), [weights[name] for name in names], allow_unused=True)

    def unstacked(self) -> list[nn.Module]:
        with torch.no_grad():
            for m, model in enumerate(self.models):
                for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                    source = self.parameters.get(name, self.buffers.get(name))
                    assert source is not None  # the stack was made of these very names
                    tensor.copy_(source[m])
        return self.models


def _runs(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbours of equal size, as half-open ranges."""
    cuts = [0, *(i for i in range(1, len(sizes)) if sizes[i] != sizes[i - 1]), len(sizes)]
    return list(pairwise(cuts))


def _stacked_batch(samples: Samples, batches: Sequence[Tensor], device: torch.device) -> Batch:
    """Equally large batches of several models as one, [M, B, ...] each, read in one go."""
    flat = next(read([samples.batch(torch.cat(list(batches)))], "data", device))
    shape = (len(batches), len(batches[0]))
    args, kwargs, targets = tree_map_only(
        Tensor, lambda t: t.unflatten(0, shape), (flat.args, flat.kwargs, flat.targets)
    )
    return Batch(args, kwargs, targets, flat.size)


def _time_alone(
    build: Build, recipe: Recipe, samples: Samples, subset: Tensor, seed: int, device: torch.device, steps: int
) -> float:
    model = initial_model(build, seed, device).train()
    order = Shuffled(samples, subset, recipe.batch_size, seed).order(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=recipe.lr, total_steps=_most_steps())

    def step(k: int) -> None:
        descend(model, [samples.batch(order[k % max(1, len(order) - 1)])], "data", optimizer, 1, scheduler=schedule)

    with preserved(model):
        return _seconds_per_step(step, steps, device)


def _time_stack(
    build: Build,
    recipe: Recipe,
    samples: Samples,
    subsets: Sequence[Tensor],
    seeds: Sequence[int],
    device: torch.device,
    steps: int,
) -> float:
    models = [initial_model(build, seed, device).train() for seed in seeds]
    stack = _Stack.of(models, Recipe(_most_steps(), recipe.lr, recipe.weight_decay, recipe.batch_size), 1)
    orders = [Shuffled(samples, s, recipe.batch_size, seed).order(0) for s, seed in zip(subsets, seeds, strict=True)]
    full = max(1, len(orders[0]) - 1)  # the last batch of an epoch is smaller
    with preserved(models[0]):
        return _seconds_per_step(lambda k: stack.step(samples, [order[k % full] for order in orders]), steps, device)


def _most_steps() -> int:
    return WARM_UP_STEPS + TIMED_STEPS + 1


def _seconds_per_step(step: Callable[[int], None], steps: int, device: torch.device) -> float:
    """Median of a few steps, one model's or a stack's; for ``steps = 0`` one is taken and not timed."""
    times: list[float] = []
    for k in range(WARM_UP_STEPS + steps if steps else 1):
        _wait_for(device)
        start = time.perf_counter()
        step(k)
        _wait_for(device)
        if k >= WARM_UP_STEPS:
            times.append(time.perf_counter() - start)
        if len(times) >= 3 and sum(times) > TIMED_SECONDS:
            break
    return sorted(times)[len(times) // 2] if times else 0.0


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
