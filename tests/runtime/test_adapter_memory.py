"""Adapters many times larger than their memory: the process grows by the arena, not by the adapters."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

from flexbatch import LLM, SamplingParams
from tests.tiny import tiny_checkpoint

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
ADAPTERS, RANK, ARENA = 96, 128, 12 * MIB
SLACK = 10 * MIB  # what a run allocates besides


def write_adapters(folder: Path) -> int:
    """Adapters for the tiny Llama's q, k, v and o; returns their bytes in fp32."""
    widths = {"q_proj": (80, 80), "k_proj": (80, 40), "v_proj": (80, 40), "o_proj": (80, 80)}
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2, "target_modules": list(widths)}
    total = 0
    for number in range(ADAPTERS):
        own = folder / f"a{number}"
        own.mkdir(parents=True)
        tensors = {}
        for layer in range(3):
            for name, (into, out) in widths.items():
                prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
                tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, into).half()
                tensors[f"{prefix}.lora_B.weight"] = torch.randn(out, RANK).half()
        save_file(tensors, own / "adapter_model.safetensors")
        (own / "adapter_config.json").write_text(json.dumps(settings))
        total += sum(4 * tensor.numel() for tensor in tensors.values())
    return total


def grow(model: Path, adapters: Path) -> None:
    """Run the base model, then every adapter twice; print what the second part made of the process."""
    rng = random.Random(0)
    names = [f"a{number}" for number in range(ADAPTERS)] * 2
    prompts = [[rng.randrange(149) for _ in range(8)] for _ in names]
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    with LLM(model, lora_dir=adapters, device="cpu", adapter_memory=ARENA, max_sequences=4) as llm:
        llm.generate(prompts, params)
        process = psutil.Process()
        before = process.memory_info().rss
        results = llm.generate(prompts, params, lora=names)
        after = process.memory_info().rss
        print(json.dumps({"grown": after - before, "done": len(results), **llm.stats()["adapters"]}))


def test_memory_is_what_the_arena_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = tiny_checkpoint(tmp_path / "model", "llama")
    total = write_adapters(tmp_path / "adapters")
    assert total > 3 * (ARENA + SLACK)
    done = subprocess.run(
        [sys.executable, __file__, str(model), str(tmp_path / "adapters")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["done"] == 2 * ADAPTERS
    assert report["arena_peak_bytes"] <= report["arena_bytes"] <= ARENA
    assert report["evictions"] > ADAPTERS // 2
    assert report["grown"] < report["arena_bytes"] + SLACK


if __name__ == "__main__":
    grow(Path(sys.argv[1]), Path(sys.argv[2]))
