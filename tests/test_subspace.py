"""Spectral filter, streaming Gram matrices, and the rows that a layer's weights act on."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fastunlearn import reference
from fastunlearn.slots import choose_layers, layer_rows, supported_layers
from fastunlearn.subspace import (
    GramAccumulator,
    collect_grams,
    filter_weight,
    filter_weight_by_eigh,
    filter_weight_by_rows,
    spectral_filter,
)

ALPHAS = [0.25, 1.0, 3.0, 100.0, 1000.0]
# (n, d): one row, one column, n < d, n = d, n > d
SHAPES = [(1, 5), (7, 1), (40, 64), (64, 64), (300, 48)]


def rows(n: int, d: int, seed: int = 0, rank: int | None = None) -> Tensor:
    """Float64 rows with a decaying spectrum, as activations have."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(n, rank or d, generator=generator, dtype=torch.float64)
    scale = torch.logspace(0, -2, rank or d, dtype=torch.float64)
    return a * scale @ torch.randn(rank or d, d, generator=generator, dtype=torch.float64)


def by_svd(a: Tensor, alpha: float) -> Tensor:
    """The paper's form, from the SVD of the stacked inputs, in the dtype of ``a``."""
    _, s, vh = torch.linalg.svd(a, full_matrices=False)
    r = s.square() / s.square().sum()
    return vh.mT * (alpha * r / ((alpha - 1) * r + 1)) @ vh


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_filter_equals_the_float64_svd_form(n: int, d: int, alpha: float) -> None:
    a = rows(n, d)
    found = spectral_filter(a.mT @ a, alpha)
    assert (found - by_svd(a, alpha)).abs().max() < 1e-11
    assert torch.equal(found, found.mT)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_filter_of_a_rank_deficient_gram_equals_the_svd_form(alpha: float) -> None:
    a = rows(200, 48, rank=5)
    assert (spectral_filter(a.mT @ a, alpha) - by_svd(a, alpha)).abs().max() < 1e-11


def by_eigh(gram: Tensor, alpha: float) -> Tensor:
    return reference.spectral_filter(gram, alpha)


