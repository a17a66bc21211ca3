"""The command line: ``fastunlearn demo`` and ``fastunlearn doctor``."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 refused with a reason, 2 a wrong argument."""
    parser = argparse.ArgumentParser(prog="fastunlearn", description="Make trained networks forget.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="three methods on scikit-learn's digits, beside retraining")
    demo.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    demo.add_argument("--seed", type=int, default=0, help="of data, training and methods (default: 0)")
    demo.add_argument("--out", type=Path, default=Path("out/demo"), help="folder to write to (default: out/demo)")
    demo.set_defaults(run=_demo)
    doctor = commands.add_parser("doctor", help="what is installed, built and used, and what is missing")
    doctor.set_defaults(run=_doctor)
    arguments = parser.parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"fastunlearn {arguments.command}: {error}", file=sys.stderr)
        return 1
    return code


def _demo(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from fastunlearn.demo import run
    from fastunlearn.jobs.task import device_named

    device = device_named(arguments.device)
    # A file or a pipe has no width: give the table the one it needs.
    console = Console(width=None if sys.stdout.isatty() else 132)
    run(arguments.out, arguments.seed, device, console)
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    """Print the state of things; exit code 1 if the library itself is not usable."""
    from fastunlearn import _library

    print(f"fastunlearn {_version('fastunlearn') or '(not installed, running from source)'}")
    print(f"  python   {platform.python_version()} on {platform.system()} {platform.machine()}")
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
    print(f"  torch    {torch.__version__} ({cuda})")
    print(f"  nvcc     {shutil.which('nvcc') or 'not found (needed only to build the CUDA kernels)'}")
    try:
        info = _library.load().build_info()
    except ImportError as error:
        print(f"  library  {error}")
        return 1
    kernels = f"CUDA {info['cuda']} for {info['cuda_architectures']}" if info["cuda"] else "CPU only"
    print(f"  library  {kernels}; {info['compiler']}, against torch {info['torch_built_with']}, "
          f"runs on {info['torch_target']} and later")  # fmt: skip
    for package, module, why in (
        ("matplotlib", "matplotlib", "pictures"),
        ("scikit-learn", "sklearn", "the demo's data and the attack's AUC"),
    ):
        if importlib.util.find_spec(module) is None:
            print(f"  missing  {package}, used for {why}: pip install {package}")
    problem = _library.cuda_problem()
    print(f"  GPU      {problem or torch.cuda.get_device_name()}")
    print("operators")
    width = max(map(len, _operators())) - len("fastunlearn::")
    for name in _operators():
        backends = [key for key in ("CPU", "CUDA") if torch._C._dispatch_has_kernel_for_dispatch_key(name, key)]
        used = "CUDA and CPU tensors" if not problem and "CUDA" in backends else "CPU tensors"
        print(f"  {name.split('::')[1]:{width}} built for {' and '.join(backends):12} usable here on {used}")
    return 0


def _operators() -> list[str]:
    return sorted(n for n in torch._C._dispatch_get_all_op_names() if n.startswith("fastunlearn::"))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
