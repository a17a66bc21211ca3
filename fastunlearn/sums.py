"""Where the squares of a Fisher pass are added up: in float32 or bfloat16, whole or in the shards of this rank."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from fastunlearn import ops
from fastunlearn.offload import HostSums
from fastunlearn.parallel.ranks import Ranks, local
from fastunlearn.units import zeros_for

BUCKET_BYTES = 25 << 20  # of squares that wait for others to be exchanged with, as in DistributedDataParallel


@dataclass(frozen=True)
class Piece:
    """Which squares of a parameter stay on each rank once they are exchanged.

    Attributes:
        shape: of what this rank computes.
        axis: cut into runs, one per rank; None where the parameter is cut as one flat run.
        sizes: elements of each rank's run.
        held: the shape of this rank's own.
    """

    shape: torch.Size
    axis: int | None
    sizes: list[int]
    held: torch.Size

    @classmethod
    def of(cls, parameter: nn.Parameter, ranks: Ranks) -> Piece:
        """By the sharding of ``parameter`` over ``ranks``; of one that all of them hold, an equal run each."""
        if isinstance(parameter, DTensor):
            placement = parameter.placements[0]
            shape, held = parameter.shape, parameter.to_local().shape
            assert isinstance(placement, Shard)  # anything else is refused before
            axis = placement.dim
            others = math.prod(shape) // shape[axis] if shape[axis] else 0
            return cls(shape, axis, [n * others for n in _runs(shape[axis], ranks.size)], held)
        sizes = _runs(parameter.numel(), ranks.size)
        return cls(parameter.shape, None, sizes, torch.Size([sizes[ranks.rank]]))

    def flat(self, squares: Tensor) -> Tensor:
        """In the order in which runs are cut."""
        return squares.reshape(-1) if self.axis is None else squares.movedim(self.axis, 0).reshape(-1)

    def shaped(self, run: Tensor) -> Tensor:
        """This rank's run in its own shape."""
        if self.axis is None:
            return run
        first, *rest = torch.empty(self.held, device="meta").movedim(self.axis, 0).shape
        return run.view(first, *rest).movedim(0, self.axis)


