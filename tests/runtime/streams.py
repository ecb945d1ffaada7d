"""Synthetic Steps, and a device with streams: what CUDA promises, played by threads, for tests of the executor."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, cast

from flexbatch.runtime.device import Completion, SimDevice
from flexbatch.scheduler.steps import Resource, Step

RESOURCES: tuple[Resource, ...] = ("gpu", "cpu", "h2d", "d2h", "disk_read", "disk_write")


def make_step(number: int, resource: Resource, *after: int, kind: str = "work") -> Step:
    return Step(
        id=number, kind=cast("Any", kind), resource=resource, group=number, batch=0, tokens=1, after=tuple(after)
    )


def random_steps(rng: random.Random, count: int, first: int = 0, earlier: Sequence[int] = ()) -> list[Step]:
    """Steps on all resources, each after up to three random ones before it, of ``earlier`` ones, too."""
    steps: list[Step] = []
    for number in range(first, first + count):
        before = [*earlier, *range(first, number)]
        after = rng.sample(before, min(len(before), rng.randint(0, 3)))
        steps.append(make_step(number, rng.choice(RESOURCES), *after))
    return steps


class _Mark:
    def __init__(self, resource: Resource, done: Future[None]) -> None:
        self.resource = resource
        self._done = done

    def wait(self) -> None:
        self._done.result(timeout=30)


class StreamDevice(SimDevice):
    """``gpu``, ``h2d`` and ``d2h`` are streams: a handler only issues work there, which is done some time later."""

    def __init__(self) -> None:
        super().__init__(0)
        self._streams = {name: ThreadPoolExecutor(1) for name in ("gpu", "h2d", "d2h")}
        self._here = threading.local()

    @contextmanager
    def lane(self, resource: Resource) -> Iterator[None]:
        self._here.resource = resource
        yield
        self._here.resource = None

    def issue(self, work: Callable[[], None]) -> None:
        """What a handler calls: on the current lane, at once if that is the host's."""
        stream = self._streams.get(self._here.resource)
        if stream is None:
            work()
        else:
            stream.submit(work)

    def after(self, resource: Resource, completion: Completion) -> None:
        assert self._here.resource == resource
        assert isinstance(completion, _Mark)
        assert completion.resource != resource, "a stream keeps its own order"
        stream = self._streams.get(resource)
        if stream is None:
            completion.wait()
        else:
            stream.submit(completion.wait)

    def mark(self, resource: Resource) -> Completion | None:
        assert self._here.resource == resource
        stream = self._streams.get(resource)
        return None if stream is None else _Mark(resource, stream.submit(lambda: None))

    def close(self) -> None:
        for stream in self._streams.values():
            stream.shutdown()
