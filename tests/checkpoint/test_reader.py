"""Checkpoints of every layout give the same tensors; whatever does not fit the model is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexbatch.checkpoint.locate import ModelFolder, locate
from flexbatch.checkpoint.reader import Checkpoint, open_checkpoint
from flexbatch.errors import ModelError
from flexbatch.models.registry import family_of
from tests.tiny import ALL_VARIANTS, split, tiny_checkpoint


def opened(path: Path, *, dummy: bool = False) -> Checkpoint:
    folder = locate(str(path), dummy=dummy)
    return open_checkpoint(folder, family_of(folder.shape).table(folder.shape))


def tensors_of(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: checkpoint.read(entry) for name, entry in checkpoint.entries.items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor, second[name]), name


def resave(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path / "model.safetensors")


def to_bin(path: Path, *, shards: int = 1) -> None:
    """Replace the safetensors of a folder by ``pytorch_model.bin``, tied tensors shared as torch saves them."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    embedding = next(name for name in tensors if "embed_tokens" in name or "wte" in name)
    tensors.setdefault("lm_head.weight", tensors[embedding])
    if shards == 1:
        torch.save(tensors, path / "pytorch_model.bin")
        return
    weight_map = {}
    for shard in range(shards):
        file = f"pytorch_model-{shard + 1:05d}-of-{shards:05d}.bin"
        names = sorted(tensors)[shard::shards]
        torch.save({name: tensors[name] for name in names}, path / file)
        weight_map.update(dict.fromkeys(names, file))
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "flexbatch" / "converted"


@pytest.mark.parametrize(("family", "variant"), ALL_VARIANTS)
def test_sharded_equals_single(tmp_path: Path, family: str, variant: str) -> None:
    single = opened(tiny_checkpoint(tmp_path / "single", family, variant, dtype=torch.float16))
    sharded = opened(tiny_checkpoint(tmp_path / "sharded", family, variant, dtype=torch.float16, shards=3))
    stored = load_file(tmp_path / "single" / "model.safetensors")
    found = tensors_of(single)
    assert_same(found, tensors_of(sharded))
    assert stored.keys() <= found.keys()
    for name, tensor in stored.items():
        assert torch.equal(tensor, found[name])


