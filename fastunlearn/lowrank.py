"""Low-rank factors of many matrices at once: randomized SVD, symmetric eigenproblems, single-pass sketches.

Sources: Halko, Martinsson & Tropp, "Finding structure with randomness", SIAM Review 2011 (arXiv 0909.4061), algorithms
4.4 and 5.1; Fukaya et al., "Shifted Cholesky QR", SIAM J. Sci. Comput. 2020 (arXiv 1809.11085), here with dropped
columns in place of a shift; Tropp et al., "Fixed-rank approximation of a positive-semidefinite matrix from streaming
data", NeurIPS 2017 (arXiv 1706.05736).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastunlearn import ops

_START = 32  # columns of the first sketch when the rank is to be found


class RSVD(NamedTuple):
    """Factors with matrix ~ U @ diag(S) @ Vh, stacked or in lists as the matrices were.

    Attributes:
        U: [..., m, k], orthonormal columns up to ``rank``, zero ones after.
        S: [..., k], not negative, descending; zero after ``rank``.
        Vh: [..., k, n], orthonormal rows up to ``rank``, zero ones after. In every row the entry of largest
            magnitude is positive (the first of them): the sign is the matrix's, not the random numbers'.
        rank: int64 [...]: singular values above rounding, k at most; -1 for a matrix that is not finite (its factors
            are NaN).
        energy: [...], float64: sum(S**2) / |matrix|_F^2, the share of the energy that the factors hold, with
            |matrix|_F^2 summed row by row in the matrix's dtype; 1 for zero.
    """

    U: Tensor | list[Tensor]
    S: Tensor | list[Tensor]
    Vh: Tensor | list[Tensor]
    rank: Tensor
    energy: Tensor


def batched_rsvd(
    matrices: Tensor | Sequence[Tensor],
    rank: int | None = None,
    energy: float | None = None,
    oversample: int = 16,
    power_iterations: int = 2,
    seed: int = 0,
) -> RSVD:
    """Randomized SVD of many matrices of any shapes, to a rank or to a share of the energy.

    Every matrix is multiplied by the same random matrix (of ``seed``), and every product is cut by its own shape: a
    matrix gives the same bits alone, in any batch, in any order and with any number of threads.

    Args:
        matrices: [..., m, n], or a sequence of [m_i, n_i]; float32 or float64 (halves are computed in float32), tall,
            wide, rank-deficient, zero or empty. A matrix with NaN or Inf gets NaN factors and leaves the others alone.
        rank: k >= 1, cut to min(m, n) for smaller matrices of a sequence. Give this or ``energy``.
        energy: in (0, 1]: the smallest k whose factors hold at least this share of |matrix|_F^2, by the exact rule
            sum(S**2) >= energy * |matrix|_F^2; the sketch doubles until it does. In a stacked tensor k is the largest
            of all members. Below rounding (energy = 1) the numerical rank is the answer.
        oversample: columns of the sketch beyond k, >= 0.
        power_iterations: multiplications by A A^T, >= 0. 0 captures 1.25 to 3.5 times the optimal tail energy on slowly
            falling spectra, 1 up to 1.16 times, 2 up to 1.09 times.
        seed: of the random matrix.

    Returns:
        :class:`RSVD`, in the dtype of the matrices.

    Raises:
        TypeError: other dtypes, or not tensors.
        ValueError: not matrices, neither or both of ``rank`` and ``energy``, or a value out of range; more than one
            device or dtype.

    Cost: (2 power_iterations + 2) products of 2 m n (k + oversample) FLOPs, and (m + n) (k + oversample)^2 terms
    between them; memory m + n rows of k + oversample numbers, twice. Source: arXiv 0909.4061.
    """
    members = _members(matrices)
    if (rank is None) == (energy is None):
        raise ValueError(f"give rank or energy, not {'both' if rank is not None else 'neither'}")
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be 1 or more, got {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy must be above 0 and at most 1, got {energy}")
    if oversample < 0 or power_iterations < 0:
        raise ValueError(f"oversample and power_iterations must not be negative, got {oversample}, {power_iterations}")
    if isinstance(matrices, Tensor) and rank is not None and rank > min(matrices.shape[-2:]):
        raise ValueError(f"rank = {rank} is more than the smaller side of matrices {list(matrices.shape)}")
    first = matrices if isinstance(matrices, Tensor) else next(iter(matrices), None)
    work, scales, energies = _within_range([m.contiguous() for m in members])
    found: list[_Factors | None] = [None] * len(work)
    # Columns wanted: the rank, or as many as have been tried; None once a member is done.
    wanted = {i: min(_START if rank is None else rank, *m.shape) for i, m in enumerate(work)}
    while wanted:
        groups: dict[tuple[int, int, bool], list[int]] = {}
        for i, k in wanted.items():
            side = min(work[i].shape)
            width = min(k + oversample, side)
            groups.setdefault((width, k if energy is None else width, width == side), []).append(i)
        for (width, keep, complete), group in groups.items():
            # A sketch as wide as the matrix has its whole range: power iterations would change nothing.
            steps = 0 if complete else power_iterations
            for i, factors in zip(group, _factor([work[i] for i in group], width, keep, steps, seed), strict=True):
                found[i] = factors
                k = wanted.pop(i)
                if energy is not None:
                    enough = _columns_for(factors, energy, energies[i], width if complete else k)
                    if enough is None and not complete:
                        wanted[i] = min(2 * k, *work[i].shape)
                        continue
                    k = factors.rank if enough is None else enough
                found[i] = factors.cut(k)
    return _gathered(matrices, found, scales, energies, torch.float32 if first is None else first.dtype)


def batched_eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of many small symmetric matrices by one-sided Jacobi, one launch for all.

    Args:
        matrices: [..., k, k], float32 or float64; the lower triangle is read, as torch.linalg.eigh does.

    Returns:
        (values [..., k] ascending, vectors [..., k, k] in columns), as torch.linalg.eigh; NaN for a matrix with NaN or
        Inf, which leaves the others alone.

    Raises:
        TypeError: another dtype.
        ValueError: not square.
        RuntimeError: 30 sweeps did not suffice (never seen; 6 to 12 are usual).

    Cost: 6 to 10 sweeps of 3 k^3 multiply-adds each, and one or two more in the basis found. On CUDA one block per
    matrix, in shared memory up to k = 240 (float32) or 170 (float64) on a GPU with 227 KB of it. Source: one-sided
    Jacobi of Hestenes 1958 on the matrix shifted to be positive definite.
    """
    if matrices.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"matrices must be float32 or float64, got {matrices.dtype}; convert with .float()")
    if matrices.dim() < 2 or matrices.shape[-1] != matrices.shape[-2]:
        raise ValueError(f"matrices must be square, [..., k, k], got shape {list(matrices.shape)}")
    if matrices.numel() == 0:
        return matrices.new_empty(matrices.shape[:-1]), torch.empty_like(matrices)
    flat = matrices.reshape(-1, *matrices.shape[-2:])
    flat = flat.tril() + flat.tril(-1).mT
    finite = torch.isfinite(flat).flatten(1).all(1)
    eye = torch.eye(flat.shape[-1], dtype=flat.dtype, device=flat.device)
    flat = torch.where(finite[:, None, None], flat, eye)
    scale = power_of_two(flat.abs().amax((1, 2)))
    members = list((flat / scale[:, None, None]).contiguous())
    vectors = _jacobi_vectors(members, eye)
    # Once more in the basis found: the matrix is nearly diagonal there, and what many rotations rounded is repaired.
    turned = _products(_products(vectors, members, transpose=True), vectors)
    vectors = _polished(_products(vectors, _jacobi_vectors(turned, eye)))
    # Rayleigh quotients: their error is of second order in that of the vectors.
    images = torch.stack(_products(members, vectors))
    values = (images * torch.stack(vectors)).sum(1, dtype=torch.float64)
    values, order = values.sort(dim=-1)
    found = torch.stack(vectors).gather(-1, order[:, None, :].expand_as(flat))
    values = (values * scale[:, None]).to(matrices.dtype)
    bad = ~finite[:, None]
    values, found = values.masked_fill(bad, torch.nan), found.masked_fill(bad[..., None], torch.nan)
    return values.reshape(matrices.shape[:-1]), found.reshape(matrices.shape)


