"""The executor on synthetic Steps: order, overlap, errors, interrupts. Its oracle is the Steps' own dependencies."""

from __future__ import annotations

import functools
import gc
import json
import random
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest
import torch
from torch import Tensor

from flexbatch.errors import InternalError
from flexbatch.runtime.device import CpuDevice, Device, SimDevice
from flexbatch.runtime.executor import Executor, Handler
from flexbatch.runtime.trace import Trace
from flexbatch.scheduler.steps import Resource, Step
from tests.runtime.streams import RESOURCES, StreamDevice, make_step, random_steps

FOREVER = 30.0


def threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


@contextmanager
def executing(
    handler: Handler,
    device: Device | None = None,
    *,
    overlap: bool = True,
    delays: Callable[[Step], float] | None = None,
    trace: Trace | None = None,
) -> Iterator[Executor]:
    device = device or SimDevice(0)
    executor = Executor({"work": handler}, device, trace or Trace(keep=False), overlap=overlap, delays=delays)
    before = threads()
    try:
        yield executor
    finally:
        start = time.monotonic()
        executor.close()
        device.close()
        assert time.monotonic() - start < 5
        while threads() > before and time.monotonic() - start < 5:
            time.sleep(0.0001)  # the kernel takes its time
        assert threads() <= before, "workers are left over"


class Work:
    """Values that depend on those of the Steps before, in a few slots a resource that later Steps overwrite."""

    def __init__(self, device: SimDevice) -> None:
        self.device = device
        self.values: dict[int, Tensor] = {}
        self.order: dict[str, list[int]] = defaultdict(list)
        self.state = {resource: torch.zeros(16) for resource in RESOURCES}
        self.wrong: list[str] = []

    def __call__(self, step: Step) -> None:
        if isinstance(self.device, StreamDevice):
            self.device.issue(lambda: self.work(step))
        else:
            self.work(step)

    def work(self, step: Step) -> None:
        missing = [number for number in step.after if number not in self.values]
        if missing:
            self.wrong.append(f"step {step.id} ran before {missing}")
            return
        state = self.state[step.resource]
        state.mul_(0.7).add_(torch.arange(16) * 0.01 + step.id)
        for number in step.after:
            state.add_(self.values[number].sin())
        self.values[step.id] = state.clone()
        self.order[step.resource].append(step.id)

    def check(self, steps: Sequence[Step]) -> None:
        assert self.wrong == []
        for resource in RESOURCES:
            assert self.order[resource] == [step.id for step in steps if step.resource == resource]


def pause(pauses: dict[int, float], step: Step) -> float:
    return pauses[step.id]


def run_all(
    runs: Sequence[list[Step]], device: SimDevice, overlap: bool, delays: Callable[[Step], float] | None = None
) -> dict[int, Tensor]:
    work = Work(device)
    with executing(work, device, overlap=overlap, delays=delays) as executor:
        for sweep, steps in enumerate(runs):
            compute = [step.id for step in steps if step.resource == "gpu"]
            executor.run(steps, sweep, compute[-1:])
        executor.drain()
        work.check([step for steps in runs for step in steps])
    return work.values


@pytest.mark.parametrize("make_device", [lambda: SimDevice(0), StreamDevice], ids=["host", "streams"])
def test_overlapped_equals_serial_under_random_delays(make_device: Callable[[], SimDevice]) -> None:
    for seed in range(200):
        rng = random.Random(seed)
        first = random_steps(rng, 20)
        second = random_steps(rng, 20, first=20, earlier=range(8, 20))
        pauses = {step.id: rng.uniform(0, 0.002) if rng.random() < 0.4 else 0.0 for step in (*first, *second)}
        serial = run_all([first, second], make_device(), overlap=False)
        delays = functools.partial(pause, pauses)
        overlapped = run_all([first, second], make_device(), overlap=True, delays=delays)
        assert serial.keys() == overlapped.keys() == set(range(40))
        assert all(torch.equal(serial[number], overlapped[number]) for number in serial), f"seed {seed}"


