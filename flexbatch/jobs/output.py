"""The output's place: whether it can be written, what stands there already, and a record of jobs that are complete.

Knows nothing of rows. The records lie in the user's cache folder; losing them costs only a friendlier message.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from flexbatch.errors import FlexbatchError, UsageError
from flexbatch.jobs.durable import replace_file
from flexbatch.jobs.identity import JobIdentity, from_json
from flexbatch.jobs.native import dump


@dataclass(frozen=True, slots=True)
class CompletedJob:
    """The job that wrote an output which nobody has changed since."""

    identity: JobIdentity
    rows: int
    failed: int


def part_path(output: Path) -> Path:
    """Return where the journal of ``output`` lies."""
    return Path(f"{output}.part")


def check_place(option: str, target: Path) -> None:
    """Raise UsageError, naming ``option``, unless ``target`` is or can become a regular file in an existing folder."""
    if target.is_dir():
        raise UsageError(f"{option} {target}: is a folder: give a file")
    if target.exists() and not target.is_file():
        raise UsageError(f"{option} {target}: is not a regular file: give a file that can be replaced")
    folder = target.parent
    if not folder.is_dir():
        raise UsageError(f"{option} {target}: there is no folder {folder}: make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"{option} {target}: the folder {folder} cannot be written: choose another")


def check_distinct(places: Mapping[str, Path]) -> None:
    """Raise UsageError if two options name the same file."""
    seen: dict[str, str] = {}
    for option, place in places.items():
        first = seen.setdefault(str(place.resolve()), option)
        if first != option:
            raise UsageError(f"{option} {place}: is the same file as {first}: give another")


def remember(output: Path, identity: JobIdentity, rows: int, failed: int) -> None:
    """Record that ``output``, as it lies there now, completes the job; a cache that cannot be written is let be."""
    with suppress(FlexbatchError, OSError, RuntimeError):  # the last: no home folder
        stat = output.stat()
        record = _record_path(output)
        record.parent.mkdir(parents=True, exist_ok=True)
        value = {
            "output": str(output.resolve()),
            "job": identity.to_json(),
            "size": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
            "rows": rows,
            "failed": failed,
        }
        data = dump(value).encode()
        replace_file(record, [data], len(data))


def recall(output: Path) -> CompletedJob | None:
    """Return the job that ``output`` completes, or None if it is not recorded or the file has changed since."""
    try:
        value = json.loads(_record_path(output).read_bytes())
        stat = output.stat()
        unchanged = (value["size"], value["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns)
        identity = from_json(value["job"])
        if not unchanged or identity is None or value["output"] != str(output.resolve()):
            return None
        return CompletedJob(identity, int(value["rows"]), int(value["failed"]))
    except (OSError, ValueError, TypeError, KeyError, RuntimeError):
        return None


def _record_path(output: Path) -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    root = Path(cache) if cache else Path.home() / ".cache"
    name = hashlib.sha256(os.fsencode(output.resolve())).hexdigest()[:32]
    return root / "flexbatch" / "jobs" / f"{name}.json"