class StreamingSketch:
    """Leading eigenpairs of a Gram matrix too large to form, from one pass over the rows: single-pass Nystroem.

    Holds Y = G Omega [groups, dim, rank + oversample] and the trace of G = sum of row^T row, so memory does not grow
    with the stream, nor with dim^2. Omega is never stored. Sketches of the same seed add up over batches and machines.

    Args:
        dim: d, columns of a row.
        rank: eigenpairs wanted.
        oversample: further columns of the sketch.
        groups: of a convolution; each has its own sketch.
        seed: of Omega.
        dtype: of the sketch, float32 or float64.

    Raises:
        ValueError: a size below 1 (``oversample`` below 0).
        TypeError: another dtype.

    Cost: 4 n d (rank + oversample) FLOPs for n rows. With 16 columns of oversampling the error in the nuclear norm is
    up to 1.6 times the optimal one: use :func:`batched_rsvd` where the matrix can be read again.
    Source: Tropp et al. 2017 (arXiv 1706.05736).
    """

    def __init__(
        self,
        dim: int,
        rank: int,
        oversample: int = 16,
        groups: int = 1,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        if min(dim, rank, groups) < 1 or oversample < 0:
            raise ValueError(
                f"dim, rank and groups must be 1 or more and oversample 0 or more, got {dim}, {rank}, {groups}, "
                f"{oversample}"
            )
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"a sketch must be float32 or float64, got {dtype}")
        self.dim, self.rank, self.groups, self.seed = dim, min(rank, dim), groups, seed
        self.width = min(rank + oversample, dim)
        self.dtype = dtype
        self.rows_seen = 0
        self.trace = torch.zeros(groups, dtype=torch.float64)
        self.product = torch.zeros(groups, dim, self.width, dtype=dtype)  # G Omega

    def add_(self, rows: Tensor) -> StreamingSketch:
        """Add rows [groups, n, dim] (or [n, dim] if there is one group), float32 or float64; returns itself.

        The sketch moves to the device of the first rows. Raises TypeError for another dtype, ValueError for another
        shape or NaN or Inf in ``rows``; the sketch is then as before.
        """
        rows = grouped_rows(rows, self.groups, self.dim).detach().to(self.dtype)
        energy = torch.linalg.vector_norm(rows.double(), dim=(1, 2)).square()
        if not bool(torch.isfinite(energy).all()):
            raise ValueError("rows hold NaN or Inf")
        self.product, self.trace = self.product.to(rows.device), self.trace.to(rows.device)
        projected = [part.new_empty(part.shape[0], self.width) for part in rows]
        ops.sketch_(projected, list(rows), [self.seed] * self.groups)
        self.product += rows.mT @ torch.stack(projected)
        self.trace += energy
        self.rows_seen += rows.shape[1]
        return self

    def merge_(self, other: StreamingSketch) -> StreamingSketch:
        """Add what ``other`` has seen; ``other`` stays as it is. Raises ValueError when the sketches differ."""
        mine, theirs = ((s.dim, s.width, s.groups, s.seed) for s in (self, other))
        if mine != theirs:
            raise ValueError(f"cannot merge sketches of (dim, width, groups, seed) {mine} and {theirs}")
        self.product = self.product + other.product.to(self.product)
        self.trace = self.trace + other.trace.to(self.trace)
        self.rows_seen += other.rows_seen
        return self

    def eigh(self) -> tuple[Tensor, Tensor]:
        """(values [groups, k] descending, vectors [groups, dim, k]) of the Nystroem approximation of G, in float64.

        k = rank. Directions that the rows do not have get a zero value and a zero vector.
        """
        y = self.product.double()
        core = [part.new_empty(self.width, self.width) for part in y]
        ops.sketch_(core, [part.contiguous() for part in y], [self.seed] * self.groups, transpose=True)  # Y^T Omega
        small, turn = torch.linalg.eigh((torch.stack(core) + torch.stack(core).mT) / 2)
        # G ~ Y (Omega^T Y)^+ Y^T = F F^T with F = Y Q s^(-1/2), on the eigenvalues s above rounding.
        top = small.amax(-1, keepdim=True)
        unit = torch.finfo(self.dtype).eps
        keep = small > self.width * unit * top
        factor = y @ (turn * torch.where(keep, small, 1).rsqrt().mul(keep)[:, None, :])
        vectors, root, _ = torch.linalg.svd(factor, full_matrices=False)
        values = root.square()
        values = torch.where(values > self.width * unit * values[:, :1], values, 0)[:, : self.rank]
        return values, vectors[..., : self.rank] * (values > 0)[:, None, :]


