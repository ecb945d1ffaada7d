"""Rows become tokens, and which of them are learned: against the tokenizer's own encoding, and read back as text."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flexbatch.checkpoint.locate import locate
from flexbatch.errors import InputError, ModelError
from flexbatch.finetune.examples import Example, ExampleEncoder, Examples, require_window
from flexbatch.jobs.training_rows import Chat, Completion, Text
from flexbatch.shapes import ModelShape
from flexbatch.text.codec import TextCodec
from tests.finetune import templates
from tests.text.conftest import DEMO, byte_level_folder

WORDS = ["cat", "dog", "The", "ran", "é", "😀", "stop!", "\n", "  ", "1", "你好", "garden"]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    return TextCodec.load(byte_level_folder(tmp_path_factory.mktemp("bpe")))


@pytest.fixture(scope="module")
def llama() -> TextCodec:
    return TextCodec.load(DEMO)


def shape_for(codec: TextCodec, *ends: int, window: int = 4096) -> ModelShape:
    shape = locate("demo").shape
    return replace(shape, vocab_size=codec.vocab_size, eos_token_ids=ends, max_positions=window)


def end_of(codec: TextCodec) -> int:
    assert codec.eos_token_id is not None
    return codec.eos_token_id


def one(codec: TextCodec | None, shape: ModelShape, row: Text | Completion | Chat, **options: Any) -> Example:
    (example,) = ExampleEncoder(codec, shape, **options).encode_all([row])
    assert isinstance(example, Example), example
    return example


def fault(codec: TextCodec | None, shape: ModelShape, row: Text | Completion | Chat, **options: Any) -> str:
    (example,) = ExampleEncoder(codec, shape, **options).encode_all([row])
    assert isinstance(example, str)
    return example


def turns(rng: random.Random, count: int, *, system: bool = False) -> tuple[dict[str, str], ...]:
    def text() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 8)))

    first = [{"role": "system", "content": text()}] if system else []
    pairs = [{"role": role, "content": text()} for _ in range(count) for role in ("user", "assistant")]
    return (*first, *pairs)


@pytest.mark.parametrize("kind", ["bpe", "llama"])
def test_texts_and_completions(kind: str, request: pytest.FixtureRequest) -> None:
    codec: TextCodec = request.getfixturevalue(kind)
    end = end_of(codec)
    shape = shape_for(codec, end)
    rng = random.Random(1)
    for _ in range(30):
        first, second = (" ".join(rng.choices(WORDS, k=rng.randint(1, 9))) for _ in range(2))
        text = one(codec, shape, Text(first))
        assert text.tokens == (*codec.encode(first), end)
        assert text.trained == (False, *[True] * (len(text.tokens) - 1))
        pair = one(codec, shape, Completion(first, second))
        prompt = codec.encode(first)
        answer = codec.encode_many([second], special_tokens=False)[0]
        assert pair.tokens == (*prompt, *answer, end)
        assert pair.trained == (*[False] * len(prompt), *[True] * (len(answer) + 1))
        assert pair.targets == len(answer) + 1


def test_token_ids_need_no_tokenizer(bpe: TextCodec) -> None:
    shape = shape_for(bpe, 7)
    assert one(None, shape, Completion((1, 2), (3,))) == Example((1, 2, 3, 7), (False, False, True, True))
    assert one(None, shape, Text((5, 7))) == Example((5, 7), (False, True))
    with pytest.raises(ModelError, match="no tokenizer"):
        ExampleEncoder(None, shape).encode_all([Text("a")])
    with pytest.raises(ModelError, match="no tokenizer"):
        ExampleEncoder(None, shape).encode_all([Chat(({"role": "user", "content": "a"},))])
    assert "outside the vocabulary" in fault(None, shape, Text((10**6,)))


def test_which_end_is_learned(bpe: TextCodec) -> None:
    own = end_of(bpe)
    assert one(bpe, shape_for(bpe, 9, own), Text((5,))).tokens[-1] == own
    assert one(bpe, shape_for(bpe, 9, 8), Text((5,))).tokens[-1] == 9  # generation stops there alone
    assert one(bpe, shape_for(bpe), Text((5,))).tokens[-1] == own
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        ExampleEncoder(None, shape_for(bpe)).encode_all([Text((1,))])


@pytest.mark.parametrize("kind", ["bpe", "llama"])
@pytest.mark.parametrize("name", sorted(templates.GOOD))
def test_answers_are_found(name: str, kind: str, request: pytest.FixtureRequest) -> None:
    codec: TextCodec = request.getfixturevalue(kind)
    template = templates.GOOD[name].replace("<|end|>", "<|end|>" if kind == "bpe" else "</s>")
    end = end_of(codec)
    shape = shape_for(codec, end)
    rng = random.Random(2)
    for _ in range(25):
        messages = turns(rng, rng.randint(1, 4), system=name != "brackets" and rng.random() < 0.5)
        example = one(codec, shape, Chat(messages), template=template)
        # What is not learned before the last answer is the prompt that a generation would get, token by token.
        runs = _runs(example)
        answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        assert len(runs) == len(answers)
        if name != "marked":
            start = runs[-1][0]
            prompt = codec.encode_chat(messages[: answers[-1]], template)
            if len(answers) == 1:
                assert example.tokens[:start] == prompt
        for (start, stop), place in zip(runs, answers, strict=True):
            said = codec._tokenizer.decode(example.tokens[start:stop])
            content = messages[place]["content"]
            assert example.tokens[stop - 1] == end
            assert content.strip() in said
            rest = said.replace(content.strip(), "", 1)
            for known in ("<|end|>", "</s>", "<think>", "</think>"):
                rest = rest.replace(known, "")
            assert rest.strip() == "", said


def _runs(example: Example) -> list[tuple[int, int]]:
    """The stretches of tokens that are learned."""
    marks = [*example.trained, False]
    starts = [at for at in range(len(marks)) if marks[at] and (at == 0 or not marks[at - 1])]
    return [(start, marks.index(False, start)) for start in starts]


def test_a_marked_template_and_a_plain_one_agree(bpe: TextCodec) -> None:
    shape = shape_for(bpe, end_of(bpe))
    rng = random.Random(3)
    for _ in range(30):
        messages = turns(rng, rng.randint(1, 4), system=True)
        # A line break at the border may be one token with the header's: there only the plain one cuts exactly.
        messages = tuple({**message, "content": "a " + message["content"].strip()} for message in messages)
        assert one(bpe, shape, Chat(messages), template=templates.MARKED) == one(
            bpe, shape, Chat(messages), template=templates.CHATML
        )


def test_a_token_never_reaches_over_the_border(bpe: TextCodec) -> None:
    """A prompt ends in a line break and the answer begins with some: they are encoded as a generation would."""
    shape = shape_for(bpe, end_of(bpe))
    messages = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "\n\n\nQ: what?"})
    for template in (templates.CHATML, templates.HEADERS.replace(" | trim", "")):
        example = one(bpe, shape, Chat((*messages, *messages)), template=template)
        prompt = bpe.encode_chat(messages[:1], template)
        assert example.tokens[: len(prompt)] == prompt
        assert example.trained[: len(prompt) + 1] == (*[False] * len(prompt), True)
        assert bpe._tokenizer.decode(example.tokens) == bpe.render_chat((*messages, *messages), template, answer=False)
        assert len(_runs(example)) == 2


def test_templates_that_hide_the_answer_are_refused(bpe: TextCodec) -> None:
    shape = shape_for(bpe, end_of(bpe))
    messages = turns(random.Random(4), 2)
    messages = tuple({**message, "content": "word"} for message in messages)
    refusals = [
        (templates.FORGETFUL, "messages[1]: the chat template renders what stands before the answer otherwise"),
        (templates.SHOUTING, "messages[1]: the chat template "),
        ("{{ raise_exception('never') }}", "the chat template refuses the messages: never"),
        ("{% if x", "the chat template refuses the messages"),
        ("{{ messages[0].content }}", "does not keep the answer"),
        (templates.MARKED.replace("== 'assistant'", "== 'nobody'"), "marks no token"),
    ]
    for template, said in refusals:
        assert said in fault(bpe, shape, Chat(messages), template=template), template
    assert "must answer something" in fault(bpe, shape, Chat(messages[1:]), template=templates.CHATML)
    llama = TextCodec.load(DEMO)
    with pytest.raises(ModelError, match="no chat template"):
        ExampleEncoder(llama, shape_for(llama, 2)).encode_all([Chat(messages)])


def test_lengths(bpe: TextCodec) -> None:
    shape = shape_for(bpe, 7, window=10)
    long = Completion(tuple(range(20, 28)), (1, 2, 3))
    assert "the row has 12 tokens, the model's window 10" in fault(None, shape, long)
    encoder = ExampleEncoder(None, shape, max_length=9)
    first, second = encoder.encode_all([long, Text((1,))])
    assert first == Example((*range(20, 28), 1), (*[False] * 8, True))
    assert second == Example((1, 7), (False, True))
    assert encoder.cut == 1
    assert "nothing is left to learn of its 12 tokens when cut to 8" in fault(None, shape, long, max_length=8)
    assert "nothing to learn" in fault(None, shape, Text((7,)))
    require_window(10, shape)
    with pytest.raises(InputError, match="--max-length 11: the model's window is 10"):
        require_window(11, shape)


def test_many_examples_are_kept_as_they_are(tmp_path: Path) -> None:
    rng = random.Random(5)
    made = []
    for _ in range(50):
        count = rng.randint(1, 9)
        made.append(
            Example(
                tuple(rng.randrange(1 << 20) for _ in range(count)),
                (False, *(rng.random() < 0.5 for _ in range(count - 1))),
            )
        )
    kept = Examples(made)
    assert list(kept) == made
    assert len(kept) == 50
    assert kept[3] == made[3]
    assert kept[-1] == made[-1]
    assert kept[5:9] == made[5:9]
    assert [kept.length(index) for index in range(50)] == [len(example.tokens) for example in made]
    assert [kept.targets(index) for index in range(50)] == [example.targets for example in made]
    with pytest.raises(IndexError):
        kept[50]
