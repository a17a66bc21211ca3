"""Numbers in memory: what an array of inputs, of labels or of ids must be, and how it becomes a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fastunlearn.inputs.options import DataOptions

CLASSES = 1_000_000  # labels from here on are taken for a column of numbers that are no classes
_CHECKED = 1 << 22  # numbers looked at together


class Inputs(Protocol):
    """The inputs of n samples, in whatever form they are kept."""

    def __len__(self) -> int: ...

    def take(self, indices: Tensor) -> Tensor | dict[str, Tensor]:
        """Those of ``indices`` [b], stacked along the first axis, as a model takes them."""
        ...

    def hashes(self) -> Iterator[bytes]:
        """SHA-256 of every sample as it came, before anything of ``options`` was applied."""
        ...


@dataclass(frozen=True)
class Scaling:
    """(x / divisor - mean) / std in float32, mean and std along the first axis of a sample."""

    divisor: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if not x.is_floating_point() and x.dtype != torch.bool and self == Scaling():
            return x.long()
        x = x.float()
        if self.divisor is not None:
            x = x / self.divisor
        if self.mean is not None:
            x = x - _along_first(self.mean, x)
        return x if self.std is None else x / _along_first(self.std, x)


def scaling(options: DataOptions, shape: Sequence[int], dtype: torch.dtype, where: str) -> Scaling:
    """What ``options`` do to samples of this ``shape`` and ``dtype``; raises ValueError if mean or std do not fit."""
    mean, std = _tuple(options.mean), _tuple(options.std)
    for name, numbers in (("mean", mean), ("std", std)):
        width = shape[0] if shape else 1
        if numbers is not None and len(numbers) not in (1, width):
            raise ValueError(f"{where}: {name} has {len(numbers)} numbers, the first axis of a sample {width}")
    return Scaling(options.scale or (255.0 if dtype == torch.uint8 else None), mean, std)


@dataclass(frozen=True, eq=False)
class Held:
    """Inputs [n, ...] in memory, in the type they came in."""

    values: Tensor
    scaling: Scaling = field(default_factory=Scaling)
    known: tuple[bytes, ...] | None = None  # hashes of what the values were made from

    def __len__(self) -> int:
        return len(self.values)

    def take(self, indices: Tensor) -> Tensor:
        return self.scaling(self.values[indices])

    def hashes(self) -> Iterator[bytes]:
        return iter(self.known) if self.known is not None else hashes_of_rows(self.values)


@dataclass(frozen=True, eq=False)
class Named:
    """Named inputs, each [n, ...] in memory, given to the model by name; integers and floats stay what they are."""

    values: dict[str, Tensor]
    known: tuple[bytes, ...] | None = None

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    def take(self, indices: Tensor) -> dict[str, Tensor]:
        return {name: _for_model(value[indices]) for name, value in self.values.items()}

    def hashes(self) -> Iterator[bytes]:
        if self.known is not None:
            yield from self.known
            return
        columns = [(name.encode() + b"\0", hashes_of_rows(self.values[name])) for name in sorted(self.values)]
        for _ in range(len(self)):
            yield hashlib.sha256(b"".join(name + next(column) for name, column in columns)).digest()


def hashes_of_rows(values: Tensor) -> Iterator[bytes]:
    """SHA-256 of every row with its type and shape."""
    head = f"{values.dtype} {list(values.shape[1:])}".encode()
    for row in values.reshape(len(values), -1):
        yield hashlib.sha256(head + row.contiguous().view(torch.uint8).numpy().tobytes()).digest()


def as_tensor(value: Any, where: str) -> Tensor:
    """A CPU tensor of ``value`` (tensor, array or nested lists) in a type torch can index and convert.

    Raises ValueError naming ``where`` for objects, text, complex numbers, and rows of different lengths.
    """
    if isinstance(value, Tensor):
        if value.is_complex():
            raise ValueError(f"{where} holds complex numbers; give real ones")
        return value.detach().cpu()
    try:
        array = np.asarray(value)
    except ValueError as error:  # nested lists of different lengths
        raise ValueError(f"{where} has rows of different shapes; every sample must have the same") from error
    kind = array.dtype.kind
    if kind == "O":
        raise ValueError(f"{where} is an array of objects; give one of numbers, all rows of the same shape and type")
    if kind not in "biuf":
        raise ValueError(f"{where} holds {array.dtype}, expected numbers")
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{where} holds {array.max()}, more than 64-bit integers with a sign can")
    wider = {np.dtype("u2"): np.int32, np.dtype("u4"): np.int64, np.dtype("u8"): np.int64}
    native = array.dtype.newbyteorder("=")
    target = wider.get(native, np.float64 if kind == "f" and native.itemsize > 8 else native)
    return torch.from_numpy(np.require(array, target, ["C", "W"]))


def held(value: Any, options: DataOptions, where: str) -> Held:
    """Inputs [n, ...] from an array. Integers with 3 axes or more are images: [n, H, W], channels first, or last.

    Raises ValueError naming ``where`` for what :func:`as_tensor` refuses, no sample, NaN and infinities.
    """
    values = as_tensor(value, where)
    if values.dim() == 0 or not values.numel():
        raise ValueError(f"{where} is empty: its shape is {list(values.shape)}")
    require_finite(values, where)
    if values.dim() >= 3 and _is_whole(values) and values.dtype != torch.uint8:
        values = _eight_bits(values, options, where)
    if values.dim() == 3 and values.dtype == torch.uint8:
        values = values.unsqueeze(1)
    if values.dim() == 4 and values.shape[1] not in (1, 3) and values.shape[3] in (1, 3):
        values = values.permute(0, 3, 1, 2).contiguous()
    asked = _as_asked(values, options, where)
    known = None if asked is values else tuple(hashes_of_rows(values))
    return Held(asked, scaling(options, asked.shape[1:], asked.dtype, where), known)


def require_finite(values: Tensor, where: str) -> None:
    """Raise ValueError naming the first row that holds NaN or an infinity, or a number that float32 can not hold."""
    if not values.is_floating_point():
        return
    step = max(1, _CHECKED // max(1, values[0].numel()))
    for start in range(0, len(values), step):
        rows = values[start : start + step]
        finite = torch.isfinite(rows.float()).reshape(len(rows), -1).all(1)
        if not finite.all():
            bad = int((~finite).nonzero()[0])
            what = "numbers too large for float32" if torch.isfinite(rows[bad]).all() else "NaN or infinity"
            raise ValueError(f"{where}: row {start + bad} holds {what}")


def labels_from(value: Any, where: str, classes: Sequence[str] | None = None) -> tuple[Tensor, list[str] | None]:
    """Labels int64 [n] and the names of the classes, sorted where the labels are text and ``classes`` are not given.

    Raises ValueError naming ``where`` and the first offending row for labels that are not whole, negative, beyond
    ``classes``, or names that ``classes`` lack.
    """
    texts = _texts(value)
    if texts is not None:
        return _named_labels(texts, where, classes)
    values = as_tensor(value, where)
    if values.dim() != 1:
        raise ValueError(f"{where} has shape {list(values.shape)}, expected one label per sample: [n]")
    if values.is_floating_point():
        _first(~torch.isfinite(values), values, where, "a class is a whole number")
        _first(values != values.round(), values, where, "a class is a whole number")
    _first(values < 0, values, where, "a class is 0 or more")
    most = CLASSES if classes is None else len(classes)
    _first(values >= most, values, where, f"expected less than {most:,}" + ("" if classes is None else ", the classes"))
    return values.long(), None if classes is None else list(classes)


def ids_from(value: Any, where: str) -> list[str]:
    """Ids as text, from text or whole numbers; raises ValueError naming ``where`` for anything else."""
    texts = _texts(value)
    if texts is None:
        values = as_tensor(value, where)
        if values.dim() != 1 or values.is_floating_point():
            raise ValueError(
                f"{where} holds {values.dtype} of shape {list(values.shape)}; ids are text or integers [n]"
            )
        texts = [str(number) for number in values.tolist()]
    for row, text in enumerate(texts):
        if not text or "\n" in text or "\r" in text:
            raise ValueError(f"{where}: row {row} is {text!r}; an id is one line of text")
    return texts


def rows(count: int) -> list[str]:
    """The ids of samples that have none."""
    return [str(row) for row in range(count)]


def named(values: Mapping[str, Any], where: str) -> Named:
    """Inputs by name from a mapping of arrays; raises ValueError naming the first key that does not fit the others."""
    tensors: dict[str, Tensor] = {}
    for key, value in values.items():
        tensor = as_tensor(value, f"{where}: {key!r}")
        if tensor.dim() == 0 or not tensor.numel():
            raise ValueError(f"{where}: {key!r} is empty: its shape is {list(tensor.shape)}")
        first = next(iter(tensors), None)
        if first is not None and len(tensor) != len(tensors[first]):
            raise ValueError(f"{where}: {key!r} has {len(tensor)} samples, {first!r} has {len(tensors[first])}")
        require_finite(tensor, f"{where}: {key!r}")
        tensors[key] = tensor
    if not tensors:
        raise ValueError(f"{where} is empty: it has no input")
    return Named(tensors)


def is_text(value: Any) -> bool:
    """Whether ``value`` is an array or a list of text."""
    return _texts(value) is not None


def _texts(value: Any) -> list[str] | None:
    if isinstance(value, np.ndarray) and value.dtype.kind == "U" and value.ndim == 1:
        return [str(text) for text in value]
    if isinstance(value, (list, tuple)) and value and all(isinstance(text, str) for text in value):
        return [str(text) for text in value]
    return None


def _named_labels(texts: list[str], where: str, classes: Sequence[str] | None) -> tuple[Tensor, list[str]]:
    known = sorted(set(texts)) if classes is None else list(classes)
    index = {name: number for number, name in enumerate(known)}
    for row, text in enumerate(texts):
        if text not in index:
            raise ValueError(f"{where}: row {row} is {text!r}, which is none of the {len(known)} classes")
    return torch.tensor([index[text] for text in texts], dtype=torch.int64), known


def _first(wrong: Tensor, values: Tensor, where: str, expected: str) -> None:
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(f"{where}: row {row} is {values[row].item()}; {expected}")


def _as_asked(values: Tensor, options: DataOptions, where: str) -> Tensor:
    """Integer images with the channels and the size that ``options`` ask for; anything else must have them already."""
    if options.channels is None and options.size is None:
        return values
    if values.dim() != 4:
        raise ValueError(f"{where}: channels and image_size are for images, its samples are {list(values.shape[1:])}")
    channels, *size = values.shape[1:]
    if options.channels in (None, channels) and options.size in (None, tuple(size)):
        return values
    if values.dtype != torch.uint8 or channels not in (1, 3):
        asked = [options.channels or channels, *(options.size or size)]
        raise ValueError(
            f"{where}: its images are {[channels, *size]}, asked for {asked}; only 8-bit ones are converted"
        )
    from fastunlearn.inputs.images import converted

    return torch.stack([converted(image, options) for image in values])


def _is_whole(values: Tensor) -> bool:
    return not values.is_floating_point() and values.dtype != torch.bool


def _eight_bits(values: Tensor, options: DataOptions, where: str) -> Tensor:
    """Images in wider integers as uint8, so that they are the same images; others need to be told their ``scale``."""
    low, high = int(values.min()), int(values.max())
    if 0 <= low and high <= 255:
        return values.to(torch.uint8)
    if options.scale is None:
        raise ValueError(f"{where} has images of integers from {low} to {high}; give scale, by which they are divided")
    return values


def _along_first(numbers: tuple[float, ...], x: Tensor) -> Tensor:
    """[k] shaped to broadcast along the first axis of a sample of ``x`` [b, k, ...]."""
    return torch.tensor(numbers).reshape(-1, *(1,) * max(0, x.dim() - 2))


def _tuple(numbers: float | tuple[float, ...] | None) -> tuple[float, ...] | None:
    return (numbers,) if isinstance(numbers, (int, float)) else numbers


def _for_model(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() or x.dtype == torch.bool else x.long()
