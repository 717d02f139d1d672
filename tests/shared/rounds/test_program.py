"""What a service program decides by itself."""

from __future__ import annotations

import pytest

from outrider.shared.rounds.program import spin_seconds


@pytest.mark.parametrize(
    ("busy", "cores", "watches"),
    [(2, 2, False), (1, 2, False), (4, 4, False), (4, 6, True), (8, 64, True), (0, 1, False),
     (0, 2, True)],
)  # fmt: skip
def test_services_watch_for_each_other_only_with_cores_to_spare(
    busy: int, cores: int, watches: bool
) -> None:
    assert (spin_seconds(busy, cores) > 0) is watches
