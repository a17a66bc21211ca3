"""Units: modules whose calls are recorded, and what can be done with a recorded call alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.func import functional_call, grad, vmap
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastunlearn import ops
from fastunlearn.graph import Key, Taps
from fastunlearn.hooks import Call

Axes = tuple[int | None, ...]
Parameters = Sequence[tuple[nn.Parameter, Tensor]]  # each with the sums of its squares
Context = Callable[[], AbstractContextManager[Any]]


def tensors_in(values: Any) -> list[Tensor]:
    """All tensors in nested arguments, in the order of ``tree_flatten``, which takes longer for the usual ones."""
    if isinstance(values, Tensor):
        return [values]
    if type(values) in (tuple, list):
        return [t for value in values for t in tensors_in(value)]
    if type(values) is dict:
        return [t for value in values.values() for t in tensors_in(value)]
    if values is None or isinstance(values, (bool, int, float, str)):
        return []
    return [leaf for leaf in tree_flatten(values)[0] if isinstance(leaf, Tensor)]


def tensors_of(output: Any) -> list[Tensor]:
    """All tensors in what a module returned; also in mappings, dataclasses and Hugging Face outputs."""
    if isinstance(output, Tensor):
        return [output]
    if type(output) in (tuple, list):
        return [t for value in output for t in tensors_of(value)]
    if isinstance(output, Mapping) and output:
        return [t for value in output.values() for t in tensors_of(value)]
    if is_dataclass(output) and not isinstance(output, type):
        return [t for f in fields(output) for t in tensors_of(getattr(output, f.name))]
    if isinstance(getattr(output, "logits", None), Tensor):
        return [output.logits]
    return tensors_in(output)


@dataclass(frozen=True)
class Unit:
    """A module to record.

    Attributes:
        input_axes, output_axes: the sample axis of each tensor given and returned; None where it has none.
        single: per tensor given and returned that has no sample axis, which of its axes had length one.
        spread: for a module that sees no samples, how what it returns is given a sample axis, see :func:`spread`.
    """

    name: str
    module: nn.Module
    input_axes: Axes
    output_axes: Axes
    single: tuple[tuple[bool, ...] | None, ...]
    spread: int | None = None

    @property
    def label(self) -> str:
        return f"{self.name or 'the model'} ({type(self.module).__name__})"

    def fits(self, record: Record, samples: int) -> bool:
        """Whether a call of a batch has its samples where the plan says."""
        if len(record.inputs) != len(self.input_axes) or len(record.outputs) != len(self.output_axes):
            return False
        if self.spread is not None:
            return all(
                one is not None and len(shape) == len(one) and (self.spread >= 0 or shape[0] == 1)
                for shape, one in zip(record.inputs, self.single, strict=False)
            )
        axes = (*self.input_axes, *self.output_axes)
        for shape, axis, single in zip((*record.inputs, *record.outputs), axes, self.single, strict=True):
            if axis is not None and (len(shape) <= axis or shape[axis] != samples):
                return False
            if single is not None:
                # An axis of one may hide an axis of samples; it has to remain one.
                if len(shape) != len(single) or any(one and k != 1 for one, k in zip(single, shape, strict=True)):
                    return False
        return True


@dataclass
class Record:
    """One call of a module: what it was given, and the gradients of what it returned as they arrive."""

    call: Call | None  # without its output; None once used up
    inputs: tuple[torch.Size, ...]
    outputs: tuple[torch.Size, ...]
    sources: set[Node]  # where the tensors given come from
    own: bool = True  # with its own parameters, not with tensors put in their place as functional_call does
    versions: list[int] = field(default_factory=list)
    keys: list[Key | None] = field(default_factory=list)  # per tensor returned
    grads: list[Tensor | None] = field(default_factory=list)
    missing: int = 0
    returned: list[tuple[Tensor, int]] = field(default_factory=list)  # with versions, where asked for

    @classmethod
    def of(
        cls,
        call: Call,
        keep: bool,
        taps: Taps,
        arrived: Callable[[Record], None] | None = None,
        whole: bool = False,
    ) -> Record:
        """To be made in the forward hook, before anybody can write over what the module returned.

        ``arrived`` is called with the record when the last of ``missing`` gradients has come; ``whole`` keeps what was
        returned.
        """
        given, returned = tensors_in((call.args, call.kwargs)), tensors_of(call.output)
        record = cls(
            replace(call, output=None) if keep else None,
            tuple(t.shape for t in given),
            tuple(t.shape for t in returned),
            {t.grad_fn for t in given if t.grad_fn is not None},
            _has_own_parameters(call.module),
            [t._version for t in given],
        )

        def take(index: int, gradient: Tensor) -> None:
            earlier = record.grads[index]
            record.grads[index] = gradient if earlier is None else earlier + gradient
            record.missing -= 1
            if record.missing == 0 and arrived is not None:
                arrived(record)

        for i, tensor in enumerate(returned):
            again = any(tensor is earlier for earlier in returned[:i])  # its gradient must not be taken twice
            listen = tensor.requires_grad and not again
            record.keys.append(taps.add(tensor, partial(take, i)) if listen else None)
        record.grads = [None] * len(returned)
        if whole:
            record.returned = [(t.detach(), t._version) for t in returned]
        return record

    def require_unwritten(self, unit: Unit) -> None:
        """Raise ValueError if a tensor the module was given holds something else by now."""
        assert self.call is not None
        if [t._version for t in tensors_in((self.call.args, self.call.kwargs))] != self.versions:
            raise ValueError(
                f"the input of {unit.name} was written over in place after it was used, so its gradient is lost; "
                "use the out-of-place operation there"
            )


def _has_own_parameters(module: nn.Module) -> bool:
    parameters = list(module._parameters.values())
    if isinstance(module, nn.MultiheadAttention):
        parameters += module.out_proj._parameters.values()
    return all(p is None or isinstance(p, nn.Parameter) for p in parameters)


# ---- values without samples, one copy per sample ----------------------------------------------------------------


def spread(value: Tensor, samples: int, form: int) -> Tensor:
    """A view [samples, ...] of one value. ``form`` -1: its first axis has length one and becomes the samples; else the
    samples are a new first axis, followed by ``form`` new axes of length one."""
    one = value if form < 0 else value.reshape(1, *[1] * form, *value.shape)
    return one.expand(samples, *one.shape[1:])


@dataclass(frozen=True)
class Bare:
    """A parameter that is replaced by one view per sample while the model runs."""

    name: str
    module: nn.Module
    local: str
    form: int


class Substitution:
    """Attributes and outputs of modules replaced for a while; :meth:`paused` where the originals are needed."""

    def __init__(self) -> None:
        self._attributes: list[tuple[nn.Module, str, Any, Any]] = []
        self._active = True

    def attribute(self, module: nn.Module, local: str, value: Tensor) -> None:
        self._attributes.append((module, local, module._parameters[local], value))
        module._parameters[local] = value  # type: ignore[assignment]

    def output(self, module: nn.Module, change: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        """Returns what ends it."""

        def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            return change(output) if self._active else output

        return module.register_forward_hook(hook, prepend=True).remove

    def originals(self) -> None:
        for module, local, original, _ in self._attributes:
            module._parameters[local] = original

    @contextmanager
    def paused(self) -> Iterator[None]:
        self._active = False
        self.originals()
        try:
            yield
        finally:
            for module, local, _, value in self._attributes:
                module._parameters[local] = value
            self._active = True


# ---- a module differentiated again, by itself --------------------------------------------------------------------


@dataclass(frozen=True)
class Fallback:
    """Parameters without a rule, differentiated on ``unit`` alone: over all samples at once, or one by one."""

    unit: Unit
    names: list[str]
    batched: bool = False

    def add(self, records: Sequence[Record], parameters: Parameters, samples: int, context: Context) -> None:
        # Of several outputs one may be made of another (attention's of its weights), which under vmap no hook can see.
        several = any(sum(gradient is not None for gradient in record.grads) > 1 for record in records)
        way = add_batched if self.batched and not several else add_one_by_one
        way(self.unit, records, parameters, samples, context)


def only_sample(values: Any, axes: Sequence[int | None], n: int) -> Any:
    """The same arguments with sample ``n`` alone."""
    return map_tensors(values, axes, lambda t, axis: t if axis is None else t.narrow(axis, n, 1))


def map_tensors(values: Any, axes: Sequence[int | None], change: Callable[[Tensor, int | None], Tensor]) -> Any:
    """Nested arguments with ``change(tensor, axis)`` for each tensor."""
    leaves, structure = tree_flatten(values)
    remaining = iter(axes)
    leaves = [change(leaf, next(remaining)) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return tree_unflatten(leaves, structure)


def run_again(unit: Unit, args: Any, kwargs: Any, context: Context = nullcontext) -> list[Tensor]:
    """The unit's output tensors from detached inputs; their graph ends at its parameters."""
    args, kwargs = map_tensors((args, kwargs), unit.input_axes, lambda t, _: t.detach())
    with torch.enable_grad(), context():
        return tensors_of(unit.module(*args, **kwargs))


