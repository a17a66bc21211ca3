"""The kernels themselves, as typed functions over ``torch.ops.fastunlearn.*``.

Every operator exists for CPU and, in a CUDA build, for CUDA tensors; :mod:`fastunlearn.reference` has the same
functions in plain torch. Samples lie along the first axis. Sums of squares are kept in float32 for float32,
bfloat16 and float16 inputs and in float64 for float64 ones, in a fixed order: equal inputs give equal bits.
Operators write only to the tensors named first, and to nothing when they raise (RuntimeError, with the shapes
that were given). Inputs that are not contiguous are copied; tensors that are written must be contiguous.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import isfinite
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from fastunlearn import _library
from fastunlearn.reference import pack_mask, unpack_mask

_C = _library.load()
_ops: Any = torch.ops.fastunlearn


__all__ = [
    "add_column_noise_",
    "add_rounded_",
    "cholesky_inverse_",
    "codec_choose_",
    "codec_scores",
    "counted",
    "gram_accumulate_",
    "gram_accumulate_conv2d_",
    "grouped_mm_",
    "mask_grads_",
    "mask_starts",
    "masked_adamw_",
    "masked_sgd_",
    "orthogonal_rows_",
    "pack_mask",
    "ratio_edges",
    "ratio_histogram",
    "select_gamma",
    "sketch_",
    "sq_grad_affine",
    "sq_grad_bias",
    "sq_grad_conv2d",
    "sq_grad_embedding",
    "sq_grad_linear",
    "threshold_reset_",
    "unpack_mask",
]


class _Counted:
    """Stands for ``torch.ops.fastunlearn`` while :func:`counted` is open."""

    def __init__(self, calls: Counter[tuple[str, str]]) -> None:
        self._calls = calls

    def __getattr__(self, name: str) -> Callable[..., Any]:
        operator = getattr(torch.ops.fastunlearn, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            device = next(
                (leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), "none"
            )
            self._calls[name, device] += 1
            return operator(*args, **kwargs)

        return call


@contextmanager
def counted() -> Iterator[Counter[tuple[str, str]]]:
    """Counts, by (operator, device type), every call that this module makes while the block runs, in any thread.

    For the account of a run: which kernels it used, and where. Blocks may not be nested; a few microseconds a call.
    """
    global _ops
    if isinstance(_ops, _Counted):
        raise RuntimeError("operators are already being counted")
    calls: Counter[tuple[str, str]] = Counter()
    _ops = _Counted(calls)
    try:
        yield calls
    finally:
        _ops = torch.ops.fastunlearn


def sq_grad_linear(out: Tensor, input: Tensor, grad_output: Tensor) -> Tensor:
    """Add the squared per-sample weight gradients of a linear layer to ``out`` and return it.

    out[p, d] += sum_n (sum_t grad_output[n, t, p] * input[n, t, d])**2, with nothing of size N x P x D stored.

    Args:
        out: [P, D], float32 (float64 for float64 inputs).
        input: [N, D] or [N, ..., D]; all axes between are positions t of one sample.
        grad_output: [N, P] or [N, ..., P], same dtype and leading axes as ``input``.

    On CUDA bfloat16 and float16 go to the tensor cores, and float32 does, rounded to TF32, unless
    ``torch.get_float32_matmul_precision()`` is "highest". Their products are exact and their sums in float32, but cut
    off instead of rounded, so that the error grows with T; float32 at "highest" rounds.

    Cost: 2 N T P D FLOPs, as the ordinary weight gradient, and one multiply-add per weight and sample; on CUDA a
    workspace of at most 16 x P x D. Source: the empirical Fisher diagonal, as DeepClean (Shi et al. 2024) uses it.
    """
    _ops.sq_grad_linear(out, input, grad_output, _allow_tf32())
    return out


def sq_grad_conv2d(
    out: Tensor,
    input: Tensor,
    grad_output: Tensor,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Add the squared per-sample weight gradients of a 2-d convolution to ``out`` and return it.

    Args:
        out: [Co, Ci / groups, kh, kw], float32 (float64 for float64 inputs).
        input: [N, Ci, H, W], as the layer saw it; zeros are padded by ``padding`` on both sides.
        grad_output: [N, Co, Ho, Wo], same dtype as ``input``.
        stride, padding, dilation: pairs (vertical, horizontal).
        groups: divides Ci and Co.

    Tensor cores on CUDA as for :func:`sq_grad_linear`; groups of up to 128 weights (depthwise) take none.

    Cost: 2 N Ho Wo Co (Ci / groups) kh kw FLOPs; patches are unfolded tile by tile and never stored.
    """
    _ops.sq_grad_conv2d(
        out, input, grad_output, list(stride), list(padding), list(dilation), groups, _allow_tf32()
    )  # fmt: skip
    return out


