"""The picture of a trace: its geometry is read back from the SVG and compared with the trace."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from flexbatch.errors import InputError
from flexbatch.runtime.picture import draw, idle_share
from flexbatch.scheduler.timeline import Event, write_chrome_trace
from tests.runtime.streams import make_step

SCRIPT = Path(__file__).parents[2] / "scripts" / "draw_trace.py"
SVG = "{http://www.w3.org/2000/svg}"
BOX = re.compile(r"M([\d.]+) (\d+)h([\d.]+)v(\d+)h-[\d.]+z")
EVENTS = [
    Event(make_step(1, "disk_read", kind="read"), 1, 100.0, 100.4),
    Event(make_step(2, "disk_read", kind="read"), 1, 100.5, 101.0),
    Event(make_step(3, "gpu", kind="project"), 1, 100.4, 100.6),
    Event(make_step(4, "gpu", kind="juggle & dance"), 1, 100.6, 101.8),
    Event(make_step(5, "cpu", kind="attend"), 1, 101.5, 102.0),
]


class Picture:
    def __init__(self, path: Path) -> None:
        self.root = ET.fromstring(path.read_text(encoding="utf-8"))
        self.texts = [element.text or "" for element in self.root.iter(f"{SVG}text")]
        self.where = {
            element.text: (float(element.attrib["x"]), float(element.attrib["y"]))
            for element in self.root.iter(f"{SVG}text")
        }
        self.bars = sorted(
            (float(y), float(x), float(x) + float(width), element.attrib["fill"])
            for element in self.root.iter(f"{SVG}path")
            if "fill" in element.attrib
            for x, y, width, _ in BOX.findall(element.attrib["d"])
        )


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.json"
    write_chrome_trace(EVENTS, path)
    return path


def test_bars_stand_where_the_steps_ran(trace: Path, tmp_path: Path) -> None:
    draw(trace, tmp_path / "picture.svg")
    picture = Picture(tmp_path / "picture.svg")
    assert [text for text in picture.texts if "idle" in text] == ["30% idle", "75% idle", "55% idle"]
    rows = sorted({y for y, *_ in picture.bars})
    assert len(rows) == 3
    # The axis gives the scale: 0.0 and 2.0 s stand at the two ends.
    zero, two = picture.where["0.0"][0], picture.where["2.0"][0]
    expected = [(0, 0.4, 0.6), (0, 0.6, 1.8), (1, 1.5, 2.0), (2, 0.0, 0.4), (2, 0.5, 1.0)]
    for (y, left, right, _), (row, start, end) in zip(picture.bars, expected, strict=True):
        assert y == rows[row]
        assert left == pytest.approx(zero + start * (two - zero) / 2, abs=0.1)
        assert right == pytest.approx(zero + end * (two - zero) / 2, abs=0.8)
    colours = [colour for *_, colour in picture.bars]
    assert colours[3] == colours[4]
    assert len(set(colours)) == 4
    for name in ("gpu", "cpu", "disk read", "read", "project", "attend", "juggle & dance", "1", "5", "time, s"):
        assert name in picture.texts


def test_a_part_of_the_time(trace: Path, tmp_path: Path) -> None:
    draw(trace, tmp_path / "picture.svg", start_s=0.5, end_s=0.7)
    picture = Picture(tmp_path / "picture.svg")
    assert [text for text in picture.texts if "idle" in text] == ["0% idle", "100% idle", "0% idle"]
    assert len(picture.bars) == 3
    assert {"500", "600", "700", "time, ms"} <= set(picture.texts)


def test_nothing_leaves_the_picture_or_overlaps(tmp_path: Path) -> None:
    kinds = ["hidden_write", "attended_up", "mmmmmmmm", *(f"kind number {i}" for i in range(20))]
    events = [
        Event(make_step(number, ("gpu", "h2d")[number % 2], kind=kinds[number % len(kinds)]), 1, begin, begin + 0.6e-4)
        for number, begin in enumerate(index * 1e-4 for index in range(20_000))
    ]
    write_chrome_trace(events, tmp_path / "trace.json")
    draw(tmp_path / "trace.json", tmp_path / "picture.svg")
    picture = Picture(tmp_path / "picture.svg")
    assert (tmp_path / "picture.svg").stat().st_size < 300_000, "fine bars are joined"
    width, height = float(picture.root.attrib["width"]), float(picture.root.attrib["height"])
    for y, left, right, _ in picture.bars:
        assert 0 <= left < right <= width
        assert 0 < y < height - 30
    for before, after in itertools.pairwise(picture.bars):
        assert after[0] > before[0] or after[1] >= before[2] - 0.45
    legend = [(y, x, name) for name, (x, y) in picture.where.items() if y < picture.bars[0][0]]
    lines = sorted({y for y, _, _ in legend})
    assert len(lines) > 1
    for line in lines:
        entries = sorted((x, len(name or "") * 12 * 0.5) for y, x, name in legend if y == line)
        assert all(x + size + 17 <= after for (x, size), (after, _) in itertools.pairwise(entries))
        assert entries[-1][0] + entries[-1][1] < width


def test_idle_share() -> None:
    assert idle_share([], 0, 4) == 1
    assert idle_share([(0, 4)], 0, 4) == 0
    assert idle_share([(2, 3), (1, 2.5), (2.6, 2.7)], 0, 4) == 0.5
    assert idle_share([(-5, 1), (3, 9)], 0, 4) == 0.5


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"traceEvents": [{"ph": "X"}]}', '{"traceEvents": [{"ph": "X", "name": "a", "tid": 1}]}'],
)
def test_what_is_no_trace(text: str, tmp_path: Path) -> None:
    (tmp_path / "trace.json").write_text(text)
    with pytest.raises(InputError, match=r"trace\.json: this is no trace that flexbatch wrote"):
        draw(tmp_path / "trace.json", tmp_path / "picture.svg")


@pytest.mark.parametrize(("start", "end"), [(5.0, 6.0), (1.0, 1.0), (1.7, 0.7)])
def test_a_time_in_which_nothing_ran(trace: Path, tmp_path: Path, start: float, end: float) -> None:
    with pytest.raises(InputError, match="no step ran between"):
        draw(trace, tmp_path / "picture.svg", start_s=start, end_s=end)


def test_the_script(trace: Path, tmp_path: Path) -> None:
    def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SCRIPT), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    picture = tmp_path / "picture.svg"
    done = run(trace, picture, "--from", 0.5, "--to", 0.7)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    draw(trace, tmp_path / "same.svg", start_s=0.5, end_s=0.7)
    assert picture.read_text() == (tmp_path / "same.svg").read_text()
    failed = run(tmp_path / "missing.json", picture)
    assert failed.returncode == 2
    assert "missing.json: this is no trace" in failed.stderr
    assert failed.stderr.count("\n") == 1
    assert json.loads(trace.read_text())["displayTimeUnit"] == "ms"
