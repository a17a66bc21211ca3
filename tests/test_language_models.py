"""Hugging Face's causal language models, tiny and with random weights: the Fisher diagonal and every method on them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from fastunlearn import DeepClean, fisher_diagonal
from fastunlearn.fisher import fisher_plan
from fastunlearn.rules import rule_of

VOCABULARY = 13
NO_SPECIAL: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SIZES: dict[str, Any] = NO_SPECIAL | {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 16,
}  # fmt: skip


def gpt2() -> nn.Module:
    sizes: dict[str, Any] = {"n_positions": 16, "n_embd": 12, "n_layer": 2, "n_head": 3, "resid_pdrop": 0.0}
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, embd_pdrop=0.0, attn_pdrop=0.0, **sizes, **NO_SPECIAL
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def qwen2() -> nn.Module:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, tie_word_embeddings=True))


def qwen3() -> nn.Module:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, tie_word_embeddings=True))


def mistral() -> nn.Module:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=3))


def gemma() -> nn.Module:
    return transformers.GemmaForCausalLM(transformers.GemmaConfig(**SIZES))


def made(kind: Any, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = kind()
    with torch.no_grad():
        for parameter in model.parameters():  # norm weights begin at 1 and biases at 0, where much goes unnoticed
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def texts(seed: int = 0, count: int = 5, length: int = 7) -> dict[str, Tensor]:
    """Padded on the right, on the left, labelled in part, without labels, whole."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (count, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, length - 2 :] = 0
    mask[1, :3] = 0
    labels = ids.clone()
    labels[2, 1:4] = -100
    labels[3:4] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loss_alone(model: nn.Module, batch: dict[str, Tensor], i: int) -> Tensor:
    """Written out: the mean over labelled, attended tokens of -log p(token | before); 0 where there is none."""
    given = {name: value[i : i + 1] for name, value in batch.items() if name != "labels"}
    logits = model(**given).logits[0]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    terms = [
        -logits[t - 1].log_softmax(0)[batch["labels"][i, t]]
        for t in range(1, len(logits))
        if batch["labels"][i, t] != -100 and batch["attention_mask"][i, t]
    ]
    return torch.stack(terms).mean() if terms else logits.sum() * 0


def loop(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of the squared gradients, one sample at a time."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in named.items()}
    samples = 0
    for batch in batches:
        for i in range(len(batch["labels"])):
            found = torch.autograd.grad(loss_alone(model, batch, i), list(named.values()), allow_unused=True)
            for name, grad in zip(named, found, strict=True):
                total[name] += 0 if grad is None else grad.double().square()
            samples += 1
    return {name: value / samples for name, value in total.items()}


def assert_alike(found: Any, wanted: dict[str, Tensor], tolerance: float) -> None:
    """Largest difference of a parameter over its largest entry."""
    assert sorted(found) == sorted(wanted)
    for name, value in wanted.items():
        largest = float(value.abs().max())
        assert largest > 0, name
        assert float((found[name].double() - value).abs().max()) <= tolerance * largest, name


# RMSNorm and rotary embeddings compute in float32 in a float64 model, too; GPT-2 does not.
WITHIN = {gpt2: 1e-12, llama: 2e-6, qwen2: 2e-6, qwen3: 2e-6, mistral: 2e-6, gemma: 2e-6}
MODELS = list(WITHIN)


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """Being slow is said in a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="no kernel for")
        yield


# ---- the Fisher diagonal ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_the_fisher_diagonal_equals_the_loop_over_sequences(kind: Any) -> None:
    model, batches = made(kind), [texts(), texts(1, 4, 5)]
    assert_alike(fisher_diagonal(model, batches), loop(model, batches), WITHIN[kind])


@pytest.mark.parametrize("kind", MODELS)
def test_every_parameter_is_taken_by_a_kernel(kind: Any) -> None:
    ways = fisher_plan(made(kind), [texts()])
    assert {way.partition(",")[0] for way in ways.values()} == {"kernel"}, ways


@pytest.mark.parametrize("kind", [gpt2, llama])
def test_padding_on_either_side_changes_nothing(kind: Any) -> None:
    """With positions given, as they are while generating; the first token of a text is left unlabelled, for padding
    predicts it where padding is on the left."""
    model, ids = made(kind), torch.tensor([[3, 1, 4, 1, 5]])
    labels = ids.clone()
    labels[0, 0] = -100
    alone = {"input_ids": ids, "labels": labels}
    wanted = fisher_diagonal(model, [alone])
    for sides in ((2, 0), (0, 2)):
        pad = [F.pad(t, sides, value=v) for t, v in ((ids, 7), (labels, 9), (torch.ones_like(ids), 0))]
        batch = dict(zip(("input_ids", "labels", "attention_mask"), pad, strict=True))
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        found = fisher_diagonal(model, [batch])
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=2e-5, atol=1e-7 * float(value.max()), msg=name)


def test_texts_without_any_label_have_no_squares_but_count() -> None:
    model, batch = made(gpt2), texts()
    nothing = batch | {"labels": torch.full_like(batch["labels"], -100)}
    assert not any(bool(value.any()) for value in fisher_diagonal(model, [nothing]).values())
    both, alone = fisher_diagonal(model, [batch, nothing]), fisher_diagonal(model, [batch])
    assert both.num_samples == 10
    for name, value in alone.items():
        torch.testing.assert_close(both[name], value / 2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", [gpt2, llama])
def test_gradient_checkpointing_changes_nothing(kind: Any) -> None:
    model, batches = made(kind), [texts()]
    plain = fisher_diagonal(model, batches)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_alike(fisher_diagonal(model, batches), dict(plain), 1e-12)
    assert model.training


@pytest.mark.parametrize("kind", [gpt2, llama])
def test_a_compiled_model_is_the_same_model(kind: Any) -> None:
    model, batches = made(kind), [texts()]
    plain = fisher_diagonal(model, batches)
    found = fisher_diagonal(torch.compile(model), batches)
    assert_alike({name.removeprefix("_orig_mod."): value for name, value in found.items()}, dict(plain), 0)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("precision", ["bfloat16", "autocast"])
def test_in_bfloat16_it_is_as_near_as_torch_itself(kind: Any, precision: str) -> None:
    """Both against float64 on the same weights: ours, and torch's one sample after another at that precision."""
    exact, batches = made(kind, torch.bfloat16).double(), [texts(), texts(2)]
    truth = loop(exact, batches)
    model = made(kind, torch.bfloat16) if precision == "bfloat16" else made(kind, torch.bfloat16).float()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        ours, theirs = fisher_diagonal(model, batches), loop(model, batches)

    def error(found: Any) -> float:
        gaps = [(found[name].double() - value).norm() / value.norm() for name, value in truth.items()]
        return float(torch.stack(gaps).square().mean().sqrt())

    assert error(ours) <= 2 * error(theirs), (error(ours), error(theirs))


# ---- other samples and labels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [gpt2, llama])
def test_tokens_as_samples_equal_the_loop_over_labelled_tokens(kind: Any) -> None:
    model, batch = made(kind), texts()
    named = dict(model.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in named.items()}
    count = 0
    for n, labels in enumerate(batch["labels"]):
        for t in range(1, len(labels)):
            if labels[t] == -100 or not batch["attention_mask"][n, t]:
                continue
            given = {name: value[n : n + 1] for name, value in batch.items() if name != "labels"}
            loss = -model(**given).logits[0, t - 1].log_softmax(0)[labels[t]]
            for name, grad in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True):
                total[name] += grad.square()
            count += 1
    found = fisher_diagonal(model, [batch], sample="token")
    assert found.num_samples == count
    assert_alike(found, {name: value / count for name, value in total.items()}, WITHIN[kind])


