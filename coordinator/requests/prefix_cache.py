"""Whose KV a prompt can take over: what one model service has of other sequences.

Live sequences are donors as far as the service has their KV. Sequences that are over become
cached ones there, for as long as nobody needs their room. A prompt that begins like a donor is
opened with a copy of the donor's KV. This module knows token logs alone: should a service have
less than is thought here, it says so, and the tokens are sent.

Whoever takes over a prefix is a donor of it from then on, so what gives way first is what was
cached first, here as at the services: that is the least recently used.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from outrider.protos import generation_pb2 as public
from outrider.protos import speculation_pb2 as pb

BLOCK = 64
"""Tokens of a block. Donors are found by whole blocks; what is taken over ends anywhere."""
MOST_TRIED = 8
"""Donors that are looked at for one prompt."""


class TokenBlocks:
    """A growing token log with the hashes of its whole blocks, each over all tokens up to its end
    and the salt."""

    __slots__ = ("_hashes", "salt", "tokens")

    def __init__(self, salt: str, tokens: Sequence[int]) -> None:
        """``tokens`` may grow, and is not copied."""
        self.salt = salt
        self.tokens = tokens
        self._hashes: list[int] = []

    def hashes(self, length: int) -> list[int]:
        """Those of the whole blocks within the first ``length`` tokens."""
        made = self._hashes
        for begin in range(len(made) * BLOCK, length - BLOCK + 1, BLOCK):
            # Of a text, whose hash nobody outside this process knows: collisions can't be made.
            before = made[-1] if made else f"salt {self.salt}"
            made.append(hash((before, *self.tokens[begin : begin + BLOCK])))
        return made[: length // BLOCK]

    def common(self, other: TokenBlocks, least: int, most: int) -> int:
        """Tokens that both logs begin with, at most ``most``; 0 where those are fewer than
        ``least``, or the salts differ.

        Compares tokens: hashes may collide.
        """
        length = min(least, most)
        if self.salt != other.salt or self.tokens[:length] != other.tokens[:length]:
            return 0
        most = min(most, len(self.tokens), len(other.tokens))
        while length < most and self.tokens[length] == other.tokens[length]:
            length += 1
        return length


@dataclass(frozen=True, slots=True)
class Match:
    """A prompt's donor, and how many of its tokens the prompt begins with."""

    sequence_id: int
    length: int


class Holding(Protocol):
    """What a service has of a live sequence."""

    @property
    def open(self) -> bool:
        """Whether the service has the sequence."""

    @property
    def length(self) -> int:
        """Tokens whose KV it has."""


@dataclass(slots=True, eq=False)
class _Donor:
    sequence_id: int
    blocks: TokenBlocks
    live: Holding | None
    """None for a cached one."""
    cached: int = 0
    """Tokens cached."""
    hashes: list[int] = field(default_factory=list)
    """Those that it is found by."""

    @property
    def length(self) -> int:
        if self.live is None:
            return self.cached
        return self.live.length if self.live.open else 0


