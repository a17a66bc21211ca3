"""Which rows each weight of a model is given: attention, Conv3d, Hugging Face's Conv1D, attention masks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastunlearn import ClassForgetting
from fastunlearn.slots import layer_rows, left_out, supported_layers
from fastunlearn.subspace import collect_grams, spectral_filter


class Conv1D(nn.Module):
    """As ``transformers.pytorch_utils.Conv1D``: weight [in, out]."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.nf)


def gram(a: Tensor) -> Tensor:
    a = a.reshape(-1, a.shape[-1]).double()
    return a.mT @ a


def forgotten(weight: Tensor, retain: Tensor, forget: Tensor) -> Tensor:
    """The formula with the default alphas, weight [p, d], rows [..., d]."""
    m_r, m_f = spectral_filter(gram(retain), 100.0), spectral_filter(gram(forget), 3.0)
    return weight - weight @ (torch.eye(len(m_r)).double() - m_r) @ m_f


class Attending(nn.Module):
    """Attention whose arguments come with the batch, all of one dict."""

    def __init__(self, self_attention: bool = False, by_name: bool = False, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(8, 2, **options)
        self.self_attention, self.by_name = self_attention, by_name

    def forward(self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None, **options: Any) -> Tensor:
        def turned(x: Tensor) -> Tensor:
            return x if self.attention.batch_first else x.transpose(0, 1)

        query = turned(query)
        key, value = (
            (query, query) if self.self_attention or key is None or value is None else map(turned, (key, value))
        )
        if self.by_name:
            output: Tensor = self.attention(value=value, key=key, query=query, **options)[0]
        else:
            output = self.attention(query, key, value, **options)[0]
        return turned(output)


CASES: list[dict[str, Any]] = [
    {},
    {"batch_first": True},
    {"batch_first": True, "bias": False},
    {"kdim": 5, "vdim": 3},
    {"kdim": 5, "vdim": 3, "batch_first": True, "add_bias_kv": True, "add_zero_attn": True},
    {"add_bias_kv": True},
    {"add_zero_attn": True, "batch_first": True, "by_name": True},
    {"dropout": 0.5},
]


def attention_inputs(options: dict[str, Any], n: int = 3) -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "query": torch.randn(n, 4, 8).double(),
        "key": torch.randn(n, 6, options.get("kdim", 8)).double(),
        "value": torch.randn(n, 6, options.get("vdim", 8)).double(),
        "labels": torch.zeros(n),
    }


def heads_of(model: Attending, batch: dict[str, Any]) -> Tensor:
    """Concatenated heads [N, L, E], solved from the module's own output: out_proj is square and invertible."""
    projection = model.attention.out_proj
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "attention_mask")}
    output = model.eval()(**inputs).detach()
    shift = 0 if projection.bias is None else projection.bias.detach()
    return torch.linalg.solve(projection.weight.detach(), (output - shift).mT).mT


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masked", ["none", "bool", "float", "heads", "causal"])
@pytest.mark.parametrize("options", CASES, ids=str)
def test_rows_of_attention_are_its_arguments_and_its_concatenated_heads(
    options: dict[str, Any], masked: str, need_weights: bool
) -> None:
    model = Attending(**options).double()
    batch = attention_inputs(options)
    mask = torch.ones(4, 6).triu(3).bool()
    if masked == "heads":
        mask = mask.expand(6, 4, 6)
    if masked == "float":
        mask = torch.randn(4, 6).double()
    # Not a tensor of the batch, which would have to share the first axis: given to every call.
    extra = {} if masked == "none" else {"attn_mask": mask}
    if masked == "causal":
        extra["is_causal"] = True
        extra["attn_mask"] = torch.ones(4, 6).triu(1).bool()
    plain = model.forward
    model.forward = lambda **inputs: plain(**inputs, **extra, need_weights=need_weights)  # type: ignore[method-assign]
    found = collect_grams(model, [batch])
    assert list(found) == [f"attention.{part}" for part in ("q", "k", "v", "out_proj")]
    for name, wanted in (("q", batch["query"]), ("k", batch["key"]), ("v", batch["value"])):
        assert torch.allclose(found[f"attention.{name}"].gram[0], gram(wanted), rtol=1e-12, atol=1e-12)
    heads = gram(heads_of(model, batch))
    assert torch.allclose(found["attention.out_proj"].gram[0], heads, rtol=0, atol=1e-9 * float(heads.abs().max()))


