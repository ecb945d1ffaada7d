"""The exact bytes that one token stands for, read from the vocabulary and the kind of its decoder.

Knows nothing of sequences of tokens: what a decoder does at the start of a text (dropping a space) is not done here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Pieces:
    """Token id -> bytes, for byte-level vocabularies (GPT-2, Llama 3, Qwen) and sentencepiece ones (Llama 2, Mistral).

    ``tokenizer`` is transformers'. For other kinds, and without a fast tokenizer behind it, nothing is known.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added: dict[int, str] = {token: added.content for token, added in tokenizer.added_tokens_decoder.items()}
        parts = list(_decoders(tokenizer))
        self._byte_level = BYTE_ALPHABET if any(part["type"] == "ByteLevel" for part in parts) else {}
        self._byte_fallback = any(part["type"] == "ByteFallback" for part in parts)
        self._space = next(filter(None, map(_space_mark, parts)), "")

    def bytes_of(self, token: int) -> bytes | None:
        """Return the token's bytes (an incomplete character's, too), or None where they are not known."""
        added = self._added.get(token)
        if added is not None:
            return added.encode()
        piece: str | None = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return None
        if self._byte_level:
            known = all(char in self._byte_level for char in piece)
            return bytes(self._byte_level[char] for char in piece) if known else piece.encode()
        if self._byte_fallback and (match := _BYTE.fullmatch(piece)):
            return bytes([int(match.group(1), 16)])
        return piece.replace(self._space, " ").encode() if self._space else None


def _decoders(tokenizer: Any) -> Iterator[dict[str, Any]]:
    """The steps of the tokenizer's decoder, a sequence's one by one."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return
    description = json.loads(decoder.__getstate__())
    yield from description["decoders"] if description["type"] == "Sequence" else (description,)


def _space_mark(decoder: dict[str, Any]) -> str:
    """The character that stands for a space in the vocabulary, or an empty string."""
    if decoder["type"] == "Metaspace":
        return str(decoder["replacement"])
    if decoder["type"] == "Replace" and decoder["content"] == " ":
        return str(decoder["pattern"].get("String", ""))
    return ""


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes for the characters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_ALPHABET = _byte_alphabet()
"""The character that stands for each byte in byte-level vocabularies."""
