"""When each Step ran, and the Chrome trace file of that. The clock may be a real one or a simulator's; pure data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexbatch.scheduler.steps import Step

RESOURCES = ("gpu", "cpu", "h2d", "d2h", "disk_read", "disk_write")
"""In the order of a trace's rows."""


@dataclass(frozen=True, slots=True)
class Event:
    """One Step from ``start`` to ``end``, in seconds of any one clock."""

    step: Step
    sweep: int
    start: float
    end: float


def chrome_trace(events: Sequence[Event]) -> dict[str, Any]:
    """Return ``events`` in Chrome's trace format: one row a resource, microseconds since the first one began."""
    origin = min((event.start for event in events), default=0.0)
    present = {event.step.resource for event in events}
    rows: list[dict[str, Any]] = []
    for row, resource in enumerate(RESOURCES):
        if resource in present:
            rows.append({"ph": "M", "name": "thread_name", "pid": 1, "tid": row, "args": {"name": resource}})
            rows.append({"ph": "M", "name": "thread_sort_index", "pid": 1, "tid": row, "args": {"sort_index": row}})
    rows += [
        {
            "ph": "X",
            "name": f"{event.step.kind} {event.step.group}",
            "cat": event.step.kind,
            "pid": 1,
            "tid": RESOURCES.index(event.step.resource),
            "ts": (event.start - origin) * 1e6,
            "dur": (event.end - event.start) * 1e6,
            "args": {"sweep": event.sweep, "micro_batch": event.step.batch, "tokens": event.step.tokens},
        }
        for event in events
    ]
    return {"traceEvents": rows, "displayTimeUnit": "ms"}


def write_chrome_trace(events: Sequence[Event], path: Path) -> None:
    """Write ``events`` for chrome://tracing, Perfetto and ``flexbatch.runtime.picture``."""
    path.write_text(json.dumps(chrome_trace(events)), encoding="utf-8")
