"""A signal at a chosen instruction of the code that holds Python's locks."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import thread
from types import FrameType
from typing import Any, Self

_LOCKING = (threading.__file__, thread.__file__)


class Strike:
    """Within the block, SIGINT comes before the ``at``-th instruction (from 1) that this thread does amid locks.

    ``when``: from then on instructions count; ``name``: those of the function of that name only. ``left``: how many
    were still to come; 0 or less once it has come.
    """

    def __init__(self, at: int, when: Callable[[], bool] = lambda: True, name: str | None = None) -> None:
        self.left = at
        self._when = when
        self._name = name

    def __enter__(self) -> Self:
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        code = frame.f_code
        if code.co_filename not in _LOCKING or self._name not in (None, code.co_name) or not self._when():
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            self.left -= 1
            if self.left == 0:
                signal.raise_signal(signal.SIGINT)
        return self._trace
