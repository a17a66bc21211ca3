"""Hugging Face's causal language models, tiny and with random weights: the Fisher diagonal and every method on them."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from fastunlearn import ClassForgetting, DeepClean, LCodec, SelectiveSynapticDampening, evaluate, fisher_diagonal
from fastunlearn.evaluate.metrics import predict
from fastunlearn.evaluate.relearn import relearn_time
from fastunlearn.fisher import fisher_plan
from fastunlearn.language import causal_lm_loss, is_causal_lm
from fastunlearn.methods.baselines import FineTune, GradientAscent, Retrain
from fastunlearn.rules import rule_of

pytestmark = pytest.mark.filterwarnings("error:no kernel for")  # what is slow says so

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


def made(kind: Any, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
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
    labels[2:3, 1:4] = -100
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
    model.activation_checkpointing_enable({"use_reentrant": False})
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
    names = ("wte.weight", "h.0.attn.c_attn.weight", "h.1.mlp.c_fc.bias", "ln_f.weight")
    named = {f"transformer.{name}": model.get_parameter(f"transformer.{name}") for name in names}
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
    found = fisher_diagonal(model, [batch], kind="exact", sample=sample, params=list(named))
    assert found.num_samples == samples
    assert_alike(found, {name: value / samples for name, value in total.items()}, 1e-10)


@pytest.mark.parametrize("sample", ["sequence", "token"])
def test_drawn_labels_are_distributed_as_the_model_says(sample: Any) -> None:
    """The mean over many draws comes as near to the exact diagonal as its own spread allows."""
    model, batch = made(gpt2), short()
    name = "transformer.h.1.mlp.c_proj.bias"
    exact = fisher_diagonal(model, [batch], kind="exact", sample=sample, params=[name])[name].sum()
    drawn = torch.stack([
        fisher_diagonal(model, [batch] * 6, kind="monte_carlo", sample=sample, params=[name], seed=s)[name].sum()
        for s in range(9)
    ])  # fmt: skip
    assert float(drawn.std()) > 0
    assert abs(float(drawn.mean() - exact)) < 3 * float(drawn.std()) / 3
    again = fisher_diagonal(model, [batch] * 6, kind="monte_carlo", sample=sample, params=[name], seed=7)[name].sum()
    assert torch.equal(again, drawn[7])


def test_labels_are_not_drawn_where_none_are_given() -> None:
    model, batch = made(gpt2), texts()
    batch["labels"][:] = -100
    for kind in ("monte_carlo", "exact"):
        found = fisher_diagonal(model, [batch], kind=kind, params=["transformer.ln_f.bias"])  # type: ignore[arg-type]
        assert not bool(found["transformer.ln_f.bias"].any())
        with pytest.raises(ValueError, match="no position with a label"):
            fisher_diagonal(model, [batch], kind=kind, sample="token")  # type: ignore[arg-type]


# ---- layers of Hugging Face's own -------------------------------------------------------------------------------


def rms_norms() -> list[type[nn.Module]]:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.mistral.modeling_mistral import MistralRMSNorm
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    return [GemmaRMSNorm, LlamaRMSNorm, MistralRMSNorm, Olmo2RMSNorm, Qwen2RMSNorm, Qwen3RMSNorm, T5LayerNorm]


class OwnRMSNorm(nn.Module):
    """Written again, with what it is not spoilt in one place."""

    def __init__(self, size: int = 6, spoilt: str = "", eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.spoilt, self.eps = nn.Parameter(torch.randn(size)), spoilt, eps

    def forward(self, x: Tensor) -> Tensor:
        eps = 0.5 * self.eps if self.spoilt == "epsilon" else self.eps
        if self.spoilt == "mean":
            x = x - x.mean(-1, keepdim=True)
        axes = (-2, -1) if self.spoilt == "axes" else -1
        scale = self.weight.square() if self.spoilt == "weight" else self.weight
        noise = torch.rand(()) if self.spoilt == "random" else 1
        if self.spoilt == "raises":
            raise AttributeError("state")
        return noise * scale * x * torch.rsqrt(x.square().mean(axes, keepdim=True) + eps)


class Gated(OwnRMSNorm):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(x if gate is None else x * gate)


@pytest.mark.parametrize("kind", [*rms_norms(), OwnRMSNorm])
def test_root_mean_square_norms_are_known_by_what_they_compute(kind: type[nn.Module]) -> None:
    for module in (kind(6), kind(1), kind(6).to(torch.bfloat16), kind(6).eval(), kind(6).to("meta")):
        assert rule_of(module) is not None


@pytest.mark.parametrize("spoilt", ["epsilon", "mean", "axes", "weight", "random", "raises"])
def test_what_computes_anything_else_is_not(spoilt: str) -> None:
    module = OwnRMSNorm(spoilt=spoilt)
    state = torch.get_rng_state()
    assert rule_of(module) is None
    assert torch.equal(torch.get_rng_state(), state)


def test_a_norm_that_may_be_given_more_or_has_more_is_not_known() -> None:
    replaced, biased, nested = OwnRMSNorm(), OwnRMSNorm(), OwnRMSNorm()
    replaced.forward = lambda x: x  # type: ignore[method-assign]
    biased.bias = nn.Parameter(torch.zeros(6))
    nested.inner = nn.Identity()
    for module in (Gated(), replaced, biased, nested):
        assert rule_of(module) is None


def test_a_stand_in_is_tried_without_the_hooks_of_the_module() -> None:
    module, calls = OwnRMSNorm(), []
    module.register_forward_hook(lambda *_: calls.append(1))
    assert rule_of(module) is not None and not calls


class Scaled(nn.Embedding):
    """As Gemma's, with what it is not spoilt in one place."""

    def __init__(self, spoilt: str = "") -> None:
        super().__init__(64, 4, padding_idx=2)  # more than a few draws see
        self.spoilt, self.factor = spoilt, nn.Buffer(torch.tensor(1.7), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        found = super().forward((ids + 1) % 64 if self.spoilt == "rows" else ids)
        if self.spoilt == "one row":
            found = found.masked_fill((ids == 63)[..., None], 0)
        if self.spoilt == "columns":
            found = found.flip(-1)
        return found * self.factor + (1 if self.spoilt == "offset" else 0)


class ScaledClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = Scaled(), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.table(ids).tanh().mean(1))
        return out