def _allow_tf32() -> bool:
    """Whether torch.get_float32_matmul_precision() is not "highest", in a form that torch.compile can guard."""
    try:
        return bool(torch.backends.cuda.matmul.allow_tf32)
    except RuntimeError:  # set by torch's newer names, beside which it does not answer to the older ones
        return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def sq_grad_affine(out: Tensor, normalized: Tensor, grad_output: Tensor, channel_dim: int = -1) -> Tensor:
    """Add the squared per-sample gradients of a norm layer's weight to ``out`` and return it.

    out[c] += sum_n (sum over all other axes of grad_output * normalized)**2.

    Args:
        out: [C], float32 (float64 for float64 inputs).
        normalized: [N, ..., C, ...], the layer's input after normalisation, before weight and bias.
        grad_output: same shape and dtype.
        channel_dim: the axis of length C, not the first.

    Cost: one read of both inputs.
    """
    _ops.sq_grad_affine(out, normalized, grad_output, channel_dim)
    return out


def sq_grad_bias(out: Tensor, grad_output: Tensor, channel_dim: int = -1) -> Tensor:
    """Add the squared per-sample gradients of a bias to ``out`` and return it.

    out[c] += sum_n (sum over all other axes of grad_output)**2.

    Args:
        out: [C], float32 (float64 for float64 inputs).
        grad_output: [N, ..., C, ...].
        channel_dim: the axis of length C, not the first.

    Cost: one read of ``grad_output``.
    """
    _ops.sq_grad_bias(out, grad_output, channel_dim)
    return out


def sq_grad_embedding(out: Tensor, indices: Tensor, grad_output: Tensor, padding_idx: int | None = None) -> Tensor:
    """Add the squared per-sample gradients of an embedding table to ``out`` and return it.

    out[v, :] += sum_n (sum over t with indices[n, t] == v of grad_output[n, t, :])**2.

    Args:
        out: [V, D], float32 (float64 for float64 inputs).
        indices: [N, ...] int64 or int32, in [0, V); on CUDA an index outside traps in the kernel, as torch's does.
        grad_output: [N, ..., D].
        padding_idx: row whose gradient is zero; negative values count from the end.

    Cost: one stable sort of the indices and one read of ``grad_output``; rows no index names are not touched.
    """
    _ops.sq_grad_embedding(out, indices, grad_output, padding_idx)
    return out


_GRAM_CHUNK = 4096


