"""Text to token ids and back, through the model's own tokenizer and chat template (transformers).

Knows nothing of requests or files of rows; an error about a text is raised for the caller to say which row it was.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from flexbatch.checkpoint.gguf_file import read_gguf
from flexbatch.errors import InputError, ModelError
from flexbatch.text.chat import plain_messages
from flexbatch.text.gguf_tokenizer import gguf_tokenizer, has_tokenizer
from flexbatch.text.pieces import Pieces

_FILE_SETS = (
    ("tokenizer.json",),
    ("vocab.json", "merges.txt"),
    ("tokenizer.model",),
    ("vocab.txt",),
    ("tekken.json",),
)
_GENERATION = re.compile(r"\{%-?\s*generation\b")
_BATCH = 256  # texts per batch call: offsets and masks of a batch take a few hundred bytes per token until it is done


class TextCodec:
    """One model's tokenizer. Make it with ``TextCodec.load``; ``tokenizer`` is transformers'."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        self._tokenizer = tokenizer
        self._name = name
        self._skipped = frozenset(t for t, added in tokenizer.added_tokens_decoder.items() if added.special)

    @classmethod
    def load(cls, path: Path) -> TextCodec:
        """Read the tokenizer in the folder (or GGUF file) ``path``; nothing is fetched, no code of the model is run.

        Raises ModelError when its files are missing or cannot be used.
        """
        if path.is_file():
            return cls(gguf_tokenizer(read_gguf(path)), str(path))
        if not any(all((path / name).is_file() for name in names) for names in _FILE_SETS):
            pair = [name for name in ("vocab.json", "merges.txt") if not (path / name).is_file()]
            missing = pair[0] if len(pair) == 1 else "tokenizer.json (or vocab.json and merges.txt, or tokenizer.model)"
            raise ModelError(f"{path}: no tokenizer: {missing} is missing; put the model's tokenizer files there")
        from transformers import AutoTokenizer  # seconds to import: only when there is something to load

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # whatever a broken file makes transformers raise: a JSON, key, type or Rust error
            raise ModelError(
                f"{path}: the tokenizer cannot be read ({_line(error)}); are its files complete, and does it need "
                "custom code or an extra package?"
            ) from error
        return cls(tokenizer, str(path))

    @classmethod
    def load_if_present(cls, path: Path) -> TextCodec | None:
        """Read the tokenizer in the folder (or GGUF file) ``path``, or return None if it has none: ids need none."""
        if path.is_file():
            file = read_gguf(path)
            return cls(gguf_tokenizer(file), str(path)) if has_tokenizer(file) else None
        return cls.load(path) if any(all((path / name).is_file() for name in names) for names in _FILE_SETS) else None

    def save(self, folder: Path) -> None:
        """Write the tokenizer and its chat template to ``folder``, as ``load`` reads them."""
        self._tokenizer.save_pretrained(str(folder))

    @property
    def tokenizer(self) -> Any:
        """The tokenizer itself, transformers' own."""
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added ones included."""
        return len(self._tokenizer)

    @property
    def eos_token_id(self) -> int | None:
        """The token that the tokenizer ends a text with, or None."""
        token = self._tokenizer.eos_token_id
        return token if isinstance(token, int) else None

    @property
    def has_template(self) -> bool:
        """Whether the model brings a chat template."""
        return bool(self._tokenizer.chat_template)

    def marks_answers(self, template: str | None = None) -> bool:
        """Whether the template itself marks what the assistant says (``{% generation %}``)."""
        text = template if template is not None else self._tokenizer.chat_template
        return isinstance(text, str) and _GENERATION.search(text) is not None

    def encode(self, text: str) -> tuple[int, ...]:
        """Encode with the tokenizer's default special tokens. InputError: not valid Unicode."""
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str], *, special_tokens: bool = True) -> list[tuple[int, ...]]:
        """Encode texts in batches, each as ``encode`` does; without special tokens for rendered templates.

        Raises InputError for a text that is not valid Unicode, the text's place (from 0) in its message if several.
        """
        for index, text in enumerate(texts):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                where = f"text {index}: " if len(texts) > 1 else ""
                raise InputError(
                    f"{where}character {error.start} is half of a surrogate pair (\\u{ord(text[error.start]):04x}), "
                    "not valid Unicode"
                ) from error
        out: list[tuple[int, ...]] = []
        for start in range(0, len(texts), _BATCH):
            batch = self._tokenizer(
                list(texts[start : start + _BATCH]),
                add_special_tokens=special_tokens,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
            out.extend(tuple(ids) for ids in batch["input_ids"])
        return out

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], template: str | None = None, *, answer: bool = True
    ) -> str:
        """Render messages with Jinja text ``template`` or else the model's own.

        ``answer``: ready for the assistant's answer; without it, as they are. Raises InputError for malformed
        messages, and with the template's own words when it refuses them or is broken; ModelError when there is no
        template.
        """
        text = self._apply_template(messages, template, add_generation_prompt=answer, tokenize=False)
        if not text:
            raise InputError("the chat template renders nothing for the messages")
        return str(text)

    def encode_answers(
        self, messages: Sequence[Mapping[str, Any]], template: str | None = None
    ) -> tuple[tuple[int, ...], tuple[bool, ...]]:
        """Return the tokens of a whole chat, and which of them a template that ``marks_answers`` says are answers.

        Raises as ``render_chat`` does.
        """
        encoded = self._apply_template(
            messages, template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return tuple(encoded["input_ids"]), tuple(bool(mark) for mark in encoded["assistant_masks"])

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], template: str | None = None) -> tuple[int, ...]:
        """Encode what ``render_chat`` gives, no special tokens added; the same errors."""
        return self.encode_many([self.render_chat(messages, template)], special_tokens=False)[0]

    def _apply_template(self, messages: Sequence[Mapping[str, Any]], template: str | None, **how: bool) -> Any:
        if template is None and not self.has_template:
            raise ModelError(f"{self._name} has no chat template: give one with --chat-template FILE, or use prompt")
        plain = plain_messages(messages)
        try:
            return self._tokenizer.apply_chat_template(plain, chat_template=template, **how)
        except Exception as error:  # a template can raise anything: its own refusal, a type error, a missing key
            raise InputError(f"the chat template refuses the messages: {_line(error)}") from error

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids without special tokens, exactly as transformers' ``decode`` gives it."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def shows(self, token: int) -> bool:
        """Whether ``decode`` looks at the token at all: it is in the vocabulary and not a special one."""
        return token not in self._skipped and self._tokenizer.convert_ids_to_tokens(token) is not None

    def token_bytes(self, token: int) -> bytes | None:
        """Return the exact bytes of one token, its leading space included; None where they are not known."""
        return self._pieces.bytes_of(token)

    def token_text(self, token: int) -> str:
        """Return one token as text, special ones by name; an incomplete character shows as U+FFFD."""
        known = self.token_bytes(token)
        if known is not None:
            return known.decode("utf-8", "replace")
        return str(self._tokenizer.decode([token]))

    @cached_property
    def _pieces(self) -> Pieces:
        return Pieces(self._tokenizer)


def _line(error: Exception) -> str:
    """An error as one short line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."
