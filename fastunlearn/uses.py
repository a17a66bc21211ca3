"""How one parameter is used in a forward pass, and the kernel that adds up the squares of its per-sample gradients.

A use holds views, or functions that compute what they stand for when the use is added: a layer whose weight nobody
asks for pays nothing for it. Several uses of one parameter in a forward pass are joined first, because it is the sum
over uses that is squared. What has to be copied on the way is copied for a few samples at a time: :data:`CHUNK_BYTES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from fastunlearn import ops
from fastunlearn.slots import windows

CHUNK_BYTES = 32 << 20
"""Patches, scaled embedding gradients and the like are written out for as many samples as fit; at least for one. A
single sample's patches above it are written out a few channels at a time, at least one."""


class Use(Protocol):
    """One use of a parameter, or several joined."""

    def add_to(self, out: Tensor) -> None:
        """Add the squares to ``out``, contiguous, shaped like the parameter, float32 (float64 for float64)."""


# ---- weights that multiply rows ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """A weight [parts * P, D] whose gradient is sum_t left[n, t, :] right[n, t, :]^T.

    ``parts`` cut the weight into equal blocks of rows; each returns its left [N, ..., P] and right [N, ..., D]. Of a
    Linear there is one, with left the output gradient and right the input.
    """

    parts: tuple[Callable[[], tuple[Tensor, Tensor]], ...]

    def add_to(self, out: Tensor) -> None:
        regions = out.view(len(self.parts), -1, out.shape[-1])
        for region, part in zip(regions, self.parts, strict=True):
            left, right = part()
            ops.sq_grad_linear(region, right, left)


def _flat(rows: Tensor) -> Tensor:
    """[N, ..., features] -> [N, T, features]."""
    return rows.reshape(rows.shape[0], -1, rows.shape[-1])


def _join_rows(uses: Sequence[Rows]) -> Rows:
    def part(i: int) -> tuple[Tensor, Tensor]:
        pairs = [use.parts[i]() for use in uses]
        return torch.cat([_flat(left) for left, _ in pairs], 1), torch.cat([_flat(right) for _, right in pairs], 1)

    return Rows(tuple(lambda i=i: part(i) for i in range(len(uses[0].parts))))  # type: ignore[misc]


# ---- vectors, one number per channel ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Channels:
    """A bias, or the weight of a norm layer.

    Each part returns an output gradient [N, ..., C, ...], after it, for a weight, the normalised input alike; the
    parts cut the parameter into equal pieces.
    """

    parts: tuple[Callable[[], tuple[Tensor, ...]], ...]
    channel_dim: int = -1

    def add_to(self, out: Tensor) -> None:
        for region, part in zip(out.view(len(self.parts), -1), self.parts, strict=True):
            grad, *normalized = part()
            if normalized:
                ops.sq_grad_affine(region, normalized[0], grad, self.channel_dim)
                continue
            positions = [axis for axis in range(1, grad.dim()) if axis != self.channel_dim % grad.dim()]
            if positions and not grad.is_contiguous():  # the kernel would copy what is summed up here without
                ops.sq_grad_bias(region, grad.sum(positions, dtype=out.dtype))
            else:
                ops.sq_grad_bias(region, grad, self.channel_dim)


def bias(grad: Tensor, channel_dim: int = -1) -> Channels:
    """The use of a bias whose layer's output gradient is ``grad`` [N, ..., C, ...]."""
    return Channels((lambda: (grad,),), channel_dim)


def _join_channels(uses: Sequence[Channels]) -> Channels:
    def part(i: int) -> tuple[Tensor, ...]:
        columns = zip(*([_flat(t.movedim(u.channel_dim, -1)) for t in u.parts[i]()] for u in uses), strict=True)
        return tuple(torch.cat(column, 1) for column in columns)

    return Channels(tuple(lambda i=i: part(i) for i in range(len(uses[0].parts))))  # type: ignore[misc]


