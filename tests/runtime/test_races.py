"""Overlapped equals serial, bit for bit, whatever the timing: random delays in every resource, 200 times."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from flexbatch.checkpoint.locate import locate
from flexbatch.options import EngineOptions
from flexbatch.policy.workload import Workload
from flexbatch.requests import Request, Result, TokenizedRequest
from flexbatch.runtime.engine import Engine
from flexbatch.sampling import SamplingParams
from flexbatch.scheduler.steps import Step
from flexbatch.units import parse_shares
from tests.tiny import tiny_checkpoint

THREE = {name: parse_shares("30,30,40", name) for name in ("weights", "kv", "hidden")}
TWO = {name: parse_shares("0,40,60", name) for name in ("weights", "kv", "hidden")}
SETTINGS: dict[str, dict[str, Any]] = {
    "sim, attention on the CPU": {"device": "sim", **THREE},
    "sim, attention on the GPU": {"device": "sim", "cpu_attention": False, **THREE},
    "cpu and disk": {"device": "cpu", **TWO},
    "cpu and disk, block": {"device": "cpu", "schedule": "block", **TWO},
}
RUNS = 50  # of each setting: 200 in all


def requests_for(rng: random.Random) -> list[TokenizedRequest]:
    made = []
    for index in range(6):
        prompt = tuple(rng.randrange(97) for _ in range(rng.randint(1, 20)))
        params = SamplingParams(max_tokens=rng.randint(1, 4), logprobs=1, temperature=rng.choice([0.0, 0.9]))
        made.append(TokenizedRequest(Request(str(index), params, prompt=prompt), index, prompt))
    return made


def exact(results: list[Result]) -> list[Any]:
    return sorted((result.id, result.token_ids, result.logprobs) for result in results)


@pytest.mark.parametrize("name", SETTINGS)
def test_overlapped_equals_serial_under_random_delays(name: str, tmp_path: Path) -> None:
    rng = random.Random(name)
    tiny_checkpoint(tmp_path, rng.choice(["llama", "qwen3", "opt"]), seed=1)
    requests = requests_for(rng)
    folder = locate(str(tmp_path))
    options: dict[str, Any] = {"micro_batch": 2 if "block" in name else 9, "max_sequences": 4, **SETTINGS[name]}
    with Engine(folder, None, EngineOptions(overlap=False, **options), Workload.of(requests)) as engine:
        expected = exact(list(engine.run(requests)))

    def delay(_: Step) -> float:
        return rng.random() * 0.002 if rng.random() < 0.1 else 0.0

    with Engine(folder, None, EngineOptions(**options), Workload.of(requests), delays=delay) as engine:
        for _ in range(RUNS):
            assert exact(list(engine.run(requests))) == expected
