"""The diagonal of the Fisher information of an unmodified model: exact per-sample squares at any batch size.

A *unit* is a module whose inputs and output gradients are recorded. Units with a rule (Linear, Conv, norm and
embedding layers) feed the kernels of :mod:`fastunlearn.ops`; every other module that owns a parameter is
differentiated again sample by sample, from the recorded inputs, on that module alone. A probe of one and two
samples decides beforehand which is possible, and proves it: every use of a parameter that autograd knows of must
be a use that was recorded.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from fastunlearn.data import Batch, Batches, LossFunction, per_sample_loss, read
from fastunlearn.hooks import Call, device_of, preserved, recording, require_finite, require_separable
from fastunlearn.outcome import track
from fastunlearn.rules import Seen, applies, joinable, joined, rule_of, ruled_owners

Kind = Literal["empirical", "monte_carlo"]


class FisherDiagonal(Mapping[str, Tensor]):
    """Parameter name -> mean over samples of the squared per-sample gradient, shaped like the parameter.

    Attributes:
        num_samples: how many samples the mean is over.
    """

    def __init__(self, values: Mapping[str, Tensor], num_samples: int) -> None:
        self._values = dict(values)
        self.num_samples = num_samples

    def __getitem__(self, name: str) -> Tensor:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"FisherDiagonal({len(self)} parameters, {self.num_samples} samples)"

    def save(self, path: str | PathLike[str]) -> None:
        """Write the diagonal to a safetensors file."""
        from safetensors.torch import save_file

        tensors = {name: value.contiguous() for name, value in self.items()}
        save_file(tensors, path, metadata={"num_samples": json.dumps(self.num_samples)})

    @classmethod
    def load(cls, path: str | PathLike[str], device: str = "cpu") -> FisherDiagonal:
        """Read what :meth:`save` wrote; raises ValueError for a safetensors file of something else."""
        from safetensors import safe_open

        with safe_open(path, framework="pt", device=device) as file:
            metadata = file.metadata() or {}
            if "num_samples" not in metadata:
                raise ValueError(f"{path} is not a Fisher diagonal: it does not say over how many samples")
            return cls({name: file.get_tensor(name) for name in file.keys()}, json.loads(metadata["num_samples"]))


def fisher_diagonal(
    model: nn.Module,
    batches: Batches,
    loss_fn: LossFunction | None = None,
    kind: Kind = "empirical",
    params: Sequence[str] | None = None,
    seed: int = 0,
    progress: bool = False,
    name: str = "batches",
) -> FisherDiagonal:
    """Mean over samples of the squared per-sample gradient, for every weight; exact at any batch size.

    The model is used as it is: no wrapping, no rewriting; ``.grad``, hooks, modes and the random state are as
    before, also after an exception. Ordinary weight gradients are not computed on the way.

    Args:
        model: any module; in eval mode where it has BatchNorm or dropout inside an unknown layer.
        batches: re-iterable of ``(inputs, targets)`` or of dicts with ``labels``; samples along the first axis.
        loss_fn: ``loss_fn(outputs, targets) -> Tensor[N]``, one loss per sample; default cross-entropy of logits.
        kind: ``"empirical"`` uses the given targets, ``"monte_carlo"`` draws one label per sample from the
            softmax of the model's logits.
        params: names to compute; default all that require grad.
        seed: of the drawn labels.
        progress: show a progress bar.
        name: what error messages call ``batches``.

    Returns:
        A :class:`FisherDiagonal`, float32 (float64 for float64 parameters), on the parameters' device.

    Raises:
        TypeError: ``batches`` can be read only once, or the model returns integers.
        ValueError: no batch, a loss that is not one per sample, NaN weights, batch statistics in BatchNorm,
            unknown names in ``params``, or a parameter whose samples can not be told apart.

    Cost: one forward and one backward pass without weight gradients, and 2 N T FLOPs per weight in the kernels;
    memory: one float32 number per weight, and the activations and their gradients of one batch. Layers without a
    rule cost one more forward and backward per sample of that layer (with one warning). Source: the diagonal used
    by DeepClean, Shi et al. 2024; see also Kunstner et al. 2019 on what "empirical" means.
    """
    if kind not in ("empirical", "monte_carlo"):
        raise ValueError(f"kind must be 'empirical' or 'monte_carlo', got {kind!r}")
    require_separable(model)
    require_finite(model)
    device = device_of(model)
    generator = torch.Generator(device).manual_seed(seed)
    with preserved(model), torch.enable_grad():
        targets = _select(model, params)
        for parameter in targets.values():
            parameter.requires_grad_(True)
        plan: _Plan | None = None
        sums = {
            key: torch.zeros_like(p, dtype=_sum_dtype(p), memory_format=torch.contiguous_format)
            for key, p in targets.items()
        }
        num_samples = 0
        for batch in track(read(batches, name, device), f"Fisher diagonal, {name}", progress):
            if plan is None:
                plan = _make_plan(model, batch, loss_fn, targets)
                plan.warn_of_fallbacks()
            _add_batch(model, batch, loss_fn, kind, generator, plan, sums)
            num_samples += batch.size
    return FisherDiagonal({key: value.div_(num_samples) for key, value in sums.items()}, num_samples)


def _select(model: nn.Module, params: Sequence[str] | None) -> dict[str, nn.Parameter]:
    named = dict(model.named_parameters())
    if params is None:
        return {name: p for name, p in named.items() if p.requires_grad}
    unknown = sorted(set(params) - set(named))
    if unknown:
        raise ValueError(f"params names {unknown}, which the model does not have; it has {sorted(named)}")
    return {name: named[name] for name in params}


def _sum_dtype(parameter: Tensor) -> torch.dtype:
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


# ---- the plan: which modules to record, and where their samples lie -------------------------------------------


@dataclass(frozen=True)
class _Unit:
    """A module to record. ``axes`` name the sample axis of each tensor it is given and of each it returns."""

    name: str
    module: nn.Module
    input_axes: tuple[int | None, ...]
    output_axes: tuple[int | None, ...]


@dataclass(frozen=True)
class _Plan:
    rules: dict[str, list[tuple[_Unit, str]]]  # parameter -> the units that use it, and its name there
    fallbacks: dict[str, tuple[_Unit, list[str]]]  # unit -> the parameters differentiated on it, by full name
    parameters: dict[str, nn.Parameter]

    @property
    def units(self) -> list[_Unit]:
        found = {id(u.module): u for uses in self.rules.values() for u, _ in uses}
        found |= {id(u.module): u for u, _ in self.fallbacks.values()}
        return list(found.values())

    def warn_of_fallbacks(self) -> None:
        if not self.fallbacks:
            return
        layers = ", ".join(f"{u.name or 'the model'} ({type(u.module).__name__})" for u, _ in self.fallbacks.values())
        warnings.warn(f"no kernel for {layers}: differentiated sample by sample, exact but slower", stacklevel=3)


@dataclass
class _Probe:
    """What one and two copies of the same sample show: shapes, calls, and every edge into every parameter."""

    calls: list[dict[nn.Module, list[Call]]]  # for one sample, for two
    edges: Counter[int]  # id of a parameter -> uses that autograd knows of

    def unit(self, name: str, module: nn.Module) -> _Unit | None:
        """The module as a unit, or None where it is not called or its samples can not be told apart."""
        one, two = (calls.get(module, []) for calls in self.calls)
        if not one or len(one) != len(two):
            return None
        axes = {(_sample_axes(a.args, a.kwargs, b.args, b.kwargs), _sample_axes(a.output, (), b.output, ()))
                for a, b in zip(one, two, strict=True)}  # fmt: skip
        if len(axes) != 1:
            return None
        inputs, outputs = axes.pop()
        if inputs is None or outputs is None or None in outputs:
            return None
        return _Unit(name, module, inputs, outputs)


def _sample_axes(a: Any, a_more: Any, b: Any, b_more: Any) -> tuple[int | None, ...] | None:
    """Per tensor the axis that doubles with the samples (None: it has none); None if samples are folded away."""
    axes: list[int | None] = []
    one = [t for t in tree_flatten((a, a_more))[0] if isinstance(t, Tensor)]
    two = [t for t in tree_flatten((b, b_more))[0] if isinstance(t, Tensor)]
    if len(one) != len(two):
        return None
    for s, t in zip(one, two, strict=True):
        if s.dim() != t.dim():
            return None
        grown = [k for k in range(s.dim()) if s.shape[k] != t.shape[k]]
        if len(grown) > 1 or any((s.shape[k], t.shape[k]) != (1, 2) for k in grown):
            return None
        axes.append(grown[0] if grown else None)
    return tuple(axes)


def _probe(model: nn.Module, batch: Batch, loss_fn: LossFunction | None) -> _Probe:
    sample = batch[:1]
    args, kwargs, targets = tree_map_only(
        Tensor, lambda t: torch.cat([t, t]), (sample.args, sample.kwargs, sample.targets)
    )
    pair = Batch(args, kwargs, targets, 2)
    calls: list[dict[nn.Module, list[Call]]] = []
    for probe in (sample, pair):
        seen: dict[nn.Module, list[Call]] = defaultdict(list)
        with recording(model.modules(), lambda call, seen=seen: seen[call.module].append(call)):  # type: ignore[misc]
            loss = per_sample_loss(loss_fn, probe.outputs(model), probe.targets, probe.size)
        calls.append(seen)
    return _Probe(calls, _parameter_edges([loss]))


def _parameter_edges(outputs: Sequence[Tensor]) -> Counter[int]:
    """How often each parameter is used in the graph that leads to ``outputs``."""
    edges: Counter[int] = Counter()
    waiting: list[Node] = [t.grad_fn for t in outputs if t.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is None:
                continue
            if hasattr(node, "variable"):
                edges[id(node.variable)] += 1
            elif node not in seen:
                seen.add(node)
                waiting.append(node)
    return edges


def _make_plan(model: nn.Module, batch: Batch, loss_fn: LossFunction | None, targets: dict[str, nn.Parameter]) -> _Plan:
    probe = _probe(model, batch, loss_fn)
    modules = dict(model.named_modules())
    owners = ruled_owners(modules)
    plan = _Plan({}, {}, targets)
    for name, parameter in targets.items():
        if not probe.edges[id(parameter)]:
            continue  # the loss does not depend on it: its squares are zero
        uses = _ruled_uses(probe, parameter, owners[id(parameter)])
        if uses is not None:
            plan.rules[name] = uses
            continue
        unit = _fallback_unit(probe, modules, parameter, [owner for owner, _, _ in owners[id(parameter)]])
        if unit is None:
            raise ValueError(
                f"the gradient of {name} can not be taken per sample: no module around it keeps the samples on an "
                "axis of their own; pass params= without it"
            )
        plan.fallbacks.setdefault(unit.name, (unit, []))[1].append(name)
    return plan


def _ruled_uses(
    probe: _Probe, parameter: nn.Parameter, owners: Sequence[tuple[str, nn.Module, str]]
) -> list[tuple[_Unit, str]] | None:
    """The units that use the parameter, if rules account for every use of it; else None."""
    uses, calls = [], 0
    for name, module, local in owners:
        unit = probe.unit(name, module)
        if isinstance(module, nn.Embedding) and module.max_norm is not None:
            raise ValueError(f"{name} is an Embedding with max_norm, whose forward pass rewrites its weights")
        if unit is None or rule_of(module) is None or not applies(module, unit.input_axes, unit.output_axes):
            return None
        uses.append((unit, local))
        calls += len(probe.calls[1][module])
    users = [(unit.module, local) for unit, local in uses]
    return uses if joinable(users, calls) and calls == probe.edges[id(parameter)] else None


def _fallback_unit(
    probe: _Probe, modules: Mapping[str, nn.Module], parameter: nn.Parameter, owners: Sequence[str]
) -> _Unit | None:
    """The smallest module that keeps samples apart and contains every use of the parameter."""
    path = owners[0].split(".") if owners[0] else []
    for depth in range(len(path), -1, -1):
        name = ".".join(path[:depth])
        inside = all(owner == name or owner.startswith(f"{name}.") or not name for owner in owners)
        unit = probe.unit(name, modules[name]) if inside else None
        if unit is None:
            continue
        _require_deterministic(name, unit.module)
        edges: Counter[int] = Counter()
        for call in probe.calls[1][unit.module]:
            outputs = _run_again(unit, call.args, call.kwargs)
            edges += _parameter_edges(outputs)
        if edges[id(parameter)] == probe.edges[id(parameter)]:
            return unit
    return None


def _require_deterministic(name: str, module: nn.Module) -> None:
    for child in module.modules():
        rate = child.p if isinstance(child, _DropoutNd) else getattr(child, "dropout", 0.0)
        if child.training and isinstance(rate, float) and rate > 0:
            raise ValueError(
                f"{name or 'the model'} has no kernel and drops units at random, so its samples can not be "
                "differentiated again; call model.eval() first"
            )


def _run_again(unit: _Unit, args: Any, kwargs: Any) -> list[Tensor]:
    """The unit's output tensors from detached inputs, with a graph that ends at its parameters."""
    args, kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
    with torch.enable_grad():
        output = unit.module(*args, **kwargs)
    return [t for t in tree_flatten(output)[0] if isinstance(t, Tensor)]


