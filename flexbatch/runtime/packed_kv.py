"""The 4-bit KV cache of a loaded model: finds the bases of its layers once, then packs and attends in them.

The bases come from a sweep over a few fixed texts, so that they depend on the model alone, not on the rows of a job.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib import resources
from typing import cast

import torch
from torch import Tensor

from flexbatch.kernels.attention import AttentionBatch, Span, attend_chunk
from flexbatch.kernels.kv4 import Tokens, attend_packed, page_tokens_of
from flexbatch.kernels.kv4_basis import Basis
from flexbatch.kernels.kv4_finder import BasisFinder
from flexbatch.kernels.linear import linear_backward
from flexbatch.kernels.rotary import RotaryTable
from flexbatch.memory.weights import Operand
from flexbatch.policy.footprint import CALIBRATION_DIRECTIONS, CALIBRATION_SEQUENCES, CALIBRATION_TOKENS
from flexbatch.requests import Request, TokenizedRequest
from flexbatch.runtime.micro_batch import MicroBatchState
from flexbatch.sampling import SamplingParams
from flexbatch.scheduler.sequence import Sequence
from flexbatch.scheduler.sweep import MicroBatch, Slice, Sweep
from flexbatch.shapes import ModelShape
from flexbatch.text.codec import TextCodec

_HOST = torch.device("cpu")


class PackedKV:
    """What the packed attention of every layer needs beside pages."""

    def __init__(self, shape: ModelShape) -> None:
        self._shape = shape
        self._finders: dict[int, BasisFinder] = {}
        self._found: dict[int, Basis] = {}
        self._sequences = 0
        self._bases: dict[torch.device, list[Basis]] = {}
        self._tables: dict[torch.device, RotaryTable] = {}

    @property
    def observes(self) -> bool:
        """Whether the bases are still to be found."""
        return not self._bases

    def bases(self, device: torch.device) -> list[Basis]:
        """The basis of every layer, on ``device``; what was not there before only one thread may ask for."""
        if device not in self._bases:
            self._bases[device] = [basis.to(device) for basis in self._bases[_HOST]]
        return self._bases[device]

    def prepare(self, states: Iterable[MicroBatchState], page_tokens: int) -> None:
        """Bring what ``attend`` reads to where it is read, before several threads do so."""
        if self.observes:
            return
        for state in states:
            self.bases(state.attends)
            self._turns(state.attends, state.length + page_tokens)

    def sweep(self, codec: TextCodec | None, tier: str) -> Sweep:
        """One micro-batch for each of the texts, computed and kept on ``tier``; to be run with ``observe``."""
        longest = min(CALIBRATION_TOKENS, self._shape.max_positions)
        batches = []
        for index, ids in enumerate(_sequences(self._shape, codec)):
            tokens, params = tuple(ids[:longest]), SamplingParams(max_tokens=0)
            source = TokenizedRequest(Request(str(index), params, tokens), index, tokens)
            sequence = Sequence.of(source, self._shape.max_positions)
            sequence.pages.pages.extend([0] * len(tokens))  # none is touched
            whole = Slice(sequence, 0, len(tokens), samples=False, score_from=len(tokens), score_to=len(tokens))
            batches.append(MicroBatch((whole,), kv=tier, hidden=tier))
        self._sequences = len(batches)
        return Sweep(0, tuple(batches))

    def observe(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, output: Operand) -> Tensor:
        """Note what ``layer`` makes of one whole sequence, and attend without any cache; ``output`` is its matrix."""
        finder = self._finders.setdefault(layer, BasisFinder())
        if finder.add(q, k, v) == self._sequences:  # all of them pass a layer before the next but one
            turns = self._turns(_HOST, CALIBRATION_TOKENS)
            self._found[layer] = self._finders.pop(layer).find(turns, _directions(output, q))
        span = Span(0, q.shape[0], 0, ())
        return attend_chunk(span, k, q, k, v, scale, self._shape.windows[layer])

    def settle(self) -> None:
        """All has been observed."""
        self._bases[_HOST] = [self._found.pop(layer) for layer in range(self._shape.num_layers)]

    def attend(
        self,
        layer: int,
        state: MicroBatchState,
        batch: AttentionBatch,
        pages: Tensor,
        qkv: tuple[Tensor, Tensor, Tensor],
        scale: float,
    ) -> Tensor:
        """Store keys and values of a micro-batch, and attend to all of its sequences'."""
        q, k, v = qkv
        basis = self.bases(q.device)[layer]
        turns = self._turns(q.device, state.length + page_tokens_of(pages, k.shape[2]))
        tokens = Tokens(k, v, state.pages, state.offsets, state.positions_of(q.device))
        return attend_packed(batch, pages, q, tokens, scale, basis, turns)

    def _turns(self, device: torch.device, length: int) -> Tensor | None:
        if self._shape.rope is None:
            return None
        if device not in self._tables:
            self._tables[device] = RotaryTable(self._shape.rope, device)
        return self._tables[device].turns(length)


def _directions(output: Operand, q: Tensor) -> Tensor:
    """Random directions of a layer's output as they come back through its matrix: fp32 [n, heads, D] on the CPU."""
    matrix, *pieces = output.parts
    if pieces:  # 16-bit rows that rest on several tiers
        matrix = torch.cat([cast(Tensor, part) for part in output.parts])
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(CALIBRATION_DIRECTIONS, matrix.shape[0], generator=generator).to(q.device, q.dtype)
    back: Tensor = linear_backward(directions, matrix).float().cpu().unflatten(1, q.shape[1:])
    return back


def _sequences(shape: ModelShape, codec: TextCodec | None) -> Iterator[tuple[int, ...]]:
    if codec is not None:
        text = resources.files("flexbatch").joinpath("assets/calibration.txt").read_text(encoding="utf-8")
        yield from codec.encode_many(text.strip().split("\n----\n"))
        return
    generator = torch.Generator().manual_seed(0)
    size = (CALIBRATION_SEQUENCES, CALIBRATION_TOKENS)
    yield from (tuple(ids) for ids in torch.randint(shape.vocab_size, size, generator=generator).tolist())
