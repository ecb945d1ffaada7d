"""Safetensors files, whole and damaged: what is read equals the safetensors library, what is wrong is named."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexbatch.checkpoint.safetensors import read_header, read_tensor, write_file
from flexbatch.checkpoint.tensors import DTYPES, TensorEntry
from flexbatch.errors import ModelError


def header_of(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    return dict(json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]))


def build(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def claim(shape: Any, begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("dtype", list(DTYPES.values()))
def test_reads_what_the_library_wrote(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "a": torch.randn(3, 5).to(dtype),
        "b.weight": torch.randn(7).to(dtype),
        "scalar": torch.tensor(2.5).to(dtype),
        "empty": torch.zeros(0, 4).to(dtype),
    }
    save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "pt"})
    entries = read_header(tmp_path / "m.safetensors")
    assert entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        got = read_tensor(entries[name])
        assert got.dtype == dtype
        assert torch.equal(got, tensor)


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    tensors = {
        "turned": torch.randn(4, 6).T,
        "half": torch.randn(3, 2).to(torch.bfloat16),
        "mask": torch.tensor([[True, False]]),
        "scalar": torch.tensor(-1e4),
    }
    write_file(tmp_path / "m.safetensors", tensors)
    loaded = load_file(tmp_path / "m.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)


DAMAGE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "empty": (lambda path: build(path, b"", length=0), "JSON"),
    "no header": (lambda path: (path.write_bytes(b"abc"), path)[1], "truncated"),
    "absurd header": (lambda path: build(path, {}, length=2**60), "claims"),
    "header beyond the file": (lambda path: build(path, {}, length=50), "claims"),
    "no JSON": (lambda path: build(path, b"{nonsense"), "JSON"),
    "deep JSON": (lambda path: build(path, b"[" * 100000), "JSON"),
    "no object": (lambda path: build(path, [1]), "object"),
    "named twice": (lambda path: build(path, b'{"a": 1, "a": 2}'), "twice"),
    "keys missing": (lambda path: build(path, {"t": {"dtype": "F32"}}), "tensor t"),
    "unknown dtype": (lambda path: build(path, {"t": claim([1], 0, 4, "Q3")}, b"1234"), "Q3"),
    "dtype no string": (lambda path: build(path, {"t": claim([1], 0, 4, [])}, b"1234"), "dtype"),
    "negative shape": (lambda path: build(path, {"t": claim([-1], 0, 4)}, b"1234"), "shape"),
    "shape no list": (lambda path: build(path, {"t": claim("4", 0, 4)}, b"1234"), "shape"),
    "absurd shape": (lambda path: build(path, {"t": claim([2**40, 2**40], 0, 4)}, b"1234"), "needs"),
    "absurd dimension": (lambda path: build(path, {"t": claim([2**300], 0, 4)}, b"1234"), "shape"),
    "fractional offset": (lambda path: build(path, {"t": claim([1], 0, 4.0)}, b"1234"), "data_offsets"),
    "outside of the file": (lambda path: build(path, {"t": claim([2**38], 0, 2**40)}, b"1234"), "outside"),
    "backwards": (lambda path: build(path, {"t": claim([1], 4, 0)}, b"1234"), "outside"),
    "size and shape disagree": (lambda path: build(path, {"t": claim([2], 0, 4)}, b"1234"), "needs 8 bytes"),
    "overlap": (lambda path: build(path, {"t": claim([2], 0, 8), "u": claim([2], 4, 12)}, b"x" * 12), "overlaps"),
    "hole": (lambda path: build(path, {"t": claim([1], 0, 4), "u": claim([1], 8, 12)}, b"x" * 12), "no tensor"),
    "left over": (lambda path: build(path, {"t": claim([1], 0, 4)}, b"x" * 12), "no tensor"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(tmp_path: Path, kind: str) -> None:
    make, word = DAMAGE[kind]
    path = make(tmp_path / "broken.safetensors")
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match=word) as caught:
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 5 * 10**7
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [4, 60, -1, -100])
def test_truncated_anywhere(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.randn(50), "b": torch.randn(50)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"truncated|claims"):
        read_header(path)


def test_file_shortened_after_its_header_was_read(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.randn(50)}, path)
    entry = read_header(path)["a"]
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ModelError, match=r"tensor a: the file ends after 190 of 200 bytes"):
        read_tensor(entry)
    path.unlink()
    with pytest.raises(ModelError, match="tensor a: No such file"):
        read_tensor(entry)


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    tensor = torch.randn(100)
    save_file({"a": tensor}, path)
    real = os.preadv

    def slow(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        return real(descriptor, [buffers[0][:7]], offset)

    monkeypatch.setattr(os, "preadv", slow)
    assert torch.equal(read_tensor(read_header(path)["a"]), tensor)


def test_two_reads_do_not_share_memory(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.ones(4)}, path)
    entry: TensorEntry = read_header(path)["a"]
    read_tensor(entry).zero_()
    assert torch.equal(read_tensor(entry), torch.ones(4))
    assert header_of(path)["a"]["shape"] == [4]