@pytest.mark.parametrize("compute", ["gpu", "cpu"])
def test_one_thread_a_resource_and_the_caller_computes(compute: str) -> None:
    idents: dict[str, set[int]] = defaultdict(set)

    def handler(step: Step) -> None:
        assert torch.is_inference_mode_enabled()
        idents[step.resource].add(threading.get_ident())

    device = SimDevice(0) if compute == "gpu" else CpuDevice()
    with executing(handler, device) as executor:
        for sweep in range(3):
            steps = random_steps(random.Random(sweep), 40, first=40 * sweep)
            executor.run(steps, sweep, [step.id for step in steps])
    assert {resource: len(numbers) for resource, numbers in idents.items()} == dict.fromkeys(RESOURCES, 1)
    assert idents[compute] == {threading.get_ident()}
    assert len(set.union(*idents.values())) == len(RESOURCES)


def test_serial_is_the_list_order_in_the_calling_thread() -> None:
    seen: list[tuple[int, int]] = []
    device = StreamDevice()
    done: list[int] = []

    def handler(step: Step) -> None:
        assert done == [number for number, _ in seen], "the step before is not done"
        seen.append((step.id, threading.get_ident()))
        device.issue(lambda: done.append(step.id))

    steps = random_steps(random.Random(1), 50)
    with executing(handler, device, overlap=False) as executor:
        executor.run(steps, 0, [])
    assert seen == [(step.id, threading.get_ident()) for step in steps]


def test_resources_overlap() -> None:
    """Six Steps that meet: each waits in its handler until all are running."""
    barrier = threading.Barrier(len(RESOURCES))

    def handler(step: Step) -> None:
        barrier.wait(timeout=FOREVER)

    with executing(handler) as executor:
        executor.run([make_step(i, resource) for i, resource in enumerate(RESOURCES)], 0, range(6))


def test_run_ends_with_until_and_drain_with_everything() -> None:
    gate = threading.Event()
    done: list[int] = []

    def handler(step: Step) -> None:
        if step.resource == "disk_read":
            assert gate.wait(FOREVER)
        done.append(step.id)

    with executing(handler) as executor:
        executor.run([make_step(0, "disk_read"), make_step(1, "h2d", 0), make_step(2, "gpu")], 0, [2])
        assert done == [2]
        executor.run([make_step(3, "cpu"), make_step(4, "gpu", 3)], 1, [3, 4])
        assert done == [2, 3, 4]
        gate.set()
        executor.run([make_step(5, "gpu", 1)], 2, [])  # of two calls before
        assert done == [2, 3, 4, 0, 1, 5]
        executor.run([make_step(6, "disk_read"), make_step(7, "disk_write", 6)], 3, [])
        executor.drain()
        assert done[6:] == [6, 7]
        executor.drain()


def test_until_waits_for_the_work_on_a_stream_not_for_its_issue() -> None:
    device = StreamDevice()
    done: list[int] = []

    def work(step: Step) -> None:
        time.sleep(0.05)
        done.append(step.id)

    def handler(step: Step) -> None:
        device.issue(functools.partial(work, step))

    with executing(handler, device) as executor:
        executor.run([make_step(0, "h2d"), make_step(1, "gpu", 0)], 0, [0])
        assert 0 in done
        executor.run([make_step(2, "d2h", 1)], 1, [])
        executor.drain()
        assert done == [0, 1, 2]


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(
    ("steps", "until", "words"),
    [
        ([make_step(5, "gpu"), make_step(6, "cpu", 99)], [], r"step 6 \(work 6 on cpu\) would wait .* \[99\]"),
        ([make_step(5, "gpu", 6), make_step(6, "cpu")], [], r"would wait for ever for \[6\]"),
        ([make_step(5, "gpu", 5)], [], r"would wait for ever for \[5\]"),
        ([make_step(5, "gpu"), make_step(5, "cpu")], [], "has the number of another"),
        ([make_step(0, "gpu")], [], "has the number of another"),
        ([make_step(5, "gpu", kind="play")], [], r"step 5 \(play 5 on gpu\) has no handler"),
        ([make_step(5, "gpu")], [6], r"until \[6\], which were not submitted"),
    ],
)
def test_what_could_never_run_is_refused(steps: list[Step], until: list[int], words: str, overlap: bool) -> None:
    done: list[int] = []
    with executing(lambda step: done.append(step.id), overlap=overlap) as executor:
        executor.run([make_step(0, "disk_read")], 0, [0])
        with pytest.raises(InternalError, match=words):
            executor.run(steps, 1, until)
    assert done == [0]


