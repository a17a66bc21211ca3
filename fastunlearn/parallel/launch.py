"""Processes that torchrun started: how they join, which of them speaks, and how all of them end when one does.

Under ``torchrun --nproc-per-node N -m fastunlearn ...`` every process runs the same command. Rank 0 alone says and
writes things. An error that all ranks meet alike is said once; one that a single rank meets is said by that rank, with
its number, and ends the job; a rank that is killed says nothing, so the others find out which it was.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from fastunlearn.parallel.ranks import Ranks, world

T = TypeVar("T")

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells a process about the others
TIMEOUT = timedelta(hours=1)  # of one collective: the ranks wait that long for rank 0's report or a slow disk
BEAT = 0.25  # seconds between two signs of life of a rank
PATIENCE = 2.0  # seconds without one after which a rank is held for dead, once it is known that something is wrong
GRACE = 3.0  # seconds that a failing rank waits for the others to fail alike


def launched() -> bool:
    """Whether this is one of several processes that a launcher started to work together."""
    return all(name in os.environ for name in VARIABLES) and int(os.environ["WORLD_SIZE"]) > 1


def speaks() -> bool:
    """Whether this process says and writes things: rank 0, or one alone."""
    return not launched() or int(os.environ["RANK"]) == 0


def local_device(device: torch.device) -> torch.device:
    """The device of this process: of several, each takes the GPU of its local rank.

    Raises ValueError for a GPU with a number, which all processes would take.
    """
    if device.type != "cuda" or not launched():
        return device
    if device.index is not None:
        raise ValueError(f"each of several processes takes a GPU of its own: give --device cuda, not {device}")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", os.environ["RANK"])))


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Join the processes that torchrun started, if it did, and leave them when the block ends without an error.

    gloo carries what is on the CPU, NCCL what is on GPUs. Where a process group is there already, it is used and left
    as it is. After an error the group is left to the end of the process: the others may never answer again.

    Args:
        device: what this process computes on; see :func:`local_device`.

    Raises torch.distributed's errors where the others can not be reached.
    """
    if dist.is_initialized() or not launched():
        yield world()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    yield world()
    dist.barrier()  # what hosts the group may not leave before the others have
    dist.destroy_process_group()


def first_alone(ranks: Ranks, run: Callable[[], T]) -> T:
    """What ``run`` returns on rank 0, on every rank, pickled; what it raises there is raised on every rank.

    The other ranks wait and do not call it.
    """
    if ranks.group is None:
        return run()
    told: list[Any] = [None, None]
    if ranks.rank == 0:
        try:
            told[0] = run()
        except (ArithmeticError, ImportError, MemoryError, OSError, RuntimeError, TypeError, ValueError) as error:
            told[1] = _portable(error)
            dist.broadcast_object_list(told, group_src=0, group=ranks.group)
            raise
    dist.broadcast_object_list(told, group_src=0, group=ranks.group)
    if told[1] is not None:
        raise told[1]
    found: T = told[0]
    return found


def require_same(ranks: Ranks, values: Mapping[str, Any]) -> None:
    """Raise ValueError, on every rank, that names the first rank and value that is not as on rank 0."""
    first, *others = ranks.gather(dict(values))
    for rank, other in enumerate(others, 1):
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) != other.get(name):
                raise ValueError(
                    f"rank {rank} differs from rank 0 in {name}; start every process with the same configuration, "
                    "and let all of them see the same files"
                )


