"""Aligned memory, the throttle on a clock of its own, and the pool: errors and interrupts leave nothing in flight."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from flexbatch.memory import blockio
from flexbatch.memory.aligned import BLOCK, align_down, align_up, aligned_buffer, aligned_bytes
from flexbatch.memory.blockio import BlockFile, Request, RequestPool, Throttle, merge, split
from flexbatch.units import MIB
from tests.strike import Strike


@pytest.mark.parametrize(
    ("number", "down", "up"), [(0, 0, 0), (1, 0, BLOCK), (BLOCK, BLOCK, BLOCK), (BLOCK + 1, BLOCK, 2 * BLOCK)]
)
def test_rounding(number: int, down: int, up: int) -> None:
    assert (align_down(number), align_up(number)) == (down, up)


def test_buffer_is_aligned_zero_and_writable() -> None:
    buffer = aligned_buffer(3 * BLOCK + 5)
    assert buffer.shape == (3 * BLOCK + 5,)
    assert buffer.dtype == torch.uint8
    assert buffer.data_ptr() % BLOCK == 0
    assert not buffer.any()
    buffer.fill_(7)
    assert int(buffer.sum(dtype=torch.int64)) == 7 * (3 * BLOCK + 5)
    assert aligned_buffer(0).numel() == 0


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_buffer_takes_memory_when_it_is_touched() -> None:
    before = resident()
    buffer = aligned_buffer(2**30)
    assert resident() - before < 2**26
    buffer[: 2**27] = 1
    assert resident() - before >= 2**27


def test_bytes_are_the_tensors_own_memory() -> None:
    buffer = aligned_buffer(2 * BLOCK)
    pages = buffer.view(torch.bfloat16).view(2, 16, -1)
    aligned_bytes(pages[1])[:2] = torch.tensor([1.5], dtype=torch.bfloat16).view(torch.uint8).numpy().data
    assert pages[1, 0, 0].item() == 1.5


@pytest.mark.parametrize(
    "tensor", [aligned_buffer(2 * BLOCK)[1:], aligned_buffer(2 * BLOCK).view(2, BLOCK).T], ids=["address", "strides"]
)
def test_bytes_that_direct_io_cannot_move_are_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(AssertionError, match="direct I/O wants"):
        aligned_bytes(tensor)


def test_split_covers_the_view_and_needs_no_more_than_asked(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    file = BlockFile(os.open(tmp_path / "file", os.O_RDONLY), "file")
    view = aligned_bytes(aligned_buffer(5 * BLOCK))
    parts = list(split(file, 8 * BLOCK, view, 4 * BLOCK + 9, 2 * BLOCK))
    file.close()
    assert [(part.offset // BLOCK, part.nbytes, part.needed) for part in parts] == [
        (8, 2 * BLOCK, 2 * BLOCK),
        (10, 2 * BLOCK, 2 * BLOCK),
        (12, BLOCK, 9),
    ]


def test_neighbours_become_one_request_up_to_its_limit() -> None:
    requests = requests_of(7)
    found = merge([requests[index] for index in (6, 4, 0, 2, 1, 3)], 3)
    assert [(request.offset, request.nbytes, request.needed, len(request.views)) for request in found] == [
        (0, 3, 3, 3),
        (3, 2, 2, 2),
        (6, 1, 1, 1),
    ]
    assert [len(request.views) for request in merge(requests_of(2000), 4096)] == [1024, 976]


def test_throttle_counts_a_busy_spell_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    throttle = Throttle(2.0 * MIB)
    assert throttle.reserve(MIB) == pytest.approx(100.5)
    assert throttle.reserve(MIB) == pytest.approx(101.0)  # behind the first one
    now = 101.0 + blockio._OVERSLEPT / 2
    assert throttle.reserve(MIB) == pytest.approx(101.5)  # a sleep that ended late is not idle time
    now = 200.0
    assert throttle.reserve(MIB) == pytest.approx(200.5)  # idle time gives no credit
    small = MIB // 32
    assert throttle.reserve(small) == pytest.approx(200 + 1 / 64)  # a short request passes long ones
    assert throttle.reserve(small) == pytest.approx(200 + 2 / 64)  # but not others of its kind
    assert throttle.reserve(MIB) == pytest.approx(201 + 2 / 64)  # and long ones pay for it
    assert Throttle(None).reserve(10**12) == 0


def requests_of(count: int) -> list[Request]:
    file = BlockFile(os.open("/dev/null", os.O_RDONLY), "null")
    file.close()
    return [Request(file, index, (memoryview(bytes(1)),), 1, 1) for index in range(count)]


def test_pool_moves_every_request_once_with_all_threads() -> None:
    pool = RequestPool(3)
    together = threading.Barrier(3, timeout=30)  # breaks unless three are in flight at once
    moved: list[int] = []

    def move(request: Request) -> int:
        together.wait()
        moved.append(request.offset)
        return 2

    assert pool.run(move, requests_of(9), Throttle(None)) == 18
    assert sorted(moved) == list(range(9))
    assert pool.run(move, [], Throttle(None)) == 0
    pool.close()


@pytest.mark.parametrize("threads", [1, 4])
def test_first_error_cancels_the_rest_and_leaves_nothing_in_flight(threads: int) -> None:
    pool = RequestPool(threads)
    lock = threading.Lock()
    begun: list[int] = []
    flying = 0

    def move(request: Request) -> int:
        nonlocal flying
        with lock:
            begun.append(request.offset)
            flying += 1
        time.sleep(0 if request.offset == 5 else 0.01)
        with lock:
            flying -= 1
        if request.offset == 5:
            raise ValueError("five")
        return 1

    with pytest.raises(ValueError, match="five"):
        pool.run(move, requests_of(1000), Throttle(None))
    assert flying == 0
    assert len(begun) < 20
    assert pool.run(lambda _: 1, requests_of(10), Throttle(None)) == 10  # the pool is still of use
    pool.close()


def test_error_does_not_wait_for_the_throttle() -> None:
    pool = RequestPool(2)

    def move(request: Request) -> int:
        if request.offset == 1:
            raise ValueError("one")
        return 1

    started = time.monotonic()
    with pytest.raises(ValueError, match="one"):
        pool.run(move, requests_of(4), Throttle(0.01))  # 100 s a byte
    assert time.monotonic() - started < 50
    pool.close()


@pytest.mark.parametrize("threads", [1, 2])
def test_interrupt_of_the_caller_waits_only_for_what_is_in_flight(threads: int) -> None:
    pool = RequestPool(threads)
    begun: list[int] = []
    main = threading.main_thread().ident
    assert main is not None

    def move(request: Request) -> int:
        begun.append(request.offset)
        if request.offset == 0:
            signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.05)
        return 1

    with pytest.raises(KeyboardInterrupt):
        pool.run(move, requests_of(1000), Throttle(None))
    after = len(begun)
    time.sleep(0.15)
    assert len(begun) == after < 100
    pool.close()


def test_an_interrupt_at_any_place_leaves_the_pool_of_use() -> None:
    pool = RequestPool(3)
    moved: list[int] = []

    def move(request: Request) -> int:
        moved.append(request.offset)
        return 1

    def struck(at: int) -> bool:
        strike, requests = Strike(at, (blockio.__file__,)), requests_of(8)
        with suppress(KeyboardInterrupt), strike:
            pool.run(move, requests, Throttle(None))
        return strike.left <= 0

    at = 1
    while struck(at):
        after = len(moved)
        assert pool.run(move, requests_of(8), Throttle(None)) == 8
        assert len(moved) == after + 8, "something was still in flight"
        at += 1
    assert at > 20
    pool.close()
    assert pool.run(move, requests_of(8), Throttle(None)) == 8  # with new threads
    pool.close()
    assert sys.exc_info() == (None, None, None), "a strike left an exception half handled"


def test_a_pool_that_is_forgotten_ends_its_threads() -> None:
    pool = RequestPool(3)
    crew = pool._crew
    pool.run(lambda _: 1, requests_of(8), Throttle(None))
    assert len(crew._hired) == 3
    del pool
    gc.collect()
    crew.join()
