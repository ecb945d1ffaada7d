"""A model's stored weights, matched against its weight table: every tensor accounted for, or refused by name.

Knows files, names and shapes; not what a tensor is for, nor where it goes once it is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from flexbatch.checkpoint.derived import DerivedCheckpoint
from flexbatch.checkpoint.dummy import dummy_checkpoint
from flexbatch.checkpoint.gguf import open_gguf
from flexbatch.checkpoint.grouped import fold
from flexbatch.checkpoint.locate import ModelFolder
from flexbatch.checkpoint.packed import matched, stored_packed
from flexbatch.checkpoint.safetensors import read_header, read_index, read_raw, read_tensor
from flexbatch.checkpoint.tensors import DTYPES, Checkpoint, TensorEntry
from flexbatch.checkpoint.torchbin import convert, find_bin
from flexbatch.config_quantization import read_quantization
from flexbatch.errors import ModelError
from flexbatch.models.spec import WeightTable

__all__ = ["Checkpoint", "StoredCheckpoint", "TensorEntry", "open_checkpoint"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_CHUNK = 2**24  # bytes compared at a time
_SAMPLE = 4096  # bytes of content hashed at three places of each file


@dataclass(frozen=True, slots=True)
class StoredCheckpoint:
    """Weights in safetensors files, read in place."""

    entries: Mapping[str, TensorEntry]
    fingerprint: str

    def read(self, entry: TensorEntry) -> torch.Tensor:
        """Return the tensor in its stored dtype and its own memory; ModelError where the file is cut short."""
        return read_tensor(entry)

    def raw(self, entry: TensorEntry) -> torch.Tensor:
        """Return the tensor's bytes, uint8 [nbytes]; ModelError where the file is cut short."""
        return read_raw(entry)

    def divisible(self, entry: TensorEntry) -> bool:
        """Whether some rows of the tensor can be read by themselves."""
        return entry.layout is None

    def at_rest(self, entry: TensorEntry) -> TensorEntry:
        """Return the entry itself."""
        return entry


def open_checkpoint(folder: ModelFolder, table: WeightTable) -> Checkpoint:
    """Return the weights that ``table`` names. Reads headers only (and tied copies, to compare them).

    ``.bin`` shards are converted to safetensors in the user's cache first, once. Raises ModelError, naming file and
    tensor, on a missing, truncated or malformed file and on a missing, unexpected or wrongly shaped tensor.
    """
    if folder.dummy:
        return dummy_checkpoint(folder, table)
    if folder.path.is_file():
        return open_gguf(folder.path, folder.shape, folder.config, table)
    stored = _stored_entries(_weights_folder(folder.path))
    fingerprint = _fingerprint(folder, stored)
    quantization = read_quantization(folder.shape.architecture, folder.config)
    if quantization is None or quantization.method == "flexbatch":
        return StoredCheckpoint(match(table, stored, folder.path), fingerprint)
    wanted = table.tensors()
    left, recipes = fold(quantization, stored, lambda name: _full_name(table, wanted, name), table.transposed())
    return DerivedCheckpoint(match(table, left, folder.path), fingerprint, recipes, folder.path)


def _weights_folder(path: Path) -> Path:
    if (path / SINGLE).is_file() or (path / INDEX).is_file():
        return path
    shards = find_bin(path)
    if not shards:
        raise ModelError(f"{path}: no weights: neither {SINGLE}, {INDEX} nor pytorch_model.bin; fetch the model again")
    return convert(path, shards)


def _stored_entries(path: Path) -> dict[str, TensorEntry]:
    """Return every stored tensor of a folder by its stored name."""
    if (path / SINGLE).is_file():
        return read_header(path / SINGLE)
    stored: dict[str, TensorEntry] = {}
    listed = read_index(path / INDEX)
    everywhere = {name for names in listed.values() for name in names}
    for file, names in sorted(listed.items()):
        if not (path / file).is_file():
            raise ModelError(f"{path / file}: the shard is missing ({INDEX} places {names[0]} there); fetch it again")
        found = read_header(path / file)
        for name in names:
            if name not in found:
                raise ModelError(f"{path / file}: tensor {name} is missing, though {INDEX} places it there")
            stored[name] = found[name]
        stored.update((name, entry) for name, entry in found.items() if name not in everywhere)
    return stored


