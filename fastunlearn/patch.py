"""The changed weights of a model and nothing else, to carry an unlearning to deployed copies.

A patch is a safetensors file. Its metadata are texts:

=============  ========================================================================================
``format``     ``fastunlearn patch``
``version``    ``1``
``before``     :func:`fastunlearn.checkpoint.digest` of the weights that it applies to
``after``      the digest of the weights that it makes of them
``tensors``    JSON: for each changed tensor its ``dtype``, ``shape``, ``count`` (entries changed), ``positions`` and
               ``values`` (the encodings)
=============  ========================================================================================

and for each changed tensor it holds two one-dimensional uint8 tensors:

``<name>/positions``
    Which entries, counted in row-major order, as zlib data; ``mask``: one bit for every entry, lowest bit first,
    filled with zeros to whole bytes; ``delta1``, ``delta2``, ``delta4``, ``delta8``: the first position and then the
    distance of each to the one before, as unsigned little-endian integers of that many bytes. The smaller is stored.
``<name>/values``
    The new values of these entries in the same order, little-endian. ``raw``: as they are; ``shuffled``: zlib data of
    the first bytes of all values, then the second bytes, and so on, where that is smaller.

Old values are never stored, nor what they could be had from together with the new ones (difference, XOR): whoever has
the patched model and the patch has nothing of the old model. Entries are compared bit by bit, so that -0.0, NaN and
their payloads arrive as they are.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .checkpoint import State, digest, dtype_name, load_weights, raw_bytes, save_weights, write_safetensors
from .files import replacing

FORMAT = "fastunlearn patch"
VERSION = "1"
DELTAS = {"delta1": "<u1", "delta2": "<u2", "delta4": "<u4", "delta8": "<u8"}
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Change:
    """The new values of one tensor, still encoded as the module describes.

    Attributes:
        dtype: of the tensor, such as ``float32``.
        shape: of the tensor.
        count: entries changed.
        positions_as, values_as: the encodings.
        positions, values: the encoded bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    count: int
    positions_as: str
    values_as: str
    positions: bytes
    values: bytes


@dataclass(frozen=True)
class Patch:
    """What a patch file holds: digests of the weights before and after, and the changes by name."""

    before: str
    after: str
    changes: Mapping[str, Change]

    @property
    def changed(self) -> dict[str, int]:
        """Weights changed, per name."""
        return {name: change.count for name, change in self.changes.items()}


def changed_entries(before: Tensor, after: Tensor) -> npt.NDArray[np.bool_]:
    """Which entries, in row-major order, differ in any bit; shape [numel]. Both of one shape and dtype."""
    kind = f"<u{min(before.element_size(), 8)}"
    parts = -(-before.element_size() // 8)
    words = [np.frombuffer(raw_bytes(t), kind).reshape(-1, parts) for t in (before, after)]
    return np.asarray((words[0] != words[1]).any(1))


def count_changes(before: State, after: State) -> dict[str, dict[str, int]]:
    """For every weight, in the order of ``after``: ``changed``, the entries that differ in any bit, ``of`` how many.

    Raises ValueError when the names, shapes or types differ.
    """
    _require_alike(before, after)
    return {
        name: {"changed": int(changed_entries(before[name], tensor).sum()), "of": tensor.numel()}
        for name, tensor in after.items()
    }


def write_patch(path: str | Path, before: State, after: State) -> Patch:
    """Write what turns ``before`` into ``after``; whole or not at all. Reads both three times at most.

    Raises ValueError when the names, shapes or types differ, or ``path`` does not end in ``.safetensors``.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: a patch is a safetensors file; name it *.safetensors")
    _require_alike(before, after)
    changes = {}
    for name in sorted(after):
        positions = np.flatnonzero(changed_entries(before[name], after[name]))
        if len(positions):
            changes[name] = _encoded(after[name], positions)
    patch = Patch(digest(before), digest(after), changes)
    table = {
        name: {"dtype": c.dtype, "shape": c.shape, "count": c.count, "positions": c.positions_as, "values": c.values_as}
        for name, c in changes.items()
    }
    metadata = {"format": FORMAT, "version": VERSION, "before": patch.before, "after": patch.after}
    metadata["tensors"] = json.dumps(table, separators=(",", ":"))
    tensors = {}
    for name, change in changes.items():
        for part in ("positions", "values"):
            tensors[f"{name}/{part}"] = torch.frombuffer(bytearray(getattr(change, part)), dtype=torch.uint8)
    with replacing(path) as file:
        write_safetensors(file, tensors, metadata)
    return patch


def read_patch(path: str | Path) -> Patch:
    """The patch in a file, nothing of it decoded yet.

    Raises OSError when the file cannot be read, ValueError when it is damaged, no patch, or of a version unknown here.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a patch")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path}: not a safetensors file, or only part of one ({error})") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: a safetensors file, but not a patch that fastunlearn wrote")
    if metadata.get("version") != VERSION:
        raise ValueError(f"{path}: a patch of version {metadata.get('version')}; this fastunlearn reads {VERSION}")
    for side in ("before", "after"):
        if not re.fullmatch(r"[0-9a-f]{64}", metadata.get(side, "")):
            raise ValueError(f"{path}: '{side}' is not a SHA-256 in hexadecimal")
    try:
        table = json.loads(metadata.get("tensors", ""))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: 'tensors' is not JSON ({error})") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path}: 'tensors' is not a dictionary")
    expected = {f"{name}/{part}" for name in table for part in ("positions", "values")}
    if expected != tensors.keys():
        raise ValueError(f"{path}: its table and its tensors differ in {min(expected ^ tensors.keys())}")
    changes = {name: _change(name, entry, tensors, path) for name, entry in table.items()}
    return Patch(metadata["before"], metadata["after"], changes)


