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
from collections.abc import Iterable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastunlearn.data import Batches, read
from fastunlearn.hooks import Call, device_of, preserved, recording
from fastunlearn.outcome import track

Solver = Literal["auto", "cholesky", "eigh"]
SOLVERS: tuple[Solver, ...] = ("auto", "cholesky", "eigh")


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
    rows = rows / _power_of_two(rows.abs().amax((-2, -1), keepdim=True))
    rows = rows / _nonzero(torch.linalg.matrix_norm(rows)[..., None, None])
    factor = _factor(rows @ rows.mT, alpha)
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


class GramAccumulator:
    """Streaming second moments A^T A of one layer's input rows; sums over batches, devices and machines.

    Fewer rows than columns are kept as they are, since n x d is then the smaller of the two and lets
    :meth:`filter` solve in n x n. From ``dim`` rows on they are folded into [groups, dim, dim] and forgotten.
    Each batch's product is taken in the dtype of its rows and added to a master of dtype ``dtype``, so that
    float64 keeps a stream of any length from drifting.

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
            total += rows.mT @ rows
        return total

    def add_(self, rows: Tensor) -> GramAccumulator:
        """Add rows [groups, n, dim] (or [n, dim] if there is one group), float32 or float64; returns itself.

        Raises:
            TypeError: another dtype.
            ValueError: another shape, or NaN or Inf in ``rows``; the sums are then as before.
        """
        if rows.dim() == 2:
            rows = rows[None]
        if rows.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"rows must be float32 or float64, got {rows.dtype}; convert with .float()")
        if rows.dim() != 3 or rows.shape[0] != self.groups or rows.shape[2] != self.dim:
            raise ValueError(f"rows must be [{self.groups}, n, {self.dim}], got {list(rows.shape)}")
        _require_finite_members(rows, "rows")
        if self._gram is not None:
            self._gram += rows.mT @ rows
        elif rows.shape[1]:
            # A copy: the caller may reuse its buffer, and a view of a batch would keep the whole batch alive.
            self._rows.append(rows.detach().clone())
        self.rows_seen += rows.shape[1]
        self._fold_if_full()
        return self

    def merge_(self, other: GramAccumulator) -> GramAccumulator:
        """Add what ``other`` has seen; ``other`` stays as it is. Raises ValueError when the sizes differ."""
        if (self.dim, self.groups) != (other.dim, other.groups):
            raise ValueError(
                f"cannot merge Gram matrices of [{self.groups}, {self.dim}] and [{other.groups}, {other.dim}]"
            )
        if self._gram is not None:
            self._gram += other.gram
        elif other._gram is None:
            self._rows = [*self._rows, *other._rows]
        else:
            folded = other._gram.to(self.dtype, copy=True)
            self._gram, self._rows = folded + self.gram if self._rows else folded, []
        self.rows_seen += other.rows_seen
        self._fold_if_full()
        return self

    def __add__(self, other: GramAccumulator) -> GramAccumulator:
        return GramAccumulator(self.dim, self.groups, self.dtype).merge_(self).merge_(other)

    def filter(self, weight: Tensor, alpha: float, solver: Solver = "auto") -> Tensor:
        """weight [groups, p, dim] @ M(alpha) of the rows seen; zero when there was none.

        ``solver``: "auto" solves in n x n while n < dim and by Cholesky in dim x dim otherwise, "cholesky"
        always in dim x dim, "eigh" by eigendecomposition. Raises as :func:`filter_weight`.
        """
        if solver not in SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
        if solver == "eigh":
            return filter_weight_by_eigh(weight, self.gram.to(weight.device), alpha)
        if solver == "auto" and self._gram is None:
            empty = weight.new_empty(self.groups, 0, self.dim, dtype=torch.float64)
            rows = torch.cat([empty, *(part.double() for part in self._rows)], 1)
            return filter_weight_by_rows(weight, rows, alpha)
        return filter_weight(weight, self.gram.to(weight.device), alpha)

    def _fold_if_full(self) -> None:
        if self._gram is None and self.rows_seen >= self.dim:
            self._gram, self._rows = self.gram, []


def supported_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers with second moments here, by name: Linear, Conv1d and Conv2d, subclasses included.

    A layer whose weight is computed from other parameters (weight norm, ``torch.nn.utils.parametrize``) is
    left out: there is no weight to write to. Cost: one walk over the modules.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)) and "weight" in module._parameters
    }


def layer_groups(module: nn.Module) -> int:
    """Groups of a convolution; 1 for a Linear."""
    return cast(int, getattr(module, "groups", 1))


def layer_rows(module: nn.Module, input: Tensor, pick: Tensor | None = None) -> Tensor:
    """The vectors that the weights of ``module`` are multiplied with, one row per output position.

    Row t of a Linear is input.reshape(-1, d)[t]; of a convolution, the patch under output position t
    (samples, then output positions in row-major order), its channels, kernel rows and columns flattened as
    the weight's.

    Args:
        module: Linear, Conv1d or Conv2d; any stride, dilation, groups, padding (also "same", "valid") and
            padding_mode.
        input: what the module was called with: [..., d], [(N,) C, L] or [(N,) C, H, W].
        pick: int64 [k], the rows wanted, in this order; all by default. Only these are gathered, so picking
            1,000 of 100,000 patches costs 1,000 patches.

    Returns:
        [groups, rows, d], in the dtype of ``input``; d = Ci / groups * kernel positions.

    Raises:
        TypeError: a module of another type.

    Cost: no arithmetic; rows * groups * d elements written.
    """
    if isinstance(module, nn.Linear):
        rows = input.reshape(-1, input.shape[-1])
        return (rows if pick is None else rows[pick])[None]
    if not isinstance(module, (nn.Conv1d, nn.Conv2d)):
        raise TypeError(f"layer_rows knows Linear, Conv1d and Conv2d, not {type(module).__name__}")
    windows = _windows(module, input)  # [N, *out, C, *kernel], a view
    axes = len(module.kernel_size)
    positions = windows.shape[: 1 + axes]
    if pick is None:
        patches = windows.reshape(math.prod(positions), module.groups, -1)
    else:
        index: list[Tensor] = []
        for size in reversed(positions):
            index.insert(0, pick % size)
            pick = pick // size
        patches = windows[tuple(index)].reshape(len(pick), module.groups, -1)
    return patches.transpose(0, 1)


def count_rows(module: nn.Module, output: Tensor) -> int:
    """How many rows :func:`layer_rows` has, read off the module's output."""
    width = module.out_features if isinstance(module, nn.Linear) else cast(int, module.out_channels)
    return output.numel() // width


