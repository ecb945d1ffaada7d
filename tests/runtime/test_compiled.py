"""Whole runs with compiled kernels and with torch's operations give the same tokens."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from flexbatch.kernels import native
from tests.lora.peft_cases import make_adapters, requests_with
from tests.runtime.test_lora import run
from tests.runtime.test_lora_narrow import ragged
from tests.tiny import tiny_checkpoint


@pytest.fixture(params=["llama", "mistral", "qwen3", "opt"])
def model(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Rotary positions, windows, norms of heads, and none of them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tiny_checkpoint(tmp_path / "model", request.param)


def test_tokens_are_the_same(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, dict[str, Any]] = {f"r{rank}": {"r": rank, "target_modules": "all-linear"} for rank in (3, 8)}
    adapters = make_adapters(model, tmp_path / "adapters", settings, 2)
    rng, rows = random.Random(1), ragged(model, 30, 8)
    names = [rng.choice([*adapters, None]) for _ in rows]
    requests = requests_with(rows, names, ignore_eos=True)
    used: list[int] = []
    launch = native._parallel()
    assert launch is not None

    def counted(*record: int) -> None:
        used.append(1)
        launch(*record)

    monkeypatch.setattr(native, "_parallel", lambda: counted)
    compiled, _ = run(model, adapters, requests)
    count = len(used)
    assert count > 0
    monkeypatch.setattr(native, "_parallel", lambda: None)
    by_torch, _ = run(model, adapters, requests)
    assert len(used) == count
    assert [result.token_ids for result in compiled] == [result.token_ids for result in by_torch]
    assert all(result.error is None and result.completion_tokens for result in compiled)
