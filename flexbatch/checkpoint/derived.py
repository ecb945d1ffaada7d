"""Tensors that are computed when they are read, from stored ones in another form: dequantized, reordered, transposed.

Knows how such tensors stand beside those read in place, and where they are kept when they have to rest on disk; the
forms themselves belong to each file format.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from flexbatch.checkpoint.packed import stored_name
from flexbatch.checkpoint.safetensors import read_header, read_raw, read_tensor, write_file
from flexbatch.checkpoint.tensors import TensorEntry
from flexbatch.checkpoint.torchbin import cache_folder, no_room
from flexbatch.compression.groups import Packed, PackedLayout
from flexbatch.errors import ModelError


class Recipe(Protocol):
    """How one tensor of the table is made from what is stored."""

    @property
    def layout(self) -> PackedLayout | None:
        """The layout of what ``packed`` returns; nothing is read for it."""

    def make(self) -> torch.Tensor:
        """Return the tensor as its entry says, in its own memory; ModelError where the stored bytes are damaged."""

    def packed(self) -> Packed | None:
        """Return the same values [out, in] in the group format, exactly, or None where it cannot hold them.

        The order is [out, in] for tables that store [in, out], too.
        """


@dataclass(frozen=True, slots=True)
class DerivedCheckpoint:
    """Weights of which those in ``recipes`` (by entry name) are made when they are read; the others lie in files."""

    entries: Mapping[str, TensorEntry]
    fingerprint: str
    recipes: Mapping[str, Recipe]
    source: Path

    def read(self, entry: TensorEntry) -> torch.Tensor:
        """Return the tensor in its entry's dtype and its own memory."""
        if entry.path is not None:
            return read_tensor(entry)
        tensor = self.recipes[entry.name].make()
        assert tensor.shape == entry.shape, f"{entry.name}: {tensor.shape} is not {entry.shape}"
        return tensor

    def packed(self, entry: TensorEntry) -> Packed | None:
        """Return the weight [out, in] in the group format without any loss, or None where that is not possible."""
        recipe = self.recipes.get(entry.name) if entry.path is None else None
        return None if recipe is None else recipe.packed()

    def raw(self, entry: TensorEntry) -> torch.Tensor:
        """Return the bytes that ``entry.view`` sees, uint8 [nbytes] in their own memory."""
        if entry.path is not None:
            return read_raw(entry)
        if entry.layout is None:
            return self.read(entry).view(-1).view(torch.uint8)
        packed = self.recipes[entry.name].packed()
        assert packed is not None
        raw = torch.empty(entry.nbytes, dtype=torch.uint8)
        entry.layout.put(packed, raw)
        return raw

    def kept_packed(self, names: Iterable[str]) -> DerivedCheckpoint:
        """Return the same weights, those of ``names`` in the group format where it can hold them."""
        entries = dict(self.entries)
        for name in names:
            entry = entries[name]
            recipe = self.recipes.get(entry.name) if entry.path is None else None
            layout = None if recipe is None else recipe.layout
            if layout is not None:
                entries[name] = TensorEntry(entry.name, "U8", layout.shape, None, 0, layout.nbytes, layout)
        return replace(self, entries=entries)

    def divisible(self, entry: TensorEntry) -> bool:
        """Whether some rows of the tensor can be read by themselves: not of one that is made from another form."""
        return entry.path is not None and entry.layout is None

    def at_rest(self, entry: TensorEntry) -> TensorEntry:
        """Return an entry of the same tensor that lies in a file: a made one is written to the user's cache, once.

        Raises DoesNotFitError (disk) where the cache has no room.
        """
        if entry.path is not None:
            return entry
        form = "dequantized" if entry.layout is None else "repacked"
        folder = cache_folder() / form / f"{self.source.stem[:40]}-{self._key()}"
        kept_as = entry.name if entry.layout is None else stored_name(entry.name, entry.layout)
        target = folder / f"{kept_as}.safetensors"
        try:
            if not target.is_file():
                folder.mkdir(parents=True, exist_ok=True)
                free = shutil.disk_usage(folder).free
                if free < entry.nbytes:
                    raise no_room(folder, entry.nbytes - free, form)
                partial = folder / f".{entry.name}.{os.getpid()}.partial"
                try:
                    kept = self.read(entry) if entry.layout is None else self.raw(entry)
                    write_file(partial, {entry.name: kept})
                    partial.replace(target)
                finally:
                    partial.unlink(missing_ok=True)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise no_room(folder, entry.nbytes, form) from error
            raise ModelError(f"{folder}: {form} weights cannot be kept: {error.strerror or error}") from error
        found = read_header(target).get(entry.name)
        shape = entry.shape if entry.layout is None else (entry.nbytes,)
        if found is None or (found.dtype, found.shape) != (entry.dtype, shape):
            raise ModelError(f"{target}: it does not hold the tensor {entry.name} that was put there: remove the file")
        return replace(found, shape=entry.shape, layout=entry.layout)

    def _key(self) -> str:
        """Identify the source by path, size, time of change and what was read of it."""
        files = sorted(self.source.glob("*.safetensors")) if self.source.is_dir() else [self.source]
        lines = [self.fingerprint]
        for file in files:
            status = file.stat()
            lines.append(f"{file.resolve()} {status.st_size} {status.st_mtime_ns}")
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:24]
