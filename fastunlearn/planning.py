"""What to record for the Fisher diagonal, decided before the gradients of the first batch are asked for, and proven.

One sample goes through the model. If rules account for every use of every parameter that autograd knows of, the
first batch shows where the samples lie (the axis that grows), and that is all. Else a batch of two goes through too:
parameters without a rule get one copy per sample where a trial shows that this is right, and are otherwise
differentiated on the smallest module that holds all their uses and keeps samples apart.
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils._pytree import tree_map_only

from fastunlearn.data import Batch
from fastunlearn.graph import Aliases, Survey, Taps, edges_between, require_no_reentrant_checkpoint
from fastunlearn.hooks import Call, recording
from fastunlearn.rules import applies, joinable, rule_of
from fastunlearn.units import (
    Axes,
    Bare,
    Context,
    Fallback,
    Record,
    Substitution,
    Unit,
    add_batched,
    add_one_by_one,
    map_tensors,
    only_sample,
    require_deterministic,
    run_again,
    spread,
    zeros_for,
)

Losses = Callable[[Batch], Tensor]  # one forward pass
Owner = tuple[str, nn.Module, str]  # a module's name, the module, the parameter's name there
Records = dict[nn.Module, list[Record]]
Ways = Literal["all", "originals", "root"]
Edge = tuple[Node, int, int]  # a use: node, position, id of the parameter


@dataclass(frozen=True)
class Observed:
    """One forward pass: the calls, and every use of every parameter."""

    records: Records
    survey: Survey

    def reached(self, module: nn.Module) -> int:
        """Calls with the module's own parameters of which the loss depends on some output."""
        return sum(r.own and any(k in self.survey.reached for k in r.keys) for r in self.records.get(module, []))


@dataclass(frozen=True)
class Plan:
    """For every parameter that the loss depends on, one of three ways to its squares."""

    parameters: dict[str, nn.Parameter]
    rules: dict[str, list[tuple[Unit, str]]] = field(default_factory=dict)  # the units that use it, its name there
    bare: dict[str, Bare] = field(default_factory=dict)
    fallbacks: dict[str, Fallback] = field(default_factory=dict)  # by the name of the unit
    kinds: Counter[str] = field(default_factory=Counter)  # of nodes in the first batch's graph

    @property
    def units(self) -> dict[nn.Module, Unit]:
        found = {u.module: u for uses in self.rules.values() for u, _ in uses}
        return found | {f.unit.module: f.unit for f in self.fallbacks.values()}

    @property
    def copies(self) -> bool:
        """Whether something is spread over the samples."""
        return bool(self.bare) or any(unit.spread is not None for unit in self.units.values())

    def slow(self) -> list[str]:
        """The units that are differentiated sample by sample."""
        return [f.unit.label for f in self.fallbacks.values() if not f.batched]

    def fits(self, observed: Observed, samples: int) -> bool:
        """Whether a batch kept to the plan: samples where they were, and no use of a parameter that is not recorded."""
        for module, unit in self.units.items():
            if not all(unit.fits(record, samples) for record in observed.records.get(module, [])):
                return False
        if self.copies:
            # What the model does with a copy per sample was tried on one structure alone.
            if self.kinds and self.kinds != observed.survey.kinds:
                return False
            self.kinds.update(observed.survey.kinds if not self.kinds else ())
        edges, accounted = observed.survey.edges, Counter[int]()
        for name, uses in self.rules.items():
            users = [(unit.module, local) for unit, local in uses]
            calls = sum(observed.reached(module) for module, _ in users)
            accounted[id(self.parameters[name])] = calls if joinable(users, calls) else -1
        for name in self.bare:
            accounted[id(self.parameters[name])] = 1
        for fallback in self.fallbacks.values():
            inner = edges_inside(observed, fallback.unit.module)
            for name in fallback.names:
                accounted[id(self.parameters[name])] = inner[id(self.parameters[name])]
        return all(
            edges[id(p)] in (0, accounted[id(p)]) if name in self.bare else edges[id(p)] == accounted[id(p)]
            for name, p in self.parameters.items()
        )


