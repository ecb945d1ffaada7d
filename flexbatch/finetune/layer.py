"""One layer of a micro-batch, forward and backward, in token windows. Holds no state; knows neither tiers nor Steps.

Backward recomputes from the layer's input. Keys and values of the whole micro-batch come first, detached; then windows
from the last to the first: each adds to the gradients of the keys and values it attends to, which are complete for its
own tokens by then, for nothing later attends to them. (DESIGN, "Finetuning"; the order is FlexLLM's, arXiv 2402.18789.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from flexbatch.models.spec import Family, LayerContext
from flexbatch.scheduler.training import Piece, Window

ContextOf = Callable[[Window], LayerContext]

_WIDENED = 256  # queries up to which a CPU's attention and its derivative take half the time in fp32 that bf16 takes


@dataclass(frozen=True, slots=True)
class LayerMath:
    """What the layer is: its wiring, attention scale and sliding window, and a context for each token window."""

    family: Family
    context: ContextOf
    scale: float
    sliding: int | None

    def forward(self, x: Tensor, windows: Sequence[Window], out: Tensor) -> None:
        """From x [T, hidden] to ``out`` of the same shape."""
        keys = values = None
        for window in windows:
            context, rows = self.context(window), slice(window.start, window.stop)
            q, k, v = self.family.project(context, x[rows])
            if len(windows) == 1:
                keys, values = k, v
            elif keys is None or values is None:
                keys, values = k.new_empty(x.shape[0], *k.shape[1:]), v.new_empty(x.shape[0], *v.shape[1:])
            if len(windows) > 1:
                keys[rows], values[rows] = k, v
            attended = [self._attend(q, keys, values, window, piece) for piece in window.pieces]
            out[rows] = self.family.finish(context, x[rows], _joined(attended))

    def backward(self, x: Tensor, windows: Sequence[Window], dy: Tensor, *, wanted: bool) -> None:
        """Add to the gradients of the layer's factors; dy [T, hidden] becomes dx if that is ``wanted``."""
        if len(windows) == 1:
            keys = values = None
        else:
            keys, values = self._keys(x, windows)
        sums: tuple[Tensor, Tensor] | None = None
        for window in reversed(windows):
            rows = slice(window.start, window.stop)
            context = self.context(window)
            with torch.enable_grad():
                before = x[rows].detach().requires_grad_(wanted)
                projected = self.family.project(context, before)
                learns = any(part.requires_grad for part in projected)
                q = projected[0].detach().requires_grad_(learns)
                if keys is None or values is None:
                    keys, values = projected[1].detach(), projected[2].detach()
                pieces = [self._graph(q, keys, values, window, piece) for piece in window.pieces]
                attended = _joined([piece.attended.detach() for piece in pieces]).requires_grad_(learns)
                beside = x[rows].detach().requires_grad_(wanted)
                y = self.family.finish(context, beside, attended)
            torch.autograd.backward([y], [dy[rows]])
            del y
            if learns:
                assert attended.grad is not None
                if sums is None:
                    sums = torch.zeros_like(keys, dtype=torch.float32), torch.zeros_like(values, dtype=torch.float32)
                for piece in pieces:
                    piece.backward(attended.grad, sums)
                assert q.grad is not None
                gradients = (q.grad, sums[0][rows].to(x.dtype), sums[1][rows].to(x.dtype))
                pairs = [pair for pair in zip(projected, gradients, strict=True) if pair[0].requires_grad]
                torch.autograd.backward([pair[0] for pair in pairs], [pair[1] for pair in pairs])
            if wanted:
                assert before.grad is not None
                assert beside.grad is not None
                torch.add(before.grad, beside.grad, out=dy[rows])

    def _keys(self, x: Tensor, windows: Sequence[Window]) -> tuple[Tensor, Tensor]:
        """Keys and values of all rows, [T, kv_heads, head_dim] each."""
        keys = values = None
        with torch.no_grad():
            for window in windows:
                rows = slice(window.start, window.stop)
                _, k, v = self.family.project(self.context(window), x[rows])
                if keys is None or values is None:
                    keys, values = k.new_empty(x.shape[0], *k.shape[1:]), v.new_empty(x.shape[0], *v.shape[1:])
                keys[rows], values[rows] = k, v
        assert keys is not None
        assert values is not None
        return keys, values

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, window: Window, piece: Piece) -> Tensor:
        first = self._first(piece)
        own = slice(piece.start - window.start, piece.stop - window.start)
        seen = slice(first, piece.stop)
        return attend(q[own], keys[seen], values[seen], piece.start - first, self.scale, self.sliding)

    def _graph(self, q: Tensor, keys: Tensor, values: Tensor, window: Window, piece: Piece) -> _Attention:
        first = self._first(piece)
        own = slice(piece.start - window.start, piece.stop - window.start)
        seen = slice(first, piece.stop)
        learns = q.requires_grad
        k, v = keys[seen].detach().requires_grad_(learns), values[seen].detach().requires_grad_(learns)
        attended = attend(q[own], k, v, piece.start - first, self.scale, self.sliding)
        return _Attention(own, seen, k, v, attended)

    def _first(self, piece: Piece) -> int:
        """The first row that any token of the piece attends to."""
        return piece.first if self.sliding is None else max(piece.first, piece.start - self.sliding + 1)


@dataclass(slots=True)
class _Attention:
    """Attention of one piece, to be differentiated: queries ``own`` of the window over the rows ``seen``."""

    own: slice
    seen: slice
    k: Tensor
    v: Tensor
    attended: Tensor

    def backward(self, gradient: Tensor, sums: tuple[Tensor, Tensor]) -> None:
        """Add to the gradients of q (autograd does) and to the ``sums`` of those of keys and values."""
        torch.autograd.backward([self.attended], [gradient[self.own]])
        assert self.k.grad is not None
        assert self.v.grad is not None
        sums[0][self.seen] += self.k.grad
        sums[1][self.seen] += self.v.grad
        self.k.grad = self.v.grad = None


def attend(q: Tensor, k: Tensor, v: Tensor, offset: int, scale: float, sliding: int | None) -> Tensor:
    """Causal attention, differentiable: q [n, heads, D] at rows ``offset`` on of k, v [m, kv_heads, D] -> as q."""
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and q.shape[0] <= _WIDENED:
        return attend(q.float(), k.float(), v.float(), offset, scale, sliding).to(q.dtype)
    count, total = q.shape[0], k.shape[0]
    mask: Tensor | None = None
    if count == 1:
        pass  # it sees all that it was given
    elif offset > 0 or (sliding is not None and total > sliding):
        queries_at = torch.arange(offset, offset + count, device=q.device).unsqueeze(1)
        keys_at = torch.arange(total, device=q.device)
        mask = keys_at <= queries_at
        if sliding is not None:
            mask &= keys_at > queries_at - sliding
    attended = functional.scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0),
        k.transpose(0, 1).unsqueeze(0),
        v.transpose(0, 1).unsqueeze(0),
        attn_mask=mask,
        is_causal=mask is None and count > 1,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return attended[0].transpose(0, 1)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
