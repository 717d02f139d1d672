"""An OpenAI-compatible HTTP server under measurement: streamed completions or chat."""

from __future__ import annotations

import importlib
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from outrider.coordinator.bench.serve.answer import Answer, RequestFailed
from outrider.coordinator.bench.serve.server_sent_events import EventReader
from outrider.coordinator.bench.serve.traffic import PlannedRequest
from outrider.shared.core.errors import ConfigError, ServiceUnavailable

PATHS = {"completions": "completions", "chat": "chat/completions"}
"""The APIs that can be measured, and where they are under ``/v1``."""
_WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child")


class OpenAITarget:
    """Streams from ``/v1/completions`` or ``/v1/chat/completions``."""

    def __init__(self, session: Any, url: str, api: str, body: Mapping[str, object]) -> None:
        """``session``: an ``aiohttp.ClientSession``; ``url`` without ``/v1``.

        ``api``: one of ``PATHS``; ``body``: fields of every request beside prompt and length.
        """
        self._session = session
        self._url, self._api, self._body = url, api, dict(body)

    async def send(self, request: PlannedRequest, index: int, answer: Answer) -> None:
        """See ``Target``."""
        body = {
            **self._prompt(request.prompt),
            "max_tokens": request.max_new_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._body,
        }
        aiohttp = _library()
        try:
            async with self._session.post(
                f"{self._url}/v1/{PATHS[self._api]}", json=body
            ) as response:
                if response.status != 200:
                    text = await response.text()
                    raise RequestFailed(f"HTTP {response.status}", _told(text))
                await self._read(response, answer)
        except aiohttp.ClientConnectorError as error:
            raise RequestFailed("no connection", str(error)) from error
        except aiohttp.ClientError as error:
            raise RequestFailed("connection broken", str(error)) from error

    async def _read(self, response: Any, answer: Answer) -> None:
        events, ended = EventReader(), False
        async for piece in response.content.iter_any():
            for data in events.push(piece):
                if data == "[DONE]" or self._event(data, answer):
                    ended = True
        if not ended:
            raise RequestFailed("ended early", "the stream ended without a reason to finish")

    def _event(self, data: str, answer: Answer) -> bool:
        """Notes one event; whether it says that the answer is complete."""
        try:
            event = json.loads(data)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            raise RequestFailed("no JSON in the stream", data[:200])
        if event.get("error") is not None:
            raise RequestFailed("error in the stream", _told(data))
        if isinstance(usage := event.get("usage"), dict):
            answer.prompt_tokens = usage.get("prompt_tokens")
            answer.output_tokens = usage.get("completion_tokens")
        choices = event.get("choices") or []
        if not choices:
            return False
        reason = choices[0].get("finish_reason")
        if self._has_token(choices[0], reason is not None):
            answer.message()
        return reason is not None

    def _has_token(self, choice: Mapping[str, Any], last: bool) -> bool:
        if self._api == "chat":
            # The first event names the role alone; it comes before there is any token.
            delta = choice.get("delta") or {}
            return any(delta.get(name) for name in ("content", "reasoning_content", "reasoning"))
        # A token may be half a character, and then has no text yet.
        return bool(choice.get("text")) or not last

    async def describe(self) -> Mapping[str, object]:
        """See ``Target``."""
        return {"api": self._api, "url": self._url, "model": self._body.get("model")}

    def _prompt(self, prompt: str | tuple[int, ...]) -> dict[str, object]:
        if self._api == "completions":
            return {"prompt": prompt if isinstance(prompt, str) else list(prompt)}
        if not isinstance(prompt, str):
            # A conversation takes no ids: a common word for each comes near their number.
            prompt = " ".join(_WORDS[one % len(_WORDS)] for one in prompt)
        return {"messages": [{"role": "user", "content": prompt}]}


@asynccontextmanager
async def open_http(headers: Mapping[str, str]) -> AsyncIterator[Any]:
    """A session with as many connections as there are requests at once."""
    aiohttp = _library()
    # What is too slow is ended by `drive`, and no request waits here for another's connection.
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
        headers=headers,
    ) as session:
        yield session


async def first_model(session: Any, url: str) -> str:
    """The name of the first model that the server at ``url`` lists.

    Raises ``ServiceUnavailable`` where it does not answer, ``ConfigError`` where it lists none.
    """
    aiohttp = _library()
    try:
        async with session.get(f"{url}/v1/models") as response:
            text, status = await response.text(), response.status
    except aiohttp.ClientError as error:
        raise ServiceUnavailable(f"{url} does not answer: {error}") from error
    try:
        return str(json.loads(text)["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        raise ConfigError(
            f"--model: {url}/v1/models names none (HTTP {status}); say which"
        ) from None


def _told(text: str) -> str:
    """What an error's body says, in one line."""
    try:
        found = json.loads(text)
        found = found.get("error", found)
        text = str(found["message"] if isinstance(found, dict) else found)
    except (ValueError, AttributeError, KeyError):
        pass
    return " ".join(text.split())[:200]


def _library() -> Any:
    """aiohttp. Raises ``ConfigError`` where it is not installed."""
    try:
        return importlib.import_module("aiohttp")
    except ImportError as error:
        raise ConfigError(
            "--url: needs aiohttp, which is not installed: pip install 'outrider[http]'"
        ) from error
