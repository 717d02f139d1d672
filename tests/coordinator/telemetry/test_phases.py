"""Phases of a round: nothing is lost and nothing counted twice."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.coordinator.telemetry import phases


@dataclass
class Exchange:
    sent_ns: int = 0
    answered_ns: int = 0
    model_seconds: float = 0.0
    service_seconds: float = 0.0


MS = 10**6


def test_phases_of_a_round_by_hand() -> None:
    draft = Exchange(1 * MS, 4 * MS, 0.0020, 0.0025)
    verify = Exchange(5 * MS, 12 * MS, 0.0060, 0.0066)
    parts = phases.split(0, 13 * MS, draft, verify)
    assert (parts.draft, parts.verify) == pytest.approx((0.0025, 0.0066))
    assert parts.wire == pytest.approx(0.0005 + 0.0004)
    assert parts.accept == pytest.approx(0.001)
    assert parts.schedule == pytest.approx(0.002)
    assert parts.hidden == 0
    assert parts.total == pytest.approx(0.013)


def test_phases_of_drafting_beside_verifying() -> None:
    draft = Exchange(2 * MS, 8 * MS, 0.005, 0.005)
    verify = Exchange(1 * MS, 7 * MS, 0.005, 0.005)
    parts = phases.split(0, 9 * MS, draft, verify)
    assert parts.hidden == pytest.approx(0.005)
    assert parts.accept == pytest.approx(0.001)
    assert parts.schedule == pytest.approx(0.001)


def test_phases_of_a_round_that_was_lost() -> None:
    parts = phases.split(0, 5 * MS, Exchange(), Exchange())
    assert (parts.draft, parts.verify, parts.wire, parts.accept) == (0, 0, 0, 0)
    assert parts.schedule == parts.total == pytest.approx(0.005)


@given(st.data())
def test_phases_add_up_to_the_round(data: st.DataObject) -> None:
    whole = data.draw(st.integers(10, 10**9))

    def exchange() -> Exchange:
        if not data.draw(st.booleans()):
            return Exchange()
        sent = data.draw(st.integers(1, whole))
        answered = data.draw(st.integers(sent, whole))
        share = data.draw(st.floats(0, 1))
        return Exchange(sent, answered, 0.0, share * (answered - sent) / 1e9)

    parts = phases.split(0, whole, exchange(), exchange())
    named = sum(getattr(parts, name) for name in phases.NAMES) - parts.hidden
    assert named == pytest.approx(parts.total, abs=1e-9)
    assert min(getattr(parts, name) for name in phases.NAMES) >= 0
