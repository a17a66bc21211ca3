"""Whether a model's layers still tell a class from the others: did only the head go quiet?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastunlearn import attention
from fastunlearn.activations import _mean, _watched, attended_positions, layers_with_units
from fastunlearn.data import Batch, Batches, read
from fastunlearn.hooks import Call, device_of, eager, preserved, recording, without_fused_attention


def linear_probe(
    model: nn.Module,
    fit: Batches,
    test: Batches,
    positive: int | Callable[[Any], Tensor],
    *,
    layers: Sequence[str] | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
    ridge: float = 0.01,
) -> dict[str, float]:
    """Per layer, how well a linear classifier on its outputs tells ``positive`` samples from the others.

    The outputs of a layer's units are averaged over positions, as :func:`fastunlearn.activations.unit_activations`
    does (over the attended ones where there is an ``attention_mask``, and over the calls of a layer that runs more
    than once), standardised, and given to a ridge regression of +1 and -1; its AUC on samples that it was not fitted to
    says what the layer knows: 0.5 nothing, 1.0 all. A class method may only silence the head: then the layers before
    it keep the AUC of the original model. A model that never saw the class does not have 0.5 either, its features
    tell new classes apart, too: compare with a retrained one.

    Args:
        model: any module; unchanged, in eval mode and without gradients while it is read.
        fit: re-iterable of ``(inputs, targets)`` or of dicts, to fit the probes to; best with as many positive samples
            as others, and more samples than a layer has units.
        test: the same of held-back samples, to measure on.
        positive: a class index, for targets int64 [N]; or a function from a batch's targets to bool [N].
        layers: names as :func:`fastunlearn.activations.layers_with_units` has them (Linear, convolutions, ``Conv1D``,
            projections of MultiheadAttention); by default all.
        transform: elementwise, of the outputs [N, ..., units] before they are averaged; ``torch.relu`` keeps what a
            ReLU behind the layer lets through.
        ridge: what the squared weights of the probe are multiplied with and added to its mean squared error.

    Returns:
        AUC by layer name, in the model's order; layers that the forward pass never calls are absent; NaN for a layer
        whose outputs are not all finite.

    Raises:
        ValueError: ``fit`` or ``test`` lacks positive samples or others; an unknown layer; a layer whose output does
            not have the samples first; no layer was called; ``ridge`` is not positive.
        TypeError: targets are not integers, ``positive`` does not return booleans, sets that can be read only once.

    Cost: one forward pass over each set; n * units values held per layer; per layer n d min(n, d) FLOPs to fit d units
    to n samples.
    """
    if not ridge > 0:
        raise ValueError(f"ridge must be above 0, got {ridge}")
    chosen = _chosen(model, layers)
    known, targets = _features(model, chosen, fit, "fit", positive, transform)
    unseen, expected = _features(model, chosen, test, "test", positive, transform)
    return {name: _auc(known[name], targets, unseen[name], expected, ridge) for name in chosen if name in known}


def _chosen(model: nn.Module, layers: Sequence[str] | None) -> dict[str, nn.Module]:
    found = layers_with_units(model)
    unknown = [name for name in layers or () if name not in found]
    if unknown:
        raise ValueError(
            f"{', '.join(map(repr, unknown))} is not a Linear, convolution, Conv1D or attention projection; "
            f"the model has {', '.join(map(repr, found)) or 'none'}"
        )
    return found if layers is None else {name: module for name, module in found.items() if name in layers}


def _features(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Batches,
    name: str,
    positive: int | Callable[[Any], Tensor],
    transform: Callable[[Tensor], Tensor] | None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Mean outputs by layer, float64 [n, units] on the CPU, and which samples are positive, bool [n]."""
    watched = _watched(model, dict(layers))
    found: dict[str, list[Tensor]] = {}
    labels: list[Tensor] = []
    with preserved(model), torch.no_grad(), without_fused_attention(), eager():
        model.eval()
        for batch in read(batches, name, device_of(model)):
            labels.append(_positives(batch, name, positive))
            for layer, means in _of_batch(model, layers, watched, batch, transform).items():
                found.setdefault(layer, []).append(means)
    if not found:
        raise ValueError("the forward pass called none of the layers, so there is nothing to probe")
    of_set = torch.cat(labels)
    if not 0 < int(of_set.sum()) < len(of_set):
        raise ValueError(
            f"{name} must hold positive samples and others, got {int(of_set.sum())} positive of {len(of_set)}"
        )
    return {layer: torch.cat(means) for layer, means in found.items()}, of_set