@pytest.mark.parametrize(("family", "prefix"), [("opt", "model."), ("gpt2", "transformer."), ("llama", "model.")])
def test_prefix_may_be_missing(tmp_path: Path, family: str, prefix: str) -> None:
    expected = tensors_of(opened(tiny_checkpoint(tmp_path, family)))
    tensors = load_file(tmp_path / "model.safetensors")
    resave(tmp_path, {name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
    assert_same(tensors_of(opened(tmp_path)), expected)


def test_old_buffers_are_ignored(tmp_path: Path) -> None:
    expected = tensors_of(opened(tiny_checkpoint(tmp_path / "g", "gpt2")))
    tensors = load_file(tmp_path / "g" / "model.safetensors")
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.uint8)
    tensors["transformer.h.1.attn.masked_bias"] = torch.tensor(-1e4)
    resave(tmp_path / "g", tensors)
    assert_same(tensors_of(opened(tmp_path / "g")), expected)
    expected = tensors_of(opened(tiny_checkpoint(tmp_path / "l", "llama")))
    tensors = load_file(tmp_path / "l" / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(10)
    resave(tmp_path / "l", tensors)
    assert_same(tensors_of(opened(tmp_path / "l")), expected)


def test_tied_copies(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, "qwen2")
    expected = tensors_of(opened(tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    resave(tmp_path, {**tensors, "lm_head.weight": embedding})
    assert_same(tensors_of(opened(tmp_path)), expected)
    del tensors["model.embed_tokens.weight"]
    resave(tmp_path, {**tensors, "lm_head.weight": embedding})
    assert_same(tensors_of(opened(tmp_path)), expected)
    resave(tmp_path, {**tensors, "lm_head.weight": embedding, "model.embed_tokens.weight": embedding + 1})
    with pytest.raises(ModelError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        opened(tmp_path)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("family", ["opt", "gpt2", "qwen2"])
def test_bin_equals_safetensors(tmp_path: Path, cache: Path, family: str, shards: int) -> None:
    expected = tensors_of(opened(tiny_checkpoint(tmp_path / "m", family, dtype=torch.bfloat16)))
    to_bin(tmp_path / "m", shards=shards)
    first = opened(tmp_path / "m")
    assert_same(tensors_of(first), expected)
    folders = [path for path in cache.iterdir() if path.is_dir()]
    assert len(folders) == 1
    written = {path: path.stat().st_mtime_ns for path in folders[0].iterdir()}
    again = opened(tmp_path / "m")
    assert again.fingerprint == first.fingerprint
    assert {path: path.stat().st_mtime_ns for path in folders[0].iterdir()} == written


def test_changed_bin_is_converted_again(tmp_path: Path, cache: Path) -> None:
    for seed in (1, 2):
        tiny_checkpoint(tmp_path / "m", "opt", seed=seed)
        expected = tensors_of(opened(tmp_path / "m"))
        to_bin(tmp_path / "m")
        assert_same(tensors_of(opened(tmp_path / "m")), expected)
        (tmp_path / "m" / "pytorch_model.bin").unlink()


def test_what_a_killed_conversion_left_is_replaced(tmp_path: Path, cache: Path) -> None:
    tiny_checkpoint(tmp_path / "m", "opt")
    expected = tensors_of(opened(tmp_path / "m"))
    to_bin(tmp_path / "m")
    opened(tmp_path / "m")
    done = next(path for path in cache.iterdir() if path.is_dir())
    partial = cache / f".{done.name.rsplit('-', 1)[1]}.partial"
    done.rename(partial)
    (partial / "model.safetensors").write_bytes(b"half")
    assert_same(tensors_of(opened(tmp_path / "m")), expected)
    assert not partial.exists()


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("executed",))


@pytest.mark.parametrize("kind", ["code", "truncated", "no tensors", "legacy", "expanded"])
def test_bad_bin_is_refused(tmp_path: Path, cache: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_checkpoint(tmp_path / "m", "opt")
    to_bin(tmp_path / "m")
    path = tmp_path / "m" / "pytorch_model.bin"
    if kind == "code":
        torch.save({"lm_head.weight": Evil()}, path)
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-5000])
    elif kind == "no tensors":
        torch.save({"lm_head.weight": [1, 2]}, path)
    elif kind == "legacy":
        torch.save({"lm_head.weight": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    else:
        torch.save({"lm_head.weight": torch.ones(1).expand(2**40)}, path)
    with pytest.raises(ModelError, match=r"pytorch_model\.bin") as caught:
        opened(tmp_path / "m")
    assert "\n" not in str(caught.value)
    assert "executed" not in capsys.readouterr().out
    assert not any(found.is_dir() for found in cache.iterdir())


def damaged(path: Path, kind: str) -> str:
    """Damage a sharded llama in one way and return what the error must say."""
    shard = path / "model-00002-of-00003.safetensors"
    index = json.loads((path / "model.safetensors.index.json").read_text())
    name = next(name for name, file in index["weight_map"].items() if file == shard.name)
    tensors = load_file(shard)
    if kind == "missing shard":
        shard.unlink()
        return rf"{shard.name}: the shard is missing .*{name}"
    if kind == "truncated shard":
        shard.write_bytes(shard.read_bytes()[:-1])
        return rf"{shard.name}.*outside"
    if kind == "missing from shard":
        del tensors[name]
        save_file(tensors, shard)
        return rf"{shard.name}: tensor {name} is missing"
    if kind == "missing":
        del tensors[name], index["weight_map"][name]
        save_file(tensors, shard)
        expected = rf"tensor {name} is missing from the checkpoint"
    elif kind == "wrong shape":
        tensors[name] = torch.ones(3, 5, 7)
        save_file(tensors, shard)
        expected = rf"{shard.name}: tensor {name} has shape \[3, 5, 7\]"
    elif kind == "wrong dtype":
        tensors[name] = tensors[name].double()
        save_file(tensors, shard)
        expected = rf"{shard.name}: tensor {name} has dtype F64"
    elif kind == "unexpected":
        tensors["model.layers.9.gate"] = torch.ones(1)
        save_file(tensors, shard)
        expected = rf"{shard.name}: tensor model\.layers\.9\.gate is unexpected"
    elif kind == "twice":
        index["weight_map"]["norm.weight"] = shard.name
        save_file({**tensors, "norm.weight": torch.ones(80)}, shard)
        expected = r"tensor (model\.)?norm\.weight is there twice"
    elif kind == "escaping index":
        index["weight_map"][name] = "../secret.safetensors"
        expected = rf"weight_map\.{name} is '\.\./secret"
    else:
        index = {"weight_map": None}
        expected = "weight_map is missing"
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return expected


@pytest.mark.parametrize(
    "kind",
    [
        "missing shard",
        "truncated shard",
        "missing from shard",
        "missing",
        "wrong shape",
        "wrong dtype",
        "unexpected",
        "twice",
        "escaping index",
        "no weight map",
    ],
)
def test_damage_is_named(tmp_path: Path, kind: str) -> None:
    tiny_checkpoint(tmp_path, "llama", shards=3)
    opened(tmp_path)
    expected = damaged(tmp_path, kind)
    with pytest.raises(ModelError, match=expected) as caught:
        opened(tmp_path)
    assert "\n" not in str(caught.value)


def test_no_weights(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, "opt")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights"):
        opened(tmp_path)
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "pytorch_model-1.bin"}}')
    with pytest.raises(ModelError, match=r"pytorch_model-1\.bin: the shard is missing"):
        opened(tmp_path)


def test_fingerprint_tells_models_apart(tmp_path: Path) -> None:
    first = opened(tiny_checkpoint(tmp_path / "a", "opt", seed=1)).fingerprint
    same = opened(tiny_checkpoint(tmp_path / "b", "opt", seed=1)).fingerprint
    other = opened(tiny_checkpoint(tmp_path / "c", "opt", seed=2)).fingerprint
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    (tmp_path / "b" / "config.json").write_text(json.dumps({**config, "activation_function": "gelu"}))
    changed = opened(tmp_path / "b").fingerprint
    split(tmp_path / "a", 2)
    assert first == same
    assert len({first, other, changed}) == 3


def dummy_folder(name: str) -> ModelFolder:
    return locate(name, dummy=True)


def test_dummy_weights_are_the_same_every_time(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, "llama", dtype=torch.float16)
    real, first, second = opened(tmp_path), opened(tmp_path, dummy=True), opened(tmp_path, dummy=True)
    assert_same(tensors_of(first), tensors_of(second))
    assert first.fingerprint == second.fingerprint != real.fingerprint
    for name, entry in real.entries.items():
        made = first.entries[name]
        assert (made.dtype, made.shape, made.nbytes) == (entry.dtype, entry.shape, entry.nbytes)
        assert first.read(made).shape == entry.shape
    values = [tensor.float().std() for tensor in tensors_of(first).values()]
    assert all(0 < value < 1 for value in values)
    queries = first.read(first.entries["model.layers.0.self_attn.q_proj.weight"])
    keys = first.read(first.entries["model.layers.1.self_attn.q_proj.weight"])
    assert not torch.equal(queries, keys)


@pytest.mark.parametrize("name", ["opt-350m", "gpt2", "qwen3-0.6b"])
def test_dummy_activations_stay_finite(name: str) -> None:
    """A few layers of a real shape, in its own dtype's range."""
    from dataclasses import replace

    from tests.models.naive import logits_of

    folder = dummy_folder(name)
    shape = replace(folder.shape, num_layers=3, windows=(None,) * 3, vocab_size=500)
    table = family_of(shape).table(shape)
    checkpoint = open_checkpoint(replace(folder, shape=shape), table)
    weights = {key: checkpoint.read(entry).float() for key, entry in checkpoint.entries.items()}
    logits = logits_of(shape, weights, torch.arange(12))
    assert torch.isfinite(logits).all()
    assert 1e-3 < float(logits.abs().max()) < 1e3


def test_dummy_of_the_largest_reads_no_memory() -> None:
    """Entries of a 175B model cost nothing until one is read, and tied ones are one."""
    folder = dummy_folder("opt-175b")
    checkpoint = open_checkpoint(folder, family_of(folder.shape).table(folder.shape))
    assert checkpoint.entries["lm_head.weight"] is checkpoint.entries["model.decoder.embed_tokens.weight"]
    stored = {entry.name: entry.nbytes for entry in checkpoint.entries.values()}
    assert 349e9 < sum(stored.values()) < 350e9