def test_a_step_of_three_calls_before_is_forgotten() -> None:
    with executing(lambda _: None) as executor:
        for number in range(3):
            executor.run([make_step(number, "disk_read")], number, [number])
        with pytest.raises(InternalError, match=r"wait for ever for \[0\]"):
            executor.run([make_step(3, "gpu", 0)], 3, [3])


def test_what_is_done_takes_no_memory() -> None:
    def tickets() -> int:
        gc.collect()
        return sum(type(thing).__name__ == "_Ticket" for thing in gc.get_objects())

    with executing(lambda _: None) as executor:
        for number in range(200):
            after = [number - 1] if number else []
            executor.run([make_step(number, "gpu" if number % 2 else "h2d", *after)], number, [number])
        executor.drain()
        assert tickets() <= 4
    assert tickets() == 0


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("resource", RESOURCES)
def test_an_error_on_any_resource_ends_the_run(resource: Resource, overlap: bool) -> None:
    for seed in range(5):
        rng = random.Random(seed)
        steps = random_steps(rng, 30)
        steps += [make_step(30, resource), *random_steps(rng, 30, first=31, earlier=range(25, 31))]
        steps.append(make_step(61, "gpu", 30))
        done: list[int] = []

        def handler(step: Step, done: list[int] = done) -> None:
            if step.id == 30:
                raise OSError("the disk burns")
            done.append(step.id)

        with executing(handler, overlap=overlap, delays=lambda _: 0.0002) as executor:
            with pytest.raises(OSError, match="the disk burns") as caught:
                executor.run(steps, 0, [61])
            assert caught.value.__context__ is None
            with pytest.raises(OSError, match="the disk burns"):
                executor.run([make_step(62, "gpu")], 1, [62])
            with pytest.raises(OSError, match="the disk burns"):
                executor.drain()
        assert 61 not in done
        assert 62 not in done


def test_the_first_error_wins() -> None:
    both = threading.Barrier(2)

    def handler(step: Step) -> None:
        both.wait(FOREVER)
        if step.id == 0:
            raise ValueError("first")
        time.sleep(0.1)
        raise RuntimeError("second")

    with executing(handler) as executor, pytest.raises(ValueError, match="first"):
        executor.run([make_step(0, "h2d"), make_step(1, "gpu")], 0, [1])


def test_an_error_in_the_background_is_raised_by_the_next_call() -> None:
    def handler(step: Step) -> None:
        if step.resource == "disk_read":
            time.sleep(0.02)
            raise OSError("short read")

    for call in ("run", "drain"):
        with executing(handler) as executor:
            executor.run([make_step(0, "disk_read"), make_step(1, "gpu")], 0, [1])
            with pytest.raises(OSError, match="short read"):
                executor.run([make_step(2, "gpu", 0)], 1, [2]) if call == "run" else executor.drain()


def test_an_error_wakes_whoever_waits_or_sleeps() -> None:
    def handler(step: Step) -> None:
        if step.id == 0:
            time.sleep(0.05)
            raise OSError("gone")

    steps = [make_step(0, "disk_read"), make_step(1, "h2d", 0), make_step(2, "d2h"), make_step(3, "gpu", 1)]
    start = time.monotonic()
    with (
        executing(handler, delays=lambda step: FOREVER if step.id == 2 else 0.0) as executor,
        pytest.raises(OSError, match="gone"),
    ):
        executor.run(steps, 0, [2])
    assert time.monotonic() - start < 5


