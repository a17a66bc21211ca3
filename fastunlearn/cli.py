"""The command line. Every command does all of what it says, or nothing and one line about why.

Exit codes: 0 done; 1 refused or failed, for the reason on stderr; 2 a wrong flag or configuration; 3 ``verify`` found
something that does not hold; 130 interrupted; 141 nobody reads what is said (``| head``).
"""

from __future__ import annotations

import argparse
import difflib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from fastunlearn.jobs.config import ConfigError, add_flags, resolve
from fastunlearn.parallel import launch

OPENING = ("model", "model_arguments", "weights", "data", "data_options", "forget", "retain", "test", "validation",
           "batch_size", "device", "parallel", "dtype", "seed")  # fmt: skip
MEASURING = ("reference", "measured", "probes", "questions", "relearn", "bootstrap")
ONE_METHOD = ("method", "settings", "method_samples", "training")
WRITING = ("pictures", "out")
COMMANDS = {
    "unlearn": (*OPENING, *ONE_METHOD, *MEASURING, "shadows", "stack", "cache", "log", *WRITING),
    "plan": (*OPENING, *ONE_METHOD, *MEASURING, "shadows"),
    "compare": (*OPENING, "methods", "method_samples", "training", "stack", *MEASURING, "seeds", *WRITING),
    "evaluate": (*OPENING, *MEASURING, "out"),
}
TOGETHER = ("unlearn",)  # commands that several processes may run
DESCRIPTIONS = {
    "unlearn": "make a checkpoint forget, measure it, and write a record",
    "plan": "what unlearn would read, how long and how much memory it would take, and what it does to each layer",
    "compare": "several methods and retraining, over seeds, in one report",
    "evaluate": "what a checkpoint still knows of some samples, beside one that never saw them",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. One of several processes that has failed ends right here, with it."""
    with launch.watched("fastunlearn") as watch:
        if watch is None:
            code, _, line = _attempt(argv)
            launch.say(line)
            return code
        signal.signal(signal.SIGINT, _interrupted)
        try:
            code, error, line = _attempt(argv)
        except SystemExit as stopped:  # of argparse, which has said why
            code, error, line = int(stopped.code or 0), None, ""
        launch.say(watch.settle(code, error, line))
        if code:
            os._exit(code)  # what others have left, a collective may keep a process for
        return code


def _attempt(argv: Sequence[str] | None) -> tuple[int, BaseException | None, str]:
    """Run one command: the exit code, what was raised, and what there is to say about it."""
    arguments, unknown = _parser().parse_known_args(argv)
    if unknown:
        flag = unknown[0].partition("=")[0]
        close = difflib.get_close_matches(flag, arguments.parser._option_string_actions, 1)
        arguments.parser.error(f"{flag} is not known here" + (f"; did you mean {close[0]}?" if close else ""))
    command = " ".join(part for part in (arguments.command, getattr(arguments, "action", None)) if part)
    try:
        if launch.launched() and command not in TOGETHER:
            raise ConfigError(f"works in one process; start it without torchrun, which is for {', '.join(TOGETHER)}")
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: _say(f"warning: {_line(message)}")
            code: int = arguments.run(arguments)
        if sys.stdout is not None:  # closed from the start
            sys.stdout.flush()
    except BrokenPipeError as error:  # all is written but what is said about it, and who reads that has gone, as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 141, error, ""
    except KeyboardInterrupt as error:
        more = "; --resume goes on with it" if hasattr(arguments, "resume") else ""
        return 130, error, f"fastunlearn {command}: interrupted; nothing half done is left{more}"
    except (ArithmeticError, ImportError, MemoryError, OSError, RuntimeError, TypeError, ValueError) as error:
        if arguments.debug:
            traceback.print_exception(error)
        return 2 if isinstance(error, ConfigError) else 1, error, f"fastunlearn {command}: {_line(error)}"
    return code, None, ""


def _interrupted(*_: object) -> NoReturn:
    """Ctrl-C reaches a process from the terminal and from torchrun; once is enough."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


class _Parser(argparse.ArgumentParser):
    """Its errors take one line, as all others do, and are said by one process."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}; see {self.prog} --help\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        if launch.speaks():
            super()._print_message(message, file)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fastunlearn", description="Make trained networks forget.", allow_abbrev=False,
        epilog="exit codes: 0 done, 1 refused or failed, 2 wrong flag or configuration, 3 verify found something "
        "wrong, 130 interrupted",
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Any, help: str, to: Any = commands) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = to.add_parser(name, help=help, description=help, allow_abbrev=False)
        added.add_argument("--debug", action="store_true", help="show the traceback of an error")
        added.set_defaults(run=run, parser=added)
        return added

    for name, run in (("unlearn", _unlearn), ("plan", _plan), ("compare", _compare), ("evaluate", _evaluate)):
        added = command(name, run, DESCRIPTIONS[name])
        add_flags(added, COMMANDS[name])
        if name in ("unlearn", "compare"):
            added.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    verify = command("verify", _verify, "whether a deletion record is whole, in its log, and about these weights")
    verify.add_argument("record", type=Path, help="record.json")
    for flag, help in (
        ("weights", "the checkpoint that is said to have forgotten"),
        ("log", "the log that the record must be in; its whole chain is checked"),
        ("patch", "the patch that is said to make the change"),
        ("salt", "what the hashes of the ids were salted with, for --id"),
    ):
        verify.add_argument(f"--{flag}", type=Path, metavar="FILE", help=help)
    verify.add_argument("--id", action="append", default=[], help="a sample that must be among the forgotten")
    patch = commands.add_parser("patch", help="bring an unlearning to a deployed copy of the model")
    actions = patch.add_subparsers(dest="action", required=True)
    apply = command("apply", _patch_apply, "write the patched weights; a model of another hash is refused", actions)
    apply.add_argument("patch", type=Path, help="patch.safetensors")
    apply.add_argument("--weights", type=Path, required=True, metavar="FILE", help="the checkpoint before")
    apply.add_argument("--out", type=Path, required=True, metavar="FILE", help="may be the same file")
    demo = command("demo", _demo, "three methods on scikit-learn's digits, beside retraining")
    demo.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    demo.add_argument("--seed", type=int, default=0, help="of data, training and methods (default: 0)")
    demo.add_argument("--out", type=Path, default=Path("out/demo"), help="folder to write to (default: out/demo)")
    command("doctor", _doctor, "what is installed, built and used, and what is missing")
    return parser


def _line(message: BaseException | str) -> str:
    """An error's or a warning's own words, in one line."""
    return " ".join(str(message).split()) or type(message).__name__


def _say(text: str) -> None:
    if launch.speaks():
        launch.say(text)


def _console() -> Any:
    from rich.console import Console

    class Terminal(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # for main(), instead of an exit as of a failure

    # A file or a pipe has no width: give the table the one it needs.
    return Terminal(width=None if sys.stdout is not None and sys.stdout.isatty() else 240)


def _show(findings: dict[str, Any]) -> None:
    from fastunlearn.report.table import models_table

    _console().print(models_table(findings))
    print(findings["verdict"])


def _unlearn(arguments: argparse.Namespace) -> int:
    from fastunlearn.jobs.deletion import unlearn
    from fastunlearn.jobs.task import device_named

    config = resolve(arguments)
    with launch.joined(device_named(config.device)) as ranks:
        out, findings = unlearn(config, arguments.resume, _say, ranks)
    if not launch.speaks():
        return 0
    _show(findings)
    print(f"written to {out}: the checkpoint, patch.safetensors, record.json, report.html; keep {out / 'salt'} apart")
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from fastunlearn.jobs.planning import plan
    from fastunlearn.jobs.task import open_task

    print(plan(open_task(resolve(arguments))))
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from fastunlearn.jobs.comparison import compare

    out, findings = compare(resolve(arguments), arguments.resume, _say)
    _show(findings)
    print(f"report: {out / 'report.html'}")
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from fastunlearn.jobs.evaluation import evaluate_weights

    _show(evaluate_weights(resolve(arguments), _say))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from fastunlearn.report.log import verify
    from fastunlearn.report.record import read_salt

    salt = None if arguments.salt is None else read_salt(arguments.salt)
    checks = verify(arguments.record, arguments.weights, arguments.log, arguments.patch, salt, arguments.id or None)
    for check in checks:
        print(f"{'holds ' if check.passed else 'BROKEN'}  {check.name}: {check.detail}")
    return 0 if all(check.passed for check in checks) else 3


def _patch_apply(arguments: argparse.Namespace) -> int:
    from fastunlearn.patch import apply_patch

    patch = apply_patch(arguments.weights, arguments.patch, arguments.out)
    print(f"{arguments.out}: {sum(patch.changed.values()):,} weights changed, digest {patch.after}")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from fastunlearn.demo import run
    from fastunlearn.jobs.task import device_named

    device = device_named(arguments.device)
    run(arguments.out, arguments.seed, device, _console())
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
        ("pandas", "pandas", "CSV, Parquet and JSON lines"),
        ("pillow", "PIL", "images"),
        ("datasets", "datasets", "Hugging Face datasets"),
        ("transformers", "transformers", "Hugging Face models"),
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
