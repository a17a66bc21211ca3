"""Which weights of a model act on rows of input, and which rows: one slot per weight matrix.

A Linear or a convolution has one slot. Attention has four: the query, key and value parts of its input projection,
which are slices of one parameter when all have the same width, and its output projection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastunlearn import attention
from fastunlearn.hooks import Call

Part = Literal["weight", "transposed", "q", "k", "v", "out"]
Gather = Callable[[Tensor | None], Tensor]
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Slot:
    """One weight matrix [groups, p, d] and the module whose calls show its rows of input.

    Attributes:
        name: of the slot: the layer's, with ``.q``, ``.k``, ``.v`` or ``.out_proj`` for attention.
        layer: name of the module, as ``model.named_modules()`` has it.
        module: whose calls are recorded.
        key: name of the parameter, as ``model.named_parameters()`` has it.
        parameter: holds the weight.
        part: what of the parameter the weight is: "weight" all of it, "transposed" stored [d, p], "q", "k", "v" a
            third of a packed input projection (all of a separate one), "out" all of an output projection.
        groups: of a convolution, else 1.
    """

    name: str
    layer: str
    module: nn.Module
    key: str
    parameter: nn.Parameter
    part: Part = "weight"
    groups: int = 1

    @property
    def region(self) -> Tensor:
        """What of the parameter the slot may write: a view [groups * p, ...] of it, d elements to a row."""
        return self.region_of(self.parameter.detach())

    def region_of(self, weight: Tensor) -> Tensor:
        """The slot's region of any tensor laid out as its parameter."""
        if self.part == "transposed":
            return weight.mT
        if self.packed:
            return weight.chunk(3)["qkv".index(self.part)]
        return weight

    @property
    def packed(self) -> bool:
        """Whether the parameter holds the projections of queries, keys and values one after another."""
        return self.key.endswith("in_proj_weight")

    @property
    def layout(self) -> tuple[str, int]:
        """Slots on one parameter whose layouts agree are uses of the same weight."""
        return self.part if self.part == "transposed" or self.packed else "weight", self.groups

    @property
    def dim(self) -> int:
        """d, columns of a row."""
        shape = self.parameter.shape
        return shape[0] if self.part == "transposed" else math.prod(shape[1:])

    @property
    def numel(self) -> int:
        """Elements of the weight, whatever part of it this process holds."""
        return self.parameter.numel() // (3 if self.packed else 1)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The weight [groups, p, d] in ``dtype``."""
        region = self.region
        return region.to(dtype).reshape(self.groups, region.shape[0] // self.groups, -1)


def supported_layers(model: nn.Module) -> dict[str, Slot]:
    """The slots of a model by name: Linear, Conv1d, Conv2d, Conv3d, MultiheadAttention and their subclasses, and
    Hugging Face's ``Conv1D`` (``transformers.pytorch_utils``, known by its name and its ``nf``).

    Embeddings are not layers here. A layer whose weight is computed from other parameters (weight norm,
    ``torch.nn.utils.parametrize``) is left out: there is no weight to write to; so is a subclass of
    MultiheadAttention with a ``forward`` of its own. Cost: one walk over the modules.
    """
    found: dict[str, Slot] = {}
    projections = {id(m.out_proj) for m in model.modules() if is_attention(m)}
    for name, module in model.named_modules():
        if id(module) not in projections:
            found.update((slot.name, slot) for slot in _slots(name, module))
    return found


def left_out(model: nn.Module) -> dict[str, str]:
    """The layers of a kind known here that have no slot, by name, with the reason."""
    slots = supported_layers(model)
    covered = {id(slot.module) for slot in slots.values()} | {id(slot.parameter) for slot in slots.values()}
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and not is_attention(module):
            reasons[name] = f"{type(module).__name__} computes attention in a forward of its own"
        elif is_attention(module) and f"{name}.q".lstrip(".") not in slots:
            reasons[name] = "its input projection is computed from other parameters"
        elif isinstance(module, (nn.Linear, *_CONVOLUTIONS, nn.MultiheadAttention)) or is_transposed(module):
            weight = module._parameters.get("weight")
            if id(module) not in covered and id(weight) not in covered:
                reasons[name] = "its weight is computed from other parameters"
    return reasons


def choose_layers(model: nn.Module, layers: Sequence[str] | None) -> dict[str, Slot]:
    """The slots of these names, or all; the name of an attention stands for its four.

    Raises ValueError naming an unknown one. Cost: one walk over the modules.
    """
    known = supported_layers(model)
    if layers is None:
        return known
    chosen = {slot.name: slot for name in layers for slot in known.values() if name in (slot.name, slot.layer)}
    names = {name for slot in chosen.values() for name in (slot.name, slot.layer)}
    unknown = [name for name in layers if name not in names]
    if unknown:
        raise ValueError(
            f"{', '.join(map(repr, unknown))} is not a Linear, a convolution, a Hugging Face Conv1D or a "
            f"MultiheadAttention with a weight of its own; the model has {', '.join(map(repr, known)) or 'none'}"
        )
    return chosen


def layer_rows(module: nn.Module, input: Tensor, pick: Tensor | None = None) -> Tensor:
    """The vectors that the weights of ``module`` are multiplied with, one row per output position.

    Row t of a Linear is input.reshape(-1, d)[t]; of a convolution, the patch under output position t
    (samples, then output positions in row-major order), its channels and kernel positions flattened as the
    weight's.

    Args:
        module: Linear, Conv1d, Conv2d, Conv3d or Hugging Face Conv1D; any stride, dilation, groups, padding (also
            "same", "valid") and padding_mode.
        input: what the module was called with: [..., d], [(N,) C, L], [(N,) C, H, W] or [(N,) C, D, H, W].
        pick: int64 [k], the rows wanted, in this order; all by default. Only these are gathered, so picking
            1,000 of 100,000 patches costs 1,000 patches.

    Returns:
        [groups, rows, d], in the dtype of ``input``; d = Ci / groups * kernel positions.

    Raises:
        TypeError: a module of another type.

    Cost: no arithmetic; rows * groups * d elements written.
    """
    if isinstance(module, nn.Linear) or is_transposed(module):
        rows = input.reshape(-1, input.shape[-1])
        return (rows if pick is None else rows[pick])[None]
    if not isinstance(module, _CONVOLUTIONS):
        raise TypeError(
            f"layer_rows knows Linear, Conv1d, Conv2d, Conv3d and Hugging Face's Conv1D, not {type(module).__name__}"
        )
    view = windows(padded_input(module, input), module.kernel_size, module.stride, module.dilation)
    axes = len(module.kernel_size)
    positions, dim = view.shape[: 1 + axes], module.weight[0].numel()
    if pick is None:
        patches = view.reshape(math.prod(positions), module.groups, dim)
    else:
        index: list[Tensor] = []
        for size in reversed(positions):
            index.insert(0, pick % size)
            pick = pick // size
        patches = view[tuple(index)].reshape(len(index[0]), module.groups, dim)
    return patches.transpose(0, 1)


def slot_rows(slot: Slot, call: Call, mask: Tensor | None = None) -> tuple[int, Gather]:
    """How many rows one call gives a slot, and what gathers them: [groups, k, d], of an index [k] or all for None.

    Rows of a Linear, Conv1D or attention at positions where ``mask`` [N, T] is 0 are left out, provided that the
    input's leading axes are [N, T] (attention: also [T, N] without ``batch_first``). A flattened input is not
    recognised, and a decoder whose text is as long as the encoder's is taken to have its mask. Attention further leaves
    out what its ``key_padding_mask`` hides: keys and values, and in self-attention (``query is key``) the queries and
    outputs of the same positions.

    Cost: none for most; for the output projection of attention, which gets no call of its own, attention over again.
    """
    if isinstance(slot.module, _CONVOLUTIONS):
        module, input = slot.module, call.input
        return call.output.numel() // module.out_channels, lambda pick: layer_rows(module, input, pick)
    source, keep = (call.input, None) if slot.part in ("weight", "transposed") else _attention_input(slot, call)
    leading = source.shape[:-1]
    if mask is not None and leading[:2] == mask.shape:
        seen = mask.bool().reshape(*mask.shape, *[1] * (len(leading) - 2)).expand(leading)
        keep = seen if keep is None else keep & seen
    rows = source.reshape(-1, source.shape[-1])
    if keep is None:
        return len(rows), lambda pick: (rows if pick is None else rows[pick])[None]
    kept = keep.reshape(-1).nonzero()[:, 0]
    return len(kept), lambda pick: rows[kept if pick is None else kept[pick]][None]


def _slots(name: str, module: nn.Module) -> list[Slot]:
    """The one registry: module type to slots."""
    prefix = f"{name}." if name else ""
    weight = module._parameters.get("weight")
    if isinstance(module, nn.MultiheadAttention):
        return _attention_slots(name, prefix, module) if is_attention(module) else []
    if weight is None:
        return []
    if isinstance(module, nn.Linear):
        return [Slot(name, name, module, f"{prefix}weight", weight)]
    if isinstance(module, _CONVOLUTIONS):
        return [Slot(name, name, module, f"{prefix}weight", weight, groups=module.groups)]
    if is_transposed(module):
        return [Slot(name, name, module, f"{prefix}weight", weight, "transposed")]
    return []


def _attention_slots(name: str, prefix: str, module: nn.MultiheadAttention) -> list[Slot]:
    found = []
    parts: tuple[Part, ...] = ("q", "k", "v")
    for part in parts:
        key = "in_proj_weight" if module._qkv_same_embed_dim else f"{part}_proj_weight"
        parameter = module._parameters.get(key)
        if parameter is not None:
            found.append(Slot(f"{prefix}{part}", name, module, f"{prefix}{key}", parameter, part))
    out = module.out_proj._parameters.get("weight")
    if out is not None:
        found.append(Slot(f"{prefix}out_proj", name, module, f"{prefix}out_proj.weight", out, "out"))
    return found


def is_attention(module: nn.Module) -> bool:
    """A MultiheadAttention that computes what the class does: no forward of its own."""
    return isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward


def is_transposed(module: nn.Module) -> bool:
    """Hugging Face's Conv1D, a Linear with weight [in, out]."""
    return (
        any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)
        and hasattr(module, "nf")
        and getattr(module, "weight", torch.empty(0)).dim() == 2
    )


