"""L-CODEC on Hugging Face encoders: texts are perturbed by replacing tokens; and on models that ranks hold."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from fastunlearn.methods.lcodec import LCodec

PAD, CLS, SEP, WORDS, LENGTH = 0, 1, 2, 30, 9
SETTINGS: dict[str, Any] = {
    "perturbations": 60, "damping": 0.05, "hessian": "gauss_newton", "protected": (CLS, SEP), "tokens": 2,
}  # fmt: skip


def texts(n: int = 30) -> dict[str, Tensor]:
    """[CLS] words [SEP] padding; the second token says which of 3 classes. One text is labelled wrongly."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(6, WORDS, (n, LENGTH), generator=generator)
    length = torch.randint(4, LENGTH, (n, 1), generator=generator)
    labels = torch.arange(n) % 3
    ids[:, 0], ids[:, 1] = CLS, 3 + labels
    ids.scatter_(1, length, SEP)
    mask = (torch.arange(LENGTH) <= length).long()
    labels[0] = 1
    return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids), "labels": labels}


def encoder(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    import transformers

    torch.manual_seed(0)
    data = texts()
    if kind == "bert":
        config: Any = transformers.BertConfig(
            vocab_size=WORDS, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
            max_position_embeddings=LENGTH, num_labels=3, pad_token_id=PAD,
        )  # fmt: skip
        return transformers.BertForSequenceClassification(config), data
    config = transformers.DistilBertConfig(
        vocab_size=WORDS, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=LENGTH, num_labels=3,
        pad_token_id=PAD,
    )  # fmt: skip
    data.pop("token_type_ids")
    return transformers.DistilBertForSequenceClassification(config), data


@cache
def _trained(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    model, data = encoder(kind)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(**data).loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval(), data


def problem(kind: str) -> tuple[nn.Module, list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """A trained encoder, the text to forget and the others."""
    model, data = _trained(kind)
    parts = ([{key: value[part] for key, value in data.items()}] for part in (slice(1), slice(1, None)))
    return copy.deepcopy(model), *parts  # type: ignore[return-value]


def losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        return F.cross_entropy(model(**inputs).logits, batch["labels"], reduction="none")


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_an_encoder_forgets_one_text_and_keeps_the_others(kind: str) -> None:
    model, (forget,), (retain,) = problem(kind)
    before, kept = losses(model, forget), losses(model, retain)
    outcome = LCodec(**SETTINGS).unlearn(model, [forget], [retain])
    (removal,) = outcome.details["removals"]
    assert removal["units"] and set(outcome.changed) <= {
        f"{name}.{part}" for name, _ in removal["units"] for part in ("weight", "bias")
    }
    after = losses(model, forget)
    assert removal["loss_before"] == pytest.approx(float(before), rel=1e-4)
    assert removal["loss_after"] == pytest.approx(float(after), rel=1e-4)
    assert float(after) > float(before)
    assert float((losses(model, retain) - kept).abs().mean()) < float(after - before)


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_copies_that_the_encoder_reads_have_words_replaced_and_nothing_else(kind: str) -> None:
    model, (forget,), (retain,) = problem(kind)
    read: list[Tensor] = []
    masks: list[Tensor] = []

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if len(kwargs["input_ids"]) == SETTINGS["perturbations"]:
            read.append(kwargs["input_ids"].clone())
            masks.append(kwargs["attention_mask"].clone())

    model.register_forward_pre_hook(hook, with_kwargs=True)
    LCodec(**SETTINGS).unlearn(model, [forget], [retain])
    (copies,), (mask,) = read, masks
    original = forget["input_ids"]
    changed = copies != original
    assert changed.sum(1).tolist() == [SETTINGS["tokens"]] * len(copies)
    assert not changed[:, torch.isin(original[0], torch.tensor([PAD, CLS, SEP]))].any()
    assert not torch.isin(copies[changed], torch.tensor([PAD, CLS, SEP])).any()
    assert torch.equal(mask, forget["attention_mask"].expand_as(mask))
    assert changed.any(0).sum() == original.ne(PAD).sum() - 2  # every word is replaced in some copy


def removed(rank: int, kind: str) -> tuple[dict[str, Any], Any]:
    model, forget, retain = problem(kind)
    outcome = LCodec(**SETTINGS).unlearn(DistributedDataParallel(model), forget, retain)
    return {name: p.detach().numpy() for name, p in model.named_parameters()}, outcome.changed


def test_ranks_of_ddp_end_in_the_bits_of_one_process() -> None:
    model, forget, retain = problem("distilbert")
    outcome = LCodec(**SETTINGS).unlearn(model, forget, retain)
    for weights, changed in on_ranks(2, removed, "distilbert"):
        assert changed == outcome.changed
        for name, parameter in model.named_parameters():
            assert (weights[name] == parameter.detach().numpy()).all(), name


def refused(rank: int) -> tuple[str, str, str, bool]:
    """What FSDP2, tensor parallelism and ranks with different samples are told; and whether the last are put back."""
    model, forget, retain = problem("distilbert")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    other = [{key: value[rank : rank + 1] for key, value in retain[0].items()}]
    with pytest.raises(ValueError) as different:
        LCodec(**SETTINGS).unlearn(DistributedDataParallel(model), other, retain)
    same = all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with pytest.raises(ValueError) as sharded:
        LCodec(**SETTINGS).unlearn(fully_shard(problem("distilbert")[0]), forget, retain)
    parallel = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    parallelize_module(parallel, init_device_mesh("cpu", (2,)), {"0": ColwiseParallel(), "1": RowwiseParallel()})
    x, y = torch.randn(4, 3), torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError) as split:
        LCodec(**SETTINGS).unlearn(parallel, [(x[:1], y[:1])], [(x, y)])
    return str(sharded.value), str(split.value), str(different.value), same


def test_parts_of_a_model_and_parts_of_the_samples_are_refused() -> None:
    for sharded, split, different, same in on_ranks(2, refused):
        assert "no double backward pass through FSDP2 (fully_shard)" in sharded and "\n" not in sharded
        assert "no double backward pass through tensor parallelism" in split
        assert "came to other weights on rank 1" in different and "the same samples" in different and same
