"""Sums of squares in host memory while the model is on a GPU: copied and added while the GPU goes on computing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate

import torch
from torch import Tensor

from fastunlearn import ops

Copy = Callable[[Tensor, Tensor], Callable[[], None]]


class HostSums:
    """Accumulators in host memory, to which tensors of a device are added without waiting for it::

        sums = HostSums([(p.shape, torch.bfloat16) for p in parameters], device)
        for ...:
            sums.add_(3, squares)  # of parameters[3], a tensor that nobody writes to afterwards
        values = sums.sums  # waits

    Two pinned buffers take turns: :meth:`add_` starts a copy into one on a stream of its own and returns; a thread
    waits for the copy, adds the buffer to its accumulator and frees it. When both are busy, :meth:`add_` waits for the
    older one. That one thread adds in the order of the calls, so equal calls give equal bits, those of CPU tensors
    included, which are added at once and without a thread. The thread ends with the object. One thread makes the calls.

    Args:
        like: shape and dtype of every accumulator: float32, float64, or bfloat16, which is rounded stochastically by
            :func:`fastunlearn.ops.add_rounded_`: addition k to an accumulator has step k.
        device: of the tensors that are added, a CUDA device or the CPU.
        seed: of the rounding.
        offsets: flat position of the first element of each accumulator among all that are rounded with this seed, so
            that a shard gets the random bits of the whole; by default one accumulator begins where the one before ends.
        copy: ``copy(buffer, source)`` starts a copy and returns a function that waits for its end; by default on a side
            stream of the CUDA device.

    Raises ValueError for other dtypes and devices, and where offsets are not one per accumulator.

    Memory: the accumulators, and in pinned host memory twice the largest tensor that can be added, of 4 bytes an
    element (8 for float64). On the device none but that of tensors being copied, two at most.
    """

    def __init__(
        self,
        like: Sequence[tuple[Sequence[int], torch.dtype]],
        device: torch.device | str,
        seed: int = 0,
        offsets: Sequence[int] | None = None,
        copy: Copy | None = None,
    ) -> None:
        self.device = torch.device(device)
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(f"sums are kept for tensors of the CPU or of a CUDA device, not of {device}")
        if wrong := sorted({str(dtype) for _, dtype in like if dtype not in _ADDENDS}):
            raise ValueError(f"sums are float32, float64 or bfloat16, not {', '.join(wrong)}")
        self._sums = [torch.zeros(tuple(shape), dtype=dtype) for shape, dtype in like]
        sizes = [total.numel() for total in self._sums]
        self._offsets = list(accumulate(sizes, initial=0))[:-1] if offsets is None else list(offsets)
        if len(self._offsets) != len(sizes):
            raise ValueError(f"{len(sizes)} accumulators but {len(self._offsets)} offsets; one of each is needed")
        self._steps = [0] * len(sizes)
        self._seed = seed
        self._copy = _side_stream(self.device) if copy is None and self.device.type == "cuda" else copy
        if self._copy is None:
            return
        largest = max((total.numel() * _ADDENDS[total.dtype].itemsize for total in self._sums), default=0)
        pinned = self.device.type == "cuda"
        self._buffers = [torch.empty(largest, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        done: Future[None] = Future()
        done.set_result(None)
        self._added = [done, done]  # the last addition from each buffer
        self._turn = 0  # whose buffer is next, the one filled longer ago
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="host-sums")

    def add_(self, index: int, scratch: Tensor) -> None:
        """Add ``scratch`` to accumulator ``index``; it may be dropped at once, but not be written to again.

        Args:
            index: into ``like``.
            scratch: of its shape, on the device, float32 (float64 for a float64 accumulator).

        Raises ValueError where ``scratch`` is another tensor than that, and the error of an earlier addition that
        failed: the sums are then incomplete, and every call raises it.
        """
        total = self._sums[index]
        dtype = _ADDENDS[total.dtype]
        fits = scratch.shape == total.shape and scratch.dtype == dtype and scratch.device.type == self.device.type
        if not fits:
            raise ValueError(
                f"accumulator {index} takes {dtype} {list(total.shape)} on {self.device.type}, "
                f"got {scratch.dtype} {list(scratch.shape)} on {scratch.device}"
            )
        if self._copy is None:
            self._add(index, self._steps[index], scratch.detach())
        else:
            for turn, added in enumerate(self._in_order()):
                if turn == 0 or added.done():
                    added.result()
            bytes_ = self._buffers[self._turn][: total.numel() * dtype.itemsize]
            buffer = bytes_.view(dtype).view(total.shape)
            arrived = self._copy(buffer, scratch.detach())
            self._added[self._turn] = self._worker.submit(self._add_arrived, arrived, index, self._steps[index], buffer)
            self._turn = 1 - self._turn
        self._steps[index] += 1

    def wait(self) -> None:
        """Return when everything given to :meth:`add_` is added; raises the error of the first addition that failed."""
        if self._copy is not None:
            for added in self._in_order():
                added.result()

    @property
    def sums(self) -> list[Tensor]:
        """The accumulators, on the CPU, after :meth:`wait`."""
        self.wait()
        return self._sums

    def _in_order(self) -> tuple[Future[None], Future[None]]:
        return self._added[self._turn], self._added[1 - self._turn]

    def _add_arrived(self, arrived: Callable[[], None], index: int, step: int, buffer: Tensor) -> None:
        arrived()
        self._add(index, step, buffer)

    def _add(self, index: int, step: int, addend: Tensor) -> None:
        total = self._sums[index]
        if total.dtype == torch.bfloat16:
            ops.add_rounded_([total], [addend], self._seed, step, [self._offsets[index]])
        else:
            total.add_(addend)


# What is added to an accumulator of a dtype.
_ADDENDS = {torch.float32: torch.float32, torch.bfloat16: torch.float32, torch.float64: torch.float64}


def _side_stream(device: torch.device) -> Copy:
    """Copies from the device that wait for what its current stream has been given, and for which that does not wait."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(buffer: Tensor, source: Tensor) -> Callable[[], None]:
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            buffer.copy_(source, non_blocking=True)
        source.record_stream(stream)  # its memory is not given to others before the copy has ended
        arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # the thread sleeps, does not spin
        arrived.record(stream)
        return arrived.synchronize

    return copy
