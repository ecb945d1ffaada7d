"""Tokenizers of both kinds: the demo model's (sentencepiece-like, bytes as fallback) and a byte-level BPE made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import flexbatch.errors
from flexbatch.text.codec import TextCodec

DEMO = Path(flexbatch.errors.__file__).parent / "assets" / "demo"

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('system must come first') }}{% endif %}"
    "<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SENTENCES = [
    "Once upon a time there was a little cat who liked to play in the garden.",
    "The cat said: stop! and the dog did not stop, so the cat ran away.",
    "naïve café 你好世界 привет 😀👍🏽 ok ok ok",
    "stop stopping stopped; one two three.\n\nQ: what? A: that.",
] * 8


def byte_level_folder(folder: Path) -> Path:
    """Train a small byte-level BPE tokenizer with a chat template and save it to ``folder``."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", bos_token="<|start|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def bpe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the byte-level tokenizer."""
    return byte_level_folder(tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="session")
def bpe(bpe_folder: Path) -> TextCodec:
    """Byte-level BPE with a chat template."""
    return TextCodec.load(bpe_folder)


@pytest.fixture(scope="session")
def llama() -> TextCodec:
    """The demo model's tokenizer: Llama 2's, without a chat template."""
    return TextCodec.load(DEMO)


@pytest.fixture(params=["bpe", "llama"])
def codec(request: pytest.FixtureRequest) -> TextCodec:
    """Each of the two in turn."""
    value: TextCodec = request.getfixturevalue(request.param)
    return value
