"""Which tokens of a chat the assistant says, found exactly through the chat template, or not at all.

A turn begins where the template stops when it is asked for an answer at that point, so that what is learned is what a
generation has to say there; it ends with the end-of-sequence token. A template that marks its answers is believed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexbatch.errors import InputError
from flexbatch.text.codec import TextCodec

Message = Mapping[str, Any]
Answer = tuple[Sequence[int], Sequence[bool]]


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A whole chat as text, and where in it the assistant's turns are, in order."""

    text: str
    turns: tuple[tuple[int, int], ...]


def encode_chats(
    codec: TextCodec, chats: Sequence[Sequence[Message]], template: str | None, ends: Collection[int]
) -> list[Answer | str]:
    """Return each chat's tokens and which of them the assistant says, or the reason why it cannot be used.

    ``ends`` are the end-of-sequence tokens. Raises ModelError if there is no template.
    """
    if codec.marks_answers(template):
        return [_marked(codec, messages, template) for messages in chats]
    rendered = [_located(codec, messages, template) for messages in chats]
    # Whole chats and all their borders in one go: a tokenizer is many times faster on batches.
    texts = [text for chat in rendered if isinstance(chat, _Rendered) for text in _pieces(chat)]
    encoded = iter(codec.encode_many(texts, special_tokens=False))
    answers: list[Answer | str] = []
    for chat in rendered:
        if isinstance(chat, str):
            answers.append(chat)
            continue
        whole, *heads = [next(encoded) for _ in range(1 + 2 * len(chat.turns))]
        answers.append(_said(codec, chat, whole, heads, ends))
    return answers


def _marked(codec: TextCodec, messages: Sequence[Message], template: str | None) -> Answer | str:
    try:
        tokens, said = codec.encode_answers(messages, template)
    except InputError as error:
        return str(error)
    return (tokens, said) if any(said) else "the chat template marks no token as the assistant's"


def _located(codec: TextCodec, messages: Sequence[Message], template: str | None) -> _Rendered | str:
    turns: list[tuple[int, int]] = []
    try:
        text = codec.render_chat(messages, template, answer=False)
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            where = f"messages[{index}]"
            if index == 0:
                return f"{where} is the assistant's: it must answer something"
            asked = codec.render_chat(messages[:index], template)
            if not text.startswith(asked) or (turns and len(asked) < turns[-1][1]):
                return f"{where}: the chat template renders what stands before the answer otherwise than for a prompt"
            end = _end(codec, messages, index, template, text, asked)
            if end is None:
                return f"{where}: the chat template does not keep the answer as it was given"
            turns.append((len(asked), end))
    except InputError as error:
        return str(error)
    return _Rendered(text, tuple(turns))


def _end(
    codec: TextCodec, messages: Sequence[Message], index: int, template: str | None, text: str, asked: str
) -> int | None:
    """Where the answer ``messages[index]`` ends in ``text``, or None if that cannot be told."""
    answered = codec.render_chat(messages[: index + 1], template, answer=False)
    if not answered.startswith(asked) or len(answered) == len(asked):
        return None
    if text.startswith(answered):
        return len(answered)
    # Some templates write an answer otherwise once the chat has gone on (without room for thoughts, for example).
    said = answered[len(asked) :]
    content = messages[index]["content"]
    for form in (content, content.strip()):
        place = said.rfind(form)
        if place >= 0 and text.startswith(said[place:], len(asked)):
            return len(asked) + len(said) - place
    return None


def _pieces(chat: _Rendered) -> list[str]:
    """The whole text, and the text up to every border."""
    return [chat.text, *(chat.text[:place] for turn in chat.turns for place in turn)]


def _said(
    codec: TextCodec,
    chat: _Rendered,
    whole: Sequence[int],
    heads: Sequence[Sequence[int]],
    ends: Collection[int],
) -> Answer:
    """Cut the tokens at the borders; ``heads`` are the tokens of the text up to each of them.

    Where a token would reach over a border, the text is encoded in two parts there, for a prompt ends there as well.
    """
    tokens = list(whole)
    borders: list[int] = []
    places = [place for turn in chat.turns for place in turn]
    split = (0, 0)  # from here on, in characters and in tokens, the text is encoded on its own
    for number, (place, head) in enumerate(zip(places, heads, strict=True)):
        if split[1]:
            head = _encoded(codec, chat.text[split[0] : place])
        if tokens[split[1] : split[1] + len(head)] == list(head):
            borders.append(split[1] + len(head))
            continue
        if number:  # what was cut before stays as it is
            split = (places[number - 1], borders[-1])
            head = _encoded(codec, chat.text[split[0] : place])
        tokens = [*tokens[: split[1]], *head, *_encoded(codec, chat.text[place:])]
        split = (place, split[1] + len(head))
        borders.append(split[1])
    said = [False] * len(tokens)
    for start, stop in zip(borders[::2], borders[1::2], strict=True):
        last = next((place for place in range(stop - 1, start - 1, -1) if tokens[place] in ends), stop - 1)
        said[start : last + 1] = [True] * (last + 1 - start)
    return tokens, said


def _encoded(codec: TextCodec, text: str) -> Sequence[int]:
    return codec.encode_many([text], special_tokens=False)[0] if text else ()
