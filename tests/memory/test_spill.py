"""The spill file: what is written is read back, full and failing disks are told, nothing is left behind."""

from __future__ import annotations

import errno
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch

from flexbatch.errors import DoesNotFitError, ExitCode, UsageError
from flexbatch.memory.aligned import BLOCK, aligned_buffer
from flexbatch.memory.spill import SpillFile
from tests.memory.faults import Faulty, record_dropped, refuse_direct, refuse_direct_transfers


def random_pages(count: int, blocks: int, seed: int = 0) -> torch.Tensor:
    """[count, blocks * BLOCK], every page starting at a block."""
    pages = aligned_buffer(count * blocks * BLOCK).view(count, -1)
    pages.copy_(torch.randint(256, pages.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)))
    return pages


def refuse_nameless(monkeypatch: pytest.MonkeyPatch, code: int = errno.EOPNOTSUPP) -> None:
    real = os.open

    def refuse(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(code, os.strerror(code))
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", refuse)


SYSTEMS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "as it is": lambda _: None,
    "no direct mode": refuse_direct,
    "no direct reads": lambda patch: refuse_direct_transfers(patch, "preadv"),
    "no direct writes": lambda patch: refuse_direct_transfers(patch, "pwritev"),
    "no nameless files": refuse_nameless,
    "old kernel": lambda patch: refuse_nameless(patch, errno.EISDIR),
}


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("request_bytes", [BLOCK, 2 * BLOCK, 2**22])
def test_reads_what_was_last_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str, request_bytes: int
) -> None:
    SYSTEMS[system](monkeypatch)
    rng = random.Random(0)
    truth = aligned_buffer(64 * BLOCK)
    with closing(SpillFile(tmp_path, 64 * BLOCK - 1, request_bytes=request_bytes)) as spill:
        assert list(tmp_path.iterdir()) == []
        moved = 0
        for turn in range(6):
            pages = random_pages(4, 3, seed=turn)
            places = [place * 3 * BLOCK for place in rng.sample(range(21), 4)]
            spill.write_many(list(zip(places, pages, strict=True)))
            moved += pages.nbytes
            for place, page in zip(places, pages, strict=True):
                truth[place : place + page.nbytes] = page
        assert spill.bytes_written == moved
        back = aligned_buffer(64 * BLOCK).fill_(0xA5)
        spill.read(0, back)  # zeros where nothing was written
        assert torch.equal(back, truth)
        some = aligned_buffer(4 * BLOCK).view(4, BLOCK)
        order = rng.sample(range(64), 4)
        spill.read_many([(index * BLOCK, row) for index, row in zip(order, some, strict=True)])
        assert torch.equal(some, truth.view(64, BLOCK)[order])
        assert spill.bytes_read == 68 * BLOCK
    assert list(tmp_path.iterdir()) == []


def test_takes_tensors_of_any_type(tmp_path: Path) -> None:
    source = aligned_buffer(BLOCK).view(torch.bfloat16).view(16, -1)
    source.normal_()
    target = aligned_buffer(BLOCK).view(torch.bfloat16).view(16, -1)
    with closing(SpillFile(tmp_path, BLOCK)) as spill:
        spill.write(0, source)
        spill.read(0, target)
    assert torch.equal(source, target)


@pytest.mark.parametrize(
    ("offset", "nbytes"), [(1, BLOCK), (0, 100), (BLOCK, 2 * BLOCK), (2 * BLOCK, BLOCK), (-BLOCK, BLOCK)]
)
def test_parts_of_blocks_and_places_outside_are_refused(tmp_path: Path, offset: int, nbytes: int) -> None:
    with closing(SpillFile(tmp_path, 2 * BLOCK)) as spill, pytest.raises(AssertionError):
        spill.write(offset, aligned_buffer(nbytes))


def test_nothing_to_hold_is_fine(tmp_path: Path) -> None:
    spill = SpillFile(tmp_path, 0)
    spill.write_many([])
    spill.close()
    spill.close()


def test_space_is_reserved_before_the_first_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reserved: list[int] = []
    real = os.posix_fallocate

    def reserve(fd: int, offset: int, length: int) -> None:
        real(fd, offset, length)
        reserved.append(os.fstat(fd).st_blocks * 512)

    monkeypatch.setattr(os, "posix_fallocate", reserve)
    SpillFile(tmp_path, 2**20).close()
    assert reserved[0] >= 2**20


def test_buffered_writes_do_not_stay_in_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_direct(monkeypatch)
    dropped = record_dropped(monkeypatch)
    with closing(SpillFile(tmp_path, 2 * BLOCK)) as spill:
        spill.write(0, aligned_buffer(BLOCK))
        assert dropped == [(0, 0)]


def test_disk_without_room_is_found_at_the_start(tmp_path: Path) -> None:
    disk = os.statvfs(tmp_path)
    free = disk.f_bavail * disk.f_frsize
    with pytest.raises(DoesNotFitError, match=r"does not fit into .*: No space left on device: .*--disk-dir") as found:
        SpillFile(tmp_path, free + 2**40)
    assert found.value.exit_code == ExitCode.DOES_NOT_FIT
    assert found.value.tier == "disk"
    assert 2**39 < found.value.missing < 2**41  # others write to that disk, too
    assert "--disk-dir" in found.value.remedy
    assert "--disk-memory" in found.value.remedy
    assert str(found.value.missing) in str(found.value)
    assert list(tmp_path.iterdir()) == []


