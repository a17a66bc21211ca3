"""Sums in host memory: order, ownership and errors, with copies that end when the test says so."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from unittest.mock import MagicMock, call, patch

import pytest
import torch
from torch import Tensor

from fastunlearn import ops
from fastunlearn.offload import HostSums, _side_stream

LIMIT = 20  # seconds that nothing here takes


class Copies:
    """Copies as a device makes them: started in order, done when they are let go, and not a moment before."""

    def __init__(self, open_: bool = True) -> None:
        self.started: list[Tensor] = []  # the buffers
        self.gates: list[threading.Event] = []
        self.errors: dict[int, Exception] = {}  # of copies, by their number
        self.open = open_

    def __call__(self, buffer: Tensor, source: Tensor) -> Callable[[], None]:
        number, gate = len(self.started), threading.Event()
        self.started.append(buffer)
        self.gates.append(gate)
        if self.open:
            gate.set()

        def arrived() -> None:
            assert gate.wait(LIMIT)
            if number in self.errors:
                raise self.errors[number]
            buffer.copy_(source)  # as late as it can be: a buffer given out too early is overwritten under its reader

        return arrived


def alive() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("host-sums")]


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


LIKE = [((3, 5), torch.float32), ((70,), torch.bfloat16), ((), torch.float64), ((0, 2), torch.bfloat16)]


def additions(count: int) -> list[tuple[int, Tensor]]:
    """Of every accumulator in turn, of sizes that make the order of float32 sums show."""
    torch.manual_seed(0)
    chosen = [(k % len(LIKE), LIKE[k % len(LIKE)]) for k in range(count)]
    return [
        (i, torch.randn(shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32) * 10 ** (k % 7))
        for k, (i, (shape, dtype)) in enumerate(chosen)
    ]


def test_tensors_of_the_cpu_are_added_at_once_without_a_thread() -> None:
    before = threading.active_count()
    sums = HostSums([((3,), torch.float32)], "cpu")
    sums.add_(0, torch.ones(3))
    assert sums._sums[0].tolist() == [1, 1, 1]
    sums.wait()
    assert sums.sums[0].tolist() == [1, 1, 1]
    assert threading.active_count() == before


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_copied_tensors_give_the_bits_of_adding_at_once(device: str) -> None:
    plain, copied = HostSums(LIKE, "cpu", seed=3), HostSums(LIKE, device, 3, copy=Copies() if device == "cpu" else None)
    for index, part in additions(80):
        plain.add_(index, part)
        scratch = part.to(device, copy=True)
        for _ in range(20):  # on a GPU still being written when its copy is asked for
            scratch = scratch * 2 / 2
        copied.add_(index, scratch)
        size = scratch.shape
        del scratch
        torch.full(size, -1.0, device=device)  # takes its memory, were it freed too early
    for a, b in zip(plain.sums, copied.sums, strict=True):
        assert torch.equal(a, b)
    exact = sum(part.double() for index, part in additions(80) if index == 2)
    assert torch.equal(copied.sums[2], exact)


def test_bfloat16_sums_are_rounded_by_seed_addition_and_position() -> None:
    sums = HostSums(LIKE, "cpu", seed=3, copy=Copies())
    shifted = HostSums(LIKE, "cpu", seed=3, offsets=[0, 1007, 0, 0])
    expected, elsewhere = torch.zeros(70, dtype=torch.bfloat16), torch.zeros(70, dtype=torch.bfloat16)
    parts = [s for i, s in additions(40) if i == 1]
    for step, part in enumerate(parts):
        sums.add_(0, torch.ones(3, 5))  # another accumulator's additions are not counted
        sums.add_(1, part)
        shifted.add_(1, part)
        ops.add_rounded_([expected], [part], 3, step, [15])  # behind the 15 elements before it
        ops.add_rounded_([elsewhere], [part], 3, step, [1007])
    assert torch.equal(sums.sums[1], expected)
    assert torch.equal(shifted.sums[1], elsewhere)
    assert not torch.equal(expected, elsewhere)


def test_a_shard_with_its_offset_gets_the_bits_of_the_whole() -> None:
    torch.manual_seed(1)
    whole = HostSums([((10, 7), torch.bfloat16)], "cpu", seed=4, offsets=[30])
    shards = [HostSums([((rows, 7), torch.bfloat16)], "cpu", 4, [30 + 7 * at]) for at, rows in ((0, 3), (3, 7))]
    for _ in range(20):
        part = torch.rand(10, 7)
        whole.add_(0, part)
        for shard, rows in zip(shards, (part[:3], part[3:]), strict=True):
            shard.add_(0, rows)
    assert torch.equal(torch.cat([s.sums[0] for s in shards]), whole.sums[0])


def test_additions_keep_their_order_when_a_later_copy_ends_first() -> None:
    copies = Copies(open_=False)
    sums = HostSums([((), torch.float32)], "cpu", copy=copies)
    sums.add_(0, torch.tensor(1e8))
    sums.add_(0, torch.tensor(1.0))  # lost beside 1e8; it would be kept if it came first or last
    copies.gates[1].set()
    caller = threading.Thread(target=sums.add_, args=(0, torch.tensor(-1e8)), daemon=True)
    caller.start()
    time.sleep(0.02)
    assert sums._sums[0] == 0  # nothing overtakes
    copies.open = True
    copies.gates[0].set()
    caller.join(LIMIT)
    assert sums.sums[0] == 0


def test_add_does_not_wait_for_its_copy_and_a_third_waits_for_the_first() -> None:
    copies = Copies(open_=False)
    sums = HostSums([((4,), torch.float32), ((2,), torch.float64)], "cpu", copy=copies)
    sums.add_(0, torch.full((4,), 1.0))
    sums.add_(1, torch.full((2,), 2.0, dtype=torch.float64))
    assert len(copies.started) == 2
    assert copies.started[0].untyped_storage().data_ptr() != copies.started[1].untyped_storage().data_ptr()
    third = threading.Thread(target=sums.add_, args=(0, torch.full((4,), 4.0)), daemon=True)
    third.start()
    time.sleep(0.05)
    assert len(copies.started) == 2 and third.is_alive()
    copies.gates[0].set()  # its buffer is free again, and no other
    third.join(LIMIT)
    assert len(copies.started) == 3
    assert copies.started[2].untyped_storage().data_ptr() == copies.started[0].untyped_storage().data_ptr()
    for gate in copies.gates:
        gate.set()
    assert sums.sums[0].tolist() == [5, 5, 5, 5] and sums.sums[1].tolist() == [2, 2]


def test_wait_returns_when_everything_is_added() -> None:
    copies = Copies(open_=False)
    sums = HostSums([((2,), torch.float32)], "cpu", copy=copies)
    sums.wait()
    sums.add_(0, torch.ones(2))
    sums.add_(0, torch.ones(2))
    waiting = threading.Thread(target=sums.wait, daemon=True)
    waiting.start()
    copies.gates[0].set()
    time.sleep(0.02)
    assert waiting.is_alive()
    copies.gates[1].set()
    waiting.join(LIMIT)
    assert sums._sums[0].tolist() == [2, 2]


@pytest.mark.parametrize("later", [0, 1, 2])
def test_an_error_of_the_thread_is_raised_in_the_caller_now_and_ever_after(later: int) -> None:
    copies = Copies()
    copies.errors[1] = OSError("the device is gone")
    sums = HostSums([((2,), torch.float32)], "cpu", copy=copies)
    sums.add_(0, torch.ones(2))
    sums.add_(0, torch.ones(2))
    if later:
        until(lambda: all(added.done() for added in sums._added))
    for _ in range(later):
        with pytest.raises(OSError, match="the device is gone"):
            sums.add_(0, torch.ones(2))
    for _ in range(2):
        with pytest.raises(OSError, match="the device is gone"):
            sums.wait()
    with pytest.raises(OSError, match="the device is gone"):
        sums.sums  # noqa: B018
    assert len(copies.started) == 2


def test_a_copy_that_can_not_start_adds_nothing() -> None:
    starts = iter([True, False, True])
    copies = Copies()

    def copy(buffer: Tensor, source: Tensor) -> Callable[[], None]:
        if not next(starts):
            raise RuntimeError("no stream")
        return copies(buffer, source)

    sums, plain = (HostSums([((9,), torch.bfloat16)], "cpu", copy=c) for c in (copy, None))
    parts = [torch.rand(9) for _ in range(2)]
    sums.add_(0, parts[0])
    with pytest.raises(RuntimeError, match="no stream"):
        sums.add_(0, torch.ones(9))
    sums.add_(0, parts[1])
    for part in parts:
        plain.add_(0, part)
    assert torch.equal(sums.sums[0], plain.sums[0])


def test_the_thread_ends_with_the_object() -> None:
    gc.collect()
    until(lambda: not alive())
    sums = HostSums([((2,), torch.float32)], "cpu", copy=Copies())
    sums.add_(0, torch.ones(2))
    assert len(alive()) == 1
    del sums
    until(lambda: not alive())


def test_gradients_and_strides_of_what_is_added_do_not_matter() -> None:
    for copy in (None, Copies()):
        sums = HostSums([((3, 2), torch.float32), ((3, 2), torch.bfloat16)], "cpu", copy=copy)
        scratch = torch.arange(6.0).reshape(2, 3).T.requires_grad_()
        sums.add_(0, scratch)
        sums.add_(1, scratch)
        assert [s.tolist() for s in sums.sums] == [[[0, 3], [1, 4], [2, 5]]] * 2
        assert not sums.sums[0].requires_grad


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sums are float32, float64 or bfloat16, not torch\.float16, torch\.int64"):
        HostSums([((2,), torch.int64), ((2,), torch.float16)], "cpu")
    with pytest.raises(ValueError, match="not of meta"):
        HostSums([], "meta")
    with pytest.raises(ValueError, match="1 accumulators but 2 offsets"):
        HostSums([((2,), torch.bfloat16)], "cpu", offsets=[0, 2])
    sums = HostSums([((2, 3), torch.bfloat16)], "cpu")
    takes = r"accumulator 0 takes torch\.float32 \[2, 3\] on cpu, got "
    for scratch, got in (
        (torch.ones(3, 2), r"torch\.float32 \[3, 2\] on cpu"),
        (torch.ones(2, 3).double(), r"torch\.float64 \[2, 3\] on cpu"),
        (torch.ones(2, 3, device="meta"), r"torch\.float32 \[2, 3\] on meta"),
    ):
        with pytest.raises(ValueError, match=takes + got):
            sums.add_(0, scratch)
    assert not sums.sums[0].any() and sums._steps == [0]
    with pytest.raises(IndexError):
        sums.add_(1, torch.ones(2, 3))


def test_a_copy_on_the_side_stream_waits_for_the_current_one_and_is_waited_for_through_an_event() -> None:
    """The order of the calls that torch is given, with its CUDA half replaced by a recorder."""
    with patch("fastunlearn.offload.torch.cuda", record := MagicMock()):
        copy, device = _side_stream(torch.device("cuda", 1)), torch.device("cuda", 1)
        buffer, source = record.buffer, record.source
        arrived = copy(buffer, source)
        arrived()
    side, event = record.Stream(), record.Event()
    assert arrived is event.synchronize
    assert record.mock_calls[:9] == [
        call.Stream(device),
        call.current_stream(device),
        call.Stream().wait_stream(record.current_stream()),
        call.stream(side),
        call.stream().__enter__(),
        call.buffer.copy_(source, non_blocking=True),
        call.stream().__exit__(None, None, None),
        call.source.record_stream(side),
        call.Event(blocking=True),
    ]
    assert record.mock_calls[9:11] == [call.Event().record(side), call.Event().synchronize()]
