"""Every family with its layers in 4 bits, wherever they rest, against transformers with the dequantized weights."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from flexbatch.checkpoint.locate import locate
from flexbatch.options import EngineOptions
from flexbatch.policy.workload import Workload
from flexbatch.requests import Result, TokenizedRequest
from flexbatch.runtime.engine import Engine
from flexbatch.units import parse_shares
from tests.oracle import Row, assert_equal, generate_row, ragged_rows, requests_of
from tests.quantized_oracle import quantized_oracle
from tests.tiny import FAMILIES, tiny_checkpoint

SETTINGS: dict[str, dict[str, Any]] = {
    "in RAM": {},
    "on disk": {"weights": "0,0,100"},
    "in RAM and on disk": {"weights": "0,40,60", "kv": "0,50,50", "micro_batch": 7},
    "sim in three": {
        "device": "sim",
        "weights": "30,30,40",
        "kv": "34,33,33",
        "hidden": "34,33,33",
        "micro_batch": 40,
    },
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(path: Path, requests: list[TokenizedRequest], **options: Any) -> tuple[list[Result], Any]:
    for name in ("weights", "kv", "hidden"):
        if name in options:
            options[name] = parse_shares(options[name], name)
    given: dict[str, Any] = {"device": "cpu", "weight_bits": 4, **options}
    with Engine(locate(str(path)), None, EngineOptions(**given), Workload.of(requests)) as engine:
        return list(engine.run(requests)), engine.plan


def oracle_rows(path: Path, family: str, seed: int, count: int = 10) -> list[Row]:
    rng = random.Random(seed)
    tiny_checkpoint(path, family, "random", seed=seed, shards=1 + seed % 3, rng=rng)
    model = quantized_oracle(path)
    vocab = locate(str(path)).shape.vocab_size
    return [generate_row(model, prompt, new) for prompt, new in ragged_rows(rng, vocab, count, longest=50, new=10)]


@pytest.mark.parametrize("family", FAMILIES)
def test_any_placement_equals_transformers_on_the_dequantized_weights(family: str, tmp_path: Path) -> None:
    rows = oracle_rows(tmp_path / "m", family, seed=5)
    for name, options in SETTINGS.items():
        print(name)
        results, plan = run(tmp_path / "m", requests_of(rows), **options)
        assert_equal(results, rows)
        assert plan.weight_bits == 4
