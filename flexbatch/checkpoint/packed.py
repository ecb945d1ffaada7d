"""Weights in 4 bits as a safetensors file keeps them: one run of bytes each, whose name says what is in it.

Knows names, sizes and which weights of a model may be packed; not how codes are chosen.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import cast

import torch

from flexbatch.checkpoint.tensors import DTYPE_NAMES, DTYPES, TensorEntry
from flexbatch.compression.groups import GROUPS, Offset, PackedLayout
from flexbatch.errors import ModelError
from flexbatch.models.spec import WeightTable

_ALIGNMENT = 64
"""A stored weight is filled up to a multiple of it, so that all of them begin at one."""
_NAME = re.compile(r"(?P<weight>.+)\.packed-(?P<group>\d{1,4})-(?P<offset>minimum|zero|middle)-(?P<scales>F16|BF16)")


def stored_name(weight: str, layout: PackedLayout) -> str:
    """The name under which a file keeps a packed weight."""
    return f"{weight}.packed-{layout.group}-{layout.offset}-{DTYPE_NAMES[layout.scale_type]}"


def stored_bytes(layout: PackedLayout) -> int:
    """Bytes of a packed weight in a file."""
    return -(-layout.nbytes // _ALIGNMENT) * _ALIGNMENT


def stored_packed(name: str) -> tuple[str, PackedLayout | None]:
    """Return the weight that a stored tensor's name means, and, if it is packed, its layout but for the shape."""
    found = _NAME.fullmatch(name)
    if found is None or int(found["group"]) not in GROUPS:
        return name, None
    scales = DTYPES[found["scales"]]
    offset = cast(Offset, found["offset"])
    return found["weight"], PackedLayout((0, 0), int(found["group"]), offset, scales)


@dataclass(frozen=True, slots=True)
class Packable:
    """A weight that may be packed: its shape [out, in], and whether checkpoints store it [in, out]."""

    shape: tuple[int, int]
    transposed: bool


def packable(table: WeightTable) -> dict[str, Packable]:
    """The linear weights of the layers, by full name; nothing else is ever packed."""
    return {
        f"{group.prefix}{part.module}.weight": Packable((part.out_features, linear.in_features), linear.transposed)
        for group in table.layers
        for linear in group.linears
        for part in linear.parts
    }


def matched(table: WeightTable, entry: TensorEntry, name: str, form: PackedLayout) -> TensorEntry:
    """The entry of the packed weight ``name`` that ``entry`` stores; ModelError unless it is one and has its size."""
    found = packable(table).get(name)
    if found is None:
        raise ModelError(f"{entry.path}: tensor {entry.name} is packed, which only linear weights of layers may be")
    layout = replace(form, shape=found.shape)
    if entry.dtype != "U8" or entry.shape != (stored_bytes(layout),):
        raise ModelError(
            f"{entry.path}: tensor {entry.name} is {entry.dtype} {list(entry.shape)}; a weight of "
            f"{list(found.shape)} packed so is U8 [{stored_bytes(layout)}]: convert the model again"
        )
    return replace(entry, shape=found.shape, nbytes=layout.nbytes, layout=layout)


def filled_up(raw: torch.Tensor) -> torch.Tensor:
    """``raw`` uint8 [nbytes] with zeros up to what a file stores."""
    return torch.nn.functional.pad(raw, (0, -len(raw) % _ALIGNMENT))
