"""Rows of many adapters and of the base model in one run, against PEFT running each row alone, in fp32."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from flexbatch.checkpoint.locate import locate
from flexbatch.options import EngineOptions
from flexbatch.policy.workload import Workload
from flexbatch.requests import TokenizedRequest
from flexbatch.runtime.engine import Engine
from flexbatch.units import parse_shares
from tests.lora.peft_cases import configs, generate_with, make_adapters, requests_with
from tests.oracle import Row, assert_equal, ragged_rows
from tests.tiny import FAMILIES, tiny_checkpoint

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "small micro-batches": {"micro_batch": 13, "max_sequences": 9},
    "block": {"schedule": "block", "micro_batch": 5, "max_sequences": 11},
    "on disk": {"weights": "0,30,70", "kv": "0,50,50", "micro_batch": 40},
    "sim": {"device": "sim"},
    "sim, KV and weights below": {"device": "sim", "weights": "30,30,40", "kv": "0,100,0", "micro_batch": 40},
}


def run(path: Path, adapters: dict[str, Path], requests: list[TokenizedRequest], **options: Any) -> tuple[Any, ...]:
    for name in ("weights", "kv", "hidden"):
        if name in options:
            options[name] = parse_shares(options[name], name)
    options.setdefault("device", "cpu")
    workload = Workload.of(requests)
    with Engine(locate(str(path)), None, EngineOptions(**options), workload, adapters=adapters) as engine:
        return list(engine.run(requests)), engine.stats()["adapters"]


def case(
    tmp_path: Path, family: str, count: int, seed: int, variant: str = "plain"
) -> tuple[Path, dict[str, Path], list[Row], list[str | None]]:
    rng = random.Random(seed)
    tiny_checkpoint(tmp_path / "model", family, variant, seed=seed, rng=rng)
    path = tmp_path / "model"
    adapters = make_adapters(path, tmp_path / "adapters", configs(family, rng), seed)
    names: list[str | None] = [*adapters, *[None] * 4]
    chosen = [names[place % len(names)] for place in range(count)]
    rng.shuffle(chosen)
    prompts = ragged_rows(rng, locate(str(path)).shape.vocab_size, count, longest=30, new=8)
    return path, adapters, generate_with(path, adapters, prompts, chosen), chosen


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_equal_peft(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path, adapters, rows, names = case(tmp_path, family, 40, seed=11)
    for title, options in SETTINGS.items():
        print(title)
        results, stats = run(path, adapters, requests_with(rows, names), **options)
        assert_equal(results, rows)
        assert stats["evictions"] == (0 if options.get("device") != "sim" else stats["evictions"])