def require_deterministic(unit: Unit) -> None:
    for child in unit.module.modules():
        rate = child.p if isinstance(child, _DropoutNd) else getattr(child, "dropout", 0.0)
        if child.training and isinstance(rate, float) and rate > 0:
            raise ValueError(
                f"{unit.name or 'the model'} has no kernel and drops units at random, so its samples can not be "
                "differentiated again; call model.eval() first"
            )


def add_one_by_one(
    unit: Unit, records: Sequence[Record], parameters: Parameters, samples: int, context: Context
) -> None:
    """Add the squares: one forward and one backward pass of the unit per sample."""
    for n in range(samples):
        total: list[Tensor | None] = [None] * len(parameters)
        for record in records:
            assert record.call is not None
            args, kwargs = only_sample((record.call.args, record.call.kwargs), unit.input_axes, n)
            with context():  # also around the backward pass, for checkpoints inside run the module again
                outputs = run_again(unit, args, kwargs)
                pairs = [
                    (output, gradient.narrow(axis, n, 1))
                    for output, gradient, axis in zip(outputs, record.grads, unit.output_axes, strict=True)
                    if gradient is not None and axis is not None and output.requires_grad
                ]
                if not pairs:
                    continue
                for output, gradient in pairs:
                    # What was recorded is the whole gradient, also where another output is made of this one.
                    output.register_hook(partial(_replaced, gradient))  # type: ignore[no-untyped-call]
                grads = torch.autograd.grad(
                    [o for o, _ in pairs], [p for p, _ in parameters], [g for _, g in pairs], allow_unused=True
                )
            for i, (gradient, (_, out)) in enumerate(zip(grads, parameters, strict=True)):
                if gradient is not None:
                    wide = gradient.to(out.dtype)
                    earlier = total[i]
                    total[i] = wide if earlier is None else earlier + wide
        for whole, (_, out) in zip(total, parameters, strict=True):
            if whole is not None:
                out.addcmul_(whole, whole)


