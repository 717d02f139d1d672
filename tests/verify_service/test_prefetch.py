"""Items made ahead of their reader: the same ones, in order, and nothing runs on without him."""

from __future__ import annotations

import threading
from collections.abc import Generator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.verify_service.prefetch import ahead


def numbers(count: int, made: list[int], closed: threading.Event) -> Generator[int, None, None]:
    try:
        for index in range(count):
            made.append(index)
            yield index
    finally:
        closed.set()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 12), st.integers(1, 4), st.integers(0, 14))
def test_ahead_gives_the_items_in_order_and_closes_them(count: int, most: int, read: int) -> None:
    made: list[int] = []
    closed = threading.Event()
    before = set(threading.enumerate())
    items = ahead(numbers(count, made, closed), most)
    got = [one for one, _ in zip(items, range(read), strict=False)]
    items.close()  # type: ignore[attr-defined]
    assert got == list(range(min(count, read)))  # zip took one more, and dropped it
    assert closed.is_set()
    assert not set(threading.enumerate()) - before


def test_ahead_goes_on_while_the_reader_is_busy_and_no_further_than_it_may() -> None:
    made: list[int] = []
    third = threading.Event()

    def items() -> Generator[int, None, None]:
        for index in range(100):
            made.append(index)
            if index == 3:
                third.set()
            yield index

    reader = ahead(items(), 2)
    assert next(reader) == 0
    # With nobody reading: one is read, two wait, and the fourth wants to.
    assert third.wait(60)
    reader.close()  # type: ignore[attr-defined]
    assert len(made) < 10


def test_ahead_raises_what_the_items_raise_after_those_before_it() -> None:
    def items() -> Generator[int, None, None]:
        yield 1
        raise ValueError("second")

    got = []
    with pytest.raises(ValueError, match="second"):
        for one in ahead(items(), 4):
            got.append(one)
    assert got == [1]


def test_ahead_reader_that_leaves_waits_until_the_items_are_closed() -> None:
    state: list[str] = []
    go = threading.Event()

    def items() -> Generator[int, None, None]:
        try:
            yield 0
            go.wait(5)
            yield 1
        finally:
            state.append("closed")

    reader = ahead(items(), 1)
    assert next(reader) == 0
    threading.Timer(0.05, go.set).start()
    reader.close()  # type: ignore[attr-defined]
    assert state == ["closed"]