@pytest.mark.parametrize("padding", [torch.bool, torch.float64])
@pytest.mark.parametrize("batch_first", [True, False])
def test_padded_keys_do_not_count_and_in_self_attention_neither_do_their_queries(
    batch_first: bool, padding: torch.dtype
) -> None:
    batch = attention_inputs({})
    shown = torch.arange(6) < torch.tensor([[6], [2], [3]])
    mask = ~shown if padding == torch.bool else torch.zeros(3, 6).double().masked_fill(~shown, float("-inf"))
    across = Attending(batch_first=batch_first).double()
    found = collect_grams(across, [{**batch, "key_padding_mask": mask}])
    rows = {name.split(".")[1]: moments.rows_seen for name, moments in found.items()}
    assert rows == {"q": 12, "k": 11, "v": 11, "out_proj": 12}
    assert torch.allclose(found["attention.k"].gram[0], gram(batch["key"][shown]))
    within = Attending(self_attention=True, batch_first=batch_first).double()
    alone = {"query": batch["key"], "key_padding_mask": mask, "labels": batch["labels"]}
    found = collect_grams(within, [alone])
    assert {moments.rows_seen for moments in found.values()} == {11}
    assert torch.allclose(found["attention.q"].gram[0], gram(batch["key"][shown]))
    heads = gram(heads_of(within, alone)[shown])
    assert torch.allclose(found["attention.out_proj"].gram[0], heads, rtol=0, atol=1e-9 * float(heads.abs().max()))


def test_unbatched_attention_is_one_sample() -> None:
    class Unbatched(Attending):
        def forward(self, query: Tensor, **options: Any) -> Tensor:  # type: ignore[override]
            x = query[0]
            output: Tensor = self.attention(x, x, x, key_padding_mask=torch.tensor([False, False, True, False]))[0]
            return output[None]

    model, batch = Unbatched().double(), {"query": torch.randn(1, 4, 8).double(), "labels": torch.zeros(1)}
    found = collect_grams(model, [batch])
    kept = torch.tensor([0, 1, 3])
    assert {moments.rows_seen for moments in found.values()} == {3}
    assert torch.allclose(found["attention.k"].gram[0], gram(batch["query"][0, kept]))
    heads = gram(heads_of(model, batch)[0, kept])
    assert torch.allclose(found["attention.out_proj"].gram[0], heads, rtol=0, atol=1e-9 * float(heads.abs().max()))


@pytest.mark.parametrize("options", CASES[:4], ids=str)
def test_every_projection_of_attention_is_updated_by_the_formula(options: dict[str, Any]) -> None:
    model = Attending(**options).double()
    before = copy.deepcopy(model)
    both = attention_inputs(options, 9)
    retain, forget = ({key: value[part] for key, value in both.items()} for part in (slice(0, 6), slice(6, 9)))
    outcome = ClassForgetting().unlearn(model, [forget], [retain])
    attention, old = model.attention, before.attention
    names = ("query", "key", "value")
    if attention._qkv_same_embed_dim:
        weights = [(w, b) for w, b in zip(attention.in_proj_weight.chunk(3), old.in_proj_weight.chunk(3), strict=True)]
    else:
        weights = [(getattr(attention, f"{p}_proj_weight"), getattr(old, f"{p}_proj_weight")) for p in "qkv"]
    for name, (new, was) in zip(names, weights, strict=True):
        assert torch.allclose(new, forgotten(was, retain[name], forget[name]), rtol=0, atol=1e-11)
    heads = heads_of(before, retain), heads_of(before, forget)
    assert torch.allclose(attention.out_proj.weight, forgotten(old.out_proj.weight, *heads), rtol=0, atol=1e-9)
    assert outcome.details["untouched"] == {}
    assert sum(outcome.changed.values()) == sum(p.numel() for n, p in model.named_parameters() if "weight" in n)


def test_self_attention_gives_its_whole_input_projection_one_filter() -> None:
    model = Attending(self_attention=True, batch_first=True).double()
    before = model.attention.in_proj_weight.detach().clone()
    x = torch.randn(9, 4, 8).double()
    forget, retain = ({"query": part, "labels": torch.zeros(len(part))} for part in (x[:3], x[3:]))
    ClassForgetting(layers=["attention.q", "attention.k", "attention.v"]).unlearn(model, [forget], [retain])
    assert torch.allclose(model.attention.in_proj_weight, forgotten(before, x[3:], x[:3]), rtol=0, atol=1e-12)


def test_the_name_of_an_attention_stands_for_its_projections() -> None:
    batch = attention_inputs({})
    outcome = ClassForgetting(layers=["attention"]).unlearn(Attending().double(), [batch], [batch])
    assert list(outcome.details["rows"]) == [f"attention.{part}" for part in ("q", "k", "v", "out_proj")]
    outcome = ClassForgetting(layers=["attention.v"]).unlearn(Attending().double(), [batch], [batch])
    assert outcome.changed == {"attention.in_proj_weight": 64}


