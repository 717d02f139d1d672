"""Every metric Outrider has, declared once: name, kind, unit, attributes, meaning.

Names under ``gen_ai.``, ``process.`` and ``otel.`` are those of OpenTelemetry's semantic
conventions; the rest is under ``outrider.``. Dashboards, documentation and tests are checked
against this table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from opentelemetry.metrics import CallbackOptions, Histogram, Meter, Observation

Kind = Literal["counter", "updown", "gauge", "histogram"]
Read = Callable[[], Iterable[tuple[float, Mapping[str, str | int]]]]

# Seconds. A round is from half a millisecond (small models on a GPU) to a second; a request
# from a few milliseconds to minutes.
ROUND_BUCKETS = (
    *(0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05),
    *(0.075, 0.1, 0.2, 0.5, 1.0),
)
# Those that the semantic conventions advise for GenAI servers.
REQUEST_BUCKETS = (
    *(0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92),
)
FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0),
    *(7.5, 10.0),
)
TOKEN_BUCKETS = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4),
    *(0.5, 0.75, 1.0, 2.5),
)

COORDINATOR = "coordinator"
SERVICES = "services"
ALL = "all"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: ``attributes`` are the keys its points may carry."""

    name: str
    kind: Kind
    unit: str
    description: str
    where: str
    attributes: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


_OPERATION = ("gen_ai.operation.name", "gen_ai.provider.name", "gen_ai.request.model")

METRICS: tuple[Metric, ...] = (
    # Requests.
    Metric("gen_ai.server.request.duration", "histogram", "s",
           "From a request's arrival to its last token", COORDINATOR,
           (*_OPERATION, "error.type"), REQUEST_BUCKETS),
    Metric("gen_ai.server.time_to_first_token", "histogram", "s",
           "From a request's arrival to its first token", COORDINATOR,
           _OPERATION, FIRST_TOKEN_BUCKETS),
    Metric("gen_ai.server.time_per_output_token", "histogram", "s",
           "Time per token after the first, averaged over a request", COORDINATOR,
           _OPERATION, TOKEN_BUCKETS),
    Metric("outrider.requests", "counter", "{request}", "Requests that ended", COORDINATOR,
           ("outrider.finish_reason",)),
    Metric("outrider.request.queue.duration", "histogram", "s",
           "Waiting for admission", COORDINATOR, (), REQUEST_BUCKETS),
    Metric("outrider.requests.waiting", "gauge", "{request}",
           "Sequences waiting for admission", COORDINATOR),
    Metric("outrider.requests.running", "gauge", "{request}",
           "Requests admitted and not ended", COORDINATOR),
    Metric("outrider.tokens.prompt", "counter", "{token}", "Prompt tokens taken in", COORDINATOR),
    Metric("outrider.tokens.emitted", "counter", "{token}",
           "Tokens emitted, by who wrote them", COORDINATOR, ("outrider.token.origin",)),
    # Rounds.
    Metric("outrider.round.duration", "histogram", "s",
           "From the start of a round to its verdicts in the logs", COORDINATOR,
           ("outrider.round.mode",), ROUND_BUCKETS),
    Metric("outrider.rounds", "counter", "{round}", "Rounds, by mode", COORDINATOR,
           ("outrider.round.mode",)),
    Metric("outrider.round.phase.time", "counter", "s", "Time of the rounds, by phase",
           COORDINATOR, ("outrider.phase",)),
    Metric("outrider.round.hidden.time", "counter", "s",
           "Drafting that ran while the verifier worked", COORDINATOR),
    Metric("outrider.round.sequences", "counter", "{sequence}",
           "Sequences served by rounds; over outrider.rounds it is the mean batch size",
           COORDINATOR, ("outrider.round.mode",)),
    # Speculation.
    Metric("outrider.speculation.sequences", "counter", "{sequence}",
           "Sequences of rounds by K, the number of draft tokens asked for", COORDINATOR,
           ("outrider.k",)),
    Metric("outrider.speculation.length", "gauge", "{token}",
           "K in force: mean over the last rounds", COORDINATOR),
    Metric("outrider.speculation.foreseen.rate", "gauge", "{token}/s",
           "Tokens a second of all sequences that the choice of K of the last round promised, and "
           "what it promised without a draft", COORDINATOR, ("outrider.choice",)),
    Metric("outrider.tokens.proposed", "counter", "{token}",
           "Draft tokens verified, by position in the proposal", COORDINATOR,
           ("outrider.position",)),
    Metric("outrider.tokens.accepted", "counter", "{token}",
           "Draft tokens accepted, by position in the proposal", COORDINATOR,
           ("outrider.position",)),
    Metric("outrider.tokens.wasted", "counter", "{token}",
           "Draft tokens that were verified and not kept", COORDINATOR),
    Metric("outrider.acceptance.rate", "gauge", "{ratio}",
           "Accepted over proposed, over the last rounds", COORDINATOR),
    Metric("outrider.accepted.length.mean", "gauge", "{token}",
           "Tokens emitted per verify, over the last rounds", COORDINATOR),
    Metric("outrider.ceiling.share", "gauge", "{ratio}",
           "Tokens per second over what the memory's speed allows, over the last rounds",
           COORDINATOR),
    # Prefix cache, by service.
    Metric("outrider.prefix_cache.sequences", "gauge", "{sequence}",
           "Sequences that are over and whose KV is cached", COORDINATOR, ("outrider.service",)),
    Metric("outrider.prefix_cache.tokens", "gauge", "{token}",
           "Tokens of cached sequences", COORDINATOR, ("outrider.service",)),
    Metric("outrider.prefix_cache.hits", "counter", "{sequence}",
           "Sequences that took over KV of another one", COORDINATOR, ("outrider.service",)),
    Metric("outrider.prefix_cache.hit.tokens", "counter", "{token}",
           "Tokens whose KV was taken over", COORDINATOR, ("outrider.service",)),
    Metric("outrider.prefix_cache.evictions", "counter", "{sequence}",
           "Cached sequences that made room", COORDINATOR, ("outrider.service",)),
    # Services as the coordinator sees them.
    Metric("outrider.failovers", "counter", "{failover}", "Services lost", COORDINATOR,
           ("outrider.service",)),
    Metric("outrider.service.up", "gauge", "", "1 while the link to a service is up",
           COORDINATOR, ("outrider.service",)),
    Metric("outrider.link.in_use", "gauge", "",
           "1 for the link that carries proposals and verdicts", COORDINATOR,
           ("outrider.link",)),
    # Each model service.
    Metric("outrider.service.round.duration", "histogram", "s",
           "From a round message's arrival to its answer", SERVICES, (), ROUND_BUCKETS),
    Metric("outrider.service.model.time", "counter", "s",
           "The model's forwards, with sampling and acceptance", SERVICES),
    Metric("outrider.service.rows", "counter", "{row}", "Rows forwarded", SERVICES),
    Metric("outrider.service.tokens.cut", "counter", "{token}",
           "Proposed tokens left out, since they can't be judged", SERVICES),
    Metric("outrider.service.refusals", "counter", "{refusal}",
           "Sequences refused, by reason", SERVICES, ("outrider.refusal",)),
    Metric("outrider.service.sequences", "gauge", "{sequence}", "Live sequences", SERVICES),
    Metric("outrider.service.sequences.cached", "gauge", "{sequence}",
           "Sequences that are over and whose KV is cached", SERVICES),
    Metric("outrider.arena.tokens.limit", "gauge", "{token}", "Token slots in the KV arena",
           SERVICES),
    Metric("outrider.arena.tokens.used", "gauge", "{token}",
           "Token slots of live sequences", SERVICES),
    Metric("outrider.arena.tokens.cached", "gauge", "{token}",
           "Token slots of cached sequences: free for whoever needs them", SERVICES),
    Metric("outrider.arena.tokens.largest_free", "gauge", "{token}",
           "Largest extent that could be reserved", SERVICES),
    Metric("outrider.arena.occupancy", "gauge", "{ratio}",
           "Slots of live sequences over slots", SERVICES),
    Metric("outrider.arena.fragmentation", "gauge", "{ratio}",
           "Share of the free slots outside the largest free extent", SERVICES),
    # Every process.
    Metric("process.memory.usage", "updown", "By", "Resident memory", ALL),
    Metric("process.cpu.time", "counter", "s", "Processor time used", ALL,
           ("cpu.mode",)),
    Metric("otel.sdk.processor.span.processed", "counter", "{span}",
           "Spans that left the queue; error.type says why they were not delivered", ALL,
           ("otel.component.type", "otel.component.name", "error.type")),
    Metric("otel.sdk.processor.span.queue.size", "updown", "{span}",
           "Spans waiting for export", ALL, ("otel.component.type", "otel.component.name")),
)  # fmt: skip


