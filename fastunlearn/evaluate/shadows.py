"""Shadow models: many small models on random halves of the data, trained once and kept by what determines them."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastunlearn.checkpoint import digest, load_into, write_safetensors
from fastunlearn.draws import derived_seed
from fastunlearn.evaluate.signals import signals
from fastunlearn.evaluate.stacked import (
    Build,
    Mode,
    Recipe,
    Samples,
    TensorSamples,
    TrainingReport,
    as_samples,
    choose_mode,
    initial_model,
    train_models,
)
from fastunlearn.files import replacing, write_json
from fastunlearn.outcome import track

FORMAT = 1  # of what is kept; part of every key
GROUP = 16  # models that are stacked together, always the same ones, so that a resumed run repeats them bit for bit
READ_SIZE = 512  # samples a batch where nothing is trained


@dataclass(frozen=True)
class ShadowCost:
    """What training the shadow models will take. ``print`` shows it in one line.

    Attributes:
        models: in all.
        cached: of them, already trained and kept.
        seconds: to train the others, from a few timed steps; 0 when there are none.
        bytes: that they will add to the cache.
        training: which way, why, and what was timed; None when nothing is left to train.
    """

    models: int
    cached: int
    seconds: float
    bytes: int
    training: TrainingReport | None

    def __str__(self) -> str:
        todo = self.models - self.cached
        way = f", {self.training.mode}" if self.training else ""
        return (
            f"{self.models} shadow models, {self.cached} cached; {todo} to train{way}: "
            f"about {self.seconds:.3g} s, {self.bytes / 1e6:.3g} MB"
        )


class TensorCache:
    """Named tensors by key, each set in a safetensors file that carries its key and the digest of its content.

    Files are written whole or not at all, so several processes may share a folder: at worst they do the same work
    twice. With ``folder=None`` everything stays in memory.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._memory: dict[str, dict[str, Tensor]] = {}

    def path(self, key: str) -> Path:
        """The file of ``key``; raises ValueError for a cache in memory."""
        if self.folder is None:
            raise ValueError("this cache is in memory and has no files; give cache=, a folder")
        return self.folder / f"{key}.safetensors"

    def load(self, key: str) -> dict[str, Tensor] | None:
        """The tensors, on the CPU, or None; a file that is damaged or of something else is None with a warning."""
        if self.folder is None:
            return self._memory.get(key)
        from safetensors import SafetensorError, safe_open

        path = self.path(key)
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except FileNotFoundError:
            return None
        except SafetensorError as error:
            warnings.warn(f"{path} is damaged ({error}); it is made anew", stacklevel=2)
            return None
        if about.get("key") != key:
            warnings.warn(f"{path} holds something else than its name says; it is made anew", stacklevel=2)
            return None
        if about.get("content") != digest(tensors):
            warnings.warn(f"{path} is damaged (its content has another digest); it is made anew", stacklevel=2)
            return None
        return tensors

    def save(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep ``tensors``; raises OSError, naming the file, where it can not be written."""
        if self.folder is None:
            self._memory[key] = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
            return
        with replacing(self.path(key)) as file:
            write_safetensors(file, tensors, {"key": key, "content": digest(tensors)})


class ShadowModels:
    """Models of one recipe on random subsets of the data, such that every sample is in exactly ``share`` of them.

    For ``share = 1/2`` models 2k and 2k + 1 take the two halves of one permutation of the samples (in general q models
    its windows of p out of q parts, for share = p/q), so that subsets are equally large but for one sample, every
    sample has equally many models with and without it, and leaving out a pair leaves it so.

    Every model is kept under the SHA-256 of all that determines it: recipe, seed, subset, data, initial weights, the
    printed form of the module, the version of torch. Code that shows in none of these (a changed ``forward``) is not
    seen: use another folder. Models that are there are not trained again; a larger ``count`` adds to them.

    Args:
        build: returns a freshly initialised model.
        recipe: how each is trained.
        data: ``(x, y)`` tensors, or anything with ``batch(indices) -> (inputs, targets)`` and a length, which is read
            once through for its digest. It is the pool of members and non-members alike.
        count: of models, a multiple of q.
        seed: of the subsets and of each model.
        cache: folder to keep the models in; None keeps them in memory.
        share: of the models that each sample is in.
        together: indices [k] that a model sees all of or none of, such as a forget set; the models without them then
            are what retraining without them makes of the others: the rest of the samples is shared out as above.
        mode: as :func:`train_models` takes it; the choice of ``auto`` is kept in the cache.
        device: where they are trained and run.

    Attributes:
        keep: bool [count, n], which samples each model was trained on.
        seeds: of each model.
        block: how many neighbouring models share one permutation (q; 2 for halves).

    Raises ValueError for counts, shares and indices that do not fit. Cost: nothing before :meth:`plan` or
    :meth:`train`.
    """

    def __init__(
        self,
        build: Build,
        recipe: Recipe,
        data: tuple[Tensor, Tensor] | Samples,
        count: int,
        seed: int = 0,
        cache: str | Path | None = None,
        share: float = 0.5,
        together: Tensor | Sequence[int] | None = None,
        mode: Mode = "auto",
        device: torch.device | str = "cpu",
    ) -> None:
        self.build, self.recipe, self.count, self.seed, self.mode = build, recipe, count, seed, mode
        self.samples = as_samples(*data) if isinstance(data, tuple) else as_samples(data)
        self.device = torch.device(device)
        self.cache = TensorCache(cache)
        self.keep = balanced_subsets(len(self.samples), count, share, seed, together)
        self.block = Fraction(share).limit_denominator(count).denominator
        self.seeds = [derived_seed(seed, "shadow", m) for m in range(count)]
        self._measured: TrainingReport | None = None

    @cached_property
    def data_digest(self) -> str:
        """SHA-256 of the samples."""
        return digest_of_samples(self.samples)

    @cached_property
    def keys(self) -> list[str]:
        """Of every model, in hexadecimal. Cost: builds every model once, on the CPU."""
        return [self._key(m) for m in range(self.count)]

    def plan(self) -> ShadowCost:
        """What :meth:`train` would take; times a few steps unless nothing is missing or the cache knows them."""
        missing = [m for m in range(self.count) if self.cache.load(self.keys[m]) is None]
        if not missing:
            return ShadowCost(self.count, self.count, 0.0, 0, None)
        training = self._training()
        per_step = training.seconds_per_step[training.mode] / min(GROUP, self.count)
        sizes = self.keep.sum(1).tolist()
        steps = sum(self.recipe.steps(sizes[m]) for unit in self._units(missing) for m in unit)
        state = initial_model(self.build, 0).state_dict().values()
        size = sum(t.numel() * t.element_size() for t in state)
        return ShadowCost(self.count, self.count - len(missing), per_step * steps, size * len(missing), training)

    def train(self, progress: bool = False) -> None:
        """Train the models that are missing and keep each as soon as it is there.

        A run that was killed goes on from there and ends with the same bits (on the same machine with as many
        threads): models that were trained in a stack are trained again in the same stack. Warns about files that are
        damaged, which are made anew. Raises OSError where the cache can not be written, and as :func:`train_models`.
        """
        missing = [m for m in range(self.count) if self.cache.load(self.keys[m]) is None]
        if not missing:
            return
        mode = self._training().mode
        for unit in track(self._units(missing), f"{len(missing)} shadow models", progress):
            seeds = [self.seeds[m] for m in unit]
            way: Mode = "stacked" if mode == "stacked" else "sequential"
            models, _ = train_models(
                self.build, self.recipe, self.samples, None, self.keep[unit], seeds, way, self.device
            )
            for m, model in zip(unit, models, strict=True):
                if m in missing:
                    self.cache.save(self.keys[m], model.state_dict())

    def model(self, m: int) -> nn.Module:
        """A fresh copy of trained model ``m``, in eval mode; raises RuntimeError before :meth:`train`."""
        state = self.cache.load(self.keys[m])
        if state is None:
            raise RuntimeError(f"shadow model {m} is not trained yet; call train() first")
        return self.restored(state, f"shadow model {m}")

    def restored(self, state: Mapping[str, Tensor], name: str) -> nn.Module:
        """A model with the weights of ``state``, in eval mode on ``device``; ``name`` is for messages."""
        model = initial_model(self.build, 0, self.device)
        load_into(model, state, name)
        return model.eval()

    def signals(self, x: Tensor | Samples | None = None, y: Tensor | None = None) -> Tensor:
        """Scaled confidence (:attr:`Signals.logit`) of every model on ``x``, ``y`` or the pool, float64 [count, n].

        Kept in the cache, too. Cost: one pass of each model that was not asked before. Raises RuntimeError before
        :meth:`train`, and as :func:`fastunlearn.evaluate.signals.signals`.
        """
        samples = self.samples if x is None else as_samples(x, y)
        about = self.data_digest if x is None else digest_of_samples(samples)
        rows = []
        for m in range(self.count):
            key = digest_of_json({"format": FORMAT, "model": self.keys[m], "samples": about, "signal": "logit"})
            kept = self.cache.load(key)
            if kept is None:
                kept = {"logit": logits_of(self.model(m), samples, name=f"the data of shadow model {m}")}
                self.cache.save(key, kept)
            rows.append(kept["logit"])
        return torch.stack(rows)

    def _key(self, m: int) -> str:
        model = initial_model(self.build, self.seeds[m])
        return digest_of_json(
            self._settings()
            | {
                "seed": self.seeds[m],
                "subset": digest({"keep": self.keep[m]}),
                "initial": digest(model.state_dict()),
                "module": repr(model),
            }
        )

    def _settings(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "group": GROUP,
            "recipe": asdict(self.recipe),
            "data": self.data_digest,
            "torch": torch.__version__,
        }

    def _units(self, missing: Iterable[int]) -> list[list[int]]:
        """Models that are trained in one go: one, or a whole stack with something missing."""
        if self._training().mode == "sequential":
            return [[m] for m in missing]
        starts = sorted({m // GROUP * GROUP for m in missing})
        return [list(range(start, min(start + GROUP, self.count))) for start in starts]

    def _training(self) -> TrainingReport:
        """What was timed, and the way that follows; measured once for a cache."""
        if self._measured is None:
            self._measured = self._kept_measurement() or self._measure()
        if self.mode == "auto":
            return self._measured
        if self.mode not in self._measured.seconds_per_step:
            raise ValueError(f"{self._measured.reason}; train with mode='auto' or 'sequential'")
        return TrainingReport(self.mode, "asked for", self._measured.seconds_per_step)

    def _measure(self) -> TrainingReport:
        group = slice(0, min(GROUP, self.count))
        subsets = [row.nonzero().flatten() for row in self.keep[group]]
        report = choose_mode(self.build, self.recipe, self.samples, subsets, self.seeds[group], "auto", self.device)
        if self.cache.folder is not None:
            write_json(self._measurement_path(), asdict(report))
        return report

    def _kept_measurement(self) -> TrainingReport | None:
        if self.cache.folder is None:
            return None
        path = self._measurement_path()
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            report = TrainingReport(**kept)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            warnings.warn(f"{path} is damaged ({error}); the steps are timed anew", stacklevel=2)
            return None
        if report.mode not in ("stacked", "sequential") or report.mode not in report.seconds_per_step:
            warnings.warn(f"{path} names no way to train; the steps are timed anew", stacklevel=2)
            return None
        return report

    def _measurement_path(self) -> Path:
        assert self.cache.folder is not None
        about = self._settings() | {
            "module": repr(initial_model(self.build, 0)),
            "models": min(GROUP, self.count),
            "device": str(self.device),
        }
        return self.cache.folder / f"{digest_of_json(about)}.timing.json"


def balanced_subsets(
    n: int, count: int, share: float = 0.5, seed: int = 0, together: Tensor | Sequence[int] | None = None
) -> Tensor:
    """Random subsets of n samples, bool [count, n]: every sample in exactly ``share`` of them, all of almost one size.

    For share = p/q every q neighbouring subsets are the windows of p parts of one random permutation in q parts. The
    first subsets are the same whatever ``count``. The samples ``together`` are added as one: all to a subset or none.

    Raises ValueError when ``share`` is not a fraction of ``count``, with fewer samples than parts, or for indices
    outside the n samples or given twice.
    """
    part = Fraction(share).limit_denominator(max(1, count))
    p, q = part.numerator, part.denominator
    if not 0 < p < q or not math.isclose(p / q, share) or count % q:
        raise ValueError(f"{count} models can not hold every sample in a share of {share:g}; 4, 16, 64 can in half")
    block = torch.as_tensor([] if together is None else together, dtype=torch.int64).cpu().flatten()
    if len(block) and (int(block.min()) < 0 or int(block.max()) >= n or len(torch.unique(block)) < len(block)):
        raise ValueError(f"together must be different indices from 0 to {n - 1}")
    rest = torch.ones(n, dtype=torch.bool)
    rest[block] = False
    free = rest.nonzero().flatten()
    if len(free) < q:
        raise ValueError(f"{len(free)} samples are too few for {q} parts")
    keep = torch.zeros(count, n, dtype=torch.bool)
    for first in range(0, count, q):
        generator = torch.Generator().manual_seed(derived_seed(seed, "subsets", first, n))
        parts = free[torch.randperm(len(free), generator=generator)].tensor_split(q)
        home = int(torch.randint(q, (), generator=generator))  # the part that goes with the block
        for j in range(q):
            window = {(j + k) % q for k in range(p)}
            for i in window:
                keep[first + j, parts[i]] = True
            keep[first + j, block] = home in window
    return keep


class InOrder:
    """Batches of some of the samples, always in the given order, for passes that only read."""

    def __init__(self, samples: Samples, indices: Tensor, batch_size: int = READ_SIZE) -> None:
        self.samples, self.indices, self.batch_size = samples, indices, batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        return (self.samples.batch(indices) for indices in torch.split(self.indices, self.batch_size))


def logits_of(model: nn.Module, samples: Samples, indices: Tensor | None = None, name: str = "the data") -> Tensor:
    """Scaled confidence of one model on some samples (default all), float64 [k] on the CPU."""
    chosen = torch.arange(len(samples)) if indices is None else indices
    return signals(model, InOrder(samples, chosen), name).logit


def digest_of_samples(samples: Samples) -> str:
    """SHA-256 of inputs and labels; other than tensors in memory, they are read once through."""
    if isinstance(samples, TensorSamples):
        return digest({"inputs": samples.inputs, "labels": samples.labels})
    sha256 = hashlib.sha256()
    for batch in InOrder(samples, torch.arange(len(samples))):
        leaves = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
        sha256.update(digest({f"{i:06}": leaf for i, leaf in enumerate(leaves)}).encode())
    return sha256.hexdigest()


def digest_of_json(value: Any) -> str:
    """SHA-256 of a value as JSON with sorted keys; raises TypeError for what JSON can not hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
