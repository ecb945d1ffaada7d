"""Factors are checked on their way from a file to memory, and a run of equal ones is one copy."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from flexbatch.checkpoint.tensors import DTYPES
from flexbatch.lora.adapter import Adapter, AdapterPart, Factor
from flexbatch.lora.layout import FlatLayout, ImageLayout, ModuleIndex
from flexbatch.lora.load import FactorReader
from flexbatch.lora.modules import Module
from flexbatch.lora.runs import Run, runs_of

Expected = dict[tuple[str, str], torch.Tensor]


def modules(layers: int) -> dict[str, Module]:
    """Two linears a layer, of which the first has two parts; an embedding before and a head behind them."""
    found = [Module("head", layers + 1, "head", 0, 24, 56, 0)]
    for layer in range(layers):
        found.append(Module(f"{layer}.q", layer + 1, "qv", 0, 24, 40, 0))
        found.append(Module(f"{layer}.v", layer + 1, "qv", 1, 24, 8, 40))
        found.append(Module(f"{layer}.o", layer + 1, "o", 0, 40, 24, 0))
    return {module.name: module for module in found}


def written(
    file: Path, changed: list[tuple[Module, int]], types: tuple[str, ...], gap: int
) -> tuple[Adapter, Expected]:
    """An adapter of ``changed`` modules and ranks, in a file in the order of their names; what its factors are."""
    rng = random.Random(1)
    raw, parts = bytearray(rng.randbytes(100)), []
    expected: Expected = {}
    for number, (module, rank) in enumerate(sorted(changed, key=lambda each: each[0].name)):
        factors = []
        for side, shape in (("a", (rank, module.in_features)), ("b", (module.out_features, rank))):
            kind = types[number % len(types)]
            numbers = torch.randn(shape).to(DTYPES[kind])
            held = numbers.contiguous().view(torch.uint8).numpy().tobytes()
            factors.append(Factor(kind, shape, len(raw), len(held)))
            raw += held + bytes(gap)
            expected[module.name, side] = numbers.t() if side == "b" else numbers
        parts.append(AdapterPart(module, rank, 1.0, *factors))
    file.write_bytes(raw)
    order = {module.name: place for place, (module, _) in enumerate(changed)}
    return Adapter("one", file, len(raw), tuple(sorted(parts, key=lambda part: order[part.module.name]))), expected


@pytest.mark.parametrize("types", [("F16",), ("BF16",), ("F32",), ("F16", "F32"), ("BF16", "F16", "F32")])
@pytest.mark.parametrize("gap", [0, 2, 3])
@pytest.mark.parametrize("into", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", ["equal", "mixed", "partial"])
def test_factors_come_to_lie_where_they_should(
    types: tuple[str, ...], gap: int, into: torch.dtype, ranks: str, tmp_path: Path
) -> None:
    """Of one type or several, at whole numbers of it or not, in both layouts and in tensors of their own."""
    rng, index = random.Random(2), ModuleIndex(modules(12))
    changed = [(module, 4 if ranks == "equal" else rng.randint(1, 9)) for module in index.modules]
    if ranks == "partial":
        changed = [each for each in changed if rng.random() < 0.6]
    adapter, expected = written(tmp_path / "adapter.safetensors", changed, types, gap)
    reader = FactorReader()

    flat, start = FlatLayout.of(adapter.parts, index), 123
    memory = torch.full((start + flat.elements,), torch.nan, dtype=into)
    stretches = flat.stretches(start, index)
    reader.read(
        adapter,
        flat.runs,
        lambda run: memory.as_strided(
            run.shape, (run.stride, run.shape[2], 1), int(stretches[run.stretch]) + run.place
        ),
    )
    bases = flat.bases(start, index)
    for (name, side), wanted in expected.items():
        number, width = index.number[name], wanted.shape[1]
        first = int(bases[index.widths.index(width)] + (flat.a_rows if side == "a" else flat.b_rows)[number])
        assert torch.equal(memory[first * width :][: wanted.numel()].view_as(wanted), wanted.to(into))

    image = ImageLayout.of(adapter.parts, index)
    memory = torch.full((image.elements,), torch.nan, dtype=into)
    reader.read(adapter, image.runs, lambda run: memory.as_strided(run.shape, (run.stride, run.shape[2], 1), run.place))
    assert not memory.isnan().any()
    for (name, side), wanted in expected.items():
        number = index.number[name]
        own = (image.a_starts if side == "a" else image.b_starts)[number]
        first = int(image.starts[index.modules[number].group] + own)
        assert torch.equal(memory[first:][: wanted.numel()].view_as(wanted), wanted.to(into))

    own_tensors = [torch.full(tuple(wanted.shape), torch.nan, dtype=into) for wanted in expected.values()]
    places = {each: place for place, each in enumerate(expected)}
    runs = runs_of(adapter.parts, lambda part: ((places[part.module.name, "a"], 0), (places[part.module.name, "b"], 0)))
    reader.read(adapter, runs, lambda run: own_tensors[run.stretch][None])
    for target, wanted in zip(own_tensors, expected.values(), strict=True):
        assert torch.equal(target, wanted.to(into))


def test_layers_that_are_alike_are_one_copy_a_factor(tmp_path: Path) -> None:
    """In flat memory all, in the order of the file: 0, 1, 10, 11, 2, ..; in images, in the model's, some."""
    index = ModuleIndex(modules(12))
    changed = [(module, 4) for module in index.modules if module.name != "head"]
    adapter, _ = written(tmp_path / "adapter.safetensors", changed, ("F16",), 0)
    assert [run.count for run in FlatLayout.of(adapter.parts, index).runs] == [12] * 6
    counts = [run.count for run in ImageLayout.of(adapter.parts, index).runs]
    assert sum(counts) == 72
    assert len(counts) <= 24


@pytest.mark.parametrize("types", [("F16",), ("BF16", "F16")])
def test_what_was_fetched_to_its_own_place_is_spread_from_there(types: tuple[str, ...], tmp_path: Path) -> None:
    """In two halves through the memory that the factors then fill; where that is too small nothing is touched."""
    index = ModuleIndex({each.name: each for each in modules(200).values()})
    adapter, _ = written(tmp_path / "adapter.safetensors", [(module, 16) for module in index.modules], types, 0)
    layout = FlatLayout.of(adapter.parts, index)
    stretches = layout.stretches(0, index)

    def filled(memory: torch.Tensor, halves: bool) -> torch.Tensor:
        def place(run: Run) -> torch.Tensor:
            strides = (run.stride, run.shape[2], 1)
            return memory.as_strided(run.shape, strides, int(stretches[run.stretch]) + run.place)

        reader = FactorReader()
        if halves:
            raw = reader.fetch(adapter, layout.runs, memory.view(torch.uint8))
            assert raw is not None
            assert memory.untyped_storage().data_ptr() <= raw.data_ptr()
            FactorReader().spread(adapter, raw, layout.runs, place)
        else:
            reader.read(adapter, layout.runs, place)
        return torch.cat([place(run).flatten() for run in layout.runs])

    one, other = (torch.full((layout.elements,), torch.nan) for _ in range(2))
    assert torch.equal(filled(one, True), filled(other, False))

    small = torch.full((adapter.size // 2,), 7, dtype=torch.uint8)
    assert FactorReader().fetch(adapter, layout.runs, small) is None
    assert bool((small == 7).all())
