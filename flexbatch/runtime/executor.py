"""Interprets Steps: one FIFO a resource, each Step behind those it names. What a Step does is behind its handler.

It knows resources and order; neither tensors nor what a sweep is for.
"""

from __future__ import annotations

import time
from _thread import start_new_thread
from collections import ChainMap, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from queue import SimpleQueue

import torch

from flexbatch.errors import InternalError
from flexbatch.runtime.device import Completion, Device
from flexbatch.runtime.threads import keep_to_one_core
from flexbatch.runtime.trace import Trace
from flexbatch.scheduler.steps import Resource, Step

Handler = Callable[[Step], None]
_RUNS_KEPT = 2
_CLOSE_S = 10.0
_LOOK_S = 0.005

# Threads meet in SimpleQueues and in plain assignments only: no lock is ever held, so an interrupt that a signal raises
# in the calling thread, wherever it strikes, leaves nothing locked behind. (threading.Thread.start waits at a lock.)
# Nothing waits at a SimpleQueue with a timeout: up to CPython 3.11 at least, one that runs out between the queue's two
# looks at its list turns negative there, and that means for ever.


@dataclass(slots=True, eq=False)
class _Ticket:
    """A submitted Step. ``issued``: its handler has returned, and ``completion`` says when its work is done."""

    step: Step
    sweep: int
    after: tuple[_Ticket, ...]
    issued: bool = False
    completion: Completion | None = None
    waiters: list[SimpleQueue[None]] = field(default_factory=list)

    def settle(self) -> None:
        """Tell whoever waits that the Step is issued."""
        self.after = ()  # otherwise each ticket would hold on to all before it
        self.issued = True
        for bell in self.waiters:
            bell.put(None)


class _Lane:
    """A resource's FIFO and the bell at which the thread that serves it waits for other lanes."""

    def __init__(self, resource: Resource) -> None:
        self.resource = resource
        self.tickets: SimpleQueue[_Ticket | None] = SimpleQueue()
        self.bell: SimpleQueue[None] = SimpleQueue()
        self.ended = False


class _CancelledError(Exception):
    """This thread is to stop: another one has failed, or the executor is closed."""


