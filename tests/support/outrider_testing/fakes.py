"""Draft and verify services over a toy model, for tests of everything around the models.

The servers, streams and messages are the real ones. Only the engine is a toy: the next token is
a hash of the whole history, so a single token that is wrong, missing, or rolled back wrongly
changes everything after it. Sessions hold the tokens whose KV a real arena would hold, and keep
to the protocol to the letter. Faults are switched on by the fields of ``Toy``.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from outrider.draft_service import service as draft_service
from outrider.shared.config.schema import ServeConfig
from outrider.shared.core import wire
from outrider.shared.core.errors import RefusalCode, SequenceRefused
from outrider.shared.core.model_facts import EngineInfo, ModelFacts
from outrider.shared.core.types import (
    Decoding,
    OpenSequence,
    PositionLogprobs,
    Proposal,
    ProposeItem,
    Refusal,
    RoundResult,
    Verdict,
    VerifyItem,
)
from outrider.shared.process.grpc_server import Server
from outrider.shared.rounds.servicer import GrantedRoundMessage, add_to_server
from outrider.verify_service import service as verify_service

VOCAB = 300
_BLOCK = bytes(1 << 15)


def _hash(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


def next_token(history: Sequence[int], decoding: Decoding, vocab: int = VOCAB) -> int:
    """The toy base model: a pure function of the history, and of the seed when sampling."""
    seed = decoding.seed if decoding.temperature > 0 else None
    return _hash(tuple(history), seed, decoding.temperature) % vocab


def plain(
    prompt: Sequence[int], count: int, decoding: Decoding | None = None, vocab: int = VOCAB
) -> list[int]:
    """What the base alone writes: the reference of every test."""
    log = list(prompt)
    for _ in range(count):
        log.append(next_token(log, decoding or Decoding(), vocab))
    return log[len(prompt) :]


class Gate(threading.Event):
    """For ``Toy.hold``: tells when a round has come to stand."""

    def __init__(self) -> None:
        super().__init__()
        self.reached = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        self.reached.set()
        return super().wait(timeout)


@dataclass
class Toy:
    """What a toy service is, and which faults it has; fields may be changed while it runs."""

    vocab: int = VOCAB
    arena_tokens: int = 100_000
    max_positions: int = 4096
    max_k: int = 16
    fingerprint: str = "f" * 64
    eos: tuple[int, ...] = ()
    agreement: int = 70
    """Of 100 draft tokens, how many are the base's."""
    seconds_per_round: float = 0.0
    seconds_per_row: float = 0.0
    spin: bool = False
    """Whether that time is spent computing; else asleep."""
    refuse: Callable[[Any], Refusal | None] = lambda item: None
    """Asked for each item; a refusal is answered in the item's place."""
    refuse_open: Callable[[OpenSequence], SequenceRefused | None] = lambda request: None
    hold: threading.Event | None = None
    """While set to an event that is clear, rounds hang."""
    protocol: int = wire.PROTOCOL
    model: str = "toy"
    used: int = 0
    live: int = 0
    cached: dict[tuple[Any, int], list[int]] = field(default_factory=dict)
    """Tokens of cached sequences, by session and id, the oldest first; they take as many slots."""
    hits: list[int] = field(default_factory=list)
    """Tokens that each sequence took over from another one by copy."""
    rounds: int = 0
    items: list[Any] = field(default_factory=list)
    """Every item that came, in order."""
    opened: list[OpenSequence] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def tokens_cached(self) -> int:
        return sum(map(len, self.cached.values()))

    def stand(self) -> Gate:
        """From now on rounds hang until ``set`` of what this returns."""
        self.hold = gate = Gate()
        return gate


@dataclass
class _Held:
    request: OpenSequence
    tokens: list[int] = field(default_factory=list)


