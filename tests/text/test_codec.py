"""Encoding, chat templates and decoding against transformers itself."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import flexbatch.errors
from flexbatch.errors import InputError, ModelError
from flexbatch.text.codec import TextCodec

DEMO = Path(flexbatch.errors.__file__).parent / "assets" / "demo"
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who are you? 😀"},
]
TEXTS = ["", " ", "Once upon a time", "a  b\n\nc", "naïve café 你好 👍🏽", "<|end|> and </s> and <s>", "x" * 3000]


def load(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


@pytest.mark.parametrize("kind", ["bpe", "llama"])
def test_encode_and_decode_equal_transformers(kind: str, bpe_folder: Path) -> None:
    folder = bpe_folder if kind == "bpe" else DEMO
    codec, oracle = TextCodec.load(folder), load(folder)
    for text in TEXTS:
        assert codec.encode(text) == tuple(oracle.encode(text))
        ids = codec.encode(text)
        assert codec.decode(ids) == oracle.decode(ids, skip_special_tokens=True)
    rng = random.Random(1)
    for _ in range(50):
        ids = tuple(rng.randrange(codec.vocab_size) for _ in range(rng.randrange(30)))
        assert codec.decode(ids) == oracle.decode(list(ids), skip_special_tokens=True)
    assert codec.vocab_size == len(oracle)


def test_special_tokens_by_default_are_the_tokenizers(llama: TextCodec) -> None:
    assert llama.encode("Hello")[0] == 1  # Llama puts <s> first
    assert llama.encode_many(["Hello"], special_tokens=False)[0] == llama.encode("Hello")[1:]


def test_many_texts_encode_as_each_alone(codec: TextCodec) -> None:
    rng = random.Random(2)
    texts = TEXTS + [" ".join(rng.choices(["cat", "dog", "ran", "é", "😀"], k=rng.randrange(60))) for _ in range(700)]
    assert codec.encode_many(texts) == [codec.encode(text) for text in texts]
    assert codec.encode_many([]) == []


def test_no_truncation_or_padding_from_the_tokenizer_file(bpe_folder: Path, bpe: TextCodec, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(bpe_folder, folder)
    data = json.loads((folder / "tokenizer.json").read_text())
    data["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    data["padding"] = {
        "strategy": {"Fixed": 12},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|end|>",
    }
    (folder / "tokenizer.json").write_text(json.dumps(data))
    assert TextCodec.load(folder).encode_many(TEXTS) == bpe.encode_many(TEXTS)


def test_chat_equals_transformers(bpe: TextCodec, bpe_folder: Path, llama: TextCodec) -> None:
    oracle = load(bpe_folder)
    expected = oracle.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert bpe.encode_chat(CHAT) == tuple(expected)
    assert bpe.render_chat(CHAT).endswith("<|start|>assistant\n")
    template = "{% for m in messages %}{{ bos_token }}{{ m['content'] }}|{% endfor %}"
    oracle = load(DEMO)
    expected = oracle.apply_chat_template(CHAT, chat_template=template, add_generation_prompt=True, return_dict=False)
    ids = llama.encode_chat(CHAT, template)
    assert ids == tuple(expected)
    assert ids.count(1) == 2  # the template's own <s>, and no third one


def test_parts_of_text_are_joined(bpe: TextCodec) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": "you"}]}]
    assert bpe.encode_chat(parts) == bpe.encode_chat([{"role": "user", "content": "Hi you"}])


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "non-empty list"),
        ("hello", "non-empty list"),
        ({"role": "user"}, "non-empty list"),
        (["hello"], "messages[0] must be an object"),
        ([{"content": "x"}], "messages[0] has no role"),
        ([{"role": "user"}], "messages[0] has no content"),
        ([{"role": 3, "content": "x"}], "messages[0].role must be a string, not int"),
        ([{"role": "user", "content": None}], "messages[0].content must be a string or a list of text parts, not null"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "'image_url'"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0] must be an object"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], "content[0].text must be a string"),
        ([CHAT[1], CHAT[0]], "system must come first"),
        ([{"role": "user", "content": "\ud800"}], "surrogate"),
    ],
)
def test_bad_messages_are_one_line(bpe: TextCodec, messages: Any, words: str) -> None:
    with pytest.raises(InputError) as caught:
        bpe.encode_chat(messages)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("template", ["{% if %}", "{{ messages.nothing.more }}", "{{ 1 / 0 }}", "{{ '' }}"])
def test_broken_template_is_one_line(llama: TextCodec, template: str) -> None:
    with pytest.raises(InputError, match="chat template") as caught:
        llama.encode_chat(CHAT, template)
    assert "\n" not in str(caught.value)


def test_no_template(llama: TextCodec, bpe: TextCodec) -> None:
    assert bpe.has_template
    assert not llama.has_template
    with pytest.raises(ModelError, match="--chat-template"):
        llama.encode_chat(CHAT)


def test_bad_text_is_refused_with_its_place(codec: TextCodec) -> None:
    with pytest.raises(InputError, match=r"^character 2 is half of a surrogate pair \(\\ud800\)"):
        codec.encode("ab\ud800")
    with pytest.raises(InputError, match=r"^text 1: character 0 "):
        codec.encode_many(["ok", "\udfff"])


def test_missing_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match=r"tokenizer\.json .* is missing"):
        TextCodec.load(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(ModelError, match=r"no tokenizer: merges\.txt is missing"):
        TextCodec.load(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": 3}', '{"version": "1.0", "model": {"type": "None"}}'])
def test_broken_tokenizer_file_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="tokenizer cannot be read") as caught:
        TextCodec.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_remote_code_is_not_run(bpe_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "custom"
    shutil.copytree(bpe_folder, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "Custom"
    config["auto_map"] = {"AutoTokenizer": ["code.Custom", "code.Custom"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('this ran')")
    try:
        codec = TextCodec.load(folder)
    except ModelError:
        return
    assert codec.encode("cat") == TextCodec.load(bpe_folder).encode("cat")


def test_bytes_of_tokens_make_up_the_text(codec: TextCodec) -> None:
    for text in ["Once upon a  time, naïve", "你好 👍🏽 \n\tok", "ok"]:
        ids = [token for token in codec.encode(text) if codec.shows(token)]
        pieces = [codec.token_bytes(token) for token in ids]
        assert b"".join(piece for piece in pieces if piece is not None).decode().removeprefix(" ") == codec.decode(ids)
        assert None not in pieces


def test_text_of_single_tokens(llama: TextCodec, bpe: TextCodec) -> None:
    assert [llama.token_text(token) for token in llama.encode("the cat")] == ["<s>", " the", " cat"]
    assert bpe.token_text(0) == "<|start|>"
    assert llama.token_bytes(3 + 0xF0) == b"\xf0"
    assert llama.token_text(3 + 0xF0) == "\ufffd"
    assert llama.token_bytes(10**6) is None
    assert llama.token_text(10**6) == ""
    assert not llama.shows(10**6)
    assert not llama.shows(1)
