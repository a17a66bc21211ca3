"""Fisher diagonals on several ranks are those of one process, bit for bit where batches are dealt whole."""

from __future__ import annotations

from itertools import pairwise
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

    sizes = (5, draw(9), draw(9), 3)
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
