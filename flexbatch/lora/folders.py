"""The adapters of a run by their names: which folders they are, and what tells them apart. Needs no torch.

Listing thousands costs a look at a folder; nothing in an adapter is understood here.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from flexbatch.errors import UsageError

CONFIG = "adapter_config.json"
SAFETENSORS = "adapter_model.safetensors"
BIN = "adapter_model.bin"
_SAMPLE = 4096


def adapter_folders(named: Iterable[tuple[str, Path]], folder: Path | None) -> dict[str, Path]:
    """Return the folder of every adapter by its name: those ``named``, and each sub-folder of ``folder``.

    Raises UsageError where a folder is missing, is no adapter, or two adapters have one name.
    """
    found: dict[str, Path] = {}
    for name, path in named:
        if not name:
            raise UsageError(f"--lora ={path}: the adapter has no name: give NAME=DIR")
        if name in found:
            raise UsageError(f"--lora {name}={path}: the name is taken by {found[name]}")
        if not (path / CONFIG).is_file():
            raise UsageError(f"--lora {name}={path}: no adapter there: {path / CONFIG} is missing")
        found[name] = path
    if folder is None:
        return found
    try:
        entries = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
    except OSError as error:
        raise UsageError(f"--lora-dir {folder}: cannot be read ({error.strerror}): give a folder of adapters") from None
    for name in entries:
        if name in found:
            raise UsageError(f"--lora-dir {folder}: its sub-folder {name} has the name of --lora {name}={found[name]}")
    return {**found, **{name: folder / name for name in entries}}


def fingerprint(folders: Mapping[str, Path], names: Iterable[str]) -> str:
    """Hash what decides the results of the adapters ``names``: settings, sizes, headers, samples of the contents."""
    digest = hashlib.sha256()
    for name in sorted(set(names)):
        digest.update(f"\n{name} ".encode("utf-8", "surrogatepass"))
        for file in (CONFIG, SAFETENSORS, BIN):
            digest.update(_sample(folders[name] / file))
    return digest.hexdigest()[:24]


def _sample(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            places = (0, size // 3, 2 * size // 3, max(0, size - _SAMPLE))
            return str(size).encode() + b"".join(os.pread(file.fileno(), _SAMPLE, place) for place in places)
    except OSError:
        return b"-"
