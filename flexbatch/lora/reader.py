"""Opens PEFT adapter folders: settings and headers are read, matched against the base model, and nothing is left over.

Factors themselves are read by ``load``; this module knows names, shapes and files.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from flexbatch.checkpoint.safetensors import MAX_HEADER, read_header
from flexbatch.checkpoint.tensors import DTYPES, TensorEntry
from flexbatch.checkpoint.torchbin import convert
from flexbatch.errors import AdapterError, DoesNotFitError, ModelError
from flexbatch.lora.adapter import Adapter, AdapterPart, Factor, UnreadableAdapterError
from flexbatch.lora.config import AdapterConfig, parse_config
from flexbatch.lora.folders import BIN, CONFIG, SAFETENSORS
from flexbatch.lora.modules import Module, is_target, modules_of
from flexbatch.models.spec import WeightTable

_THREADS = 16
_PREFIX = "base_model.model."
_SIDES = {".lora_A.weight": "a", ".lora_B.weight": "b"}
_REASONS = (
    ("lora_magnitude_vector", "DoRA is not supported"),
    ("lora_embedding_", "LoRA on embeddings is not supported"),
    ("trainable_tokens", "trained token embeddings are not supported"),
    ("base_layer", "weights of the base model are not replaced: save with save_embedding_layers=False"),
    ("modules_to_save", "modules_to_save is not supported"),
    (".bias", "biases are not supported"),
)


class AdapterReader:
    """Opens adapters of one base model; from any thread.

    Most adapters of one base share their settings and have headers that are equal to the byte: what follows from them
    is found once.
    """

    def __init__(self, table: WeightTable, family: str) -> None:
        self._modules = modules_of(table)
        self._prefix = table.optional_prefix
        self._family = family
        self._configs: dict[bytes, AdapterConfig] = {}
        self._parts: dict[tuple[bytes, int, AdapterConfig], tuple[AdapterPart, ...]] = {}
        self._lock = threading.Lock()

    def open(self, name: str, folder: Path) -> Adapter:
        """Return the adapter in ``folder``; nothing but settings and the header is read.

        Raises UnreadableAdapterError where files are missing or damaged, AdapterError where they ask for something
        that is not supported or does not fit the base model. ``.bin`` files are converted in the user's cache, once.
        """
        config = self.config(folder)
        try:
            file = self._file(folder)
            size = file.stat().st_size
            header = _raw_header(file)
            key = (header, size, config)
            parts = self._parts.get(key)
            if parts is None:
                matched = self._match(folder, read_header(file), config)
                parts = self._parts.setdefault(key, matched)  # another thread may have been as fast
        except (ModelError, DoesNotFitError) as error:
            raise UnreadableAdapterError(f"adapter {folder}: {error}") from error
        except OSError as error:
            raise UnreadableAdapterError(f"adapter {folder}: cannot be read: {error.strerror or error}") from error
        return Adapter(name, file, size, parts)

    def config(self, folder: Path) -> AdapterConfig:
        """Return an adapter's settings alone; raises as ``open`` does."""
        path = folder / CONFIG
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise UnreadableAdapterError(f"adapter {path}: cannot be read: {error.strerror or error}") from error
        config = self._configs.get(raw)
        if config is None:
            try:
                config = parse_config(_object(raw))
            except ValueError as error:
                raise UnreadableAdapterError(f"adapter {path}: not valid JSON ({error})") from error
            except AdapterError as error:
                raise AdapterError(f"adapter {path}: {error}") from error
            self._configs[raw] = config
        return config

    def _file(self, folder: Path) -> Path:
        if (folder / SAFETENSORS).is_file():
            return folder / SAFETENSORS
        if not (folder / BIN).is_file():
            raise UnreadableAdapterError(f"adapter {folder}: neither {SAFETENSORS} nor {BIN} is there")
        with self._lock:  # one .bin at a time is in memory
            return convert(folder, (folder / BIN,)) / "model.safetensors"

    def _match(self, folder: Path, stored: Mapping[str, TensorEntry], config: AdapterConfig) -> tuple[AdapterPart, ...]:
        """Give every stored tensor its place; raise AdapterError on one that has none."""
        found: dict[str, dict[str, TensorEntry]] = {}
        for tensor, entry in stored.items():
            side = next((side for side in _SIDES if tensor.endswith(side)), None)
            short = tensor.removeprefix(_PREFIX)
            target = None if side is None or short == tensor else self._module(short.removesuffix(side))
            if target is None or not is_target(config, short.removesuffix(side or ""), self._family):
                raise AdapterError(f"adapter {folder}: tensor {tensor} would be left over: {_reason(tensor, target)}")
            assert side is not None
            if _SIDES[side] in found.setdefault(target.name, {}):
                raise AdapterError(f"adapter {folder}: tensor {tensor} is there twice, with and without {self._prefix}")
            found[target.name][_SIDES[side]] = entry
        parts = [_part(folder, module, found[name], config) for name, module in self._modules.items() if name in found]
        if not parts:
            raise AdapterError(f"adapter {folder}: it holds no tensors: nothing to add to the base model")
        return tuple(parts)

    def _module(self, name: str) -> Module | None:
        return self._modules.get(name) or self._modules.get(self._prefix + name)


