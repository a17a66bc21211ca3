"""Gradient and curvature of the mean loss over a block of weights: whole matrices, and products for a solver.

Three things keep this cheap:

* A layer of the block computes the block's rows from leaves of their own, the other rows from constants. Weight
  gradients, first and second, are then as large as the slice, not as the layer, and what comes before the first
  layer of the block has no graph at all.
* The loss sees a row's weights only through that unit's outputs, and samples do not see one another. A unit with T
  outputs per sample (1 for a Linear on vectors) and J weights therefore needs T second-derivative passes, which run
  for all samples at once, instead of J; the weights' entries follow by matrix products with the layer's inputs.
* The graph of the first backward pass stays between products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from fastunlearn.data import Batch, LossFunction, per_sample_loss
from fastunlearn.hooks import eager, full_precision, preserved, require_separable, restored
from fastunlearn.language import loss_for
from fastunlearn.methods.block import Block

KINDS = ("exact", "gauss_newton", "fisher", "reference")
# Step along the gradient whose change of gradient the "reference" curvature is made of.
_REFERENCE_STEP = 1e-3
# Working memory of one pass over several directions, in bytes.
_PASS = 1 << 28
# Bytes of graphs that a product keeps between its calls.
KEPT = 2 << 30


def gradient(model: nn.Module, block: Block, batches: Sequence[Batch], loss_fn: LossFunction | None) -> Tensor:
    """Gradient of the mean loss over all samples of ``batches`` with respect to the block, [size] in float64.

    Raises ValueError for an empty block, no sample, a BatchNorm in train mode, or a loss that is not one per
    sample. Cost: a forward pass, and a backward pass down to the block's first layer.
    """
    with _working(model, block, batches):
        return _gradient(model, block, batches, loss_for(model, loss_fn))


def matrix(model: nn.Module, block: Block, batches: Sequence[Batch], loss_fn: LossFunction | None, kind: str) -> Tensor:
    """The curvature of the mean loss over all samples of ``batches`` on the block, [size, size] in float64.

    Args:
        kind: "exact", the block of the Hessian.
            "gauss_newton", the mean over samples of J^T L'' J, with J the Jacobian of the outputs and L'' the
            Hessian of the loss in the outputs; what the loss has of the weights beside the outputs is not in it.
            "fisher", the mean of g g^T over the samples' gradients g on their given labels.
            "reference", what the public L-CODEC code set out to do: y y^T / |w - w'|_1 with w' = w - 0.001 g one
            gradient step of the block's whole parameters, y = g(w) - g(w') and the block's slices of all three.

    Raises:
        ValueError: an unknown kind, an empty block, no sample, a BatchNorm in train mode, a loss that is not one
            per sample; for "reference" a gradient too small to move the block.
        TypeError: "gauss_newton" of a model that returns anything but one tensor.

    Cost, in passes backward through a graph of the gradient (about four forward passes each): exact min(T, J)
    per unit of J weights and T outputs per sample, and one pass that checks the result against a product; where
    the samples turn out to see one another, or a weight is used outside Linear and convolution calls, J.
    Gauss-Newton as many plain backward passes as outputs per sample, or the block's size if that is less; Fisher
    two, or one per sample where samples cannot be told apart. Memory: two matrices, the graph of one batch, and
    passes of 256 MiB.
    """
    _require_kind(kind)
    loss_fn = loss_for(model, loss_fn)
    with _working(model, block, batches):
        samples = _samples(batches)
        if kind == "reference":
            y, length = _reference(model, block, batches, loss_fn)
            return y[:, None] * y / length
        total = torch.zeros(block.size, block.size, dtype=torch.float64, device=block.device)
        for batch in batches:
            if kind == "exact":
                with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
                    total += _exact(model, block, batch, loss_fn)
            elif kind == "gauss_newton":
                with sdpa_kernel(SDPBackend.MATH):
                    found = _gauss_newton(model, block, batch, loss_fn)
                    total += (found + found.mT) / 2
            else:
                own = _per_sample_gradients(model, block, batch, loss_fn).double()
                total += own.mT @ own
        return total / samples


def product(
    model: nn.Module,
    block: Block,
    batches: Sequence[Batch],
    loss_fn: LossFunction | None,
    kind: str,
    kept: int = KEPT,
) -> Callable[[Tensor], Tensor]:
    """The function v -> H v on float64 vectors, [size] or [k, size], with H as :func:`matrix` defines it.

    The weights must stay as they are while the function is in use; it keeps the model and the batches.

    Args:
        kept: bytes of graphs to keep between calls. The first batches whose graphs fit cost one pass backward
            through the gradient's graph per call (two smaller ones for Gauss-Newton); every further batch a
            forward and a backward pass more. A graph's size is measured on one sample. Fisher keeps the per-sample
            gradients (samples * size numbers) if they fit, and recomputes them otherwise.

    Several vectors go through one batched pass where the model has no convolution after the block's first layer
    (batched convolutions are about three times as slow as single ones), one after the other elsewhere.

    Raises as :func:`matrix`; the function itself ValueError for a v of another length.
    """
    _require_kind(kind)
    loss_fn = loss_for(model, loss_fn)
    with _working(model, block, batches):
        samples = _samples(batches)
        if kind == "reference":
            y, length = _reference(model, block, batches, loss_fn)
            return _checked(block, lambda v: (v @ y)[..., None] * y / length)
        left = kept
        if kind == "fisher":
            width = max((p.element_size() for p in block.parameters), default=4)
            fits = samples * block.size * width <= kept
            own = [_per_sample_gradients(model, block, b, loss_fn) for b in batches] if fits else []

            def fisher(v: Tensor) -> Tensor:
                total = torch.zeros_like(v)
                with _working(model, block, batches):
                    for i, batch in enumerate(batches):
                        g = own[i] if own else _per_sample_gradients(model, block, batch, loss_fn)
                        total += (v.to(g.dtype) @ g.mT @ g).double()
                return total / samples

            return _checked(block, fisher)

        linearise = _linearised_gradient if kind == "exact" else _linearised_gauss_newton
        with sdpa_kernel(SDPBackend.MATH):
            per_sample = _graph_bytes(model, lambda b: linearise(model, block, b, loss_fn, 1), batches[0])
            ready: list[Callable[[Tensor], Tensor] | None] = []
            for batch in batches:
                size = per_sample * batch.size
                if fits := size <= left:
                    left -= size
                width = max(1, _PASS // max(size, 1))
                ready.append(linearise(model, block, batch, loss_fn, width) if fits else None)

        def times(v: Tensor) -> Tensor:
            total = torch.zeros_like(v)
            with _working(model, block, batches), sdpa_kernel(SDPBackend.MATH):
                for batch, known in zip(batches, ready, strict=True):
                    width = max(1, _PASS // max(per_sample * batch.size, 1))
                    total += (known or linearise(model, block, batch, loss_fn, width))(v)
            return total / samples

        return _checked(block, times)


def _checked(block: Block, times: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def product(v: Tensor) -> Tensor:
        if v.dim() not in (1, 2) or v.shape[-1] != block.size:
            raise ValueError(f"expected a vector [{block.size}] or vectors [k, {block.size}], got {list(v.shape)}")
        v = v.double()
        return times(v) if v.numel() else torch.zeros_like(v)

    return product


def _require_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"curvature must be one of {', '.join(KINDS)}, got {kind!r}")


def _samples(batches: Sequence[Batch]) -> int:
    return sum(batch.size for batch in batches)


@contextmanager
def _working(model: nn.Module, block: Block, batches: Sequence[Batch]) -> Iterator[None]:
    """Full precision, gradients on for the block's parameters and for nothing else, all put back afterwards."""
    if not block.size:
        raise ValueError("the block is empty: it has no curvature")
    if not _samples(batches):
        raise ValueError("no sample to take the curvature from")
    require_separable(model)
    with eager(), full_precision(block.device), preserved(model), torch.enable_grad():
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in block.parameters:
            parameter.requires_grad_(True)
        yield


