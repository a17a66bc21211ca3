"""Data sets of any format as one thing: samples that are numbered, named, labelled and given out in batches."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastunlearn.inputs import arrays, places
from fastunlearn.inputs.options import INPUT_NAMES, TARGET_NAMES, DataOptions


@dataclass(frozen=True, eq=False)
class Samples:
    """n samples, the same whenever they are asked for.

    inputs : in memory or read when asked for; see :meth:`batch`.
    labels : int64 [n]; classes from 0.
    ids : n different names: the path within a folder or archive, the ``id`` column, or the row as a decimal number.
    classes : names of the classes, where the data has them.
    source : where it was read from, as the user wrote it.
    """

    inputs: arrays.Inputs
    labels: Tensor
    ids: list[str]
    classes: list[str] | None
    source: str

    def __post_init__(self) -> None:
        if not len(self.inputs) == len(self.labels) == len(self.ids):
            raise ValueError(
                f"{self.source!r}: {len(self.inputs)} inputs, {len(self.labels)} targets and {len(self.ids)} ids; "
                "expected as many of each"
            )
        if not self.ids:
            raise ValueError(f"{self.source!r} is empty: it has no sample")
        if len(set(self.ids)) < len(self.ids):
            twice = next(name for name, times in Counter(self.ids).items() if times > 1)
            raise ValueError(f"{self.source!r}: the id {twice!r} is there twice; ids must tell samples apart")

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, indices: Tensor) -> Any:
        """The samples of ``indices`` (int64 [b], CPU): (inputs [b, ...], targets [b]), or a dict with ``labels``.

        Floats are float32 after ``scale``, ``mean`` and ``std``; token ids are int64. Raises ValueError naming the
        sample that can not be read.
        """
        inputs = self.inputs.take(indices)
        if not isinstance(inputs, Tensor):
            return {**inputs, "labels": inputs.get("labels", self.labels[indices])}
        return inputs, self.labels[indices]

    def signature(self) -> dict[str, Any]:
        """Of one input: ``{"shape": [3, 32, 32], "dtype": "float32"}``, or such by name where there are several."""
        one = self.inputs.take(torch.zeros(1, dtype=torch.int64))
        if isinstance(one, Tensor):
            return _signature(one)
        return {name: _signature(value) for name, value in one.items()}

    def digest(self) -> str:
        """SHA-256 in hexadecimal of the ids, labels, names of the classes and inputs, as they came.

        It does not depend on times, on ``options``, nor on whether images lie in a folder or in an archive; only of
        the Pillow images that a Dataset makes, it takes what they were turned into. The first call may read all again.
        """
        return self._digest

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256(b"fastunlearn samples 1\0")
        for name, label, content in zip(self.ids, self.labels.tolist(), self.inputs.hashes(), strict=True):
            for part in (name, str(label) if self.classes is None else self.classes[label]):
                digest.update(len(part.encode()).to_bytes(8, "little") + part.encode())
            digest.update(content)
        return digest.hexdigest()


@dataclass(eq=False)
class Loader:
    """Batches of the samples of ``indices`` (int64 [m]), as torch's DataLoader yields them in one process.

    It can be iterated any number of times. With ``shuffle`` every epoch has an order of its own, which depends on
    ``seed`` and ``epoch`` alone: set ``epoch`` to continue where an interrupted run was. The last batch may be smaller.
    Batches are on ``device``, the CPU by default. Raises ValueError for a batch size below 1, for no indices, and for
    indices outside the samples.
    """

    samples: Samples
    indices: Tensor
    batch_size: int
    shuffle: bool = False
    seed: int = 0
    device: torch.device | str | None = None
    epoch: int = 0  # the number of the next iteration over all batches

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {self.batch_size}")
        self.indices = torch.as_tensor(self.indices, dtype=torch.int64).cpu()
        if not len(self.indices):
            raise ValueError(f"no samples of {self.samples.source!r} were chosen to be loaded")
        low, high = int(self.indices.min()), int(self.indices.max())
        if low < 0 or high >= len(self.samples):
            wrong = low if low < 0 else high
            raise ValueError(f"index {wrong} is outside the {len(self.samples)} samples of {self.samples.source!r}")

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        order, self.epoch = self.order(self.epoch), self.epoch + 1
        parts = (order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size))
        return (_moved(self.samples.batch(part), self.device) for part in parts)

    def order(self, epoch: int) -> Tensor:
        """The indices in the order of epoch ``epoch``."""
        if not self.shuffle:
            return self.indices
        mixed = hashlib.sha256(f"{self.seed} {epoch}".encode()).digest()  # neighbouring seeds share no epoch
        generator = torch.Generator().manual_seed(int.from_bytes(mixed[:8], "little") >> 1)
        return self.indices[torch.randperm(len(self.indices), generator=generator)]


def open_samples(
    spec: str, *, options: DataOptions | None = None, tokenizer: Any = None, classes: Sequence[str] | None = None
) -> Samples:
    """Open a data set of any known format.

    ``spec`` is a folder of class folders of images, or such a folder in a .zip, .tar, .tar.gz or .tar.xz archive
    (``archive.tar.xz::train`` for a folder within); a .txt file or a folder of them; an .npz, .safetensors, .csv,
    .parquet or .jsonl file; a folder of Hugging Face ``datasets`` (``folder::train`` for a split); or
    ``package.module:function`` or ``path/to/file.py:function``, called without arguments, which returns (inputs,
    targets), a map-style torch Dataset or :class:`Samples`. ``tokenizer`` turns texts into token ids. ``classes`` are
    the names known from another set, so that a class has the same number here.

    Raises FileNotFoundError, ValueError or, where a package is missing, ImportError; each of one line that names the
    file, the array or column, and the first row that is wrong.
    """
    options = options or DataOptions()
    path, _, inner = spec.partition("::")
    if not Path(path).exists():
        if places.names_code(spec):
            return _from_code(spec, options, tokenizer, classes)
        raise FileNotFoundError(f"{spec!r}: there is no such file or folder; {KNOWN}")
    opener = _opener(Path(path))
    if opener is None:
        raise ValueError(f"{spec!r} is of no known format; {KNOWN}")
    reading = Reading(spec, Path(path), inner, options, tokenizer, None if classes is None else list(classes))
    if options.text_split is not None:
        from fastunlearn.inputs import texts

        if opener not in (texts.open_text, texts.open_text_folder):
            refuse(reading, ("text_split",), "is for text files")
    return opener(reading)


OF_NUMBERS = ("image_size", "channels", "mean", "std", "scale")
OF_COLUMNS = ("inputs", "targets", "columns", "id")
KNOWN = (
    "known are a folder of class folders of images (also in .zip, .tar, .tar.gz, .tar.xz), .txt and folders of it, "
    ".npz, .safetensors, .csv, .parquet, .jsonl, a Hugging Face datasets folder, package.module:function and "
    "file.py:function"
)


@dataclass(frozen=True)
class Reading:
    """What an opener is given."""

    spec: str
    path: Path
    inner: str
    options: DataOptions
    tokenizer: Any
    classes: list[str] | None


def from_parts(reading: Reading, parts: Mapping[str, Any]) -> Samples:
    """Samples from arrays by name: inputs, targets and ids are found by ``options`` or by the default names."""
    where = repr(reading.spec)
    options = reading.options
    refuse(reading, ("columns",), "is for tables")
    if reading.inner:
        raise ValueError(f"{reading.spec!r}: only archives and Hugging Face datasets have a part {reading.inner!r}")
    x = found(parts, options.inputs, INPUT_NAMES, "inputs", where)
    y = found(parts, options.targets, TARGET_NAMES, "targets", where)
    if options.id is not None and options.id not in parts:
        raise ValueError(f"{where} has no {options.id!r} (option id); it has {listed(parts)}")
    ids = None if options.id is None else arrays.ids_from(parts[options.id], f"{where}: {options.id!r}")
    return assembled(reading, parts[x], parts[y], ids, f"{where}: {x!r}", f"{where}: {y!r}")


def assembled(
    reading: Reading, inputs: Any, targets: Any, ids: list[str] | None, inputs_at: str, targets_at: str
) -> Samples:
    """Samples from inputs (array, text, or a mapping of arrays) and targets, named in messages by the last two."""
    labels, classes = arrays.labels_from(targets, targets_at, reading.classes)
    kept: arrays.Inputs
    if isinstance(inputs, Mapping):
        refuse(reading, (*OF_NUMBERS, "text_length"), "is not for inputs by name")
        if "labels" in inputs:
            raise ValueError(f"{inputs_at}: 'labels' are no input; {targets_at} are what labels are taken from")
        kept = arrays.named(inputs, inputs_at)
    elif arrays.is_text(inputs):
        from fastunlearn.inputs.tables import tokenized

        kept = tokenized(list(inputs), reading, inputs_at)
    else:
        refuse(reading, ("text_length",), "is for text")
        kept = arrays.held(inputs, reading.options, inputs_at)
    if len(kept) != len(labels):
        raise ValueError(f"{inputs_at} has {len(kept)} samples, {targets_at} has {len(labels)}; expected as many")
    return Samples(kept, labels, ids or arrays.rows(len(labels)), classes, reading.spec)


def refuse(reading: Reading, names: Sequence[str], reason: str) -> None:
    """Raise ValueError for the first option of ``names`` that was given: it would be passed over in silence."""
    for name in names:
        if getattr(reading.options, name) is not None:
            raise ValueError(f"{reading.spec!r}: the option {name} {reason}")


def found(parts: Mapping[str, Any], asked: str | None, names: Sequence[str], option: str, where: str) -> str:
    """The name of the array or column for ``option``; raises ValueError listing what is there."""
    if asked is not None:
        if asked not in parts:
            raise ValueError(f"{where} has no {asked!r} (option {option}); it has {listed(parts)}")
        return asked
    for name in names:
        if name in parts:
            return name
    raise ValueError(
        f"{where} has none of {', '.join(names)}; it has {listed(parts)}: name one with the option {option}"
    )


def listed(parts: Mapping[str, Any], most: int = 10) -> str:
    names = [repr(str(name)) for name in parts]
    return (", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")) or "nothing"


def _opener(path: Path) -> Callable[[Reading], Samples] | None:
    name = path.name.lower()
    if path.is_dir():
        from fastunlearn.inputs import images, tables, texts

        if tables.is_hugging_face(path):
            return tables.open_hugging_face
        return texts.open_text_folder if texts.is_text_folder(path) else images.open_folder
    if name.endswith(".txt"):
        from fastunlearn.inputs import texts

        return texts.open_text
    if name.endswith((".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz")):
        from fastunlearn.inputs import images

        return images.open_archive
    if name.endswith((".csv", ".parquet", ".jsonl")):
        from fastunlearn.inputs import tables

        return tables.open_table
    return {".npz": _open_npz, ".safetensors": _open_safetensors}.get(path.suffix.lower())


def _open_npz(reading: Reading) -> Samples:
    try:
        file = np.load(reading.path, allow_pickle=False)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{reading.spec!r} can not be read as .npz: {places.one_line(error)}") from error
    if isinstance(file, np.ndarray):
        raise ValueError(f"{reading.spec!r} holds one array without a name, expected .npz with inputs and targets")
    with file:
        names = list(file.files)
        parts = {name: _array(file, name, repr(reading.spec)) if _is_wanted(name, names, reading.options) else None
                 for name in names}  # fmt: skip
    return from_parts(reading, parts)


def _array(file: Any, name: str, where: str) -> Any:
    try:
        return file[name]
    except ValueError as error:
        if "Object arrays" in str(error):
            raise ValueError(f"{where}: {name!r} is an array of objects; save numbers or text, not objects") from error
        raise ValueError(f"{where}: {name!r} can not be read: {places.one_line(error)}") from error
    except (OSError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{where}: {name!r} can not be read: {places.one_line(error)}") from error


def _is_wanted(name: str, names: Sequence[str], options: DataOptions) -> bool:
    """Only these arrays are read: others may be of any kind and size."""
    x = options.inputs or next((n for n in INPUT_NAMES if n in names), None)
    y = options.targets or next((n for n in TARGET_NAMES if n in names), None)
    return name in (x, y, options.id)


def _open_safetensors(reading: Reading) -> Samples:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(reading.path), framework="pt") as file:
            names = list(file.keys())
            wanted = [name for name in names if _is_wanted(name, names, reading.options)]
            parts = dict.fromkeys(names) | {name: file.get_tensor(name) for name in wanted}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{reading.spec!r} can not be read as .safetensors: {places.one_line(error)}") from error
    return from_parts(reading, parts)


def _from_code(spec: str, options: DataOptions, tokenizer: Any, classes: Sequence[str] | None) -> Samples:
    function = places.find(spec)
    if not callable(function):
        raise ValueError(f"{spec!r} is a {type(function).__name__}, expected a function that returns the data")
    reading = Reading(spec, Path(), "", options, tokenizer, None if classes is None else list(classes))
    refuse(reading, OF_COLUMNS, "is for tables and arrays with names, not for a function")
    refuse(reading, ("text_split",), "is for text files")
    data = places.call(spec, function)
    if isinstance(data, Samples):
        refuse(reading, (*OF_NUMBERS, "text_length"), "is for the function to apply: it returned Samples")
        return data
    if isinstance(data, tuple) and len(data) == 2:
        return assembled(reading, data[0], data[1], None, f"{spec!r}: the inputs", f"{spec!r}: the targets")
    if not isinstance(data, (tuple, str)) and hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        from fastunlearn.inputs.mapped import open_mapped

        return open_mapped(reading, data)
    raise ValueError(
        f"{spec!r} returned a {type(data).__name__}, expected (inputs, targets), a map-style Dataset or Samples"
    )


def _signature(value: Tensor) -> dict[str, Any]:
    return {"shape": list(value.shape[1:]), "dtype": str(value.dtype).removeprefix("torch.")}


def _moved(batch: Any, device: torch.device | str | None) -> Any:
    if device is None:
        return batch
    if isinstance(batch, dict):
        return {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    return tuple(value.to(device, non_blocking=True) for value in batch)