def activations(n: int, d: int, seed: int) -> Tensor:
    """Float64 rows as a ReLU gives them: a strong mean direction and a flat rest."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return (torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix).relu()


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(
    ("n", "d", "rank"), [(300, 48, None), (64, 96, None), (300, 96, 20), (300, 48, 5), (300, 96, 1)]
)
def test_float32_error_is_at_most_twice_that_of_torchs_float32_eigendecomposition(
    n: int, d: int, rank: int | None, alpha: float
) -> None:
    ours = theirs = 0.0
    for seed in range(8):  # a ratio of two rounding errors: summed, so that it is a property and not luck
        a = rows(n, d, seed, rank).float()
        gram = a.mT @ a
        truth = by_eigh(gram.double(), alpha)
        ours += float((spectral_filter(gram, alpha) - truth).norm())
        theirs += float((by_eigh(gram, alpha) - truth).norm())
    assert ours <= 2 * theirs


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(("n", "d"), [(1500, 64), (1000, 96)])
def test_float32_error_from_activations_is_at_most_twice_that_of_their_float32_svd(
    n: int, d: int, alpha: float
) -> None:
    ours = svd = 0.0
    for seed in range(3):
        a = activations(n, d, seed).float()
        truth = by_svd(a.double(), alpha)
        ours += float((spectral_filter(a.mT @ a, alpha) - truth).norm())
        svd += float((by_svd(a, alpha) - truth).norm())
    assert ours <= 2 * svd


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("rank", [None, 5])
def test_a_float64_gram_beats_the_float32_svd_on_wide_spectra(rank: int | None, alpha: float) -> None:
    a = rows(300, 48, rank=rank).float()
    truth = by_svd(a.double(), alpha)
    gram = a.double().mT @ a.double()
    assert (spectral_filter(gram, alpha) - truth).norm() < 1e-3 * (by_svd(a, alpha) - truth).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_filter_of_zero_is_zero(dtype: torch.dtype) -> None:
    assert torch.equal(spectral_filter(torch.zeros(2, 3, 3, dtype=dtype), 3.0), torch.zeros(2, 3, 3, dtype=dtype))


def test_filter_of_an_empty_batch_or_matrix_is_empty() -> None:
    assert spectral_filter(torch.zeros(0, 3, 3), 3.0).shape == (0, 3, 3)
    assert spectral_filter(torch.zeros(2, 0, 0), 3.0).shape == (2, 0, 0)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e35])
def test_filter_does_not_depend_on_the_scale_of_the_gram(scale: float) -> None:
    a = rows(60, 40).float()
    gram = a.mT @ a
    assert (spectral_filter(gram * scale, 100.0) - spectral_filter(gram, 100.0)).abs().max() < 1e-4


def test_batched_filter_equals_one_by_one_and_spares_the_zero_member() -> None:
    grams = torch.stack([a.mT @ a for a in (rows(30, 6, s) for s in range(5))] + [torch.zeros(6, 6).double()])
    found = spectral_filter(grams.view(2, 3, 6, 6), 30.0).view(6, 6, 6)
    for one, gram in zip(found, grams, strict=True):
        assert torch.allclose(one, spectral_filter(gram, 30.0), rtol=0, atol=1e-14)


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 40), d=st.integers(1, 40), p=st.integers(0, 9), alpha=st.sampled_from(ALPHAS))
def test_all_ways_of_filtering_a_weight_agree(n: int, d: int, p: int, alpha: float) -> None:
    a, w = rows(n, d), torch.randn(p, d, dtype=torch.float64)
    truth = w @ by_svd(a, alpha)
    gram = a.mT @ a
    for found in (
        filter_weight(w, gram, alpha),
        filter_weight_by_eigh(w, gram, alpha),
        filter_weight_by_rows(w, a, alpha),
    ):  # fmt: skip
        assert torch.allclose(found, truth, rtol=0, atol=1e-9)


def test_rows_that_are_none_or_zero_filter_everything_away() -> None:
    w = torch.randn(3, 4)
    assert torch.equal(filter_weight_by_rows(w, torch.zeros(0, 4), 3.0), torch.zeros(3, 4))
    assert torch.equal(filter_weight_by_rows(w, torch.zeros(2, 4), 3.0), torch.zeros(3, 4))


def test_rows_whose_energy_overflows_float32_are_filtered_all_the_same() -> None:
    w, a = torch.randn(3, 8), rows(4, 8).float()
    assert torch.allclose(filter_weight_by_rows(w, a * 1e25, 3.0), filter_weight_by_rows(w, a, 3.0), atol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_alpha_must_be_finite_and_positive(alpha: float) -> None:
    for call in (
        lambda: spectral_filter(torch.eye(2), alpha),
        lambda: filter_weight(torch.eye(2), torch.eye(2), alpha),
        lambda: filter_weight_by_rows(torch.eye(2), torch.eye(2), alpha),
    ):
        with pytest.raises(ValueError, match="alpha must be a finite number above 0"):
            call()


def test_a_gram_that_is_not_square_is_refused() -> None:
    with pytest.raises(ValueError, match="must be square"):
        spectral_filter(torch.zeros(2, 3), 3.0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.bfloat16])
def test_a_gram_of_another_dtype_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="float32 or float64"):
        spectral_filter(torch.ones(2, 2, dtype=dtype), 3.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_member_of_a_batch_is_named(bad: float) -> None:
    grams = torch.eye(3).repeat(2, 2, 1, 1)
    grams[1, 0, 2, 2] = bad
    with pytest.raises(ValueError, match=r"gram\[1, 0\] holds NaN or Inf"):
        spectral_filter(grams, 3.0)


def test_a_member_that_is_not_semidefinite_is_named() -> None:
    grams = torch.eye(3).repeat(3, 1, 1)
    grams[1] *= -1
    with pytest.raises(ValueError, match=r"gram\[1\] is not positive semidefinite"):
        spectral_filter(grams, 3.0)
    grams[1] = torch.diag(torch.tensor([5.0, -3.0, 0.0]))
    with pytest.raises(ValueError, match=r"gram\[1\] is not positive semidefinite"):
        spectral_filter(grams, 3.0)


def test_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="must share"):
        filter_weight(torch.ones(2, 3), torch.eye(4), 3.0)
    with pytest.raises(TypeError, match="weight must be float32 or float64"):
        filter_weight(torch.ones(2, 4).half(), torch.eye(4), 3.0)


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(0, 30),
    d=st.integers(1, 12),
    groups=st.integers(1, 3),
    cuts=st.lists(st.integers(0, 30), max_size=4),
    merged=st.booleans(),
)
def test_any_split_of_the_stream_gives_the_same_gram(
    n: int, d: int, groups: int, cuts: list[int], merged: bool
) -> None:
    a = torch.randn(groups, n, d, dtype=torch.float64)
    edges = sorted({0, n, *(min(c, n) for c in cuts)})
    parts = [a[:, i:j] for i, j in pairwise(edges)]
    total = GramAccumulator(d, groups)
    for part in parts:
        if merged:
            total = total + GramAccumulator(d, groups).add_(part)
        else:
            total.add_(part)
    assert total.rows_seen == n
    assert torch.allclose(total.gram, a.mT @ a, rtol=0, atol=1e-12 * max(1, n * d))
    w = torch.randn(groups, 2, d, dtype=torch.float64)
    truth = filter_weight(w, a.mT @ a, 3.0)
    for solver in ("auto", "cholesky", "eigh"):
        assert torch.allclose(total.filter(w, 3.0, solver), truth, rtol=0, atol=1e-10)


def test_merging_leaves_the_other_accumulator_as_it_was() -> None:
    thin, full = GramAccumulator(4).add_(torch.eye(4)[:2]), GramAccumulator(4).add_(torch.eye(4))
    (thin + full).merge_(full).add_(torch.ones(9, 4))
    thin.merge_(full)
    assert torch.equal(full.gram[0], torch.eye(4).double())
    assert torch.equal(thin.gram[0], torch.diag(torch.tensor([2.0, 2.0, 1.0, 1.0])).double())


def test_fewer_rows_than_columns_never_form_a_square_of_columns() -> None:
    gram = GramAccumulator(100_000).add_(torch.randn(3, 100_000))  # its square would take 80 GB
    assert (gram + gram).filter(torch.randn(1, 2, 100_000), 3.0).shape == (1, 2, 100_000)
    assert gram.eigenpairs().vectors.shape == (1, 100_000, 3)


def test_float64_master_does_not_drift_over_a_long_stream() -> None:
    part = torch.full((1, 1, 1), 0.1)
    gram = GramAccumulator(1)
    for _ in range(3000):
        gram.add_(part)
    assert abs(float(gram.gram) / (3000 * float(part.double().square())) - 1) < 1e-12


def test_rows_that_are_bad_leave_the_sums_as_they_were() -> None:
    gram = GramAccumulator(2, groups=2)
    for bad, error in (
        (torch.ones(2, 3, 3), ValueError),
        (torch.ones(3, 2), ValueError),
        (torch.ones(2, 3, 2).half(), TypeError),
        (torch.full((2, 3, 2), float("nan")), ValueError),
    ):
        with pytest.raises(error):
            gram.add_(bad)
    assert gram.rows_seen == 0 and not gram.gram.any()


CONVS: list[tuple[type[nn.Module], dict[str, Any]]] = [
    (nn.Conv2d, {}),
    (nn.Conv2d, {"stride": 2, "padding": 1}),
    (nn.Conv2d, {"stride": (1, 3), "padding": (2, 0), "dilation": (2, 1)}),
    (nn.Conv2d, {"groups": 2, "padding": 1}),
    (nn.Conv2d, {"groups": 4, "dilation": 2, "padding": "same"}),
    (nn.Conv2d, {"kernel_size": (2, 4), "padding": "same"}),
    (nn.Conv2d, {"padding": "valid"}),
    (nn.Conv2d, {"padding": 2, "padding_mode": "reflect"}),
    (nn.Conv2d, {"padding": (1, 2), "padding_mode": "circular", "groups": 2}),
    (nn.Conv2d, {"padding": "same", "padding_mode": "replicate", "kernel_size": 4}),
    (nn.Conv2d, {"kernel_size": 1}),
    (nn.Conv1d, {}),
    (nn.Conv1d, {"stride": 3, "padding": 2, "dilation": 2, "groups": 2}),
    (nn.Conv1d, {"padding": "same", "kernel_size": 4, "padding_mode": "circular"}),
]


@pytest.mark.parametrize(("kind", "options"), CONVS, ids=[f"{k.__name__}-{o}" for k, o in CONVS])
def test_conv_rows_times_weights_equal_the_convolution(kind: Any, options: dict[str, Any]) -> None:
    """Every option at once: the module's own output is the explicit loop."""
    torch.manual_seed(0)
    conv = kind(4, 8, **{"kernel_size": 3, "bias": False, **options}).double()
    x = torch.randn(3, 4, *((9, 7) if kind is nn.Conv2d else (11,)), dtype=torch.float64)
    for given_input in (x, x[0], x.expand(3, *x.shape[1:]), x.transpose(-1, 1).contiguous().transpose(-1, 1)):
        output = conv(given_input)
        a = layer_rows(conv, given_input)  # [groups, rows, d]
        w = conv.weight.reshape(conv.groups, 8 // conv.groups, -1)
        product = torch.einsum("gnd,gpd->ngp", a, w).reshape(-1, 8)
        wanted = output.movedim(-output.dim() + (given_input.dim() == x.dim()), -1).reshape(-1, 8)
        assert torch.allclose(product, wanted, rtol=0, atol=1e-12)
        pick = torch.tensor([a.shape[1] - 1, 0, 2, 2])
        assert torch.equal(layer_rows(conv, given_input, pick), a[:, pick])


def test_conv2d_rows_equal_unfold() -> None:
    conv = nn.Conv2d(3, 5, (3, 2), stride=2, padding=(1, 2), dilation=(1, 2))
    x = torch.randn(2, 3, 8, 9)
    unfolded = F.unfold(x, (3, 2), dilation=(1, 2), padding=(1, 2), stride=2)
    assert torch.equal(layer_rows(conv, x)[0], unfolded.transpose(1, 2).reshape(-1, 18))


def test_linear_rows_are_the_flattened_input() -> None:
    x = torch.randn(2, 3, 5)
    linear = nn.Linear(5, 4)
    assert torch.equal(layer_rows(linear, x)[0], x.reshape(6, 5))
    assert torch.equal(layer_rows(linear, x[0, 0], torch.tensor([0]))[0], x[0, :1])


def test_rows_of_another_layer_are_refused() -> None:
    with pytest.raises(TypeError, match="not LayerNorm"):
        layer_rows(nn.LayerNorm(3), torch.ones(2, 3))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, groups=2)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)
        self.unused = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.head(h) + self.head(2 * h)


