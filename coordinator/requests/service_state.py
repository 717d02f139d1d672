"""What one service holds of one sequence."""

from __future__ import annotations

from dataclasses import dataclass, field

from outrider.coordinator.requests.prefix_cache import Match, PrefixCache, TokenBlocks


@dataclass(slots=True)
class ServiceState:
    """What one service holds of one sequence."""

    open: bool = False
    reserved: bool = False
    """It was opened on this stream and not closed: an extent may be held there for it, whatever
    the service answered since."""
    epoch: int = 0
    length: int = 0
    """Tokens of the log whose KV is valid there."""
    blocked: bool = False
    """An open was refused for want of room; not asked again until room was made."""
    given_up: bool = False
    """The service can't serve this sequence at all."""
    strikes: int = 0
    """Refusals in a row."""
    full_since: float | None = None
    """When room was first refused to a sequence that had it before; monotonic seconds."""
    cache: PrefixCache = field(default_factory=PrefixCache)
    """What else the service has, for this sequence to begin with."""
    inherited: int = 0
    """Tokens that it was opened with, their KV being another's, until an answer bears that out."""
    branch: bool = False
    """It was opened with KV that lies in another sample's extent."""
    _matched: tuple[int, int, Match | None] = (-1, 0, None)

    def lose(self) -> None:
        """The service does not know the sequence, or is to begin anew."""
        self.open = self.branch = False
        self.length = self.inherited = 0

    def lack(self, held: int) -> None:
        """The service has no more than ``held`` tokens of what it was thought to have."""
        self.length = min(self.length, held)
        self.inherited = min(self.inherited, held)

    def match(self, blocks: TokenBlocks, most: int) -> Match | None:
        """What the sequence may begin with if it is opened now; see ``PrefixCache.match``."""
        version = self.cache.version
        if self._matched[:2] != (version, most):
            # Asked for several times while a round is made ready.
            self._matched = (version, most, self.cache.match(blocks, most))
        return self._matched[2]

    def release(self) -> bool:
        """It is to be closed there, or the stream is gone; whether anything may be held."""
        self.lose()
        reserved, self.reserved = self.reserved, False
        return reserved
