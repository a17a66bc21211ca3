"""What a layer's inputs and output gradients say about each of its parameters: one rule per layer type.

A rule turns one recorded call, :class:`Seen`, into a :class:`~fastunlearn.uses.Use` for every parameter of the layer.
It computes nothing but autocast's cast of the input: what a use needs beyond views of the recorded tensors is computed
when it is added, and once per call of the rule where several uses need the same. So call a rule once per record.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from fastunlearn.attention_rule import attention_uses
from fastunlearn.hooks import Call
from fastunlearn.slots import is_transposed, padded_input
from fastunlearn.uses import Channels, Patches, Rows, Table, Use, bias, joined

__all__ = ["RULES", "Rule", "Seen", "Use", "applies", "joinable", "joined", "rule_of", "ruled_owners"]


@dataclass(frozen=True)
class Seen:
    """One call of a layer in the forward pass and what the backward pass said about it.

    Attributes:
        call: as the layer saw it.
        input_axes: per tensor given (positional, then keyword, in the order of ``tree_flatten``), the axis of the
            samples; None where it has none.
        output_axes: the same per tensor returned.
        grads: per tensor returned, the gradient of the sum of the losses; None where the loss does not depend on it,
            but not everywhere.
    """

    call: Call
    input_axes: tuple[int | None, ...]
    output_axes: tuple[int | None, ...]
    grads: tuple[Tensor | None, ...]

    @property
    def x(self) -> Tensor:
        """The first tensor given, samples first."""
        return self.samples_first(self.call.input)

    @property
    def g(self) -> Tensor:
        """The gradient of the first tensor returned, samples first."""
        grad = self.grads[0]
        assert grad is not None  # of a layer that returns one tensor, which the loss depends on
        return grad.movedim(self.output_axes[0] or 0, 0)

    @property
    def xg(self) -> tuple[Tensor, Tensor]:
        """Both, in the dtype of the gradient: what autocast lowered the input to."""
        g = self.g
        return self.x.to(g.dtype), g

    def samples_first(self, given: Tensor) -> Tensor:
        """A tensor that was given, whose samples lie where the first one's do."""
        return given.detach().movedim(self.input_axes[0] or 0, 0)

    def arguments(self, forward: Callable[..., Any]) -> dict[str, Any]:
        """What the layer was called with, by name."""
        bound = inspect.signature(forward).bind(self.call.module, *self.call.args, **self.call.kwargs)
        bound.apply_defaults()
        return bound.arguments


Rule = Callable[[Any, Seen], Mapping[str, Use]]


def _linear(module: nn.Linear, seen: Seen) -> dict[str, Use]:
    x, g = seen.xg
    return {"weight": Rows((lambda: (g, x),)), "bias": bias(g)}


def _transposed_linear(module: nn.Module, seen: Seen) -> dict[str, Use]:
    """Hugging Face's Conv1D: y = x W + b with W [in, out], so input and gradient swap places."""
    x, g = seen.xg
    return {"weight": Rows((lambda: (x, g),)), "bias": bias(g)}


def _bilinear(module: nn.Bilinear, seen: Seen) -> dict[str, Use]:
    """Weight [O, I1, I2]: output feature o is a linear layer with gradient g_o x1 and input x2."""
    given = seen.arguments(nn.Bilinear.forward)
    g = seen.g
    x1, x2 = (seen.samples_first(given[name]).to(_wide(g)) for name in ("input1", "input2"))
    parts = tuple((lambda o=o: (g[..., o : o + 1] * x1, x2)) for o in range(module.out_features))
    return {"weight": Rows(parts), "bias": bias(g)}


def _wide(g: Tensor) -> torch.dtype:
    """For what a kernel is given that no layer has rounded: not below float32."""
    return torch.promote_types(g.dtype, torch.float32)


def _conv(module: _ConvNd, seen: Seen) -> dict[str, Use]:
    x, g = seen.xg
    # torch's own list of zeros or other values to pad with: pairs, from the last axis to the first.
    pads = module._reversed_padding_repeated_twice
    before, after = tuple(pads[-2::-2]), tuple(pads[::-2])
    plain = module.padding_mode == "zeros" and before == after
    weight = Patches(
        x, g, *_geometry(module), padding=before if plain else (0,) * len(before),
        pad=None if plain else lambda image: padded_input(cast(nn.Conv2d, module), image),
    )  # fmt: skip
    return {"weight": weight, "bias": bias(g, 1)}


