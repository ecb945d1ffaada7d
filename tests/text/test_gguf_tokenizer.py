"""Tokenizers from GGUF vocabularies: against sentencepiece's rule written out, and against ``tokenizers``.

llama.cpp's own vectors are checked where FLEXBATCH_GGUF_VOCABULARIES names their folder (see
``scripts/check_vocabularies.py``).
"""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from flexbatch.errors import ModelError
from flexbatch.text.codec import TextCodec

ROOT = Path(__file__).resolve().parents[2]
NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6
TEXTS = (ROOT / "benchmarks" / "prompts.txt").read_text(encoding="utf-8")[:20000]
ALPHABET = "abcdefghij ABC 0123456789  \n\t.,!?'s'll'RE-_$<>=é漢字😀\u00a0Ⅷ½"


def write_vocabulary(path: Path, settings: Mapping[str, Any]) -> Path:
    """Write a GGUF file with a vocabulary only; lists as given, numbers by their Python type."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in settings.items():
        full = key if key.startswith("tokenizer.") else f"tokenizer.ggml.{key}"
        if isinstance(value, bool):
            writer.add_bool(full, value)
        elif isinstance(value, int):
            writer.add_uint32(full, value)
        elif isinstance(value, str):
            writer.add_string(full, value)
        else:
            writer.add_array(full, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_texts(seed: int, count: int = 150) -> list[str]:
    rng = random.Random(seed)
    made = ["".join(rng.choice(ALPHABET) for _ in range(rng.randint(1, 40))) for _ in range(count)]
    words = TEXTS.split(" ")
    return made + [" ".join(rng.choice(words) for _ in range(12)) for _ in range(count)]


# --- sentencepiece -------------------------------------------------------------------------------------------------


def sentencepiece(seed: int = 0) -> dict[str, Any]:
    """A made-up vocabulary: bytes, characters, and pieces that are built of each other."""
    rng = random.Random(seed)
    letters = [*"abcdefghijABC.,!?'0123456789", "\u2581", "é"]
    pieces = list(letters)
    while len(pieces) < 300:
        piece = rng.choice(pieces) + rng.choice(pieces)
        if len(piece) <= 9 and piece not in pieces:
            pieces.append(piece)
    special = ["<unk>", "<s>", "</s>", "<tool>"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    order = list(range(len(pieces) - len(letters)))
    rng.shuffle(order)
    scores = [0.0] * (len(special) + 256) + [-1000.0] * len(letters) + [-float(rank) for rank in order]
    kinds = [UNKNOWN, CONTROL, CONTROL, USER, *[BYTE] * 256, *[NORMAL] * len(pieces)]
    ends = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    return {"model": "llama", "pre": "default", "tokens": tokens, "scores": scores, "token_type": kinds, **ends}


def merged(text: str, settings: Mapping[str, Any]) -> list[int]:
    """Sentencepiece's rule: whichever neighbours make the piece of the highest score are joined, the leftmost first."""
    ids = {token: index for index, token in enumerate(settings["tokens"]) if settings["token_type"][index] == NORMAL}
    parts = list("\u2581" + text.replace(" ", "\u2581"))
    while True:
        pairs = [
            (-settings["scores"][ids[left + right]], place)
            for place, (left, right) in enumerate(itertools.pairwise(parts))
            if left + right in ids
        ]
        if not pairs:
            break
        place = min(pairs)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    first_byte = settings["tokens"].index("<0x00>")
    out = []
    for part in parts:
        out += [ids[part]] if part in ids else [first_byte + byte for byte in part.encode()]
    return out


def test_sentencepiece_merges_by_score_with_bytes_for_the_rest(tmp_path: Path) -> None:
    for seed in range(3):
        settings = sentencepiece(seed)
        codec = TextCodec.load(write_vocabulary(tmp_path / f"{seed}.gguf", settings))
        for text in (text.replace("<", "") for text in random_texts(seed)):
            expected = merged(text, settings)
            assert codec.encode_many([text], special_tokens=False)[0] == tuple(expected), text
            assert codec.encode(text) == (1, *expected)
            assert codec.decode(expected) == text


def test_sentencepiece_special_tokens_and_prefix(tmp_path: Path) -> None:
    settings = sentencepiece()
    codec = TextCodec.load(write_vocabulary(tmp_path / "a.gguf", settings))
    tool = settings["tokens"].index("<tool>")
    ids = codec.encode("<s>ab<tool>")
    assert ids[:2] == (1, 1)
    assert ids[-1] == tool
    assert codec.decode([1, tool, 2]) == "<tool>"
    settings |= {"add_space_prefix": False, "add_bos_token": False, "add_eos_token": True}
    codec = TextCodec.load(write_vocabulary(tmp_path / "b.gguf", settings))
    a = len(settings["tokens"]) - 300
    assert codec.encode("a") == (a, 2)
    assert codec.decode([a]) == "a"


# --- pairs of bytes ------------------------------------------------------------------------------------------------

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def oracle(pre: str) -> Tokenizer:
    """A tokenizer trained on a page, split as the model's own ``tokenizer.json`` does."""
    bare = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    if pre == "gpt-2":
        tokenizer.pre_tokenizer = words
    elif pre == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    else:
        pattern = LLAMA3 if pre == "llama-bpe" else LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bare])
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([TEXTS, ALPHABET * 3], trainer)
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


