"""ClassForgetting on models that several processes hold: the result is that of one process, on every shard."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from fastunlearn.methods import class_forgetting
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


# One start of two ranks for what follows: every claim about a small model of its own.
LOW_RANK: dict[str, dict[str, Any]] = {
    "sketch": {"solver": "sketch", "rank": 1000, "max_patches": None},
    "rsvd": {"solver": "rsvd", "rank": 1000},
    "some sketched": {"memory_limit": 5_000, "rank": 12, "max_patches": None},
    "eigh": {"solver": "eigh", "max_patches": 33},
}


def low_rank(rank: int) -> dict[str, Found]:
    return {name: forgotten("odd", "fsdp2", settings) for name, settings in LOW_RANK.items()}


def test_every_solver_has_the_same_choice_and_result_on_ranks() -> None:
    for of_rank in on_ranks(2, low_rank):
        for name, found in of_rank.items():
            expected = forgotten("odd", "alone", LOW_RANK[name])
            for key, value in expected[0].items():
                assert abs(found[0][key] - value).max() <= 1e-7 * abs(value).max(), (name, key)
            assert [kind for kind, _ in found[1]["solver"].values()] == [
                kind for kind, _ in expected[1]["solver"].values()
            ]
            assert found[1]["rows"] == expected[1]["rows"]
    assert {kind for kind, _ in expected[1]["solver"].values()} == {"eigh"}
    mixed = forgotten("odd", "alone", LOW_RANK["some sketched"])[1]["solver"]
    assert {kind for kind, _ in mixed.values()} >= {"sketch", "cholesky"}


GRID: dict[str, Any] = {"alphas_retain": (5.0, 100.0), "alphas_forget": (1.0, 3.0)}


def searched(engine: Engine) -> tuple[list[float], list[Any], list[Any], bool]:
    """Changes of the points, the outputs of the model at each, the spectra, and whether the model is as it was."""
    model, forget, retain = odd()
    if engine != "alone":
        model, forget, retain = held(model, engine), deal(forget), deal(retain)  # type: ignore[assignment]
    before, outputs = full_weights(model), []

    def score(measured: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            outputs.append(measured(numbers(4, 1, 6, 6, seed=5)).detach().numpy())
        return {"forget": 0.0, "retain": 0.0}

    method = ClassForgetting(memory_limit=1 << 40)
    points = method.search(model, forget, retain, **GRID, score=score).points
    with torch.no_grad():
        outputs.append(model(numbers(4, 1, 6, 6, seed=5)).detach().numpy())
    spectra = [layer.retain.numpy() for layer in method.spectrum(model, forget, retain).layers]
    after = full_weights(model)
    return [p.change for p in points], outputs, spectra, all((after[n] == before[n]).all() for n in before)


def searched_on(rank: int, engine: Engine) -> Any:
    return searched(engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_search_on_ranks_measures_the_models_of_one_process_and_puts_the_shards_back(engine: Engine) -> None:
    changes, outputs, spectra, _ = searched("alone")
    for found in on_ranks(2, searched_on, engine):
        assert found[0] == pytest.approx(changes, rel=1e-8) and found[3]
        assert len(found[1]) == len(outputs) == 2 + 4
        for mine, theirs in zip(found[1], outputs, strict=True):
            assert abs(mine - theirs).max() <= 1e-10
        for mine, theirs in zip(found[2], spectra, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-12)
    assert all(abs(a - b).max() > 1e-4 for a, b in pairwise(outputs))


def told_apart(rank: int) -> tuple[str, str, str, bool, int | None, Any]:
    """What each of two ranks is told of another's faults, the limit they agree on, and what one of them plans."""
    model, forget, retain = odd()
    model = held(model, "fsdp2")
    before = full_weights(model)
    method = ClassForgetting(max_patches=None)
    bad = [(x / (0 if rank == 1 and i == 1 else 1), y) for i, (x, y) in enumerate(retain)]
    with pytest.raises(ValueError) as nan:
        method.unlearn(model, deal(forget), bad)
    with pytest.raises(ValueError) as none:
        method.unlearn(model, forget, [])
    after = full_weights(model)
    same = all((after[name] == before[name]).all() for name in before)
    free = class_forgetting._free
    class_forgetting._free = lambda device: 8_000 if rank == 1 else 1 << 40
    limit = method._limit(model)
    class_forgetting._free = free
    planned = method.plan(model, deal(forget), deal(retain))
    if rank == 0:
        with torch.no_grad():
            model.inner[2].weight.to_local().fill_(float("nan"))
    with pytest.raises(ValueError) as weight:
        method.unlearn(model, forget, retain)
    return str(nan.value), str(none.value), str(weight.value), same, limit, planned.weights


