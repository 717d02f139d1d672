"""Process-wide settings of the libraries underneath, which they read when they are loaded.

What the user has set in the environment stays as it is.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

# Where gRPC's older poller serves a connection, the thread that waits for a completion reads
# the socket itself; with the event engine a second thread reads and wakes the first. Measured
# on 2 cores, a round trip over one stream and a unix socket, interleaved runs: 257 µs against
# 294 µs when quiet, 440 µs against 656 µs when busy. A release that no longer knows the names
# would complain in the log, so they are given only to those that do.
_GRPC_EXPERIMENTS = "-event_engine_client,-event_engine_listener"
_GRPC_BEFORE = (1, 85)


def before_grpc(environment: MutableMapping[str, str] | None = None) -> None:
    """Chooses gRPC's poller; call before ``import grpc``."""
    from importlib import metadata  # takes longer than most commands otherwise do

    env = os.environ if environment is None else environment
    try:
        version = tuple(int(part) for part in metadata.version("grpcio").split(".")[:2])
    except (metadata.PackageNotFoundError, ValueError):
        return
    if version < _GRPC_BEFORE:
        env.setdefault("GRPC_EXPERIMENTS", _GRPC_EXPERIMENTS)


def before_torch(threads: int | None, environment: MutableMapping[str, str] | None = None) -> None:
    """Keeps the thread pools of two model processes on one host from fighting.

    Draft and verifier take turns. A pool that spins after its work, as OpenMP's does by
    default, takes the cores from the process whose turn it is. Call before ``import torch``.
    """
    env = os.environ if environment is None else environment
    env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    if threads is not None:
        env.setdefault("OMP_NUM_THREADS", str(threads))
