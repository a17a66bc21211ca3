"""Checkpoints of models that several ranks hold together, read and written without ever gathering the model.

Every function is called by all ranks of the model together; a plain model on one process works the same way. Each rank
reads and writes the parts that it holds, tensor by tensor: beside the model a process needs memory for a few copies
of its part of the largest tensor.
All ranks must see the same file system. Of what several ranks hold alike one writes; of buffers, which
DistributedDataParallel lets drift apart, those of the first rank count.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from ..checkpoint import (
    State,
    as_in,
    digest_heading,
    names_for,
    raw_bytes,
    require_finite,
    require_initialised,
    require_tensors,
    require_type,
    safetensors_layout,
    safetensors_metadata,
    tied,
)
from ..files import sync_folder
from .ranks import Ranks, everyone, local, unwrapped
from .stored import Box, Stored, open_stored

T = TypeVar("T")

BAND = 64 << 20  # bytes of a tensor that are brought to the first rank at once
INDEX = "model.safetensors.index.json"


def load_sharded(model: nn.Module, path: str | Path) -> list[str]:
    """Give a model the weights of a checkpoint, each rank reading only what it holds; all of them or none.

    What must fit, what is cast and what tied weights need is as in :func:`fastunlearn.checkpoint.load_into`. Parameters
    and buffers may be plain, or DTensors in any sharding (FSDP2, tensor parallelism, both). A model built on the meta
    device is sharded and given memory first: ``fully_shard(model)``, ``model.to_empty(device=...)``.

    Args:
        model: changed in place, where it is.
        path: a ``.safetensors`` file, an index of shards, a Hugging Face folder, a folder of
            torch.distributed.checkpoint (with ``.metadata``), or a file that ``torch.save`` wrote.

    Returns the names of buffers that no checkpoint has (non-persistent, such as the frequencies of rotary embeddings).
    They stay as they are; after ``to_empty`` that is no value at all, and they are the caller's to fill.

    Everything is read twice, the first time only to look at it, and one tensor at a time. Raises, the same on every
    rank and before anything is changed, ValueError as ``load_into`` does, or for parameters and buffers that are still
    on the meta device, and OSError where a file cannot be read. A file that changes, or a disk that fails, between the
    two readings leaves the model with a part of the new weights: load again.
    """
    own = _state(model)
    ranks = everyone(model)
    source = str(path)
    twins = tied(own)

    def checked() -> tuple[dict[str, Stored], dict[str, str]]:
        require_initialised(own | dict(unwrapped(model).named_buffers()))
        require_tensors(own, "the model")
        stored = open_stored(path)
        names = names_for(own, stored, twins, f"{source} does not fit {type(unwrapped(model)).__name__}")
        for key, name in names.items():
            require_type(key, stored[name].dtype, stored[name].shape, own[key], source)
        for key, name in names.items():
            if (box := _box(own[key])) is None:
                continue
            values = stored[name].read(box)
            require_finite(key, values, local(own[key]), source)
            for other in twins.get(key, ()):
                if names[other] != name and not torch.equal(values, stored[names[other]].read(box)):
                    raise ValueError(f"{source}: {key} and {other} are one tensor in the model but differ in the file")
        return stored, names

    with torch.no_grad():
        stored, names = _together(ranks, checked)

        def copied() -> None:
            for key, name in names.items():
                if (box := _box(own[key])) is not None:
                    local(own[key]).copy_(stored[name].read(box))

        _together(ranks, copied)
    return [name for name, _ in unwrapped(model).named_buffers() if name not in own]


def save_sharded(
    folder: str | Path,
    model: nn.Module,
    max_shard_bytes: int = 5 * 10**9,
    like: str | Path | None = None,
    beside: Callable[[Path], object] | None = None,
) -> None:
    """Write a model as Hugging Face reads it: safetensors in shards, with their index; the whole folder or none.

    ``model-00001-of-0000N.safetensors`` and ``model.safetensors.index.json``, or ``model.safetensors`` alone where one
    file is enough. Every rank writes the rows that it holds to their place in the files, which all ranks must see;
    nothing is sent between them, and each holds one tensor's share on the CPU at a time. It is written into a hidden
    folder beside, flushed to the disk and renamed when all ranks are done. A rank that dies leaves nothing under the
    final name.

    Args:
        folder: not there yet, or empty. Its parent is made.
        model: its ``state_dict()`` is written, in the types that it has.
        max_shard_bytes: a file holds no more, unless it is one tensor alone.
        like: as for :func:`fastunlearn.checkpoint.save_weights`: the checkpoint that the weights came from; may be
            anything that :func:`load_sharded` reads.
        beside: called on the first rank with the hidden folder, to put more files there, such as
            ``model.config.save_pretrained``.

    Raises on every rank FileExistsError where the folder has something in it, OSError where it cannot be written or a
    rank does not see it, ValueError for a type that safetensors has no name for.
    """
    folder = Path(folder)
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be 1 or more, got {max_shard_bytes}")
    state = _state(model)
    ranks = everyone(model)

    def planned() -> list[_File]:
        require_tensors(state, "the model")
        metadata = {"format": "pt"}
        chosen: State = state
        if like is not None:
            chosen = as_in(state, open_stored(like).keys())
            if Path(like).is_file() and Path(like).suffix == ".safetensors":
                metadata |= safetensors_metadata(Path(like))
        return _files(chosen, max_shard_bytes, metadata)

    files = _together(ranks, planned)
    pieces = _pieces({key: state[key] for file in files for key in file.places}, ranks, spread=True)
    with _whole(folder, ranks) as hidden:

        def begun() -> None:
            if ranks.rank:
                return
            for file in files:
                with open(hidden / file.name, "xb") as handle:
                    handle.write(file.start)
                    handle.truncate(file.size)
            if len(files) > 1:
                (hidden / INDEX).write_text(_index(files), encoding="utf-8")
            if beside is not None:
                beside(hidden)

        def written() -> None:
            for file in files:
                mine = [(key, box) for key in file.places for rank, box in pieces[key] if rank == ranks.rank]
                if not mine:
                    continue
                handle = os.open(hidden / file.name, os.O_WRONLY)
                try:
                    for key, box in mine:
                        _write_box(handle, file.places[key], state[key], box)
                    os.fsync(handle)
                finally:
                    os.close(handle)

        _together(ranks, begun)
        _together(ranks, written)


def save_distributed(folder: str | Path, model: nn.Module) -> None:
    """Write a model with torch.distributed.checkpoint; the whole folder or none, as :func:`save_sharded` does it.

    ``dcp.load(model.state_dict(), checkpoint_id=folder)`` and :func:`load_sharded` read it, on any number of ranks.
    Raises on every rank FileExistsError where the folder has something in it, OSError where it cannot be written.
    """
    state = _state(model)
    ranks = everyone(model)
    _together(ranks, lambda: require_tensors(state, "the model"))
    with _whole(Path(folder), ranks) as hidden, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        try:
            save(
                {key: value.detach() for key, value in state.items()},
                storage_writer=FileSystemWriter(hidden),
                process_group=ranks.group,
                no_dist=ranks.group is None,
            )
        except CheckpointException as error:
            rank, (cause, _) = next(iter(error.failures.items()))
            raise OSError(f"{folder}: rank {rank} could not write its part ({cause})") from error


def sharded_digest(model: nn.Module) -> str:
    """:func:`fastunlearn.checkpoint.digest` of the full ``model.state_dict()``, on every rank, without gathering it.

    Rows are sent to the first rank, 64 MiB at a time (or one row, where that is more), and hashed there: every byte
    crosses the network once and is hashed by one core. Raises ValueError where the ranks do not hold the tensors whole.
    """
    state = _state(model)
    ranks = everyone(model)
    _together(ranks, lambda: require_tensors(state, "the model"))
    pieces = _pieces(state, ranks, spread=False)
    sha256 = hashlib.sha256()
    for name in sorted(state):
        sha256.update(digest_heading(name, state[name]))
        for band in _bands(state[name]):
            values = _brought(state[name], pieces[name], band, ranks)
            if values is not None:
                sha256.update(raw_bytes(values))
    return str(ranks.gather(sha256.hexdigest())[0])


def count_changed(model: nn.Module, before: str | Path) -> dict[str, int]:
    """How many entries of each parameter differ from those of a checkpoint, over all ranks; unchanged ones are absent.

    Compared in the model's type, to which the checkpoint's values are cast as loading would. Each rank reads what it
    holds, one tensor at a time. Raises on every rank as :func:`load_sharded` does for names, types and shapes.
    """
    own = _state(model)
    ranks = everyone(model)
    pieces = _pieces(own, ranks, spread=True)
    parameters = [name for name, _ in unwrapped(model).named_parameters()]

    def compared() -> list[int]:
        stored = open_stored(before)
        names = names_for(own, stored, tied(own), f"{before} does not fit {type(unwrapped(model)).__name__}")
        counts = []
        for key in parameters:
            require_type(key, stored[names[key]].dtype, stored[names[key]].shape, own[key], str(before))
            here = local(own[key])
            boxes = [box for rank, box in pieces[key] if rank == ranks.rank]
            counts.append(sum(int((here != stored[names[key]].read(box).to(here)).sum()) for box in boxes))
        return counts

    with torch.no_grad():
        counts = ranks.gather(_together(ranks, compared))
    totals = {name: sum(each) for name, each in zip(parameters, zip(*counts, strict=True), strict=True)}
    return {name: total for name, total in totals.items() if total}


@dataclass(frozen=True)
class _File:
    """A safetensors file: its name, how it begins, its size and at which byte each tensor begins."""

    name: str
    start: bytes
    size: int
    places: dict[str, int]


def _files(state: State, max_shard_bytes: int, metadata: Mapping[str, str]) -> list[_File]:
    shards: list[dict[str, Tensor]] = [{}]
    room = max_shard_bytes
    for key, value in state.items():
        size = value.numel() * value.element_size()
        if size > room and shards[-1]:
            shards.append({})
            room = max_shard_bytes
        shards[-1][key] = value
        room -= size
    found = []
    for i, shard in enumerate(shards, 1):
        start, places = safetensors_layout(shard, metadata)
        size = len(start) + sum(t.numel() * t.element_size() for t in shard.values())
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        found.append(_File(name, start, size, places))
    return found


def _index(files: list[_File]) -> str:
    total = sum(file.size - len(file.start) for file in files)
    where = {key: file.name for file in files for key in file.places}
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    return json.dumps(content, indent=2) + "\n"


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The model's own tensors by name; those that FSDP2 still has gathered are sharded again by the hook it sets."""
    return dict(unwrapped(model).state_dict(keep_vars=True))


