"""The filter against a float64 SVD, never worse than the float32 SVD of the paper, on every kind of spectrum."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastunlearn import ClassForgetting
from fastunlearn.subspace import GramAccumulator, filter_weight_by_eigenpairs

ALPHAS = [0.25, 1.0, 3.0, 100.0, 1000.0]
D = 40


def with_spectrum(sigma: Tensor, n: int = 150) -> Tensor:
    """Rows [n, len(sigma)] with these singular values between random orthonormal factors."""
    generator = torch.Generator().manual_seed(len(sigma) + n)
    k = min(n, len(sigma))
    u, _ = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(len(sigma), k, generator=generator, dtype=torch.float64))
    return u * sigma[:k] @ v.mT


def noise(n: int = 150, d: int = D) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def low_rank(d: int = D) -> Tensor:
    return with_spectrum(torch.cat([torch.linspace(1, 0.3, 6).double(), torch.zeros(d - 6).double()]))


def relu_like() -> Tensor:
    return (noise() @ torch.randn(D, D, generator=torch.Generator().manual_seed(3)).double() + 4).relu()


step = torch.where(torch.arange(D) < 10, 1.0, 1e-5).double()
clusters = torch.tensor([1.0, 1e-2, 1e-4, 1e-6]).double().repeat_interleave(D // 4)
index = torch.arange(1, D + 1).double()
SPECTRA: dict[str, Callable[[], Tensor]] = {
    "exact low rank": low_rank,
    "low rank + noise": lambda: low_rank() + 1e-4 * noise(),
    "polynomial decay": lambda: with_spectrum(index**-2),
    "exponential decay": lambda: with_spectrum((-index / 2).exp()),
    "step": lambda: with_spectrum(step),
    "clusters": lambda: with_spectrum(clusters),
    "identity": lambda: torch.eye(D).double(),
    "ReLU-like, one huge sigma": relu_like,
    "duplicated rows": lambda: noise(10).repeat(12, 1),
    "zero rows": lambda: torch.cat([torch.zeros(60, D).double(), noise(70), torch.zeros(20, D).double()]),
    "nothing but zeros": lambda: torch.zeros(60, D).double(),
    "n = 1": lambda: noise(1),
    "n < d": lambda: with_spectrum(index**-1.5, 17),
    "n = d - 1": lambda: noise(D - 1),
    "n = d": lambda: noise(D),
    "d = 1": lambda: noise(30, 1),
    "scale 1e15": lambda: 1e15 * with_spectrum(index**-2),
    "scale 1e-15": lambda: 1e-15 * with_spectrum(index**-2),
    "scale 1e15, n < d": lambda: 1e15 * noise(12),
    "scale 1e-15, n < d": lambda: 1e-15 * noise(12),
}


def by_svd(weight: Tensor, rows: Tensor, alpha: float) -> Tensor:
    """The paper's path in the dtype of ``rows``; 0/0 of zero rows counts as zero, in its favour."""
    _, s, vh = torch.linalg.svd(rows, full_matrices=False)
    r = (s.square() / s.square().sum()).nan_to_num(0)
    return weight @ (vh.mT * (alpha * r / ((alpha - 1) * r + 1))) @ vh


def weight_of(d: int) -> Tensor:
    return torch.randn(9, d, generator=torch.Generator().manual_seed(5))


SOLVERS: list[Any] = ["auto", "cholesky", "eigh", "eigenpairs"]


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_float32_filter_errs_no_more_than_the_float32_svd(spectrum: str) -> None:
    a = SPECTRA[spectrum]().float()
    weight = weight_of(a.shape[1])
    moments = GramAccumulator(a.shape[1])
    for part in a.split(13):  # as batches come
        moments.add_(part)
    for alpha in ALPHAS:
        truth = by_svd(weight.double(), a.double(), alpha)
        theirs = float((by_svd(weight, a, alpha).double() - truth).norm())
        for solver in SOLVERS:
            if solver == "eigenpairs":
                found = moments.eigenpairs().filter(weight[None], alpha)[0]
            else:
                found = moments.filter(weight[None], alpha, solver)[0]
            assert found.dtype == torch.float32
            assert float((found.double() - truth).norm()) <= theirs, (solver, alpha)


