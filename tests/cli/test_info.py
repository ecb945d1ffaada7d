"""``flexbatch info``: figures that the model's own files confirm; nothing but data on stdout."""

from __future__ import annotations

import json
import math
import struct

import pytest

from flexbatch.checkpoint.locate import ASSETS
from flexbatch.cli.main import main


def stored_tensors() -> dict[str, list[int]]:
    """Shapes in the demo model's safetensors header, read by hand."""
    with (ASSETS / "demo" / "model.safetensors").open("rb") as stream:
        (size,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(size))
    return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}


def test_facts_match_the_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--model", "demo", "--json"]) == 0
    out, err = capsys.readouterr()
    facts = json.loads(out)
    config = json.loads((ASSETS / "demo" / "config.json").read_text())
    assert err == ""
    assert facts["parameters"] == sum(math.prod(shape) for shape in stored_tensors().values())
    assert facts["weight_bytes"] == 2 * facts["parameters"]
    assert facts["num_layers"] == config["num_hidden_layers"]
    assert facts["max_positions"] == config["max_position_embeddings"]
    width = config["num_hidden_layers"] * config["hidden_size"]
    width = width * config["num_key_value_heads"] // config["num_attention_heads"]
    assert facts["kv_bytes_per_token"] == {"float16": 4 * width, "float32": 8 * width}
    assert facts["hidden_bytes_per_token"]["float16"] == 2 * config["hidden_size"]


def test_a_packaged_configuration_needs_no_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--model", "opt-30b"]) == 0
    out = capsys.readouterr().out
    lines = dict(line.split("  ", 1) for line in out.splitlines())
    assert lines["family"].strip() == "opt (OPTForCausalLM)"
    # 48 layers of width 7168: the paper's "30B".
    assert 29e9 < int(lines["parameters"].strip().replace(",", "")) < 31e9
    assert "1.3 MiB per token in 16 bit" in out
