"""Checkpoints in 4 bits: the cache, converted folders, what a crash leaves, and what is refused."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexbatch.checkpoint import shards
from flexbatch.checkpoint.export import export
from flexbatch.checkpoint.four_bits import PackedCheckpoint, as_stored, in_four_bits
from flexbatch.checkpoint.locate import locate
from flexbatch.checkpoint.packed import packable
from flexbatch.checkpoint.reader import StoredCheckpoint, open_checkpoint
from flexbatch.checkpoint.safetensors import write_file
from flexbatch.checkpoint.tensors import Checkpoint
from flexbatch.cli.main import main
from flexbatch.compression.groups import Packed, dequantize
from flexbatch.compression.quantize import quantize
from flexbatch.errors import DoesNotFitError, ModelError
from flexbatch.models.registry import family_of
from flexbatch.runtime.calibrate import Calibrator
from tests.checkpoint.gguf_files import Q, write_model
from tests.checkpoint.grouped_files import SETTINGS, write_folder
from tests.models.naive import load_weights, logits_of
from tests.tiny import FAMILIES, tiny_checkpoint, tiny_model


class Usage(NamedTuple):
    """As ``shutil.disk_usage`` gives it."""

    total: int
    used: int
    free: int


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "flexbatch" / "packed"


def opened(path: Path, bits: int = 16) -> Checkpoint:
    folder = locate(str(path))
    table = family_of(folder.shape).table(folder.shape)
    checkpoint = open_checkpoint(folder, table)
    return in_four_bits(checkpoint, folder, table) if bits == 4 else as_stored(checkpoint, table)


def linears(path: Path) -> list[str]:
    shape = locate(str(path)).shape
    return list(packable(family_of(shape).table(shape)))


def weight(checkpoint: Checkpoint, name: str) -> torch.Tensor | Packed:
    entry = checkpoint.entries[name]
    return entry.view(checkpoint.raw(entry))


def assert_same(one: Checkpoint, other: Checkpoint) -> None:
    """Every tensor the same, bit for bit and in the same form."""
    assert one.entries.keys() == other.entries.keys()
    for name in one.entries:
        first, second = weight(one, name), weight(other, name)
        if isinstance(first, Packed):
            assert isinstance(second, Packed)
            assert first.tensors().keys() == second.tensors().keys()
            for field, tensor in first.tensors().items():
                assert torch.equal(tensor, second.tensors()[field]), (name, field)
        else:
            assert isinstance(second, torch.Tensor)
            assert torch.equal(first, second), name


def convert(model: Path, output: Path, *more: str) -> int:
    return main(["convert", "--model", str(model), "--output", str(output), "--quiet", *more])


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_packed_once_and_a_converted_folder_holds_the_same(family: str, tmp_path: Path, cache: Path) -> None:
    model = tiny_checkpoint(tmp_path / "m", family, "random", seed=7, shards=2, rng=random.Random(7))
    wide, narrow = opened(model), opened(model, 4)
    assert isinstance(narrow, PackedCheckpoint)
    shape = locate(str(model)).shape
    kinds = packable(family_of(shape).table(shape))
    for name in wide.entries:
        stored = wide.read(wide.entries[name])
        found = weight(narrow, name)
        if name in kinds:
            assert isinstance(found, Packed)
            expected = quantize(stored.t().contiguous() if kinds[name].transposed else stored)
            assert torch.equal(dequantize(found), dequantize(expected)), name
        else:
            assert isinstance(found, torch.Tensor)
            assert torch.equal(found, stored), name
    files = {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}
    assert len(files) == shape.num_layers
    assert_same(narrow, opened(model, 4))
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")} == files
    assert convert(model, tmp_path / "out", "--weight-bits", "4") == 0
    assert_same(narrow, opened(tmp_path / "out"))
    assert isinstance(opened(tmp_path / "out", 4), StoredCheckpoint)
    assert convert(model, tmp_path / "same") == 0
    assert_same(wide, opened(tmp_path / "same"))


def test_bytes_are_at_most_4_6_bits_a_weight(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "m", "llama", "linear")
    narrow = opened(model, 4)
    entries = [narrow.entries[name] for name in linears(model) if narrow.entries[name].shape[1] % 64 == 0]
    assert entries
    assert all(8 * entry.nbytes <= 4.6 * entry.elements for entry in entries)


def test_a_changed_source_is_packed_anew(tmp_path: Path, cache: Path) -> None:
    model = tiny_checkpoint(tmp_path / "m", "llama", "plain")
    before = opened(model, 4)
    tensors = load_file(model / "model.safetensors")
    name = linears(model)[0]
    tensors[name] = tensors[name] + 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    after = opened(model, 4)
    assert len([folder for folder in cache.iterdir() if folder.is_dir()]) == 2
    changed = [weight(checkpoint, name) for checkpoint in (before, after)]
    assert all(isinstance(found, Packed) for found in changed)
    assert not torch.equal(*(dequantize(found) for found in changed if isinstance(found, Packed)))


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("family", SETTINGS)
def test_published_checkpoints_stay_packed(family: str, method: str, tmp_path: Path) -> None:
    model = write_folder(tmp_path / "m", family, method, 64)
    checkpoint = opened(tmp_path / "m")
    assert convert(tmp_path / "m", tmp_path / "out", "--weight-bits", "4") == 0
    assert_same(checkpoint, opened(tmp_path / "out"))
    state = model.state_dict()
    for name in linears(tmp_path / "m"):
        found = weight(checkpoint, name)
        assert isinstance(found, Packed)
        assert found.zeros is not None
        exact = dequantize(found, torch.float16).float()
        assert torch.equal(exact.t() if family == "gpt2" else exact, state[name]), name
        rested = checkpoint.at_rest(checkpoint.entries[name])
        assert rested.path is not None
        kept = rested.view(checkpoint.raw(rested))
        assert isinstance(kept, Packed)
        assert torch.equal(dequantize(kept), dequantize(found))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_gguf_types_that_the_format_holds_stay_packed(architecture: str, tmp_path: Path) -> None:
    settings = {"n_embd": 96, "n_head": 3} if architecture == "gpt2" else {"hidden_size": 64, "intermediate_size": 96}
    model: Any = tiny_model(architecture, settings=settings)
    path = tmp_path / "m.gguf"
    write_model(path, model, architecture, (Q.Q4_0, Q.Q8_0, Q.Q4_1))
    wide, narrow = opened(path), opened(path, 4)
    folder = locate(str(path))
    plain = open_checkpoint(folder, family_of(folder.shape).table(folder.shape))
    kinds = packable(family_of(folder.shape).table(folder.shape))
    seen: set[str] = set()
    for name, kind in kinds.items():
        exact = plain.read(plain.entries[name])
        exact = exact.t().contiguous() if kind.transposed else exact
        stored, packed = weight(wide, name), weight(narrow, name)
        assert isinstance(packed, Packed)
        if isinstance(stored, Packed):
            seen.add(stored.offset)
            bits = {"middle": 4.5, "minimum": 5.0}[stored.offset]
            assert stored.bits_per_weight == bits
            assert torch.equal(dequantize(stored), exact)
            assert torch.equal(dequantize(packed), exact)
        else:
            seen.add("wide")
            assert torch.equal(dequantize(packed), dequantize(quantize(exact)))
    assert seen == {"middle", "minimum", "wide"}
    for asked, expected in (("16", wide), ("4", narrow)):
        assert convert(path, tmp_path / f"out{asked}", "--weight-bits", asked) == 0
        assert_same(expected, opened(tmp_path / f"out{asked}"))


def crash_in(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let the conversion fail as it makes the file of that number."""
    count = 0

    def count_up(path: Path, tensors: Any) -> None:
        nonlocal count
        count += 1
        if count == number:
            path.write_bytes(b"torn")
            raise KeyboardInterrupt
        write_file(path, tensors)

    monkeypatch.setattr(shards, "write_file", count_up)