def edges_inside(observed: Observed, module: nn.Module) -> Counter[int]:
    """Uses of parameters between what the module was given and what it returned."""
    uses = set[Edge]().union(*(edges_inside_call(observed, record) for record in observed.records.get(module, [])))
    aliases = observed.survey.aliases
    return Counter(parameter if aliases is None else aliases[parameter] for _, _, parameter in uses)


def edges_inside_call(observed: Observed, record: Record) -> set[Edge]:
    """Those between what one call was given and what it returned."""
    nodes = [key[0] for key in record.keys if key is not None and key in observed.survey.reached]
    return edges_between(nodes, record.sources)


@dataclass(frozen=True)
class Probe:
    """One sample's pass: shapes, calls and uses, without its tensors, and its losses to be compared with."""

    shapes: dict[nn.Module, list[tuple[tuple[torch.Size, ...], tuple[torch.Size, ...]]]]
    reached: Counter[nn.Module]
    edges: Counter[int]
    losses: Tensor
    random: bool  # the pass drew random numbers


@contextmanager
def observing(
    model: nn.Module, losses_of: Losses, batch: Batch, keep: bool, aliases: Aliases | None = None
) -> Iterator[tuple[Observed, Tensor]]:
    """One pass with all modules recorded, and its losses; the graph is let go at the end of the block."""
    taps, records = Taps(aliases), defaultdict(list)

    def on_call(call: Call) -> None:
        require_no_reentrant_checkpoint()
        if aliases is not None:
            aliases.see(call.module)
        records[call.module].append(Record.of(call, keep, taps, whole=keep))

    try:
        with recording(model.modules(), on_call):
            losses = losses_of(batch)
        yield Observed(dict(records), taps.survey(losses.sum())), losses
    finally:
        taps.close()


def probe(
    model: nn.Module, losses_of: Losses, batch: Batch, device: torch.device, aliases: Aliases | None = None
) -> Probe:
    """Of the last sample: one that sums over those before it show in."""
    before = _random_state(device)
    with observing(model, losses_of, batch[-1:], keep=False, aliases=aliases) as (observed, losses):
        losses = losses.detach()
    shapes = {m: [(r.inputs, r.outputs) for r in records] for m, records in observed.records.items()}
    reached = Counter({m: observed.reached(m) for m in observed.records})
    random = not torch.equal(before, _random_state(device))
    return Probe(shapes, reached, observed.survey.edges, losses, random)


def _random_state(device: torch.device) -> Tensor:
    state = torch.get_rng_state()
    return torch.cat([state, torch.cuda.get_rng_state(device)]) if device.type == "cuda" else state


def owners_with_rules(
    one: Probe, owners: Mapping[int, Sequence[Owner]], parameters: Mapping[str, nn.Parameter]
) -> dict[str, Sequence[Owner]] | None:
    """For every parameter in use its owners, if they all have rules that account for every use; else None.

    A rule's module uses its parameters once in a call. So when the calls that reach the loss are as many as the uses
    that autograd knows of, there is no other use.
    """
    found: dict[str, Sequence[Owner]] = {}
    for name, parameter in parameters.items():
        uses = one.edges[id(parameter)]
        if uses:
            found[name] = owners[id(parameter)]
            _require_constant(found[name])
            if not _all_ruled(found[name], sum(one.reached[m] for _, m, _ in found[name]), uses):
                return None
    return found


def _all_ruled(owners: Sequence[Owner], calls: int, uses: int) -> bool:
    users = [(module, local) for _, module, local in owners]
    return calls == uses and all(rule_of(m) is not None for m, _ in users) and joinable(users, calls)


def _require_constant(owners: Sequence[Owner]) -> None:
    for name, module, _ in owners:
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
            kind = type(module).__name__
            raise ValueError(f"{name} is an {kind} with max_norm, whose forward pass rewrites its weights")


