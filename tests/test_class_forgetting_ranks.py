"""ClassForgetting on models that several processes hold: the result is that of one process, on every shard."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fastunlearn.methods.class_forgetting import ClassForgetting
from fastunlearn.parallel.deal import deal

Engine = str  # "alone", "ddp", "fsdp2", "tp"


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Odd(nn.Module):
    """Sizes that no number of ranks divides, rows fewer than ranks, grouped and plain convolutions, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 5, 3)
        self.grouped = nn.Conv2d(5, 10, 2, groups=5)
        self.inner = nn.Sequential(nn.Linear(90, 7), nn.ReLU(), nn.Linear(7, 1, bias=False))
        self.attention = nn.MultiheadAttention(3, 1, batch_first=True)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.conv(x).relu()).relu()
        x = self.inner(x.flatten(1)) * torch.linspace(-1, 2, 12, dtype=x.dtype).view(4, 3)[:, None]
        x = self.attention(x.transpose(0, 1), x.transpose(0, 1), x.transpose(0, 1))[0]
        return self.head(x).mean(1)  # type: ignore[no-any-return]


def odd() -> tuple[nn.Module, list[Any], list[Any]]:
    torch.manual_seed(0)
    forget, retain = numbers(8, 1, 6, 6), numbers(27, 1, 6, 6, seed=1)
    return (
        Odd().double(),
        [(x, torch.zeros(len(x))) for x in forget.split(3)],
        [(x, torch.zeros(len(x))) for x in retain.split(4)],
    )


def language(kind: str) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    if kind == "gpt2":
        config: Any = transformers.GPT2Config(
            vocab_size=23, n_positions=16, n_embd=12, n_layer=2, n_head=2, resid_pdrop=0.0, attn_pdrop=0.0
        )
        return transformers.GPT2LMHeadModel(config).double()
    config = transformers.LlamaConfig(
        vocab_size=23, hidden_size=16, intermediate_size=18, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).double()


def texts(n: int, seed: int, size: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(23, (n, 9), generator=generator)
    mask = (torch.arange(9) < torch.randint(2, 10, (n, 1), generator=generator)).long()
    rows = {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask.bool(), ids, -100)}
    return [{key: value[i : i + size] for key, value in rows.items()} for i in range(0, n, size)]


def gpt2() -> tuple[nn.Module, list[Any], list[Any]]:
    return language("gpt2"), texts(7, 1, 3), texts(18, 2, 4)


def llama() -> tuple[nn.Module, list[Any], list[Any]]:
    return language("llama"), texts(7, 1, 3), texts(18, 2, 4)


def held(model: nn.Module, engine: Engine) -> nn.Module:
    """The model as the engine holds it."""
    if engine == "ddp":
        return DistributedDataParallel(model)
    if engine == "fsdp2":
        blocks = [m for m in model.modules() if type(m).__name__ in ("GPT2Block", "LlamaDecoderLayer", "Sequential")]
        for block in blocks:
            fully_shard(block)
        fully_shard(model)
    return model


def full_weights(model: nn.Module) -> dict[str, Any]:
    """As NumPy arrays: a tensor would be sent as memory of a process that ends."""
    model = model.module if isinstance(model, DistributedDataParallel) else model
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().double().numpy()
        for name, p in model.named_parameters()
    }


Found = tuple[dict[str, Any], dict[str, Any], dict[str, int]]


PROBLEMS: dict[str, Callable[[], Any]] = {"odd": odd, "gpt2": gpt2, "llama": llama}
ENGINES = ("fsdp2", "ddp")
# 17 rows are a sample of every layer's rows, and fewer than the columns of some.
SETTINGS: dict[str, Any] = {"memory_limit": 1 << 40, "max_patches": 17, "alpha_retain": 5.0}


def forgotten(problem: str, engine: Engine, settings: dict[str, Any]) -> Found:
    """Weights after, details and counts, as this rank sees them."""
    model, forget, retain = PROBLEMS[problem]()
    if engine == "alone":
        outcome = ClassForgetting(**settings).unlearn(model, forget, retain)
    else:
        model = held(model, engine)
        outcome = ClassForgetting(**settings).unlearn(model, deal(forget), deal(retain))
    return full_weights(model), outcome.details, outcome.changed


def all_forgotten(rank: int) -> dict[tuple[str, Engine], Found]:
    return {(name, engine): forgotten(name, engine, SETTINGS) for name in PROBLEMS for engine in ENGINES}


@cache
def alone(problem: str) -> Found:
    return forgotten(problem, "alone", SETTINGS)


@cache
def together(size: int) -> list[dict[tuple[str, Engine], Found]]:
    """Of each rank; started once for all problems, since every start imports transformers anew."""
    return on_ranks(size, all_forgotten)


def require_same(found: Found, expected: Found) -> None:
    for name, value in expected[0].items():
        assert abs(found[0][name] - value).max() <= 1e-11 * abs(value).max(), name
    for key in ("rows", "solver", "untouched"):
        assert found[1][key] == expected[1][key]
    assert found[1]["relative_change"] == pytest.approx(expected[1]["relative_change"], rel=1e-8)
    assert found[2] == expected[2]


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_forget_as_one_process_does(size: int, engine: Engine, problem: str) -> None:
    """Of four ranks one has no batch to forget, since there are three."""
    expected = alone(problem)
    assert expected[2] and any(reason != "cholesky" for reason, _ in expected[1]["solver"].values())
    for found in together(size):
        require_same(found[problem, engine], expected)