def _conv_transpose(module: _ConvTransposeNd, seen: Seen) -> dict[str, Use]:
    """The gradient of a convolution with its input and its output gradient in each other's place.

    Output padding below the stride does not change how many positions the kernel has to slide over. From the stride
    on, which torch allows where the dilation is larger, there would be more of them than inputs; then padding is
    written out at the front, and what the last input does not reach is cut off at the end.
    """
    x, g = seen.xg
    kernel, stride, dilation, groups = _geometry(module)
    padding = cast(tuple[int, ...], module.padding)
    sizes = [(n - 1) * s + d * (k - 1) + 1 for n, s, d, k in zip(x.shape[2:], stride, dilation, kernel, strict=True)]
    extra = [size + 2 * p - reached for size, p, reached in zip(g.shape[2:], padding, sizes, strict=True)]
    pad = None
    if any(e >= s for e, s in zip(extra, stride, strict=True)):
        sides = [side for p, e in reversed(list(zip(padding, extra, strict=True))) for side in (p, p - e)]
        padding, pad = (0,) * len(padding), lambda image: F.pad(image, sides)
    return {"weight": Patches(g, x, kernel, stride, dilation, groups, padding, pad), "bias": bias(g, 1)}


def _geometry(module: _ConvNd) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
    return tuple(module.kernel_size), tuple(module.stride), tuple(module.dilation), module.groups


def _affine(g: Tensor, normalized: Callable[[], Tensor], channel_dim: int) -> dict[str, Use]:
    return {"weight": Channels((lambda: (g, normalized()),), channel_dim), "bias": bias(g, channel_dim)}


def _layer_norm(module: nn.LayerNorm, seen: Seen) -> dict[str, Use]:
    x, g = seen.xg
    shape = module.normalized_shape
    return _affine(
        g.flatten(-len(shape)), lambda: F.layer_norm(x, shape, eps=module.eps).flatten(-len(shape)), -1
    )  # fmt: skip


def _rms_norm(module: nn.RMSNorm, seen: Seen) -> dict[str, Use]:
    x, g = seen.xg
    shape = list(module.normalized_shape)
    return _affine(g.flatten(-len(shape)), lambda: F.rms_norm(x, shape, eps=module.eps).flatten(-len(shape)), -1)


def _root_mean_square_norm(module: nn.Module, seen: Seen) -> dict[str, Use]:
    """One that :func:`_rms_eps` has recognised; the weight and 1 + weight have the same derivative."""
    x, g = seen.xg
    return _affine(g, lambda: F.rms_norm(x, x.shape[-1:], eps=_rms_eps(module)), -1)


def _group_norm(module: nn.GroupNorm, seen: Seen) -> dict[str, Use]:
    x, g = seen.xg
    return _affine(g, lambda: F.group_norm(x, module.num_groups, eps=module.eps), 1)


def _batch_norm(module: _BatchNorm | _InstanceNorm, seen: Seen) -> dict[str, Use]:
    """By the running statistics; batch statistics are refused long before."""
    x, g = seen.xg
    return _affine(g, lambda: F.batch_norm(x, module.running_mean, module.running_var, eps=module.eps), 1)


def _instance_norm(module: _InstanceNorm, seen: Seen) -> dict[str, Use]:
    if module.track_running_stats and not module.training:
        return _batch_norm(module, seen)
    x, g = seen.xg
    return _affine(g, lambda: F.instance_norm(x, eps=module.eps), 1)


def _prelu(module: nn.PReLU, seen: Seen) -> dict[str, Use]:
    """The slope of what lies below zero, of a channel (the second axis) or of everything."""
    x, g = seen.xg
    if module.num_parameters == 1:
        x, g = x.reshape(len(x), -1, 1), g.reshape(len(g), -1, 1)
        return {"weight": Channels((lambda: (g, x.clamp(max=0)),))}
    return {"weight": Channels((lambda: (g, x.clamp(max=0)),), 1)}


def _embedding(module: nn.Embedding, seen: Seen) -> dict[str, Use]:
    x, g = seen.x, seen.g
    return {"weight": Table(lambda chunk: (x[chunk], g[chunk]), len(g), padding_idx=module.padding_idx)}


def _scaled_embedding(module: nn.Embedding, seen: Seen) -> dict[str, Use]:
    """One that :func:`_embedding_scale` has recognised."""
    x, g, scale = seen.x, seen.g, _embedding_scale(module)
    assert scale is not None

    def gather(chunk: slice) -> tuple[Tensor, Tensor]:
        return x[chunk], g[chunk].to(_wide(g)) * scale

    return {"weight": Table(gather, len(g), g[0].numel() * 4, module.padding_idx)}