def plan_of_rules(
    one: Probe, ruled: Mapping[str, Sequence[Owner]], parameters: dict[str, nn.Parameter], samples: int, first: Observed
) -> Plan | None:
    """The plan when rules are enough and the first batch shows every sample axis; else None."""
    units: dict[nn.Module, Unit | None] = {}
    plan = Plan(parameters)
    for name, found in ruled.items():
        uses = []
        for owner, module, local in found:
            if module not in units:
                units[module] = _unit(owner, module, one, first.records.get(module, []), samples)
            unit = units[module]
            if not one.reached[module]:
                continue  # called for nothing, or not at all
            if unit is None or not applies(unit.module, unit.input_axes, unit.output_axes):
                return None
            uses.append((unit, local))
        plan.rules[name] = uses
    return plan if plan.fits(first, samples) else None


def _unit(name: str, module: nn.Module, one: Probe, many: Sequence[Record], samples: int) -> Unit | None:
    """The module as a unit, or None where it is not called or its samples can not be told apart."""
    calls = one.shapes.get(module, [])
    if not calls or len(calls) != len(many):
        return None
    found: set[tuple[Axes, Axes]] = set()
    single: list[tuple[bool, ...] | None] | None = None
    for (given, returned), record in zip(calls, many, strict=True):
        inputs, outputs = _axes(given, record.inputs, samples), _axes(returned, record.outputs, samples)
        if inputs is None or outputs is None:
            return None
        found.add((inputs, outputs))
        shapes = zip((*record.inputs, *record.outputs), (*inputs, *outputs), strict=True)
        ones = [tuple(k == 1 for k in shape) if axis is None else None for shape, axis in shapes]
        if single is not None and [o and len(o) for o in ones] != [o and len(o) for o in single]:
            return None
        single = ones if single is None else [
            a and b and tuple(x and y for x, y in zip(a, b, strict=True)) for a, b in zip(single, ones, strict=True)
        ]  # fmt: skip
    if len(found) != 1 or single is None:
        return None
    inputs, outputs = found.pop()
    return Unit(name, module, inputs, outputs, tuple(single))


def _axes(one: Sequence[torch.Size], many: Sequence[torch.Size], samples: int) -> Axes | None:
    """Per tensor the axis that grows with the samples (None: it has none); None if samples are folded away."""
    if len(one) != len(many):
        return None
    axes: list[int | None] = []
    for a, b in zip(one, many, strict=True):
        if len(a) != len(b):
            return None
        grown = [k for k in range(len(a)) if a[k] != b[k]]
        if len(grown) > 1 or any((a[k], b[k]) != (1, samples) for k in grown):
            return None
        axes.append(grown[0] if grown else None)
    return tuple(axes)


# ---- models for which rules are not enough -----------------------------------------------------------------------


@dataclass
class _Search:
    """The two passes, and what has been found out so far."""

    one: Probe
    two: Observed
    modules: dict[str, nn.Module]
    context: Context
    device: torch.device
    copies: bool  # whether values without samples may be spread over them
    trials: bool = True  # whether parts of the model may be run by themselves to see if that is right
    units: dict[str, Unit | None] = field(default_factory=dict)
    inner: dict[nn.Module, Counter[int]] = field(default_factory=dict)
    tables: dict[nn.Module, Unit | None] = field(default_factory=dict)
    separates: dict[str, bool] = field(default_factory=dict)
    error: Exception | None = None  # of a module that did not run again, the cause if none does

    def unit(self, name: str) -> Unit | None:
        if name not in self.units:
            module = self.modules[name]
            self.units[name] = _unit(name, module, self.one, self.two.records.get(module, []), 2)
        return self.units[name]

    def inside(self, module: nn.Module) -> Counter[int]:
        if module not in self.inner:
            self.inner[module] = edges_inside(self.two, module)
        return self.inner[module]

    def around(self, parameter: nn.Parameter, owners: Sequence[Owner]) -> Iterator[Unit]:
        """Modules that keep samples apart and contain every use of the parameter, the smallest first."""
        path = owners[0][0].split(".") if owners[0][0] else []
        for depth in range(len(path), -1, -1):
            name = ".".join(path[:depth])
            if not all(owner == name or owner.startswith(f"{name}.") or not name for owner, _, _ in owners):
                continue
            unit = self.unit(name)
            if unit is None or not unit.output_axes or None in unit.output_axes:
                continue
            if self.inside(unit.module)[id(parameter)] == self.two.survey.edges[id(parameter)]:
                require_deterministic(unit)
                yield unit


