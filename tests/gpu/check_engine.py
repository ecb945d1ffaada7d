"""Tiny models of every family through the engine on a GPU, in fp32, against transformers. See ``scripts/gpu_test``."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from flexbatch.checkpoint.locate import locate
from flexbatch.options import EngineOptions
from flexbatch.policy.workload import Workload
from flexbatch.runtime.engine import Engine
from flexbatch.units import GIB, Shares
from tests.oracle import assert_equal, generate_alone, ragged_rows, requests_of
from tests.runtime.test_four_bits import oracle_rows
from tests.tiny import ALL_VARIANTS, FAMILIES, tiny_checkpoint

SETTINGS: dict[str, dict[str, Any]] = {
    "all on the GPU": {},
    "shared out": {
        "weights": Shares(0.3, 0.4, 0.3),
        "kv": Shares(0.4, 0.4, 0.2),
        "hidden": Shares(0.5, 0.5, 0.0),
        "micro_batch": 13,
    },
    "attended on the CPU": {"kv": Shares(0.0, 1.0, 0.0), "cpu_attention": True, "micro_batch": 13},
    "one after the other": {"weights": Shares(0.0, 0.5, 0.5), "overlap": False, "schedule": "block"},
}


@pytest.mark.parametrize(("family", "variant"), ALL_VARIANTS)
def test_greedy_rows_equal_transformers(family: str, variant: str, tmp_path: Path) -> None:
    rng = random.Random(1)
    model = tmp_path / "model"
    tiny_checkpoint(model, family, variant, seed=1, rng=rng)
    folder = locate(str(model))
    rows = generate_alone(model, ragged_rows(rng, folder.shape.vocab_size, 24))
    requests = requests_of(rows)
    for name, settings in SETTINGS.items():
        print(name)
        options = EngineOptions(
            device="cuda", dtype="float32", gpu_memory=GIB, cpu_memory=4 * GIB, disk_dir=tmp_path, **settings
        )
        with Engine(folder, None, options, Workload.of(requests)) as engine:
            assert_equal(list(engine.run(requests)), rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_in_four_bits(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = tmp_path / "model"
    rows = oracle_rows(model, family, seed=5)
    for name, settings in SETTINGS.items():
        print(name)
        options = EngineOptions(
            device="cuda",
            dtype="float32",
            weight_bits=4,
            gpu_memory=GIB,
            cpu_memory=4 * GIB,
            disk_dir=tmp_path,
            **settings,
        )
        requests = requests_of(rows)
        with Engine(locate(str(model)), None, options, Workload.of(requests)) as engine:
            assert_equal(list(engine.run(requests)), rows)