def data(n: int = 10) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 2, 6, 6, generator=generator), torch.zeros(n, dtype=torch.int64)


def test_collected_grams_do_not_depend_on_the_batch_size_and_count_every_call() -> None:
    model = Net().double()
    x, y = data()
    x = x.double()
    whole = collect_grams(model, [(x, y)])
    parts = collect_grams(model, list(zip(x.split(3), y.split(3), strict=True)))
    assert {name: gram.rows_seen for name, gram in whole.items()} == {"conv": 160, "head": 20, "unused": 0}
    for name, gram in whole.items():
        assert torch.allclose(gram.gram, parts[name].gram, rtol=1e-12)
    a = layer_rows(model.conv, x)
    assert torch.allclose(whole["conv"].gram, a.mT @ a)


@pytest.mark.parametrize("batch", [1, 3, 10])
def test_sampled_rows_are_bounded_seeded_and_span_the_pass(batch: int) -> None:
    x, y = data()
    batches = list(zip(x.split(batch), y.split(batch), strict=True))
    one, same, other = (collect_grams(Net_, batches, max_patches=37, seed=s) for s in (0, 0, 1))
    assert one["conv"].rows_seen == 37 and one["head"].rows_seen == 20
    assert torch.equal(one["conv"].gram, same["conv"].gram)
    assert not torch.equal(one["conv"].gram, other["conv"].gram)


