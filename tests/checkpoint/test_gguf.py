"""GGUF models against transformers: tensors and settings of every family, tokens of whole runs, and clear refusals."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers

from flexbatch import LLM, SamplingParams
from flexbatch.checkpoint.derived import DerivedCheckpoint
from flexbatch.checkpoint.gguf_file import read_gguf
from flexbatch.checkpoint.locate import locate
from flexbatch.checkpoint.reader import open_checkpoint
from flexbatch.checkpoint.safetensors import read_tensor
from flexbatch.compression.groups import dequantize
from flexbatch.config_parse import parse_config
from flexbatch.errors import ModelError
from flexbatch.models.registry import family_of
from tests.checkpoint.gguf_files import SETTINGS, WIDE, Q, as_stored, gguf_name, write_model
from tests.tiny import tiny_model

ALL_KINDS = (Q.F16, Q.BF16, Q.F32, Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1)
WIDE_KINDS = (Q.Q4_K, Q.Q5_K, Q.Q6_K)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def opened(path: Path) -> DerivedCheckpoint:
    folder = locate(str(path))
    checkpoint = open_checkpoint(folder, family_of(folder.shape).table(folder.shape))
    assert isinstance(checkpoint, DerivedCheckpoint)
    return checkpoint


def expected_tensors(path: Path, architecture: str, model: Any) -> dict[str, torch.Tensor]:
    """Every tensor as transformers would have it, from the package ``gguf``'s reading of the file."""
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    found = {}
    for name in model.state_dict():
        source = stored.get(gguf_name(architecture, name))
        if source is None:
            continue
        values = torch.from_numpy(gguf.dequantize(source.data, source.tensor_type).copy())
        # as_stored is a permutation: numbers sent through it tell where each value comes from.
        places = torch.arange(values.numel(), dtype=torch.float64)
        shape = model.state_dict()[name].shape
        order = as_stored(architecture, model.config, name, places.view(shape)).reshape(-1).long()
        back = torch.empty_like(values.reshape(-1))
        back[order] = values.reshape(-1)
        found[name] = back.view(shape)
    return found


@pytest.mark.parametrize("architecture", SETTINGS)
def test_every_tensor_of_every_type_is_what_the_file_holds(architecture: str, tmp_path: Path) -> None:
    model: Any = tiny_model(architecture, settings=SETTINGS[architecture])
    path = tmp_path / "model.gguf"
    write_model(path, model, architecture, ALL_KINDS)
    checkpoint = opened(path)
    expected = expected_tensors(path, architecture, model)
    for name, values in expected.items():
        entry = checkpoint.entries[name]
        assert entry.nbytes == checkpoint.read(entry).nbytes
        assert torch.equal(checkpoint.read(entry).float(), values), name
    if "lm_head.weight" not in expected:
        tied = "transformer.wte.weight" if architecture == "gpt2" else "model.embed_tokens.weight"
        assert checkpoint.entries["lm_head.weight"] is checkpoint.entries[tied]


def test_block_types_of_256_weights_and_rows_out_of_order(tmp_path: Path) -> None:
    model: Any = tiny_model("llama", settings=WIDE)
    path = tmp_path / "model.gguf"
    write_model(path, model, "llama", WIDE_KINDS)
    checkpoint = opened(path)
    for name, values in expected_tensors(path, "llama", model).items():
        assert torch.equal(checkpoint.read(checkpoint.entries[name]), values), name


@pytest.mark.parametrize("architecture", SETTINGS)
def test_settings_are_those_of_the_model(architecture: str, tmp_path: Path) -> None:
    model: Any = tiny_model(architecture, settings=SETTINGS[architecture])
    path = tmp_path / "model.gguf"
    write_model(path, model, architecture, vocabulary={"ggml.eos_token_id": 2, "ggml.eot_token_id": 5})
    config = model.config.to_dict() | {"architectures": [type(model).__name__], "eos_token_id": [2, 5]}
    expected, _ = parse_config(config | {"dtype": "float32"})
    folder = locate(str(path))
    assert folder.shape == expected
    assert folder.warnings == ()


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.5},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
        {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 64},
    ],
    ids=str,
)
def test_rotary_scaling(scaling: dict[str, Any], tmp_path: Path) -> None:
    if scaling["rope_type"] == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    settings = SETTINGS["llama"] | {"head_dim": 64, "rope_scaling": scaling, "rope_theta": 500000.0}
    model: Any = tiny_model("llama", settings=settings)
    metadata: dict[str, Any] = {}
    if scaling["rope_type"] != "llama3":
        metadata = {"llama.rope.scaling.type": scaling["rope_type"], "llama.rope.scaling.factor": scaling["factor"]}
        if scaling["rope_type"] == "yarn":
            metadata["llama.rope.scaling.original_context_length"] = 64
        write_model(tmp_path / "model.gguf", model, "llama", metadata=metadata)
    else:
        # What the converter writes: by how much each frequency is divided.
        plain = 1 / 500000.0 ** (torch.arange(0, 64, 2).double() / 64)
        model.register_buffer("rope_freqs", (plain / model.model.rotary_emb.inv_freq.double()).float())
        write_model_with_factors(tmp_path / "model.gguf", model)
    found = locate(str(tmp_path / "model.gguf")).shape.rope
    config = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    wanted = parse_config(config)[0].rope
    assert found is not None
    assert wanted is not None
    assert (found.theta, found.dim, found.scaling) == (wanted.theta, wanted.dim, wanted.scaling)
    assert found.factor == pytest.approx(wanted.factor, rel=1e-6)
    assert found.parameters == wanted.parameters
    opened(tmp_path / "model.gguf")


