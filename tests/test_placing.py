"""Models laid out over ranks compute what one process computes, and no rank holds more than it must."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from fastunlearn.checkpoint import digest
from fastunlearn.inputs import build_model
from fastunlearn.parallel.checkpoints import sharded_digest
from fastunlearn.parallel.placing import place
from fastunlearn.parallel.ranks import local, unwrapped, world

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
    return {"digest": known, "held": held, "plain": whole_on_rank, "logits": logits.numpy(),
            "grads": {n: g.numpy() for n, g in grads.items()}, "training": model.training, "meta": [n for n, p in model.named_parameters() if p.is_meta]}  # fmt: skip


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