def test_an_embedding_that_scales_equals_the_loop() -> None:
    torch.manual_seed(0)
    model, ids, labels = ScaledClassifier().double(), torch.randint(0, 64, (5, 4)), torch.arange(5) % 3
    assert fisher_plan(model, [(ids, labels)])["table.weight"] == "kernel, Scaled"
    total = torch.zeros(64, 4, dtype=torch.float64)
    for i in range(5):
        loss = F.cross_entropy(model(ids[i : i + 1]), labels[i : i + 1])
        total += torch.autograd.grad(loss, model.table.weight)[0].square() / 5
    torch.testing.assert_close(fisher_diagonal(model, [(ids, labels)])["table.weight"], total, rtol=1e-12, atol=0)


@pytest.mark.parametrize("spoilt", ["rows", "one row", "columns", "offset"])
def test_an_embedding_that_does_more_than_scale_has_no_rule(spoilt: str) -> None:
    assert rule_of(Scaled()) is not None and rule_of(Scaled(spoilt)) is None


# ---- adapters ---------------------------------------------------------------------------------------------------


def adapted(kind: Any, dtype: torch.dtype, task: str | None) -> nn.Module:
    import peft

    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules="all-linear", task_type=task, init_lora_weights=False,
        fan_in_fan_out=kind is gpt2,
    )  # fmt: skip
    torch.manual_seed(1)
    return peft.get_peft_model(made(kind, dtype), config).to(dtype).eval()


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
@pytest.mark.parametrize("kind", [gpt2, llama])
def test_adapters_have_their_own_fisher_diagonal(kind: Any, task: str | None) -> None:
    model, batches = adapted(kind, torch.float64, task), [texts()]
    assert is_causal_lm(model)
    found = fisher_diagonal(model, batches)
    assert found and all("lora_" in name for name in found)
    assert_alike(found, loop(model, batches), WITHIN[kind])
    assert set(fisher_plan(model, batches).values()) == {"kernel, Linear"}


