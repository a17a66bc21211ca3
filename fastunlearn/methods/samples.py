"""Single samples in batches again, and a seeded draw among the training samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastunlearn.data import Batch, Batches, read


def drawn(
    retain: Batches, forget: Sequence[Batch], total: int, limit: int, seed: int, device: torch.device
) -> list[tuple[int, Batch]]:
    """(-1 or the index among ``forget``, sample) in a seeded order, of which any prefix is a uniform draw.

    Holds all of ``forget`` and the first ``limit`` of the ``total - len(forget)`` retain samples in that order.
    """
    count = total - len(forget)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
    wanted = set([i for i in order if i < count][:limit])
    held: dict[int, Batch] = {}
    start = 0
    for batch in read(retain, "retain", device):
        for i in range(batch.size):
            if start + i in wanted:
                held[start + i] = batch[i : i + 1]
        start += batch.size
    return [(-1, held[i]) if i < count else (i - count, forget[i - count]) for i in order if i >= count or i in held]


def joined(samples: Sequence[Batch], size: int) -> Iterator[Batch]:
    """The samples in batches of at most ``size``, those of equal shapes together."""
    groups: dict[Any, list[Batch]] = {}
    for sample in samples:
        leaves = tree_flatten((sample.args, sample.kwargs, sample.targets))[0]
        shapes = tuple(tuple(t.shape) for t in leaves if isinstance(t, Tensor))
        groups.setdefault(shapes, []).append(sample)
    for group in groups.values():
        for start in range(0, len(group), size):
            part = group[start : start + size]
            flat = [tree_flatten((s.args, s.kwargs, s.targets)) for s in part]
            columns = zip(*(leaves for leaves, _ in flat), strict=True)
            leaves = [torch.cat(c) if isinstance(c[0], Tensor) else c[0] for c in columns]
            args, kwargs, targets = tree_unflatten(leaves, flat[0][1])
            yield Batch(args, kwargs, targets, len(part))