def grouped_rows(rows: Tensor, groups: int, dim: int) -> Tensor:
    """Rows as [groups, n, dim], from [n, dim] where there is one group; raises TypeError, ValueError otherwise."""
    if rows.dim() == 2:
        rows = rows[None]
    if rows.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"rows must be float32 or float64, got {rows.dtype}; convert with .float()")
    if rows.dim() != 3 or rows.shape[0] != groups or rows.shape[2] != dim:
        raise ValueError(f"rows must be [{groups}, n, {dim}], got {list(rows.shape)}")
    return rows


class _Factors(NamedTuple):
    """Of one matrix: u [m, l], s [l] in float64, v [n, l], the numerical rank (-1: not finite)."""

    u: Tensor
    s: Tensor
    v: Tensor
    rank: int

    def cut(self, k: int) -> _Factors:
        return _Factors(self.u[:, :k], self.s[:k], self.v[:, :k], min(self.rank, k))


def _factor(matrices: list[Tensor], width: int, keep: int, power_iterations: int, seed: int) -> list[_Factors]:
    """Algorithms 4.4 and 5.1: the range by power iterations, then the leading ``keep`` of the SVD of what it holds."""
    if width == 0:
        return [_Factors(a[:, :0], a.new_zeros(0).double(), a.new_zeros(a.shape[1], 0), 0) for a in matrices]
    # Two panels on either side, written in turn: fresh memory for each product would cost as much as the product.
    y, y_spare = ([a.new_empty(a.shape[0], width) for a in matrices] for _ in range(2))
    z, z_spare = ([a.new_empty(a.shape[1], width) for a in matrices] for _ in range(2))
    ops.sketch_(y, matrices, [seed] * len(matrices))
    for _ in range(power_iterations):
        y, y_spare, _, _ = _orthonormal(y, y_spare, polish=False)
        ops.grouped_mm_(z, matrices, y, transpose=True)
        z, z_spare, _, _ = _orthonormal(z, z_spare, polish=False)
        ops.grouped_mm_(y, matrices, z)
    q, _, _, finite = _orthonormal(y, y_spare, polish=True)
    ops.grouped_mm_(z, matrices, q, transpose=True)
    p, _, r, also = _orthonormal(z, z_spare, polish=True)
    # A ~ Q Q^T A = Q R^T P^T. With R = rotation^T rows and rows = diag(s) W: U = Q W^T, V = P rotation^T.
    rotation = torch.empty_like(r)
    _require_converged(ops.orthogonal_rows_(r, rotation))
    s, order = torch.linalg.vector_norm(r, dim=-1).sort(dim=-1, descending=True, stable=True)
    # What is left of a product in this dtype: singular values below it are rounding.
    unit = torch.finfo(matrices[0].dtype).eps / 2
    real = (s > width * unit * s[:, :1]) & finite[:, None] & also[:, None]
    s = s.where(real, 0)
    turn = order[..., None].expand_as(r)
    left = (r.gather(1, turn) / s.where(real, 1)[..., None]).where(real[..., None], 0)[:, :keep].mT
    right = rotation.gather(1, turn).where(real[..., None], 0)[:, :keep].mT
    u = _products(q, [x.to(q[0].dtype) for x in _polished(list(left.contiguous()))])
    v = _products(p, [x.to(p[0].dtype) for x in _polished(list(right.contiguous()))])
    ranks = torch.where(finite & also, real.sum(-1), -1).tolist()
    return [_Factors(*parts) for parts in zip(u, s, v, ranks, strict=True)]