@pytest.mark.parametrize("kind", [gpt2, llama])
def test_deepclean_forgets_through_the_adapter_alone(kind: Any) -> None:
    model = adapted(kind, torch.bfloat16, "CAUSAL_LM")
    before = copy.deepcopy(model)
    outcome = DeepClean(fraction=0.1).unlearn(model, [texts()], [texts(1)])
    changed = differences(before, model)
    assert changed and set(changed) <= set(fisher_diagonal(model, [texts()]))  # adapters' names
    assert set(outcome.changed) == set(changed)


# ---- methods ----------------------------------------------------------------------------------------------------


def differences(before: nn.Module, after: nn.Module) -> dict[str, int]:
    """How many entries of each parameter differ, by bits."""
    then = dict(before.named_parameters())
    counted = {name: int((p != then[name]).sum()) for name, p in after.named_parameters()}
    return {name: count for name, count in counted.items() if count}


METHODS: list[Any] = [
    DeepClean(fraction=0.05, finetune_epochs=0),
    DeepClean(fraction=0.05, autocast=torch.bfloat16),
    SelectiveSynapticDampening(alpha=2.0),
    ClassForgetting(),
    FineTune(),
    GradientAscent(),
    Retrain(epochs=1),
]


@pytest.mark.parametrize("kind", [gpt2, llama, qwen3])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_methods_run_in_bfloat16_change_what_they_say_and_leave_ties_tied(kind: Any, method: Any) -> None:
    model = made(kind, torch.bfloat16)
    before = copy.deepcopy(model)
    outcome = method.unlearn(model, [texts()], [texts(1), texts(2, 3, 5)])
    changed = differences(before, model)
    assert changed == outcome.changed and changed
    assert all(bool(p.isfinite().all()) and p.dtype == torch.bfloat16 for p in model.parameters())
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (kind is not llama) == ("lm_head.weight" not in dict(model.named_parameters()))
    if isinstance(method, ClassForgetting):
        kept = [name for name in changed if name.endswith(("bias", "embed_tokens.weight", "wte.weight", "norm.weight"))]
        assert not kept, "only what multiplies activations is updated"


@pytest.mark.parametrize("kind", [gpt2, llama])
def test_gradient_ascent_climbs_and_fine_tuning_descends_the_loss_of_the_next_token(kind: Any) -> None:
    batch = texts()
    for method, sign in ((GradientAscent(lr=0.01), 1), (FineTune(lr=0.01), -1)):
        model = made(kind, torch.float32)
        means = []
        for _ in range(2):
            means.append(torch.stack([loss_alone(model, batch, i) for i in range(5)]).mean().detach())
            method.unlearn(model, [batch], [batch])
        assert sign * float(means[1] - means[0]) > 0


