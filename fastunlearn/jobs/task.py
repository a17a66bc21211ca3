"""A configuration opened: the model with its weights, what to forget and what to keep; checked, nothing changed."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastunlearn.checkpoint import digest, load_into, load_weights
from fastunlearn.data import read
from fastunlearn.draws import derived_seed
from fastunlearn.evaluate.stacked import Recipe, initial_model
from fastunlearn.files import sha256_of_file
from fastunlearn.hooks import preserved
from fastunlearn.inputs import DataOptions, Loader, Samples, build_model, open_samples, select, tokenizer_of
from fastunlearn.inputs.places import blaming
from fastunlearn.jobs.config import Config, ConfigError, flag_of, pick
from fastunlearn.jobs.methods import METHODS, TAKES_VALIDATION, entry

FORGOTTEN_TEST = "test of forgotten"  # test samples of the classes that are forgotten


@dataclass(frozen=True)
class Part:
    """Some samples of a source: the forgotten, the retained, the test ones.

    Attributes:
        indices: int64 [n], positions in ``samples``.
    """

    name: str
    samples: Samples
    indices: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def labels(self) -> Tensor:
        """int64 [n]."""
        return self.samples.labels[self.indices]

    @property
    def ids(self) -> list[str]:
        return [self.samples.ids[i] for i in self.indices.tolist()]

    def loader(self, batch_size: int, shuffle: bool = False, seed: int = 0) -> Loader:
        return Loader(self.samples, self.indices, batch_size, shuffle=shuffle, seed=seed)

    def at_most(self, count: int | None, seed: int) -> Part:
        """A seeded draw of ``count`` samples in the order of the data; all where there are no more."""
        if count is None or count >= len(self):
            return self
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count]
        return replace(self, indices=self.indices[chosen.sort().values])

    def evenly(self, count: int | None, seed: int) -> Part:
        """A seeded draw of ``count`` samples, the same number of every class as far as there are so many."""
        if count is None or count >= len(self):
            return self
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self), generator=generator)
        labels = self.labels[order]
        rank = torch.empty_like(labels)  # of a sample among those of its class, in the drawn order
        for label in torch.unique(labels):
            mine = labels == label
            rank[mine] = torch.arange(int(mine.sum()))
        chosen = order[rank.argsort(stable=True)[:count]]
        return replace(self, indices=self.indices[chosen.sort().values])


@dataclass(frozen=True)
class Task:
    """What a run works on.

    Attributes:
        model: with the weights, in eval mode, on the device.
        weights: the file they came from; None for a model that brings its own.
        forget, retain: disjoint where they come from the same data.
        measured: what is measured of ``retain``.
        reference: weights of a model that never saw the forgotten data, if a file was given.
        classes: names of the outputs, as far as the data names them.
    """

    config: Config
    device: torch.device
    model: nn.Module
    weights: Path | None
    forget: Part
    retain: Part
    measured: Part
    test: Part | None
    validation: Part | None
    reference: dict[str, Tensor] | None
    recipe: Recipe
    classes: list[str]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the original weights."""
        return digest(self.model.state_dict())

    @property
    def sets(self) -> dict[str, Part]:
        """Those that are measured, by name.

        Where whole classes are forgotten, the test samples of these classes are a set of their own: what a model that
        never saw a class gets wrong there is no loss.
        """
        found = {"forget": self.forget, "retain": self.measured}
        if self.test is None:
            return found
        of_forgotten = torch.isin(self.test.labels, torch.tensor(self.whole_classes, dtype=torch.int64))
        if bool(of_forgotten.all()) or not bool(of_forgotten.any()):
            return found | {"test": self.test}
        kept, gone = (replace(self.test, indices=self.test.indices[m]) for m in (~of_forgotten, of_forgotten))
        return found | {"test": kept, FORGOTTEN_TEST: gone}

    @property
    def whole_classes(self) -> list[int]:
        """The forgotten classes, if every one of them is forgotten whole; empty where any is also retained."""
        forgotten, kept = set(self.forget.labels.tolist()), set(self.retain.labels.tolist())
        return [] if forgotten & kept else sorted(forgotten)

    def everything(self) -> Part:
        """What the original was trained on: both, where they come from the same data.

        Raises ValueError where they do not: there is no order of the whole then.
        """
        if self.forget.samples is not self.retain.samples:
            raise ValueError("without --data the original can not be trained; give --weights")
        both = torch.cat([self.forget.indices, self.retain.indices]).sort().values
        return Part("data", self.forget.samples, both)

    def fresh(self) -> nn.Module:
        """A newly made model, with weights of its own, on the device."""
        return make_model(self.config, len(self.classes), fresh=True).to(self.device)

    def require_trained(self) -> None:
        """Raise ConfigError where the model's weights are newly drawn ones, which know nothing to unlearn."""
        build = partial(make_model, self.config, len(self.classes))
        if self.weights is None and digest(self._drawn(build)) != self.digest:
            raise ConfigError(
                f"weights is missing: the model of --model {self.config.model} has new random weights each time; "
                "give --weights"
            )

    def require_fresh(self) -> None:
        """Raise ValueError where a newly made model has the original's weights: training it is no retraining."""
        state = self._drawn(self.fresh)
        drawn = any(bool((value != value.flatten()[0]).any()) for value in state.values() if value.numel())
        if drawn and digest(state) == self.digest:
            raise ValueError(
                f"--model {self.config.model} makes a model that has the original's weights from the start, so it can "
                "not be retrained without the forgotten samples; let it make new ones, and give those with --weights"
            )

    def _drawn(self, build: Callable[[], nn.Module]) -> dict[str, Tensor]:
        """The weights of a newly made model, drawn with another seed than :func:`open_task` did."""
        return initial_model(build, derived_seed(self.config.seed, "drawn")).state_dict()

    def copy(self) -> nn.Module:
        """The model, to be changed."""
        return copy.deepcopy(self.model)

    def batches(self, method: str, seed: int) -> tuple[Loader, Loader, Loader | None]:
        """Forget, retain and validation batches as the method reads them; None for those that it does not take."""
        kind, size = entry(method), self.config.batch_size
        count = self.config.method_samples or kind.samples
        forget, retain = self.forget.evenly(count, seed), self.retain.evenly(count, seed)
        held = self.validation.loader(size) if self.validation is not None and method in TAKES_VALIDATION else None
        return forget.loader(size), retain.loader(size, shuffle=kind.shuffled, seed=seed), held

    def identity(self) -> dict[str, Any]:
        """What decides the results, for comparing an interrupted run with the one that goes on with it."""
        sources = {name: part.samples.digest() for name, part in self._parts().items()}
        chosen = {name: _hash(part.indices) for name, part in self._parts().items()}
        reference = None if self.reference is None else digest(self.reference)
        config = {k: v for k, v in self.config.as_dict().items() if k not in ("out", "log", "cache")}
        file = Path(self.config.model.rpartition(":")[0])
        code = file.read_bytes() if file.suffix == ".py" else b""
        model = hashlib.sha256(repr(self.model).encode() + code).hexdigest()
        return {**config, "model digest": model, "weights digest": self.digest, "data digests": sources,
                "samples": chosen, "reference digest": reference}  # fmt: skip

    def _parts(self) -> dict[str, Part]:
        held = {} if self.validation is None else {"validation": self.validation}
        return {"forget": self.forget, "retain": self.retain, **held} | (
            {} if self.test is None else {"test": self.test}
        )


