"""The loss of causal language models against torch's own and plain formulas, and what it allocates."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastunlearn import language
from fastunlearn.data import Batch, FirstSamples, cross_entropy, read
from fastunlearn.language import causal_lm_loss, causal_lm_loss_by_position, is_causal_lm, loss_for, predictions
from fastunlearn.parallel.deal import deal
from fastunlearn.parallel.ranks import Ranks
from fastunlearn.rules import rule_of


def drawn(
    n: int, length: int, classes: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, length, classes, generator=generator, dtype=torch.float64)
    return logits.to(dtype).requires_grad_(), torch.randint(0, classes, (n, length), generator=generator)


def plain(logits: Tensor, labels: Tensor) -> Tensor:
    """One sequence at a time, by torch's own mean; 0 without labels."""
    found = []
    for own, wanted in zip(logits, labels, strict=True):
        empty = not bool((wanted[1:] != -100).any())
        found.append(own.sum() * 0 if empty else F.cross_entropy(own[:-1], wanted[1:]))
    return torch.stack(found)


# ---- the loss ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 23, 1 << 22])
@pytest.mark.parametrize("shape", [(1, 1, 2), (1, 2, 3), (3, 7, 5), (4, 5, 11)])
def test_the_loss_of_a_sequence_is_the_mean_over_its_labelled_positions(
    shape: tuple[int, int, int], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language, "_CHUNK", chunk)
    logits, labels = drawn(*shape)
    labels[torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)) < 0.3] = -100
    labels[-1] = -100  # a sequence without any
    weights = torch.arange(1.0, shape[0] + 1, dtype=torch.float64)
    ours, theirs = causal_lm_loss(logits, labels), plain(logits, labels)
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
    found, wanted = (torch.autograd.grad((loss * weights).sum(), logits)[0] for loss in (ours, theirs))
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)
    assert not bool(found[-1].any()) and float(ours[-1].detach()) == 0


def test_the_first_label_is_never_scored() -> None:
    logits, labels = drawn(2, 4, 5)
    other = labels.clone()
    other[:, 0] = (other[:, 0] + 1) % 5
    assert torch.equal(causal_lm_loss(logits, labels), causal_lm_loss(logits, other))


def test_by_position_label_t_is_measured_under_the_logits_before_it() -> None:
    logits, labels = drawn(3, 6, 4)
    labels[1, 2] = -100
    wanted = torch.zeros(3, 6, dtype=torch.float64)
    for n in range(3):
        for t in range(1, 6):
            if labels[n, t] != -100:
                wanted[n, t] = -logits.detach()[n, t - 1].log_softmax(0)[labels[n, t]]
    torch.testing.assert_close(causal_lm_loss_by_position(logits, labels).detach(), wanted, rtol=1e-13, atol=1e-13)


def test_first_and_second_derivatives_are_those_of_the_loss() -> None:
    logits, labels = drawn(2, 3, 4)
    labels[0, 1] = -100
    assert gradcheck(lambda x: causal_lm_loss(x, labels), logits)
    assert gradgradcheck(lambda x: causal_lm_loss(x, labels), logits)


def test_the_gradient_is_the_same_with_and_without_a_graph_of_it() -> None:
    logits, labels = drawn(2, 5, 7)
    plainly, again = (
        torch.autograd.grad(causal_lm_loss(logits, labels).sum(), logits, create_graph=graph)[0]
        for graph in (False, True)
    )
    torch.testing.assert_close(plainly, again.detach(), rtol=1e-13, atol=1e-15)


def test_many_output_gradients_at_once_by_vmap() -> None:
    logits, labels = drawn(3, 4, 5)
    (rows,) = torch.autograd.grad(causal_lm_loss(logits, labels), logits, torch.eye(3).double(), is_grads_batched=True)
    (whole,) = torch.autograd.grad(causal_lm_loss(logits, labels).sum(), logits)
    torch.testing.assert_close(rows.sum(0), whole, rtol=1e-13, atol=1e-15)
    assert not bool(rows[0, 1:].any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_lose_no_more_than_their_own_rounding(dtype: torch.dtype) -> None:
    logits, labels = drawn(3, 9, 50, dtype)
    wide = logits.detach().double().requires_grad_()
    ours = causal_lm_loss(logits, labels)
    exact = plain(wide, labels)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-6)
    (found,) = torch.autograd.grad(ours.sum(), logits)
    (wanted,) = torch.autograd.grad(exact.sum(), wide)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_a_nan_where_nothing_is_scored_is_not_seen() -> None:
    logits, labels = drawn(2, 4, 3)
    with torch.no_grad():
        logits[0, 2:] = torch.nan  # predicts label 3 and what comes after
    labels[0, 3] = -100
    loss = causal_lm_loss(logits, labels)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert bool(torch.isfinite(loss).all()) and not bool(grad[0, 2:].any())
    (grad,) = torch.autograd.grad(causal_lm_loss(logits, labels).sum(), logits, create_graph=True)
    assert not bool(grad[0, 2:].any())


