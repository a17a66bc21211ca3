"""A configuration opened: the model with its weights, what to forget and what to keep; checked, nothing changed."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastunlearn.checkpoint import State, digest, load_into, load_weights
from fastunlearn.data import Batches, read
from fastunlearn.draws import derived_seed
from fastunlearn.evaluate.stacked import Recipe, initial_model
from fastunlearn.files import sha256_of_file
from fastunlearn.hooks import preserved
from fastunlearn.inputs import DataOptions, Loader, Samples, build_model, open_samples, select, tokenizer_of
from fastunlearn.inputs.own_targets import is_causal_folder, next_tokens, with_own_targets
from fastunlearn.inputs.places import blaming
from fastunlearn.jobs.config import Config, ConfigError, flag_of, pick
from fastunlearn.jobs.methods import METHODS, TAKES_VALIDATION, entry
from fastunlearn.language import is_causal_lm
from fastunlearn.parallel.checkpoints import sharded_digest
from fastunlearn.parallel.deal import deal
from fastunlearn.parallel.launch import local_device, require_same
from fastunlearn.parallel.placing import place, replicated, without_memory
from fastunlearn.parallel.ranks import ALONE, Ranks, local, sharing
from fastunlearn.parallel.stored import Box, Stored, open_stored

SHARDED = ("fsdp", "tp")  # no rank has the model whole
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
        model: with the weights, in eval mode, on the device; this rank's shard of it where the model is sharded.
        weights: the file they came from; None for a model that brings its own.
        forget, retain: disjoint where they come from the same data.
        measured: what is measured of ``retain``.
        reference: weights of a model that never saw the forgotten data, if a file was given; of a sharded model they
            stay there.
        classes: names of the outputs, as far as the data names them.
        ranks: who works on it, each with the whole of the data.
        parallel: how the ranks hold the model: ``none``, ``ddp``, ``fsdp`` or ``tp``.
        architecture: the model's modules, in text.
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
    reference: State | None
    recipe: Recipe
    classes: list[str]
    ranks: Ranks = ALONE
    parallel: str = "none"
    architecture: str = ""

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the original weights."""
        return sharded_digest(self.model)

    @property
    def sharded(self) -> bool:
        """Whether no rank has the model whole."""
        return self.parallel in SHARDED

    @property
    def not_relearned(self) -> list[str]:
        """What the report says where the time to relearn is not measured though it was asked for."""
        if not (self.sharded and self.config.relearn):
            return []
        return ["The time to relearn was not measured: it needs a copy of the model, which no process has whole."]

    @property
    def language(self) -> bool:
        """Whether the model is a causal language model."""
        return is_causal_lm(self.model)

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

    def copy(self, model: nn.Module | None = None) -> nn.Module:
        """The model, or another one of the run that lies over the ranks like it, to be changed."""
        model = self.model if model is None else model
        if not self.sharded:
            return copy.deepcopy(model)
        other = self._placed(_dtype(self.config), None)
        with torch.no_grad():
            for mine, given in ((other.parameters, model.parameters), (other.buffers, model.buffers)):
                for a, b in zip(mine(), given(), strict=True):
                    local(a).copy_(local(b))
        for a, b in zip(other.parameters(), model.parameters(), strict=True):
            a.requires_grad_(b.requires_grad)
        return other

    def loaded(self, weights: Path | State, source: str) -> nn.Module:
        """A model with these weights, which lies over the ranks as the task's does, in eval mode."""
        if self.sharded and isinstance(weights, Path):
            return self._placed(_dtype(self.config), weights)
        model = self.copy()
        load_into(model, load_weights(weights) if isinstance(weights, Path) else weights, source)
        return model.eval()

    def shared(self, model: nn.Module) -> nn.Module:
        """The model as a method is given it: one that each rank has whole is kept the same by DDP."""
        return replicated(model, self.ranks) if self.parallel == "ddp" else model

    def dealt(self, batches: Batches, model: nn.Module) -> Batches:
        """This rank's share of the batches, where ``model`` is one that all ranks work on together."""
        ranks = sharing(model)
        return batches if ranks.group is None else deal(batches, ranks)

    def stored(self) -> State:
        """The original weights as the file has them: a checkpoint in half precision stays one, whatever the model runs
        in. They are read when asked for where the model is sharded."""
        if self.weights is None:
            return {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}
        return kept_on_disk(self.weights) if self.sharded else load_weights(self.weights)

    def as_stored(self, model: nn.Module) -> nn.Module:
        """Of a sharded model, the same in the types of the file; what is as in the task's model keeps the file's bits,
        which a model of lower precision than the file has rounded."""
        if self.config.dtype == "auto":
            return model
        found = self._placed(None, self.weights)
        with torch.no_grad():
            for old, before, after in zip(found.parameters(), self.model.parameters(), model.parameters(), strict=True):
                mine, new = local(old), local(after)
                mine.copy_(torch.where(new == local(before), mine, new.to(mine.dtype)))
        return found

    def _placed(self, dtype: torch.dtype | None, weights: Path | None) -> nn.Module:
        """One without weights of its own, or each rank would make the whole of them to have them replaced."""

        def build() -> nn.Module:
            with without_memory():
                return make_model(self.config, len(self.classes), fresh=True)

        with naming("--weights"):
            return place(build, self.parallel, self.ranks, self.device, dtype, weights)

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
        file, settings = Path(self.config.model.rpartition(":")[0]), Path(self.config.model) / "config.json"
        code = file.read_bytes() if file.suffix == ".py" else settings.read_bytes() if settings.is_file() else b""
        model = hashlib.sha256(self.architecture.encode() + code).hexdigest()
        found = {**config, "model digest": model, "weights digest": self.digest, "data digests": sources,
                 "samples": chosen, "reference digest": reference}  # fmt: skip
        require_same(self.ranks, found)
        return found

    def _parts(self) -> dict[str, Part]:
        held = {} if self.validation is None else {"validation": self.validation}
        return {"forget": self.forget, "retain": self.retain, **held} | (
            {} if self.test is None else {"test": self.test}
        )


