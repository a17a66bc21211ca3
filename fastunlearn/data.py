"""Batches and losses: what every pass over the data asks of them, checked once, at the door."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map_only

Batches = Iterable[Any]
LossFunction = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Batch:
    """One batch, ready to be given to a model. ``size`` samples lie along the first axis of every tensor."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: Any
    size: int

    def outputs(self, model: nn.Module) -> Any:
        """The model's outputs; of a Hugging Face output object, its logits."""
        outputs = model(*self.args, **self.kwargs)
        return getattr(outputs, "logits", outputs)

    def __getitem__(self, samples: slice) -> Batch:
        """The same batch with only these samples."""
        args, kwargs, targets = tree_map_only(Tensor, lambda t: t[samples], (self.args, self.kwargs, self.targets))
        return Batch(args, kwargs, targets, len(range(self.size)[samples]))


def require_batches(batches: Batches, name: str) -> None:
    """Raise TypeError unless ``batches`` can be iterated more than once."""
    if isinstance(batches, Iterator):
        raise TypeError(
            f"{name} is an iterator ({type(batches).__name__}) and can be read only once; "
            "pass a DataLoader, a list of batches, or anything whose __iter__ starts anew"
        )
    if not isinstance(batches, Iterable):
        raise TypeError(f"{name} must be an iterable of (inputs, targets) batches, got {type(batches).__name__}")


@dataclass(frozen=True)
class FirstSamples:
    """The first batches of ``batches`` that hold ``samples`` samples together, whole batches; all for None."""

    batches: Batches
    samples: int | None

    def __iter__(self) -> Iterator[Any]:
        seen = 0
        for raw in self.batches:
            yield raw
            seen += next((len(leaf) for leaf in tree_leaves(raw) if isinstance(leaf, Tensor) and leaf.dim()), 0)
            if self.samples is not None and seen >= self.samples:
                return


def count_batches(batches: Batches) -> int:
    """From ``len`` where there is one, else by reading them; a loader over a stream has a ``len`` that raises."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return sum(1 for _ in batches)


def read(batches: Batches, name: str, device: torch.device) -> Iterator[Batch]:
    """The batches on ``device``; raises ValueError when there is none, or when one is malformed."""
    require_batches(batches, name)
    empty = True
    for raw in batches:
        empty = False
        yield _batch(raw, name, device)
    if empty:
        raise ValueError(f"{name} is empty: it yields no batch")


def _batch(raw: Any, name: str, device: torch.device) -> Batch:
    raw = tree_map_only(Tensor, lambda t: t.to(device, non_blocking=True), raw)
    if isinstance(raw, Mapping):
        if "labels" not in raw:
            raise ValueError(f"a batch of {name} is a dict without 'labels'; it has {sorted(raw)}")
        args: tuple[Any, ...] = ()
        kwargs = {key: value for key, value in raw.items() if key != "labels"}
        targets = raw["labels"]
    elif isinstance(raw, (tuple, list)) and len(raw) == 2:
        args, kwargs, targets = (raw[0],), {}, raw[1]
    else:
        raise ValueError(
            f"a batch of {name} must be a pair (inputs, targets) or a dict with 'labels', got {type(raw).__name__}"
        )
    tensors = [t for t in (*args, *kwargs.values(), targets) if isinstance(t, Tensor)]
    sizes = {t.shape[0] if t.dim() else 0 for t in tensors}
    if len(sizes) != 1 or sizes == {0}:
        shapes = ", ".join(str(list(t.shape)) for t in tensors) or "no tensor"
        raise ValueError(f"the tensors of a batch of {name} must share a first axis of 1 sample or more, got {shapes}")
    return Batch(args, kwargs, targets, sizes.pop())


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of logits [N, C, ...] per sample [N], halves in float32; further axes (positions) are averaged."""
    if outputs.dtype in (torch.bfloat16, torch.float16):
        outputs = outputs.float()
    loss = F.cross_entropy(outputs, targets, reduction="none")
    return loss.flatten(1).mean(1) if loss.dim() > 1 else loss


def per_sample_loss(loss_fn: LossFunction | None, outputs: Any, targets: Any, size: int) -> Tensor:
    """One loss per sample, shape [size].

    Raises TypeError for outputs that carry no gradient (integers), ValueError for a loss of any other shape.
    """
    if isinstance(outputs, Tensor) and not outputs.is_floating_point():
        raise TypeError(f"the model returns {outputs.dtype}, which has no gradient; return logits, not class indices")
    loss = (loss_fn or cross_entropy)(outputs, targets)
    if not isinstance(loss, Tensor) or loss.shape != (size,):
        shape = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"loss_fn must return one loss per sample, shape [{size}], got {shape}; a reduced loss has lost the "
            'scale of each sample: use reduction="none"'
        )
    return loss