def apply_patch(weights: str | Path, patch: str | Path, out: str | Path) -> Patch:
    """Write the patched ``weights`` to ``out``, which may be the same file; whole or not at all.

    ``weights`` is anything :func:`fastunlearn.checkpoint.load_weights` reads, ``out`` a file whose suffix says the
    format; of a training checkpoint the weights alone are written. The digest is checked before and after.

    Raises ValueError, and writes nothing, when the model is not the one the patch was made for (the message names both
    digests), has the patch already, or the patch is damaged. What a patch unpacks to is bounded by the size of the
    weights.
    """
    weights, path = Path(weights), Path(patch)
    found = read_patch(path)
    state = load_weights(weights)
    have = digest(state)
    if have == found.after != found.before:
        raise ValueError(f"{weights}: {path.name} was applied already (digest {have})")
    if have != found.before:
        raise ValueError(f"{weights}: has the digest {have}, but {path.name} is for the model {found.before}")
    for name, change in found.changes.items():
        if name not in state:
            raise ValueError(f"{path}: changes {name}, which {weights} does not have")
        state[name] = _patched(state[name], change, f"{path}: {name}")
    if digest(state) != found.after:
        raise ValueError(f"{path}: damaged; the weights it leads to have the digest {digest(state)}, not {found.after}")
    save_weights(out, state, like=weights)
    return found


def _require_alike(before: State, after: State) -> None:
    if different := sorted(before.keys() ^ after.keys()):
        raise ValueError(f"the weights before and after must have the same names; only one of them has {different[0]}")
    for name, old in before.items():
        new = after[name]
        if old.shape != new.shape or old.dtype != new.dtype:
            raise ValueError(
                f"{name} is {dtype_name(old.dtype)} {list(old.shape)} before and {dtype_name(new.dtype)} "
                f"{list(new.shape)} after; a patch keeps types and shapes"
            )


def _encoded(tensor: Tensor, positions: npt.NDArray[np.int64]) -> Change:
    mask = np.zeros(tensor.numel(), bool)
    mask[positions] = True
    deltas = np.diff(positions, prepend=0)
    width = next(w for w in (1, 2, 4, 8) if int(deltas.max()) < 1 << (8 * w))
    choices = {
        "mask": zlib.compress(np.packbits(mask, bitorder="little").tobytes()),
        f"delta{width}": zlib.compress(deltas.astype(f"<u{width}").tobytes()),
    }
    positions_as = min(choices, key=lambda name: len(choices[name]))
    raw = np.frombuffer(raw_bytes(tensor), np.uint8).reshape(tensor.numel(), -1)[positions]
    values = {"raw": raw.tobytes(), "shuffled": zlib.compress(np.ascontiguousarray(raw.T).tobytes())}
    values_as = min(values, key=lambda name: len(values[name]))
    return Change(
        dtype_name(tensor.dtype), tuple(tensor.shape), len(positions),
        positions_as, values_as, choices[positions_as], values[values_as],
    )  # fmt: skip