class _Session:
    # No device that takes turns by itself, with a draft or without.
    engine = SimpleNamespace(runner=None)
    alone = None

    def __init__(self, toy: Toy) -> None:
        self.toy = toy
        self.held: dict[int, _Held] = {}
        self.evicted: list[int] = []

    def open(self, request: OpenSequence) -> None:
        toy = self.toy
        with toy.lock:
            known = self.held.get(request.sequence_id)
            if known is not None:
                if known.request.epoch == request.epoch:
                    return
                self._free(request.sequence_id)
            refusal = toy.refuse_open(request)
            if refusal is not None:
                raise refusal
            if toy.used + request.capacity > toy.arena_tokens:
                raise SequenceRefused(
                    RefusalCode.NO_CAPACITY, f"{toy.arena_tokens - toy.used} tokens are free"
                )
            held = _Held(request)
            if request.copy and request.parent_id is not None:
                live = self.held.get(request.parent_id)
                tokens = toy.cached.get((self, request.parent_id)) if live is None else live.tokens
                held.tokens = (tokens or [])[: request.prefix_len]
                toy.hits.append(len(held.tokens))
            toy.used += request.capacity
            toy.live += 1
            toy.opened.append(request)
            self.held[request.sequence_id] = held
            self._make_room()

    def close(self, sequence_id: int) -> None:
        with self.toy.lock:
            if sequence_id in self.held:
                self._free(sequence_id)
            self.toy.cached.pop((self, sequence_id), None)

    def cache(self, sequence_id: int, length: int) -> None:
        with self.toy.lock:
            if sequence_id in self.held:
                self.toy.cached[self, sequence_id] = self.held[sequence_id].tokens[:length]
                self._free(sequence_id)
                self._make_room()

    def _make_room(self) -> None:
        toy = self.toy
        while toy.used + toy.tokens_cached > toy.arena_tokens:
            session, sequence_id = next(iter(toy.cached))
            del toy.cached[session, sequence_id]
            session.evicted.append(sequence_id)

    def release(self) -> None:
        with self.toy.lock:
            for sequence_id in list(self.held):
                self._free(sequence_id)
            for key in [key for key in self.toy.cached if key[0] is self]:
                del self.toy.cached[key]

    def _free(self, sequence_id: int) -> None:
        self.toy.used -= self.held.pop(sequence_id).request.capacity
        self.toy.live -= 1

    def round(self, items: Sequence[Any]) -> RoundResult[Any]:
        toy = self.toy
        started = time.perf_counter()
        result: RoundResult[Any] = RoundResult()
        if toy.hold is not None:
            toy.hold.wait(30)
        toy.rounds += bool(items)
        for item in items:
            toy.items.append(item)
            refusal = toy.refuse(item) or self._check(item)
            if refusal is not None:
                result.refusals.append(refusal)
                continue
            held = self.held[item.sequence_id]
            del held.tokens[item.base_len :]
            held.tokens.extend(item.append)
            answer, rows = self.answer(item, held)
            result.rows += rows
            result.answers.append(answer)
        pause = (toy.seconds_per_round if items else 0) + toy.seconds_per_row * result.rows
        if toy.spin:
            until = time.perf_counter() + pause
            while time.perf_counter() < until:
                hashlib.sha256(_BLOCK)  # computes without the interpreter's lock, as a model does
        elif pause:
            time.sleep(pause)
        result.model_seconds = time.perf_counter() - started
        result.evicted, self.evicted = self.evicted, []
        return result

    def _check(self, item: Any) -> Refusal | None:
        def refusal(code: RefusalCode, held_len: int = 0) -> Refusal:
            return Refusal(item.sequence_id, item.epoch, code, code.name, held_len)

        held = self.held.get(item.sequence_id)
        if held is None or item.epoch > held.request.epoch:
            return refusal(RefusalCode.UNKNOWN)
        if item.epoch < held.request.epoch:
            return refusal(RefusalCode.STALE_EPOCH)
        if item.base_len > len(held.tokens):
            return refusal(RefusalCode.KV_MISSING, len(held.tokens))
        extra = item.k if isinstance(item, ProposeItem) else len(item.proposal)
        if not item.append or item.base_len + len(item.append) + extra > held.request.capacity:
            return refusal(RefusalCode.INVALID)
        if max(item.append) >= self.toy.vocab:
            return refusal(RefusalCode.INVALID)
        return None

    def answer(self, item: Any, held: _Held) -> tuple[Any, int]:
        raise NotImplementedError


class _DraftSession(_Session):
    def answer(self, item: ProposeItem, held: _Held) -> tuple[Proposal, int]:
        toy = self.toy
        n = len(held.tokens)
        history = list(held.tokens)
        for _ in range(item.k):
            token = next_token(history, held.request.decoding, toy.vocab)
            if _hash("draft", tuple(history)) % 100 >= toy.agreement:
                token = (token + 1) % toy.vocab
            history.append(token)
        proposed = tuple(history[n:])
        # The last proposed token is not forwarded: its KV is missing.
        held.tokens = history[: max(n, n + item.k - 1)]
        rows = len(item.append) + max(0, item.k - 1)
        return Proposal(item.sequence_id, item.epoch, n, proposed), rows


