"""L-CODEC's selection: ours beside the public algorithm, scikit-learn's neighbours, and one round composed of torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import resnet18
from peers_codec import public_foci, sklearn_foci
from torch import Tensor
from torch.nn import functional as F

import fastunlearn as fu
from fastunlearn.data import Batch
from fastunlearn.methods.block import Block, trainable_layers
from fastunlearn.methods.curvature import gradient, product
from fastunlearn.methods.newton import newton_step

# Warp instructions that the CUDA kernel's inner loop issues for 32 pairs of rows and one candidate each, float32,
# counted in the disassembly for 9.0: 172 for 32 pairs a thread.
INSTRUCTIONS_PER_PAIR = 172 / 32


def problem(n: int, p: int, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Y depends on three of the features, on the third only beside the others."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, p, generator=generator, dtype=dtype)
    a, b, c = x[:, 3 % p], x[:, p // 2], x[:, -1]
    y = a + b.square() + 0.5 * a * c + 0.1 * torch.randn(n, generator=generator, dtype=dtype)
    return x.to(device), y.to(device)


def test_foci_200_features(versus: Any, device: str) -> None:
    """n = 1,000, p = 200, three features chosen; the peers compare all rows, or build a tree, for every candidate."""
    x, y = problem(1000, 200, device)
    chosen = fu.foci(x, y, max_features=3).indices
    peers = {
        name: (lambda peer=peer: _same(peer(x, y, 3), chosen))
        for name, peer in (("public_algorithm", public_foci), ("scikit_learn", sklearn_foci))
    }
    versus(lambda: fu.foci(x, y, max_features=3), rounds=3, warm_up=False, **peers)


@pytest.mark.parametrize("chosen", [0, 1, 3])
@pytest.mark.parametrize(("n", "p"), [(1000, 20_000), (1000, 16_384), (20_000, 64)])
def test_round(versus: Any, benchmark: Any, device: str, n: int, p: int, chosen: int) -> None:
    """One round: the scores of all features once ``chosen`` are chosen; torch holds n x n distances per candidate."""
    x, y = problem(n, p, device)
    terms, distances = rank_terms(y), torch.zeros(n, n, device=device)
    for c in range(chosen):
        fu.ops.codec_choose_(distances, terms, x[:, c].contiguous())
    held = distances if chosen else None
    few = 32_000 // n  # torch takes minutes for all; its time goes with their number

    def composed() -> None:
        rank = terms[0].long()
        for c in range(few):
            joined = torch.addcmul(distances, d := x[:, c, None] - x[None, :, c], d)
            torch.minimum(rank, rank[joined.fill_diagonal_(torch.inf).argmin(1)]).sum()

    versus(lambda: fu.ops.codec_scores(x, terms, held), rounds=3, **{f"torch_{few}_features": composed})
    if device == "cuda" and chosen:
        properties = torch.cuda.get_device_properties(0)
        warps = n * n * p / 32 * INSTRUCTIONS_PER_PAIR
        bound = warps / (4 * properties.multi_processor_count * 1e3 * properties.clock_rate)  # kHz
        benchmark.extra_info["share_of_issue_bound"] = bound / benchmark.extra_info["medians"]["ours"]


def test_choose(versus: Any, device: str) -> None:
    n = 4000
    x, y = problem(n, 1, device)
    terms, distances = rank_terms(y), torch.zeros(n, n, device=device)
    column = x[:, 0].contiguous()

    def composed() -> None:
        distances.addcmul_(d := column[:, None] - column, d)
        rank = terms[0].long()
        terms[1] = torch.minimum(rank, rank[distances.fill_diagonal_(torch.inf).argmin(1)])

    versus(lambda: fu.ops.codec_choose_(distances, terms, column), moved=8 * n * n, torch=composed)


@pytest.mark.parametrize("kind", ["exact", "gauss_newton", "fisher"])
def test_curvature_product(versus: Any, device: str, kind: str) -> None:
    """One product of conjugate gradients: 10,242 weights of late layers of a ResNet-18, 64 samples.

    Beside it a Hessian-vector product of torch over all weights, by two backward passes from a new forward pass.
    """
    torch.manual_seed(0)
    model = resnet18().to(device).eval()
    x, y = torch.randn(64, 3, 32, 32, device=device), torch.arange(64, device=device) % 10
    units = [("10.conv2", 3), ("10.conv1", 7), ("13", 1), ("13", 4)]
    block = Block(trainable_layers(model, None), units, None)
    times = product(model, block, [Batch((x,), {}, y, 64)], None, kind)
    v = torch.randn(block.size, dtype=torch.float64, device=device)
    weights = list(model.parameters())
    direction = [torch.randn_like(p) for p in weights]

    def torch_hvp() -> None:
        gradients = torch.autograd.grad(F.cross_entropy(model(x), y), weights, create_graph=True)
        torch.autograd.grad(gradients, weights, direction)

    versus(lambda: times(v), rounds=3, torch_all_weights=torch_hvp)


def test_newton_step(versus: Any, device: str) -> None:
    """The whole step on that block: conjugate gradients with damping 0.01 on the exact Hessian."""
    torch.manual_seed(0)
    model = resnet18().to(device).eval()
    x, y = torch.randn(64, 3, 32, 32, device=device), torch.arange(64, device=device) % 10
    units = [("10.conv2", 3), ("10.conv1", 7), ("13", 1), ("13", 4)]
    block = Block(trainable_layers(model, None), units, None)
    batches = [Batch((x,), {}, y, 64)]
    g = gradient(model, block, [batches[0][:1]], None)
    versus(
        lambda: newton_step(product(model, block, batches, None, "exact"), g, 0.01, "the sample", tolerance=1e-6),
        rounds=1,
    )


def rank_terms(y: Tensor) -> Tensor:
    ordered = y.sort().values
    above = len(y) - torch.searchsorted(ordered, y)
    return torch.stack([torch.searchsorted(ordered, y, right=True), above]).int()


def _same(found: list[int], expected: list[int]) -> None:
    assert found == expected