def _orthonormal(
    panels: list[Tensor], spare: list[Tensor], polish: bool
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """CholeskyQR: panel = Q R, dependent columns zero. Returns (Q, the other of ``panels`` and ``spare``,
    R [B, l, l] in float64, finite [B]); both lists are written to.

    The l x l Gram matrices are summed in float64: of float32 panels they hold condition numbers up to 1e7, all that
    float32 can. Float64 panels take one shifted pass before (Fukaya et al.). One pass makes the columns
    well-conditioned, which is all that power iterations need; with ``polish`` one more makes them orthonormal to
    rounding.
    """
    dtype, width = panels[0].dtype, panels[0].shape[1]
    eps, wide = torch.finfo(dtype).eps, torch.finfo(torch.float64).eps
    tolerance = max((2 * eps) ** 2, 4 * width * wide)
    total = None
    finite = torch.ones(len(panels), dtype=torch.bool, device=panels[0].device)
    for step in range(1 + polish + (dtype == torch.float64)):
        r = panels[0].new_empty(len(panels), width, width, dtype=torch.float64)
        ops.grouped_mm_(list(r), panels, panels, transpose=True)
        if dtype == torch.float64 and step == 0:
            diagonal = r.diagonal(dim1=1, dim2=2)
            diagonal += 8 * width * wide * diagonal.sum(-1, keepdim=True)
        inverse, ranks = ops.cholesky_inverse_(r, tolerance)
        finite &= ranks >= 0
        ops.grouped_mm_(spare, panels, list(inverse.to(dtype)))
        panels, spare = spare, panels
        total = r if total is None else torch.stack(_products(list(r), list(total)))
    assert total is not None
    return panels, spare, total, finite


def _jacobi_vectors(matrices: list[Tensor], eye: Tensor) -> list[Tensor]:
    """Eigenvectors, in columns and no order, of symmetric matrices."""
    flat = torch.stack(matrices)
    # Shifted by twice its largest row sum of magnitudes, a matrix has eigenvalues within a factor of three: rows that
    # are orthogonal relative to their lengths are then orthogonal to rounding, whatever the matrix.
    bound = flat.abs().sum(-1).amax(-1)
    rows = flat + (2 * bound + (bound == 0))[:, None, None] * eye
    _require_converged(ops.orthogonal_rows_(rows))
    return list((rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True)).mT.contiguous())