class Executor:
    """Runs Steps through one handler a kind.

    With ``overlap`` each resource has its FIFO: the device's compute resource is served by the thread that calls
    ``run``, so that one thread issues the products, each other one by a worker. Without, the same Steps run one after
    the other in the calling thread. ``delays`` gives seconds to sleep before a Step, to shake out races in tests.

    The first exception of a handler stops everything; ``run`` or ``drain`` raises it, and so does every later call.
    An interrupt that is raised in the calling thread goes through and stops the workers, too.
    """

    def __init__(
        self,
        handlers: Mapping[str, Handler],
        device: Device,
        trace: Trace,
        *,
        overlap: bool,
        delays: Callable[[Step], float] | None = None,
    ) -> None:
        self._handlers = handlers
        self._device = device
        self._trace = trace
        self._overlap = overlap
        self._delays = delays
        self._bell: SimpleQueue[None] = SimpleQueue()  # the calling thread's
        self._lanes: dict[Resource, _Lane] = {}
        self._newest: dict[Resource, _Ticket] = {}
        self._recent: deque[dict[int, _Ticket]] = deque(maxlen=_RUNS_KEPT)
        self._errors: list[BaseException] = []
        self._stopped = False

    def run(self, steps: Iterable[Step], sweep: int, until: Collection[int]) -> None:
        """Submit ``steps`` and return when those named in ``until`` are done; the workers go on with the others.

        A Step may name (``after``) Steps earlier in the list, or of the two calls before; the order of the list is
        that of the FIFOs. Steps of the compute resource all run before this returns. Raises InternalError, and
        submits nothing, if a Step could never run.
        """
        self._guard(lambda: self._run(steps, sweep, until))

    def drain(self) -> None:
        """Return when everything that was submitted is done."""
        self._guard(lambda: self._finish(self._newest.values()))

    def close(self) -> None:
        """Stop the workers; what they have not begun is dropped. Returns after what they are doing, or 10 seconds."""
        self._stop()
        self._recent.clear()
        self._newest.clear()
        deadline = time.monotonic() + _CLOSE_S
        while self._lanes:
            _, lane = self._lanes.popitem()
            while not lane.ended and time.monotonic() < deadline:
                time.sleep(_LOOK_S)
        self._handlers = {}  # which know their owner, who knows this: its memory would wait for a collection

    # --- submission -------------------------------------------------------------------------------------------

    def _run(self, steps: Iterable[Step], sweep: int, until: Collection[int]) -> None:
        tickets = self._admit(steps, sweep, until)
        if self._overlap:
            self._dispatch(tickets)
        else:
            self._serve(tickets)
        known = ChainMap(*self._recent)
        self._finish(known[number] for number in until)

    def _admit(self, steps: Iterable[Step], sweep: int, until: Collection[int]) -> list[_Ticket]:
        """A Step waits only for earlier ones, and every FIFO keeps the list's order: so none waits for ever."""
        new: dict[int, _Ticket] = {}
        known = ChainMap(new, *self._recent)
        for step in steps:
            if step.id in known:
                raise InternalError(f"{_name(step)} has the number of another step")
            if step.kind not in self._handlers:
                raise InternalError(f"{_name(step)} has no handler")
            missing = [number for number in step.after if number not in known]
            if missing:
                raise InternalError(
                    f"{_name(step)} would wait for ever for {missing}: not submitted before it, or too long ago"
                )
            new[step.id] = _Ticket(step, sweep, tuple(known[number] for number in step.after))
        unknown = [number for number in until if number not in known]
        if unknown:
            raise InternalError(f"a run was to last until {unknown}, which were not submitted")
        self._recent.append(new)
        return list(new.values())

    def _dispatch(self, tickets: list[_Ticket]) -> None:
        mine = []
        for ticket in tickets:
            resource = ticket.step.resource
            self._newest[resource] = ticket
            if resource == self._device.compute:
                mine.append(ticket)
            else:
                self._lane(resource).tickets.put(ticket)
        with self._device.lane(self._device.compute), torch.inference_mode():
            for ticket in mine:
                self._carry_out(ticket, self._bell)

    def _serve(self, tickets: list[_Ticket]) -> None:
        with torch.inference_mode():
            for ticket in tickets:
                with self._device.lane(ticket.step.resource):
                    self._carry_out(ticket, self._bell)
                    self._finish([ticket])

    def _lane(self, resource: Resource) -> _Lane:
        if resource not in self._lanes:
            lane = self._lanes[resource] = _Lane(resource)
            start_new_thread(self._work, (lane,))
        return self._lanes[resource]

    # --- one thread's part --------------------------------------------------------------------------------------

    def _work(self, lane: _Lane) -> None:
        try:
            keep_to_one_core()
            with self._device.lane(lane.resource), torch.inference_mode():
                while (ticket := lane.tickets.get()) is not None:
                    self._carry_out(ticket, lane.bell)
        except _CancelledError:
            return
        except BaseException as error:  # noqa: BLE001  raised again by the calling thread
            self._fail(error)
        finally:
            lane.ended = True

    def _carry_out(self, ticket: _Ticket, bell: SimpleQueue[None]) -> None:
        step = ticket.step
        for other in ticket.after:
            self._await(other, bell)
            # A resource's own order is that of its FIFO.
            if other.completion is not None and other.step.resource != step.resource:
                self._device.after(step.resource, other.completion)
        self._sleep(0.0 if self._delays is None else self._delays(step))
        start = time.perf_counter()
        self._handlers[step.kind](step)
        ticket.completion = self._device.mark(step.resource)
        self._trace.record(step, ticket.sweep, start, time.perf_counter())
        ticket.settle()

    def _await(self, ticket: _Ticket, bell: SimpleQueue[None]) -> None:
        """Block until ``ticket`` is issued."""
        if not ticket.issued:
            # First the bell, then a second look: ``settle`` sets the flag first and rings afterwards.
            ticket.waiters.append(bell)
            while not ticket.issued:
                self._check()
                bell.get()
        self._check()

    def _finish(self, tickets: Iterable[_Ticket]) -> None:
        """Block the calling thread until the work of ``tickets`` is done."""
        for ticket in tickets:
            self._await(ticket, self._bell)
            if ticket.completion is not None:
                ticket.completion.wait()

    def _sleep(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        self._check()
        while (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, _LOOK_S))
            self._check()

    # --- errors ---------------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self._stopped:
            raise _CancelledError

    def _stop(self) -> None:
        """Let every thread stop at its next look."""
        self._stopped = True
        self._bell.put(None)
        for lane in list(self._lanes.values()):
            lane.tickets.put(None)
            lane.bell.put(None)

    def _fail(self, error: BaseException) -> None:
        self._errors.append(error)
        self._stop()

    def _guard(self, work: Callable[[], None]) -> None:
        """In the calling thread: whatever goes wrong here or in a worker stops all, and the first error is raised."""
        if not self._stopped:
            try:
                work()
            except _CancelledError:
                pass  # the reason is among the errors
            except Exception as error:  # noqa: BLE001  raised below, unless another one came first
                self._fail(error)
            except BaseException:
                self._stop()
                raise
        if self._errors:
            raise self._errors[0]
        if self._stopped:
            raise InternalError("the executor was stopped")


def _name(step: Step) -> str:
    return f"step {step.id} ({step.kind} {step.group} on {step.resource})"