def _of_batch(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    watched: Mapping[nn.Module, list[str]],
    batch: Batch,
    transform: Callable[[Tensor], Tensor] | None,
) -> dict[str, Tensor]:
    calls: dict[str, list[Tensor]] = {}
    attended = attended_positions(batch)

    def on_call(call: Call) -> None:
        for name in watched[call.module]:
            outputs = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in _outputs(name, layers[name], call)]
            if transform is not None:
                outputs = [transform(x) for x in outputs]
            means = torch.cat([_mean(name, x, batch.size, attended) for x in outputs], 1)
            calls.setdefault(name, []).append(means)

    with recording(watched, on_call):
        batch.outputs(model)
    return {name: torch.stack(means).double().mean(0).cpu() for name, means in calls.items()}


def _outputs(name: str, layer: nn.Module, call: Call) -> list[Tensor]:
    """What the layer computes in this call, [N, ..., units]; of an attention's input projection, all three of it."""
    if isinstance(call.module, nn.MultiheadAttention):
        given = attention.arguments(call)
        if given["query"].dim() != 3:
            raise ValueError(f"{name}: an attention called without a batch has no axis of samples")
        if layer is not call.module:
            return [attention.samples_first(call.module, call.output[0])]
        inputs = [attention.samples_first(call.module, given[k]) for k in ("query", "key", "value")]
        return list(attention.projected(call.module, inputs))
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return [call.output.movedim(1, -1)]
    return [call.output]


def _positives(batch: Batch, name: str, positive: int | Callable[[Any], Tensor]) -> Tensor:
    if callable(positive):
        found = positive(batch.targets)
        if not isinstance(found, Tensor) or found.dtype != torch.bool:
            raise TypeError(
                f"positive must return a tensor of booleans, one per sample, got {_kind(found)} for targets of {name}"
            )
    else:
        if not isinstance(batch.targets, Tensor) or batch.targets.is_floating_point():
            raise TypeError(
                f"targets of {name} must be class indices, a tensor of integers, got {_kind(batch.targets)}; "
                "or give positive= a function of the targets"
            )
        found = batch.targets == positive
    if found.shape != (batch.size,):
        raise ValueError(
            f"positive must tell samples apart, shape [{batch.size}], got {list(found.shape)} for targets of {name}; "
            "give positive= a function of the targets that returns one boolean per sample"
        )
    return found.cpu()


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def _auc(known: Tensor, targets: Tensor, unseen: Tensor, expected: Tensor, ridge: float) -> float:
    from sklearn.linear_model import Ridge
    from sklearn.metrics import roc_auc_score

    if not bool(torch.isfinite(known).all() and torch.isfinite(unseen).all()):
        return float("nan")
    mean, deviation = known.mean(0), known.std(0)
    # A unit that was constant teaches nothing; in units of its deviation, which is rounding, it could decide all.
    constant = deviation <= 1e-12 * mean.abs()
    a, b = (((x - mean) / deviation).masked_fill(constant, 0) for x in (known, unseen))
    # Centred features need no intercept, and an AUC none either.
    probe = Ridge(alpha=ridge * len(a), fit_intercept=False).fit(a.numpy(), 2.0 * targets.numpy() - 1)
    return float(roc_auc_score(expected.numpy(), probe.predict(b.numpy())))
