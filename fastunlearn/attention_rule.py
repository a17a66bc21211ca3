"""What MultiheadAttention's inputs and output gradients say about its parameters.

The projections' own outputs are not recorded, so the core, softmax(Q K^T) V with all its masks, runs once more for
the whole batch and is differentiated down to the projected queries, keys and values: these, and the heads that enter
the output projection, are the rows of linear layers.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastunlearn.hooks import Call
from fastunlearn.uses import Channels, Rows, Use

_SIGNATURE = inspect.signature(nn.MultiheadAttention.forward)


@dataclass(frozen=True)
class _Core:
    """Samples first: what the projections were given, what they and the heads have for gradients."""

    inputs: tuple[Tensor, Tensor, Tensor]  # query [N, L, E], key [N, S, kdim], value [N, S, vdim]
    grads: tuple[Tensor, Tensor, Tensor]  # of the projected ones, [N, L or S, E]
    extra: tuple[Tensor, ...]  # of bias_k and bias_v, [N, 1, E]
    heads: Tensor  # [N, L, E]


def attention_uses(module: nn.MultiheadAttention, call: Call, grads: Sequence[Tensor | None]) -> Mapping[str, Use]:
    """The uses of an attention's parameters in one call, the output projection's by ``out_proj.weight`` and ``.bias``.

    Args:
        module: without dropout, or in eval mode.
        call: with a batch: query [N, L, E], or [L, N, E] without ``batch_first``.
        grads: of the output and of the attention weights.

    Cost: no more than names whose use is added need. Input projection: the core, forward and backward, for the whole
    batch, once; its memory is the forward pass's, [N, heads, L, S] where it asked for the weights.
    """

    @cache
    def core() -> _Core:
        return _run(module, call, grads)

    def part(i: int) -> Callable[[], tuple[Tensor, Tensor]]:
        return lambda: (core().grads[i], core().inputs[i])

    def part_bias(i: int) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: (core().grads[i],)

    def out() -> Tensor:
        # Without a gradient the loss sees the attention weights alone.
        return torch.zeros_like(core().heads) if grads[0] is None else _samples_first(module, grads[0])

    return {
        "in_proj_weight": Rows((part(0), part(1), part(2))),
        **{f"{name}_proj_weight": Rows((part(i),)) for i, name in enumerate("qkv")},
        "in_proj_bias": Channels((part_bias(0), part_bias(1), part_bias(2))),
        **{f"bias_{name}": Channels((lambda i=i: (core().extra[i],),)) for i, name in enumerate("kv")},  # type: ignore[misc]
        "out_proj.weight": Rows((lambda: (out(), core().heads),)),
        "out_proj.bias": Channels((lambda: (out(),),)),
    }


def _samples_first(module: nn.MultiheadAttention, x: Tensor) -> Tensor:
    return x if module.batch_first else x.transpose(0, 1)


def _run(module: nn.MultiheadAttention, call: Call, grads: Sequence[Tensor | None]) -> _Core:
    bound = _SIGNATURE.bind(module, *call.args, **call.kwargs)
    bound.apply_defaults()
    given = bound.arguments
    if given["query"].dim() != 3:
        raise ValueError("MultiheadAttention called without a batch has no axis of samples")
    dtype = next(grad for grad in grads if grad is not None).dtype  # autocast's, where it was on

    def rows(name: str) -> Tensor:
        # The kernels want samples first in memory too: copied here, once for the projection and the kernel.
        return _samples_first(module, given[name].detach()).to(dtype).contiguous()

    query = rows("query")
    key = query if given["key"] is given["query"] else rows("key")
    value = key if given["value"] is given["key"] else rows("value")
    inputs = (query, key, value)
    projected = [
        F.linear(x, weight, b).requires_grad_()
        for x, weight, b in zip(inputs, *_projections(module, dtype), strict=True)
    ]
    extra = [
        b.detach().to(dtype).expand(len(query), 1, -1).clone().requires_grad_()
        for b in (module.bias_k, module.bias_v)
        if b is not None
    ]
    with torch.enable_grad():
        heads, weights = _core(module, projected, extra, given)
    outputs, received = [], []
    if (grad := grads[0]) is not None:
        outputs.append(heads)
        received.append(_samples_first(module, grad) @ module.out_proj.weight.detach().to(dtype))
    if len(grads) > 1 and (grad := grads[1]) is not None and weights is not None:
        outputs.append(weights)
        received.append(grad.to(dtype))
    found = torch.autograd.grad(outputs, [*projected, *extra], received, materialize_grads=True)
    return _Core(inputs, (found[0], found[1], found[2]), found[3:], heads.detach())


def _projections(
    module: nn.MultiheadAttention, dtype: torch.dtype
) -> tuple[Sequence[Tensor], Sequence[Tensor] | Sequence[None]]:
    """The weights and biases of query, key and value."""
    if module._qkv_same_embed_dim:
        packed: Tensor = module.in_proj_weight
        weights: Sequence[Tensor] = packed.chunk(3)
    else:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    weights = [weight.detach().to(dtype) for weight in weights]
    if module.in_proj_bias is None:
        return weights, (None, None, None)
    return weights, module.in_proj_bias.detach().to(dtype).chunk(3)


def _core(
    module: nn.MultiheadAttention, projected: Sequence[Tensor], extra: Sequence[Tensor], given: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """The concatenated heads [N, L, E], and the attention weights if they were asked for.

    As F.multi_head_attention_forward, between its projections.
    """
    (q, k, v), heads = projected, module.num_heads
    need_weights, causal = given["need_weights"], given["is_causal"]
    hidden, mask = _additive(given["key_padding_mask"], q.dtype), _additive(given["attn_mask"], q.dtype)
    if causal and hidden is None and not need_weights:
        mask = None  # torch takes the hint instead
    else:
        causal = False
    if mask is not None and mask.dim() == 3:
        mask = mask.reshape(-1, heads, *mask.shape[1:])  # [N, heads, L, S]
    if hidden is not None:
        hidden = hidden[:, None, None]
    if extra:
        k, v = torch.cat([k, extra[0]], 1), torch.cat([v, extra[1]], 1)
    if module.add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    added = (0, bool(extra) + module.add_zero_attn)  # keys that no mask hides
    mask, hidden = (None if m is None else F.pad(m, added) for m in (mask, hidden))
    if mask is not None and hidden is not None:
        mask = mask + hidden
    elif mask is None:
        mask = hidden
    q, k, v = (x.view(*x.shape[:2], heads, -1).transpose(1, 2) for x in (q, k, v))  # [N, heads, L, E / heads]
    if not need_weights:
        return F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal).transpose(1, 2).flatten(2), None
    scores = (q * math.sqrt(1 / q.shape[-1])) @ k.mT
    weights = (scores if mask is None else scores + mask).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2), weights.mean(1) if given["average_attn_weights"] else weights


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask to be added to the scores; of booleans, True hides."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, -math.inf)
    return mask.detach().to(dtype)
