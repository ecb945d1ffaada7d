"""Adapter folders: what is refused, by name; what is damaged; names, patterns and scales as PEFT has them."""

from __future__ import annotations

import dataclasses
import json
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file

from flexbatch.checkpoint.locate import locate
from flexbatch.errors import AdapterError, UsageError
from flexbatch.lora.adapter import UnreadableAdapterError
from flexbatch.lora.folders import adapter_folders, fingerprint
from flexbatch.lora.reader import AdapterReader, open_adapters
from flexbatch.models.registry import family_of
from tests.lora.peft_cases import configs, make_adapters
from tests.tiny import load_oracle, tiny_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), "llama")


def reader_of(model: Path) -> AdapterReader:
    shape = locate(str(model)).shape
    return AdapterReader(family_of(shape).table(shape), shape.family)


def write(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    """An adapter of rank 2 on the first layer's q_proj, with changes."""
    folder.mkdir(exist_ok=True)
    values = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**values, **config}))
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    both = {f"{name}.lora_A.weight": torch.ones(2, 80), f"{name}.lora_B.weight": torch.ones(80, 2)}
    kept = {key: value for key, value in {**both, **(tensors or {})}.items() if value.numel()}
    save_file(kept, folder / "adapter_model.safetensors")
    return folder


def test_the_smallest_adapter(model: Path, tmp_path: Path) -> None:
    adapter = reader_of(model).open("a", write(tmp_path / "a"))
    (part,) = adapter.parts
    assert (part.module.name, part.module.group, part.module.linear) == ("model.layers.0.self_attn.q_proj", 1, "qkv")
    assert (part.rank, part.scale, part.elements) == (2, 2.0, 2 * 160)
    assert adapter.elements == 320


REFUSED: dict[str, Any] = {
    "use_dora": True,
    "bias": "lora_only",
    "modules_to_save": ["lm_head"],
    "peft_type": "IA3",
    "task_type": "SEQ_CLS",
    "lora_bias": True,
    "trainable_token_indices": [1, 2],
    "alora_invocation_tokens": [5],
    "megatron_config": {"tensor_parallel": 2},
    "layer_replication": [[0, 2]],
    "target_parameters": ["experts.gate"],
    "loftq_config": {"loftq_bits": 4},
    "use_qalora": True,
    "velora_config": {"num_groups": 2},
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 1},
    "kasa_config": {"beta": 1},
    "monteclora_config": {"num_samples": 1},
    "ensure_weight_tying": True,
    "a_field_of_the_future": 3,
    "r": 0,
    "lora_alpha": "large",
    "use_rslora": "yes",
    "rank_pattern": {"q_proj": -1},
    "alpha_pattern": {"(": 2},
    "target_modules": 7,
    "exclude_modules": "(",
    "layers_to_transform": ["first"],
    "layers_pattern": "(",
}


FREE = frozenset(
    {"auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "lora_dropout", "megatron_core"}
    | {"peft_version", "qalora_group_size", "revision", "runtime_config"}
)
"""Fields of PEFT that say nothing about an adapter's results."""


@pytest.mark.parametrize("field", REFUSED)
def test_a_field_that_is_not_supported_is_named(field: str, model: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", None, **{field: REFUSED[field]})
    with pytest.raises(AdapterError, match=field) as caught:
        reader_of(model).open("a", folder)
    assert not isinstance(caught.value, UnreadableAdapterError)
    assert str(folder / "adapter_config.json") in str(caught.value)


def test_every_field_of_peft_is_read_or_refused(model: Path, tmp_path: Path) -> None:
    """Whatever PEFT's own settings can hold: nothing is ignored that might change results."""
    others = {field.name for field in dataclasses.fields(LoraConfig)} - FREE
    assert {"use_dora", "modules_to_save", "eva_config", "corda_config", "lora_ga_config"} <= others
    for name in sorted(others):
        with pytest.raises(AdapterError, match=name):
            reader_of(model).open("a", write(tmp_path / "a", None, **{name: {"some": "thing"}}))


@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_16", "olora", "corda", "eva", "loftq", "lora_ga", "mica", "unknown"]
)
def test_initialisations_that_change_the_base_are_named(init: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=f"init_lora_weights '{init}'"):
        reader_of(model).open("a", write(tmp_path / "a", init_lora_weights=init))


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", None])
def test_initialisations_that_do_not(init: Any, model: Path, tmp_path: Path) -> None:
    assert reader_of(model).open("a", write(tmp_path / "a", init_lora_weights=init)).parts


Q, V = "base_model.model.model.layers.0.self_attn.q_proj", "base_model.model.model.layers.0.self_attn.v_proj"
LEFT_OVER: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "magnitude": ({f"{Q}.lora_magnitude_vector.weight": torch.ones(80)}, "DoRA"),
    "embedding": ({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 149)}, "embeddings"),
    "bias": ({f"{Q}.lora_B.bias": torch.ones(80)}, "biases"),
    "base": ({"base_model.model.lm_head.base_layer.weight": torch.ones(149, 80)}, "base model"),
    "tokens": ({"base_model.model.model.embed_tokens.trainable_tokens_delta": torch.ones(2)}, "token embeddings"),
    "saved": ({"base_model.model.lm_head.modules_to_save.weight": torch.ones(2)}, "modules_to_save"),
    "no module": ({"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.ones(2, 80)}, "no linear"),
    "no target": ({f"{V}.lora_A.weight": torch.ones(2, 80)}, "target_modules"),
    "no prefix": ({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 80)}, "no linear module"),
}


