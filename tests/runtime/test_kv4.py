"""``kv_bits=4`` through the whole engine, against transformers whose keys and values go through 4 bits."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from flexbatch.checkpoint.locate import locate
from flexbatch.errors import UsageError
from flexbatch.kernels.kv4_basis import Basis
from flexbatch.options import EngineOptions
from flexbatch.policy.workload import Workload
from flexbatch.requests import Result, TokenizedRequest
from flexbatch.runtime import engine as engine_module
from flexbatch.runtime import units
from flexbatch.runtime.engine import Engine
from flexbatch.scheduler.scheduler import Scheduler
from flexbatch.units import parse_shares
from tests.oracle import Row, ragged_rows, requests_of
from tests.packed_oracle import assert_nearly_equal, generate_packed
from tests.placements import IN_THREE
from tests.tiny import FAMILIES, tiny_checkpoint, tiny_model

SETTINGS: dict[str, dict[str, Any]] = {
    "cpu": {},
    "cpu, one token a micro-batch": {"micro_batch": 1, "max_sequences": 3},
    "cpu, odd sizes": {"micro_batch": 13, "max_sequences": 7},
    "cpu, block": {"schedule": "block", "micro_batch": 5, "max_sequences": 11},
    "everything on disk": {"weights": "0,0,100", "kv": "0,0,100", "hidden": "0,0,100", "micro_batch": 33},
    **IN_THREE,
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
def test_any_placement_and_schedule_equals_transformers_over_packed_values(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Fixed: of some models too many rows hang on a number at the border of two codes (see ``assert_nearly_equal``).
    seed = 1 + FAMILIES.index(family)
    rows = oracle(tmp_path, family, seed)
    monkeypatch.setattr(units, "_LEAST_PIECE", 1)  # matrices of tiny models are in pieces, too
    monkeypatch.setattr(units, "_ROWS", 4)
    for name, options in SETTINGS.items():
        print(name)
        assert_nearly_equal(run(tmp_path, requests_of(rows), overlap=seed % 2 == 0, **options), rows)


def rows_alone(path: Path, family: str, count: int, seed: int = 2) -> list[TokenizedRequest]:
    """A tiny model, and rows for it whose results are not known."""
    rng = random.Random(seed)
    tiny_checkpoint(path, family, "plain", seed=seed, rng=rng)
    drawn = ragged_rows(rng, locate(str(path)).shape.vocab_size, count)
    return requests_of([Row(prompt, new, (), (), ()) for prompt, new in drawn])


def tokens(results: list[Result]) -> dict[str, tuple[int, ...]]:
    return {result.id: result.token_ids for result in results}


def assert_same(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    """One row in eight may differ, as ``assert_nearly_equal`` says."""
    assert found.keys() == expected.keys()
    assert sum(found[name] != expected[name] for name in found) <= len(found) // 8


@pytest.mark.parametrize("family", ["gpt2", "mistral", "qwen3"])
def test_company_chunks_overlap_and_preemption_change_nothing(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = rows_alone(tmp_path, family, 16)
    expected = tokens(run(tmp_path, requests))
    assert_same(tokens(run(tmp_path, requests, max_sequences=1)), expected)
    assert_same(tokens(run(tmp_path, requests, micro_batch=7)), expected)
    sim = {"device": "sim", "kv": "34,33,33", "weights": "30,30,40", "micro_batch": 40}
    assert tokens(run(tmp_path, requests, overlap=True, **sim)) == tokens(run(tmp_path, requests, overlap=False, **sim))
    monkeypatch.setattr(engine_module, "Scheduler", functools.partial(Scheduler, expected_fraction=0.0))
    monkeypatch.setattr("flexbatch.policy.memory.PAGE_TOKENS", 4)
    monkeypatch.setattr("flexbatch.policy.candidates.pages_of", lambda *_: {"cpu": 30})
    options = EngineOptions(device="cpu", kv_bits=4)
    with Engine(locate(str(tmp_path)), None, options, Workload.of(requests)) as engine:
        assert_same(tokens(list(engine.run(requests))), expected)
        assert engine.snapshot().preemptions > 0


def test_auto_takes_four_bits_where_memory_is_short_and_sixteen_where_it_is_not(tmp_path: Path) -> None:
    requests = rows_alone(tmp_path, "llama", 6)
    folder = locate(str(tmp_path))
    with Engine(folder, None, EngineOptions(device="cpu", kv_bits=None), Workload.of(requests)) as engine:
        assert engine.plan.kv_bits in (4, 16)
        kept = engine.plan.kv_bits
        auto = tokens(list(engine.run(requests)))
    assert auto == tokens(run(tmp_path, requests, kv_bits=kept))


def test_heads_of_odd_width_are_refused(tmp_path: Path) -> None:
    tiny_model("opt", settings={"hidden_size": 60, "word_embed_proj_dim": 60}).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"--kv-bits 4: .*head_dim 15"):
        Engine(locate(str(tmp_path)), None, EngineOptions(device="cpu", kv_bits=4), Workload.of([]))