def match(table: WeightTable, stored: Mapping[str, TensorEntry], path: Path) -> dict[str, TensorEntry]:
    """Return the table's tensors among the stored ones; raise ModelError on any that do not fit."""
    wanted = table.tensors()
    found: dict[str, TensorEntry] = {}
    for stored_name, entry in stored.items():
        file = entry.path or path
        name, form = stored_packed(stored_name)
        full = _full_name(table, wanted, name)
        if full is None:
            if any(re.fullmatch(pattern, name) for pattern in table.ignored):
                continue
            raise ModelError(f"{file}: tensor {name} is unexpected: this architecture has none of that name")
        if full in found:
            raise ModelError(f"{file}: tensor {name} is there twice, also as {found[full].name}")
        if form is not None:
            found[full] = matched(table, entry, full, form)
            continue
        if entry.shape != wanted[full]:
            raise ModelError(
                f"{file}: tensor {name} has shape {list(entry.shape)}, config.json asks for {list(wanted[full])}"
            )
        if entry.dtype not in DTYPES:
            raise ModelError(f"{file}: tensor {name} has dtype {entry.dtype}; supported are {', '.join(DTYPES)}")
        found[full] = entry
    for absent, source in table.tied:
        _tie(found, absent, source)
    for name in wanted:
        if name not in found:
            raise ModelError(f"{path}: tensor {name} is missing from the checkpoint")
    return {name: found[name] for name in wanted}


def _full_name(table: WeightTable, wanted: Mapping[str, object], name: str) -> str | None:
    """Return the table's name for a stored one, which may lack the optional prefix or carry it needlessly."""
    prefix = table.optional_prefix
    for candidate in (name, prefix + name, name.removeprefix(prefix)):
        if candidate in wanted:
            return candidate
    return None


def _tie(found: dict[str, TensorEntry], first: str, second: str) -> None:
    """Give both names one entry; two stored copies must be the same bytes."""
    copies = [found[name] for name in (second, first) if name in found]
    if not copies:
        return
    if len(copies) == 2 and not _same_bytes(*copies):
        raise ModelError(
            f"{copies[1].path}: tensor {copies[1].name} differs from {copies[0].name}, but config.json ties them; "
            "set tie_word_embeddings to false there if both are meant"
        )
    found[first] = found[second] = copies[0]


def _same_bytes(one: TensorEntry, other: TensorEntry) -> bool:
    if (one.dtype, one.nbytes) != (other.dtype, other.nbytes) or one.path is None or other.path is None:
        return False
    with one.path.open("rb") as left, other.path.open("rb") as right:
        for start in range(0, one.nbytes, _CHUNK):
            size = min(_CHUNK, one.nbytes - start)
            if os.pread(left.fileno(), size, one.offset + start) != os.pread(
                right.fileno(), size, other.offset + start
            ):
                return False
    return True


def _fingerprint(folder: ModelFolder, stored: Mapping[str, TensorEntry]) -> str:
    """Hash configuration, what the headers say, and a few kilobytes of each file's contents."""
    digest = hashlib.sha256(json.dumps(folder.config, sort_keys=True).encode())
    for name, entry in sorted(stored.items()):
        file = entry.path.name if entry.path else ""
        digest.update(f"\n{name} {entry.dtype} {entry.shape} {file} {entry.offset}".encode())
    for path in sorted({entry.path for entry in stored.values() if entry.path}):
        size = path.stat().st_size
        with path.open("rb") as file_object:
            for start in (size // 3, 2 * size // 3, max(0, size - _SAMPLE)):
                digest.update(os.pread(file_object.fileno(), _SAMPLE, start))
    return digest.hexdigest()
