"""Where a run keeps what it has finished, so that a killed one goes on and no half of a result is ever seen."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastunlearn.files import sync_folder, write_json

KEPT = ".phases"


class Workspace:
    """The folder beside ``out`` in which a run collects its results; it becomes ``out`` in one rename at the end.

    Each finished phase is kept under a name, a value as JSON, weights as the caller writes them. What is kept is whole
    or absent, so a run that was killed anywhere repeats no more than the phase it was in.

    Args:
        out: the folder that the results will be in.
        request: what was asked for, JSON; an interrupted run goes on only with the same.
        resume: go on with an interrupted run; one that never began is begun.

    Raises FileExistsError where there are results already, or an interrupted run and no ``resume``; ValueError, naming
    the key, where the interrupted run was asked for something else; BlockingIOError where another process is at it.
    """

    def __init__(self, out: Path, request: dict[str, Any], resume: bool) -> None:
        out = out.resolve()
        self.out, self.path = out, out.parent / f".{out.name}.unfinished"
        if out.exists() and not out.is_dir():
            raise FileExistsError(f"--out {out} is a file, not a folder")
        if out.is_dir() and any(out.iterdir()):
            raise FileExistsError(f"--out {out} is not empty; give a folder that is, or does not exist")
        if self.path.exists() and not resume:
            raise FileExistsError(f"a run for {out} was interrupted: --resume goes on with it, or remove {self.path}")
        (self.path / KEPT).mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.path / KEPT / "lock", os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            before = self.phase("request", lambda: request)
        except BlockingIOError as error:
            self.close()
            raise BlockingIOError(f"another process is working on {out}") from error
        for torn in self.path.rglob(".*.part"):  # what a kill cut off
            torn.unlink()
        for key, value in request.items():
            if before.get(key) != value:
                self.close()
                raise ValueError(
                    f"the interrupted run for {out} had another {key}: {_short(before.get(key))}, now {_short(value)}; "
                    f"give the same, or remove {self.path}"
                )

    def phase(self, name: str, run: Callable[[], Any]) -> Any:
        """What ``run`` returned when it was last finished under this name, else what it returns now; JSON."""
        kept = self.path / KEPT / f"{name}.json"
        if not kept.exists():
            write_json(kept, run())
        return json.loads(kept.read_text())  # also the first time: a resumed run sees the same

    def weights(self, name: str) -> Path:
        """Where the weights that a phase leaves to others are kept."""
        return self.path / KEPT / f"{name}.safetensors"

    def finish(self) -> None:
        """Let the folder take its name; everything in it but what was kept for resuming is the result."""
        if self.out.is_dir():
            self.out.rmdir()  # empty
        os.rename(self.path, self.out)
        sync_folder(self.out.parent)
        forget_phases(self.out)
        self.close()

    def close(self) -> None:
        """Let others work on it; also when the process ends."""
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1


def forget_phases(out: Path) -> None:
    """Remove what finished results no longer need; also after a run that was killed just before."""
    if (out / KEPT).exists():
        shutil.rmtree(out / KEPT)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
