"""Tests on several processes: a function run on every rank of a gloo group."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Forks of a server that has torch loaded and no threads yet: a rank starts in milliseconds.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.distributed.checkpoint", "fastunlearn",
     "transformers.models.gpt2.modeling_gpt2", "transformers.models.llama.modeling_llama"]
)  # fmt: skip
LIMIT = 300  # seconds


def on_ranks(size: int, body: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``body(rank, *args)``, a function of a module, returned on each of ``size`` ranks joined by gloo.

    Raises AssertionError with the first rank's traceback if any raised, or when they take longer than ``LIMIT``.
    """
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank in range(size):
            ours, theirs = _SERVER.Pipe(duplex=False)
            process = _SERVER.Process(target=_run, args=(theirs, Path(folder) / "store", rank, size, body, args))
            process.start()
            theirs.close()
            started.append((process, ours))
        try:
            return [_received(rank, ours) for rank, (_, ours) in enumerate(started)]
        finally:
            for process, ours in started:
                process.join(10)
                process.kill()
                ours.close()


def _received(rank: int, connection: Connection) -> Any:
    assert connection.poll(LIMIT), f"rank {rank} has said nothing for {LIMIT} s"
    try:
        failed, result = pickle.loads(connection.recv())
    except EOFError:
        raise AssertionError(f"rank {rank} died") from None
    assert not failed, f"rank {rank}:\n{result}"
    return result


def _run(connection: Connection, store: Path, rank: int, size: int, body: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        result = False, body(rank, *args)
    except BaseException:  # reported by the test
        result = True, traceback.format_exc()
    # Pickled here: a Connection by itself would share a tensor's memory, which ends with the rank.
    connection.send(pickle.dumps(result))
    dist.destroy_process_group()
