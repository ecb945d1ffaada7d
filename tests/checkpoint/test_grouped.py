"""GPTQ and AWQ checkpoints: weights bit for bit, whole runs against transformers, refusals by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flexbatch import LLM, SamplingParams
from flexbatch.checkpoint.derived import DerivedCheckpoint
from flexbatch.checkpoint.locate import locate
from flexbatch.checkpoint.reader import open_checkpoint
from flexbatch.compression.groups import dequantize
from flexbatch.errors import ModelError
from flexbatch.models.registry import family_of
from tests.checkpoint.grouped_files import SETTINGS, write_folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def opened(path: Path) -> DerivedCheckpoint:
    folder = locate(str(path))
    assert folder.warnings == ()
    checkpoint = open_checkpoint(folder, family_of(folder.shape).table(folder.shape))
    assert isinstance(checkpoint, DerivedCheckpoint)
    return checkpoint


def check(path: Path, model: Any, *, group: int) -> None:
    """Every tensor is the model's, and those in 4 bits have the same values in the group format."""
    checkpoint = opened(path)
    packed = 0
    for name, values in model.state_dict().items():
        entry = checkpoint.entries[name]
        assert torch.equal(checkpoint.read(entry).float(), values), name
        form = checkpoint.packed(entry)
        if form is not None:
            packed += 1
            assert form.group == group
            assert form.zeros is not None
            exact = dequantize(form, torch.float16)
            assert torch.equal(exact.t() if exact.shape != values.shape or "h.0" in name else exact, values.half())
    assert packed == len(checkpoint.recipes)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("family", SETTINGS)
def test_weights_are_those_of_the_description(family: str, method: str, group: int, tmp_path: Path) -> None:
    check(tmp_path, write_folder(tmp_path, family, method, group), group=group)


def test_the_second_gptq_format_and_old_zero_biases(tmp_path: Path) -> None:
    changes = {"checkpoint_format": "gptq_v2", "desc_act": True, "meta": {"quantizer": "x"}, "lm_head": False}
    check(tmp_path, write_folder(tmp_path, "llama", "gptq", 64, changes=changes, zero_bias=True), group=64)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_run_gives_transformers_tokens(method: str, tmp_path: Path) -> None:
    model = write_folder(tmp_path, "llama", method, 32)
    prompts = [[5, 9, 33, 2, 71], [7], [90, 3, 4, 1, 1, 50, 60]]
    for shares in ("0,100,0", "0,0,100"):
        with LLM(tmp_path, device="cpu", weights=shares) as llm:
            results = llm.generate(prompts, SamplingParams(max_tokens=12, ignore_eos=True))
        for prompt, result in zip(prompts, results, strict=True):
            oracle = model.generate(
                torch.tensor([prompt]), max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=None
            )
            assert list(result.token_ids) == oracle[0, len(prompt) :].tolist(), shares


def test_act_order_is_exact_where_runs_of_inputs_share_a_group(tmp_path: Path) -> None:
    index = np.array([1, 0, 3, 2], dtype=np.int64).repeat(32)  # four groups of 32, in another order
    model = write_folder(tmp_path / "a", "llama", "gptq", 32, index=index, changes={"desc_act": True})
    check(tmp_path / "a", model, group=32)
    halves = np.array([0, 1, 1, 0], dtype=np.int64).repeat(32)  # two groups of 64, each in two places
    model = write_folder(tmp_path / "b", "llama", "gptq", 64, index=halves, changes={"desc_act": True})
    checkpoint = opened(tmp_path / "b")
    groups = set()
    for name, values in model.state_dict().items():
        assert torch.equal(checkpoint.read(checkpoint.entries[name]).float(), values), name
        form = checkpoint.packed(checkpoint.entries[name])
        groups.add(0 if form is None else form.group)
    assert groups == {0, 32, 64}


def test_other_act_order_is_refused(tmp_path: Path) -> None:
    index = np.random.default_rng(0).permutation(128) // 32
    write_folder(tmp_path, "llama", "gptq", 32, index=index, changes={"desc_act": True})
    with pytest.raises(ModelError, match=r"_proj\.g_idx: act-order"):
        opened(tmp_path)


