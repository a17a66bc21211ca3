"""What a run will read, how long and how much memory it will take, said before it begins."""

from __future__ import annotations

import resource
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from fastunlearn.activations import layers_with_units
from fastunlearn.data import Batch, read
from fastunlearn.fisher import fisher_plan
from fastunlearn.hooks import preserved
from fastunlearn.jobs.methods import Method, make_method
from fastunlearn.jobs.task import Task
from fastunlearn.methods.class_forgetting import ClassForgetting
from fastunlearn.methods.dampening import SelectiveSynapticDampening
from fastunlearn.methods.deepclean import DeepClean
from fastunlearn.methods.lcodec import LCodec

TIMED = 0.3  # seconds at least that a rate is measured over


@dataclass(frozen=True)
class Step:
    """One part of a run.

    Attributes:
        forward, backward: samples that go through the model, and through its gradient.
        seconds: at the rates that were measured on the first batch; None where nothing says.
        memory: bytes beyond the model and a pass through it.
    """

    name: str
    what: str
    forward: int
    backward: int
    seconds: float | None
    memory: int


@dataclass(frozen=True)
class JobPlan:
    """``print`` shows the tables.

    Attributes:
        samples: per set.
        steps: in the order they run.
        layers: what is done to each layer or parameter, and how.
        peak_memory: bytes at most, of the device; on a CPU of this process.
        rates: samples per second of a forward pass and of a forward and backward pass.
    """

    samples: dict[str, int]
    steps: list[Step]
    layers: dict[str, str]
    peak_memory: int
    rates: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Of all steps that have an estimate."""
        return sum(step.seconds or 0.0 for step in self.steps)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "seconds": self.seconds}

    def __str__(self) -> str:
        width = max(len(step.name) for step in self.steps)
        lines = ["samples: " + ", ".join(f"{count:,} {name}" for name, count in self.samples.items())]
        lines.append(f"{'step':{width}}  {'forward':>11}  {'backward':>11}  {'seconds':>9}  {'MB':>8}  what")
        for s in self.steps:
            seconds = "unknown" if s.seconds is None else f"{s.seconds:.1f}"
            lines.append(
                f"{s.name:{width}}  {s.forward:11,}  {s.backward:11,}  {seconds:>9}  {s.memory / 1e6:8.1f}  {s.what}"
            )
        lines.append(f"about {self.seconds:.1f} s in all, {self.peak_memory / 1e6:,.0f} MB at the peak")
        width = max(map(len, self.layers), default=0)
        lines += [f"{name:{width}}  {how}" for name, how in self.layers.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Rates:
    """Seconds per sample, and bytes that a pass over one batch holds."""

    forward: float
    backward: float
    activations: int

    def seconds(self, forward: float, backward: float) -> float:
        return forward * self.forward + backward * self.backward


def plan(task: Task) -> JobPlan:
    """Estimate ``unlearn`` for this task: passes, seconds, memory, layers. Nothing is changed or written.

    Seconds are samples times the time per sample of the first batch; what is solved rather than passed through
    (class forgetting's layers) is counted in FLOPs, and for L-CODEC one removal is run on a copy of the model. Raises
    what the method would raise on its first batch. Cost: a few batches, and that removal.
    """
    config = task.config
    config.require("method")
    assert config.method is not None
    rates = _measure(task)
    method = make_method(config.method, config.settings, config.seed, task.fresh)
    weights = sum(p.numel() * p.element_size() for p in task.model.parameters())
    steps = [_method_step(task, config.method, method, rates, weights)]
    if config.reference == "retrain":
        passes = task.recipe.epochs * len(task.retain)
        steps.append(Step("retrain", f"{task.recipe.epochs} epochs without the forgotten samples", passes, passes,
                          rates.seconds(0, passes), 5 * weights))  # fmt: skip
    steps += _measuring_steps(task, rates, weights)
    peak = _in_use(task.device) + max(step.memory for step in steps) + rates.activations
    samples = {name: len(part) for name, part in task.sets.items()}
    return JobPlan(samples, steps, _layers(task, config.method, method), peak,
                   {"forward": 1 / rates.forward, "backward": 1 / rates.backward})  # fmt: skip


def _measure(task: Task) -> _Rates:
    """Of the first retained batch: a forward pass, one with gradients, and the bytes that it keeps for them."""
    batch = next(read(task.retain.loader(task.config.batch_size), "retain", task.device))
    kept = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    with preserved(task.model):
        task.model.eval()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            _backward(task.model, batch)
        forward = _seconds(lambda: _forward(task.model, batch), task.device)
        backward = _seconds(lambda: _backward(task.model, batch), task.device)
    return _Rates(forward / batch.size, backward / batch.size, kept)


def _forward(model: nn.Module, batch: Batch) -> None:
    with torch.no_grad():
        batch.outputs(model)


def _backward(model: nn.Module, batch: Batch) -> None:
    with torch.enable_grad():
        loss = batch.outputs(model).float().logsumexp(1).sum()
        torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """The fastest of at least three runs."""
    found: list[float] = []
    while len(found) < 3 or sum(found) < TIMED:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return min(found)


def _method_step(task: Task, name: str, method: Method, rates: _Rates, weights: int) -> Step:
    forget, retain, _ = task.batches(name, task.config.seed)
    n, m = len(forget.indices), len(retain.indices)
    if isinstance(method, (DeepClean, SelectiveSynapticDampening)):
        read_of_retain = m if method.fisher_samples is None else min(m, method.fisher_samples)
        epochs = method.finetune_epochs if isinstance(method, DeepClean) else 0
        labels = len(task.classes) if method.fisher == "exact" else 1
        fisher, tuned = n + read_of_retain, epochs * m
        what = f"Fisher diagonal of {n:,} + {read_of_retain:,} samples" + (
            f", {epochs} epochs over retain" * bool(epochs)
        )
        return Step(name, what, fisher + tuned, fisher * labels + tuned,
                    rates.seconds(0, fisher * labels + tuned), 4 * weights)  # fmt: skip
    if isinstance(method, ClassForgetting):
        found = method.plan(task.model, forget, retain)
        # Per layer: two Gram matrices, two filters and the update, each a few d x d x d products.
        work = sum(layer.groups * layer.dim**2 * (2 * min(layer.rows or (n + m), n + m) + 8 * layer.dim) * 2
                   for layer in found.layers)  # fmt: skip
        seconds = rates.seconds(n + m, 0) + work / _float64_rate(task.device)
        return Step(
            name, f"inputs of every layer over {n:,} + {m:,} samples, one update", n + m, 0, seconds, found.total
        )
    if isinstance(method, LCodec):
        removals = 1 if method.group else n
        one = _removal(task, method, n if method.group else 1)
        what = f"{removals:,} removals of {method.perturbations:,} perturbed copies each"
        forward = n * method.perturbations if method.select == "foci" else 0
        return Step(name, what, forward, removals * min(method.hessian_samples, n + m),
                    None if one is None else one * removals, 2 * weights)  # fmt: skip
    epochs = getattr(method, "epochs", 1)
    passes = epochs * (n if name == "gradient-ascent" else m)
    return Step(name, f"{epochs} epochs", passes, passes, rates.seconds(0, passes), 5 * weights)


def _removal(task: Task, method: LCodec, samples: int) -> float:
    """Seconds of removing the first so many of the forgotten samples at once, from a copy of the model."""
    few = replace(task.forget, indices=task.forget.indices[:samples])
    _, retain, _ = task.batches("lcodec", task.config.seed)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run itself warns
        replace(method, budget=None).unlearn(task.copy(), few.loader(task.config.batch_size), retain)
    return time.perf_counter() - start


def _float64_rate(device: torch.device) -> float:
    """FLOP/s of a float64 product."""
    a = torch.ones(512, 512, dtype=torch.float64, device=device)
    return 2 * 512**3 / _seconds(lambda: torch.mm(a, a), device)


def _measuring_steps(task: Task, rates: _Rates, weights: int) -> list[Step]:
    models = 2 if task.config.reference is None else 3
    measured = sum(len(part) for part in task.sets.values())
    # Accuracy and divergences beside the reference, and what the attacks look at.
    passes = models * 3 * measured
    steps = [Step("measure", f"{models} models on {measured:,} samples", passes, 0, rates.seconds(passes, 0), weights)]
    if task.config.relearn:
        most = models * task.config.relearn * task.config.batch_size
        steps.append(Step("relearn", f"at most {task.config.relearn} steps for each model", most, most,
                          rates.seconds(0, most), 4 * weights))  # fmt: skip
    if task.config.shadows:
        passes = task.config.shadows * task.recipe.epochs * (len(task.forget) + len(task.retain)) // 2
        what = f"{task.config.shadows} models on half of the data each, less those in the cache"
        steps.append(Step("shadows", what, passes, passes, rates.seconds(0, passes), 5 * weights))
    return steps


def _layers(task: Task, name: str, method: Method) -> dict[str, str]:
    forget, retain, _ = task.batches(name, task.config.seed)
    if isinstance(method, (DeepClean, SelectiveSynapticDampening)):
        return fisher_plan(task.model, retain, method.loss_fn)
    if isinstance(method, ClassForgetting):
        found = method.plan(task.model, forget, retain)
        ways = {layer.name: f"{layer.groups} x {layer.dim} inputs, {layer.solver}: {layer.reason}"
                for layer in found.layers}  # fmt: skip
        return ways | {layer: f"left alone: {reason}" for layer, reason in found.untouched.items()}
    if isinstance(method, LCodec):
        return {layer: f"units may be chosen, {type(module).__name__}"
                for layer, module in layers_with_units(task.model).items()}  # fmt: skip
    return {n: "trained" for n, p in task.model.named_parameters() if p.requires_grad}


def _in_use(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
