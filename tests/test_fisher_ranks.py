"""Fisher diagonals on several ranks are those of one process, bit for bit where batches are dealt whole."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import fastunlearn as fu
from fastunlearn import sums
from fastunlearn.fisher import fisher_plan
from fastunlearn.parallel.deal import deal


def mlp(sizes: tuple[int, ...] = (5, 7, 3)) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), nn.LayerNorm(b), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).eval()


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=37, n_positions=12, n_embd=12, n_layer=2, n_head=2)).eval()


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=37, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


MODELS = {"mlp": mlp, "gpt2": gpt2, "llama": llama}


def batches_for(name: str, sizes: list[int]) -> list[Any]:
    torch.manual_seed(1)
    if name == "mlp":
        return [(torch.randn(n, 5), torch.randint(0, 3, (n,))) for n in sizes]
    found = []
    for n in sizes:
        ids = torch.randint(1, 37, (n, 9))
        mask = torch.ones_like(ids)
        mask[0, 6:] = 0
        found.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return found


def place(model: nn.Module, how: str) -> nn.Module:
    if how == "tp":
        return parallelised(model)
    if how == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    blocks = [m for m in model.modules() if type(m).__name__ in ("GPT2Block", "LlamaDecoderLayer")]
    for block in blocks or list(model.children())[:1]:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def parallelised(model: nn.Module) -> nn.Module:
    """A Llama with its blocks cut into columns and rows, its embedding into rows, and sequence-parallel norms."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    columns, rows = ColwiseParallel(), RowwiseParallel()
    for layer in model.model.layers:
        parallelize_module(layer.mlp, mesh, {"gate_proj": columns, "up_proj": columns, "down_proj": rows})
    parallelize_module(
        model, mesh, {
            "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
            "lm_head": ColwiseParallel(output_layouts=Replicate()),
            "model.layers.0.self_attn.q_proj": ColwiseParallel(output_layouts=Replicate()),
            "model.layers.0.self_attn.o_proj": RowwiseParallel(input_layouts=Replicate()),
        },
    )  # fmt: skip
    return model


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def fisher_on_rank(rank: int, name: str, how: str, sizes: list[int], options: dict[str, Any]) -> Any:
    model = place(MODELS[name](), how)
    found = fu.fisher_diagonal(model, deal(batches_for(name, sizes)), **options)
    return {key: whole(value) for key, value in found.items()}, found.num_samples


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_find_bit_for_bit_what_one_process_finds(name: str, how: str, size: int) -> None:
    """Five batches of several sizes, so that some ranks stand in, and layers of fewer rows than ranks."""
    sizes = [4, 3, 4, 2, 1]
    alone = fu.fisher_diagonal(MODELS[name](), batches_for(name, sizes))
    for values, samples in on_ranks(size, fisher_on_rank, name, how, sizes, {}):
        assert samples == alone.num_samples == 14
        assert list(values) == list(alone)
        for key, value in alone.items():
            torch.testing.assert_close(values[key], value, rtol=0, atol=0)


def parallel_on_rank(rank: int, sizes: list[int]) -> Any:
    model = parallelised(llama())
    found = fu.fisher_diagonal(model, batches_for("llama", sizes))
    return {key: (whole(value), value.to_local().shape if hasattr(value, "to_local") else None)
            for key, value in found.items()}  # fmt: skip


def test_tensor_parallel_layers_square_the_gradients_of_their_own_rows_and_columns() -> None:
    sizes = [4, 1, 3]
    alone = fu.fisher_diagonal(llama(), batches_for("llama", sizes))
    for found in on_ranks(2, parallel_on_rank, sizes):
        for key, value in alone.items():
            torch.testing.assert_close(found[key][0], value, rtol=1e-4, atol=1e-9, msg=key)
        assert found["model.embed_tokens.weight"][1] in ((19, 16), (18, 16))
        assert found["model.layers.0.mlp.down_proj.weight"][1] == (16, 10)


def any_shapes_on_rank(rank: int, seeds: list[int], how: str) -> Any:
    return [diagonal_of(seed, lambda model: place(model, how), deal) for seed in seeds]


