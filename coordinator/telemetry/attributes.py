"""Every attribute that Outrider's spans and events carry, declared once.

Names under ``gen_ai.`` and ``error.`` are those of OpenTelemetry's semantic conventions. The
rest is under ``outrider.``; times are seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

PROVIDER = "outrider"
OPERATION = "text_completion"


@dataclass(frozen=True, slots=True)
class Attribute:
    """One attribute: ``spans`` are the names of the spans and events that carry it."""

    name: str
    kind: type
    spans: tuple[str, ...]
    meaning: str


_ROUND = ("round",)
_PHASED = ("round",)

ATTRIBUTES: tuple[Attribute, ...] = (
    Attribute("gen_ai.operation.name", str, ("request",), "always text_completion"),
    Attribute("gen_ai.provider.name", str, ("request",), "always outrider"),
    Attribute("gen_ai.request.model", str, ("request",), "the base model"),
    Attribute("gen_ai.response.model", str, ("request",), "the base model"),
    Attribute("gen_ai.response.id", str, ("request",), "request id, as in Started"),
    Attribute("gen_ai.request.temperature", float, ("request",), "softmax temperature"),
    Attribute("gen_ai.request.top_p", float, ("request",), "nucleus"),
    Attribute("gen_ai.request.top_k", int, ("request",), "0 keeps all"),
    Attribute("gen_ai.request.frequency_penalty", float, ("request",), "as sent"),
    Attribute("gen_ai.request.presence_penalty", float, ("request",), "as sent"),
    Attribute("gen_ai.request.max_tokens", int, ("request",), "most new tokens"),
    Attribute("gen_ai.request.seed", int, ("request",), "seed in force, as a signed number"),
    Attribute("gen_ai.request.stream", bool, ("request",), "always true"),
    Attribute("gen_ai.usage.input_tokens", int, ("request",), "tokens of the prompt"),
    Attribute("outrider.cached_prompt_tokens", int, ("request",),
              "tokens of the prompt that the base took over from another sequence"),
    Attribute("gen_ai.usage.output_tokens", int, ("request",), "tokens emitted"),
    Attribute("gen_ai.response.finish_reasons", tuple, ("request",), "one reason"),
    Attribute("gen_ai.response.time_to_first_chunk", float, ("request",),
              "arrival to first token"),
    Attribute("error.type", str, ("request",), "gRPC status of a request that failed"),
    Attribute("outrider.sample.index", int, ("request",), "which sample of the request"),
    Attribute("outrider.rule", str, ("request",), "acceptance rule"),
    Attribute("outrider.k", int, ("request", "round", "draft"),
              "draft tokens asked for; on a request, the fixed K, absent where it adapts"),
    Attribute("outrider.rounds", int, ("request",), "verifies that emitted tokens"),
    Attribute("outrider.proposed", int, ("request", "round", "draft", "verify"),
              "draft tokens offered and verified"),
    Attribute("outrider.accepted", int, ("request", "round", "verify"), "draft tokens kept"),
    Attribute("outrider.acceptance.rate", float, ("request",), "accepted over proposed"),
    Attribute("outrider.accepted.length.mean", float, ("request",), "tokens per verify"),
    Attribute("outrider.request.id", str, ("round",), "the request whose part of the round it is"),
    Attribute("outrider.round", int, ("round", "draft", "catch_up", "verify"),
              "number of the round; on a service's span, of the message in its stream"),
    Attribute("outrider.round.mode", str, _ROUND, "speculative, plain, prefill or mixed"),
    Attribute("outrider.batch_size", int, ("round", "draft", "catch_up", "verify"),
              "sequences of the round"),
    Attribute("outrider.emitted", int, _ROUND, "tokens appended to the logs"),
    Attribute("outrider.rollback", int, ("round",), "rows whose KV was given up"),
    Attribute("outrider.committed_len", int, _ROUND, "length of the log before the round"),
    Attribute("outrider.rows", int, ("round", "draft", "catch_up", "verify"), "rows forwarded"),
    Attribute("outrider.verify.epoch", int, _ROUND, "rises when the sequence is opened anew"),
    Attribute("outrider.draft.epoch", int, _ROUND, "likewise, on the draft"),
    Attribute("outrider.refused", int, _ROUND, "sequences that a service refused"),
    Attribute("outrider.link", str, _ROUND, "how proposals and verdicts travelled"),
    Attribute("outrider.lost", str, _ROUND, "the service lost during the round"),
    Attribute("outrider.draft.time", float, _PHASED, "in the draft service"),
    Attribute("outrider.verify.time", float, _PHASED, "in the verify service"),
    Attribute("outrider.wire.time", float, _PHASED, "messages on their way"),
    Attribute("outrider.accept.time", float, _PHASED, "verdicts' arrival to the logs"),
    Attribute("outrider.schedule.time", float, _PHASED, "coordinator before and between messages"),
    Attribute("outrider.hidden.time", float, _PHASED, "drafting while the verifier worked"),
    Attribute("outrider.draft.device_time", float, _PHASED, "the draft model's forwards"),
    Attribute("outrider.verify.device_time", float, _PHASED, "the base model's forwards"),
    Attribute("outrider.device_time", float, ("draft", "catch_up", "verify"),
              "the model's forwards; on CUDA between two device events, without synchronising"),
    Attribute("outrider.refusals", int, ("draft", "catch_up", "verify"), "sequences refused"),
    Attribute("outrider.service", str, ("failover", "outrider.failover", "outrider.recovered"),
              "draft or verify"),
    Attribute("outrider.reason", str, ("failover", "outrider.failover"),
              "why the service was lost"),
    Attribute("outrider.sequences", int, ("failover", "outrider.failover"),
              "sequences that it held"),
)  # fmt: skip
