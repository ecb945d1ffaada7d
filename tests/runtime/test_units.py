"""How a model's weights are cut to units that are placed by themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flexbatch.checkpoint.dummy import dummy_checkpoint
from flexbatch.checkpoint.locate import locate
from flexbatch.checkpoint.reader import open_checkpoint
from flexbatch.models.registry import family_of
from flexbatch.policy.weights import deal
from flexbatch.runtime import units as units_module
from flexbatch.runtime.units import unit_sizes, units_of
from flexbatch.units import Shares
from tests.tiny import FAMILIES, tiny_checkpoint


@pytest.fixture(autouse=True)
def _tiny_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units_module, "_LEAST_PIECE", 1)
    monkeypatch.setattr(units_module, "_ROWS", 4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("made_up", [False, True])
def test_units_are_all_of_the_weights_once_and_in_order(family: str, made_up: bool, tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, family, "random")
    folder = locate(str(tmp_path))
    table = family_of(folder.shape).table(folder.shape)
    checkpoint = dummy_checkpoint(folder, table) if made_up else open_checkpoint(folder, table)
    units = units_of(table, checkpoint, folder.shape.vocab_size)
    pieces = 0
    for index, group in enumerate(table.groups):
        for linear in group.linears:
            held = [unit for unit in units if unit.group == index and unit.name == linear.name and not unit.is_table]
            whole = [
                checkpoint.read(checkpoint.entries[f"{group.prefix}{part.module}.weight"]) for part in linear.parts
            ]
            read = [checkpoint.read(entry) for unit in held for entry in unit.entries]
            assert torch.equal(torch.cat(read), torch.cat(whole))
            raw = [checkpoint.raw(entry) for unit in held for entry in unit.entries]
            assert torch.equal(torch.cat(raw), torch.cat([part.view(-1).view(torch.uint8) for part in read]))
            pieces += len(held) - 1
            assert len(held) == 1 or not linear.transposed
    assert pieces > 0 or any(linear.transposed for linear in table.layers[0].linears)
    layers = [unit for unit in units if 0 < unit.group < len(table.groups) - 1]
    assert len({unit.key for unit in layers}) == len(layers)
    uncut = units_of(table, checkpoint, folder.shape.vocab_size, whole=True)
    assert sum(size.nbytes for size in unit_sizes(units)) == sum(size.nbytes for size in unit_sizes(uncut))


def test_every_layer_asks_as_much_of_the_disk() -> None:
    folder = locate("qwen2-1.5b", dummy=True)
    table = family_of(folder.shape).table(folder.shape)
    checkpoint = dummy_checkpoint(folder, table)

    def spread(*, whole: bool) -> float:
        units = unit_sizes(units_of(table, checkpoint, folder.shape.vocab_size, whole=whole))
        reads = list(deal(units, Shares(0.0, 0.47, 0.53), compute="cpu", edges="cpu").reads.values())
        return max(reads) / min(reads)

    assert spread(whole=True) > 2
    assert spread(whole=False) < 1.2
