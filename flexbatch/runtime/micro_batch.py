"""A micro-batch on its way through the layers: its index tensors and its hidden states. Runs nothing itself."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from flexbatch.kernels.attention import AttentionBatch, Span, prepare
from flexbatch.kernels.paged import has_kernels, key_rows
from flexbatch.kernels.rotary import RotaryTable
from flexbatch.runtime.adapter_store import BoundAdapters
from flexbatch.runtime.kv_moves import Staging
from flexbatch.scheduler.sweep import MicroBatch


@dataclass(slots=True)
class MicroBatchState:
    """T ragged tokens: ``ids``, ``positions``, and where their KV goes (``pages``, ``offsets``), all int64 [T].

    ``attends`` is the device of its attention. ``length`` is one more than its largest position.

    ``rotation`` are the cosines and sines of its positions, [T, head_dim / 2] each, in a model that has them.
    ``x`` is the hidden state [T, hidden] where products run; ``raw`` its bytes in RAM while it travels
    (``leaving``: while a copy still reads them; ``host_parts``: those of q, k and v);
    ``hidden_offset`` its place on disk. ``staging`` says where its KV pages stand if they travel. ``qkv``, ``attended``
    and ``rows`` (of the token embedding) live from one Step to the next. ``adapters``: those that its rows name.
    """

    batch: MicroBatch
    host_ids: Tensor
    ids: Tensor
    positions: Tensor
    pages: Tensor
    offsets: Tensor
    attention: dict[int | None, AttentionBatch]
    attends: torch.device
    rotary: RotaryTable | None
    length: int
    dtype: torch.dtype
    hidden_shape: tuple[int, int]
    hidden_offset: int
    staging: Staging | None
    rotation: tuple[Tensor, Tensor] | None = None
    x: Tensor | None = None
    raw: Tensor | None = None
    leaving: Tensor | None = None
    host_parts: list[Tensor] = field(default_factory=list)
    rows: Tensor | None = None
    qkv: tuple[Tensor, Tensor, Tensor] | None = None
    attended: Tensor | None = None
    adapters: BoundAdapters | None = None
    _key_rows: Tensor | None = None
    _host_positions: Tensor | None = None

    def hidden(self) -> Tensor:
        """The hidden state; the embedding Step has run."""
        assert self.x is not None
        return self.x

    def key_rows(self, kv_heads: int, page_tokens: int) -> Tensor | None:
        """What the store of keys and values needs in every layer, found once; None on a device with its own kernel."""
        if self._key_rows is None and not has_kernels(self.attends):
            self._key_rows = key_rows(self.pages, self.offsets, kv_heads, page_tokens)
        return self._key_rows

    def positions_of(self, device: torch.device) -> Tensor:
        """The positions on the device of attention: where products run, or the CPU."""
        if self.positions.device == device or self._host_positions is None:
            return self.positions
        return self._host_positions

    def to(self, device: torch.device) -> None:
        """Bring what products read to ``device``, and what attention reads to where that is computed; once."""
        self.ids = self.ids.to(device, non_blocking=True)
        self._host_positions = self.positions
        self.positions = self.positions.to(device, non_blocking=True)
        if self.rotary is not None:
            self.rotation = self.rotary.lookup(self.positions, self.length)
        self.pages = self.pages.to(self.attends, non_blocking=True)
        self.offsets = self.offsets.to(self.attends, non_blocking=True)
        self.attention = {window: batch.to(self.attends) for window, batch in self.attention.items()}

    @property
    def hidden_bytes(self) -> int:
        """Bytes of the hidden state."""
        rows, width = self.hidden_shape
        return rows * width * self.dtype.itemsize


def start(
    batch: MicroBatch,
    page_tokens: int,
    windows: frozenset[int | None],
    rotary: RotaryTable | None,
    dtype: torch.dtype,
    *,
    hidden_size: int,
    hidden_offset: int,
    staging: Staging | None,
    attends: torch.device,
    cascade: bool = False,
    packed: bool = False,
) -> MicroBatchState:
    """Build the index tensors of ``batch``; ``windows`` are the different attention windows of the layers.

    They are on the CPU until ``to``. ``attends`` is where its attention is computed. ``cascade``: pages that several
    rows share may be attended to by all of them together. ``packed``: they are in 4 bits.
    """
    spans: list[Span] = []
    ids: list[int] = []
    positions: list[int] = []
    tables: list[Tensor] = []
    row = 0
    for place, piece in enumerate(batch.slices):
        pages = piece.sequence.pages.pages if staging is None else staging.tables[place]
        spans.append(Span(row, piece.count, piece.start, pages, piece.sequence.shared if cascade else 0))
        ids += piece.sequence.tokens[piece.start : piece.stop]
        positions += range(piece.start, piece.stop)
        if piece.count == 1:
            tables.append(torch.tensor([pages[piece.start // page_tokens]]))
        else:
            places = torch.arange(piece.start, piece.stop) // page_tokens
            tables.append(torch.tensor(pages)[places])
        row += piece.count
    where = torch.tensor(positions)
    host_ids = torch.tensor(ids)
    return MicroBatchState(
        batch=batch,
        host_ids=host_ids,
        ids=host_ids,
        positions=where,
        pages=torch.cat(tables),
        offsets=where % page_tokens,
        attention={window: prepare(spans, page_tokens, window, dtype, attends, packed=packed) for window in windows},
        dtype=dtype,
        hidden_shape=(row, hidden_size),
        hidden_offset=hidden_offset,
        staging=staging,
        attends=attends,
        rotary=rotary,
        length=max(positions) + 1,
    )


@dataclass(slots=True)
class Readout:
    """What the head read off one slice: the next token, and log-probabilities where they are wanted.

    ``prompt_branches``: by position, those of tokens that follow there in other prompts.
    """

    token: int | None = None
    logprob: float | None = None
    top: dict[int, float] = field(default_factory=dict)
    prompt_values: list[float] = field(default_factory=list)
    prompt_top: list[dict[int, float]] = field(default_factory=list)
    prompt_branches: dict[int, dict[int, float]] = field(default_factory=dict)