def test_a_subclass_with_attention_of_its_own_is_left_alone_and_listed() -> None:
    class Other(nn.MultiheadAttention):
        def forward(self, *args: Any, **options: Any) -> Any:
            return super().forward(*args, **options)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Other(8, 2, batch_first=True)
            self.computed = nn.MultiheadAttention(8, 2, batch_first=True)
            nn.utils.parametrizations.weight_norm(self.computed, "in_proj_weight")
            nn.utils.parametrizations.weight_norm(self.computed.out_proj)
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.attention(x, x, x)[0]
            return self.head(self.computed(x, x, x)[0])  # type: ignore[no-any-return]

    model, x = Model(), torch.randn(4, 3, 8)
    assert list(supported_layers(model)) == ["attention.out_proj", "head"]
    reasons = left_out(model)
    assert "forward of its own" in reasons["attention"]
    assert "computed from other parameters" in reasons["computed"] + reasons["computed.out_proj"]
    outcome = ClassForgetting().unlearn(model, [(x, torch.zeros(4))], [(x, torch.zeros(4))])
    assert "never called" in outcome.details["untouched"]["attention.out_proj"]
    assert set(outcome.changed) == {"head.weight"}


def test_a_padded_transformer_encoder_is_read_as_it_computes() -> None:
    """In eval mode torch would pack it into nested tensors and call no layer at all."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, hidden = torch.randn(3, 5, 8), torch.arange(5) >= torch.tensor([[5], [2], [3]])
    batch = {"src": x, "src_key_padding_mask": hidden, "labels": torch.zeros(3)}
    enabled = torch.backends.mha.get_fastpath_enabled()
    found = collect_grams(model, [batch])
    assert torch.backends.mha.get_fastpath_enabled() == enabled
    assert len(found) == 12
    rows = {name: moments.rows_seen for name, moments in found.items()}
    assert rows["layers.1.self_attn.q"] == rows["layers.1.self_attn.out_proj"] == 10
    # A Linear has no padding mask of its own; "attention_mask" in the batch gives it one, see below.
    assert rows["layers.1.linear1"] == 15
    outcome = ClassForgetting().unlearn(model, [batch], [batch])
    assert outcome.details["untouched"] == {} and len(outcome.details["rows"]) == 12


def test_hugging_face_conv1d_is_a_linear_with_its_weight_transposed() -> None:
    torch.manual_seed(0)
    linear, other = nn.Linear(5, 7).double(), Conv1D(7, 5).double()
    with torch.no_grad():
        other.weight.copy_(linear.weight.mT)
    x = torch.randn(9, 3, 5).double()
    assert torch.equal(layer_rows(other, x), layer_rows(linear, x))
    forget, retain = [(x[:3], torch.zeros(3))], [(x[3:], torch.zeros(6))]
    for model in (linear, other):
        outcome = ClassForgetting().unlearn(model, forget, retain)
        assert sum(outcome.changed.values()) == 35
    assert torch.allclose(other.weight.mT, linear.weight, rtol=0, atol=1e-14)
    assert other.weight.is_contiguous()


def test_one_parameter_read_both_ways_round_is_left_alone() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(4, 4, bias=False), Conv1D(4, 4)
            self.other.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.one(x))  # type: ignore[no-any-return]

    x = torch.randn(6, 4)
    outcome = ClassForgetting().unlearn(Model(), [(x, torch.zeros(6))], [(x, torch.zeros(6))])
    assert outcome.changed == {}
    assert outcome.details["untouched"] == {
        "one": "its weight is also used by other (Conv1D)", "other": "its weight is also used by one (Linear)",
    }  # fmt: skip


def test_attentions_that_share_their_projections_add_up() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.one, self.other = (nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))
            self.other.in_proj_weight = self.one.in_proj_weight

        def forward(self, x: Tensor) -> Tensor:
            a = self.one(x, x, x)[0]
            return self.other(a, x, x)[0]  # type: ignore[no-any-return]

    model = Model().double()
    before = copy.deepcopy(model)
    x = torch.randn(9, 4, 8).double()
    ClassForgetting().unlearn(model, [(x[:3], torch.zeros(3))], [(x[3:], torch.zeros(6))])
    a = before.one(x, x, x)[0]
    q, k, v = before.one.in_proj_weight.chunk(3)
    twice = torch.cat([x, a], 1)
    wanted = torch.cat([forgotten(q, twice[3:], twice[:3]), *(forgotten(w, x[3:], x[:3]) for w in (k, v))])
    assert torch.allclose(model.one.in_proj_weight, wanted, rtol=0, atol=1e-11)
    assert model.other.in_proj_weight is model.one.in_proj_weight


CONVS: list[dict[str, Any]] = [
    {},
    {"stride": (1, 2, 3), "padding": (2, 0, 1), "dilation": (1, 2, 1)},
    {"groups": 2, "padding": "same", "kernel_size": (2, 3, 1)},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": (1, 2, 0), "padding_mode": "circular", "groups": 4},
    {"padding": "same", "padding_mode": "replicate"},
]


@pytest.mark.parametrize("options", CONVS, ids=str)
def test_conv3d_rows_times_weights_equal_the_convolution(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    conv = nn.Conv3d(4, 8, **{"kernel_size": 3, "bias": False, **options}).double()  # type: ignore[arg-type]
    x = torch.randn(2, 4, 5, 6, 7).double()
    for given in (x, x[0], x.contiguous(memory_format=torch.channels_last_3d)):
        output = conv(given)
        a = layer_rows(conv, given)
        product = torch.einsum("gnd,gpd->ngp", a, conv.weight.reshape(conv.groups, 8 // conv.groups, -1))
        wanted = output.movedim(-4, -1).reshape(-1, 8)
        assert torch.allclose(product.reshape(-1, 8), wanted, rtol=0, atol=1e-12)
        pick = torch.tensor([a.shape[1] - 1, 0, 2, 2])
        assert torch.equal(layer_rows(conv, given, pick), a[:, pick])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_weight_in_channels_last_is_updated_where_it_lies(memory_format: Any) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3).double()
    x = torch.randn(8, 3, 6, 6).double()
    rows = [layer_rows(conv, part)[0] for part in (x[4:], x[:4])]
    wanted = forgotten(conv.weight.detach().flatten(1), *rows).view_as(conv.weight)
    conv = conv.to(memory_format=memory_format)
    ClassForgetting(max_patches=None).unlearn(conv, [(x[:4], torch.zeros(4))], [(x[4:], torch.zeros(4))])
    assert torch.allclose(conv.weight, wanted, rtol=0, atol=1e-12)
    assert conv.weight.is_contiguous(memory_format=memory_format)


class LanguageModel(nn.Module):
    """Tied embedding and head, attention, Conv1D and Linear: logits of the next token."""

    def __init__(self, tokens: int = 11, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(tokens, width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.up, self.down = Conv1D(2 * width, width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, tokens, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        x = x + self.attention(x, x, x, key_padding_mask=attention_mask == 0, need_weights=False)[0]
        x = x + self.down(self.up(x).relu())
        return self.head(x)  # type: ignore[no-any-return]


def text(n: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 11, (n, 6), generator=generator)
    mask = (torch.arange(6) < torch.randint(1, 7, (n, 1), generator=generator)).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": ids}


@pytest.mark.parametrize("max_patches", [None, 1000])
def test_masked_text_does_not_count_and_tied_embeddings_are_left_alone(max_patches: int | None) -> None:
    model = LanguageModel().double()
    before = copy.deepcopy(model)
    forget, retain = text(4, 0), text(9, 1)
    method = ClassForgetting(max_patches=max_patches)
    outcome = method.unlearn(model, [forget], [retain])
    assert outcome.details["untouched"] == {"head": "its weight is also used by embedding (Embedding)"}
    assert torch.equal(model.embedding.weight, before.embedding.weight)
    shown = int(retain["attention_mask"].sum()), int(forget["attention_mask"].sum())
    assert set(outcome.details["rows"].values()) == {shown}
    x = [before.embedding(batch["input_ids"])[batch["attention_mask"].bool()] for batch in (retain, forget)]
    wanted = forgotten(before.attention.in_proj_weight, *x)
    assert torch.allclose(model.attention.in_proj_weight, wanted, rtol=0, atol=1e-11)
    # What hides behind the mask must not matter: other tokens there, the same update.
    again = copy.deepcopy(before)
    noisy = [
        {**batch, "input_ids": batch["input_ids"] + 3 * (1 - batch["attention_mask"])} for batch in (forget, retain)
    ]
    method.unlearn(again, noisy[:1], noisy[1:])
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-10)


def test_padding_longer_than_the_text_changes_nothing() -> None:
    one, other = (LanguageModel().double() for _ in range(2))
    forget, retain = text(4, 0), text(9, 1)
    longer = [{key: nn.functional.pad(value, (0, 5)) for key, value in batch.items()} for batch in (forget, retain)]
    ClassForgetting().unlearn(one, [forget], [retain])
    ClassForgetting().unlearn(other, longer[:1], longer[1:])
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-10)


def test_a_mask_of_other_axes_than_the_inputs_is_not_applied() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.layer(x.flatten(0, 1)).view(*x.shape[:2], 2)  # type: ignore[no-any-return]

    batch = {"x": torch.randn(4, 5, 3), "attention_mask": torch.zeros(4, 5), "labels": torch.zeros(4)}
    assert collect_grams(Flat(), [batch])["layer"].rows_seen == 20
    # All masked away is no row at all, and no reason to stop.
    batch["attention_mask"][0, 0] = 1
    seen = collect_grams(LanguageModel(), [{**text(2, 0), "attention_mask": torch.ones(2, 6)}])
    assert seen["down"].rows_seen == 12