def _embedding_bag(module: nn.EmbeddingBag, seen: Seen) -> dict[str, Use]:
    """Every index of a bag [N, T] gets the bag's gradient [N, D], times its weight or over the count."""
    given = seen.arguments(nn.EmbeddingBag.forward)
    indices, g = given["input"], seen.g
    weights = given["per_sample_weights"]
    if indices.dim() == 1:
        # Only bags of one index each have as many indices as samples.
        if not torch.equal(given["offsets"], torch.arange(len(g), device=g.device)):
            raise ValueError("an EmbeddingBag called with offsets has no samples to tell apart; give it input [N, T]")
        indices = indices[:, None]
        weights = None if weights is None else weights[:, None]

    def gather(chunk: slice) -> tuple[Tensor, Tensor]:
        ids, grads = indices[chunk], g[chunk, None].to(_wide(g))
        if module.mode == "mean":
            counted = torch.ones_like(ids) if module.padding_idx is None else ids != module.padding_idx
            grads = grads / counted.sum(1)[:, None, None]  # 0 / 0 of a bag of padding is never added
        if weights is not None:
            grads = grads * weights[chunk].detach()[..., None]
        return ids, grads.expand(*ids.shape, -1)

    size = indices.shape[1] * g.shape[1] * 4
    return {"weight": Table(gather, len(g), size, module.padding_idx)}


def _attention(module: nn.MultiheadAttention, seen: Seen) -> Mapping[str, Use]:
    return attention_uses(module, seen.call, seen.grads)


RULES: dict[type[nn.Module], tuple[Rule, str]] = {
    nn.Linear: (_linear, "rows"),
    nn.Bilinear: (_bilinear, "bilinear"),
    nn.Conv1d: (_conv, "patches"),
    nn.Conv2d: (_conv, "patches"),
    nn.Conv3d: (_conv, "patches"),
    nn.ConvTranspose1d: (_conv_transpose, "patches"),
    nn.ConvTranspose2d: (_conv_transpose, "patches"),
    nn.ConvTranspose3d: (_conv_transpose, "patches"),
    nn.LayerNorm: (_layer_norm, "norm"),
    nn.RMSNorm: (_rms_norm, "norm"),
    nn.GroupNorm: (_group_norm, "norm"),
    nn.BatchNorm1d: (_batch_norm, "norm"),
    nn.BatchNorm2d: (_batch_norm, "norm"),
    nn.BatchNorm3d: (_batch_norm, "norm"),
    nn.SyncBatchNorm: (_batch_norm, "norm"),
    nn.InstanceNorm1d: (_instance_norm, "norm"),
    nn.InstanceNorm2d: (_instance_norm, "norm"),
    nn.InstanceNorm3d: (_instance_norm, "norm"),
    nn.PReLU: (_prelu, "norm"),
    nn.Embedding: (_embedding, "rows"),
    nn.EmbeddingBag: (_embedding_bag, "rows"),
    nn.MultiheadAttention: (_attention, ""),
}
"""Module type -> its rule, and what its ``weight`` is: uses of one kind can be joined."""

_CHANNELS_SECOND = (_ConvNd, _BatchNorm, _InstanceNorm, nn.GroupNorm)


def rule_of(module: nn.Module) -> Rule | None:
    """The rule of a module that computes what its torch class does; one with a forward of its own has none.

    Neither has one whose samples are not independent (``scale_grad_by_freq`` counts over the batch), one that
    can not be run again (dropout in attention while training), and the maximum of an EmbeddingBag.
    """
    if "forward" in vars(module) or "_conv_forward" in vars(module):
        return None
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.scale_grad_by_freq:
        return None
    if isinstance(module, nn.EmbeddingBag) and (module.mode == "max" or module.max_norm is not None):
        return None
    if isinstance(module, nn.MultiheadAttention) and module.training and module.dropout > 0:
        return None
    for cls, (rule, _) in RULES.items():
        if isinstance(module, cls) and all(
            getattr(type(module), name, None) is getattr(cls, name, None) for name in ("forward", "_conv_forward")
        ):
            return rule
    if _is_transposed_linear(module):
        return _transposed_linear
    if _embedding_scale(module) is not None:
        return _scaled_embedding
    return _root_mean_square_norm if _rms_eps(module) is not None else None