Net_ = Net()


def test_sampling_is_uniform_over_rows_and_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(12, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x[:, :12]) + self.layer(x[:, 12:])

    # One-hot rows: the Gram matrix counts how often each of the 12 rows of the pass was drawn.
    x = torch.zeros(6, 24)
    for i in range(6):
        x[i, i] = x[i, 18 + i] = 1
    model, y = Twice(), torch.zeros(6)
    drawn = torch.zeros(12)
    for seed in range(400):
        gram = collect_grams(model, [(x[:2], y[:2]), (x[2:], y[2:])], max_patches=6, seed=seed)["layer"]
        assert gram.rows_seen == 6
        drawn += gram.gram[0].diagonal()
    assert ((drawn / 400 - 0.5).abs() < 5 * 0.025).all()  # standard error 0.025


class Failing(Net):
    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        raise RuntimeError("boom")


def test_hooks_modes_and_random_state_are_put_back_after_an_exception() -> None:
    model = Failing().train()
    model.head.weight.requires_grad_(False)
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="boom"):
        collect_grams(model, [data()], max_patches=5)
    assert model.training and model.norm.training and not model.head.weight.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in model.modules())
    assert model.norm.num_batches_tracked == 0


def test_collecting_does_not_train_batchnorm() -> None:
    model = Net().train()
    before = model.norm.running_mean.clone()
    collect_grams(model, [data()])
    assert torch.equal(model.norm.running_mean, before) and model.norm.training


