"""L-CODEC: remove samples by a Newton step on the few units that their loss depends on."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from fastunlearn.data import Batches, LossFunction, require_batches
from fastunlearn.hooks import (
    device_of,
    eager,
    full_precision,
    preserved,
    require_finite,
    require_separable,
    restored_on_error,
    without_fused_attention,
)
from fastunlearn.methods.block import trainable_layers, unit_parameters
from fastunlearn.methods.budget import Account, Budget, Verdict
from fastunlearn.methods.curvature import KINDS
from fastunlearn.methods.newton import Privacy
from fastunlearn.methods.removal import Run, gather, remove
from fastunlearn.outcome import Outcome, track
from fastunlearn.parallel.ranks import Ranks, everyone, unwrapped

_NO_CERTIFICATE = (
    "Gaussian noise of the stated deviation on the block; (epsilon, delta)-indistinguishable from retraining only for "
    "the strongly convex losses and constants that Privacy states, so not a certificate for this model"
)


@dataclass(frozen=True)
class LCodec:
    """Remove samples one after another, or as one group, each by a Newton step on a Markov blanket of its loss.

    Per sample z: perturb its input, record every unit's activation and the loss, let L-FOCI choose the units
    S on which the loss depends, and move their weights (a row of a Linear or of an attention projection, a filter
    of a convolution, and its bias) up the loss of z:

        w_S <- w_S + (1 / (n - 1)) (H_S + damping I)^-1 grad_S loss(z)
        H_S = (n H - hess_S loss(z)) / (n - 1)

    with H the mean Hessian over the n samples still in. H_S is the mean Hessian over the n - 1 others, and is
    computed as that: over ``hessian_samples`` of them, drawn uniformly from the retain samples and the forget
    samples not yet removed. It is exact when ``hessian_samples`` >= n - 1.
    Source: Mehta, Pal, Singh & Ravi, CVPR 2022 (arXiv 2204.07655); Sekhari et al., NeurIPS 2021 for the step.

    Text: batches are dicts with ``input_ids``, and copies have tokens replaced (see ``tokens``); attention masks,
    segments and positions stay.

    Several ranks: with DistributedDataParallel every rank passes the same samples and does the whole of the work, which
    ends in the same bits on all of them. FSDP2 and tensor parallelism are refused: torch has no double backward pass
    through them.

    Attributes:
        perturbations: m, perturbed copies of each sample's input.
        noise: standard deviation of the Gaussian perturbation of floating-point inputs, in their units.
        tokens: positions replaced per copy of a text; 15 % of the attended ones by default, at least 1.
        vocabulary: ids that tokens are replaced by; every row of the input embedding by default.
        protected: ids of special tokens ([CLS], [SEP], padding) that are neither replaced nor replaced by.
        select: "foci"; or for comparison "random" (``max_units`` random units of the layers) or "all" (every unit of
            the layers in the model's order). Neither of these perturbs anything.
        group: remove all forget samples in one step. One selection: row k of L-FOCI's data is the mean over the
            group of the activations of the k-th perturbed copies, and of their losses. With m removed, the step is
            (1 / (n - m)) (H_S + damping I)^-1 times the sum of the gradients, H_S the mean over retain samples.
        damping: > 0, added to the diagonal; multiplied by 10 until the block is positive definite.
        hessian: "exact", "gauss_newton" (positive semidefinite wherever the loss is convex in the outputs),
            "fisher" (mean of g g^T on the given labels), or "reference", the public code's rank-one finite
            difference, repaired; see :func:`fastunlearn.methods.curvature.matrix`.
        hessian_samples: samples that H_S is averaged over.
        reuse_hessian: keep the matrices of the last 8 blocks and take them again when the same units are chosen
            again. They are averages over retain samples only, and stale by the weights moved since. Blocks solved by
            conjugate gradients have no matrix to keep.
        update: "sekhari" (above), or "single_sample", the public code's "CR": H_S is the mean Hessian over the removed
            samples themselves, and the step is the full (H_S + damping I)^-1 times their mean gradient, without
            1 / (n - 1): far larger, and no approximation of retraining.
        solver: "cholesky" (block^2 memory; sees every direction in which the block is not positive definite), "cg"
            (conjugate gradients on Hessian-vector products; sees those it visits, and takes long when the damping is
            tiny), or "auto": Cholesky up to 512 weights, 2,048 with ``reuse_hessian``.
        max_units: units that L-FOCI or chance may choose per removal.
        max_block: weights per block; units are taken in order while they fit, the first one always. By default
            2,048 with "cholesky", unlimited otherwise.
        batch_size: samples per forward and backward pass.
        loss_fn: (outputs, targets) -> one loss per sample; cross-entropy by default, for causal language models that of
            the next token.
        layers: names of the layers whose units may be chosen, see :mod:`fastunlearn.activations`; all trainable by
            default.
        privacy: adds Gaussian noise of :meth:`Privacy.deviation` to the block at each removal. Not a certificate.
        budget: limits past which removals stop; ``Budget()`` if ``unlearn`` is given ``validation``, else none.
        seed: of perturbations, L-FOCI's noise, random units, Hessian samples and the Gaussian noise.
        progress: show a progress bar.
    """

    perturbations: int = 1000
    noise: float = 0.1
    tokens: int | None = None
    vocabulary: Sequence[int] | None = None
    protected: Sequence[int] = ()
    select: Literal["foci", "random", "all"] = "foci"
    group: bool = False
    damping: float = 0.01
    hessian: Literal["exact", "gauss_newton", "fisher", "reference"] = "exact"
    hessian_samples: int = 256
    reuse_hessian: bool = False
    update: Literal["sekhari", "single_sample"] = "sekhari"
    solver: Literal["auto", "cholesky", "cg"] = "auto"
    max_units: int = 4
    max_block: int | None = None
    batch_size: int = 256
    loss_fn: LossFunction | None = None
    layers: Sequence[str] | None = None
    privacy: Privacy | None = None
    budget: Budget | None = None
    seed: int = 0
    progress: bool = False

    def __post_init__(self) -> None:
        for name in ("perturbations", "hessian_samples", "max_units", "max_block", "batch_size", "tokens"):
            value, least = getattr(self, name), 2 if name == "perturbations" else 1
            if value is not None and value < least:
                raise ValueError(f"{name} must be {least} or more, got {value}")
        for name in ("noise", "damping"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number above 0, got {getattr(self, name)}")
        choices = {
            "hessian": KINDS,
            "update": ("sekhari", "single_sample"),
            "solver": ("auto", "cholesky", "cg"),
            "select": ("foci", "random", "all"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                options = ", ".join(f'"{option}"' for option in known)
                raise ValueError(f"{name} must be one of {options}, got {getattr(self, name)!r}")
        if self.reuse_hessian and (self.solver == "cg" or self.update == "single_sample"):
            raise ValueError(
                'reuse_hessian keeps matrices of retain samples: solver="cg" makes none, and update="single_sample" '
                "takes the curvature of the removed sample alone"
            )
        if self.privacy is not None and self.update == "single_sample":
            raise ValueError('privacy bounds the step of update="sekhari", not that of update="single_sample"')

    def unlearn(self, model: nn.Module, forget: Batches, retain: Batches, validation: Batches | None = None) -> Outcome:
        """Remove every sample of ``forget`` in place, in the order they come; eval mode meanwhile.

        Runs in the weights' full precision, without autocast or TF32, and runs compiled models uncompiled.

        Args:
            model: any module with float32 or float64 weights.
            forget: re-iterable batches of the samples to remove, held in memory.
            retain: re-iterable batches of the other training samples; their number enters the step.
            validation: re-iterable batches that a budget's drop is measured on. Given without a budget, removals
                stop at ``Budget()``, a drop of 0.05 in accuracy.

        Returns:
            An :class:`~fastunlearn.outcome.Outcome`. ``details``: ``n`` (samples before any removal),
            ``hessian_samples`` (those used), ``damping_raised`` (how many removals needed more damping),
            ``removals``, ``not_removed`` (forget samples still in, by index) and, past the budget, ``retrain_now``
            (why) and ``rolled_back`` (the removals taken back, bit by bit); ``score_before`` and ``score`` where
            validation was looked at; ``privacy`` says what the noise is not.

            A removal is a dict: ``samples`` (indices), ``units`` [(layer, unit)], their ``scores`` (L-FOCI's), units
            ``left_out`` for ``max_block``, ``block`` (weights), ``solver``, ``iterations``, ``residual``,
            ``damping``, ``deviation`` (of the noise), ``step_norm`` (of what was added, noise included),
            ``loss_before`` and ``loss_after`` (mean of a group), ``gradient_norm_before`` and
            ``gradient_norm_after`` (of that loss over all trainable weights, one backward pass each) and
            ``seconds``. A removal whose loss depends on no unit has no units and changes nothing.

        Raises:
            TypeError: a set that cannot be iterated twice; integer inputs that are not token ids; integer outputs;
                weights in half precision.
            ValueError: an empty or malformed set; NaN or Inf in a weight, an input, a Hessian or a loss; a
                BatchNorm in train mode; a loss that is not one per sample; no trainable layer; an unknown name in
                ``layers``; a budget with ``max_drop`` and no ``validation``, or the reverse; a model sharded by FSDP2
                or tensor parallelism; ranks of DistributedDataParallel that end up with different weights.
            RuntimeError: a solve whose residual is not at rounding level.
            The model's weights are as they were whenever this raises, also half-way through the removals.

        Warns:
            UserWarning: damping had to be raised; "retrain now" past the budget.

        Cost per removal: m forward passes (times the group), L-FOCI's m^2 * units multiply-adds per unit chosen, two
        forward and backward passes of the sample, and the curvature over ``hessian_samples``: see
        :func:`~fastunlearn.methods.curvature.matrix` (then block^3 / 3) and ``product`` (one per iteration).
        Memory: two block^2 matrices in float64 and a copy of the trainable layers; with a budget one more copy of
        the parameters that the block is in.
        """
        require_batches(forget, "forget")
        require_batches(retain, "retain")
        if validation is not None:
            require_batches(validation, "validation")
        _require_whole(model)
        ranks, model = everyone(model), unwrapped(model)
        require_finite(model)
        require_separable(model)
        device = device_of(model)
        layers = trainable_layers(model, self.layers)
        budget = Budget() if self.budget is None and validation is not None else self.budget
        outcome = Outcome("LCodec", _plain(replace(self, budget=budget)))
        parameters = [slab.parameter for module in layers.values() for slab in unit_parameters(module)]
        verdict = None
        with (
            outcome.measured(device),
            eager(),
            full_precision(device),
            preserved(model),
            torch.inference_mode(False),
            torch.enable_grad(),
            without_fused_attention(),
            restored_on_error(model, parameters) as before,
        ):
            model.eval()
            with outcome.phase("gather"):
                run = gather(self, model, layers, forget, retain, device, outcome)
            with outcome.phase("validate"):
                account = None if budget is None else Account(budget, model, validation)
            count = len(run.samples)
            todo = [list(range(count))] if self.group else [[i] for i in range(count)]
            removals: list[dict[str, Any]] = []
            for indices in track(todo, "LCodec", self.progress):
                removals.append(remove(run, indices, account))
                if account is not None:
                    with outcome.phase("validate"):
                        done = removals[-1]
                        verdict = account.settle(done["step_norm"], done["gradient_norm_after"], indices is todo[-1])
                    if verdict is not None:
                        break
            _require_agreement(ranks, parameters)
        for name, parameter, copy in before:
            outcome.count(name, copy, parameter)
        _report(run, removals, account, verdict)
        return outcome


def _require_whole(model: nn.Module) -> None:
    """Raise ValueError for a model of which this rank holds a part only."""
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        engine = "FSDP2 (fully_shard)"
    elif any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        engine = "tensor parallelism"
    else:
        return
    raise ValueError(
        f"LCodec takes second derivatives, and torch has no double backward pass through {engine}; give it the whole "
        "model, alone or in DistributedDataParallel, or forget by another method"
    )


def _require_agreement(ranks: Ranks, parameters: Sequence[nn.Parameter]) -> None:
    """Raise ValueError on all ranks unless they have the same bits."""
    if ranks.size == 1:
        return
    digest = hashlib.sha256()
    for parameter in parameters:
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    found = ranks.gather(digest.hexdigest())
    other = [rank for rank, theirs in enumerate(found) if theirs != found[0]]
    if other:
        raise ValueError(
            f"LCodec came to other weights on rank {', '.join(map(str, other))} than on rank 0; give every rank the "
            "same samples in the same order (not a share of them), and the same model"
        )


def _plain(value: Any) -> Any:
    """A setting as it goes on record: dataclasses as dicts, functions and ranges by name, nothing copied."""
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if callable(value):
        return getattr(value, "__qualname__", repr(value))
    return str(value) if isinstance(value, range) else value


def _report(run: Run, removals: list[dict[str, Any]], account: Account | None, verdict: Verdict | None) -> None:
    """Fill in the outcome's details, and warn once of each thing to be warned of."""
    method, count = run.method, len(run.samples)
    raised = [r["damping"] for r in removals if r["damping"] > method.damping]
    if raised:
        warnings.warn(
            f"LCodec raised the damping from {method.damping:g} to as much as {max(raised):g} for "
            f"{len(raised)} of {len(removals)} removals, whose Hessian block was not positive definite; "
            'hessian="gauss_newton" needs no such help',
            UserWarning,
            stacklevel=3,
        )
    stand = removals[: len(removals) - verdict.undone] if verdict is not None else removals
    removed = {i for r in stand for i in r["samples"]}
    averaged = run.total - (count if method.group or method.reuse_hessian else 1)
    details = run.outcome.details
    details.update(
        n=run.total,
        hessian_samples=min(method.hessian_samples, averaged) if run.pool else len(removals[0]["samples"]),
        damping_raised=len(raised),
        removals=stand,
        not_removed=[i for i in range(count) if i not in removed],
    )
    if account is not None and account.score_before is not None:
        details.update(score_before=account.score_before, score=account.score)
    if method.privacy is not None:
        details["privacy"] = _NO_CERTIFICATE
    if verdict is not None:
        details.update(retrain_now=verdict.reason, rolled_back=removals[len(stand) :])
        warnings.warn(
            f"retrain now: {verdict.reason}. The last {verdict.undone} removals were rolled back; "
            f"{len(details['not_removed'])} of {count} samples are still in the model",
            UserWarning,
            stacklevel=3,
        )
