"""A signal at a chosen instruction."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import thread
from types import FrameType
from typing import Any, Self

LOCKING = (threading.__file__, thread.__file__)
"""Where Python's own code takes locks and gives them back."""


class Strike:
    """Within the block, SIGINT comes before the ``at``-th instruction (from 1) that this thread does in ``files``.

    ``when``: from then on instructions count. ``left``: how many were still to come; 0 or less once it has come.
    """

    def __init__(self, at: int, files: Sequence[str] = LOCKING, when: Callable[[], bool] = lambda: True) -> None:
        self.left = at
        self._files = files
        self._when = when

    def __enter__(self) -> Self:
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        if frame.f_code.co_filename not in self._files or not self._when():
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            self.left -= 1
            if self.left == 0:
                signal.raise_signal(signal.SIGINT)
        return self._trace
