"""Rows of many adapters and of the base model in one run, against PEFT running each row alone, in fp32."""

from __future__ import annotations

import functools
import gc
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flexbatch import LLM, SamplingParams
from flexbatch.checkpoint.locate import locate
from flexbatch.errors import UsageError
from flexbatch.kernels.linear import linear
from flexbatch.lora.reader import AdapterReader
from flexbatch.models.registry import family_of
from flexbatch.options import EngineOptions
from flexbatch.policy.workload import Workload
from flexbatch.requests import TokenizedRequest
from flexbatch.runtime import engine as engine_module
from flexbatch.runtime.engine import Engine
from flexbatch.scheduler.scheduler import Scheduler
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
"""Exact ones; those with weights or KV in 4 bits are in ``test_lora_four_bits``."""

TITLES = [title for title in SETTINGS if title not in ("plain", "sim")]
SWAPPED_ON_CPU: dict[str, Any] = {"max_sequences": 6}
SWAPPED_ON_SIM: dict[str, Any] = {"device": "sim", "kv": "50,50,0", "weights": "0,0,100", "max_sequences": 6}


def run(path: Path, adapters: dict[str, Path], requests: list[TokenizedRequest], **options: Any) -> tuple[Any, ...]:
    for name in ("weights", "kv", "hidden"):
        if name in options:
            options[name] = parse_shares(options[name], name)
    options.setdefault("device", "cpu")
    workload = Workload.of(requests)
    with Engine(locate(str(path)), None, EngineOptions(**options), workload, adapters=adapters) as engine:
        return list(engine.run(requests)), engine.stats()["adapters"]


