"""Second moments of layer inputs and their spectral filter: the subspaces a layer's weights act on.

Source: Kodge, Saha & Roy, "Deep Unlearning: Fast and Efficient Gradient-free Class Forgetting", TMLR 2024
(arXiv 2312.00761). The paper takes an SVD of the stacked inputs A [n, d]; the filter it builds is a rational
function of the Gram matrix, so one Cholesky solve replaces the SVD:

    M(alpha) = U diag(alpha r / ((alpha - 1) r + 1)) U^T = alpha G ((alpha - 1) G + I)^-1

with G = A^T A / |A|_F^2.

Every array of a layer carries its groups first, [groups, ...]; Linear and ungrouped convolutions have one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastunlearn import ops
from fastunlearn.data import IGNORED, Batch, Batches, read
from fastunlearn.hooks import Call, device_of, preserved, recording, without_fused_attention
from fastunlearn.language import is_causal_lm
from fastunlearn.lowrank import StreamingSketch, batched_rsvd, grouped_rows, power_of_two
from fastunlearn.outcome import track
from fastunlearn.parallel.deal import together
from fastunlearn.parallel.ranks import Ranks, reshard, sharing, unwrapped
from fastunlearn.parallel.weights import whole
from fastunlearn.slots import Gather, Slot, choose_layers, layer_rows, padded_input, slot_rows

Solver = Literal["auto", "cholesky", "eigh", "rsvd", "sketch"]
SOLVERS: tuple[Solver, ...] = get_args(Solver)
Positions = Literal["attended", "labelled"]
POSITIONS: tuple[Positions, ...] = get_args(Positions)
BLOCK = 4096  # rows gathered and multiplied at a time, so that no pass over a batch copies all of its patches


@dataclass(frozen=True)
class Eigenpairs:
    """Leading eigenpairs of Gram matrices, computed once and good for any alpha.

    Attributes:
        values: [groups, k] float64, from the largest down, none negative; in a unit of each group's own, since only
            their ratios to the trace matter and squares of far scales would leave float64.
        vectors: [groups, d, k] float64, columns orthonormal.
        trace: [groups] float64, the sum of all d eigenvalues, also of those beyond the k-th.
    """

    values: Tensor
    vectors: Tensor
    trace: Tensor

    @property
    def ratios(self) -> Tensor:
        """r = eigenvalue / trace, [groups, k]; zero where there was no energy."""
        return (self.values / _nonzero(self.trace)[:, None]).clamp(0, 1)

    def gain(self, alpha: float) -> Tensor:
        """The filter's factor alpha r / ((alpha - 1) r + 1) in each direction, [groups, k]."""
        _require_alpha(alpha)
        return _gain(self.ratios, alpha)

    def dropped_gain(self, alpha: float) -> float:
        """What the filter would have left of any direction beyond the k-th, at most: the norm of the error in M.

        The eigenvalues come in order and sum to the trace, so the first that is missing is no larger than the last
        that is there, nor than all that is missing together. 0 when none is missing. Of a sketch, whose eigenvalues
        are underestimates, it is an estimate and may be several times too low.
        """
        if not self.ratios.numel():
            return 0.0
        missing = (1 - self.ratios.sum(-1)).clamp(min=0)
        missing = torch.where(missing > _ROUNDING, missing, torch.zeros_like(missing))
        return float(_gain(torch.minimum(missing, self.ratios[:, -1]), alpha).max())

    def filter(self, weight: Tensor, alpha: float) -> Tensor:
        """:func:`filter_weight_by_eigenpairs` of a weight [groups, p, d]."""
        return filter_weight_by_eigenpairs(weight, self.values, self.vectors, self.trace, alpha)


_ROUNDING = 1e-12  # a sum of ratios this close to 1 is 1


def spectral_filter(gram: Tensor, alpha: float) -> Tensor:
    """M(alpha) = alpha G ((alpha - 1) G + I)^-1 with G = gram / trace(gram); zero for a zero gram.

    M keeps the directions in which the inputs have energy: eigenvalue r of G becomes alpha r / ((alpha - 1) r
    + 1), between 0 (no energy) and 1 (all of it). One Cholesky factorisation per matrix; its condition number
    is at most max(alpha, 1 / alpha).

    The solve runs in float64 whatever the dtype of ``gram``, so what it adds is the rounding of the result. A Gram
    matrix holds squares of singular values, and the small ones drown in the rounding of the large when it was
    summed in float32 (errors in M of about alpha times the rounding unit, 2e-4 at worst among those measured
    against a float32 SVD of the rows): sum it in float64 where that matters, as :class:`GramAccumulator` does.

    Args:
        gram: [..., d, d], float32 or float64, symmetric positive semidefinite; its scale does not matter.
        alpha: > 0. Larger keeps more directions.

    Returns:
        [..., d, d] in the dtype of ``gram``, exactly symmetric.

    Raises:
        TypeError: ``gram`` is not float32 or float64.
        ValueError: ``alpha`` is not finite and positive; ``gram`` is not square, holds NaN or Inf, or is not
            positive semidefinite (the first such matrix of the batch is named; none is returned).

    Cost: (1/3 + 2) d^3 multiply-adds per matrix and three d x d temporaries. Source: arXiv 2312.00761,
    section 4.
    """
    _require_alpha(alpha)
    scaled = _unit_trace(gram)
    solved = torch.cholesky_solve(alpha * scaled, _factor(scaled, alpha))
    return ((solved + solved.mT) / 2).to(gram.dtype)