def _rms_eps(module: nn.Module) -> float | None:
    """The epsilon of an RMSNorm as transformers writes them (Llama's, Gemma's with 1 + weight, T5's), each a class of
    its own; None of anything else.

    Recognised by what its forward computes, not by its name: a module of one vector ``weight`` with an epsilon whose
    forward takes one tensor is tried, once per class and settings, on small random inputs. A stand-in with a weight of
    its own is what runs, for the module's own may be sharded.
    """
    own = vars(module)
    if list(own["_parameters"]) != ["weight"] or own["_modules"] or own["_buffers"] or "forward" in own:
        return None
    # What else it has, a forward that needs it will miss.
    settings = {name: value for name, value in own.items() if name not in _MODULE_STATE and _is_plain(value)}
    epsilons = [value for name, value in settings.items() if "eps" in name and isinstance(value, float)]
    weight = own["_parameters"]["weight"]
    if len(epsilons) != 1 or weight is None or weight.dim() != 1 or not len(weight):
        return None
    known = _is_rms_norm(_own_class(module), len(weight), module.training, tuple(sorted(settings.items())))
    return epsilons[0] if known else None


def _own_class(module: nn.Module) -> Any:
    """Without what fully_shard puts before it, which is not to be made by hand and has no forward of its own."""
    return next(cls for cls in type(module).__mro__ if not issubclass(cls, FSDPModule))


def _stand_in(cls: Any, weight: Tensor, training: bool, settings: tuple[tuple[str, Any], ...]) -> Any:
    """A module of the class without its ``__init__``: no hooks, these settings, a weight of its own."""
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    module.training = training
    vars(module).update(settings)
    module.weight = nn.Parameter(weight)
    return module


def _takes_one(cls: Any) -> bool:
    """Whether the forward of a class takes one argument: no gate, no scale of the call."""
    parameters = list(inspect.signature(cls.forward).parameters.values())
    return len(parameters) == 2 and parameters[1].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD


# What a forward of somebody else's may raise when it is not for what it was given.
_NO = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


_MODULE_STATE = frozenset(vars(nn.Module()))


def _embedding_scale(module: nn.Module) -> float | None:
    """The number that an Embedding with a forward of its own multiplies what it looks up by, as Gemma's does; None of
    anything else. Recognised as RMSNorm is, in the dtype of the table, to which the number may be rounded."""
    own = vars(module)
    if not isinstance(module, nn.Embedding) or list(own["_parameters"]) != ["weight"] or own["_modules"]:
        return None
    buffers = own["_buffers"]
    if any(b is None or b.numel() != 1 or b.is_meta for b in buffers.values()):
        return None
    settings = {name: value for name, value in own.items() if name not in _MODULE_STATE and _is_plain(value)}
    scalars = {name: (b.item(), b.dtype) for name, b in buffers.items()}
    return _scale_of(
        _own_class(module), module.weight.dtype, len(module.weight), module.training,
        tuple(sorted(settings.items())), tuple(sorted(scalars.items())),
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _scale_of(
    cls: Any, dtype: torch.dtype, rows: int, training: bool,
    settings: tuple[tuple[str, Any], ...], buffers: tuple[tuple[str, tuple[Any, torch.dtype]], ...],
) -> float | None:  # fmt: skip
    if not _takes_one(cls):
        return None
    generator = torch.Generator().manual_seed(0)
    # Powers of two, which multiply without rounding.
    table = torch.exp2(torch.randint(-3, 4, (rows, 4), generator=generator)).to(dtype)
    table *= torch.randint(0, 2, table.shape, generator=generator) * 2 - 1
    ids = torch.stack([torch.randperm(rows, generator=generator) for _ in range(2)])  # one may be treated otherwise
    with torch.no_grad(), torch.random.fork_rng(devices=()):
        module = _stand_in(cls, table.clone(), training, settings)
        for name, (value, kind) in buffers:
            module.register_buffer(name, torch.tensor(value, dtype=kind))
        try:
            found = cls.forward(module, ids)
        except _NO:
            return None
        if not isinstance(found, Tensor) or found.shape != (*ids.shape, 4):
            return None
        scale = (found[0, 0, 0] / table[ids[0, 0], 0]).item()
        return scale if torch.equal(found, (table[ids] * scale).to(found.dtype)) else None


def _is_plain(value: Any) -> bool:
    """A setting, not state."""
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, (int, float, str, torch.dtype, type(None)))


