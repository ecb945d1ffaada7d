"""Rows of many adapters over a base in 4 bits, and over KV in 4 bits, against PEFT running each row alone."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from flexbatch.checkpoint.locate import locate
from flexbatch.kernels.linear import linear
from flexbatch.kernels.rotary import RotaryTable
from flexbatch.options import EngineOptions
from flexbatch.policy.workload import Workload
from flexbatch.requests import Result, TokenizedRequest
from flexbatch.runtime.engine import Engine
from flexbatch.units import parse_shares
from tests.lora.peft_cases import configs, generate_with, make_adapters, requests_with
from tests.oracle import Row, assert_equal, ragged_rows, requests_of
from tests.packed_oracle import assert_nearly_equal, packed_attention
from tests.quantized_oracle import quantized_oracle
from tests.runtime.test_kv4 import bases_of
from tests.tiny import FAMILIES, tiny_checkpoint

SETTINGS: dict[str, dict[str, Any]] = {
    "in RAM": {},
    "small micro-batches": {"micro_batch": 13, "max_sequences": 9},
    "on disk": {"weights": "0,30,70", "kv": "0,50,50", "micro_batch": 40},
    "sim": {"device": "sim"},
    "sim, KV and weights below": {"device": "sim", "weights": "30,30,40", "kv": "0,100,0", "micro_batch": 40},
}
TITLES = tuple(SETTINGS)


@dataclass(frozen=True)
class Case:
    """A model, its adapters, and ragged prompts of twelve of them and of none."""

    path: Path
    adapters: dict[str, Path]
    prompts: list[tuple[tuple[int, ...], int]]
    names: list[str | None]


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Case]]:
    """Cases by family, each made once."""
    folder = tmp_path_factory.mktemp("lora-four-bits")

    @functools.cache
    def make(family: str) -> Case:
        rng = random.Random(12)
        path = tiny_checkpoint(folder / family, family, seed=12)
        adapters = make_adapters(path, folder / f"{family}-adapters", configs(family, rng), 12)
        choices: list[str | None] = [*adapters, *[None] * 4]
        names = [choices[place % len(choices)] for place in range(40)]
        rng.shuffle(names)
        return Case(path, adapters, ragged_rows(rng, locate(str(path)).shape.vocab_size, 40, longest=30, new=4), names)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield make


def run(path: Path, adapters: dict[str, Path], requests: list[TokenizedRequest], **options: Any) -> list[Result]:
    for name in ("weights", "kv", "hidden"):
        if name in options:
            options[name] = parse_shares(options[name], name)
    options = {"device": "cpu", **options}
    workload = Workload.of(requests)
    with Engine(locate(str(path)), None, EngineOptions(**options), workload, adapters=adapters) as engine:
        assert engine.plan.weight_bits == options.get("weight_bits", 16)
        assert engine.plan.kv_bits == options.get("kv_bits", 16)
        return list(engine.run(requests))


def titles_for(family: str) -> tuple[str, ...]:
    """In RAM, and one more setting, another one for the next family."""
    return TITLES[0], TITLES[1 + FAMILIES.index(family) % (len(TITLES) - 1)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_in_four_bits_equals_peft_on_the_dequantized_weights(
    family: str, case_of: Callable[[str], Case]
) -> None:
    case = case_of(family)
    rows = generate_with(quantized_oracle(case.path), case.adapters, case.prompts, case.names)
    for title in titles_for(family):
        print(title)
        requests = requests_with(rows, case.names)
        assert_equal(run(case.path, case.adapters, requests, weight_bits=4, **SETTINGS[title]), rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_kv_in_four_bits_nearly_equals_peft_over_packed_values(family: str, case_of: Callable[[str], Case]) -> None:
    case = case_of(family)
    shape = locate(str(case.path)).shape
    turns = None if shape.rope is None else RotaryTable(shape.rope).turns(shape.max_positions)
    prompts, names = case.prompts[:18], case.names[:18]
    with packed_attention(bases_of(case.path), turns):
        rows = generate_with(case.path, case.adapters, prompts, names)
    for title in titles_for(family):
        print(title)
        requests = requests_with(rows, names)
        assert_nearly_equal(run(case.path, case.adapters, requests, kv_bits=4, **SETTINGS[title]), rows)


@pytest.mark.parametrize("device", ["cpu", "sim"])
@pytest.mark.parametrize("bits", [{"weight_bits": 4}, {"kv_bits": 4}, {"weight_bits": 4, "kv_bits": 4}], ids=str)
def test_rows_of_the_base_model_are_the_same_to_the_bit(
    bits: dict[str, int], device: str, case_of: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[list[tuple[int, ...]]] = []

    def noted(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        shapes[-1].append(tuple(x.shape))
        return linear(x, *rest)

    monkeypatch.setattr("flexbatch.memory.weights.linear", noted)
    case = case_of("qwen3")
    rows = [Row(prompt, new, (), (), ()) for prompt, new in case.prompts]
    same = {"ignore_eos": True, "logprobs": 3}
    shapes.append([])
    mixed = run(case.path, case.adapters, requests_with(rows, case.names, **same), device=device, **bits)
    shapes.append([])
    alone = run(case.path, {}, requests_of(rows, **same), device=device, **bits)
    assert shapes[0] == shapes[1], "products of other shapes may differ in the last bit"
    by_id = {result.id: result for result in alone}
    for result in mixed:
        if case.names[int(result.id)] is None:
            assert result == by_id[result.id]
        else:
            assert result.logprobs != by_id[result.id].logprobs
