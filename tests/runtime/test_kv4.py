"""``kv_bits=4`` through the whole engine, against transformers whose keys and values go through 4 bits."""

from __future__ import annotations

import functools
import random
import secrets
from pathlib import Path
from typing import Any

import pytest
import torch

from flexbatch.checkpoint.locate import locate
from flexbatch.kernels.kv4_basis import Basis
from flexbatch.options import EngineOptions
from flexbatch.policy.workload import Workload
from flexbatch.requests import Result, TokenizedRequest
from flexbatch.runtime import engine as engine_module
from flexbatch.runtime.engine import Engine
from flexbatch.scheduler.scheduler import Scheduler
from flexbatch.units import parse_shares
from tests.oracle import Row, assert_equal, generate_alone, ragged_rows, requests_of
from tests.packed_oracle import generate_packed
from tests.tiny import FAMILIES, tiny_checkpoint

SETTINGS: dict[str, dict[str, Any]] = {
    "cpu": {},
    "cpu, one token a micro-batch": {"micro_batch": 1, "max_sequences": 3},
    "cpu, odd sizes": {"micro_batch": 13, "max_sequences": 7},
    "cpu, block": {"schedule": "block", "micro_batch": 5, "max_sequences": 11},
    "everything on disk": {"weights": "0,0,100", "kv": "0,0,100", "hidden": "0,0,100", "micro_batch": 33},
    "sim in three": {
        "device": "sim",
        "weights": "30,30,40",
        "kv": "34,33,33",
        "hidden": "34,33,33",
        "micro_batch": 40,
        "cpu_attention": True,
    },
    "sim in three, attention on the GPU": {
        "device": "sim",
        "weights": "30,30,40",
        "kv": "34,33,33",
        "micro_batch": 40,
        "cpu_attention": False,
    },
    "sim, block": {"device": "sim", "kv": "0,50,50", "schedule": "block", "micro_batch": 5},
    "sim, all on the GPU": {"device": "sim", "weights": "100,0,0", "kv": "100,0,0"},
}


def run(path: Path, requests: list[TokenizedRequest], **options: Any) -> list[Result]:
    for name in ("weights", "kv", "hidden"):
        if name in options:
            options[name] = parse_shares(options[name], name)
    options = {"device": "cpu", "kv_bits": 4, **options}
    with Engine(locate(str(path)), None, EngineOptions(**options), Workload.of(requests)) as engine:
        assert engine.plan.kv_bits == options["kv_bits"]
        return list(engine.run(requests))


def bases_of(path: Path) -> list[Basis]:
    """What an engine finds for the model."""
    request = requests_of([Row((1, 2), 1, (), (), ())])
    with Engine(locate(str(path)), None, EngineOptions(device="cpu", kv_bits=4), Workload.of(request)) as engine:
        list(engine.run(request))
        assert engine._packing is not None
        return engine._packing.bases(torch.device("cpu"))


def oracle(path: Path, family: str, seed: int, count: int = 8, longest: int = 70) -> list[Row]:
    rng = random.Random(seed)
    tiny_checkpoint(path, family, "random", seed=seed, shards=1 + seed % 3, rng=rng)
    vocab = locate(str(path)).shape.vocab_size
    return generate_packed(path, ragged_rows(rng, vocab, count, longest=longest, new=10), bases_of(path))


@pytest.mark.parametrize("family", FAMILIES)
def test_any_placement_and_schedule_equals_transformers_over_packed_values(family: str, tmp_path: Path) -> None:
    seed = secrets.randbelow(10**6)
    print(f"seed {seed}")
    rows = oracle(tmp_path, family, seed)
    for name, options in SETTINGS.items():
        print(name)
        assert_equal(run(tmp_path, requests_of(rows), overlap=seed % 2 == 0, **options), rows)
