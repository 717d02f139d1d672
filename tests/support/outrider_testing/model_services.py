"""Services over real engines, in the test's own process."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from outrider.shared.config.schema import ServeConfig
from outrider.shared.process.grpc_server import Server
from outrider.shared.rounds.servicer import GrantedRoundMessage, add_to_server


def start_model(
    role: str,
    config: Any,
    listen: str,
    runner: Callable[[Any], Any] = lambda plain: plain,
    device: Any = None,
) -> SimpleNamespace:
    """One service over the engine that its program would build.

    ``runner``: makes another runner of the engine's; ``device``: see ``RoundsServicer.attach``.
    ``rows``: of each round. ``free``: of each round that it ran by itself, the number of the
    grant's message and the items.
    """
    if role == "draft":
        from outrider.draft_service.__main__ import build
        from outrider.draft_service.service import make_servicer
    else:
        from outrider.verify_service.__main__ import build
        from outrider.verify_service.service import make_servicer
    servicer = make_servicer()
    engine = build(config, lambda text: None)
    engine.runner = runner(engine.runner)
    rows: list[int] = []
    run = engine.run

    def counted(work: Any) -> Any:
        # Before the answer goes out: a test may look as soon as it has come.
        answers, count = run(work)
        rows.append(count)
        return answers, count

    free: list[tuple[int, list[Any]]] = []

    def seen(message: Any, items: Any, *_: Any) -> None:
        if isinstance(message, GrantedRoundMessage):
            free.append((message.round, list(items)))

    engine.run = counted
    servicer.attach(engine, device=device)
    servicer.watch(seen)
    name = role.capitalize()
    server = Server(
        ServeConfig(listen=listen, max_calls=8, reflection=False),
        lambda grpc_server: add_to_server(grpc_server, servicer, name),
        [f"outrider.v1.{name}"],
    )
    server.serving()
    return SimpleNamespace(server=server, engine=engine, listen=listen, rows=rows, free=free)
