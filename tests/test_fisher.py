"""fisher_diagonal against one backward pass per sample, in float64."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastunlearn.fisher import FisherDiagonal, fisher_diagonal

Pairs = list[tuple[Any, Tensor]]


def per_sample_loop(model: nn.Module, batches: Pairs) -> dict[str, Tensor]:
    """The definition: the mean over samples of the squared gradient of that sample's loss."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros_like(p) for name, p in named.items()}
    samples = 0
    for inputs, targets in batches:
        for n in range(len(targets)):
            loss = F.cross_entropy(model(inputs[n : n + 1]), targets[n : n + 1])
            grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
            for name, grad in zip(named, grads, strict=True):
                if grad is not None:
                    sums[name] += grad.square()
            samples += 1
    return {name: value / samples for name, value in sums.items()}


def assert_equals_loop(model: nn.Module, batches: Pairs) -> FisherDiagonal:
    model = model.double()
    fisher = fisher_diagonal(model, batches)
    expected = per_sample_loop(model, batches)
    assert set(fisher) == set(expected)
    for name in expected:
        torch.testing.assert_close(
            fisher[name], expected[name], rtol=1e-9, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}"
        )
    return fisher


def images(*shape: int, sizes: tuple[int, ...] = (5, 3), classes: int = 4) -> Pairs:
    return [(torch.randn(n, *shape, dtype=torch.float64), torch.randint(classes, (n,))) for n in sizes]


def tokens(length: int, vocabulary: int, sizes: tuple[int, ...] = (4, 3), classes: int = 4) -> Pairs:
    return [(torch.randint(vocabulary, (n, length)), torch.randint(classes, (n,))) for n in sizes]


class Pooled(nn.Module):
    """Any body with outputs [N, T, C], averaged over T."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(1))


class Block(nn.Module):
    """A pre-norm transformer block; ``batch_first=False`` puts the samples on the second axis inside."""

    def __init__(self, width: int, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width, bias=False)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=batch_first)
        self.mlp = nn.Sequential(nn.Linear(width, 9), nn.GELU(), nn.Linear(9, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.mlp(self.norm2(x))
        return x if self.batch_first else x.transpose(0, 1)


class TiedLanguageModel(nn.Module):
    """The embedding is the output head as well, through F.linear."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 6)
        self.mix = nn.Linear(6, 6)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.mix(self.embed(ids)).mean(1), self.embed.weight)


class TwiceUsed(nn.Module):
    """One linear and one norm layer used twice, on different lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.head = nn.Linear(5, 5), nn.LayerNorm(5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.linear(x)).tanh()
        return self.head(self.norm(self.linear(x[:, :2])).mean(1) + x.sum(1))


class PositionTable(nn.Module):
    """A learned position table added to every sample, as a bare parameter and as an embedding called once."""

    def __init__(self) -> None:
        super().__init__()
        self.bare = nn.Parameter(torch.randn(3, 5))
        self.table = nn.Embedding(3, 5)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        positions = self.table(torch.arange(3))
        return self.head((x + self.bare + positions).tanh().mean(1))


def cnn() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, (3, 2), dilation=(1, 2), padding="same", padding_mode="circular", groups=8),
        nn.GroupNorm(2, 8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 6, 3, bias=False),
        nn.Flatten(),
        nn.LazyLinear(4),
    )
    model(torch.randn(2, 4, 9, 8))  # sets the lazy layer and the running statistics
    return model.eval()


MODELS: dict[str, Callable[[], tuple[nn.Module, Pairs]]] = {
    "mlp": lambda: (nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 4)), images(7)),
    "hooks that change what layers are given and return": lambda: (hooked(), images(7)),
    "cnn with groups, dilation and batch norm": lambda: (cnn(), images(4, 9, 8)),
    "transformer block": lambda: (Pooled(Block(6, True), 6), images(5, 6)),
    "transformer block, samples second": lambda: (Pooled(Block(6, False), 6), images(5, 6)),
    "as many positions as samples, samples second": lambda: (
        Pooled(Block(6, False), 6),
        images(5, 6, sizes=(5,)),
    ),
    "embedding with padding": lambda: (
        Pooled(nn.Sequential(nn.Embedding(11, 6, padding_idx=0), nn.RMSNorm(6)), 6),
        tokens(5, 11),
    ),
    "conv1d": lambda: (Pooled(nn.Conv1d(5, 7, 3, padding="same", padding_mode="reflect"), 8), images(5, 8)),
    "layer norm over two axes": lambda: (Pooled(nn.LayerNorm((5, 6)), 6), images(5, 6)),
    "embedding tied to the head": lambda: (TiedLanguageModel(), tokens(5, 4)),
    "layers used twice": lambda: (TwiceUsed(), images(3, 5)),
    "parameters without samples": lambda: (PositionTable(), images(3, 5)),
    "samples folded into positions": lambda: (Folded(), images(5, 6)),
    "recurrent": lambda: (Pooled(Recurrent(), 6), images(5, 3)),
    "conv3d": lambda: (nn.Sequential(nn.Conv3d(2, 3, 2), nn.Flatten(), nn.Linear(24, 4)), images(2, 3, 3, 3)),
}


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 4))
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    model[2].register_forward_pre_hook(lambda module, args: (3 * args[0],))
    return model


class Folded(nn.Module):
    """A linear layer that sees samples and positions as one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(0, 1)).view(len(x), -1, 4).tanh().mean(1)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


