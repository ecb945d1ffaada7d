"""The journal ``OUTPUT.part``: a header that says which job it belongs to, then finished rows as OUTPUT will hold them.

Knows rows only as lines with an id; keeps their places in the file in memory, never the rows themselves.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from flexbatch.errors import InputError, InternalError, UsageError
from flexbatch.jobs.durable import AppendFile, disk_error, replace_file, sync_folder
from flexbatch.jobs.fields import Json
from flexbatch.jobs.identity import VERSION, JobIdentity, from_json, is_header
from flexbatch.jobs.native import dump


class Journal:
    """An open, locked journal of one job with ``len(ids)`` rows; ``ids[i]`` is the id of row i, None for no run.

    Opening creates the file, which shows that the folder can be written, but changes nothing in an existing one:
    ``begin`` does. With ``fresh`` what stands in it counts for nothing. ``rows_done`` and ``rows_failed`` count rows.
    Opening raises UsageError if another run holds it or it cannot be written, InputError if it cannot be continued.
    """

    def __init__(self, path: Path, ids: Sequence[str | None], *, fresh: bool = False) -> None:
        self.path = path
        self.rows_done = 0
        self.rows_failed = 0
        self.identity: JobIdentity | None = None
        self._index = {name: index for index, name in enumerate(ids) if name is not None}
        self._offsets = array("q", [-1]) * len(ids)
        self._lengths = array("q", [0]) * len(ids)
        self._end = 0
        self._unterminated = False
        self._file = AppendFile(path, _open_locked(path))
        try:
            if not fresh:
                self._scan()
        except BaseException:
            self.close()
            raise

    def is_done(self, index: int) -> bool:
        """Whether row ``index`` stands in the journal."""
        return self._offsets[index] >= 0

    def require_same(self, identity: JobIdentity) -> None:
        """Raise InputError saying what differs if the journal belongs to another job than ``identity``."""
        if self.identity is not None and (found := identity.differences(self.identity)):
            remedy = "run with the same options and input, or start anew with --overwrite"
            raise InputError(f"{self.path} belongs to another job; what differs: {', '.join(found)}: {remedy}")

    def begin(self, identity: JobIdentity) -> None:
        """Make the journal ready for rows: repair its end, or start it with a header. ``identity`` is complete."""
        self.require_same(identity)
        if self.identity is not None:
            self._file.truncate(self._end)
            if self._unterminated:
                self._file.append(b"\n")
        else:
            self._file.truncate(0)
            self._file.append(dump(identity.to_json()).encode() + b"\n")
            self.identity = identity
        self._file.sync()
        sync_folder(self.path.parent)

    def append(self, index: int, line: str, *, failed: bool = False) -> None:
        """Add row ``index``, a JSON line without its end. Raises DoesNotFitError when the disk is full."""
        if self.is_done(index):
            raise InternalError(f"row {index} was finished twice")
        data = line.encode() + b"\n"
        self._note(index, self._file.append(data), len(data), failed)

    def sync(self) -> None:
        """Return when all rows are on the disk."""
        self._file.sync()

    def write_output(self, output: Path, fixed: Mapping[int, str]) -> None:
        """Write all rows to ``output`` in input order, atomically; ``fixed`` has the lines of rows that never ran.

        Raises DoesNotFitError on a full disk; the journal is then still complete.
        """
        self._file.sync()
        lines = {index: line.encode() + b"\n" for index, line in fixed.items()}
        size = sum(self._lengths) + sum(len(line) for line in lines.values())
        replace_file(output, self._lines(lines), size)

    def remove(self) -> None:
        """Remove the file, and close."""
        self.path.unlink(missing_ok=True)
        sync_folder(self.path.parent)
        self.close()

    def close(self) -> None:
        """Sync, close and unlock; a file in which nothing was ever written goes. Calling it again does nothing."""
        if self._file.closed:
            return
        if self._file.size == 0:
            self.path.unlink(missing_ok=True)
        self._file.close()

    def _note(self, index: int, offset: int, length: int, failed: bool) -> None:
        self._offsets[index] = offset
        self._lengths[index] = length
        self.rows_done += 1
        self.rows_failed += failed

    def _lines(self, fixed: Mapping[int, bytes]) -> Iterator[bytes]:
        for index, offset in enumerate(self._offsets):
            if index in fixed:
                yield fixed[index]
            elif offset >= 0:
                yield os.pread(self._file.fd, self._lengths[index], offset)
            else:
                raise InternalError(f"row {index} has no result")

    def _scan(self) -> None:
        headless = 0
        offset = 0
        with os.fdopen(os.dup(self._file.fd), "rb") as stream:
            for number, raw in enumerate(stream):
                value = _object(raw)
                good = False
                if number == 0:
                    self.identity = self._header(value)
                    good = self.identity is not None
                if number > 0 or not good:
                    index = self._index.get(str(value.get("custom_id", value.get("id"))))
                    if self.identity is None:
                        headless += "id" in value and "error" in value
                    elif index is not None:
                        good = True
                        if not self.is_done(index):
                            length = len(raw) + (not raw.endswith(b"\n"))
                            self._note(index, offset, length, value.get("error") is not None)
                offset += len(raw)
                if good:
                    self._end = offset
                    self._unterminated = not raw.endswith(b"\n")
        if headless:
            reason = f"holds {headless} rows, but its header cannot be read"
            raise InputError(f"{self.path} {reason}: move it away, or start anew with --overwrite")

    def _header(self, value: dict[str, Json]) -> JobIdentity | None:
        if is_header(value) and value["version"] != VERSION:
            reason = f"has journal format {value['version']}, this flexbatch writes {VERSION}"
            raise InputError(f"{self.path} {reason}: finish it with the one that began it, or give --overwrite")
        return from_json(value)


def _object(raw: bytes) -> dict[str, Json]:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _open_locked(path: Path) -> int:
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise disk_error(error, path) from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(fd)
                raise UsageError(f"{path}: another run is writing it: wait, or choose another --output") from None
            return fd  # a file system without locks: go on without one
        try:
            if os.path.samestat(os.fstat(fd), path.stat()):
                return fd
        except FileNotFoundError:
            pass
        os.close(fd)  # the run that held the lock has just finished and removed the file: make a new one