def collect_grams(
    model: nn.Module,
    batches: Batches,
    layers: Sequence[str] | None = None,
    max_patches: int | None = None,
    seed: int = 0,
    name: str = "batches",
    progress: bool = False,
) -> dict[str, GramAccumulator]:
    """Second moments of the inputs of a model's layers, by hooks, in eval mode and without gradients.

    With ``max_patches``, a layer that sees more rows than that contributes a seeded uniform sample of them:
    each batch gives its share by number of samples, drawn without replacement, so the total never exceeds the
    limit, and nothing but the Gram matrices outlives a batch. The samples are counted by one more iteration
    over ``batches``, without running the model.

    Args:
        model: any module; its modes, hooks and the random state are put back, also on an exception.
        batches: re-iterable of (inputs, targets) or of dicts.
        layers: names of layers; all of :func:`supported_layers` by default.
        max_patches: rows kept per layer; None keeps all.
        seed: of the sample of rows.
        name: of ``batches`` in error messages.
        progress: show a progress bar.

    Returns:
        An accumulator per layer name; ``rows_seen`` is 0 for a layer that the forward pass never called
        (``nn.MultiheadAttention`` uses the weight of its ``out_proj`` without calling it).

    Raises:
        TypeError: ``batches`` cannot be iterated twice.
        ValueError: no batch, a malformed batch, an unknown layer, ``max_patches`` < 1, or NaN or Inf in a
            layer's input (the layer is named).

    Cost: one forward pass plus rows * d^2 multiply-adds per layer; d^2 elements held per layer.
    Source: arXiv 2312.00761.
    """
    if max_patches is not None and max_patches < 1:
        raise ValueError(f"max_patches must be 1 or more, or None for no limit, got {max_patches}")
    chosen = choose_layers(model, layers)
    device = device_of(model)
    grams = {key: _empty_gram(module) for key, module in chosen.items()}
    names = {id(module): key for key, module in chosen.items()}
    pending = {key: _Sample() for key in chosen}
    share: int | None = None
    generator = torch.Generator().manual_seed(seed)

    def on_call(call: Call) -> None:
        key = names[id(call.module)]
        dtype = _compute_dtype(cast(Tensor, call.module.weight))
        try:
            if share is None:
                grams[key].add_(layer_rows(call.module, call.input).to(dtype))
            else:
                pending[key].add(call, share, dtype, generator)
        except ValueError as error:
            raise ValueError(f"layer {key}: {error}") from error

    with preserved(model), torch.no_grad():
        model.eval()
        # The meta device carries shapes only: counting moves no data.
        total = seen = 0
        if max_patches is not None:
            total = sum(batch.size for batch in read(batches, name, torch.device("meta")))
        with recording(chosen.values(), on_call):
            for batch in track(read(batches, name, device), name, progress):
                if max_patches is not None:
                    before, seen = min(seen, total), seen + batch.size
                    share = max_patches * min(seen, total) // total - max_patches * before // total
                batch.outputs(model)
                for key, sample in pending.items():
                    try:
                        sample.flush(grams[key])
                    except ValueError as error:
                        raise ValueError(f"layer {key}: {error}") from error
    return grams