def write_model_with_factors(path: Path, model: Any) -> None:
    factors = model.rope_freqs
    del model.rope_freqs

    class WithFactors:
        config = model.config

        def state_dict(self) -> dict[str, torch.Tensor]:
            found: dict[str, torch.Tensor] = model.state_dict() | {"rope_freqs.weight": factors}
            return found

    write_model(path, WithFactors(), "llama")


def test_factors_that_are_not_llama_3s_are_refused(tmp_path: Path) -> None:
    model: Any = tiny_model("llama", settings=SETTINGS["llama"])
    model.rope_freqs = torch.tensor([1.0, 3.0, 2.0, 5.0, 1.0, 1.0, 1.0, 1.0])
    write_model_with_factors(tmp_path / "model.gguf", model)
    with pytest.raises(ModelError, match=r"rope_freqs\.weight"):
        locate(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("architecture", SETTINGS)
def test_a_run_gives_transformers_tokens_from_the_same_file(architecture: str, tmp_path: Path) -> None:
    model: Any = tiny_model(architecture, settings=SETTINGS[architecture])
    path = tmp_path / "model.gguf"
    write_model(path, model, architecture, (Q.Q8_0, Q.F16, Q.Q5_1))
    model.load_state_dict(expected_tensors(path, architecture, model), strict=False)
    model.tie_weights()
    prompts = [[5, 9, 33, 2, 71], [7], [90, 3, 4, 1, 1, 50, 60]]
    for shares in ("0,100,0", "0,0,100"):
        with LLM(path, device="cpu", weights=shares) as llm:
            results = llm.generate(prompts, SamplingParams(max_tokens=12, ignore_eos=True))
        for prompt, result in zip(prompts, results, strict=True):
            oracle = model.generate(
                torch.tensor([prompt]), max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=None
            )
            assert list(result.token_ids) == oracle[0, len(prompt) :].tolist(), shares


def test_transformers_reads_the_same_weights_from_the_file(tmp_path: Path) -> None:
    model: Any = tiny_model("llama", settings=SETTINGS["llama"])
    path = tmp_path / "model.gguf"
    tokens = {"ggml.model": "gpt2", "ggml.tokens": [f"t{n}" for n in range(149)], "ggml.eos_token_id": 2}
    write_model(path, model, "llama", (Q.Q4_1, Q.Q8_0, Q.Q5_0), vocabulary=tokens)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    )
    checkpoint = opened(path)
    for name, values in loaded.state_dict().items():
        assert torch.equal(checkpoint.read(checkpoint.entries[name]), values), name