class PrefixCache:
    """The donors at one service, and what that service is to be told of sequences that are over.

    It forgets everything when the connection is lost, as the service does.
    """

    def __init__(self, most: int = 0) -> None:
        """``most``: sequences to have cached at a time; 0: no sequence is a donor."""
        self.most = most
        self.version = 0
        """Rises when there are other donors."""
        self.hits = 0
        self.hit_tokens = 0
        self.evictions = 0
        self.tokens = 0
        """Tokens of cached sequences."""
        self._live: dict[int, _Donor] = {}
        self._cached: dict[int, _Donor] = {}
        self._by_hash: dict[int, dict[_Donor, None]] = {}
        self._to_close: list[int] = []
        self._to_cache: dict[int, int] = {}

    def __len__(self) -> int:
        """Cached sequences."""
        return len(self._cached)

    # --- donors ------------------------------------------------------------------------------

    def match(self, wanted: TokenBlocks, most: int) -> Match | None:
        """The donor of most of the first ``most`` tokens, at least a block; the latest of equals.

        Not where there are many that have less than they share: ``MOST_TRIED`` are looked at.
        """
        levels: list[dict[_Donor, None]] = []
        for one in wanted.hashes(most):
            donors = self._by_hash.get(one)
            if donors is None:
                break
            levels.append(donors)
        best: Match | None = None
        tried: set[_Donor] = set()
        for level in range(len(levels), 0, -1):
            if best is not None and best.length >= level * BLOCK:
                break  # the donors of fewer blocks have no more
            for donor in reversed(levels[level - 1]):
                if donor in tried or donor.blocks is wanted:
                    continue
                if len(tried) == MOST_TRIED:
                    return best
                tried.add(donor)
                held = min(most, donor.length)
                length = wanted.common(donor.blocks, level * BLOCK, held)
                if length >= BLOCK and (best is None or length > best.length):
                    best = Match(donor.sequence_id, length)
        return best

    def offer(self, sequence_id: int, blocks: TokenBlocks, live: Holding) -> None:
        """A live sequence may be a donor of what its log holds now."""
        if not self.most:
            return
        donor = self._live.get(sequence_id)
        if donor is None:
            donor = self._live[sequence_id] = _Donor(sequence_id, blocks, live)
        self._register(donor, len(blocks.tokens))

    def hit(self, tokens: int) -> None:
        """A sequence has taken over so many tokens."""
        self.hits += 1
        self.hit_tokens += tokens

    # --- sequences that are over -------------------------------------------------------------

    def retire(self, sequence_id: int, blocks: TokenBlocks, length: int) -> None:
        """A sequence of which the service may hold something is over.

        With the next message it is cached there, with the first ``length`` tokens of its log, or
        closed where that is not worth it.
        """
        donor = self._live.pop(sequence_id, None)
        if donor is not None:
            self._unregister(donor)
        if not self.most or length < BLOCK:
            self._to_close.append(sequence_id)
            return
        self._close_covered(blocks, length)
        donor = self._cached[sequence_id] = _Donor(sequence_id, blocks, None, length)
        self._register(donor, length)
        self.tokens += length
        self._to_cache[sequence_id] = length
        if len(self._cached) > self.most:
            self._close_cached(next(iter(self._cached.values())))
            self.evictions += 1

    def evicted(self, ids: Iterable[int]) -> None:
        """The service had to give these up."""
        for sequence_id in ids:
            donor = self._cached.get(sequence_id)
            if donor is not None:
                self._forget(donor)
                self.evictions += 1

    def lost(self) -> None:
        """The service has nothing any more."""
        for donor in (*self._live.values(), *self._cached.values()):
            self._unregister(donor)
        self._live.clear()
        self._cached.clear()
        self.tokens = 0
        self._to_close.clear()
        self._to_cache.clear()

    @property
    def waits(self) -> bool:
        """Whether the service is to be told something."""
        return bool(self._to_close or self._to_cache)

    def fill(self, request: pb.DraftRequest | pb.VerifyRequest) -> None:
        """Adds to a message what is to be closed and cached."""
        request.close.extend(self._to_close)
        for sequence_id, length in self._to_cache.items():
            request.cache.add(sequence_id=sequence_id, length=length)
        self._to_close.clear()
        self._to_cache.clear()

    def describe(self) -> public.PrefixCacheDescription | None:
        """As clients see it; None where it is off."""
        if not self.most:
            return None
        return public.PrefixCacheDescription(
            sequences=len(self),
            tokens=self.tokens,
            hits=self.hits,
            hit_tokens=self.hit_tokens,
            evictions=self.evictions,
        )

    # --- parts -------------------------------------------------------------------------------

    def _close_covered(self, blocks: TokenBlocks, length: int) -> None:
        """Closes cached sequences that begin the log: it has all that they have."""
        hashes = blocks.hashes(length)
        for donor in list(self._by_hash.get(hashes[0], ())):
            last = len(donor.hashes)
            if (
                donor.live is None
                and donor.cached <= length
                and donor.hashes[-1] == hashes[last - 1]
                and blocks.common(donor.blocks, donor.cached, donor.cached)
            ):
                self._close_cached(donor)

    def _close_cached(self, donor: _Donor) -> None:
        self._forget(donor)
        self._to_cache.pop(donor.sequence_id, None)
        self._to_close.append(donor.sequence_id)

    def _forget(self, donor: _Donor) -> None:
        """A cached one is no donor any more."""
        del self._cached[donor.sequence_id]
        self.tokens -= donor.cached
        self._unregister(donor)

    def _register(self, donor: _Donor, length: int) -> None:
        self.version += 1
        for one in donor.blocks.hashes(length)[len(donor.hashes) :]:
            donor.hashes.append(one)
            self._by_hash.setdefault(one, {})[donor] = None

    def _unregister(self, donor: _Donor) -> None:
        self.version += 1
        for one in dict.fromkeys(donor.hashes):  # hashes may collide
            donors = self._by_hash[one]
            del donors[donor]
            if not donors:
                del self._by_hash[one]
        donor.hashes.clear()
