"""The emulated CUDA runtime means what CUDA means, and it bites.

Every other test that runs our kernels without a GPU leans on ``tests/emulator``; this file is what
that trust rests on. The programs under ``emulator/faults`` carry one classic mistake each: a test
that such a program is caught says more than a hundred that correct kernels pass.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

EMULATOR = Path(__file__).parent / "emulator"
SOURCES = EMULATOR.parent.parent / "csrc"
FLAGS = [
    *("-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"),
    *("-DFASTUNLEARN_EMULATED", f"-I{EMULATOR / 'include'}", f"-I{SOURCES}"),
    *("-Wno-psabi", "-Wno-unknown-pragmas"),
]
SANITIZE = {
    "plain": [],
    "thread": ["-fsanitize=thread"],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
}
# The runtime is told which sanitizer it lives with, but never instrumented itself.
RUNTIME = {"plain": [], "thread": ["-DEMULATOR_TSAN"], "address": ["-DEMULATOR_ASAN"]}

Run = Callable[..., subprocess.CompletedProcess[str]]


def execute(command: list[str | Path], **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | env,
    )


def compile_with(compiler: str, *arguments: str | Path) -> None:
    done = execute([compiler, *arguments])
    assert done.returncode == 0, f"{compiler} failed:\n{done.stderr}"


@pytest.fixture(scope="session")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[str]]]:
    """mode -> (the compiled runtime, the words that must precede a program of this mode)."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("runtime")
    empty = folder / "empty.cpp"
    empty.write_text("int main() {}\n")
    ready: dict[str, tuple[Path, list[str]]] = {}

    def launcher(mode: str) -> list[str]:
        program = folder / f"empty_{mode}"
        linked = execute(["g++", *SANITIZE[mode], empty, "-o", program])
        if linked.returncode != 0 and "cannot find" in linked.stderr:
            pytest.skip(f"g++ has no {mode} sanitizer: {linked.stderr.strip()}")
        # ThreadSanitizer's shadow needs fixed places; kernels that randomise addresses by 32 bits
        # (vm.mmap_rnd_bits) put the program in its way, and setarch -R turns that off.
        said = ""
        for prefix in ([], ["setarch", "-R"]):
            if not prefix or shutil.which(prefix[0]):
                tried = execute([*prefix, program])
                if tried.returncode == 0:
                    return prefix
                said = tried.stderr
        assert "unexpected memory mapping" in said or "personality" in said, said
        pytest.skip(f"this kernel does not let the {mode} sanitizer run: {said.strip()}")

    def prepare(mode: str) -> tuple[Path, list[str]]:
        if mode not in ready:
            prefix = launcher(mode)
            built = folder / f"runtime_{mode}.o"
            sources = EMULATOR / "runtime.cpp", EMULATOR / "hopper.cpp"
            compile_with("g++", *FLAGS, *RUNTIME[mode], "-r", "-nostdlib", *sources, "-o", built)
            ready[mode] = built, prefix
        return ready[mode]

    return prepare