def full_plan(
    model: nn.Module,
    losses_of: Losses,
    batch: Batch,
    one: Probe,
    owners: Mapping[int, Sequence[Owner]],
    parameters: dict[str, nn.Parameter],
    context: Context,
    ways: Ways = "all",
) -> Plan:
    """The plan of any model, from a pass of two samples; ``context`` is what the model runs in.

    ``ways``: "all"; "originals", without one copy per sample of anything; "root", every parameter on the whole model,
    one sample after the other, which asks of a model no more than that its samples are independent.

    Raises ValueError, by name, for a parameter whose gradient can not be taken per sample.
    """
    pair = batch[:2] if batch.size > 1 else _doubled(batch)
    with observing(model, losses_of, pair, keep=True) as (two, _):
        device = next(iter(parameters.values())).device
        search = _Search(one, two, dict(model.named_modules()), context, device, copies=ways == "all")
        plan = Plan(parameters)
        remaining: dict[str, tuple[Unit, list[str]]] = {}
        for name, parameter in parameters.items():
            root = search.unit("") if ways == "root" else None
            if root is not None and None not in root.output_axes and _keeps_apart(search, root):
                require_deterministic(root)
                remaining.setdefault("", (root, []))[1].append(name)
                continue
            if not search.two.survey.edges[id(parameter)]:
                continue  # the loss does not depend on it: its squares are zero
            found = owners[id(parameter)]
            _require_constant(found)
            uses = _ruled_uses(search, parameter, found)
            if uses is not None:
                plan.rules[name] = uses
                continue
            bare = _bare(search, name, parameter, found) if ways == "all" else None
            if bare is not None:
                plan.bare[name] = bare
                continue
            unit = next((u for u in search.around(parameter, found) if _keeps_apart(search, u)), None)
            if unit is None:
                raise ValueError(
                    f"the gradient of {name} can not be taken per sample: no module around it keeps the samples on an "
                    "axis of their own; pass params= without it"
                ) from search.error
            remaining.setdefault(unit.name, (unit, []))[1].append(name)
        for unit, names in remaining.values():
            batched = ways != "root" and _can_batch(search, unit, [parameters[n] for n in names])
            plan.fallbacks[unit.name] = Fallback(unit, names, batched)
    return plan


def sharded_plan(
    model: nn.Module,
    losses_of: Losses,
    batch: Batch,
    one: Probe,
    owners: Mapping[int, Sequence[Owner]],
    parameters: dict[str, nn.Parameter],
    context: Context,
    aliases: Aliases | None,
) -> Plan:
    """The plan of a model whose layers can not be run by themselves, because their weights are elsewhere: rules alone.

    A table of positions is spread over the samples without a trial; that the first batch's losses are still those of
    its samples is what proves it right. Raises ValueError with the parameters that no rule accounts for.
    """
    pair = batch[:2] if batch.size > 1 else _doubled(batch)
    with observing(model, losses_of, pair, keep=True, aliases=aliases) as (two, _):
        device = next(iter(parameters.values())).device
        search = _Search(one, two, dict(model.named_modules()), context, device, copies=True, trials=False)
        plan, unruled = Plan(parameters), []
        for name, parameter in parameters.items():
            if two.survey.edges[id(parameter)]:
                found = owners[id(parameter)]
                _require_constant(found)
                uses = _ruled_uses(search, parameter, found)
                if uses is None:
                    unruled.append(name)
                else:
                    plan.rules[name] = uses
    if unruled:
        raise ValueError(
            f"no kernel accounts for every use of {', '.join(unruled)}; a sharded model's layers can not be run by "
            "themselves instead: pass params= without them, or use DistributedDataParallel"
        )
    return plan


