"""From a model's name to its folder: each way, and one clear line where there is none."""

from __future__ import annotations

import json
import math
from pathlib import Path

import huggingface_hub
import pytest

from flexbatch.checkpoint.hub import SHORT_NAMES, fetch
from flexbatch.checkpoint.locate import locate
from flexbatch.errors import ModelError
from flexbatch.models.registry import family_of
from tests.tiny import tiny_checkpoint


def parameters(name: str) -> int:
    shape = locate(name, dummy=True).shape
    table = family_of(shape).table(shape)
    tied = {absent for absent, _ in table.tied}
    return sum(math.prod(size) for tensor, size in table.tensors().items() if tensor not in tied)


def test_folder(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "odd": 1, "eos_token_id": 3}))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9]}')
    folder = locate(str(tmp_path))
    assert (folder.name, folder.path, folder.dummy) == (str(tmp_path), tmp_path, False)
    assert folder.config["odd"] == 1
    assert folder.shape.eos_token_ids == (3, 9)
    assert len(folder.warnings) == 1
    assert "odd" in folder.warnings[0]


def test_demo() -> None:
    folder = locate("demo")
    assert folder.shape.family == "llama"
    assert (folder.path / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("opt-125m", 0.125),
        ("opt-350m", 0.331),
        ("opt-30b", 29.97),
        ("opt-175b", 174.6),
        ("facebook/opt-6.7b", 6.658),
        ("gpt2-xl", 1.558),
        ("LLAMA-2-7B", 6.738),
        ("llama-3.1-8b-instruct", 8.030),
        ("llama-3.2-1b", 1.236),
        ("mistral-7b", 7.242),
        ("qwen2-7b", 7.616),
        ("qwen2.5-14b", 14.77),
        ("qwen3-8b", 8.191),
        ("smollm2-135m", 0.1345),
    ],
)
def test_packaged_shapes_have_the_published_size(name: str, billions: float) -> None:
    assert parameters(name) / 1e9 == pytest.approx(billions, rel=2e-3)


def test_every_short_name_has_a_packaged_shape() -> None:
    for name in SHORT_NAMES:
        assert locate(name, dummy=True).dummy


@pytest.mark.parametrize("dummy", [False, True])
def test_offline_error_names_what_would_be_fetched(monkeypatch: pytest.MonkeyPatch, dummy: bool) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    name = "nobody/never-there" if dummy else "opt-125m"
    with pytest.raises(ModelError) as caught:
        locate(name, dummy=dummy)
    message = str(caught.value)
    assert "\n" not in message
    assert "HF_HUB_OFFLINE" in message
    assert ("model.safetensors" in message) is not dummy
    assert "config.json" in message or "*.json" in message
    assert ("nobody/never-there" if dummy else "facebook/opt-125m") in message


def test_no_network_is_the_same_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> str:
        raise ConnectionError("no route\nto host")

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ModelError, match=r"cannot be reached: .*would be fetched") as caught:
        locate("gpt2")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("has_safetensors", [True, False])
def test_bin_is_fetched_only_without_safetensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_safetensors: bool
) -> None:
    asked: list[list[str]] = []

    def snapshot(repo: str, *, allow_patterns: list[str], **kwargs: object) -> str:
        asked.append(allow_patterns)
        if has_safetensors:
            (tmp_path / "model-00001-of-00002.safetensors").touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert fetch("x", "owner/x", weights=True) == tmp_path
    assert [any(".bin" in pattern for pattern in patterns) for patterns in asked] == (
        [False] if has_safetensors else [False, True]
    )


@pytest.mark.parametrize("name", ["opt-9000b", "no such model", "a/b/c", "", "../x/y"])
def test_unknown_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"config\.json|neither a folder"):
        locate(name)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no config.json"),
        (b"{", "config.json: not valid JSON"),
        (b"\xff\xfe\x00", "config.json: not valid JSON"),
        (b"[]", "config.json: not a JSON object"),
        (b'{"architectures": ["T5ForConditionalGeneration"]}', "T5ForConditionalGeneration is not supported"),
    ],
)
def test_bad_folder(tmp_path: Path, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=words) as caught:
        locate(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_file_instead_of_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match="is a file"):
        locate(str(tmp_path / "model.safetensors"))