@pytest.mark.filterwarnings("ignore:no kernel for")
@pytest.mark.parametrize("name", MODELS)
def test_equals_a_per_sample_loop(name: str) -> None:
    torch.manual_seed(0)
    assert_equals_loop(*MODELS[name]())


def test_does_not_depend_on_the_batch_size() -> None:
    torch.manual_seed(0)
    model, [(x, y)] = nn.Linear(6, 4).double(), images(6, sizes=(12,))
    whole = fisher_diagonal(model, [(x, y)])
    parts = fisher_diagonal(model, [(x[i : i + 5], y[i : i + 5]) for i in range(0, 12, 5)])
    assert whole.num_samples == parts.num_samples == 12
    torch.testing.assert_close(whole["weight"], parts["weight"], rtol=1e-12, atol=0)


def test_float32_is_as_close_to_float64_as_a_loop_in_float32() -> None:
    torch.manual_seed(0)
    model, batches = cnn().float(), [(x.float(), y) for x, y in images(4, 9, 8)]
    ours, theirs = fisher_diagonal(model, batches), per_sample_loop(model, batches)
    exact = per_sample_loop(model.double(), [(x.double(), y) for x, y in batches])

    def error(values: Any) -> Tensor:
        return sum(((values[name] - value).norm() / value.norm()).square() for name, value in exact.items()).sqrt()

    assert error(ours) <= 2 * error(theirs)


def test_unknown_layers_warn_once_and_by_name() -> None:
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=r"body.lstm \(LSTM\)") as caught:
        fisher_diagonal(Pooled(Recurrent(), 6).double(), images(5, 3))
    assert len(caught) == 1


def test_known_layers_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fisher_diagonal(cnn().double(), images(4, 9, 8))


def test_monte_carlo_labels_are_drawn_from_the_model() -> None:
    """The mean over many draws is the exact Fisher: the expectation over the model's own labels."""
    torch.manual_seed(0)
    model, x = nn.Linear(3, 4).double(), torch.randn(1, 3, dtype=torch.float64)
    probabilities = model(x).softmax(1)[0].detach()
    exact = sum(p * per_sample_loop(model, [(x, torch.tensor([c]))])["weight"] for c, p in enumerate(probabilities))
    unused = torch.zeros(20_000, dtype=torch.int64)
    drawn = fisher_diagonal(model, [(x.expand(20_000, 3), unused)], kind="monte_carlo")["weight"]
    assert torch.allclose(drawn, exact, rtol=0.05)
    again = fisher_diagonal(model, [(x.expand(20_000, 3), unused)], kind="monte_carlo")["weight"]
    assert torch.equal(drawn, again)


