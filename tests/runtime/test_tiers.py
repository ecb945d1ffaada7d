"""Every family with weights, KV and hidden states on every tier, against transformers, row by row."""

from __future__ import annotations

import random
import secrets
from pathlib import Path
from typing import Any

import pytest

from flexbatch.checkpoint.locate import locate
from flexbatch.options import EngineOptions
from flexbatch.policy.workload import Workload
from flexbatch.requests import Result, TokenizedRequest
from flexbatch.runtime import units
from flexbatch.runtime.engine import Engine
from flexbatch.units import parse_shares
from tests.oracle import Row, assert_equal, generate_alone, ragged_rows, requests_of
from tests.placements import IN_THREE
from tests.tiny import FAMILIES, tiny_checkpoint

SETTINGS: dict[str, dict[str, Any]] = {
    "weights on disk": {"weights": "0,0,100"},
    "weights and KV over RAM and disk": {"weights": "0,40,60", "kv": "0,50,50", "micro_batch": 40},
    "everything on disk": {"weights": "0,0,100", "kv": "0,0,100", "hidden": "0,0,100", "micro_batch": 33},
    "disk, block": {"weights": "0,40,60", "kv": "0,50,50", "schedule": "block", "micro_batch": 4},
    **IN_THREE,
    "sim, block": {
        "device": "sim",
        "weights": "0,50,50",
        "kv": "0,100,0",
        "hidden": "0,100,0",
        "schedule": "block",
        "micro_batch": 5,
    },
    "sim, all on the GPU": {"device": "sim", "weights": "100,0,0", "kv": "100,0,0"},
}


def run(path: Path, requests: list[TokenizedRequest], **options: Any) -> list[Result]:
    for name in ("weights", "kv", "hidden"):
        if name in options:
            options[name] = parse_shares(options[name], name)
    options.setdefault("device", "cpu")
    with Engine(locate(str(path)), None, EngineOptions(**options), Workload.of(requests)) as engine:
        return list(engine.run(requests))


def random_rows(path: Path, family: str, seed: int) -> list[Row]:
    rng = random.Random(seed)
    tiny_checkpoint(path, family, "random", seed=seed, shards=1 + seed % 3, rng=rng)
    return generate_alone(path, ragged_rows(rng, locate(str(path)).shape.vocab_size, 10, longest=50, new=10))


@pytest.mark.parametrize("family", FAMILIES)
def test_any_placement_equals_transformers(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "_LEAST_PIECE", 1)  # matrices of tiny models are in pieces, too
    monkeypatch.setattr(units, "_ROWS", 4)
    seed = secrets.randbelow(10**6)
    print(f"seed {seed}")
    rows = random_rows(tmp_path, family, seed)
    for name, options in SETTINGS.items():
        print(name)
        assert_equal(run(tmp_path, requests_of(rows), overlap=seed % 2 == 0, **options), rows)
