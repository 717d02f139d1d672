from outrider.protos import generation_pb2 as _generation_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Rule(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RULE_UNSPECIFIED: _ClassVar[Rule]
    RULE_GREEDY: _ClassVar[Rule]
    RULE_COUPLED: _ClassVar[Rule]
    RULE_REJECTION: _ClassVar[Rule]

class GrantEndReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    GRANT_END_REASON_UNSPECIFIED: _ClassVar[GrantEndReason]
    GRANT_END_REASON_CREDITS: _ClassVar[GrantEndReason]
    GRANT_END_REASON_STOPPED: _ClassVar[GrantEndReason]
    GRANT_END_REASON_REVOKED: _ClassVar[GrantEndReason]
    GRANT_END_REASON_REFUSED: _ClassVar[GrantEndReason]
    GRANT_END_REASON_PEER: _ClassVar[GrantEndReason]
    GRANT_END_REASON_LATE: _ClassVar[GrantEndReason]
    GRANT_END_REASON_HOST: _ClassVar[GrantEndReason]

class SequenceErrorCode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SEQUENCE_ERROR_CODE_UNSPECIFIED: _ClassVar[SequenceErrorCode]
    SEQUENCE_ERROR_CODE_UNKNOWN: _ClassVar[SequenceErrorCode]
    SEQUENCE_ERROR_CODE_STALE_EPOCH: _ClassVar[SequenceErrorCode]
    SEQUENCE_ERROR_CODE_KV_MISSING: _ClassVar[SequenceErrorCode]
    SEQUENCE_ERROR_CODE_NO_CAPACITY: _ClassVar[SequenceErrorCode]
    SEQUENCE_ERROR_CODE_INVALID: _ClassVar[SequenceErrorCode]
    SEQUENCE_ERROR_CODE_MODEL: _ClassVar[SequenceErrorCode]
    SEQUENCE_ERROR_CODE_NOTHING_ALLOWED: _ClassVar[SequenceErrorCode]
RULE_UNSPECIFIED: Rule
RULE_GREEDY: Rule
RULE_COUPLED: Rule
RULE_REJECTION: Rule
GRANT_END_REASON_UNSPECIFIED: GrantEndReason
GRANT_END_REASON_CREDITS: GrantEndReason
GRANT_END_REASON_STOPPED: GrantEndReason
GRANT_END_REASON_REVOKED: GrantEndReason
GRANT_END_REASON_REFUSED: GrantEndReason
GRANT_END_REASON_PEER: GrantEndReason
GRANT_END_REASON_LATE: GrantEndReason
GRANT_END_REASON_HOST: GrantEndReason
SEQUENCE_ERROR_CODE_UNSPECIFIED: SequenceErrorCode
SEQUENCE_ERROR_CODE_UNKNOWN: SequenceErrorCode
SEQUENCE_ERROR_CODE_STALE_EPOCH: SequenceErrorCode
SEQUENCE_ERROR_CODE_KV_MISSING: SequenceErrorCode
SEQUENCE_ERROR_CODE_NO_CAPACITY: SequenceErrorCode
SEQUENCE_ERROR_CODE_INVALID: SequenceErrorCode
SEQUENCE_ERROR_CODE_MODEL: SequenceErrorCode
SEQUENCE_ERROR_CODE_NOTHING_ALLOWED: SequenceErrorCode

class OpenSequence(_message.Message):
    __slots__ = ("sequence_id", "epoch", "capacity", "decoding", "parent_id", "prefix_len", "copy")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    DECODING_FIELD_NUMBER: _ClassVar[int]
    PARENT_ID_FIELD_NUMBER: _ClassVar[int]
    PREFIX_LEN_FIELD_NUMBER: _ClassVar[int]
    COPY_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    epoch: int
    capacity: int
    decoding: Decoding
    parent_id: int
    prefix_len: int
    copy: bool
    def __init__(self, sequence_id: _Optional[int] = ..., epoch: _Optional[int] = ..., capacity: _Optional[int] = ..., decoding: _Optional[_Union[Decoding, _Mapping]] = ..., parent_id: _Optional[int] = ..., prefix_len: _Optional[int] = ..., copy: bool = ...) -> None: ...

class CacheSequence(_message.Message):
    __slots__ = ("sequence_id", "length")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    length: int
    def __init__(self, sequence_id: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class Decoding(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "bad_words", "eos_token_ids", "min_new_tokens", "prompt_len", "seed", "rule", "logprobs", "draft_top", "vocab_size")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    BAD_WORDS_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MIN_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LEN_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_TOP_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: _containers.ScalarMap[int, float]
    bad_words: _containers.RepeatedCompositeFieldContainer[TokenSequence]
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    min_new_tokens: int
    prompt_len: int
    seed: int
    rule: Rule
    logprobs: int
    draft_top: int
    vocab_size: int
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., bad_words: _Optional[_Iterable[_Union[TokenSequence, _Mapping]]] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., min_new_tokens: _Optional[int] = ..., prompt_len: _Optional[int] = ..., seed: _Optional[int] = ..., rule: _Optional[_Union[Rule, str]] = ..., logprobs: _Optional[int] = ..., draft_top: _Optional[int] = ..., vocab_size: _Optional[int] = ...) -> None: ...

class TokenSequence(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class DraftRequest(_message.Message):
    __slots__ = ("round", "close", "open", "items", "goodbye", "traceparent", "grant", "change", "cache")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    GRANT_FIELD_NUMBER: _ClassVar[int]
    CHANGE_FIELD_NUMBER: _ClassVar[int]
    CACHE_FIELD_NUMBER: _ClassVar[int]
    round: int
    close: _containers.RepeatedScalarFieldContainer[int]
    open: _containers.RepeatedCompositeFieldContainer[OpenSequence]
    items: _containers.RepeatedCompositeFieldContainer[ProposeItem]
    goodbye: bool
    traceparent: str
    grant: Grant
    change: GrantChange
    cache: _containers.RepeatedCompositeFieldContainer[CacheSequence]
    def __init__(self, round: _Optional[int] = ..., close: _Optional[_Iterable[int]] = ..., open: _Optional[_Iterable[_Union[OpenSequence, _Mapping]]] = ..., items: _Optional[_Iterable[_Union[ProposeItem, _Mapping]]] = ..., goodbye: bool = ..., traceparent: _Optional[str] = ..., grant: _Optional[_Union[Grant, _Mapping]] = ..., change: _Optional[_Union[GrantChange, _Mapping]] = ..., cache: _Optional[_Iterable[_Union[CacheSequence, _Mapping]]] = ...) -> None: ...

class ProposeItem(_message.Message):
    __slots__ = ("sequence_id", "epoch", "base_len", "append", "k")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    BASE_LEN_FIELD_NUMBER: _ClassVar[int]
    APPEND_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    epoch: int
    base_len: int
    append: _containers.RepeatedScalarFieldContainer[int]
    k: int
    def __init__(self, sequence_id: _Optional[int] = ..., epoch: _Optional[int] = ..., base_len: _Optional[int] = ..., append: _Optional[_Iterable[int]] = ..., k: _Optional[int] = ...) -> None: ...

class DraftResponse(_message.Message):
    __slots__ = ("round", "proposals", "errors", "timing", "grant_end", "evicted")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    PROPOSALS_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    GRANT_END_FIELD_NUMBER: _ClassVar[int]
    EVICTED_FIELD_NUMBER: _ClassVar[int]
    round: int
    proposals: _containers.RepeatedCompositeFieldContainer[Proposal]
    errors: _containers.RepeatedCompositeFieldContainer[SequenceError]
    timing: Timing
    grant_end: GrantEnd
    evicted: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, round: _Optional[int] = ..., proposals: _Optional[_Iterable[_Union[Proposal, _Mapping]]] = ..., errors: _Optional[_Iterable[_Union[SequenceError, _Mapping]]] = ..., timing: _Optional[_Union[Timing, _Mapping]] = ..., grant_end: _Optional[_Union[GrantEnd, _Mapping]] = ..., evicted: _Optional[_Iterable[int]] = ...) -> None: ...

class Proposal(_message.Message):
    __slots__ = ("sequence_id", "epoch", "committed_len", "tokens", "rows")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_LEN_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    epoch: int
    committed_len: int
    tokens: _containers.RepeatedScalarFieldContainer[int]
    rows: _containers.RepeatedCompositeFieldContainer[SparseRow]
    def __init__(self, sequence_id: _Optional[int] = ..., epoch: _Optional[int] = ..., committed_len: _Optional[int] = ..., tokens: _Optional[_Iterable[int]] = ..., rows: _Optional[_Iterable[_Union[SparseRow, _Mapping]]] = ...) -> None: ...

class SparseRow(_message.Message):
    __slots__ = ("ids", "probabilities")
    IDS_FIELD_NUMBER: _ClassVar[int]
    PROBABILITIES_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    probabilities: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, ids: _Optional[_Iterable[int]] = ..., probabilities: _Optional[_Iterable[float]] = ...) -> None: ...