@pytest.mark.parametrize("kind", [Q.Q4_0, Q.Q4_1])
def test_four_bit_blocks_are_repacked_without_loss(kind: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_model(path, tiny_model("llama", settings=SETTINGS["llama"]), "llama", (kind,))
    checkpoint = opened(path)
    matrices = 0
    for entry in checkpoint.entries.values():
        packed = checkpoint.packed(entry)
        assert (packed is None) == (len(entry.shape) == 1)
        if packed is not None:
            assert packed.group == 32
            assert torch.equal(dequantize(packed), checkpoint.read(entry))
            matrices += 1
    assert matrices == 23


def test_other_types_have_no_exact_form_in_groups(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_model(path, tiny_model("llama", settings=SETTINGS["llama"]), "llama", (Q.Q5_0, Q.Q8_0, Q.F16))
    checkpoint = opened(path)
    assert all(checkpoint.packed(entry) is None for entry in checkpoint.entries.values())


def test_a_tensor_is_put_on_disk_once(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_model(path, tiny_model("llama", settings=SETTINGS["llama"]), "llama", (Q.Q4_0, Q.F16))
    checkpoint = opened(path)
    for entry in checkpoint.entries.values():
        kept = checkpoint.at_rest(entry)
        assert kept.path is not None
        assert torch.equal(read_tensor(kept), checkpoint.read(entry))
        if entry.path is not None:
            assert kept is entry
        else:
            before = kept.path.stat().st_mtime_ns
            assert checkpoint.at_rest(entry) == kept
            assert kept.path.stat().st_mtime_ns == before


def test_files_that_differ_have_different_fingerprints(tmp_path: Path) -> None:
    prints = set()
    for seed in (0, 1):
        path = tmp_path / f"model{seed}.gguf"
        write_model(path, tiny_model("llama", settings=SETTINGS["llama"], seed=seed), "llama")
        prints.add(opened(path).fingerprint)
    assert len(prints) == 2


def test_a_truncated_file_says_how_much_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_model(path, tiny_model("llama", settings=SETTINGS["llama"]), "llama")
    whole = read_gguf(path)
    end = max(tensor.offset + tensor.nbytes for tensor in whole.tensors.values())
    content = path.read_bytes()
    path.write_bytes(content[: end - 1234])
    with pytest.raises(ModelError, match="1234 bytes are missing"):
        locate(str(path))
    path.write_bytes(content[:1000])
    with pytest.raises(ModelError, match="the file ends inside its header"):
        locate(str(path))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"llama.expert_count": 8}, ["llama.expert_count = 8"]),
        ({"llama.rope.scaling.type": "longrope"}, ["rope.scaling.type", "longrope"]),
        ({"llama.attention.head_count_kv": [2, 2, 1]}, ["head_count_kv", "by layer"]),
        ({"llama.attention.value_length": 8}, ["value_length", "16"]),
        ({"llama.logit_scale": 8.0}, ["logit_scale"]),
        ({"split.count": 3}, ["3 parts", "merge"]),
        ({"llama.block_count": 2}, ["blk.2", "unexpected"]),
        ({"llama.block_count": 4}, ["model.layers.3", "missing"]),
        ({"llama.feed_forward_length": 128}, ["ffn_", "shape"]),
        ({"llama.embedding_length": "x"}, ["hidden_size"]),
        ({"tokenizer.ggml.eos_token_id": 149}, ["eos_token_id", "149"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_supported_is_refused_by_name(change: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    model: Any = tiny_model("llama", settings=SETTINGS["llama"])
    path = tmp_path / "model.gguf"
    write_model(path, model, "llama", metadata=change)
    with pytest.raises(ModelError) as caught:
        opened(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert all(word in message for word in words), message


def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gemma3")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"gemma3 is not supported in GGUF \(supported: llama, qwen2, qwen3, gpt2\)"):
        locate(str(tmp_path / "model.gguf"))


def test_other_types_are_refused_by_name(tmp_path: Path) -> None:
    model: Any = tiny_model("llama", settings=WIDE)
    path = tmp_path / "model.gguf"
    write_model(path, model, "llama", (Q.Q6_K,))
    content = path.read_bytes()
    place = content.index(b"blk.0.attn_v.weight") + len(b"blk.0.attn_v.weight") + 4 + 16
    assert content[place] == Q.Q6_K
    path.write_bytes(content[:place] + bytes([Q.Q3_K]) + content[place + 1 :])
    with pytest.raises(ModelError, match=r"blk\.0\.attn_v\.weight has type Q3_K, which is not supported"):
        locate(str(path))


def test_files_that_are_not_there_or_no_gguf(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no such file"):
        locate(str(tmp_path / "model.gguf"))
    (tmp_path / "text.txt").write_text("hello")
    with pytest.raises(ModelError, match="no GGUF"):
        locate(str(tmp_path / "text.txt"))
    (tmp_path / "model.gguf").write_bytes(b"GGML" + bytes(100))
    with pytest.raises(ModelError, match="no GGUF file"):
        locate(str(tmp_path / "model.gguf"))
    shutil.copy(tmp_path / "model.gguf", tmp_path / "big.gguf")
    (tmp_path / "big.gguf").write_bytes(b"GGUF" + (3).to_bytes(4, "big") + bytes(100))
    with pytest.raises(ModelError, match="big endian"):
        locate(str(tmp_path / "big.gguf"))