def _change(name: str, entry: Any, tensors: Mapping[str, Tensor], path: Path) -> Change:
    """A line of the table with its tensors, checked as far as that goes without the model."""
    fields = {"dtype", "shape", "count", "positions", "values"}
    if not isinstance(entry, dict) or entry.keys() != fields:
        raise ValueError(f"{path}: {name}: expected the fields {', '.join(sorted(fields))}")
    shape, count = entry["shape"], entry["count"]
    sizes = [*shape, count] if isinstance(shape, list) else [None]
    if not all(isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 1 << 63 for size in sizes):
        raise ValueError(f"{path}: {name}: shape and count must be integers of 0 or more")
    if not 1 <= count <= math.prod(shape):
        raise ValueError(f"{path}: {name}: changes {count} of {math.prod(shape)} entries")
    if entry["positions"] not in ("mask", *DELTAS) or entry["values"] not in ("raw", "shuffled"):
        raise ValueError(f"{path}: {name}: unknown encoding {entry['positions']!r} or {entry['values']!r}")
    parts = [tensors[f"{name}/{part}"] for part in ("positions", "values")]
    if any(part.dtype != torch.uint8 or part.dim() != 1 for part in parts):
        raise ValueError(f"{path}: {name}: positions and values must be one-dimensional uint8 tensors")
    positions, values = (bytes(raw_bytes(part)) for part in parts)
    return Change(str(entry["dtype"]), tuple(shape), count, entry["positions"], entry["values"], positions, values)


def _patched(tensor: Tensor, change: Change, what: str) -> Tensor:
    if dtype_name(tensor.dtype) != change.dtype or tuple(tensor.shape) != change.shape:
        raise ValueError(
            f"{what} is {change.dtype} {list(change.shape)} in the patch, but {dtype_name(tensor.dtype)} "
            f"{list(tensor.shape)} in the model"
        )
    size = tensor.element_size()
    positions = _positions(change, what)
    if change.values_as == "shuffled":
        values = _unpacked(change.values, change.count * size, what).reshape(size, change.count).T
    elif len(change.values) != change.count * size:
        raise ValueError(f"{what}: damaged, {len(change.values)} bytes are not {change.count} values of {size} bytes")
    else:
        values = np.frombuffer(change.values, np.uint8).reshape(change.count, size)
    entries: Bytes = np.frombuffer(raw_bytes(tensor), np.uint8).reshape(-1, size).copy()
    entries[positions] = values
    return torch.from_numpy(entries.reshape(-1)).view(tensor.dtype).reshape(tensor.shape)


def _positions(change: Change, what: str) -> npt.NDArray[np.int64]:
    numel = math.prod(change.shape)
    if change.positions_as == "mask":
        packed = _unpacked(change.positions, -(-numel // 8), what)
        bits = np.unpackbits(packed, bitorder="little")
        if int(bits.sum()) != change.count or bits[numel:].any():
            raise ValueError(f"{what}: damaged, its mask does not mark {change.count} of {numel} entries")
        return np.flatnonzero(bits)
    kind = np.dtype(DELTAS[change.positions_as])
    deltas = _unpacked(change.positions, change.count * kind.itemsize, what).view(kind)
    found = np.cumsum(deltas, dtype=np.uint64)  # one that runs over comes out smaller than the one before
    if (found[1:] <= found[:-1]).any() or int(found[-1]) >= numel:
        raise ValueError(f"{what}: damaged, its positions do not rise or exceed {numel} entries")
    return found.astype(np.int64)


def _unpacked(data: bytes, size: int, what: str) -> Bytes:
    """zlib data that must hold exactly ``size`` bytes; never makes more, whatever the data say."""
    unpacker = zlib.decompressobj()
    try:
        found = unpacker.decompress(data, size + 1)
    except zlib.error as error:
        raise ValueError(f"{what}: damaged ({error})") from error
    if len(found) != size or not unpacker.eof or unpacker.unused_data:
        raise ValueError(f"{what}: damaged, its data do not unpack to {size} bytes")
    return np.frombuffer(found, np.uint8)
