"""A signal interrupts at once, but for the blocks that must be done whole."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from flexbatch.cli.signals import Interrupted, Stop, interruptible
from flexbatch.errors import ExitCode
from tests.strike import Strike


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


def wait_for_a_thread(changed: threading.Condition, pool: ThreadPoolExecutor) -> None:
    """What may not be interrupted just anywhere: a thread is started, and waited for in three ways."""
    done: list[int] = []

    def work() -> None:
        with changed:
            done.append(1)
            changed.notify_all()

    thread = threading.Thread(target=work)
    thread.start()
    pool.submit(work).result()
    with changed:
        changed.wait_for(lambda: len(done) == 2)
    thread.join()


def struck(strike: Strike) -> None:
    changed = threading.Condition(threading.Lock())
    with ThreadPoolExecutor(1) as pool:
        try:
            with interruptible():
                with strike:
                    wait_for_a_thread(changed, pool)
                if strike.left <= 0:
                    time.sleep(10)
        finally:
            assert changed.acquire(timeout=10), "the lock was left taken"


def test_a_signal_amid_locks_leaves_none_of_them_taken() -> None:
    at = 0
    while True:
        at += 1
        strike = Strike(at)
        try:
            struck(strike)
        except Interrupted:
            continue
        break
    assert at > 60
    assert strike.left > 0, "a signal was lost"
    assert sys.exc_info() == (None, None, None), "a strike left an exception half handled"
