"""Writing a converted checkpoint: a safetensors file for each part, and what a killed conversion left is gone on with.

Knows files and their order; what the parts hold is made by whoever asks for them, one part at a time.
"""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from flexbatch.checkpoint.safetensors import read_header, write_file
from flexbatch.checkpoint.torchbin import locked
from flexbatch.errors import DoesNotFitError, ModelError
from flexbatch.units import format_size

INDEX = "model.safetensors.index.json"
_STATE = "conversion.json"
"""Says what a folder was, or is being, converted from and how."""


@dataclass(frozen=True, slots=True)
class Part:
    """One file to be: the bytes of its tensors, about, how they are made, and who is told if the file is there."""

    nbytes: int
    make: Callable[[], Mapping[str, torch.Tensor]]
    passed: Callable[[Path], None] = lambda _: None


def file_name(number: int, count: int) -> str:
    """The name of the file of part ``number``, from 0."""
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def write_parts(
    target: Path, identity: str, parts: Sequence[Part], finish: Callable[[Path], None], *, remedy: str
) -> None:
    """Make the folder ``target`` with a file for each of ``parts`` and an index; it appears, complete, by a rename.

    Files are written to a hidden folder beside it. If one of the same ``identity`` is there, left by a conversion that
    was killed, its finished files stay. ``finish`` puts what else belongs into the folder. Raises DoesNotFitError
    (disk), which names ``remedy``, where there is no room, and ModelError where it cannot be written.
    """
    partial = target.with_name(f".{target.name}.partial")
    with _disk_errors(target.parent, sum(part.nbytes for part in parts), remedy):
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.with_name(f".{target.name}.lock")):
            if target.is_dir():
                return
            _begin(partial, identity)
            missing = [number for number in range(len(parts)) if not (partial / file_name(number, len(parts))).exists()]
            needed = sum(parts[number].nbytes for number in missing)
            free = shutil.disk_usage(partial).free
            if free < needed:
                raise _no_room(target.parent, needed - free, remedy)
            weight_map: dict[str, str] = {}
            for number, part in enumerate(parts):
                file = partial / file_name(number, len(parts))
                if number not in missing:
                    part.passed(file)
                else:
                    unfinished = partial / f"{file.name}.unfinished"
                    write_file(unfinished, part.make())
                    unfinished.replace(file)
                weight_map.update(dict.fromkeys(read_header(file), file.name))
            (partial / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1) + "\n")
            finish(partial)
            partial.rename(target)
            target.with_name(f".{target.name}.lock").unlink(missing_ok=True)


def identity_of(folder: Path) -> str | None:
    """The identity of the conversion that made ``folder``, or is making it; None for any other folder."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads((folder / _STATE).read_text(encoding="utf-8"))["identity"]
        return found if isinstance(found, str) else None
    return None


def _begin(partial: Path, identity: str) -> None:
    """Make ``partial`` the work folder of this conversion; what is there of another one goes."""
    if identity_of(partial) != identity:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        (partial / _STATE).write_text(json.dumps({"identity": identity}) + "\n", encoding="utf-8")
    for unfinished in partial.glob("*.unfinished"):
        unfinished.unlink()


@contextlib.contextmanager
def _disk_errors(folder: Path, nbytes: int, remedy: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_room(folder, nbytes, remedy) from error
        raise ModelError(f"{folder}: converted weights cannot be kept there: {error.strerror or error}") from error


def _no_room(folder: Path, missing: int, remedy: str) -> DoesNotFitError:
    return DoesNotFitError(
        f"converting the weights needs {format_size(missing)} more in {folder}: {remedy}",
        tier="disk",
        missing=missing,
        remedy=remedy,
    )
