"""Captured CUDA graphs by the sizes they are for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable

import torch

log = logging.getLogger(__name__)


class Graphs:
    """Runs chains of launches; the second time a key is seen its chain is captured.

    The first time it runs plainly, which compiles and loads what is missing: a capture may not.
    A chain must launch the same kernels over the same memory whenever its key is the same.
    """

    def __init__(self, *, enabled: bool) -> None:
        """``enabled`` False always runs plainly."""
        self.enabled = enabled
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._seen: set[Hashable] = set()

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
            if key not in self._seen:
                self._seen.add(key)
                chain()
                return
            graph = torch.cuda.CUDAGraph()
            # Other threads of the process may go on using CUDA meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                chain()
            self._graphs[key] = graph
            log.debug("captured %s", key)
        graph.replay()