# ---- one batch -------------------------------------------------------------------------------------------------


@dataclass
class _Recorded:
    """A call of a unit with the gradient edges of what it returned, taken before anyone can write over it."""

    call: Call
    versions: list[int]
    edges: list[GradientEdge | None]
    grads: list[Tensor | None]

    @classmethod
    def of(cls, call: Call) -> _Recorded:
        outputs = [t for t in tree_flatten(call.output)[0] if isinstance(t, Tensor)]
        edges = [get_gradient_edge(t) if t.requires_grad else None for t in outputs]
        return cls(replace(call, output=None), [t._version for t in cls.tensors(call)], edges, [None] * len(edges))

    @staticmethod
    def tensors(call: Call) -> list[Tensor]:
        return [t for t in tree_flatten((call.args, call.kwargs))[0] if isinstance(t, Tensor)]

    def require_unwritten(self, unit: _Unit) -> None:
        if [t._version for t in self.tensors(self.call)] != self.versions:
            raise ValueError(
                f"the input of {unit.name} was written over in place after it was used, so its gradient is lost; "
                "use the out-of-place operation there"
            )


def _add_batch(
    model: nn.Module,
    batch: Batch,
    loss_fn: LossFunction | None,
    kind: Kind,
    generator: torch.Generator,
    plan: _Plan,
    sums: dict[str, Tensor],
) -> None:
    records: dict[nn.Module, list[_Recorded]] = defaultdict(list)
    with recording([unit.module for unit in plan.units], lambda call: records[call.module].append(_Recorded.of(call))):
        outputs = batch.outputs(model)
        targets = batch.targets if kind == "empirical" else _draw_labels(outputs, generator)
        losses = per_sample_loss(loss_fn, outputs, targets, batch.size)
    slots = [(r, i) for found in records.values() for r in found for i, e in enumerate(r.edges) if e is not None]
    edges = [edge for r, i in slots if (edge := r.edges[i]) is not None]
    if not edges:
        return  # the loss depends on none of the parameters
    # Asking for the edges, not for the weights, is what keeps autograd from computing weight gradients.
    for (record, i), grad in zip(slots, torch.autograd.grad(losses.sum(), edges, allow_unused=True), strict=True):
        record.grads[i] = grad
    del losses, outputs
    for unit in plan.units:
        for record in records[unit.module]:
            record.require_unwritten(unit)
    with torch.no_grad():
        for name, users in plan.rules.items():
            _add_ruled(sums[name], users, records)
    for unit, names in plan.fallbacks.values():
        _add_fallback(unit, records[unit.module], [(plan.parameters[n], sums[n]) for n in names], batch.size)


