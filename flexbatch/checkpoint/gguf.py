"""A GGUF file as a checkpoint: every tensor of the family's table found in it, read in place or dequantized.

Knows how names, block types and the table meet; the container, the blocks and the names have modules of their own.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flexbatch.checkpoint.derived import DerivedCheckpoint, Recipe
from flexbatch.checkpoint.gguf_blocks import BLOCKS, dequantize, first_not_finite
from flexbatch.checkpoint.gguf_config import ROPE_FACTORS
from flexbatch.checkpoint.gguf_file import GgufFile, GgufTensor, read_gguf
from flexbatch.checkpoint.gguf_names import Stored, stored_as, table_rows
from flexbatch.checkpoint.safetensors import read_bytes
from flexbatch.checkpoint.tensors import DTYPE_NAMES, TensorEntry
from flexbatch.compression.groups import Packed, PackedLayout, pack_codes
from flexbatch.errors import ModelError
from flexbatch.models.spec import WeightTable
from flexbatch.shapes import ModelShape

_SAMPLE = 4096  # bytes of content hashed at each of several places
_GROUP = 32  # weights of a Q4_0 or Q4_1 block


@dataclass(frozen=True, slots=True)
class GgufRecipe:
    """One tensor of a GGUF file that is not stored as the table has it."""

    path: Path
    tensor: GgufTensor
    stored: Stored

    @property
    def layout(self) -> PackedLayout | None:
        """The layout of what ``packed`` returns."""
        tensor = self.tensor
        if tensor.kind not in ("Q4_0", "Q4_1") or len(tensor.shape) != 2:
            return None
        out_features, in_features = tensor.shape
        return PackedLayout((out_features, in_features), _GROUP, "middle" if tensor.kind == "Q4_0" else "minimum")

    def make(self) -> torch.Tensor:
        """Return the tensor: plain types as they are, others in fp32, the values of ggml's reference."""
        raw = self._raw()
        dtype = BLOCKS[self.tensor.kind].dtype
        if dtype is not None:
            return self.stored.as_table(raw.view(dtype).view(self.tensor.shape))
        values = dequantize(raw, self.tensor.kind, self.tensor.shape)
        wrong = first_not_finite(values)
        if wrong is not None:
            raise self._damaged(wrong)
        return self.stored.as_table(values)

    def packed(self) -> Packed | None:
        """Return Q4_0 (a scale; the zero is always 8) and Q4_1 (scale and minimum) exactly, with groups of 32."""
        tensor = self.tensor
        if self.layout is None:
            return None
        out_features, in_features = tensor.shape
        blocks = self._raw().view(out_features, in_features // _GROUP, BLOCKS[tensor.kind].nbytes)
        if self.stored.heads:
            blocks = table_rows(blocks, self.stored.heads)
        has_minimum = tensor.kind == "Q4_1"
        lanes = blocks[:, :, 4 if has_minimum else 2 :]
        codes = pack_codes(torch.cat([lanes & 15, lanes >> 4], dim=2).view(out_features, in_features))
        scales = blocks[:, :, :2].contiguous().view(torch.float16).squeeze(2)
        minimums = blocks[:, :, 2:4].contiguous().view(torch.float16).squeeze(2) if has_minimum else None
        for numbers in (scales, minimums):
            wrong = None if numbers is None else first_not_finite(numbers)
            if wrong is not None:
                raise self._damaged(wrong * _GROUP)
        return Packed(codes, scales, minimums, None, _GROUP, (out_features, in_features))

    def _damaged(self, number: int) -> ModelError:
        return ModelError(
            f"{self.path}: tensor {self.tensor.name}: its weight number {number} is not finite: "
            "the block's scale is damaged; fetch the file again"
        )

    def _raw(self) -> torch.Tensor:
        return read_bytes(self.path, self.tensor.name, self.tensor.offset, self.tensor.nbytes)


def open_gguf(path: Path, shape: ModelShape, config: dict[str, Any], table: WeightTable) -> DerivedCheckpoint:
    """Return the weights that ``table`` names. Reads the header only.

    Raises ModelError, naming file and tensor, on a damaged file and on a missing, unexpected or wrongly shaped tensor.
    """
    file = read_gguf(path)
    architecture = str(file.metadata.get("general.architecture"))
    wanted = table.tensors()
    entries: dict[str, TensorEntry] = {}
    recipes: dict[str, Recipe] = {}
    for name, tensor in file.tensors.items():
        if name == ROPE_FACTORS and shape.rope is not None:
            continue  # part of the configuration
        stored = stored_as(architecture, name, shape.num_heads, shape.num_kv_heads)
        if stored is None or stored.name not in wanted:
            raise ModelError(f"{path}: tensor {name} is unexpected: the file's settings leave no place for it")
        entry, recipe = _entry(path, tensor, stored)
        if entry.shape != wanted[stored.name]:
            raise ModelError(
                f"{path}: tensor {name} has shape {list(entry.shape)}, the file's settings ask for "
                f"{list(wanted[stored.name])}"
            )
        entries[stored.name] = entry
        if recipe is not None:
            recipes[stored.name] = recipe
    for absent, source in table.tied:
        if source in entries:
            entries.setdefault(absent, entries[source])
    for name in wanted:
        if name not in entries:
            raise ModelError(f"{path}: the tensor for {name} is missing from the file")
    ordered = {name: entries[name] for name in wanted}
    return DerivedCheckpoint(ordered, _fingerprint(file, config), recipes, path)


def _entry(path: Path, tensor: GgufTensor, stored: Stored) -> tuple[TensorEntry, Recipe | None]:
    """The table's entry of a stored tensor, and how it is made unless it can be read in place."""
    plain = BLOCKS[tensor.kind].dtype
    shape = tensor.shape[::-1] if stored.transposed else tensor.shape
    if stored.heads and (tensor.shape[0] % (2 * stored.heads)):
        raise ModelError(f"{path}: tensor {tensor.name} has {tensor.shape[0]} rows, no pairs for {stored.heads} heads")
    if plain is not None and not stored.heads and not stored.transposed:
        return TensorEntry(stored.name, DTYPE_NAMES[plain], shape, path, tensor.offset, tensor.nbytes), None
    dtype = plain or torch.float32
    nbytes = math.prod(shape) * dtype.itemsize
    return TensorEntry(stored.name, DTYPE_NAMES[dtype], shape, None, 0, nbytes), GgufRecipe(path, tensor, stored)


def _fingerprint(file: GgufFile, config: dict[str, Any]) -> str:
    """Hash configuration, directory, and a few kilobytes of the contents."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(file.tensors.items()):
        digest.update(f"\n{name} {tensor.kind} {tensor.shape} {tensor.offset}".encode())
    try:
        size = file.path.stat().st_size
        with file.path.open("rb") as content:
            for start in (0, size // 3, 2 * size // 3, max(0, size - _SAMPLE)):
                digest.update(os.pread(content.fileno(), _SAMPLE, start))
    except OSError as error:
        raise ModelError(f"{file.path}: cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()