class VerifyRequest(_message.Message):
    __slots__ = ("round", "close", "open", "items", "goodbye", "traceparent", "grant", "change", "cache")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    GRANT_FIELD_NUMBER: _ClassVar[int]
    CHANGE_FIELD_NUMBER: _ClassVar[int]
    CACHE_FIELD_NUMBER: _ClassVar[int]
    round: int
    close: _containers.RepeatedScalarFieldContainer[int]
    open: _containers.RepeatedCompositeFieldContainer[OpenSequence]
    items: _containers.RepeatedCompositeFieldContainer[VerifyItem]
    goodbye: bool
    traceparent: str
    grant: Grant
    change: GrantChange
    cache: _containers.RepeatedCompositeFieldContainer[CacheSequence]
    def __init__(self, round: _Optional[int] = ..., close: _Optional[_Iterable[int]] = ..., open: _Optional[_Iterable[_Union[OpenSequence, _Mapping]]] = ..., items: _Optional[_Iterable[_Union[VerifyItem, _Mapping]]] = ..., goodbye: bool = ..., traceparent: _Optional[str] = ..., grant: _Optional[_Union[Grant, _Mapping]] = ..., change: _Optional[_Union[GrantChange, _Mapping]] = ..., cache: _Optional[_Iterable[_Union[CacheSequence, _Mapping]]] = ...) -> None: ...