def filter_weight(weight: Tensor, gram: Tensor, alpha: float) -> Tensor:
    """weight @ spectral_filter(gram, alpha), without forming the filter.

    Args:
        weight: [..., p, d], float32 or float64; the solve runs in float64.
        gram: [..., d, d] as in :func:`spectral_filter`.
        alpha: > 0.

    Returns:
        [..., p, d] in the dtype of ``weight``.

    Raises:
        TypeError, ValueError: as :func:`spectral_filter`; ValueError also for shapes that do not fit.

    Cost: d^3 / 3 + 2 p d^2 multiply-adds. Source: arXiv 2312.00761.
    """
    _require_alpha(alpha)
    scaled = _unit_trace(gram)
    _require_fit(weight, scaled, "gram")
    # W M = (alpha S^-1 G W^T)^T, because S = (alpha - 1) G + I is symmetric and commutes with G.
    solved = torch.cholesky_solve(alpha * (scaled @ weight.double().mT), _factor(scaled, alpha))
    return solved.mT.to(weight.dtype)


def filter_weight_by_rows(weight: Tensor, rows: Tensor, alpha: float) -> Tensor:
    """weight @ spectral_filter(rows^T rows, alpha) for fewer rows than columns: nothing d x d is ever formed.

    The push-through identity moves the solve to the rows' side:
    M(alpha) = (alpha / s) A^T ((alpha - 1) / s A A^T + I)^-1 A, with s = |A|_F^2.

    Args:
        weight: [..., p, d], float32 or float64; the solve runs in float64.
        rows: A [..., n, d], float32 or float64; any n (0 gives zero), pays off when n < d.
        alpha: > 0.

    Returns:
        [..., p, d] in the dtype of ``weight``.

    Raises:
        TypeError: ``rows`` is not float32 or float64.
        ValueError: ``alpha`` is not finite and positive, ``rows`` holds NaN or Inf, or shapes do not fit.

    Cost: n^2 d + n^3 / 3 + p n (2 d + 2 n) multiply-adds, n x n + p x n temporaries. Source: arXiv
    2312.00761.
    """
    _require_alpha(alpha)
    if rows.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"rows must be float32 or float64, got {rows.dtype}; convert with .float()")
    if rows.dim() < 2:
        raise ValueError(f"rows must be [..., n, d], got shape {list(rows.shape)}")
    _require_fit(weight, rows, "rows")
    _require_finite_members(rows, "rows")
    if rows.shape[-2] == 0:
        return torch.zeros_like(weight)
    # Scale to a largest entry of 1 and then to norm 1: |A|_F^2 may overflow where A does not.
    rows = rows.double()
    rows = rows / power_of_two(rows.abs().amax((-2, -1), keepdim=True))
    rows = rows / _nonzero(torch.linalg.matrix_norm(rows)[..., None, None])
    factor = _factor(_outer(rows), alpha)
    filtered = alpha * torch.cholesky_solve((weight.double() @ rows.mT).mT, factor).mT @ rows
    return filtered.to(weight.dtype)


def filter_weight_by_eigh(weight: Tensor, gram: Tensor, alpha: float) -> Tensor:
    """weight @ spectral_filter(gram, alpha) through the eigendecomposition, the paper's literal form.

    Shapes, dtypes and errors as :func:`filter_weight`. Negative eigenvalues (rounding) count as zero.

    Cost: about 9 d^3 + 2 p d^2 multiply-adds.
    Source: arXiv 2312.00761.
    """
    _require_alpha(alpha)
    scaled = _unit_trace(gram)
    _require_fit(weight, scaled, "gram")
    values, vectors = torch.linalg.eigh(scaled)
    ratio = values.clamp(min=0)
    kept = alpha * ratio / ((alpha - 1) * ratio + 1)
    filtered = torch.matmul(weight.double() @ vectors * kept[..., None, :], vectors.mT)
    return filtered.to(weight.dtype)


