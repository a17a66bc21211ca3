"""Texts as causal language models train on them: each is its own target."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fastunlearn.data import IGNORED
from fastunlearn.inputs.arrays import Inputs
from fastunlearn.inputs.models import AUTO_CLASSES
from fastunlearn.inputs.options import INPUT_NAMES, TARGET_NAMES, DataOptions
from fastunlearn.inputs.samples import Samples

TOPIC_NAMES = (*TARGET_NAMES, "topic")


@dataclass(frozen=True, eq=False)
class OwnTargets:
    """Tokenized texts with the labels [n, T] of causal language models: their own tokens, -100 on padding."""

    inputs: Inputs

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, indices: Tensor) -> dict[str, Tensor]:
        """Those of ``indices`` [b], with ``labels``."""
        found = self.inputs.take(indices)
        assert isinstance(found, dict)
        tokens = found["input_ids"]
        return {**found, "labels": tokens.masked_fill(found.get("attention_mask", torch.ones(())) == 0, IGNORED)}

    def hashes(self) -> Iterator[bytes]:
        """Those of the texts."""
        return self.inputs.hashes()


def next_tokens(samples: Samples) -> Samples:
    """The same texts with the labels that causal language models are trained with.

    Ids and classes stay, so that texts can be chosen by topic. What has labels of its own is returned as it is.
    Raises ValueError for what is no tokenized text, and for labels of another shape than the tokens.
    """
    one = samples.inputs.take(torch.zeros(1, dtype=torch.int64))
    if not isinstance(one, dict) or "input_ids" not in one:
        raise ValueError(
            f"{samples.source!r} holds no text, which is what a causal language model takes: name the column of texts "
            "with the option inputs"
        )
    if "labels" not in one:
        return replace(samples, inputs=OwnTargets(samples.inputs))
    if one["labels"].shape != one["input_ids"].shape:
        raise ValueError(
            f"{samples.source!r} has labels {list(one['labels'].shape[1:])} for tokens "
            f"{list(one['input_ids'].shape[1:])}; a causal language model takes one label for each token"
        )
    return samples


def is_causal_folder(spec: str) -> bool:
    """Whether ``spec`` is a Hugging Face folder of a causal language model; no for a folder that can not be read."""
    try:
        config = json.loads((Path(spec) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # opening the model says what is wrong
        return False
    names = config.get("architectures") if isinstance(config, dict) else None
    causal = tuple(end for end, auto in AUTO_CLASSES.items() if auto == "AutoModelForCausalLM")
    return isinstance(names, list) and any(isinstance(name, str) and name.endswith(causal) for name in names)


def with_own_targets(spec: str, options: DataOptions) -> DataOptions:
    """For JSON lines of a causal language model: their topics are the targets, and without any the texts themselves.

    What ``options`` name stays; so do the options for other files. Cost: the first line is read.
    """
    if options.targets is not None or not spec.lower().endswith(".jsonl"):
        return options
    try:
        with open(spec, encoding="utf-8") as file:
            first = json.loads(file.readline())
    except (OSError, ValueError, RecursionError):  # opening the file says what is wrong
        return options
    names = list(first) if isinstance(first, dict) else []
    text = options.inputs or next((name for name in INPUT_NAMES if isinstance(first, dict) and name in first), None)
    target = next((name for name in TOPIC_NAMES if name in names and name != text), text)
    return options if target is None else replace(options, inputs=text, targets=target)
