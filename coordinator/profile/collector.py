"""The profile of one request, gathered by the client that asked and written to a file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import grpc

from outrider.coordinator.profile.record import build
from outrider.protos import generation_pb2 as pb
from outrider.protos import generation_pb2_grpc as stubs
from outrider.shared.core.errors import ConfigError
from outrider.shared.process.grpc_status import message_of

ORIGINS = {
    pb.TOKEN_ORIGIN_ACCEPTED: "accepted",
    pb.TOKEN_ORIGIN_CORRECTED: "corrected",
    pb.TOKEN_ORIGIN_BONUS: "bonus",
    pb.TOKEN_ORIGIN_BASE: "base",
}
TIMEOUT_SECONDS = 30.0


class Collector:
    """Gathers one streamed answer, and then asks the coordinator what its rounds took."""

    def __init__(self, path: Path, prompt: str) -> None:
        """``path``: the file to write. Raises ``ConfigError`` before anything was generated."""
        if not path.parent.is_dir():
            raise ConfigError(f"--profile {path}: its folder does not exist")
        self._path = path
        self._text: dict[str, Any] = {"prompt": prompt, "text": ""}
        self._deltas: list[dict[str, Any]] = []
        self._finished: pb.Finished | None = None

    def see(self, response: pb.GenerateResponse) -> None:
        """Takes one message of the stream; the profile is of the first sample."""
        if response.sample_index:
            return
        kind = response.WhichOneof("event")
        if kind == "started":
            self._text["request_id"] = response.started.request_id
        elif kind == "delta":
            delta = response.delta
            self._text["text"] += delta.text
            self._deltas.append(
                {
                    "text": delta.text,
                    "token_ids": list(delta.token_ids),
                    "origins": [ORIGINS.get(one, "base") for one in delta.origins],
                }
            )
        elif kind == "finished":
            self._finished = response.finished

    def watch(self, call: Iterable[pb.GenerateResponse]) -> Iterator[pb.GenerateResponse]:
        """``call``'s messages, seen on their way."""
        for response in call:
            self.see(response)
            yield response

    def write(
        self, channel: grpc.Channel, metadata: Any = (), pieces: Any = None
    ) -> dict[str, Any]:
        """Asks for the rounds and writes the record.

        ``pieces`` turns token ids into one text each, where a tokenizer is at hand. Raises
        ``ConfigError`` when the coordinator keeps no profiles.
        """
        assert self._finished is not None
        finished = self._finished
        ids = [token for delta in self._deltas for token in delta["token_ids"]]
        self._text |= {
            "token_ids": ids,
            "origins": [origin for delta in self._deltas for origin in delta["origins"]],
            "pieces": None if pieces is None else pieces(ids),
            "deltas": self._deltas,
            "finish_reason": pb.FinishReason.Name(finished.reason)
            .removeprefix("FINISH_REASON_")
            .lower(),
            "prompt_tokens": finished.usage.prompt_tokens,
            "seed": finished.seed,
        }
        try:
            profile = stubs.GenerationStub(channel).Profile(
                pb.ProfileRequest(request_id=self._text["request_id"]),
                timeout=TIMEOUT_SECONDS,
                metadata=metadata,
            )
        except grpc.RpcError as error:
            raise ConfigError(f"--profile: {message_of(error)}") from None
        record = build(profile, self._text)
        self._path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")
        return record
