"""The Fisher diagonal of a language model in bfloat16 beside plain training passes over the same sequences.

Weights are random; on a GPU with 75 GB or more the shape is that of Llama 3 8B, on a smaller one that of Llama 3.2 1B,
on a CPU a small one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import Llama
from torch import Tensor, nn

import fastunlearn as fu

SHAPES = {
    "8B": (128_256, 4096, 14_336, 32, 32, 8),
    "1B": (128_256, 2048, 8192, 16, 32, 8),
    "19M": (8192, 384, 1024, 8, 6, 2),
}


@pytest.mark.parametrize("information", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_fisher_of_a_language_model(versus: Any, device: str, information: torch.dtype | None, benchmark: Any) -> None:
    name = "19M"
    if device == "cuda":
        name = "8B" if torch.cuda.get_device_properties(0).total_memory > 75e9 else "1B"
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)  # 8 billion weights in float32 beside them would not fit everywhere
        try:
            model = Llama(*SHAPES[name]).eval()
        finally:
            torch.set_default_dtype(torch.float32)
        batches = [
            (tokens, tokens) for tokens in torch.randint(SHAPES[name][0], (2, 4, 512 if device == "cuda" else 64))
        ]

    def forward_backward() -> None:
        for tokens, labels in batches:
            model.zero_grad(set_to_none=True)
            fu.causal_lm_loss(model(tokens), labels).mean().backward()
        model.zero_grad(set_to_none=True)

    def ours() -> None:
        fu.fisher_diagonal(model, batches, fu.causal_lm_loss, dtype=information)

    versus(ours, rounds=5, forward_backward=forward_backward)
    parameters = sum(p.numel() for p in model.parameters())
    benchmark.extra_info.update({"shape": name, "parameters": parameters, "samples": sum(len(t) for t, _ in batches)})
    if device == "cuda":
        benchmark.extra_info["largest_allocation"] = largest = _largest_allocation(ours)
        weights = 4 * max(p.numel() for p in model.parameters())
        logits = max(_logits_bytes(model, tokens) for tokens, _ in batches)
        assert largest <= max(weights, logits), "something of samples x weights was allocated"


def _logits_bytes(model: nn.Module, tokens: Tensor) -> int:
    with torch.no_grad():
        return 4 * model(tokens).numel()


def _largest_allocation(run: Any) -> int:
    """Bytes of the largest block that the CUDA allocator was asked for while ``run`` ran."""
    torch.cuda.memory._record_memory_history(max_entries=10_000_000, stacks="python", context=None)
    try:
        run()
        traces = torch.cuda.memory._snapshot()["device_traces"]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    return max(event["size"] for trace in traces for event in trace if event["action"] == "alloc")