def _doubled(batch: Batch) -> Batch:
    args, kwargs, targets = tree_map_only(
        Tensor, lambda t: torch.cat([t, t]), (batch.args, batch.kwargs, batch.targets)
    )
    return Batch(args, kwargs, targets, 2)


def _ruled_uses(search: _Search, parameter: nn.Parameter, owners: Sequence[Owner]) -> list[tuple[Unit, str]] | None:
    """The units that use the parameter, if rules account for every use of it; else None."""
    calls = sum(search.two.reached(module) for _, module, _ in owners)
    if not _all_ruled(owners, calls, search.two.survey.edges[id(parameter)]):
        return None
    uses = []
    for name, module, local in owners:
        if not search.two.reached(module):
            continue
        unit = search.unit(name)
        if unit is not None and not any(axis is not None for axis in (*unit.input_axes, *unit.output_axes)):
            unit = _table(search, unit, parameter, owners) if search.copies else None
        if unit is None:
            return None
        if unit.spread is None and not applies(module, unit.input_axes, unit.output_axes):
            return None
        uses.append((unit, local))
    return uses


# ---- one copy per sample, where a trial shows that it is right ---------------------------------------------------


def _table(search: _Search, unit: Unit, parameter: nn.Parameter, owners: Sequence[Owner]) -> Unit | None:
    """A module that sees no samples, such as an embedding of positions, as a unit whose output is spread over them."""
    if unit.module not in search.tables:
        search.tables[unit.module] = None
        records = search.two.records[unit.module]
        shapes = [shape for r in records for shape in (*r.inputs, *r.outputs)]
        if len(unit.input_axes) == len(unit.output_axes) == 1 and all(shapes):
            form = -1 if all(shape[0] == 1 for shape in shapes) else 0
            around = next(search.around(parameter, owners), None)
            if around is not None and (not search.trials or _spreads(search, around, unit.module, None, form)):
                search.tables[unit.module] = Unit(unit.name, unit.module, (0,), (0,), unit.single, form)
    return search.tables[unit.module]


def _bare(search: _Search, name: str, parameter: nn.Parameter, owners: Sequence[Owner]) -> Bare | None:
    """A parameter that its module broadcasts over samples, such as a position table, a gate or a norm's weight."""
    around = next(search.around(parameter, owners), None)
    if len(owners) != 1 or around is None or parameter.numel() > _activation(search, around):
        return None
    _, module, local = owners[0]
    if local not in module._parameters:
        return None  # attention answers for the parameters of its output projection
    forms = [-1] if parameter.dim() > 1 and parameter.shape[0] == 1 else []
    # The parameter meets activations [N, ..., *its own axes], with as many axes between as the most of them have.
    ranks = Counter(len(shape) for shape in _shapes_inside(search, around))
    forms += [rank - 1 - parameter.dim() for rank, _ in ranks.most_common() if rank > parameter.dim()]
    for form in forms:
        if _spreads(search, around, module, local, form):
            return Bare(name, module, local, form)
    return None


def _activation(search: _Search, unit: Unit) -> int:
    """Numbers per sample in the largest tensor that a module inside the unit is given or returns."""
    return max((shape.numel() for shape in _shapes_inside(search, unit)), default=0) // 2


def _shapes_inside(search: _Search, unit: Unit) -> Iterator[torch.Size]:
    for module in unit.module.modules():
        for record in search.two.records.get(module, []):
            yield from (*record.inputs, *record.outputs)


