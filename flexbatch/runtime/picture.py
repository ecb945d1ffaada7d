"""Draws a trace as a picture: one row a resource, a bar a Step, as SVG that a web page shows as it is.

It reads Chrome traces, written by real runs or by a simulator; of flexbatch it knows the kinds of Steps, for colours.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from flexbatch.errors import InputError

_COLOURS = {
    # weights: blue
    "read": "#3f7fbf",
    "upload": "#7fb2e5",
    # hidden states: violet
    "hidden_read": "#6a51a3",
    "hidden_up": "#9e8ac8",
    "hidden_down": "#b9a9d9",
    "hidden_write": "#8064b0",
    # KV: green
    "kv_read": "#1f7a5c",
    "kv_up": "#59b08f",
    "kv_down": "#94cfb8",
    "kv_write": "#35967a",
    # products: orange; attention: red
    "project": "#f0a13c",
    "finish": "#e07b39",
    "attend": "#c8473f",
    "qkv_down": "#e59a95",
    "attended_up": "#d97b74",
    # the two ends of the model: grey
    "gather": "#b5b0a8",
    "embed": "#8d877d",
    "head": "#5f5a52",
}
_OTHERS = ("#a6761d", "#c2569c", "#6b9a1f", "#2c9fa8", "#9c6b4f", "#7a7a7a")
_PALE = {"upload", "hidden_down", "kv_down", "gather", "qkv_down"}
_INK, _SOFT, _GRID, _TRACK = "#24292f", "#656d76", "#e3e6ea", "#f4f5f7"
_FONT = "-apple-system, 'Segoe UI', Helvetica, Arial, 'DejaVu Sans', sans-serif"
_WIDTH, _LEFT, _RIGHT = 1000, 128, 28
_ROW, _BAR = 46, 30
_FINEST = 0.4  # bars closer than so many pixels are drawn as one


@dataclass(frozen=True, slots=True)
class _Bar:
    kind: str
    label: str
    start: float
    end: float


def draw(trace_json: Path, output: Path, *, start_s: float | None = None, end_s: float | None = None) -> None:
    """Write the picture of the trace ``trace_json`` to ``output`` (SVG), from ``start_s`` to ``end_s`` of its seconds.

    A row's label says which share of that time the resource was idle; the number in a bar is the layer (0 the
    embedding). Raises InputError if the file is no trace, or nothing happened in that time.
    """
    rows = _read(trace_json)
    bars = [bar for row in rows.values() for bar in row]
    begin = min((bar.start for bar in bars), default=0.0) if start_s is None else start_s
    end = max((bar.end for bar in bars), default=0.0) if end_s is None else end_s
    rows = {name: _clip(row, begin, end) for name, row in rows.items()}
    if begin >= end or not any(rows.values()):
        raise InputError(f"{trace_json}: no step ran between {begin:g} s and {end:g} s")
    output.write_text(_svg(rows, begin, end), encoding="utf-8")


def _read(path: Path) -> dict[str, list[_Bar]]:
    """The bars of each row by its name, in seconds, both in the order of the trace."""
    try:
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
        rows: dict[str, list[_Bar]] = {names[number]: [] for number in sorted(names)}
        for event in events:
            if event["ph"] == "X":
                kind, start = event["cat"], event["ts"] / 1e6
                label = event["name"].removeprefix(kind).strip()
                rows[names[event["tid"]]].append(_Bar(kind, label, start, start + event["dur"] / 1e6))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: this is no trace that flexbatch wrote ({type(error).__name__}: {error})") from error
    for row in rows.values():
        row.sort(key=lambda bar: bar.start)
    return rows


def _clip(row: Iterable[_Bar], begin: float, end: float) -> list[_Bar]:
    return [
        _Bar(bar.kind, bar.label, max(bar.start, begin), min(bar.end, end))
        for bar in row
        if bar.end > begin and bar.start < end
    ]


def idle_share(spans: Iterable[tuple[float, float]], begin: float, end: float) -> float:
    """Return the share of ``begin`` to ``end`` that none of ``spans``, (start, end) each, covers."""
    covered, reached = 0.0, begin
    for start, stop in sorted(spans):
        covered += max(0.0, min(stop, end) - max(start, reached))
        reached = max(reached, stop)
    return 1 - covered / (end - begin)


def _svg(rows: dict[str, list[_Bar]], begin: float, end: float) -> str:
    present = {bar.kind for row in rows.values() for bar in row}
    colours = _colours_of(present)
    legend, top = _legend([kind for kind in colours if kind in present], colours)
    bottom = top + _ROW * len(rows)
    height = bottom + 40
    scale = (_WIDTH - _LEFT - _RIGHT) / (end - begin)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        f'font-family="{_FONT}" font-size="12">',
        f'<rect x="0.5" y="0.5" width="{_WIDTH - 1}" height="{height - 1}" rx="6" fill="#ffffff" stroke="{_GRID}"/>',
        *legend,
    ]
    for number, (name, row) in enumerate(rows.items()):
        parts += _row(name, row, top + _ROW * number, begin, end, scale, colours)
    parts += _axis(begin, end, scale, top, bottom)
    return "\n".join([*parts, "</svg>", ""])


def _colours_of(present: set[str]) -> dict[str, str]:
    others = sorted(present - _COLOURS.keys())
    return _COLOURS | {kind: _OTHERS[number % len(_OTHERS)] for number, kind in enumerate(others)}


def _text(x: float, y: float, text: str, colour: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}"{" " + more if more else ""}>{escape(text)}</text>'


def _width_of(text: str, size: float) -> float:
    """About the width of ``text`` in pixels, on the generous side: the font is the reader's."""
    return size * sum(0.38 if letter in "fijlrt, " else 0.95 if letter in "mwMW" else 0.66 for letter in text)


