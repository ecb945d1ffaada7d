"""Old ``pytorch_model.bin`` checkpoints, turned into safetensors in the user's cache: once, shard by shard.

Knows torch's zip format and the cache folder; nothing that a shard holds is ever executed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from flexbatch.checkpoint.safetensors import WRITABLE, read_index, write_file
from flexbatch.errors import DoesNotFitError, ModelError
from flexbatch.units import format_size

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"


def cache_folder() -> Path:
    """Return where converted weights are kept: ``$XDG_CACHE_HOME/flexbatch`` or ``~/.cache/flexbatch``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "flexbatch"


def find_bin(path: Path) -> tuple[Path, ...]:
    """Return the ``.bin`` shards of a model folder (none: an empty tuple); ModelError where one is missing."""
    if (path / SINGLE).is_file():
        return (path / SINGLE,)
    if not (path / INDEX).is_file():
        return ()
    shards = tuple(path / file for file in sorted(read_index(path / INDEX)))
    for shard in shards:
        if not shard.is_file():
            raise ModelError(f"{shard}: the shard is missing ({INDEX} names it); fetch it again")
    return shards


def convert(path: Path, shards: Sequence[Path]) -> Path:
    """Return the folder with the safetensors form of ``shards``, made now unless the cache has it.

    Memory: one tensor at a time (shards are mapped). Disk: as many bytes as the shards. The folder appears, complete,
    by a rename. Raises ModelError on a shard that is damaged or holds anything but tensors, DoesNotFitError (disk)
    where the cache has no room.
    """
    key = _key(shards)
    parent = cache_folder() / "converted"
    target = parent / f"{path.name[:40]}-{key}"
    if target.is_dir():
        return target
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with locked(parent / f".{key}.lock"):
            if not target.is_dir():
                _fill(parent / f".{key}.partial", target, shards)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise no_room(parent, sum(shard.stat().st_size for shard in shards)) from error
        raise ModelError(f"{parent}: converted weights cannot be kept there: {error.strerror or error}") from error
    return target


def _key(shards: Sequence[Path]) -> str:
    """Identify shards by path, size and time of change."""
    lines = []
    for shard in shards:
        status = shard.stat()
        lines.append(f"{shard.resolve()} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:24]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file, so that two processes do not convert the same shards at once."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fill(partial: Path, target: Path, shards: Sequence[Path]) -> None:
    """Convert all shards into ``partial``, then rename it to ``target``; what a killed process left is replaced."""
    shutil.rmtree(partial, ignore_errors=True)
    needed = sum(shard.stat().st_size for shard in shards)
    free = shutil.disk_usage(partial.parent).free
    if free < needed:
        raise no_room(partial.parent, needed - free)
    partial.mkdir()
    try:
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            tensors = load_shard(shard)
            write_file(partial / file, tensors)
            weight_map.update(dict.fromkeys(tensors, file))
        if len(shards) > 1:
            (partial / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def load_shard(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of one ``.bin`` file, mapped, not read; ModelError on anything but plain tensors."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            claimed = sum(record.file_size for record in archive.infolist())
            packed = any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist())
    except (zipfile.BadZipFile, OSError) as error:
        raise ModelError(
            f"{path}: no readable torch checkpoint ({error}): truncated, or older than torch 1.6; "
            "fetch it again, or the safetensors form"
        ) from error
    if packed or claimed > size:
        raise ModelError(f"{path}: the file claims {format_size(claimed)} but holds {format_size(size)}: damaged")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ModelError(f"{path}: it holds more than tensors, which is refused; use the safetensors form") from error
    except (RuntimeError, ValueError, EOFError, KeyError, AttributeError, TypeError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{path}: the checkpoint is damaged ({reason}); fetch it again") from error
    if not isinstance(state, dict):
        raise ModelError(f"{path}: it holds a {type(state).__name__}, not named tensors")
    for name, tensor in state.items():
        _check_tensor(path, name, tensor)
    return state


def _check_tensor(path: Path, name: object, tensor: object) -> None:
    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
        raise ModelError(f"{path}: entry {str(name)[:80]} is no plain tensor; use the safetensors form")
    if tensor.dtype not in WRITABLE:
        raise ModelError(f"{path}: tensor {name} has dtype {tensor.dtype}, which is not supported")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ModelError(f"{path}: tensor {name} claims more bytes than are stored: damaged")


def no_room(parent: Path, missing: int, form: str = ".bin") -> DoesNotFitError:
    """Return the error for weights of a certain form whose readable copy does not fit the cache."""
    remedy = "set XDG_CACHE_HOME to a larger disk"
    return DoesNotFitError(
        f"converting {form} weights needs {format_size(missing)} more in {parent}: {remedy}, "
        "or use a checkpoint in 16-bit safetensors form",
        tier="disk",
        missing=missing,
        remedy=remedy,
    )