class _VerifySession(_Session):
    def answer(self, item: VerifyItem, held: _Held) -> tuple[Verdict, int]:
        toy, decoding = self.toy, held.request.decoding
        n = len(held.tokens)
        rows = len(item.append) + len(item.proposal)
        if item.extend_only:
            return Verdict(item.sequence_id, item.epoch, 0, None, n), rows
        history = list(held.tokens)
        accepted = 0
        while True:
            token = next_token(history, decoding, toy.vocab)
            if accepted == len(item.proposal) or token != item.proposal[accepted]:
                break
            history.append(token)
            accepted += 1
        held.tokens = history
        logprobs: tuple[PositionLogprobs, ...] = ()
        if decoding.logprobs is not None:
            logprobs = tuple(toy_logprobs(one, decoding.logprobs) for one in (*history[n:], token))
        verdict = Verdict(item.sequence_id, item.epoch, accepted, token, n + accepted + 1, logprobs)
        return verdict, rows


def toy_logprobs(token: int, count: int) -> PositionLogprobs:
    """Made-up log-probabilities that depend on the token alone."""
    return PositionLogprobs(-token / 100, tuple((i, -i / 10) for i in range(count)))


class _Engine:
    cores = 1
    works_between = False

    def __init__(self, toy: Toy, session: Callable[[Toy], _Session]) -> None:
        self._toy = toy
        self._session = session

    def connect(self) -> _Session:
        return self._session(self._toy)

    def info(self) -> EngineInfo:
        toy = self._toy
        facts = ModelFacts(
            name=toy.model,
            architecture="Toy",
            parameters=1,
            weight_bytes=4,
            vocab_size=toy.vocab,
            vocab_fingerprint=toy.fingerprint,
            max_positions=toy.max_positions,
            device="cpu",
            dtype="float32",
            eos_token_ids=toy.eos,
            runner="toy",
        )
        return EngineInfo(
            facts,
            arena_tokens=toy.arena_tokens,
            arena_tokens_used=toy.used,
            arena_tokens_cached=toy.tokens_cached,
            arena_tokens_largest_free=toy.arena_tokens - toy.used - toy.tokens_cached,
            arena_longest=toy.arena_tokens,
            sequences=toy.live,
            cached=len(toy.cached),
            max_k=toy.max_k,
        )


class _Messages:
    """What a stream reads; a message has been acted on when the next one is asked for."""

    def __init__(self, messages: Iterator[Any], acted_on: Callable[[Any], None]) -> None:
        self._messages = messages
        self._acted_on = acted_on
        self._last: Any = None

    def __iter__(self) -> _Messages:
        return self

    def __next__(self) -> Any:
        last, self._last = self._last, None
        if last is not None:
            self._acted_on(last)
        self._last = next(self._messages)
        return self._last


SERVICES: dict[str, Any] = {"draft": draft_service, "verify": verify_service}
"""The modules that make the services' servicers, by role."""


def engine(role: str, toy: Toy) -> Any:
    """The engine of the service ``role``."""
    return _Engine(toy, _DraftSession if role == "draft" else _VerifySession)


class ToyService:
    """One running toy service; ``kill`` and ``start`` as often as wanted, at one address."""

    def __init__(self, role: str, listen: str, toy: Toy | None = None) -> None:
        """``role``: "draft" or "verify"."""
        self.role = role
        self.listen = listen
        self.toy = toy or Toy()
        self.free: list[tuple[int, list[Any]]] = []
        """Rounds that it ran by itself: the number of the grant's message, and the items."""
        self.changes: list[Any] = []
        """The changes to grants that it has heard."""
        self._server: Server | None = None
        self.start()

    def start(self) -> None:
        """Starts the service with nothing held."""
        servicer = SERVICES[self.role].make_servicer()
        servicer.attach(engine(self.role, self.toy))
        servicer.watch(self._seen)
        rounds = servicer.Rounds
        servicer.Rounds = lambda messages, context: rounds(
            _Messages(messages, self._heard), context
        )
        self._server = Server(
            ServeConfig(listen=self.listen, max_calls=16, reflection=False),
            lambda server: add_to_server(server, servicer, self.role.capitalize()),
            [f"outrider.v1.{self.role.capitalize()}"],
        )
        self._server.serving()

    def _seen(self, message: Any, items: Sequence[Any], *_: Any) -> None:
        if isinstance(message, GrantedRoundMessage):
            self.free.append((message.round, list(items)))

    def _heard(self, message: Any) -> None:
        if message.HasField("change"):
            self.changes.append(message.change)

    def kill(self) -> None:
        """Ends it at once, as a crash would: streams break, nothing is said."""
        if self._server is not None:
            self._server.drain(grace=0)
            self._server = None
