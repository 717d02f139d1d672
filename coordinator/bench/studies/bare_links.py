"""A round of a link by itself: proposal and verdict travel, and no model runs in between.

Models push a link's code and data out of the processor's caches, so a round among them costs
more than this; see ``overhead`` in the table of ``outrider bench links``. This is the floor.
"""

from __future__ import annotations

import dataclasses
import json
import queue
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc

from outrider.coordinator.local.private_stack import Deployed
from outrider.protos import speculation_pb2 as pb
from outrider.protos import speculation_pb2_grpc as rpc
from outrider.shared.core.links import LINKS
from outrider.shared.core.types import Proposal
from outrider.shared.link.carrier import carrier_of
from outrider.shared.link.doorbell import Doorbell
from outrider.shared.link.handshake import Offered
from outrider.shared.link.mailbox import ENDS, Judgement, Layout, ProposalHead, VerdictHead

ROUNDS, WARMUP = 2000, 200
SPIN = 0.02
K = 3
_PATIENCE = 10.0
_LAYOUT = Layout(max_sequences=8, max_k=16, row_entries=64)
_GRANT = 1


def measure(deployed: Deployed, links: Sequence[str]) -> list[dict[str, object]]:
    """Seconds of one round over each of ``links``: median and 99th percentile."""
    made = []
    for link in links:
        way = LINKS[link].way
        if way == "alone" and deployed.draft is not None:
            seconds = _messages(deployed.draft, deployed.base)
            made.append(_figures(f"{link}, two exchanges", seconds))
        elif way == "host":
            made.append(_figures(link, _mailbox(link, 0.0)))
            made.append(_figures(f"{link}, spinning", _mailbox(link, SPIN)))
    return made


def _figures(link: str, seconds: list[float]) -> dict[str, object]:
    cuts = statistics.quantiles(seconds, n=100)
    return {"link": link, "median": cuts[49], "p99": cuts[98], "rounds": len(seconds)}


def _timed(turn: Callable[[int], None]) -> list[float]:
    seconds = []
    for index in range(WARMUP + ROUNDS):
        began = time.perf_counter()
        turn(index)
        seconds.append(time.perf_counter() - began)
    return seconds[WARMUP:]


def _messages(draft: str, base: str) -> list[float]:
    """Rounds without sequences, to the services themselves: draft first, then verify."""
    with grpc.insecure_channel(draft) as to_draft, grpc.insecure_channel(base) as to_base:
        sides: list[tuple[Any, Any]] = [
            (pb.DraftRequest, rpc.DraftStub(to_draft).Rounds),
            (pb.VerifyRequest, rpc.VerifyStub(to_base).Rounds),
        ]
        streams = []
        for message, call in sides:
            asked: queue.SimpleQueue[Any] = queue.SimpleQueue()
            streams.append((message, asked, call(iter(asked.get, None))))

        def turn(index: int) -> None:
            for message, asked, answers in streams:
                asked.put(message(round=index + 1))
                next(answers)

        seconds = _timed(turn)
        for message, asked, answers in streams:
            asked.put(message(round=WARMUP + ROUNDS + 1, goodbye=True))
            for _ in answers:
                pass
            asked.put(None)
        return seconds


def _mailbox(link: str, spin: float) -> list[float]:
    """Rounds through a mailbox, with a draft in another process that proposes at once."""
    claimed: queue.SimpleQueue[Doorbell] = queue.SimpleQueue()
    carrier = carrier_of(link, spin, None)
    offered = carrier.offer(_LAYOUT, lambda mailbox, doorbell: claimed.put(doorbell))
    known = dataclasses.asdict(offered) | {"secret": offered.secret.hex()}
    child = subprocess.Popen(
        [sys.executable, "-c", f"from {__name__} import propose; propose()"],
        stdin=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    with child.stdin:
        child.stdin.write(json.dumps({"offered": known, "spin": spin}))
    doorbell = claimed.get(timeout=_PATIENCE)
    try:
        return _timed(lambda step: _judge(doorbell, step))
    finally:
        doorbell.close()
        child.wait()


def _judge(doorbell: Doorbell, step: int) -> None:
    """The verifier's turn."""
    found = doorbell.await_turn((_GRANT, step), doorbell.mailbox.read_proposals, _PATIENCE)
    assert found is not None
    (one,) = found[1]
    flags = ENDS if step == WARMUP + ROUNDS - 1 else 0
    verdict = Judgement(one.sequence_id, one.epoch, K, 1, one.committed_len + K + 1, K)
    doorbell.mailbox.write_verdicts(VerdictHead(_GRANT, step, flags), [verdict])
    doorbell.ring()


def propose() -> None:
    """The draft's side, in its own process: what to fetch stands on standard input."""
    known = json.load(sys.stdin)
    known["offered"]["secret"] = bytes.fromhex(known["offered"]["secret"])
    offered = Offered(**known["offered"])
    doorbell = carrier_of(offered.link, known["spin"], None).fetch(offered)
    step, length = 0, 100
    while True:
        doorbell.mailbox.write_proposals(
            ProposalHead(_GRANT, step), [Proposal(1, 1, length, tuple(range(K)))]
        )
        doorbell.ring()
        found = doorbell.await_turn((_GRANT, step), doorbell.mailbox.read_verdicts, _PATIENCE)
        assert found is not None
        head, (verdict,) = found
        if head.flags & ENDS:
            return
        step, length = step + 1, verdict.committed_len
