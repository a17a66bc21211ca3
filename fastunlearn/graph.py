"""What the autograd graph of one forward pass knows: every use of every parameter, and gradients as they come."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.hooks import RemovableHandle

Key = tuple[Node, int]  # an output of a node: one tensor of the forward pass


class Aliases:
    """FSDP2 lets a module run with gathered parameters, which are others than those it has at rest."""

    def __init__(self, model: nn.Module) -> None:
        self._at_rest = {module: dict(module._parameters) for module in model.modules() if module._parameters}
        self._known: dict[int, int] = {}

    def see(self, module: nn.Module) -> None:
        """To be called while the module runs."""
        for local, parameter in self._at_rest.get(module, {}).items():
            running = module._parameters[local]
            if parameter is not None and running is not None and running is not parameter:
                self._known[id(running)] = id(parameter)

    def __getitem__(self, running: int) -> int:
        return self._known.get(running, running)


@dataclass
class Survey:
    """What leads to a result.

    Attributes:
        edges: id of a parameter -> how many nodes use it.
        reached: the marked tensors that the result depends on.
        frontier: those of them that depend on no other marked tensor.
        kinds: how many nodes there are of each kind.
        aliases: for other walks over the same graph.
    """

    edges: Counter[int]
    reached: set[Key]
    frontier: set[Key]
    kinds: Counter[str]
    aliases: Aliases | None = None


def survey(result: Tensor, marked: Container[Key], aliases: Aliases | None = None) -> Survey:
    """One walk over the graph of ``result``, O(nodes); raises ValueError where a node hides uses of parameters."""
    edges: Counter[int] = Counter()
    reached: set[Key] = set()
    users: dict[Node, list[Node]] = defaultdict(list)
    above: set[Node] = set()  # nodes with a marked tensor further upstream
    if not result.requires_grad:
        return Survey(edges, reached, set(), Counter(), aliases)
    root = get_gradient_edge(result)
    if (root.node, root.output_nr) in marked:
        reached.add((root.node, root.output_nr))
    waiting, seen = [root.node], {root.node}
    while waiting:
        node = waiting.pop()
        _require_open(node)
        for upstream, index in node.next_functions:
            if upstream is None:
                continue
            if (upstream, index) in marked:
                reached.add((upstream, index))
                above.add(node)
            variable = _variable(upstream)
            if variable is not None:
                edges[id(variable) if aliases is None else aliases[id(variable)]] += 1
                continue
            users[upstream].append(node)
            if upstream not in seen:
                seen.add(upstream)
                waiting.append(upstream)
    waiting = list(above)
    while waiting:
        for node in users[waiting.pop()]:
            if node not in above:
                above.add(node)
                waiting.append(node)
    kinds = Counter(type(node).__name__ for node in seen)
    return Survey(edges, reached, {key for key in reached if key[0] not in above}, kinds, aliases)


_REENTRANT = (
    "the model uses torch.utils.checkpoint with use_reentrant=True, which hides the layers inside from autograd; pass "
    "use_reentrant=False to it"
)


_CHANGED = ("TBackward0", "TransposeBackward0", "ToCopyBackward0", "ViewBackward0")


def _variable(node: Node | None) -> Tensor | None:
    """The parameter that the node brings, transposed, cast or reshaped or not: several nodes may share such a change,
    and each of them is a use."""
    while node is not None and type(node).__name__ in _CHANGED:
        node = node.next_functions[0][0]
    return getattr(node, "variable", None)


def _require_open(node: Node) -> None:
    if type(node).__name__ == "CheckpointFunctionBackward":
        raise ValueError(_REENTRANT)


def require_no_reentrant_checkpoint() -> None:
    """To be called while the model runs: without gradients at its door such a checkpoint leaves no node behind."""
    frame = None if torch.is_grad_enabled() else sys._getframe()
    while frame is not None:
        if frame.f_code is CheckpointFunction.forward.__code__:
            raise ValueError(_REENTRANT)
        frame = frame.f_back


def edges_between(outputs: Iterable[Node], inputs: Container[Node]) -> set[tuple[Node, int, int]]:
    """The uses (node, position, id of the parameter) on the way from ``inputs`` to ``outputs``."""
    uses: set[tuple[Node, int, int]] = set()
    waiting = [node for node in outputs if node not in inputs]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        for position, (upstream, _) in enumerate(node.next_functions):
            if upstream is None or upstream in inputs:
                continue
            variable = _variable(upstream)
            if variable is not None:
                uses.add((node, position, id(variable)))
            elif upstream not in seen:
                seen.add(upstream)
                waiting.append(upstream)
    return uses


class Taps:
    """Callbacks that are given the gradients of chosen tensors of one forward pass, the moment autograd has them.

    Nothing is kept: a gradient is freed as soon as autograd has no more use for it. Call :meth:`close` at the end, also
    after an exception: hooks, graph and callbacks hold one another.
    """

    def __init__(self, aliases: Aliases | None = None) -> None:
        self._aliases = aliases
        self._edges: dict[Key, GradientEdge] = {}
        self._callbacks: dict[int, list[Callable[[Tensor], None]]] = {}
        self._indices: dict[Key, int] = {}
        self._ends: set[int] = set()
        self._handles: list[RemovableHandle] = []

    def add(self, tensor: Tensor, callback: Callable[[Tensor], None]) -> Key:
        """Listen to ``tensor`` as it is now; what is written over it in place later is another tensor."""
        edge = get_gradient_edge(tensor)
        key = (edge.node, edge.output_nr)
        if key not in self._edges:
            index = len(self._edges)
            self._edges[key], self._indices[key], self._callbacks[index] = edge, index, []
            hook = partial(self._deliver, index)
            self._handles.append(tensor.register_hook(hook))  # type: ignore[no-untyped-call]
        self._callbacks[self._indices[key]].append(callback)
        return key

    def _deliver(self, index: int, grad: Tensor | None) -> Tensor | None:
        if grad is None:
            return None
        for callback in self._callbacks[index]:
            callback(grad)
        # Autograd would keep the gradients it was asked for until it returns; nobody reads these, so they shrink.
        return grad.new_zeros(()).expand_as(grad) if index in self._ends else None

    def survey(self, result: Tensor) -> Survey:
        return survey(result, self._edges, self._aliases)

    def backward(self, result: Tensor, ends: Iterable[Key], retain_graph: bool = False) -> None:
        """Bring gradients as far as ``ends``, the frontier of a survey: on the way no weight gradient is computed."""
        for handle in self._handles:
            hooks = handle.hooks_dict_ref()
            if hooks is not None and len(hooks) > 1:
                hooks[handle.id] = hooks.pop(handle.id)  # last: after what hooks of the model make of the gradient
        edges: Sequence[GradientEdge] = [self._edges[key] for key in ends]
        self._ends = {self._indices[key] for key in ends}
        torch.autograd.grad(result, edges, retain_graph=retain_graph, allow_unused=True)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        for table in (self._edges, self._callbacks, self._indices, self._handles):
            table.clear()