def _attention_input(slot: Slot, call: Call) -> tuple[Tensor, Tensor | None]:
    """What one projection of attention acts on, samples first [N, L, d], and the positions [N, L] not padded away."""
    module = cast(nn.MultiheadAttention, slot.module)
    given = attention.arguments(call)
    query, key, padding = given["query"], given["key"], given["key_padding_mask"]
    keep = None
    if padding is not None and (slot.part in ("k", "v") or query is key):
        shown = ~padding if padding.dtype == torch.bool else ~torch.isneginf(padding)
        keep = shown if query.dim() == 3 else shown[None]
    if slot.part == "out":
        return _heads(module, given), keep
    return attention.samples_first(module, given[{"q": "query", "k": "key", "v": "value"}[slot.part]]), keep


def _heads(module: nn.MultiheadAttention, given: dict[str, Any]) -> Tensor:
    """The concatenated heads [N, L, E], by attention over again up to its output projection."""
    inputs = [attention.samples_first(module, given[name]) for name in ("query", "key", "value")]
    extra = attention.extra_keys(module, len(inputs[0]), inputs[0].dtype)
    return attention.attend(module, *attention.projected(module, inputs), extra, given)[0]


def padded_input(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, input: Tensor) -> Tensor:
    """[N, C, *sizes]: what a convolution slides over, its padding of any mode written out. Cost: a copy if it pads."""
    kernel, dilation = module.kernel_size, module.dilation
    axes = len(kernel)
    if input.dim() == 1 + axes:  # unbatched
        input = input[None]
    if module.padding == "valid":
        padding = [(0, 0)] * axes
    elif module.padding == "same":
        # torch puts the odd element of "same" padding at the end.
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        padding = [(t // 2, t - t // 2) for t in totals]
    else:
        padding = [(p, p) for p in cast(Iterable[int], module.padding)]
    if any(side for pair in padding for side in pair):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        input = F.pad(input, [side for pair in reversed(padding) for side in pair], mode=mode)
    return input


def windows(input: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """Every patch of padded images [N, C, *sizes] as a view: [N, *positions, C, *kernel], sharing their memory."""
    out = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(input.shape[2:], kernel, stride, dilation, strict=True)
    ]
    steps: Any = input.stride()
    return input.as_strided(
        [input.shape[0], *out, input.shape[1], *kernel],
        [
            steps[0],
            *(step * s for step, s in zip(steps[2:], stride, strict=True)),
            steps[1],
            *(step * d for step, d in zip(steps[2:], dilation, strict=True)),
        ],
    )
