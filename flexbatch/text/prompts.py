"""Encodes the prompts of requests and says which ones the model cannot take. Knows no files and no line numbers."""

from __future__ import annotations

from collections.abc import Sequence

from flexbatch.errors import InputError, ModelError
from flexbatch.requests import Request
from flexbatch.shapes import ModelShape
from flexbatch.text.codec import TextCodec


class PromptEncoder:
    """Prompts of one model: text and chats through its tokenizer, token ids as they are.

    ``chat`` wraps plain text prompts into a chat of one user message; ``template`` replaces the model's own template.
    """

    def __init__(
        self, codec: TextCodec | None, shape: ModelShape, *, chat: bool = False, template: str | None = None
    ) -> None:
        self._codec = codec
        self._shape = shape
        self._chat = chat
        self._template = template

    def encode_all(self, requests: Sequence[Request]) -> list[tuple[int, ...] | str]:
        """Return each request's token ids, or the reason why it cannot be used, in order.

        Raises ModelError if the model lacks what all such rows need: a tokenizer for text, a template for chats.
        """
        encoded: list[tuple[int, ...] | str] = [""] * len(requests)
        plain: list[tuple[int, str]] = []
        for index, request in enumerate(requests):
            try:
                if isinstance(request.prompt, tuple):
                    encoded[index] = request.prompt
                elif request.messages is not None:
                    encoded[index] = self._need_codec().encode_chat(request.messages, self._template)
                elif self._chat:
                    message = {"role": "user", "content": request.prompt}
                    encoded[index] = self._need_codec().encode_chat([message], self._template)
                else:
                    assert request.prompt is not None
                    request.prompt.encode()
                    plain.append((index, request.prompt))
            except InputError as error:
                encoded[index] = str(error)
            except UnicodeEncodeError:
                encoded[index] = "the prompt holds half a surrogate pair, which is no character"
        if plain:
            for (index, _), ids in zip(plain, self._need_codec().encode_many([text for _, text in plain]), strict=True):
                encoded[index] = ids
        return [tokens if isinstance(tokens, str) else self._checked(tokens) for tokens in encoded]

    def encode_pair(
        self, context: str | Sequence[int], continuation: str | Sequence[int], where: str
    ) -> tuple[tuple[int, ...], int]:
        """Return the tokens of ``context + continuation`` and where the continuation begins.

        Of text, trailing spaces of the context go to the continuation, since most tokenizers join a space to the word
        behind it. Raises InputError, naming ``where``, if either is empty, if one is text and the other token ids, or
        if the whole is longer than the window and the one token that is predicted at its end.
        """
        if isinstance(context, str) != isinstance(continuation, str):
            raise InputError(f"{where}: give the context and the continuation both as text or both as token ids")
        if isinstance(context, str) and isinstance(continuation, str):
            codec = self._need_codec()
            stripped = context.rstrip()
            continuation = context[len(stripped) :] + continuation
            if not stripped or not continuation:
                raise InputError(f"{where}: the context and the continuation must not be empty")
            tokens, start = codec.encode(stripped + continuation), len(codec.encode(stripped))
        else:
            if not context or not continuation:
                raise InputError(f"{where}: the context and the continuation must not be empty")
            tokens, start = tuple(int(token) for token in (*context, *continuation)), len(context)
        whole = self._checked(tokens, predicted=1)
        if isinstance(whole, str):
            raise InputError(f"{where}: {whole}")
        if start >= len(whole):
            raise InputError(f"{where}: the continuation has no tokens of its own")
        return whole, start

    def _checked(self, tokens: tuple[int, ...], predicted: int = 0) -> tuple[int, ...] | str:
        if not tokens:
            return "the prompt is empty"
        if any(isinstance(token, bool) or not isinstance(token, int) for token in tokens):
            return "token ids must be whole numbers"
        wrong = next((token for token in tokens if not 0 <= token < self._shape.vocab_size), None)
        if wrong is not None:
            return f"token id {wrong} is outside the vocabulary (0 to {self._shape.vocab_size - 1})"
        if len(tokens) > self._shape.max_positions + predicted:
            window = self._shape.max_positions
            return f"the prompt has {len(tokens)} tokens, the model's window {window}: shorten the prompt"
        return tokens

    def _need_codec(self) -> TextCodec:
        if self._codec is None:
            raise ModelError("the model's folder has no tokenizer: give token ids, or add its tokenizer files")
        return self._codec
