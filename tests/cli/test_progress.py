"""What a person sees while a job runs: a bar on a terminal, lines elsewhere, nothing with --quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import pytest

from flexbatch.cli import progress
from flexbatch.cli.console import Console
from flexbatch.cli.progress import LoadMeter, RunMeter
from tests.cli.fakes import Progress


class Terminal(Console):
    is_terminal = True


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_remaining_time_goes_by_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    snapshot = Progress()
    meter = RunMeter(Console(quiet=True), lambda: snapshot, [30, 70], rows=12, done=10)
    assert (meter.fraction(), meter.remaining()) == (0.0, "?")
    # 25 tokens of 100 after 10 seconds: 30 more to go.
    snapshot.prompt_tokens, snapshot.completion_tokens = 20, 5
    now[0] = 110.0
    assert (meter.fraction(), meter.remaining()) == (0.25, "30.0 s")
    assert meter.status() == "10/12 rows, 5 tokens, 0.5 tokens/s"
    # The first row ends early, after 20 of its 30 tokens: its whole share counts, and the 5 of the other one.
    meter.finished(30, 20)
    assert meter.fraction() == pytest.approx(0.35)
    assert meter.status().startswith("11/12 rows")


def test_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.01)
    seen: list[str] = []
    console = Console()
    monkeypatch.setattr(console, "say", seen.append)
    with RunMeter(console, lambda: Progress(2, 3), [10], rows=1, done=0):
        wait_for(lambda: bool(seen))
    assert seen[0].startswith("0/1 rows, 3 tokens, ")
    assert seen[0].endswith(" left")


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "BAR_SECONDS", 0.01)
    with RunMeter(Terminal(), lambda: Progress(2, 3), [10], rows=4, done=1):
        time.sleep(0.05)
    err = capsys.readouterr().err
    assert " 50%|" in err
    assert "1/4 rows, 3 tokens" in err


def test_loading(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for console in (Console(quiet=True), Console()):
        meter = LoadMeter(console)
        meter("loading weights", 1, 2)
        meter.close()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    LoadMeter(Console())("loading weights", 1, 2)
    assert capsys.readouterr().err == "flexbatch: loading weights: 1 of 2\n"
    meter = LoadMeter(Terminal())
    meter("loading weights", 1, 2)
    meter("loading weights", 2, 2)
    meter.close()
    assert "loading weights:   0%" in capsys.readouterr().err


def test_without_stderr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert not Console().is_terminal
    Console().say("nobody hears")
    assert capsys.readouterr().out == ""
