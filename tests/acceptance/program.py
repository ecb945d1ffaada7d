"""The program as a user starts it: ``python -m flexbatch run`` in a process of its own, in a folder of its own."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 300.0  # seconds after which a run counts as hung
_STORY = (
    "Once upon a time, in a big forest, there lived a little rabbit who loved to hop and play with all of his friends. "
    "One day he found a shiny red ball under an old tree, and he wanted to show it to his mom. But the ball was too "
    "heavy for him, so he asked a bird for help."
)


def story_rows(count: int, longest: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Return rows of ragged lengths that suit the demo model; each goes on for at most ``longest`` tokens."""
    rng = random.Random(seed)
    words = _STORY.split()
    rows = []
    for index in range(count):
        start = rng.randrange(len(words) // 2)
        prompt = " ".join(words[start : start + rng.randint(1, len(words) // 2)])
        rows.append({"id": f"story-{index}", "prompt": prompt, "max_tokens": rng.randint(1, longest)})
    return rows


@dataclass
class Program:
    """``flexbatch run`` on ``rows.jsonl`` in ``folder``, into ``out.jsonl``; ``options`` come with every start."""

    folder: Path
    rows: list[dict[str, Any]]
    options: tuple[str, ...] = ()
    model: str = "demo"
    errors: Path = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.errors = self.folder.with_name(self.folder.name + ".stderr")
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows]
        (self.folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")

    @property
    def output(self) -> Path:
        return self.folder / "out.jsonl"

    @property
    def part(self) -> Path:
        return self.folder / "out.jsonl.part"

    @property
    def said(self) -> str:
        """What the last start wrote to stderr."""
        return self.errors.read_text(encoding="utf-8")

    def words(self, *options: str) -> list[str]:
        places = ["-i", str(self.folder / "rows.jsonl"), "-o", str(self.output)]
        return ["run", "--model", self.model, *places, *self.options, *options]

    def start(self, *options: str) -> subprocess.Popen[bytes]:
        with self.errors.open("wb") as errors:
            return subprocess.Popen(
                [sys.executable, "-m", "flexbatch", *self.words(*options)], stderr=errors, env=self.environment()
            )

    def finish(self, *options: str) -> int:
        """Start, wait, and return the exit code."""
        return self.start(*options).wait(PATIENCE)

    def environment(self) -> dict[str, str]:
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        cache = str(self.folder.with_name("cache"))
        return {**os.environ, "PYTHONPATH": path, "XDG_CACHE_HOME": cache, "OMP_NUM_THREADS": "1"}

    def journalled(self) -> list[bytes]:
        """Return the whole lines of the journal, its header first; nothing where there is no journal."""
        data = self.part.read_bytes() if self.part.exists() else b""
        return data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