def layout(config: Config, ranks: Ranks) -> str:
    """How the ranks hold the model."""
    return "none" if ranks.group is None else "fsdp" if config.parallel == "auto" else config.parallel


def open_task(config: Config, ranks: Ranks = ALONE) -> Task:
    """Open and check everything that ``config`` names; every one of several ranks does.

    Raises ValueError, TypeError, OSError or ImportError in one line that names the flag, the file or the key; nothing
    has been written or changed then. Cost: the data are read, and one batch is run through the model.
    """
    config.require("forget")
    require_same(ranks, config.as_dict())
    parallel = layout(config, ranks)
    device = device_named(config.device)
    options = _options(config)
    tokenizer = tokenizer_of(config.model)

    names: list[str] | None = None  # of the classes, from the first source that has any: a class is a number once

    def opened(name: str, spec: str) -> Samples:
        own = with_own_targets(spec, options) if is_causal_folder(config.model) else options
        with naming(flag_of(name)):
            return open_samples(spec, options=own, tokenizer=tokenizer, classes=names)

    forget, retain = _forget_and_retain(config, opened)
    names = forget.samples.classes or retain.samples.classes
    test = None if config.test is None else _whole("test", opened("test", config.test))
    names = names or (test.samples.classes if test is not None else None)
    validation = None if config.validation is None else _whole("validation", opened("validation", config.validation))
    classes = _classes([p.samples for p in (forget, retain, test, validation) if p is not None])
    # Seeded, so that an interrupted run without weights is known again when it goes on.
    weights = Path(config.weights) if config.weights is not None else None
    if weights is None and Path(config.model).is_dir():
        weights = Path(config.model)
    given = "--model" if config.weights is None else "--weights"
    build = partial(make_model, config, len(classes), fresh=True)
    if parallel in SHARDED:
        if weights is None:
            raise ConfigError("weights is missing: a sharded model is loaded shard by shard; give --weights")
        with without_memory():
            architecture = repr(build())
        with naming(given):
            model = place(build, parallel, ranks, device, _dtype(config), weights)
    else:
        model = initial_model(lambda: make_model(config, len(classes)), config.seed)
        architecture = repr(model)
        if weights is not None:
            with naming(given):
                load_into(model, load_weights(weights), str(weights))
        model = model.to(device, _dtype(config)).eval()
    if is_causal_lm(model):
        known: dict[int, Samples] = {}
        forget, retain = _own_targets(forget, known), _own_targets(retain, known)
        test, validation = (None if part is None else _own_targets(part, known) for part in (test, validation))
    reference: State | None = None
    if config.reference not in (None, "retrain"):
        assert config.reference is not None
        with naming("--reference"):
            if parallel in SHARDED:
                reference = kept_on_disk(Path(config.reference))
                place(build, parallel, ranks, device, _dtype(config), config.reference)  # whether they fit
            else:
                reference = load_weights(Path(config.reference))
                load_into(copy.deepcopy(model), reference, config.reference)
    recipe = pick(Recipe, config.training, "training")
    # Another draw than those of the methods, or what is measured would be what they have seen.
    measured = retain.at_most(config.measured, derived_seed(config.seed, "measured"))
    if test is not None and any(test.samples.digest() == part.samples.digest() for part in (forget, retain)):
        raise ValueError(f"--test {config.test} holds the samples that are forgotten or retained; give others")
    task = Task(
        config, device, model, weights, forget, retain, measured, test, validation, reference, recipe, classes,
        ranks, parallel, architecture,
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
    try:
        device = local_device(device)
    except ValueError as error:
        raise ConfigError(f"--device: {error}") from error
    if device.type == "cuda":
        problem = cuda_problem()
        if not problem and device.index is not None and device.index >= torch.cuda.device_count():
            problem = f"there are {torch.cuda.device_count()} GPUs, counted from 0"
        if problem:
            raise ValueError(f"--device {name} can not be used: {problem}")
    return device


def _dtype(config: Config) -> torch.dtype | None:
    """Of the model while it runs; None for its own."""
    return None if config.dtype == "auto" else {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]


class _OnDisk(Mapping[str, Tensor]):
    """Weights that are read when they are asked for, each time anew."""

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        self.stored = stored

    def __getitem__(self, name: str) -> Tensor:
        found = self.stored[name]
        return found.read(Box.whole(found.shape))

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def kept_on_disk(path: Path) -> State:
    """The weights of a checkpoint, one at a time: for models that no process may hold whole."""
    return _OnDisk(open_stored(path))


def in_order(state: State, names: Iterable[str]) -> State:
    """Those of ``state`` that are named, in this order: files have one of their own."""
    if isinstance(state, _OnDisk):
        return _OnDisk({name: state.stored[name] for name in names if name in state})
    return {name: state[name] for name in names if name in state}


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


def _own_targets(part: Part, known: dict[int, Samples]) -> Part:
    """The part with every text as its own target; parts of one source stay parts of one."""
    if id(part.samples) not in known:
        known[id(part.samples)] = next_tokens(part.samples)
    return replace(part, samples=known[id(part.samples)])


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
        dims, axes = (3, "texts, tokens, vocabulary") if task.language else (2, "samples, classes")
        if not isinstance(logits, Tensor) or logits.dim() != dims or not logits.is_floating_point():
            shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"--model {task.config.model} must return logits [{axes}], it returns {shape}")
        if not task.language and logits.shape[1] < len(task.classes):
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
