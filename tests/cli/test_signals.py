"""A signal interrupts at once, but for the blocks that must be done whole."""

from __future__ import annotations

import os
import signal

import pytest

from flexbatch.cli.signals import Interrupted, Stop, interruptible
from flexbatch.errors import ExitCode


def interrupted(log: list[str], number: int, *, hold: bool) -> None:
    """Send this process a signal between two entries of a log, perhaps in a block that is held."""
    with interruptible() as stop:
        with stop.held():
            log.append("nothing came")
        if hold:
            with stop.held():
                os.kill(os.getpid(), number)
                log.append("the block is whole")
        else:
            os.kill(os.getpid(), number)
        log.append("too late")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, ExitCode.TERMINATED), (signal.SIGINT, ExitCode.INTERRUPTED)]
)
@pytest.mark.parametrize("hold", [True, False])
def test_a_signal_interrupts_but_for_a_held_block(number: signal.Signals, code: ExitCode, hold: bool) -> None:
    log: list[str] = []
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught:
        interrupted(log, number, hold=hold)
    assert log == ["nothing came", "the block is whole"][: 1 + hold]
    assert caught.value.exit_code is code
    assert signal.getsignal(number) == before


def fail(stop: Stop) -> None:
    with stop.held():
        os.kill(os.getpid(), signal.SIGTERM)
        raise OSError("full")


def test_an_error_in_the_block_wins_over_the_signal() -> None:
    with interruptible() as stop:
        with pytest.raises(OSError, match="full"):
            fail(stop)
        assert not stop.is_held
        with pytest.raises(Interrupted):
            stop.check()
