"""The tokenizer inside a GGUF file, as a fast tokenizer of transformers, chat template included.

Knows llama.cpp's keys, its two supported kinds of vocabulary and its names of ways to split text; what is unknown is
refused by name. Knows nothing of prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flexbatch.checkpoint.gguf_file import GgufFile
from flexbatch.errors import ModelError
from flexbatch.text.pieces import BYTE_ALPHABET

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_MAX_PIECES = 2**24  # characters of all pieces together: each one is tried as the border of a merge
_SPACE = "\u2581"
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"


def _tiktoken(digits: str) -> str:
    """How Llama 3 and Qwen 2 split; they differ in how many ``digits`` stay together."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


@dataclass(frozen=True, slots=True)
class _Splitting:
    """How text is cut before pairs are merged: patterns, one after the other. ``whole``: known words are not merged."""

    patterns: tuple[str, ...]
    nfc: bool = False
    whole: bool = False
    add_bos: bool = False


_LLAMA3 = _Splitting((_tiktoken(r"\p{N}{1,3}"),), whole=True, add_bos=True)
_QWEN2 = _Splitting((_tiktoken(r"\p{N}"),), nfc=True)
SPLITTINGS: dict[str, _Splitting] = {
    "default": _Splitting((r"[\p{P}\$\+<=>\^~\|]+", _WORDS, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": _Splitting((_WORDS,)),
    "smollm": _Splitting((r"\p{N}", _WORDS)),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}
"""llama.cpp's names (``tokenizer.ggml.pre``) of the supported ways to split text."""


def gguf_tokenizer(file: GgufFile) -> Any:
    """Return transformers' tokenizer for the vocabulary in a file.

    Raises ModelError, naming the key, on a kind or a way of splitting that is not supported, and on a malformed list.
    """
    from transformers import PreTrainedTokenizerFast  # seconds to import: only when there is something to load

    vocabulary = _Vocabulary(file)
    built = _build(vocabulary)
    names = {
        "bos_token": vocabulary.special("bos_token_id"),
        "eos_token": vocabulary.special("eos_token_id"),
        "unk_token": vocabulary.special("unknown_token_id"),
        "pad_token": vocabulary.special("padding_token_id"),
    }
    template = file.metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise vocabulary.wrong("tokenizer.chat_template must be text")
    return PreTrainedTokenizerFast(
        tokenizer_object=built,
        clean_up_tokenization_spaces=False,
        chat_template=template,
        **{name: vocabulary.tokens[token] for name, token in names.items() if token is not None},
    )


def has_tokenizer(file: GgufFile) -> bool:
    """Return whether the file brings a vocabulary at all."""
    return "tokenizer.ggml.tokens" in file.metadata


def _build(vocabulary: _Vocabulary) -> Tokenizer:
    kind = vocabulary.get("model", str, None)
    if kind not in ("llama", "gpt2"):
        raise ModelError(
            f"{vocabulary.path}: tokenizer.ggml.model is {str(kind)[:40]!r}; supported are llama (sentencepiece with "
            "scores) and gpt2 (pairs of bytes)"
        )
    make: Callable[[_Vocabulary], Tokenizer] = _sentencepiece if kind == "llama" else _byte_pairs
    try:
        return make(vocabulary)
    except ModelError:
        raise
    except Exception as error:  # the library's own errors have no common class
        reason = " ".join(str(error).split())[:200]
        raise vocabulary.wrong(f"the vocabulary makes no tokenizer ({reason})") from error


def _sentencepiece(vocabulary: _Vocabulary) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    prefix = vocabulary.get("add_space_prefix", bool, True)
    unknown = vocabulary.special("unknown_token_id")
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary.ids,
            merges=_merges_by_score(vocabulary),
            unk_token=vocabulary.tokens[0 if unknown is None else unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    before = [normalizers.Prepend(_SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", _SPACE)])
    after = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    return _finished(tokenizer, vocabulary, add_bos=True)


def _merges_by_score(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """Sentencepiece merges whichever neighbours make the piece of the highest score: the same, as a list of pairs."""
    scores = vocabulary.numbers("scores", float, required=True)
    if sum(map(len, vocabulary.tokens)) > _MAX_PIECES:
        raise vocabulary.wrong(f"tokenizer.ggml.tokens holds more than {_MAX_PIECES} characters")
    pieces = {
        token: score
        for token, score, kind in zip(vocabulary.tokens, scores, vocabulary.kinds, strict=True)
        if kind == _NORMAL
    }
    if any(not math.isfinite(score) for score in pieces.values()):
        raise vocabulary.wrong("tokenizer.ggml.scores holds a score that is not finite")
    found = []
    for piece, score in pieces.items():
        for border in range(1, len(piece)):
            left, right = piece[:border], piece[border:]
            if left in pieces and right in pieces:
                found.append((-score, -len(left), left, right))
    found.sort(key=lambda merge: merge[:2])
    return [(left, right) for _, _, left, right in found]


def _byte_pairs(vocabulary: _Vocabulary) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = vocabulary.get("pre", str, "default")
    splitting = SPLITTINGS.get(name)
    if splitting is None:
        raise ModelError(
            f"{vocabulary.path}: tokenizer.ggml.pre is {name[:40]!r}, which is not supported; supported are "
            + ", ".join(SPLITTINGS)
        )
    # Some vocabularies lack bytes that their training text never had; none lacks a letter.
    missing = [byte for char, byte in BYTE_ALPHABET.items() if 32 <= byte < 127 and char not in vocabulary.ids]
    if missing:
        raise vocabulary.wrong(f"tokenizer.ggml.tokens has no token for the byte {missing[0]}")
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary.ids, merges=_pairs(vocabulary), ignore_merges=splitting.whole, fuse_unk=False)
    )
    if splitting.nfc:
        tokenizer.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splitting.patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return _finished(tokenizer, vocabulary, add_bos=splitting.add_bos)


def _pairs(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    merges = vocabulary.texts("merges")
    pairs = []
    for index, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        if left not in vocabulary.ids or right not in vocabulary.ids or left + right not in vocabulary.ids:
            raise vocabulary.wrong(f"tokenizer.ggml.merges: entry {index} is no pair of tokens that makes a token")
        pairs.append((left, right))
    return pairs


def _finished(tokenizer: Tokenizer, vocabulary: _Vocabulary, *, add_bos: bool) -> Tokenizer:
    """Make special tokens known as such, and have those of the sequence's ends added."""
    from tokenizers import AddedToken, processors

    named = {vocabulary.special(f"{name}_token_id") for name in ("bos", "eos", "eot", "eom", "unknown", "padding")}
    special, user = [], []
    for token, (text, kind) in enumerate(zip(vocabulary.tokens, vocabulary.kinds, strict=True)):
        if not text:
            continue
        if kind in (_CONTROL, _UNKNOWN) or token in named:
            special.append(AddedToken(text, special=True, normalized=False))
        elif kind == _USER:
            user.append(AddedToken(text, special=False, normalized=False))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(user)
    if any(tokenizer.token_to_id(text) != token for text, token in vocabulary.ids.items()):
        raise vocabulary.wrong("its tokens cannot keep their numbers")
    bos, eos = vocabulary.special("bos_token_id"), vocabulary.special("eos_token_id")
    ends: list[tuple[str, int | None, bool]] = []
    if vocabulary.get("add_bos_token", bool, add_bos):
        ends.append(("bos", bos, True))
    if vocabulary.get("add_eos_token", bool, False):
        ends.append(("eos", eos, False))
    single = ["$A"]
    pieces = []
    for name, end, front in ends:
        if end is None:
            raise vocabulary.wrong(f"tokenizer.ggml.add_{name}_token is set, but {name}_token_id is missing")
        text = vocabulary.tokens[end]
        single = [text, *single] if front else [*single, text]
        pieces.append((text, end))
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, pair=[*single, "$B:1"], special_tokens=pieces
        )
    return tokenizer


class _Vocabulary:
    """The lists and settings below ``tokenizer.ggml``, checked."""

    def __init__(self, file: GgufFile) -> None:
        self.path = file.path
        self._metadata = file.metadata
        self.tokens = self.texts("tokens")
        embedding = file.tensors.get("token_embd.weight")
        if embedding is not None and len(self.tokens) > embedding.shape[0]:
            raise self.wrong(f"it names {len(self.tokens)} tokens, but embeds only {embedding.shape[0]}")
        self.ids = {text: token for token, text in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            twice = next(text for token, text in enumerate(self.tokens) if self.ids[text] != token)
            raise self.wrong(f"tokenizer.ggml.tokens has the token {twice[:40]!r} twice")
        self.kinds = self.numbers("token_type", int, required=False) or [_NORMAL] * len(self.tokens)
        if not all(_NORMAL <= kind <= _BYTE for kind in self.kinds):
            raise self.wrong("tokenizer.ggml.token_type holds a type that does not exist")

    def get(self, key: str, kind: type, default: Any) -> Any:
        """A setting of one type, or ``default``."""
        value = self._metadata.get(f"tokenizer.ggml.{key}", default)
        if value is not default and type(value) is not kind:
            raise self.wrong(f"tokenizer.ggml.{key} is {str(value)[:40]}, which is no {kind.__name__}")
        return value

    def special(self, key: str) -> int | None:
        """The token that a key names, or None; all ones are what writers put for a token that does not exist."""
        token = self.get(key, int, None)
        if token is not None and not 0 <= token < len(self.tokens):
            if token == 2**32 - 1:
                return None
            raise self.wrong(f"tokenizer.ggml.{key} is {token}, but there are {len(self.tokens)} tokens")
        return token if token is None else int(token)

    def texts(self, key: str) -> list[str]:
        """A list of text that must be there."""
        values = self._metadata.get(f"tokenizer.ggml.{key}")
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values) or not values:
            raise self.wrong(f"tokenizer.ggml.{key} must be a list of text")
        return values

    def numbers(self, key: str, kind: type, *, required: bool) -> Sequence[Any]:
        """A list of numbers, one a token; an empty one where it is missing and not required."""
        values = self._metadata.get(f"tokenizer.ggml.{key}")
        if values is None and not required:
            return []
        if not isinstance(values, list) or len(values) != len(self.tokens) or type(values[0]) is not kind:
            raise self.wrong(f"tokenizer.ggml.{key} must be a list of {len(self.tokens)} numbers, one a token")
        return values

    def wrong(self, reason: str) -> ModelError:
        """The error for a vocabulary."""
        return ModelError(f"{self.path}: {reason}: the tokenizer in the file cannot be used")
