"""Texts as causal language models train on them: each is its own target."""

from __future__ import annotations

from dataclasses import replace

from fastunlearn.data import IGNORED
from fastunlearn.inputs.arrays import Named
from fastunlearn.inputs.samples import Samples


def next_tokens(samples: Samples) -> Samples:
    """The same texts with the labels [n, T] that causal language models are trained with, -100 on padding.

    Ids and classes stay, so that texts can be chosen by topic. What has labels of its own is returned as it is.
    Raises ValueError for what is no tokenized text.
    """
    values = samples.inputs.values if isinstance(samples.inputs, Named) else {}
    if "labels" in values:
        return samples
    if "input_ids" not in values:
        raise ValueError(
            f"{samples.source!r} holds no text, which is what a causal language model takes: name the column of texts "
            "with the option inputs"
        )
    labels = values["input_ids"]
    if "attention_mask" in values:
        labels = labels.masked_fill(values["attention_mask"] == 0, IGNORED)
    return replace(samples, inputs=replace(samples.inputs, values={**values, "labels": labels}))  # type: ignore[type-var]
