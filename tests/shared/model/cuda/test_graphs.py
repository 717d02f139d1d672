"""Which chains are captured, and when; the captures themselves need a GPU."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from types import SimpleNamespace
from typing import Any

import pytest

from outrider.shared.model.cuda import graphs as graphs_module
from outrider.shared.model.cuda.graphs import Graphs


class Noted(Graphs):
    """Notes what is captured and replayed instead."""

    def __init__(self, **options: Any) -> None:
        super().__init__(enabled=True, **options)
        self.log: list[str] = []

    def chain(self, key: Hashable) -> None:
        self.run(key, lambda: self.log.append(f"{key} runs"))

    def _graph(self, key: Hashable, chain: Callable[[], None]) -> Any:
        self.log.append(f"{key} captured")
        return SimpleNamespace(replay=lambda: self.log.append(f"{key} replayed"))


def test_graphs_capture_what_comes_again() -> None:
    graphs = Noted()
    for _ in range(3):
        graphs.chain("a")
    assert graphs.log == ["a runs", "a captured", "a replayed", "a replayed"]
    assert not graphs.capture_one() and len(graphs) == 1


@pytest.mark.parametrize("patience", [2, 3, 5])
def test_graphs_with_patience_are_captured_after_so_many_runs(patience: int) -> None:
    graphs = Noted(patience=patience)
    for _ in range(patience + 2):
        graphs.chain("a")
    assert graphs.log == ["a runs"] * patience + ["a captured"] + ["a replayed"] * 2


def test_graphs_capture_one_takes_the_oldest() -> None:
    graphs = Noted(patience=9)
    for key in "aba":
        graphs.chain(key)
    graphs.log.clear()
    assert graphs.capture_one() and graphs.capture_one() and not graphs.capture_one()
    for key in "abc":
        graphs.chain(key)
    assert graphs.log == ["a captured", "b captured", "a replayed", "b replayed", "c runs"]


def test_graphs_capture_so_many_ahead_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs_module, "MOST_GRAPHS", 2)
    graphs = Noted(patience=1)
    for key in "abc":
        graphs.chain(key)
    assert [graphs.capture_one() for _ in range(3)] == [True, True, False]
    graphs.chain("c")  # who asks for it has it captured all the same
    assert graphs.log[-1] == "c replayed" and len(graphs) == 3


def test_graphs_that_are_not_enabled_run_plainly() -> None:
    graphs = Noted()
    graphs.enabled = False
    for _ in range(5):
        graphs.chain("a")
    assert graphs.log == ["a runs"] * 5 and not graphs.capture_one()
