"""The stated peak is what a process then holds; and the terms are those that arithmetic gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from fastunlearn.memory import MemoryPlan, memory_plan
from fastunlearn.methods.baselines import FineTune
from fastunlearn.methods.dampening import SelectiveSynapticDampening
from fastunlearn.methods.deepclean import DeepClean

HARNESS = '''
import gc, json, os, sys

sys.path.insert(0, sys.argv[1])
import torch
from test_memory_plan import METHODS, batch, gpt2

from fastunlearn.memory import memory_plan


def held(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def measured(method):
    """In a child, whose highest memory is its own."""
    read, write = os.pipe()
    if not os.fork():
        method.unlearn(tiny, [batch(50)], [batch(50)])  # the code itself, which a child maps anew, and what it loads
        gc.collect()
        before = held("VmRSS")
        method.unlearn(model, [data], [data])
        os.write(write, str(held("VmHWM") - before).encode())
        os._exit(0)
    os.close(write)
    return int(os.fdopen(read).read())


tiny, model, data = gpt2(64, 1, 50), gpt2(640, 6, 1000), batch(1000)
for name, method in METHODS.items():
    plan = memory_plan(model, data, method)
    weights = sum(p.numel() for p in model.parameters())
    print(json.dumps([name, weights, plan.peak - plan.weights, measured(method)]), flush=True)
'''

METHODS = {
    "float32": DeepClean(),
    "bfloat16": DeepClean(fisher_dtype=torch.bfloat16, finetune_epochs=0),
    "passes": DeepClean(passes=4, per_layer=True, finetune_epochs=0),
}


def gpt2(width: int, depth: int, words: int) -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=width, n_layer=depth, n_head=width // 64, vocab_size=words, n_positions=32,
                        bos_token_id=0, eos_token_id=0)  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def batch(words: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(words, (4, 16), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


@pytest.fixture(scope="module")
def runs() -> dict[str, list[int]]:
    """Per method: parameters, bytes stated and measured beyond the model."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 18),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 18),
    }  # fmt: skip
    ended = subprocess.run([sys.executable, "-c", HARNESS, str(Path(__file__).parent)], env=environment,
                           capture_output=True, text=True)  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    found = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("[")]
    return {name: numbers for name, *numbers in found}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("name", METHODS)
def test_a_run_holds_what_the_plan_states(name: str, runs: dict[str, list[int]]) -> None:
    weights, stated, measured = runs[name]
    print(f"\n{name}: {weights / 1e6:.1f} M parameters, {stated / 1e6:.1f} MB stated, {measured / 1e6:.1f} measured")
    assert 30e6 < weights < 60e6
    assert abs(measured - stated) <= 0.15 * stated


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 33), nn.ReLU(), nn.Linear(33, 7))


DATA = (torch.randn(5, 20), torch.randint(7, (5,)))
COUNT = 20 * 33 + 33 + 33 * 7 + 7


def phase(plan: MemoryPlan, name: str) -> dict[str, int]:
    return dict(next(p.terms for p in plan.phases if p.name == name))


def test_terms_are_those_of_arithmetic() -> None:
    found = memory_plan(mlp(), DATA, DeepClean(fraction=0.25, optimizer="adamw"))
    assert found.weights == 4 * COUNT
    assert phase(found, "fisher_forget")["information"] == 4 * COUNT
    assert phase(found, "fisher_retain")["information"] == 8 * COUNT
    tuned = phase(found, "finetune")
    assert tuned["gradients"] == 4 * COUNT
    assert tuned["reset values"] == tuned["values before"] == COUNT
    assert tuned["optimizer"] == 2 * COUNT
    assert COUNT / 8 <= tuned["masks"] < COUNT / 8 + 4
    assert found.peak == max(p.total for p in found.phases)


def test_bfloat16_halves_the_information_and_dampening_copies_the_weights() -> None:
    half = memory_plan(mlp(), DATA, DeepClean(fisher_dtype=torch.bfloat16))
    assert phase(half, "fisher_retain")["information"] == 4 * COUNT
    dampened = memory_plan(mlp(), DATA, SelectiveSynapticDampening())
    assert phase(dampened, "dampen")["copy of the weights"] == 4 * COUNT


def test_fsdp_holds_shards_and_ddp_everything() -> None:
    sizes = [20 * 33, 33, 33 * 7, 7]
    sharded = memory_plan(mlp(), DATA, DeepClean(), 3, "fsdp")
    assert sharded.weights == sum(-(-4 * size // 3) for size in sizes)
    assert phase(sharded, "fisher_retain")["information"] == 2 * sharded.weights
    replicated = memory_plan(mlp(), DATA, DeepClean(), 3, "ddp")
    assert replicated.weights == 4 * COUNT
    # Every square of a batch waits for the exchange, beside what is sent or received.
    assert phase(replicated, "fisher_retain")["gradients and squares of layers"] >= 4 * COUNT


def test_offloaded_information_is_on_the_host_of_a_gpu_only() -> None:
    method = DeepClean(offload=True)
    on_gpu = memory_plan(mlp(), DATA, method, device="cuda")
    assert on_gpu.host == 8 * COUNT and "information" not in phase(on_gpu, "fisher_retain")
    on_cpu = memory_plan(mlp(), DATA, method)
    assert on_cpu.host == 0 and phase(on_cpu, "fisher_retain")["information"] == 8 * COUNT


def test_a_model_without_values_has_the_plan_of_one_with_them() -> None:
    real = gpt2(64, 2, 100)
    before = {name: p.clone() for name, p in real.named_parameters()}
    with torch.device("meta"):
        hollow = gpt2(64, 2, 100)
    method = DeepClean(fisher_dtype=torch.bfloat16)
    assert memory_plan(hollow, (4, 16), method, device="cpu") == memory_plan(real, batch(100), method)
    assert all(p.requires_grad and p.grad is None and torch.equal(p, before[n]) for n, p in real.named_parameters())


def test_longer_batches_take_more_by_as_much_each() -> None:
    peaks = [memory_plan(gpt2(64, 2, 100), (4, t), DeepClean()).peak for t in (8, 16, 24)]
    assert peaks[1] - peaks[0] == pytest.approx(peaks[2] - peaks[1], rel=0.1) and peaks[1] > peaks[0]


def test_the_table_has_every_phase_and_term() -> None:
    shown = str(memory_plan(mlp(), DATA, DeepClean()))
    for word in ("MB at the peak", "weights", "information", "fisher_retain", "reset", "finetune", "total"):
        assert word in shown


def refused(kind: type[Exception], words: str, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(kind, match=words):
        memory_plan(*args, **kwargs)


def test_what_can_not_be_planned_is_refused() -> None:
    refused(TypeError, "knows DeepClean", mlp(), DATA, FineTune())
    refused(ValueError, "sharding must be", mlp(), DATA, DeepClean(), 2)
    refused(ValueError, "sharding must be", mlp(), DATA, DeepClean(), 1, "ddp")
    refused(ValueError, "pass per label", gpt2(64, 1, 50), batch(50), DeepClean(fisher="exact"))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(20, 7), nn.Parameter(torch.ones(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * self.scale


def test_a_parameter_without_a_rule_is_named() -> None:
    refused(ValueError, "scale", Scaled(), DATA, DeepClean())