class VerifyItem(_message.Message):
    __slots__ = ("sequence_id", "epoch", "base_len", "append", "proposal", "rows", "extend_only")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    BASE_LEN_FIELD_NUMBER: _ClassVar[int]
    APPEND_FIELD_NUMBER: _ClassVar[int]
    PROPOSAL_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    EXTEND_ONLY_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    epoch: int
    base_len: int
    append: _containers.RepeatedScalarFieldContainer[int]
    proposal: _containers.RepeatedScalarFieldContainer[int]
    rows: _containers.RepeatedCompositeFieldContainer[SparseRow]
    extend_only: bool
    def __init__(self, sequence_id: _Optional[int] = ..., epoch: _Optional[int] = ..., base_len: _Optional[int] = ..., append: _Optional[_Iterable[int]] = ..., proposal: _Optional[_Iterable[int]] = ..., rows: _Optional[_Iterable[_Union[SparseRow, _Mapping]]] = ..., extend_only: bool = ...) -> None: ...

class VerifyResponse(_message.Message):
    __slots__ = ("round", "verdicts", "errors", "timing", "granted", "grant_end", "evicted")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    VERDICTS_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    GRANTED_FIELD_NUMBER: _ClassVar[int]
    GRANT_END_FIELD_NUMBER: _ClassVar[int]
    EVICTED_FIELD_NUMBER: _ClassVar[int]
    round: int
    verdicts: _containers.RepeatedCompositeFieldContainer[Verdict]
    errors: _containers.RepeatedCompositeFieldContainer[SequenceError]
    timing: Timing
    granted: GrantedRound
    grant_end: GrantEnd
    evicted: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, round: _Optional[int] = ..., verdicts: _Optional[_Iterable[_Union[Verdict, _Mapping]]] = ..., errors: _Optional[_Iterable[_Union[SequenceError, _Mapping]]] = ..., timing: _Optional[_Union[Timing, _Mapping]] = ..., granted: _Optional[_Union[GrantedRound, _Mapping]] = ..., grant_end: _Optional[_Union[GrantEnd, _Mapping]] = ..., evicted: _Optional[_Iterable[int]] = ...) -> None: ...

