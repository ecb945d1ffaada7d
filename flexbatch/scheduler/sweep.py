"""What one pass over the layers computes: slices of sequences, packed into micro-batches. Plain data and packing."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from flexbatch.scheduler.adapters import NO_MOVES, AdapterMoves
from flexbatch.scheduler.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Slice:
    """``count`` consecutive tokens of one sequence, from position ``start``.

    ``samples``: the last of them predicts the sequence's next token. ``score_from``: positions from here to the
    slice's end predict prompt tokens whose log-probabilities are wanted (``start + count``: none).
    """

    sequence: Sequence
    start: int
    count: int
    samples: bool
    score_from: int
    score_to: int

    @property
    def stop(self) -> int:
        """The position behind the last token."""
        return self.start + self.count

    @property
    def is_decode(self) -> bool:
        """Whether this is one token with its whole context cached: the shape that batched attention takes."""
        return self.count == 1


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The ragged tokens that go through a layer together.

    ``kv`` is the tier on which all their KV rests, ``hidden`` the one where their hidden states wait between layers.
    ``streamed``: the KV rests below the GPU, and comes there to be attended to.
    """

    slices: tuple[Slice, ...]
    kv: str = "cpu"
    hidden: str = "cpu"
    streamed: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of all slices."""
        return sum(piece.count for piece in self.slices)


@dataclass(frozen=True)
class Sweep:
    """One pass over the layers. ``adapters``: which LoRA adapters move before or during it."""

    number: int
    micro_batches: tuple[MicroBatch, ...]
    adapters: AdapterMoves = NO_MOVES

    @functools.cached_property
    def continues(self) -> tuple[bool, ...]:
        """Of every micro-batch, whether it goes on with a prompt that was cut between the one before it and this."""
        own = [{id(piece.sequence) for piece in batch.slices} for batch in self.micro_batches]
        return tuple(bool(before & after) for before, after in zip([set(), *own], own, strict=False))

    @property
    def slices(self) -> Iterable[Slice]:
        """All slices, micro-batch by micro-batch."""
        return (piece for batch in self.micro_batches for piece in batch.slices)

    @property
    def tokens(self) -> int:
        """Tokens of all micro-batches."""
        return sum(batch.tokens for batch in self.micro_batches)


def cut(sequence: Sequence, count: int) -> Slice:
    """The next ``count`` uncomputed tokens of ``sequence``.

    Its own scores and those it finds for others with the same prefix begin anywhere; where one does, both go on.
    """
    start = sequence.computed
    stop = start + count
    last = stop == len(sequence.tokens)
    own = range(max(start, sequence.scored - 1), min(stop, sequence.prompt_len - 1) if sequence.scores_prompt else 0)
    others = range(max(start, sequence.records.start), min(stop, sequence.records.stop))
    parts = [part for part in (own, others) if part]
    scoring = bool(parts)
    wanted = range(min(part.start for part in parts), max(part.stop for part in parts)) if parts else range(0)
    return Slice(
        sequence=sequence,
        start=start,
        count=count,
        samples=last and sequence.wants_tokens,
        score_from=wanted.start if scoring else stop,
        score_to=wanted.stop if scoring else stop,
    )


def split(piece: Slice, count: int) -> tuple[Slice, Slice]:
    """The first ``count`` tokens of a slice, and the rest."""
    middle = piece.start + count
    first = Slice(piece.sequence, piece.start, count, False, min(piece.score_from, middle), min(piece.score_to, middle))
    rest = Slice(
        piece.sequence,
        middle,
        piece.count - count,
        piece.samples,
        max(piece.score_from, middle),
        max(piece.score_to, middle),
    )
    return first, rest


def part_by_attention(slices: SequenceOf[Slice], tier: str, gpu_share: float | None) -> list[tuple[list[Slice], bool]]:
    """Part the slices at home on ``tier`` by where they are attended to; True: their pages come to the GPU for that.

    With a ``gpu_share`` prompts below the GPU are attended to there, which takes no bytes up, and so is that share of
    the decoding sequences, always the same ones; without, all of a tier go the way of the run.
    """
    if gpu_share is None or tier == "gpu":
        return [(list(slices), False)]
    parts: tuple[list[Slice], list[Slice], list[Slice]] = ([], [], [])
    for piece in slices:
        age = piece.sequence.age
        streams = int((age + 1) * gpu_share) > int(age * gpu_share)
        parts[2 if not piece.is_decode else 1 if streams else 0].append(piece)
    return [(part, streamed) for part, streamed in zip(parts, (False, True, True), strict=True) if part]


def pack_by_tokens(slices: SequenceOf[Slice], tokens: int, pages: int, page_tokens: int) -> list[tuple[Slice, ...]]:
    """Fill micro-batches of at most ``tokens`` tokens whose contexts take at most ``pages`` pages, in order.

    A page that slices share counts once.

    Only a slice longer than a whole micro-batch is split: the attention of a prompt that begins in the middle costs
    more than an emptier micro-batch. One slice may exceed ``pages`` alone: whoever sets it sees to that.
    """
    batches: list[tuple[Slice, ...]] = []
    current: list[Slice] = []
    room, pages_left = tokens, pages
    brought: set[int] = set()
    for piece in slices:
        rest = piece
        shared = piece.sequence.pages.pages[: piece.sequence.shared]
        needed = -(-piece.stop // page_tokens) - sum(page in brought for page in shared)
        if current and (needed > pages_left or room < rest.count <= tokens):
            batches.append(tuple(current))
            current, room, pages_left, brought = [], tokens, pages, set()
            needed = -(-piece.stop // page_tokens)
        while rest.count > room:
            if room > 0:
                first, rest = split(rest, room)
                current.append(first)
            batches.append(tuple(current))
            current, room, pages_left, brought = [], tokens, pages, set()
            needed = -(-piece.stop // page_tokens)
        current.append(rest)
        room -= rest.count
        pages_left -= needed
        brought.update(shared)
    if current:
        batches.append(tuple(current))
    return batches


def pack_by_sequences(slices: SequenceOf[Slice], sequences: int) -> list[tuple[Slice, ...]]:
    """Micro-batches of ``sequences`` whole slices each: FlexGen's shape."""
    return [tuple(slices[i : i + sequences]) for i in range(0, len(slices), sequences)]


def by_adapter(slices: tuple[Slice, ...]) -> tuple[Slice, ...]:
    """The same slices, those of one adapter side by side: their products are large ones then, made in place."""
    if all(piece.sequence.adapter is None for piece in slices):
        return slices
    return tuple(sorted(slices, key=lambda piece: piece.sequence.adapter or ""))
