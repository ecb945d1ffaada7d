"""Shows how far a job is: a bar on a terminal, a line now and then elsewhere. Knows numbers, not what they are of.

The remaining time goes by tokens: a row's share is the most it can take, and is credited in full once it is finished.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn, Protocol, Self

from tqdm import tqdm

from flexbatch.cli.backend import SnapshotLike
from flexbatch.cli.console import Console
from flexbatch.units import format_duration

LINE_SECONDS = 10.0
BAR_SECONDS = 0.5


class LoadMeter:
    """Progress of loading, called by the engine with (stage, done, total)."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = time.monotonic()
        self._bar: tqdm[NoReturn] | None = None
        self._stage = ""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` parts of ``stage`` are ready."""
        if self._console.quiet:
            return
        if self._console.is_terminal:
            self._draw(stage, done, total)
        elif time.monotonic() - self._last >= LINE_SECONDS:
            self._last = time.monotonic()
            self._console.say(f"{stage}: {done} of {total}")

    def close(self) -> None:
        """Take the bar off the screen."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _draw(self, stage: str, done: int, total: int) -> None:
        if self._bar is None or stage != self._stage:
            self.close()
            self._bar, self._stage = tqdm(total=total, desc=stage, leave=False), stage
        self._bar.update(done - self._bar.n)
        if done >= total:
            self.close()


class TrainingProgress(Protocol):
    """How far a training is: steps, the loss of the last one, tokens done and in all."""

    @property
    def step(self) -> int:
        """Finished steps."""

    @property
    def steps(self) -> int:
        """All steps."""

    @property
    def loss(self) -> float:
        """The loss of the last finished step."""

    @property
    def done(self) -> int:
        """Tokens done."""

    @property
    def total(self) -> int:
        """Tokens in all."""


class TrainMeter:
    """Progress of a training, told after every batch: a bar with loss, speed and the time left, or lines."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: tqdm[NoReturn] | None = None
        self._started = self._last = time.monotonic()
        self._first: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, progress: TrainingProgress) -> None:
        """Show how far it is."""
        if self._console.quiet:
            return
        now = time.monotonic()
        if self._first is None:
            # Speed is that of this run, from the first batch on: loading lies before it, and earlier runs.
            self._first, self._started = progress.done, now
        if self._console.is_terminal:
            if self._bar is None:
                layout = "{percentage:3.0f}%|{bar}| {postfix} [{elapsed}]"
                self._bar = tqdm(total=1.0, bar_format=layout, dynamic_ncols=True, leave=False)
            self._bar.set_postfix_str(self.status(progress, now), refresh=False)
            self._bar.n = progress.done / progress.total
            self._bar.refresh()
        elif now - self._last >= LINE_SECONDS:
            self._last = now
            self._console.say(self.status(progress, now))

    def status(self, progress: TrainingProgress, now: float) -> str:
        """Steps, loss, speed and the time left in words."""
        seconds, first = now - self._started, self._first or 0
        speed = (progress.done - first) / seconds if seconds > 0 else 0.0
        left = format_duration((progress.total - progress.done) / speed) if speed > 0 else "?"
        step = f"{progress.step}/{progress.steps} steps, loss {progress.loss:.4f}"
        return f"{step}, {speed:.1f} tokens/s, {left} left"


class RunMeter:
    """Progress of generation, refreshed by a thread of its own, for rows can take minutes to finish.

    ``shares[i]`` is the most tokens that the i-th row of this run can take; ``rows`` counts all rows of the job,
    ``done`` those of earlier runs. ``more`` says what else there is to say.
    """

    def __init__(
        self,
        console: Console,
        snapshot: Callable[[], SnapshotLike],
        shares: list[int],
        *,
        rows: int,
        done: int,
        more: Callable[[], str] | None = None,
    ) -> None:
        self._more = more
        self._console = console
        self._snapshot = snapshot
        self._total = sum(shares)
        self._rows = rows
        self._done = done
        self._credited = 0
        self._taken = 0
        self._started = time.monotonic()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if not self._console.quiet:
            draw = self._draw_bar if self._console.is_terminal else self._write_lines
            self._thread = threading.Thread(target=draw, name="progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def finished(self, share: int, taken: int) -> None:
        """Count one more row: it could have taken ``share`` tokens and took ``taken``."""
        self._done += 1
        self._credited += share
        self._taken += taken

    def fraction(self) -> float:
        """How much of the run is done, 0 to 1."""
        now = self._snapshot()
        running = max(0, now.prompt_tokens + now.completion_tokens - self._taken)
        return min(1.0, (self._credited + running) / max(1, self._total))

    def status(self) -> str:
        """Rows, tokens and speed in words."""
        tokens = self._snapshot().completion_tokens
        speed = tokens / max(time.monotonic() - self._started, 1e-9)
        more = "" if self._more is None else self._more()
        return f"{self._done}/{self._rows} rows, {tokens} tokens, {speed:.1f} tokens/s{more}"

    def remaining(self) -> str:
        """The time left in words, ``?`` before anything is known."""
        fraction = self.fraction()
        if fraction <= 0:
            return "?"
        return format_duration((time.monotonic() - self._started) * (1 - fraction) / fraction)

    def _write_lines(self) -> None:
        while not self._stop.wait(LINE_SECONDS):
            self._console.say(f"{self.status()}, {self.remaining()} left")

    def _draw_bar(self) -> None:
        layout = "{percentage:3.0f}%|{bar}| {postfix} [{elapsed}]"
        with tqdm(total=1.0, bar_format=layout, dynamic_ncols=True, leave=False) as bar:
            while True:
                bar.set_postfix_str(f"{self.status()}, {self.remaining()} left", refresh=False)
                bar.n = self.fraction()
                bar.refresh()
                if self._stop.wait(BAR_SECONDS):
                    return
