"""The index of donors against lists of tokens, and against a service that does as it is told."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import takewhile
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from outrider.coordinator.requests import prefix_cache
from outrider.coordinator.requests.prefix_cache import BLOCK, MOST_TRIED, PrefixCache, TokenBlocks
from outrider.protos import speculation_pb2 as pb

MOST = 4


def tokens(*blocks: int, tail: int = 0) -> list[int]:
    """Whole blocks, each named by a number, and some tokens that no block begins with."""
    made = [1000 * block + i for block in blocks for i in range(BLOCK)]
    return [*made, *range(500_000, 500_000 + tail)]


def log(*blocks: int, tail: int = 0, salt: str = "") -> TokenBlocks:
    return TokenBlocks(salt, tokens(*blocks, tail=tail))


def told(cache: PrefixCache) -> tuple[list[int], dict[int, int]]:
    """What the next message says: ids to close, lengths to cache."""
    request = pb.VerifyRequest()
    cache.fill(request)
    return list(request.close), {one.sequence_id: one.length for one in request.cache}


def matched(cache: PrefixCache, wanted: TokenBlocks, most: int | None = None) -> tuple[int, int]:
    """Donor and length; zeros where there is none."""
    found = cache.match(wanted, len(wanted.tokens) - 1 if most is None else most)
    return (0, 0) if found is None else (found.sequence_id, found.length)


def test_match_goes_to_the_token_beyond_whole_blocks() -> None:
    cache = PrefixCache(MOST)
    cache.retire(1, log(1, 2, tail=20), 2 * BLOCK + 20)
    assert told(cache) == ([], {1: 2 * BLOCK + 20})
    assert matched(cache, log(1, 2, tail=9)) == (1, 2 * BLOCK + 8)  # the last one is its own
    assert matched(cache, log(1, 2, 3)) == (1, 2 * BLOCK)
    assert matched(cache, log(1, 3, 2)) == (1, BLOCK)
    assert matched(cache, log(2, 1)) == (0, 0)
    assert matched(cache, log(1, tail=0)) == (0, 0)  # one token is left out: no whole block
    assert matched(cache, log(tail=BLOCK - 1)) == (0, 0)


def test_match_takes_no_more_than_the_service_has() -> None:
    cache = PrefixCache(MOST)
    held = SimpleNamespace(open=True, length=0)
    donor = log(1, 2, 3)
    cache.offer(1, donor, held)
    for length, wanted in ((0, 0), (BLOCK - 1, 0), (BLOCK + 7, BLOCK + 7), (9 * BLOCK, 3 * BLOCK)):
        held.length = length
        assert matched(cache, log(1, 2, 3, 4))[1] == wanted
    held.open = False
    assert matched(cache, log(1, 2, 3, 4)) == (0, 0)
    assert matched(cache, donor) == (0, 0), "a sequence is no donor of its own"


def test_match_prefers_the_one_that_has_most() -> None:
    cache = PrefixCache(MOST)
    cache.retire(1, log(1, 2), 2 * BLOCK)
    held = SimpleNamespace(open=True, length=BLOCK)
    cache.offer(2, log(1, 2, 3, 4), held)  # shares more, and has not taken it in yet
    assert matched(cache, log(1, 2, 3, 4, 5)) == (1, 2 * BLOCK)
    held.length = 3 * BLOCK
    assert matched(cache, log(1, 2, 3, 4, 5)) == (2, 3 * BLOCK)


def test_match_keeps_salts_apart_even_where_hashes_collide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_cache, "hash", lambda _: 7, raising=False)
    cache = PrefixCache(MOST)
    cache.retire(1, log(1, 2, salt="a"), 2 * BLOCK)
    cache.retire(2, log(3, salt="b"), BLOCK)
    assert matched(cache, log(1, 2, 3, salt="a")) == (1, 2 * BLOCK)
    assert matched(cache, log(1, 2, 3, salt="b")) == (0, 0)
    assert matched(cache, log(1, 2, 3)) == (0, 0)
    assert matched(cache, log(3, 3, salt="b")) == (2, BLOCK)
    cache.lost()
    assert not cache._by_hash


def test_retire_closes_what_a_longer_one_has_too() -> None:
    cache = PrefixCache(MOST)
    cache.retire(1, log(1, 2, tail=5), 2 * BLOCK + 5)
    cache.retire(2, log(1, 3), 2 * BLOCK)
    told(cache)
    cache.retire(3, log(1, 2, tail=30), 2 * BLOCK + 30)
    assert told(cache) == ([1], {3: 2 * BLOCK + 30})
    # Before the service was told of it, it is closed without having been cached.
    cache.retire(4, log(1, 2, tail=40), 2 * BLOCK + 40)
    cache.retire(5, log(1, 2, tail=41), 2 * BLOCK + 41)
    assert told(cache) == ([3, 4], {5: 2 * BLOCK + 41})
    assert (len(cache), cache.tokens, cache.evictions) == (2, 4 * BLOCK + 41, 0)


def test_retire_evicts_the_oldest_and_closes_what_is_short() -> None:
    cache = PrefixCache(2)
    for number in (1, 2, 3):
        cache.retire(number, log(number), BLOCK)
    assert told(cache) == ([1], {2: BLOCK, 3: BLOCK})
    cache.retire(4, log(4), BLOCK - 1)
    assert told(cache) == ([4], {})
    assert (len(cache), cache.evictions) == (2, 1)
    cache.evicted([2, 2, 77])
    assert (len(cache), cache.evictions, cache.tokens) == (1, 2, BLOCK)
    assert not cache.waits


def test_cache_that_is_off_has_no_donors() -> None:
    cache = PrefixCache(0)
    cache.offer(1, log(1), SimpleNamespace(open=True, length=BLOCK))
    cache.retire(1, log(1), BLOCK)
    assert told(cache) == ([1], {})
    assert matched(cache, log(1, 2)) == (0, 0)
    assert cache.describe() is None


@dataclass
class Known:
    """A donor as the model knows it."""

    log: TokenBlocks
    held: SimpleNamespace | None
    length: int = 0

    @property
    def usable(self) -> int:
        if self.held is None:
            return self.length
        return self.held.length if self.held.open else 0


def common(left: list[int], right: list[int]) -> int:
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False))))


class IndexMachine(RuleBasedStateMachine):
    """Sequences open, go on, end, give way; the model is a list, the service a set."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = PrefixCache(MOST)
        self.live: dict[int, Known] = {}
        self.cached: dict[int, Known] = {}
        self.service: dict[int, int | None] = {}
        """What the service has: None for live ones, else the length."""
        self.count = 0

    blocks = st.lists(st.integers(1, 2), max_size=4)
    salts = st.sampled_from(["", "", "", "other"])

    @rule(blocks=blocks, tail=st.integers(0, 9), salt=salts, held=st.integers(0, 5 * BLOCK))
    def begin(self, blocks: list[int], tail: int, salt: str, held: int) -> None:
        own = log(*blocks, tail=tail, salt=salt)
        self.look(own)
        self.count += 1
        state = SimpleNamespace(open=True, length=min(held, len(own.tokens)))
        self.live[self.count] = Known(own, state)
        self.service[self.count] = None
        self.cache.offer(self.count, own, state)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), block=st.integers(1, 2), tail=st.integers(0, 70))
    def go_on(self, data: st.DataObject, block: int, tail: int) -> None:
        one = self.live[data.draw(st.sampled_from(sorted(self.live)))]
        assert isinstance(one.log.tokens, list) and one.held is not None
        one.log.tokens.extend(tokens(block, tail=tail))
        one.held.length = len(one.log.tokens) - 1
        one.held.open = True

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def lose_one(self, data: st.DataObject) -> None:
        held = self.live[data.draw(st.sampled_from(sorted(self.live)))].held
        assert held is not None
        held.open = False

    @precondition(lambda self: self.live)
    @rule(data=st.data(), keep=st.booleans())
    def end(self, data: st.DataObject, keep: bool) -> None:
        number = data.draw(st.sampled_from(sorted(self.live)))
        one = self.live.pop(number)
        length = one.usable if keep else 0
        self.cache.retire(number, one.log, length)
        if length < BLOCK:
            return
        for other, known in list(self.cached.items()):
            if known.log.salt == one.log.salt and (
                common(known.log.tokens[: known.length], one.log.tokens[:length]) == known.length  # type: ignore[arg-type]
            ):
                del self.cached[other]
        self.cached[number] = Known(one.log, None, length)
        if len(self.cached) > MOST:
            del self.cached[next(iter(self.cached))]

    @rule()
    def tell(self) -> None:
        close, keep = told(self.cache)
        for number in close:
            self.service.pop(number, None)
        for number, length in keep.items():
            assert self.service[number] is None, "only what is live can be cached"
            self.service[number] = length
        assert not self.cache.waits
        assert {n for n, length in self.service.items() if length is None} == set(self.live)
        assert {n: length for n, length in self.service.items() if length is not None} == {
            n: one.length for n, one in self.cached.items()
        }

    @rule(data=st.data())
    def give_way(self, data: st.DataObject) -> None:
        there = sorted(n for n, length in self.service.items() if length is not None)
        gone = [number for number in there if data.draw(st.booleans())]
        self.cache.evicted(gone)
        for number in gone:
            self.service.pop(number)
            self.cached.pop(number, None)

    @rule()
    def lose_all(self) -> None:
        self.cache.lost()
        self.service.clear()
        self.live.clear()
        self.cached.clear()

    @rule(blocks=blocks, tail=st.integers(0, 70), salt=salts)
    def ask(self, blocks: list[int], tail: int, salt: str) -> None:
        self.look(log(*blocks, tail=tail, salt=salt))

    def look(self, wanted: TokenBlocks) -> None:
        donors = {**self.live, **self.cached}
        most = max(0, len(wanted.tokens) - 1)

        def shared(one: Known) -> int:
            if one.log.salt != wanted.salt:
                return 0
            return min(common(wanted.tokens, one.log.tokens), one.usable, most)  # type: ignore[arg-type]

        best = max(map(shared, donors.values()), default=0)
        found = self.cache.match(wanted, most)
        if found is None:
            # What live ones wrote since they were offered is not looked for.
            offered = [one for one in donors.values() if one.held is None]
            sure = max(map(shared, offered), default=0)
            assert sure < BLOCK or len(donors) > MOST_TRIED
            return
        assert BLOCK <= found.length <= shared(donors[found.sequence_id]) <= best

    @invariant()
    def figures_add_up(self) -> None:
        assert len(self.cache) == len(self.cached) <= MOST
        assert self.cache.tokens == sum(one.length for one in self.cached.values())
        indexed = {one.sequence_id for donors in self.cache._by_hash.values() for one in donors}
        assert indexed <= set(self.live) | set(self.cached)


TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


def test_match_finds_the_best_of_cached_ones_to_within_a_block() -> None:
    """Where there are few enough to be looked at, nothing worth a block is missed."""
    chance = random.Random(1)
    for _ in range(200):
        cache, logs = PrefixCache(MOST_TRIED), {}
        for number in range(1, MOST_TRIED + 1):
            one = log(*(chance.randint(1, 2) for _ in range(chance.randint(1, 5))), tail=9)
            cache.retire(number, one, len(one.tokens))
            logs[number] = one.tokens
        wanted = log(*(chance.randint(1, 2) for _ in range(5)))
        best = max(common(wanted.tokens, one) for one in logs.values())  # type: ignore[arg-type]
        found = matched(cache, wanted)[1]
        assert best - BLOCK < found <= best or best < BLOCK
