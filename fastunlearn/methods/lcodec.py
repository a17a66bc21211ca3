"""L-CODEC: remove single samples by a Newton step on the few units that the sample's loss depends on."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from fastunlearn.activations import unit_activations
from fastunlearn.codec import foci
from fastunlearn.data import Batch, Batches, LossFunction, per_sample_loss, read, require_batches
from fastunlearn.hooks import device_of, preserved, require_finite, require_separable, restored_on_error
from fastunlearn.outcome import Outcome, track

# Numbers that a batch of Hessian-vector products may hold per pass.
_BATCHED = 1 << 22
# Share of a unit's spread added as noise before L-FOCI, so that the many equal zeros of a silent unit do not
# all take the same row for their nearest neighbour.
_JITTER = 1e-3


@dataclass(frozen=True)
class LCodec:
    """Remove samples one after another, each by a Newton step on a Markov blanket of its loss.

    Per sample z: perturb its input, record every unit's activation and the loss, let L-FOCI choose the units
    S on which the loss depends, and move their weights (a row of a Linear or a filter of a convolution, and
    its bias) up the loss of z:

        w_S <- w_S + (1 / (n - 1)) (H_S + damping I)^-1 grad_S loss(z)
        H_S = (n H - hess_S loss(z)) / (n - 1)

    with H the mean Hessian over the n samples still in. H_S is the mean Hessian over the n - 1 others, and is
    computed as that: over ``hessian_samples`` of them, drawn uniformly from the retain samples and the forget
    samples not yet removed. It is exact when ``hessian_samples`` >= n - 1.
    Source: Mehta, Pal, Singh & Ravi, CVPR 2022 (arXiv 2204.07655); Sekhari et al., NeurIPS 2021 for the step.

    Attributes:
        perturbations: m, perturbed copies of each sample's input.
        noise: standard deviation of the Gaussian perturbation, in the units of the input.
        damping: > 0, added to the diagonal; multiplied by 10 until the block is positive definite.
        hessian: "exact" (Hessian-vector products) or "gauss_newton" (positive semidefinite
            wherever the loss is convex in the outputs).
        hessian_samples: samples that H_S is averaged over.
        update: "sekhari" (above) or "single_sample" (H_S = hess_S loss(z), the reference code's "CR").
        max_units: units that L-FOCI may choose per sample.
        max_block: weights per block; units are taken in L-FOCI's order while they fit, the first one always.
        batch_size: samples per forward and backward pass.
        loss_fn: (outputs, targets) -> one loss per sample; cross-entropy by default.
        layers: names of the Linear, Conv1d and Conv2d layers whose units may be chosen; all trainable by
            default.
        epsilon, delta, sensitivity: all three or none. They add Gaussian noise of standard deviation
            sensitivity * sqrt(2 ln(1.25 / delta)) / epsilon to the block (the Gaussian mechanism,
            epsilon < 1). It is (epsilon, delta)-indistinguishable only if ``sensitivity`` bounds the distance
            to the retrained block, which no one has proven for deep networks.
        seed: of perturbations, L-FOCI's noise, Hessian samples and the Gaussian mechanism.
        progress: show a progress bar.
    """

    perturbations: int = 1000
    noise: float = 0.1
    damping: float = 0.01
    hessian: Literal["exact", "gauss_newton"] = "exact"
    hessian_samples: int = 256
    update: Literal["sekhari", "single_sample"] = "sekhari"
    max_units: int = 4
    max_block: int = 2048
    batch_size: int = 256
    loss_fn: LossFunction | None = None
    layers: Sequence[str] | None = None
    epsilon: float | None = None
    delta: float | None = None
    sensitivity: float | None = None
    seed: int = 0
    progress: bool = False

    def __post_init__(self) -> None:
        for name in ("perturbations", "hessian_samples", "max_units", "max_block", "batch_size"):
            least = 2 if name == "perturbations" else 1
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be {least} or more, got {getattr(self, name)}")
        for name in ("noise", "damping"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number above 0, got {getattr(self, name)}")
        if self.hessian not in ("exact", "gauss_newton"):
            raise ValueError(f'hessian must be "exact" or "gauss_newton", got {self.hessian!r}')
        if self.update not in ("sekhari", "single_sample"):
            raise ValueError(f'update must be "sekhari" or "single_sample", got {self.update!r}')
        given = [value is not None for value in (self.epsilon, self.delta, self.sensitivity)]
        if any(given) != all(given):
            raise ValueError("epsilon, delta and sensitivity go together: give all three or none")
        if self.epsilon is not None and self.delta is not None and self.sensitivity is not None:
            if not (0 < self.epsilon < 1 and 0 < self.delta < 1 and 0 < self.sensitivity < math.inf):
                raise ValueError(
                    "the Gaussian mechanism needs 0 < epsilon < 1, 0 < delta < 1 and sensitivity > 0, "
                    f"got {self.epsilon}, {self.delta}, {self.sensitivity}"
                )

    def unlearn(self, model: nn.Module, forget: Batches, retain: Batches) -> Outcome:
        """Remove every sample of ``forget`` in place, in the order they come; eval mode meanwhile.

        Args:
            model: any module with float32 or float64 weights whose inputs are floating point.
            forget: re-iterable batches of the samples to remove, held in memory.
            retain: re-iterable batches of the other training samples; their number enters the step.

        Returns:
            An :class:`~fastunlearn.outcome.Outcome`. ``details``: ``n`` (samples before any removal),
            ``hessian_samples`` (those used), ``damping_raised`` (how many removals needed more damping), and
            ``removals``, per sample a dict of ``units`` [(layer, unit)], their ``scores``, units ``left_out``
            for ``max_block``, ``block`` (weights), ``damping``, ``step_norm``, ``loss_before`` and
            ``loss_after``. A removal whose loss depends on no unit has no units and changes nothing.

        Raises:
            TypeError: ``forget`` or ``retain`` cannot be iterated twice; integer inputs or outputs; weights
                in half precision.
            ValueError: an empty or malformed set; NaN or Inf in a weight, an input, a Hessian or a loss;
                a BatchNorm in train mode; a loss that is not one per sample; no trainable layer; an unknown
                name in ``layers``.
            RuntimeError: a solve whose residual is not at rounding level.
            The model's weights are as they were whenever this raises, also half-way through the removals.

        Warns:
            UserWarning: damping had to be raised.

        Cost per sample: m forward passes, L-FOCI's m^2 * units multiply-adds per unit chosen, one
        Hessian-vector product over ``hessian_samples`` per weight of the block (two for Gauss-Newton),
        block^3 / 3. Memory: block^2 in float64 and a copy of the trainable layers.
        """
        require_batches(forget, "forget")
        require_batches(retain, "retain")
        require_finite(model)
        require_separable(model)
        device = device_of(model)
        layers = _trainable_layers(model, self.layers)
        outcome = Outcome("LCodec", asdict(self))
        if self.loss_fn is not None:
            outcome.settings["loss_fn"] = getattr(self.loss_fn, "__qualname__", repr(self.loss_fn))
        removals: list[dict[str, Any]] = []
        parameters = [p for module in layers.values() for p in module._parameters.values() if p is not None]
        with (
            outcome.measured(device),
            preserved(model),
            torch.enable_grad(),
            restored_on_error(model, parameters) as before,
        ):
            model.eval()
            with outcome.phase("gather"):
                samples = [b[i : i + 1] for b in read(forget, "forget", device) for i in range(b.size)]
                for index, sample in enumerate(samples):
                    _require_continuous(sample, index)
                total = sum(b.size for b in read(retain, "retain", torch.device("meta"))) + len(samples)
                pool = self._pool(retain, samples, total, device)
            generator = torch.Generator().manual_seed(self.seed)
            for index in track(range(len(samples)), "LCodec", self.progress):
                removals.append(self._remove(model, layers, samples, index, total, pool, generator, outcome))
        for name, parameter, copy in before:
            outcome.count(name, copy, parameter)
        raised = [r["damping"] for r in removals if r["damping"] > self.damping]
        if raised:
            warnings.warn(
                f"LCodec raised the damping from {self.damping:g} to as much as {max(raised):g} for "
                f"{len(raised)} of {len(removals)} removals, whose Hessian block was not positive definite; "
                'hessian="gauss_newton" needs no such help',
                UserWarning,
                stacklevel=2,
            )
        outcome.details.update(
            n=total,
            hessian_samples=min(self.hessian_samples, total - 1) if self.update == "sekhari" else 1,
            damping_raised=len(raised),
            removals=removals,
        )
        return outcome

    def _pool(self, retain: Batches, samples: list[Batch], total: int, device: torch.device) -> list[tuple[int, Batch]]:
        """(-1 or index among the forget samples, sample) in a seeded order: any prefix is a uniform draw."""
        count = total - len(samples)
        order = torch.randperm(total, generator=torch.Generator().manual_seed(self.seed)).tolist()
        wanted = set([i for i in order if i < count][: self.hessian_samples])
        held: dict[int, Batch] = {}
        start = 0
        for batch in read(retain, "retain", device):
            for i in range(batch.size):
                if start + i in wanted:
                    held[start + i] = batch[i : i + 1]
            start += batch.size
        return [
            (-1, held[i]) if i < count else (i - count, samples[i - count]) for i in order if i >= count or i in held
        ]

    def _remove(
        self,
        model: nn.Module,
        layers: dict[str, nn.Module],
        samples: list[Batch],
        index: int,
        total: int,
        pool: list[tuple[int, Batch]],
        generator: torch.Generator,
        outcome: Outcome,
    ) -> dict[str, Any]:
        """One removal: choose the units, solve for their step, write it."""
        sample, n = samples[index], total - index
        with outcome.phase("select"):
            units, scores = self._select(model, layers, sample, index, generator)
        block = _Block(layers, units, self.max_block)
        loss = self._losses(model, sample).sum()
        report: dict[str, Any] = {
            "sample": index,
            "units": block.units,
            "scores": scores[: len(block.units)],
            "left_out": len(units) - len(block.units),
            "block": block.size,
            "damping": self.damping,
            "step_norm": 0.0,
            "loss_before": loss.item(),
            "loss_after": loss.item(),
        }
        if not block.size:
            return report
        with (
            outcome.phase("hessian"),
            sdpa_kernel(SDPBackend.MATH),
        ):  # the fused kernels have no second derivative
            gradient = block.flat(block.gradients(self._losses(model, sample).sum(), create_graph=False)).double()
            if self.update == "sekhari":
                # By index, not by value: a sample that occurs twice stays in once.
                others = [held for origin, held in pool if origin == -1 or origin > index][: self.hessian_samples]
            else:
                others = [sample]
            hessian = self._hessian(model, block, others)
        with outcome.phase("solve"):
            step, damping = _newton_step(hessian, gradient, self.damping, index)
            step = step / (n - 1)
            with torch.no_grad():
                block.add_(step + self._mechanism(step, generator))
                after = self._losses(model, sample).item()
        if not math.isfinite(after):
            raise ValueError(f"removal of forget sample {index} drives its loss to {after}; raise damping")
        report.update(damping=damping, step_norm=step.norm().item(), loss_after=after)
        return report

    def _losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return per_sample_loss(self.loss_fn, batch.outputs(model), batch.targets, batch.size)

    def _select(
        self,
        model: nn.Module,
        layers: dict[str, nn.Module],
        sample: Batch,
        index: int,
        generator: torch.Generator,
    ) -> tuple[list[tuple[str, int]], list[float]]:
        """The units on which the sample's loss depends under perturbation, most informative first."""
        values, losses = [], []
        units: list[tuple[str, int]] = []
        for start in range(0, self.perturbations, self.batch_size):
            copies = _perturbed(sample, min(self.batch_size, self.perturbations - start), self.noise, generator)
            recorded = unit_activations(model, copies, list(layers))
            with torch.no_grad():
                losses.append(per_sample_loss(self.loss_fn, recorded.outputs, copies.targets, copies.size))
            values.append(recorded.values)
            units = recorded.units
        try:
            chosen = foci(
                torch.cat(values),
                torch.cat(losses),
                noise=_JITTER,
                seed=self.seed + index,
                max_features=self.max_units,
            )
        except ValueError as error:
            raise ValueError(f"perturbed forget sample {index}: {error} (activations or losses)") from error
        return [units[j] for j in chosen.indices], chosen.scores

    def _hessian(self, model: nn.Module, block: _Block, samples: list[Batch]) -> Tensor:
        """Mean Hessian (or Gauss-Newton matrix) of the block over ``samples``, [size, size] in float64."""
        total = torch.zeros(block.size, block.size, dtype=torch.float64, device=block.device)
        for batch in _joined(samples, self.batch_size):
            outputs = batch.outputs(model)
            if self.hessian == "exact":
                loss = per_sample_loss(self.loss_fn, outputs, batch.targets, batch.size).sum()
                total += _exact_hessian(block, loss)
            else:
                if not isinstance(outputs, Tensor):
                    raise TypeError(
                        f'hessian="gauss_newton" needs a model that returns one tensor, got {type(outputs).__name__}'
                    )

                def losses(out: Tensor, batch: Batch = batch) -> Tensor:
                    return per_sample_loss(self.loss_fn, out, batch.targets, batch.size).sum()

                total += _gauss_newton(block, outputs, losses)
        return total / len(samples)

    def _mechanism(self, step: Tensor, generator: torch.Generator) -> Tensor:
        if self.epsilon is None or self.delta is None or self.sensitivity is None:
            return torch.zeros_like(step)
        deviation = self.sensitivity * math.sqrt(2 * math.log(1.25 / self.delta)) / self.epsilon
        return deviation * torch.randn(len(step), generator=generator, dtype=step.dtype).to(step.device)


class _Block:
    """The weights of the chosen units, as slices of parameters, in the model's order of layers."""

    def __init__(self, layers: dict[str, nn.Module], units: Sequence[tuple[str, int]], limit: int) -> None:
        self.units: list[tuple[str, int]] = []
        rows: dict[int, list[int]] = {}  # per weight: two layers may share one
        owner: dict[int, nn.Module] = {}
        size = 0
        for name, unit in units:
            module = layers[name]
            weight = cast(Tensor, module.weight)
            known = rows.get(id(weight), [])
            extra = weight[0].numel() + (_trainable_bias(module) is not None)
            if unit in known or (self.units and size + extra > limit):
                continue
            rows[id(weight)] = [*known, unit]
            owner[id(weight)] = module
            size += extra
            self.units.append((name, unit))
        self.parts: list[tuple[nn.Parameter, Tensor]] = []
        self.dense: list[bool] = []  # per part: of a Linear
        for module in layers.values():
            weight = cast(nn.Parameter, module.weight)
            if owner.get(id(weight)) is module:
                picked = torch.tensor(sorted(rows[id(weight)]), device=weight.device)
                self.parts.append((weight, picked))
                bias = _trainable_bias(module)
                if bias is not None and all(bias is not parameter for parameter, _ in self.parts):
                    self.parts.append((bias, picked))
                self.dense += [isinstance(module, nn.Linear)] * (len(self.parts) - len(self.dense))
        self.parameters = [parameter for parameter, _ in self.parts]
        self.sizes = [len(picked) * parameter[0].numel() for parameter, picked in self.parts]
        self.size = sum(self.sizes)
        self.device = self.parameters[0].device if self.parameters else torch.device("cpu")

    def gradients(self, loss: Tensor, create_graph: bool) -> list[Tensor]:
        """Gradient of ``loss`` with respect to every part's whole parameter; zero where it does not enter."""
        return _grad(loss, self.parameters, None, create_graph=create_graph)

    def flat(self, tensors: Sequence[Tensor]) -> Tensor:
        """The block's entries of tensors shaped like its parameters, as one vector."""
        return torch.cat([t[picked].reshape(-1) for t, (_, picked) in zip(tensors, self.parts, strict=True)])

    def add_(self, step: Tensor) -> None:
        for (parameter, picked), part in zip(self.parts, torch.split(step, self.sizes), strict=True):
            parameter[picked] += part.reshape(len(picked), *parameter.shape[1:]).to(parameter.dtype)


def _exact_hessian(block: _Block, loss: Tensor) -> Tensor:
    """One Hessian-vector product per weight of the block; only the upper triangle of parts is computed.

    A row of a late layer needs no second derivative of the layers before it: those entries are the transposes
    of rows already there, and skipping them spares the backward pass through the early (convolutional)
    layers.
    """
    gradients = block.gradients(loss, create_graph=True)
    hessian = torch.zeros(block.size, block.size, dtype=torch.float64, device=loss.device)
    start = 0
    for part, size in enumerate(block.sizes):
        wanted = gradients[part][block.parts[part][1]].reshape(-1)
        parameters = block.parameters[part:]
        # Several products in one pass where all is matrix products; vmap slows convolutions down threefold.
        chunk = max(1, min(32, _BATCHED // sum(p.numel() for p in parameters))) if all(block.dense[part:]) else 1
        for first in range(0, size, chunk):
            last = min(first + chunk, size)
            if chunk == 1:
                rows = [g[None] for g in _grad(wanted, parameters, _one_hots(wanted, first, last)[0], False)]
            else:
                rows = _grad(wanted, parameters, _one_hots(wanted, first, last), False, batched=True)
            hessian[start + first : start + last, start:] = torch.cat(
                [g[:, picked].flatten(1) for g, (_, picked) in zip(rows, block.parts[part:], strict=True)], 1
            )
        start += size
    return hessian.triu() + hessian.triu(1).mT


def _gauss_newton(block: _Block, outputs: Tensor, loss_of: Callable[[Tensor], Tensor]) -> Tensor:
    """J^T (d^2 loss / d outputs^2) J, the sum over the batch.

    J^T w is linear in w, so differentiating it again with respect to w gives J, column by column.
    """
    detached = outputs.detach().requires_grad_()
    (slope,) = _grad(loss_of(detached), [detached], None, create_graph=True)
    probe = torch.zeros_like(outputs, requires_grad=True)
    pulled = _grad(outputs, block.parameters, probe, create_graph=True)
    columns, curved = [], []
    for part, size in enumerate(block.sizes):
        wanted = pulled[part][block.parts[part][1]].reshape(-1)
        for entry in range(size):
            (column,) = _grad(wanted, [probe], _one_hots(wanted, entry, entry + 1)[0], create_graph=False)
            (bent,) = _grad(slope, [detached], column, create_graph=False)
            columns.append(column.reshape(-1))
            curved.append(bent.reshape(-1))
    product = torch.stack(columns).double() @ torch.stack(curved).double().mT
    return (product + product.mT) / 2


def _grad(
    output: Tensor,
    inputs: Sequence[Tensor],
    weights: Tensor | None,
    create_graph: bool,
    batched: bool = False,
) -> list[Tensor]:
    """torch.autograd.grad that keeps the graph; zero where ``output`` does not depend on an input.

    ``batched``: ``weights`` is [k, *output.shape], and so are the gradients.
    """
    lead = weights.shape[:1] if batched and weights is not None else ()
    if not output.requires_grad:
        return [t.new_zeros(*lead, *t.shape) for t in inputs]
    found = torch.autograd.grad(
        output,
        list(inputs),
        weights,
        retain_graph=True,
        create_graph=create_graph,
        allow_unused=True,
        is_grads_batched=batched,
    )
    return [t.new_zeros(*lead, *t.shape) if g is None else g for g, t in zip(found, inputs, strict=True)]


def _one_hots(like: Tensor, first: int, last: int) -> Tensor:
    """Rows ``first`` to ``last`` of the identity as large as the vector ``like``."""
    rows = like.new_zeros(last - first, len(like))
    rows.diagonal(first).fill_(1)
    return rows


def _newton_step(hessian: Tensor, gradient: Tensor, damping: float, index: int) -> tuple[Tensor, float]:
    """(hessian + damping I)^-1 gradient, and the damping that made the matrix positive definite."""
    if not bool(torch.isfinite(hessian).all() and torch.isfinite(gradient).all()):
        raise ValueError(f"the gradient or Hessian block of forget sample {index} holds NaN or Inf")
    identity = torch.eye(len(gradient), dtype=hessian.dtype, device=hessian.device)
    while True:
        system = hessian + damping * identity
        factor, info = torch.linalg.cholesky_ex(system)
        if int(info) == 0:
            break
        damping *= 10
    step = torch.cholesky_solve(gradient[:, None], factor)[:, 0]
    residual = (system @ step - gradient).norm()
    scale = torch.linalg.matrix_norm(system) * step.norm() + gradient.norm()
    # Cholesky is backward stable: in float64 this quotient is about 1e-16 times the block size.
    if float(residual) > 1e-10 * float(scale):
        raise RuntimeError(f"forget sample {index}: the solve left a residual of {float(residual / scale):.1e}")
    return step, damping


def _trainable_layers(model: nn.Module, names: Sequence[str] | None) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d))
        and (weight := module._parameters.get("weight")) is not None
        and weight.requires_grad
    }
    unknown = [name for name in names or () if name not in found]
    if unknown or not found:
        raise ValueError(
            f"{', '.join(map(repr, unknown)) or 'the model'} has no trainable Linear or convolution weight; "
            f"trainable layers: {', '.join(map(repr, found)) or 'none'}"
        )
    chosen = found if names is None else {name: found[name] for name in found if name in set(names)}
    for name, module in chosen.items():
        dtype = cast(Tensor, module.weight).dtype
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"layer {name} is {dtype}; second derivatives need float32 or float64: model.float()")
    return chosen


