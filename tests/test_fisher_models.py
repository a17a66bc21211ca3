"""Models whose parameters are hard to follow: each sample's gradient is right, or the model is refused by name."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_fisher import Pairs, Pooled, assert_equals_loop, images, per_sample_loop, state, tokens
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from fastunlearn.fisher import fisher_diagonal


def assert_equals_loop_without_a_warning(model: nn.Module, batches: Pairs) -> None:
    """No warning: no parameter was differentiated sample by sample."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equals_loop(model, batches)


# ---- parameters without samples: one copy per sample --------------------------------------------------------------


class VisionTransformer(nn.Module):
    """A class token and positions [1, T, D] as bare parameters; a gate [D] on every block."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 4, 4)
        self.cls = nn.Parameter(torch.randn(1, 1, 6))
        self.positions = nn.Parameter(torch.randn(1, 5, 6))
        self.block, self.gate = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.GELU()), nn.Parameter(torch.zeros(6))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head((x + self.gate * self.block(x)).tanh()[:, 0])


class Positions(nn.Module):
    """A position table called once for all samples: with ids [1, T] as Hugging Face does, or [T]."""

    def __init__(self, lead: bool, twice: bool = False) -> None:
        super().__init__()
        self.words, self.places, self.head = nn.Embedding(9, 6), nn.Embedding(7, 6), nn.Linear(6, 4)
        self.lead, self.twice = lead, twice

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1])
        x = (self.words(ids) + self.places(places[None] if self.lead else places)).tanh()
        if self.twice:
            x = x * self.places(places[None] if self.lead else places)
        return self.head(x.mean(1))


class RootMeanSquare(nn.Module):
    """A norm layer of one's own, as Llama's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Scale(nn.Module):
    """ConvNeXt's layer scale, on channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gamma, self.head = nn.Conv2d(3, 5, 3), nn.Parameter(torch.randn(5, 1, 1)), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.conv(x) * self.gamma).relu().mean((2, 3)))


SHARED: dict[str, Callable[[], tuple[nn.Module, Pairs]]] = {
    "vision transformer": lambda: (VisionTransformer(), images(3, 8, 8, sizes=(5, 3, 1))),
    "positions [1, T]": lambda: (Positions(True), tokens(5, 9)),
    "positions [T]": lambda: (Positions(False), tokens(5, 9)),
    "positions [1, T] used twice": lambda: (Positions(True, twice=True), tokens(5, 9)),
    "as many positions as samples": lambda: (Positions(False), tokens(4, 9, sizes=(4, 4))),
    "as many positions as samples in the trial": lambda: (Positions(False), tokens(2, 9, sizes=(2, 4))),
    "lengths that change": lambda: (Positions(False), tokens(5, 9) + tokens(3, 9)),
    "the first batch is one sample": lambda: (Positions(True), tokens(5, 9, sizes=(1, 4))),
    "a norm layer of one's own": lambda: (Pooled(nn.Sequential(RootMeanSquare(6), nn.Linear(6, 6)), 6), images(5, 6)),
    "layer scale on channels": lambda: (Scale(), images(3, 6, 6)),
}


@pytest.mark.parametrize("name", SHARED)
def test_parameters_that_all_samples_share_cost_no_loop(name: str) -> None:
    torch.manual_seed(0)
    assert_equals_loop_without_a_warning(*SHARED[name]())


class Odd(nn.Module):
    """Positions used in ways that a copy per sample would change."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor], bare: bool) -> None:
        super().__init__()
        self.mix, self.head, self.use = nn.Linear(6, 6), nn.Linear(6, 4), use
        if bare:
            self.places = nn.Parameter(torch.randn(1, 5, 6))
        else:
            self.table = nn.Embedding(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        places = self.places if hasattr(self, "places") else self.table(torch.arange(5)[None])
        return self.head(self.use(self.mix(x), places).tanh().mean(1))


ODD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean over the first axis": lambda x, p: x + p.mean(0),
    "sum over everything": lambda x, p: x + 0.1 * p.sum(),
    "the first row for all": lambda x, p: x + p[0],
    "the last row for all": lambda x, p: x + p[-1],
    "divided by the length": lambda x, p: x + p / len(p),
    "a norm beside a good use": lambda x, p: x + p + 0.01 * p.norm(),
    "squeezed": lambda x, p: x + p.squeeze(0),
    "samples mixed through it": lambda x, p: x + p + 0.01 * p.std(0, correction=0),
}


