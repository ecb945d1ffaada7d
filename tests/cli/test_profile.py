"""``flexbatch profile``: JSON and nothing else on stdout, a file that plan can read, a cache, and clear mistakes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from flexbatch.cli.main import main
from flexbatch.policy.machines import load_profile
from flexbatch.policy.profile import parse_profile
from flexbatch.runtime import profile_cache
from flexbatch.runtime.measure import QUICK
from flexbatch.runtime.steady import Patience
from flexbatch.units import MIB


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Measurements take no time worth mentioning; the cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    short = Patience(0.5, 2, 0.02)
    tiny = replace(QUICK, rows=(1, 16), patience=short, disk=short, pool=4 * MIB, file=4 * MIB, piece=MIB)
    monkeypatch.setattr(profile_cache, "_EFFORTS", {"full": tiny, "quick": tiny})
    return tmp_path


def test_stdout_is_the_profile_and_nothing_else(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "--device", "cpu", "--disk-dir", str(folder)]) == 0
    out, _ = capsys.readouterr()
    profile = parse_profile(json.loads(out), "stdout")
    assert profile.gpu is None
    assert [rows for rows, _ in profile.cpu.products["float32"].points] == [1, 16]
    assert len(list((folder / "cache" / "flexbatch" / "profiles").iterdir())) == 1


def test_a_file_that_plan_reads(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = folder / "mine.json"
    words = ["profile", "--device", "sim", "--gpu-memory", "64MiB", "--throttle", "h2d=400MB", "--output", str(target)]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert str(target) in err
    profile = load_profile(target)
    assert profile.memory["gpu"] == 64 * MIB
    assert 0 < profile.links["h2d"] < 1.1 * 4e8  # a busy machine may be slower than that


def test_quiet(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "--device", "cpu", "--quiet", "--output", str(folder / "mine.json")]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--device", "tpu"], "--device tpu: give auto"),
        (["--disk-dir", "/missing/folder"], "--disk-dir /missing/folder: is no folder"),
        (["--output", "/missing/folder/x.json"], "there is no folder /missing/folder"),
        (["--throttle", "h2d"], "--throttle h2d: give one of"),
        (["--throttle", "h2d=0"], "--throttle h2d=0"),
        (["--gpu-memory", "many"], "--gpu-memory: 'many' is not a size"),
        (["--rounds", "3"], "unrecognized arguments"),
    ],
)
def test_a_mistake_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    assert main(["profile", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert expected in err