# ---- tables whose rows are looked up ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """An embedding table [V, D].

    Attributes:
        gather: of a slice of the samples, the indices [n, ...] and their gradients [n, ..., D].
        samples: N.
        bytes_per_sample: what ``gather`` writes for a sample; 0 where it returns views.
        padding_idx: the row that gets no gradient.
    """

    gather: Callable[[slice], tuple[Tensor, Tensor]]
    samples: int
    bytes_per_sample: int = 0
    padding_idx: int | None = None

    def add_to(self, out: Tensor) -> None:
        for chunk in _chunks(self.samples, self.bytes_per_sample):
            indices, grads = self.gather(chunk)
            ops.sq_grad_embedding(out, indices, grads, self.padding_idx)

    def unpadded(self, chunk: slice) -> tuple[Tensor, Tensor]:
        """Indices [n, T] and gradients [n, T, D], these zero at padding."""
        indices, grads = self.gather(chunk)
        indices, grads = indices.reshape(len(indices), -1).long(), _flat(grads)
        if self.padding_idx is not None:
            grads = grads.masked_fill((indices == self.padding_idx)[..., None], 0)
        return indices, grads


def _join_tables(uses: Sequence[Table]) -> Table:
    def gather(chunk: slice) -> tuple[Tensor, Tensor]:
        indices, grads = zip(*(use.unpadded(chunk) for use in uses), strict=True)
        return torch.cat(indices, 1), torch.cat(grads, 1)

    return Table(gather, uses[0].samples, sum(use.bytes_per_sample for use in uses))


@dataclass(frozen=True)
class Tied:
    """A table that is the weight of linear layers as well: sum_n (E_n + L_n)^2, both parts [V, D].

    L_n alone goes to :func:`ops.sq_grad_linear`, with the output gradient zeroed at the rows that sample n looks up.
    There L_n is computed apart, one row per index, and added to the embedding's gradient *before* anything is
    squared. L_n^2 + E_n (2 L_n + E_n) would be the same without the zeroed copy, but where E_n is about -L_n its
    rounding leaves a sum of squares below zero; here only squares are ever added.

    Cost for T positions and S indices a sample: 2 N T (V + S) D FLOPs; V x D numbers, a copy of the output gradient,
    S x D and T x S numbers a sample.
    """

    rows: Rows
    table: Table

    def add_to(self, out: Tensor) -> None:
        left, right = (_flat(t) for t in self.rows.parts[0]())
        total = torch.zeros_like(out)  # added once, as every kernel adds: the bits are the same wherever it is added
        size = (left[0].numel() + right[0].numel()) * left.element_size() if len(left) else 0
        for chunk in _chunks(self.table.samples, size + self.table.bytes_per_sample):
            indices, embedded = self.table.unpadded(chunk)
            grads, inputs = left[chunk], right[chunk]
            columns = indices[:, None].expand(-1, grads.shape[1], -1)  # [n, T, S]
            looked_up = grads.gather(2, columns).to(out.dtype).mT @ inputs.to(out.dtype)  # [n, S, D]
            # The kernel adds up gradients of equal indices, so L_n may come with the first of them only.
            looked_up.masked_fill_(~_first_of_each(indices)[..., None], 0)
            ops.sq_grad_embedding(total, indices, looked_up.add_(embedded))
            ops.sq_grad_linear(total, inputs, grads.scatter(2, columns, 0))
        out += total


def _first_of_each(indices: Tensor) -> Tensor:
    """Whether an index [n, S] occurs in its row for the first time."""
    ordered, order = indices.sort(dim=1, stable=True)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return torch.zeros_like(new).scatter_(1, order, new)


# ---- kernels that slide over images -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Patches:
    """A convolution's weight [G * P, C, *kernel]: gradient sum_t planes[n, :, t] patch_t(image[n])^T.

    ``image`` [N, G * C, *sizes] is what the kernel slides over, ``planes`` [N, G * P, *positions] meets it at each
    position: a convolution's input and output gradient, a transposed one's output gradient and input.

    Attributes:
        padding: zeros on both sides of each axis, never written out where the kernel operator knows them.
        pad: writes out any other padding, of any slice of samples and channels.
    """

    image: Tensor
    planes: Tensor
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding: tuple[int, ...]
    pad: Callable[[Tensor], Tensor] | None = None

    def add_to(self, out: Tensor) -> None:
        if len(self.kernel) > 2:
            _add_unfolded(out, [self])
            return
        image, planes = self.image if self.pad is None else self.pad(self.image), self.planes
        stride, padding, dilation = self.stride, self.padding, self.dilation
        if len(self.kernel) == 1:  # an image of height one
            out, image, planes = out.unsqueeze(2), image.unsqueeze(2), planes.unsqueeze(2)
            stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
        ops.sq_grad_conv2d(out, image, planes, stride, padding, dilation, self.groups)

    @property
    def positions(self) -> int:
        return math.prod(self.planes.shape[2:])

    def unfold(self, samples: slice, channels: slice, out: Tensor) -> None:
        """Write the patches to ``out`` [n, channels * kernel positions, T]."""
        image = self.image[samples, channels]
        if self.pad is not None:
            image = self.pad(image)
        if any(self.padding):
            image = F.pad(image, [p for p in reversed(self.padding) for _ in range(2)])
        axes = len(self.kernel)
        patches = windows(image, self.kernel, self.stride, self.dilation)  # [n, *positions, c, *kernel]
        patches = patches.permute(0, *range(1 + axes, 2 + 2 * axes), *range(1, 1 + axes))
        out.view(patches.shape).copy_(patches)


@dataclass(frozen=True)
class JoinedPatches:
    """Several uses of a convolution's weight, with images of any sizes: patches side by side."""

    uses: tuple[Patches, ...]

    def add_to(self, out: Tensor) -> None:
        _add_unfolded(out, self.uses)


