"""SIGINT and SIGTERM as an exception, so that a job ends through its usual clean-up. Knows nothing of jobs."""

from __future__ import annotations

import signal
import threading
import time
from _thread import start_new_thread
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from flexbatch.errors import ExitCode

_CODES = {signal.SIGINT: ExitCode.INTERRUPTED, signal.SIGTERM: ExitCode.TERMINATED}
# An exception between two instructions of these leaves a lock taken or given back twice: the next thread to need it
# waits for ever, or a RuntimeError takes the exception's place.
_LOCKING = (threading.__file__, str(Path(threading.__file__).parent / "concurrent"))
_PUT_OFF_S = (0.002, 0.004, 0.008, 0.016, 0.032)


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

    One that strikes amid Python's own locks is put off until they are left; where that is long, the thread is asleep at
    a lock, and may be woken. In another thread than the main one it changes nothing, for signals do not reach it.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    delays = list(_PUT_OFF_S)
    main = threading.get_ident()

    def again(number: int, delay: float) -> None:
        time.sleep(delay)
        if signal.getsignal(number) is handle:
            signal.pthread_kill(main, number)

    def handle(number: int, frame: FrameType | None) -> None:
        if delays and not stop.is_held and _is_locking(frame):
            start_new_thread(again, (number, delays.pop(0)))
            return
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


def _is_locking(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith(_LOCKING):
            return True
        frame = frame.f_back
    return False