def filter_weight_by_eigenpairs(weight: Tensor, values: Tensor, vectors: Tensor, trace: Tensor, alpha: float) -> Tensor:
    """W V diag(alpha r / ((alpha - 1) r + 1)) V^T with r = values / trace: the filter on a kept subspace.

    With all d eigenpairs this is :func:`filter_weight`. With the leading k, what lies outside the kept subspace is
    dropped, which for exact eigenpairs changes the filter by no more (in the spectral norm) than its gain
    alpha r / ((alpha - 1) r + 1) at the first r left out, itself at most alpha / (alpha + k).

    Args:
        weight: [..., p, d], float32 or float64.
        values: [..., k], eigenvalues of the Gram matrices; negative ones (rounding) count as zero.
        vectors: [..., d, k], the eigenvectors in its columns.
        trace: [...], of the Gram matrices; where it is 0, the result is 0.
        alpha: > 0.

    Returns:
        [..., p, d] in the dtype of ``weight``, computed in float64.

    Raises:
        TypeError, ValueError: another dtype of ``weight``; shapes that do not fit; alpha not finite and positive.

    Cost: 2 p k d multiply-adds; p x k and p x d temporaries. Source: arXiv 2312.00761.
    """
    _require_alpha(alpha)
    _require_fit(weight, vectors.mT, "vectors^T")
    if values.shape != (*vectors.shape[:-2], vectors.shape[-1]) or trace.shape != values.shape[:-1]:
        raise ValueError(
            f"values [..., k], vectors [..., d, k] and trace [...] do not fit: got {list(values.shape)}, "
            f"{list(vectors.shape)} and {list(trace.shape)}"
        )
    kept = _gain((values.double() / _nonzero(trace.double())[..., None]).clamp(0, 1), alpha)
    vectors = vectors.double()
    return (weight.double() @ vectors * kept[..., None, :] @ vectors.mT).to(weight.dtype)


