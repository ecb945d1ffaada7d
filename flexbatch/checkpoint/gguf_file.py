"""GGUF files: metadata and tensor directory, every claim checked against the file before anything is allocated for it.

Knows the container (versions 2 and 3, little endian); not what a key or a tensor means, nor how blocks are dequantized.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from flexbatch.checkpoint.gguf_blocks import BLOCKS, TYPE_NAMES
from flexbatch.errors import ModelError
from flexbatch.units import format_size

MAGIC = b"GGUF"
MAX_HEADER = 2**27
"""Longest header accepted, in bytes: the largest vocabularies take a tenth of it."""
_MAX_ITEMS = 2**22  # elements of one array
_MAX_NAME = 1024  # bytes of a key or a tensor's name
_MAX_DIMENSIONS = 4
_MAX_SIZE = 2**40  # elements along one dimension
_STEP = 2**22  # bytes read ahead
_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS: dict[int, str] = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
_PLAIN = {kind: struct.Struct("<" + code) for kind, code in _NUMBERS.items()}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One stored tensor: ``shape`` is as in PyTorch (the last dimension is contiguous); ``offset`` is in the file."""

    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """What a file's header says, checked: values by key (numbers, booleans, text, lists of them), tensors by name."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


def is_gguf(path: Path) -> bool:
    """Return whether a file is named as GGUF or begins as one."""
    if path.suffix.lower() == ".gguf":
        return path.is_file()
    try:
        with path.open("rb") as file:
            return path.is_file() and file.read(4) == MAGIC
    except OSError:
        return False


def read_gguf(path: Path) -> GgufFile:
    """Return a file's header. Reads no tensor.

    Raises ModelError, in one line, on anything malformed: a damaged header, types that are not supported (by name),
    tensors that overlap or leave holes, and a truncated file (with the number of missing bytes).
    """
    try:
        with path.open("rb") as file:
            return _Header(path, file, os.fstat(file.fileno()).st_size).read()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error


class _Header:
    """A cursor over the header: every read is bounded by the file's size and by ``MAX_HEADER``."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self._path = path
        self._file = file
        self._size = size
        self._bytes = bytearray()
        self._position = 0

    def read(self) -> GgufFile:
        if self._take(4) != MAGIC:
            raise self._wrong("it does not begin with GGUF: no GGUF file")
        version = self._number(4)
        if version not in (2, 3):
            big = struct.unpack(">I", struct.pack("<I", version))[0]
            reason = "big endian" if big in (2, 3) else f"version {version}"
            raise self._wrong(f"it is {reason}; supported are the little-endian versions 2 and 3")
        tensors, keys = self._number(10), self._number(10)
        # A key takes at least 13 bytes, a tensor 25.
        if keys * 13 + tensors * 25 > self._size:
            raise self._wrong(f"it claims {keys} keys and {tensors} tensors, more than {self._size} bytes can hold")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self._name("a key")
            if key in metadata:
                raise self._wrong(f"the key {key} is there twice")
            metadata[key] = self._value(self._number(4), key)
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 8 <= alignment <= 2**16 or alignment & (alignment - 1):
            raise self._wrong(f"general.alignment is {str(alignment)[:40]}; it must be a power of two from 8 to 65536")
        claims = [self._claim() for _ in range(tensors)]
        return GgufFile(self._path, metadata, self._place(claims, alignment))

    # --- the tensor directory ------------------------------------------------------------------------------------

    def _claim(self) -> tuple[str, str, tuple[int, ...], int, int]:
        """One tensor: name, type, shape, bytes, offset in the data."""
        name = self._name("a tensor's name")
        count = self._number(4)
        if not 1 <= count <= _MAX_DIMENSIONS:
            raise self._wrong(f"tensor {name} has {count} dimensions; 1 to {_MAX_DIMENSIONS} are possible")
        sizes = [self._number(10) for _ in range(count)]
        if any(not 1 <= size <= _MAX_SIZE for size in sizes):
            raise self._wrong(f"tensor {name} has the impossible size {sizes}")
        number = self._number(4)
        offset = self._number(10)
        kind = TYPE_NAMES.get(number, f"number {number}")
        if kind not in BLOCKS:
            raise ModelError(
                f"{self._path}: tensor {name} has type {kind}, which is not supported; supported are "
                + ", ".join(BLOCKS)
            )
        block = BLOCKS[kind]
        if sizes[0] % block.weights:
            raise self._wrong(f"tensor {name} has rows of {sizes[0]} weights, no multiple of {kind}'s {block.weights}")
        nbytes = math.prod(sizes) // block.weights * block.nbytes
        return name, kind, tuple(reversed(sizes)), nbytes, offset

    def _place(self, claims: list[tuple[str, str, tuple[int, ...], int, int]], alignment: int) -> dict[str, GgufTensor]:
        """The tensors must follow each other without overlap or hole, each at a multiple of ``alignment``."""
        start = -(-self._position // alignment) * alignment
        expected = 0
        end = start
        placed: dict[str, GgufTensor] = {}
        for name, kind, shape, nbytes, offset in sorted(claims, key=lambda claim: claim[4]):
            if name in placed:
                raise self._wrong(f"tensor {name} is there twice")
            if offset != expected:
                raise self._wrong(f"tensor {name} lies at byte {offset} of the data; it must be {expected}")
            placed[name] = GgufTensor(name, kind, shape, start + offset, nbytes)
            end = start + offset + nbytes
            expected = -(-(offset + nbytes) // alignment) * alignment
        if end > self._size and claims:
            raise ModelError(
                f"{self._path}: the file is truncated: its tensors end at byte {end}, but it has {self._size}: "
                f"{end - self._size} bytes are missing; fetch it again"
            )
        if claims and self._size - end >= alignment:
            raise self._wrong(f"{self._size - end} bytes at its end belong to no tensor")
        return {claim[0]: placed[claim[0]] for claim in claims}

    # --- values --------------------------------------------------------------------------------------------------

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._text(key)
        if kind == _BOOL:
            return self._flags(1, key)[0]
        if kind in _PLAIN:
            return self._number(kind)
        if kind != _ARRAY:
            raise self._wrong(f"the value of {key} has the unknown type {kind}")
        item, count = self._number(4), self._number(10)
        if count > _MAX_ITEMS:
            raise self._wrong(f"the list {key} claims {count} entries; more than {_MAX_ITEMS} are never needed")
        if item == _STRING:
            self._need(8 * count)
            return [self._text(key) for _ in range(count)]
        if item == _BOOL:
            return self._flags(count, key)
        if item not in _PLAIN:
            raise self._wrong(f"the list {key} holds values of type {item}; lists of numbers and of text are possible")
        dtype = np.dtype("<" + _NUMBERS[item].replace("q", "i8").replace("Q", "u8"))
        return np.frombuffer(self._take(count * dtype.itemsize), dtype).tolist()

    def _flags(self, count: int, key: str) -> list[bool]:
        raw = self._take(count)
        if any(byte > 1 for byte in raw):
            raise self._wrong(f"{key} must be true or false")
        return [byte == 1 for byte in raw]

    def _number(self, kind: int) -> Any:
        plain = _PLAIN[kind]
        self._need(plain.size)
        value = plain.unpack_from(self._bytes, self._position)[0]
        self._position += plain.size
        return value

    def _name(self, what: str) -> str:
        length = self._number(10)
        if not 1 <= length <= _MAX_NAME:
            raise self._wrong(f"{what} is {length} bytes long; 1 to {_MAX_NAME} are possible")
        self._position -= 8
        name = self._text(what)
        if not name.isprintable():
            raise self._wrong(f"{what} holds characters that cannot be printed")
        return name

    def _text(self, what: str) -> str:
        length = self._number(10)
        raw = self._take(length)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self._wrong(f"{what} holds text that is not UTF-8") from None

    # --- bytes ---------------------------------------------------------------------------------------------------

    def _take(self, count: int) -> bytes:
        self._need(count)
        start = self._position
        self._position += count
        return bytes(self._bytes[start : start + count])

    def _need(self, count: int) -> None:
        """Have ``count`` bytes from the position on in memory."""
        end = self._position + count
        if end <= len(self._bytes):
            return
        if end > self._size:
            raise ModelError(
                f"{self._path}: the file ends inside its header: byte {self._position} needs {count} more, the file "
                f"has {self._size}: {end - self._size} bytes are missing, or it is damaged; fetch it again"
            )
        if end > MAX_HEADER:
            raise self._wrong(f"its header is longer than {format_size(MAX_HEADER)}, the most that is accepted")
        self._bytes += self._file.read(min(max(_STEP, end - len(self._bytes)), self._size - len(self._bytes)))
        if end > len(self._bytes):
            raise self._wrong("it became shorter while it was read")

    def _wrong(self, reason: str) -> ModelError:
        return ModelError(f"{self._path}: {reason}; the file is damaged or no model: fetch it again")
