"""The text of one sequence while it grows: finds stop strings token by token, and cuts the final text before them.

Knows nothing of end-of-sequence tokens or of lengths, and decodes nothing per token when there is no stop string.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_MARGIN = 16  # characters kept beyond the longest stop: what a decoder may change at the start of a window
_PATIENCE = 16  # tokens: no character takes this many to be finished, so the bytes are just invalid


class Decoder(Protocol):
    """What is needed of a TextCodec."""

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids -> text without special tokens."""

    def shows(self, token: int) -> bool:
        """Whether ``decode`` looks at the token at all."""


class TextStream:
    """Text of the tokens appended so far.

    ``append`` returns True from the first token on after which ``decode`` of all tokens contains a stop string. Only
    a window of the last tokens is decoded each time, so the cost of a token does not grow with the text; a find is
    then confirmed on the whole. Stop strings see what ``text`` shows, so a special token's name is never found.
    """

    def __init__(self, codec: Decoder, stop: tuple[str, ...] = ()) -> None:
        self._codec = codec
        self._stop = stop
        self._reach = max(map(len, stop), default=0) + _MARGIN
        self._ids: list[int] = []
        self._window: list[int] = []  # the last tokens that show
        self._border = 0  # where in the window its next start lies
        self._border_chars = 0  # length of the window's text up to there
        self._unfinished = 0  # tokens since the text last ended with a whole character
        self._stopped = False
        self._text: tuple[int, str] = (0, "")  # for so many tokens

    def append(self, token: int) -> bool:
        """Add a token; True: the text contains a stop string."""
        self._ids.append(token)
        if not self._stop or self._stopped or not self._codec.shows(token):
            return self._stopped
        self._window.append(token)
        text = self._codec.decode(self._window)
        # The window can only see too much (it may begin inside invalid bytes), so the whole text has the last word.
        if _cut(text, self._stop) < len(text):
            whole = self._codec.decode(self._ids)
            self._stopped = _cut(whole, self._stop) < len(whole)
        fresh = len(self._window) - self._border
        # A window never begins inside a character: its first bytes would be lost.
        self._unfinished = self._unfinished + 1 if text.endswith("\ufffd") else 0
        whole_character = self._unfinished == 0 or self._unfinished > _PATIENCE
        if len(text) - self._border_chars >= self._reach and whole_character:
            self._window = self._window[self._border :]
            self._border = fresh
            self._border_chars = len(text) - self._border_chars
        return self._stopped

    @property
    def text(self) -> str:
        """Exactly ``decode`` of all tokens, ended before the stop string that begins first."""
        if self._text[0] != len(self._ids):
            whole = self._codec.decode(self._ids)
            self._text = (len(self._ids), whole[: _cut(whole, self._stop)])
        return self._text[1]


def _cut(text: str, stop: tuple[str, ...]) -> int:
    """Where the first stop string in ``text`` begins; its length if there is none."""
    return min((place for place in map(text.find, stop) if place >= 0), default=len(text))
