"""A small HTTP server that streams completions and chat the OpenAI way, with faults on demand."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class OpenAIServer(ThreadingHTTPServer):
    """Answers ``max_tokens`` words, ``per_event`` in each event.

    ``faults``: by the request's number from 0: ``"busy"`` is HTTP 503, ``"cut"`` ends the stream
    after its first word, ``"error"`` tells of an error there, ``"hang"`` waits for ``release``.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self, faults: Mapping[int, str] | None = None, *, per_event: int = 1, usage: bool = True
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.faults, self.per_event, self.usage = dict(faults or {}), per_event, usage
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.release = threading.Event()
        self.lock = threading.Lock()
        self.running = self.most_running = 0

    @property
    def url(self) -> str:
        """Without ``/v1``."""
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def openai_server(*args: Any, **options: Any) -> Iterator[OpenAIServer]:
    """A running server; see ``OpenAIServer`` for the arguments."""
    with OpenAIServer(*args, **options) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.release.set()
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: OpenAIServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        listed = [{"id": "small"}, {"id": "large"}] if self.path == "/v1/models" else []
        self._json(200 if listed else 404, {"object": "list", "data": listed})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            number = len(server.bodies)
            server.bodies.append(body)
            server.headers.append(dict(self.headers))
            server.running += 1
            server.most_running = max(server.most_running, server.running)
        fault = server.faults.get(number)
        # The count falls before the client can see the end, and send its next request.
        if fault == "busy":
            self._done()
            self._json(503, {"error": {"message": "too many requests", "type": "overloaded"}})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        if fault == "hang":
            server.release.wait()
        self._stream(body, fault, chat="messages" in body)

    def _stream(self, body: dict[str, Any], fault: str | None, chat: bool) -> None:
        count = body["max_tokens"]
        if chat:
            self._event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        sent = 0
        while sent < count:
            words = "word " * min(self.server.per_event, count - sent)
            choice: dict[str, Any] = {"delta": {"content": words}} if chat else {"text": words}
            sent += self.server.per_event
            self._event({"choices": [choice | {"finish_reason": None}]})
            if fault == "cut":
                self._done()
                return
            if fault == "error":
                self._done()
                self._event({"error": {"message": "the engine died"}})
                return
        last: dict[str, Any] = {"delta": {}} if chat else {"text": ""}
        self._done()
        self._event({"choices": [last | {"finish_reason": "length"}]})
        if self.server.usage:
            self._event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": count}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _done(self) -> None:
        with self.server.lock:
            self.server.running -= 1

    def _event(self, event: dict[str, Any]) -> None:
        self.wfile.write(f": comment\ndata: {json.dumps(event)}\n\n".encode())
        self.wfile.flush()

    def _json(self, status: int, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
