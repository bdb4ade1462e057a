"""One question from the agent's page to the engine: passed on, streamed back, limited in size, time and number.

The page is on the agent's port and may only talk to it (its content security policy), so the agent passes questions on.
The Guard has checked Host, Origin and key before. The key goes from the request's header to the engine's own socket
and is kept nowhere. Programs ask the engine directly.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pascaline.redaction import redact
from pascaline.serving.threads import start_in_thread

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from pascaline.engines.client import Exchange
    from pascaline.serving.engine_api import EngineApi

MOST_QUESTIONS = 4
"""Questions from pages at the same time; each needs a thread."""
MOST_SECONDS = 600.0
"""Time limit of a whole answer."""
MOST_BODY_BYTES = 256 * 2**10
"""Limit of a question with the whole conversation before it."""
MOST_TOKENS = 4096
"""Most tokens of an answer."""
WAITING_PIECES = 64
"""Pieces of an answer that may wait for the page; then the engine's are not read."""


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str


class Question(BaseModel):
    """What the page may ask; everything else of a request is decided here."""

    model_config = ConfigDict(extra="forbid")

    messages: list[Message] = Field(min_length=1, max_length=200)
    temperature: float = Field(default=0.7, ge=0, le=2)
    max_tokens: int = Field(default=512, ge=1, le=MOST_TOKENS)


def request_of(question: Question, model: str, *, has_chat_template: bool) -> tuple[str, dict[str, Any]]:
    """Return (path, body) of the engine's API; a model without a chat template continues the last message."""
    body: dict[str, Any] = {"model": model}
    if has_chat_template:
        body["messages"] = [message.model_dump() for message in question.messages]
    else:
        body["prompt"] = question.messages[-1].content
    body |= {
        "temperature": question.temperature,
        "max_tokens": question.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return ("/v1/chat/completions" if has_chat_template else "/v1/completions"), body


class Answer:
    """The engine's answer: its beginning is awaited by `begin`, the rest read by `pieces`."""

    def __init__(self, exchange: Exchange) -> None:
        """Take over an exchange; use `begin`."""
        self.status = exchange.status
        """HTTP status."""
        self.streams = exchange.status == 200 and exchange.content_type.startswith("text/event-stream")
        self._exchange = exchange

    @classmethod
    async def begin(cls, api: EngineApi, path: str, body: dict[str, Any], authorization: str | None) -> Answer:
        """Send the request and wait for the beginning of the answer. Raises OSError."""
        headers = {"Authorization": authorization} if authorization else {}
        beginning = start_in_thread(api.stream, path, body, headers, MOST_SECONDS)
        try:
            return cls(await asyncio.shield(beginning))
        except asyncio.CancelledError:
            # The page has gone, so nobody reads the rest of the answer.
            beginning.add_done_callback(_discard)
            raise

    async def whole(self) -> bytes:
        """Return an answer that does not stream, such as an error, without secrets. Raises OSError."""
        try:
            return redact((await start_in_thread(self._exchange.whole)).decode(errors="replace")).encode()
        finally:
            self._exchange.close()

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """Yield the answer as it comes. If it breaks off, the last piece says why, in the API's own form."""
        queue: asyncio.Queue[bytes] = asyncio.Queue(WAITING_PIECES)
        reading = start_in_thread(_read_into, self._exchange, queue, asyncio.get_running_loop())
        try:
            while piece := await queue.get():
                yield piece
        finally:
            # Ends the thread's read, and lets it put what it waits to put.
            self._exchange.abort()
            while not reading.done():
                with contextlib.suppress(asyncio.QueueEmpty):
                    queue.get_nowait()
                await asyncio.sleep(0.01)


def _read_into(exchange: Exchange, queue: asyncio.Queue[bytes], loop: asyncio.AbstractEventLoop) -> None:
    """Put every piece into a queue of an event loop, and empty bytes at the end."""

    def put(piece: bytes) -> None:
        asyncio.run_coroutine_threadsafe(queue.put(piece), loop).result()

    try:
        while piece := exchange.piece():
            put(piece)
    except OSError as error:
        text = f"the engine's answer broke off: {redact(str(error) or type(error).__name__)}"
        put(f"\n\ndata: {json.dumps({'error': {'message': text, 'type': 'server_error'}})}\n\n".encode())
    finally:
        exchange.close()
        put(b"")


def _discard(beginning: asyncio.Future[Exchange]) -> None:
    if not beginning.cancelled() and beginning.exception() is None:
        exchange = beginning.result()
        exchange.abort()
        exchange.close()