def diagonal_of(seed: int, placed: Any, spread: Any) -> tuple[dict[str, Tensor], int]:
    """Layers of 1 to 9 rows, so that shards are uneven or empty, and 1 to 5 batches, so that ranks may have none."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int) -> int:
        return int(torch.randint(1, high + 1, (1,), generator=generator))

    sizes = (5, draw(9), draw(9), 3) if seed else (5, 1, 1, 3)  # of which the fourth rank has nothing at all
    batches = batches_for("mlp", [draw(4) for _ in range(draw(5))])
    found = fu.fisher_diagonal(placed(mlp(sizes)), spread(batches))
    return {key: whole(value) for key, value in found.items()}, found.num_samples


@pytest.mark.parametrize(("how", "size"), [("ddp", 3), ("fsdp", 3), ("fsdp", 4)])
def test_any_shapes_and_shares_of_batches_give_the_bits_of_one_process(how: str, size: int) -> None:
    seeds = list(range(12))
    alone = [diagonal_of(seed, lambda model: model, list) for seed in seeds]
    for found in on_ranks(size, any_shapes_on_rank, seeds, how):
        for (values, samples), (truth, count) in zip(found, alone, strict=True):
            assert samples == count
            for key, value in truth.items():
                assert torch.equal(values[key], value), key


def own_share_on_rank(rank: int, shares: list[list[int]]) -> Any:
    torch.manual_seed(5)
    every = batches_for("mlp", [n for share in shares for n in share])
    start = sum(len(share) for share in shares[:rank])
    found = fu.fisher_diagonal(place(mlp(), "fsdp"), every[start : start + len(shares[rank])])
    return {key: whole(value) for key, value in found.items()}, found.num_samples


def test_a_rank_may_bring_samples_of_its_own_or_none() -> None:
    """As a DistributedSampler gives them: other sums in float32, the same diagonal to 1e-6."""
    shares = [[3, 2, 4], [], [1]]
    every = batches_for("mlp", [3, 2, 4, 1])
    alone = fu.fisher_diagonal(mlp(), every)
    for values, samples in on_ranks(3, own_share_on_rank, shares):
        assert samples == 10
        for key, value in alone.items():
            torch.testing.assert_close(values[key], value, rtol=1e-6, atol=0)


def no_batch_on_rank(rank: int) -> str:
    with pytest.raises(ValueError) as error:
        fu.fisher_diagonal(place(mlp(), "fsdp"), [])
    return str(error.value)


def test_no_batch_anywhere_is_an_error_on_every_rank() -> None:
    assert on_ranks(2, no_batch_on_rank) == ["batches is empty: it yields no batch on any rank"] * 2


def unruled_on_rank(rank: int) -> str:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale.exp()

    with pytest.raises(ValueError) as error:
        fu.fisher_diagonal(place(nn.Sequential(nn.Linear(5, 3), Scale()), "fsdp"), batches_for("mlp", [2]))
    return str(error.value)


def test_a_sharded_parameter_without_a_kernel_is_named() -> None:
    for message in on_ranks(2, unruled_on_rank):
        assert "no kernel accounts for every use of 1.scale" in message
        assert "DistributedDataParallel" in message


def poisoned_on_rank(rank: int) -> str:
    model = place(mlp(), "fsdp")
    if rank == 1:
        with torch.no_grad():
            model[0].weight.to_local()[0, 0] = torch.nan
    with pytest.raises(ValueError) as error:
        fu.fisher_diagonal(model, batches_for("mlp", [2]))
    return str(error.value)


def test_nan_in_one_shard_is_found_by_all_ranks() -> None:
    assert on_ranks(2, poisoned_on_rank) == ["parameter 0.weight holds NaN or Inf; unlearning would only spread it"] * 2


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_rank_that_stands_in_adds_nothing_however_often_the_squares_are_exchanged(how: str) -> None:
    """Buckets of one parameter, sent while the backward pass goes on, and a backward pass for each of three labels."""
    sizes = [4, 3, 1]
    exact = fu.fisher_diagonal(mlp(), batches_for("mlp", sizes), kind="exact")
    alone = fu.fisher_diagonal(mlp(), batches_for("mlp", sizes))
    for (first, second), samples in on_ranks(2, small_buckets_on_rank, how, sizes):
        assert samples == [8, 8]
        for key, value in alone.items():
            assert torch.equal(first[key], value), key
            torch.testing.assert_close(second[key], exact[key], rtol=1e-6, atol=0)


def small_buckets_on_rank(rank: int, how: str, sizes: list[int]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sums, "BUCKET_BYTES", 0)
        found = [fisher_on_rank(rank, "mlp", how, sizes, {"kind": kind}) for kind in ("empirical", "exact")]
    return [values for values, _ in found], [samples for _, samples in found]


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_drawn_labels_do_not_depend_on_the_number_of_ranks(how: str) -> None:
    """Of a GPT-2, whose first batch is tried with two plans; on each rank that is another batch."""
    alone = fu.fisher_diagonal(gpt2(), batches_for("gpt2", [3, 2, 1]), kind="monte_carlo")
    for values, _ in on_ranks(2, fisher_on_rank, "gpt2", how, [3, 2, 1], {"kind": "monte_carlo"}):
        assert all(torch.equal(values[key], value) for key, value in alone.items())


def tokens_on_rank(rank: int) -> Any:
    long, short = batches_for("gpt2", [2, 2])
    batches = [long, {key: value[:, :4] for key, value in short.items()}]
    with pytest.raises(ValueError, match="a backward pass for every position") as error:
        fu.fisher_diagonal(place(gpt2(), "fsdp"), deal(batches), sample="token")
    found, alone = (fu.fisher_diagonal(m, b, sample="token") for m, b in (
        (place(gpt2(), "ddp"), deal(batches)), (gpt2(), batches)))  # fmt: skip
    for key, value in alone.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-9)
    return found.num_samples == alone.num_samples, str(error.value)


def test_replicas_may_have_different_numbers_of_tokens_and_shards_are_refused() -> None:
    assert all(same for same, _ in on_ranks(2, tokens_on_rank))


def ready_on_rank(rank: int) -> Any:
    """A sharded model that was run without gradients, one that is compiled, and a compiled DDP model."""
    batches = batches_for("mlp", [4, 3, 1])
    ran = place(mlp(), "fsdp")
    with torch.no_grad():
        ran(batches[0][0])
    found = {}
    for name, model in (
        ("ran", ran),
        ("compiled", torch.compile(place(mlp(), "fsdp"), backend="eager")),
        ("compiled ddp", torch.compile(DistributedDataParallel(mlp()), backend="eager")),
    ):
        values = fu.fisher_diagonal(model, deal(batches))
        found[name] = {key.removeprefix("_orig_mod."): whole(value) for key, value in values.items()}
        assert values.num_samples == 8
    return found


def test_models_that_have_run_or_are_compiled() -> None:
    alone = fu.fisher_diagonal(mlp(), batches_for("mlp", [4, 3, 1]))
    for found in on_ranks(2, ready_on_rank):
        for values in found.values():
            assert all(torch.equal(values[key], value) for key, value in alone.items())


def refused_on_rank(rank: int) -> list[str]:
    inner = nn.Sequential(DistributedDataParallel(mlp()))
    half = mlp()
    fully_shard(half, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))["b"])
    messages = []
    for model in (inner, half):
        with pytest.raises(ValueError) as error:
            fu.fisher_diagonal(model, batches_for("mlp", [2]))
        messages.append(str(error.value))
    return messages


def test_engines_around_a_part_of_the_model_or_on_some_of_the_ranks_are_refused() -> None:
    """Rather than taken for a model of one process, each rank with another result."""
    for inner, half in on_ranks(4, refused_on_rank):
        assert "0 is in DistributedDataParallel" in inner
        assert "on a mesh of 2 ranks, but 4 were started" in half


class Routed(nn.Module):
    """The sign of a batch's first number decides which expert it meets."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 3)])

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.experts[int(x[0, 0] > 0)](x)
        return found


