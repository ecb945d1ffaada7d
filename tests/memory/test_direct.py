"""Direct reads against plain ones: any extents, file ends, refusals, faults of the disk, look-ups of rows."""

from __future__ import annotations

import errno
import os
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexbatch.errors import ModelError
from flexbatch.memory.aligned import BLOCK, aligned_buffer
from flexbatch.memory.blockio import BlockFile
from flexbatch.memory.direct import DirectReader, Extent, ReadPlan, plan_reads
from tests.memory.faults import Faulty, record_dropped, refuse_direct, refuse_direct_transfers

SIZES = (1, 4095, 4096, 3 * 4096, 70_001, 300_000)


def make_files(folder: Path) -> list[Path]:
    rng = random.Random(0)
    paths = [folder / f"{size}.bin" for size in SIZES]
    for path, size in zip(paths, SIZES, strict=True):
        path.write_bytes(rng.randbytes(size))
    return paths


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_files(tmp_path_factory.mktemp("direct"))


@pytest.fixture
def reader() -> Iterator[DirectReader]:
    with closing(DirectReader(threads=3, request_bytes=2 * BLOCK)) as made:
        yield made


def plain(extent: Extent) -> bytes:
    with extent.path.open("rb") as file:
        file.seek(extent.offset)
        return file.read(extent.nbytes)


def check(reader: DirectReader, plan: ReadPlan, offset: int = 0) -> int:
    """Read ``plan``, compare every extent with a plain read, and return the bytes that came."""
    buffer = aligned_buffer(offset + plan.nbytes + BLOCK).fill_(0xA5)
    count = reader.read(plan, buffer, offset)
    for index, extent in enumerate(plan.extents):
        assert plan.view(buffer, index, offset).numpy().tobytes() == plain(extent)
    assert (buffer[:offset] == 0xA5).all()  # nothing beside the plan's place is touched
    assert (buffer[offset + plan.nbytes :] == 0xA5).all()
    return count


