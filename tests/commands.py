"""A small request as a user would make it: a model in a file, data, weights; and the command line called in-process."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

NET = """
from torch import nn


def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 24), nn.ReLU(), nn.Linear(24, 4))
"""

QUICK = {
    "deepclean": ["fraction=0.3", "lr=0.01"],
    "class-forgetting": ["alpha_retain=30.0", "alpha_forget=10.0"],
    "lcodec": ["perturbations=20", "hessian_samples=20", "max_units=4", "group=true"],
    "ssd": ["alpha=2.0"],
    "finetune": ["lr=0.005", "momentum=0.5"],
    "gradient-ascent": ["lr=0.01"],
    "retrain": ["epochs=3", "lr=0.02"],
}


@dataclass(frozen=True)
class Request:
    """Paths of everything in ``folder``, and the flags that name them."""

    folder: Path

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def flags(self, *more: str, out: str | None = "out") -> list[str]:
        """Of ``unlearn``, with quick settings; ``more`` come last and win."""
        where = [] if out is None else ["--out", self.path(out), "--log", self.path("log.jsonl")]
        return [
            "--model", f"{self.path('net.py')}:net", "--weights", self.path("weights.safetensors"),
            "--data", self.path("train.npz"), "--test", self.path("test.npz"), "--forget", "class:1",
            "--method", "deepclean", "--set", "fraction=0.3", "--bootstrap", "20", "--relearn", "3", *where, *more,
        ]  # fmt: skip

    def of(self, method: str, *more: str, out: str | None = "out") -> list[str]:
        """As :meth:`flags`, for any method, with settings that make it quick."""
        base = self.flags(out=out)
        start = base.index("--method")
        settings = [part for pair in QUICK[method] for part in ("--set", pair)]
        return [*base[:start], *base[start + 4 :], "--method", method, *settings, *more]

    def hashes(self) -> dict[str, str]:
        """SHA-256 of every input file: what no run may change."""
        names = ("net.py", "weights.safetensors", "train.npz", "test.npz", "forget.json")
        return {name: hashlib.sha256((self.folder / name).read_bytes()).hexdigest() for name in names}


@cache
def _trained() -> tuple[dict[str, Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 6, 6, generator=generator)
    y = torch.arange(200) % 4
    x = centres[y] + torch.randn(200, 6, 6, generator=generator)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 24), nn.ReLU(), nn.Linear(24, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x[:120]), y[:120]).backward()
        optimizer.step()
    return {name: value.detach() for name, value in model.state_dict().items()}, [x[:120], y[:120], x[120:], y[120:]]


def make_request(folder: Path) -> Request:
    """Write the files of a request into ``folder``."""
    state, (x, y, tx, ty) = _trained()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "net.py").write_text(NET)
    save_file(state, folder / "weights.safetensors")
    np.savez(folder / "train.npz", x=x.numpy(), y=y.numpy())
    np.savez(folder / "test.npz", x=tx.numpy(), y=ty.numpy())
    (folder / "forget.json").write_text(json.dumps([3, 14, 15, 92]))
    return Request(folder)