def gram_accumulate_(gram: Tensor, rows: Tensor, weights: Tensor | None = None) -> Tensor:
    """Add the second moments of rows of features to ``gram`` and return it.

    gram[g] += sum_n weights[n] * rows[g, n, :]^T rows[g, n, :], exactly symmetric. Products of bfloat16 and float16 are
    exact in float32, and a float64 ``gram``, flushed every 4,096 rows, keeps a stream of any length from drifting.
    On a CPU rows are the patches of a 1 x 1 convolution (:func:`gram_accumulate_conv2d_`, which spares half the
    products: 2.7 to 3.4 times as fast as MKL's matmul at [4096, 2304] on two cores). On CUDA the products are torch's
    matmul over chunks of 4,096 rows, with torch's precision settings (``torch.set_float32_matmul_precision``).

    Args:
        gram: [G, d, d], float32 or float64; float64 for float64 rows.
        rows: [G, n, d], or [n, d] for one group; float32, bfloat16, float16 or float64.
        weights: [n], float32 (float64 for float64 rows); may be negative. 1 by default.

    Raises RuntimeError, before anything is written, for shapes, dtypes or devices other than these.

    Cost: G n d^2 multiply-adds, one d x d product per group and chunk. Source: Kodge et al. 2024, arXiv 2312.00761.
    """
    op = "gram_accumulate_"
    if gram.dtype not in (torch.float32, torch.float64):
        raise RuntimeError(f"{op}: gram is {_describe(gram)}; second moments are kept in float32 or float64")
    if gram.dim() != 3 or gram.shape[1] != gram.shape[2]:
        raise RuntimeError(f"{op}: gram is {_describe(gram)}, expected [groups, d, d]")
    groups, d = gram.shape[:2]
    if rows.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise RuntimeError(f"{op}: rows are {_describe(rows)}; float32, bfloat16, float16 or float64 is needed")
    if rows.dtype == torch.float64 and gram.dtype != torch.float64:
        raise RuntimeError(f"{op}: rows are {_describe(rows)} and need a float64 gram, got {_describe(gram)}")
    fits = rows.dim() == 3 or (rows.dim() == 2 and groups == 1)
    if not fits or rows.shape[-1] != d or (rows.dim() == 3 and rows.shape[0] != groups):
        wanted = f"[{groups}, n, {d}]" + (f" or [n, {d}]" if groups == 1 else "")
        raise RuntimeError(f"{op}: rows are {_describe(rows)}, expected {wanted} for gram {_describe(gram)}")
    n, accumulator = rows.shape[-2], _accumulator(rows)
    if weights is not None and (weights.shape != (n,) or weights.dtype != accumulator):
        raise RuntimeError(f"{op}: weights are {_describe(weights)}, expected {accumulator} [{n}], one per row")
    if any(t.device != gram.device for t in (rows, weights) if t is not None):
        raise RuntimeError(f"{op}: rows are {_describe(rows)} but gram is {_describe(gram)}; move all to one device")
    with torch.no_grad():
        stacked = rows if rows.dim() == 3 else rows[None]
        if gram.device.type == "cpu" and gram.is_contiguous():
            for total, part in zip(gram, stacked, strict=True):
                images = part.reshape(n, d, 1, 1)
                _ops.gram_accumulate_conv2d_(total[None], images, [1, 1], [1, 1], [0, 0], [1, 1], weights)
            return gram
        for first in range(0, n, _GRAM_CHUNK):
            chunk = stacked[:, first : first + _GRAM_CHUNK].to(accumulator)
            left = chunk if weights is None else chunk * weights[first : first + _GRAM_CHUNK, None]
            product = torch.matmul(left.mT, chunk)
            # A library need not round both sides of the diagonal alike.
            gram.add_((product + product.mT).div_(2))
    return gram


def gram_accumulate_conv2d_(
    gram: Tensor,
    images: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    weights: Tensor | None = None,
) -> Tensor:
    """Add the second moments of the patches under a 2-d convolution to ``gram`` and return it.

    gram[g] += sum over images n and output positions of weights[n] * patch[g]^T patch[g], exactly symmetric, without an
    unfolded copy of the images (implicit im2col). A patch's features are ordered (channel, row, column), as the
    convolution's weight is.

    Args:
        gram: [groups, d, d] with d = C / groups * kh * kw, float32 or float64; float64 for float64 images. A float64
            ``gram`` keeps a stream of any length from drifting: sums in float32 never hold more than 4,096 patches.
        images: [N, C, H, W], as the layer saw them, float32, bfloat16, float16 or float64.
        kernel_size, stride, dilation: pairs (vertical, horizontal).
        padding: a pair too, of zeros on both sides; pad other modes with ``torch.nn.functional.pad`` first.
        weights: [N], float32 (float64 for float64 images); may be negative. 1 by default.

    Raises RuntimeError also where the kernel does not fit into a padded image.

    Cost: N Ho Wo C / groups kh kw (d + 1) / 2 multiply-adds, half of the full product: only tiles on and above the
    diagonal are computed, 64 x 64 on CUDA. On a CPU 8 MB of packed patches (one layer of 256 patches if that is
    more), on CUDA at most 16 Gram matrices of workspace, and none once the tiles fill the GPU.
    Source: Kodge et al. 2024, arXiv 2312.00761.
    """
    _ops.gram_accumulate_conv2d_(
        gram, images, list(kernel_size), list(stride), list(padding), list(dilation), weights
    )  # fmt: skip
    return gram


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"


PerTensor = float | Sequence[float] | Tensor
ResetMode = Literal["zero", "mean", "init", "dampen"]