class Watch:
    """What the ranks tell one another about their lives, through the launcher's store and beside all collectives.

    A thread gives a sign of life every ``BEAT`` seconds. It also takes SIGTERM, by which a launcher ends the others
    once a rank is gone: the main thread may be in a collective that never returns. Whoever comes to the end first,
    the main thread by :meth:`settle` or this one, says why; then the process is over.

    Args:
        command: how this process calls itself in what it says.
        store: shared by all ranks; the thread takes a connection of its own.
    """

    def __init__(self, command: str, store: Any, rank: int, size: int) -> None:
        self.command, self.rank, self.size = command, rank, size
        self._store, self._beats = store, store.clone()
        self._ending = threading.Lock()
        self._over = threading.Event()
        self._signals, write = os.pipe()
        os.set_blocking(write, False)  # as signal.set_wakeup_fd wants it
        self._restore = (signal.signal(signal.SIGTERM, lambda *_: None), signal.set_wakeup_fd(write), write)
        self._thread = threading.Thread(target=self._live, daemon=True, name="fastunlearn-watch")
        self._thread.start()

    def settle(self, code: int, error: BaseException | None, line: str) -> str:
        """What this rank has to say of its end: one line, or "" where it is another that says it.

        Args:
            code: the exit code.
            error: why it is not 0, where there is more than what has been said.
            line: what one process alone would say of it.
        """
        if not self._ending.acquire(blocking=False):
            self._over.wait()  # the thread is about to end the process
        start, colon, what = line.partition(": ")
        own = f"{start}{colon}rank {self.rank}: {type(error).__name__}: {what}" if line else ""
        try:
            if not code:
                self._store.set(f"left/{self.rank}", "")
                return ""
            # A collective raises RuntimeError where another rank has gone.
            found = self._consequence(line) if isinstance(error, RuntimeError) else None
            if found is None:
                found = (line if self.rank == 0 else "") if self._alike(line) else own
        except dist.DistError:  # the store went with the process that kept it
            found = own
        return found

    def _alike(self, line: str) -> bool:
        """Tell the others of this failure; whether all of them fail, and would say the same."""
        place = self._store.add("failures", 1)
        self._store.set(f"failure/{place}", json.dumps([self.rank, line]))
        until = time.monotonic() + GRACE
        while self._store.add("failures", 0) < self.size and time.monotonic() < until:
            time.sleep(0.02)
        failures = self._failures()
        return len(failures) == self.size and len({said for _, said in failures}) == 1

    def close(self) -> None:
        """No more signs of life, and SIGTERM as it was."""
        self._over.set()
        self._thread.join()
        handler, wakeup, write = self._restore
        signal.signal(signal.SIGTERM, handler)
        signal.set_wakeup_fd(wakeup)
        os.close(write)
        os.close(self._signals)

    def _live(self) -> None:
        count = 0
        while not self._over.is_set():
            count += 1
            try:
                self._beats.set(f"beat/{self.rank}", str(count))
            except dist.DistError:  # the process that kept the store is gone, and nobody could read it any more
                return
            if select.select([self._signals], [], [], BEAT)[0] and signal.SIGTERM in os.read(self._signals, 64):
                threading.Thread(target=self._terminated, daemon=True).start()

    def _terminated(self) -> None:
        """End the process; the main thread may be where no handler is ever called."""
        if not self._ending.acquire(blocking=False):
            return  # the main thread knows already
        try:
            line = self._consequence("")
        except dist.DistError:
            line = None
        say((f"{self.command}: terminated" if self.rank == 0 else "") if line is None else line)
        os._exit(1)

    def _consequence(self, line: str) -> str | None:
        """What to say where this rank ends because another did, "" where another says so; None where none did."""
        others = [rank for rank, said in self._failures() if rank != self.rank and said != line]
        gone = others[:1] or self._silent()
        if not gone:
            return None
        if self.rank != min(set(range(self.size)) - {*gone, *others}):
            return ""
        names = " and ".join(f"rank {rank}" for rank in gone)
        how = "failed" if others else "died without a word, as what is killed or out of memory does"
        more = "nothing half done is left, and --resume goes on from the last finished phase"
        return f"{self.command}: ended, because {names} {how}; {more}"

    def _failures(self) -> list[tuple[int, str]]:
        """Rank and line of each, in their order."""
        found = []
        for place in range(1, self._store.add("failures", 0) + 1):
            rank, line = json.loads(self._store.get(f"failure/{place}"))
            found.append((rank, line))
        return found

    def _silent(self) -> list[int]:
        """The ranks that give no sign of life, and have not said that they leave."""
        before = self._counts()
        time.sleep(PATIENCE)
        after = self._counts()
        return [r for r in range(self.size) if before[r] == after[r] and not self._store.check([f"left/{r}"])]

    def _counts(self) -> list[bytes | None]:
        keys = [f"beat/{rank}" for rank in range(self.size)]
        return [self._store.get(key) if self._store.check([key]) else None for key in keys]


@contextmanager
def watched(command: str) -> Iterator[Watch | None]:
    """A :class:`Watch` on the processes that torchrun started with this one; None for one alone.

    Raises torch.distributed's errors where the launcher's store can not be reached.
    """
    if not launched() or dist.is_initialized():
        yield None
        return
    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    watch = Watch(command, PrefixStore(f"fastunlearn/{attempt}", store), rank, size)
    try:
        yield watch
    finally:
        watch.close()


def say(line: str) -> None:
    """One line on stderr, if there is anything to say."""
    if line:
        print(line, file=sys.stderr, flush=True)


def _portable(error: BaseException) -> BaseException:
    """The same in one argument: what an error was made with can not always be pickled, or made again from."""
    kinds = [kind for kind in type(error).__mro__ if kind.__module__ == "builtins"]
    kind = ValueError if isinstance(error, UnicodeError) else kinds[0]  # most of its kinds take five arguments
    same: BaseException = kind(str(error))
    return same
