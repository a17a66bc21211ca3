"""Perturbed copies: which inputs change, where, and by how much."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastunlearn.data import Batch
from fastunlearn.perturb import Perturbation, require_finite_inputs

PAD, CLS, SEP = 0, 1, 2


class Reader(nn.Module):
    """Reads token ids, transposed, besides tables for positions and segments; ``other`` is never read."""

    def __init__(self, rows: int = 30, padding: int | None = None) -> None:
        super().__init__()
        self.positions = nn.Embedding(64, 4)
        self.segments = nn.Embedding(2, 4)
        self.other = nn.Embedding(99, 4)
        self.words = nn.Embedding(rows, 4, padding_idx=padding)

    def forward(self, input_ids: Tensor, attention_mask: Any = None, token_type_ids: Any = None) -> Tensor:
        words = self.words(input_ids.T).transpose(0, 1)
        result: Tensor = (words + self.positions(torch.arange(input_ids.shape[1]))).mean(1)
        return result if token_type_ids is None else result + self.segments(token_type_ids).mean(1)


def text(length: int, attended: int) -> Batch:
    ids = torch.arange(3, 3 + length)[None] % 27 + 3
    ids[0, 0], ids[0, attended - 1] = CLS, SEP
    ids[0, attended:] = PAD
    mask = (torch.arange(length)[None] < attended).long()
    return Batch((), {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)},
                 torch.tensor([1]), 1)  # fmt: skip


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), length=st.integers(3, 40), seed=st.integers(0, 10**6))
def test_replaced_tokens_are_exactly_so_many_attended_ones_and_never_special(data: Any, length: int, seed: int) -> None:
    attended = data.draw(st.integers(3, length))
    tokens = data.draw(st.one_of(st.none(), st.integers(1, attended - 2)))
    sample = text(length, attended)
    ids, mask = sample.kwargs["input_ids"], sample.kwargs["attention_mask"]
    way = Perturbation.for_sample(Reader(), sample, 0.1, tokens, protected=(PAD, CLS, SEP))
    copies = way.copies(sample, 7, generator(seed))
    changed = copies.kwargs["input_ids"] != ids
    assert changed.sum(1).tolist() == [tokens or max(1, int(0.15 * attended))] * 7
    assert not changed[:, mask[0] == 0].any() and not changed[:, 0].any() and not changed[:, attended - 1].any()
    assert not torch.isin(copies.kwargs["input_ids"][changed], torch.tensor([PAD, CLS, SEP])).any()
    assert copies.kwargs["input_ids"].max() < 30
    for name in ("attention_mask", "token_type_ids"):
        assert torch.equal(copies.kwargs[name], sample.kwargs[name].expand(7, -1))
    assert torch.equal(copies.targets, torch.ones(7, dtype=torch.int64)) and copies.size == 7


def test_every_other_word_is_as_likely_and_so_is_every_position() -> None:
    sample = Batch((torch.tensor([[3, 4, 5, 6]]),), {}, None, 1)
    way = Perturbation.for_sample(Reader(8), sample, 0.1, 1, protected=(0, 7))
    copies = way.copies(sample, 20_000, generator()).args[0]
    changed = copies != sample.args[0]
    assert torch.allclose(changed.double().mean(0), torch.full((4,), 0.25).double(), atol=0.01)
    words = copies[changed[:, 0], 0].bincount(minlength=8) / changed[:, 0].sum()
    assert torch.allclose(words, torch.tensor([0, 0.2, 0.2, 0, 0.2, 0.2, 0.2, 0]), atol=0.02)


def test_a_word_outside_the_vocabulary_is_replaced_by_any_word_of_it() -> None:
    sample = Batch((torch.tensor([[20, 1]]),), {}, None, 1)
    way = Perturbation.for_sample(nn.Identity(), sample, 0.1, 2, vocabulary=[9, 5, 9])
    copies = way.copies(sample, 100, generator()).args[0]
    assert set(copies.flatten().tolist()) == {5, 9}


def test_the_vocabulary_is_the_table_that_reads_the_ids_and_its_padding_is_protected() -> None:
    sample = text(9, 6)
    way = Perturbation.for_sample(Reader(17, padding=PAD), sample, 0.1)
    assert way.vocabulary is not None and way.vocabulary.tolist() == list(range(1, 17)) and way.protected == {PAD}

    class Named(Reader):
        def get_input_embeddings(self) -> nn.Module:
            return self.other

    named = Perturbation.for_sample(Named(), sample, 0.1).vocabulary
    assert named is not None and len(named) == 99


def test_copies_are_seeded_and_leave_the_sample_and_the_random_state_alone() -> None:
    model, sample = Reader(40), text(30, 30)
    before, state = sample.kwargs["input_ids"].clone(), torch.get_rng_state()
    way = Perturbation.for_sample(model, sample, 0.1)
    one, same, other = (way.copies(sample, 5, generator(s)).kwargs["input_ids"] for s in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(sample.kwargs["input_ids"], before) and torch.equal(torch.get_rng_state(), state)


def test_gaussian_noise_has_the_stated_deviation_and_spares_masks_and_integers() -> None:
    inputs = {"x": torch.ones(1, 50), "attention_mask": torch.ones(1, 50), "kind": torch.ones(1, 50).long()}
    sample = Batch((), inputs, torch.zeros(1), 1)
    copies = Perturbation.for_sample(nn.Identity(), sample, 0.3).copies(sample, 400, generator())
    assert float((copies.kwargs["x"] - 1).std()) == pytest.approx(0.3, rel=0.03)
    assert float(copies.kwargs["x"].mean()) == pytest.approx(1, abs=0.01)
    assert copies.kwargs["attention_mask"].eq(1).all() and copies.kwargs["kind"].eq(1).all()
    assert copies.targets.shape == (400,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_noise_keeps_the_dtype(dtype: torch.dtype) -> None:
    sample = Batch((torch.zeros(1, 3, dtype=dtype),), {}, None, 1)
    assert Perturbation.for_sample(nn.Identity(), sample, 0.1).copies(sample, 2, generator()).args[0].dtype == dtype


@pytest.mark.parametrize("value", [torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.zeros(1, 5, dtype=torch.uint8)])
def test_integers_that_are_no_tokens_are_refused(value: Tensor) -> None:
    sample = Batch((value,), {}, None, 1)
    with pytest.raises(TypeError, match=r"an input is .*floating-point"):
        Perturbation.for_sample(nn.Linear(5, 2), sample, 0.1)


def test_two_integer_inputs_are_told_apart_by_name_only() -> None:
    a, b = torch.ones(1, 4).long(), torch.ones(1, 4).long()
    way = Perturbation.for_sample(Reader(), Batch((), {"input_ids": a, "kind": b}, None, 1), 0.1, vocabulary=range(9))
    copies = way.copies(Batch((), {"input_ids": a, "kind": b}, None, 1), 3, generator())
    assert (copies.kwargs["input_ids"] != 1).sum() == 3 and copies.kwargs["kind"].eq(1).all()
    with pytest.raises(TypeError, match="name the token ids input_ids"):
        Perturbation.for_sample(Reader(), Batch((), {"ids": a, "kind": b}, None, 1), 0.1)


def test_nothing_to_replace_is_refused() -> None:
    sample = Batch((torch.tensor([[CLS, SEP]]),), {}, None, 1)
    way = Perturbation.for_sample(Reader(), sample, 0.1, protected=(CLS, SEP))
    with pytest.raises(ValueError, match="protected"):
        way.copies(sample, 2, generator())
    with pytest.raises(ValueError, match="vocabulary has 1 ids"):
        Perturbation.for_sample(Reader(), sample, 0.1, vocabulary=[4, 4])


def test_nan_in_an_input_is_named_but_an_additive_mask_may_be_infinite() -> None:
    mask = torch.tensor([[0.0, -torch.inf]])
    require_finite_inputs(Batch((), {"x": torch.zeros(1, 2), "attention_mask": mask}, None, 1), "sample 3")
    with pytest.raises(ValueError, match="sample 3 has NaN"):
        require_finite_inputs(Batch((torch.tensor([[torch.nan]]),), {}, None, 1), "sample 3")
