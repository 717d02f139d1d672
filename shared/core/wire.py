"""Messages of speculation.proto to and from the plain types of ``types.py``.

On the critical path of every round, admission apart: one comprehension per list, no reflection,
and the fields that most rounds leave empty (rows, log-probabilities) are not touched.
Functions named ``read_*`` go from message to types, ``write_*`` the other way.
"""

from __future__ import annotations

from collections.abc import Sequence

from outrider.protos import speculation_pb2 as pb
from outrider.shared.core import rules
from outrider.shared.core.errors import RefusalCode, SequenceRefused
from outrider.shared.core.types import (
    PARAMETERS,
    Decoding,
    OpenSequence,
    PositionLogprobs,
    Proposal,
    ProposeItem,
    Refusal,
    RoundResult,
    SparseRow,
    Verdict,
    VerifyItem,
)

PROTOCOL = 4
"""Version of the round protocol; coordinator and services must agree."""


# --- admission ---------------------------------------------------------------------------------


def write_open(item: OpenSequence) -> pb.OpenSequence:
    """The message that reserves an extent."""
    d = item.decoding
    return pb.OpenSequence(
        sequence_id=item.sequence_id,
        epoch=item.epoch,
        capacity=item.capacity,
        decoding=pb.Decoding(
            **{name: one.kind.write(getattr(d, name)) for name, one in PARAMETERS.items()},
            eos_token_ids=d.eos_token_ids,
            prompt_len=d.prompt_len,
            rule=d.rule.number,  # type: ignore[arg-type]
            logprobs=d.logprobs,
            draft_top=d.draft_top,
            vocab_size=d.vocab_size,
        ),
        parent_id=item.parent_id,
        prefix_len=item.prefix_len,
        copy=item.copy,
    )


def read_open(message: pb.OpenSequence) -> OpenSequence:
    """The admission asked for; raises ``SequenceRefused`` (INVALID) for an unknown rule."""
    d = message.decoding
    try:
        rule = rules.numbered(d.rule)
    except ValueError as error:
        raise SequenceRefused(
            RefusalCode.INVALID, f"decoding.rule: got {d.rule}; must be {error}"
        ) from None
    return OpenSequence(
        message.sequence_id,
        message.epoch,
        message.capacity,
        Decoding(
            **{name: one.kind.read(getattr(d, name)) for name, one in PARAMETERS.items()},
            eos_token_ids=tuple(d.eos_token_ids),
            prompt_len=d.prompt_len,
            rule=rule,
            logprobs=d.logprobs if d.HasField("logprobs") else None,
            draft_top=d.draft_top,
            vocab_size=d.vocab_size,
        ),
        message.parent_id if message.HasField("parent_id") else None,
        message.prefix_len,
        message.copy,
    )


# --- draft -------------------------------------------------------------------------------------


def read_propose_items(message: pb.DraftRequest) -> list[ProposeItem]:
    """What the draft is asked for, in order."""
    return [
        ProposeItem(item.sequence_id, item.epoch, item.base_len, tuple(item.append), item.k)
        for item in message.items
    ]


def write_draft_response(
    number: int, result: RoundResult[Proposal], service_seconds: float
) -> pb.DraftResponse:
    """The draft's answer."""
    return pb.DraftResponse(
        round=number,
        proposals=[
            pb.Proposal(
                sequence_id=answer.sequence_id,
                epoch=answer.epoch,
                committed_len=answer.committed_len,
                tokens=answer.tokens,
                rows=_write_rows(answer.rows),
            )
            for answer in result.answers
        ],
        errors=_write_refusals(result.refusals),
        timing=_write_timing(result, service_seconds),
        evicted=result.evicted or None,
    )


# --- verify ------------------------------------------------------------------------------------


def read_verify_items(message: pb.VerifyRequest) -> list[VerifyItem]:
    """What the verifier is asked for, in order."""
    return [
        VerifyItem(
            item.sequence_id,
            item.epoch,
            item.base_len,
            tuple(item.append),
            tuple(item.proposal),
            _read_rows(item.rows),
            item.extend_only,
        )
        for item in message.items
    ]


def write_verify_response(
    number: int, result: RoundResult[Verdict], service_seconds: float
) -> pb.VerifyResponse:
    """The verifier's answer."""
    return pb.VerifyResponse(
        round=number,
        verdicts=[
            pb.Verdict(
                sequence_id=answer.sequence_id,
                epoch=answer.epoch,
                num_accepted=answer.num_accepted,
                next_token=answer.next_token,
                committed_len=answer.committed_len,
                logprobs=_write_logprobs(answer.logprobs),
            )
            for answer in result.answers
        ],
        errors=_write_refusals(result.refusals),
        timing=_write_timing(result, service_seconds),
        evicted=result.evicted or None,
    )


# --- parts -------------------------------------------------------------------------------------


def _write_rows(rows: Sequence[SparseRow]) -> list[pb.SparseRow] | None:
    if not rows:
        return None
    return [pb.SparseRow(ids=row.ids, probabilities=row.probabilities) for row in rows]


def _read_rows(rows: Sequence[pb.SparseRow]) -> tuple[SparseRow, ...]:
    if not rows:
        return ()
    return tuple(SparseRow(tuple(row.ids), tuple(row.probabilities)) for row in rows)


def _write_timing(
    result: RoundResult[Proposal] | RoundResult[Verdict], service_seconds: float
) -> pb.Timing:
    return pb.Timing(
        model_seconds=result.model_seconds, service_seconds=service_seconds, rows=result.rows
    )


def _write_refusals(refusals: Sequence[Refusal]) -> list[pb.SequenceError] | None:
    if not refusals:
        return None
    return [
        pb.SequenceError(
            sequence_id=one.sequence_id,
            epoch=one.epoch,
            code=int(one.code),  # type: ignore[arg-type]
            message=one.message,
            held_len=one.held_len,
        )
        for one in refusals
    ]


def _write_logprobs(rows: Sequence[PositionLogprobs]) -> list[pb.PositionLogprobs] | None:
    if not rows:
        return None
    return [
        pb.PositionLogprobs(
            logprob=row.logprob,
            top_ids=[token for token, _ in row.top],
            top_logprobs=[value for _, value in row.top],
        )
        for row in rows
    ]
