"""From what ``--model`` says to a folder with a readable configuration: folder, hub id, short name, or ``demo``.

Knows where models lie and reads their JSON; opens no weights.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexbatch.checkpoint.gguf_config import gguf_config
from flexbatch.checkpoint.gguf_file import is_gguf, read_gguf
from flexbatch.checkpoint.hub import SHORT_NAMES, fetch
from flexbatch.config_parse import parse_config
from flexbatch.errors import ModelError
from flexbatch.shapes import ModelShape

ASSETS = Path(__file__).resolve().parent.parent / "assets"
_MAX_JSON = 2**26  # bytes
_SHORT = re.compile(r"[a-z0-9][a-z0-9.-]*")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model that was found and is supported: ``path`` holds its ``config.json``, which ``config`` is.

    ``path`` may also be a GGUF file; ``config`` is then what its metadata say. ``dummy``: its weights are made up, none
    are looked for. ``native_dtype``: what products on a GPU are in where that is not the stored type.
    """

    name: str
    path: Path
    config: dict[str, Any]
    shape: ModelShape
    warnings: tuple[str, ...]
    dummy: bool
    native_dtype: str | None = None


def locate(model: str, *, dummy: bool = False) -> ModelFolder:
    """Return the folder (or GGUF file) of a model, fetching it from the hub where it has to be.

    ``dummy`` needs the configuration only, and takes that from the package where it can. Raises ModelError, in one
    line, where the model is not found or its configuration is unreadable or unsupported.
    """
    path = _folder(model, dummy)
    if path.is_file():
        return _gguf(model, path, dummy)
    config = _read_json(path / "config.json")
    if config is None:
        files = sorted(path.glob("*.gguf"))
        if files:
            raise ModelError(
                f"{path}: no config.json, but GGUF files: give one of them as the model, such as {files[0]}"
            )
        raise ModelError(f"{path}: no config.json: not a Hugging Face model folder")
    generation_config = _read_json(path / "generation_config.json")
    try:
        shape, warnings = parse_config(config, generation_config)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    return ModelFolder(model, path, config, shape, warnings, dummy)


def _gguf(model: str, path: Path, dummy: bool) -> ModelFolder:
    made = gguf_config(read_gguf(path))
    try:
        shape, warnings = parse_config(made.config)
    except ModelError as error:
        raise ModelError(f"{path}: {str(error).removeprefix('config.json: ')}") from error
    return ModelFolder(model, path, made.config, shape, (*made.warnings, *warnings), dummy, made.native_dtype)


def _folder(model: str, dummy: bool) -> Path:
    if model == "demo":
        return ASSETS / "demo"
    given = Path(model).expanduser()
    if given.is_dir():
        return given
    if is_gguf(given):
        return given
    if given.exists():
        raise ModelError(f"model {model} is a file, but no GGUF: give the folder that holds config.json")
    if given.suffix.lower() == ".gguf":
        raise ModelError(f"model {model}: there is no such file")
    short = model.lower()
    repo = SHORT_NAMES.get(short, model)
    if dummy:
        known = next((name for name, full in SHORT_NAMES.items() if full == repo), short)
        for packaged in (known, re.sub("-(instruct|chat)$", "", known)):
            if _SHORT.fullmatch(packaged) and (ASSETS / "configs" / packaged / "config.json").is_file():
                return ASSETS / "configs" / packaged
    if not _HUB_ID.fullmatch(repo):
        raise ModelError(
            f"model {model} is neither a folder, a hub id (owner/name), demo nor a short name (nor a GGUF file); "
            "short names are such as opt-6.7b, llama-3.1-8b, mistral-7b, qwen2.5-7b-instruct, qwen3-8b, gpt2"
        )
    return fetch(model, repo, weights=not dummy)


def _read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file, or None where there is no such file."""
    try:
        if not path.is_file():
            return None
        if path.stat().st_size > _MAX_JSON:
            raise ModelError(f"{path}: larger than any configuration ({path.stat().st_size} bytes)")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: not a JSON object")
    return content
