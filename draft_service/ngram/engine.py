"""The n-gram draft's engine: find the longest suffix seen before, propose what followed it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from outrider.draft_service.ngram.memory import TextExtent, TextMemory
from outrider.draft_service.proposing import ProposingEngine
from outrider.shared.config.ngram import NgramName
from outrider.shared.config.schema import ModelConfig
from outrider.shared.core.types import OpenSequence, Proposal, ProposeItem, Refusal, SparseRow
from outrider.shared.rounds.session import Held

BACKLOG = 2048
"""Tokens that an item may bring the automaton nearer to the log, beyond those that it appends: some
5 ms. A prefix that was shared or cached comes without them."""


class NgramEngine(ProposingEngine):
    """Proposes what followed the end of the text where it stood before.

    As many tokens as such matches have earned, K at most, and none where the text is new. Only
    what is committed is ever added to an automaton, so there is nothing to take back; what is
    proposed counts as held, like the KV of a model's proposal, until the next item says otherwise.
    For a rule that needs the draft's distribution, that is the proposed token alone.
    """

    def __init__(self, memory: TextMemory, max_k: int, least_match: int) -> None:
        """``least_match``: tokens of a match, at least, that is proposed from."""
        super().__init__(memory, max_k)
        self._least_match = least_match

    @property
    def trial_amounts(self) -> tuple[int, ...]:
        """See ``Engine.trial_amounts``."""
        return tuple(k for k in (1, 8) if k <= self.max_k)

    def trial(
        self, opened: OpenSequence, base_len: int, tokens: Sequence[int], amount: int
    ) -> ProposeItem:
        """See ``Engine.trial``: of a text that repeats, so that there is something to propose."""
        append = (0,) * (1 if amount else len(tokens))
        return ProposeItem(opened.sequence_id, opened.epoch, base_len, append, amount)

    def tokens_of(self, item: ProposeItem) -> Sequence[int]:
        """See ``Engine.tokens_of``: any token may come in a text."""
        return ()

    def run(self, work: Sequence[tuple[ProposeItem, Held]]) -> tuple[list[Proposal | Refusal], int]:
        """See ``Engine.run``; rows are the tokens taken in."""
        return [self._serve(*one) for one in work], sum(len(item.append) for item, _ in work)

    def settle(
        self, work: Sequence[tuple[ProposeItem, Held]], found: Sequence[Any]
    ) -> tuple[list[Proposal | Refusal], int]:
        """See ``Engine.settle``; ``found`` is of no use: there is no device."""
        return self.run(work)

    def _serve(self, item: ProposeItem, held: Held) -> Proposal:
        extent, log = held.extent, held.log
        assert isinstance(extent, TextExtent)
        extent.trust.learn(log)
        there = _follow(extent, item, log)
        committed_len = len(log)
        k = self._clipped(item) if there else 0
        tokens = self._proposal(extent, committed_len, k) if k else []
        extent.advance(committed_len + max(len(tokens) - 1, 0))
        log.extend(tokens)
        rows = tuple(SparseRow((token,), (1.0,)) for token in tokens)
        return Proposal(
            item.sequence_id,
            item.epoch,
            committed_len,
            tuple(tokens),
            rows if held.decoding.rule.needs_rows else (),
        )

    def _proposal(self, extent: TextExtent, committed_len: int, k: int) -> list[int]:
        match_len = extent.automaton.match_len
        if match_len < self._least_match:
            return []
        tokens = extent.automaton.continuation(min(k, extent.trust.tokens(match_len)))
        extent.trust.proposed(match_len, committed_len, tokens)
        return tokens


def _follow(extent: TextExtent, item: ProposeItem, log: Sequence[int]) -> bool:
    """Brings the automaton nearer to ``log``; whether it is there.

    Below ``base_len`` the two agree, as far as the automaton goes. Messages may come again, and
    with other tokens where a peer is wrong: then it begins anew.
    """
    automaton, base_len = extent.automaton, item.base_len
    if automaton.text(base_len, automaton.size) != list(log[base_len : automaton.size]):
        automaton.clear()
    begin = automaton.size
    for token in log[begin : begin + len(item.append) + BACKLOG]:
        automaton.add(token)
    return automaton.size == len(log)


def make_engine(config: ModelConfig, name: NgramName) -> NgramEngine:
    """The engine of a draft that is called so."""
    memory = TextMemory(config.path, config.arena_bytes, config.max_positions)
    return NgramEngine(memory, config.max_k, name.least_match)
