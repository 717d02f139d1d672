"""Captured CUDA graphs by the sizes they are for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable

import torch

log = logging.getLogger(__name__)

MOST_GRAPHS = 1024
"""Captures that are made while nobody waits; each takes some memory."""


class Graphs:
    """Runs chains of launches, and captures those that come again.

    The first time a chain runs plainly, which compiles and loads what is missing: a capture may
    not. A chain must launch the same kernels over the same memory whenever its key is the same.
    """

    def __init__(self, *, enabled: bool, patience: int = 1) -> None:
        """``enabled`` False always runs plainly. ``patience``: plain runs of a key before it is
        captured by whoever asks for it once more. A capture takes several times as long as they
        do, and is better made by ``capture_one`` while nobody waits."""
        self.enabled = enabled
        self._patience = patience
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._waiting: dict[Hashable, tuple[int, Callable[[], None]]] = {}
        """Chains that are not captured, the oldest first, and how often they ran."""

    def __len__(self) -> int:
        """Graphs captured so far."""
        return len(self._graphs)

    def run(self, key: Hashable, chain: Callable[[], None]) -> None:
        """Runs ``chain``, or replays its capture."""
        if not self.enabled:
            chain()
            return
        graph = self._graphs.get(key)
        if graph is None:
            runs, _ = self._waiting.get(key, (0, chain))
            if runs < self._patience:
                chain()
                self._waiting[key] = runs + 1, chain
                return
            graph = self._capture(key, chain)
        graph.replay()

    def capture_one(self) -> bool:
        """Captures a chain that ran; whether there was any."""
        if not self._waiting or len(self) >= MOST_GRAPHS:
            return False
        key, (_, chain) = next(iter(self._waiting.items()))
        self._capture(key, chain)
        return True

    def _capture(self, key: Hashable, chain: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = self._graphs[key] = self._graph(key, chain)
        self._waiting.pop(key, None)
        log.debug("captured %s", key)
        return graph

    def _graph(self, key: Hashable, chain: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process may go on using CUDA meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            chain()
        return graph
