"""Named fp32 tensors as a safetensors file that appears complete or not at all, and back. Knows no adapters."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flexbatch.errors import InputError, InternalError
from flexbatch.jobs.durable import replace_file


def write_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write ``tensors``, fp32, in the order of ``shapes``; each is asked for only when those before it are written.

    Raises DoesNotFitError on a full disk, UsageError on other failures.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = len(text).to_bytes(8, "little") + text
    replace_file(path, _chunks(start, shapes, tensors), len(start) + end)


def _chunks(
    start: bytes, shapes: Mapping[str, tuple[int, ...]], tensors: Iterable[tuple[str, Tensor]]
) -> Iterator[bytes]:
    yield start
    for (name, shape), (given, tensor) in zip(shapes.items(), tensors, strict=True):
        if given != name or tuple(tensor.shape) != tuple(shape) or tensor.dtype != torch.float32:
            raise InternalError(f"tensor {given} was to be {name} {tuple(shape)} in float32")
        yield tensor.detach().cpu().contiguous().numpy().tobytes()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a file. Raises InputError where it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path}: cannot be read ({reason}): remove its folder, or start anew with --overwrite"
        ) from None
