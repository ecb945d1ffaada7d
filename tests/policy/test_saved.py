"""Saved plans: read back as the options that bring them about; every mistake in a file is named, one line each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flexbatch.errors import UsageError
from flexbatch.options import EngineOptions
from flexbatch.policy.saved import load_plan, parse_plan
from flexbatch.units import Shares
from tests.plans import small_plan


def saved(**changes: Any) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(json.dumps(small_plan().to_json()))
    return {**value, **changes}


def test_a_plan_comes_back_as_options() -> None:
    weights, kv = Shares(0.125, 0.625, 0.25), Shares(0.5, 0.5, 0)
    plan = small_plan(
        model="opt-30b",
        weights=weights,
        kv=kv,
        hidden=Shares(1, 0, 0),
        cpu_attention=0.5,
        weight_bits=4,
        dtype="float16",
    )
    found = parse_plan(json.loads(json.dumps(plan.to_json())), "x")
    assert found.model == "opt-30b"
    assert found.options == EngineOptions(
        weights=weights,
        kv=kv,
        hidden=Shares(1, 0, 0),
        cpu_attention=True,
        weight_bits=4,
        kv_bits=16,
        micro_batch=16,
        max_sequences=8,
        dtype="float16",
    )


def test_a_fixed_block_counts_sequences() -> None:
    found = parse_plan(small_plan(schedule="block", micro_batch_sequences=7).to_json(), "x")
    assert (found.options.schedule, found.options.micro_batch) == ("block", 7)


@pytest.mark.parametrize(
    ("kv", "share", "expected"),
    [
        (Shares(1, 0, 0), 0.0, None),
        (Shares(0, 1, 0), 1.0, True),
        (Shares(0.5, 0.5, 0), 0.5, True),
        (Shares(0.5, 0.5, 0), 0.0, False),
        (Shares(0.5, 0.5, 0), 0.2, None),
    ],
)
def test_who_attends(kv: Shares, share: float, expected: bool | None) -> None:
    found = parse_plan(small_plan(kv=kv, cpu_attention=share).to_json(), "x")
    assert found.options.cpu_attention is expected


def test_what_the_user_says_besides_is_kept() -> None:
    plan = parse_plan(saved(dtype="bfloat16"), "x")
    applied = plan.applied(EngineOptions(device="cpu", cpu_memory=10**9, overlap=False))
    assert (applied.device, applied.cpu_memory, applied.overlap) == ("cpu", 10**9, False)
    assert (applied.dtype, applied.max_sequences) == ("bfloat16", 8)
    assert plan.applied(EngineOptions(dtype="float32")).dtype == "float32"


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (EngineOptions(weights=Shares(0, 1, 0)), "--weights"),
        (EngineOptions(cpu_attention=True), "--cpu-attention"),
        (EngineOptions(weight_bits=4), "--weight-bits"),
        (EngineOptions(micro_batch=3), "--micro-batch"),
        (EngineOptions(schedule="block"), "--schedule"),
    ],
)
def test_a_second_opinion_is_refused(options: EngineOptions, name: str) -> None:
    with pytest.raises(UsageError, match=f"^{name}: the plan given with --plan says that already"):
        parse_plan(saved(), "x").applied(options)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", 3),
        ("model", ""),
        ("weights", {"gpu": 0.5, "cpu": 0.4, "disk": 0}),
        ("weights", {"gpu": 2, "cpu": -1, "disk": 0}),
        ("kv", {"gpu": 1, "cpu": 0}),
        ("kv", {"gpu": 1, "cpu": 0, "disk": 0, "tape": 0}),
        ("hidden", {"gpu": "1", "cpu": 0, "disk": 0}),
        ("hidden", None),
        ("hidden", {"gpu": True, "cpu": 0, "disk": 0}),
        ("cpu_attention", 1.5),
        ("cpu_attention", float("nan")),
        ("weight_bits", 8),
        ("weight_bits", [16]),
        ("kv_bits", "16"),
        ("micro_batch_tokens", 0),
        ("micro_batch_tokens", True),
        ("max_sequences", 2.5),
        ("max_sequences", -1),
        ("schedule", "zigzag"),
        ("dtype", "int8"),
        ("dtype", {}),
    ],
)
def test_a_wrong_field_is_one_line_with_its_name(name: str, value: Any) -> None:
    with pytest.raises(UsageError) as caught:
        parse_plan(saved(**{name: value}), "mine.json")
    message = str(caught.value)
    assert message.startswith(f"--plan mine.json: {name}: ")
    assert "write" in message
    assert "\n" not in message


def test_all_mistakes_are_listed() -> None:
    value = saved(weights=1, max_sequences=0)
    del value["kv_bits"]
    with pytest.raises(UsageError) as caught:
        parse_plan(value, "mine.json")
    lines = str(caught.value).split("\n")
    assert [line.split(": ")[1] for line in lines] == ["weights", "kv_bits", "max_sequences"]


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"3", b"\xff", b"[" * 10**5, b" " * 2**23])
def test_a_file_that_is_no_plan(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "mine.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match="flexbatch plan --json") as caught:
        load_plan(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