def threshold_reset_(
    weights: Sequence[Tensor],
    forget: Sequence[Tensor],
    retain: Sequence[Tensor],
    gamma: PerTensor,
    mode: ResetMode = "zero",
    eps: PerTensor = 0.0,
    init: Sequence[Tensor] | None = None,
    lambda_: float = 1.0,
    means: Sequence[float] | Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Reset the weights whose ratio forget / (retain + eps) passes gamma, for a whole list of tensors in one launch.

    The ratio is rounded to float32 and compared with gamma in float32, so a gamma of :func:`select_gamma` cuts
    exactly where it says. A dead weight (both importances zero) and a NaN on either side keep; x / 0 resets.

    Args:
        weights: written in place; any mix of float32, bfloat16, float16 and float64, on one device. Those that are
            not contiguous (channels_last) are staged through a copy.
        forget, retain: importances shaped like the weights, float32, bfloat16 or float64; each pair of one dtype.
        gamma: positive; one for all, one per tensor, or a tensor of either on the device, which is not read by the
            host (a NaN in it keeps everything).
        mode: ``"zero"``; ``"mean"``, the mean of the tensor before; ``"init"``, the values in ``init``; ``"dampen"``,
            weight * min(1, lambda_ / ratio).
        eps: added to ``retain``, not negative, in the units of an importance; as ``gamma``, one or one per tensor.
        init: shaped and typed like the weights, for ``mode="init"``.
        lambda_: positive, for ``mode="dampen"``.
        means: one per tensor, in place of their own for ``mode="mean"``, where tensors are shards of larger ones.

    Returns:
        masks: per tensor the reset weights as bits, int32 [ceil(numel / 32)] (see :func:`unpack_mask`).
        counts: int64 [len(weights)], exact.

    Raises ValueError for a gamma, eps, mode, init or lambda_ other than these.

    Cost: one read of both importances, a read and a write of the weights where something changes; ``"mean"`` reads
    the weights once more. Sources: DeepClean, Shi et al. 2024; selective synaptic dampening, Foster et al. 2024.
    """
    if mode not in get_args(ResetMode):
        raise ValueError(f"mode must be one of {', '.join(get_args(ResetMode))}, got {mode!r}")
    if (init is not None) != (mode == "init"):
        raise ValueError('init= and mode="init" belong together')
    if not (isfinite(lambda_) and lambda_ > 0):
        raise ValueError(f"lambda_ must be a positive number, got {lambda_}")
    staged = [w if w.is_contiguous() else w.contiguous() for w in weights]
    masks = [w.new_empty((w.numel() + 31) // 32, dtype=torch.int32) for w in weights]
    device = weights[0].device if weights else torch.device("cpu")
    counts = torch.empty(len(weights), dtype=torch.int64, device=device)
    rules = torch.zeros(len(weights), 3, dtype=torch.float64, device=device)
    _assign(rules[:, 0], "gamma", gamma, positive=True)
    _assign(rules[:, 1], "eps", eps)
    if (means is not None) > (mode == "mean"):
        raise ValueError('means= is for mode="mean"')
    if means is not None:
        rules[:, 2] = torch.as_tensor(means, dtype=torch.float64)
    elif mode == "mean" and weights:
        rules[:, 2] = torch.stack([w.detach().mean(dtype=_accumulator(w)).double() for w in weights]).nan_to_num()
    number = {"init": 1, "dampen": 2}.get(mode, 0)
    _ops.threshold_reset_(
        staged, list(forget), list(retain), rules, number, lambda_, list(init or ()), masks, counts
    )  # fmt: skip
    _write_back(weights, staged)
    return masks, counts


def ratio_histogram(
    forget: Sequence[Tensor], retain: Sequence[Tensor], eps: PerTensor = 0.0, per_tensor: bool = False
) -> Tensor:
    """How many ratios forget / (retain + eps) fall into each bin of :func:`ratio_edges`, eight bins an octave.

    Args as :func:`threshold_reset_`. Returns int64 [2041], or [tensors, 2041] if ``per_tensor``; dead weights (both
    importances zero) and NaN are in no bin, so the sum counts the live ones. Histograms of several devices add up.

    Cost: one read of both importances.
    """
    device = forget[0].device if forget else torch.device("cpu")
    rows = len(forget) if per_tensor else 1
    counts = _count(forget, retain, _eps(forget, eps), torch.zeros(rows, dtype=torch.int32, device=device), 0)
    counts = counts[:, : _LAST_BIN + 1]
    return counts if per_tensor else counts[0]


def ratio_edges() -> Tensor:
    """Bin b of :func:`ratio_histogram` holds ratios from edges[b] to below edges[b + 1]: float32 [2041], 0 to inf."""
    return (torch.arange(_LAST_BIN + 1, dtype=torch.int32) << 20).view(torch.float32)


def select_gamma(
    forget: Sequence[Tensor],
    retain: Sequence[Tensor],
    fraction: float,
    eps: PerTensor = 0.0,
    per_tensor: bool = False,
    reduce: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """The gamma above which the given share of the live weights lies: exact, with no sort and no copy.

    With k = round(fraction * live), at most live - 1, gamma is the (k + 1)-th largest of the ratios that
    :func:`threshold_reset_` compares, so exactly k weights pass it, fewer only where ratios are equal. Live are the
    weights with any importance at all. Radix selection on the bits of the float32 ratios, for any number of weights.

    Args:
        forget, retain, eps: as :func:`threshold_reset_`.
        fraction: between 0 and 1.
        per_tensor: one gamma for each tensor instead of one for all.
        reduce: called with each table of counts, int64 on the device of the importances, to replace it by its sum over
            ranks that hold other shards of the same tensors; the selection is then exact over all of them.

    Returns: float32, 0-dimensional or [tensors], on the device of the importances; NaN where no weight is live, which
    resets nothing. The host waits for nothing, given a number or a tensor on the device as ``eps``.

    Raises ValueError for a fraction outside (0, 1).

    Cost: three reads of both importances; a few tables of 16 KB, or of 16 KB per tensor.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie between 0 and 1, got {fraction}")
    device = forget[0].device if forget else torch.device("cpu")
    rows = len(forget) if per_tensor else 1
    table = _eps(forget, eps)
    prefix = torch.zeros(rows, dtype=torch.int32, device=device)
    for level in range(_LEVELS):
        counts = _count(forget, retain, table, prefix, level)
        if reduce is not None:
            reduce(counts)
        if level == 0:
            live = counts.sum(1)
            rank = torch.minimum((live.double() * fraction).round().long(), live - 1)  # of larger ratios
        at_least = counts.flip(1).cumsum(1).flip(1)  # at_least[d]: how many have digit d or a larger one
        digit = ((at_least > rank[:, None]).sum(1, keepdim=True) - 1).clamp(min=0)
        rank = rank - (at_least - counts).gather(1, digit)[:, 0]
        prefix = (prefix << (0 if level == 0 else 10)) | digit[:, 0].int()
    gamma = prefix.view(torch.float32).masked_fill(live == 0, torch.nan)
    return gamma if per_tensor else gamma[0]


_LEVELS, _BINS = 3, 2048
_LAST_BIN = 255 << 3  # of infinity; what lies above would be NaN


def _count(forget: Sequence[Tensor], retain: Sequence[Tensor], eps: Tensor, prefix: Tensor, level: int) -> Tensor:
    counts = torch.zeros(len(prefix), _BINS, dtype=torch.int64, device=prefix.device)
    _ops.ratio_histogram_(counts, list(forget), list(retain), eps, prefix, level)
    return counts


def _eps(tensors: Sequence[Tensor], eps: PerTensor) -> Tensor:
    device = tensors[0].device if tensors else torch.device("cpu")
    table = torch.zeros(len(tensors), dtype=torch.float64, device=device)
    _assign(table, "eps", eps)
    return table


def _assign(column: Tensor, name: str, value: PerTensor, positive: bool = False) -> None:
    """Write one value, or one per tensor, into a column of a table; numbers are checked, tensors are not read."""
    if not isinstance(value, Tensor):
        wanted = "positive" if positive else "not negative"
        for number in (value,) if isinstance(value, (int, float)) else value:
            if not (isfinite(number) and (number > 0 if positive else number >= 0)):
                raise ValueError(f"{name} must be finite and {wanted}, got {number}")
        if isinstance(value, (int, float)):
            column.fill_(value)  # a launch, where a copy from the host could not be captured in a graph
            return
        value = torch.tensor(list(value), dtype=torch.float64)
    if value.dim() > 1 or value.numel() not in (1, len(column)):
        raise ValueError(f"{name} must be one number or one for each of {len(column)} tensors, got {list(value.shape)}")
    column.copy_(value)


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def mask_grads_(grads: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Set gradients to zero wherever the mask bit is 0 (NaN included), in one launch.

    For an optimizer of one's own without weight decay; :func:`masked_sgd_` and :func:`masked_adamw_` need no masked
    gradient and keep no state for the rest.

    Args:
        grads: written in place, as ``weights`` of :func:`threshold_reset_`.
        masks: int32 bit masks as returned there, in row-major order of each gradient.
    """
    if not grads and not masks:
        return  # nothing that could tell the dispatcher a device
    staged = [g if g.is_contiguous() else g.contiguous() for g in grads]
    _ops.mask_grads_(staged, list(masks))
    _write_back(grads, staged)


def mask_starts(mask: Tensor, elements: int) -> Tensor:
    """Where the state of a masked step begins: bits set before each block of 32 words, and in all.

    Args:
        mask: int32 [words], as of :func:`threshold_reset_`.
        elements: of the masked tensor; bits of the last word beyond them count nothing.

    Returns int64 [ceil(words / 32) + 1]; the last entry is the length of the state. Cost: a few temporaries of twice
    the size of the mask.
    """
    x = mask.long() & 0xFFFFFFFF
    if elements % 32:
        x[-1] &= (1 << elements % 32) - 1
    # Population count in parallel, Warren, Hacker's Delight, section 5-1.
    x = x - (x >> 1 & 0x55555555)
    x = (x & 0x33333333) + (x >> 2 & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    bits = (x * 0x01010101 & 0xFFFFFFFF) >> 24
    blocks = F.pad(bits, (0, -len(bits) % 32)).view(-1, 32).sum(1)
    return F.pad(blocks.cumsum(0), (1, 0))


def masked_sgd_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    masks: Sequence[Tensor],
    starts: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> None:
    """One step of SGD, as torch.optim.SGD takes it, on the weights whose mask bit is 1; the others are not touched.

    Args:
        weights: written in place, as of :func:`threshold_reset_`.
        grads: shaped and typed like the weights; read where the bit is 1.
        masks: int32 bit masks, in row-major order of each weight.
        starts: of each mask, :func:`mask_starts`.
        momentum_buffers: float32 (float64 for float64 weights) [bits of the mask], zero before the first step; may be
            empty without momentum. On a CPU a state or ``starts`` that does not fit its mask is refused; on CUDA, where
            looking would wait for the device, they are trusted.

    Cost: a read of the masks, and of weight, gradient and buffer where a bit is set; one launch.
    """
    _masked_step(
        "masked_sgd_", weights, grads, masks, starts, (momentum_buffers,), lr, momentum, weight_decay, nesterov
    )


def masked_adamw_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    masks: Sequence[Tensor],
    starts: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    step: int = 1,
) -> None:
    """One step of AdamW, as torch.optim.AdamW takes it, on the weights whose mask bit is 1; as :func:`masked_sgd_`.

    ``means`` and ``squares`` are the moments, [bits of the mask], zero before ``step`` 1.
    """
    if step < 1:
        raise ValueError(f"step counts from 1, got {step}")
    options = (lr, beta1, beta2, eps, weight_decay, step)
    _masked_step("masked_adamw_", weights, grads, masks, starts, (means, squares), *options)


def _masked_step(
    op: str,
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    masks: Sequence[Tensor],
    starts: Sequence[Tensor],
    states: tuple[Sequence[Tensor], ...],
    *options: float,
) -> None:
    if not weights and not grads:
        return
    staged = [w if w.is_contiguous() else w.contiguous() for w in weights]
    getattr(_ops, op)(staged, list(grads), list(masks), list(starts), *map(list, states), *options)
    _write_back(weights, staged)


def _write_back(tensors: Sequence[Tensor], staged: Sequence[Tensor]) -> None:
    with torch.no_grad():  # parameters are leaves
        for tensor, copy in zip(tensors, staged, strict=True):
            if copy is not tensor:
                tensor.copy_(copy)


def grouped_mm_(
    out: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor], transpose: bool = False
) -> Sequence[Tensor]:
    """Many products of different shapes at once: out_i = a_i @ b_i, or a_i.T @ b_i; returns ``out``.

    The bits of a product depend on its own factors alone: not on the rest of the list, nor on the number of threads.

    Args:
        out: [rows_i, columns_i], float32 or float64; overwritten. float64 beside float32 factors sums the exact
            products in float64.
        a: [rows_i, depth_i], or [depth_i, rows_i] with ``transpose``; all float32 or all float64.
        b: [depth_i, columns_i], same dtype.
        transpose: transpose every a_i.

    Cost: 2 rows depth columns FLOPs each. CUDA: one launch for up to 400 products, plain tiles (tall and skinny
    factors are its purpose), a workspace of depth / 2048 outputs where the depth is above 2048.
    """
    _ops.grouped_mm_(list(out), list(a), list(b), transpose)
    return out


def sketch_(
    out: Sequence[Tensor], matrices: Sequence[Tensor], seeds: Sequence[int], transpose: bool = False
) -> Sequence[Tensor]:
    """Random projections of many matrices: out_i = matrix_i @ Omega(seed_i), or matrix_i.T @ Omega; returns ``out``.

    Omega holds independent standard normal numbers; each is a function of (seed, row, column) alone
    (:func:`fastunlearn.reference.normal_matrix`), made where it is needed and never stored, so more columns keep those
    there were.

    Args:
        out: [rows_i, columns_i], float32 (or float64); overwritten.
        matrices: [rows_i, depth_i], or [depth_i, rows_i] with ``transpose``; all float32 or all float64.
        seeds: one per matrix, from -2**63 to 2**63 - 1.
        transpose: transpose every matrix.

    Cost: as :func:`grouped_mm_`, and one normal number per block of 512 (CPU) or 128 (CUDA) rows and entry of Omega.
    Source: Halko, Martinsson & Tropp 2011 (arXiv 0909.4061); Philox4x32-10 of Salmon et al. 2011.
    """
    _ops.sketch_(list(out), list(matrices), list(seeds), transpose)
    return out


def cholesky_inverse_(grams: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Replace Gram matrices G = R^T R by their upper triangular R; returns (R^-1, ranks). Dependent columns drop out.

    Where what is left of G_jj falls to tolerance * G_jj or below, row j of R and row and column j of the inverse are
    zero: Y R^-1 then has orthonormal columns and zero ones.

    Args:
        grams: [B, k, k], float64, symmetric positive semidefinite; the upper triangle is read.
        tolerance: relative to each diagonal element, a squared length.

    Returns:
        inverses [B, k, k], and int64 [B]: columns kept, -1 (and all zero) where a diagonal is not finite.

    Cost: 2/3 k^3 FLOPs each.
    """
    inverses = torch.empty_like(grams)
    ranks = torch.empty(grams.shape[0], dtype=torch.int64, device=grams.device)
    _ops.cholesky_inverse_(grams, inverses, ranks, tolerance)
    return inverses, ranks


def orthogonal_rows_(rows: Tensor, rotation: Tensor | None = None) -> Tensor:
    """Rotate the rows of every matrix until they are orthogonal to one another: one-sided Jacobi, in place.

    With A the matrix given, A = rotation.T @ rows afterwards: row norms are the singular values of A (in no order),
    directions of rows its right singular vectors, rows of ``rotation`` its left ones.

    Args:
        rows: [B, k, k], float32 or float64; squares of its entries must neither overflow nor vanish.
        rotation: alike, overwritten; leave it out where the left vectors are not needed.

    Returns:
        int64 [B]: sweeps taken, -1 where 30 did not suffice.

    Cost: 6 to 10 sweeps of 3 k^3 multiply-adds (6 k^3 with ``rotation``). CUDA: one block per matrix, in shared memory
    up to k = 240 in float32 (k = 120 in float64 with ``rotation``) on a GPU with 227 KB of it, else through L2. A CPU
    works in float64 whatever the dtype.
    """
    sweeps = torch.zeros(rows.shape[0], dtype=torch.int64, device=rows.device)
    _ops.orthogonal_rows_(rows, rotation, sweeps)
    return sweeps


def codec_scores(
    features: Tensor, rank_terms: Tensor, distances: Tensor | None = None, candidates: Tensor | None = None
) -> Tensor:
    """Conditional dependence T(Y, feature | chosen) of every candidate feature, in one pass.

    M(i) is the j that minimises distances[i, j] + (x_i - x_j)**2, the nearest neighbour of row i once the feature has
    joined those behind ``distances``; of equally near rows the lowest. Nothing chosen, M(i) is one of the rows beside i
    in order of x, by |x_i - x_j|, whose square may overflow or vanish. A row without any at a finite distance counts
    as if its neighbour had rank 0. The sums are of integers: equal inputs give equal bits on any number of threads.
    Which of two rows is nearer, where they differ in the last bit, can depend on the machine's fused multiply-add.

    Args:
        features: [n, p], float32 or float64, 2 <= n <= 46,340. NaN in a feature spoils the score of that one alone.
        rank_terms: int32 [2, n]. Row 0: R_i, how many y_j <= y_i. Row 1, with ``distances``: min(R_i, R_N(i)) with N(i)
            the nearest neighbour over the chosen features, as :func:`codec_choose_` writes it; without: L_i, how
            many y_j >= y_i.
        distances: [n, n] like ``features``, symmetric squared distances over the chosen features, the diagonal ignored;
            None while nothing is chosen, for T(Y, feature).
        candidates: bool [p], the features to score; all by default.

    Returns:
        float64 [p]: T; 0 where its denominator is 0, -inf for features that are no candidates.

    Cost: nothing chosen, O(n log n) per feature (a sort); else n**2 fused multiply-adds and comparisons per feature on
    CUDA. A CPU lists the rows nearest to each row once, as many as a sample of rows and candidates asks for (at worst
    all n), and rows that do not settle among them fall back on all n. Nothing n x n is stored per feature. Source:
    Azadkia & Chatterjee 2021; Mehta et al. 2022 (L-FOCI).
    """
    scores = torch.empty(features.shape[-1], dtype=torch.float64, device=features.device)
    if candidates is None:
        candidates = torch.ones(features.shape[-1], dtype=torch.bool, device=features.device)
    _ops.codec_scores_(scores, features, rank_terms, distances, candidates)
    return scores


def codec_choose_(distances: Tensor, rank_terms: Tensor, column: Tensor) -> Tensor:
    """Let one more feature join the chosen ones: update ``distances`` and the rank terms in place.

    distances[i, j] += (column[i] - column[j])**2 and rank_terms[1, i] = min(R_i, R_N(i)), with N(i) the j != i at the
    least finite distance, the lowest of equals; 0 where there is none.

    Args:
        distances: [n, n], float32 or float64; zeros before the first feature.
        rank_terms: int32 [2, n]; row 0 holds R_i.
        column: [n] like ``distances``, the feature.

    Returns:
        ``distances``.

    Cost: n**2 multiply-adds, one read and one write of ``distances``.
    """
    _ops.codec_choose_(distances, rank_terms, column)
    return distances


def add_column_noise_(values: Tensor, scales: Tensor, seed: int) -> Tensor:
    """values[i, j] += scales[j] * standard normal number of (seed, i, j), in place; returns ``values``.

    The numbers are counter-based (Philox4x32-10 and a Box-Muller transform in exactly rounded operations): they do not
    depend on the device, the number of threads, or the shape of ``values``.

    Args:
        values: [n, p], float32 or float64.
        scales: [p] like ``values``.
        seed: any int64.
    """
    _ops.add_column_noise_(values, scales, seed)
    return values


def add_rounded_(
    sums: Sequence[Tensor], addends: Sequence[Tensor], seed: int, step: int, offsets: Sequence[int]
) -> Sequence[Tensor]:
    """sums_i += addends_i in bfloat16 with stochastic rounding, for a whole list in one launch; returns ``sums``.

    The float32 sum is rounded to the bfloat16 below or above it, above with a probability of its distance from the one
    below, so that the result is the float32 sum on average, where rounding to nearest would lose every addend below
    2**-9 of its sum. A float32 sum that bfloat16 can represent stays as it is; beyond the largest finite bfloat16 it is
    rounded to nearest; infinities stay infinite, and NaN becomes the one quiet NaN.

    The 16 random bits of element j of tensor i are a function of (seed, step, offsets[i] + j) alone, j counting in
    row-major order: parts of a parameter that begin at their flat position get the bits of the whole, and results
    depend neither on the device nor on the number of threads. Tensors whose ranges of positions overlap share their
    bits, so independent ones need ranges of their own, and every addition to a tensor a step of its own.

    Args:
        sums: bfloat16, written in place, on one device. Those that are not contiguous are staged through a copy.
        addends: float32, shaped like the sums.
        seed, step: any int64.
        offsets: position of the first element of each tensor, from 0 to 2**62 - 1.

    Cost: 6 bytes read and 2 written per element, and a Philox counter for every eight; eight are one vector on CUDA
    where an element at a position that is a multiple of 8 lies on 16 bytes. Source: Philox4x32-10, Salmon et al. 2011.
    """
    if not sums and not addends and not offsets:
        return sums  # nothing that could tell the dispatcher a device
    staged = [s if s.is_contiguous() else s.contiguous() for s in sums]
    _ops.add_rounded_(staged, list(addends), seed, step, list(offsets))
    _write_back(sums, staged)
    return sums


def _nothing(*args: object, **kwargs: object) -> None:
    """The fake kernel of every operator here: they write into their arguments and return nothing."""


for _name in (
    "sq_grad_linear", "sq_grad_conv2d", "sq_grad_affine", "sq_grad_bias", "sq_grad_embedding",
    "threshold_reset_", "ratio_histogram_", "mask_grads_", "masked_sgd_", "masked_adamw_",
    "grouped_mm_", "sketch_", "cholesky_inverse_", "orthogonal_rows_",
    "gram_accumulate_conv2d_", "codec_scores_", "codec_choose_", "add_column_noise_",
    "add_rounded_",
):  # fmt: skip
    torch.library.register_fake(f"fastunlearn::{_name}", _nothing)