def _draw_labels(outputs: Any, generator: torch.Generator) -> Tensor:
    """One label per sample from the softmax of logits [N, C]."""
    if not isinstance(outputs, Tensor) or outputs.dim() != 2 or not outputs.is_floating_point():
        shape = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(f"kind='monte_carlo' draws labels from logits [N, C], but the model returns {shape}")
    probabilities = outputs.detach().float().softmax(1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)


def _add_ruled(out: Tensor, users: Sequence[tuple[_Unit, str]], records: Mapping[nn.Module, list[_Recorded]]) -> None:
    uses = []
    for unit, local in users:
        rule = rule_of(unit.module)
        assert rule is not None  # the plan gave it one
        for record in records[unit.module]:
            if all(grad is None for grad in record.grads):
                continue  # the loss does not depend on what this call returned
            seen = Seen(record.call, unit.input_axes, unit.output_axes, tuple(record.grads))
            uses.append(rule(unit.module, seen)[local])
    for use in joined(uses) if uses else ():
        use.add_to(out)


def _add_fallback(
    unit: _Unit, records: Sequence[_Recorded], parameters: Sequence[tuple[nn.Parameter, Tensor]], samples: int
) -> None:
    for n in range(samples):
        total: list[Tensor | None] = [None] * len(parameters)
        for record in records:
            args, kwargs = _only_sample((record.call.args, record.call.kwargs), unit.input_axes, n)
            outputs = _run_again(unit, args, kwargs)
            pairs = [
                (output, grad.narrow(axis, n, 1))
                for output, grad, axis in zip(outputs, record.grads, unit.output_axes, strict=True)
                if grad is not None and axis is not None
            ]
            if not pairs:
                continue
            grads = torch.autograd.grad(
                [o for o, _ in pairs], [p for p, _ in parameters], [g for _, g in pairs], allow_unused=True
            )
            for i, (grad, (_, out)) in enumerate(zip(grads, parameters, strict=True)):
                if grad is not None:
                    wide = grad.to(out.dtype)
                    earlier = total[i]
                    total[i] = wide if earlier is None else earlier + wide
        for gradient, (_, out) in zip(total, parameters, strict=True):
            if gradient is not None:
                out.addcmul_(gradient, gradient)


def _only_sample(values: Any, axes: Sequence[int | None], n: int) -> Any:
    """The same arguments with sample ``n`` alone."""
    leaves, structure = tree_flatten(values)
    remaining = iter(axes)
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            axis = next(remaining)
            leaves[i] = leaf if axis is None else leaf.narrow(axis, n, 1)
    return tree_unflatten(leaves, structure)