# ---- memory -----------------------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Bytes of the largest tensors that come into being."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in given:
                self.sizes.append(t.untyped_storage().nbytes())
        return out


def test_nothing_as_large_as_the_logits_is_allocated_but_their_gradient() -> None:
    logits, labels = drawn(4, 32, 4096, torch.bfloat16)
    whole = logits.numel() * logits.element_size()
    chunk = 4 * 4 * 4096  # float32, one position of four sequences
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language, "_CHUNK", 4 * 4096)
        with Allocations() as forward:
            loss = causal_lm_loss(logits, labels).sum()
        with Allocations() as backward:
            torch.autograd.backward(loss)
    assert max(forward.sizes) <= chunk < whole
    assert [size for size in backward.sizes if size > chunk] == [whole]  # in bfloat16, once


def test_only_the_logits_and_two_numbers_per_position_are_kept_for_the_backward_pass() -> None:
    logits, labels = drawn(4, 32, 512, torch.bfloat16)
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = causal_lm_loss(logits, labels)
    assert kept.pop(logits.untyped_storage().data_ptr()) == logits.untyped_storage().nbytes()
    assert sum(kept.values()) <= 4 * 32 * (8 + 8) + 4 * 8
    del loss


# ---- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (torch.zeros(2, 4, dtype=torch.int64), r"got torch.int64 \[2, 4\] for \[2, 5, 3\]"),
        (torch.zeros(2, dtype=torch.int64), r"labels of integers \[N, T\]"),
        (torch.zeros(2, 5), "got torch.float32"),
        ([[0] * 5] * 2, "got list"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        causal_lm_loss(torch.zeros(2, 5, 3), labels)


@pytest.mark.parametrize(("logits", "said"), [(torch.zeros(2, 5, 3).long(), "torch.int64"), ((1, 2), "tuple")])
def test_logits_that_are_none_are_refused(logits: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        causal_lm_loss(logits, torch.zeros(2, 5, dtype=torch.int64))


# ---- which models -----------------------------------------------------------------------------------------------


class TinyForCausalLM(nn.Linear):
    pass


class TinyLMHeadModel(nn.Linear):
    pass


class OwnName(TinyLMHeadModel):
    pass


class TinyWithLMHeadModel(nn.Linear):
    pass


class TinyForSequenceClassification(nn.Linear):
    pass


class XLNetLMHeadModel(nn.Linear):  # a permutation of the text, each position its own token
    pass


@pytest.mark.parametrize("kind", [TinyForCausalLM, TinyLMHeadModel, OwnName])
def test_causal_language_models_are_known_by_name_also_inside_wrappers(kind: type[nn.Linear]) -> None:
    model = kind(2, 2)
    wrapped = nn.DataParallel(model)
    for found in (model, wrapped, torch.compile(model), torch.compile(wrapped)):
        assert is_causal_lm(found)
        assert loss_for(found, None) is causal_lm_loss
        assert loss_for(found, None, by_position=True) is causal_lm_loss_by_position


@pytest.mark.parametrize("kind", [nn.Linear, TinyWithLMHeadModel, XLNetLMHeadModel, TinyForSequenceClassification])
def test_other_models_have_the_loss_they_had(kind: type[nn.Linear]) -> None:
    assert not is_causal_lm(kind(2, 2)) and not is_causal_lm(nn.Sequential(TinyForCausalLM(2, 2)))
    assert loss_for(kind(2, 2), None) is None


def test_the_loss_of_the_caller_is_kept() -> None:
    def own(outputs: Any, targets: Any) -> Tensor:
        return outputs.sum(1)

    assert loss_for(TinyForCausalLM(2, 2), own) is own


class RootMeanSquare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.randn(6)), 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


class NormedForCausalLM(nn.Sequential):
    pass


def sharded(rank: int) -> tuple[bool, bool, bool]:
    model = NormedForCausalLM(nn.Linear(6, 6), RootMeanSquare(), RootMeanSquare())
    fully_shard(model[1])  # by itself
    fully_shard(model)
    known = all(rule_of(norm) is not None for norm in (model[1], model[2]))
    return all(isinstance(p, DTensor) for p in model.parameters()), known, is_causal_lm(model)


def test_sharded_models_and_their_norms_are_known_without_gathering_a_weight() -> None:
    assert on_ranks(2, sharded) == [(True, True, True)] * 2


# ---- batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_padding_is_never_labelled(dtype: torch.dtype) -> None:
    ids = torch.arange(8).reshape(2, 4)
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]]).to(dtype)
    labels = ids.clone()
    labels[0, 0] = -100
    (batch,) = read([{"input_ids": ids, "attention_mask": mask, "labels": labels}], "batches", torch.device("cpu"))
    assert batch.targets.tolist() == [[-100, 1, 2, -100], [-100, -100, 6, 7]]
    assert labels.tolist() == [[-100, 1, 2, 3], [4, 5, 6, 7]]  # the caller's stay as they are
    assert torch.equal(batch.kwargs["attention_mask"], mask)