@st.composite
def extents_in(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """(file, offset, nbytes), within the file."""
    found = []
    for _ in range(draw(st.integers(0, 12))):
        file = draw(st.integers(0, len(SIZES) - 1))
        begin = draw(st.integers(0, SIZES[file]))
        found.append((file, begin, draw(st.integers(0, SIZES[file] - begin))))
    return found


@given(
    raw=extents_in(),
    gap=st.sampled_from([0, 1, BLOCK, 128 * 1024]),
    request=st.sampled_from([BLOCK, 3 * BLOCK, 2**20]),
    threads=st.integers(1, 4),
    offset=st.sampled_from([0, 5 * BLOCK]),
)
def test_any_extents_read_as_plain_reads_do(
    files: list[Path], raw: list[tuple[int, int, int]], gap: int, request: int, threads: int, offset: int
) -> None:
    plan = plan_reads([Extent(files[file], begin, nbytes) for file, begin, nbytes in raw], gap)
    with closing(DirectReader(threads=threads, request_bytes=request)) as reader:
        count = check(reader, plan, offset)
        assert count == reader.bytes_read
    ends = dict(zip(files, SIZES, strict=True))
    assert count == sum(min(part.nbytes, ends[part.path] - part.start) for part in plan.ranges)


@given(raw=extents_in(), gap=st.sampled_from([0, BLOCK, 128 * 1024]))
def test_plan_is_whole_blocks_apart_by_more_than_the_gap(raw: list[tuple[int, int, int]], gap: int) -> None:
    paths = [Path(f"/f/{index}") for index in range(len(SIZES))]
    plan = plan_reads([Extent(paths[file], begin, nbytes) for file, begin, nbytes in raw], gap)
    position = 0
    for part in plan.ranges:
        assert part.start % BLOCK == part.nbytes % BLOCK == 0
        assert 0 < part.needed <= part.nbytes < part.needed + BLOCK
        assert part.position == position
        position += part.nbytes
    assert plan.nbytes == position
    for left, right in pairwise(plan.ranges):
        assert left.path < right.path or left.start + left.nbytes + gap < right.start
    for file, begin, nbytes in raw:  # nothing is read that no extent asks for, gaps aside
        if nbytes:
            assert any(part.path == paths[file] and part.start <= begin for part in plan.ranges)
    for part in plan.ranges:
        inside = [
            (b, n) for f, b, n in raw if n and paths[f] == part.path and part.start <= b < part.start + part.nbytes
        ]
        assert min(b for b, _ in inside) - part.start < BLOCK
        assert max(b + n for b, n in inside) == part.start + part.needed


def test_offsets_follow_the_given_order_and_neighbours_are_read_once(files: list[Path], reader: DirectReader) -> None:
    path = files[-1]
    plan = plan_reads([Extent(path, 9000, 100), Extent(path, 100, 8900), Extent(path, 5000, 8)], gap=0)
    assert plan.offsets == (9000, 100, 5000)
    assert plan.nbytes == 3 * BLOCK
    assert check(reader, plan) == 3 * BLOCK


def test_far_ranges_stay_apart_and_near_ones_become_one() -> None:
    path = Path("/f")
    extents = [Extent(path, 0, 10), Extent(path, 3 * BLOCK, 10)]
    assert [part.nbytes for part in plan_reads(extents, gap=2 * BLOCK - 1).ranges] == [BLOCK, BLOCK]
    assert [part.nbytes for part in plan_reads(extents, gap=2 * BLOCK).ranges] == [4 * BLOCK]
    assert plan_reads(extents, gap=2 * BLOCK - 1).offsets == (0, BLOCK)


def test_files_are_read_directly_where_possible(
    files: list[Path], reader: DirectReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = BlockFile(os.open(files[-1], os.O_RDONLY), "probe")
    dropped = record_dropped(monkeypatch)
    check(reader, plan_reads([Extent(files[-1], 0, 300_000)]))
    assert bool(dropped) != probe.direct
    probe.close()


@pytest.mark.parametrize("refusal", ["open", "transfer"])
def test_refusal_of_direct_io_falls_back_and_keeps_the_cache_clean(
    refusal: str, files: list[Path], reader: DirectReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    if refusal == "open":
        refuse_direct(monkeypatch)
    else:
        refuse_direct_transfers(monkeypatch, "preadv")
    dropped = record_dropped(monkeypatch)
    check(reader, plan_reads([Extent(files[-1], 5000, 295_000)]))
    covered = sorted(dropped)
    assert covered[0][0] == BLOCK
    assert all(left[0] + left[1] == right[0] for left, right in pairwise(covered))
    assert sum(covered[-1]) >= 300_000


def test_file_system_in_memory(reader: DirectReader) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        paths = make_files(Path(folder))
        check(
            reader,
            plan_reads([Extent(path, size // 3, size - size // 3) for path, size in zip(paths, SIZES, strict=True)]),
        )


def test_missing_file(tmp_path: Path, reader: DirectReader) -> None:
    with pytest.raises(ModelError, match=r"gone: cannot be read: No such file"):
        check(reader, plan_reads([Extent(tmp_path / "gone", 0, 1)]))


@pytest.mark.parametrize("size", [0, 5, 4096, 9999, 20_479])
def test_truncated_file_is_named_with_the_bytes_it_lacks(tmp_path: Path, reader: DirectReader, size: int) -> None:
    path = tmp_path / "short.safetensors"
    path.write_bytes(bytes(size))
    with pytest.raises(ModelError, match=r"short.safetensors: the file ends after \d+ bytes, .* need \d+; .*truncated"):
        reader.read(plan_reads([Extent(path, 0, 20_480)]), aligned_buffer(20_480))


def test_disk_error_is_named_with_file_and_byte_and_cancels_the_rest(
    files: list[Path], reader: DirectReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = Faulty(monkeypatch, "preadv", at=2 * BLOCK)
    plan = plan_reads([Extent(files[-1], 0, 300_000)])
    with pytest.raises(ModelError, match=r"300000.bin: cannot be read at byte 8192: Input/output error"):
        reader.read(plan, aligned_buffer(plan.nbytes))
    assert fault.in_flight == 0
    assert fault.calls < len(range(0, 300_000, 2 * BLOCK))
    monkeypatch.undo()
    check(reader, plan)


@pytest.mark.parametrize("most", [BLOCK, BLOCK + 512, 2 * BLOCK - 1])
def test_short_reads_are_continued(
    files: list[Path], reader: DirectReader, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: real(fd, [views[0][:most]], offset))
    refuse_direct(monkeypatch)  # the cut views are no multiples of a block
    check(reader, plan_reads([Extent(files[-1], 77, 299_000)]))


def test_disk_that_stops_in_the_middle_of_a_file_is_no_truncated_file(
    files: list[Path], reader: DirectReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: 0 if offset >= 16 * BLOCK else real(fd, views, offset))
    with pytest.raises(ModelError, match=r"cannot be read at byte 65536: the disk gives no more"):
        check(reader, plan_reads([Extent(files[-1], 0, 70_000)]))


def test_many_threads_share_one_reader(files: list[Path], reader: DirectReader) -> None:
    rng = random.Random(1)
    failed: list[BaseException] = []

    def work(plans: list[ReadPlan]) -> None:
        try:
            for plan in plans:
                check(reader, plan)
        except BaseException as error:  # noqa: BLE001  asserted on below
            failed.append(error)

    def some() -> list[Extent]:
        return [Extent(files[-1], begin, rng.randrange(300_000 - begin)) for begin in rng.sample(range(299_000), 4)]

    threads = [threading.Thread(target=work, args=([plan_reads(some()) for _ in range(10)],)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_file_is_opened_once_and_closed(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    real = os.open

    def record(path: Path, flags: int) -> int:
        opened.append(real(path, flags))
        return opened[-1]

    monkeypatch.setattr(os, "open", record)
    reader = DirectReader()
    for _ in range(3):
        check(reader, plan_reads([Extent(files[0], 0, 1), Extent(files[1], 5, 60)]))
    assert len(opened) == 2
    reader.close()
    reader.close()
    for fd in opened:
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            os.fstat(fd)


def test_throttle_holds(files: list[Path]) -> None:
    with closing(DirectReader(threads=4, request_bytes=4 * BLOCK, rate=3_000_000)) as reader:
        started = time.monotonic()
        count = check(reader, plan_reads([Extent(files[-1], 0, 300_000)]))
        assert time.monotonic() - started >= count / 3_000_000


@pytest.mark.parametrize("row_bytes", [2, 4096, 5000, 6])
@pytest.mark.parametrize("staging", [1, 64 * 1024, 2**24])
def test_rows_are_gathered_as_indexing_does(
    files: list[Path], reader: DirectReader, monkeypatch: pytest.MonkeyPatch, row_bytes: int, staging: int
) -> None:
    monkeypatch.setattr("flexbatch.memory.direct._STAGING", staging)
    base = 123
    count = (300_000 - base) // row_bytes
    table = torch.frombuffer(bytearray(files[-1].read_bytes()[base : base + count * row_bytes]), dtype=torch.uint8)
    rows = [count - 1, 0, count - 1, *torch.randint(count, (50,), generator=torch.Generator().manual_seed(0)).tolist()]
    found = reader.read_rows(files[-1], base, row_bytes, rows)
    assert torch.equal(found, table.view(count, row_bytes)[rows])


def test_each_row_is_read_once(files: list[Path], reader: DirectReader) -> None:
    reader.read_rows(files[-1], 0, BLOCK, [7, 3, 7, 7, 3])
    assert reader.bytes_read == 2 * BLOCK


def test_no_rows(files: list[Path], reader: DirectReader) -> None:
    assert reader.read_rows(files[-1], 0, 8, []).shape == (0, 8)


def test_row_beyond_the_end(files: list[Path], reader: DirectReader) -> None:
    with pytest.raises(ModelError, match="the file ends after"):
        reader.read_rows(files[-1], 0, BLOCK, [0, 73])
