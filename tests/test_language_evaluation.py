"""Perplexity, extraction, Min-K% and multiple choice of language models, against formulas and transformers' own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from fastunlearn.evaluate import language
from fastunlearn.evaluate.language import (
    Question,
    TokenLogProbs,
    accuracy_of,
    common_subsequence,
    extraction,
    greedy,
    language_metrics,
    min_k_attack,
    min_k_plus_scores,
    min_k_scores,
    multiple_choice,
    perplexity,
    perplexity_of,
    token_log_probs,
)
from fastunlearn.parallel.deal import deal

V = 23
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}


def gpt2(**more: Any) -> Any:
    import transformers  # here: ranks that need none start in milliseconds

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=V, n_positions=24, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5, **more
    )
    return transformers.GPT2LMHeadModel(config)


def llama(**more: Any) -> Any:
    import transformers

    torch.manual_seed(1)
    given = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None} | more
    config = transformers.LlamaConfig(
        vocab_size=V, num_key_value_heads=2, max_position_embeddings=24, initializer_range=0.5, **SIZES, **given
    )
    return transformers.LlamaForCausalLM(config)


def bloom() -> Any:
    """Takes no position_ids: it reads them off the mask."""
    import transformers

    torch.manual_seed(2)
    config = transformers.BloomConfig(
        vocab_size=V, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.5, eos_token_id=None
    )
    return transformers.BloomForCausalLM(config)


class Plain(nn.Module):
    """Logits alone, no mask, no cache: the embedding of a token and the mean of those before it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(V, 8)
        self.head = nn.Linear(8, V)

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        x = self.embedding(input_ids)
        counts = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        return self.head(x + x.cumsum(1) / counts)