@pytest.mark.parametrize("labels", [torch.tensor([1, 0]), torch.rand(2, 4)])
def test_labels_of_whole_samples_are_left_alone(labels: Tensor) -> None:
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]])
    (batch,) = read([{"attention_mask": mask, "labels": labels}], "batches", torch.device("cpu"))
    assert torch.equal(batch.targets, labels)


def test_predictions_stand_beside_the_labels_that_they_predict() -> None:
    logits, labels = drawn(2, 5, 3)
    view, wanted = predictions(logits, labels)
    assert view.shape == (2, 3, 4) and wanted.shape == (2, 4)
    losses = F.cross_entropy(view, wanted, reduction="none")
    torch.testing.assert_close(losses, causal_lm_loss_by_position(logits, labels)[:, 1:], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("wrong", [-1, 3, 2**40])
def test_a_label_that_is_no_token_is_named(wrong: int) -> None:
    with pytest.raises(ValueError, match=f"label {wrong} is no token; they go from 0 to 2"):
        causal_lm_loss(torch.zeros(1, 2, 3), torch.tensor([[0, wrong]]))


def test_logits_and_labels_of_other_positions_are_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"\[1, 6, 3\] and \[1, 6\]; pass loss_fn="):  # of a classifier of tokens
        cross_entropy(torch.zeros(1, 6, 3), torch.zeros(1, 6, dtype=torch.int64))


class Collated(UserDict[str, Tensor]):
    """A mapping that is no dict, as transformers' BatchEncoding is."""


def test_what_collators_return_is_counted_and_split_like_a_dict() -> None:
    batch = Collated(x=torch.arange(3), labels=torch.arange(3))
    assert len(list(FirstSamples([batch] * 5, 4))) == 2
    (mine,) = deal([batch], Ranks(rank=1, size=2)).split
    assert {name: values.tolist() for name, values in mine.items()} == {"x": [1], "labels": [1]}


class Caching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 3)

    def forward(self, ids: Tensor, use_cache: bool = True) -> Tensor:
        self.cached = use_cache
        return self.table(ids)


def test_no_cache_is_asked_for_unless_the_batch_does() -> None:
    model, ids = Caching(), torch.tensor([[0, 1]])
    for wrapped in (model, nn.DataParallel(model), torch.compile(model, backend="eager")):
        Batch((ids,), {}, ids, 1).outputs(wrapped)
        assert not model.cached
    Batch((ids,), {"use_cache": True}, ids, 1).outputs(model)
    assert model.cached
    assert Batch((ids,), {}, ids, 1).outputs(torch.jit.script(nn.Embedding(4, 3))).shape == (1, 2, 3)


def test_a_token_beyond_the_vocabulary_is_an_error_of_one_line() -> None:
    with pytest.raises(ValueError, match=r"no embedding for an index in a batch of shape \[1, 2\]"):
        Batch((torch.tensor([[0, 4]]),), {}, None, 1).outputs(Caching())
