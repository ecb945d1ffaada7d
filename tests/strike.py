"""A signal at a chosen place of a program."""

from __future__ import annotations

import dis
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import thread
from types import FrameType
from typing import Any, Self

LOCKING = (threading.__file__, thread.__file__)
"""Where Python's own code takes locks and gives them back."""
# After these Python looks whether a signal came; an exception at others it need not survive.
_LOOKS = frozenset({"CALL", "CALL_KW", "CALL_FUNCTION_EX", "JUMP_BACKWARD", "RESUME"})


class Strike:
    """Within the block, SIGINT comes the ``at``-th time (from 1) that this thread could meet a signal in ``files``.

    ``when``: from then on places count. ``left``: how many were still to come; 0 or less once it has come.
    """

    def __init__(self, at: int, files: Sequence[str] = LOCKING, when: Callable[[], bool] = lambda: True) -> None:
        self.left = at
        self._files = files
        self._when = when
        self._before: dict[FrameType, str] = {}

    def __enter__(self) -> Self:
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)
        self._before.clear()

    def _trace(self, frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        if frame.f_code.co_filename not in self._files or not self._when():
            return None
        frame.f_trace_opcodes = True
        if event == "return":
            self._before.pop(frame, None)
        elif event == "opcode":
            before = self._before.get(frame)
            self._before[frame] = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            if before in _LOOKS:
                self.left -= 1
                if self.left == 0:
                    signal.raise_signal(signal.SIGINT)
        return self._trace
