"""A disk that fails, fills up or ends early in the middle of an out-of-core run, and runs that are stopped there."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flexbatch.cli.main import main
from flexbatch.memory import blockio
from tests.acceptance.program import Program, story_rows
from tests.strike import Strike

SPILLING = ("--weights", "0,0,100", "--kv", "0,0,100", "--hidden", "0,0,100", "--max-sequences", "3", "--quiet")


class Job:
    """Eight rows whose weights, KV and hidden states all pass through the disk, run in this process."""

    def __init__(self, folder: Path) -> None:
        self.program = Program(folder / "job", story_rows(8, 8), SPILLING)
        self.spills = folder / "spills"
        self.spills.mkdir()

    def run(self, *options: str) -> int:
        return main([*self.program.words(*options), "--disk-dir", str(self.spills)])

    def rows_kept(self) -> int:
        return len(self.program.part.read_bytes().splitlines()) - 1


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Job(tmp_path)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    job = Job(tmp_path_factory.mktemp("expected"))
    assert job.run("--overwrite") == 0
    return job.program.output.read_bytes()


def failing(call: Callable[..., int], when: Callable[[], bool], fault: Callable[[int], int]) -> Callable[..., int]:
    def wrapped(*arguments: Any) -> int:
        done = call(*arguments)
        return fault(done) if when() else done

    return wrapped


def broken_disk(_: int) -> int:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def full_disk(_: int) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_more(_: int) -> int:
    return 0


@pytest.mark.parametrize(
    ("call", "fault", "code", "words"),
    [
        ("preadv", broken_disk, 2, "Input/output error"),
        ("preadv", no_more, 2, ""),
        ("pwritev", full_disk, 4, "--disk-dir"),
        ("pwritev", broken_disk, 2, "--disk-dir"),
    ],
)
def test_a_fault_in_the_middle(
    call: str,
    fault: Callable[[int], int],
    code: int,
    words: str,
    job: Job,
    expected: bytes,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def some_rows_are_kept() -> bool:
        return job.program.part.exists() and job.rows_kept() >= 3

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(getattr(os, call), some_rows_are_kept, fault))
        assert job.run() == code
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert words in error
    assert "Traceback" not in error
    assert job.rows_kept() >= 3
    assert not job.program.output.exists()
    assert list(job.spills.iterdir()) == []
    assert job.run() == 0
    assert job.program.output.read_bytes() == expected


@pytest.mark.parametrize(
    ("stop", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_a_stop_in_the_middle(stop: signal.Signals, code: int, job: Job, expected: bytes) -> None:
    process = job.program.start("--disk-dir", str(job.spills))
    deadline = time.monotonic() + 120
    while not (job.program.part.exists() and job.rows_kept() >= 1) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(stop)
    ended = process.wait(60)
    assert list(job.spills.iterdir()) == []
    if ended != 0:  # the run may have been over already
        assert ended == code
        assert job.rows_kept() >= 1
        assert job.run() == 0
    assert job.program.output.read_bytes() == expected


@pytest.mark.parametrize("at", [1, 5, 12, 20, 30, 45, 60, 90])
def test_a_stop_while_rows_are_read(at: int, job: Job, expected: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    def some_row_is_kept() -> bool:
        return job.program.part.exists() and job.rows_kept() >= 1

    with Strike(at, (blockio.__file__,), some_row_is_kept) as strike:
        assert job.run() == 130
    assert strike.left <= 0
    assert "Traceback" not in capsys.readouterr().err
    assert list(job.spills.iterdir()) == []
    assert job.run() == 0
    assert job.program.output.read_bytes() == expected