def test_params_selects_and_includes_frozen_weights() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double()
    model[0].requires_grad_(False)
    batches = images(6)
    assert list(fisher_diagonal(model, batches)) == ["1.weight", "1.bias"]
    assert list(fisher_diagonal(model, batches, params=["0.bias"])) == ["0.bias"]
    assert not model[0].weight.requires_grad
    with pytest.raises(ValueError, match="nowhere"):
        fisher_diagonal(model, batches, params=["nowhere"])


def test_parameters_that_the_loss_ignores_have_zero_information() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model, batches = Unused().double(), images(6)
    fisher = assert_equals_loop(model, batches)
    assert not fisher["unused.weight"].any()
    assert not fisher_diagonal(model, batches, params=["unused.bias"])["unused.bias"].any()


def test_hugging_face_style_batches() -> None:
    class Output(dict[str, Tensor]):
        logits: Tensor

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 4)

        def forward(self, features: Tensor) -> Output:
            output = Output()
            output.logits = self.linear(features)
            return output

    torch.manual_seed(0)
    model, batches = Model().double(), images(6)
    dicts = [{"features": x, "labels": y} for x, y in batches]
    expected = per_sample_loop(model.linear, batches)
    torch.testing.assert_close(fisher_diagonal(model, dicts)["linear.weight"], expected["weight"])


def test_save_and_load(tmp_path: Any) -> None:
    fisher = fisher_diagonal(nn.Linear(6, 4).double(), images(6))
    fisher.save(tmp_path / "fisher.safetensors")
    loaded = FisherDiagonal.load(tmp_path / "fisher.safetensors")
    assert loaded.num_samples == 8
    assert all(torch.equal(loaded[name], fisher[name]) for name in fisher)


def state(model: nn.Module) -> Any:
    return (
        [m.training for m in model.modules()],
        [(p.requires_grad, p.grad) for p in model.parameters()],
        [len(m._forward_hooks) for m in model.modules()],
        torch.get_rng_state().tolist(),
        random.getstate(),
    )


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_and_the_random_state_are_put_back(fails: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 4)).double()
    model[0].requires_grad_(False)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        if fails:
            raise RuntimeError("planned")
        return F.cross_entropy(outputs, targets, reduction="none")

    batches, before = images(6), state(model)
    if fails:
        with pytest.raises(RuntimeError, match="planned"):
            fisher_diagonal(model, batches, loss, params=["0.weight"])
    else:
        fisher_diagonal(model, batches, loss, params=["0.weight"])
    assert state(model) == before


def linear() -> nn.Module:
    return nn.Linear(6, 4).double()


def mean_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets)


class ArgMax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).argmax(1)


def not_a_number() -> nn.Module:
    model = linear()
    model.weight.data[0, 0] = torch.nan
    return model


BAD: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], dict[str, Any], type[Exception], str]] = {
    "no batch": (linear, list, {}, ValueError, "empty"),
    "an iterator": (linear, lambda: iter(images(6)), {}, TypeError, "only once"),
    "not iterable": (linear, lambda: 3, {}, TypeError, "iterable"),
    "a scalar loss": (linear, lambda: images(6), {"loss_fn": mean_loss}, ValueError, "one loss per sample"),
    "integer outputs": (ArgMax, lambda: images(6), {}, TypeError, "logits, not class indices"),
    "NaN weights": (not_a_number, lambda: images(6), {}, ValueError, "weight holds NaN"),
    "unequal lengths": (linear, lambda: [(torch.randn(3, 6), torch.zeros(2))], {}, ValueError, "first axis"),
    "a bare tensor": (linear, lambda: [torch.randn(3, 6)], {}, ValueError, "pair"),
    "an unknown kind": (linear, lambda: images(6), {"kind": "true"}, ValueError, "kind must be"),
    "batch statistics": (
        lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).double(),
        lambda: images(6),
        {},
        ValueError,
        "model.eval",
    ),
    "dropout inside an unknown layer": (
        lambda: Pooled(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), 6).double(),
        lambda: images(5, 6),
        {},
        ValueError,
        "drops units at random",
    ),
}


@pytest.mark.filterwarnings("ignore:no kernel for")
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_a_reason(case: str) -> None:
    torch.manual_seed(0)
    build, batches, options, error, message = BAD[case]
    model = build()
    with pytest.raises(error, match=message):
        fisher_diagonal(model, batches(), **options)