def routed_on_rank(rank: int) -> str:
    x = torch.ones(2, 5) * (1 - 2 * rank)
    with pytest.raises(ValueError) as error:
        fu.fisher_diagonal(fully_shard(Routed()), [(x, torch.zeros(2, dtype=torch.int64))])
    return str(error.value)


def test_shards_that_one_rank_uses_and_another_does_not_are_an_error_on_both() -> None:
    assert all("used conditionally" in message for message in on_ranks(2, routed_on_rank))


def added_on_rank(rank: int, folder: str) -> bool:
    """Sums of shards, a file of them, and sums of what was read and shards."""
    model = place(mlp(), "fsdp")
    first, second = (fu.fisher_diagonal(model, deal(batches_for("mlp", sizes))) for sizes in ([4, 3], [2]))
    first.save(f"{folder}/fisher.safetensors")
    dist.barrier()
    read = fu.FisherDiagonal.load(f"{folder}/fisher.safetensors")
    assert all(torch.equal(read[key], whole(value)) for key, value in first.items())
    both = [{key: whole(value) for key, value in pair.items()} for pair in (first + second, read + second)]
    assert (second + read).num_samples == 9
    return all(torch.equal(both[0][key], both[1][key]) for key in read)


def test_diagonals_of_shards_are_saved_whole_and_added(tmp_path: Path) -> None:
    assert on_ranks(2, added_on_rank, str(tmp_path)) == [True, True]


def plan_on_rank(rank: int, how: str) -> dict[str, str]:
    return fisher_plan(place(gpt2(), how), deal(batches_for("gpt2", [3])))


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_plans_of_several_ranks(how: str) -> None:
    for plan in on_ranks(2, plan_on_rank, how):
        assert plan["transformer.h.0.attn.c_attn.weight"] == "kernel, Conv1D"
