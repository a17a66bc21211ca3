"""Samples shared out among ranks, so that the results do not depend on how many there are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves, tree_map_only

from fastunlearn.data import Batch, Batches, count_batches, read, require_batches, transparent
from fastunlearn.parallel.ranks import Ranks, world

Part = TypeVar("Part")


@dataclass(frozen=True)
class Dealt:
    """This rank's share of batches that every rank could read: see :func:`deal`.

    Attributes:
        batches: all of them, the same on every rank.
    """

    batches: Batches
    ranks: Ranks

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.batches), self.ranks.rank, None, self.ranks.size)

    def __len__(self) -> int:
        return len(range(self.ranks.rank, count_batches(self.batches), self.ranks.size))

    @property
    def split(self) -> Split:
        """For training: this rank's part of *every* batch, so that a step sees the samples it would see on one rank."""
        return Split(self.batches, self.ranks)


@dataclass(frozen=True)
class Split:
    """Of every batch the samples r, r + size, ...; of a batch with fewer samples than ranks some ranks have none."""

    batches: Batches
    ranks: Ranks

    def __iter__(self) -> Iterator[Any]:
        mine = slice(self.ranks.rank, None, self.ranks.size)
        for raw in self.batches:
            yield tree_map_only(torch.Tensor, lambda t: t[mine], transparent(raw))

    def __len__(self) -> int:
        return count_batches(self.batches)


def deal(batches: Batches, ranks: Ranks | None = None) -> Dealt:
    """This rank's share of ``batches``: batch r, r + size, ... whole, of ``size`` ranks.

    ``batches`` are the same on every rank, in the same order (seed a shuffled loader). Whole batches keep Fisher
    diagonals, and masks made of them, bit for bit the same on any number of ranks; training deals the samples
    of each batch instead (:attr:`Dealt.split`). ``ranks`` are those of the default process group, or this process
    alone.
    """
    require_batches(batches, "batches")
    return Dealt(batches, world() if ranks is None else ranks)


def together(batches: Batches, name: str, device: torch.device, ranks: Ranks) -> Iterator[tuple[Batch, bool]]:
    """Batches on ``device``, as many times on every rank: with False, a stand-in on a rank that has no more.

    A pass through a sharded model is a collective, so a rank without a batch has to go along; what it computes must not
    count. A rank that had none at all is sent one sample of another's. Raises as :func:`fastunlearn.data.read`, on
    all ranks where none has a batch. Cost: one number from each rank a batch.
    """
    if ranks.size == 1:
        yield from ((batch, True) for batch in read(batches, name, device))
        return
    require_batches(batches, name)
    own = (_read_one(raw, name, device) for raw in batches)
    last: Batch | None = None
    seen = False
    while True:
        batch = next(own, _DONE)
        states = ranks.numbers(_state(batch, last), device)
        if all(state & _NO_MORE for state in states):
            if not seen:
                raise ValueError(f"{name} is empty: it yields no batch on any rank")
            return
        present = [bool(state & _HAS_BATCH) for state in states]
        if not any(present):
            continue  # a batch of which no rank has a sample
        seen = True
        mine = batch if isinstance(batch, Batch) else None
        if not all(state & (_HAS_BATCH | _HAS_LAST) for state in states):
            sent = _broadcast(mine, present.index(True), device, ranks)
            last = last or sent
        last = mine or last
        assert last is not None
        yield last, mine is not None


def dealt_back(ranks: Ranks, parts: list[Part]) -> list[Part]:
    """What all ranks made of their batches, in the order of the batches before they were dealt."""
    shares = ranks.gather(parts)
    return [mine[step] for step in range(max(map(len, shares))) for mine in shares if step < len(mine)]


_DONE = "no more"
_NO_MORE, _HAS_BATCH, _HAS_LAST = 1, 2, 4


def _state(batch: Batch | str | None, last: Batch | None) -> int:
    state = _NO_MORE if batch is _DONE else 0
    return state | _HAS_BATCH * isinstance(batch, Batch) | _HAS_LAST * (last is not None)


def _read_one(raw: Any, name: str, device: torch.device) -> Batch | None:
    """None for this rank's part of a batch of fewer samples than there are ranks."""
    return next(read([raw], name, device)) if _has_samples(raw) else None


def _has_samples(raw: Any) -> bool:
    leaves = tree_leaves(transparent(raw))
    return all(len(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim())


def _broadcast(batch: Batch | None, source: int, device: torch.device, ranks: Ranks) -> Batch:
    one = None if batch is None else _moved(batch[:1], torch.device("cpu"))
    sent = [one if ranks.rank == source else None]
    dist.broadcast_object_list(sent, group=ranks.group, group_src=source)
    received = sent[0]
    assert received is not None  # the source has one
    return _moved(received, device)


def _moved(batch: Batch, device: torch.device) -> Batch:
    values = (batch.args, batch.kwargs, batch.targets)
    args, kwargs, targets = tree_map_only(torch.Tensor, lambda t: t.to(device), values)
    return Batch(args, kwargs, targets, batch.size)
