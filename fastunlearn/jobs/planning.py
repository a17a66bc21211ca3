"""What a run will read, how long and how much memory it will take, said before it begins."""

from __future__ import annotations

import resource
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch

from fastunlearn.activations import layers_with_units
from fastunlearn.data import Batch, per_sample_loss, read
from fastunlearn.evaluate.signals import signals_of
from fastunlearn.fisher import fisher_diagonal, fisher_plan
from fastunlearn.inputs import Loader
from fastunlearn.jobs import language
from fastunlearn.jobs.measuring import LEAKS_SHOWN, PROBED, attacks
from fastunlearn.jobs.methods import Method, make_method
from fastunlearn.jobs.task import FORGOTTEN_TEST, Task
from fastunlearn.language import loss_for
from fastunlearn.methods.class_forgetting import ClassForgetting
from fastunlearn.methods.dampening import SelectiveSynapticDampening
from fastunlearn.methods.deepclean import DeepClean
from fastunlearn.methods.lcodec import LCodec

TIMED = 0.3  # seconds at least that a rate is measured over
TIMED_BATCHES = 3  # at least; the first one, which is slower, is not counted
ATTACKED = 2000  # samples of a set that the support-vector attack takes at most


@dataclass(frozen=True)
class Step:
    """One part of a run.

    Attributes:
        forward, backward: samples that go through the model, and through its gradient, each as often as it does; but
            for the one or two that a method tries a layer with, and the products with a Hessian.
        seconds: at the rates that were measured on the first batches; None where nothing says.
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
        peak_memory: bytes at most, of the device; on a CPU of this process, but for some 100 MB of libraries that the
            report and the record load.
        rates: samples per second, reading included, of a forward pass and of a step of training.
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
    """Seconds per sample, reading included, of a forward pass, of a step of training, and of one of retraining by the
    recipe; bytes that a batch of training holds."""

    forward: float
    training: float
    retraining: float
    activations: int

    def seconds(self, forward: float, trained: float) -> float:
        return forward * self.forward + trained * self.training


def plan(task: Task) -> JobPlan:
    """Estimate ``unlearn`` for this task: passes, seconds, memory, layers. Nothing is changed or written.

    Seconds are samples times the time per sample of the first batches, measured on a copy of the model. What is solved
    rather than passed through is done once: class forgetting's updates from the first batches, one removal of L-CODEC,
    the attacks on made-up logits. Raises what the method would raise on its first batch. Cost: a few batches and this.
    """
    config = task.config
    config.require("method")
    assert config.method is not None
    held = _in_use(task.device)
    rates = _measure(task)
    method = make_method(config.method, config.settings, config.seed, task.fresh)
    weights = sum(p.numel() * p.element_size() for p in task.model.parameters())
    steps = [_method_step(task, config.method, method, rates, weights)]
    if config.reference == "retrain":
        passes = task.recipe.epochs * len(task.retain)
        steps.append(Step("retrain", f"{task.recipe.epochs} epochs without the forgotten samples", passes, passes,
                          rates.retraining * passes, 5 * weights))  # fmt: skip
    steps += _measuring_steps(task, rates, weights)
    # What was tried above has held what it holds in the run, the libraries that the attacks load included.
    peak = max(_in_use(task.device), held + max(step.memory for step in steps) + rates.activations)
    samples = {name: len(part) for name, part in task.sets.items()}
    return JobPlan(samples, steps, _layers(task, config.method, method), peak,
                   {"forward": 1 / rates.forward, "training": 1 / rates.training})  # fmt: skip


def _measure(task: Task) -> _Rates:
    """Of the first retained batches, on a copy of the model."""
    loader = task.retain.loader(task.config.batch_size)
    model = task.copy().eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    kept, loss_fn = 0, loss_for(model, None)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    def forward(batch: Batch) -> None:
        with torch.no_grad():
            batch.outputs(model)

    def step(optimizer: torch.optim.Optimizer, batch: Batch) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = per_sample_loss(loss_fn, batch.outputs(model), batch.targets, batch.size).mean()
        torch.autograd.backward(loss)
        optimizer.step()

    with torch.enable_grad():
        train = partial(step, torch.optim.SGD(trained, lr=0.0, momentum=0.9))
        retrain = partial(step, torch.optim.AdamW(trained, lr=0.0))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            train(next(read(loader, "retain", task.device)))
        own = task.retain.loader(task.recipe.batch_size)
        return _Rates(
            _pace(loader, forward, task.device), _pace(loader, train, task.device), _pace(own, retrain, task.device),
            kept,
        )  # fmt: skip


def _pace(loader: Loader, run: Callable[[Batch], object], device: torch.device) -> float:
    """Seconds per sample of reading batches and running them, over and over; the mean, as a run meets the machine."""
    samples, batches, start = 0, 0, 0.0
    while True:
        for batch in read(loader, "retain", device):
            run(batch)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            now = time.perf_counter()
            if not batches:
                start = now
            else:
                samples += batch.size
            batches += 1
            if batches > TIMED_BATCHES and now - start >= TIMED:
                return (now - start) / samples


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """The mean of at least three runs after one that is not counted."""
    found: list[float] = []
    run()
    while len(found) < 3 or sum(found) < TIMED:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return sum(found) / len(found)


def _method_step(task: Task, name: str, method: Method, rates: _Rates, weights: int) -> Step:
    forget, retain, _ = task.batches(name, task.config.seed)
    n, m = len(forget.indices), len(retain.indices)
    if isinstance(method, (DeepClean, SelectiveSynapticDampening)):
        size = task.config.batch_size
        whole = m if method.fisher_samples is None else -(-method.fisher_samples // size) * size
        epochs = method.finetune_epochs if isinstance(method, DeepClean) else 0
        labels = _labels(task) if method.fisher == "exact" else 1
        fisher, tuned = n + min(m, whole), epochs * m
        what = f"Fisher diagonal of {n:,} + {min(m, whole):,} samples" + (
            f", {epochs} epochs over retain" * bool(epochs)
        )
        batch = [next(iter(retain))]
        one = _seconds(lambda: fisher_diagonal(task.model, batch, method.loss_fn, method.fisher), task.device)
        seconds = one / min(size, m) * fisher + rates.seconds(0, tuned)
        return Step(name, what, fisher + tuned, fisher * labels + tuned, seconds, 4 * weights)
    if isinstance(method, ClassForgetting):
        found = method.plan(task.model, forget, retain)
        first = [next(iter(forget))], [next(iter(retain))]
        size = min(task.config.batch_size, n) + min(task.config.batch_size, m)
        for _ in range(2):  # what a first call costs is not its pace
            tried = method.unlearn(task.copy(), *first).seconds
        seconds = tried["gather"] * (n + m) / size + tried["solve"] + tried["write"]
        return Step(
            name, f"inputs of every layer over {n:,} + {m:,} samples, one update", n + m, 0, seconds, found.total
        )
    if isinstance(method, LCodec):
        removals = 1 if method.group else n
        together = n if method.group else 1
        one = _removal(task, method, together)
        what = f"{removals:,} removals, Hessians of {method.hessian_samples:,} samples"
        copies = n * method.perturbations if method.select == "foci" else 0
        if copies:
            what += f", {method.perturbations:,} perturbed copies of each sample"
        others = together if method.update == "single_sample" else min(method.hessian_samples, n + m - together)
        # The gradient before and after each removal, and the samples of its Hessian.
        passes = 2 * n + removals * others
        return Step(name, what, copies + passes, passes, one * removals, 2 * weights)
    epochs = getattr(method, "epochs", 1)
    passes = epochs * (n if name == "gradient-ascent" else m)
    return Step(name, f"{epochs} epochs", passes, passes, rates.seconds(0, passes), 5 * weights)


def _labels(task: Task) -> int:
    """Backward passes of an exact Fisher diagonal: one for each class, of texts for each token at each position."""
    if not task.language:
        return len(task.classes)
    with torch.no_grad():
        _, positions, tokens = next(read(task.retain.loader(1), "retain", task.device)).outputs(task.model).shape
    return int(positions - 1) * int(tokens)


def _removal(task: Task, method: LCodec, samples: int) -> float:
    """Seconds of removing the first so many of the forgotten samples at once, from a copy of the model."""
    few = replace(task.forget, indices=task.forget.indices[:samples])
    _, retain, _ = task.batches("lcodec", task.config.seed)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run itself warns
        replace(method, budget=None).unlearn(task.copy(), few.loader(task.config.batch_size), retain)
    return time.perf_counter() - start


def _measuring_steps(task: Task, rates: _Rates, weights: int) -> list[Step]:
    models = 2 if task.config.reference is None else 3
    n = len(task.forget)
    measured = sum(len(part) for part in task.sets.values())
    passes = n + (models + (models > 2)) * measured if task.language else _looks(task, models)
    passes += _looks_at_leaks(task, models)
    steps = [Step("measure", f"{models} models on {measured:,} samples", passes, 0, rates.seconds(passes, 0), weights)]
    if task.language:
        steps += _language_steps(task, models, weights)
    elif task.test is not None:
        what = f"membership attacks on {models} models, {task.config.bootstrap:,} resamples each"
        steps.append(Step("attacks", what, 0, 0, models * _attacks_once(task), 0))
    if most := task.config.relearn:
        trained, tried = models * most * min(task.config.batch_size, n), models * (most + 1) * n
        steps.append(Step("relearn", f"at most {most} steps for each model", trained + tried, trained,
                          rates.seconds(tried, trained), 4 * weights))  # fmt: skip
    if task.config.shadows:
        passes = task.config.shadows * task.recipe.epochs * (n + len(task.retain)) // 2
        what = f"{task.config.shadows} models on half of the data each, less those in the cache"
        steps.append(Step("shadows", what, passes, passes, rates.retraining * passes, 5 * weights))
    return steps


def _language_steps(task: Task, models: int, weights: int) -> list[Step]:
    """What is measured of language models alone: continuations, questions, Min-K%."""
    tried = language.trial(task)
    count = sum(tried.continued.values())
    steps = [
        Step("continue", f"{models} models on {count:,} texts, at most {tried.tokens:,} tokens of each, greedily",
             models * count * tried.tokens, 0, models * count * tried.continuation, weights)
    ]  # fmt: skip
    if tried.questions:
        what = f"{tried.questions:,} questions, a pass for each of their {tried.choices:,} choices"
        seconds = models * tried.questions * tried.question
        steps.append(Step("questions", what, models * tried.choices, 0, seconds, weights))
    what = f"intervals of {models} models, {task.config.bootstrap:,} resamples each"
    if task.test is not None:
        what = f"membership attacks and {what}"
    return [*steps, Step("attacks", what, 0, 0, models * tried.statistics, 0)]


def _looks(task: Task, models: int) -> int:
    """Forward passes, in samples, of measuring so many models but for relearning."""
    n = len(task.forget)
    each = sum(len(part) for part in task.sets.values())  # what metrics and attacks are computed from
    once = n  # what is to be relearnt
    if task.config.reference is not None:
        once += each
        each += 2 * n  # activations, beside the reference's
    if task.test is not None and task.config.probes and task.whole_classes:
        half = PROBED // 2
        each += min(n, half) + min(len(task.measured), half) + min(len(task.test), PROBED)
    return once + models * each


def _looks_at_leaks(task: Task, models: int) -> int:
    """Forward passes, in samples, of the leak reports: nearest retained samples, and their signals; at most."""
    if task.test is None or task.language:
        return 0
    n = min(len(task.forget), LEAKS_SHOWN)
    beside = min(len(task.measured), 5 * n, LEAKS_SHOWN)
    return n + len(task.measured) + models * (len(task.test) + n + beside)


def _attacks_once(task: Task) -> float:
    """Seconds of the attacks on one model, on made-up logits of as many samples."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, part in task.sets.items():
        count = len(part) if name in ("forget", FORGOTTEN_TEST) else min(len(part), ATTACKED)
        targets = part.labels[:count]
        logits = torch.randn(count, max(2, len(task.classes)), generator=generator)
        logits[torch.arange(count), targets] += 6  # most of them known, as a trained model does
        made[name] = signals_of(logits, targets)
    start = time.perf_counter()
    attacks(task, made, 0)
    return time.perf_counter() - start


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