class GramAccumulator:
    """Streaming second moments A^T A of one layer's input rows; sums over batches, devices and machines.

    Fewer rows than columns are kept as they are, since n x d is then the smaller of the two and lets
    :meth:`filter` solve in n x n. From ``dim`` rows on they are folded into [groups, dim, dim] and forgotten.
    Products are taken and summed in ``dtype``. A float32 product resolves singular
    values down to 2.4e-4 of the largest, where an SVD of the rows reaches 6e-8; a float64 product of float32 rows is
    exact to 1e-16 at any scale that float32 has, and costs 1.8 times the float32 product (2000 rows, d = 1152 and
    2304, two CPU cores).

    Args:
        dim: d, columns of a row.
        groups: groups of a convolution; each has its own Gram matrix.
        dtype: of the master, float32 or float64.

    Raises:
        ValueError: ``dim`` or ``groups`` below 1.
        TypeError: another dtype.

    Cost: n d^2 multiply-adds for n rows; groups * min(n, d) * d elements held. Source: arXiv 2312.00761.
    """

    def __init__(self, dim: int, groups: int = 1, dtype: torch.dtype = torch.float64) -> None:
        if dim < 1 or groups < 1:
            raise ValueError(f"dim and groups must be 1 or more, got {dim} and {groups}")
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"the master of a Gram matrix must be float32 or float64, got {dtype}")
        self.dim = dim
        self.groups = groups
        self.dtype = dtype
        self.rows_seen = 0
        self._rows: list[Tensor] = []  # each [groups, n, dim], in the dtype they came in
        self._gram: Tensor | None = None  # [groups, dim, dim] in the master's dtype, once folded

    @property
    def gram(self) -> Tensor:
        """The Gram matrices [groups, dim, dim] in the master's dtype; zero before any row."""
        if self._gram is not None:
            return self._gram
        device = self._rows[0].device if self._rows else None
        total = torch.zeros(self.groups, self.dim, self.dim, dtype=self.dtype, device=device)
        for rows in self._rows:
            self._add_products(total, rows)
        return total

    @property
    def elements(self) -> int:
        """Elements held: groups * min(n, dim) * dim."""
        return sum(t.numel() for t in (self._rows if self._gram is None else [self._gram]))

    def add_(self, rows: Tensor) -> GramAccumulator:
        """Add rows [groups, n, dim] (or [n, dim] if there is one group), float32 or float64; returns itself.

        Raises:
            TypeError: another dtype.
            ValueError: another shape, or NaN or Inf in ``rows``; the sums are then as before.
        """
        rows = grouped_rows(rows, self.groups, self.dim)
        _require_finite_members(rows, "rows")
        self._fold_if_full(self.rows_seen + rows.shape[1], rows.device)  # before the new rows, so as not to hold both
        if self._gram is not None:
            self._add_products(self._gram, rows)
        elif rows.shape[1]:
            # A copy: the caller may reuse its buffer, and a view of a batch would keep the whole batch alive.
            self._rows.append(rows.detach().clone())
        self.rows_seen += rows.shape[1]
        return self

    def add_patches_(self, module: nn.Conv2d, input: Tensor) -> GramAccumulator:
        """Add every patch of what a convolution was called with, [(N,) C, H, W]; returns itself.

        Equal to :meth:`add_` of its ``layer_rows``, but from ``dim`` rows on no patch is unfolded:
        ``ops.gram_accumulate_conv2d_`` reads the image, and half the products of a symmetric sum are spared.

        Raises ValueError for NaN or Inf in ``input``; the sums are then as before.
        """
        images = padded_input(module, input.detach())
        count = math.prod(
            (size - d * (k - 1) - 1) // s + 1
            for size, k, s, d in zip(images.shape[2:], module.kernel_size, module.stride, module.dilation, strict=True)
        ) * len(images)
        if self._gram is None and self.rows_seen + count < self.dim:
            return self.add_(layer_rows(module, input).to(self.dtype))
        _require_finite_members(images, "input")
        self._fold_if_full(self.rows_seen + count, images.device)
        assert self._gram is not None
        for part in torch.split(
            images, max(1, BLOCK * len(images) // count)
        ):  # about BLOCK patches in ``dtype`` at a time
            ops.gram_accumulate_conv2d_(
                self._gram, part.to(self.dtype), module.kernel_size, module.stride, (0, 0), module.dilation
            )
        self.rows_seen += count
        return self

    def merge_(self, other: GramAccumulator) -> GramAccumulator:
        """Add what ``other`` has seen; ``other`` stays as it is. Raises ValueError when the sizes differ."""
        if (self.dim, self.groups) != (other.dim, other.groups):
            raise ValueError(
                f"cannot merge Gram matrices of [{self.groups}, {self.dim}] and [{other.groups}, {other.dim}]"
            )
        if self._gram is not None:
            self._gram += other.gram.to(self._gram.device)
        elif other._gram is None:
            self._rows = [*self._rows, *other._rows]
        else:
            folded = other._gram.to(self.dtype, copy=True)
            self._gram, self._rows = folded + self.gram if self._rows else folded, []
        self.rows_seen += other.rows_seen
        self._fold_if_full(self.rows_seen, self._rows[0].device if self._rows else torch.device("cpu"))
        return self

    def sum_(self, ranks: Ranks, counts: Sequence[int], device: torch.device) -> GramAccumulator:
        """Take in what every rank has seen, ``counts`` rows each; all of them call this together. Returns itself.

        Where all ranks' rows together are fewer than ``dim`` they are brought together, otherwise Gram matrices summed,
        so that :meth:`filter` solves as if one process had seen them all. Cost: groups * min(n, dim) * dim elements in
        float64 exchanged.
        """
        total, before = sum(counts), sum(counts[: ranks.rank])
        if not total or ranks.size == 1:
            return self
        if total < self.dim:
            rows = torch.zeros(self.groups, total, self.dim, dtype=torch.float64, device=device)
            rows[:, before : before + self.rows_seen] = self._kept_rows()
            ranks.sum_(rows)  # zeros of the others: nothing is rounded
            self._rows = [rows]
        else:
            gram = self.gram.to(device)
            ranks.sum_(gram)
            self._gram, self._rows = gram, []
        self.rows_seen = total
        return self

    def __add__(self, other: GramAccumulator) -> GramAccumulator:
        return GramAccumulator(self.dim, self.groups, self.dtype).merge_(self).merge_(other)

    def filter(
        self, weight: Tensor, alpha: float, solver: Solver = "auto", rank: int | None = None, seed: int = 0
    ) -> Tensor:
        """weight [groups, p, dim] @ M(alpha) of the rows seen; zero when there was none.

        ``solver``: "auto" solves in n x n while n < dim and by Cholesky in dim x dim otherwise, "cholesky"
        always in dim x dim, "eigh" by eigendecomposition, "rsvd" by :meth:`eigenpairs` of ``rank`` and ``seed``.
        Raises as :func:`filter_weight`.
        """
        if solver not in SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
        if solver == "sketch":
            raise ValueError("a sketch is chosen when the rows are collected; these are summed exactly")
        if solver == "rsvd":
            return self.eigenpairs(rank or low_rank(self.dim, alpha), seed).filter(weight, alpha)
        if solver == "eigh":
            return filter_weight_by_eigh(weight, self.gram.to(weight.device), alpha)
        if solver == "auto" and self._gram is None:
            return filter_weight_by_rows(weight, self._kept_rows().to(weight.device), alpha)
        return filter_weight(weight, self.gram.to(weight.device), alpha)

    def eigenpairs(self, rank: int | None = None, seed: int = 0) -> Eigenpairs:
        """Eigenpairs of the Gram matrices, min(n, dim) of them, or by a randomised SVD the leading ``rank``.

        Fewer rows than columns are decomposed as rows: nothing dim x dim is formed. Directions below 1e-15 of the
        trace are rounding and come as zero vectors of value zero.

        Raises ValueError when the sums hold NaN or Inf.
        Cost: about 9 min(n, dim)^3, with ``rank`` about 6 rank * min(n, dim) * dim multiply-adds.
        """
        thin = self._gram is None
        source = self._kept_rows() if thin else self.gram.double()
        # Exact scaling to a largest entry of 1 keeps the squares of the rows within float64.
        largest = source.abs().amax((-2, -1), keepdim=True) if source.numel() else source.new_zeros(self.groups, 1, 1)
        _require_finite_members(source, "rows" if thin else "gram")
        unit = power_of_two(largest)
        source = source / unit
        trace = source.square().sum((-2, -1)) if thin else source.diagonal(dim1=-2, dim2=-1).sum(-1)
        if rank is not None and rank < min(source.shape[-2:]):
            found = batched_rsvd(source, rank=rank, seed=seed)
            singular, vectors = cast(Tensor, found.S), cast(Tensor, found.Vh).mT
            values = singular.square() if thin else singular
        else:
            values, vectors = torch.linalg.eigh(_outer(source) if thin else source)
            values, vectors = values.flip(-1).clamp(min=0), vectors.flip(-1)
            values = torch.where(values > 1e-15 * trace[:, None], values, torch.zeros_like(values))
            if thin:
                vectors = source.mT @ vectors / _nonzero(values.sqrt())[:, None, :]
            vectors = vectors * (values > 0)[:, None, :]
        return Eigenpairs(values, vectors, trace)

    def _kept_rows(self) -> Tensor:
        """The rows [groups, n, dim] in float64, while there are fewer than columns."""
        if not self._rows:
            return torch.zeros(self.groups, 0, self.dim, dtype=torch.float64)
        return torch.cat([part.double() for part in self._rows], 1)

    def _add_products(self, total: Tensor, rows: Tensor) -> None:
        # One buffer for all blocks: converting costs less than fresh memory to convert into.
        buffer = rows.new_empty(self.groups, min(BLOCK, rows.shape[1]), self.dim, dtype=self.dtype)
        for start in range(0, rows.shape[1], BLOCK):
            block = rows[:, start : start + BLOCK]
            ops.gram_accumulate_(total, buffer[:, : block.shape[1]].copy_(block))

    def _fold_if_full(self, rows: int, device: torch.device) -> None:
        if self._gram is None and rows >= self.dim:
            self._gram, self._rows = self.gram.to(device), []


def low_rank(dim: int, alpha: float) -> int:
    """The rank a low-rank solver keeps unless told: 4 alpha, at least 64, at most d.

    The eigenvalue ratios sum to 1, so the k-th is at most 1 / k and the filter's gain on all that k eigenpairs drop
    at most alpha / (alpha + k): a fifth at k = 4 alpha, whatever the spectrum; in practice far less.
    """
    return min(dim, max(64, math.ceil(4 * alpha)))


# What a layer's rows leave behind.
Moments = GramAccumulator | StreamingSketch


def moments_eigenpairs(moments: Moments, rank: int | None = None, seed: int = 0) -> Eigenpairs:
    """Eigenpairs of what was collected, exact or sketched; cost as :meth:`GramAccumulator.eigenpairs`."""
    if isinstance(moments, GramAccumulator):
        return moments.eigenpairs(rank, seed)
    return Eigenpairs(*moments.eigh(), moments.trace)


def collect_grams(
    model: nn.Module,
    batches: Batches,
    layers: Sequence[str] | None = None,
    max_patches: int | None = None,
    seed: int = 0,
    name: str = "batches",
    progress: bool = False,
    sketched: Mapping[str, int] | None = None,
    positions: Positions = "attended",
) -> dict[str, Moments]:
    """Second moments of the inputs of a model's layers, by hooks, in eval mode and without gradients.

    With ``max_patches``, a layer that sees more rows than that contributes a seeded uniform sample of them:
    each batch gives its share by number of samples, drawn without replacement, so the total never exceeds the
    limit, and nothing but the Gram matrices outlives a batch. The samples are counted by one more iteration
    over ``batches``, without running the model. What is drawn of a batch depends on the seed, the batch's number and
    the sizes of all batches, not on what was drawn before.

    Of a batch that is a dict with "attention_mask" [N, T], positions where the mask is 0 are left out of every
    Linear, Conv1D and attention whose input has leading axes [N, T]; see :func:`fastunlearn.slots.slot_rows`.

    A model held by several ranks (DistributedDataParallel, FSDP2's ``fully_shard``) is run by all of them together,
    each with its own share of the samples, which may be empty; every rank is returned what all have seen. Batches
    dealt by :func:`fastunlearn.deal` give the rows that one process would have taken. The ranks of tensor parallelism
    pass the same samples.

    Args:
        model: any module; its modes, hooks and the random state are put back, also on an exception.
        batches: re-iterable of (inputs, targets) or of dicts.
        layers: names of layers or slots; all of :func:`fastunlearn.slots.supported_layers` by default.
        max_patches: rows kept per layer; None keeps all.
        seed: of the sample of rows, and of sketches.
        name: of ``batches`` in error messages.
        progress: show a progress bar.
        sketched: rank per slot for which a sketch of [d, rank] takes the place of the Gram matrix.
        positions: "attended", or "labelled": those of them whose output is scored. Targets are then labels [N, T], -100
            where there is none; of a causal language model position t is scored by label t + 1.

    Returns:
        A :class:`GramAccumulator` (or sketch) per slot name; ``rows_seen`` is 0 for a layer that the forward pass
        never called.

    Raises:
        TypeError: ``batches`` cannot be iterated twice.
        ValueError: no batch, a malformed batch, an unknown layer, ``max_patches`` < 1, or NaN or Inf in a
            layer's input (the layer is named; on all ranks, after the pass); no labels [N, T] for "labelled".

    Cost: one forward pass plus rows * d^2 multiply-adds in float64 per slot (attention is computed twice); d^2
    elements held per slot, and with ``max_patches`` one batch's share of rows; on several ranks one sum of what is
    held, layer by layer. torch's fused attention is switched off meanwhile: it calls no hooks and packs padded batches.
    Source: arXiv 2312.00761.
    """
    if max_patches is not None and max_patches < 1:
        raise ValueError(f"max_patches must be 1 or more, or None for no limit, got {max_patches}")
    ranks, model = sharing(model), unwrapped(model)
    reshard(model)
    chosen = choose_layers(model, layers)
    device = device_of(model)
    moments = {key: _empty(slot, (sketched or {}).get(key), seed) for key, slot in chosen.items()}
    slots: dict[int, list[Slot]] = {}
    for slot in chosen.values():
        slots.setdefault(id(slot.module), []).append(slot)
    pending = {key: _Sample() for key in chosen}
    counted = True
    share: int | None = None
    mask: Tensor | None = None
    generator = torch.Generator()
    failed: list[str] = []
    causal = is_causal_lm(model)

    def refuse(key: str, error: ValueError) -> None:
        if ranks.size == 1:
            raise ValueError(f"layer {key}: {error}") from error
        failed.append(f"layer {key}: {error}")  # the others are in the middle of a pass that needs this rank

    def on_call(call: Call) -> None:
        if not counted or failed:
            return
        call = _plain(call)
        for slot in slots[id(call.module)]:
            count, gather = slot_rows(slot, call, mask)
            try:
                found = moments[slot.name]
                if share is None and isinstance(slot.module, nn.Conv2d) and isinstance(found, GramAccumulator):
                    found.add_patches_(slot.module, call.input)
                elif share is None:
                    _add_blocks(moments[slot.name], gather, count, rows_dtype(slot), call.input.device)
                else:
                    pending[slot.name].add(count, gather, share, rows_dtype(slot), call.input.device, generator)
            except ValueError as error:
                refuse(slot.name, error)

    with preserved(model), without_fused_attention(), torch.no_grad():
        model.eval()
        sizes = None if max_patches is None else batch_sizes(batches, name, ranks)
        shares = None if sizes is None or max_patches is None else _shares(sizes, max_patches)[ranks.rank]
        with recording({id(s.module): s.module for s in chosen.values()}.values(), on_call):
            passes = track(together(batches, name, device, ranks), name, progress and ranks.rank == 0)
            for number, (batch, counts) in enumerate(passes):
                counted = counts
                if shares is not None:
                    share = shares[number] if number < len(shares) else 0
                    generator.manual_seed(_seed_of(seed, ranks.rank + number * ranks.size))
                mask = _rows_that_count(batch, positions, causal, name)
                batch.outputs(model)
                for key, sample in pending.items():
                    try:
                        sample.flush(moments[key])
                    except ValueError as error:
                        refuse(key, error)
        reshard(model)
        if ranks.size > 1:
            _pool(moments, ranks, failed, device)
    return moments


def batch_sizes(batches: Batches, name: str, ranks: Ranks) -> list[list[int]]:
    """Samples per batch of every rank; raises as :func:`fastunlearn.data.read`. Cost: one iteration over them."""
    if ranks.size == 1:
        # The meta device carries shapes only: counting moves no data.
        return [[batch.size for batch in read(batches, name, torch.device("meta"))]]
    meta = torch.device("meta")  # no collective on the CPU, which NCCL has none of
    sizes = ranks.gather([batch.size for raw in batches for batch in read([raw], name, meta)])
    if not any(sizes):
        raise ValueError(f"{name} is empty: it yields no batch on any rank")
    return sizes


def _shares(sizes: Sequence[Sequence[int]], max_patches: int) -> list[list[int]]:
    """Of ``max_patches`` rows, how many each batch of each rank may give, by its number of samples.

    Batch k of rank r is batch r + k * size of all.
    """
    total = sum(map(sum, sizes))
    shares: list[list[int]] = [[] for _ in sizes]
    seen = 0
    for number in range(max(map(len, sizes))):
        for rank, of_rank in enumerate(sizes):
            if number < len(of_rank):
                before, seen = seen, seen + of_rank[number]
                shares[rank].append(max_patches * seen // total - max_patches * before // total)
    return shares


def _pool(moments: Mapping[str, Moments], ranks: Ranks, failed: Sequence[str], device: torch.device) -> None:
    """Give every rank what all have seen; raises on all of them what went wrong on any."""
    reported = ranks.gather((failed[:1], {key: found.rows_seen for key, found in moments.items()}))
    errors = [message for messages, _ in reported for message in messages]
    if errors:
        raise ValueError(errors[0])
    for key, found in moments.items():
        counts = [rows[key] for _, rows in reported]
        if isinstance(found, GramAccumulator):
            found.sum_(ranks, counts, device)
        else:
            found.product, found.trace = found.product.to(device), found.trace.to(device)
            ranks.sum_(found.product, found.trace)
            found.rows_seen = sum(counts)


def _plain(call: Call) -> Call:
    """A call under tensor parallelism as one process would have made it: its inputs brought together."""
    if not any(isinstance(value, DTensor) for value in (*call.args, *call.kwargs.values())):
        return call
    return replace(
        call,
        args=tuple(whole(value) for value in call.args),
        kwargs={key: whole(value) for key, value in call.kwargs.items()},
    )


def _seed_of(seed: int, number: int) -> int:
    """Of the rows drawn from batch ``number``: torch's generator takes 32 bits, of which this odd step misses none."""
    return seed + number * 0x9E3779B9


def _rows_that_count(batch: Batch, positions: Positions, causal: bool, name: str) -> Tensor | None:
    """Which positions [N, T] of a batch give rows; None for all."""
    mask = batch.kwargs.get("attention_mask")
    mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
    if positions == "attended":
        return mask
    labels = batch.targets
    if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.is_floating_point():
        found = list(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f'positions="labelled" needs labels [N, T] in every batch of {name}, got {found}')
    scored = labels != IGNORED
    if causal:
        scored = nn.functional.pad(scored[:, 1:], (0, 1), value=False)
    return scored if mask is None or mask.shape != scored.shape else scored & mask.bool()


def rows_dtype(slot: Slot) -> torch.dtype:
    """In which dtype a slot's rows are kept: float64 for float64 weights, else float32."""
    return torch.float64 if slot.parameter.dtype == torch.float64 else torch.float32


class _Sample:
    """A uniform sample of at most ``share`` of one batch's rows, over all calls of a layer in that batch."""

    def __init__(self) -> None:
        self.rows: Tensor | None = None  # [groups, k, d]
        self.seen = 0

    def add(
        self,
        new: int,
        gather: Gather,
        share: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator,
    ) -> None:
        order = torch.randperm(self.seen + new, generator=generator)[:share]
        # Of a uniform draw from old and new rows, how many are old says how many of the kept ones stay:
        # they are themselves a uniform draw in random order, so the first ones will do.
        stay = int((order < self.seen).sum())
        fresh = order[order >= self.seen] - self.seen
        rows = gather(fresh.to(device)).to(dtype)
        self.rows = rows if self.rows is None else torch.cat([self.rows[:, :stay], rows], 1)
        if self.seen and stay:
            shuffled = torch.randperm(self.rows.shape[1], generator=generator).to(rows.device)
            self.rows = self.rows[:, shuffled]
        self.seen += new

    def flush(self, moments: Moments) -> None:
        if self.rows is not None:
            _add_rows(moments, self.rows)
        self.rows, self.seen = None, 0


def _add_blocks(moments: Moments, gather: Gather, count: int, dtype: torch.dtype, device: torch.device) -> None:
    """All rows of a call, a block at a time."""
    if count <= BLOCK:
        _add_rows(moments, gather(None).to(dtype))
        return
    for start in range(0, count, BLOCK):
        index = torch.arange(start, min(start + BLOCK, count), device=device)
        _add_rows(moments, gather(index).to(dtype))


def _add_rows(moments: Moments, rows: Tensor) -> None:
    if isinstance(moments, GramAccumulator):
        moments.add_(rows)
    elif rows.shape[1]:
        _require_finite_members(rows, "rows")
        for start in range(0, rows.shape[1], BLOCK):
            moments.add_(rows[:, start : start + BLOCK].double())


def _empty(slot: Slot, rank: int | None, seed: int) -> Moments:
    if rank is None:
        return GramAccumulator(slot.dim, slot.groups)
    return StreamingSketch(slot.dim, rank, groups=slot.groups, seed=seed)


def _outer(rows: Tensor) -> Tensor:
    """rows @ rows^T, [..., n, n] of [..., n, d] in float64."""
    if rows.is_cuda or rows.numel() == 0:
        return rows @ rows.mT
    # The columns are the pixels of a one-row image: the kernel spares half the products.
    total = rows.new_zeros(*rows.shape[:-1], rows.shape[-2])
    images = rows.reshape(-1, 1, rows.shape[-2], 1, rows.shape[-1])
    for gram, image in zip(total.reshape(-1, *total.shape[-2:]), images, strict=True):
        ops.gram_accumulate_conv2d_(gram[None], image, (1, 1))
    return total


def _gain(ratio: Tensor, alpha: float) -> Tensor:
    return alpha * ratio / ((alpha - 1) * ratio + 1)


def _require_alpha(alpha: float) -> None:
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha must be a finite number above 0, got {alpha}")


def _require_fit(weight: Tensor, other: Tensor, what: str) -> None:
    if weight.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"weight must be float32 or float64, got {weight.dtype}; convert with .float()")
    if weight.dim() != other.dim() or weight.shape[:-2] != other.shape[:-2] or weight.shape[-1] != other.shape[-1]:
        raise ValueError(
            f"weight [..., p, d] and {what} must share the leading axes and d, "
            f"got {list(weight.shape)} and {list(other.shape)}"
        )


def _require_finite_members(matrices: Tensor, what: str) -> None:
    if matrices.numel() == 0:
        return
    # The largest magnitude carries NaN and Inf, and needs no mask as large as the matrices.
    finite = torch.isfinite(torch.linalg.vector_norm(matrices, torch.inf, dim=(-2, -1)))
    if not bool(finite.all()):
        raise ValueError(f"{_member(~finite, what)} holds NaN or Inf")


def _member(bad: Tensor, what: str) -> str:
    """Name the first matrix of a batch for which ``bad`` holds."""
    return f"{what}[{', '.join(map(str, bad.nonzero()[0].tolist()))}]" if bad.dim() else what


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _unit_trace(gram: Tensor) -> Tensor:
    """gram / trace in float64, zero where gram is zero; checks what can be checked without factorising."""
    if gram.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"gram must be float32 or float64, got {gram.dtype}; convert with .float()")
    if gram.dim() < 2 or gram.shape[-1] != gram.shape[-2]:
        raise ValueError(f"gram must be square, [..., d, d], got shape {list(gram.shape)}")
    if gram.numel() == 0:
        return gram.double()
    _require_finite_members(gram, "gram")
    # Scale to a largest entry of 1 before the trace, which may overflow or vanish where no entry does.
    gram = gram.double()
    scaled = gram / power_of_two(gram.abs().amax((-2, -1), keepdim=True))
    trace = scaled.diagonal(dim1=-2, dim2=-1).sum(-1)
    bad = (trace <= 0) & (scaled != 0).flatten(-2).any(-1)
    if bool(bad.any()):
        raise ValueError(f"{_member(bad, 'gram')} is not positive semidefinite: its trace is not positive")
    return scaled / _nonzero(trace)[..., None, None]


def _factor(scaled: Tensor, alpha: float) -> Tensor:
    """Cholesky factor of (alpha - 1) scaled + I."""
    system = (alpha - 1) * scaled
    system.diagonal(dim1=-2, dim2=-1).add_(1)
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(system)
    if bool((info != 0).any()):
        raise ValueError(
            f"{_member(info != 0, 'gram')} is not positive semidefinite (at alpha = {alpha}); sum it in float64, or "
            "check that it is a sum of outer products"
        )
    return factor
