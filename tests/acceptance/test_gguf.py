"""The program on a GGUF file: text and chat rows, facts, and one line for a file that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flexbatch.cli.main import main
from flexbatch.text.codec import TextCodec
from tests.checkpoint.gguf_files import SETTINGS, Q, write_model
from tests.text.test_gguf_tokenizer import byte_pairs, oracle
from tests.tiny import tiny_model

TEMPLATE = "{% for m in messages %}<|end|>{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    vocabulary = {f"ggml.{key}": value for key, value in byte_pairs(oracle("smollm"), "smollm").items()}
    model: Any = tiny_model("llama", settings=SETTINGS["llama"] | {"vocab_size": len(vocabulary["ggml.tokens"])})
    path = tmp_path / "model.gguf"
    write_model(path, model, "llama", (Q.F32,), vocabulary=vocabulary | {"chat_template": TEMPLATE})
    return path


def test_rows_of_text_and_chat(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"id": "text", "prompt": "In 2024 it's", "max_tokens": 9},
        {"id": "chat", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 9},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["run", "--model", str(file), "-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]
    assert main([*command, "--device", "cpu", "--ignore-eos"]) == 0
    capsys.readouterr()
    done = {row["id"]: row for row in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())}
    codec = TextCodec.load(file)
    assert done["text"]["prompt_tokens"] == len(oracle("smollm").encode("In 2024 it's").ids)
    assert codec.render_chat([{"role": "user", "content": "hello"}]) == "<|end|>user: hello\nassistant:"
    model: Any = tiny_model("llama", settings=SETTINGS["llama"] | {"vocab_size": codec.vocab_size})
    prompts = {"text": codec.encode("In 2024 it's"), "chat": codec.encode("<|end|>user: hello\nassistant:")}
    for name, prompt in prompts.items():
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=9, min_new_tokens=9, do_sample=False, eos_token_id=None
        )
        assert done[name]["token_ids"] == expected[0, len(prompt) :].tolist()


def test_facts(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--model", str(file), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["format"].startswith("GGUF, 30 tensors F32; ")
    assert facts["architecture"] == "LlamaForCausalLM"
    assert facts["eos_token_ids"] == [TextCodec.load(file).encode("<|end|>")[0]]


def test_one_line_and_exit_code_2(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:-40000])
    for model, words in ((file, "bytes are missing"), (file.with_name("other.gguf"), "no such file")):
        assert main(["info", "--model", str(model)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert words in err
        assert err.count("\n") == 1
    assert main(["info", "--model", str(file.parent)]) == 2
    assert "give one of them" in capsys.readouterr().err
