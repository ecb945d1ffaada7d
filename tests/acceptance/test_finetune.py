"""A training that is killed at random moments ends with the bytes of one that was left alone."""

from __future__ import annotations

import json
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.acceptance.program import ROOT, story_rows

KILLS = 10
OPTIONS = ("--max-steps", "24", "--batch-size", "2", "--rank", "4", "--dropout", "0.1", "--save-every", "2")


class Nursery:
    """``flexbatch finetune`` on the demo model, in a process that can be killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        rows = [{"text": row["prompt"]} for row in story_rows(9, 1)]
        (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._errors = (folder / "errors").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.acceptance.nursery"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        assert self._answer() == "ready"

    def run(self, output: Path, *options: str, kill_after: float | None = None) -> int:
        """Return the exit code, minus the signal's number where one ended it."""
        places = ["--data", str(self.folder / "data.jsonl"), "-o", str(output), "--quiet"]
        return self.start(["finetune", "--model", "demo", *places, *OPTIONS, *options], kill_after=kill_after)

    def both(self, name: str, *options: str, kill_after: float | None = None) -> int:
        """The same training beside generation, into ``name.jsonl`` and ``name``."""
        (self.folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in story_rows(20, 12)))
        words = [
            "run",
            "--model",
            "demo",
            "-i",
            str(self.folder / "rows.jsonl"),
            "-o",
            str(self.folder / f"{name}.jsonl"),
        ]
        words += ["--finetune", str(self.folder / "data.jsonl"), "--adapter-output", str(self.folder / name), "--quiet"]
        words += ["--max-sequences", "3", "--finetune-share", "0.5", "--grad-accumulation", "2"]
        return self.start([*words, *OPTIONS, *options], kill_after=kill_after)

    def start(self, words: list[str], *, kill_after: float | None = None) -> int:
        """Run the program with ``words``; else as ``run``."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        child = int(self._answer())
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(child, signal.SIGKILL)  # not waited for yet, so its id cannot be another's
        self._process.stdin.write("wait\n")
        self._process.stdin.flush()
        return int(self._answer())

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()
        self._errors.close()

    @property
    def said(self) -> str:
        return (self.folder / "errors").read_text()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, self.said
        return line.strip()


@pytest.fixture
def nursery(tmp_path: Path) -> Iterator[Nursery]:
    made = Nursery(tmp_path)
    yield made
    made.close()


def test_killed_ten_times_it_ends_the_same(nursery: Nursery, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    stats = tmp_path / "stats.json"
    started = time.monotonic()
    assert nursery.run(whole, "--stats", str(stats)) == 0, nursery.said
    seconds = time.monotonic() - started
    losses = json.loads(stats.read_text())["losses"]
    seed = secrets.randbits(32)
    rng = random.Random(seed)
    print(f"seed {seed}: {seconds:.1f} s alone")
    kept: set[tuple[str, ...]] = set()
    killed = 0
    for _ in range(10 * KILLS):
        if killed >= KILLS and len(kept) > 1:
            break
        code = nursery.run(broken, "--stats", str(stats), kill_after=rng.uniform(0, 1.1) * seconds)
        if code == -signal.SIGKILL:
            killed += 1
            kept.add(tuple(sorted(path.name for path in tmp_path.glob("broken.part/step-*"))))
            if kept == {()}:
                seconds *= 1.1  # the machine may be slower than it was: some moment has to come after a checkpoint
        else:
            # It was done before its moment: from the start again, so that all moments of a training are met.
            assert code == 0, nursery.said
            check(whole, broken, stats, losses)
            assert nursery.run(broken, "--overwrite", kill_after=rng.uniform(0.3, 1.0) * seconds) in (0, -9)
            killed += not (broken / "training.json").exists()
    assert killed >= KILLS
    assert nursery.run(broken, "--stats", str(stats)) == 0, nursery.said
    check(whole, broken, stats, losses)
    assert not (tmp_path / "broken.part").exists()
    assert len(kept) > 1, kept


def test_killed_beside_generation_both_outputs_are_whole(nursery: Nursery, tmp_path: Path) -> None:
    """Which steps share sweeps depends on the moment, so the adapter is the same to rounding; the text is exact."""
    options = ("--max-steps", "6", "--dropout", "0.1")
    started = time.monotonic()
    assert nursery.both("whole", *options) == 0, nursery.said
    seconds = time.monotonic() - started
    rng = random.Random(secrets.randbits(32))
    killed = 0
    for _ in range(4):
        code = nursery.both("broken", *options, kill_after=rng.uniform(0.2, 0.9) * seconds)
        assert code in (0, -signal.SIGKILL), nursery.said
        killed += code != 0
    assert killed
    assert nursery.both("broken", *options) == 0, nursery.said
    assert (tmp_path / "broken.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "broken"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert float((tensor - two[name]).norm() / tensor.norm()) < 1e-4, name
    assert not list(tmp_path.glob("*.part"))


def check(whole: Path, broken: Path, stats: Path, losses: list[float]) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes(), name
    assert json.loads(stats.read_text())["losses"] == losses