@pytest.fixture(scope="session")
def run(runtime: Callable[[str], tuple[Path, list[str]]], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """run(source, mode, *defines, arguments=(), **environment): build once, then execute."""
    folder = tmp_path_factory.mktemp("programs")

    def build_and_run(
        source: str,
        mode: str = "plain",
        *defines: str,
        arguments: tuple[str | Path, ...] = (),
        **env: str,
    ) -> subprocess.CompletedProcess[str]:
        built, prefix = runtime(mode)
        program = folder / "_".join([Path(source).stem, mode, *defines])
        if not program.exists():
            compile_with(
                "g++",
                *FLAGS,
                *SANITIZE[mode],
                *(f"-D{name}" for name in defines),
                *("-x", "c++", EMULATOR / source, "-x", "none", built, "-o", program),
            )
        return execute([*prefix, program, *arguments], **env)

    return build_and_run


def assert_clean(done: subprocess.CompletedProcess[str]) -> None:
    assert (done.returncode, done.stderr) == (0, "")


# ------------------------------------------------------------------------------------- semantics


@pytest.fixture(scope="session")
def printed(run: Run) -> dict[str, list[str]]:
    done = run("semantics.cu")
    assert_clean(done)
    return {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}


@pytest.mark.parametrize("type_name", ["int", "unsigned", "float", "double", "long_long", "unsigned_long_long"])
def test_shuffles_take_their_values_from_the_lanes_cuda_names(printed: dict[str, list[str]], type_name: str) -> None:
    def source(kind: int, lane: int) -> int:
        start = {0: lane // 8 * 8, 2: lane // 16 * 16, 4: lane // 4 * 4}.get(kind, 0)
        if kind == 0:
            return start + (lane + 3) % 8
        if kind == 1:
            return 5
        if kind == 2:
            return lane - 3 if lane - 3 >= start else lane
        if kind == 3:
            return lane + 5 if lane + 5 < 32 else lane
        if kind == 4:
            return lane + 2 if lane + 2 < start + 4 else lane
        return lane ^ 9 if lane ^ 9 < lane // 8 * 8 + 8 else lane  # earlier segments may be read

    expected = [100 * (tid // 32 * 32 + source(kind, tid % 32)) + 7 for kind in range(6) for tid in range(64)]
    assert list(map(int, printed[f"shuffle_{type_name}"])) == expected


def test_votes_count_the_named_lanes_only(printed: dict[str, list[str]]) -> None:
    def ballot(tid: int) -> int:
        warp, low = tid // 32 * 32, tid % 32 < 20
        lanes = range(20) if low else range(20, 32)
        return sum(1 << lane for lane in lanes if ((warp + lane) % 3 == 0 if low else (warp + lane) % 2 == 1))

    values = list(map(int, printed["vote"]))
    assert values[:64] == [ballot(tid) for tid in range(64)]
    assert values[64:128] == [1] * 32 + [2] * 32  # warp 0: all but not any; warp 1: any, not all
    assert values[128:192] == [13] * 64  # 0, 5, ..., 60
    assert values[192:] == [2] * 64  # some are thread 63, not all are others


def test_barriers_wait_for_living_threads_of_three_dimensional_blocks(
    printed: dict[str, list[str]],
) -> None:
    expected = [1000 * block + (39 - tid + 1) % 40 + 1 for block in range(12) for tid in range(40)]
    assert list(map(int, printed["barrier"])) == expected


def test_dynamic_shared_memory_is_poisoned_then_shared(printed: dict[str, list[str]]) -> None:
    values = list(map(int, printed["dynamic_shared"]))
    assert values == [0xFFFFFFFF] * 64 + [(63 - tid) ** 2 for tid in range(64)]


def test_atomics_lose_no_update(printed: dict[str, list[str]]) -> None:
    total = 2 * sum(range(64))
    expected = [-total, total, 0xFF, 0xFFFFFFF0, 63, 1000 - 63, 9, 77, 128 << 33, 64, 32]
    assert list(map(float, printed["atomic"])) == expected


def test_intrinsics_compute_what_their_names_say(printed: dict[str, list[str]]) -> None:
    x, n = np.float32(1.1), 0x00345678

    def bits(value: float | np.floating[Any]) -> int:
        return int(np.float32(value).view(np.uint32))

    square_error = np.float64(x) ** 2 - np.float64(x * x)  # exact: 48 bits fit in float64
    assert list(map(int, printed["intrinsic"])) == [
        n.bit_count(),
        61,
        (n & -n).bit_length(),
        32 - n.bit_length(),
        int(f"{n:032b}"[::-1], 2),
        bits(x),
        n * 0xDEADBEEF >> 32,
        bits(square_error),
        bits(x + np.uint32(n).view(np.float32)),
        n.bit_count(),
        -4 + 5 + int(min(1.5, float(x)) + 2.5),
        bits(np.float64(x) * 3 + 1),
        bits(torch.tensor(x).bfloat16().item()),
        bits(torch.tensor(x).half().item()),
    ]


def test_impossible_launches_do_not_run_and_set_the_last_error(
    printed: dict[str, list[str]],
) -> None:
    refused = {name: values for name, values in printed.items() if name.startswith("refuse_")}
    assert len(refused) == 6
    # cudaErrorInvalidConfiguration when peeked at and when got; getting it clears it.
    assert all(values == ["9", "9", "0"] for values in refused.values()), refused


@pytest.mark.parametrize("mode", ["thread", "address"])
def test_correct_programs_are_clean_under_the_sanitizers(run: Run, mode: str) -> None:
    done = run("semantics.cu", mode)
    assert_clean(done)
    assert done.stdout == run("semantics.cu").stdout


def test_every_16_bit_float_widens_as_in_torch(run: Run, tmp_path: Path) -> None:
    assert_clean(run("conversions.cu", arguments=("UP", tmp_path / "wide")))
    wide = np.fromfile(tmp_path / "wide", np.float32).reshape(2, 65536)
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.uint16)
    for ours, dtype in zip(wide, (torch.bfloat16, torch.float16), strict=True):
        theirs = patterns.view(dtype).float().numpy()
        number = ~np.isnan(theirs)
        assert np.isnan(ours[~number]).all()
        # Bits, so that -0 is not 0.
        assert np.array_equal(ours[number].view(np.uint32), theirs[number].view(np.uint32))


def test_rounding_to_16_bits_is_to_nearest_even_as_in_torch(run: Run, tmp_path: Path) -> None:
    """Every 16-bit value, every midpoint between two and the fp32 numbers next to both."""
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.uint16)
    exact = torch.cat([patterns.view(dtype).float() for dtype in (torch.bfloat16, torch.float16)])
    exact = torch.unique(exact[exact.isfinite()].double())
    midpoints = (exact[1:] + exact[:-1]) / 2
    centres = torch.cat([exact, midpoints]).float().numpy()
    noise = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    special = np.array([65519.996, 65520, 65536, 3.4e38, np.inf, np.nan, 2**-25], np.float32)
    values = np.concatenate(
        [
            centres,
            np.nextafter(centres, np.float32(np.inf)),
            np.nextafter(centres, np.float32(-np.inf)),
            noise,
            special,
            -special,
        ]
    )
    values.tofile(tmp_path / "values")
    assert_clean(run("conversions.cu", arguments=("DOWN", tmp_path / "values", tmp_path / "out")))
    narrow = np.fromfile(tmp_path / "out", np.uint16).reshape(2, len(values))
    number = ~np.isnan(values)
    for ours, dtype in zip(narrow, (torch.bfloat16, torch.float16), strict=True):
        theirs = torch.from_numpy(values).to(dtype).view(torch.uint16).numpy()
        assert np.array_equal(ours[number], theirs[number])
        assert (ours[~number] == 0x7FFF).all()  # CUDA's NaN


@pytest.mark.parametrize("kind", ["BF16", "HALF", "TF32"])
def test_mma_is_the_product_of_matrices_laid_out_as_the_ptx_manual_says(run: Run, tmp_path: Path, kind: str) -> None:
    """The manual's formulas for the row and column of each lane's element i, for m16n8k16 and m16n8k8."""
    random = np.random.default_rng(0)
    wide = kind == "TF32"
    depth = 8 if wide else 16
    # Small integers: exact whatever the order of the sum, and d starts from something.
    a, b = random.integers(-8, 8, (16, depth)), random.integers(-8, 8, (depth, 8))
    d = random.integers(-8, 8, (16, 8))
    group, member = np.divmod(np.arange(32), 4)

    def of_a(i: int) -> tuple[Any, Any]:
        if wide:
            return group + 8 * (i in (1, 3)), member + 4 * (i >= 2)
        return group + 8 * (not (0 <= i < 2 or 4 <= i < 6)), 2 * member + i % 2 + 8 * (i >= 4)

    def of_b(i: int) -> tuple[Any, Any]:
        return (member + 4 * i, group) if wide else (2 * member + i % 2 + 8 * (i >= 2), group)

    def of_d(i: int) -> tuple[Any, Any]:
        return group + 8 * (i >= 2), 2 * member + i % 2

    def registers(matrix: np.ndarray[Any, Any], at: Callable[[int], tuple[Any, Any]], count: int) -> bytes:
        values = torch.tensor(np.stack([matrix[at(i)] for i in range(count)], axis=1))  # [32, count]
        dtype = {"BF16": torch.bfloat16, "HALF": torch.float16, "TF32": torch.float32}[kind]
        stored = values.to(torch.float32 if matrix is d else dtype).contiguous()
        return stored.view(torch.int16 if stored.element_size() == 2 else torch.int32).numpy().tobytes()

    elements = 1 if wide else 2  # of a register
    packed = registers(a, of_a, 4 * elements) + registers(b, of_b, 2 * elements) + registers(d, of_d, 4)
    (tmp_path / "in").write_bytes(packed)
    assert_clean(run("tensor_cores.cu", arguments=(kind, tmp_path / "in", tmp_path / "out")))
    ours = np.fromfile(tmp_path / "out", np.float32).reshape(32, 4)
    expected = d + a @ b
    for i in range(4):
        assert np.array_equal(ours[:, i], expected[of_d(i)])


def test_tf32_is_rounded_to_nearest_before_the_product(run: Run, tmp_path: Path) -> None:
    values = np.array([1 + 2**-11, 1 + 2**-11 - 2**-23, -1 - 2**-11, 1 + 3 * 2**-11, 3e38, np.inf], np.float32)
    a, b = np.zeros((32, 4), np.float32), np.zeros((32, 2), np.float32)
    a[:24:4, 0] = values  # row = group, column 0
    b[::4, 0] = 1  # row 0
    (tmp_path / "in").write_bytes(a.tobytes() + b.tobytes() + bytes(512))
    assert_clean(run("tensor_cores.cu", arguments=("TF32", tmp_path / "in", tmp_path / "out")))
    ours = np.fromfile(tmp_path / "out", np.float32).reshape(32, 4)[:24:4, 0]
    assert list(ours[:4]) == [1 + 2**-10, 1, -1 - 2**-10, 1 + 2**-9]
    assert abs(ours[4] / values[4] - 1) <= 2**-11
    assert ours[5] == np.inf


@pytest.fixture(scope="session")
def printed_tensor_cores(run: Run) -> dict[str, list[int]]:
    done = run("tensor_cores.cu")
    assert_clean(done)
    lines = [line.split() for line in done.stdout.splitlines()]
    return {name: list(map(int, values)) for name, *values in lines}


def test_ldmatrix_deals_out_rows_or_columns(printed_tensor_cores: dict[str, list[int]]) -> None:
    values = np.array(printed_tensor_cores["ldmatrix"], np.uint32).reshape(2, 32, 4)
    pairs = np.stack([values & 0xFFFF, values >> 16], axis=-1)  # [plain or transposed, lane, matrix, half]
    for lane in range(32):
        group, member = divmod(lane, 4)
        for matrix in range(4):
            for half in range(2):
                row, column = 8 * matrix + group, 2 * member + half
                assert pairs[0, lane, matrix, half] == 16 * row + column
                row, column = 8 * matrix + 2 * member + half, group
                assert pairs[1, lane, matrix, half] == 16 * row + column


def test_copies_arrive_when_they_are_waited_for(printed_tensor_cores: dict[str, list[int]]) -> None:
    looks = np.array(printed_tensor_cores["copy"], np.uint32).reshape(3, 32, 3, 4)  # [look, lane, group, word]
    neighbours = (np.arange(32) + 1) % 32
    full = (0x01010101 * (4 * neighbours[:, None] + np.arange(4) + 1)).astype(np.uint32)
    part = full.copy()
    part[:, 2] &= 0xFF  # 9 bytes
    part[:, 3] = 0
    assert (looks[0] == 0xFFFFFFFF).all()  # nothing is there, nor what was there before
    assert np.array_equal(looks[1][:, 0], full)
    assert (looks[1][:, 1:] == 0xFFFFFFFF).all()
    assert np.array_equal(looks[2], np.stack([full, part, np.zeros_like(full)], axis=1))


def test_copies_need_a_barrier_beside_the_wait(run: Run) -> None:
    assert_clean(run("tensor_cores.cu", "thread"))
    assert_clean(run("tensor_cores.cu", "address"))
    done = run("tensor_cores.cu", "thread", "MISSING_BARRIER")
    assert done.returncode != 0
    assert "ThreadSanitizer: data race" in done.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("source", ["semantics.cu", "conversions.cu", "tensor_cores.cu"])
def test_the_same_source_compiles_with_nvcc(source: str, tmp_path: Path) -> None:
    words = ("-std=c++20", "-arch=sm_80", f"-I{SOURCES}", "-c", EMULATOR / source, "-o", tmp_path / "object.o")
    compile_with("nvcc", *words)


# --------------------------------------------------------------------------------------- it bites


@pytest.mark.parametrize("source", ["missing_barrier", "missing_syncwarp"])
def test_complete_barriers_are_no_race(run: Run, source: str) -> None:
    assert_clean(run(f"faults/{source}.cu", "thread", "FIXED"))


@pytest.mark.parametrize(
    ("source", "defines"),
    [
        ("missing_barrier", ["REDUCTION"]),
        ("missing_barrier", ["BROADCAST"]),
        ("missing_syncwarp", []),
        ("missing_syncwarp", ["HALVES"]),
    ],
)
def test_a_missing_barrier_is_a_data_race(run: Run, source: str, defines: list[str]) -> None:
    for order in ("forward", "reverse"):
        done = run(f"faults/{source}.cu", "thread", *defines, FASTUNLEARN_EMULATOR_ORDER=order)
        assert done.returncode != 0
        assert "ThreadSanitizer: data race" in done.stderr
        assert f"{source}.cu:" in done.stderr  # the report leads to the line
        assert "CUDA thread" in done.stderr  # and to the threads


def test_accesses_inside_every_buffer_are_no_error(run: Run) -> None:
    assert_clean(run("faults/out_of_bounds.cu", "address", "FIXED"))


@pytest.mark.parametrize(
    ("define", "report"),
    [
        ("SHARED", "global-buffer-overflow"),  # a static array is a global to AddressSanitizer
        ("DYNAMIC", "heap-buffer-overflow"),
        ("GLOBAL", "heap-buffer-overflow"),
        ("STACK", "stack-overflow"),
    ],
)
def test_an_access_past_the_end_is_reported(run: Run, define: str, report: str) -> None:
    done = run("faults/out_of_bounds.cu", "address", define)
    assert done.returncode != 0
    assert f"AddressSanitizer: {report}" in done.stderr
    assert "out_of_bounds.cu:" in done.stderr


def test_a_stack_overflow_stops_the_program_without_a_sanitizer_too(run: Run) -> None:
    assert run("faults/out_of_bounds.cu", "plain", "STACK").returncode < 0


@pytest.mark.parametrize("mode", ["plain", "thread", "address"])
def test_a_barrier_that_all_threads_reach_is_no_deadlock(run: Run, mode: str) -> None:
    assert_clean(run("faults/divergent_barrier.cu", mode, "FIXED"))


@pytest.mark.parametrize(
    ("define", "places"),
    [
        ("BARRIER_AND_SHUFFLE", ["1 at __syncthreads", "31 in warp 0 at __shfl_xor_sync"]),
        ("TWO_BARRIERS", ["32 at __syncthreads", "32 at __syncthreads"]),
        ("TWO_COLLECTIVES", ["16 in warp 0 at __any_sync", "16 in warp 0 at __shfl_xor_sync"]),
        ("EXITED_LANE", ["31 in warp 0 at __shfl_xor_sync", "0x00000008 exited"]),
    ],
)
def test_waiting_for_threads_that_never_come_aborts_with_a_listing(run: Run, define: str, places: list[str]) -> None:
    done = run("faults/divergent_barrier.cu", "plain", define)
    assert done.returncode < 0
    assert "emulator: deadlock in block (0,0,0):" in done.stderr
    for place in places:
        assert done.stderr.count(place) >= places.count(place), done.stderr


def test_a_lane_outside_its_own_mask_aborts(run: Run) -> None:
    done = run("faults/divergent_barrier.cu", "plain", "NOT_IN_MASK")
    assert done.returncode < 0
    assert "lane 16 is not in its own mask 0x0000ffff" in done.stderr


def test_the_order_of_blocks_and_threads_is_ours_to_choose(run: Run) -> None:
    forward = run("faults/order.cu", FASTUNLEARN_EMULATOR_ORDER="forward")
    reverse = run("faults/order.cu", FASTUNLEARN_EMULATOR_ORDER="reverse")
    assert forward.stdout.split() == ["4", "63", "10080"]
    assert reverse.stdout.split() == ["0", "0", "10080"]


@pytest.mark.parametrize("mode", ["plain", "thread", "address"])
def test_operating_system_threads_may_launch_at_the_same_time(run: Run, mode: str) -> None:
    done = run("concurrent.cu", mode)
    assert_clean(done)
    assert done.stdout == "all sums right\n"