def open_adapters(
    reader: AdapterReader, folders: Mapping[str, Path], names: Iterable[str]
) -> tuple[dict[str, Adapter], dict[str, AdapterError]]:
    """Open the adapters ``names`` in parallel: those that can be used, and why the others cannot."""
    wanted = sorted(set(names))
    opened: dict[str, Adapter] = {}
    failed: dict[str, AdapterError] = {}

    def work(name: str) -> None:
        try:
            opened[name] = reader.open(name, folders[name])
        except AdapterError as error:
            failed[name] = error

    with ThreadPoolExecutor(min(_THREADS, max(1, len(wanted)))) as pool:
        list(pool.map(work, wanted))
    return opened, failed


def _part(folder: Path, module: Module, entries: Mapping[str, TensorEntry], config: AdapterConfig) -> AdapterPart:
    for side, name in (("a", "lora_A"), ("b", "lora_B")):
        if side not in entries:
            raise AdapterError(
                f"adapter {folder}: tensor {module.name}.{name}.weight is missing, its other half is not"
            )
    stored = entries["a"].name.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
    rank = config.rank_of(stored)
    shapes = {"a": (rank, module.in_features), "b": (module.out_features, rank)}
    for side, shape in shapes.items():
        entry = entries[side]
        if entry.shape != shape:
            raise AdapterError(
                f"adapter {folder}: tensor {entry.name} has shape {list(entry.shape)}, {list(shape)} is expected: "
                f"rank {rank} by {CONFIG}, and this base model's module"
            )
        if entry.dtype not in DTYPES:
            raise AdapterError(
                f"adapter {folder}: tensor {entry.name} has dtype {entry.dtype}; supported are {', '.join(DTYPES)}"
            )
    return AdapterPart(
        module, rank, config.scale_of(stored), _factor(entries["a"], shapes["a"]), _factor(entries["b"], shapes["b"])
    )


def _factor(entry: TensorEntry, shape: tuple[int, int]) -> Factor:
    return Factor(entry.dtype, shape, entry.offset, entry.nbytes)


def _reason(tensor: str, module: Module | None) -> str:
    for mark, reason in _REASONS:
        if mark in tensor:
            return reason
    if module is not None:
        return "target_modules, exclude_modules and layers_to_transform do not name its module"
    return "the base model has no linear module of that name"


def _object(raw: bytes) -> Mapping[str, Any]:
    value = json.loads(raw)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def _raw_header(path: Path) -> bytes:
    with path.open("rb") as file:
        start = file.read(8)
        return start + file.read(min(int.from_bytes(start, "little"), MAX_HEADER))