def choose_layers(model: nn.Module, layers: Sequence[str] | None) -> dict[str, nn.Module]:
    """The supported layers of these names, or all; raises ValueError naming an unknown one."""
    known = supported_layers(model)
    if layers is None:
        return known
    unknown = [name for name in layers if name not in known]
    if unknown:
        raise ValueError(
            f"{', '.join(map(repr, unknown))} is not a Linear, Conv1d or Conv2d with a weight of its own; "
            f"the model has {', '.join(map(repr, known)) or 'none'}"
        )
    return {name: known[name] for name in layers}


class _Sample:
    """A uniform sample of at most ``share`` of one batch's rows, over all calls of a layer in that batch."""

    def __init__(self) -> None:
        self.rows: Tensor | None = None  # [groups, k, d]
        self.seen = 0

    def add(self, call: Call, share: int, dtype: torch.dtype, generator: torch.Generator) -> None:
        new = count_rows(call.module, call.output)
        order = torch.randperm(self.seen + new, generator=generator)[:share]
        # Of a uniform draw from old and new rows, how many are old says how many of the kept ones stay:
        # they are themselves a uniform draw in random order, so the first ones will do.
        stay = int((order < self.seen).sum())
        fresh = order[order >= self.seen] - self.seen
        rows = layer_rows(call.module, call.input, fresh.to(call.input.device)).to(dtype)
        self.rows = rows if self.rows is None else torch.cat([self.rows[:, :stay], rows], 1)
        if self.seen and stay:
            shuffled = torch.randperm(self.rows.shape[1], generator=generator).to(rows.device)
            self.rows = self.rows[:, shuffled]
        self.seen += new

    def flush(self, gram: GramAccumulator) -> None:
        if self.rows is not None:
            gram.add_(self.rows)
        self.rows, self.seen = None, 0


def _empty_gram(module: nn.Module) -> GramAccumulator:
    weight = cast(Tensor, module.weight)
    return GramAccumulator(weight[0].numel(), layer_groups(module), _compute_dtype(weight))


def _compute_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _windows(module: nn.Conv1d | nn.Conv2d, input: Tensor) -> Tensor:
    """Every patch as a view: [N, *out, C, *kernel], sharing the (padded) input's memory."""
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    axes = len(kernel)
    if input.dim() == 1 + axes:  # unbatched
        input = input[None]
    if module.padding == "valid":
        padding = [(0, 0)] * axes
    elif module.padding == "same":
        # torch puts the odd element of "same" padding at the end.
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        padding = [(t // 2, t - t // 2) for t in totals]
    else:
        padding = [(p, p) for p in cast(Iterable[int], module.padding)]
    if any(side for pair in padding for side in pair):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        input = F.pad(input, [side for pair in reversed(padding) for side in pair], mode=mode)
    out = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(input.shape[2:], kernel, stride, dilation, strict=True)
    ]
    steps: Any = input.stride()
    return input.as_strided(
        [input.shape[0], *out, input.shape[1], *kernel],
        [
            steps[0],
            *(step * s for step, s in zip(steps[2:], stride, strict=True)),
            steps[1],
            *(step * d for step, d in zip(steps[2:], dilation, strict=True)),
        ],
    )


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
    finite = torch.isfinite(matrices)
    if not bool(finite.all()):
        raise ValueError(f"{_member(~finite.flatten(-2).all(-1), what)} holds NaN or Inf")


def _member(bad: Tensor, what: str) -> str:
    """Name the first matrix of a batch for which ``bad`` holds."""
    return f"{what}[{', '.join(map(str, bad.nonzero()[0].tolist()))}]" if bad.dim() else what


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _power_of_two(scale: Tensor) -> Tensor:
    """The power of two at or below ``scale`` (1 for 0): dividing by it rounds nothing."""
    return torch.ldexp(torch.ones_like(scale), torch.frexp(_nonzero(scale)).exponent - 1)


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
    scaled = gram / _power_of_two(gram.abs().amax((-2, -1), keepdim=True))
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
