"""Corrupted model files, each a pure function of a number, and what must hold of flexbatch's answer to one.

Damage is done to GGUF files, to safetensors of GPTQ, AWQ and of our own 4 bits, and to ``config.json``; a file
that is still accepted must read as
the package ``gguf``, the package ``safetensors`` or the formats' description read it.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from flexbatch.checkpoint.derived import DerivedCheckpoint
from flexbatch.checkpoint.four_bits import packed_form
from flexbatch.checkpoint.gguf import GgufRecipe
from flexbatch.checkpoint.grouped import GroupedRecipe
from flexbatch.checkpoint.locate import locate
from flexbatch.checkpoint.reader import open_checkpoint
from flexbatch.checkpoint.tensors import Checkpoint, TensorEntry
from flexbatch.compression.groups import Packed, dequantize
from flexbatch.compression.quantize import quantize
from flexbatch.errors import ModelError, UsageError
from flexbatch.models.registry import family_of
from flexbatch.text.codec import TextCodec
from tests.checkpoint.gguf_files import Q, write_model
from tests.checkpoint.grouped_files import write_folder
from tests.tiny import tiny_model

_EXTREMES = (0, 1, 2, 255, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)
_JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 7, 2**31, 2**70, 1.5, -0.0, 1e300),
    *("", "4", "gptq", "awq", "x" * 300, [], [0], {}, {"a": 1}),
)
SLOWEST_S = 5.0
_FOLDERS = ("gptq", "awq", "own")


class Fuzz:
    """Base files in a folder, and cases made of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        model: Any = tiny_model("llama", settings=small | {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": 300})
        for name, vocabulary in (("spm", _sentencepiece()), ("bpe", _byte_pairs())):
            write_model(folder / f"{name}.gguf", model, "llama", (Q.Q4_0, Q.F16, Q.Q8_0), vocabulary=vocabulary)
        self._gguf = [(folder / f"{name}.gguf").read_bytes() for name in ("spm", "bpe")]
        write_folder(folder / "gptq", "qwen2", "gptq", 32)
        write_folder(folder / "awq", "qwen2", "awq", 64)
        write_own(folder / "own", model)
        self._safetensors = {name: (folder / name / "model.safetensors").read_bytes() for name in _FOLDERS}
        self._configs = {name: json.loads((folder / name / "config.json").read_text()) for name in _FOLDERS}

    def case(self, number: int) -> str:
        """Make case ``number``, try it, and return ``refused`` or ``accepted``; AssertionError where a rule is broken.

        Any other error that escapes is a breach, too.
        """
        rng = random.Random(number)
        started = time.perf_counter()
        kind = ("gguf", "gguf", "safetensors", "config")[number % 4]
        if kind == "gguf":
            path = self._folder / "case.gguf"
            path.write_bytes(damaged(rng, rng.choice(self._gguf)))
        else:
            method = rng.choice(_FOLDERS)
            path = self._folder / "case"
            path.mkdir(exist_ok=True)
            config, content = json.dumps(self._configs[method]).encode(), self._safetensors[method]
            if kind == "config":
                config = damaged_config(rng, self._configs[method])
            else:
                content = damaged(rng, content)
            (path / "config.json").write_bytes(config)
            (path / "model.safetensors").write_bytes(content)
        answer = _answer(path)
        assert time.perf_counter() - started < SLOWEST_S, f"case {number} is slow"
        return answer


def damaged(rng: random.Random, content: bytes) -> bytes:
    """Damage a file in one to three places, mostly in its header."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        header = min(len(data), rng.choice((64, 1500, 8000, len(data))))
        place = rng.randrange(max(1, header))
        width = rng.choice((1, 2, 4, 8))
        match rng.randrange(8):
            case 0 | 1:
                data[place : place + 1] = bytes([data[place] ^ (1 << rng.randrange(8))]) if data else b"\0"
            case 2:
                data[place : place + width] = rng.randbytes(width)
            case 3 | 4:
                extreme = rng.choice(_EXTREMES) % 2 ** (8 * width)
                data[place : place + width] = extreme.to_bytes(width, "little")
            case 5:
                del data[rng.randrange(len(data)) :]
            case 6:
                del data[place : place + width]
            case _:
                data[place:place] = rng.randbytes(width)
        if not data:
            break
    return bytes(data)


def damaged_config(rng: random.Random, config: dict[str, Any]) -> bytes:
    """Change, remove, add or misspell fields of a configuration or of its quantization; sometimes break the JSON."""
    changed = json.loads(json.dumps(config))
    for _ in range(rng.choice((1, 1, 2, 3))):
        inside = changed.get("quantization_config")
        target = inside if isinstance(inside, dict) and rng.random() < 0.7 else changed
        key = rng.choice(sorted(target)) if target else "bits"
        match rng.randrange(5):
            case 0 | 1:
                target[key] = rng.choice(_JUNK)
            case 2:
                del target[key]
            case 3:
                target[key[:-1] + rng.choice("abcxyz_")] = target.pop(key)
            case _:
                target[rng.choice(("dynamic", "lm_head", "version", "format", "checkpoint_format", "sym"))] = (
                    rng.choice(_JUNK)
                )
    text = json.dumps(changed).encode()
    return damaged(rng, text) if rng.random() < 0.2 else text


def _answer(path: Path) -> str:
    """Load a model as a run would, read everything; return what came of it."""
    try:
        folder = locate(str(path))
        checkpoint = open_checkpoint(folder, family_of(folder.shape).table(folder.shape))
        tensors = {name: _read(checkpoint, entry) for name, entry in checkpoint.entries.items()}
        codec = TextCodec.load_if_present(folder.path)
        if codec is not None:
            codec.decode(codec.encode("a b, 12 é\n"))
    except (ModelError, UsageError) as error:
        message = str(error)
        if "\n" in message or len(message) > 1000:
            raise AssertionError(f"not one clear line: {message}") from error
        return "refused"
    for name, entry in checkpoint.entries.items():
        assert tensors[name].nbytes == entry.nbytes
        assert entry.layout is not None or tensors[name].shape == entry.shape
    if isinstance(checkpoint, DerivedCheckpoint):
        (_check_gguf if path.is_file() else _check_grouped)(path, checkpoint, tensors)
    else:
        _check_own(path, checkpoint, tensors)
    return "accepted"


def write_own(path: Path, model: Any) -> None:
    """Write a folder whose layers are in our 4 bits, in one file."""
    path.mkdir()
    model.half().save_pretrained(path / "wide")
    config = json.loads((path / "wide" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "flexbatch", "version": 1, "bits": 4, "group_size": 64}
    (path / "config.json").write_text(json.dumps(config))
    tensors = load_file(path / "wide" / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        key, raw = packed_form(name, quantize(tensors.pop(name), method="minmax"))
        tensors[key] = raw
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    model.float()


def _read(checkpoint: Checkpoint, entry: TensorEntry) -> torch.Tensor:
    if entry.layout is None:
        return checkpoint.read(entry)
    raw = checkpoint.raw(entry)
    found = entry.view(raw)
    assert isinstance(found, Packed)
    assert found.shape == entry.shape
    assert dequantize(found).shape == entry.shape
    return raw


def _check_own(path: Path, checkpoint: Checkpoint, tensors: dict[str, torch.Tensor]) -> None:
    """An accepted folder reads as the package ``safetensors`` reads it, byte for byte."""
    try:
        stored = load_file(path / "model.safetensors")
    except (SafetensorError, ValueError, OSError) as error:
        raise AssertionError(f"accepted, but safetensors refuses it: {error}") from error
    for name, tensor in tensors.items():
        same = stored[checkpoint.entries[name].name].reshape(-1).view(torch.uint8)
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), same[: tensor.nbytes]), name


def _check_gguf(path: Path, checkpoint: DerivedCheckpoint, tensors: dict[str, torch.Tensor]) -> None:
    """An accepted file reads as the package ``gguf`` reads it, rows aside, which other tests are about."""
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, recipe in checkpoint.recipes.items():
        assert isinstance(recipe, GgufRecipe)
        other = read[recipe.tensor.name]
        with np.errstate(all="ignore"):
            values = torch.from_numpy(gguf.dequantize(other.data, other.tensor_type).copy())
        expected = recipe.stored.as_table(values).to(tensors[name].dtype)
        assert bool(torch.isclose(tensors[name], expected, rtol=0, atol=0, equal_nan=True).all()), name


def _check_grouped(path: Path, checkpoint: DerivedCheckpoint, tensors: dict[str, torch.Tensor]) -> None:
    """An accepted folder reads as the package ``safetensors`` and the formats' description say."""
    try:
        stored = load_file(path / "model.safetensors")
    except (SafetensorError, ValueError, OSError) as error:
        raise AssertionError(f"accepted, but safetensors refuses it: {error}") from error
    for name, tensor in tensors.items():
        recipe = checkpoint.recipes.get(checkpoint.entries[name].name)
        if recipe is None:
            same = stored[checkpoint.entries[name].name]
            assert torch.equal(tensor.view(torch.uint8), same.view(torch.uint8)), name
            continue
        assert isinstance(recipe, GroupedRecipe)
        module = checkpoint.entries[name].name.removesuffix(".weight")
        words, zeros, scales = (stored[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales"))
        shifts = torch.arange(0, 32, 4)
        if recipe.quantization.method == "gptq":
            codes = ((words.unsqueeze(1) >> shifts.view(1, 8, 1)) & 15).reshape(-1, words.shape[1])
            zeros = ((zeros.unsqueeze(2) >> shifts) & 15).reshape(zeros.shape[0], -1)
            zeros = zeros + (0 if recipe.quantization.symmetric and bool((zeros == 8).all()) else 1)
            if recipe.quantization.zero_offset == 0:
                zeros = zeros - 1
            groups = stored[f"{module}.g_idx"].long() if f"{module}.g_idx" in stored else None
        else:
            order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7]) * 4
            codes = ((words.unsqueeze(2) >> order) & 15).reshape(words.shape[0], -1)
            zeros = ((zeros.unsqueeze(2) >> order) & 15).reshape(zeros.shape[0], -1)
            groups = None
        if groups is None:
            groups = torch.arange(codes.shape[0]) // recipe.quantization.group
        values = ((codes - zeros[groups]).float() * scales[groups].float()).to(scales.dtype)
        assert torch.equal(tensor, values.t()), name


def _sentencepiece() -> dict[str, Any]:
    letters = [*"abcdefghij., 12", "\u2581"]
    pieces = [*letters, "ab", "cd", "abcd", "\u2581a", "\u2581b"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    return {
        "ggml.model": "llama",
        "ggml.tokens": tokens,
        "ggml.scores": [0.0] * 259 + [-float(n) for n in range(len(pieces))],
        "ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(pieces)],
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.unknown_token_id": 0,
        "chat_template": "{{ messages[0].content }}",
    }


def _byte_pairs() -> dict[str, Any]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    merges = ["a b", "c d", "ab cd", "\u0120 a"]
    return {
        "ggml.model": "gpt2",
        "ggml.pre": "llama-bpe",
        "ggml.tokens": [*letters, *(merge.replace(" ", "") for merge in merges), "<|end|>"],
        "ggml.merges": merges,
        "ggml.token_type": [1] * 260 + [3],
        "ggml.bos_token_id": 260,
        "ggml.eos_token_id": 260,
    }
