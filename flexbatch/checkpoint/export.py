"""A whole model written anew as a folder that ``--model`` takes: ``flexbatch convert``.

Knows which tensors go into which file, and what else a model's folder holds; how weights are packed is asked of others.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from flexbatch.checkpoint.four_bits import METHOD, Progress, packed_form, packed_weight
from flexbatch.checkpoint.locate import ModelFolder
from flexbatch.checkpoint.packed import filled_up, matched, packable, stored_bytes, stored_name, stored_packed
from flexbatch.checkpoint.safetensors import read_header, read_raw
from flexbatch.checkpoint.shards import Part, write_parts
from flexbatch.checkpoint.tensors import Checkpoint
from flexbatch.compression.groups import Packed, PackedLayout
from flexbatch.models.spec import GroupSpec, WeightTable

STAGE = "converting"
_GROUP = 64
_WEIGHTS = ("*.safetensors", "*.bin", "*.index.json", "*.gguf", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx")
_LARGEST = 64 << 20  # bytes of a file that is copied beside the weights


class LayerPacker(Protocol):
    """What packs the layers' weights, from the first layer to the last."""

    def pack(self, layer: int) -> Mapping[str, Packed]:
        """Pack the weights of ``layer`` that are not packed yet."""

    def pass_over(self, layer: int, packed: Mapping[str, Packed]) -> None:
        """Be told that ``layer`` was packed before, as ``packed``."""


class PlainPacker:
    """Packs every weight by itself."""

    def __init__(self, checkpoint: Checkpoint, table: WeightTable) -> None:
        self._checkpoint = checkpoint
        self._table = table
        self._kinds = packable(table)

    def pack(self, layer: int) -> Mapping[str, Packed]:
        """Pack the weights of ``layer`` that are not packed yet."""
        names = [name for name, _ in self._table.layers[layer].tensors() if name in self._kinds]
        wide = [name for name in names if self._checkpoint.entries[name].layout is None]
        return {name: packed_weight(self._checkpoint, name, self._kinds[name]) for name in wide}

    def pass_over(self, layer: int, packed: Mapping[str, Packed]) -> None:
        """Nothing hangs on it."""


def export(
    checkpoint: Checkpoint,
    folder: ModelFolder,
    table: WeightTable,
    target: Path,
    packer: LayerPacker | None,
    finish: Callable[[Path], None],
    *,
    identity: str,
    progress: Progress,
) -> None:
    """Write the model to ``target``: a file for the embedding, each layer and the head, and what lies beside them.

    ``packer`` None: no weight is packed that is not stored so. ``finish`` adds files of its own. A conversion of the
    same ``identity`` that was killed is gone on with. Raises what ``write_parts`` does, and ModelError for weights that
    cannot be packed.
    """
    groups = table.groups
    kinds = packable(table)
    repeated = {absent for absent, source in table.tied if checkpoint.entries[absent] == checkpoint.entries[source]}

    def make(number: int) -> Mapping[str, torch.Tensor]:
        group = groups[number]
        packs = packer is not None and 0 < number < len(groups) - 1
        packed = packer.pack(number - 1) if packer is not None and packs else {}
        found: dict[str, torch.Tensor] = {}
        for name, _ in group.tensors():
            entry = checkpoint.entries[name]
            if name in packed:
                key, raw = packed_form(name, packed[name])
                found[key] = raw
            elif entry.layout is not None:
                found[stored_name(name, entry.layout)] = filled_up(checkpoint.raw(entry))
            elif name not in repeated:
                found[name] = checkpoint.read(entry)
        progress(STAGE, number + 1, len(groups))
        return found

    def passed(number: int, file: Path) -> None:
        if packer is not None and 0 < number < len(groups) - 1:
            packer.pass_over(number - 1, _read_back(file, table))

    def size(group: GroupSpec) -> int:
        total = 0
        for name, _ in group.tensors():
            entry = checkpoint.entries[name]
            if packer is not None and name in kinds and entry.layout is None:
                total += stored_bytes(PackedLayout(kinds[name].shape))
            elif name not in repeated:
                total += entry.nbytes
        return total

    def complete(place: Path) -> None:
        config = dict(folder.config)
        config.pop("quantization_config", None)
        if packer is not None or any(entry.layout is not None for entry in checkpoint.entries.values()):
            config["quantization_config"] = _description()
        (place / "config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        if folder.path.is_dir():
            _copy_others(folder.path, place)
        finish(place)

    parts = [Part(size(group), partial(make, number), partial(passed, number)) for number, group in enumerate(groups)]
    write_parts(target, f"{METHOD} {identity}", parts, complete, remedy="choose an --output on a larger disk")


def _description() -> dict[str, Any]:
    return {"quant_method": "flexbatch", "version": 1, "bits": 4, "group_size": _GROUP}


def _read_back(file: Path, table: WeightTable) -> dict[str, Packed]:
    found: dict[str, Packed] = {}
    for stored, entry in read_header(file).items():
        name, form = stored_packed(stored)
        if form is not None:
            kept = matched(table, entry, name, form)
            assert kept.layout is not None
            found[name] = kept.layout.view(read_raw(kept))
    return found


def _copy_others(source: Path, target: Path) -> None:
    """Tokenizer, template, generation settings, licence: all files but weights and the configuration."""
    for file in sorted(source.iterdir()):
        weights = any(file.match(pattern) for pattern in _WEIGHTS)
        if file.is_file() and not weights and file.name != "config.json" and file.stat().st_size <= _LARGEST:
            shutil.copyfile(file, target / file.name)