def open_task(config: Config) -> Task:
    """Open and check everything that ``config`` names.

    Raises ValueError, TypeError, OSError or ImportError in one line that names the flag, the file or the key; nothing
    has been written or changed then. Cost: the data are read, and one batch is run through the model.
    """
    config.require("forget")
    device = device_named(config.device)
    options = _options(config)
    tokenizer = tokenizer_of(config.model)

    names: list[str] | None = None  # of the classes, from the first source that has any: a class is a number once

    def opened(name: str, spec: str) -> Samples:
        with naming(flag_of(name)):
            return open_samples(spec, options=options, tokenizer=tokenizer, classes=names)

    forget, retain = _forget_and_retain(config, opened)
    names = forget.samples.classes or retain.samples.classes
    test = None if config.test is None else _whole("test", opened("test", config.test))
    names = names or (test.samples.classes if test is not None else None)
    validation = None if config.validation is None else _whole("validation", opened("validation", config.validation))
    classes = _classes([p.samples for p in (forget, retain, test, validation) if p is not None])
    # Seeded, so that an interrupted run without weights is known again when it goes on.
    model = initial_model(lambda: make_model(config, len(classes)), config.seed)
    own = Path(config.model)
    weights = Path(config.weights) if config.weights is not None else None
    if weights is not None:
        with naming("--weights"):
            load_into(model, load_weights(weights), str(weights))
    elif own.is_dir():
        weights = own
        with naming("--model"):
            load_into(model, load_weights(own), str(own))
    model = model.to(device).eval()
    reference = None
    if config.reference not in (None, "retrain"):
        assert config.reference is not None
        with naming("--reference"):
            reference = load_weights(Path(config.reference))
            load_into(copy.deepcopy(model), reference, config.reference)
    recipe = pick(Recipe, config.training, "training")
    # Another draw than those of the methods, or what is measured would be what they have seen.
    measured = retain.at_most(config.measured, derived_seed(config.seed, "measured"))
    if test is not None and any(test.samples.digest() == part.samples.digest() for part in (forget, retain)):
        raise ValueError(f"--test {config.test} holds the samples that are forgotten or retained; give others")
    task = Task(
        config, device, model, weights, forget, retain, measured, test, validation, reference, recipe, classes,
    )  # fmt: skip
    _try(task)
    return task


