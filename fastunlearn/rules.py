"""What a layer's inputs and output gradients say about each of its parameters: one rule per layer type.

A rule turns one recorded call, :class:`Seen`, into a :class:`Use` for every parameter of the layer: an accumulating
kernel of :mod:`fastunlearn.ops` with its tensors. Several uses of one parameter are joined before they are squared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from fastunlearn import ops
from fastunlearn.hooks import Call


@dataclass(frozen=True)
class Seen:
    """One call of a layer in the forward pass and what the backward pass said about it.

    Attributes:
        call: as the layer saw it.
        input_axes: per tensor given (positional, then keyword, in the order of ``tree_flatten``), the axis of the
            samples; None where it has none.
        output_axes: the same per tensor returned.
        grads: per tensor returned, the gradient of the sum of the losses; None where the loss does not depend on it.
    """

    call: Call
    input_axes: tuple[int | None, ...]
    output_axes: tuple[int | None, ...]
    grads: tuple[Tensor | None, ...]

    @property
    def x(self) -> Tensor:
        """The first tensor given, samples first."""
        return self.call.input.detach().movedim(self.input_axes[0] or 0, 0)

    @property
    def g(self) -> Tensor:
        """The gradient of the first tensor returned, samples first."""
        grad = self.grads[0]
        assert grad is not None  # the caller leaves out calls that the loss does not depend on
        return grad.movedim(self.output_axes[0] or 0, 0)


@dataclass(frozen=True)
class Use:
    """One use of a parameter: an accumulating kernel, its tensors [N, ...] and its settings.

    ``join`` lays several uses of one parameter side by side along their positions, because the sum over
    positions must be squared once; None where the kernel has no such axis.
    """

    kernel: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]
    settings: tuple[Any, ...] = ()
    join: Callable[[Sequence[Use]], Use] | None = None

    def add_to(self, out: Tensor) -> None:
        self.kernel(out, *self.tensors, *self.settings)


def _join_positions(uses: Sequence[Use]) -> Use:
    """[N, T_i, features] -> [N, sum T_i, features]."""
    columns = zip(*(use.tensors for use in uses), strict=True)
    flat = [[t.reshape(t.shape[0], -1, t.shape[-1]) for t in column] for column in columns]
    return replace(uses[0], tensors=tuple(torch.cat(column, 1) for column in flat))


def _join_channels(uses: Sequence[Use]) -> Use:
    """[N, ..., C, ...] -> [N, T, C] -> joined."""

    def last(use: Use) -> Use:
        return replace(use, tensors=tuple(t.movedim(use.settings[0], -1) for t in use.tensors), settings=(-1,))

    return _join_positions([last(use) for use in uses])


def _join_indices(uses: Sequence[Use]) -> Use:
    indices = torch.cat([use.tensors[0].flatten(1) for use in uses], 1)
    grads = torch.cat([use.tensors[1].flatten(1, -2) for use in uses], 1)
    return replace(uses[0], tensors=(indices, grads))


Rule = Callable[[Any, Seen], dict[str, Use]]


def _linear(module: nn.Linear, seen: Seen) -> dict[str, Use]:
    x, g = seen.x, seen.g
    return {
        "weight": Use(ops.sq_grad_linear, (x.to(g.dtype), g), join=_join_positions),
        "bias": Use(ops.sq_grad_bias, (g,), (-1,), _join_channels),
    }


def _conv(module: nn.Conv1d | nn.Conv2d, seen: Seen) -> dict[str, Use]:
    g = seen.g
    x = seen.x.to(g.dtype)
    stride, padding, dilation = list(module.stride), module.padding, list(module.dilation)
    if isinstance(padding, str) or module.padding_mode != "zeros":
        # "same" may pad one side more than the other, and other modes pad with values: pad here, as torch does.
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        padding = (0,) * len(stride)
    axes = list(padding)
    bias = Use(ops.sq_grad_bias, (g,), (1,), _join_channels)
    if isinstance(module, nn.Conv1d):  # an image of height one
        x, g = x.unsqueeze(2), g.unsqueeze(2)
        stride, axes, dilation = [1, *stride], [0, *axes], [1, *dilation]
    return {"weight": Use(_conv_kernel, (x, g), (stride, axes, dilation, module.groups)), "bias": bias}


def _conv_kernel(out: Tensor, *args: Any) -> Tensor:
    ops.sq_grad_conv2d(out if out.dim() == 4 else out.unsqueeze(2), *args)
    return out


def _affine(normalized: Tensor, g: Tensor, channel_dim: int) -> dict[str, Use]:
    return {
        "weight": Use(ops.sq_grad_affine, (normalized.to(g.dtype), g), (channel_dim,), _join_channels),
        "bias": Use(ops.sq_grad_bias, (g,), (channel_dim,), _join_channels),
    }


def _flat_affine(normalized: Tensor, g: Tensor, axes: int) -> dict[str, Use]:
    """Norms whose weight spans the last ``axes`` axes: one channel per element of them."""
    uses = _affine(normalized.flatten(-axes), g.flatten(-axes), -1)
    return {name: replace(use, kernel=_flattened(use.kernel)) for name, use in uses.items()}


def _flattened(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(out: Tensor, *args: Any) -> Tensor:
        kernel(out.view(-1), *args)
        return out

    return run


def _layer_norm(module: nn.LayerNorm, seen: Seen) -> dict[str, Use]:
    x, g = seen.x, seen.g
    normalized = F.layer_norm(x.to(g.dtype), module.normalized_shape, eps=module.eps)
    return _flat_affine(normalized, g, len(module.normalized_shape))


def _rms_norm(module: nn.RMSNorm, seen: Seen) -> dict[str, Use]:
    x, g = seen.x, seen.g
    normalized = F.rms_norm(x.to(g.dtype), list(module.normalized_shape), eps=module.eps)
    return _flat_affine(normalized, g, len(module.normalized_shape))


def _group_norm(module: nn.GroupNorm, seen: Seen) -> dict[str, Use]:
    x, g = seen.x, seen.g
    return _affine(F.group_norm(x.to(g.dtype), module.num_groups, eps=module.eps), g, 1)


def _batch_norm(module: _BatchNorm, seen: Seen) -> dict[str, Use]:
    x, g = seen.x, seen.g
    normalized = F.batch_norm(x.to(g.dtype), module.running_mean, module.running_var, eps=module.eps)
    return _affine(normalized, g, 1)


def _embedding(module: nn.Embedding, seen: Seen) -> dict[str, Use]:
    x, g = seen.x, seen.g
    return {"weight": Use(ops.sq_grad_embedding, (x, g), (module.padding_idx,), _join_indices)}


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    nn.Conv1d: _conv,
    nn.Conv2d: _conv,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
    nn.GroupNorm: _group_norm,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm3d: _batch_norm,
    nn.Embedding: _embedding,
}


def rule_of(module: nn.Module) -> Rule | None:
    """The rule of a module that computes what its torch class does; a subclass with its own forward has none."""
    for cls, rule in RULES.items():
        if isinstance(module, cls) and type(module).forward is cls.forward:
            if isinstance(module, nn.Embedding) and module.scale_grad_by_freq:
                return None  # scales by counts over the batch; one sample alone has its own counts
            return rule
    return None


def joinable(users: Sequence[tuple[nn.Module, str]], calls: int) -> bool:
    """Whether :func:`joined` can add up ``calls`` uses in one forward pass of the parameter that these modules own
    under these names; each has a rule."""
    if calls <= 1:
        return True
    if any(isinstance(module, _ConvNd) and name == "weight" for module, name in users):
        return False  # images of different sizes have no common axis of positions
    return len({(rule_of(module), getattr(module, "padding_idx", None)) for module, _ in users}) == 1


def joined(uses: Sequence[Use]) -> Sequence[Use]:
    """The uses of one parameter in one forward pass as uses to be added one by one: summed before they are squared."""
    if len(uses) == 1:
        return uses
    join = uses[0].join
    assert join is not None  # not joinable
    return [join(uses)]