class Verdict(_message.Message):
    __slots__ = ("sequence_id", "epoch", "num_accepted", "next_token", "committed_len", "logprobs")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NUM_ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    NEXT_TOKEN_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_LEN_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    epoch: int
    num_accepted: int
    next_token: int
    committed_len: int
    logprobs: _containers.RepeatedCompositeFieldContainer[PositionLogprobs]
    def __init__(self, sequence_id: _Optional[int] = ..., epoch: _Optional[int] = ..., num_accepted: _Optional[int] = ..., next_token: _Optional[int] = ..., committed_len: _Optional[int] = ..., logprobs: _Optional[_Iterable[_Union[PositionLogprobs, _Mapping]]] = ...) -> None: ...

class Grant(_message.Message):
    __slots__ = ("id", "mailbox", "rounds", "sequences", "patience_seconds", "link")
    ID_FIELD_NUMBER: _ClassVar[int]
    MAILBOX_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    PATIENCE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    LINK_FIELD_NUMBER: _ClassVar[int]
    id: int
    mailbox: int
    rounds: int
    sequences: _containers.RepeatedCompositeFieldContainer[GrantedSequence]
    patience_seconds: float
    link: str
    def __init__(self, id: _Optional[int] = ..., mailbox: _Optional[int] = ..., rounds: _Optional[int] = ..., sequences: _Optional[_Iterable[_Union[GrantedSequence, _Mapping]]] = ..., patience_seconds: _Optional[float] = ..., link: _Optional[str] = ...) -> None: ...

class GrantedSequence(_message.Message):
    __slots__ = ("k", "limit", "stop_token_ids")
    K_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    k: int
    limit: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, k: _Optional[int] = ..., limit: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class GrantChange(_message.Message):
    __slots__ = ("id", "rounds", "ks")
    ID_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    KS_FIELD_NUMBER: _ClassVar[int]
    id: int
    rounds: int
    ks: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, id: _Optional[int] = ..., rounds: _Optional[int] = ..., ks: _Optional[_Iterable[int]] = ...) -> None: ...

class GrantedRound(_message.Message):
    __slots__ = ("step", "proposals", "draft", "draft_asked_ns", "draft_answered_ns", "verify_asked_ns", "verify_answered_ns")
    STEP_FIELD_NUMBER: _ClassVar[int]
    PROPOSALS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_FIELD_NUMBER: _ClassVar[int]
    DRAFT_ASKED_NS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_ANSWERED_NS_FIELD_NUMBER: _ClassVar[int]
    VERIFY_ASKED_NS_FIELD_NUMBER: _ClassVar[int]
    VERIFY_ANSWERED_NS_FIELD_NUMBER: _ClassVar[int]
    step: int
    proposals: _containers.RepeatedCompositeFieldContainer[Proposal]
    draft: Timing
    draft_asked_ns: int
    draft_answered_ns: int
    verify_asked_ns: int
    verify_answered_ns: int
    def __init__(self, step: _Optional[int] = ..., proposals: _Optional[_Iterable[_Union[Proposal, _Mapping]]] = ..., draft: _Optional[_Union[Timing, _Mapping]] = ..., draft_asked_ns: _Optional[int] = ..., draft_answered_ns: _Optional[int] = ..., verify_asked_ns: _Optional[int] = ..., verify_answered_ns: _Optional[int] = ...) -> None: ...

class GrantEnd(_message.Message):
    __slots__ = ("id", "reason", "message", "rounds")
    ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    id: int
    reason: GrantEndReason
    message: str
    rounds: int
    def __init__(self, id: _Optional[int] = ..., reason: _Optional[_Union[GrantEndReason, str]] = ..., message: _Optional[str] = ..., rounds: _Optional[int] = ...) -> None: ...

class OfferMailboxRequest(_message.Message):
    __slots__ = ("max_sequences", "max_k", "row_entries", "link")
    MAX_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    MAX_K_FIELD_NUMBER: _ClassVar[int]
    ROW_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    LINK_FIELD_NUMBER: _ClassVar[int]
    max_sequences: int
    max_k: int
    row_entries: int
    link: str
    def __init__(self, max_sequences: _Optional[int] = ..., max_k: _Optional[int] = ..., row_entries: _Optional[int] = ..., link: _Optional[str] = ...) -> None: ...