def short() -> dict[str, Tensor]:
    """Two labelled tokens at most, so that all label pairs can be gone through."""
    batch = texts(3, 3, 4)
    batch["attention_mask"] = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [1, 1, 1, 1]])
    batch["labels"] = torch.tensor([[5, 1, 2, 3], [1, -100, 3, 4], [7, -100, -100, -100]])
    return batch


@pytest.mark.parametrize("sample", ["sequence", "token"])
def test_exact_is_the_expectation_over_all_labels_of_the_labelled_tokens(sample: Any) -> None:
    """Every pair of labels, weighted by the product of their probabilities, in float64."""
    model, batch = made(gpt2), short()
    named = dict(model.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in named.items()}
    samples = 0
    for n in range(3):
        places = [t for t in range(1, 4) if batch["labels"][n, t] != -100 and batch["attention_mask"][n, t]]
        given = {name: value[n : n + 1] for name, value in batch.items() if name != "labels"}
        logs = model(**given).logits[0].log_softmax(-1)
        groups = [places] if sample == "sequence" else [[t] for t in places]
        samples += len(groups)
        for group in groups:
            for labels in torch.cartesian_prod(*[torch.arange(VOCABULARY)] * len(group)) if group else ():
                terms = torch.stack([logs[t - 1, c] for t, c in zip(group, labels.reshape(-1), strict=True)])
                weight = terms.sum().exp().detach()
                found = torch.autograd.grad(-terms.mean(), list(named.values()), retain_graph=True)
                for name, grad in zip(named, found, strict=True):
                    total[name] += weight * grad.square()
    found = fisher_diagonal(model, [batch], kind="exact", sample=sample)
    assert found.num_samples == samples
    assert_alike(found, {name: value / samples for name, value in total.items()}, 1e-10)


@pytest.mark.parametrize("sample", ["sequence", "token"])
def test_drawn_labels_are_distributed_as_the_model_says(sample: Any) -> None:
    """The mean over many seeds comes as near to the exact diagonal as its own spread allows."""
    model, batch = made(gpt2), short()
    name = "transformer.h.1.mlp.c_proj.bias"
    exact = fisher_diagonal(model, [batch], kind="exact", sample=sample, params=[name])[name].sum()
    drawn = torch.stack([
        fisher_diagonal(model, [batch], kind="monte_carlo", sample=sample, params=[name], seed=s)[name].sum()
        for s in range(150)
    ])  # fmt: skip
    assert abs(float(drawn.mean() - exact)) < 4 * float(drawn.std()) / 150**0.5
    assert float(drawn.std()) > 0
    again = fisher_diagonal(model, [batch], kind="monte_carlo", sample=sample, params=[name], seed=7)[name].sum()
    assert torch.equal(again, drawn[7])


def test_labels_are_not_drawn_where_none_are_given() -> None:
    model, batch = made(gpt2), texts()
    batch["labels"][:] = -100
    for kind in ("monte_carlo", "exact"):
        found = fisher_diagonal(model, [batch], kind=kind, params=["transformer.ln_f.bias"])  # type: ignore[arg-type]
        assert not bool(found["transformer.ln_f.bias"].any())
        with pytest.raises(ValueError, match="no position with a label"):
            fisher_diagonal(model, [batch], kind=kind, sample="token")  # type: ignore[arg-type]