# One forward pass, with the block's rows as leaves


@dataclass(frozen=True)
class _Call:
    """One use of a layer of the block: its input, and zeros added to its units' outputs to differentiate by."""

    layer: Callable[..., Tensor]
    options: tuple[Any, ...]  # stride, padding and dilation of a convolution
    input: Tensor
    units: Tensor  # zeros shaped like the units' outputs
    probe: Tensor | None  # zeros shaped like the input
    columns: Tensor  # the block's entries that `outer` returns, in its order
    weights: Tensor  # [U, J] entries of the block
    biases: Tensor  # [U], -1 where a unit has none in the block
    kernel: tuple[int, ...]

    def positions(self, outputs: Tensor) -> Tensor:
        """[..., *units.shape] as [..., N, T, U]."""
        lead = outputs.shape[: outputs.dim() - self.units.dim() + 1]
        if self.layer is F.linear:
            return outputs.reshape(*lead, -1, outputs.shape[-1])
        return outputs.reshape(*lead, self.units.shape[1], -1).mT

    def hot(self, unit: int, first: int, last: int) -> Tensor:
        """For positions ``first`` to ``last`` of a unit, one at it for every sample: [k, *units.shape]."""
        hots = self.units.new_zeros(last - first, *self.units.shape)
        if self.layer is F.linear:
            hots.view(last - first, len(self.units), -1, self.units.shape[-1])[:, :, first:last, unit].diagonal(
                0, 0, 2
            ).fill_(1)
        else:
            hots.view(last - first, *self.units.shape[:2], -1)[:, :, unit, first:last].diagonal(0, 0, 2).fill_(1)
        return hots

    def patches(self, inputs: Tensor) -> Tensor:
        """What the outputs' positions see of [..., *input.shape]: [..., N, T, J]."""
        lead = inputs.shape[: inputs.dim() - self.input.dim() + 1]
        if self.layer is F.linear:
            return inputs.reshape(*lead, -1, inputs.shape[-1])
        images = inputs.reshape(-1, *self.input.shape[1:])
        stride, padding, dilation = (_sizes(o, len(self.kernel)) for o in self.options)
        kernel = self.kernel
        if len(kernel) == 1:
            images = images.unsqueeze(2)
            kernel, stride, padding, dilation = (1, *kernel), (1, *stride), (0, *padding), (1, *dilation)
        found = F.unfold(images, kernel, dilation, padding, stride).mT
        return found.reshape(*lead, *found.shape[1:])

    def outer(self, deltas: Tensor, patches: Tensor) -> Tensor:
        """Per-sample gradients [..., N, P] from those of the outputs [..., N, T, U] and patches [..., N, T, J]."""
        weights = torch.einsum("...tu,...tj->...uj", deltas, patches).flatten(-2)
        known = (self.biases >= 0).nonzero()[:, 0]
        if not len(known):
            return weights
        return torch.cat([weights, deltas.sum(-2)[..., known]], -1)

    def outer_by_samples(self, deltas: Tensor) -> Tensor:
        """The same from the call's own input, a few samples at a time: unfolded images are large."""
        size = self.units[0].numel() // self.weights.shape[0] * self.weights.shape[1] * deltas.element_size()
        step = max(1, _PASS // max(4 * size, 1))
        inputs = self.input.detach()
        rows = [
            self.outer(deltas[i : i + step], self.patches(inputs[i : i + step])) for i in range(0, len(inputs), step)
        ]
        return torch.cat(rows)


def _sizes(option: Any, dimensions: int) -> tuple[int, ...]:
    return (option,) * dimensions if isinstance(option, int) else tuple(option)


class _Slices(TorchFunctionMode):
    """While active, Linear and convolution calls with a parameter of the block take its rows from ``leaves``.

    Any other use of a parameter sees the parameter itself, so derivatives are taken by leaves and parameters
    both. With ``samples``, calls are recorded; parts with uses that could not be are in ``unrecorded``.
    """

    def __init__(self, block: Block, samples: int | None, short_only: bool) -> None:
        super().__init__()
        self.block = block
        self.samples, self.short_only = samples, short_only
        self.leaves = [block.take(k, p.detach()).requires_grad_() for k, p in enumerate(block.parameters)]
        # A weight [in, out] is not what these calls take: it is left to the derivatives by the parameter itself.
        self.part = {id(p): k for k, p in enumerate(block.parameters) if block.axes[k] == 0}
        self.starts = [sum(block.sizes[:k]) for k in range(len(block.sizes))]
        self.calls: list[_Call] = []
        self.unrecorded: set[int] = set()
        self.convolves = False  # some convolution has a graph

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.linear and func is not F.conv1d and func is not F.conv2d:
            return func(*args, **(kwargs or {}))
        result = self._layer(func, *args, **(kwargs or {}))
        self.convolves |= func is not F.linear and result.requires_grad
        return result

    def _layer(
        self, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any, **kw: Any
    ) -> Any:
        k = self.part.get(id(weight))
        b = None if bias is None else self.part.get(id(bias))
        if k is None and b is None:
            return func(input, weight, bias, *rest, **kw)
        if bias is not None and b is not None:
            whole = bias
            bias = bias.detach().index_copy(0, self.block.parts[b][1], self.leaves[b])
        if k is None:
            self.unrecorded.add(b)  # type: ignore[arg-type]
            return func(input, weight, bias, *rest, **kw)
        rows = self.block.parts[k][1]
        options = [rest[i] if len(rest) > i else kw.get(n, d) for i, (n, d) in enumerate(_OPTIONS)]
        of_bias = rows[:0] if b is None else self.block.parts[b][1]
        inside = bool(torch.isin(of_bias, rows).all())
        if options[3] != 1 or not inside:
            self.unrecorded |= {k} | ({b} if b is not None else set())
            return func(input, weight.detach().index_copy(0, rows, self.leaves[k]), bias, *rest, **kw)
        axis = -1 if func is F.linear else -_dimensions(func) - 1
        units = func(input, self.leaves[k], None if bias is None else bias[rows], *rest, **kw)
        units = self._recorded(func, input, units, options[:3], k, b)
        if len(rows) == len(weight):
            return units
        if b is not None:
            bias = whole.detach()
        others = func(input, weight.detach(), bias, *rest, **kw)
        # In place: nothing has kept the rows that are written over.
        return others.index_copy_(axis, rows, units)

    def _recorded(self, func: Any, input: Tensor, units: Tensor, options: list[Any], k: int, b: int | None) -> Tensor:
        if self.samples is None:
            return units
        spatial = 1 if func is F.linear else _dimensions(func)
        weight = self.leaves[k]
        count, fan = len(weight), weight[0].numel()
        positions = units.numel() // max(1, self.samples * count)
        batched = input.dim() > 1 if func is F.linear else input.dim() == spatial + 2
        if (
            not batched
            or len(input) != self.samples
            or isinstance(options[1], str)  # padding="same" and "valid"
            or (self.short_only and positions > fan)
        ):
            self.unrecorded |= {k} | ({b} if b is not None else set())
            return units
        weights = self.starts[k] + torch.arange(count * fan, device=units.device).view(count, fan)
        biases = torch.full((count,), -1, device=units.device)
        if b is not None:
            rows, of_bias = self.block.parts[k][1], self.block.parts[b][1]
            biases[torch.searchsorted(rows, of_bias)] = self.starts[b] + torch.arange(len(of_bias), device=units.device)
        columns = torch.cat([weights.flatten(), biases[biases >= 0]])
        zeros = torch.zeros_like(units).requires_grad_()
        probe = torch.zeros_like(input).requires_grad_() if self.short_only and input.requires_grad else None
        self.calls.append(
            _Call(func, tuple(options), input, zeros, probe, columns, weights, biases, tuple(weight.shape[2:]))
        )
        return units + zeros

    def derivatives(
        self,
        output: Tensor,
        weights: Tensor | None = None,
        create_graph: bool = False,
        parts: Sequence[int] | None = None,
        extra: Sequence[Tensor] = (),
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Gradient of ``output`` by the block's ``parts`` (all), one vector, and by ``extra`` tensors."""
        chosen = range(len(self.leaves)) if parts is None else parts
        leaves = [self.leaves[k] for k in chosen]
        parameters = [self.block.parameters[k] for k in chosen]
        found = _grad(output, [*leaves, *parameters, *extra], weights, create_graph)
        pieces = []
        for i, k in enumerate(chosen):
            own, other = found[i], found[len(leaves) + i]
            piece = torch.zeros_like(leaves[i]) if own is None else own
            if other is not None:
                self.unrecorded.add(k)
                piece = piece + self.block.take(k, other)
            pieces.append(piece.reshape(-1))
        return torch.cat(pieces), found[2 * len(leaves) :]

    def batched(self, output: Tensor, weights: Tensor, width: int, parts: Sequence[int] | None = None) -> Tensor:
        """Gradients [k, entries] of ``output`` for each of ``weights`` [k, *output.shape]."""
        if self.convolves or width == 1:  # vmap slows convolutions down threefold
            return torch.stack([self.derivatives(output, w, parts=parts)[0] for w in weights])

        return _batched(lambda w: self.derivatives(output, w, parts=parts)[0], weights, width)


def _batched(one: Callable[[Tensor], Tensor], vectors: Tensor, width: int) -> Tensor:
    rows: Tensor = torch.func.vmap(one, chunk_size=width)(vectors)
    return rows


_OPTIONS = (("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1))


def _dimensions(func: Any) -> int:
    return 1 if func is F.conv1d else 2


def _grad(
    output: Tensor, inputs: Sequence[Tensor], weights: Tensor | None, create_graph: bool = False
) -> list[Tensor | None]:
    """torch.autograd.grad that keeps the graph; None where ``output`` does not depend on an input."""
    if not output.requires_grad or not inputs:
        return [None] * len(inputs)
    return list(
        torch.autograd.grad(
            output, list(inputs), weights, retain_graph=True, create_graph=create_graph, allow_unused=True
        )
    )


def _forward(
    model: nn.Module,
    block: Block,
    batch: Batch,
    loss_fn: LossFunction | None,
    recorded: bool = False,
    short_only: bool = False,
) -> tuple[_Slices, Any, Tensor]:
    slices = _Slices(block, batch.size if recorded else None, short_only)
    with slices:
        outputs = batch.outputs(model)
        losses = per_sample_loss(loss_fn, outputs, batch.targets, batch.size)
    return slices, outputs, losses


def _graph_bytes(model: nn.Module, build: Callable[[Batch], Any], batch: Batch) -> int:
    """Bytes that the graph of ``build`` holds per sample, the model's own tensors aside."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return t.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        held = build(batch[:1])
    del held  # until here, so that no address came twice
    return sum(sizes.values())


# The kinds


def _gradient(model: nn.Module, block: Block, batches: Sequence[Batch], loss_fn: LossFunction | None) -> Tensor:
    total = torch.zeros(block.size, dtype=torch.float64, device=block.device)
    for batch in batches:
        slices, _, losses = _forward(model, block, batch, loss_fn)
        total += slices.derivatives(losses.sum())[0]
    return total / _samples(batches)


def _linearised_gradient(
    model: nn.Module, block: Block, batch: Batch, loss_fn: LossFunction | None, width: int
) -> Callable[[Tensor], Tensor]:
    """v -> H v for the sum over one batch, on a graph that stays."""
    slices, _, losses = _forward(model, block, batch, loss_fn)
    own, _ = slices.derivatives(losses.sum(), create_graph=True)

    def times(v: Tensor) -> Tensor:
        rows = slices.batched(own, v.to(own.dtype).reshape(-1, block.size), width)
        return rows.reshape(v.shape).double()

    return times


def _linearised_gauss_newton(
    model: nn.Module, block: Block, batch: Batch, loss_fn: LossFunction | None, width: int
) -> Callable[[Tensor], Tensor]:
    slices, outputs, _ = _forward(model, block, batch, loss_fn)
    _require_tensor(outputs)
    detached = outputs.detach().requires_grad_()
    (slope,) = _grad(per_sample_loss(loss_fn, detached, batch.targets, batch.size).sum(), [detached], None, True)
    # J^T w is linear in w, so differentiating it again, by w, gives J v.
    probe = torch.zeros_like(outputs, requires_grad=True)
    pulled, _ = slices.derivatives(outputs, probe, create_graph=True)

    def one(v: Tensor) -> Tensor:
        (pushed,) = _grad(pulled, [probe], v)
        bent = None if slope is None or pushed is None else _grad(slope, [detached], pushed)[0]
        return torch.zeros_like(v) if bent is None else slices.derivatives(outputs, bent)[0]

    def times(v: Tensor) -> Tensor:
        flat = v.to(pulled.dtype).reshape(-1, block.size)
        single = slices.convolves or width == 1
        rows = torch.stack([one(row) for row in flat]) if single else _batched(one, flat, width)
        return rows.reshape(v.shape).double()

    return times


def _require_tensor(outputs: Any) -> None:
    if not isinstance(outputs, Tensor):
        raise TypeError(f'"gauss_newton" needs a model that returns one tensor, got {type(outputs).__name__}')


def _exact(model: nn.Module, block: Block, batch: Batch, loss_fn: LossFunction | None) -> Tensor:
    """The Hessian of the batch's summed loss, by units' outputs where that takes fewer passes than by weights."""
    found, check = _exact_rows(model, block, batch, loss_fn, recorded=True)
    if check is not None and not check:
        # The samples see one another, or do not lie along the first axis of a layer's input.
        found, _ = _exact_rows(model, block, batch, loss_fn, recorded=False)
    return found


def _exact_rows(
    model: nn.Module, block: Block, batch: Batch, loss_fn: LossFunction | None, recorded: bool
) -> tuple[Tensor, bool | None]:
    slices, _, losses = _forward(model, block, batch, loss_fn, recorded, short_only=True)
    # <input, zeros> changes no value, but makes the gradient of a unit's output depend on the zeros: its
    # derivative by them is the derivative of the input by that output.
    loss = losses.sum() + sum((c.input * c.probe).sum() for c in slices.calls if c.probe is not None)
    own, deltas = slices.derivatives(loss, create_graph=True, extra=[c.units for c in slices.calls])
    hessian = torch.zeros(block.size, block.size, dtype=torch.float64, device=block.device)
    width = 1
    if not slices.convolves:
        width = _PASS // max(
            1, batch.size * _graph_bytes(model, lambda b: _linearised_gradient(model, block, b, loss_fn, 1), batch)
        )
        width = max(1, min(64, width))
    by_weights = sorted(slices.unrecorded) if recorded else list(range(len(block.parts)))
    by_units = [k for k in range(len(block.parts)) if k not in by_weights]
    if by_units and slices.calls:
        _add_by_units(hessian, slices.calls, deltas, slices.convolves, width)
    for i, k in enumerate(by_weights):
        # Entries with earlier parts are known by symmetry, which spares the way back through early layers.
        parts = sorted([*by_weights[i:], *by_units])
        columns = torch.cat([torch.arange(slices.starts[j], slices.starts[j] + block.sizes[j]) for j in parts])
        columns = columns.to(block.device)
        wanted = own[slices.starts[k] : slices.starts[k] + block.sizes[k]]
        for first in range(0, len(wanted), max(width, 16)):
            last = min(first + max(width, 16), len(wanted))
            hots = wanted.new_zeros(last - first, len(wanted))
            hots.diagonal(first).fill_(1)
            rows = slices.batched(wanted, hots, width, parts).double()
            here = torch.arange(slices.starts[k] + first, slices.starts[k] + last, device=block.device)
            hessian[here[:, None], columns] = rows
            hessian[columns[:, None], here] = rows.mT
    hessian = (hessian + hessian.mT) / 2
    if not by_units or not slices.calls:
        return hessian, None
    weights = torch.randn(own.shape, generator=torch.Generator().manual_seed(0)).to(own)
    exact = slices.derivatives(own, weights)[0].double()
    return hessian, _close(block, hessian @ weights.double(), exact, own.dtype)


def _add_by_units(
    hessian: Tensor, calls: list[_Call], deltas: Sequence[Tensor | None], convolves: bool, width: int
) -> None:
    """Second derivatives of the summed loss between all recorded calls.

    With z the outputs of a unit of call i, and D d/dz:  d^2 loss / dw_i dw_j = x_i (D delta_j x_j + delta_j D x_j),
    summed over samples and positions, for every call j from i on; x_j moves with z only if j comes after i.
    """
    for i, call in enumerate(calls):
        delta = deltas[i]
        if delta is None:
            continue
        later = calls[i:]
        inputs = call.patches(call.input.detach())
        positions = inputs.shape[-2]
        # Bytes per direction: the per-sample gradients and the patches of what moved.
        each = (
            sum(
                len(c.columns) * len(c.input)
                + 2
                * c.input.numel()
                * max(1, c.weights[0].numel() // max(1, c.input.shape[-1 if c.layer is F.linear else 1]))
                for c in later
            )
            * delta.element_size()
        )
        step = max(1, min(positions, _PASS // max(1, each)))
        own = [(deltas[i + j], c.patches(c.input.detach())) for j, c in enumerate(later)]
        for unit in range(len(call.weights)):
            rows = call.weights[unit]
            if call.biases[unit] >= 0:
                rows = torch.cat([rows, call.biases[unit][None]])
            for first in range(0, positions, step):
                last = min(first + step, positions)
                moved = _directions(delta, later, call.hot(unit, first, last), convolves, width)
                left = inputs[:, first:last].transpose(0, 1)
                if len(rows) > inputs.shape[-1]:
                    left = torch.cat([left, torch.ones_like(left[..., :1])], -1)
                left = left.flatten(0, 1)
                for j, other in enumerate(later):
                    turned, shifted = moved[j], moved[len(later) + j]
                    old, patches = own[j]
                    right = None
                    if turned is not None:
                        right = other.outer(other.positions(turned), patches)
                    if j and shifted is not None and old is not None:
                        # A bias is multiplied by one, which does not move.
                        more = torch.einsum("ntu,kntp->knup", other.positions(old.detach()), other.patches(shifted))
                        more = F.pad(more.flatten(-2), (0, len(other.columns) - other.weights.numel()))
                        right = more if right is None else right + more
                    if right is None:
                        continue
                    entries = (left.mT @ right.flatten(0, 1)).double()
                    hessian[rows[:, None], other.columns] += entries
                    if j:
                        hessian[other.columns[:, None], rows] += entries.mT


def _directions(delta: Tensor, later: list[_Call], hots: Tensor, convolves: bool, width: int) -> list[Tensor | None]:
    """Derivatives of <delta, hot> by the outputs and by the inputs' probes of calls, stacked over ``hots``."""
    inputs = [c.units for c in later] + [c.units if c.probe is None else c.probe for c in later]
    without = {len(later) + j for j, c in enumerate(later) if c.probe is None}

    if convolves or width == 1:
        lists = [_grad(delta, inputs, hot) for hot in hots]
        stacked = [
            None if any(row[i] is None for row in lists) else torch.stack([row[i] for row in lists])  # type: ignore[misc]
            for i in range(len(inputs))
        ]
    else:
        used = [i for i, g in enumerate(_grad(delta, inputs, hots[0])) if g is not None]
        found = torch.func.vmap(lambda hot: tuple(_grad(delta, [inputs[i] for i in used], hot)), chunk_size=width)(hots)
        stacked = [None] * len(inputs)
        for i, g in zip(used, found, strict=True):
            stacked[i] = g
    return [None if i in without else g for i, g in enumerate(stacked)]


def _per_sample(slices: _Slices, output: Tensor, weights: Tensor) -> Tensor:
    """Each sample's gradient of <output, weights>, [N, size], from one backward pass to the recorded calls."""
    found = _grad(output, [c.units for c in slices.calls], weights)
    rows = output.new_zeros(len(output), slices.block.size)
    for call, delta in zip(slices.calls, found, strict=True):
        if delta is not None:
            rows.index_add_(1, call.columns, call.outer_by_samples(call.positions(delta)).to(rows.dtype))
    return rows


def _close(block: Block, found: Tensor, exact: Tensor, dtype: torch.dtype) -> bool:
    """Whether two vectors over the block, computed in ``dtype``, differ by rounding alone; NaN counts as close.

    Each part is held to its own size, so that a wrong one is not lost beside a large one.
    """
    gaps = torch.stack([part.norm() for part in torch.split((found - exact).double(), block.sizes)])
    sizes = torch.stack([part.norm() for part in torch.split(exact.double(), block.sizes)])
    # Two ways to the same derivative differ by about ten roundings of it, and of what cancels in it.
    rounding = torch.finfo(dtype).eps
    return not bool((gaps > 1e4 * rounding * sizes + 100 * rounding * sizes.norm()).any())


def _agrees(slices: _Slices, output: Tensor, rows: Callable[[Tensor], Tensor]) -> bool:
    """Whether samples can be told apart: random weights of them must give the gradient that autograd gives."""
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
    exact, _ = slices.derivatives(output, weights)
    if slices.unrecorded:  # a parameter is used outside Linear and convolution calls, too
        return False
    return _close(slices.block, rows(weights), exact, output.dtype)


def _per_sample_gradients(model: nn.Module, block: Block, batch: Batch, loss_fn: LossFunction | None) -> Tensor:
    """[N, size], in the weights' dtype."""
    slices, _, losses = _forward(model, block, batch, loss_fn, recorded=True)
    if not slices.unrecorded:
        rows = _per_sample(slices, losses, torch.ones_like(losses))
        if _agrees(slices, losses, lambda weights: weights.to(rows.dtype) @ rows):
            return rows
    alone = []
    for i in range(batch.size):
        slices, _, losses = _forward(model, block, batch[i : i + 1], loss_fn)
        alone.append(slices.derivatives(losses.sum())[0])
    return torch.stack(alone)


def _gauss_newton(model: nn.Module, block: Block, batch: Batch, loss_fn: LossFunction | None) -> Tensor:
    """J^T L'' J summed over the batch."""
    slices, outputs, _ = _forward(model, block, batch, loss_fn, recorded=True)
    _require_tensor(outputs)
    width = outputs.numel() // batch.size
    if width < block.size and not slices.unrecorded and len(outputs) == batch.size:
        size = width * block.size * outputs.element_size()
        step = max(1, _PASS // size)
        if step < batch.size:
            parts = [batch[i : i + step] for i in range(0, batch.size, step)]
            return torch.stack([_gauss_newton(model, block, p, loss_fn) for p in parts]).sum(0)
        jacobian = outputs.new_zeros(batch.size, width, block.size)
        for c in range(width):
            jacobian[:, c] = _per_sample(slices, outputs, _hot(outputs, c))
        curved = _loss_curvature(outputs, batch, loss_fn)
        separate = _agrees(slices, outputs, lambda w: torch.einsum("nc,ncp->p", w.reshape(batch.size, -1), jacobian))
        if separate and curved is not None:
            wide = jacobian.double()
            found: Tensor = wide.flatten(0, 1).mT @ (curved.double() @ wide).flatten(0, 1)
            return found
    times = _linearised_gauss_newton(model, block, batch, loss_fn, 1)
    return torch.stack([times(row) for row in torch.eye(block.size, dtype=torch.float64, device=block.device)])


def _loss_curvature(outputs: Tensor, batch: Batch, loss_fn: LossFunction | None) -> Tensor | None:
    """Each sample's Hessian of its loss in its outputs, [N, C, C]; None where a loss sees other samples' outputs."""
    detached = outputs.detach().requires_grad_()
    losses = per_sample_loss(loss_fn, detached, batch.targets, batch.size)
    (slope,) = _grad(losses.sum(), [detached], None, create_graph=True)

    def times(weights: Tensor) -> Tensor:
        found = None if slope is None else _grad(slope, [detached], weights)[0]
        return (torch.zeros_like(outputs) if found is None else found).reshape(batch.size, -1)

    curved = torch.stack([times(_hot(outputs, c)) for c in range(outputs[0].numel())], 1)
    weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(0)).to(outputs)
    exact = times(weights)
    gap = (torch.einsum("nc,ncd->nd", weights.reshape(batch.size, -1), curved) - exact).norm()
    return None if gap > 1e4 * torch.finfo(outputs.dtype).eps * exact.norm() else curved


def _hot(outputs: Tensor, entry: int) -> Tensor:
    """One at this entry of every sample's outputs, zero elsewhere."""
    hot = outputs.new_zeros(len(outputs), outputs[0].numel())
    hot[:, entry] = 1
    return hot.view(outputs.shape)


def _reference(
    model: nn.Module, block: Block, batches: Sequence[Batch], loss_fn: LossFunction | None
) -> tuple[Tensor, float]:
    """The change of the block's gradient over one gradient step, and that step's length in the 1-norm."""
    parameters, samples = block.parameters, _samples(batches)

    def whole() -> list[Tensor]:
        total = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
        for batch in batches:
            losses = per_sample_loss(loss_fn, batch.outputs(model), batch.targets, batch.size)
            for t, g in zip(total, _grad(losses.sum(), parameters, None), strict=True):
                if g is not None:
                    t += g
        return [t / samples for t in total]

    before = whole()
    start = block.values()
    with restored(model, parameters):
        with torch.no_grad():
            for parameter, g in zip(parameters, before, strict=True):
                parameter.sub_((_REFERENCE_STEP * g).to(parameter.dtype))
        length = float((start - block.values()).abs().sum())
        y = block.flat(before) - block.flat(whole())
    if not length:
        raise ValueError('the gradient is too small to move the block: the "reference" curvature is not defined')
    return y, length
