"""Safetensors files: headers read with every claim checked against the file, tensors read by byte range, files written.

Knows the file format; not which tensors a model needs.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flexbatch.checkpoint.tensors import DTYPE_NAMES, DTYPES, TensorEntry
from flexbatch.errors import ModelError
from flexbatch.units import format_size

MAX_HEADER = 100 * 10**6
"""Longest header accepted, in bytes; the format's own limit."""

_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "C64": 64,
}
_MAX_DIMENSION = 2**48

WRITABLE: dict[torch.dtype, str] = {
    **DTYPE_NAMES,
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What ``write_file`` takes: weights, and the buffers that old checkpoints carry beside them."""


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Return the entries of a file by name; raise ModelError unless every claim of the header fits the file."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8:
                raise ModelError(f"{path}: the file is truncated: {size} bytes, not even a header; fetch it again")
            if length > MAX_HEADER or length > size - 8:
                raise ModelError(
                    f"{path}: the header claims {format_size(length)}, the file holds {format_size(size)} "
                    f"(at most {format_size(MAX_HEADER)} is accepted): no safetensors file, or a truncated one"
                )
            raw = file.read(length)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(raw) < length:
        raise ModelError(f"{path}: the file is truncated inside its header; fetch it again")
    header = _parse(path, raw)
    entries = [_entry(path, name, claim, 8 + length, size) for name, claim in header.items() if name != "__metadata__"]
    _check_layout(path, entries, 8 + length, size)
    return {entry.name: entry for entry in entries}


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name appears twice")
        return found

    try:
        header = json.loads(raw, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: the header is not valid JSON ({error}): damaged, fetch it again") from error
    if not isinstance(header, dict):
        raise ModelError(f"{path}: the header is not a JSON object: no safetensors file")
    return header


def _entry(path: Path, name: str, claim: Any, data_start: int, file_size: int) -> TensorEntry:
    """Check one tensor's claims; nothing is allocated before they hold."""
    where = f"{path}: tensor {name}"
    if not isinstance(claim, dict) or claim.keys() != {"dtype", "shape", "data_offsets"}:
        raise ModelError(f"{where}: the header must give exactly dtype, shape and data_offsets")
    dtype, shape, offsets = claim["dtype"], claim["shape"], claim["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ModelError(f"{where}: dtype {str(dtype)[:40]!r} is unknown")
    if not _whole_numbers(shape) or any(size > _MAX_DIMENSION for size in shape):
        raise ModelError(f"{where}: shape must be a list of whole numbers below 2^48")
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise ModelError(f"{where}: data_offsets must be two whole numbers")
    begin, end = offsets
    if begin > end or end > file_size - data_start:
        raise ModelError(
            f"{where}: its bytes {begin} to {end} lie outside of the file's data "
            f"({file_size - data_start} bytes): truncated, fetch the file again"
        )
    bits = math.prod(shape) * _BITS[dtype]
    if bits % 8 or bits // 8 != end - begin:
        raise ModelError(f"{where}: {dtype} {shape} needs {bits / 8:.0f} bytes, but {end - begin} are stored")
    return TensorEntry(name, dtype, tuple(shape), path, data_start + begin, end - begin)


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in value
    )


def _check_layout(path: Path, entries: list[TensorEntry], data_start: int, file_size: int) -> None:
    """The tensors must cover the data without overlap or hole, as the format demands."""
    position = data_start
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset < position:
            raise ModelError(f"{path}: tensor {entry.name} overlaps another tensor: damaged, fetch the file again")
        if entry.offset > position:
            raise ModelError(f"{path}: {entry.offset - position} bytes before tensor {entry.name} belong to no tensor")
        position = entry.offset + entry.nbytes
    if position != file_size:
        raise ModelError(f"{path}: {file_size - position} bytes at its end belong to no tensor")


def read_tensor(entry: TensorEntry) -> torch.Tensor:
    """Read one tensor by its byte range into memory of exactly its size; ModelError where the file ends early."""
    assert entry.layout is None, f"{entry.name} is packed"
    return read_raw(entry).view(DTYPES[entry.dtype]).view(entry.shape)


def read_raw(entry: TensorEntry) -> torch.Tensor:
    """Read one tensor's bytes, uint8 [nbytes], into memory of their own; ModelError where the file ends early."""
    assert entry.path is not None, "a tensor without a file cannot be read from one"
    return read_bytes(entry.path, entry.name, entry.offset, entry.nbytes)


def read_bytes(path: Path, name: str, offset: int, nbytes: int) -> torch.Tensor:
    """Return a range of a file as uint8 [nbytes]; ModelError, naming the tensor, where the file ends early."""
    buffer = torch.empty(nbytes, dtype=torch.uint8)
    target = buffer.numpy().data
    done = 0
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            while done < nbytes:
                count = os.preadv(descriptor, [target[done:]], offset + done)
                if count == 0:
                    raise ModelError(
                        f"{path}: tensor {name}: the file ends after {done} of {nbytes} bytes; "
                        "it changed or was truncated: fetch it again"
                    )
                done += count
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ModelError(f"{path}: tensor {name}: {error.strerror or error}") from error
    return buffer


def write_file(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors to ``path``, one after the other (at most one is copied at a time), and fsync."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": WRITABLE[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + size],
        }
        position += size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-(8 + len(raw)) % 64)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for tensor in tensors.values():
            file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def read_index(path: Path) -> dict[str, list[str]]:
    """Return, for every shard of an index file, the names of its tensors; ModelError on anything malformed."""
    try:
        index = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON ({error}); fetch it again") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{path}: weight_map is missing; fetch it again")
    shards: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\\0]+", file) or file in (".", ".."):
            raise ModelError(
                f"{path}: weight_map.{name} is {str(file)[:80]!r}; it must be a file name in the same folder"
            )
        shards.setdefault(file, []).append(name)
    return shards
