"""What the Steps of finetuning do: binds tasks to weights, saved inputs, wiring and the loss.

It knows where things are; neither why these examples were chosen nor when a Step runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from flexbatch.finetune.context import LearningContext
from flexbatch.finetune.dropout import Dropout, token_keys
from flexbatch.finetune.inputs import SavedInputs
from flexbatch.finetune.layer import LayerMath, attend
from flexbatch.finetune.loss import loss_rows, measure
from flexbatch.finetune.meter import ActivationMeter
from flexbatch.finetune.pace import Pace
from flexbatch.finetune.parameters import Parameters
from flexbatch.finetune.pruning import shapes_only
from flexbatch.kernels.rotary import RotaryTable
from flexbatch.models.spec import Family
from flexbatch.runtime.device import Device
from flexbatch.runtime.weight_store import WeightStore
from flexbatch.scheduler.steps import Step
from flexbatch.scheduler.training import LearningBatch, TaskKind, Window, cut
from flexbatch.shapes import ModelShape


class TrainedTokens(Protocol):
    """An example: token ids, and which of them are targets of the loss; the first never is."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """Token ids."""

    @property
    def trained(self) -> tuple[bool, ...]:
        """Which tokens are targets, as many as there are."""


@dataclass(slots=True)
class BatchState:
    """A micro-batch on its way: ``ids`` and ``positions`` int64 [T]; ``targets`` are those of ``rows``.

    ``x`` [T, hidden] is the hidden state on the way forward, ``dx`` its gradient on the way back.
    """

    batch: LearningBatch
    host_ids: Tensor
    ids: Tensor
    positions: Tensor
    rows: Tensor
    targets: Tensor
    keys: np.ndarray | None
    rotation: tuple[Tensor, Tensor] | None
    table_rows: Tensor | None = None
    x: Tensor | None = None
    dx: Tensor | None = None
    loss: float = 0.0


@dataclass(slots=True)
class Work:
    """The handlers of one trainer, and the micro-batches of the pass that is under way.

    ``seconds`` of the thread that issues products went into them so far. ``peak``: the most bytes of activations, which
    are buffers and what is made inside of Steps. The latter is measured, and slow, where a Step of training is of more
    tokens than any of its kind and group before; others are taken to need as much.
    """

    shape: ModelShape
    family: Family
    weights: WeightStore
    parameters: Parameters
    inputs: SavedInputs
    device: Device
    dropout: float
    seed: int
    loss_bytes: int
    seconds: float = 0.0
    peak: int = 0
    pace: Pace = field(default_factory=Pace)
    _inner: dict[tuple[TaskKind, int], tuple[int, int]] = field(default_factory=dict)  # tokens, and bytes for them
    _states: list[BatchState] = field(default_factory=list)
    _scale: float | None = None
    _rotary: RotaryTable | None = None
    _outputs: dict[int, dict[str, tuple[int, ...]]] = field(default_factory=dict)
    _pruned: dict[int, frozenset[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with ActivationMeter():  # torch imports modules for seconds when it is used first
            torch.zeros(1)
        if self.shape.rope is not None:
            self._rotary = RotaryTable(self.shape.rope, self.device.torch_device)
        self._outputs = {
            group: {each.name: tuple(part.out_features for part in each.parts) for each in spec.linears}
            for group, spec in enumerate(self.family.table(self.shape).groups)
        }
        found: dict[frozenset[str], frozenset[str]] = {}
        for group in range(1, self.shape.num_layers + 1):
            spec = self.family.table(self.shape).layers[group - 1]
            trained = frozenset(each.name for each in spec.linears if self.parameters.of(group, each.name))
            if trained not in found:
                found[trained] = shapes_only(self.shape, group, trained)
            self._pruned[group] = found[trained]

    def handlers(self) -> dict[str, Callable[[Step], None]]:
        """What the executor calls for each kind of Step."""
        return {
            "learn_gather": self._gather,
            "learn_embed": _normal(self._timed("learn_embed", self._embed)),
            "learn_forward": _normal(self._timed("learn_forward", self._forward)),
            "learn_loss": _normal(self._timed("learn_loss", self._loss)),
            "learn_backward": _normal(self._timed("learn_backward", self._backward)),
            "input_down": _normal(self.inputs.down),
            "input_write": _normal(self.inputs.write),
            "input_read": _normal(self.inputs.read),
            "input_up": _normal(self.inputs.up),
        }

    def _timed(self, kind: TaskKind, handler: Callable[[Step], None]) -> Callable[[Step], None]:
        def run(step: Step) -> None:
            started = time.perf_counter()
            self.inputs.highest()
            largest, inner = self._inner.get((kind, step.group), (0, 0))
            metered = step.tokens > largest and self._scale is not None
            if metered:
                with ActivationMeter() as meter:
                    handler(step)
                inner = meter.peak
                self._inner[kind, step.group] = step.tokens, inner
            else:
                handler(step)
            self.peak = max(self.peak, self.inputs.highest() + inner)
            seconds = time.perf_counter() - started
            self.seconds += seconds
            self.pace.took(kind, step.tokens, seconds, metered=metered)

        return run

    def begin(
        self, batches: Sequence[LearningBatch], examples: Sequence[TrainedTokens], seen: int, scale: float | None
    ) -> None:
        """Make the index tensors of a pass; ``scale`` None: only the loss is wanted."""
        self._scale = scale
        self._states = [self._state(batch, examples, seen) for batch in batches]

    def finish(self) -> tuple[float, int]:
        """The loss of the pass, and how many targets it is of."""
        states, self._states = self._states, []
        return sum(state.loss for state in states), sum(state.targets.numel() for state in states)

    def _state(self, batch: LearningBatch, examples: Sequence[TrainedTokens], seen: int) -> BatchState:
        device = self.device.torch_device
        ids: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        targets: list[int] = []
        keys: list[np.ndarray] = []
        for number, count in zip(batch.examples, batch.counts, strict=True):
            example = examples[number]
            base = len(ids)
            ids += example.tokens[:count]
            positions += range(count)
            for at in range(count):
                if example.trained[at + 1]:
                    rows.append(base + at)
                    targets.append(example.tokens[at + 1])
            if self.dropout and self._scale is not None:
                keys.append(token_keys(self.seed, seen + number, np.arange(count)))
        where = torch.tensor(positions, device=device)
        return BatchState(
            batch=batch,
            host_ids=torch.tensor(ids),
            ids=torch.tensor(ids, device=device),
            positions=where,
            rows=torch.tensor(rows, device=device),
            targets=torch.tensor(targets, device=device),
            keys=np.concatenate(keys) if keys else None,
            rotation=None if self._rotary is None else self._rotary.lookup(where, max(positions) + 1),
        )

    def _context(self, state: BatchState, group: int, start: int, stop: int, *, back: bool = False) -> LearningContext:
        rows = slice(start, stop)
        rotation = state.rotation
        return LearningContext(
            shape=self.shape,
            positions=state.positions[rows],
            weights=self.weights.group(group),
            rotation=None if rotation is None else (rotation[0][rows], rotation[1][rows]),
            group=group,
            parameters=self.parameters,
            outputs=self._outputs[group],
            weight=1.0 if self._scale is None else self._scale,
            dropout=None if state.keys is None else Dropout(self.dropout, state.keys[rows]),
            rows=state.table_rows,
            shapes_only=self._pruned[group] if back else frozenset(),
        )

    def _layer(self, state: BatchState, group: int, *, back: bool = False) -> LayerMath:
        def context(window: Window) -> LearningContext:
            return self._context(state, group, window.start, window.stop, back=back)

        return LayerMath(self.family, context, self.shape.scale_of(group - 1), self.shape.windows[group - 1])

    def whole_layer(self, group: int, x: Tensor) -> Tensor:
        """One layer over one example x [T, hidden] under autograd, nothing recomputed: for measurements."""
        state = self._state(cut([x.shape[0]], x.shape[0])[0], [_Blank(x.shape[0])], 0)
        layer = self._layer(state, group)
        q, k, v = self.family.project(layer.context(state.batch.windows[0]), x)
        attended = attend(q, k, v, 0, layer.scale, layer.sliding)
        return self.family.finish(layer.context(state.batch.windows[0]), x, attended)

    # --- handlers ------------------------------------------------------------------------------------------------

    def _gather(self, step: Step) -> None:
        state = self._states[step.batch]
        state.table_rows = self.weights.gather(state.host_ids)

    def _embed(self, step: Step) -> None:
        state = self._states[step.batch]
        with torch.no_grad():
            embedded = self.family.embed(self._context(state, 0, 0, state.batch.tokens), state.ids)
            state.x = self.inputs.make(step.batch).copy_(embedded)
        if self._scale is None or 0 not in self.parameters.groups:
            state.table_rows = None

    def _forward(self, step: Step) -> None:
        state = self._states[step.batch]
        assert state.x is not None
        out = self.inputs.make(step.batch)
        with torch.no_grad():
            self._layer(state, step.group).forward(state.x, state.batch.windows, out)
        x, state.x = state.x, out
        self.inputs.keep(step.group, step.batch, x)

    def _loss(self, step: Step) -> None:
        state = self._states[step.batch]
        assert state.x is not None
        context = self._context(state, step.group, 0, state.batch.tokens)
        chunk = loss_rows(self.shape.vocab_size, self.loss_bytes)
        dx = None if self._scale is None else self.inputs.make(step.batch)

        def head(x: Tensor, rows: Tensor) -> Tensor:
            if state.keys is None:
                return self.family.head(context, x)
            dropout = Dropout(self.dropout, state.keys[rows.cpu().numpy()])
            return self.family.head(replace(context, dropout=dropout), x)

        state.loss = measure(head, state.x, state.rows, state.targets, chunk, dx)
        self.inputs.drop(state.x)
        state.x, state.dx = None, dx

    def _backward(self, step: Step) -> None:
        state = self._states[step.batch]
        assert state.dx is not None
        if step.group == 0:
            with torch.enable_grad():
                embedded = self.family.embed(self._context(state, 0, 0, state.batch.tokens), state.ids)
            torch.autograd.backward([embedded], [state.dx])
        else:
            x = self.inputs.take(step.group, step.batch)
            wanted = step.group > self.parameters.groups[0]
            layer = self._layer(state, step.group, back=True)
            layer.backward(x, state.batch.windows, state.dx, wanted=wanted)
            self.inputs.drop(x)
        if step.group == self.parameters.groups[0]:
            self.inputs.drop(state.dx)
            state.dx = None


class _Blank:
    """An example of nothing."""

    def __init__(self, count: int) -> None:
        self.tokens = (0,) * (count + 1)
        self.trained = (False,) * (count + 1)


def counts_of(examples: Sequence[TrainedTokens]) -> list[int]:
    """Tokens of every example that a pass reads.

    What comes after the last target changes nothing; the last target itself is only predicted.
    """
    return [max((at for at, is_target in enumerate(each.trained) if is_target), default=0) for each in examples]


def _normal(handler: Callable[[Step], None]) -> Callable[[Step], None]:
    """The handler outside of inference mode: autograd cannot keep tensors that are made there."""

    def run(step: Step) -> None:
        with torch.inference_mode(False), torch.no_grad():
            handler(step)

    return run