def calibrated(model: Path, output: Path, texts: int = 3) -> None:
    """Convert with a sample of random tokens."""
    folder = locate(str(model))
    table = family_of(folder.shape).table(folder.shape)
    checkpoint = open_checkpoint(folder, table)
    rng = random.Random(3)
    sample = [[rng.randrange(folder.shape.vocab_size) for _ in range(40)] for _ in range(texts)]
    packer = Calibrator(folder.shape, checkpoint, sample)
    export(checkpoint, folder, table, output, packer, lambda _: None, identity="x", progress=lambda *_: None)


@pytest.mark.parametrize("way", ["convert", "calibrated", "cache"])
def test_a_conversion_that_was_cut_off_goes_on(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    family = "gpt2" if way == "calibrated" else "mistral"
    model = tiny_checkpoint(tmp_path / "m", family, "plain")
    ways: dict[str, Callable[[Path], object]] = {
        "convert": lambda out: convert(model, out, "--weight-bits", "4"),
        "calibrated": lambda out: calibrated(model, out),
        "cache": lambda _: opened(model, 4),
    }
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        crash_in(patch, 3)
        if way == "convert":
            assert ways[way](out) == 130
        else:
            with pytest.raises(KeyboardInterrupt):
                ways[way](out)
    assert not out.exists()
    (left,) = [*tmp_path.glob(".out.partial"), *cache.glob(".*.partial")]
    finished = {path.name: path.stat().st_ino for path in left.glob("*.safetensors")}
    assert len(finished) == 2
    ways[way](out)
    place = out if way != "cache" else next(folder for folder in cache.iterdir() if folder.is_dir())
    found = opened(out) if way != "cache" else opened(model, 4)
    assert not left.exists()
    assert {name: (place / name).stat().st_ino for name in finished} == finished
    if way == "cache":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
        assert_same(found, opened(model, 4))
        return
    ways[way](tmp_path / "whole")
    assert_same(found, opened(tmp_path / "whole"))
    if way == "convert":
        assert convert(model, out, "--weight-bits", "4") == 0  # complete already
        assert convert(model, out) == 2  # of another kind


def test_a_killed_process_leaves_what_the_next_one_goes_on_with(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "flexbatch", "convert", "--model", "demo", "--weight-bits", "4", "--output"]
    process = subprocess.Popen([*command, str(out)], stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob(".out.partial/*.safetensors")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert main([*command[3:], str(out), "--quiet"]) == 0
    assert main([*command[3:], str(tmp_path / "whole"), "--quiet"]) == 0
    assert_same(opened(out), opened(tmp_path / "whole"))


def test_calibration_lowers_the_error_of_outputs(tmp_path: Path) -> None:
    """Of a model without text, on other random tokens of the same kind."""
    model = tiny_checkpoint(tmp_path / "m", "llama", "linear")
    calibrated(model, tmp_path / "fitted", texts=50)
    assert convert(model, tmp_path / "plain", "--weight-bits", "4") == 0
    shape, exact = load_weights(model)
    ids = torch.randint(0, shape.vocab_size, (200,), generator=torch.Generator().manual_seed(9))
    expected = logits_of(shape, exact, ids)
    errors = {}
    for name in ("plain", "fitted"):
        checkpoint = opened(tmp_path / name)
        weights = {}
        for key in exact:
            found = weight(checkpoint, key)
            weights[key] = dequantize(found) if isinstance(found, Packed) else found.float()
        errors[name] = float((logits_of(shape, weights, ids) - expected).norm() / expected.norm())
    assert errors["fitted"] < 0.97 * errors["plain"], errors


def test_a_sample_of_text_is_read_with_the_models_tokenizer(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little girl who had a red ball. " * 12, encoding="utf-8")
    assert convert(Path("demo"), tmp_path / "fitted", "--weight-bits", "4", "--calibrate", str(text)) == 0
    assert convert(Path("demo"), tmp_path / "plain", "--weight-bits", "4") == 0
    fitted, plain = opened(tmp_path / "fitted"), opened(tmp_path / "plain")
    name = linears(tmp_path / "plain")[0]
    assert not torch.equal(fitted.raw(fitted.entries[name]), plain.raw(plain.entries[name]))


# --- what is refused -------------------------------------------------------------------------------------------------


def fails(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    """Run the program; return its one line of error."""
    assert main(list(arguments)) == code
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("flexbatch: error: ")
    return lines[0]


def test_mistakes_are_one_line_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(tiny_checkpoint(tmp_path / "m", "llama", "plain"))
    capsys.readouterr()
    out = str(tmp_path / "out")
    (tmp_path / "file").write_text("x" * 2000)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    four = ("--weight-bits", "4")
    cases: list[tuple[tuple[str, ...], str]] = [
        (("--model", model), "--output"),
        (("--model", model, "--output", out, "--weight-bits", "auto"), "give 16 or 4"),
        (("--model", model, "--output", out, "--weight-bits", "3"), "give 16 or 4"),
        (("--model", model, "--output", str(tmp_path / "file")), "is a file"),
        (("--model", model, "--output", str(tmp_path / "full")), "not empty"),
        (("--model", model, "--output", str(tmp_path / "no" / "out")), "make it first"),
        (("--model", str(tmp_path / "nothing"), "--output", out), "neither a folder"),
        (("--model", model, "--output", out, "--calibrate", str(tmp_path / "file")), "goes with --weight-bits 4"),
        (("--model", model, "--output", out, *four, "--calibrate", str(tmp_path / "gone")), "cannot be read"),
        (("--model", model, "--output", out, *four, "--calibrate", str(tmp_path / "bytes")), "not UTF-8"),
        (("--model", model, "--output", out, *four, "--calibrate", str(tmp_path / "file")), "no tokenizer"),
    ]
    for arguments, words in cases:
        assert words in fails(capsys, 2, "convert", *arguments), arguments
        assert not Path(out).exists()
    (tmp_path / "short").write_text("Too short.")
    line = fails(
        capsys, 2, "convert", "--model", "demo", "--output", out, *four, "--calibrate", str(tmp_path / "short")
    )
    assert "give a few kilobytes" in line


def test_a_weight_that_is_not_finite_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_checkpoint(tmp_path / "m", "qwen2", "plain")
    tensors = load_file(model / "model.safetensors")
    name = linears(model)[2]
    tensors[name][3, 5] = torch.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=name):
        opened(model, 4)
    capsys.readouterr()
    line = fails(capsys, 2, "convert", "--model", str(model), "--output", str(tmp_path / "o"), "--weight-bits", "4")
    assert name in line


def test_a_full_disk_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_checkpoint(tmp_path / "m", "opt", "plain")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 1000))
    with pytest.raises(DoesNotFitError, match=r"XDG_CACHE_HOME") as caught:
        opened(model, 4)
    assert caught.value.tier == "disk"
    capsys.readouterr()
    line = fails(capsys, 4, "convert", "--model", str(model), "--output", str(tmp_path / "o"), "--weight-bits", "4")
    assert "--output on a larger disk" in line


def test_damaged_folders_are_refused_by_name(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "m", "llama", "plain")
    out = tmp_path / "out"
    assert convert(model, out, "--weight-bits", "4") == 0
    file = next(path for path in sorted(out.glob("*.safetensors")) if "00002" in path.name)
    tensors = load_file(file)
    name = next(name for name in tensors if "q_proj" in name)
    for changed, words in (
        ({name: tensors[name][:-64]}, "convert the model again"),
        ({name: tensors[name].to(torch.float16)}, "convert the model again"),
        ({name.replace("-64-", "-48-"): tensors[name]}, "unexpected"),
        ({name.replace("minimum", "zero"): tensors[name]}, "convert the model again"),
        ({"model.norm.weight.packed-64-minimum-F16": tensors[name]}, "only linear weights"),
        ({}, "missing"),
    ):
        kept = {key: tensor for key, tensor in tensors.items() if key != name}
        save_file({**kept, **changed}, file, metadata={"format": "pt"})
        index = json.loads((out / "model.safetensors.index.json").read_text())
        index["weight_map"] = {
            key: place for key, place in index["weight_map"].items() if place != file.name or key in kept
        } | dict.fromkeys(changed, file.name)
        (out / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ModelError) as caught:
            opened(out)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
