"""The journal: nothing finished is lost or done twice, whatever a crash or a full disk leaves behind."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from flexbatch.errors import DoesNotFitError, ExitCode, InputError, InternalError, UsageError
from flexbatch.jobs import durable
from flexbatch.jobs.identity import JobIdentity
from flexbatch.jobs.journal import Journal

IDENTITY = JobIdentity(
    "demo", "m1", "i1", {"max_tokens": 128, "stop": ["x"]}, {"dtype": "float32", "weight_bits": 16, "kv_bits": 16}
)
IDS = ["a", "bé", "c", "d"]
ORDER = [2, 0, 3, 1]


def line(index: int) -> str:
    return json.dumps({"id": IDS[index], "text": "ü\n" * index, "error": None if index != 3 else {"type": "t"}})


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(journal: Journal, indices: Sequence[int]) -> None:
    for index in indices:
        journal.append(index, line(index), failed=index == 3)


@pytest.fixture
def part(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl.part"


@pytest.fixture
def full(part: Path) -> bytes:
    """A journal with all rows."""
    journal = Journal(part, IDS)
    journal.begin(IDENTITY)
    write(journal, ORDER)
    journal.close()
    return part.read_bytes()


def test_rows_stand_as_in_the_output(full: bytes, part: Path) -> None:
    header, *rows = full.decode().split("\n")
    assert json.loads(header)["hash"] == IDENTITY.hash
    assert rows == [*(line(index) for index in ORDER), ""]


def test_the_output_is_in_input_order_and_the_part_goes(part: Path, full: bytes, tmp_path: Path) -> None:
    journal = Journal(part, [*IDS, None])
    journal.begin(IDENTITY)
    journal.write_output(tmp_path / "out.jsonl", {4: '{"fixed": "é"}'})
    journal.remove()
    expected = "".join(line(index) + "\n" for index in range(4)) + '{"fixed": "é"}\n'
    assert (tmp_path / "out.jsonl").read_text() == expected
    assert files(tmp_path) == ["out.jsonl"]


def test_resuming_at_every_byte(full: bytes, part: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    ends = [len(full)]
    for index in reversed(ORDER):
        ends.append(ends[-1] - len(line(index).encode()) - 1)
    for size in range(len(full) + 1):
        part.write_bytes(full[:size])
        journal = Journal(part, IDS)
        # A row counts from its closing brace on: nothing but its line end can be missing then.
        done = [index for index, end in zip(ORDER, reversed(ends[:-1]), strict=True) if size >= end - 1]
        assert [index for index in range(4) if journal.is_done(index)] == sorted(done)
        assert (journal.rows_done, journal.rows_failed) == (len(done), 3 in done)
        journal.begin(IDENTITY)
        write(journal, [index for index in ORDER if index not in done])
        journal.write_output(tmp_path / "out.jsonl", {})
        journal.close()
        assert (tmp_path / "out.jsonl").read_text() == "".join(line(index) + "\n" for index in range(4))
        assert part.read_bytes() == full


@pytest.mark.parametrize("garbage", [b"\x00" * 700, b'{"id": "c", "te', b"\xff\n\n[]\n", b'{"id": "zz"}\n'])
def test_garbage_at_the_end_is_cut_off(full: bytes, part: Path, garbage: bytes) -> None:
    part.write_bytes(full + garbage)
    journal = Journal(part, IDS)
    assert journal.rows_done == 4
    journal.begin(IDENTITY)
    journal.close()
    assert part.read_bytes() == full


def test_a_damaged_row_in_the_middle_is_done_again(full: bytes, part: Path, tmp_path: Path) -> None:
    lines = full.splitlines(keepends=True)
    lines[2] = b"\x00" * (len(lines[2]) - 1) + b"\n"
    part.write_bytes(b"".join(lines))
    journal = Journal(part, IDS)
    assert [journal.is_done(index) for index in range(4)] == [False, True, True, True]
    journal.begin(IDENTITY)
    write(journal, [0])
    journal.write_output(tmp_path / "out", {})
    journal.close()
    assert (tmp_path / "out").read_text() == "".join(line(index) + "\n" for index in range(4))


def test_the_first_of_two_copies_of_a_row_counts(full: bytes, part: Path) -> None:
    part.write_bytes(full + line(0).replace('""', '"other"').encode() + b"\n")
    journal = Journal(part, IDS)
    assert journal.rows_done == 4
    journal.close()


def test_a_row_is_never_written_twice(part: Path) -> None:
    journal = Journal(part, IDS)
    journal.begin(IDENTITY)
    write(journal, [1])
    with pytest.raises(InternalError):
        write(journal, [1])
    with pytest.raises(InternalError, match="row 0 has no result"):
        journal.write_output(part.with_name("out"), {})
    journal.close()
    assert files(part.parent) == [part.name]


def test_openai_rows_go_by_custom_id(part: Path) -> None:
    journal = Journal(part, IDS)
    journal.begin(IDENTITY)
    journal.append(1, json.dumps({"id": "a", "custom_id": "bé", "error": None}))
    journal.close()
    again = Journal(part, IDS)
    assert [again.is_done(index) for index in range(4)] == [False, True, False, False]
    again.close()


def test_a_torn_header_starts_anew_but_not_over_rows(full: bytes, part: Path) -> None:
    rows = full.split(b"\n", 1)[1]
    part.write_bytes(full[:40] + b"\n" + rows)
    with pytest.raises(InputError, match="holds 4 rows, but its header cannot be read") as caught:
        Journal(part, IDS)
    assert str(part) in str(caught.value)
    part.write_bytes(rows)
    with pytest.raises(InputError, match="holds 4 rows"):
        Journal(part, IDS)
    assert part.read_bytes() == rows
    fresh = Journal(part, IDS, fresh=True)
    assert fresh.rows_done == 0
    fresh.begin(IDENTITY)
    fresh.close()
    assert part.read_bytes() == full.split(b"\n", 1)[0] + b"\n"


def test_another_version_is_refused(full: bytes, part: Path) -> None:
    part.write_bytes(full.replace(b'"version": 1', b'"version": 99', 1))
    with pytest.raises(InputError, match="journal format 99"):
        Journal(part, IDS)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (replace(IDENTITY, model="m2"), "what differs: the model:"),
        (replace(IDENTITY, model="m2", model_name="big"), r"the model \(it was demo, now big\)"),
        (replace(IDENTITY, input="i2"), "the input file's content"),
        (replace(IDENTITY, settings={"max_tokens": 5, "stop": ["x"]}), r"max_tokens \(it was 128, now 5\)"),
        (replace(IDENTITY, settings={**IDENTITY.settings, "new": True}), r"new \(it was None, now True\)"),
        (replace(IDENTITY, resolved={**IDENTITY.resolved, "dtype": "bfloat16"}), "dtype .it was 'float32', now 'bfl"),
    ],
)
def test_another_job_is_refused_and_left_alone(full: bytes, part: Path, other: JobIdentity, said: str) -> None:
    torn = full[:-5]
    part.write_bytes(torn)
    journal = Journal(part, IDS)
    with pytest.raises(InputError, match=said) as caught:
        journal.begin(other)
    journal.close()
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code is ExitCode.USAGE
    assert part.read_bytes() == torn


def test_what_auto_became_is_kept(full: bytes, part: Path) -> None:
    asked = replace(IDENTITY, resolved={"dtype": None, "weight_bits": None, "kv_bits": 16})
    journal = Journal(part, IDS)
    journal.require_same(asked)
    assert journal.identity is not None
    assert asked.adopt(journal.identity) == IDENTITY
    journal.close()


def test_two_runs_cannot_share_a_journal(part: Path) -> None:
    first = Journal(part, IDS)
    with pytest.raises(UsageError, match="another run is writing it") as caught:
        Journal(part, IDS)
    assert str(part) in str(caught.value)
    first.begin(IDENTITY)
    first.close()
    Journal(part, IDS).close()


def test_a_journal_without_anything_goes_when_closed(part: Path) -> None:
    journal = Journal(part, IDS)
    assert part.exists()
    journal.close()
    journal.close()
    assert not part.exists()


@pytest.mark.parametrize("make", ["missing folder", "folder in its place", "long name"])
def test_an_unwritable_journal(tmp_path: Path, make: str) -> None:
    path = {
        "missing folder": tmp_path / "none" / "x",
        "folder in its place": tmp_path,
        "long name": tmp_path / ("x" * 300),
    }[make]
    with pytest.raises(UsageError, match="cannot write") as caught:
        Journal(path, IDS)
    assert str(path) in str(caught.value)


class FullDisk:
    """os.write on a disk with ``room`` bytes left, as the system does it: the last write that fits in part is short."""

    def __init__(self, room: int, code: int = errno.ENOSPC) -> None:
        self.room = room
        self.code = code
        self.write = os.write

    def __call__(self, fd: int, data: bytes) -> int:
        if self.room == 0:
            raise OSError(self.code, os.strerror(self.code))
        written = self.write(fd, data[: self.room])
        self.room -= written
        return written


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_leaves_a_valid_journal(part: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    journal = Journal(part, IDS)
    journal.begin(IDENTITY)
    write(journal, [0, 1])
    before = part.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", FullDisk(10, code))
        with pytest.raises(DoesNotFitError, match=os.strerror(code)) as caught:
            write(journal, [2])
    assert caught.value.tier == "disk"
    assert caught.value.missing == len(line(2).encode()) + 1
    assert part.read_bytes() == before
    journal.close()
    again = Journal(part, IDS)
    assert again.rows_done == 2
    again.close()


def test_a_full_disk_at_the_end_keeps_the_journal(
    full: bytes, part: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("old")
    journal = Journal(part, IDS)
    journal.begin(IDENTITY)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", FullDisk(20))
        with pytest.raises(DoesNotFitError, match=r"out\.jsonl: No space left"):
            journal.write_output(output, {})
    journal.close()
    assert files(tmp_path) == ["out.jsonl", part.name]
    assert (output.read_text(), part.read_bytes()) == ("old", full)


def test_rows_reach_the_disk_by_themselves(part: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "SYNC_SECONDS", 0.02)
    journal = Journal(part, IDS)
    journal.begin(IDENTITY)
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    write(journal, [0])
    deadline = time.monotonic() + 20
    while not synced and time.monotonic() < deadline:
        time.sleep(0.005)
    assert synced[-1] == part.stat().st_size
    journal.close()


def test_a_failed_sync_is_not_swallowed(part: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "SYNC_SECONDS", 0.02)
    journal = Journal(part, IDS)
    journal.begin(IDENTITY)
    failed: list[int] = []

    def fail(fd: int) -> None:
        failed.append(fd)
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        write(journal, [0])
        deadline = time.monotonic() + 20
        while not failed and time.monotonic() < deadline:
            time.sleep(0.005)
        with pytest.raises(UsageError, match="Input/output error"):
            journal.sync()
    with pytest.raises(UsageError, match="Input/output error"):
        write(journal, [1])
    with pytest.raises(UsageError, match="Input/output error"):
        journal.close()


def test_a_permission_error_is_about_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UsageError, match="Permission denied"):
        Journal(tmp_path / "x", IDS)
