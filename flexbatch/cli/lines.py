"""Results as output lines, each in the format of its row. Knows both formats by name only, and no files."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from flexbatch.jobs.native import native_line
from flexbatch.jobs.openai_lines import Answer, error_line, response_line
from flexbatch.jobs.rows import Row
from flexbatch.requests import Result, RowError, TokenizedRequest

if TYPE_CHECKING:
    from flexbatch.text.codec import TextCodec

INVALID = "invalid_request"  # the error type of a row that --skip-invalid let pass


class LineWriter:
    """Writes the lines of one model's results; without a ``codec`` a token's text is ``token_id:N``."""

    def __init__(self, model: str, codec: TextCodec | None) -> None:
        self._model = model
        self._codec = codec
        self._token_text = lru_cache(maxsize=1 << 16)(codec.token_text if codec is not None else _nameless)

    def line(self, row: Row, request: TokenizedRequest, result: Result) -> str:
        """Return the line of one result, without its end."""
        if row.endpoint is None:
            return native_line(result)
        echoed = self._echoed(request, result) if request.request.params.echo else ""
        return response_line(
            result, Answer(row.endpoint, row.digest, result.lora or self._model, self._token_text, echoed)
        )

    def _echoed(self, request: TokenizedRequest, result: Result) -> str:
        """Return the prompt's text, with the space that a completion loses when it is decoded on its own."""
        prompt = request.request.prompt
        if self._codec is None:
            return prompt if isinstance(prompt, str) else ""
        before = self._codec.decode(request.token_ids)
        after = self._codec.decode(result.token_ids)
        whole = self._codec.decode((*request.token_ids, *result.token_ids))
        joined = whole.startswith(before) and whole.endswith(after) and result.token_ids
        gap = whole[len(before) : len(whole) - len(after)] if joined else ""
        return (prompt if isinstance(prompt, str) else before) + gap


def invalid_line(row: Row) -> str:
    """Return the line of a row that never ran, for it is invalid."""
    error = RowError(INVALID, f"line {row.line}: {row.error}")
    if row.endpoint is not None:
        return error_line(row.id, row.digest, error)
    return native_line(Result(row.id, "", (), "error", 0, 0, error=error))


def _nameless(token: int) -> str:
    return f"token_id:{token}"
