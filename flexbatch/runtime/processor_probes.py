"""What is measured of a processor: products by rows and type, widening, attention over paged KV, what a Step costs.

Everything runs through the kernels and the executor of real runs, on weights and pages that are not in a cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexbatch.compression.groups import PackedLayout
from flexbatch.kernels.activations import gated
from flexbatch.kernels.attention import Span, attend, prepare
from flexbatch.kernels.kv4 import Tokens, attend_packed, store_packed
from flexbatch.kernels.kv4_basis import Basis
from flexbatch.kernels.linear import Weight, linear, pack
from flexbatch.kernels.norms import rms_norm
from flexbatch.kernels.paged import has_kernels, key_rows, store_paged
from flexbatch.kernels.rotary import apply_rotary
from flexbatch.memory.kv import PageShape
from flexbatch.policy.footprint import KV_NEAR
from flexbatch.runtime.device import Device
from flexbatch.runtime.executor import Executor
from flexbatch.runtime.probes import Probe, Sampler, Stopwatch
from flexbatch.runtime.trace import Trace
from flexbatch.scheduler.steps import Resource, Step

WIDENED_ROWS = 64  # enough that reading weights does not hide what widening costs, few enough that it shows
_HEAD_DIM, _KV_HEADS, _GROUP = 128, 8, 4
_CONTEXT, _PAGE_TOKENS, _MOST_SEQUENCES = 512, 64, 64
_STEPS, _STEP_WIDTH = 64, 64
_PASSING_ROWS = 256
_SHORT, _SHORT_ROWS = 16, 8


@dataclass(frozen=True, slots=True)
class Bench:
    """A processor to measure: ``tier`` names its figures, ``room`` bytes of its memory may be taken.

    ``slowest``: seconds that one product may take; more rows are not tried after it.
    """

    device: Device
    tier: Resource
    room: int
    slowest: float = 0.5

    @property
    def torch_device(self) -> torch.device:
        """Where its operands live."""
        return self.device.torch_device if self.tier == "gpu" else torch.device("cpu")

    @property
    def side(self) -> int:
        """Rows and columns of a weight: those of common models, smaller where memory is short."""
        wanted = 2048 if self.torch_device.type == "cpu" else 4096
        while wanted > 64 and 4 * 4 * wanted * wanted > self.room:
            wanted //= 2
        return wanted

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory of the kind that weights and pages rest in."""
        allocate = self.device.gpu_buffer if self.tier == "gpu" else self.device.host_buffer
        return allocate(math.prod(shape) * dtype.itemsize).view(dtype).view(*shape)

    def random(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Such memory with numbers in it; an extent that was never written would be read from one cached page."""
        with self.device.lane(self.tier):
            return self.empty(shape, dtype).normal_()

    def watch(self) -> Stopwatch:
        """Times work of this processor."""
        return Stopwatch(self.device, self.tier)

    def weights(self, dtype: torch.dtype, *, loose: bool = False) -> list[Weight]:
        """Weights, each [side, side], that together take ``room``: more than any cache holds.

        A CPU's are in blocks, as those that stay are, unless they are to be ``loose``.
        """
        nbytes = self.side**2 * dtype.itemsize
        drawn = (self.random((self.side, self.side), dtype) for _ in range(max(2, self.room // nbytes)))
        return [weight if loose or self.tier == "gpu" else pack(weight) for weight in drawn]

    def packed_weights(self) -> list[Weight]:
        """The same in 4 bits."""
        layout = PackedLayout((self.side, self.side))
        with self.device.lane(self.tier):
            raws = [
                self.empty((layout.nbytes,), torch.uint8).random_() for _ in range(max(2, self.room // layout.nbytes))
            ]
            packed = [layout.view(raw) for raw in raws]
            for weight in packed:
                weight.scales.fill_(0.01)
                assert weight.minimums is not None
                weight.minimums.fill_(-0.075)
        return list(packed)


def products(bench: Bench, dtype: torch.dtype, rows: Sequence[int], *, loose: bool = False) -> Probe:
    """FLOP/s of a linear with operands in ``dtype``, at each number of ``rows``; ``loose``: not in blocks."""
    name = "loose" if loose else f"products.{str(dtype).removeprefix('torch.')}"

    def samplers() -> Iterator[Sampler]:
        weights = bench.weights(dtype, loose=loose)
        rate = math.inf
        for count in rows:
            flops = 2 * count * bench.side**2
            if flops / rate > bench.slowest:
                return
            work = _product(bench, weights, count, dtype)
            watch = bench.watch()

            def sample(work: Callable[[int], None] = work, watch: Stopwatch = watch, flops: int = flops) -> float:
                nonlocal rate
                rate = flops / watch.seconds(work)
                return rate

            yield sample

    return Probe(tuple(f"{bench.tier}.{name}.{count}" for count in rows), samplers)


def widening(bench: Bench, stored: torch.dtype | None) -> Probe:
    """Weights/s that a linear in float32 widens from ``stored``: how much longer it takes than on loose float32 ones.

    None: unpacks from 4 bits. The difference is at least a fiftieth of the product's own time, for it is no better
    known.
    """
    name = "int4" if stored is None else str(stored).removeprefix("torch.")

    def samplers() -> Iterator[Sampler]:
        wide = bench.weights(torch.float32, loose=True)
        narrow = bench.packed_weights() if stored is None else bench.weights(stored, loose=True)
        plain = _product(bench, wide, WIDENED_ROWS, torch.float32)
        widened = _product(bench, narrow, WIDENED_ROWS, torch.float32)
        watches = bench.watch(), bench.watch()

        def sample() -> float:
            alone, both = watches[0].seconds(plain), watches[1].seconds(widened)
            return bench.side**2 / max(both - alone, alone / 50)

        yield sample

    return Probe((f"{bench.tier}.widened.{name}",), samplers)


def elementwise(bench: Bench, dtype: torch.dtype) -> Probe:
    """Bytes/s that what lies between a layer's products reads and writes: a norm, an addition, a gated activation."""
    hidden, inner = bench.side, 3 * bench.side
    rows = max(1, min(_PASSING_ROWS, bench.room // (4 * inner * dtype.itemsize)))

    def samplers() -> Iterator[Sampler]:
        with bench.device.lane(bench.tier):
            x, y = (torch.randn(rows, hidden, device=bench.torch_device).to(dtype) for _ in range(2))
            gate_up = torch.randn(rows, 2 * inner, device=bench.torch_device).to(dtype)
            weight = torch.ones(hidden, device=bench.torch_device).to(dtype)

        def work(_: int) -> None:
            _drop(rms_norm(x, weight, 1e-5).add_(y))
            _drop(gated("silu", gate_up))

        watch = bench.watch()
        passed = rows * (5 * hidden + 5 * inner) * dtype.itemsize
        yield lambda: passed / watch.seconds(work)

    return Probe((f"{bench.tier}.elementwise",), samplers)


def attention(bench: Bench, dtype: torch.dtype) -> Probe:
    """KV bytes/s of attention of decoding rows, and FLOP/s of prompt chunks, half of them continuing a prompt."""
    kv_heads, context = _KV_HEADS, _CONTEXT
    while _sequences(bench, kv_heads, context, dtype) < 2 and (kv_heads > 1 or context > _PAGE_TOKENS):
        kv_heads, context = (kv_heads // 2, context) if kv_heads > 1 else (kv_heads, context // 2)
    page = PageShape(kv_heads, _PAGE_TOKENS, _HEAD_DIM, dtype)
    pages_each = context // _PAGE_TOKENS
    heads = kv_heads * _GROUP

    def run(layer: Tensor, spans: Sequence[Span]) -> Callable[[int], None]:
        tokens = sum(span.count for span in spans)
        with bench.device.lane(bench.tier):
            batch = prepare(spans, _PAGE_TOKENS, None, dtype, bench.torch_device).to(bench.torch_device)
            q = torch.randn(tokens, heads, _HEAD_DIM, device=bench.torch_device).to(dtype)
            k, v = (torch.randn(tokens, kv_heads, _HEAD_DIM, device=bench.torch_device).to(dtype) for _ in range(2))
        return lambda _: _drop(attend(batch, layer, q, k, v, _HEAD_DIM**-0.5))

    def samplers() -> Iterator[Sampler]:
        sequences = max(2, _sequences(bench, kv_heads, context, dtype))
        layer = page.view(
            bench.random((sequences * pages_each * page.nbytes // dtype.itemsize,), dtype).view(torch.uint8)
        )
        singles = [
            Span(row, 1, context - 1, range(row * pages_each, (row + 1) * pages_each)) for row in range(sequences)
        ]
        decode, watch = run(layer, singles), bench.watch()
        read = sequences * pages_each * page.nbytes
        yield lambda: read / watch.seconds(decode)
        half = context // 2
        chunks = [
            Span(0, half, 0, range(pages_each)),
            Span(half, half, half, range(pages_each, 2 * pages_each)),
        ]
        prompt, prompt_watch = run(layer, chunks), bench.watch()
        pairs = sum(span.count * span.start + span.count * (span.count + 1) // 2 for span in chunks)
        flops = 4 * heads * _HEAD_DIM * pairs
        yield lambda: flops / prompt_watch.seconds(prompt)

    return Probe((f"{bench.tier}.attention_bytes", f"{bench.tier}.attention_flops"), samplers)


def short_attention(bench: Bench, dtype: torch.dtype) -> Probe:
    """Attention Steps/s of a few rows with short contexts, with the store of their keys and values."""
    page = PageShape(2, _PAGE_TOKENS, 64, dtype)

    def samplers() -> Iterator[Sampler]:
        device = bench.torch_device
        with bench.device.lane(bench.tier):
            layer = page.view(bench.empty((_SHORT_ROWS * page.nbytes,), torch.uint8))
            layer.zero_()
            spans = [Span(row, 1, _SHORT - 1, range(row, row + 1)) for row in range(_SHORT_ROWS)]
            batch = prepare(spans, _PAGE_TOKENS, None, dtype, device).to(device)
            pages = torch.arange(_SHORT_ROWS, device=device)
            offsets = torch.full_like(pages, _SHORT - 1)
            q = torch.randn(_SHORT_ROWS, 2 * _GROUP, 64, device=device).to(dtype)
            k = torch.randn(_SHORT_ROWS, 2, 64, device=device).to(dtype)
            rows = None if has_kernels(device) else key_rows(pages, offsets, 2, _PAGE_TOKENS)

        def work(_: int) -> None:
            store_paged(layer, pages, offsets, k, k, rows)
            _drop(attend(batch, layer, q, k, k, 64**-0.5))

        watch = bench.watch()
        yield lambda: 1 / watch.seconds(work)

    return Probe((f"{bench.tier}.attend_s",), samplers)


def packed_attention(bench: Bench, dtype: torch.dtype) -> Probe:
    """KV numbers/s that attention of decoding rows reads in 4 bits, and that are packed, of a prompt's chunk."""
    kv_heads, device = 2, bench.torch_device
    page = PageShape(kv_heads, _PAGE_TOKENS, _HEAD_DIM, dtype, 4)
    pages_each = _CONTEXT // _PAGE_TOKENS
    each = pages_each * page.nbytes
    sequences = max(2, min(_MOST_SEQUENCES, bench.room // each))

    def samplers() -> Iterator[Sampler]:
        with bench.device.lane(bench.tier):
            layer = page.view(bench.empty((sequences * each,), torch.uint8))
            basis = Basis.plain(kv_heads, _HEAD_DIM).to(device)
            spans = [
                Span(row, 1, _CONTEXT - 1, range(row * pages_each, (row + 1) * pages_each)) for row in range(sequences)
            ]
            batch = prepare(spans, _PAGE_TOKENS, None, dtype, device, packed=True).to(device)
            turns = torch.ones(_CONTEXT + _PAGE_TOKENS, _HEAD_DIM, device=device)
            q = torch.randn(sequences, kv_heads * _GROUP, _HEAD_DIM, device=device).to(dtype)
            k = torch.randn(_CONTEXT, kv_heads, _HEAD_DIM, device=device).to(dtype)
            positions = torch.arange(_CONTEXT, device=device)
            pages, offsets = positions // _PAGE_TOKENS, positions % _PAGE_TOKENS
            own = torch.arange(sequences, device=device)
            at = torch.full_like(own, _CONTEXT - 1)
            k_own = k[:1].expand(sequences, -1, -1)
            newest = Tokens(k_own, k_own, own * pages_each + at // _PAGE_TOKENS, at % _PAGE_TOKENS, at)

        def pack(_: int) -> None:
            store_packed(layer, Tokens(k, k, pages, offsets, positions), positions[-KV_NEAR:], basis, turns)

        def read(_: int) -> None:
            _drop(attend_packed(batch, layer, q, newest, _HEAD_DIM**-0.5, basis, turns))

        numbers = 2 * _CONTEXT * kv_heads * _HEAD_DIM
        watches = bench.watch(), bench.watch()
        with bench.device.lane(bench.tier):
            pack(0)
            layer.unflatten(0, (sequences, pages_each))[1:] = layer[:pages_each]
        yield lambda: sequences * numbers / watches[0].seconds(read)
        yield lambda: numbers / watches[1].seconds(pack)

    return Probe((f"{bench.tier}.packed_attention", f"{bench.tier}.packing"), samplers)


def _sequences(bench: Bench, kv_heads: int, context: int, dtype: torch.dtype) -> int:
    """How many sequences' KV there is room for."""
    each = PageShape(kv_heads, context, _HEAD_DIM, dtype).nbytes
    return min(_MOST_SEQUENCES, bench.room // each)


def steps(bench: Bench, dtype: torch.dtype) -> Probe:
    """Steps/s of the executor where each does half of what a layer does, on a few rows of next to no width.

    One half is a norm, a product and rotary embedding; the other three products, a norm and a gated activation.
    """
    device = bench.torch_device

    def samplers() -> Iterator[Sampler]:
        width, rows = _STEP_WIDTH, _SHORT_ROWS
        with bench.device.lane(bench.tier):
            x = torch.randn(rows, width, device=device).to(dtype)
            scale = torch.ones(width, device=device).to(dtype)
            angles = torch.rand(2, rows, width // 4, device=device)
            drawn = [torch.randn(wide * width, width, device=device).to(dtype) / width for wide in (2, 1, 2, 1)]
        own = drawn if bench.tier == "gpu" else [pack(weight) for weight in drawn]
        qkv, out, gate_up, down = ((weight,) for weight in own)

        def handle(step: Step) -> None:
            if step.id % 2:
                heads = linear(rms_norm(x, scale, 1e-5), qkv).view(rows, -1, width // 2)
                _drop(apply_rotary(heads.split((3, 1), dim=1)[0], angles[0], angles[1]))
            else:
                state = linear(x, out).add_(x)
                inner = gated("silu", linear(rms_norm(state, scale, 1e-5), gate_up))
                _drop(linear(inner, down).add_(state))

        executor = Executor({"finish": handle}, bench.device, Trace(keep=False), overlap=True)
        watch = Stopwatch(bench.device, bench.tier)
        number = 0

        def run(_: int) -> None:
            nonlocal number
            tasks = [
                Step(index, "finish", bench.tier, 1, 0, 1, () if index == number else (index - 1,))
                for index in range(number, number + _STEPS)
            ]
            number += _STEPS
            executor.run(tasks, 0, {number - 1})

        try:
            yield lambda: _STEPS / watch.seconds(run)
        finally:
            executor.close()

    return Probe((f"{bench.tier}.step_s",), samplers)


def _product(bench: Bench, weights: Sequence[Weight], rows: int, dtype: torch.dtype) -> Callable[[int], None]:
    with bench.device.lane(bench.tier):
        x = torch.randn(rows, bench.side, device=bench.torch_device).to(dtype)
    turn = 0

    def work(_: int) -> None:
        nonlocal turn
        turn = (turn + 1) % len(weights)
        linear(x, (weights[turn],))

    return work


def _drop(_: Tensor) -> None:
    """A result that nobody needs."""