def _spreads(search: _Search, around: Unit, module: nn.Module, local: str | None, form: int) -> bool:
    """Try: a batch of the same sample twice, the second with another value for the parameter ``local`` (for what the
    module returns, if None), must give what each value gives alone, and the two must differ."""
    for record in search.two.records[around.module]:
        assert record.call is not None
        single = only_sample((record.call.args, record.call.kwargs), around.input_axes, 0)
        double = map_tensors(single, around.input_axes, lambda t, a: t if a is None else torch.cat([t, t], a))
        noise: list[Tensor] = []

        def other(value: Tensor, noise: list[Tensor] = noise) -> Tensor:
            """The same in every call of the module."""
            if not noise:
                noise.append(torch.randn_like(value) * (value.std(correction=0) + 0.1))
            return value + noise[0]

        def both(value: Tensor) -> Tensor:
            return torch.cat([spread(value, 1, form), spread(other(value), 1, form)])

        try:
            together = _run_with(search, around, double, module, local, both)
        except Exception:
            return False  # the model's own code does not take the substitute; whatever it raises, it says no
        graph = [t.grad_fn for t in together if t.grad_fn is not None]
        used = {p for _, _, p in edges_between(graph, set())}
        if any(id(p) in used for p in ([module._parameters[local]] if local else module.parameters())):
            return False  # there is another way to the value than the one replaced
        together = [t.detach() for t in together]  # the graph holds what a pass of two does; let it go before the next
        del graph
        alone = _run_with(search, around, single, module, local, other)
        if not _agree(together, _before(search, around, record, single), alone, around.output_axes):
            return False
    return True


def _run_with(
    search: _Search,
    unit: Unit,
    arguments: tuple[tuple[object, ...], dict[str, object]],
    module: nn.Module,
    local: str | None,
    change: Callable[[Tensor], Tensor],
) -> list[Tensor]:
    """The unit's outputs with a parameter of ``module``, or what it returns, changed."""
    substitution = Substitution()
    with ExitStack() as stack:
        stack.callback(substitution.originals)
        if local is None:
            stack.callback(substitution.output(module, lambda output: change(output.detach())))
        else:
            original = module._parameters[local]
            assert original is not None
            substitution.attribute(module, local, change(original.detach()))
        return run_again(unit, *arguments, search.context)


def _before(
    search: _Search, unit: Unit, record: Record, single: tuple[tuple[object, ...], dict[str, object]]
) -> list[Tensor]:
    """What the unit returned for the first sample, from the pass of two unless it was written over since."""
    if any(t._version != version for t, version in record.returned):
        return run_again(unit, *single, search.context)
    values = zip(record.returned, unit.output_axes, strict=True)
    return [t if axis is None else t.narrow(axis, 0, 1) for (t, _), axis in values]


def _agree(both: Sequence[Tensor], first: Sequence[Tensor], second: Sequence[Tensor], axes: Axes) -> bool:
    """Whether a batch of two gives what its samples give alone, far closer than they are to each other."""
    error = effect = tolerance = 0.0
    if not len(both) == len(first) == len(second):
        return False
    for together, *singles, axis in zip(both, first, second, axes, strict=True):
        if axis is None or together.dim() <= axis or together.shape[axis] != 2:
            return False
        parts = [together.detach().narrow(axis, n, 1) for n in range(2)]
        alone = [single.detach() for single in singles]
        if any(part.shape != single.shape for part, single in zip(parts, alone, strict=True)):
            return False
        if together.is_floating_point() and together.numel():
            error = max(error, *(float((p - s).abs().max()) for p, s in zip(parts, alone, strict=True)))
            effect = max(effect, float((alone[0] - alone[1]).abs().max()))
            tolerance = max(tolerance, _tolerance(together.dtype))
    return error <= tolerance * effect and 0 < effect < float("inf")


def _tolerance(dtype: torch.dtype) -> float:
    """Rounding accumulates over a model, and halves keep three digits."""
    return min(0.05, 8192 * torch.finfo(dtype).eps)


# ---- fallbacks ---------------------------------------------------------------------------------------------------


