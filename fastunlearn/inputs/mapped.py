"""Data sets of the user's own code: anything with ``__len__`` and ``__getitem__``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastunlearn.inputs import arrays, images, places
from fastunlearn.inputs.options import DataOptions
from fastunlearn.inputs.samples import Reading, Samples, assembled, refuse


@dataclass(frozen=True, eq=False)
class Mapped:
    """Inputs [n, ...] that are asked of a data set again whenever they are needed."""

    read: Callable[[int], tuple[Tensor, Any]]
    count: int
    options: DataOptions
    where: str

    def __len__(self) -> int:
        return self.count

    def take(self, indices: Tensor) -> Tensor:
        return self._held(indices.tolist()).take(torch.arange(len(indices)))

    def hashes(self) -> Iterator[bytes]:
        return (digest for index in range(self.count) for digest in self._held([index]).hashes())

    def _held(self, indices: Sequence[int]) -> arrays.Held:
        return arrays.held(torch.stack([self.read(index)[0] for index in indices]), self.options, self.where)


def open_mapped(reading: Reading, dataset: Any) -> Samples:
    """Samples from a map-style torch Dataset of (input, label) pairs or of dicts with ``labels``.

    All samples are read at once; the inputs are kept where they fit into ``images.HELD`` bytes, so that a data set
    which augments at random gives what it gave then. Beyond, and for no other reason, they are asked for again. Pillow
    images become uint8 [C, H, W]. Names of classes are taken from an attribute ``classes``, as torchvision has it.
    Raises ValueError naming ``spec`` and the first sample that raises or differs from the first in shape or type.
    """
    where = repr(reading.spec)
    with places.blaming(f"{where}: len of its {type(dataset).__name__}"):
        count = len(dataset)
    if not count:
        raise ValueError(f"{where} is empty: its {type(dataset).__name__} has no sample")
    first = _item(dataset, 0, reading.spec)
    if isinstance(first, Mapping):
        return _of_dicts(reading, dataset, count)
    refuse(reading, ("text_length",), "is for text")
    pairs = Pairs(dataset, reading)
    one, _ = pairs(0)
    keep = one.numel() * one.element_size() * count <= images.HELD
    kept, labels = [], []
    for index in range(count):
        values, label = pairs(index)
        if values.shape != one.shape or values.dtype != one.dtype:
            raise ValueError(
                f"{where}: sample {index} is {values.dtype} {list(values.shape)}, sample 0 is {one.dtype} "
                f"{list(one.shape)}; all must be alike"
            )
        if keep:
            kept.append(values)
        else:
            arrays.held(values.unsqueeze(0), reading.options, f"{where}: sample {index}")
        labels.append(label)
    targets, classes = _labels(reading, dataset, labels)
    at = f"{where}: the inputs"
    if keep:
        inputs: arrays.Inputs = arrays.held(torch.stack(kept), reading.options, at)
    else:
        inputs = Mapped(pairs, count, reading.options, at)
    return Samples(inputs, targets, arrays.rows(count), classes, reading.spec)


@dataclass(frozen=True)
class Pairs:
    """Samples of ``dataset`` as a tensor and a label."""

    dataset: Any
    reading: Reading

    def __call__(self, index: int) -> tuple[Tensor, Any]:
        item = _item(self.dataset, index, self.reading.spec)
        where = f"{self.reading.spec!r}: sample {index}"
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise ValueError(f"{where} is a {type(item).__name__}, expected a pair (input, label)")
        value, label = item
        if hasattr(value, "mode") and hasattr(value, "convert"):  # a Pillow image, without importing Pillow
            with places.blaming(f"{where}: its conversion"):
                return images.from_image(value, self.reading.options), label
        return arrays.as_tensor(value, where), label


def _item(dataset: Any, index: int, spec: str) -> Any:
    with places.importable(spec), places.blaming(f"{spec!r}: sample {index} of its {type(dataset).__name__}"):
        return dataset[index]


def _of_dicts(reading: Reading, dataset: Any, count: int) -> Samples:
    where = repr(reading.spec)
    columns: dict[str, list[Tensor]] = {}
    for index in range(count):
        item = _item(dataset, index, reading.spec)
        names = sorted(item) if isinstance(item, Mapping) else []
        if "labels" not in names:
            raise ValueError(
                f"{where}: sample {index} has {', '.join(names) or 'no names'}, expected 'labels' among them"
            )
        columns = columns or {name: [] for name in names}
        if names != list(columns):
            raise ValueError(f"{where}: sample {index} has {', '.join(names)}, sample 0 has {', '.join(columns)}")
        for name, parts in columns.items():
            value = arrays.as_tensor(item[name], f"{where}: {name!r} of sample {index}")
            if parts and (value.shape, value.dtype) != (parts[0].shape, parts[0].dtype):
                raise ValueError(f"{where}: {name!r} of sample {index} is {value.dtype} {list(value.shape)}, of 0 "
                                 f"{parts[0].dtype} {list(parts[0].shape)}; all must be alike")  # fmt: skip
            parts.append(value)
    stacked = {name: torch.stack(parts) for name, parts in columns.items()}
    labels = stacked.pop("labels")
    return assembled(reading, stacked, labels, None, f"{where}: the inputs", f"{where}: 'labels'")


def _labels(reading: Reading, dataset: Any, labels: Sequence[Any]) -> tuple[Tensor, list[str] | None]:
    where = f"{reading.spec!r}: the labels"
    if all(isinstance(label, str) for label in labels):
        return arrays.labels_from(list(labels), where, reading.classes)
    kinds = {isinstance(label, str) for label in labels}
    if len(kinds) > 1:
        row = next(row for row, label in enumerate(labels) if isinstance(label, str) != isinstance(labels[0], str))
        raise ValueError(f"{where}: sample {row} is {labels[row]!r}, sample 0 is {labels[0]!r}; expected one kind")
    numbers = np.array(
        [label.item() if isinstance(label, Tensor) and label.numel() == 1 else label for label in labels]
    )
    names = getattr(dataset, "classes", None)
    if not (isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names)):
        return arrays.labels_from(numbers, where, reading.classes)
    known = [str(name) for name in names]
    checked, _ = arrays.labels_from(numbers, where, known)
    return arrays.labels_from([known[label] for label in checked.tolist()], where, reading.classes or known)
