"""Hardware profiles as JSON: what is written is read back, and every mistake is one line that names its field."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from flexbatch.errors import UsageError
from flexbatch.policy.profile import Curve, parse_profile

CPU: dict[str, Any] = {
    "products": {"float32": [[1, 2e9], [512, 1.5e11]]},
    "widened": {"float16": 1e9, "int4": 5e8},
    "attention_bytes": 1e10,
    "attention_flops": 2e10,
    "step_s": 1e-5,
}
WHOLE: dict[str, Any] = {
    "name": "a machine",
    "memory": {"gpu": 16_000_000_000, "cpu": "32GiB", "disk": 1e12},
    "links": {"h2d": 1.2e10, "d2h": 1.2e10, "disk_read": 2e9, "disk_write": 1e9},
    "cpu": CPU,
    "gpu": {**CPU, "products": {"float16": [[1, 1e10], [1024, 2e13]]}},
    "sources": {"links.h2d": "a data sheet"},
}
GONE = object()


def changed(path: str, value: Any) -> dict[str, Any]:
    whole: dict[str, Any] = json.loads(json.dumps(WHOLE))
    target = whole
    *parents, last = path.split("/")
    for parent in parents:
        target = target[parent]
    if value is GONE:
        del target[last]
    else:
        target[last] = value
    return whole


def test_a_profile_survives_its_json() -> None:
    profile = parse_profile(WHOLE, "x.json")
    assert profile.memory == {"gpu": 16 * 10**9, "cpu": 32 * 2**30, "disk": 10**12}
    assert profile.gpu is not None
    assert profile.gpu.products["float16"].points == ((1, 1e10), (1024, 2e13))
    assert parse_profile(json.loads(json.dumps(profile.to_json())), "y.json") == profile


def test_a_machine_without_a_gpu() -> None:
    whole: dict[str, Any] = {
        **WHOLE,
        "memory": {"cpu": 1, "disk": 0},
        "links": {"disk_read": 1, "disk_write": 1},
        "gpu": None,
    }
    profile = parse_profile(whole, "x.json")
    assert profile.gpu is None
    assert "gpu" not in profile.to_json()
    assert parse_profile(profile.to_json(), "x.json") == profile
    with pytest.raises(UsageError, match="a machine has no GPU"):
        profile.processor("gpu")


def test_a_curve_is_straight_in_logarithms_and_flat_beyond_its_ends() -> None:
    curve = Curve(((4, 1.0), (16, 4.0), (64, 2.0)))
    assert curve.at(1) == 1.0
    assert curve.at(8) == pytest.approx(2.0)
    assert curve.at(32) == pytest.approx(math.sqrt(8))
    assert curve.at(1000) == 2.0


@pytest.mark.parametrize(
    ("path", "value", "field", "advice"),
    [
        ("name", "  ", "name", "write a name"),
        ("name", GONE, "name", "add it"),
        ("memory", 5, "memory", "not an object"),
        ("memory/gpu", GONE, "memory.gpu", "add it"),
        ("memory/cpu", "lots", "memory.cpu", "16GiB"),
        ("memory/cpu", -1, "memory.cpu", "whole bytes"),
        ("memory/cpu", 1.5, "memory.cpu", "whole bytes"),
        ("memory/cpu", math.nan, "memory.cpu", "whole bytes"),
        ("memory/cpu", True, "memory.cpu", "whole bytes"),
        ("memory/tape", 5, "memory.tape", "known here are gpu, cpu, disk"),
        ("links/h2d", 0, "links.h2d", "above 0"),
        ("links/h2d", "fast", "links.h2d", "above 0"),
        ("links/h2d", math.inf, "links.h2d", "above 0"),
        ("links/d2h", GONE, "links.d2h", "add it"),
        ("gpu", GONE, "memory.gpu", "remove it"),
        ("gpu", [], "gpu", "not an object"),
        ("cpu/products", {}, "cpu.products", "FLOP/s by type"),
        ("cpu/products/float8", [[1, 1]], "cpu.products.float8", "float32"),
        ("cpu/products/float32", [], "cpu.products.float32", "rising rows"),
        ("cpu/products/float32", [[1, 1], [1, 2]], "cpu.products.float32[1]", "rising rows"),
        ("cpu/products/float32", [[1]], "cpu.products.float32[0]", "no point"),
        ("cpu/products/float32", [[0, 1]], "cpu.products.float32[0]", "from 1"),
        ("cpu/products/float32", [[1.5, 1]], "cpu.products.float32[0]", "from 1"),
        ("cpu/products/float32", [[1, -1]], "cpu.products.float32[0]", "above 0"),
        ("cpu/widened", [], "cpu.widened", "by stored type"),
        ("cpu/widened/float16", None, "cpu.widened.float16", "above 0"),
        ("cpu/widened/int3", 1, "cpu.widened.int3", "int4"),
        ("cpu/step_s", -1, "cpu.step_s", "0 or more"),
        ("gpu/attention_bytes", GONE, "gpu.attention_bytes", "add it"),
        ("gpu/speed", 1, "gpu.speed", "remove it"),
        ("sources", {"a": 1}, "sources", "object of texts"),
        ("extra", 1, "extra", "remove it"),
    ],
)
def test_a_mistake_is_one_line(path: str, value: Any, field: str, advice: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_profile(changed(path, value), "mine.json")
    message = str(caught.value)
    assert message.startswith(f"hardware profile mine.json: {field}: ")
    assert advice in message
    assert "\n" not in message


def test_not_an_object_at_all() -> None:
    with pytest.raises(UsageError, match=r"^hardware profile mine.json: a profile is a JSON object$"):
        parse_profile([1], "mine.json")