@pytest.mark.filterwarnings("ignore:no kernel for")
@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("name", ODD)
def test_shared_parameters_in_odd_uses_stay_exact(name: str, bare: bool) -> None:
    torch.manual_seed(0)
    assert_equals_loop(Odd(ODD[name], bare), images(5, 6))


class Aliased(nn.Module):
    """A bare parameter that is reached in a second way, not by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.head = nn.Parameter(torch.randn(1, 5, 6)), nn.Linear(6, 4)
        self.others = [self.places]

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x * self.others[0] + self.places).tanh().mean(1))


def test_a_parameter_under_a_second_name_stays_exact() -> None:
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="no kernel for the model"):
        assert_equals_loop(Aliased(), images(5, 6))


@pytest.mark.parametrize("fails", [False, True])
def test_shared_parameters_are_put_back(fails: bool) -> None:
    torch.manual_seed(0)
    model, batches = VisionTransformer().double(), images(3, 8, 8)
    before, parameters = state(model), dict(model.named_parameters())
    calls = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(len(outputs))
        if fails and len(outputs) > 2:
            raise RuntimeError("planned")
        return F.cross_entropy(outputs, targets, reduction="none")

    if fails:
        with pytest.raises(RuntimeError, match="planned"):
            fisher_diagonal(model, batches, loss)
    else:
        fisher_diagonal(model, batches, loss)
    assert max(calls) > 2
    assert state(model) == before
    assert all(p is parameters[name] for name, p in model.named_parameters())


# ---- few weights without a rule ----------------------------------------------------------------------------------


class FewWeights(nn.Module):
    """Small layers on large inputs: gradients per sample are smaller than activations."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.Conv3d(1, 2, 2)
        self.poly = Polynomial()
        self.head = nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.poly(self.pool(x).tanh()).mean((2, 3, 4)))


class Polynomial(nn.Module):
    """A learned activation: three numbers for all elements."""

    def __init__(self) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.coefficients
        return a + b * x + c * x * x


def test_few_weights_are_differentiated_for_all_samples_together() -> None:
    torch.manual_seed(0)
    assert_equals_loop_without_a_warning(FewWeights(), images(1, 5, 5, 5))


def test_many_weights_are_differentiated_sample_by_sample() -> None:
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=r"body \(Bag\)"):
        assert_equals_loop(Pooled(Bag(), 6), images(2, 3))


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6, 40))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ntd,dck->ntck", x, self.weight).logsumexp(-1)


# ---- Hugging Face's ways ------------------------------------------------------------------------------------------


class Output(dict[str, Tensor]):
    @property
    def logits(self) -> Tensor:
        return self["logits"]


