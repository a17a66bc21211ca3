"""Perturbed copies of one sample: Gaussian noise on continuous inputs, replaced tokens on texts.

All draws are made on the CPU by the generator given, so that every device sees the same copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import (
    KeyPath,
    MappingKey,
    keystr,
    tree_flatten_with_path,
    tree_map_only,
    tree_map_with_path,
)

from fastunlearn.activations import attended_positions
from fastunlearn.data import Batch
from fastunlearn.hooks import Call, preserved, recording, without_fused_attention

# Share of a text's attended positions that is replaced in each copy, as in the pretraining of BERT.
_SHARE = 0.15


@dataclass(frozen=True)
class Perturbation:
    """How copies of a sample differ from it; make one with :meth:`for_sample`.

    Attributes:
        noise: standard deviation of the Gaussian noise, in the units of the input.
        path: where the token ids are in (args, kwargs); None when the noise is Gaussian.
        tokens: positions replaced per copy; None for 15 % of the attended ones, at least 1.
        vocabulary: int64 [V], the ids that tokens are replaced by, without ``protected`` and without duplicates.
        protected: ids of special tokens, whose positions are left alone.
    """

    noise: float
    path: KeyPath | None = None
    tokens: int | None = None
    vocabulary: Tensor | None = None
    protected: frozenset[int] = frozenset()

    @classmethod
    def for_sample(
        cls,
        model: nn.Module,
        sample: Batch,
        noise: float,
        tokens: int | None = None,
        vocabulary: Sequence[int] | None = None,
        protected: Sequence[int] = (),
    ) -> Perturbation:
        """What suits the inputs of ``sample``, a batch of one.

        Gaussian noise if any input is floating point, masks left out; else token replacement in ``input_ids``, or in
        the only other integer input [1, T]. Masks, ``token_type_ids`` and ``position_ids`` are never perturbed.
        ``vocabulary`` None: every row of the input embedding, found by one forward pass where the model has no
        ``get_input_embeddings()``; its ``padding_idx`` is protected.

        Raises TypeError for integer inputs that are no tokens, or whose embedding is not found and ``vocabulary`` is
        not given; ValueError for a vocabulary of fewer than 2 ids that are not protected.
        """
        inputs = _inputs(sample)
        if any(value.is_floating_point() for _, value in inputs):
            return cls(noise)
        path, ids = _token_input(inputs)
        known = set(protected)
        if vocabulary is None:
            embedding = _input_embedding(model, sample, ids)
            if embedding is None:
                raise TypeError(
                    f"an input is {ids.dtype} and no nn.Embedding reads it, so it cannot be perturbed: give the model "
                    "floating-point inputs (images / 255), or vocabulary= if they are token ids"
                )
            vocabulary = range(len(embedding.weight))  # type: ignore[arg-type]
            padding = getattr(embedding, "padding_idx", None)
            known |= set() if padding is None else {padding}
        allowed = sorted(set(vocabulary) - known)
        if len(allowed) < 2:
            raise ValueError(f"vocabulary has {len(allowed)} ids that are not protected; replacing needs 2 or more")
        return cls(noise, path, tokens, torch.tensor(allowed), frozenset(known))

    def copies(self, sample: Batch, count: int, generator: torch.Generator) -> Batch:
        """``count`` perturbed copies of a batch of one sample, their targets and masks those of the sample.

        Text: each copy has exactly ``tokens`` positions replaced, each by another id than it had; positions are
        drawn without replacement from the attended ones that hold no protected id (all of them, if there are
        fewer). Raises ValueError if there is none.
        """
        if self.path is None or self.vocabulary is None:
            return self._noisy(sample, count, generator)

        def change(path: KeyPath, value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            repeated = _repeated(value, count)
            return self._replaced(repeated, sample, generator) if path == self.path else repeated

        args, kwargs = tree_map_with_path(change, (sample.args, sample.kwargs))
        return Batch(args, kwargs, _repeated(sample.targets, count), count)

    def _noisy(self, sample: Batch, count: int, generator: torch.Generator) -> Batch:
        def change(path: KeyPath, value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            repeated = _repeated(value, count)
            if not value.is_floating_point() or _is_mask(path):
                return repeated
            return value + self.noise * torch.randn(repeated.shape, generator=generator, dtype=value.dtype).to(
                value.device
            )

        args, kwargs = tree_map_with_path(change, (sample.args, sample.kwargs))
        return Batch(args, kwargs, _repeated(sample.targets, count), count)

    def _replaced(self, ids: Tensor, sample: Batch, generator: torch.Generator) -> Tensor:
        """Copies [count, T] with tokens replaced, on the device of ``ids``."""
        assert self.vocabulary is not None
        free = ~torch.isin(ids[0].cpu(), torch.tensor(sorted(self.protected), dtype=ids.dtype))
        attended = attended_positions(sample)
        if attended is None or attended.shape != ids[:1].shape:
            attended = torch.ones_like(ids[:1], dtype=torch.bool)
        free &= attended[0].cpu()
        places = free.nonzero()[:, 0]
        if not len(places):
            raise ValueError("every attended token is protected, so none can be replaced")
        tokens = max(1, int(_SHARE * int(attended.sum()))) if self.tokens is None else self.tokens
        drawn = torch.rand(len(ids), len(places), generator=generator).argsort(dim=1, stable=True)[:, :tokens]
        picked = places[drawn]  # [count, tokens]
        copies = ids.cpu().clone()
        old = copies.gather(1, picked)
        # Uniform over the other ids of the vocabulary: draw from one fewer and step over the present one.
        rank = torch.searchsorted(self.vocabulary, old.long())
        known = self.vocabulary[rank.clamp(max=len(self.vocabulary) - 1)] == old
        draw = torch.rand(picked.shape, generator=generator, dtype=torch.float64)
        index = (draw * (len(self.vocabulary) - known.long())).long()
        index += (known & (index >= rank)).long()
        return copies.scatter_(1, picked, self.vocabulary[index].to(ids.dtype)).to(ids.device)


def require_finite_inputs(sample: Batch, what: str) -> None:
    """Raise ValueError when a floating-point input of the sample holds NaN or Inf, masks left out."""
    for _, value in _inputs(sample):
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{what} has NaN or Inf in an input")


def _inputs(sample: Batch) -> list[tuple[KeyPath, Tensor]]:
    """The sample's input tensors that may be perturbed, with where they are."""
    leaves = tree_flatten_with_path((sample.args, sample.kwargs))[0]
    return [(path, value) for path, value in leaves if isinstance(value, Tensor) and not _is_mask(path, value)]


