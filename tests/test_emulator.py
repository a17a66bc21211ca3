"""The emulated GPU computes what CUDA computes, and reports what would be wrong on one."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

EMULATOR = Path(__file__).parent / "emulator"
SANITIZERS = {
    "none": ([], []),
    "thread": (["-DEMULATOR_TSAN"], ["-fsanitize=thread"]),
    "address": (["-DEMULATOR_ASAN"], ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]),
}
Run = Callable[..., "subprocess.CompletedProcess[str]"]


def compiler(*arguments: str) -> None:
    flags = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"]
    subprocess.run(["g++", *flags, f"-I{EMULATOR / 'include'}", *arguments], check=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Compile a program against the emulator under a sanitizer, and run it."""
    folder = tmp_path_factory.mktemp("emulator")

    def compile_and_run(
        source: str, *defines: str, sanitizer: str = "none", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        runtime_flags, flags = SANITIZERS[sanitizer]
        runtime = folder / f"runtime-{sanitizer}.o"
        if not runtime.exists():
            compiler(*runtime_flags, "-c", str(EMULATOR / "runtime.cpp"), "-o", str(runtime))
        program = folder / "-".join([Path(source).stem, sanitizer, *defines])
        compiler(
            *flags, "-DFASTUNLEARN_EMULATED", *(f"-D{d}" for d in defines), "-x", "c++", str(EMULATOR / source),
            "-x", "none", str(runtime), "-o", str(program),
        )  # fmt: skip
        # ThreadSanitizer of g++ 12 does not know every layout of randomised addresses.
        command = ["setarch", "-R", str(program)] if sanitizer == "thread" else [str(program)]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})

    return compile_and_run


FAULTS = [
    ("faults/missing_barrier.cu", (), "thread", "data race"),
    ("faults/missing_syncwarp.cu", (), "thread", "data race"),
    ("faults/out_of_bounds.cu", ("FAULT=SHARED",), "address", "out of bounds"),
    ("faults/out_of_bounds.cu", ("FAULT=DYNAMIC",), "address", "heap-buffer-overflow"),
    ("faults/out_of_bounds.cu", ("FAULT=GLOBAL",), "address", "heap-buffer-overflow"),
]


@pytest.mark.parametrize(("source", "defines", "sanitizer", "report"), FAULTS)
def test_a_fault_is_reported_and_its_repair_is_clean(
    run: Run, source: str, defines: tuple[str, ...], sanitizer: str, report: str
) -> None:
    faulty = run(source, *defines, sanitizer=sanitizer)
    assert faulty.returncode != 0
    assert report in faulty.stderr
    fixed = run(source, *defines, "FIXED", sanitizer=sanitizer)
    assert fixed.returncode == 0, fixed.stderr


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_a_divergent_barrier_aborts_and_says_who_waits_where(run: Run, sanitizer: str) -> None:
    result = run("faults/divergent_barrier.cu", sanitizer=sanitizer)
    assert result.returncode != 0
    assert "deadlock in block (0, 0, 0): of 64 threads 16 wait at a block barrier, 16 at a warp" in result.stderr


def test_the_order_of_blocks_can_be_reversed(run: Run) -> None:
    assert run("faults/block_order.cu").stdout == "3\n"
    assert run("faults/block_order.cu", FASTUNLEARN_EMULATOR_ORDER="reverse").stdout == "0\n"


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_collectives_and_conversions_are_those_of_cuda(run: Run, sanitizer: str, order: str) -> None:
    result = run("semantics.cu", sanitizer=sanitizer, FASTUNLEARN_EMULATOR_ORDER=order)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    for i, line in enumerate(lines[:64]):
        lane, first = i % 32, i - i % 32
        expected = [
            first + (lane ^ 5),
            i + 3 if lane + 3 < 32 else i,
            i - 2 if lane % 8 >= 2 else i,
            first + 7,
            signed(sum(1 << k for k in range(32) if (first + k) % 3 == 0)),
            int(first == 32),
            1,
            32,
            1,
            0,
            i ^ 1 if i < 16 else -1,
            64 * 63 // 2,
            8 + 4 + 31,
            i ^ 1,
        ]
        assert [int(word) for word in line.split()] == expected, f"thread {i}"
    bits = torch.tensor([[int(word, 16) for word in line.split()] for line in lines[64:-1]])
    floats = [signed_words(bits[:, k]).view(torch.float32) for k in range(3)]
    for ours, dtype in zip(floats[1:], (torch.bfloat16, torch.float16), strict=True):
        torch.testing.assert_close(ours, floats[0].to(dtype).float(), rtol=0, atol=0, equal_nan=True)
    assert lines[-1] == "invalid configuration argument"


def signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def signed_words(words: torch.Tensor) -> torch.Tensor:
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_same_program_compiles_for_a_gpu(tmp_path: Path) -> None:
    """The emulated interface is a subset of CUDA's."""
    subprocess.run(
        ["nvcc", "-std=c++20", "-arch=sm_80", "-c", str(EMULATOR / "semantics.cu"), "-o", str(tmp_path / "a.o")],
        check=True,
    )
