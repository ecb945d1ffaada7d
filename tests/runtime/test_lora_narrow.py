"""Adapters whose files are in 16 bits: read in two halves, they give what the same numbers in fp32 files give."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexbatch.checkpoint.locate import locate
from flexbatch.lora.load import FactorReader
from flexbatch.options import EngineOptions
from flexbatch.policy.workload import Workload
from flexbatch.runtime.engine import Engine
from tests.lora.peft_cases import make_adapters, requests_with
from tests.oracle import Row, ragged_rows
from tests.runtime.test_lora import run
from tests.tiny import tiny_checkpoint

FILE = "adapter_model.safetensors"


def stored(adapters: dict[str, Path], folder: Path, narrow: torch.dtype, dtype: torch.dtype) -> dict[str, Path]:
    """Copies of adapters whose numbers are rounded to ``narrow`` and stored in ``dtype``."""
    made = {}
    for name, path in adapters.items():
        made[name] = shutil.copytree(path, folder / name)
        tensors = {key: tensor.to(narrow).to(dtype) for key, tensor in load_file(path / FILE).items()}
        save_file(tensors, made[name] / FILE)
    return made


def ragged(path: Path, count: int, new: int) -> list[Row]:
    """Prompts of random tokens, of which nobody has said what follows."""
    prompts = ragged_rows(random.Random(3), locate(str(path)).shape.vocab_size, count, longest=20, new=new)
    return [Row(prompt, new, (), (), ()) for prompt, new in prompts]


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("room", [None, 140_000])
def test_rows_equal_those_of_wide_files(
    narrow: torch.dtype, room: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for all, and with so little that adapters push each other out."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tiny_checkpoint(tmp_path / "model", "llama")
    settings: dict[str, dict[str, Any]] = {
        f"a{rank}": {"r": rank, "target_modules": "all-linear"} for rank in (4, 9, 16)
    }
    settings |= {f"b{rank}": {"r": rank, "target_modules": ["q_proj", "down_proj"]} for rank in (8, 24)}
    whole = make_adapters(path, tmp_path / "whole", settings, 5)
    safe = {name: folder for name, folder in whole.items() if (folder / FILE).exists()}
    halves = stored(safe, tmp_path / "halves", narrow, narrow)
    wide = stored(safe, tmp_path / "wide", narrow, torch.float32)
    rng, rows = random.Random(4), ragged(path, 24, 6)
    names: list[str | None] = [rng.choice([*safe, None]) for _ in rows]
    spread: list[int] = []
    second_half = FactorReader.spread

    def counted(*args: Any) -> None:
        spread.append(1)
        second_half(*args)

    monkeypatch.setattr(FactorReader, "spread", counted)
    options: dict[str, Any] = {} if room is None else {"adapter_memory": room, "max_sequences": 4}
    found, stats = run(path, halves, requests_with(rows, names), **options)
    assert len(spread) == stats["reads"] > 0
    if room is not None:
        assert stats["evictions"] > 0
    if room is not None:
        options["adapter_memory"] = 2 * room  # in files of fp32 they take twice as much
    expected, _ = run(path, wide, requests_with(rows, names), **options)
    tokens = [{result.id: result.token_ids for result in results} for results in (found, expected)]
    assert tokens[0] == tokens[1]
    assert all(result.error is None for result in found)


def test_a_bad_number_in_a_narrow_file_fails_its_rows_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tiny_checkpoint(tmp_path / "model", "llama")
    settings: dict[str, dict[str, Any]] = {
        name: {"r": 16, "target_modules": "all-linear"} for name in ("x", "good", "bad")
    }
    whole = make_adapters(path, tmp_path / "whole", settings, 5)
    del whole["x"]  # stored in another format
    adapters = stored(whole, tmp_path / "halves", torch.float16, torch.float16)
    tensors = load_file(adapters["bad"] / FILE)
    tensors[sorted(tensors)[-1]].view(-1)[-1] = torch.inf
    save_file(tensors, adapters["bad"] / FILE)
    rows = ragged(path, 9, 4)
    names: list[str | None] = ["good", "bad", None] * 3
    results, _ = run(path, adapters, requests_with(rows, names))
    errors = {int(result.id): result.error for result in results}
    assert len(errors) == len(rows)
    for place, name in enumerate(names):
        error = errors[place]
        assert (error is not None) == (name == "bad")
        if error is not None:
            assert error.type == "adapter_error"
            assert "not finite" in error.message


def test_what_is_read_again_to_the_same_place_is_laid_out_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows, adapters and places of a run's first sweep are those of the last run's last one, but the bytes are new."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tiny_checkpoint(tmp_path / "model", "llama")
    whole = make_adapters(path, tmp_path / "whole", {"x": {}, "own": {"r": 16, "target_modules": "all-linear"}}, 5)
    adapters = stored({"own": whole["own"]}, tmp_path / "halves", torch.float16, torch.float16)
    requests = requests_with(ragged(path, 12, 1), ["own"] * 12)
    with Engine(
        locate(str(path)), None, EngineOptions(device="cpu"), Workload.of(requests), adapters=adapters
    ) as engine:
        first = [(result.id, result.token_ids) for result in engine.run(requests)]
        assert engine.stats()["sweeps"] == 1
        kept = engine._adapters._kept
        assert kept is not None
        cache = kept[0]
        start = cache.start("own")
        cache.drop("own")
        again = [(result.id, result.token_ids) for result in engine.run(requests)]
        assert cache.start("own") == start
        assert cache.counts.reads == 2
    assert again == first
