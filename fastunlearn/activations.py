"""The units of a model as features: one column per output unit of a layer, its mean activation per sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastunlearn.data import Batch
from fastunlearn.hooks import Call, preserved, recording


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


def unit_activations(model: nn.Module, batch: Batch | Tensor, layers: Sequence[str] | None = None) -> UnitActivations:
    """Mean activation per sample of every output unit of a Linear and every filter of a convolution.

    Positions (sequence, height, width) are averaged, and so are the calls of a layer that runs more than
    once. The model runs in eval mode without gradients; modes, hooks and random state are put back.

    Args:
        model: any module.
        batch: a :class:`~fastunlearn.data.Batch`, or the inputs alone as one tensor [N, ...].
        layers: names of Linear, Conv1d or Conv2d layers; all by default.

    Returns:
        :class:`UnitActivations`; layers that were never called have no column.

    Raises:
        ValueError: an unknown layer; a layer whose output does not have the N samples first; no layer was
            called.

    Cost: one forward pass; N * units elements held. Source: arXiv 2204.07655, section 4.
    """
    if isinstance(batch, Tensor):
        batch = Batch((batch,), {}, None, len(batch))
    found = {
        name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d))
    }
    unknown = [name for name in layers or () if name not in found]
    if unknown:
        raise ValueError(
            f"{', '.join(map(repr, unknown))} is not a Linear, Conv1d or Conv2d layer; "
            f"the model has {', '.join(map(repr, found)) or 'none'}"
        )
    chosen = found if layers is None else {name: found[name] for name in layers}
    names = {id(module): name for name, module in chosen.items()}
    sums: dict[str, tuple[Tensor, int]] = {}
    size = batch.size

    def on_call(call: Call) -> None:
        name = names[id(call.module)]
        output: Tensor = call.output
        if output.dim() < 2 or len(output) != size:
            raise ValueError(
                f"layer {name} returns {list(output.shape)} for a batch of {size} samples; "
                "unit activations need the samples along its first axis"
            )
        if isinstance(call.module, nn.Linear):
            mean = output.reshape(size, -1, output.shape[-1]).mean(1)
        else:
            mean = output.flatten(2).mean(2)
        before, calls = sums.get(name, (torch.zeros_like(mean), 0))
        sums[name] = (before + mean, calls + 1)

    with preserved(model), torch.no_grad():
        model.eval()
        with recording(chosen.values(), on_call):
            outputs = batch.outputs(model)
    # In the model's own order, whatever the order of the calls.
    seen = [name for name in chosen if name in sums]
    if not seen:
        raise ValueError("the forward pass called none of the layers, so there are no units to record")
    units = [(name, unit) for name in seen for unit in range(sums[name][0].shape[1])]
    return UnitActivations(torch.cat([sums[name][0] / sums[name][1] for name in seen], 1), units, outputs)
