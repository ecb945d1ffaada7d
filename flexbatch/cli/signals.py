"""SIGINT and SIGTERM as an exception, so that a job ends through its usual clean-up. Knows nothing of jobs."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from flexbatch.errors import ExitCode

_CODES = {signal.SIGINT: ExitCode.INTERRUPTED, signal.SIGTERM: ExitCode.TERMINATED}


class Interrupted(BaseException):
    """The user asked the program to stop. No ``except Exception`` on the way may hold it up."""

    def __init__(self, exit_code: ExitCode) -> None:
        super().__init__(exit_code.name.lower())
        self.exit_code = exit_code


class Stop:
    """Whether a signal came; ``check`` raises it where an exception out of the handler got lost (in a finalizer)."""

    def __init__(self) -> None:
        self.exit_code: ExitCode | None = None
        self.is_held = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within the block a signal waits: what stands there is done whole or not at all."""
        self.is_held = True
        try:
            yield
        finally:
            self.is_held = False
        self.check()

    def check(self) -> None:
        """Raise Interrupted if a signal came."""
        if self.exit_code is not None:
            raise Interrupted(self.exit_code)


@contextmanager
def interruptible() -> Iterator[Stop]:
    """Within the block the first signal raises Interrupted in the main thread; a second one ends the process at once.

    In another thread than the main one it changes nothing, for signals do not reach it.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        stop.exit_code = _CODES[signal.Signals(number)]
        for each in _CODES:
            signal.signal(each, signal.SIG_DFL)
        if not stop.is_held:
            raise Interrupted(stop.exit_code)

    previous = {number: signal.signal(number, handle) for number in _CODES}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
