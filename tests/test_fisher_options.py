"""Every option of fisher_diagonal against its definition, one backward pass per term, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from test_fisher import Pairs, TwiceUsed, cnn, images, per_sample_loop, state, tokens
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastunlearn import ops
from fastunlearn.fisher import FisherDiagonal, fisher_diagonal, fisher_plan

Terms = Callable[[Any, Tensor], Iterable[tuple[Any, Tensor]]]  # outputs, targets of one sample -> weights and losses


def loop(model: nn.Module, batches: Pairs, terms: Terms) -> dict[str, Tensor]:
    """Sum over samples and terms of weight x squared gradient of the loss."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros_like(p) for name, p in named.items()}
    for inputs, targets in batches:
        for n in range(len(targets)):
            for weight, loss in terms(model(inputs[n : n + 1]), targets[n : n + 1]):
                grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
                for name, grad in zip(named, grads, strict=True):
                    if grad is not None:
                        sums[name] += weight * grad.square()
    return sums


def assert_same(fisher: FisherDiagonal, sums: dict[str, Tensor], samples: int) -> None:
    assert fisher.num_samples == samples
    assert set(fisher) == set(sums)
    for name, value in sums.items():
        torch.testing.assert_close(
            fisher[name], value / samples, rtol=1e-9, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}"
        )


# ---- kinds -------------------------------------------------------------------------------------------------------


