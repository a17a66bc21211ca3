"""What fisher_diagonal needs beside a plain backward pass: one float32 number per weight, at any batch size."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from fastunlearn.fisher import fisher_diagonal


def peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes held at once beyond what was held before: what the allocator hands out, less what it takes back."""
    run()  # whatever is made once
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    results = recorded.profiler.kineto_results  # type: ignore[union-attr]
    changes = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda c: c[0]):
        held += change
        peak = max(peak, held)
    return peak


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """With a position table as GPT-2 has it, and one as vision transformers have it."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, width), nn.Embedding(16, width)
        self.bare = nn.Parameter(torch.randn(1, 16, width))
        self.blocks = nn.Sequential(*[Block(width) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(16)[None]) + self.bare
        return self.head(self.norm(self.blocks(x)).mean(1))


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(inplace=True),
        nn.Conv2d(32, 64, 3, padding=1), nn.GroupNorm(4, 64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 16, 256), nn.ReLU(),
        nn.Linear(256, 10),
    ).eval()  # fmt: skip


def images(samples: int) -> Tensor:
    return torch.randn(samples, 3, 16, 16)


def words(samples: int) -> Tensor:
    return torch.randint(50, (samples, 16))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "conv net": (conv_net, images),
    "transformer": (lambda: Transformer(64, 4), words),
}


@pytest.mark.parametrize("samples", [8, 256])
@pytest.mark.parametrize("name", MODELS)
def test_one_number_per_weight_over_a_plain_backward_pass(name: str, samples: int) -> None:
    torch.manual_seed(0)
    build, draw = MODELS[name]
    model, x, y = build(), draw(samples), torch.randint(10, (samples,))
    parameters = list(model.parameters())
    plain = peak_bytes(lambda: torch.autograd.grad(F.cross_entropy(model(x), y), parameters))
    ours = peak_bytes(lambda: fisher_diagonal(model, [(x, y)] * 2))
    weights = sum(p.numel() for p in parameters)
    print(f"\n{name}, N = {samples}: plain {plain / 1e6:.3f} MB, ours {(ours - plain) / 4 / weights:+.3f} P")
    assert ours <= plain + 1.1 * 4 * weights


def test_the_measure_counts_what_is_held_at_once() -> None:
    def run() -> None:
        for _ in range(3):
            held = torch.zeros(1000)
            del held
        first, second = torch.zeros(1000), torch.zeros(500)
        del first, second

    assert 6000 <= peak_bytes(run) < 6500
