"""Which units a removal may move: those that the loss depends on, random ones, or all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fastunlearn.activations import unit_activations
from fastunlearn.codec import Foci, foci
from fastunlearn.data import Batch, LossFunction, per_sample_loss
from fastunlearn.language import loss_for
from fastunlearn.methods.block import unit_count
from fastunlearn.perturb import Perturbation

Unit = tuple[str, int]

# Share of a unit's spread added as noise before L-FOCI, so that the many equal zeros of a silent unit do not
# all take the same row for their nearest neighbour.
_JITTER = 1e-3


def all_units(layers: dict[str, nn.Module]) -> list[Unit]:
    """Every unit of the layers, in their order."""
    return [(name, unit) for name, module in layers.items() for unit in range(unit_count(module))]


def random_units(layers: dict[str, nn.Module], count: int, generator: torch.Generator) -> list[Unit]:
    """``count`` units drawn uniformly without replacement; all in a random order if there are fewer."""
    units = all_units(layers)
    return [units[i] for i in torch.randperm(len(units), generator=generator)[:count].tolist()]


def markov_blanket(
    model: nn.Module,
    layers: dict[str, nn.Module],
    samples: Sequence[tuple[Batch, Perturbation]],
    rows: int,
    batch_size: int,
    loss_fn: LossFunction | None,
    max_units: int,
    seed: int,
    generator: torch.Generator,
) -> dict[Unit, float]:
    """The units on which the mean loss of ``samples`` depends under perturbation, most informative first.

    Row k of the data has the k-th perturbed copy of every sample: the features are the means over the samples of
    each unit's activation, the response is the mean of their losses. L-FOCI (arXiv 2204.07655, section 4) chooses
    at most ``max_units`` and stops at the first that adds nothing.

    Returns:
        The units in the order chosen, each with the dependence T that it had then.

    Raises:
        ValueError: NaN or Inf in an activation or a loss; samples that call different layers.

    Cost: ``rows`` * samples forward passes without gradients; rows * units numbers held.
    """
    loss_fn = loss_for(model, loss_fn)
    values, losses = [], []
    units: list[Unit] | None = None
    for start in range(0, rows, batch_size):
        count = min(batch_size, rows - start)
        features: torch.Tensor | None = None
        response: torch.Tensor | None = None
        for sample, perturbation in samples:
            copies = perturbation.copies(sample, count, generator)
            recorded = unit_activations(model, copies, list(layers))
            if units is not None and recorded.units != units:
                raise ValueError("the samples of a group run different layers, so their units have no common mean")
            units = recorded.units
            with torch.no_grad():
                loss = per_sample_loss(loss_fn, recorded.outputs, copies.targets, copies.size)
            features = recorded.values if features is None else features + recorded.values
            response = loss if response is None else response + loss
        assert features is not None and response is not None
        values.append(features / len(samples))
        losses.append(response / len(samples))
    assert units is not None
    chosen: Foci = foci(torch.cat(values), torch.cat(losses), noise=_JITTER, seed=seed, max_features=max_units)
    return {units[j]: score for j, score in zip(chosen.indices, chosen.scores, strict=True)}
