"""What makes two runs the same job: the model, the input, and the settings that change results.

Sizes, placement and schedule are no part of it: they change how fast rows come, not what they say.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

from flexbatch.jobs.fields import Json, show

VERSION = 1
_FORMAT = "flexbatch journal"


@dataclass(frozen=True, slots=True)
class JobIdentity:
    """The parts that a job's hash covers.

    ``model`` is the checkpoint's fingerprint, ``model_name`` what messages call it (not hashed), ``input`` the
    SHA-256 of the input. ``resolved`` holds what ``auto`` became (dtype, bits); None there means not known yet.
    """

    model_name: str
    model: str
    input: str
    settings: Mapping[str, Json]
    resolved: Mapping[str, Json]

    @property
    def hash(self) -> str:
        """One hash over all parts, hexadecimal."""
        parts = [VERSION, self.model, self.input, dict(self.settings), dict(self.resolved)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def adopt(self, recorded: JobIdentity) -> JobIdentity:
        """Return this identity with what is not resolved yet taken from a recorded one."""
        values = {
            name: recorded.resolved.get(name) if value is None else value for name, value in self.resolved.items()
        }
        return replace(self, resolved=values)

    def differences(self, recorded: JobIdentity) -> list[str]:
        """Return what differs from a recorded job, in words; nothing if this run may continue it."""
        found = []
        if self.model != recorded.model:
            renamed = f" (it was {recorded.model_name}, now {self.model_name})"
            found.append("the model" + (renamed if recorded.model_name != self.model_name else ""))
        if self.input != recorded.input:
            found.append("the input file's content")
        mine = {**self.settings, **{name: value for name, value in self.resolved.items() if value is not None}}
        theirs = {**recorded.settings, **recorded.resolved}
        names = sorted(mine.keys() | (recorded.settings.keys() - mine.keys()))
        found += [
            f"{name} (it was {show(theirs.get(name))}, now {show(mine.get(name))})"
            for name in names
            if mine.get(name) != theirs.get(name)
        ]
        return found

    def to_json(self) -> dict[str, Json]:
        """Return the identity as the journal's header and the record of a finished job keep it."""
        return {
            "format": _FORMAT,
            "version": VERSION,
            "hash": self.hash,
            "model": {"name": self.model_name, "fingerprint": self.model},
            "input": self.input,
            "settings": dict(self.settings),
            "resolved": dict(self.resolved),
        }


def is_header(value: Json) -> bool:
    """Whether a JSON value is a journal's header, of any version."""
    return isinstance(value, dict) and value.get("format") == _FORMAT and isinstance(value.get("version"), int)


def from_json(value: Json) -> JobIdentity | None:
    """Return the identity that ``to_json`` wrote, or None for anything else, other versions included."""
    if not is_header(value) or value["version"] != VERSION:
        return None
    try:
        model = value["model"]
        settings, resolved = dict(value["settings"]), dict(value["resolved"])
        identity = JobIdentity(model["name"], model["fingerprint"], value["input"], settings, resolved)
        return identity if identity.hash == value["hash"] else None
    except (KeyError, TypeError, ValueError):
        return None
