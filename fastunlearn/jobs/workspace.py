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
from fastunlearn.jobs.config import ConfigError

KEPT = ".phases"
CHEAP = {"request.json", "identifier.json"}  # a run that kept no more than these has nothing to go on with


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
        require_free(out, resume)
        self.out, self.path = out, _unfinished(out)
        self._made = [folder for folder in (out.parent, *out.parent.parents) if not folder.exists()]
        self._own = not self.path.exists()  # not one that an earlier run left
        try:
            (self.path / KEPT).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._remove_made()
            raise OSError(f"--out {out} can not be made: {error.strerror}: {error.filename}") from error
        self._lock = os.open(self.path / KEPT / "lock", os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            before = self.phase("request", lambda: request)
        except BlockingIOError as error:
            self._unlock()
            raise BlockingIOError(f"another process is working on {out}") from error
        except BaseException:  # a full disk, a request that is no JSON
            self.close()
            raise
        for key, value in request.items():
            if before.get(key) != value:
                self._unlock()
                raise ValueError(
                    f"the interrupted run for {out} had another {key}: {_short(before.get(key))}, now {_short(value)}; "
                    f"give the same, or remove {self.path}"
                )
        for torn in self.path.rglob(".*.part"):  # what a kill cut off
            torn.unlink()

    def phase(self, name: str, run: Callable[[], Any]) -> Any:
        """What ``run`` returned when it was last finished under this name, else what it returns now; JSON."""
        kept = self.path / KEPT / f"{name}.json"
        if not kept.exists():
            write_json(kept, run())
        try:
            return json.loads(kept.read_text())  # also the first time: a resumed run sees the same
        except ValueError as error:
            raise ValueError(f"{kept}: not what was kept there ({error}); remove {self.path}") from error

    def weights(self, name: str) -> Path:
        """Where the weights that a phase leaves to others are kept."""
        return self.path / KEPT / f"{name}.safetensors"

    def finish(self) -> None:
        """Let the folder take its name; everything in it but what was kept for resuming is the result."""
        if self.out.is_dir():
            self.out.rmdir()  # empty
        os.rename(self.path, self.out)
        self._own = False
        sync_folder(self.out.parent)
        forget_phases(self.out)
        self._unlock()

    def close(self) -> None:
        """Let others work on it; where nothing was finished that a later run could go on with, nothing is left of it.

        A process that is killed lets others work on it, too, and leaves what there is.
        """
        if self._lock >= 0 and self._own and not self._has_kept():
            shutil.rmtree(self.path)
            self._remove_made()
        self._unlock()

    def _has_kept(self) -> bool:
        return any(kept.name not in CHEAP for kept in (self.path / KEPT).glob("*.json"))

    def _remove_made(self) -> None:
        """The folders above ``out`` that this run made."""
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:  # it was not made, or others have put something there
                return

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1


def require_free(out: Path, resume: bool) -> None:
    """Raise, before a long run, what :class:`Workspace` would; changes nothing."""
    out = out.resolve()
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"--out {out} is a file, not a folder")
    if out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"--out {out} is not empty; give a folder that is, or does not exist")
    if _unfinished(out).exists() and not resume:
        raise FileExistsError(
            f"a run for {out} was interrupted, or is still at it: --resume goes on with it, or remove "
            f"{_unfinished(out)}"
        )
    require_makeable(out, "--out")


def require_beside(out: Path, place: Path, flag: str) -> None:
    """Raise ConfigError where ``place`` lies in ``out``, which a run makes as its last step."""
    if out.resolve() in (place.resolve(), *place.resolve().parents):
        raise ConfigError(f"{flag} {place} lies in --out {out}, which holds finished results alone; put it beside")


def require_makeable(path: Path, flag: str) -> None:
    """Raise OSError where nothing can be made at ``path``, as far as the folders above it tell."""
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise NotADirectoryError(f"{flag} {path} can not be made: {above} is not a folder")
    if not os.access(above, os.W_OK):
        raise PermissionError(f"{flag} {path} can not be made: the folder {above} can not be written to")


def _unfinished(out: Path) -> Path:
    return out.parent / f".{out.name}.unfinished"


def forget_phases(out: Path) -> None:
    """Remove what finished results no longer need; also after a run that was killed just before."""
    if (out / KEPT).exists():
        shutil.rmtree(out / KEPT)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
