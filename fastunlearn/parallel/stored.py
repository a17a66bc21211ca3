"""Tensors in files, of which any box can be read without the rest: safetensors and torch.distributed.checkpoint."""

from __future__ import annotations

import math
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from ..checkpoint import (
    DTYPES,
    UNREADABLE,
    WRAPPERS,
    first_line,
    is_plain_name,
    load_weights,
    require_listed,
    shards_of,
    weights_file,
    without_prefixes,
)

METADATA = ".metadata"  # what torch.distributed.checkpoint's folders are known by

# Everything that torch.distributed.checkpoint puts into its metadata; a pickle could name any function instead.
CLASSES = {
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
            "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"),
    ("pathlib", "Path"), ("pathlib", "PosixPath"), ("pathlib._local", "PosixPath"),
}  # fmt: skip


@dataclass(frozen=True)
class Box:
    """A part of a tensor: from ``offsets`` on, ``sizes`` entries along each axis."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        return cls((0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    def slices(self, origin: Box | None = None) -> tuple[slice, ...]:
        """What takes the box out of the whole tensor, or out of another box that holds it."""
        starts = origin.offsets if origin else (0,) * len(self.offsets)
        return tuple(slice(a - o, a - o + n) for a, o, n in zip(self.offsets, starts, self.sizes, strict=True))

    def cut(self, other: Box) -> Box:
        """What both share; ``numel`` is 0 when that is nothing."""
        starts = tuple(max(a, b) for a, b in zip(self.offsets, other.offsets, strict=True))
        ends = (
            min(a + n, b + m) for a, n, b, m in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        )
        return Box(starts, tuple(max(0, end - start) for start, end in zip(starts, ends, strict=True)))


@dataclass(frozen=True)
class Stored:
    """A tensor in a file. ``read`` gives a box of it on the CPU, in the file's type, until the file changes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[Box], Tensor]


def open_stored(path: str | Path) -> dict[str, Stored]:
    """The tensors of a checkpoint by name, none of them read yet; no code in it is run.

    Reads what :func:`fastunlearn.checkpoint.load_weights` reads, with the same names, and folders of
    torch.distributed.checkpoint. Of safetensors and torch's zip files a box costs only its own bytes; of
    torch.distributed.checkpoint the pieces, as they were saved, that it lies in. Raises as ``load_weights`` does.
    """
    path = Path(path)
    if (path / METADATA).is_file():
        return _open_distributed(path)
    file = weights_file(path)
    if file.name.endswith(".index.json"):
        stored: dict[str, Stored] = {}
        for shard, names in shards_of(file).items():
            part = _open_file(shard)
            require_listed(part, names, shard, file)
            stored |= part
    else:
        stored = _open_file(file)
    return without_prefixes(stored)


def _open_file(file: Path) -> dict[str, Stored]:
    if file.suffix != ".safetensors":
        return {key: Stored(t.dtype, tuple(t.shape), _reader(t)) for key, t in load_weights(file, mmap=True).items()}
    types = {name: dtype for dtype, name in DTYPES.items()}
    stored = {}
    with _safetensors(file) as content:
        for key in content.keys():
            found = content.get_slice(key)
            if found.get_dtype() not in types:
                raise ValueError(f"{file}: {key} is {found.get_dtype()}, which torch has no type for")
            stored[key] = Stored(types[found.get_dtype()], tuple(found.get_shape()), _slice_reader(file, key))
    if not stored:
        raise ValueError(f"{file}: an empty dictionary, without weights")
    return stored


@contextmanager
def _safetensors(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as content:
            yield content
    except SafetensorError as error:
        raise ValueError(f"{file}: not a safetensors file, or only part of one ({first_line(error)})") from error


def _reader(tensor: Tensor) -> Callable[[Box], Tensor]:
    return lambda box: tensor[box.slices()]


def _slice_reader(file: Path, key: str) -> Callable[[Box], Tensor]:
    def read(box: Box) -> Tensor:
        # Opened anew each time: the pages that were read stay mapped, and count as memory, as long as the file is.
        with _safetensors(file) as content:
            found: Tensor = content.get_slice(key)[box.slices()]
        return found

    return read


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in CLASSES or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


class _Into(DefaultLoadPlanner):
    """Where FileSystemReader puts what it reads: a tensor that holds one box."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        start = [slice(a, a + n) for a, n in zip(read_item.dest_offsets, read_item.lengths, strict=True)]
        return self.target[tuple(start)]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


def _open_distributed(folder: Path) -> dict[str, Stored]:
    try:
        with open(folder / METADATA, "rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except UNREADABLE as error:
        raise ValueError(
            f"{folder / METADATA}: refused, not what torch.distributed.checkpoint writes ({first_line(error)})"
        ) from error
    if not isinstance(metadata, Metadata) or metadata.storage_data is None:
        raise ValueError(f"{folder / METADATA}: not the metadata of a torch.distributed.checkpoint folder")
    for info in metadata.storage_data.values():
        if not is_plain_name(info.relative_path):
            raise ValueError(
                f"{folder / METADATA}: names the file {info.relative_path!r}; pieces lie in the same folder"
            )
    reader = FileSystemReader(folder)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    found = {
        key: value for key, value in metadata.state_dict_metadata.items() if isinstance(value, TensorStorageMetadata)
    }
    paths = {key: tuple(map(str, (metadata.planner_data or {}).get(key, (key,)))) for key in found}
    inside = sorted({path[0] for path in paths.values() if len(path) > 1 and path[0] in WRAPPERS})
    if len(inside) > 1:
        raise ValueError(f"{folder}: has weights under {' and '.join(map(repr, inside))}; save the ones that are meant")
    names = {key: key for key in found}
    if inside:  # a training checkpoint: {"model": {...}, "optimizer": {...}}, which is kept flat
        names = {key: ".".join(path[1:]) for key, path in paths.items() if len(path) > 1 and path[0] == inside[0]}
    if not names:
        raise ValueError(f"{folder}: a checkpoint without weights")
    return without_prefixes(
        {
            name: Stored(
                found[key].properties.dtype,
                tuple(found[key].size),
                _distributed_reader(reader, key, found[key], folder),
            )
            for key, name in names.items()
        }
    )


def _distributed_reader(
    reader: FileSystemReader, key: str, metadata: TensorStorageMetadata, folder: Path
) -> Callable[[Box], Tensor]:
    def read(box: Box) -> Tensor:
        target = torch.empty(box.sizes, dtype=metadata.properties.dtype)
        here = ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))
        items = create_read_items_for_chunk_list(key, metadata, [here])
        if sum(math.prod(item.lengths) for item in items) != box.numel:
            raise ValueError(f"{folder}: the pieces of {key} do not make up the tensor")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # about TypedStorage
                reader.read_data(LoadPlan(items), _Into(target)).wait()
        except FileNotFoundError:
            raise
        except UNREADABLE as error:
            raise ValueError(f"{folder}: {key} cannot be read, a file is damaged ({first_line(error)})") from error
        return target

    return read