@pytest.mark.parametrize("case", LEFT_OVER)
def test_no_tensor_is_left_over(case: str, model: Path, tmp_path: Path) -> None:
    tensors, reason = LEFT_OVER[case]
    (name,) = tensors
    with pytest.raises(AdapterError, match=reason) as caught:
        reader_of(model).open("a", write(tmp_path / "a", tensors))
    assert f"tensor {name} would be left over" in str(caught.value)


def test_halves_shapes_types_and_duplicates(model: Path, tmp_path: Path) -> None:
    reader = reader_of(model)
    with pytest.raises(AdapterError, match=r"q_proj\.lora_B\.weight is missing"):
        reader.open("a", write(tmp_path / "a", {f"{Q}.lora_B.weight": torch.empty(0)}))
    with pytest.raises(AdapterError, match=r"has shape \[3, 80\], \[2, 80\] is expected"):
        reader.open("b", write(tmp_path / "b", {f"{Q}.lora_A.weight": torch.ones(3, 80)}))
    with pytest.raises(AdapterError, match="dtype F64"):
        reader.open("c", write(tmp_path / "c", {f"{Q}.lora_A.weight": torch.ones(2, 80, dtype=torch.float64)}))
    short = "base_model.model.layers.0.self_attn.q_proj"
    with pytest.raises(AdapterError, match="there twice"):
        reader.open("d", write(tmp_path / "d", {f"{short}.lora_A.weight": torch.ones(2, 80)}))
    both = {f"{Q}.lora_A.weight": torch.empty(0), f"{Q}.lora_B.weight": torch.empty(0)}
    with pytest.raises(AdapterError, match="holds no tensors"):
        reader.open("e", write(tmp_path / "e", both))
    bare = {f"{short}.lora_A.weight": torch.ones(2, 80), f"{short}.lora_B.weight": torch.ones(80, 2)}
    (part,) = reader.open("f", write(tmp_path / "f", {**both, **bare})).parts
    assert part.module.name == "model.layers.0.self_attn.q_proj"


BREAK: dict[str, Callable[[Path], object]] = {
    "no config": lambda folder: (folder / "adapter_config.json").unlink(),
    "config is no JSON": lambda folder: (folder / "adapter_config.json").write_text("{"),
    "config is a list": lambda folder: (folder / "adapter_config.json").write_text("[]"),
    "no weights": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "truncated": lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\x10"),
    "cut short": lambda folder: (folder / "adapter_model.safetensors").write_bytes(
        (folder / "adapter_model.safetensors").read_bytes()[:-5]
    ),
    "pickle": lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
}


@pytest.mark.parametrize("how", BREAK)
def test_what_is_damaged_is_unreadable(how: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = write(tmp_path / "a")
    BREAK[how](folder)
    with pytest.raises(UnreadableAdapterError, match=str(folder)):
        reader_of(model).open("a", folder)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_modules_ranks_and_scales_are_those_of_peft(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each adapter that PEFT saved changes the modules that it changes in PEFT, by the same ranks and scales."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tiny_checkpoint(tmp_path / "model", family, "350m" if family == "opt" else "plain")
    folders = make_adapters(path, tmp_path / "adapters", configs(family, random.Random(5)), 5)
    reader = reader_of(path)
    for name, folder in folders.items():
        ours = {part.module.name: (part.rank, pytest.approx(part.scale)) for part in reader.open(name, folder).parts}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: Any = PeftModel.from_pretrained(load_oracle(path), folder)
        theirs = {
            key.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
            for key, module in model.named_modules()
            if hasattr(module, "lora_A")
        }
        assert theirs == ours, name


def test_thousands_are_opened_quickly_and_in_parallel(model: Path, tmp_path: Path) -> None:
    modules = [
        f"base_model.model.model.layers.{layer}.{name}"
        for layer in range(3)
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    ]
    widths = {"q_proj": 80, "k_proj": 40, "v_proj": 40, "o_proj": 80}
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 80) for name in modules}
    tensors |= {f"{name}.lora_B.weight": torch.ones(widths[name.rpartition(".")[2]], 2) for name in modules}
    for number in range(300):
        write(tmp_path / f"a{number}", tensors, target_modules=list(widths))
    (tmp_path / "a7" / "adapter_model.safetensors").write_bytes(b"")
    folders = adapter_folders([], tmp_path)
    started = time.perf_counter()
    opened, failed = open_adapters(reader_of(model), folders, folders)
    assert time.perf_counter() - started < 3
    assert list(failed) == ["a7"]
    assert len(opened) == 299
    assert len({id(adapter.parts) for adapter in opened.values()}) == 1


def test_names_of_folders(model: Path, tmp_path: Path) -> None:
    one, two = write(tmp_path / "one"), write(tmp_path / "two", lora_alpha=5)
    assert adapter_folders([("x", one)], tmp_path) == {"x": one, "one": one, "two": two}
    for named, folder, message in (
        ([("x", one), ("x", two)], None, "the name is taken"),
        ([("", one)], None, "has no name"),
        ([("x", tmp_path)], None, "adapter_config.json is missing"),
        ([("one", one)], tmp_path, "has the name of --lora one"),
        ([], tmp_path / "none", "cannot be read"),
    ):
        with pytest.raises(UsageError, match=message):
            adapter_folders(named, folder)
    folders = {"a": one, "b": two}
    assert fingerprint(folders, ["a"]) == fingerprint(folders, ["a", "a"])
    assert len({fingerprint(folders, names) for names in (["a"], ["b"], ["a", "b"])}) == 3
    before = fingerprint(folders, ["a"])
    write(one, lora_alpha=6)
    assert fingerprint(folders, ["a"]) != before