def _runs(count: int, parts: int) -> list[int]:
    """As torch.chunk cuts, and so DTensor: equal ones but for the last, some of them perhaps empty."""
    step = -(-count // parts)
    return [max(0, min(count, (i + 1) * step) - i * step) for i in range(parts)]


class Sums:
    """Sums of squares per parameter.

    A batch's squares go to :meth:`region`, and :meth:`complete` says when they are all there. Alone in float32 that
    region is the sum itself. Otherwise it lives for as long as it takes to add a parameter's squares: several ranks
    exchange them, so that each keeps the run of its shard, added in the order of the ranks; what is left are the bits
    that one rank would have found in the batches dealt as :func:`fastunlearn.parallel.deal.deal` deals them.

    Args:
        parameters: name -> parameter, a plain tensor or an FSDP2 shard.
        ranks: who share the samples.
        dtype: torch.bfloat16 keeps half of the memory, rounding at random without bias; None for float32 (float64).
        seed: of that rounding.
        offload: keep the sums in host memory, see :class:`fastunlearn.offload.HostSums`.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        ranks: Ranks,
        dtype: torch.dtype | None = None,
        seed: int = 0,
        offload: bool = False,
    ) -> None:
        self.parameters, self.ranks, self.dtype, self.seed = dict(parameters), ranks, dtype, seed
        self.pieces = {n: Piece.of(p, ranks) for n, p in parameters.items()} if ranks.size > 1 else {}
        self.sharded = any(isinstance(p, DTensor) for p in parameters.values())
        self.bases = dict(
            zip(parameters, accumulate((p.numel() for p in parameters.values()), initial=0), strict=False)
        )
        self.host: HostSums | None = None
        if offload:
            like = [(self._held_shape(name), self._held_dtype(name)) for name in parameters]
            device = next(iter(parameters.values())).device
            self.host = HostSums(like, device, seed, [self._offset(name) for name in parameters])
            self.held = dict(zip(parameters, self.host.sums, strict=True))
        else:
            self.held = {
                name: torch.zeros(self._held_shape(name), dtype=self._held_dtype(name), device=p.device)
                for name, p in parameters.items()
            }
        self.counts = True  # whether the batch that is being added does, or only stands in for one
        self.added = dict.fromkeys(parameters, 0)  # how often, by this rank
        self.waiting: dict[str, Tensor] = {}

    def region(self, name: str) -> Tensor:
        """Contiguous, shaped like the parameter, float32 (float64 for float64 parameters): add a batch's squares."""
        if not self.pieces and self.dtype is None and self.host is None:
            return self.held[name]
        return zeros_for(local(self.parameters[name])) if not self.pieces else self._scratch(name)

    def complete(self, name: str, region: Tensor) -> None:
        """The batch's squares of this parameter are all in its region."""
        if region is self.held[name]:
            return
        if not self.pieces:
            self._add(name, region, 0)
            return
        if not self.counts:
            region.zero_()  # now: some of what waits may be exchanged before the batch is over
        if name in self.waiting:  # another pass of the same batch: ranks may take different numbers of them
            self.waiting[name] += region
        else:
            self.waiting[name] = region
        size = sum(r.numel() * r.element_size() for r in self.waiting.values())
        if self.sharded and size >= BUCKET_BYTES:
            self.flush()

    def flush(self) -> None:
        """Exchange what waits; called by all ranks after a batch.

        Shards go in the order in which the backward pass completes them, the same on all ranks, since they hold the
        same model: raises ValueError where a weight is used on some of them only. Replicas may have planned
        differently, so they exchange everything, in one order.
        """
        if not self.pieces:
            return
        if self.sharded:
            waiting = zlib.crc32("\n".join(self.waiting).encode())
            device = next(iter(self.parameters.values())).device
            if len(set(self.ranks.numbers(waiting, device))) > 1:
                raise ValueError(
                    "a batch of one rank uses sharded weights that those of others do not; pass params= without "
                    "those used conditionally, or use DistributedDataParallel"
                )
        names = list(self.waiting) if self.sharded else list(self.parameters)
        for dtype in (torch.float32, torch.float64):
            alike = [n for n in names if zeros_dtype(self.parameters[n]) == dtype]
            for bucket in self._buckets(alike, dtype.itemsize):
                self._exchange(bucket)

    def mean(self, samples: int) -> dict[str, Tensor]:
        """The sums over ``samples``, which end here: shards as DTensors like the parameter, replicas whole again."""
        if self.host is not None:
            self.host.wait()
        found = {}
        for name in self.parameters:
            value = self.held.pop(name).div_(samples)
            found[name] = self._whole(name, value)
        return found

    def _buckets(self, names: list[str], itemsize: int) -> Iterator[list[str]]:
        """What is exchanged at once is there twice, so not everything is."""
        bucket: list[str] = []
        size = 0
        for name in names:
            bucket.append(name)
            size += self.pieces[name].shape.numel() * itemsize
            if size >= BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket

    def _scratch(self, name: str) -> Tensor:
        parameter, piece = self.parameters[name], self.pieces[name]
        return torch.zeros(piece.shape, dtype=zeros_dtype(parameter), device=parameter.device)

    def _held_shape(self, name: str) -> torch.Size:
        return self.pieces[name].held if self.pieces else local(self.parameters[name]).shape

    def _held_dtype(self, name: str) -> torch.dtype:
        return zeros_dtype(self.parameters[name]) if self.dtype is None else self.dtype

    def _exchange(self, names: list[str]) -> None:
        """All ranks to all: each is sent its runs, and adds what it receives in the order of the senders."""
        size, rank = self.ranks.size, self.ranks.rank
        flat = [(n, self.pieces[n].flat(self.waiting[n] if n in self.waiting else self._scratch(n))) for n in names]
        for name in names:
            self.waiting.pop(name, None)
        runs = [torch.split(run, self.pieces[name].sizes) for name, run in flat]
        # One parameter's runs lie one after the other as they are: the largest ones, alone in a bucket, are not copied.
        sent = flat[0][1] if len(flat) == 1 else torch.cat([run[to] for to in range(size) for run in runs])
        sizes = [sum(self.pieces[name].sizes[to] for name in names) for to in range(size)]
        del runs, flat
        received = sent.new_empty(sizes[rank] * size)
        dist.all_to_all_single(received, sent, [sizes[rank]] * size, sizes, group=self.ranks.group)
        del sent
        own = [self.pieces[name].sizes[rank] for name in names]
        for source, run in enumerate(received.view(size, sizes[rank])):
            for name, part in zip(names, torch.split(run, own), strict=True):
                self._add(name, self.pieces[name].shaped(part), source)
        for name in names:
            self.added[name] += 1

    def _add(self, name: str, squares: Tensor, source: int) -> None:
        held = self.held[name]
        if self.host is not None:
            self.host.add_(list(self.parameters).index(name), squares.contiguous())
            return
        if self.dtype is None:
            held += squares
            return
        step = self.added[name] * self.ranks.size + source
        if not self.pieces:
            self.added[name] += 1
        ops.add_rounded_([held], [squares.contiguous()], self.seed, step, [self._offset(name)])

    def _offset(self, name: str) -> int:
        """Where this rank's run begins among all weights: random bits belong to a weight, not to a rank."""
        return self.bases[name] + (sum(self.pieces[name].sizes[: self.ranks.rank]) if self.pieces else 0)

    def _whole(self, name: str, value: Tensor) -> Tensor:
        parameter = self.parameters[name]
        if isinstance(parameter, DTensor) and self.host is None:
            return DTensor.from_local(
                value, parameter.device_mesh, parameter.placements, run_check=False,
                shape=parameter.shape, stride=parameter.stride(),
            )  # fmt: skip
        if not self.pieces or self.sharded:
            return value
        runs = [value.new_empty(size) for size in self.pieces[name].sizes]
        runs[self.ranks.rank] = value
        for source, run in enumerate(runs):
            sent = run.to(parameter.device)  # where the group's collectives are
            dist.broadcast(sent, group=self.ranks.group, group_src=source)
            runs[source] = sent.to(run.device)
        return torch.cat(runs).view(parameter.shape)


def zeros_dtype(parameter: Tensor) -> torch.dtype:
    """What squares of a parameter's gradients are added up in."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32
