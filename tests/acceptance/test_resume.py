"""A job that is killed again and again ends as if nothing had happened, and computes no finished row a second time."""

from __future__ import annotations

import json
import random
import re
import secrets
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.acceptance.program import PATIENCE, Program, story_rows

KILLS = 20
ROWS = 30
# Few sequences at a time, so that rows finish one after the other and the job has many different middles.
OPTIONS = ("--max-sequences", "3")
POLL = 0.0005
Moment = Callable[[float], Callable[[], bool]]
"""Called with a haste of 1 or less when the program starts; returns the test that says whether its moment has come."""


class Whole:
    """An uninterrupted run: its output's bytes, its seconds, and how large its journal became."""

    def __init__(self, program: Program) -> None:
        started = time.monotonic()
        process = program.start("--stats", str(program.folder / "stats.json"))
        self.journal_size = 0
        while process.poll() is None:
            self.journal_size = max(self.journal_size, size(program.part))
            time.sleep(0.01)
        self.seconds = time.monotonic() - started
        assert process.returncode == 0, program.said
        self.output = program.output.read_bytes()
        self.stats = json.loads((program.folder / "stats.json").read_bytes())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(Program(tmp_path_factory.mktemp("whole") / "job", story_rows(ROWS, 36), OPTIONS))


def size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def wait_for(process: subprocess.Popen[bytes], moment: Callable[[], bool]) -> None:
    """Return when the moment has come, or the process has ended before it."""
    give_up = time.monotonic() + PATIENCE
    while process.poll() is None and not moment():
        assert time.monotonic() < give_up, "the program hangs"
        time.sleep(POLL)


def moments(rng: random.Random, whole: Whole, program: Program) -> list[Moment]:
    """Return the moment of each kill, in random order but for the last: when the output is being written."""

    def after(seconds: float) -> Moment:
        def begin(haste: float) -> Callable[[], bool]:
            end = time.monotonic() + haste * seconds
            return lambda: time.monotonic() >= end

        return begin

    def grown(share: float) -> Moment:
        # The journal grew by so much of what was missing: a row has just been written.
        def begin(haste: float) -> Callable[[], bool]:
            found = size(program.part)
            target = found + max(1, int(haste * share * (whole.journal_size - found)))
            return lambda: size(program.part) >= target

        return begin

    def replacing(haste: float) -> Callable[[], bool]:
        before = {path.name for path in program.folder.iterdir()} | {program.part.name}
        return lambda: any(path.name not in before for path in program.folder.iterdir())

    # Every stretch of the run has its kill: the first ones hit importing and loading. The end has one of its own.
    timed = [after((index + rng.random()) / 14 * 0.85 * whole.seconds) for index in range(14)]
    kills = [*timed, *(grown(rng.uniform(0, 0.4)) for _ in range(KILLS - 15))]
    rng.shuffle(kills)
    return [*kills, replacing]


def test_killed_at_20_random_moments_in_turn(whole: Whole, tmp_path: Path) -> None:
    seed = secrets.randbelow(10**9)
    print(f"seed {seed}")
    rng = random.Random(seed)
    program = Program(tmp_path / "job", story_rows(ROWS, 36), OPTIONS)
    planned = moments(rng, whole, program)
    before: list[bytes] = []
    killed = in_the_middle = 0
    haste = 1.0
    while killed < KILLS:
        has_come = planned[killed](haste)
        process = program.start()
        wait_for(process, has_come)
        process.kill()
        code = process.wait(PATIENCE)
        check_resumed(program, before)
        if code == 0:  # it was done before its moment came: a new job is killed somewhat earlier
            print(f"done before kill {killed + 1}")
            haste *= 0.8
        else:
            assert code == -signal.SIGKILL, program.said
            killed += 1
            haste = 1.0
        if not program.part.exists() and program.output.exists():  # so late a kill finds a complete job
            assert program.finish() == 0, program.said
            assert "is already complete" in program.said
            assert program.output.read_bytes() == whole.output
            program.output.unlink()
            before = []
            continue
        lines = program.journalled()
        print(f"kill {killed}: {max(0, len(lines) - 1)} rows journalled")
        check_journal(lines, before)
        in_the_middle += 0 < len(lines) - 1 < ROWS
        before = lines
        # What a power cut can do beyond a kill: tear the last line, which is on the disk before there is an output.
        if len(lines) > 1 and not program.output.exists() and rng.random() < 0.3:
            torn = rng.randrange(2, len(lines[-1]))  # its end of line alone would be no loss
            program.part.write_bytes(b"".join(lines)[:-torn])
            before = lines[:-1]
    assert in_the_middle >= 3, "hardly any kill hit a job in its middle"

    assert program.finish("--stats", str(tmp_path / "stats.json")) == 0, program.said
    check_resumed(program, before)
    assert program.output.read_bytes() == whole.output
    assert sorted(path.name for path in program.folder.iterdir()) == ["out.jsonl", "rows.jsonl"]
    # What the last run computed is what was missing, counted in tokens.
    rows = [json.loads(line) for line in whole.output.splitlines()]
    done = {json.loads(line)["id"] for line in before[1:]}
    stats = json.loads((tmp_path / "stats.json").read_bytes())
    assert stats["resumed"] == len(done)
    assert stats["completion_tokens"] == sum(row["completion_tokens"] for row in rows if row["id"] not in done)


def check_journal(lines: list[bytes], before: list[bytes]) -> None:
    """What stood in the journal is still there, unchanged; no row is there twice."""
    assert lines[: len(before)] == before
    ids = [json.loads(line)["id"] for line in lines[1:]]
    assert len(ids) == len(set(ids))


def check_resumed(program: Program, before: list[bytes]) -> None:
    """If the run came so far as to say where it goes on, it found every row of the journal."""
    said = re.search(r"going on from \S+: (\d+) of (\d+) rows are done", program.said)
    if said:
        assert (int(said[1]), int(said[2])) == (len(before) - 1, ROWS)


def test_the_printed_command_goes_on_after_sigterm_and_after_sigint(whole: Whole, tmp_path: Path) -> None:
    program = Program(tmp_path / "job", story_rows(ROWS, 36), OPTIONS)
    process = program.start()
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        found = size(program.part)
        wait_for(process, lambda found=found: size(program.part) > found + 0.2 * whole.journal_size)  # type: ignore[misc]
        process.send_signal(number)
        assert process.wait(PATIENCE) == code, program.said
        assert not program.output.exists()
        lines = program.journalled()
        assert 1 < len(lines) <= ROWS
        kept, command = program.said.splitlines()[-2:]
        assert f"interrupted; {len(lines) - 1} of {ROWS} rows are kept in {program.part}; continue with:" in kept
        with program.errors.open("wb") as errors:
            process = subprocess.Popen(shlex.split(command), stderr=errors, env=program.environment())
    assert process.wait(PATIENCE) == 0, program.said
    check_resumed(program, lines)
    assert program.output.read_bytes() == whole.output
    assert not program.part.exists()