@lru_cache(maxsize=1024)
def _is_rms_norm(cls: Any, size: int, training: bool, settings: tuple[tuple[str, Any], ...]) -> bool:
    if not _takes_one(cls):
        return False
    eps: float = next(value for name, value in settings if "eps" in name and isinstance(value, float))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), torch.random.fork_rng(devices=()):
        for shape in ((3, size), (2, 3, size), (2, 1, 3, size)):
            weight, x = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((size,), shape))
            # Of a mean beside zero, and as small as epsilon is felt, ordinary, and large.
            x = (x + 0.5) * torch.tensor([max(eps, 1e-12) ** 0.5, 1.0, 100.0], dtype=torch.float64)[:, None]
            try:
                found = cls.forward(_stand_in(cls, weight, training, settings), x.clone())
            except _NO:
                return False
            if not isinstance(found, Tensor) or found.shape != x.shape:
                return False
            normalized = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
            # Most compute in float32 whatever they are given.
            if not any(torch.allclose(found.double(), w * normalized, 1e-5, 1e-6) for w in (weight, 1 + weight)):
                return False
    return True


def _is_transposed_linear(module: nn.Module) -> bool:
    """Hugging Face's Conv1D with the forward of that class."""
    forwards = [vars(cls).get("forward") for cls in type(module).__mro__ if cls.__name__ == "Conv1D"]
    return is_transposed(module) and type(module).forward in forwards


def applies(module: nn.Module, input_axes: Sequence[int | None], output_axes: Sequence[int | None]) -> bool:
    """Whether the module's rule can tell samples apart that lie on these axes (as of :class:`Seen`).

    Layers that act on the last axes take them on any other. Where channels come second, samples come first: on an
    axis of positions a convolution or a norm would mix them, or does not because its kernel is 1 there; attention
    must have them on the axis of its batch.
    """
    if not input_axes or not output_axes or input_axes[0] is None or output_axes[0] is None:
        return False
    axis = output_axes[0]
    if isinstance(module, nn.MultiheadAttention):
        return axis == (0 if module.batch_first else 1) and tuple(input_axes[:3]) == (axis,) * 3
    if isinstance(module, nn.EmbeddingBag):
        return axis == 0 and set(input_axes) == {0}
    if isinstance(module, nn.Bilinear):
        return set(input_axes) == {axis}
    channels_second = isinstance(module, _CHANNELS_SECOND) or (isinstance(module, nn.PReLU) and len(module.weight) > 1)
    return not channels_second or input_axes[0] == axis == 0


def ruled_owners(modules: Mapping[str, nn.Module]) -> dict[int, list[tuple[str, nn.Module, str]]]:
    """Who answers for each parameter: its ``id`` -> (module name, module, the rule's name of it) of all its owners.

    That is the module that holds it, but for the output projection of attention, which attention applies without
    calling it: attention answers, by ``out_proj.weight`` and ``out_proj.bias``.

    Args:
        modules: as ``dict(model.named_modules())``.
    """
    owners: dict[int, list[tuple[str, nn.Module, str]]] = defaultdict(list)
    projections = {
        id(module.out_proj): (name, module)
        for name, module in modules.items()
        if isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward
    }
    for name, module in modules.items():
        for local, parameter in module._parameters.items():
            if parameter is not None:
                attention = projections.get(id(module))
                owner = (name, module, local) if attention is None else (*attention, f"out_proj.{local}")
                owners[id(parameter)].append(owner)
    return owners


def joinable(users: Sequence[tuple[nn.Module, str]], calls: int) -> bool:
    """Whether rules know the parameter that these modules own under these names, and :func:`joined` can add up its
    ``calls`` uses in one forward pass."""
    kinds = {_kind(module, local) for module, local in users}
    return None not in kinds and (calls <= 1 or len(kinds) == 1)


def _kind(module: nn.Module, local: str) -> str | None:
    """Uses of one kind can be joined; None where the rule does not know the name."""
    if isinstance(module, nn.MultiheadAttention):
        return _ATTENTION.get(local)
    if local == "bias":
        return "bias"
    if local != "weight":
        return None  # what a parametrization computes the weight from
    if isinstance(module, _ConvNd):
        return f"patches of {module.groups} groups"
    unlisted = "rows" if is_transposed(module) else "norm"  # Conv1D, an RMSNorm of another class
    return next((kind for cls, (_, kind) in RULES.items() if isinstance(module, cls)), unlisted)


_ATTENTION = {
    "in_proj_weight": "rows of q, k, v",
    "in_proj_bias": "bias of q, k, v",
    **{f"{name}_proj_weight": "rows" for name in "qkv"},
    **{f"bias_{name}": "bias" for name in "kv"},
    "out_proj.weight": "rows",
    "out_proj.bias": "bias",
}