def test_a_fault_of_one_rank_is_told_on_all_and_the_poorest_sets_the_limit() -> None:
    found = on_ranks(2, told_apart)
    assert found[0][:5] == found[1][:5]
    nan, none, weight, same, limit, _ = found[0]
    assert nan.startswith("layer conv: ") and "NaN" in nan
    assert none == "retain is empty: it yields no batch on any rank"
    assert weight.startswith("parameter inner.2.weight holds NaN") and same
    assert limit == 2_000  # half of 8,000, which the ranks of one machine share
    model, forget, retain = odd()
    one = ClassForgetting(max_patches=None).plan(model, forget, retain).weights
    assert sum(of_rank[5] for of_rank in found) == one and found[0][5] > found[1][5] > 0


def after_a_measurement(rank: int) -> tuple[Any, Any]:
    """FSDP2 leaves the root's weights whole after a forward pass alone: an update must not be lost to them."""
    model, forget, retain = odd()
    model = held(model, "fsdp2")
    x = numbers(4, 1, 6, 6, seed=5)
    with torch.no_grad():
        model.eval()(x)
        ClassForgetting(**SETTINGS).unlearn(model, deal(forget), deal(retain))
        seen = model(x).numpy()
    fresh = odd()[0]
    for name, value in full_weights(model).items():
        fresh.get_parameter(name).data = torch.from_numpy(value)
    return seen, fresh(x).detach().numpy()


def test_the_next_forward_pass_sees_the_update() -> None:
    for seen, expected in on_ranks(2, after_a_measurement):
        assert abs(seen - expected).max() <= 1e-12


# torch asks for inner sizes that the ranks divide.
def perceptron() -> tuple[nn.Module, list[Any], list[Any]]:
    torch.manual_seed(0)
    x = numbers(60, 5)
    model = nn.ModuleDict({"up": nn.Linear(5, 8), "down": nn.Linear(8, 3)}).double()
    model.forward = lambda x: model["down"](model["up"](x).relu())  # type: ignore[method-assign]
    return model, [(x[:20], torch.zeros(20))], [(part, torch.zeros(len(part))) for part in x[20:].split(15)]


def block() -> tuple[nn.Module, list[Any], list[Any]]:
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP

    torch.manual_seed(0)
    model = LlamaMLP(LlamaConfig(hidden_size=6, intermediate_size=10, num_attention_heads=2)).double()
    x = numbers(16, 4, 6)
    return model, [(x[:5], torch.zeros(5))], [(part, torch.zeros(len(part))) for part in x[5:].split(4)]


TENSOR_PARALLEL: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "perceptron": (perceptron, {"up": ColwiseParallel(), "down": RowwiseParallel()}),
    "block": (block, {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}),
}


def tensor_parallel(rank: int) -> dict[str, Found]:
    found = {}
    for name, (problem, ways) in TENSOR_PARALLEL.items():
        model, forget, retain = problem()
        parallelize_module(model, init_device_mesh("cpu", (2,)), ways)
        outcome = ClassForgetting(**SETTINGS).unlearn(model, forget, retain)
        found[name] = full_weights(model), outcome.details, outcome.changed
    return found


def test_ranks_of_tensor_parallelism_see_the_same_samples_and_count_them_once() -> None:
    for of_rank in on_ranks(2, tensor_parallel):
        for name, (problem, _) in TENSOR_PARALLEL.items():
            model, forget, retain = problem()
            outcome = ClassForgetting(**SETTINGS).unlearn(model, forget, retain)
            assert len(outcome.changed) == len(TENSOR_PARALLEL[name][1])
            require_same(of_rank[name], (full_weights(model), outcome.details, outcome.changed))
