"""What MultiheadAttention computes between its projections, which are not modules that could be recorded."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastunlearn.hooks import Call

_SIGNATURE = inspect.signature(nn.MultiheadAttention.forward)


def arguments(call: Call) -> dict[str, Any]:
    """What an attention was called with, by name, defaults included."""
    bound = _SIGNATURE.bind(call.module, *call.args, **call.kwargs)
    bound.apply_defaults()
    return bound.arguments


def samples_first(module: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """[N, L, E] from what the attention was given or returned; one sample without a batch."""
    if x.dim() == 2:
        return x[None]
    return x if module.batch_first else x.transpose(0, 1)


def projected(module: nn.MultiheadAttention, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [N, L or S, E] of (query, key, value), samples first, in their dtype.

    Cost: 2 E^2 FLOPs for each row of the three.
    """
    if module._qkv_same_embed_dim:
        packed: Tensor = module.in_proj_weight
        weights: Sequence[Tensor] = packed.chunk(3)
    else:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    biases = (None, None, None) if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    q, k, v = (
        F.linear(x, weight.detach().to(x.dtype), None if bias is None else bias.detach().to(x.dtype))
        for x, weight, bias in zip(inputs, weights, biases, strict=True)
    )
    return q, k, v


def extra_keys(module: nn.MultiheadAttention, samples: int, dtype: torch.dtype) -> list[Tensor]:
    """The learned key and value [N, 1, E] of ``add_bias_kv``, a copy for every sample; none without."""
    return [
        bias.detach().to(dtype).expand(samples, 1, -1).clone()
        for bias in (module.bias_k, module.bias_v)
        if bias is not None
    ]


def attend(
    module: nn.MultiheadAttention,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    extra: Sequence[Tensor],
    given: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """The concatenated heads [N, L, E], and the attention weights if they were asked for.

    As torch.nn.functional.multi_head_attention_forward does without dropout, with all its masks.

    Args:
        queries, keys, values: of :func:`projected`.
        extra: of :func:`extra_keys`.
        given: of :func:`arguments`.
    """
    heads, need_weights, causal = module.num_heads, given["need_weights"], given["is_causal"]
    mask, hidden = (_additive(given[name], queries.dtype) for name in ("attn_mask", "key_padding_mask"))
    if causal and hidden is None and not need_weights:
        mask = None  # torch takes the hint instead
    else:
        causal = False
    if mask is not None and mask.dim() == 3:
        mask = mask.reshape(-1, heads, *mask.shape[1:])  # [N, heads, L, S]
    if hidden is not None:
        hidden = hidden.reshape(-1, 1, 1, hidden.shape[-1])
    if extra:
        keys, values = torch.cat([keys, extra[0]], 1), torch.cat([values, extra[1]], 1)
    if module.add_zero_attn:
        keys, values = F.pad(keys, (0, 0, 0, 1)), F.pad(values, (0, 0, 0, 1))
    added = (0, bool(extra) + module.add_zero_attn)  # keys that no mask hides
    masks = [F.pad(m, added) for m in (mask, hidden) if m is not None]
    mask = masks[0] + masks[1] if len(masks) == 2 else masks[0] if masks else None
    # [N, heads, L or S, E / heads]
    q, k, v = (x.view(*x.shape[:2], heads, -1).transpose(1, 2) for x in (queries, keys, values))
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