def test_retraining_begins_where_a_new_model_of_the_config_does() -> None:
    model = made(llama, torch.float32)
    Retrain(epochs=1, lr=1e-12, weight_decay=0.0, seed=3).unlearn(model, None, [texts()])
    torch.manual_seed(3)
    fresh = dict(llama().named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, fresh[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize("hessian", ["exact", "gauss_newton", "fisher"])
@pytest.mark.parametrize("kind", [gpt2, llama])
def test_lcodec_removes_texts_from_a_language_model(kind: Any, hessian: Any) -> None:
    """With replaced tokens; all runs in float32 and on torch's plain attention, twice differentiable."""
    model = made(kind, torch.float32)
    before = copy.deepcopy(model)
    forget = texts(count=2)
    method = LCodec(perturbations=12, hessian=hessian, hessian_samples=4, damping=1.0, max_units=3, max_block=40)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LCodec raised the damping")
        outcome = method.unlearn(model, [forget], [texts(1)])
    assert differences(before, model) == outcome.changed and outcome.changed
    removals = outcome.details["removals"]
    assert [r["samples"] for r in removals] == [[0], [1]]
    for i, removal in enumerate(removals[:1]):  # later ones start from moved weights
        assert removal["loss_before"] == pytest.approx(float(loss_alone(before, forget, i).detach()), rel=1e-5)


def test_lcodec_removes_texts_from_an_encoder_classifier_by_replacing_tokens() -> None:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=12, num_hidden_layers=1, num_attention_heads=3, intermediate_size=16,
        max_position_embeddings=8, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval()
    before = copy.deepcopy(model)
    batch = texts() | {"labels": torch.arange(5) % 3}
    other = texts(1) | {"labels": torch.arange(5) % 3}
    method = LCodec(perturbations=12, hessian="gauss_newton", hessian_samples=4, max_units=3, protected=[0], tokens=2)
    outcome = method.unlearn(model, [batch], [other])
    changed = differences(before, model)
    assert changed == outcome.changed and changed
    assert not any("LayerNorm" in name or "embeddings" in name for name in changed)


# ---- evaluation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [gpt2, llama])
def test_accuracy_and_loss_are_those_of_the_next_token_over_labelled_positions(kind: Any) -> None:
    model, reference, batch = made(kind, torch.float32), made(kind, torch.float32, 1), texts()
    right, kl = [], []
    for i in range(5):
        given = {name: value[i : i + 1] for name, value in batch.items() if name != "labels"}
        logits, theirs = model(**given).logits[0].double(), reference(**given).logits[0].double()
        for t in range(1, 7):
            if batch["labels"][i, t] != -100 and batch["attention_mask"][i, t]:
                right.append(int(logits[t - 1].argmax()) == int(batch["labels"][i, t]))
                kl.append(F.kl_div(logits[t - 1].log_softmax(0), theirs[t - 1].softmax(0), reduction="sum"))
    found = evaluate(model, forget=[batch], test=[texts(1)], reference=reference)
    assert found.accuracy["forget"] == pytest.approx(100 * sum(right) / len(right))
    losses = torch.stack([loss_alone(model, batch, i) for i in range(5)]).detach()
    assert found.loss["forget"] == pytest.approx(float(losses.mean()), rel=1e-5)
    assert found.kl is not None and found.kl["forget"] == pytest.approx(
        float(torch.stack(kl).mean().detach()), rel=1e-5
    )
    assert found.membership_auc is not None and found.per_class == {}
    correct, each = predict(model, [batch], "batches")
    torch.testing.assert_close(each, losses, rtol=1e-5, atol=1e-6)
    assert correct.tolist() == [False, False, False, True, False]  # of a text without labels, all are right


def test_a_loss_of_the_caller_leaves_accuracy_that_of_the_next_token() -> None:
    model, batch = made(gpt2, torch.float32), texts()
    own = evaluate(model, forget=[batch], loss_fn=lambda logits, labels: 2 * causal_lm_loss(logits, labels))
    plain = evaluate(model, forget=[batch])
    assert own.accuracy == plain.accuracy
    assert own.loss["forget"] == pytest.approx(2 * plain.loss["forget"])


def test_a_language_model_relearns_its_texts() -> None:
    found = relearn_time(made(gpt2, torch.float32), [texts()], threshold=1.5, by="loss", lr=0.1, max_steps=200)
    assert found.steps


def test_attention_with_sinks_is_differentiated_though_it_returns_its_weights_too() -> None:
    torch.manual_seed(0)
    config = transformers.GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1)
    model = transformers.GptOssForCausalLM(config).eval()
    ids = torch.randint(0, VOCABULARY, (3, 5))
    with pytest.warns(UserWarning, match="no kernel for"):
        found = fisher_diagonal(model, [{"input_ids": ids, "labels": ids}])
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for one in ids[:, None]:
        loss = model(input_ids=one, labels=one).loss
        for name, grad in zip(total, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            total[name] += grad.square() / len(ids)
    for name, value in total.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6 * float(value.max()))