def _keeps_apart(search: _Search, unit: Unit) -> bool:
    """Whether the unit, run again alone, gives what it gave, and each of two samples what it gives them together."""
    if unit.name not in search.separates:
        records = search.two.records[unit.module]
        hooked = unit.module._backward_hooks or unit.module._backward_pre_hooks
        # A call inside another would be counted in both.
        inner = [edges_inside_call(search.two, record) for record in records]
        nested = sum(map(len, inner)) != len(set[Edge]().union(*inner))
        try:
            separate = not (hooked or nested) and all(_apart(search, unit, record) for record in records)
        except Exception as error:  # the module's own code does not run again; whatever it raises says so
            separate, search.error = False, error
        search.separates[unit.name] = separate
    return search.separates[unit.name]


def _apart(search: _Search, unit: Unit, record: Record) -> bool:
    """Whether one call can be repeated, for both samples and for each. With gradients enabled: a forward pass may take
    some of its own."""
    assert record.call is not None
    given = (record.call.args, record.call.kwargs)
    before = _random_state(search.device)
    both = [t.detach() for t in run_again(unit, *given, search.context)]
    if not torch.equal(before, _random_state(search.device)):
        return False  # it draws other numbers than it drew
    if len(both) != len(record.returned):
        return False
    for again, (first, version) in zip(both, record.returned, strict=True):
        if again.shape != first.shape:
            return False
        if first._version == version and first.is_floating_point() and first.numel():
            # Hooks of others, or what its parent set before each call, may change what it gives.
            limit = 10 * _tolerance(first.dtype) * float(first.abs().max())
            if not float((again - first).abs().max()) <= limit:
                return False
    for n in range(2):
        args, kwargs = only_sample(given, unit.input_axes, n)
        alone = run_again(unit, args, kwargs, search.context)
        if len(alone) != len(both):
            return False
        for together, single, axis in zip(both, alone, unit.output_axes, strict=True):
            assert axis is not None
            part = together.narrow(axis, n, 1)
            if part.shape != single.shape:
                return False
            if together.is_floating_point():
                scale = float(together.abs().max())
                if not float((part - single.detach()).abs().max()) <= 10 * _tolerance(together.dtype) * scale:
                    return False
    return True


def _can_batch(search: _Search, unit: Unit, parameters: Sequence[nn.Parameter]) -> bool:
    """Whether per-sample gradients of the unit are no larger than its activations, and vmap gives the right ones."""
    records = search.two.records[unit.module]
    elements = sum(shape.numel() for r in records for shape in (*r.inputs, *r.outputs)) // 2
    if sum(p.numel() for p in parameters) > elements:
        return False
    for record in records:
        likes = zip(record.outputs, record.keys, strict=True)
        record.grads = [None if key is None else torch.randn_like(parameters[0].new_empty(s)) for s, key in likes]
    sums = [[zeros_for(p) for p in parameters] for _ in range(2)]
    for add, outs in zip((add_batched, add_one_by_one), sums, strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("error" if add is add_batched else "default")
            try:
                add(unit, records, list(zip(parameters, outs, strict=True)), 2, search.context)
            except Exception:
                if add is add_one_by_one:
                    raise
                return False  # vmap has no rule for an operation inside; it says so in many ways, one is a warning
    limit = 10 * _tolerance(parameters[0].dtype)
    return all(float((a - b).abs().max()) <= limit * float(b.abs().max()) for a, b in zip(*sums, strict=True))


def require_independent(one: Probe, losses: Tensor, batch: Batch) -> None:
    """Raise ValueError when the last sample's loss is another in company: then no gradient belongs to one sample."""
    if batch.size == 1 or one.random or one.losses.shape[1:] != losses.shape[1:]:
        return  # nothing to compare
    together, alone = losses.detach()[-1:], one.losses
    error = float((together - alone).abs().max())
    scale = float(alone.abs().max()) + float(losses.detach().abs().max())
    if error > _tolerance(losses.dtype) * scale:
        raise ValueError(
            f"the loss of the last sample is {alone.flatten()[0].item():.6g} alone and "
            f"{together.flatten()[0].item():.6g} in a batch of {batch.size}: samples influence one another, so their "
            "gradients can not be told apart"
        )
