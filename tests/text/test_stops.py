"""Stop strings: what is found token by token equals what a search in the whole decoded text finds."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from flexbatch.text.codec import TextCodec
from flexbatch.text.stops import TextStream


class Spy:
    """A codec that notes how many tokens each decode was given."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self.sizes: list[int] = []

    def decode(self, ids: Sequence[int]) -> str:
        self.sizes.append(len(ids))
        return self._codec.decode(ids)

    def shows(self, token: int) -> bool:
        return self._codec.shows(token)


def generated(codec: TextCodec, text: str) -> tuple[int, ...]:
    return codec.encode_many([text], special_tokens=False)[0]


def feed(codec: TextCodec, ids: Sequence[int], stop: tuple[str, ...]) -> tuple[int, str]:
    """Number of tokens until a stop is reported (all, if none), and the text then."""
    stream = TextStream(codec, stop)
    for count, token in enumerate(ids, 1):
        if stream.append(token):
            return count, stream.text
    return len(ids), stream.text


def brute(codec: TextCodec, ids: Sequence[int], stop: tuple[str, ...]) -> tuple[int, str]:
    for count in range(1, len(ids) + 1):
        text = codec.decode(ids[:count])
        places = [text.index(s) for s in stop if s in text]
        if places:
            return count, text[: min(places)]
    return len(ids), codec.decode(ids)


@pytest.mark.parametrize("kind", ["words", "tokens", "bytes", "mixed"])
def test_random_tokens_agree_with_search_in_the_whole_text(codec: TextCodec, kind: str) -> None:
    rng = random.Random(f"{kind} 7")
    words = ["the", "cat", "stop", "sto", "p", "\n\n", "😀", "你好", "é", "Q:", " ", "<|end|>", "."]
    single = [t for t in range(codec.vocab_size) if (b := codec.token_bytes(t)) is not None and len(b) == 1]
    found = 0
    for _ in range(60):
        length = rng.randrange(1, 150)
        if kind == "words":
            ids = generated(codec, "".join(rng.choice(words) + rng.choice(["", " "]) for _ in range(length)))
        elif kind == "tokens":
            ids = tuple(rng.randrange(codec.vocab_size) for _ in range(length))
        elif kind == "bytes":
            ids = tuple(rng.choice(single) for _ in range(length))
        else:
            text = generated(codec, "".join(rng.choices(words, k=length)))
            ids = tuple(rng.choice(single) if rng.random() < 0.1 else t for t in text)
        whole = codec.decode(ids)
        start = rng.randrange(max(1, len(whole)))
        inside = whole[start : start + rng.randrange(1, 40)]  # some of the text itself, so that most are found
        stop = tuple(s for s in (inside, rng.choice(words) + rng.choice(words)) if s)
        assert feed(codec, ids, stop) == brute(codec, ids, stop)
        found += brute(codec, ids, stop)[0] < len(ids)
    assert found > 20


def test_stop_across_tokens_is_found_when_it_is_complete(codec: TextCodec) -> None:
    ids = generated(codec, "the cat did not stop running away")
    count, text = feed(codec, ids, ("not stop run",))
    assert text == "the cat did "
    assert "not stop run" in codec.decode(ids[:count])
    assert "not stop run" not in codec.decode(ids[: count - 1])


def test_stop_inside_one_token_cuts_it(llama: TextCodec) -> None:
    ids = generated(llama, "a garden party")
    assert feed(llama, ids, ("ard",)) == (2, "a g")


def test_earliest_of_several_stops(codec: TextCodec) -> None:
    ids = generated(codec, "one two three")
    assert feed(codec, ids, ("three", "two", "wo t"))[1] == "one "
    stream = TextStream(codec, ("three", "two"))
    for token in ids:  # the caller may go on after a stop (a whole chunk of tokens): the text stays
        stream.append(token)
    assert stream.text == "one "
    assert stream.append(ids[0])


def test_character_split_across_tokens(codec: TextCodec) -> None:
    ids = generated(codec, "a 👩🏿‍🚀 b 🧿 c")
    assert feed(codec, ids, ("🧿",))[1] == "a 👩🏿‍🚀 b "
    assert feed(codec, ids, ("🚀 b",))[1] == "a 👩🏿‍"
    stream = TextStream(codec, ("zzz",))
    assert not any(stream.append(token) for token in ids)
    assert stream.text == "a 👩🏿‍🚀 b 🧿 c"


def test_long_runs_of_split_characters(codec: TextCodec) -> None:
    """Where every character is several byte tokens, no window may begin inside one."""
    text = "".join(chr(0x1F400 + n) for n in range(60))
    ids = generated(codec, text)
    for place in (0, 1, 20, 37, 38, 39, 59):
        assert feed(codec, ids, (text[place],)) == brute(codec, ids, (text[place],))
        assert feed(codec, ids, (text[place],))[1] == text[:place]


def test_a_find_is_confirmed_on_the_whole_text(codec: TextCodec) -> None:
    """A run of byte tokens that begins badly is all U+FFFD in Llama's decoder, however good its end looks alone."""
    byte = {codec.token_bytes(token): token for token in range(codec.vocab_size)}
    for bad in range(1, 5):
        ids = (*[byte[b"\xff"]] * bad, *[byte[bytes([part])] for part in "🧿".encode()] * 60)
        for stop in ("🧿", "🧿" * 3):
            assert feed(codec, ids, (stop,)) == brute(codec, ids, (stop,))


def test_special_tokens_between_do_not_hide_a_stop(codec: TextCodec) -> None:
    first, second = generated(codec, "the cat sto"), generated(codec, "the p")[-1:]
    ids = (*first, *([1] * 300), *second)
    stop = (codec.decode(ids)[-3:],)
    assert feed(codec, ids, stop) == brute(codec, ids, stop) == (len(ids), codec.decode(ids)[:-3])


def test_without_stop_nothing_is_decoded_until_asked(codec: TextCodec) -> None:
    spy = Spy(codec)
    stream = TextStream(spy)
    ids = generated(codec, "the cat did not stop") * 20
    assert not any(stream.append(token) for token in ids)
    assert spy.sizes == []
    assert stream.text == stream.text == codec.decode(ids)
    assert spy.sizes == [len(ids)]
    assert TextStream(codec).text == ""


def test_cost_of_a_token_does_not_grow(codec: TextCodec) -> None:
    spy = Spy(codec)
    stream = TextStream(spy, ("never to be seen",))
    broken = [t for t in range(codec.vocab_size) if codec.token_bytes(t) == b"\xff"][:1]
    ids = generated(codec, "the cat 😀 你好 did not stop. ") * 40 + tuple(broken) * 500 + (1,) * 500
    assert not any(stream.append(token) for token in ids)
    assert 1000 < len(spy.sizes) == len(ids) - 500  # special tokens show nothing
    assert max(spy.sizes) < 250
    assert stream.text == codec.decode(ids)
