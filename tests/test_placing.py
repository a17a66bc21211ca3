"""Models laid out over ranks compute what one process computes, and no rank holds more than it must."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from fastunlearn.checkpoint import digest
from fastunlearn.inputs import build_model
from fastunlearn.parallel.checkpoints import sharded_digest
from fastunlearn.parallel.placing import blocks, place, without_memory
from fastunlearn.parallel.ranks import ALONE, local, unwrapped, world

CPU = torch.device("cpu")
SIZES = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16}  # fmt: skip


def written(folder: Path, kind: str, tied: bool = True) -> str:
    """A tiny Hugging Face folder with random weights."""
    import transformers

    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=31, n_embd=16, n_layer=2, n_head=2, n_positions=16)
        model: Any = transformers.GPT2LMHeadModel(config)
    else:
        own = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}[kind]
        model = transformers.AutoModelForCausalLM.from_config(own(**SIZES, tie_word_embeddings=tied))
    model.save_pretrained(folder)
    return str(folder)


def fresh(folder: str) -> nn.Module:
    return build_model(folder, None, None, True)


def tokens(rows: int = 3) -> Tensor:
    return torch.randint(0, 31, (rows, 7), generator=torch.Generator().manual_seed(1))


def whole(folder: str, dtype: torch.dtype | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of the plain model."""
    model = build_model(folder, None).eval()
    if dtype is not None:
        model.to(dtype)
    return _run(model)


def _run(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    logits = model(input_ids=tokens()).logits
    F.cross_entropy(logits.float().flatten(0, 1), tokens().flatten()).backward()
    grads = {n: p.grad for n, p in unwrapped(model).named_parameters() if p.grad is not None}
    full = {n: (g.full_tensor() if isinstance(g, DTensor) else g) for n, g in grads.items()}
    return logits.detach(), full


def _placed(rank: int, folder: str, how: str, dtype: torch.dtype | None) -> dict[str, Any]:
    model = place(partial(fresh, folder), how, world(), CPU, dtype, folder)
    known = sharded_digest(model)
    held = sum(local(p).numel() for p in model.parameters())
    whole_on_rank = [n for n, p in model.named_parameters() if not isinstance(p, DTensor)]
    logits, grads = _run(model)
    meta = [n for n, p in model.named_parameters() if p.is_meta]
    return {"digest": known, "held": held, "plain": whole_on_rank, "logits": logits.numpy(),
            "grads": {n: g.numpy() for n, g in grads.items()}, "training": model.training, "meta": meta}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "how", "size", "tied"),
    [
        ("gpt2", "fsdp", 3, True),  # 31 and 16 rows over 3 ranks
        ("llama", "fsdp", 2, False),
        ("qwen2", "fsdp", 2, True),
        ("gpt2", "ddp", 2, True),
        ("llama", "tp", 2, True),
        ("qwen2", "tp", 2, False),
    ],
)
def test_a_placed_language_model_is_the_one_in_the_folder(
    tmp_path: Path, kind: str, how: str, size: int, tied: bool
) -> None:
    folder = written(tmp_path, kind, tied)
    logits, grads = whole(folder)
    model = build_model(folder, None)
    for found in on_ranks(size, _placed, folder, how, None):
        assert found["digest"] == digest(model.state_dict())
        assert not found["training"] and not found["meta"]
        torch.testing.assert_close(torch.from_numpy(found["logits"]), logits, rtol=1e-4, atol=1e-5)
        assert found["grads"].keys() == grads.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(torch.from_numpy(found["grads"][name]), grad, rtol=1e-3, atol=1e-6)
        count = sum(p.numel() for p in model.parameters())
        if how == "fsdp":
            assert not found["plain"] and found["held"] < count / size * 1.2


class Tied(nn.Module):
    """Blocks of which one shares a weight with the head, a frozen one, and a buffer that no checkpoint has."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))
        self.head = nn.Linear(5, 5, bias=False)
        self.head.weight = self.blocks[1].weight
        self.blocks[2].requires_grad_(False)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x) * self.scale)
        return self.head(x)


def tied() -> nn.Module:
    torch.manual_seed(3)
    return Tied()


def test_a_block_that_shares_a_weight_with_another_part_is_left_to_the_rest() -> None:
    model = tied()
    assert blocks(model) == [model.blocks[0], model.blocks[2]]  # type: ignore[index]
    plain = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    assert blocks(plain) == [plain[1], plain[3]]
    assert blocks(nn.Linear(2, 2)) == []


def test_a_model_without_memory_has_its_shapes_ties_types_and_buffers() -> None:
    with without_memory():
        model: Any = tied()
    assert all(p.is_meta for p in model.parameters()) and not model.scale.is_meta
    assert model.head.weight is model.blocks[1].weight and not model.blocks[2].weight.requires_grad
    assert digest({"scale": model.scale}) == digest({"scale": torch.linspace(0.5, 1.5, 5)})
    assert not any(p.is_meta for p in tied().parameters())  # over with the block


def _tied_placed(rank: int, path: str) -> tuple[bool, list[bool], Any, Any, int]:
    model: Any = place(Tied, "fsdp", world(), CPU, None, path)
    groups = sum(isinstance(m, FSDPModule) for m in model.modules())
    out = model(torch.ones(2, 5))
    out.square().sum().backward()
    grad = model.head.weight.grad.full_tensor()
    frozen = [p.requires_grad for p in model.blocks[2].parameters()]
    return model.head.weight is model.blocks[1].weight, frozen, out.detach().numpy(), grad.numpy(), groups


@pytest.mark.parametrize("size", [2, 4])  # 5 rows: the last of four ranks has none
def test_tied_and_frozen_weights_stay_so_when_sharded(tmp_path: Path, size: int) -> None:
    whole: Any = tied()
    torch.save(whole.state_dict(), tmp_path / "weights.pt")
    expected = whole(torch.ones(2, 5))
    expected.square().sum().backward()
    for same, frozen, out, grad, groups in on_ranks(size, _tied_placed, str(tmp_path / "weights.pt")):
        assert same and frozen == [False, False] and groups == 3
        torch.testing.assert_close(torch.from_numpy(out), expected.detach())
        torch.testing.assert_close(torch.from_numpy(grad), whole.head.weight.grad)


def _refused(rank: int, folder: str) -> list[str]:
    said = []
    for build, how in ((partial(fresh, folder), "tp"), (tied, "tp"), (tied, "pipeline")):
        try:
            place(build, how, world(), CPU)
        except ValueError as error:
            said.append(str(error))
    return said


def test_what_can_not_be_placed_is_said_in_one_line(tmp_path: Path) -> None:
    folder = written(tmp_path, "llama")
    first, *others = on_ranks(3, _refused, folder)
    assert all(other == first for other in others)
    assert first[0] == "LlamaForCausalLM has num_attention_heads 4, which 3 ranks can not share evenly; use fsdp"
    assert first[1].startswith("Tied has no plan for tensor parallelism") and "got 'pipeline'" in first[2]


def test_alone_nothing_is_shared_and_the_type_is_the_one_asked_for(tmp_path: Path) -> None:
    folder = written(tmp_path, "gpt2")
    for how in ("none", "ddp", "fsdp", "tp"):
        model = place(partial(fresh, folder), how, ALONE, CPU, torch.bfloat16, folder)
        assert type(model).__name__ == "GPT2LMHeadModel" and not model.training
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        expected = {n: v.to(torch.bfloat16) for n, v in build_model(folder, None).state_dict().items()}
        assert digest(model.state_dict()) == digest(expected)