def make_model(config: Config, classes: int, fresh: bool = False) -> nn.Module:
    """The model, newly initialised if ``fresh``; raises ValueError naming --model."""
    with naming("--model"):
        return build_model(config.model, classes, config.model_arguments, fresh)


def device_named(name: str) -> torch.device:
    """Raises ValueError naming --device for one that does not exist or can not be used."""
    from fastunlearn._library import cuda_problem

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device must be cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda":
        problem = cuda_problem()
        if not problem and device.index is not None and device.index >= torch.cuda.device_count():
            problem = f"there are {torch.cuda.device_count()} GPUs, counted from 0"
        if problem:
            raise ValueError(f"--device {name} can not be used: {problem}")
    return device


@contextlib.contextmanager
def naming(flag: str) -> Iterator[None]:
    """Errors about what a flag or key named say which, and take one line."""
    try:
        yield
    except (OSError, TypeError, ValueError, ImportError) as error:
        kind = type(error) if type(error) in (TypeError, ValueError, ImportError) else None
        text = " ".join(f"{flag}: {error}".split())
        raise (kind(text) if kind is not None else OSError(text)) from error


def _options(config: Config) -> DataOptions:
    try:
        return DataOptions.from_dict(config.data_options, "data_options")
    except (TypeError, ValueError) as error:
        raise ConfigError(f"--data-option: {error}") from error