def test_closing_waits_for_what_is_under_way_and_drops_the_rest() -> None:
    begun, gate = threading.Event(), threading.Event()
    done: list[int] = []

    def handler(step: Step) -> None:
        begun.set()
        assert gate.wait(FOREVER)
        done.append(step.id)

    with executing(handler) as executor:
        executor.run([make_step(0, "disk_read"), make_step(1, "disk_read"), make_step(2, "h2d", 0)], 0, [])
        assert begun.wait(FOREVER)
        threading.Timer(0.05, gate.set).start()
        executor.close()
        assert done == [0]
        executor.close()
        with pytest.raises(InternalError, match="stopped"):
            executor.run([make_step(3, "gpu")], 1, [3])
        with pytest.raises(InternalError, match="stopped"):
            executor.drain()
    assert done == [0]


@contextmanager
def interrupt_after(seconds: float, error: type[BaseException]) -> Iterator[None]:
    def strike(number: int, frame: FrameType | None) -> None:
        raise error

    before = signal.signal(signal.SIGALRM, strike)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", ["waiting", "sleeping", "computing"])
@pytest.mark.parametrize("overlap", [True, False])
def test_an_interrupt_stops_the_workers(where: str, overlap: bool, error: type[BaseException]) -> None:
    behind = (1,) if where == "waiting" else ()
    steps = [make_step(0, "disk_read"), make_step(1, "h2d", 0), make_step(2, "gpu", *behind)]
    sleeps = {"waiting": {0}, "sleeping": {0, 2}, "computing": {0} if overlap else set()}[where]

    def handler(step: Step) -> None:
        if step.id == 2:
            time.sleep(FOREVER)

    start = time.monotonic()
    with executing(handler, overlap=overlap, delays=lambda step: FOREVER if step.id in sleeps else 0.0) as executor:
        with interrupt_after(0.05, error), pytest.raises(error):
            executor.run(steps, 0, [2])
        with pytest.raises(InternalError, match="stopped"):
            executor.run([make_step(3, "gpu")], 1, [3])
    assert time.monotonic() - start < 5


@pytest.fixture
def without_collections() -> Iterator[None]:
    """Python drops an exception that a signal raises in a callback of the garbage collector, and hypothesis has one."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("without_collections")
def test_an_interrupt_at_any_moment_leaves_nothing_hanging() -> None:
    """The signal strikes at a random instruction of a busy run: it must come out, and close() must return."""
    for seed in range(100):
        rng = random.Random(seed)
        deadline = time.monotonic() + FOREVER
        with executing(lambda _: None) as executor:
            number = 0
            with pytest.raises(KeyboardInterrupt), interrupt_after(rng.uniform(0.0005, 0.01), KeyboardInterrupt):  # noqa: PT012
                while time.monotonic() < deadline:
                    steps = random_steps(rng, 30, first=number)
                    executor.run(steps, 0, [steps[-1].id])
                    number += 30


def test_the_trace_shows_every_step_in_its_row(tmp_path: Path) -> None:
    trace = Trace(keep=True)
    steps = random_steps(random.Random(3), 60)
    with executing(lambda _: time.sleep(0.001), trace=trace) as executor:
        executor.run(steps, 7, [])
        executor.drain()
    assert sorted(event.step.id for event in trace.events) == list(range(60))
    ends = {event.step.id: event.end for event in trace.events}
    for event in trace.events:
        assert event.sweep == 7
        assert all(ends[number] <= event.start for number in event.step.after)
    for resource in RESOURCES:
        times = [event.end - event.start for event in trace.events if event.step.resource == resource]
        assert trace.busy_s[resource] == pytest.approx(sum(times))
        assert min(times) >= 0.001
    assert trace.kind_s["work"] == pytest.approx(sum(trace.busy_s.values()))
    trace.write(tmp_path / "trace.json")
    rows = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {row["tid"]: row["args"]["name"] for row in rows if row["name"] == "thread_name"}
    bars = [row for row in rows if row["ph"] == "X"]
    assert len(bars) == 60
    assert {(names[bar["tid"]], bar["name"]) for bar in bars} == {(step.resource, f"work {step.id}") for step in steps}
    assert min(bar["ts"] for bar in bars) == 0
