"""What is trained on: tokens, and which of them the loss is over; and how rows become that.

Knows the tokenizer and the model's window; no files, no line numbers, no tensors.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from flexbatch.errors import InputError, ModelError
from flexbatch.finetune.answers import encode_chats
from flexbatch.jobs.training_rows import Chat, Completion, Content, Text
from flexbatch.shapes import ModelShape
from flexbatch.text.codec import TextCodec


@dataclass(frozen=True, slots=True)
class Example:
    """One row: ``trained[i]`` says that token i is a target of the loss, predicted from those before it.

    ``trained[0]`` is False, for nothing stands before the first token.
    """

    tokens: tuple[int, ...]
    trained: tuple[bool, ...]

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.trained)
        assert not self.trained[0]

    @property
    def targets(self) -> int:
        """How many tokens the loss is over."""
        return sum(self.trained)


class Examples(Sequence[Example]):
    """Many examples, at five bytes a token."""

    def __init__(self, examples: Sequence[Example] = ()) -> None:
        self._tokens = array("i")
        self._trained = bytearray()
        self._starts = array("q", [0])
        for example in examples:
            self.append(example)

    def append(self, example: Example) -> None:
        """Add one more."""
        self._tokens.extend(example.tokens)
        self._trained.extend(example.trained)
        self._starts.append(len(self._tokens))

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        start, stop = self._starts[place], self._starts[place + 1]
        return Example(tuple(self._tokens[start:stop]), tuple(map(bool, self._trained[start:stop])))

    def __iter__(self) -> Iterator[Example]:
        return (self[place] for place in range(len(self)))

    def length(self, index: int) -> int:
        """Tokens of one example."""
        return self._starts[index + 1] - self._starts[index]

    def targets(self, index: int) -> int:
        """Tokens of one example that the loss is over."""
        return self._trained.count(1, self._starts[index], self._starts[index + 1])


class ExampleEncoder:
    """Rows of one model as examples.

    ``max_length`` cuts longer rows; without it a row longer than the model's window is refused. ``template`` replaces
    the model's own chat template. Token ids in place of text are taken as they are and need no ``codec``.
    """

    def __init__(
        self,
        codec: TextCodec | None,
        shape: ModelShape,
        *,
        max_length: int | None = None,
        template: str | None = None,
    ) -> None:
        self._codec = codec
        self._shape = shape
        self._max_length = max_length
        self._template = template
        own = None if codec is None else codec.eos_token_id
        ends = shape.eos_token_ids
        self._ends = frozenset({*ends, *(() if own is None else (own,))})
        # What stops a generation must be learned as the end; the tokenizer's own end is the usual one of several.
        self._end = own if own in ends or not ends else ends[0]
        self.cut = 0

    def encode_all(self, rows: Sequence[Text | Completion | Chat]) -> list[Example | str]:
        """Return each row's example, or the reason why it cannot be used, in order; ``cut`` counts those cut.

        Raises ModelError if the model lacks what such rows need: a tokenizer, a template, an end-of-sequence token.
        """
        encoded: list[Example | str] = [""] * len(rows)
        places = [index for index, row in enumerate(rows) if not isinstance(row, Chat)]
        plain = [row for row in rows if not isinstance(row, Chat)]
        for index, example in zip(places, self._encode_plain(plain), strict=True):
            encoded[index] = example
        chats = [(index, row.messages) for index, row in enumerate(rows) if isinstance(row, Chat)]
        if chats:
            codec = self._need_codec()
            answers = encode_chats(codec, [messages for _, messages in chats], self._template, self._ends)
            for (index, _), answer in zip(chats, answers, strict=True):
                encoded[index] = answer if isinstance(answer, str) else self._example(*answer)
        return [example if isinstance(example, str) else self._checked(example) for example in encoded]

    def _encode_plain(self, rows: Sequence[Text | Completion]) -> Iterator[Example | str]:
        with_specials = self._encode_contents([row.text if isinstance(row, Text) else row.prompt for row in rows])
        completions = [row.completion for row in rows if isinstance(row, Completion)]
        without = iter(self._encode_contents(completions, special_tokens=False))
        for row, first in zip(rows, with_specials, strict=True):
            second = next(without) if isinstance(row, Completion) else ()
            if isinstance(first, str) or isinstance(second, str):
                yield first if isinstance(first, str) else str(second)
            elif isinstance(row, Text):
                tokens = self._ended(first)
                yield self._example(tokens, (True,) * len(tokens))
            elif not first:
                yield "the prompt has no tokens"
            else:
                tokens = self._ended(second)
                yield self._example((*first, *tokens), (False,) * len(first) + (True,) * len(tokens))

    def _encode_contents(
        self, contents: Sequence[Content], *, special_tokens: bool = True
    ) -> list[tuple[int, ...] | str]:
        """Token ids of each text, or why it is none; ids as they are."""
        encoded: list[tuple[int, ...] | str] = ["" if isinstance(content, str) else content for content in contents]
        texts = [(index, content) for index, content in enumerate(contents) if isinstance(content, str)]
        if texts:
            codec = self._need_codec()
            ids = codec.encode_many([text for _, text in texts], special_tokens=special_tokens)
            for (index, _), tokens in zip(texts, ids, strict=True):
                encoded[index] = tokens
        return encoded

    def _ended(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        if self._end is None:
            raise ModelError(
                "the model names no end-of-sequence token, so an adapter cannot learn when to stop: add eos_token_id "
                "to its config.json"
            )
        return tokens if tokens and tokens[-1] in self._ends else (*tokens, self._end)

    def _example(self, tokens: Sequence[int], trained: Sequence[bool]) -> Example | str:
        if not tokens:
            return "the row has no tokens"
        return Example(tuple(tokens), (False, *trained[1:]))

    def _checked(self, example: Example) -> Example | str:
        wrong = next((token for token in example.tokens if not 0 <= token < self._shape.vocab_size), None)
        if wrong is not None:
            return f"token id {wrong} is outside the vocabulary (0 to {self._shape.vocab_size - 1})"
        count, window = len(example.tokens), self._shape.max_positions
        if self._max_length is None and count > window:
            return f"the row has {count} tokens, the model's window {window}: shorten it, or cut rows with --max-length"
        if self._max_length is not None and count > self._max_length:
            self.cut += 1
            example = Example(example.tokens[: self._max_length], example.trained[: self._max_length])
            if not example.targets:
                return (
                    f"nothing is left to learn of its {count} tokens when cut to {self._max_length}: raise --max-length"
                )
        if not example.targets:
            return "there is nothing to learn: no token stands before what the loss would be over"
        return example

    def _need_codec(self) -> TextCodec:
        if self._codec is None:
            raise ModelError("the model's folder has no tokenizer: give token ids, or add its tokenizer files")
        return self._codec


def require_window(max_length: int | None, shape: ModelShape) -> None:
    """Raise InputError if rows are to be longer than the model's window."""
    if max_length is not None and max_length > shape.max_positions:
        raise InputError(
            f"--max-length {max_length}: the model's window is {shape.max_positions} tokens: lower it to that"
        )
