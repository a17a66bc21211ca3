"""Class forgetting on text: a topic is what a corpus is about, and its perplexity what there is to lose."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastunlearn.language import causal_lm_loss_by_position, scored
from fastunlearn.methods.class_forgetting import ClassForgetting
from fastunlearn.subspace import GramAccumulator, collect_grams

# Ids: padding, beginning, 12 words of every topic, then 8 words of each topic alone.
PAD, BEGIN, COMMON, OWN = 0, 1, 12, 8
TOPICS = ("cooking", "sailing", "stars")
SIZE = 2 + COMMON + OWN * len(TOPICS)
LENGTH = 16


def corpus(topic: str, n: int, seed: int) -> dict[str, Tensor]:
    """Texts of 8 to 16 tokens, padded: common and own words in turn, each own word following from the one before."""
    generator = torch.Generator().manual_seed(1000 * TOPICS.index(topic) + seed)
    rules = torch.Generator().manual_seed(TOPICS.index(topic))
    follows = torch.randint(OWN, (OWN, 2), generator=rules)  # two words may follow an own word
    first = 2 + COMMON + OWN * TOPICS.index(topic)
    ids = torch.full((n, LENGTH), PAD)
    ids[:, 0] = BEGIN
    word = torch.randint(OWN, (n,), generator=generator)
    for t in range(1, LENGTH):
        if t % 2:
            ids[:, t] = first + word
        else:
            ids[:, t] = 2 + (word + torch.randint(2, (n,), generator=generator)) % COMMON
            word = follows[word, torch.randint(2, (n,), generator=generator)]
    mask = (torch.arange(LENGTH) < torch.randint(8, LENGTH + 1, (n, 1), generator=generator)).long()
    ids = ids * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask.bool(), ids, -100)}


def batches(*topics: str, n: int = 96, size: int = 32, seed: int = 0) -> list[dict[str, Tensor]]:
    rows = [corpus(topic, n, seed) for topic in topics]
    return [{key: value[i : i + size] for key, value in part.items()} for part in rows for i in range(0, n, size)]


def perplexity(model: Any, batch: dict[str, Tensor]) -> float:
    """exp of the mean loss over all labelled tokens."""
    with torch.no_grad():
        logits = model.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        losses = causal_lm_loss_by_position(logits, batch["labels"])
    return float((losses.double().sum() / scored(batch["labels"]).sum()).exp())


@cache
def _trained(tied: bool) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=SIZE, n_positions=LENGTH + 8, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, tie_word_embeddings=tied, bos_token_id=BEGIN, eos_token_id=None,
    )  # fmt: skip
    model: Any = transformers.GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(120):
        for batch in batches(*TOPICS, n=16, seed=100 + step):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    optimizer.zero_grad()
    return model.eval()


def trained(tied: bool) -> Any:
    return copy.deepcopy(_trained(tied))


METHOD = ClassForgetting(alpha_retain=50.0, alpha_forget=30.0)


def held_out() -> dict[str, dict[str, Tensor]]:
    return {topic: corpus(topic, 128, 1) for topic in TOPICS}


def retained(of: dict[str, float]) -> float:
    """One perplexity of both topics that stay."""
    return (of["sailing"] * of["stars"]) ** 0.5


@pytest.mark.parametrize(("tied", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_the_topic_is_forgotten_and_the_others_stay(tied: bool, dtype: torch.dtype) -> None:
    """At the alphas of a search on other texts that forget most while the rest loses 5 % at most."""
    model = trained(tied).to(dtype)
    forget, retain = batches("cooking"), batches("sailing", "stars")

    def score(measured: Any) -> dict[str, float]:
        """Mean probability of a token, in percent."""
        seen = {topic: perplexity(measured, corpus(topic, 64, 2)) for topic in TOPICS}
        return {"forget": 100 / seen["cooking"], "retain": 100 / retained(seen)}

    search = METHOD.search(model, forget, retain, (30.0, 100.0, 300.0), (10.0, 30.0, 100.0), score=score)
    fit = [point for point in search.points if point.accuracy["retain"] >= 0.95 * search.original["retain"]]
    best = min(fit, key=lambda point: point.accuracy["forget"])
    before = {topic: perplexity(model, batch) for topic, batch in held_out().items()}
    outcome = ClassForgetting(best.alpha_retain, best.alpha_forget).unlearn(model, forget, retain)
    after = {topic: perplexity(model, batch) for topic, batch in held_out().items()}
    assert all(p.dtype == dtype for p in model.parameters())
    forgotten, lost = after["cooking"] / before["cooking"] - 1, retained(after) / retained(before) - 1
    assert forgotten >= 0.12 and lost <= 0.05 and forgotten >= 3 * lost
    # The output layer is updated unless it is the embedding.
    assert ("lm_head" in outcome.details["untouched"]) == tied == ("lm_head.weight" not in outcome.changed)
    assert not any("wte" in name or "wpe" in name or "ln_" in name for name in outcome.changed)


@pytest.mark.parametrize("left", [False, True])
def test_padding_does_not_count_whatever_it_holds(left: bool) -> None:
    """On either side; positions are given, so that a text padded on the left is the same text."""

    def padded(batch: dict[str, Tensor], filler: int, width: int) -> dict[str, Tensor]:
        sides = (width, 0) if left else (0, width)
        values = {"input_ids": filler, "attention_mask": 0, "labels": -100}
        longer = {key: F.pad(batch[key], sides, value=value) for key, value in values.items()}
        longer["input_ids"] = torch.where(longer["attention_mask"].bool(), longer["input_ids"], filler)
        return {**longer, "position_ids": (longer["attention_mask"].cumsum(1) - 1).clamp(min=0)}

    models = [trained(False).double() for _ in range(2)]
    outcomes = [
        METHOD.unlearn(
            model,
            [padded(batch, filler, width) for batch in batches("cooking", n=32)],
            [padded(batch, filler, width) for batch in batches("stars", n=32)],
        )
        for model, filler, width in zip(models, (PAD, 7), (0, 5), strict=True)
    ]
    rows = int(sum(batch["attention_mask"].sum() for batch in batches("cooking", n=32)))
    for outcome in outcomes:
        assert {forget for _, forget in outcome.details["rows"].values()} == {rows}
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-9)


def chats(topic: str) -> list[dict[str, Tensor]]:
    """The first 6 tokens are the prompt, which is not scored."""
    return [
        {**batch, "labels": torch.where(torch.arange(LENGTH) < 6, -100, batch["labels"])}
        for batch in batches(topic, n=32)
    ]


def test_labelled_positions_are_those_that_predict_a_scored_label() -> None:
    """Position 5, the prompt's last, predicts the first scored label; the text's last position predicts none."""
    model = trained(False).double()
    seen: list[Tensor] = []
    layer = model.transformer.h[1].mlp.c_fc
    hook = layer.register_forward_hook(lambda module, args, output: seen.append(args[0].detach()))
    (batch,) = chats("cooking")
    with torch.no_grad():
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    hook.remove()
    kept = torch.cat([
        rows[5 : int(mask.sum()) - 1] for rows, mask in zip(seen[0], batch["attention_mask"], strict=True)
    ])  # fmt: skip
    found = collect_grams(model, [batch], ["transformer.h.1.mlp.c_fc"], positions="labelled")
    (gram,) = found.values()
    assert gram.rows_seen == len(kept) == int(scored(batch["labels"]).sum())
    assert isinstance(gram, GramAccumulator)
    assert torch.allclose(gram.gram[0], kept.mT @ kept, rtol=0, atol=1e-9)
    every = collect_grams(model, [batch], ["transformer.h.1.mlp.c_fc"])
    assert next(iter(every.values())).rows_seen == int(batch["attention_mask"].sum())


def test_prompts_are_left_out_of_what_is_forgotten_when_asked() -> None:
    outcomes = [
        ClassForgetting(positions=positions).unlearn(trained(False), chats("cooking"), chats("stars"))
        for positions in ("attended", "labelled")
    ]
    attended, labelled = (outcome.details["rows"]["lm_head"] for outcome in outcomes)
    assert attended[1] == int(chats("cooking")[0]["attention_mask"].sum())
    assert labelled[1] == int(scored(chats("cooking")[0]["labels"]).sum())
    assert outcomes[0].details["relative_change"] != outcomes[1].details["relative_change"]


def test_of_a_model_that_is_not_causal_a_position_is_scored_by_its_own_label() -> None:
    model = torch.nn.Linear(3, 2)
    x, labels = torch.randn(4, 5, 3), torch.tensor([[0, -100, 1, -100, -100]] * 4)
    (gram,) = collect_grams(model, [(x, labels)], positions="labelled").values()
    kept = x[:, [0, 2]].reshape(-1, 3).double()
    assert isinstance(gram, GramAccumulator)
    assert torch.allclose(gram.gram[0], kept.mT @ kept, rtol=0, atol=1e-12)


def test_labelled_positions_need_labels_of_positions() -> None:
    with pytest.raises(ValueError, match=r"needs labels \[N, T\] in every batch of forget"):
        collect_grams(torch.nn.Linear(3, 2), [(torch.randn(4, 3), torch.zeros(4))], name="forget", positions="labelled")
    with pytest.raises(ValueError, match="positions must be one of attended, labelled"):
        ClassForgetting(positions="all")  # type: ignore[arg-type]