def _add_unfolded(out: Tensor, uses: Sequence[Patches]) -> None:
    """Patches written out, for a few samples or, of one sample, some groups or channels at a time; then a 1 x 1
    convolution of images of height one.

    Cost: the products of the kernel; every patch is written once, never more than ``CHUNK_BYTES`` at a time, unless
    one channel's patches of one sample are larger.
    """
    groups, taps = uses[0].groups, math.prod(uses[0].kernel)
    weight = out.view(groups, -1, out.shape[1], taps)  # [G, P, C, kernel positions]
    image, positions = uses[0].image, sum(use.positions for use in uses)
    each = positions * taps * image.element_size()  # bytes of a channel of a sample

    def add(region: Tensor, channels: slice, planes: slice, groups: int) -> None:
        """To a region [G * P, C, kernel positions]."""
        width = channels.stop - channels.start
        for chunk in _chunks(image.shape[0], each * width):
            patches = image.new_empty(chunk.stop - chunk.start, width * taps, positions)
            at = 0
            for use in uses:
                use.unfold(chunk, channels, patches[..., at : at + use.positions])
                at += use.positions
            met = [use.planes[chunk, planes].flatten(2) for use in uses]
            grads = met[0] if len(met) == 1 else torch.cat(met, 2)
            ops.sq_grad_conv2d(
                region.flatten(1)[..., None, None], patches[:, :, None], grads[:, :, None], groups=groups
            )  # fmt: skip

    _, rows, width, _ = weight.shape
    if step := min(groups, CHUNK_BYTES // (each * width)):
        for first in range(0, groups, step):
            last = min(groups, first + step)
            channels, planes = slice(first * width, last * width), slice(first * rows, last * rows)
            add(weight[first:last].flatten(0, 1), channels, planes, last - first)
        return
    step = max(1, CHUNK_BYTES // each)
    for group in range(groups):
        for start in range(0, width, step):
            stop = min(width, start + step)
            part = weight.new_zeros(rows, stop - start, taps)  # operators write to contiguous tensors
            channels = slice(group * width + start, group * width + stop)
            add(part, channels, slice(group * rows, (group + 1) * rows), 1)
            weight[group, :, start:stop] += part


def _chunks(samples: int, bytes_per_sample: int) -> Iterator[slice]:
    step = max(1, CHUNK_BYTES // bytes_per_sample) if bytes_per_sample else max(1, samples)
    for start in range(0, samples, step):
        yield slice(start, min(samples, start + step))


# ---- several uses of one parameter ------------------------------------------------------------------------------


def joined(uses: Sequence[Use]) -> Sequence[Use]:
    """The uses of one parameter in one forward pass as uses to be added one by one: summed before they are squared.

    Raises TypeError for uses that have no sum in common, which :func:`fastunlearn.rules.joinable` tells beforehand.
    """
    if len(uses) == 1:
        return uses
    kinds = {type(use) for use in uses}
    if kinds == {Channels}:
        return [_join_channels(cast(Sequence[Channels], uses))]
    if kinds == {Patches}:
        return [JoinedPatches(tuple(cast(Sequence[Patches], uses)))]
    rows, tables = ([use for use in uses if isinstance(use, kind)] for kind in (Rows, Table))
    if len(rows) + len(tables) < len(uses):
        raise TypeError(f"uses of {', '.join(sorted(kind.__name__ for kind in kinds))} can not be joined")
    if not tables:
        return [_join_rows(cast(Sequence[Rows], rows))]
    table = _join_tables(cast(Sequence[Table], tables)) if len(tables) > 1 else cast(Table, tables[0])
    if not rows:
        return [table]
    return [Tied(_join_rows(cast(Sequence[Rows], rows)) if len(rows) > 1 else cast(Rows, rows[0]), table)]