class OfferMailboxResponse(_message.Message):
    __slots__ = ("mailbox", "layout", "socket", "secret", "boot_id", "size", "link")
    MAILBOX_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    SOCKET_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    LINK_FIELD_NUMBER: _ClassVar[int]
    mailbox: int
    layout: int
    socket: str
    secret: bytes
    boot_id: str
    size: int
    link: str
    def __init__(self, mailbox: _Optional[int] = ..., layout: _Optional[int] = ..., socket: _Optional[str] = ..., secret: _Optional[bytes] = ..., boot_id: _Optional[str] = ..., size: _Optional[int] = ..., link: _Optional[str] = ...) -> None: ...

class MapMailboxRequest(_message.Message):
    __slots__ = ("offer",)
    OFFER_FIELD_NUMBER: _ClassVar[int]
    offer: OfferMailboxResponse
    def __init__(self, offer: _Optional[_Union[OfferMailboxResponse, _Mapping]] = ...) -> None: ...

class MapMailboxResponse(_message.Message):
    __slots__ = ("link", "reason")
    LINK_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    link: str
    reason: str
    def __init__(self, link: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class PositionLogprobs(_message.Message):
    __slots__ = ("logprob", "top_ids", "top_logprobs")
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    logprob: float
    top_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, logprob: _Optional[float] = ..., top_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class SequenceError(_message.Message):
    __slots__ = ("sequence_id", "epoch", "code", "message", "held_len")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    HELD_LEN_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    epoch: int
    code: SequenceErrorCode
    message: str
    held_len: int
    def __init__(self, sequence_id: _Optional[int] = ..., epoch: _Optional[int] = ..., code: _Optional[_Union[SequenceErrorCode, str]] = ..., message: _Optional[str] = ..., held_len: _Optional[int] = ...) -> None: ...

class Timing(_message.Message):
    __slots__ = ("model_seconds", "service_seconds", "rows")
    MODEL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SERVICE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    model_seconds: float
    service_seconds: float
    rows: int
    def __init__(self, model_seconds: _Optional[float] = ..., service_seconds: _Optional[float] = ..., rows: _Optional[int] = ...) -> None: ...

class ServiceInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ServiceInfoResponse(_message.Message):
    __slots__ = ("version", "protocol", "model", "arena_tokens_largest_free", "sequences", "max_k", "streams", "resident_bytes", "memory_bandwidth", "grants", "device_uuid", "costs")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ARENA_TOKENS_LARGEST_FREE_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    MAX_K_FIELD_NUMBER: _ClassVar[int]
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BANDWIDTH_FIELD_NUMBER: _ClassVar[int]
    GRANTS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_UUID_FIELD_NUMBER: _ClassVar[int]
    COSTS_FIELD_NUMBER: _ClassVar[int]
    version: str
    protocol: int
    model: _generation_pb2.ModelDescription
    arena_tokens_largest_free: int
    sequences: int
    max_k: int
    streams: int
    resident_bytes: int
    memory_bandwidth: float
    grants: bool
    device_uuid: str
    costs: _containers.RepeatedCompositeFieldContainer[CostPoint]
    def __init__(self, version: _Optional[str] = ..., protocol: _Optional[int] = ..., model: _Optional[_Union[_generation_pb2.ModelDescription, _Mapping]] = ..., arena_tokens_largest_free: _Optional[int] = ..., sequences: _Optional[int] = ..., max_k: _Optional[int] = ..., streams: _Optional[int] = ..., resident_bytes: _Optional[int] = ..., memory_bandwidth: _Optional[float] = ..., grants: bool = ..., device_uuid: _Optional[str] = ..., costs: _Optional[_Iterable[_Union[CostPoint, _Mapping]]] = ...) -> None: ...

class CostPoint(_message.Message):
    __slots__ = ("sequences", "amount", "seconds")
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    sequences: int
    amount: int
    seconds: float
    def __init__(self, sequences: _Optional[int] = ..., amount: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...