class Conv1D(nn.Module):
    """GPT-2's linear layer: the weight is [in, out]."""

    def __init__(self, out: int, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(width, out) / 3), nn.Parameter(torch.randn(out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Heads [N, H, T, D]; mask [N, T] of positions that count."""
    length = q.shape[2]
    allowed = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    if mask is not None:
        allowed = allowed & mask[:, None, None, :].bool()
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~allowed, torch.finfo(q.dtype).min)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class GPT2Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.c_attn, self.c_proj = Conv1D(24, 8), Conv1D(8, 8)
        self.c_fc, self.c_out = Conv1D(16, 8), Conv1D(8, 16)

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, None]:
        q, k, v = (t.unflatten(2, (2, 4)).transpose(1, 2) for t in self.c_attn(self.ln_1(x)).split(8, -1))
        x = x + self.c_proj(attend(q, k, v, mask))
        return x + self.c_out(F.gelu(self.c_fc(self.ln_2(x)))), None


class GPT2(nn.Module):
    """Learned positions [1, T], Conv1D, an attention mask, the head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(11, 8), nn.Embedding(6, 8)
        self.h, self.ln_f = nn.ModuleList([GPT2Block(), GPT2Block()]), nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 11, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Output:
        x = self.wte(input_ids) + self.wpe(torch.arange(input_ids.shape[1])[None])
        for block in self.h:
            x, _ = block(x, mask=attention_mask)
        return Output(logits=self.lm_head(self.ln_f(x)))


class LlamaBlock(nn.Module):
    """Grouped queries, rotary positions, a gated feed-forward part, norm layers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, width, bias=False) for width in (8, 4, 4))
        self.o, self.norm1, self.norm2 = nn.Linear(8, 8, bias=False), RootMeanSquare(8), RootMeanSquare(8)
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor, positions: tuple[Tensor, Tensor], mask: Tensor | None = None) -> Tensor:
        y = self.norm1(x)
        q, k, v = (layer(y).unflatten(2, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        cos, sin = positions
        q, k = (t * cos + torch.cat([-t[..., 2:], t[..., :2]], -1) * sin for t in (q, k))
        x = x + self.o(attend(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), mask))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(11, 8), RootMeanSquare(8), nn.Linear(8, 11, bias=False)
        self.layers = nn.ModuleList([LlamaBlock(), LlamaBlock()])

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Output:
        angles = torch.arange(input_ids.shape[1])[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])
        positions = (angles.cos().to(self.head.weight)[None, None], angles.sin().to(self.head.weight)[None, None])
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, positions=positions, mask=attention_mask)
        return Output(logits=self.head(self.norm(x)))


class Bert(nn.Module):
    """Three embeddings, one of them without samples, and a pooled classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.kinds = nn.Embedding(11, 8, padding_idx=0), nn.Embedding(6, 8), nn.Embedding(2, 8)
        self.register_buffer("position_ids", torch.arange(6).expand(1, -1))
        self.norm, self.qkv, self.dense = nn.LayerNorm(8, eps=1e-12), nn.Linear(8, 24), nn.Linear(8, 8)
        self.classifier = nn.Linear(8, 11)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor) -> Output:
        places = self.places(self.position_ids[:, : input_ids.shape[1]])
        x = self.norm(self.words(input_ids) + self.kinds(token_type_ids) + places)
        q, k, v = (t.unflatten(2, (2, 4)).transpose(1, 2) for t in self.qkv(x).split(8, -1))
        x = x + self.dense(attend(q, k, v, attention_mask)).tanh()
        return Output(logits=self.classifier(x).mean(1))


def language_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """The next token, per sequence."""
    if labels.dim() == 1:
        return F.cross_entropy(outputs, labels, reduction="none")
    return F.cross_entropy(outputs[:, :-1].mT, labels[:, 1:], reduction="none").sum(1)


def text(kind: type[nn.Module]) -> list[dict[str, Tensor]]:
    batches = []
    for samples, length in ((4, 5), (3, 6)):
        ids = torch.randint(1, 11, (samples, length))
        mask = torch.ones(samples, length, dtype=torch.int64)
        mask[0, -2:], mask[1, -1:] = 0, 0
        batch = {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
        if kind is Bert:
            batch |= {"token_type_ids": torch.randint(2, ids.shape), "labels": torch.randint(11, (samples,))}
        batches.append(batch)
    return batches


@pytest.mark.filterwarnings("ignore:no kernel for")
@pytest.mark.parametrize("kind", [GPT2, Llama, Bert])
def test_hugging_face_models(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, batches = kind().double(), text(kind)
    named, samples = dict(model.named_parameters()), 0
    sums = {name: torch.zeros_like(p) for name, p in named.items()}
    for batch in batches:
        for n in range(len(batch["labels"])):
            row = {key: value[n : n + 1] for key, value in batch.items()}
            labels = row.pop("labels")
            loss = language_loss(model(**row).logits, labels).sum()
            for name, grad in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True):
                sums[name] += grad.square()
            samples += 1
    fisher = fisher_diagonal(model, batches, language_loss)
    for name, value in sums.items():
        torch.testing.assert_close(fisher[name], value / samples, rtol=1e-9, atol=1e-14, msg=lambda m, n=name: n + m)


# ---- calls that differ from batch to batch, and graphs with corners -----------------------------------------------


class Moody(nn.Module):
    """Uses its layers as the first number of the batch says; that number has no other use."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        mood, x = int(x[0, 0]), x[:, 1:]
        for _ in range(1 + mood % 2):
            x = self.body(x).tanh()
        if mood >= 2:
            x = F.linear(x, next(self.body.parameters())).tanh()
        return self.head(x)


class Gru(nn.Module):
    """A matrix and a cell without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.cell = nn.Parameter(torch.randn(6, 6)), nn.GRUCell(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(F.linear(x, self.first), x)


def moods(*values: int) -> Pairs:
    return [
        (torch.cat([torch.full((4, 1), value, dtype=torch.float64), x], 1), y)
        for value in values
        for x, y in images(6, sizes=(4,))
    ]


@pytest.mark.filterwarnings("ignore:no kernel for")
@pytest.mark.parametrize("body", [lambda: nn.Linear(6, 6), Gru], ids=["linear", "cell"])
@pytest.mark.parametrize("values", [(0, 1), (1, 0), (0, 2), (2, 0, 3, 1), (0, 0, 3)])
def test_layers_called_as_the_batch_demands(values: tuple[int, ...], body: Any) -> None:
    torch.manual_seed(0)
    assert_equals_loop(Moody(body()), moods(*values))


class Discarded(nn.Module):
    """Calls a layer for nothing, and uses its weight without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.head = nn.Linear(6, 6, bias=False), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.linear(x)
        return self.head(F.linear(2 * x, self.linear.weight).tanh())


class Same(nn.Module):
    """The same tensor returned by several modules, twice by one, then written over in place."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Identity(), nn.Sequential(nn.Linear(6, 6)), nn.Identity())
        self.pair, self.head = Pair(), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        a, b, _ = self.pair(self.inner(x))
        return self.head(a.add_(1).relu_() * b)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = torch.einsum("nd,dp->np", x, self.weight)
        return y, y, y.detach()


class Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


class HalfBlocked(nn.Module):
    """One of two uses of a layer is cut from the loss by a function that gives no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.linear(x).tanh() + Blocked.apply(self.linear(2 * x)))


def reparametrized(change: Callable[[nn.Module], object]) -> nn.Module:
    """The layer's own class and forward pass, but other parameters behind its weight."""
    layer = nn.Linear(6, 6)
    change(layer)
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(6, 4))


class LowRank(nn.Module):
    """A layer that is given a second parameter, which its parent uses."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.head = nn.Linear(6, 6), nn.Linear(6, 4)
        self.linear.update = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.linear(x) + x @ self.linear.update).tanh())


CORNERS: dict[str, Callable[[], nn.Module]] = {
    "a call for nothing beside a use without a call": Discarded,
    "one tensor returned many times": Same,
    "a function without a gradient": HalfBlocked,
    "weight norm": lambda: reparametrized(nn.utils.parametrizations.weight_norm),
    "weight norm by a hook": lambda: reparametrized(nn.utils.weight_norm),
    "pruned": lambda: reparametrized(lambda layer: prune.random_unstructured(layer, "weight", 0.5)),
    "a parameter added to a layer": LowRank,
}


@pytest.mark.filterwarnings("ignore:no kernel for")
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("name", CORNERS)
def test_corners_of_the_graph(name: str) -> None:
    torch.manual_seed(0)
    assert_equals_loop(CORNERS[name](), images(6))


class Company(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x - x.mean(0))


def test_samples_that_influence_one_another_are_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="samples influence one another"):
        fisher_diagonal(Company().double(), images(6))


class Overwritten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.head = nn.Linear(6, 6), Careless(), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.linear(self.norm(x)))


class Careless(nn.Module):
    """Writes over what its layer was given. Autograd does not mind: the layer's weight needs no gradient of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        with torch.no_grad():
            x.mul_(1)
        return y


def test_an_error_in_the_backward_pass_reaches_the_user_and_leaves_the_model() -> None:
    torch.manual_seed(0)
    model, batches = Overwritten().double(), images(6)
    before = state(model)
    with pytest.raises(ValueError, match=r"the input of linear\.linear was written over in place"):
        fisher_diagonal(model, batches)
    assert state(model) == before


def test_nothing_is_held_afterwards() -> None:
    """Hooks, graphs and records hold one another while a batch runs."""
    torch.manual_seed(0)
    outputs: list[Any] = []
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)).double()
    model[1].register_forward_hook(lambda _, __, out: outputs.append(weakref.ref(out)))
    gc.collect()
    gc.disable()
    try:
        fisher_diagonal(model, images(6))
        assert len(outputs) > 2
        assert not any(out() is not None for out in outputs)
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("build", "shape", "planning"),
    [(lambda: nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4)), (6,), 1), (VisionTransformer, (3, 8, 8), 1 + 2 + 3 * 3)],
    ids=["rules", "three parameters without samples"],
)
def test_planning_takes_few_samples(build: Any, shape: tuple[int, ...], planning: int) -> None:
    """One; where rules are not enough two more, and three for each parameter that is given one copy per sample."""
    torch.manual_seed(0)
    model, sizes = build().double(), []
    last = list(model.children())[-1]
    last.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    fisher_diagonal(model, images(*shape, sizes=(16, 16, 7)))
    assert sizes[-3:] == [16, 16, 7]
    assert sum(sizes[:-3]) == planning


def test_what_is_not_asked_for_costs_no_backward_pass() -> None:
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(6, 6), Counted(), nn.Linear(6, 4)).double(), images(6)
    expected = per_sample_loop(model, batches)
    Seen.backwards = 0
    fisher = fisher_diagonal(model, batches, params=["2.weight"])
    torch.testing.assert_close(fisher["2.weight"], expected["2.weight"], rtol=1e-9, atol=1e-14)
    assert Seen.backwards == 0


class Seen(torch.autograd.Function):
    backwards = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        Seen.backwards += 1
        return grad


class Counted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Seen.apply(x)
