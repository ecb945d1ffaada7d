"""Busy times of resources and kinds of Steps, and on demand every event. Knows nothing of what a Step does."""

from __future__ import annotations

import threading
from collections import defaultdict
from pathlib import Path

from flexbatch.scheduler.steps import Step
from flexbatch.scheduler.timeline import Event, write_chrome_trace


class Trace:
    """Collects events from any thread; keeps them only if ``keep``, since a long job has millions."""

    def __init__(self, *, keep: bool) -> None:
        self._keep = keep
        self._lock = threading.Lock()
        self.events: list[Event] = []
        self.busy_s: dict[str, float] = defaultdict(float)
        self.kind_s: dict[str, float] = defaultdict(float)

    def record(self, step: Step, sweep: int, start: float, end: float) -> None:
        """Note that ``step`` ran from ``start`` to ``end``, in seconds of one clock."""
        with self._lock:
            self.busy_s[step.resource] += end - start
            self.kind_s[step.kind] += end - start
            if self._keep:
                self.events.append(Event(step, sweep, start, end))

    def write(self, path: Path) -> None:
        """Write the Chrome trace format (chrome://tracing, Perfetto): one row a resource, microseconds."""
        with self._lock:
            events = list(self.events)
        write_chrome_trace(events, path)
