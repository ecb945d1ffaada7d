"""The output's place, and the record of finished jobs."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from flexbatch.errors import UsageError
from flexbatch.jobs.output import CompletedJob, check_distinct, check_place, part_path, recall, remember
from tests.jobs.test_journal import IDENTITY


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "out.jsonl"
    path.write_text("rows\n")
    return path


def test_the_journal_lies_beside_the_output() -> None:
    assert part_path(Path("a/b.jsonl")) == Path("a/b.jsonl.part")


def test_a_finished_job_is_remembered_by_its_place(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert recall(output) is None
    remember(output, IDENTITY, 4, 1)
    assert recall(output) == CompletedJob(IDENTITY, 4, 1)
    monkeypatch.chdir(output.parent)
    assert recall(Path(output.name)) == CompletedJob(IDENTITY, 4, 1)
    assert (output.parent / "cache" / "flexbatch" / "jobs").is_dir()


def test_a_changed_output_is_not_remembered(output: Path) -> None:
    remember(output, IDENTITY, 4, 0)
    stat = output.stat()
    os.utime(output, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert recall(output) is None
    remember(output, IDENTITY, 4, 0)
    with output.open("a") as stream:
        stream.write("more\n")
    os.utime(output, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert recall(output) is None


def test_a_record_that_was_tampered_with_is_ignored(output: Path) -> None:
    remember(output, IDENTITY, 4, 0)
    (record,) = (output.parent / "cache" / "flexbatch" / "jobs").iterdir()
    whole = record.read_text()
    for broken in ("", whole[:-9], "[]", whole.replace("m1", "m2"), whole.replace('"rows": 4', '"rows": []')):
        record.write_text(broken)
        assert recall(output) is None
    record.write_text(whole)
    assert recall(output) is not None


def test_a_cache_that_cannot_be_written_is_let_be(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (output.parent / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(output.parent / "file"))
    remember(output, replace(IDENTITY), 4, 0)
    assert recall(output) is None


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for place, reason in (
        (tmp_path, "is a folder"),
        (tmp_path / "none" / "out", f"there is no folder {tmp_path / 'none'}"),
        (fifo, "is not a regular file"),
    ):
        with pytest.raises(UsageError, match=reason) as caught:
            check_place("--stats", place)
        assert str(caught.value).startswith(f"--stats {place}: ")
    check_place("--output", tmp_path / "new")


def test_a_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(UsageError, match="cannot be written"):
        check_place("--output", tmp_path / "new")


def test_one_file_for_two_purposes(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "in")
    with pytest.raises(UsageError, match=r"^--output .*link: is the same file as --input"):
        check_distinct({"--input": tmp_path / "in", "--output": link})
    check_distinct({"--input": tmp_path / "in", "--output": tmp_path / "out"})