def byte_pairs(tokenizer: Tokenizer, pre: str) -> dict[str, Any]:
    model = json.loads(tokenizer.to_str())["model"]
    ids = tokenizer.get_vocab()
    tokens = sorted(ids, key=lambda token: ids[token])
    kinds = [CONTROL if token == "<|end|>" else NORMAL for token in tokens]
    merges = [" ".join(pair) for pair in model["merges"]]
    end = ids["<|end|>"]
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": kinds,
        "merges": merges,
        "bos_token_id": end,
        "eos_token_id": end,
    }


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_byte_pairs_split_as_the_model_does(pre: str, tmp_path: Path) -> None:
    wanted = oracle(pre)
    codec = TextCodec.load(write_vocabulary(tmp_path / "a.gguf", byte_pairs(wanted, pre)))
    for text in [*random_texts(1), "e\u0301 <|end|>2024 1234567"]:
        ids = wanted.encode(text).ids
        assert list(codec.encode_many([text], special_tokens=False)[0]) == ids, text
        assert codec.decode(ids) == wanted.decode(ids)
    bos = () if pre != "llama-bpe" else (wanted.token_to_id("<|end|>"),)
    assert codec.encode("a") == (*bos, *wanted.encode("a").ids)


def test_the_default_splits_punctuation_and_digits_by_three(tmp_path: Path) -> None:
    settings = byte_pairs(oracle("gpt-2"), "default")
    settings["tokens"] += ["12", "34", "123", "!!", "a!"]
    settings["merges"] += ["1 2", "3 4", "12 3", "! !", "a !"]
    settings["token_type"] += [NORMAL] * 5
    codec = TextCodec.load(write_vocabulary(tmp_path / "a.gguf", settings))
    pieces = [codec.token_text(token) for token in codec.encode("a!! 12345")]
    assert pieces == ["a", "!!", " ", "123", "4", "5"]
    del settings["pre"]
    other = TextCodec.load(write_vocabulary(tmp_path / "b.gguf", settings))
    assert other.encode("a!! 12345") == codec.encode("a!! 12345")


def test_the_chat_template_in_the_file_is_used(tmp_path: Path) -> None:
    template = "{% for m in messages %}<|end|>{{ m.role }}: {{ m.content }}{% endfor %}{{ bos_token }}"
    settings = byte_pairs(oracle("gpt-2"), "gpt-2") | {"tokenizer.chat_template": template}
    codec = TextCodec.load(write_vocabulary(tmp_path / "a.gguf", settings))
    assert codec.render_chat([{"role": "user", "content": "hi"}]) == "<|end|>user: hi<|end|>"
    assert codec.encode_chat([{"role": "user", "content": "hi"}])[0] == settings["eos_token_id"]


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "t5"}, "tokenizer.ggml.model is 't5'"),
        ({"pre": "tekken"}, "tokenizer.ggml.pre is 'tekken'"),
        ({"token_type": [1, 2]}, "tokenizer.ggml.token_type must be a list of 701"),
        ({"tokens": ["a", "b", "a"], "token_type": [1, 1, 1]}, "the token 'a' twice"),
        ({"merges": ["a nothing-like-it"]}, "entry 0 is no pair"),
        ({"merges": 3}, "tokenizer.ggml.merges must be a list"),
        ({"bos_token_id": 701}, "bos_token_id is 701"),
        ({"eos_token_id": "x"}, "eos_token_id is x"),
        ({"add_bos_token": 1}, "add_bos_token is 1"),
        ({"tokens": ["a", "b"], "token_type": [1, 1], "bos_token_id": 0, "eos_token_id": 1}, "no token for the byte"),
        ({"tokenizer.chat_template": 3}, "chat_template must be text"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_used_is_refused_by_name(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    settings = byte_pairs(oracle("gpt-2"), "gpt-2") | change
    path = write_vocabulary(tmp_path / "a.gguf", settings)
    with pytest.raises(ModelError) as caught:
        TextCodec.load(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sentencepiece_refusals(tmp_path: Path) -> None:
    for change, words in (
        ({"scores": [0.0, 1.0]}, "scores must be a list"),
        ({"scores": [float("nan")] * 560}, "not finite"),
        ({"token_type": [9] * 560}, "a type that does not exist"),
    ):
        path = tmp_path / "a.gguf"
        with pytest.raises(ModelError, match=words):
            TextCodec.load(write_vocabulary(path, sentencepiece() | change))


def test_a_file_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    path = write_vocabulary(tmp_path / "a.gguf", {"model": "none"})
    assert TextCodec.load_if_present(path) is None


@pytest.mark.skipif(
    "FLEXBATCH_GGUF_VOCABULARIES" not in os.environ,
    reason="FLEXBATCH_GGUF_VOCABULARIES does not name a folder of llama.cpp's vocabularies",
)
def test_llama_cpp_s_vectors() -> None:
    command = [
        sys.executable,
        str(ROOT / "scripts" / "check_vocabularies.py"),
        os.environ["FLEXBATCH_GGUF_VOCABULARIES"],
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("47 of 47") == 4
