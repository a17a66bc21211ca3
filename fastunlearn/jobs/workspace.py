"""Where a run keeps what it has finished, so that a killed one goes on and no half of a result is ever seen."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from fastunlearn.files import sync_folder, write_json
from fastunlearn.jobs.config import ConfigError
from fastunlearn.parallel.checkpoints import save_sharded
from fastunlearn.parallel.launch import first_alone
from fastunlearn.parallel.ranks import ALONE, Ranks

KEPT = ".phases"
CHEAP = {"request.json", "identifier.json"}  # a run that kept no more than these has nothing to go on with


class Workspace:
    """The folder beside ``out`` in which a run collects its results; it becomes ``out`` in one rename at the end.

    Each finished phase is kept under a name, a value as JSON, weights as the caller writes them. What is kept is whole
    or absent, so a run that was killed anywhere repeats no more than the phase it was in.

    Several ranks make one together, on a file system that all of them see: each calls every method at the same time.
    Rank 0 makes the folders and keeps the phases; what it finds wrong is raised on all of them.

    Args:
        out: the folder that the results will be in.
        request: what was asked for, JSON; an interrupted run goes on only with the same.
        resume: go on with an interrupted run, of any number of processes; one that never began is begun.
        ranks: who works on it.

    Raises FileExistsError where there are results already, or an interrupted run and no ``resume``; ValueError, naming
    the key, where the interrupted run was asked for something else; BlockingIOError where another process is at it.
    """

    def __init__(self, out: Path, request: dict[str, Any], resume: bool, ranks: Ranks = ALONE) -> None:
        self.out = out.resolve()
        self.path = _unfinished(self.out)
        self._ranks = ranks
        self._made: list[Path] = []
        self._own = False
        self._lock = -1
        first_alone(ranks, lambda: self._begin(request, resume))

    def _begin(self, request: dict[str, Any], resume: bool) -> None:
        out = self.out
        require_free(out, resume)
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
            if not self._kept("request").exists():
                write_json(self._kept("request"), request)
            before = self._read("request")
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
        for torn in [*self.path.rglob(".*.part")]:  # what a kill cut off
            shutil.rmtree(torn) if torn.is_dir() else torn.unlink()

    def phase(self, name: str, run: Callable[[], Any]) -> Any:
        """What ``run`` returned when it was last finished under this name, else what it returns now; JSON.

        All ranks run it, and all are given what rank 0 returned.
        """
        kept = self._kept(name)
        if not first_alone(self._ranks, kept.exists):
            found = run()
            first_alone(self._ranks, lambda: write_json(kept, found))
        return first_alone(self._ranks, lambda: self._read(name))  # also the first time: a resumed run sees the same

    def weights(self, name: str) -> Path:
        """Where the weights that a phase leaves to others are kept: a file, or the folder that :meth:`save` made."""
        folder = self.path / KEPT / name
        return folder if folder.is_dir() else self.path / KEPT / f"{name}.safetensors"

    def place_for(self, name: str) -> Path:
        """The file to keep weights in anew, for rank 0; a folder that a phase cut off left there is removed."""
        folder = self.path / KEPT / name
        if folder.is_dir():
            shutil.rmtree(folder)
        return folder.with_name(f"{name}.safetensors")

    def save(self, name: str, model: nn.Module, like: Path | None) -> None:
        """Keep the weights of a model that the ranks hold together, with the names that they have in ``like``."""
        first_alone(self._ranks, lambda: self.place_for(name))
        save_sharded(self.path / KEPT / name, model, like=like)

    def finish(self) -> None:
        """Let the folder take its name; everything in it but what was kept for resuming is the result.

        Of several ranks, rank 0 alone calls it, when the others have written what is theirs.
        """
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

    def _kept(self, name: str) -> Path:
        return self.path / KEPT / f"{name}.json"

    def _read(self, name: str) -> Any:
        kept = self._kept(name)
        try:
            return json.loads(kept.read_text())
        except ValueError as error:
            raise ValueError(f"{kept}: not what was kept there ({error}); remove {self.path}") from error

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