class Lookup(nn.Module):
    """Logits by the last token alone, from a table [V, V] of logits."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.table[input_ids]


def batch(rows: list[list[int]], unlabelled: list[int] | None = None) -> dict[str, Tensor]:
    """Padded on the right; of each row the first ``unlabelled`` tokens are no labels."""
    width = max(map(len, rows))
    prompts = unlabelled or [0] * len(rows)
    return {
        "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
        "labels": torch.tensor(
            [[-100] * n + row[n:] + [-100] * (width - len(row)) for n, row in zip(prompts, rows, strict=True)]
        ),
    }


def rows(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, V, (n,), generator=generator).tolist() for n in lengths]


UNEVEN = [batch(rows([7, 1, 12, 3]), [0, 0, 5, 3]), batch(rows([2, 20], 1))]


# Log-probabilities and perplexity


@pytest.mark.parametrize("make", [gpt2, llama, Plain])
def test_log_probabilities_equal_the_formula_in_float64_token_by_token(make: Any) -> None:
    model = make().eval()
    found = token_log_probs(model, UNEVEN)
    assert found.lengths.tolist() == [6, 0, 7, 0, 1, 19] and len(found) == 6
    expected: list[tuple[float, float, float, bool]] = []
    for one in UNEVEN:
        for ids, mask, labels in zip(*one.values(), strict=True):
            real = ids[: int(mask.sum())][None]
            outputs = model(real)
            logits = getattr(outputs, "logits", outputs)[0].detach().double()
            for t in range(1, real.shape[1]):
                if labels[t] == -100:
                    continue
                p = logits[t - 1].exp() / logits[t - 1].exp().sum()
                mean = float((p * p.log()).sum())
                deviation = float((p * (p.log() - mean) ** 2).sum().sqrt())
                expected.append((float(p[labels[t]].log()), mean, deviation, int(p.argmax()) == int(labels[t])))
    for got, want in zip((found.log_probs, found.means, found.deviations), zip(*expected, strict=True), strict=False):
        torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=2e-5, atol=2e-6)
    assert found.correct.tolist() == [hit for *_, hit in expected]
    torch.testing.assert_close(torch.stack([s.sum() for s in found.sequences()]), found.sums(found.log_probs))


@pytest.mark.parametrize("make", [gpt2, llama])
def test_the_loss_is_that_of_transformers_and_perplexity_its_exponential(make: Any) -> None:
    model = make().eval()
    for one in UNEVEN:
        found = perplexity(model, [one])
        expected = float(model(**one).loss.detach())
        assert found.loss == pytest.approx(expected, rel=1e-5) and found.value.mean == pytest.approx(
            math.exp(found.loss)
        )
    both = perplexity(model, UNEVEN)
    assert both.tokens == 33 and both.losses.isnan().tolist() == [False, True, False, True, False, False]
    low, high = both.value.low, both.value.high
    assert low is not None and high is not None and low < both.value.mean < high


def test_halves_are_scored_in_float32() -> None:
    torch.manual_seed(0)
    table = (8 * torch.randn(V, V)).bfloat16()
    found = token_log_probs(Lookup(table), UNEVEN)
    exact = token_log_probs(Lookup(table.double()), UNEVEN)
    torch.testing.assert_close(found.log_probs, exact.log_probs, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(min_k_plus_scores(found), min_k_plus_scores(exact), rtol=1e-5, atol=1e-5, equal_nan=True)
    model = llama().bfloat16()
    assert perplexity(model, [UNEVEN[1]]).loss == pytest.approx(float(model(**UNEVEN[1]).loss.detach()), rel=1e-5)


def test_positions_scored_in_many_parts_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gpt2()
    whole = token_log_probs(model, UNEVEN)
    monkeypatch.setattr(language, "_MOST_LOGITS", 3 * V)
    parts = token_log_probs(model, UNEVEN)
    torch.testing.assert_close(parts.log_probs, whole.log_probs, rtol=1e-6, atol=1e-7)
    assert torch.equal(parts.lengths, whole.lengths)


def test_impossible_and_certain_tokens_have_infinite_and_no_surprise() -> None:
    table = torch.full((V, V), -math.inf)
    table[:, 5] = 0.0
    found = token_log_probs(Lookup(table), [batch([[1, 5, 5], [1, 5, 2]])])
    assert found.log_probs.tolist() == [0, 0, 0, -math.inf]
    assert not found.means.any() and not found.deviations.any()
    assert min_k_plus_scores(found, 1.0).tolist() == [0, -math.inf]
    told = perplexity_of(found)
    assert told.value.mean == math.inf and told.value.low is None
    json.dumps(told.as_dict()["perplexity"], allow_nan=False)


def test_the_model_is_put_back_and_carries_no_gradient() -> None:
    model = gpt2(attn_pdrop=0.5).train()
    state = torch.random.get_rng_state()
    once, twice = perplexity(model, UNEVEN), perplexity(model, UNEVEN)
    extraction(model, UNEVEN)
    assert once.loss == twice.loss and all(module.training for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_the_interval_of_perplexity_is_over_sequences() -> None:
    """Of sequences that repeat one token each, tokens would promise an interval that is far too narrow."""
    generator = torch.Generator().manual_seed(0)
    held = 0
    for seed in range(150):
        losses = 2 + torch.randn(60, generator=generator, dtype=torch.float64)
        log_probs = -losses.repeat_interleave(20)
        zeros = torch.zeros_like(log_probs)
        tokens = TokenLogProbs(log_probs, zeros, zeros, zeros.bool(), torch.full((60,), 20))
        value = perplexity_of(tokens, resamples=300, seed=seed).value
        assert value.low is not None and value.high is not None
        held += value.low <= math.exp(2) <= value.high
    assert 134 <= held <= 149  # 95 % less two percent for so few, with three standard errors


def test_one_sequence_has_no_interval() -> None:
    found = perplexity(gpt2(), [batch(rows([6]))])
    assert found.value.low is None and found.tokens == 5 and "nats per token of 5" in str(found)


@pytest.mark.parametrize("measure", [perplexity, extraction, lambda m, b: language_metrics(m, forget=b)])
@pytest.mark.parametrize("nothing", [batch(rows([1])), batch(rows([4, 5]), [4, 5])], ids=["one token", "all masked"])
def test_nothing_labelled_is_nothing_to_measure(measure: Any, nothing: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="no labelled token"):
        measure(gpt2(), [nothing])


def test_malformed_batches_and_outputs_are_refused() -> None:
    one = UNEVEN[0]
    with pytest.raises(ValueError, match=r"logits \[N, T, V\] on retain, \[4, 12\] labels; got \[4, 12\]"):
        token_log_probs(Named(), [one], "retain")
    with pytest.raises(ValueError, match="the label 23 is no token; they go from 0 to 22"):
        token_log_probs(gpt2(), [one | {"labels": one["labels"].masked_fill(one["labels"] == -100, V)}])
    with pytest.raises(TypeError, match="labels of batches must be token ids"):
        token_log_probs(gpt2(), [one | {"labels": one["labels"].float()}])
    with pytest.raises(ValueError, match=r"labels of batches must be token ids \[N, T\], got shape \[4\]"):
        token_log_probs(gpt2(), [one | {"labels": one["labels"][:, 0]}])
    with pytest.raises(ValueError, match="batches is empty"):
        token_log_probs(gpt2(), [])
    with pytest.raises(TypeError, match="iterator"):
        token_log_probs(gpt2(), iter(UNEVEN))
    with pytest.raises(ValueError, match=r"also \['token_type_ids'\]"):
        extraction(gpt2(), [one | {"token_type_ids": one["input_ids"]}])
    with pytest.raises(ValueError, match="prompt_tokens must be 1 or more, got 0"):
        extraction(gpt2(), UNEVEN, prompt_tokens=0)
    with pytest.raises(ValueError, match="resamples must be 2 or more"):
        perplexity(gpt2(), UNEVEN, resamples=1)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(V))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.weight[input_ids]


# Extraction


def generated(model: Any, prompt: list[int], length: int) -> list[int]:
    """By transformers, alone and without padding; -100 where it has ended before."""
    ids = torch.tensor([prompt])
    pad = model.config.eos_token_id if isinstance(model.config.eos_token_id, int) else 0
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=length, pad_token_id=pad
    )[0, len(prompt) :].tolist()
    return out + [-100] * (length - len(out))


@pytest.mark.parametrize("make", [gpt2, llama, bloom])
def test_greedy_decoding_is_that_of_generate_token_for_token(make: Any) -> None:
    model = make().eval()
    prompts, lengths = rows([3, 20, 1, 9, 2]), [5, 4, 23, 0, 13]
    found = greedy(model, [torch.tensor(p) for p in prompts], lengths)
    for prompt, length, own in zip(prompts, lengths, found, strict=True):
        assert len(own) == length and own.dtype == torch.int64
        assert own.tolist() == (generated(model, prompt, length) if length else [])


@pytest.mark.parametrize("make", [gpt2, llama])
def test_greedy_decoding_in_batches_is_that_of_generate_with_padding_on_the_left(make: Any) -> None:
    model = make().eval()
    prompts = rows([3, 11, 1])
    ids = torch.tensor([[0] * (11 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (11 - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0
    )
    found = greedy(model, [torch.tensor(p) for p in prompts], [12] * 3)
    assert torch.stack(found).tolist() == out[:, 11:].tolist()


@pytest.mark.parametrize("listed", [False, True])
def test_decoding_ends_where_generate_ends(listed: bool) -> None:
    model = llama().eval()
    said = greedy(model, [torch.tensor([4, 7])], [10])[0].tolist()
    end = said[4]
    ended = llama(eos_token_id=[end, 0] if listed else end).eval()
    own = greedy(ended, [torch.tensor([4, 7])], [10])[0].tolist()
    first = said.index(end)
    assert own == said[: first + 1] + [-100] * (9 - first)
    if not listed:
        assert own == generated(ended, [4, 7], 10)


def test_models_without_a_cache_are_run_again_for_every_token() -> None:
    model = Plain().eval()
    prompts, lengths = rows([3, 9, 1, 2]), [4, 2, 11, 0]
    for prompt, length, own in zip(
        prompts, lengths, greedy(model, list(map(torch.tensor, prompts)), lengths), strict=True
    ):
        ids = list(prompt)
        for _ in range(length):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        assert own.tolist() == ids[len(prompt) :]


@pytest.mark.parametrize("make", [gpt2, llama])
def test_decoding_without_the_cache_gives_what_it_gives_with_it(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts, lengths = make(), list(map(torch.tensor, rows([3, 9, 1]))), [4, 2, 11]
    with_cache = greedy(model, prompts, lengths)
    monkeypatch.setattr(language, "_with_cache", lambda *_: None)
    assert [own.tolist() for own in greedy(model, prompts, lengths)] == [own.tolist() for own in with_cache]


def test_the_prompt_is_what_comes_before_the_first_label() -> None:
    model = llama().eval()
    for one in UNEVEN:
        found = extraction(model, [one])
        for i, (ids, mask, labels) in enumerate(zip(*one.values(), strict=True)):
            real = ids[: int(mask.sum())].tolist()
            start = max(1, next((t for t in range(len(real)) if labels[t] != -100), len(real)))
            assert int(found.tokens[i]) == len(real) - start
            if start == len(real):
                assert math.isnan(found.overlap[i]) and math.isnan(found.rouge_l[i]) and not found.exact[i]
                continue
            said = generated(model, real[:start], len(real) - start)
            assert found.generated[i].tolist() == said
            same = [a == b for a, b in zip(said, real[start:], strict=True)]
            assert float(found.overlap[i]) == sum(same) / len(same)
            assert float(found.rouge_l[i]) == textbook_lcs(said, real[start:]) / len(same)


def test_a_number_of_prompt_tokens_takes_their_labels_away() -> None:
    model, texts = llama(), rows([9, 3, 4, 12])
    found = extraction(model, [batch(texts)], prompt_tokens=4)
    masked = extraction(model, [batch(texts, [4, 3, 4, 4])])
    assert found.tokens.tolist() == masked.tokens.tolist() == [5, 0, 0, 8]
    assert [g.tolist() for g in found.generated] == [g.tolist() for g in masked.generated]


def test_padding_on_the_left_is_no_part_of_the_prompt() -> None:
    texts = rows([9, 3, 12])
    right = batch(texts, [2, 1, 5])
    left = {
        name: torch.stack([row.roll(12 - len(text)) for row, text in zip(value, texts, strict=True)])
        for name, value in right.items()
    }
    ours, theirs = (extraction(gpt2(), [one]) for one in (right, left))
    assert [g.tolist() for g in ours.generated] == [g.tolist() for g in theirs.generated]


def test_of_a_conversation_the_first_answer_is_continued() -> None:
    one = batch(rows([12]), [3])
    one["labels"][0, 7:10] = -100  # the second question
    found = extraction(llama(), [one])
    assert found.tokens.tolist() == [4]


def successor() -> Lookup:
    """After token t it says t + 1, for certain."""
    return Lookup(50 * torch.eye(V).roll(1, 1))


def test_what_was_memorised_is_extracted_word_for_word() -> None:
    known = batch([list(range(2, 12)), list(range(5, 9))])
    found = extraction(successor(), [known])
    assert found.exact.all() and {name: e.mean for name, e in found.shares.items()} == dict.fromkeys(found.shares, 100)
    assert perplexity(successor(), [known]).value.mean == pytest.approx(1, abs=1e-6)
    assert "100" in str(found) and found.as_dict()["tokens"] == 12


def test_overlap_is_by_position_and_rouge_allows_for_shifts() -> None:
    # said after 3: 4 5 6 7 8
    shifted = extraction(successor(), [batch([[3, 9, 4, 5, 6, 7], [3, 4, 5, 9, 9, 9], [3, 4, 5, 6, 7, 8]])])
    assert shifted.overlap.tolist() == [0, 0.4, 1] and shifted.rouge_l.tolist() == [0.8, 0.4, 1]
    assert shifted.exact.tolist() == [False, False, True]
    assert [shifted.shares[n].mean for n in ("overlap", "rouge_l", "exact")] == pytest.approx(
        [140 / 3, 220 / 3, 100 / 3]
    )


def textbook_lcs(a: list[int], b: list[int]) -> int:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


@pytest.mark.parametrize("letters", [1, 2, 4, 30])
def test_the_longest_common_subsequence_is_the_textbook_s(letters: int) -> None:
    generator = torch.Generator().manual_seed(letters)
    for _ in range(60):
        sizes = torch.randint(90, (2,), generator=generator).tolist()
        a, b = (torch.randint(letters, (size,), generator=generator).tolist() for size in sizes)
        assert common_subsequence(a, b) == textbook_lcs(a, b)


def test_a_prompt_without_a_token_is_refused_unless_nothing_is_asked() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="prompt 1 has no token to continue from"):
        greedy(gpt2(), [torch.tensor([3]), nothing], [2, 2])
    assert [len(g) for g in greedy(gpt2(), [torch.tensor([3]), nothing], [2, 0])] == [2, 0]
    assert greedy(gpt2(), [], []) == []


def test_more_tokens_than_the_model_has_positions_are_refused_in_one_line() -> None:
    model = gpt2()
    most = model.config.n_positions
    prompt = torch.zeros(most - 1, dtype=torch.int64)
    assert [len(g) for g in greedy(model, [prompt], [2])] == [2]  # of the last token generated nothing is asked
    with pytest.raises(ValueError, match=f"take {most + 1} positions, the model has {most}"):
        greedy(model, [prompt], [3])


# Min-K%


def tokens_of(*sequences: list[float]) -> TokenLogProbs:
    log_probs = torch.tensor([x for s in sequences for x in s], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    means, deviations = (torch.rand(len(log_probs), generator=generator, dtype=torch.float64) for _ in range(2))
    return TokenLogProbs(log_probs, -means, 0.1 + deviations, log_probs > -1, torch.tensor([len(s) for s in sequences]))


@pytest.mark.parametrize("k", [0.1, 0.2, 0.5, 1.0])
def test_min_k_is_the_mean_of_the_least_probable_tokens(k: float) -> None:
    tokens = tokens_of([-1.0, -5.0, -0.5, -3.0, -2.0, -0.1], [], [-4.0], [-0.25 * i for i in range(11)])
    plain, standardised = min_k_scores(tokens, k), min_k_plus_scores(tokens, k)
    begin = 0
    for i, length in enumerate(tokens.lengths.tolist()):
        span = slice(begin, begin + length)
        begin += length
        if not length:
            assert plain[i].isnan() and standardised[i].isnan()
            continue
        kept = max(1, int(k * length))
        z = (tokens.log_probs[span] - tokens.means[span]) / tokens.deviations[span]
        assert float(plain[i]) == pytest.approx(sum(sorted(tokens.log_probs[span].tolist())[:kept]) / kept)
        assert float(standardised[i]) == pytest.approx(sum(sorted(z.tolist())[:kept]) / kept)
    with pytest.raises(ValueError, match="k is the share of tokens"):
        min_k_scores(tokens, 0.0)


def test_a_model_that_memorised_its_members_is_found_out() -> None:
    members, others = batch([list(range(i, i + 8)) for i in range(1, 13)]), batch(rows([8] * 12))
    found = min_k_attack(*(token_log_probs(successor(), [one]) for one in (members, others)))
    assert set(found) == {"min_k", "min_k_plus"}
    for one in found.values():
        assert one.auc.mean == 1 and one.auc.low == 1 and one.tpr[0.01].mean == 1
        assert any("non-members" in limit for limit in one.limits)


def test_a_fresh_model_can_not_tell_members_from_others() -> None:
    sides = [token_log_probs(gpt2(), [batch(rows([12] * 150, seed))]) for seed in (1, 2)]
    for one in min_k_attack(sides[0], sides[1], k=0.3).values():
        assert one.auc.low is not None and one.auc.high is not None and one.auc.low < 0.5 < one.auc.high


def test_sequences_without_a_label_are_left_out_of_the_attack_and_that_is_said() -> None:
    sides = tokens_of([-1.0, -2.0], [], [-3.0]), tokens_of([-4.0], [-5.0, -6.0])
    with_hole = min_k_attack(*sides)["min_k"]
    assert with_hole.limits[-1] == "1 sequences without a labelled token are left out"
    assert with_hole.auc == min_k_attack(tokens_of([-1.0, -2.0], [-3.0]), sides[1])["min_k"].auc
    with pytest.raises(ValueError, match="others have no sequence with a labelled token"):
        min_k_attack(sides[0], tokens_of([]))


# Multiple choice


def test_the_most_probable_choice_is_taken_as_transformers_scores_it() -> None:
    model = gpt2().eval()
    questions = [
        Question(tuple(prompt), tuple(tuple(c) for c in rows(sizes, seed)), seed % len(sizes))
        for seed, (prompt, sizes) in enumerate(zip(rows([3, 7, 1]), ([1, 4, 2], [3, 3], [2, 5, 1, 9]), strict=True))
    ]
    for score in ("mean", "sum"):
        found = multiple_choice(model, questions, score=score, batch_size=4)
        for question, scores, chosen in zip(questions, found.scores, found.chosen.tolist(), strict=True):
            for choice, own in zip(question.choices, scores.tolist(), strict=True):
                one = batch([[*question.prompt, *choice]], [len(question.prompt)])
                loss = -float(model(**one).loss.detach()) * (len(choice) if score == "sum" else 1)
                assert own == pytest.approx(loss, rel=1e-5)
            assert chosen == int(scores.argmax())
        right = sum(c == q.answer for c, q in zip(found.chosen.tolist(), questions, strict=True))
        assert found.accuracy.mean == pytest.approx(100 * right / 3)
        assert found.chance == pytest.approx(100 * (1 / 3 + 1 / 2 + 1 / 4) / 3)


def test_a_model_that_knows_the_answers_gets_them_all_and_one_that_does_not_guesses() -> None:
    questions = [Question((i,), ((i + 1, i + 2), (i + 2, i + 3)), 0) for i in range(1, 19)]
    assert multiple_choice(successor(), questions).accuracy.mean == 100
    assert str(multiple_choice(successor(), questions)).endswith("% of 18 questions; chance is 50")
    backwards = [Question(q.prompt, q.choices[::-1], 0) for q in questions]
    assert multiple_choice(successor(), backwards).accuracy.mean == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Question((), ((1,), (2,)), 0), "a prompt of 0"),
        (lambda: Question((1,), ((1,), ()), 0), r"choices of \[1, 0\]"),
        (lambda: Question((1,), ((1,),), 0), r"choices of \[1\]"),
        (lambda: Question((1,), ((1,), (2,)), 2), "the answer 2 is none of the 2"),
        (lambda: multiple_choice(gpt2(), []), "nothing to ask"),
        (lambda: multiple_choice(gpt2(), [Question((1,), ((1,), (2,)), 0)], batch_size=0), "batch_size"),
        (lambda: multiple_choice(gpt2(), [Question((1,), ((1,), (2,)), 0)], score="max"), "'mean' or 'sum'"),  # type: ignore[arg-type]
    ],
)
def test_questions_that_can_not_be_asked_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# All together


def test_a_table_shows_the_model_beside_one_fine_tuned_without_the_data() -> None:
    forget, retain, test = ([batch(rows([9] * 6, seed))] for seed in range(3))
    model, reference = gpt2(), llama()
    found = language_metrics(model, forget=forget, retain=retain, test=test, reference=reference, prompt_tokens=3)
    assert found.perplexity["retain"].loss == perplexity(model, retain).loss
    assert found.accuracy["test"] == accuracy_of(token_log_probs(model, test))
    assert found.extraction is not None and found.min_k is not None and found.reference is not None
    assert found.extraction.shares == extraction(model, forget, 3).shares
    assert found.min_k["min_k"].auc == min_k_attack(*(token_log_probs(model, b) for b in (forget, test)))["min_k"].auc
    alone = language_metrics(reference, forget=forget, retain=retain, test=test, prompt_tokens=3)
    assert found.reference.as_dict() == alone.as_dict()
    assert language_metrics(model, forget=forget, reference=alone).reference is alone
    lines = str(found).splitlines()
    assert lines[0].split() == ["model", "reference"] and len(lines) == 1 + 3 + 3 + 3 + 2 * 3
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["reference"]["extraction"]["samples"] == 6
    some = language_metrics(model, retain=retain)
    assert some.extraction is None and some.min_k is None and len(str(some).splitlines()) == 3
    with pytest.raises(ValueError, match="not measured on forget"):
        language_metrics(model, forget=forget, reference=some)
    with pytest.raises(ValueError, match="nothing to measure on"):
        language_metrics(model)


def sharded_figures(rank: int, make: Callable[[], nn.Module], kind: str, batches: list[dict[str, Tensor]]) -> Any:
    model = make()
    if kind == "fsdp":
        for module in list(model.modules())[::-1]:
            if type(module).__name__ in ("LlamaDecoderLayer", "Linear", "LlamaForCausalLM", "Plain"):
                fully_shard(module)
    elif kind == "tp":
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        parallelize_module(model, mesh, {"head": ColwiseParallel(use_local_output=False)})
        return figures(model, batches)
    else:
        model = DistributedDataParallel(model)
    found = figures(model, deal(batches))
    assert kind != "fsdp" or all(isinstance(p, DTensor) for p in model.parameters())  # back in its shards
    return found


def figures(model: nn.Module, batches: Any) -> Any:
    """As lists: a tensor that a process sent is gone with it."""
    tokens, said = token_log_probs(model, batches), extraction(model, batches)
    asked = multiple_choice(model, QUESTIONS, batch_size=3)
    generated = [own.tolist() for own in said.generated]
    return tokens.lengths.tolist(), tokens.log_probs.tolist(), generated, asked.chosen.tolist()


QUESTIONS = [Question((i, 2 * i), ((i + 1, 3), (i + 2, 4, 5), (1,)), 0) for i in range(1, 6)]
FIVE = [*UNEVEN, batch(rows([4, 5], 2)), batch(rows([14], 3), [13]), batch(rows([6, 1, 3], 4))]


@pytest.mark.parametrize(
    ("make", "kind", "size", "count"),
    [(llama, "fsdp", 2, 5), (Plain, "fsdp", 4, 5), (Plain, "fsdp", 4, 1), (Plain, "ddp", 2, 5), (Plain, "tp", 2, 5)],
)
def test_models_on_several_processes_give_every_rank_the_figures_of_one(
    make: Any, kind: str, size: int, count: int
) -> None:
    """Five batches on two ranks, three and two; on four, two and one; one batch on four, three ranks have none."""
    lengths, log_probs, generated, chosen = figures(make(), FIVE[:count])
    for own in on_ranks(size, sharded_figures, make, kind, FIVE[:count]):
        assert own[0] == lengths and own[2] == generated and own[3] == chosen
        assert own[1] == pytest.approx(log_probs, rel=1e-5, abs=1e-6)


class Adapted(nn.Module):
    """As peft wraps a model: everything is handed on, and the signature tells nothing."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.base_model = model
        self.config = model.config
        self.calls: set[str] = set()

    def get_base_model(self) -> Any:
        return self.base_model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls |= kwargs.keys()
        return self.base_model(*args, **kwargs)


def test_wrapped_and_compiled_models_are_measured_as_they_are() -> None:
    expected = figures(llama(), UNEVEN)
    adapted = Adapted(llama())
    assert figures(adapted, UNEVEN) == expected and {"past_key_values", "position_ids"} <= adapted.calls
    compiled = figures(torch.compile(llama(), backend="eager"), UNEVEN)
    assert compiled[0] == expected[0] and compiled[2:] == expected[2:]
    assert compiled[1] == pytest.approx(expected[1], rel=1e-5)