def test_symmetric_checkpoints_with_the_wrong_format_name(tmp_path: Path) -> None:
    # Newer programs store the middle code 8 itself, and say "gptq" where zeros are stored less one.
    write_folder(tmp_path, "llama", "gptq", 64, changes={"sym": True})
    tensors = load_file(tmp_path / "model.safetensors")
    words = {name: torch.full_like(tensor, -0x77777778) for name, tensor in tensors.items() if "qzeros" in name}
    save_file(tensors | words, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = opened(tmp_path)
    form = checkpoint.packed(checkpoint.entries["model.layers.0.self_attn.q_proj.weight"])
    assert form is not None
    assert form.zeros is not None
    assert bool((form.zeros == 8).all())


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        ("gptq", {"bits": 8}, ["bits is 8"]),
        ("gptq", {"group_size": -1}, ["group_size is -1", "32 or 64 or 128"]),
        ("gptq", {"group_size": None}, ["group_size is missing"]),
        ("gptq", {"checkpoint_format": "marlin"}, ["checkpoint_format is 'marlin'"]),
        ("gptq", {"checkpoint_format": "gptq", "format": "gptq_v2"}, ["format is 'gptq_v2'"]),
        ("gptq", {"lm_head": True}, ["lm_head is True"]),
        ("gptq", {"dynamic": {"-:.*down.*": {}}}, ["dynamic"]),
        ("gptq", {"sparsity": 2}, ["sparsity is 2", "not known"]),
        ("gptq", {"desc_act": "no"}, ["desc_act is 'no'"]),
        ("gptq", {"modules_to_not_convert": ["q_proj"]}, ["q_proj", "modules_to_not_convert"]),
        ("awq", {"version": "gemv"}, ["version is 'gemv'"]),
        ("awq", {"zero_point": False}, ["zero_point is False"]),
        ("awq", {"bits": 3}, ["bits is 3"]),
        ("awq", {"quant_method": "bitsandbytes"}, ["quant_method is 'bitsandbytes'", "gptq and awq"]),
        ("awq", {"quant_method": 4}, ["quant_method is 4"]),
        ("gptq", {"group_size": 128}, ["shape", "groups of 128"]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_everything_else_is_refused_by_name(
    method: str, changes: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    write_folder(tmp_path, "qwen2", method, 64, changes=changes)
    with pytest.raises(ModelError) as caught:
        opened(tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("qzeros", None, "down_proj.qzeros is missing"),
        ("g_idx", None, "down_proj.g_idx is missing"),
        ("scales", torch.ones(4, 128, dtype=torch.float32), "must be a matrix of F16 or BF16"),
        ("scales", torch.ones(5, 128, dtype=torch.float16), "has shape"),
        ("qweight", torch.ones(33, 128, dtype=torch.int32), "shape"),
        ("g_idx", torch.full((256,), 4, dtype=torch.int32), "beyond the 4"),
        ("g_idx", torch.zeros(255, dtype=torch.int32), "must be I32"),
        ("weight", torch.ones(128, 256, dtype=torch.float16), "twice"),
        ("bias", torch.ones(128, dtype=torch.float16), "bias is unexpected"),
    ],
)
def test_damaged_linears_are_refused_by_name(
    part: str, change: torch.Tensor | None, words: str, tmp_path: Path
) -> None:
    write_folder(tmp_path, "qwen2", "gptq", 64, changes={"desc_act": True})
    tensors = load_file(tmp_path / "model.safetensors")
    name = f"model.layers.0.mlp.down_proj.{part}"
    tensors.pop(name, None)
    if change is not None:
        tensors[name] = change
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError) as caught:
        opened(tmp_path)
    assert words in str(caught.value)
    assert "down_proj" in str(caught.value)


def test_a_scale_that_is_not_finite_is_refused_when_it_is_read(tmp_path: Path) -> None:
    write_folder(tmp_path, "qwen2", "awq", 64)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.scales"][1, 3] = torch.inf
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = opened(tmp_path)
    with pytest.raises(ModelError, match=r"down_proj\.scales: its value number 131 is not finite"):
        checkpoint.read(checkpoint.entries["model.layers.0.mlp.down_proj.weight"])


def test_a_configuration_without_quantized_tensors_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, "qwen2", "gptq", 64)
    other = tmp_path / "plain"
    write_folder(other, "qwen2", "gptq", 64)
    plain = {name: tensor for name, tensor in load_file(other / "model.safetensors").items() if "norm" in name}
    save_file(plain, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="no tensor is quantized"):
        opened(tmp_path)