def _forget_and_retain(config: Config, opened: Callable[[str, str], Samples]) -> tuple[Part, Part]:
    assert config.forget is not None
    if config.data is None:
        if config.retain == "rest":
            raise ConfigError("retain is rest, but of what: give --data, or --retain with data of its own")
        both = _sharing_classes(opened("forget", config.forget), opened("retain", config.retain))
        return _whole("forget", both[0]), _whole("retain", both[1])
    source = opened("data", config.data)
    with naming("--forget"):
        forgotten = select(source, config.forget)
    if config.retain == "rest":
        keep = torch.ones(len(source), dtype=torch.bool)
        keep[forgotten] = False
        kept = keep.nonzero().flatten()
        if not len(kept):
            raise ValueError(f"--forget {config.forget} takes all {len(source)} samples; there is nothing to retain")
    else:
        with naming("--retain"):
            kept = select(source, config.retain)
        twice = torch.isin(kept, forgotten)
        if bool(twice.any()):
            first = int(kept[twice][0])
            raise ValueError(f"sample {first} is in both --forget {config.forget} and --retain {config.retain}")
    return Part("forget", source, forgotten), Part("retain", source, kept)


def _sharing_classes(forget: Samples, retain: Samples) -> tuple[Samples, Samples]:
    """Both with the class numbers of the data that they were one of: those of all names together, sorted."""
    names = [samples.classes for samples in (forget, retain)]
    if names[0] == names[1] or any(own is None or own != sorted(own) for own in names):
        return forget, retain
    together = sorted(set().union(*(own for own in names if own is not None)))
    return _renumbered(forget, together), _renumbered(retain, together)


def _renumbered(samples: Samples, classes: list[str]) -> Samples:
    """The same samples, whose classes are among ``classes``, with the numbers of these."""
    assert samples.classes is not None
    numbers = torch.tensor([classes.index(name) for name in samples.classes], dtype=torch.int64)
    return replace(samples, labels=numbers[samples.labels], classes=classes)


def _whole(name: str, samples: Samples) -> Part:
    return Part(name, samples, torch.arange(len(samples)))


def _classes(sources: list[Samples]) -> list[str]:
    """Names of all classes; those of the first source that has names, which the others must share."""
    named = next((s for s in sources if s.classes is not None), None)
    count = 1 + max(int(s.labels.max()) for s in sources)
    if named is None or named.classes is None:
        return [str(i) for i in range(count)]
    for other in sources:
        if other.classes is not None and other.classes != named.classes:
            odd = sorted(set(other.classes) ^ set(named.classes))
            what = f"{odd[0]!r} is in one alone" if odd else "their order differs"
            raise ValueError(f"{other.source} and {named.source} have different classes: {what}")
    return named.classes + [str(i) for i in range(len(named.classes), count)]


def _try(task: Task) -> None:
    """One batch of each set through the model: shapes that do not fit are found before anything is written."""
    for name, part in task._parts().items():
        few = replace(part, indices=part.indices[: min(2, len(part))])
        with preserved(task.model), torch.no_grad():
            batch = next(read(few.loader(2), name, task.device))
            with blaming(f"--model {task.config.model} can not run on {part.samples.source}: it"):
                logits = batch.outputs(task.model)
        if not isinstance(logits, Tensor) or logits.dim() != 2 or not logits.is_floating_point():
            shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"--model {task.config.model} must return logits [samples, classes], it returns {shape}")
        if logits.shape[1] < len(task.classes):
            raise ValueError(
                f"--model {task.config.model} has {logits.shape[1]} outputs, but {part.samples.source} has "
                f"{len(task.classes)} classes"
            )
        if not bool(torch.isfinite(logits).all()):
            raise ValueError(f"--model {task.config.model} returns NaN or Inf on the first samples of {name}")


def _hash(indices: Tensor) -> str:
    return hashlib.sha256(indices.numpy().tobytes()).hexdigest()


def file_hash(path: Path | None) -> str | None:
    """SHA-256 of the file with the weights; None for a folder and for a model that brings its own."""
    return sha256_of_file(path) if path is not None and path.is_file() else None


def applicable(task: Task) -> tuple[list[str], dict[str, str]]:
    """The methods that a comparison of all runs for this request, and why it leaves the others out."""
    reasons: dict[str, str] = {}
    if not task.whole_classes:
        reasons["class-forgetting"] = "the forgotten samples are not whole classes"
    return [name for name in METHODS if name not in reasons and name != "retrain"], reasons