def test_limit_on_file_sizes_is_found_at_the_start(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**22, hard))
    try:
        with pytest.raises(DoesNotFitError, match="File too large") as found:
            SpillFile(tmp_path, 2**23)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert found.value.missing > 0


def test_reservation_that_fails_leaves_no_open_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(DoesNotFitError):
        SpillFile(tmp_path, BLOCK)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_folder_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gone: the spill file failed: No such file or directory: .*--disk-dir"):
        SpillFile(tmp_path / "gone", BLOCK)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_disk_that_fills_up_during_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    pages = random_pages(50, 1)
    with closing(SpillFile(tmp_path, 50 * BLOCK, request_bytes=BLOCK)) as spill:
        fault = Faulty(monkeypatch, "pwritev", at=3 * BLOCK, code=code)
        with pytest.raises(DoesNotFitError) as found:
            spill.write_many([(index * BLOCK, page) for index, page in enumerate(pages)])
    assert found.value.missing == BLOCK
    assert fault.in_flight == 0
    assert fault.calls < 50


@pytest.mark.parametrize("name", ["preadv", "pwritev"])
def test_disk_that_fails_during_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with closing(SpillFile(tmp_path, 8 * BLOCK)) as spill:
        Faulty(monkeypatch, name, at=4 * BLOCK)
        move = spill.read if name == "preadv" else spill.write
        with pytest.raises(UsageError, match=r"failed at byte 16384: Input/output error: name another disk"):
            move(4 * BLOCK, aligned_buffer(BLOCK))


def test_short_reads_and_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.preadv, os.pwritev
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: read(fd, [views[0][:BLOCK]], offset))
    monkeypatch.setattr(os, "pwritev", lambda fd, views, offset: write(fd, [views[0][: 2 * BLOCK]], offset))
    pages = random_pages(4, 5)
    back = aligned_buffer(pages.nbytes).view_as(pages)
    with closing(SpillFile(tmp_path, pages.nbytes)) as spill:
        spill.write_many([(index * 5 * BLOCK, page) for index, page in enumerate(pages)])
        spill.read_many([(index * 5 * BLOCK, page) for index, page in enumerate(back)])
    assert torch.equal(back, pages)


def test_neighbours_in_the_file_are_one_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = random_pages(12, 2)
    back = aligned_buffer(pages.nbytes).view_as(pages)
    places = [index * 2 * BLOCK for index in (5, 0, 3, 1, 4, 2, 9, 10, 11, 7, 6, 8)]  # all, in any order
    with closing(SpillFile(tmp_path, pages.nbytes, request_bytes=8 * BLOCK)) as spill:
        writes, reads = Faulty(monkeypatch, "pwritev"), Faulty(monkeypatch, "preadv")
        spill.write_many(list(zip(places, pages, strict=True)))
        spill.read_many(list(zip(places, back, strict=True)))
    assert (writes.calls, reads.calls) == (3, 3)
    assert torch.equal(back, pages)


@pytest.mark.parametrize(("name", "count"), [("preadv", 0), ("pwritev", 100)])
def test_disk_that_moves_no_whole_block_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, count: int
) -> None:
    with closing(SpillFile(tmp_path, BLOCK)) as spill:
        monkeypatch.setattr(os, name, lambda *_: count)
        move = spill.read if name == "preadv" else spill.write
        with pytest.raises(UsageError, match=r"the disk (gave|took)"):
            move(0, aligned_buffer(BLOCK))


def test_throttles_hold(tmp_path: Path) -> None:
    pages = random_pages(40, 1)
    parts = [(index * BLOCK, page) for index, page in enumerate(pages)]
    with closing(
        SpillFile(tmp_path, 40 * BLOCK, request_bytes=2 * BLOCK, read_rate=2_000_000, write_rate=1_000_000)
    ) as spill:
        started = time.monotonic()
        spill.write_many(parts)
        written = time.monotonic()
        spill.read_many(parts)
        assert written - started >= pages.nbytes / 1_000_000
        assert time.monotonic() - written >= pages.nbytes / 2_000_000


KILLED = """
import os, sys, time
from pathlib import Path
from flexbatch.memory.aligned import aligned_buffer
from flexbatch.memory.spill import SpillFile

def nameless_only(path, flags, mode=0o777, real=os.open):
    if flags & os.O_TMPFILE == os.O_TMPFILE:
        raise OSError(95, "Operation not supported")
    return real(path, flags, mode)

first = SpillFile(Path(sys.argv[1]), 2**20)
os.open = nameless_only
second = SpillFile(Path(sys.argv[1]), 2**20)
for spill in (first, second):
    spill.write(0, aligned_buffer(2**20).fill_(1))
print("ready", flush=True)
time.sleep(600)
"""


def test_nothing_is_left_after_sigkill(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        finally:
            process.kill()
    assert list(tmp_path.iterdir()) == []


def test_name_that_a_killed_run_left_is_taken_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill can fall between making a file and taking its name away, where the file system has no nameless ones."""
    refuse_nameless(monkeypatch)
    real = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    SpillFile(tmp_path, BLOCK).close()
    assert len(list(tmp_path.iterdir())) == 1
    (tmp_path / "mine.txt").touch()
    monkeypatch.setattr(Path, "unlink", real)
    SpillFile(tmp_path, BLOCK).close()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
