"""The losses of a training as a picture, where matplotlib is installed. Knows no training."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path

from flexbatch.jobs.durable import replace_file

_WINDOW = 20  # the smooth line is a mean over about a twentieth of all steps, at least this many of a long training


def draw_losses(path: Path, losses: Sequence[float], title: str) -> bool:
    """Write a PNG of the losses over the steps; return False, and write nothing, without matplotlib.

    Raises DoesNotFitError on a full disk, UsageError where the file cannot be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure  # no pyplot: that would look for a display

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color="tab:blue", alpha=0.35 if len(losses) > _WINDOW else 1.0, linewidth=1)
    if len(losses) > _WINDOW:
        axes.plot(steps, smoothed(losses, max(_WINDOW // 4, len(losses) // 20)), color="tab:blue", linewidth=1.8)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (mean over tokens, nats)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    data = buffer.getvalue()
    replace_file(path, [data], len(data))
    return True


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of each value and those before it, ``window`` in all."""
    means: list[float] = []
    total = 0.0
    for index, value in enumerate(values):
        total += value - (values[index - window] if index >= window else 0.0)
        means.append(total / min(index + 1, window))
    return means
