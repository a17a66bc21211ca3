"""Batches and losses: what every pass over the data asks of them, checked once, at the door."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map_only

Batches = Iterable[Any]
LossFunction = Callable[[Any, Any], Tensor]

IGNORED = -100  # the label that torch's cross-entropy leaves out


@dataclass(frozen=True)
class Batch:
    """One batch, ready to be given to a model. ``size`` samples lie along the first axis of every tensor."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: Any
    size: int

    def outputs(self, model: nn.Module) -> Any:
        """The model's outputs; of a Hugging Face output object, its logits.

        Hugging Face's models are told to keep no keys and values for a continuation, unless the batch says otherwise:
        they are memory for nothing, and a layer that was called with them can not be run again by itself.

        Raises ValueError for token ids or positions that an embedding of the model does not have.
        """
        uncached = {"use_cache": False} if "use_cache" in forward_parameters(model) else {}
        try:
            outputs = model(*self.args, **{**uncached, **self.kwargs})
        except IndexError as error:
            if str(error) != "index out of range in self":  # torch's, of an embedding on the CPU
                raise
            shapes = [list(t.shape) for t in tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor)]
            raise ValueError(
                f"the model has no embedding for an index in a batch of shape {shapes[0]}: a token id beyond its "
                "vocabulary, or more positions than it takes"
            ) from error
        return getattr(outputs, "logits", outputs)

    def __getitem__(self, samples: slice) -> Batch:
        """The same batch with only these samples."""
        args, kwargs, targets = tree_map_only(Tensor, lambda t: t[samples], (self.args, self.kwargs, self.targets))
        return Batch(args, kwargs, targets, len(range(self.size)[samples]))


def forward_parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """What the forward pass of the model itself takes, not that of DistributedDataParallel's, torch.compile's or peft's
    wrapper around it; nothing of TorchScript, which tells it to nobody."""
    if isinstance(model, (DistributedDataParallel, nn.DataParallel)):
        return forward_parameters(model.module)
    if isinstance(model, torch.jit.ScriptModule):
        return {}
    model = getattr(model, "_orig_mod", model)
    base = getattr(model, "get_base_model", None)  # peft
    return inspect.signature((base() if callable(base) else model).forward).parameters


def transparent(raw: Any) -> Any:
    """A batch that ``torch.utils._pytree`` sees into, which it does not into what Hugging Face's collators return."""
    return dict(raw) if isinstance(raw, Mapping) else raw


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
            leaves = tree_leaves(transparent(raw))
            seen += next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), 0)
            if self.samples is not None and seen >= self.samples:
                return


def count_batches(batches: Batches) -> int:
    """From ``len`` where there is one, else by reading them; a loader over a stream has a ``len`` that raises."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return sum(1 for _ in batches)


def read(batches: Batches, name: str, device: torch.device) -> Iterator[Batch]:
    """The batches on ``device``; raises ValueError when there is none, or when one is malformed.

    Of a dict with an ``attention_mask`` of the labels' shape, the labels are -100 where the mask is 0. A sequence that
    is left without any label has loss 0 and gradient 0, and still counts as a sample.
    """
    require_batches(batches, name)
    empty = True
    for raw in batches:
        empty = False
        yield _batch(raw, name, device)
    if empty:
        raise ValueError(f"{name} is empty: it yields no batch")


def _batch(raw: Any, name: str, device: torch.device) -> Batch:
    raw = tree_map_only(Tensor, lambda t: t.to(device, non_blocking=True), transparent(raw))
    if isinstance(raw, Mapping):
        if "labels" not in raw:
            raise ValueError(f"a batch of {name} is a dict without 'labels'; it has {sorted(raw)}")
        args: tuple[Any, ...] = ()
        kwargs = {key: value for key, value in raw.items() if key != "labels"}
        targets = _attended(raw["labels"], raw.get("attention_mask"))
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


def _attended(labels: Any, mask: Any) -> Any:
    """Labels of positions with -100 where an attention mask of their shape is 0, so that padding is never scored."""
    alike = isinstance(labels, Tensor) and isinstance(mask, Tensor) and labels.dim() > 1 and labels.shape == mask.shape
    return labels.masked_fill(mask == 0, IGNORED) if alike and not labels.is_floating_point() else labels


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of logits [N, C, ...] per sample [N], halves in float32; further axes (positions) are averaged."""
    loss = cross_entropy_by_position(outputs, targets)
    return loss.flatten(1).mean(1) if loss.dim() > 1 else loss


def cross_entropy_by_position(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of logits [N, C, ...], shape [N, ...], halves in float32; zero where the label is -100.

    Raises ValueError for labels of other positions.
    """
    if isinstance(targets, Tensor) and targets.shape not in (outputs.shape, outputs.shape[:1] + outputs.shape[2:]):
        raise ValueError(
            f"cross-entropy takes logits [N, C, ...] and labels [N, ...], got {list(outputs.shape)} and "
            f"{list(targets.shape)}; pass loss_fn= for a model of logits [N, T, C]"
        )
    if outputs.dtype in (torch.bfloat16, torch.float16):
        outputs = outputs.float()
    return F.cross_entropy(outputs, targets, reduction="none", ignore_index=IGNORED)


def per_sample_loss(loss_fn: LossFunction | None, outputs: Any, targets: Any, size: int) -> Tensor:
    """One loss per sample, shape [size].

    Raises TypeError for outputs that carry no gradient (integers), ValueError for a loss of any other shape.
    """
    _require_gradients(outputs)
    loss = (loss_fn or cross_entropy)(outputs, targets)
    if not isinstance(loss, Tensor) or loss.shape != (size,):
        shape = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"loss_fn must return one loss per sample, shape [{size}], got {shape}; a reduced loss has lost the "
            'scale of each sample: use reduction="none"'
        )
    return loss


def per_position_loss(loss_fn: LossFunction | None, outputs: Any, targets: Any, size: int) -> Tensor:
    """One loss per sample and position, shape [size, T]; further axes of positions are flattened. Errors as above."""
    _require_gradients(outputs)
    loss = (loss_fn or cross_entropy_by_position)(outputs, targets)
    if not isinstance(loss, Tensor) or loss.dim() < 2 or len(loss) != size:
        shape = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"with sample='token' loss_fn must return one loss per position, shape [{size}, T], got {shape}; "
            'use reduction="none" and logits [N, C, T]'
        )
    return loss.flatten(1)


def labelled_positions(targets: Any, losses: Tensor) -> Tensor:
    """Which positions count, shaped like ``losses`` [N, T]: where targets are labels, all but those labelled -100."""
    if isinstance(targets, Tensor) and not targets.is_floating_point() and targets.numel() == losses.numel():
        return targets.reshape(losses.shape) != IGNORED
    return torch.ones_like(losses, dtype=torch.bool)


def _require_gradients(outputs: Any) -> None:
    if isinstance(outputs, Tensor) and not outputs.is_floating_point():
        raise TypeError(f"the model returns {outputs.dtype}, which has no gradient; return logits, not class indices")
