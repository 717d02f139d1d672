"""The suffix automaton of a growing text: the longest suffix of it that it has seen before.

Blumer et al. 1985, built online: a token is added in O(1) amortised time, however often passages
repeat. A state stands for all substrings that end at the same places; its link leads to the
longest suffix that ends at more places. So the link of the state of the whole text is the longest
suffix that occurs twice.

All of it lies in memory that its owner provides, ``BYTES_PER_TOKEN`` for each token that there is
room for: arrays of 32-bit numbers, and no object for any state or transition.
"""

from __future__ import annotations

ROOT, NONE = 0, 0xFFFFFFFF
_STATES, _EDGES, _SLOTS = 2, 3, 4
"""Per token at most: states, transitions, and places of the table that finds these, which is so
never more than three quarters full."""
_COLUMNS = {
    # of the text
    "_text": 1,
    # of states: the longest substring's length, the link, where it was last seen to end, and the
    # first of its transitions
    "_length": _STATES,
    "_link": _STATES,
    "_end": _STATES,
    "_first": _STATES,
    # of transitions: from where, by which token, to where, and the next one of the same state
    "_source": _EDGES,
    "_token": _EDGES,
    "_target": _EDGES,
    "_next": _EDGES,
    # transitions by state and token: one more than the transition's number, 0 where there is none
    "_slots": _SLOTS,
}
BYTES_PER_TOKEN = 4 * sum(_COLUMNS.values())
MOST_RECENT = 8
"""So many of the longest suffixes that a text ends with have their last place noted. A shorter one
may be taken from an earlier place than its last: noting all takes O(n) where tokens repeat."""
_MIX_STATE, _MIX_TOKEN = 0x9E3779B1, 0x85EBCA77


class SuffixAutomaton:
    """Tokens in [0, 2**32), as many as there is room for; see the module."""

    __slots__ = (
        *_COLUMNS,
        "_edges",
        "_last",
        "_places",
        "_states",
        "capacity",
        "match_end",
        "match_len",
        "size",
    )

    _text: memoryview
    _length: memoryview
    _link: memoryview
    _end: memoryview
    _first: memoryview
    _source: memoryview
    _token: memoryview
    _target: memoryview
    _next: memoryview
    _slots: memoryview

    def __init__(self, memory: memoryview) -> None:
        """``memory``: items of 32 bits for at least one token; what is in it does not matter."""
        self.capacity = 4 * len(memory) // BYTES_PER_TOKEN
        at = 0
        for name, times in _COLUMNS.items():
            end = at + times * self.capacity
            setattr(self, name, memory[at:end])
            at = end
        self._places = _SLOTS * self.capacity
        self.clear()

    def clear(self) -> None:
        """Begins anew, with an empty text."""
        self.size = 0
        """Tokens of the text."""
        self.match_len = 0
        """Length of the longest suffix that was seen before; 0: none was."""
        self.match_end = 0
        """The text went on here, ``text[match_end]``, where that suffix was seen before."""
        self._slots[:] = memoryview(bytes(4 * len(self._slots))).cast("I")
        self._edges = self._last = 0
        self._states = 0
        self._new_state(0, NONE, 0)

    def text(self, begin: int, end: int) -> list[int]:
        """Tokens ``begin … end-1``; fewer where the text ends before."""
        return self._text[begin : min(end, self.size)].tolist()

    def add(self, token: int) -> None:
        """Makes the text one token longer. Raises ``IndexError`` where there is no more room."""
        if self.size >= self.capacity:
            raise IndexError(f"the automaton has room for {self.capacity} tokens")
        length, link, target = self._length, self._link, self._target
        self._text[self.size] = token
        self.size = size = self.size + 1
        state = self._last
        new = self._last = self._new_state(size, ROOT, size)
        edge = NONE
        while state != NONE:
            edge = self._edge(state, token)
            if edge != NONE:
                break
            self._new_edge(state, token, new)
            state = link[state]
        if state != NONE:
            found = target[edge]
            if length[found] != length[state] + 1:
                found = self._split(state, token, found)
            link[new] = found
        self._note_match(link[new])

    def continuation(self, count: int) -> list[int]:
        """What followed the longest suffix where it was seen before, ``count`` tokens.

        Where the text ends before that many, the proposal goes on with itself: the suffix overlaps
        its earlier place, so the text repeats with that period. Empty where nothing was seen
        before.
        """
        if not self.match_len:
            return []
        tokens = self.text(self.match_end, self.match_end + count)
        for at in range(count - len(tokens)):
            tokens.append(tokens[at])
        return tokens

    # --- parts -----------------------------------------------------------------------------------

    def _note_match(self, state: int) -> None:
        """``state``: of the longest suffix that was seen before. It ends here as well, and so do
        those that its links lead to."""
        link, end, size = self._link, self._end, self.size
        self.match_len, self.match_end = self._length[state], end[state]
        for _ in range(MOST_RECENT):
            if state == ROOT:
                break
            end[state] = size
            state = link[state]

    def _split(self, state: int, token: int, old: int) -> int:
        """A state of its own for the shorter ones of ``old``, which ``state`` leads to by
        ``token``."""
        link, target = self._link, self._target
        new = self._new_state(self._length[state] + 1, link[old], self._end[old])
        edge = self._first[old]
        while edge != NONE:
            self._new_edge(new, self._token[edge], target[edge])
            edge = self._next[edge]
        link[old] = new
        while state != NONE:
            edge = self._edge(state, token)
            if edge == NONE or target[edge] != old:
                break
            target[edge] = new
            state = link[state]
        return new

    def _new_state(self, length: int, link: int, end: int) -> int:
        state = self._states
        self._states = state + 1
        self._length[state], self._link[state] = length, link
        self._end[state], self._first[state] = end, NONE
        return state

    def _edge(self, state: int, token: int) -> int:
        """The transition from ``state`` by ``token``; ``NONE`` where there is none."""
        slots, source, tokens, places = self._slots, self._source, self._token, self._places
        at = (state * _MIX_STATE + token * _MIX_TOKEN) % places
        while edge := slots[at]:
            if source[edge - 1] == state and tokens[edge - 1] == token:
                return edge - 1
            at = at + 1 if at + 1 < places else 0
        return NONE

    def _new_edge(self, state: int, token: int, to: int) -> None:
        """A transition that there was none of."""
        slots, places = self._slots, self._places
        edge = self._edges
        self._edges = edge + 1
        self._source[edge], self._token[edge], self._target[edge] = state, token, to
        self._next[edge], self._first[state] = self._first[state], edge
        at = (state * _MIX_STATE + token * _MIX_TOKEN) % places
        while slots[at]:
            at = at + 1 if at + 1 < places else 0
        slots[at] = edge + 1
