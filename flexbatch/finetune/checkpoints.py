"""``OUTPUT.part``: the state of a training after some of its steps, from which it goes on as if it had never stopped.

A checkpoint is a folder that gets its name when it is complete, and the one before it goes only then: whenever the
process dies, one good checkpoint is there. It is an adapter in PEFT's form as well. Knows no models.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from flexbatch.errors import InputError, UsageError
from flexbatch.finetune.optimizer import NamedTensors, Optimizer
from flexbatch.finetune.output import AdapterSettings, write_adapter, write_text
from flexbatch.finetune.tensor_file import read_tensors, write_tensors
from flexbatch.jobs.durable import disk_error, sync_folder
from flexbatch.jobs.identity import JobIdentity, from_json
from flexbatch.lora.folders import SAFETENSORS

_NAME = re.compile(r"step-(\d{8})")
_STATE, _MOMENTS, _LOCK = "state.json", "optimizer.safetensors", "lock"


@dataclass(slots=True)
class Record:
    """What has happened: the loss of every step, the tokens read and those learned, and the seconds it took."""

    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    peak_activation_bytes: int = 0

    @property
    def steps(self) -> int:
        """Steps done."""
        return len(self.losses)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One that was found: the job it belongs to, and what had happened."""

    path: Path
    identity: JobIdentity
    record: Record


class Checkpoints:
    """The checkpoints of one output folder, locked for this process. Opening changes nothing that is there.

    Raises UsageError if another run holds them or the place cannot be written.
    """

    def __init__(self, output: Path, option: str = "--output") -> None:
        self.path = Path(f"{output}.part")
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"{self.path}: is a file, where checkpoints of {option} {output} go: move it away")
        try:
            self.path.mkdir(exist_ok=True)
            self._lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise disk_error(error, self.path) from None
        if not _locked(self._lock, self.path / _LOCK):
            os.close(self._lock)
            raise UsageError(f"{self.path}: another run is writing there: wait for it, or choose another {option}")
        self._open = True

    def latest(self) -> Checkpoint | None:
        """Return the newest checkpoint, or None. Raises InputError if it cannot be read."""
        complete = sorted(self._complete())
        if not complete:
            return None
        path = self.path / complete[-1]
        try:
            value = json.loads((path / _STATE).read_bytes())
            identity = from_json(value["job"])
            record = Record(**value["record"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path}: cannot be continued ({_line(error)}): start anew with --overwrite") from None
        if identity is None:
            raise InputError(f"{path}: is of another version of flexbatch: start anew with --overwrite")
        return Checkpoint(path, identity, record)

    def save(
        self,
        identity: JobIdentity,
        record: Record,
        settings: AdapterSettings,
        trained: NamedTensors,
        optimizer: Optimizer,
    ) -> Path:
        """Keep the state after ``record.steps`` steps, and drop what was kept before.

        Raises DoesNotFitError on a full disk, UsageError on other failures; the checkpoint before stays then.
        """
        name = _name(record.steps)
        try:
            making = self.scratch(name)
            write_adapter(making, settings, trained)
            write_tensors(making / _MOMENTS, dict(_moment_shapes(trained, optimizer)), optimizer.state())
            state = {"job": identity.to_json(), "record": asdict(record)}
            write_text(making / _STATE, json.dumps(state, allow_nan=False) + "\n")
            sync_folder(making)
            earlier = [other for other in self._complete() if other != name]
            shutil.rmtree(self.path / name, ignore_errors=True)
            making.rename(self.path / name)
        except OSError as error:
            raise disk_error(error, self.path) from None
        sync_folder(self.path)
        for other in earlier:
            shutil.rmtree(self.path / other, ignore_errors=True)
        return self.path / name

    def place(self, steps: int) -> Path:
        """Return where the checkpoint after ``steps`` steps lies."""
        return self.path / _name(steps)

    def scratch(self, name: str) -> Path:
        """Return an empty folder to make something in; what an earlier run left there is gone."""
        folder = self.path / f".{name}.tmp"
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        except OSError as error:
            raise disk_error(error, folder) from None
        return folder

    def clear(self) -> None:
        """Drop all checkpoints."""
        for name in self._complete():
            shutil.rmtree(self.path / name, ignore_errors=True)

    def remove(self) -> None:
        """Drop everything, the folder included: the output is complete."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Let go of the lock; a folder without a checkpoint goes."""
        if not self._open:
            return
        self._open = False
        with suppress(OSError):
            if {entry.name for entry in self.path.iterdir()} <= {_LOCK}:
                (self.path / _LOCK).unlink()
                self.path.rmdir()
        os.close(self._lock)

    def _complete(self) -> list[str]:
        try:
            return [entry.name for entry in self.path.iterdir() if _NAME.fullmatch(entry.name)]
        except OSError:
            return []


def _locked(fd: int, path: Path) -> bool:
    """Take the lock, and say whether this process has it; True on a file system that knows none."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:  # whoever had it has just finished and taken the folder away
        return False


def _name(steps: int) -> str:
    return f"step-{steps:08d}"


def restore(checkpoint: Checkpoint, trained: NamedTensors, optimizer: Optimizer) -> None:
    """Give parameters and optimizer what the checkpoint kept. Raises InputError where it is damaged."""
    tensors = read_tensors(checkpoint.path / SAFETENSORS)
    if tensors.keys() != set(trained.names()):
        raise InputError(f"{checkpoint.path}: holds other tensors than this training has: start anew with --overwrite")
    for name, tensor in tensors.items():
        trained.parameter(name).copy_(tensor)
    optimizer.restore(read_tensors(checkpoint.path / _MOMENTS), checkpoint.record.steps)


def _moment_shapes(trained: NamedTensors, optimizer: Optimizer) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name in trained.names():
        for moment in optimizer.moments:
            yield f"{name}.{moment}", tuple(trained.parameter(name).shape)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
