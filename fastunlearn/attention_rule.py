"""What MultiheadAttention's inputs and output gradients say about its parameters.

The projections' own outputs are not recorded, so the core, softmax(Q K^T) V with all its masks, runs once more for
the whole batch and is differentiated down to the projected queries, keys and values: these, and the heads that enter
the output projection, are the rows of linear layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from fastunlearn import attention
from fastunlearn.hooks import Call
from fastunlearn.uses import Channels, Rows, Use


@dataclass(frozen=True)
class _Core:
    """Samples first: what the projections were given, and what they and the learned keys have for gradients."""

    inputs: tuple[Tensor, ...]  # query [N, L, E], key [N, S, kdim], value [N, S, vdim]
    grads: tuple[Tensor, ...]  # of the projected ones, [N, L or S, E]; of bias_k and bias_v, [N, 1, E]
    heads: Tensor  # [N, L, E]


def attention_uses(module: nn.MultiheadAttention, call: Call, grads: Sequence[Tensor | None]) -> Mapping[str, Use]:
    """The uses of an attention's parameters in one call, the output projection's by ``out_proj.weight`` and ``.bias``.

    Args:
        module: without dropout, or in eval mode.
        call: with a batch: query [N, L, E], or [L, N, E] without ``batch_first``.
        grads: of the output, and of the attention weights if they were returned.

    Cost, at the first use that is added and once for all of them: the input projections forward, the core forward and
    backward. Memory as in the forward pass: [N, heads, L, S] if the call asked for the weights.
    """

    @cache
    def core() -> _Core:
        return _run(module, call, grads)

    @cache
    def out() -> Tensor:
        # Without a gradient the loss sees the attention weights alone.
        return torch.zeros_like(core().heads) if grads[0] is None else attention.samples_first(module, grads[0])

    def rows(i: int) -> Callable[[], tuple[Tensor, Tensor]]:
        return lambda: (core().grads[i], core().inputs[i])

    def channels(i: int) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: (core().grads[i],)

    return {
        "in_proj_weight": Rows((rows(0), rows(1), rows(2))),
        **{f"{name}_proj_weight": Rows((rows(i),)) for i, name in enumerate("qkv")},
        "in_proj_bias": Channels((channels(0), channels(1), channels(2))),
        "bias_k": Channels((channels(3),)),
        "bias_v": Channels((channels(4),)),
        "out_proj.weight": Rows((lambda: (out(), core().heads),)),
        "out_proj.bias": Channels((lambda: (out(),),)),
    }


def _run(module: nn.MultiheadAttention, call: Call, grads: Sequence[Tensor | None]) -> _Core:
    given = attention.arguments(call)
    if given["query"].dim() != 3:
        raise ValueError("MultiheadAttention called without a batch has no axis of samples")
    dtype = next(grad for grad in grads if grad is not None).dtype  # autocast's, where it was on

    def rows(name: str) -> Tensor:
        # The kernels want samples first in memory too: copied here, once for the projection and the kernel.
        return attention.samples_first(module, given[name].detach()).to(dtype).contiguous()

    query = rows("query")
    key = query if given["key"] is given["query"] else rows("key")
    value = key if given["value"] is given["key"] else rows("value")
    with torch.no_grad():
        leaves = [*attention.projected(module, (query, key, value)), *attention.extra_keys(module, len(query), dtype)]
    with torch.enable_grad():
        q, k, v, *extra = (leaf.requires_grad_() for leaf in leaves)
        heads, weights = attention.attend(module, q, k, v, extra, given)
    pairs = []
    if (grad := grads[0]) is not None:
        pairs.append((heads, attention.samples_first(module, grad) @ module.out_proj.weight.detach().to(dtype)))
    if weights is not None and len(grads) > 1 and (grad := grads[1]) is not None:
        pairs.append((weights, grad.to(dtype)))
    found = torch.autograd.grad([o for o, _ in pairs], leaves, [g for _, g in pairs], materialize_grads=True)
    return _Core((query, key, value), found, heads.detach())
