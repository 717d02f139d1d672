"""Finished spans as OTLP bytes, about six times as fast as the general encoder.

A round makes a handful of small spans with plain attributes. Encoding them through message
objects costs more than making them; it runs on a thread of its own, but it holds the
interpreter while the next round wants it. This writes the same wire format directly.
Field numbers: opentelemetry/proto/trace/v1/trace.proto and common/v1/common.proto. A test
holds that the result parses to what the SDK's own encoder makes.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanContext, Status

_pack_double = struct.Struct("<d").pack
_BYTES = [bytes((value,)) for value in range(128)]
_TIMES = struct.Struct("<BQBQ")
# Flags say "remoteness is known" (bit 8) and "the parent is remote" (bit 9).
_LOCAL = b"\x85\x01" + struct.pack("<I", 0x100)
_REMOTE = b"\x85\x01" + struct.pack("<I", 0x300)
_LINK_LOCAL = b"\x35" + struct.pack("<I", 0x100)
_LINK_REMOTE = b"\x35" + struct.pack("<I", 0x300)


def varint(value: int) -> bytes:
    """``value`` in [-2^63, 2^64) as a protobuf varint."""
    if 0 <= value < 128:
        return _BYTES[value]
    value &= 0xFFFF_FFFF_FFFF_FFFF
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def field(tag: bytes, body: bytes) -> bytes:
    """A length-delimited field."""
    return tag + varint(len(body)) + body


class SpanEncoder:
    """Encodes batches of spans; keeps the bytes of attribute keys and of the last resource."""

    def __init__(self) -> None:
        self._heads: dict[tuple[bytes, str], tuple[bytes, bytes, bytes]] = {}
        self._resource: tuple[Resource, bytes] | None = None

    def request(self, spans: Sequence[ReadableSpan]) -> bytes:
        """A serialized ``ExportTraceServiceRequest``; order is kept within one resource."""
        resources: dict[Resource, dict[Any, list[bytes]]] = {}
        for span in spans:
            scopes = resources.setdefault(span.resource, {})
            scopes.setdefault(span.instrumentation_scope, []).append(self._span(span))
        out = b""
        for resource, scopes in resources.items():
            body = self._resource_bytes(resource)
            for scope, encoded in scopes.items():
                part = field(b"\x0a", self._scope(scope)) if scope else b""
                part += b"".join(field(b"\x12", one) for one in encoded)
                if scope and scope.schema_url:
                    part += field(b"\x1a", scope.schema_url.encode())
                body += field(b"\x12", part)
            if resource.schema_url:
                body += field(b"\x1a", resource.schema_url.encode())
            out += field(b"\x0a", body)
        return out

    def _span(self, span: ReadableSpan) -> bytes:
        context = span.context
        parts = [b"\x0a\x10", context.trace_id.to_bytes(16, "big")]
        parts += b"\x12\x08", context.span_id.to_bytes(8, "big")
        if context.trace_state:
            state = ",".join(f"{key}={value}" for key, value in context.trace_state.items())
            parts.append(field(b"\x1a", state.encode()))
        parent: SpanContext | None = span.parent
        if parent is not None:
            parts += b"\x22\x08", parent.span_id.to_bytes(8, "big")
        parts.append(field(b"\x2a", span.name.encode()))
        # The API's kinds count from 0, those of OTLP from 1.
        parts.append(bytes((0x30, span.kind.value + 1)))
        parts.append(_TIMES.pack(0x39, span.start_time or 0, 0x41, span.end_time or 0))
        parts.append(self._attributes(b"\x4a", span.attributes))
        if span.dropped_attributes:
            parts += b"\x50", varint(span.dropped_attributes)
        for event in span.events:
            body = b"\x09" + event.timestamp.to_bytes(8, "little")
            body += field(b"\x12", event.name.encode())
            body += self._attributes(b"\x1a", event.attributes)
            if event.dropped_attributes:
                body += b"\x20" + varint(event.dropped_attributes)
            parts.append(field(b"\x5a", body))
        if span.dropped_events:
            parts += b"\x60", varint(span.dropped_events)
        for link in span.links:
            body = b"\x0a\x10" + link.context.trace_id.to_bytes(16, "big")
            body += b"\x12\x08" + link.context.span_id.to_bytes(8, "big")
            if link.attributes:
                body += self._attributes(b"\x22", link.attributes)
            body += _LINK_REMOTE if link.context.is_remote else _LINK_LOCAL
            parts.append(field(b"\x6a", body))
        if span.dropped_links:
            parts += b"\x70", varint(span.dropped_links)
        parts.append(field(b"\x7a", _status(span.status)))
        parts.append(_REMOTE if parent is not None and parent.is_remote else _LOCAL)
        return b"".join(parts)

    def _attributes(self, tag: bytes, attributes: Mapping[str, Any] | None) -> bytes:
        if not attributes:
            return b""
        heads = self._heads
        out: list[bytes] = []
        for key, value in attributes.items():
            head = heads.get((tag, key))
            if head is None:
                head = heads[tag, key] = _heads(tag, key)
            kind = type(value)
            # What rounds carry has its length fixed beforehand.
            if kind is float:
                out += head[0], _pack_double(value)
            elif kind is int and 0 <= value < 128:
                out += head[1], _BYTES[value]
            else:
                encoded = _any(value)
                out.append(field(tag, head[2] + field(b"\x12", encoded)))
        return b"".join(out)

    def _resource_bytes(self, resource: Resource) -> bytes:
        if self._resource is None or self._resource[0] is not resource:
            body = self._attributes(b"\x0a", resource.attributes)
            self._resource = (resource, field(b"\x0a", body))
        return self._resource[1]

    def _scope(self, scope: Any) -> bytes:
        out = field(b"\x0a", scope.name.encode()) if scope.name else b""
        if scope.version:
            out += field(b"\x12", scope.version.encode())
        return out + self._attributes(b"\x1a", scope.attributes)


def _heads(tag: bytes, key: str) -> tuple[bytes, bytes, bytes]:
    """What stands before a double, before an integer below 128, and the key's own field."""
    name = field(b"\x0a", key.encode())
    double = tag + varint(len(name) + 11) + name + b"\x12\x09\x21"
    small = tag + varint(len(name) + 4) + name + b"\x12\x02\x18"
    return double, small, name


def _any(value: Any) -> bytes:
    """An ``AnyValue``; the order of tests puts what rounds carry first."""
    kind = type(value)
    if kind is int:
        return b"\x18" + varint(value)
    if kind is float:
        return b"\x21" + _pack_double(value)
    if kind is str:
        return field(b"\x0a", value.encode())
    if kind is bool:
        return b"\x10\x01" if value else b"\x10\x00"
    if kind is bytes:
        return field(b"\x3a", value)
    if isinstance(value, (list, tuple)):
        return field(b"\x2a", b"".join(field(b"\x0a", _any(one)) for one in value))
    return field(b"\x0a", str(value).encode())


def _status(status: Status) -> bytes:
    out = field(b"\x12", status.description.encode()) if status.description else b""
    code = status.status_code.value
    return out + b"\x18" + bytes((code,)) if code else out
