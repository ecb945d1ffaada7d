"""The page allocator under arbitrary arrivals, growth, sharing and release, against a model that only counts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexbatch.errors import InternalError
from flexbatch.scheduler.pages import PageAllocator, PageTable

ACTIONS = st.lists(
    st.tuples(st.sampled_from(["grow", "release", "share"]), st.integers(0, 5), st.integers(1, 9), st.integers(0, 12)),
    max_size=60,
)


@given(capacity=st.integers(0, 30), actions=ACTIONS)
def test_no_leak_no_overlap(capacity: int, actions: list[tuple[str, int, int, int]]) -> None:
    allocator = PageAllocator(capacity)
    tables = [PageTable() for _ in range(6)]
    most = 0
    for action, who, pages, extra in actions:
        table = tables[who]
        if action == "grow":
            before = list(table.pages)
            possible = pages - len(before) <= allocator.available
            assert allocator.grow(table, pages, pages + extra) == possible
            assert table.pages[: len(before)] == before
            assert len(table.pages) == (max(pages, len(before)) if possible else len(before))
        elif action == "release":
            allocator.release(table)
            assert table.pages == []
        else:
            other = tables[pages % 6]
            if not other.pages:
                allocator.share(other, table.pages[:extra])
        held = [page for table in tables for page in table.pages]
        assert len(set(held)) == allocator.used == allocator.capacity - allocator.available
        most = max(most, allocator.used)
        assert allocator.peak == most
        assert all(0 <= page < capacity for page in held)
        assert all(len(set(table.pages)) == len(table.pages) for table in tables)
    for table in tables:
        allocator.release(table)
    allocator.check_idle()


def test_a_sequence_grows_in_place_while_there_is_room() -> None:
    allocator = PageAllocator(20)
    first, second = PageTable(), PageTable()
    allocator.grow(first, 1, 5)
    allocator.grow(second, 1, 5)
    for pages in range(2, 6):
        allocator.grow(first, pages, 5)
        allocator.grow(second, pages, 5)
    assert first.pages == [0, 1, 2, 3, 4]
    assert second.pages == [5, 6, 7, 8, 9]


def test_a_reservation_gives_way_when_nothing_else_is_left() -> None:
    allocator = PageAllocator(6)
    first, second = PageTable(), PageTable()
    assert allocator.grow(first, 1, 6)
    assert allocator.grow(second, 5, 5)
    assert not allocator.grow(first, 2, 6)
    assert sorted(first.pages + second.pages) == list(range(6))


def test_shared_pages_stay_until_the_last_holder_goes() -> None:
    allocator = PageAllocator(4)
    first, second = PageTable(), PageTable()
    allocator.grow(first, 2, 2)
    allocator.share(second, first.pages)
    allocator.release(first)
    assert allocator.used == 2
    allocator.release(second)
    assert allocator.used == 0


def test_misuse_is_found() -> None:
    allocator = PageAllocator(4)
    table = PageTable()
    allocator.grow(table, 2, 2)
    with pytest.raises(InternalError, match="still held"):
        allocator.check_idle()
    copy = PageTable(list(table.pages))
    allocator.release(table)
    with pytest.raises(InternalError, match="released twice"):
        allocator.release(copy)
    with pytest.raises(InternalError, match="not in use"):
        allocator.share(copy, [0])