def _box(tensor: Tensor) -> Box | None:
    """Which part of a tensor this rank holds; None for nothing."""
    if not isinstance(tensor, DTensor):
        return Box.whole(tensor.shape) if tensor.numel() else None
    if tensor.device_mesh.get_coordinate() is None or not local(tensor).numel():
        return None
    (chunk,) = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
    return Box(tuple(chunk.offsets), tuple(chunk.sizes))


def _pieces(state: State, ranks: Ranks, spread: bool) -> dict[str, list[tuple[int, Box]]]:
    """Who answers for which part of each tensor, every entry once, as all ranks agree.

    Where several hold the same part of a parameter it is the one with the fewest bytes so far, with ``spread``, or the
    first; of a buffer always the first.
    """
    held = ranks.gather({key: _box(value) for key, value in state.items()})
    if any(each.keys() != held[0].keys() for each in held):
        raise ValueError("the ranks have models with different tensors; every rank must build the same model")
    load = [0] * ranks.size
    pieces: dict[str, list[tuple[int, Box]]] = {}
    for key, value in state.items():
        holders: dict[Box, list[int]] = {}
        for rank, each in enumerate(held):
            if each[key] is not None:
                holders.setdefault(each[key], []).append(rank)
        if sum(box.numel for box in holders) != value.numel():
            raise ValueError(f"{key}: the ranks do not hold each of its {value.numel()} entries once")
        pieces[key] = []
        for box, among in holders.items():
            dealt = spread and isinstance(value, nn.Parameter)
            owner = min(among, key=lambda rank: (load[rank], rank)) if dealt else among[0]
            load[owner] += box.numel * value.element_size()
            pieces[key].append((owner, box))
    return pieces