class Tally:
    """A counter that costs a dictionary update; it is read when metrics are collected.

    The SDK's own ``add`` takes several microseconds, too much for ten of them in a round.
    """

    __slots__ = ("_keys", "_sums")

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._keys = keys
        self._sums: dict[tuple[str | int, ...], float] = {}

    def add(self, amount: float, *values: str | int) -> None:
        """Adds ``amount``; ``values`` are those of the declared attributes, in order."""
        self._sums[values] = self._sums.get(values, 0) + amount

    def read(self) -> Iterable[tuple[float, Mapping[str, str | int]]]:
        """The sums with their attributes."""
        for values, amount in tuple(self._sums.items()):
            yield amount, dict(zip(self._keys, values, strict=True))


class Instruments:
    """The metrics of one process, made on a meter from the table above."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._declared = {metric.name: metric for metric in METRICS}

    def counter(self, name: str) -> Tally:
        """A counter to add to."""
        made = Tally(self._find(name, "counter").attributes)
        self.observe(name, made.read)
        return made

    def histogram(self, name: str) -> Histogram:
        """A histogram to record into."""
        metric = self._find(name, "histogram")
        return self._meter.create_histogram(
            name,
            metric.unit,
            metric.description,
            explicit_bucket_boundaries_advisory=list(metric.buckets),
        )

    def observe(self, name: str, read: Read) -> None:
        """Has ``read`` called at every collection; it yields (value, attributes) pairs."""
        metric = self._find(name, "counter", "updown", "gauge")
        create = {
            "counter": self._meter.create_observable_counter,
            "updown": self._meter.create_observable_up_down_counter,
            "gauge": self._meter.create_observable_gauge,
        }[metric.kind]

        def callback(_: CallbackOptions) -> Iterable[Observation]:
            return [Observation(value, dict(attributes)) for value, attributes in read()]

        create(name, callbacks=[callback], unit=metric.unit, description=metric.description)

    def _find(self, name: str, *kinds: Kind) -> Metric:
        metric = self._declared[name]
        if metric.kind not in kinds:
            raise TypeError(f"{name} is a {metric.kind}, not a {' or '.join(kinds)}")
        return metric
