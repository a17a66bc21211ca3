"""The units of a model as features: one column per output unit of a layer, its mean activation per sample.

Layers with units, and the names they go by:

- Linear: its outputs; Conv1d, Conv2d, Conv3d: their filters; the transformers library's ``Conv1D`` (GPT-2), a linear
  layer with its weight [in, out]: its outputs. They go by the module's name.
- MultiheadAttention ``a``: ``a.in_proj`` has the rows of the packed query, key and value projection for units (of
  three weights one after another where the embeddings have different sizes), ``a.out_proj`` the outputs. Neither is
  called as a module, so both are taken from what the attention is given and returns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastunlearn import attention
from fastunlearn.data import Batch
from fastunlearn.hooks import Call, preserved, recording, without_fused_attention
from fastunlearn.slots import is_attention, is_transposed


@dataclass(frozen=True)
class UnitActivations:
    """Mean activations of a model's units over one batch.

    Attributes:
        values: [N, units].
        units: (layer name, output unit or filter) of each column.
        outputs: what the model returned for the batch; of a Hugging Face output object, its logits.
    """

    values: Tensor
    units: list[tuple[str, int]]
    outputs: Any


def layers_with_units(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer of the kinds above by name, in the model's order; ``a.in_proj`` stands for the attention ``a``."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if is_attention(module):
            found[f"{name}.in_proj".removeprefix(".")] = module
        elif isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) or is_transposed(module):
            found[name] = module
    return found


def unit_activations(model: nn.Module, batch: Batch | Tensor, layers: Sequence[str] | None = None) -> UnitActivations:
    """Mean activation per sample of every unit of a layer: outputs of linear layers, filters of convolutions.

    Positions (sequence, height, width) are averaged, and so are the calls of a layer that runs more than once. Where
    the batch has an ``attention_mask`` [N, T], outputs [N, T, units] are averaged over the attended positions only. The
    model runs in eval mode without gradients and without torch's fused attention; modes, hooks and random state are
    put back.

    Args:
        model: any module.
        batch: a :class:`~fastunlearn.data.Batch`, or the inputs alone as one tensor [N, ...].
        layers: names of layers as :func:`layers_with_units` has them; all by default.

    Returns:
        :class:`UnitActivations`; layers that were never called have no column.

    Raises:
        ValueError: an unknown layer; a layer whose output does not have the N samples first; no layer was
            called.

    Cost: one forward pass; N * units elements held. An attention's projections cost one product with the mean of its
    inputs more. Source: arXiv 2204.07655, section 4.
    """
    if isinstance(batch, Tensor):
        batch = Batch((batch,), {}, None, len(batch))
    found = layers_with_units(model)
    unknown = [name for name in layers or () if name not in found]
    if unknown:
        raise ValueError(
            f"{', '.join(map(repr, unknown))} is not a Linear, convolution, Conv1D or attention projection; "
            f"the model has {', '.join(map(repr, found)) or 'none'}"
        )
    chosen = found if layers is None else {name: found[name] for name in layers}
    attended = attended_positions(batch)
    watched = _watched(model, chosen)
    sums: dict[str, tuple[Tensor, int]] = {}

    def on_call(call: Call) -> None:
        for name in watched[call.module]:
            mean = _mean_activation(name, chosen[name], call, batch.size, attended)
            before, calls = sums.get(name, (torch.zeros_like(mean), 0))
            sums[name] = (before + mean, calls + 1)

    with preserved(model), torch.no_grad(), without_fused_attention():
        model.eval()
        with recording(watched, on_call):
            outputs = batch.outputs(model)
    # In the model's own order, whatever the order of the calls.
    seen = [name for name in chosen if name in sums]
    if not seen:
        raise ValueError("the forward pass called none of the layers, so there are no units to record")
    units = [(name, unit) for name in seen for unit in range(sums[name][0].shape[1])]
    return UnitActivations(torch.cat([sums[name][0] / sums[name][1] for name in seen], 1), units, outputs)


def attended_positions(batch: Batch) -> Tensor | None:
    """The batch's ``attention_mask`` if it is a tensor [N, T], True where a position is attended."""
    mask = batch.kwargs.get("attention_mask")
    if mask is None and len(batch.args) == 1 and isinstance(batch.args[0], Mapping):
        mask = batch.args[0].get("attention_mask")
    return mask > 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _watched(model: nn.Module, chosen: dict[str, nn.Module]) -> dict[nn.Module, list[str]]:
    """The layers that each module's calls tell about: its own, or an attention's two projections."""
    parents = {m.out_proj: m for m in model.modules() if is_attention(m)}
    watched: dict[nn.Module, list[str]] = {}
    for name, module in chosen.items():
        # torch calls an attention's output projection through its weight, never as a module.
        watched.setdefault(parents.get(module, module), []).append(name)
    return watched


def _mean_activation(name: str, layer: nn.Module, call: Call, size: int, attended: Tensor | None) -> Tensor:
    """[N, units] of one call of the layer, or of the attention that it belongs to."""
    output: Any = call.output
    if isinstance(call.module, nn.MultiheadAttention):
        given = attention.arguments(call)
        if given["query"].dim() != 3:
            raise ValueError(f"{name}: an attention called without a batch has no axis of samples")
        if layer is call.module:
            # A projection is linear, so the mean of its outputs is its output for the mean input.
            rows = [attention.samples_first(call.module, given[k]) for k in ("query", "key", "value")]
            means = [_mean(name, x, size, attended)[:, None] for x in rows]
            return torch.cat([x[:, 0] for x in attention.projected(call.module, means)], 1)
        output = attention.samples_first(call.module, output[0])
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        _require_samples(name, output, size)
        return output.flatten(2).mean(2)  # type: ignore[no-any-return]
    return _mean(name, output, size, attended)


def _mean(name: str, output: Tensor, size: int, attended: Tensor | None) -> Tensor:
    """[N, units] from [N, ..., units]: the mean over the positions, of a sequence over the attended ones."""
    _require_samples(name, output, size)
    if attended is not None and output.dim() == 3 and output.shape[1] == attended.shape[1]:
        weights = attended.to(output.dtype) / attended.sum(1, keepdim=True).clamp(min=1)
        return torch.einsum("nt,ntu->nu", weights, output)
    return output.reshape(size, -1, output.shape[-1]).mean(1)


def _require_samples(name: str, output: Tensor, size: int) -> None:
    if output.dim() < 2 or len(output) != size:
        raise ValueError(
            f"layer {name} returns {list(output.shape)} for a batch of {size} samples; "
            "unit activations need the samples along its first axis; name the layers that have them there in layers="
        )
