"""Loads the compiled operators, and says in a person's words why when it can not."""

from __future__ import annotations

import importlib
import platform
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import torch


def load() -> ModuleType:
    """Import ``fastunlearn._C``, which registers ``torch.ops.fastunlearn.*``; raises ImportError saying what to do."""
    try:
        return importlib.import_module("fastunlearn._C")
    except ImportError as error:
        raise ImportError(_explain(Path(__file__).parent, str(error))) from error


def cuda_problem() -> str:
    """Why CUDA tensors can not be used here, and what would change that; empty when they can."""
    if not torch.version.cuda:
        return "none for torch: this is its CPU build; install the CUDA build of torch"
    if not torch.cuda.is_available():
        return "none found: torch is a CUDA build but sees no GPU or no driver"
    if not load().build_info()["cuda"]:
        return "found, but fastunlearn was built without nvcc: install the CUDA toolkit and build it again"
    return ""


def _explain(package: Path, reason: str) -> str:
    here = f"Python {platform.python_version()} on {sys.platform} {platform.machine()} with torch {torch.__version__}"
    built = sorted(path.name for path in package.glob("_C.*") if path.suffix in (".so", ".pyd", ".dylib"))
    if not built:
        return f"fastunlearn is not built: there is no _C library in {package}. Run `pip install .` in its source."
    if not any(name == "_C" + suffix for name in built for suffix in EXTENSION_SUFFIXES):
        return f"fastunlearn is built for {', '.join(built)}, this is {here}. Build it again with this Python."
    return f"fastunlearn is built for torch 2.11 or later, this is {here}: {reason}"