def _replaced(by: Tensor, _: Tensor) -> Tensor:
    return by


def add_batched(unit: Unit, records: Sequence[Record], parameters: Parameters, samples: int, context: Context) -> None:
    """Add the squares: one forward and one backward pass of the unit over all samples, by torch.func.vmap."""
    names = {id(p): name for name, p in unit.module.named_parameters()}
    weights = {names[id(p)]: p.detach() for p, _ in parameters}
    total: dict[str, Tensor] = {}
    for record in records:
        assert record.call is not None
        leaves, structure = tree_flatten((record.call.args, record.call.kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        inputs = [leaves[i].detach() for i in places]
        targets = [(k, g, axis) for k, (g, axis) in enumerate(zip(record.grads, unit.output_axes, strict=True))
                   if g is not None and axis is not None]  # fmt: skip
        if not targets:
            continue

        def score(
            values: dict[str, Tensor],
            tensors: list[Tensor],
            directions: list[Tensor],
            leaves: list[Any] = leaves,
            structure: Any = structure,
            places: list[int] = places,
            targets: Any = targets,
        ) -> Tensor:
            """What the gradients of one sample's outputs say of one sample's weights."""
            filled = list(leaves)
            for i, tensor, axis in zip(places, tensors, unit.input_axes, strict=True):
                filled[i] = tensor if axis is None else tensor.unsqueeze(axis)
            args, kwargs = tree_unflatten(filled, structure)
            outputs = tensors_of(functional_call(unit.module, values, args, kwargs))
            products: list[Tensor] = [
                (outputs[k] * direction.unsqueeze(axis)).sum()
                for (k, _, axis), direction in zip(targets, directions, strict=True)
            ]
            return reduce(torch.add, products)

        per_sample = vmap(grad(score), in_dims=(None, list(unit.input_axes), [axis for _, _, axis in targets]))
        with torch.no_grad(), context():
            grads = per_sample(weights, inputs, [g for _, g, _ in targets])
        for name, gradient in grads.items():
            total[name] = gradient if name not in total else total[name] + gradient
    for p, out in parameters:
        if names[id(p)] in total:
            add_squares(out, total[names[id(p)]])


def zeros_for(parameter: Tensor) -> Tensor:
    """The sums of a parameter's squares: contiguous, float32, float64 for float64."""
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    return torch.zeros_like(parameter, dtype=dtype, memory_format=torch.contiguous_format)


def add_squares(out: Tensor, gradients: Tensor) -> None:
    """out += sum over samples of gradients [N, ...] squared."""
    ops.sq_grad_bias(out.view(-1), gradients.reshape(len(gradients), -1))
