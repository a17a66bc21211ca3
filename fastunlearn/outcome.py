"""What an unlearning run reports about itself."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass
class Outcome:
    """The account of one ``unlearn`` call.

    Attributes:
        method: name of the method.
        settings: every setting it ran with.
        changed: weights changed, per parameter name (parameters left alone are absent).
        seconds: wall-clock seconds per phase.
        peak_memory: bytes; of the CUDA allocator since the run began, or of the process on a CPU.
        details: what is particular to the method (gamma used, units chosen, damping raised, ...).
    """

    method: str
    settings: dict[str, Any]
    changed: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: int = 0
    details: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the block's wall-clock time to ``seconds[name]``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def count(self, name: str, before: Tensor, after: Tensor) -> None:
        """Add the number of entries in which ``after`` differs from ``before`` to ``changed[name]``."""
        different = int((before != after).sum())
        if different:
            self.changed[name] = self.changed.get(name, 0) + different

    @contextmanager
    def measured(self, device: torch.device) -> Iterator[None]:
        """Set ``peak_memory`` when the block ends."""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        yield
        if device.type == "cuda":
            self.peak_memory = torch.cuda.max_memory_allocated(device)
        else:
            # ru_maxrss counts KiB on Linux and bytes on macOS.
            unit = 1 if sys.platform == "darwin" else 1024
            self.peak_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def track(items: Iterable[T], description: str, progress: bool) -> Iterable[T]:
    """``items``, with a progress bar on the terminal only if ``progress``."""
    if not progress:
        return items
    from rich.progress import track as bar

    return bar(items, description=description)
