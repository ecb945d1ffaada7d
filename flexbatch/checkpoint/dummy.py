"""Random weights of any model's shapes, the same in every run: for benchmarks, where only sizes matter.

Knows shapes and names; scales are such that activations stay finite at any depth.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from flexbatch.checkpoint.locate import ModelFolder
from flexbatch.checkpoint.tensors import DTYPE_NAMES, DTYPES, TensorEntry
from flexbatch.compression.groups import MIDDLE, Offset, PackedLayout
from flexbatch.compression.quantize import quantize
from flexbatch.errors import UsageError
from flexbatch.models.spec import WeightTable

# Random numbers of one tensor repeat after this many (a prime, so that no two rows are alike): a 175B model would
# otherwise spend hours on them.
_PERIOD = 1_000_003


@dataclass(frozen=True, slots=True)
class DummyCheckpoint:
    """Weights made up on demand, each a pure function of its name, shape and dtype.

    ``fan_in`` is the number of inputs of each matrix; tensors that are not in it are embeddings, norms or biases.
    """

    entries: Mapping[str, TensorEntry]
    fingerprint: str
    fan_in: Mapping[str, int]

    def read(self, entry: TensorEntry) -> torch.Tensor:
        """Return the tensor in its stored dtype and its own memory."""
        whole = self.entries[entry.name].elements
        seed = int.from_bytes(hashlib.blake2b(entry.name.encode(), digest_size=7).digest(), "little")
        generator = torch.Generator().manual_seed(seed)
        if len(entry.shape) == 1:
            deviation, mean = 0.02, 1.0 if entry.name.endswith("weight") else 0.0
        else:
            deviation, mean = self.fan_in.get(entry.name, entry.shape[-1]) ** -0.5, 0.0
        noise = torch.randn(min(whole, _PERIOD), generator=generator) * deviation + mean
        stored = noise.to(DTYPES[entry.dtype])
        tensor = torch.empty(entry.elements, dtype=stored.dtype)
        place, begin = 0, entry.offset // stored.itemsize % len(stored)  # a piece begins in the middle
        while place < len(tensor):
            size = min(len(stored) - begin, len(tensor) - place)
            tensor[place : place + size] = stored[begin : begin + size]
            place, begin = place + size, 0
        return tensor.view(entry.shape)

    def raw(self, entry: TensorEntry) -> torch.Tensor:
        """Return the bytes that ``entry.view`` sees, uint8 [nbytes]."""
        if entry.layout is None:
            return self.read(entry).view(-1).view(torch.uint8)
        wide = self.read(replace(entry, dtype="F16", nbytes=2 * entry.elements, layout=None))
        packed = quantize(wide, group=entry.layout.group, method="minmax")
        if entry.layout.offset != "minimum":
            zeros = torch.full(packed.scales.shape, MIDDLE, dtype=torch.uint8)
            packed = replace(packed, minimums=None, zeros=zeros if entry.layout.offset == "zero" else None)
        raw = torch.empty(entry.nbytes, dtype=torch.uint8)
        entry.layout.put(packed, raw)
        return raw

    def kept_packed(
        self, shapes: Mapping[str, tuple[int, int]], group: int = 64, offset: Offset = "minimum"
    ) -> DummyCheckpoint:
        """Return such weights, those of ``shapes`` [out, in] in 4 bits."""
        entries = dict(self.entries)
        for name, shape in shapes.items():
            layout = PackedLayout(shape, group, offset)
            entries[name] = TensorEntry(name, "U8", shape, None, 0, layout.nbytes, layout)
        return replace(self, entries=entries)

    def divisible(self, entry: TensorEntry) -> bool:
        """Whether some rows of the tensor can be read by themselves."""
        return entry.layout is None

    def at_rest(self, entry: TensorEntry) -> TensorEntry:
        """Raise UsageError: made-up weights lie nowhere."""
        raise UsageError(
            f"--dummy-weights: {entry.name}: made-up weights cannot rest on disk; give --weights a disk share of 0"
        )


def dummy_checkpoint(folder: ModelFolder, table: WeightTable) -> DummyCheckpoint:
    """Return random weights for every tensor of the table, in the dtype that the configuration names."""
    dtype = getattr(torch, folder.shape.stored_dtype)
    entries = {}
    for name, shape in table.tensors().items():
        nbytes = math.prod(shape) * dtype.itemsize
        entries[name] = TensorEntry(name, DTYPE_NAMES[dtype], shape, None, 0, nbytes)
    for absent, source in table.tied:
        entries[absent] = entries[source]
    fan_in = {
        f"{group.prefix}{part.module}.weight": linear.in_features
        for group in table.groups
        for linear in group.linears
        for part in linear.parts
    }
    text = "dummy\n" + json.dumps(folder.config, sort_keys=True)
    return DummyCheckpoint(entries, hashlib.sha256(text.encode()).hexdigest(), fan_in)
