"""One removal of L-CODEC: choose the units, solve for their Newton step, write it."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastunlearn.data import Batch, Batches, per_sample_loss, read
from fastunlearn.language import loss_for
from fastunlearn.methods.block import Block
from fastunlearn.methods.budget import Account
from fastunlearn.methods.choice import Unit, all_units, markov_blanket, random_units
from fastunlearn.methods.curvature import matrix, product
from fastunlearn.methods.newton import newton_step
from fastunlearn.methods.samples import drawn, joined
from fastunlearn.outcome import Outcome
from fastunlearn.perturb import Perturbation, require_finite_inputs

if TYPE_CHECKING:
    from fastunlearn.methods.lcodec import LCodec

# Weights per block from which "auto" takes conjugate gradients. Measured on an MLP and a CNN, 256 samples, damping 0.01
# and 0.001, two cores: as fast as Cholesky at 300 to 500 weights, 10 to 30 times as fast at 2,000 (11 to 42 products).
_AUTO_WEIGHTS = 512
# Weights per block at most where a matrix is asked for, in 32 MiB each for it and its factor.
_CHOLESKY_WEIGHTS = 2048
# Matrices that reuse_hessian keeps, the least recently used dropped first: 32 MiB each at 2,048 weights.
_KEPT = 8


@dataclass(frozen=True)
class Run:
    """What the removals of one ``unlearn`` share.

    Attributes:
        samples, perturbations: to forget, one each, and how each is perturbed; the latter only to choose by L-FOCI.
        total: training samples before any removal.
        pool: samples that curvatures are averaged over, see :func:`~fastunlearn.methods.samples.drawn`.
        generator: of all draws on the CPU.
        matrices: kept for ``reuse_hessian``, by units, the most recently used last.
    """

    method: LCodec
    model: nn.Module
    layers: dict[str, nn.Module]
    samples: list[Batch]
    perturbations: list[Perturbation]
    total: int
    pool: list[tuple[int, Batch]]
    generator: torch.Generator
    outcome: Outcome
    matrices: OrderedDict[tuple[Unit, ...], Tensor] = field(default_factory=OrderedDict)


def gather(
    method: LCodec,
    model: nn.Module,
    layers: dict[str, nn.Module],
    forget: Batches,
    retain: Batches,
    device: torch.device,
    outcome: Outcome,
) -> Run:
    """Read the sets: the samples to forget, how to perturb them, and a draw of the others for the curvature.

    Raises TypeError or ValueError for inputs that cannot be perturbed, or that hold NaN or Inf.
    """
    samples: list[Batch] = []
    perturbations: list[Perturbation] = []
    for batch in read(forget, "forget", device):
        if method.select == "foci":
            perturbation = Perturbation.for_sample(
                model, batch[:1], method.noise, method.tokens, method.vocabulary, method.protected
            )
            perturbations += [perturbation] * batch.size
        for i in range(batch.size):
            require_finite_inputs(batch[i : i + 1], f"forget sample {len(samples)}")
            samples.append(batch[i : i + 1])
    total = sum(b.size for b in read(retain, "retain", torch.device("meta"))) + len(samples)
    pool: list[tuple[int, Batch]] = []
    if method.update == "sekhari":
        pool = drawn(retain, samples, total, method.hessian_samples, method.seed, device)
    generator = torch.Generator().manual_seed(method.seed)
    return Run(method, model, layers, samples, perturbations, total, pool, generator, outcome)


def remove(run: Run, indices: list[int], account: Account | None) -> dict[str, Any]:
    """Remove these samples in one step, and report it as :meth:`LCodec.unlearn` says.

    The account keeps what is about to be written to. Raises ValueError when the loss ends up NaN or Inf.
    """
    method, started = run.method, time.perf_counter()
    samples = [run.samples[i] for i in indices]
    what = f"forget sample {indices[0]}" if not method.group else "the group of forget samples"
    with run.outcome.phase("select"):
        units, scores = _choose(run, indices, what)
    limit = method.max_block or (_CHOLESKY_WEIGHTS if method.solver == "cholesky" else None)
    block = Block(run.layers, units, limit)
    with run.outcome.phase("gradient"):
        loss, norm, gradients = _gradients(run, samples)
    report: dict[str, Any] = {
        "samples": indices, "units": block.units, "scores": [scores[u] for u in block.units if u in scores],
        "left_out": len(units) - len(block.units), "block": block.size, "solver": "none", "iterations": 0,
        "residual": 0.0, "damping": method.damping, "deviation": 0.0, "step_norm": 0.0, "loss_before": loss,
        "loss_after": loss, "gradient_norm_before": norm, "gradient_norm_after": norm, "seconds": 0.0,
    }  # fmt: skip
    if account is not None:
        account.keep(block.parameters)
    if block.size:
        n = run.total - indices[0]
        # A parameter that the loss does not see has no gradient.
        whole = [gradients[p] if p in gradients else torch.zeros_like(p) for p in block.parameters]
        gradient = block.flat(whole).double()
        del gradients, whole
        with run.outcome.phase("hessian"):
            curvature = _curvature(run, block, indices)
        with run.outcome.phase("solve"):
            newton = newton_step(curvature, gradient, method.damping, what)
            # The public code's "CR" minimises the removed samples' own loss model: its step is not one in n.
            share = 1.0 if method.update == "single_sample" else len(indices) / (n - len(indices))
            step = newton.step * share
            if method.privacy is not None:
                report["deviation"] = method.privacy.deviation(len(indices), n)
                noise = torch.randn(len(step), generator=run.generator, dtype=step.dtype).to(step.device)
                step = step + report["deviation"] * noise
            block.add_(step)
        with run.outcome.phase("gradient"):
            loss, norm, _ = _gradients(run, samples)
        if not math.isfinite(loss):
            raise ValueError(f"the removal of {what} drives its loss to {loss}; raise damping")
        report.update(
            solver=newton.solver, iterations=newton.iterations, residual=newton.residual, damping=newton.damping,
            step_norm=step.norm().item(), loss_after=loss, gradient_norm_after=norm,
        )  # fmt: skip
    report["seconds"] = time.perf_counter() - started
    return report


def _choose(run: Run, indices: list[int], what: str) -> tuple[list[Unit], dict[Unit, float]]:
    """Units in the order in which they are to fill the block, and L-FOCI's scores."""
    method = run.method
    if method.select == "all":
        return all_units(run.layers), {}
    if method.select == "random":
        return random_units(run.layers, method.max_units, run.generator), {}
    try:
        scores = markov_blanket(
            run.model,
            run.layers,
            [(run.samples[i], run.perturbations[i]) for i in indices],
            method.perturbations,
            method.batch_size,
            method.loss_fn,
            method.max_units,
            method.seed + indices[0],
            run.generator,
        )
    except ValueError as error:
        raise ValueError(f"perturbed copies of {what}: {error}") from error
    return list(scores), scores


