"""The observer of a coordinator: hands its records to traces, metrics, the profile and the log.

The round loop calls it while the verifier works on the next round, so it may take its time,
but it runs on the event loop: it does arithmetic and appends, and waits for nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from outrider.coordinator.telemetry import ceiling, phases
from outrider.coordinator.telemetry.metrics import Metering, Now
from outrider.coordinator.telemetry.recent_rounds import RoundsKept
from outrider.coordinator.telemetry.records import ConnectionRecord, RequestRecord, RoundRecord
from outrider.coordinator.telemetry.span_attributes import mode_of
from outrider.coordinator.telemetry.tracing import Tracing
from outrider.shared.core.links import MESSAGES
from outrider.shared.core.model_facts import model_name
from outrider.shared.process.logs import fields
from outrider.shared.telemetry.setup import Telemetry

log = logging.getLogger("outrider.request")


class TelemetryObserver:
    """Implements ``records.Observer`` over the telemetry of this process."""

    def __init__(self, telemetry: Telemetry, *, profile: bool = False) -> None:
        """``profile``: keep the rounds of recent requests."""
        self._runtime: Any = None
        self._tracing = Tracing(telemetry.spans, lambda: self._now().model)
        self._metering = Metering(telemetry.instruments, self._now) if telemetry.metering else None
        self.kept = RoundsKept() if profile else None
        self._traces = telemetry.tracing
        # Records of rounds are only worth building for somebody. Requests are always
        # followed, since each of them is a line of the log.
        self.enabled = self._traces or telemetry.metering or profile
        self.follows = True

    def attach(self, runtime: Any) -> None:
        """``runtime`` is up: what it knows of models and services is of use here."""
        self._runtime = runtime
        if self._metering is not None:
            services = {"verify": runtime.verify_connection.up}
            if runtime.draft_connection is not None:
                services["draft"] = runtime.draft_connection.up
            self._metering.attached(services)

    def traceparent(self, round_number: int, request_ids: Sequence[str]) -> str:
        """See ``Tracing.traceparent``."""
        return self._tracing.traceparent(round_number, request_ids) if self._traces else ""

    def follow(self, round_number: int, request_ids: Sequence[str], traceparent: str) -> None:
        """See ``Tracing.follow``."""
        self._tracing.follow(round_number, request_ids, traceparent)

    def request_started(self, request_id: str, traceparent: str) -> None:
        """A request passed validation."""
        context = self._tracing.begin(request_id, traceparent)
        if self.kept is not None:
            self.kept.begin(request_id, context.trace_hex)

    def round(self, record: RoundRecord) -> None:
        """A round is over."""
        self._guarded(self._round, record)

    def request(self, record: RequestRecord) -> None:
        """A sample is over."""
        self._guarded(self._request, record)

    def connection(self, record: ConnectionRecord) -> None:
        """A service was lost or came back."""
        self._guarded(self._connection_changed, record)

    # --- parts -----------------------------------------------------------------------------------

    def _round(self, record: RoundRecord) -> None:
        if record.traceparent or self._metering is not None:
            parts = phases.split(record.started_ns, record.finished_ns, record.draft, record.verify)
            mode = mode_of(record)
            if record.traceparent:
                self._tracing.round(record, parts, mode)
            if self._metering is not None:
                self._metering.round(record, parts, mode)
        if self.kept is not None:
            self.kept.round(record)

    def _request(self, record: RequestRecord) -> None:
        context = self._tracing.context(record.request_id)
        self._tracing.request(record)
        if self._metering is not None:
            self._metering.request(record)
        if self.kept is not None:
            self.kept.request(record)
        level = logging.WARNING if record.error else logging.INFO
        if log.isEnabledFor(level):
            log.log(
                level, "request %s", record.reason.lower(), extra=fields(context, **_line(record))
            )

    def _connection_changed(self, record: ConnectionRecord) -> None:
        self._tracing.connection(record)
        if self._metering is not None:
            self._metering.connection(record)

    def _guarded(self, call: Callable[[Any], None], record: Any) -> None:
        try:
            call(record)
        except Exception:
            # Seeing must not disturb what is seen.
            log.exception("telemetry failed")

    def _link(self) -> str:
        return MESSAGES if self._runtime is None else str(self._runtime.mailbox_setup.link)

    def _now(self) -> Now:
        runtime = self._runtime
        if runtime is None:
            return Now()
        return Now(
            running=runtime.loop.running,
            waiting=runtime.loop.waiting,
            link=self._link(),
            model=model_name(runtime.base.model.name),
            caches=runtime.loop.prefix_caches,
            ceiling=self._ceiling,
        )

    def _ceiling(self, tokens: float, k: float) -> float | None:
        runtime = self._runtime
        base = runtime.base
        draft = runtime.draft_connection.info if runtime.draft_connection is not None else None
        return ceiling.rate_ceiling(base, draft, tokens, k)


def _line(record: RequestRecord) -> dict[str, Any]:
    """The fields of a request's log line; times are seconds."""
    end = record.finished_ns
    made: dict[str, Any] = {
        "request_id": record.request_id,
        "sample": record.sample_index,
        "reason": record.reason.lower(),
        "prompt_tokens": record.prompt_tokens,
        "cached_prompt_tokens": record.cached_prompt_tokens,
        "completion_tokens": record.completion_tokens,
        "seconds": round((end - record.arrived_ns) / 1e9, 6),
        "queue_seconds": round(((record.admitted_ns or end) - record.arrived_ns) / 1e9, 6),
        "rounds": record.rounds,
        "proposed": sum(record.proposed_by_position),
        "accepted": sum(record.accepted_by_position),
        "rule": record.rule.lower(),
        "temperature": record.decoding.temperature,
        "seed": record.decoding.seed,
    }
    if record.first_token_ns:
        made["first_token_seconds"] = round((record.first_token_ns - record.arrived_ns) / 1e9, 6)
    if record.error:
        made["error"] = record.error
    return made