def _legend(kinds: Sequence[str], colours: dict[str, str]) -> tuple[list[str], int]:
    """The legend, in as many lines as it takes, and where the rows begin below it."""
    parts = []
    x, y = float(_LEFT), 18
    for kind in kinds:
        name = " ".join(word.upper() if word in ("kv", "qkv") else word for word in kind.split("_"))
        width = 17 + _width_of(name, 12) + 14
        if x + width > _WIDTH - _RIGHT and x > _LEFT:
            x, y = float(_LEFT), y + 20
        parts.append(f'<rect x="{x:.1f}" y="{y}" width="12" height="12" rx="2.5" fill="{colours[kind]}"/>')
        parts.append(_text(x + 17, y + 10, name, _INK))
        x += width
    return parts, y + 24


def _row(
    name: str, row: Sequence[_Bar], y: int, begin: float, end: float, scale: float, colours: dict[str, str]
) -> list[str]:
    inner = y + (_ROW - _BAR) // 2
    idle = idle_share(((bar.start, bar.end) for bar in row), begin, end)
    parts = [
        _text(_LEFT - 14, inner + 12, name.replace("_", " "), _INK, 'text-anchor="end" font-weight="600"'),
        _text(_LEFT - 14, inner + 27, f"{idle:.0%} idle", _SOFT, 'text-anchor="end" font-size="11"'),
        f'<rect x="{_LEFT}" y="{inner}" width="{_WIDTH - _LEFT - _RIGHT}" height="{_BAR}" rx="2" fill="{_TRACK}"/>',
    ]
    shapes: dict[str, list[str]] = {}
    labels: list[str] = []
    for bar in _merged(row, _FINEST / scale):
        x, width = _LEFT + (bar.start - begin) * scale, (bar.end - bar.start) * scale
        # A sliver of background keeps neighbours apart where there is room for it.
        width = max(width - 0.7, 0.85 * width, _FINEST)
        shapes.setdefault(bar.kind, []).append(f"M{x:.2f} {inner}h{width:.2f}v{_BAR}h-{width:.2f}z")
        if bar.label and width >= _width_of(bar.label, 10) + 5:
            ink = _INK if bar.kind in _PALE else "#ffffff"
            labels.append(_text(x + width / 2, inner + _BAR / 2 + 3.5, bar.label, ink))
    parts += [f'<path fill="{colours[kind]}" d="{"".join(paths)}"/>' for kind, paths in shapes.items()]
    if labels:
        parts += ['<g font-size="10" text-anchor="middle">', *labels, "</g>"]
    return parts


def _merged(row: Sequence[_Bar], finest: float) -> list[_Bar]:
    """The bars to draw: those that would be too fine to see one by one are joined, under the longest one's kind."""
    drawn: list[_Bar] = []
    longest = 0.0
    for bar in row:
        length = bar.end - bar.start
        last = drawn[-1] if drawn else None
        if last is not None and last.end - last.start < finest and bar.start - last.end < finest and length < finest:
            kind = bar.kind if length > longest else last.kind
            longest = max(longest, length)
            drawn[-1] = _Bar(kind, "", last.start, max(bar.end, last.end))
        else:
            drawn.append(bar)
            longest = length
    return drawn


def _axis(begin: float, end: float, scale: float, top: int, bottom: int) -> list[str]:
    """Ticks at round times, in a unit that keeps their numbers short."""
    unit, factor = ("s", 1.0) if end - begin >= 1 else ("ms", 1e3) if end - begin >= 1e-3 else ("µs", 1e6)
    step = _round_step((end - begin) * factor / 8)
    first = math.ceil(begin * factor / step - 1e-6)
    last = math.floor(end * factor / step + 1e-6)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    parts = []
    for number in range(first, last + 1):
        x = _LEFT + (number * step / factor - begin) * scale
        parts.append(f'<path d="M{x:.1f} {top}V{bottom + 4}" stroke="{_INK}" stroke-opacity="0.13"/>')
        parts.append(
            _text(x, bottom + 19, f"{number * step:.{decimals}f}", _SOFT, 'text-anchor="middle" font-size="11"')
        )
    parts.append(_text(_LEFT - 30, bottom + 19, f"time, {unit}", _SOFT, 'text-anchor="end" font-size="11"'))
    return parts


def _round_step(rough: float) -> float:
    """The smallest of 1, 2, 5, 10, 20, .. that is not below ``rough``."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * digit for digit in (1, 2, 5, 10) if power * digit >= rough * (1 - 1e-9))