def _write_box(handle: int, start: int, tensor: Tensor, box: Box) -> None:
    """Write this rank's part of a tensor to where it belongs in the whole, which begins at byte ``start`` of a file."""
    shape, size = tuple(tensor.shape), tensor.element_size()
    # Axes that the box has in full follow one another in the file: one run for each index of those before.
    outer = len(shape)
    while outer and box.sizes[outer - 1] == shape[outer - 1]:
        outer -= 1
    outer = max(outer - 1, 0)
    run = math.prod(box.sizes[outer:]) * size
    strides = [math.prod(shape[axis + 1 :]) * size for axis in range(len(shape))]
    first = start + sum(offset * stride for offset, stride in zip(box.offsets, strides, strict=True))
    data = raw_bytes(local(tensor))
    for i, index in enumerate(itertools.product(*map(range, box.sizes[:outer]))):
        place = first + sum(a * stride for a, stride in zip(index, strides[:outer], strict=True))
        part = data[i * run : (i + 1) * run]
        while part:  # one call writes 2 GiB at most
            done = os.pwrite(handle, part, place)
            part, place = part[done:], place + done


def _bands(tensor: Tensor) -> Iterator[Box]:
    """A tensor in boxes that follow one another in memory, of ``BAND`` bytes or one row."""
    shape = tuple(tensor.shape)
    if not tensor.numel():
        return
    axis = next((i for i, n in enumerate(shape) if n > 1), None)
    if axis is None:
        yield Box.whole(shape)
        return
    rows = max(1, BAND // (math.prod(shape[axis + 1 :]) * tensor.element_size()))
    for start in range(0, shape[axis], rows):
        offsets, sizes = [0] * len(shape), list(shape)
        offsets[axis], sizes[axis] = start, min(rows, shape[axis] - start)
        yield Box(tuple(offsets), tuple(sizes))


def _brought(tensor: Tensor, pieces: list[tuple[int, Box]], band: Box, ranks: Ranks) -> Tensor | None:
    """On the first rank the values of a band of a tensor; on the others None."""
    own = local(tensor).detach()
    cuts = [(rank, box, cut) for rank, box in pieces if (cut := box.cut(band)).numel]
    if [rank for rank, _, _ in cuts] == [0]:
        return None if ranks.rank else own[band.slices(cuts[0][1])]
    values = None if ranks.rank else torch.empty(band.sizes, dtype=tensor.dtype)
    for rank, box, cut in cuts:
        if rank == ranks.rank:
            part = own[cut.slices(box)].resolve_conj().resolve_neg()
            if values is not None:
                values[cut.slices(band)] = part.cpu()
            else:
                flat = part.to(_wire(ranks)).clone(memory_format=torch.contiguous_format).reshape(-1)
                dist.send(flat.view(torch.uint8), group=ranks.group, group_dst=0)
        elif values is not None:
            flat = torch.empty(cut.numel, dtype=tensor.dtype, device=_wire(ranks))
            dist.recv(flat.view(torch.uint8), group=ranks.group, group_src=rank)
            values[cut.slices(band)] = flat.reshape(cut.sizes).cpu()
    return values


def _wire(ranks: Ranks) -> torch.device:
    """Where tensors must be for the ranks to send them."""
    if dist.get_backend(ranks.group) == "gloo":
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _together(ranks: Ranks, work: Callable[[], T]) -> T:
    """What ``work`` returns here; raises on every rank what it raised on the first that it failed on.

    Of errors in what the user gave: any other ends this process, and with it the job.
    """
    if ranks.group is None:
        return work()
    try:
        found, error = [work()], None
    except (ValueError, OSError) as caught:
        found, error = [], caught
    errors = [each for each in ranks.gather(error) if each is not None]
    if errors:
        raise errors[0]
    return found[0]


@contextmanager
def _whole(folder: Path, ranks: Ranks) -> Iterator[Path]:
    """A hidden folder for all ranks to write in, which takes the name ``folder`` when all are done, never before."""
    token = str(ranks.gather(secrets.token_hex(8))[0])
    hidden = folder.parent / f".{folder.name[:200]}.{token}.part"

    def made() -> None:
        if ranks.rank:
            return
        if folder.is_symlink() or (folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))):
            raise FileExistsError(f"{folder}: is there already; give a folder that is not, or an empty one")
        folder.parent.mkdir(parents=True, exist_ok=True)
        hidden.mkdir()

    def seen() -> None:
        if not hidden.is_dir():
            raise OSError(f"{folder}: rank {ranks.rank} does not see it; all ranks must write to one file system")

    def renamed() -> None:
        if not ranks.rank:
            sync_folder(hidden)
            os.rename(hidden, folder)
            sync_folder(folder.parent)

    try:
        _together(ranks, made)
        _together(ranks, seen)
        yield hidden
        _together(ranks, renamed)
    except BaseException as error:
        if not ranks.rank:
            shutil.rmtree(hidden, ignore_errors=True)
        if isinstance(error, OSError) and error.errno:
            # The user knows nothing of the hidden folder.
            raise OSError(error.errno, os.strerror(error.errno), str(folder)) from error
        raise