def _is_mask(path: KeyPath, value: Tensor | None = None) -> bool:
    """Masks, by name (additive ones are floating point) or by type, and the ids that number segments and positions."""
    name = next((str(key.key) for key in reversed(path) if isinstance(key, MappingKey)), "")
    return (
        "mask" in name
        or name in ("token_type_ids", "position_ids")
        or (value is not None and value.dtype == torch.bool)
    )


def _token_input(inputs: list[tuple[KeyPath, Tensor]]) -> tuple[KeyPath, Tensor]:
    named = [(path, value) for path, value in inputs if path and path[-1] == MappingKey("input_ids")]
    candidates = named or inputs
    if len(candidates) == 1 and candidates[0][1].dim() == 2 and not candidates[0][1].is_complex():
        return candidates[0]
    found = ", ".join(f"{value.dtype} {list(value.shape)} at {keystr(path)}" for path, value in inputs) or "none"
    raise TypeError(
        f"an input is integer but not one of token ids [N, T]; inputs found: {found}. Give the model floating-point "
        "ones (images / 255), or name the token ids input_ids"
    )


def _input_embedding(model: nn.Module, sample: Batch, ids: Tensor) -> nn.Module | None:
    """The module that turns these ids into vectors."""
    getter = getattr(model, "get_input_embeddings", None)
    try:
        embedding = getter() if callable(getter) else None
    except NotImplementedError:  # what transformers raises where it does not know
        embedding = None
    if isinstance(getattr(embedding, "weight", None), Tensor):
        return embedding
    readers: list[nn.Module] = []

    def on_call(call: Call) -> None:
        # Transposed or flattened, a batch of one has its ids in the same order.
        if call.input.numel() == ids.numel() and torch.equal(call.input.reshape(-1), ids.reshape(-1)):
            readers.append(call.module)

    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if not tables:
        return None
    with preserved(model), torch.no_grad(), without_fused_attention(), recording(tables, on_call):
        model.eval()
        sample.outputs(model)
    return readers[0] if readers else None


def _repeated(values: Any, count: int) -> Any:
    """Copies in memory of their own, for models that ask for a view of what they are given."""
    return tree_map_only(Tensor, lambda t: t.expand(count, *t.shape[1:]).contiguous(), values)