@pytest.mark.parametrize("alphas", [(100.0, 3.0), (0.25, 1000.0), (1000.0, 0.25), (1.0, 100.0)], ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_float32_update_errs_no_more_than_with_the_float32_svd(spectrum: str, alphas: tuple[float, float]) -> None:
    """From the model's inputs to its weight, with everything in between."""
    alpha_retain, alpha_forget = alphas
    retain = SPECTRA[spectrum]().float()
    n, d = retain.shape
    scale = float(retain.abs().max()) or 1.0
    forget = (scale * noise(max(1, n // 2), d)).float()
    layer = nn.Linear(d, 9, bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight_of(d))
    before = layer.weight.detach().clone()

    def updated(dtype: torch.dtype) -> Tensor:
        w = before.to(dtype)
        kept = by_svd(w, retain.to(dtype), alpha_retain)
        return (w - by_svd(w - kept, forget.to(dtype), alpha_forget)).double()

    batches = [[(part, torch.zeros(len(part))) for part in rows.split(13)] for rows in (forget, retain)]
    ClassForgetting(alpha_retain, alpha_forget).unlearn(layer, *batches)
    truth = updated(torch.float64)
    assert (layer.weight.double() - truth).norm() <= (updated(torch.float32) - truth).norm()


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_any_split_of_a_float32_stream_gives_the_same_gram_to_rounding(spectrum: str) -> None:
    a = SPECTRA[spectrum]().float()
    n, d = a.shape
    whole = GramAccumulator(d).add_(a).gram
    exact = a.double().mT @ a.double()
    # Summing n products in any order: n times the rounding unit of the sum of magnitudes.
    bound = n * torch.finfo(torch.float64).eps * (a.double().abs().mT @ a.double().abs())
    assert ((whole[0] - exact).abs() <= bound).all()
    for size in (1, 7, d, n):
        total, merged = GramAccumulator(d), GramAccumulator(d)
        for part in a.split(size):
            total.add_(part)
            merged = merged + GramAccumulator(d).add_(part)
        assert total.rows_seen == merged.rows_seen == n
        assert ((total.gram[0] - exact).abs() <= bound).all() and ((merged.gram[0] - exact).abs() <= bound).all()


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("kept", [1, 5, 20, D])
def test_leading_eigenpairs_err_by_no_more_than_the_gain_of_the_first_dropped(kept: int, alpha: float) -> None:
    a = with_spectrum(index**-1)
    pairs = GramAccumulator(D).add_(a).eigenpairs()
    assert torch.allclose(pairs.ratios.sum(-1), torch.ones(1).double(), rtol=1e-12)
    eye = torch.eye(D).double()
    found = filter_weight_by_eigenpairs(
        eye[None], pairs.values[:, :kept], pairs.vectors[:, :, :kept], pairs.trace, alpha
    )
    error = float(torch.linalg.matrix_norm(found[0] - by_svd(eye, a, alpha), 2))
    gains = [*pairs.gain(alpha)[0].tolist(), 0.0]
    assert error <= gains[kept] + 1e-12
    assert gains[kept] <= alpha / (alpha + kept) if kept < D else error < 1e-12


def test_eigenpairs_that_do_not_fit_are_refused_and_no_energy_filters_everything_away() -> None:
    w = torch.randn(1, 3, 4)
    values, vectors, trace = torch.ones(1, 2), torch.eye(4)[None, :, :2], torch.ones(1)
    with pytest.raises(ValueError, match="do not fit"):
        filter_weight_by_eigenpairs(w, torch.ones(1, 3), vectors, trace, 3.0)
    with pytest.raises(ValueError, match="must share"):
        filter_weight_by_eigenpairs(w[..., :3], values, vectors, trace, 3.0)
    with pytest.raises(ValueError, match="alpha must be"):
        filter_weight_by_eigenpairs(w, values, vectors, trace, math.nan)
    assert not filter_weight_by_eigenpairs(w, torch.zeros(1, 2), vectors, torch.zeros(1), 3.0).any()
    assert not GramAccumulator(4).eigenpairs().filter(w, 3.0).any()


def test_kept_rows_whose_squares_leave_float64_have_eigenpairs_all_the_same() -> None:
    a, w = noise(5), weight_of(D)[None].double()
    plain = GramAccumulator(D).add_(a).eigenpairs().filter(w, 30.0)
    for scale in (2.0**-500, 2.0**400):
        pairs = GramAccumulator(D).add_(a * scale).eigenpairs()
        assert torch.allclose(pairs.filter(w, 30.0), plain, rtol=1e-12, atol=0)