@pytest.mark.parametrize("max_patches", [None, 5])
def test_nan_in_an_input_names_the_layer(max_patches: int | None) -> None:
    x, y = data()
    x[:] = float("nan")
    with pytest.raises(ValueError, match=r"layer conv: .* NaN"):
        collect_grams(Net(), [(x, y)], max_patches=max_patches)


def test_bad_arguments_are_refused() -> None:
    def once() -> Iterator[tuple[Tensor, Tensor]]:
        yield data()

    with pytest.raises(TypeError, match="read only once"):
        collect_grams(Net(), once())
    with pytest.raises(ValueError, match="empty"):
        collect_grams(Net(), [])
    with pytest.raises(ValueError, match="max_patches"):
        collect_grams(Net(), [data()], max_patches=0)
    with pytest.raises(ValueError, match="'norm' is not a Linear"):
        collect_grams(Net(), [data()], layers=["norm"])


def test_supported_layers_leave_out_weights_that_are_computed() -> None:
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
        nn.Conv1d(3, 3, 1),
        nn.ReLU(),
        nn.Embedding(2, 3),
    )
    assert list(supported_layers(model)) == ["1"] == list(choose_layers(model, None))


def test_a_transformer_layer_in_eval_mode_is_seen_in_spite_of_its_fast_path() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    grams = collect_grams(layer, [(torch.randn(3, 5, 8), torch.zeros(3))])
    assert {name: gram.rows_seen for name, gram in grams.items()} == dict.fromkeys(
        ["self_attn.q", "self_attn.k", "self_attn.v", "self_attn.out_proj", "linear1", "linear2"], 15
    )


@pytest.mark.parametrize("options", [options for kind, options in CONVS if kind is nn.Conv2d], ids=str)
def test_patches_added_without_unfolding_give_the_gram_of_their_rows(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, **{"kernel_size": 3, **options})
    dim = conv.weight[0].numel()
    direct, unfolded = GramAccumulator(dim, conv.groups), GramAccumulator(dim, conv.groups)
    for x in (torch.randn(4, 9, 7), torch.randn(3, 4, 9, 7), torch.randn(2, 9, 7, 4).permute(0, 3, 1, 2)):
        direct.add_patches_(conv, x)
        unfolded.add_(layer_rows(conv, x))
        assert direct.rows_seen == unfolded.rows_seen
    assert torch.allclose(direct.gram, unfolded.gram, rtol=1e-13, atol=1e-13)


def test_patches_fewer_than_columns_are_kept_and_bad_ones_leave_the_sums_as_they_were() -> None:
    conv = nn.Conv2d(4, 8, 3)
    gram = GramAccumulator(36).add_patches_(conv, torch.randn(4, 5, 5))
    assert gram.rows_seen == 9 and gram.elements == 9 * 36
    gram.add_patches_(conv, torch.randn(8, 4, 5, 5))
    before = gram.gram.clone()
    with pytest.raises(ValueError, match="NaN or Inf"):
        gram.add_patches_(conv, torch.full((1, 4, 5, 5), torch.inf))
    assert torch.equal(gram.gram, before) and gram.rows_seen == 81
