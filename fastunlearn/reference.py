"""Every operator in plain torch: the specification, and the oracle of the tests.

The functions have the contracts of :mod:`fastunlearn.ops`, run on any device and dtype (float64 included) and
favour being obviously right over being fast: some hold one gradient per sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def sq_grad_linear(out: Tensor, input: Tensor, grad_output: Tensor) -> Tensor:
    """out[p, d] += sum_n (sum_t grad_output[n, t, p] * input[n, t, d])**2."""
    a, g = _positions(input.to(out.dtype)), _positions(grad_output.to(out.dtype))
    return out.add_(torch.einsum("ntp,ntd->npd", g, a).square().sum(0))


def _positions(values: Tensor) -> Tensor:
    """[N, ..., features] -> [N, T, features], also of no elements."""
    return values.reshape(values.shape[0], values.shape[1:-1].numel(), values.shape[-1])


def sq_grad_conv2d(
    out: Tensor,
    input: Tensor,
    grad_output: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The same over unfolded patches: out [Co, Ci/groups, kh, kw], input [N, Ci, H, W], grad_output [N, Co, Ho, Wo]."""
    samples, channels = input.shape[:2]
    patches = F.unfold(
        input.to(out.dtype), tuple(out.shape[2:]), tuple(dilation), tuple(padding), tuple(stride)
    )  # [N, Ci * kh * kw, T]
    a = patches.reshape(samples, groups, channels // groups * out.shape[2] * out.shape[3], patches.shape[2])
    g = grad_output.to(out.dtype).reshape(samples, groups, out.shape[0] // groups, patches.shape[2])
    return out.add_(torch.einsum("ngpt,ngdt->ngpd", g, a).square().sum(0).reshape(out.shape))


def sq_grad_affine(out: Tensor, normalized: Tensor, grad_output: Tensor, channel_dim: int = -1) -> Tensor:
    """out[c] += sum_n (sum_t grad_output[n, t, c] * normalized[n, t, c])**2, t over every other axis."""
    g = grad_output.to(out.dtype) * normalized.to(out.dtype)
    return sq_grad_bias(out, g, channel_dim)


def sq_grad_bias(out: Tensor, grad_output: Tensor, channel_dim: int = -1) -> Tensor:
    """out[c] += sum_n (sum_t grad_output[n, t, c])**2, t over every other axis."""
    g = grad_output.to(out.dtype).movedim(channel_dim, -1)
    return out.add_(_positions(g).sum(1).square().sum(0))


def sq_grad_embedding(out: Tensor, indices: Tensor, grad_output: Tensor, padding_idx: int | None = None) -> Tensor:
    """out[v, :] += sum_n (sum over t with indices[n, t] == v of grad_output[n, t, :])**2, v != padding_idx."""
    for ids, g in zip(indices, grad_output, strict=True):
        flat = ids.reshape(-1)
        rows = torch.zeros_like(out).index_add_(0, flat, g.reshape(flat.numel(), -1).to(out.dtype))
        if padding_idx is not None:
            rows[padding_idx] = 0
        out.add_(rows.square())
    return out


def importance_ratio(forget: Tensor, retain: Tensor, eps: float = 0.0) -> Tensor:
    """forget / (retain + eps) as float32 of the same shape; NaN for a dead weight, whose importances are both zero."""
    wide = torch.float64 if forget.dtype == torch.float64 else torch.float32
    f, r = forget.to(wide), retain.to(wide)
    ratio = (f / (r + torch.tensor(eps, dtype=wide, device=f.device))).float()
    return ratio.masked_fill((f == 0) & (r == 0), torch.nan)


def threshold_reset_(
    weights: Sequence[Tensor],
    forget: Sequence[Tensor],
    retain: Sequence[Tensor],
    gamma: float | Sequence[float],
    mode: str = "zero",
    eps: float | Sequence[float] = 0.0,
    init: Sequence[Tensor] | None = None,
    lambda_: float = 1.0,
) -> tuple[list[Tensor], Tensor]:
    """weight = 0 | mean | init | weight * min(1, lambda_ / ratio) where the ratio of importances passes gamma."""
    masks, counts = [], []
    gammas, floors = ([v] * len(weights) if isinstance(v, (int, float)) else list(v) for v in (gamma, eps))
    for i, (w, f, r) in enumerate(zip(weights, forget, retain, strict=True)):
        ratio = importance_ratio(f, r, floors[i])
        reset = ratio > torch.tensor(gammas[i], dtype=torch.float32, device=ratio.device)
        wide = torch.float64 if w.dtype == torch.float64 else torch.float32
        if mode == "dampen":
            factor = torch.tensor(lambda_, dtype=wide, device=w.device) / ratio.to(wide)  # one rounding
            new = (w.to(wide) * factor.clamp(max=1)).to(w.dtype)
        elif mode == "init":
            assert init is not None
            new = init[i]
        else:
            new = w.mean(dtype=wide).to(w.dtype) if mode == "mean" else torch.zeros_like(w)
        w.copy_(torch.where(reset, new, w))
        masks.append(pack_mask(reset))
        counts.append(reset.sum())
    return masks, torch.stack(counts) if counts else torch.zeros(0, dtype=torch.int64)


def select_gamma(
    forget: Sequence[Tensor], retain: Sequence[Tensor], fraction: float, eps: float | Sequence[float] = 0.0
) -> Tensor:
    """The (k + 1)-th largest ratio of all tensors together, k = round(fraction * live), by sorting."""
    floors = [eps] * len(forget) if isinstance(eps, (int, float)) else list(eps)
    ratios = [importance_ratio(f, r, e).flatten() for f, r, e in zip(forget, retain, floors, strict=True)]
    live = torch.cat([torch.zeros(0), *(r[r >= 0] for r in ratios)])
    if not len(live):
        return torch.tensor(torch.nan)
    return live.sort(descending=True).values[min(round(fraction * len(live)), len(live) - 1)]


def mask_grads_(grads: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """grad = 0 wherever the mask bit is 0; a NaN there is overwritten too."""
    for g, mask in zip(grads, masks, strict=True):
        g.masked_fill_(~unpack_mask(mask, g.shape), 0)


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
    """torch.optim.SGD on the masked weights; the buffers hold only theirs, in row-major order."""
    for w, g, mask, buffer in zip(weights, grads, masks, momentum_buffers, strict=True):
        where = unpack_mask(mask, w.shape)
        old, grad = w[where].to(buffer.dtype), g[where].to(buffer.dtype)
        grad = grad + weight_decay * old
        if momentum:
            buffer.mul_(momentum).add_(grad)
            grad = grad + momentum * buffer if nesterov else buffer
        w[where] = (old - lr * grad).to(w.dtype)


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
    """torch.optim.AdamW on the masked weights; the moments hold only theirs, in row-major order."""
    for w, g, mask, mean, square in zip(weights, grads, masks, means, squares, strict=True):
        where = unpack_mask(mask, w.shape)
        old, grad = w[where].to(mean.dtype), g[where].to(mean.dtype)
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = (square / (1 - beta2**step)).sqrt() + eps
        w[where] = (old * (1 - lr * weight_decay) - lr / (1 - beta1**step) * mean / root).to(w.dtype)


def pack_mask(mask: Tensor) -> Tensor:
    """bool [any shape] -> int32 [ceil(numel / 32)]; bit j of word i is element 32 i + j in row-major order."""
    flat = mask.reshape(-1).to(torch.int64)
    bits = F.pad(flat, (0, -flat.numel() % 32)).reshape(-1, 32)
    words = (bits << torch.arange(32, device=mask.device)).sum(1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack_mask(words: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of :func:`pack_mask`: int32 words -> bool of ``shape``."""
    count = torch.Size(shape).numel()
    octets = words.contiguous().view(torch.uint8)  # the low one first; a byte a bit at most is held
    bits = octets[:, None] >> torch.arange(8, dtype=torch.uint8, device=words.device)
    return bits.bitwise_and_(1).view(torch.bool).reshape(-1)[:count].reshape(tuple(shape))


def normal_matrix(seed: int, rows: int, columns: int) -> Tensor:
    """Omega [rows, columns] in float64: Philox4x32-10 keyed by the seed, Box-Muller; the numbers of ``ops.sketch_``.

    Counter (row // 4, column) gives rows 4 i to 4 i + 3 of a column: two pairs, radius from the 24 upper bits of one
    word, angle from the 26 upper bits of the next.
    """
    blocks = -(-rows // 4)
    row = torch.arange(blocks)[:, None].expand(blocks, columns)
    column = torch.arange(columns)[None, :].expand(blocks, columns)
    c = _philox(seed, row, column)
    out = torch.empty(blocks, 4, columns, dtype=torch.float64)
    for pair in range(2):
        u = ((c[2 * pair] >> 8).double() + 0.5) * 2.0**-24
        turn = (c[2 * pair + 1] >> 30).double() / 4
        turn += ((c[2 * pair + 1] >> 6 & 0xFFFFFF).double() + 0.5 - 2.0**23) * 2.0**-26
        radius, angle = (-2 * u.log()).sqrt(), 2 * torch.pi * turn
        out[:, 2 * pair], out[:, 2 * pair + 1] = radius * angle.cos(), radius * angle.sin()
    return out.reshape(4 * blocks, columns)[:rows]


def _philox(key: int, low: Tensor, high: Tensor) -> list[Tensor]:
    """Philox4x32-10: the four 32-bit words of every counter, in int64; ``low`` and ``high`` are its int64 halves."""
    word = 2**32 - 1
    c = [low & word, low >> 32 & word, high & word, high >> 32 & word]
    k0, k1 = key & word, key >> 32 & word
    for _ in range(10):
        first, second = _wide_product(0xD2511F53, c[0]), _wide_product(0xCD9E8D57, c[2])
        c = [second[0] ^ c[1] ^ k0, second[1], first[0] ^ c[3] ^ k1, first[1]]
        k0, k1 = k0 + 0x9E3779B9 & word, k1 + 0xBB67AE85 & word
    return c


def _wide_product(factor: int, words: Tensor) -> tuple[Tensor, Tensor]:
    """Upper and lower 32 bits of factor * words, all below 2**32, in int64 that may not overflow."""
    upper, lower = factor >> 16, factor & 0xFFFF
    low = lower * words  # < 2**48
    high = upper * words + (low >> 16)  # < 2**48 + 2**32
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF


def rounding_bits(seed: int, step: int, offset: int, count: int) -> Tensor:
    """The random 16 bits at positions offset to offset + count - 1, int64 [count].

    Counter (position // 8, step) gives eight: the lower and the upper half of each of its four words.
    """
    first, last = offset // 8, -(-(offset + count) // 8)
    octet = torch.arange(first, last)
    words = torch.stack(_philox(seed, octet, torch.full_like(octet, step)), 1)
    bits = torch.stack([words & 0xFFFF, words >> 16], 2).reshape(-1)
    return bits[offset - 8 * first :][:count]


def add_rounded_(
    sums: Sequence[Tensor], addends: Sequence[Tensor], seed: int, step: int, offsets: Sequence[int]
) -> Sequence[Tensor]:
    """sums_i += addends_i in float32, then to bfloat16: away from zero where the lower half and random bits carry."""
    for total, addend, offset in zip(sums, addends, offsets, strict=True):
        exact = (total.float() + addend).cpu().reshape(-1)
        bits = exact.view(torch.int32).long()
        kept, lower = bits >> 16 & 0x7FFF, bits & 0xFFFF
        random = rounding_bits(seed, step, offset, len(bits))
        away = torch.where(kept == 0x7F7F, lower >= 0x8000, lower + random >= 0x10000)  # to nearest at the top
        magnitude = torch.where(exact.isnan(), 0x7FC0, kept + away).to(torch.int16).view(torch.bfloat16)
        negative = (bits < 0) & ~exact.isnan()
        total.copy_(torch.where(negative, -magnitude, magnitude).reshape(total.shape))
    return sums


def sketch_(out: Sequence[Tensor], matrices: Sequence[Tensor], seeds: Sequence[int], transpose: bool = False) -> None:
    """out_i = matrix_i (transposed) @ normal_matrix(seed_i)."""
    for target, matrix, seed in zip(out, matrices, seeds, strict=True):
        factor = matrix.mT if transpose else matrix
        omega = normal_matrix(seed, factor.shape[1], target.shape[1]).to(target)
        target.copy_(factor.to(target.dtype) @ omega)


def grouped_mm_(out: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor], transpose: bool = False) -> None:
    """out_i = a_i (transposed) @ b_i."""
    for target, left, right in zip(out, a, b, strict=True):
        target.copy_((left.mT if transpose else left).to(target.dtype) @ right.to(target.dtype))


def cholesky_inverse_(grams: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Column by column: R replaces G = R^T R, the inverse of the kept block and the kept columns are returned."""
    inverses, ranks = torch.zeros_like(grams), []
    for gram, inverse in zip(grams, inverses, strict=True):
        rest, r = gram.clone(), torch.zeros_like(gram)
        kept: list[int] = []
        finite = bool(torch.isfinite(gram.diagonal()).all())
        for j in range(len(gram)):
            if finite and rest[j, j] > tolerance * gram[j, j]:
                kept.append(j)
                r[j, j:] = rest[j, j:] / rest[j, j].sqrt()
                rest = rest - r[j][:, None] * r[j][None, :]
        gram.copy_(r)
        if kept:
            index = torch.tensor(kept, device=gram.device)
            block = r[index][:, index]
            eye = torch.eye(len(kept), dtype=gram.dtype, device=gram.device)
            inverse[index[:, None], index] = torch.linalg.solve_triangular(block, eye, upper=True)
        ranks.append(len(kept) if finite else -1)
    return inverses, torch.tensor(ranks, device=grams.device)


def gram_accumulate_(gram: Tensor, rows: Tensor, weights: Tensor | None = None) -> Tensor:
    """gram[g] += sum_n weights[n] * rows[g, n, :]^T rows[g, n, :]; rows [G, n, d] or [n, d]."""
    x = rows.to(gram.dtype)
    left = x if weights is None else x * weights.to(gram.dtype)[:, None]
    return gram.add_(left.mT @ x)


def gram_accumulate_conv2d_(
    gram: Tensor,
    images: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    weights: Tensor | None = None,
) -> Tensor:
    """The same over unfolded patches: gram [groups, d, d], images [N, C, H, W], weights [N]."""
    groups, d = gram.shape[:2]
    patches = F.unfold(
        images.to(gram.dtype), tuple(kernel_size), tuple(dilation), tuple(padding), tuple(stride)
    )  # [N, C * kh * kw, T]
    samples, _, positions = patches.shape
    rows = patches.reshape(samples, groups, d, positions).permute(1, 0, 3, 2).reshape(groups, samples * positions, d)
    return gram_accumulate_(gram, rows, None if weights is None else weights.repeat_interleave(positions))


def spectral_filter(gram: Tensor, alpha: float) -> Tensor:
    """U diag(alpha r / ((alpha - 1) r + 1)) U^T with gram = U diag(s) U^T and r = s / sum(s); zero for a zero gram.

    The literal form of Kodge et al. 2024, from an eigendecomposition; ``fastunlearn.spectral_filter`` needs none.
    """
    values, vectors = torch.linalg.eigh(gram)
    total = gram.trace()  # the sum of the eigenvalues; of the clamped ones it would count rounding as energy
    ratio = values.clamp(min=0) / total if total > 0 else torch.zeros_like(values)
    kept = alpha * ratio / ((alpha - 1) * ratio + 1)
    return torch.matmul(vectors * kept, vectors.mT)


def codec(response: Tensor, z: Tensor, given: Tensor | None = None) -> float:
    """Conditional dependence T(Y, Z | X) of Azadkia & Chatterjee 2021 from all pairwise distances, in float64.

    response [n], z [n, q], given [n, k] or None. Nearest neighbours and equal ranks at the lowest index.
    """
    y, z = response.double(), z.double().reshape(len(response), -1)
    n = len(y)
    rank = (y[None, :] <= y[:, None]).sum(1).double()  # R_i: how many are no larger
    above = (y[None, :] >= y[:, None]).sum(1).double()  # L_i: how many are no smaller

    def neighbour(points: Tensor) -> Tensor:
        distance = (points[:, None, :] - points[None, :, :]).square().sum(-1)
        return distance.fill_diagonal_(torch.inf).argmin(1)

    if given is None:
        m = torch.minimum(rank, rank[neighbour(z)])
        denominator = (above * (n - above)).sum()
        numerator = (n * m - above.square()).sum()
    else:
        x = given.double().reshape(n, -1)
        closest = torch.minimum(rank, rank[neighbour(x)])
        numerator = (torch.minimum(rank, rank[neighbour(torch.cat([x, z], 1))]) - closest).sum()
        denominator = (rank - closest).sum()
    return float(numerator / denominator) if denominator != 0 else 0.0


def codec_scores(
    features: Tensor, rank_terms: Tensor, distances: Tensor | None = None, candidates: Tensor | None = None
) -> Tensor:
    """T(Y, feature | chosen) of every candidate, all pairwise distances written out; see ``ops.codec_scores``."""
    n, p = features.shape
    rank, base = rank_terms.long()
    chosen = torch.zeros(n, n, dtype=features.dtype, device=features.device) if distances is None else distances
    if distances is None:
        scale, offset, denominator = n, base.square().sum(), (base * (n - base)).sum()
    else:
        scale, offset, denominator = 1, base.sum(), (rank - base).sum()
    scores = torch.full((p,), -torch.inf, dtype=torch.float64, device=features.device)
    for c in range(p):
        if candidates is None or candidates[c]:
            joined = chosen + (features[:, None, c] - features[None, :, c]).square()
            total = torch.minimum(rank, _rank_of_nearest(rank, joined)).sum()
            scores[c] = (scale * total - offset).double() / denominator if denominator else 0.0
    return scores


def codec_choose_(distances: Tensor, rank_terms: Tensor, column: Tensor) -> Tensor:
    """One more feature joins the chosen ones; see ``ops.codec_choose_``."""
    distances += (column[:, None] - column[None, :]).square()
    rank = rank_terms[0].long()
    rank_terms[1] = torch.minimum(rank, _rank_of_nearest(rank, distances))
    return distances


def _rank_of_nearest(rank: Tensor, distances: Tensor) -> Tensor:
    """The rank of the nearest other row, the lowest of equals; 0 where none is at a finite distance."""
    # NaN is no distance; argmin returns the first of equals.
    far = torch.where(distances < torch.inf, distances, torch.inf).fill_diagonal_(torch.inf)
    nearest = far.argmin(1)
    return torch.where(far.gather(1, nearest[:, None])[:, 0] < torch.inf, rank[nearest], 0)
