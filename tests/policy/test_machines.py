"""Machines that ship with the package: every one is a whole profile, with a source for each figure, and plausible."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flexbatch.errors import UsageError
from flexbatch.policy.machines import load_profile, profile_text, shipped_profiles
from flexbatch.policy.profile import HardwareProfile, Processor, parse_profile

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("a100-40", "a10g", "h100", "l4", "rtx3060", "rtx3090", "rtx4090", "t4")
PACKED = ("packed_attention", "packing")


def gpu(name: str) -> Processor:
    found = load_profile(name).gpu
    assert found is not None
    return found


def test_the_contracts_machines_are_there() -> None:
    assert shipped_profiles() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_has_a_source(name: str) -> None:
    profile = load_profile(name)
    value = profile.to_json()
    figures = {f"{part}.{key}" for part in ("memory", "links") for key in value[part]}
    for tier in ("gpu", "cpu"):
        figures |= {f"{tier}.{key}" for key in ("attention_bytes", "attention_flops", "step_s", *PACKED)}
        figures |= {f"{tier}.{kind}.{key}" for kind in ("products", "widened") for key in value[tier][kind]}
    assert set(profile.sources) == figures
    assert all(len(source) > 15 for source in profile.sources.values())
    assert re.search(r"PCIe [345]\.0 x16", profile.sources["links.h2d"])


@pytest.mark.parametrize("name", NAMES)
def test_figures_are_in_order(name: str) -> None:
    profile = load_profile(name)
    processor = gpu(name)
    memory, links = profile.memory, profile.links
    assert memory["gpu"] < memory["cpu"] < memory["disk"]
    assert links["disk_write"] <= links["disk_read"] < links["h2d"] < profile.cpu.attention_bytes * 2
    assert profile.cpu.attention_bytes < processor.attention_bytes
    assert profile.cpu.products["float32"].at(512) < processor.products["float32"].at(512)
    assert processor.products["float32"].at(512) < processor.products["float16"].at(512)
    for part in (processor, profile.cpu):
        assert set(part.widened) >= {"float16", "bfloat16", "int4"}
        for curve in part.products.values():
            found = [rate for _, rate in curve.points]
            assert found == sorted(found)
            # More rows never take less time.
            assert all(r1 / f1 <= r2 / f2 for (r1, f1), (r2, f2) in zip(curve.points, curve.points[1:], strict=False))
        # One row cannot be multiplied faster than its weights are read: two FLOPs for 2 or 4 bytes.
    assert processor.products["float16"].at(1) <= processor.attention_bytes
    # Packed KV: fewer bytes, and work besides. It pays on a GPU; on a CPU, at least not many times less than fp32.
    assert 1 < processor.packed_attention / (processor.attention_bytes / 2) < 4
    assert 0.25 < profile.cpu.packed_attention / (profile.cpu.attention_bytes / 4) <= 4 / 0.5625
    assert profile.cpu.packing < processor.packing < processor.packed_attention


def test_machines_are_ordered_as_their_makers_say() -> None:
    half = {name: gpu(name).products["float16"].at(4096) for name in NAMES}
    assert half["t4"] < half["rtx3090"] < half["l4"] < half["rtx4090"] < half["a100-40"] < half["h100"]
    assert half["rtx3060"] < half["a10g"] <= half["rtx3090"]
    reads = {name: gpu(name).attention_bytes for name in NAMES}
    assert reads["l4"] < reads["t4"] < reads["rtx3060"] < reads["a10g"] < reads["rtx3090"] < reads["rtx4090"]
    assert reads["rtx4090"] < reads["a100-40"] < reads["h100"]
    links = {name: load_profile(name).links["h2d"] for name in NAMES}
    assert links["t4"] < links["l4"] == links["a100-40"] < links["h100"]


def test_the_t4_is_the_papers() -> None:
    profile = load_profile("t4")
    assert profile.memory["cpu"] == 208 * 10**9
    assert profile.memory["disk"] == 1.5e12
    assert (profile.links["disk_read"], profile.links["disk_write"]) == (2e9, 1e9)
    assert profile.links["h2d"] == 12.89e9
    assert gpu("t4").products["float16"].at(4096) == pytest.approx(21.24e12, rel=0.03)
    assert "bfloat16" not in gpu("t4").products


def test_the_files_are_what_the_script_writes() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/write_profiles.py", "--check"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_profile_in_a_file_is_as_good(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    text = profile_text(load_profile("l4"))
    path.write_text(text, encoding="utf-8")
    assert load_profile(path) == load_profile("L4") == parse_profile(json.loads(text), "x")
    assert re.search(r"^ +\[1, \d+\.\d\],$", text, re.MULTILINE)
    assert isinstance(load_profile(str(path)), HardwareProfile)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "neither a file nor a shipped machine"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe{", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "a profile is a JSON object"),
        (b'{"name": "x"}', "memory: missing"),
        (b" " * 2**23, "larger than any profile"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(tmp_path: Path, content: bytes | None, expected: str) -> None:
    path = tmp_path / "mine.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        load_profile(path)
    message = str(caught.value)
    assert expected in message
    assert str(path) in message
    assert "\n" not in message


def test_a_name_that_is_not_shipped_lists_those_that_are() -> None:
    with pytest.raises(UsageError) as caught:
        load_profile("rtx9090")
    assert all(name in str(caught.value) for name in NAMES)