def smoothed(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none", label_smoothing=0.1)


@pytest.mark.parametrize("loss_fn", [None, smoothed])
@pytest.mark.parametrize("build", [cnn, TwiceUsed])
def test_exact_is_the_expectation_over_the_models_own_labels(build: Any, loss_fn: Any) -> None:
    torch.manual_seed(0)
    model, batches = build().double(), images(4, 9, 8) if build is cnn else images(3, 5)

    def terms(outputs: Tensor, _: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        probabilities = outputs.detach().softmax(1)[0]
        for c, p in enumerate(probabilities):
            yield p, (loss_fn or F.cross_entropy)(outputs, torch.tensor([c])).sum()

    fisher = fisher_diagonal(model, batches, loss_fn, kind="exact")
    assert_same(fisher, loop(model, batches, terms), 8)
    assert fisher.kind == "exact"


@pytest.mark.filterwarnings("ignore:no kernel for")
def test_exact_reaches_layers_without_a_kernel() -> None:
    torch.manual_seed(0)
    model, batches = Last(nn.GRU(3, 4, batch_first=True)).double(), images(5, 3)

    def terms(outputs: Tensor, _: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        for c, p in enumerate(outputs.detach().softmax(1)[0]):
            yield p, F.cross_entropy(outputs, torch.tensor([c]))

    assert_same(fisher_diagonal(model, batches, kind="exact"), loop(model, batches, terms), 8)


class Last(nn.Module):
    """The last state of a recurrent body: one of its two outputs."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)[1][0]


@pytest.mark.parametrize("kind", ["exact", "monte_carlo"])
def test_kinds_that_need_logits_say_so(kind: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Unflatten(1, (2, 2))).double()
    batches = [(x, torch.randint(2, (len(x), 2))) for x, _ in images(6)]
    with pytest.raises(ValueError, match=r"logits \[N, C\], but the model returns \[5, 2, 2\]"):
        fisher_diagonal(model, batches, kind=kind)


# ---- tokens ------------------------------------------------------------------------------------------------------


class TinyLanguageModel(nn.Module):
    """Causal attention, tied head; logits [N, V, T]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.norm, self.mix = nn.LayerNorm(6), nn.Linear(6, 18)
        self.head = nn.Linear(6, 7, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = self.mix(self.norm(x)).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x).mT


def labelled(length: int = 5, classes: int = 7) -> Pairs:
    """Every kind of row: some positions ignored, one position in all rows, one row whole."""
    batches = []
    for x, _ in tokens(length, classes):
        y = torch.randint(classes, x.shape)
        y[torch.rand(y.shape) < 0.3] = -100
        y[:, 2], y[1] = -100, -100
        batches.append((x, y))
    return batches


def by_position(outputs: Tensor, targets: Tensor) -> Iterable[tuple[float, Tensor]]:
    losses = F.cross_entropy(outputs, targets, reduction="none")
    for t in range(losses.shape[1]):
        if targets[0, t] != -100:
            yield 1.0, losses[0, t]


def own_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


@pytest.mark.parametrize("loss_fn", [None, own_loss])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.filterwarnings("ignore:no kernel for")
def test_a_token_has_the_gradient_of_its_own_loss(tied: bool, loss_fn: Any) -> None:
    torch.manual_seed(0)
    model, batches = TinyLanguageModel().double(), labelled()
    if tied:
        model.head.weight = model.embed.weight
    count = sum(int((y != -100).sum()) for _, y in batches)
    fisher = fisher_diagonal(model, batches, loss_fn, sample="token")
    assert_same(fisher, loop(model, batches, by_position), count)
    assert fisher.sample == "token"


def test_tokens_exact() -> None:
    torch.manual_seed(0)
    model, batches = TinyLanguageModel().double(), labelled()

    def terms(outputs: Tensor, targets: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        for t in range(targets.shape[1]):
            if targets[0, t] != -100:
                for c, p in enumerate(outputs.detach().softmax(1)[0, :, t]):
                    yield p, F.cross_entropy(outputs[:, :, t], torch.tensor([c]))

    count = sum(int((y != -100).sum()) for _, y in batches)
    assert_same(fisher_diagonal(model, batches, kind="exact", sample="token"), loop(model, batches, terms), count)


def test_tokens_monte_carlo_approaches_exact() -> None:
    torch.manual_seed(0)
    model = nn.Conv1d(2, 3, 1).double()
    x = torch.randn(1, 2, 2, dtype=torch.float64).expand(10_000, 2, 2)
    y = torch.zeros(10_000, 2, dtype=torch.int64)
    y[:, 1] = -100
    drawn = fisher_diagonal(model, [(x, y)], kind="monte_carlo", sample="token")
    exact = fisher_diagonal(model, [(x[:1], y[:1])], kind="exact", sample="token")
    assert drawn.num_samples == 10_000
    assert torch.allclose(drawn["weight"], exact["weight"], rtol=0.05)


def test_tokens_need_a_label_and_a_loss_each() -> None:
    model, [(x, y), _] = TinyLanguageModel().double(), labelled()
    with pytest.raises(ValueError, match="no position with a label"):
        fisher_diagonal(model, [(x, torch.full_like(y, -100))], sample="token")
    with pytest.raises(ValueError, match=r"shape \[1, T\], got \[1\]"):
        fisher_diagonal(model, [(x, y)], lambda o, t: own_loss(o, t).mean(1), sample="token")
    with pytest.raises(ValueError, match="sample must be one of"):
        fisher_diagonal(model, [(x, y)], sample="word")


# ---- merging -----------------------------------------------------------------------------------------------------


def test_diagonals_add_up_to_the_one_over_all_samples(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model, loaders = cnn().double(), [images(4, 9, 8, sizes=sizes) for sizes in ((3, 2), (1,), (4, 4))]
    whole = fisher_diagonal(model, [batch for loader in loaders for batch in loader])
    merged = sum(fisher_diagonal(model, loader) for loader in loaders)
    fisher_diagonal(model, loaders[0]).save(tmp_path / "half")
    resumed = FisherDiagonal.load(tmp_path / "half") + fisher_diagonal(model, loaders[1] + loaders[2])
    for fisher in (merged, resumed):
        assert_same(fisher, {name: value * 14 for name, value in whole.items()}, 14)


def test_loading_brings_back_what_merging_needs(tmp_path: Any) -> None:
    fisher_diagonal(TinyLanguageModel(), labelled(), kind="exact", sample="token").save(tmp_path / "file")
    loaded = FisherDiagonal.load(tmp_path / "file")
    assert (loaded.kind, loaded.sample) == ("exact", "token")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (FisherDiagonal({"a": torch.ones(2), "c": torch.ones(3)}, 1), r"\['b', 'c'\] are in one only"),
        (FisherDiagonal({"a": torch.ones(2), "b": torch.ones(4)}, 1), r"b has shape \[3\] in one and \[4\]"),
        (FisherDiagonal({"a": torch.ones(2), "b": torch.ones(3)}, 1, "exact"), "kind 'empirical' and 'exact'"),
        (FisherDiagonal({"a": torch.ones(2), "b": torch.ones(3)}, 1, sample="token"), "sample 'sequence' and 'token'"),
    ],
)
def test_diagonals_of_other_things_do_not_add_up(other: FisherDiagonal, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FisherDiagonal({"a": torch.ones(2), "b": torch.ones(3)}, 5) + other


# ---- what a model may run in -------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Layers that autocast treats differently; one of them used twice, one without a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(5, 6, 3, padding=1), nn.LayerNorm(8)
        self.twice, self.gate = nn.Linear(8, 8), nn.Parameter(torch.randn(8))
        self.recurrent, self.head = nn.GRU(8, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)) * self.gate
        x = self.twice(F.gelu(self.twice(x)))
        return self.head(self.recurrent(x)[0].mean(1))


@pytest.mark.filterwarnings("ignore:no kernel for")
@pytest.mark.parametrize("seen_before", [False, True])
def test_under_autocast_it_is_as_close_as_a_loop(seen_before: bool) -> None:
    """Also where the context already holds casts of the weights, made without gradients."""
    torch.manual_seed(0)
    model, batches = Mixed(), [(x.float(), y) for x, y in images(5, 8, sizes=(12, 8))]
    with torch.autocast("cpu", torch.bfloat16):
        if seen_before:
            with torch.no_grad():
                model(batches[0][0])
        ours = fisher_diagonal(model, batches)
        torch.clear_autocast_cache()
        theirs = per_sample_loop(model, batches)
    exact = per_sample_loop(model.double(), [(x.double(), y) for x, y in batches])
    for name, value in exact.items():
        error, reference = ((f[name] - value).norm() / value.norm() for f in (ours, theirs))
        assert reference > 1e-4, "the loop ran in float32"
        assert error <= 2 * reference, name


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 4)
        self.places, self.gate = nn.Embedding(5, 6), nn.Parameter(torch.randn(6))
        self.recurrent, self.reentrant = nn.GRU(6, 6, batch_first=True), reentrant

    def inner(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x) + self.places(torch.arange(5)[None])).relu_() * self.gate
        return self.recurrent(x)[0]

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(checkpoint(self.inner, x, use_reentrant=self.reentrant).mean(1))


@pytest.mark.filterwarnings("ignore:no kernel for")
@pytest.mark.parametrize("kind", ["empirical", "exact"])
def test_checkpointed_models_are_exact(kind: Any) -> None:
    torch.manual_seed(0)
    model, batches = Checkpointed(False).double(), images(5, 6)
    fisher = fisher_diagonal(model, batches, kind=kind)

    def terms(outputs: Tensor, targets: Tensor) -> Iterable[tuple[Any, Tensor]]:
        for c, p in enumerate(outputs.detach().softmax(1)[0]):
            if kind == "exact" or c == targets[0]:
                yield p if kind == "exact" else 1.0, F.cross_entropy(outputs, torch.tensor([c]))

    assert_same(fisher, loop(model, batches, terms), 8)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("params", [None, ["norm.weight"]])
def test_reentrant_checkpoints_are_refused(params: Any) -> None:
    """Also where only parameters inside are asked for, so that nothing before the checkpoint has a gradient."""
    torch.manual_seed(0)
    model, batches = Checkpointed(True).double(), images(5, 6)
    before = state(model)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        fisher_diagonal(model, batches, params=params)
    assert state(model) == before


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_models_run_their_python_code(backend: str, in_place: bool) -> None:
    torch.manual_seed(0)
    plain, batches = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double(), images(6)
    expected = per_sample_loop(plain, batches)
    model: Any = plain
    if in_place:
        plain.compile(backend=backend)
    else:
        model = torch.compile(plain, backend=backend)
    for used in (False, True):
        if used:
            model(batches[0][0]).sum().backward()
        fisher = fisher_diagonal(model, batches)
        assert list(fisher) == [name for name, _ in model.named_parameters()]
        assert_same(fisher, {name: expected[name.removeprefix("_orig_mod.")] * 8 for name in fisher}, 8)
    assert torch.isfinite(model(batches[0][0])).all()


def test_the_plan_says_how_each_parameter_is_taken_and_changes_nothing() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(5, 4))
            self.recurrent = nn.LSTM(4, 4, batch_first=True)
            self.out = nn.Linear(4, 3)
            self.unused = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.recurrent(x + self.table)[0][:, -1])

    model = Model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    ways = fisher_plan(model, [(torch.rand(6, 5, 4), torch.arange(6) % 3)])
    assert list(ways) == list(before)
    assert ways["table"] == "one copy per sample"
    assert ways["recurrent.weight_hh_l0"] == "one sample after another, on recurrent (LSTM)"
    assert ways["out.weight"] == "kernel, Linear"
    assert ways["unused.bias"] == "the loss does not depend on it"
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


def test_calls_of_operators_are_counted_by_device_and_only_inside() -> None:
    model = nn.Linear(3, 2)
    batches = [(torch.rand(4, 3), torch.zeros(4, dtype=torch.int64))] * 3
    with ops.counted() as calls:
        fisher_diagonal(model, batches)
        with pytest.raises(RuntimeError, match="already"), ops.counted():
            pass
    assert calls == {("sq_grad_linear", "cpu"): 3, ("sq_grad_bias", "cpu"): 3}
    fisher_diagonal(model, batches)
    assert calls.total() == 6