def _trainable_bias(module: nn.Module) -> nn.Parameter | None:
    bias = module._parameters.get("bias")
    return bias if bias is not None and bias.requires_grad else None


def _require_continuous(sample: Batch, index: int) -> None:
    for value in tree_flatten((sample.args, sample.kwargs))[0]:
        if not isinstance(value, Tensor):
            continue
        if not value.is_floating_point():
            raise TypeError(
                f"LCodec perturbs inputs with Gaussian noise, but an input is {value.dtype}; token and "
                "other integer inputs are not supported: give the model floating-point ones (images / 255)"
            )
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"forget sample {index} has NaN or Inf in an input")


def _perturbed(sample: Batch, copies: int, noise: float, generator: torch.Generator) -> Batch:
    """``copies`` of one sample, every input tensor with its own Gaussian noise."""

    def shake(t: Tensor) -> Tensor:
        shape = (copies, *t.shape[1:])
        return t + noise * torch.randn(shape, generator=generator, dtype=t.dtype).to(t.device)

    args, kwargs = tree_map_only(Tensor, shake, (sample.args, sample.kwargs))
    targets = tree_map_only(Tensor, lambda t: t.expand(copies, *t.shape[1:]), sample.targets)
    return Batch(args, kwargs, targets, copies)


def _joined(samples: list[Batch], size: int) -> Iterator[Batch]:
    """The samples in batches of at most ``size``, those of equal shapes together."""
    groups: dict[Any, list[Batch]] = {}
    for sample in samples:
        leaves = tree_flatten((sample.args, sample.kwargs, sample.targets))[0]
        shapes = tuple(tuple(t.shape) for t in leaves if isinstance(t, Tensor))
        groups.setdefault(shapes, []).append(sample)
    for group in groups.values():
        for start in range(0, len(group), size):
            part = group[start : start + size]
            flat = [tree_flatten((s.args, s.kwargs, s.targets)) for s in part]
            columns = zip(*(leaves for leaves, _ in flat), strict=True)
            joined = [torch.cat(c) if isinstance(c[0], Tensor) else c[0] for c in columns]
            args, kwargs, targets = tree_unflatten(joined, flat[0][1])
            yield Batch(args, kwargs, targets, len(part))