def _gradients(run: Run, samples: list[Batch]) -> tuple[float, float, dict[nn.Parameter, Tensor]]:
    """Mean loss of the samples, the norm of its gradient over all trainable weights, and that gradient."""
    parameters = [p for p in run.model.parameters() if p.requires_grad]
    total: dict[nn.Parameter, Tensor] = {}
    loss = 0.0
    loss_fn = loss_for(run.model, run.method.loss_fn)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels may sum in another order each time
        for batch in joined(samples, run.method.batch_size):
            outputs = batch.outputs(run.model)
            part = per_sample_loss(loss_fn, outputs, batch.targets, batch.size).sum() / len(samples)
            loss += part.item()
            found = torch.autograd.grad(part, parameters, allow_unused=True) if part.requires_grad else ()
            for p, g in zip(parameters, found, strict=False):
                if g is not None:
                    total[p] = total[p] + g if p in total else g
    norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in total.values()]
    return loss, torch.stack(norms).norm().item() if norms else 0.0, total


def _curvature(run: Run, block: Block, indices: list[int]) -> Tensor | Callable[[Tensor], Tensor]:
    """H_S: a matrix for Cholesky, a product for conjugate gradients."""
    method = run.method
    if method.update == "single_sample":
        others = [run.samples[i] for i in indices]
    else:
        # By index, not by value: a sample that occurs twice stays in once.
        stays = run.total if method.group or method.reuse_hessian else indices[-1]
        others = [held for origin, held in run.pool if origin == -1 or origin > stays][: method.hessian_samples]
    batches = list(joined(others, method.batch_size))
    largest = _CHOLESKY_WEIGHTS if method.reuse_hessian else _AUTO_WEIGHTS
    if method.solver == "cg" or (method.solver == "auto" and block.size > largest):
        return product(run.model, block, batches, method.loss_fn, method.hessian)
    key = tuple(sorted(block.units))
    known = run.matrices.pop(key, None)
    found = matrix(run.model, block, batches, method.loss_fn, method.hessian) if known is None else known
    if method.reuse_hessian:
        run.matrices[key] = found
        if len(run.matrices) > _KEPT:
            run.matrices.popitem(last=False)
    return found
