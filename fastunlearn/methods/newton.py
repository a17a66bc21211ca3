"""A damped Newton step, solved and checked, and the noise that the Gaussian mechanism would add to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Cholesky in float64 leaves about 1e-16 times the block size of |A| |x| + |b|.
_CHOLESKY_ERROR = 1e-10
# Products with float32 derivatives carry the rounding of a forward and two backward passes, below which no iteration
# gets: residuals stalled at up to 2.7e-6 (|A| |x| + |b|) in 27 removals from a small convolutional network.
_PRODUCT_ERROR = 1e-5


@dataclass(frozen=True)
class NewtonStep:
    """The solution of (H + damping I) step = gradient.

    Attributes:
        step: [size] float64.
        damping: what was added to the diagonal: the damping asked for, or the first multiple of it by a power
            of 10 that made the system positive definite.
        residual: |(H + damping I) step - gradient| / |gradient|; 0 for a zero gradient.
        solver: "cholesky" or "cg".
        iterations: products with H that conjugate gradients took, restarts and the check included; 0 for
            Cholesky.
    """

    step: Tensor
    damping: float
    residual: float
    solver: str
    iterations: int


def newton_step(
    curvature: Tensor | Callable[[Tensor], Tensor],
    gradient: Tensor,
    damping: float,
    what: str,
    max_iterations: int | None = None,
    tolerance: float = 1e-8,
) -> NewtonStep:
    """Solve (H + damping I) step = gradient, raising the damping tenfold until the matrix is positive definite.

    Args:
        curvature: H, a symmetric [size, size] matrix (Cholesky in float64, size^3 / 3 multiply-adds for each
            damping tried), or a function v -> H v on float64 vectors (conjugate gradients, one product per
            iteration, five vectors of memory).
        gradient: [size].
        damping: > 0.
        what: whose step it is, for messages.
        max_iterations: products that conjugate gradients may take; default 10 * size + 50, at most 2,000.
        tolerance: of conjugate gradients, on |residual| / |gradient|. Where rounding in the products keeps it
            out of reach, the step is taken when the residual is below 1e-5 (|H| |step| + |gradient|).

    Conjugate gradients see an indefinite H only along the directions they visit: where p^T (H + damping I) p
    <= 0 they start anew with more damping. An H that is indefinite elsewhere is solved as it stands.

    Raises:
        ValueError: NaN or Inf in the gradient, the matrix or a product; damping or tolerance not a finite number
            above 0; shapes that do not match.
        RuntimeError: a residual above rounding level, or no convergence in ``max_iterations``.
    """
    for name, value in (("damping", damping), ("tolerance", tolerance)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be a finite number above 0, got {value}")
    if gradient.dim() != 1:
        raise ValueError(f"{what}: the gradient must be a vector, got shape {list(gradient.shape)}")
    gradient = gradient.double()
    _require_finite(gradient, "gradient", what)
    if isinstance(curvature, Tensor):
        if curvature.shape != (len(gradient), len(gradient)):
            raise ValueError(f"{what}: a matrix {list(curvature.shape)} for a gradient of {len(gradient)} entries")
        return _cholesky(curvature.double(), gradient, damping, what)
    limit = min(10 * len(gradient) + 50, 2000) if max_iterations is None else max_iterations
    if limit < 1:
        raise ValueError(f"max_iterations must be 1 or more, got {limit}")
    return _conjugate_gradients(curvature, gradient, damping, what, limit, tolerance)


def _cholesky(matrix: Tensor, gradient: Tensor, damping: float, what: str) -> NewtonStep:
    _require_finite(matrix, "curvature", what)
    while True:
        system = matrix.clone()
        system.diagonal().add_(damping)
        factor, info = torch.linalg.cholesky_ex(system)
        if int(info) == 0:
            break
        damping *= 10
    step = torch.cholesky_solve(gradient[:, None], factor)[:, 0]
    residual = float((system @ step - gradient).norm())
    size = float(gradient.norm())
    scale = float(torch.linalg.matrix_norm(system) * step.norm()) + size
    if not residual <= _CHOLESKY_ERROR * scale:
        raise RuntimeError(f"{what}: the solve left a residual of {residual / scale:.1e}; is the matrix symmetric?")
    return NewtonStep(step, damping, residual / size if size else 0.0, "cholesky", 0)


def _conjugate_gradients(
    product: Callable[[Tensor], Tensor], gradient: Tensor, damping: float, what: str, limit: int, tolerance: float
) -> NewtonStep:
    step = torch.zeros_like(gradient)
    size = float(gradient.norm())
    if not size:
        return NewtonStep(step, damping, 0.0, "cg", 0)
    iterations = 0
    largest = 0.0  # of |H p| / |p|: H is no smaller

    def times(vector: Tensor) -> Tensor:
        nonlocal iterations, largest
        iterations += 1
        result = product(vector).double()
        _require_finite(result, "curvature's product", what)
        largest = max(largest, float(result.norm() / vector.norm()))
        return result

    residual, before = gradient.clone(), math.inf  # true residuals: the one to work off and the last one's norm
    while True:
        r, p = residual.clone(), residual.clone()
        rr = float(r @ r)
        while math.sqrt(rr) > tolerance * size and iterations < limit:
            hp = times(p)
            pp = float(p @ p)
            bend = float(p @ hp)
            if bend + damping * pp <= 0:
                while damping * pp <= -bend:
                    damping *= 10
                step, r, p = torch.zeros_like(gradient), gradient.clone(), gradient.clone()
                before, rr = math.inf, size * size
                continue
            alpha = rr / (bend + damping * pp)
            step += alpha * p
            r -= alpha * (hp + damping * p)
            old, rr = rr, float(r @ r)
            p = r + (rr / old) * p
        # The recurrence's residual drifts from the true one: look, and go on from there while that helps.
        residual = gradient - times(step) - damping * step if bool(step.any()) else gradient.clone()
        now = float(residual.norm())
        if now <= tolerance * size or now > 0.5 * before or iterations >= limit:
            break
        before = now
    scale = (largest + damping) * float(step.norm()) + size
    if now > tolerance * size and now > _PRODUCT_ERROR * scale:
        raise RuntimeError(
            f"{what}: conjugate gradients left a residual of {now / size:.1e} of the gradient after {iterations} "
            "products; raise the damping or max_iterations"
        )
    return NewtonStep(step, damping, now / size, "cg", iterations)


def _require_finite(value: Tensor, name: str, what: str) -> None:
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{what}: the {name} holds NaN or Inf")


@dataclass(frozen=True)
class Privacy:
    """Gaussian noise that makes a Newton removal (epsilon, delta)-indistinguishable from retraining.

    That is a theorem for losses that are strongly convex with the constants stated here, at their optimum, with
    all weights moved by the step (Sekhari, Acharya, Kamath & Suresh, NeurIPS 2021, arXiv 2103.03279, algorithm
    1). A deep network is not convex, a block is not all of its weights, and a finite sample of the Hessian is
    not the Hessian: there the noise has the stated size and proves nothing. It is no certificate of removal.

    Attributes:
        epsilon: 0 < epsilon < 1, where the Gaussian mechanism's proof holds.
        delta: 0 < delta < 1.
        lipschitz: L > 0 of every sample's loss.
        hessian_lipschitz: M >= 0 of every sample's Hessian; 0 for a quadratic loss, whose step is exact.
        strong_convexity: lambda > 0 of every sample's loss, its regulariser included.

    Raises ValueError for a constant out of its range.
    """

    epsilon: float
    delta: float
    lipschitz: float
    hessian_lipschitz: float
    strong_convexity: float

    def __post_init__(self) -> None:
        for name in ("epsilon", "delta"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be above 0 and below 1, where the Gaussian mechanism is proven, "
                    f"got {getattr(self, name)}"
                )
        for name in ("lipschitz", "strong_convexity"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number above 0, got {getattr(self, name)}")
        if not 0 <= self.hessian_lipschitz < math.inf:
            raise ValueError(f"hessian_lipschitz must be a finite number, 0 or more, got {self.hessian_lipschitz}")

    def deviation(self, removed: int, n: int) -> float:
        """Standard deviation per weight for ``removed`` of ``n`` samples taken out in one step.

        (2 m^2 M L^2 / (lambda^3 n^2)) sqrt(2 ln(1.25 / delta)) / epsilon with m = ``removed``. Raises ValueError
        unless 1 <= removed < n.
        """
        if not 1 <= removed < n:
            raise ValueError(f"removed must be 1 or more and below n, got {removed} of {n}")
        distance = 2 * removed**2 * self.hessian_lipschitz * self.lipschitz**2 / (self.strong_convexity**3 * n**2)
        return distance * math.sqrt(2 * math.log(1.25 / self.delta)) / self.epsilon
