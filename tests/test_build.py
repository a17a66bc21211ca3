"""The CUDA sources for the architectures they claim: they compile, and nothing spills."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*.cu"))

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def compile_kernels(source: Path, architecture: str, out: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Compile the device code alone, with the flags of CMakeLists.txt that concern spills."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.submodule_search_locations
    torch_include = Path(spec.submodule_search_locations[0]) / "include"
    command = [
        "nvcc", "-std=c++20", "-O3", "-cubin", "-gencode", f"arch=compute_{architecture},code=sm_{architecture}",
        "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{ROOT / 'csrc'}", "-isystem", str(torch_include),
        "--expt-relaxed-constexpr", "--extended-lambda", "-Xptxas=-v,-warn-spills,-warn-lmem-usage,-Werror", *flags,
        str(ROOT / source), "-o", str(out / "kernels.cubin"),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True)


def test_every_cuda_source_is_in_the_build() -> None:
    listed = (ROOT / "CMakeLists.txt").read_text()
    assert SOURCES
    assert all(str(source) in listed for source in SOURCES)


# Instructions of Hopper's own exist for no other architecture.
CLAIMED = [(source, a) for source in SOURCES for a in ("80", "90a") if a == "90a" or "wgmma" not in source.stem]


@pytest.mark.parametrize(("source", "architecture"), CLAIMED, ids=[f"{source.stem}-{a}" for source, a in CLAIMED])
def test_compiles_without_spills(source: Path, architecture: str, tmp_path: Path) -> None:
    result = compile_kernels(source, architecture, tmp_path)
    assert result.returncode == 0, result.stderr
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", result.stderr)
    assert spills and set(spills) == {"0"}


HUNGRY = """
__global__ void __launch_bounds__(1024, 2) hungry_kernel(float* x) {  // 32 registers for 64 values
  float v[64];
  for (int i = 0; i < 64; ++i) v[i] = x[threadIdx.x + 1024 * i];
  __syncthreads();
  for (int i = 0; i < 64; ++i) x[threadIdx.x + 1024 * i] = v[i] * v[63 - i];
}
"""


def test_a_spill_would_fail_the_build(tmp_path: Path) -> None:
    source = tmp_path / "hungry.cu"
    source.write_text(HUNGRY)
    result = compile_kernels(source, "80", tmp_path)
    assert result.returncode != 0
    assert "spilled" in result.stderr


def test_torch_is_found_without_being_imported() -> None:
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); assert 'torch' not in sys.modules"
    script = ROOT / "cmake" / "find_torch.py"
    done = subprocess.run([sys.executable, "-c", code, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    root, version = done.stdout.strip().split(";")
    assert (Path(root) / "include" / "torch" / "csrc" / "stable" / "library.h").exists()
    assert version
