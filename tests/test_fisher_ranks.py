"""Fisher diagonals on several ranks are those of one process, bit for bit where batches are dealt whole."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastunlearn as fu
from fastunlearn.parallel.deal import deal


def mlp(sizes: tuple[int, ...] = (5, 7, 3)) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:], strict=False):
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
    if how == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    blocks = [m for m in model.modules() if type(m).__name__ in ("GPT2Block", "LlamaDecoderLayer")]
    for block in blocks or list(model.children())[:1]:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


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
    """Batches of several sizes, fewer than the ranks need, so that some stand in, with layers of fewer rows than ranks."""
    sizes = [4, 3, 4, 2, 1]
    alone = fu.fisher_diagonal(MODELS[name](), batches_for(name, sizes))
    for values, samples in on_ranks(size, fisher_on_rank, name, how, sizes, {}):
        assert samples == alone.num_samples == 14
        assert list(values) == list(alone)
        for key, value in alone.items():
            torch.testing.assert_close(values[key], value, rtol=0, atol=0)