def _require_converged(sweeps: Tensor) -> None:
    if bool((sweeps < 0).any()):
        raise RuntimeError(f"one-sided Jacobi of matrix {int((sweeps < 0).nonzero()[0])} took more than 30 sweeps")


def _polished(columns: list[Tensor]) -> list[Tensor]:
    """Columns that are orthonormal or zero, up to many roundings, made so up to one: a Newton-Schulz step."""
    squares = _products(columns, _products(columns, columns, transpose=True))
    return [1.5 * x - 0.5 * square for x, square in zip(columns, squares, strict=True)]


def _products(a: list[Tensor], b: list[Tensor], transpose: bool = False) -> list[Tensor]:
    out = [x.new_empty(x.shape[1 if transpose else 0], y.shape[1]) for x, y in zip(a, b, strict=True)]
    ops.grouped_mm_(out, a, b, transpose)
    return out


def _members(matrices: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Each matrix in float32 or float64."""
    if isinstance(matrices, Tensor):
        if matrices.dim() < 2:
            raise ValueError(f"matrices must be [..., m, n], got shape {list(matrices.shape)}")
        members = list(matrices.reshape(math.prod(matrices.shape[:-2]), *matrices.shape[-2:]))
    else:
        members = list(matrices)
    for i, member in enumerate(members):
        if not isinstance(member, Tensor):
            raise TypeError(f"matrices must be tensors; number {i} is a {type(member).__name__}")
        if member.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            raise TypeError(f"matrices must be floating-point, number {i} is {member.dtype}")
        if member.dim() != 2:
            raise ValueError(f"matrices must be [m, n], number {i} has shape {list(member.shape)}")
        if (member.dtype, member.device) != (members[0].dtype, members[0].device):
            raise ValueError(
                f"all matrices must have one dtype and device: {members[0].dtype} on {members[0].device} and "
                f"{member.dtype} on {member.device}"
            )
    return [m.detach().to(torch.float64 if m.dtype == torch.float64 else torch.float32) for m in members]


def _within_range(matrices: list[Tensor]) -> tuple[list[Tensor], list[float], list[float]]:
    """Matrices, scales and |matrix|_F^2: a matrix far from 1 is divided by a power of two, its scale, so that no
    product of it over- or underflows."""
    energies = _energies(matrices)
    scales = [1.0] * len(matrices)
    for i, (matrix, energy) in enumerate(zip(matrices, energies, strict=True)):
        if matrix.numel() and not 2.0**-60 < energy < 2.0**60:
            top = matrix.abs().amax().double()
            if bool(torch.isfinite(top)):
                scales[i] = float(power_of_two(top))
    scaled = [
        # In float64: the reciprocal of a tiny scale may not be a float32 number.
        m if scale == 1 else (m.double() / scale).to(m.dtype)
        for m, scale in zip(matrices, scales, strict=True)
    ]
    return scaled, scales, energies if max(scales, default=1) == min(scales, default=1) == 1 else _energies(scaled)


def _energies(matrices: list[Tensor]) -> list[float]:
    """|matrix|_F^2, row by row in the dtype, in an order that does not depend on the number of threads."""
    if not matrices:
        return []
    rows = (torch.linalg.vector_norm(m, dim=1).double().square() for m in matrices)
    # torch sums fewer than 32,768 numbers on one thread.
    blocks = (torch.nn.functional.pad(row, (0, -len(row) % 1024)).reshape(-1, 1024).sum(1) for row in rows)
    energies: list[float] = torch.stack([block.sum() for block in blocks]).tolist()
    return energies


def _columns_for(factors: _Factors, energy: float, total: float, limit: int) -> int | None:
    """The smallest k up to ``limit`` whose singular values hold the share ``energy``; None when none does."""
    if factors.rank < 0 or total == 0:
        return 0
    held = factors.s[:limit].square().cumsum(0)
    enough = (held >= energy * total).nonzero()
    if len(enough):
        return int(enough[0]) + 1
    # Singular values that are all above rounding say nothing about those beyond; zeros say that there are none.
    return factors.rank if factors.rank < limit else None


def _gathered(
    matrices: Tensor | Sequence[Tensor],
    found: list[_Factors | None],
    scales: list[float],
    energies: list[float],
    dtype: torch.dtype,
) -> RSVD:
    """Signs, scales and NaN; stacked where the matrices were, with zero columns up to the widest."""
    stacked = isinstance(matrices, Tensor)
    widest = max((f.s.shape[0] for f in found if f is not None), default=0)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for factors, scale in zip(found, scales, strict=True):
        assert factors is not None
        u, s, v, rank = factors
        if stacked:
            pad = (0, widest - s.shape[0])
            u, s, v = (torch.nn.functional.pad(x, pad) for x in (u, s, v))
        if rank < 0:
            u, s, v = (torch.full_like(x, torch.nan) for x in (u, s, v))
        else:
            largest = v.gather(0, v.abs().argmax(0, keepdim=True)) if v.numel() else v.new_ones(1, v.shape[1])
            sign = torch.where(largest < 0, -1, 1).to(v.dtype)
            u.mul_(sign)
            v.mul_(sign)
        parts.append((u, (s * scale).to(u.dtype), v.mT))
    device = matrices.device if isinstance(matrices, Tensor) else next((m.device for m in matrices), None)
    ranks = torch.tensor([f.rank for f in found if f is not None], dtype=torch.int64, device=device)
    held = [
        math.nan if f.rank < 0 else 1.0 if not total else float(f.s.square().sum()) / total
        for f, total in zip(found, energies, strict=True)
        if f is not None
    ]
    energy = torch.tensor(held, dtype=torch.float64, device=device)
    columns = [[part[i].to(dtype) for part in parts] for i in range(3)]
    if not isinstance(matrices, Tensor):
        return RSVD(columns[0], columns[1], columns[2], ranks, energy)
    lead = matrices.shape[:-2]
    if not parts:
        m, n = matrices.shape[-2:]
        u, s, vh = (matrices.new_empty(*lead, *shape) for shape in ((m, 0), (0,), (0, n)))
    else:
        u, s, vh = (torch.stack(column).reshape(*lead, *column[0].shape) for column in columns)
    return RSVD(u, s, vh, ranks.reshape(lead), energy.reshape(lead))


def power_of_two(top: Tensor) -> Tensor:
    """The power of two at or below ``top`` (1 for zero): dividing by it rounds nothing."""
    safe = torch.where(top > 0, top, torch.ones_like(top))
    return torch.ldexp(torch.ones_like(safe), torch.frexp(safe).exponent - 1)
