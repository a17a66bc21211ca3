"""The emulated Hopper instructions mean what the PTX ISA says, and a missing wait shows.

``emulator/hopper_semantics.cu`` prints what the wrappers of ``csrc/common/hopper.cuh`` did; here stand the direct
loops. The programs of ``emulator/faults/missing_wait.cu`` carry one mistake each.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from test_emulator import EMULATOR, Run, assert_clean, compile_with, execute, run, runtime

__all__ = ["run", "runtime"]  # fixtures

MOMENTS = [(asynchronous, order) for asynchronous in ("late", "early") for order in ("forward", "reverse")]
HOPPER = ["-std=c++20", "-DFIXED", "-gencode=arch=compute_90a,code=sm_90a", f"-I{EMULATOR.parent.parent / 'csrc'}"]
Z, Y, X, ROWS = 2, 9, 72, 16


def value(z: int, y: int, x: int) -> int:
    inside = 0 <= z < Z and 0 <= y < Y and 0 <= x < X
    return (5 * x + 11 * y + 29 * z) % 37 - 18 if inside else 0


def box(x: int, y: int, z: int) -> np.ndarray:
    """[rows, 64] as the tensor has them."""
    return np.array([[value(z, y + row, x + i) for i in range(64)] for row in range(ROWS)])


def swizzled(panel: np.ndarray) -> np.ndarray:
    """As they lie in shared memory: the 16-byte unit of a row, exclusive or the row modulo 8."""
    lying = np.empty_like(panel)
    for row in range(ROWS):
        for unit in range(8):
            to = unit ^ row % 8
            lying[row, 8 * to : 8 * to + 8] = panel[row, 8 * unit : 8 * unit + 8]
    return lying


def half_bits(values: np.ndarray) -> list[int]:
    return [int(bits) for bits in values.astype(np.float16).view(np.uint16).ravel()]


@pytest.fixture(scope="session", params=MOMENTS, ids="-".join)
def printed(run: Run, request: pytest.FixtureRequest) -> list[list[str]]:
    asynchronous, order = request.param
    done = run("hopper_semantics.cu", FASTUNLEARN_EMULATOR_ASYNC=asynchronous, FASTUNLEARN_EMULATOR_ORDER=order)
    assert_clean(done)
    return [line.split() for line in done.stdout.splitlines()]


def of(printed: list[list[str]], name: str) -> list[list[int]]:
    return [[int(word) for word in line[1:]] for line in printed if line[0] == name]


def test_a_copied_box_is_swizzled_and_zero_outside_the_tensor(printed: list[list[str]]) -> None:
    origins = [(0, 0, 0), (8, 0, 1), (64, 3, 0), (-8, -2, 1), (80, 0, 0), (0, 0, 2)]
    assert of(printed, "copy") == [half_bits(swizzled(box(*origin))) for origin in origins]


def test_a_multicast_reaches_both_blocks_of_a_cluster(printed: list[list[str]]) -> None:
    both = [*half_bits(swizzled(box(0, 0, 0))), *half_bits(swizzled(box(0, 0, 1)))]
    assert of(printed, "multicast") == [both * 4]


@pytest.mark.parametrize("columns", [128, 192, 256])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_warpgroup_product_reads_through_its_descriptors(printed: list[list[str]], dtype: str, columns: int) -> None:
    panels = np.concatenate([box(3 * i, 0, i % 2) for i in range(columns // 64)], axis=1)
    expected = 1 + 2 * panels[:, :64].T @ panels
    assert of(printed, f"product_{dtype}_{columns}") == [list(expected.ravel())]


def test_a_tensor_map_that_the_driver_refuses_is_refused(printed: list[list[str]]) -> None:
    assert of(printed, "refused") == [[1] * 5]  # CUDA_ERROR_INVALID_VALUE


@pytest.mark.parametrize("mode", ["thread", "address"])
def test_the_correct_program_is_clean_under_the_sanitizers(run: Run, mode: str) -> None:
    assert_clean(run("hopper_semantics.cu", mode))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("source", ["hopper_semantics.cu", "faults/missing_wait.cu"])
def test_the_same_source_compiles_for_hopper(source: str, tmp_path: Path) -> None:
    compile_with("nvcc", *HOPPER, "-c", EMULATOR / source, "-o", tmp_path / "object.o")


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0) or shutil.which("nvcc") is None,
    reason="no Hopper GPU with nvcc",
)
@pytest.mark.parametrize("source", ["hopper_semantics.cu", "faults/missing_wait.cu"])
def test_a_gpu_prints_the_same(run: Run, source: str, tmp_path: Path) -> None:
    program = tmp_path / "program"
    compile_with("nvcc", *HOPPER, EMULATOR / source, "-o", program)
    done = execute([program])
    assert_clean(done)
    assert done.stdout == run(source, "plain", "FIXED").stdout


# --------------------------------------------------------------------------------------- it bites


@pytest.mark.parametrize(("asynchronous", "order"), MOMENTS)
def test_a_ring_with_every_wait_is_right(run: Run, asynchronous: str, order: str) -> None:
    done = run(
        "faults/missing_wait.cu",
        "plain",
        "FIXED",
        FASTUNLEARN_EMULATOR_ASYNC=asynchronous,
        FASTUNLEARN_EMULATOR_ORDER=order,
    )
    assert_clean(done)
    assert done.stdout == "right\n"


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize(
    ("define", "asynchronous", "report"),
    [
        ("FULL", "late", "more arrivals than the phase expects"),
        ("EMPTY", "late", "more arrivals than the phase expects"),
        ("EMPTY", "early", "deadlock"),
        ("RELEASE", "early", "wrong"),
        ("PRODUCT", "late", "wrong"),
        ("PRODUCT", "early", "wrong"),
        ("FENCE", "late", "no wgmma_fence since the accumulators were handed out"),
        ("ARRIVALS", "late", "deadlock in block (0,0,0): 129 of 256 threads"),
        ("BYTES", "early", "129 at mbarrier_wait"),
        ("OUTSIDE", "early", "are outside the block's"),
        ("ALIGNMENT", "late", "is no multiple of 1024"),
        ("DIVERGENT", "late", "issue different products"),
    ],
)
def test_a_mistake_in_the_ring_shows(run: Run, define: str, asynchronous: str, report: str, order: str) -> None:
    done = run(
        "faults/missing_wait.cu",
        "plain",
        define,
        FASTUNLEARN_EMULATOR_ASYNC=asynchronous,
        FASTUNLEARN_EMULATOR_ORDER=order,
    )
    assert done.stdout != "right\n"
    assert report in done.stdout + done.stderr
