"""Back ends: the same tests run against the CPU kernels, the emulated CUDA kernels and, on a GPU, the CUDA kernels."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from fastunlearn import ops

ROOT = Path(__file__).parent.parent
HAS_CUDA = torch.cuda.is_available() and bool(ops._C.build_info()["cuda"])
PRESENT = ("cpu", "emulated", "cuda") if HAS_CUDA else ("cpu", "emulated")
# FASTUNLEARN_TEST_BACKENDS=emulated runs that back end alone; FASTUNLEARN_SANITIZE instruments it.
BACKENDS = os.environ.get("FASTUNLEARN_TEST_BACKENDS", ",".join(PRESENT)).split(",")
SANITIZE = os.environ.get("FASTUNLEARN_SANITIZE", "")


@cache
def load_emulated() -> None:
    """Build the emulated operators if their sources changed, and register them."""
    build = ROOT / "build" / ("emulated" + (f"-{SANITIZE}" if SANITIZE else ""))
    # The compiler must not run under the sanitizer that is preloaded into this process.
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    configure = [
        "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DFASTUNLEARN_EMULATED=ON",
        f"-DFASTUNLEARN_SANITIZE={SANITIZE}", f"-DPython_EXECUTABLE={sys.executable}",
    ]  # fmt: skip
    build.mkdir(parents=True, exist_ok=True)
    with open(build / "lock", "w") as lock:  # of several test processes one builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, ["cmake", "--build", str(build)]):
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    torch.ops.load_library(str(build / "libfastunlearn_emulated.so"))


@dataclass(frozen=True)
class Backend:
    """Calls an operator of one back end, with the signature of :mod:`fastunlearn.ops`."""

    name: str

    @property
    def device(self) -> str:
        return "cuda" if self.name == "cuda" else "cpu"

    def __call__(self, op: str, *args: Any, **options: Any) -> Any:
        function: Callable[..., Any] = getattr(ops, op)
        if self.name != "emulated":
            return function(*args, **options)
        with patch.object(ops, "_ops", torch.ops.fastunlearn_emulated):
            return function(*args, **options)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param == "emulated":
        load_emulated()
    return Backend(request.param)