@dataclass(frozen=True)
class Case:
    """A model, its adapters, and 40 ragged rows of twelve of them and of none, as PEFT computes each alone."""

    path: Path
    adapters: dict[str, Path]
    rows: list[Row]
    names: list[str | None]


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Case]]:
    """Cases by family, each made once."""
    folder = tmp_path_factory.mktemp("lora")

    @functools.cache
    def make(family: str) -> Case:
        seed = 11
        rng = random.Random(seed)
        path = tiny_checkpoint(folder / family, family, seed=seed)
        adapters = make_adapters(path, folder / f"{family}-adapters", configs(family, rng), seed)
        choices: list[str | None] = [*adapters, *[None] * 4]
        names = [choices[place % len(choices)] for place in range(40)]
        rng.shuffle(names)
        prompts = ragged_rows(rng, locate(str(path)).shape.vocab_size, len(names), longest=30, new=6)
        return Case(path, adapters, generate_with(path, adapters, prompts, names), names)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield make


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_equal_peft(family: str, case_of: Callable[[str], Case]) -> None:
    case = case_of(family)
    path, adapters, rows, names = case.path, case.adapters, case.rows, case.names
    number = FAMILIES.index(family)
    for title in ("plain", "sim", TITLES[number % len(TITLES)], TITLES[(number + 1) % len(TITLES)]):
        options = SETTINGS[title]
        print(title)
        results, stats = run(path, adapters, requests_with(rows, names), **options)
        assert_equal(results, rows)
        assert stats["evictions"] == (0 if options.get("device") != "sim" else stats["evictions"])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_adapters_that_are_swapped_all_the_time(
    family: str, case_of: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An arena for hardly more than the largest adapter: rows of others wait, or push it out."""
    case = case_of(family)
    shape = locate(str(case.path)).shape
    reader = AdapterReader(family_of(shape).table(shape), family)
    largest = max(reader.open(name, folder).elements for name, folder in case.adapters.items())
    room = 5 * largest
    for options in (SWAPPED_ON_CPU, SWAPPED_ON_SIM):
        reads = []
        for ahead in (1, 64):  # in the rows' order, and grouped by adapter
            monkeypatch.setattr("flexbatch.scheduler.scheduler._LOOKAHEAD", ahead)
            requests = requests_with(case.rows, case.names)
            results, stats = run(case.path, case.adapters, requests, **options, adapter_memory=room)
            assert_equal(results, case.rows)
            assert stats["evictions"] > 0
            assert stats["arena_peak_bytes"] <= stats["arena_bytes"] <= room
            reads.append(stats["reads"])
        assert reads[0] > len(case.adapters)
        assert reads[1] < reads[0]


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_a_pool_so_small_that_kv_and_adapters_push_each_other_out(
    device: str, case_of: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of("qwen2")
    path, adapters, rows, names = case.path, case.adapters, case.rows, case.names
    monkeypatch.setattr("flexbatch.policy.memory.PAGE_TOKENS", 4)
    kept = [place for place, name in enumerate(names) if name not in ("large", "stable")]
    few, own = [rows[place] for place in kept], [names[place] for place in kept]
    pages = {"gpu": 26} if device == "sim" else {"cpu": 26}
    monkeypatch.setattr("flexbatch.policy.candidates.pages_of", lambda *_: pages)
    monkeypatch.setattr("flexbatch.runtime.adapters._POOL_SHARE", 0.0)
    monkeypatch.setattr(engine_module, "Scheduler", functools.partial(Scheduler, expected_fraction=0.0))
    results, stats = run(path, adapters, requests_with(few, own), device=device)
    assert_equal(results, few)
    if device == "sim":
        assert stats["uploads"] > len(adapters)


@pytest.mark.parametrize("options", [{}, {"device": "sim"}, {"micro_batch": 7}], ids=str)
def test_rows_of_the_base_model_are_the_same_to_the_bit(
    options: dict[str, Any], case_of: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[list[tuple[int, ...]]] = []
    product = linear

    def noted(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        shapes[-1].append(tuple(x.shape))
        return product(x, *rest)

    monkeypatch.setattr("flexbatch.memory.weights.linear", noted)
    case = case_of("llama")
    path, adapters, rows, names = case.path, case.adapters, case.rows, case.names
    same = {"ignore_eos": True, "logprobs": 3}
    shapes.append([])
    mixed, _ = run(path, adapters, requests_with(rows, names, **same), **options)
    shapes.append([])
    alone, _ = run(path, {}, requests_with(rows, [None] * len(rows), **same), **options)
    assert shapes[0] == shapes[1]
    by_id = {result.id: result for result in alone}
    for result in mixed:
        if names[int(result.id)] is None:
            assert result == by_id[result.id]
        else:
            assert result.logprobs != by_id[result.id].logprobs


@pytest.mark.parametrize("device", ["cpu", "sim"])
@pytest.mark.parametrize("variant", ["plain", "350m"])
def test_adapters_outside_of_the_layers(
    variant: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the head, and on the projections that stand around OPT-350m's layers."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tiny_checkpoint(tmp_path / "model", "opt", variant)
    edges = ["lm_head"] if variant == "plain" else ["lm_head", "project_in", "project_out"]
    configs = {
        "edges": {"r": 9, "target_modules": edges},
        "more": {"r": 40, "target_modules": [*edges, "q_proj", "fc2"]},
        "inside": {"r": 4, "target_modules": ["k_proj"]},
    }
    adapters = make_adapters(path, tmp_path / "adapters", configs, 3)
    rng = random.Random(3)
    names: list[str | None] = [rng.choice([*adapters, None]) for _ in range(20)]
    rows = generate_with(path, adapters, ragged_rows(rng, 131, 20, longest=20, new=8), names)
    results, _ = run(path, adapters, requests_with(rows, names, logprobs=1, ignore_eos=False), device=device)
    assert_equal(results, rows)
    for result in results:
        assert result.logprobs is not None
        assert list(result.logprobs.token_logprobs) == pytest.approx(rows[int(result.id)].logprobs, abs=1e-3)


def damage(folder: Path) -> None:
    """Turn one number of an adapter into NaN: its header stays as it was."""
    file = folder / "adapter_model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-2:] = b"\xff\x7f"
    raw[-4:-2] = b"\xff\xff"
    file.write_bytes(raw)


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_an_adapter_that_cannot_be_read_fails_its_rows_only(
    device: str, case_of: Callable[[str], Case], tmp_path: Path
) -> None:
    case = case_of("llama")
    path, rows, names = case.path, case.rows, case.names
    adapters = dict(case.adapters)
    for name in ("all", "stable"):
        adapters[name] = shutil.copytree(case.adapters[name], tmp_path / name)
    damage(adapters["all"])
    (adapters["stable"] / "adapter_config.json").write_text("{")
    results, stats = run(path, adapters, requests_with(rows, names), device=device)
    bad = {place for place, name in enumerate(names) if name in ("all", "stable")}
    failed = {int(result.id): result for result in results if result.error is not None}
    assert set(failed) == bad
    for place, result in failed.items():
        assert result.error is not None
        assert result.error.type == "adapter_error"
        assert str(adapters[names[place] or ""]) in result.error.message
        assert result.lora == names[place]
    assert len(results) == len(rows)
    for result in results:
        if result.error is None:
            assert_equal([replace(result, id="0")], [rows[int(result.id)]])
    assert stats["rows"]["all"]["failed"] == stats["rows"]["all"]["requests"] > 0
    assert stats["rows"]["usual"]["failed"] == 0


def test_an_adapter_larger_than_its_memory_fails_its_rows(case_of: Callable[[str], Case]) -> None:
    case = case_of("llama")
    results, _ = run(case.path, case.adapters, requests_with(case.rows, case.names), adapter_memory=700_000)
    errors = {result.error.message for result in results if result.error is not None}
    assert errors
    assert all("adapter large takes" in error and "raise --adapter-memory" in error for error in errors)
    assert {result.lora for result in results if result.error is not None} == {"large"}


@pytest.mark.parametrize("kv", ["100,0,0", "0,100,0"])
def test_runs_leave_no_memory_to_the_collector(kv: str, case_of: Callable[[str], Case]) -> None:
    """What a run had is free when the next one asks for as much: its pages, its arena, its KV."""
    case = case_of("llama")
    requests = requests_with(case.rows, case.names)
    options = EngineOptions(device="sim", kv=parse_shares(kv, "kv"))
    peaks, arenas = [], []
    gc.collect()
    gc.disable()
    try:
        with Engine(locate(str(case.path)), None, options, Workload.of(requests), adapters=case.adapters) as engine:
            for count in (len(requests), 1, len(requests), len(requests)):
                assert all(result.error is None for result in engine.run(requests[:count]))
                peaks.append(engine._device.gpu_peak)
                arenas.append(engine._adapters._store)
    finally:
        gc.enable()
    assert peaks == peaks[:1] * 4
    assert arenas == [None] * 4


def test_the_python_api(case_of: Callable[[str], Case]) -> None:
    case = case_of("llama")
    rows, names = case.rows, case.names
    params = [SamplingParams(max_tokens=row.new) for row in rows]
    prompts = [list(row.prompt) for row in rows]
    some = {name: case.adapters[name] for name in ("one", "mlp")}
    with LLM(case.path, device="cpu", lora=some) as llm, pytest.raises(UsageError, match="'layers': no adapter"):
        llm.generate(prompts, params, lora="layers")
    with LLM(case.path, device="cpu", lora_dir=case.adapters["one"].parent) as llm:
        for _ in range(2):
            results = llm.generate(prompts, params, lora=names)
            assert [result.lora for result in results] == names
            assert_equal(results, rows)
        stats = llm.stats()["adapters"]
        assert stats["reads"] == len(set(names) - {None}), "the arena outlives a call"
        assert stats["rows"]["usual"]["requests"] == 2 * names.count("usual")
        first = llm.generate(prompts[0], params[0], lora="one")
        assert first[0].token_ids == llm.generate([prompts[0]], [params[0]], lora=["one"])[0].token_ids
