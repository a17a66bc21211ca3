"""Ours and the peers in one run: rounds in turn, medians, ratios, all kept in the JSON."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

DEVICE = os.environ.get("FASTUNLEARN_BENCH_DEVICE", "cpu")
Versus = Callable[..., None]
_lines: list[str] = []


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture
def versus(benchmark: Any, request: pytest.FixtureRequest) -> Versus:
    """versus(ours, rounds=…, peer=function, …): all in turn, ours through pytest-benchmark as well.

    ``moved`` bytes and ``flops`` are what ours can not do without; their rates are kept too. ``warm_up=False`` spares
    a peer that takes minutes its run beforehand.
    """

    def run(
        ours: Callable[[], Any],
        rounds: int = 7,
        moved: int = 0,
        flops: int = 0,
        warm_up: bool = True,
        **peers: Callable[[], Any],
    ) -> None:
        functions = {"ours": ours, **peers}
        times: dict[str, list[float]] = {name: [] for name in functions}
        for function in functions.values() if warm_up else [ours]:
            _timed(function)
        for _ in range(rounds):
            for name, function in functions.items():
                times[name].append(_timed(function))
        medians = {name: statistics.median(values) for name, values in times.items()}
        benchmark.extra_info.update(
            {
                "device": DEVICE,
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "medians": medians,
            }
        )
        if moved:
            benchmark.extra_info["gigabytes_per_second"] = moved / medians["ours"] / 1e9
        if flops:
            benchmark.extra_info["teraflops"] = flops / medians["ours"] / 1e12
        benchmark.pedantic(lambda: _timed(ours), rounds=rounds)
        cells = ", ".join(f"{name} {1e3 * t:.2f} ms ({t / medians['ours']:.2f}x)" for name, t in medians.items())
        rate = f" [{moved / medians['ours'] / 1e9:.1f} GB/s]" if moved else ""
        rate += f" [{flops / medians['ours'] / 1e12:.3g} TFLOP/s]" if flops else ""
        _lines.append(f"{request.node.name}: {cells}{rate}")

    return run


def _timed(function: Callable[[], Any]) -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.section(f"medians on {DEVICE}, in brackets as a multiple of ours")
    for line in _lines:
        terminalreporter.write_line(line)
