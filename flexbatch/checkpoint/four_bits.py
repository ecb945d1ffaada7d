"""A checkpoint whose layers' linear weights are in 4 bits: those that are stored so stay, others are packed once.

What is packed is kept in the user's cache. Knows which weights and where; how they are packed, ``compression`` does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from flexbatch.checkpoint.derived import DerivedCheckpoint
from flexbatch.checkpoint.dummy import DummyCheckpoint
from flexbatch.checkpoint.locate import ModelFolder
from flexbatch.checkpoint.packed import (
    Packable,
    filled_up,
    matched,
    packable,
    stored_bytes,
    stored_name,
    stored_packed,
)
from flexbatch.checkpoint.reader import open_checkpoint
from flexbatch.checkpoint.safetensors import read_header, read_index, read_raw
from flexbatch.checkpoint.shards import INDEX, Part, write_parts
from flexbatch.checkpoint.tensors import Checkpoint, TensorEntry
from flexbatch.checkpoint.torchbin import cache_folder
from flexbatch.compression.groups import Packed, PackedLayout
from flexbatch.compression.quantize import Method, quantize
from flexbatch.errors import ModelError
from flexbatch.models.spec import WeightTable

Progress = Callable[[str, int, int], None]
STAGE = "converting to 4 bits"
METHOD = "search 1"
"""Rises when the same weights come to be packed differently: what is in the cache is then packed again."""
_WEIGHTS = 1 << 20  # weights that a thread packs at a time


@dataclass(frozen=True, slots=True)
class PackedCheckpoint:
    """The weights of ``base``, of which those that ``entries`` gives a file and a layout are read from there."""

    base: Checkpoint
    entries: Mapping[str, TensorEntry]
    fingerprint: str

    def read(self, entry: TensorEntry) -> torch.Tensor:
        """Return a tensor that is not packed, in its stored dtype and its own memory."""
        return self.base.read(entry)

    def raw(self, entry: TensorEntry) -> torch.Tensor:
        """Return the bytes that ``entry.view`` sees, uint8 [nbytes] in their own memory."""
        return read_raw(entry) if entry.layout is not None and entry.path is not None else self.base.raw(entry)

    def divisible(self, entry: TensorEntry) -> bool:
        """Whether some rows of the tensor can be read by themselves."""
        return entry.layout is None and self.base.divisible(entry)

    def at_rest(self, entry: TensorEntry) -> TensorEntry:
        """Return an entry of the same tensor that lies in a file."""
        return entry if entry.path is not None else self.base.at_rest(entry)


def open_weights(
    folder: ModelFolder, table: WeightTable, *, bits: int | None = None, progress: Progress | None = None
) -> Checkpoint:
    """Return the weights of a model as they are stored, or (``bits`` 4) with the layers' in 4 bits.

    Raises what ``open_checkpoint`` and ``in_four_bits`` do.
    """
    checkpoint = as_stored(open_checkpoint(folder, table), table)
    return in_four_bits(checkpoint, folder, table, progress) if bits == 4 else checkpoint


def as_stored(checkpoint: Checkpoint, table: WeightTable) -> Checkpoint:
    """Return the same weights, those that are stored in 4 bits kept so where the group format can hold them."""
    return checkpoint.kept_packed(packable(table)) if isinstance(checkpoint, DerivedCheckpoint) else checkpoint


def in_four_bits(
    checkpoint: Checkpoint, folder: ModelFolder, table: WeightTable, progress: Progress | None = None
) -> Checkpoint:
    """Return the same weights with every linear weight of the layers in 4 bits.

    Those that are not stored so are packed now, layer after layer, unless the cache has them: a killed conversion is
    gone on with. Made-up weights are packed when they are read. Raises DoesNotFitError (disk) where the cache has no
    room, ModelError for weights that cannot be packed.
    """
    checkpoint = as_stored(checkpoint, table)
    kinds = packable(table)
    wide = [name for name in kinds if checkpoint.entries[name].layout is None]
    if not wide:
        return checkpoint
    if isinstance(checkpoint, DummyCheckpoint):
        return checkpoint.kept_packed({name: kinds[name].shape for name in wide})
    target = cache_folder() / "packed" / f"{folder.path.name[:40]}-{_key(folder, checkpoint)}"
    if not target.is_dir():
        remedy = "set XDG_CACHE_HOME to a larger disk, or run with --weight-bits 16"
        write_parts(target, METHOD, _parts(checkpoint, table, wide, progress), lambda _: None, remedy=remedy)
    entries = dict(checkpoint.entries) | _kept(target, table, wide)
    digest = hashlib.sha256(f"{checkpoint.fingerprint}\n{METHOD}".encode()).hexdigest()
    return PackedCheckpoint(checkpoint, entries, digest)


def packed_form(name: str, packed: Packed) -> tuple[str, torch.Tensor]:
    """The name and the bytes by which a file keeps the packed weight ``name``."""
    layout = PackedLayout.of(packed)
    raw = torch.empty(layout.nbytes, dtype=torch.uint8)
    layout.put(packed, raw)
    return stored_name(name, layout), filled_up(raw)


def wide_weight(checkpoint: Checkpoint, name: str, kind: Packable) -> torch.Tensor:
    """The weight ``name`` [out, in] as it is stored."""
    stored = checkpoint.read(checkpoint.entries[name])
    return stored.t().contiguous() if kind.transposed else stored


def packed_weight(checkpoint: Checkpoint, name: str, kind: Packable, method: Method = "search") -> Packed:
    """Pack the weight ``name``, with all cores. ModelError, naming it, if a number of it does not fit."""
    weight = wide_weight(checkpoint, name, kind)
    out_features, in_features = kind.shape
    rows = max(1, _WEIGHTS // in_features)
    pieces = [weight[start : start + rows] for start in range(0, out_features, rows)]
    try:
        with _alone_on_each_core() as pool:
            made = list(pool.map(partial(quantize, method=method), pieces))
    except ModelError as error:
        raise ModelError(f"tensor {name}: {error}") from error
    layout = PackedLayout(kind.shape, made[0].group, scale_type=made[0].scales.dtype)
    columns = {field: torch.cat([piece.tensors()[field] for piece in made]) for field in made[0].tensors()}
    return Packed(columns["codes"], columns["scales"], columns["minimums"], None, layout.group, kind.shape)


@contextmanager
def _alone_on_each_core() -> Iterator[ThreadPoolExecutor]:
    """Threads, one for each that torch would use, in which torch uses no others."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def _parts(checkpoint: Checkpoint, table: WeightTable, wide: Sequence[str], progress: Progress | None) -> list[Part]:
    """A part for each layer that has weights to pack."""
    kinds, todo = packable(table), set(wide)
    parts: list[Part] = []
    done = 0
    for group in table.layers:
        names = [name for name, _ in group.tensors() if name in todo]
        if not names:
            continue

        def make(names: Sequence[str] = names, before: int = done) -> Mapping[str, torch.Tensor]:
            made = {}
            for place, name in enumerate(names, start=before + 1):
                key, raw = packed_form(name, packed_weight(checkpoint, name, kinds[name]))
                made[key] = raw
                if progress is not None:
                    progress(STAGE, place, len(wide))
            return made

        parts.append(Part(sum(stored_bytes(PackedLayout(kinds[name].shape)) for name in names), make))
        done += len(names)
    return parts


def _kept(target: Path, table: WeightTable, wide: Sequence[str]) -> dict[str, TensorEntry]:
    """The entries of the packed weights in the cache; ModelError if it does not hold them all."""
    found: dict[str, TensorEntry] = {}
    for file in read_index(target / INDEX):
        for stored, entry in read_header(target / file).items():
            name, form = stored_packed(stored)
            if form is not None:
                found[name] = matched(table, entry, name, form)
    if missing := set(wide) - found.keys():
        raise ModelError(f"{target}: it lacks {sorted(missing)[0]}, which was put there: remove the folder")
    return found


def _key(folder: ModelFolder, checkpoint: Checkpoint) -> str:
    """Identify the source by what was read of it, and its files by path, size and time of change."""
    lines = [METHOD, checkpoint.fingerprint]
    path = folder.path
    files = [path] if path.is_file() else sorted([*path.glob("*.safetensors"), *path.glob("*.bin")])
    for file in files:
        status = file.stat()
        lines.append(f"{file.resolve()} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:24]
