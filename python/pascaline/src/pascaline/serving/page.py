"""The agent's page for people: `GET /`, its parts, its live snapshots, and the box that asks the model.

The page is three files without a build step. Its content security policy allows nothing but those, so that no text of a
model or an engine can become a program or fetch anything.
"""

from __future__ import annotations

import html
import json
import re
import time
from contextlib import aclosing
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import ValidationError

from pascaline.serving.chat import MOST_BODY_BYTES, MOST_QUESTIONS, Answer, Question, request_of
from pascaline.serving.connections import HEARD
from pascaline.serving.feed import Feed, TooManyReadersError
from pascaline.serving.health import ANSWERING
from pascaline.serving.page_gpus import GpuWatch
from pascaline.serving.snapshot import snapshot

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from fastapi import FastAPI
    from starlette.types import Send

    from pascaline.serving.instance_view import InstanceView

WEB = Path(__file__).parent / "web"
CONTENT_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
PATHS = frozenset({"/", "/page.css", "/page.js", "/events", "/chat"})
"""What belongs to the page; the Guard lets no foreign page use it."""
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
LEAST_PAGES, MOST_PAGES = 1, 16
CONNECTIONS_PER_PAGE = 4
"""Connections of the agent for each one that a page may hold: probes and scrapers come first."""
_TEXT = re.compile(r'(<[^<>]* data-text="([\w-]+)"[^<>]*>)(?=</)')
_ROWS = re.compile(r'(<tbody data-rows="(\w+)"[^<>]*>)(?=</)')


class EventResponse(StreamingResponse):
    """Server-sent events; the source is closed at once if the page leaves."""

    async def stream_response(self, send: Send) -> None:
        """Send all of them."""
        async with aclosing(cast("Any", self.body_iterator)):
            await super().stream_response(send)


class Page:
    """The state of all open pages of one instance."""

    def __init__(self, instance: InstanceView, connections: int) -> None:
        """connections: the most that the agent's server keeps open."""
        self._instance = instance
        self._gpus = GpuWatch()
        self._questions = 0
        self.feed = Feed(self._event, max(LEAST_PAGES, min(MOST_PAGES, connections // CONNECTIONS_PER_PAGE)))

    def close(self) -> None:
        """Show the pages the last state, and let go of them."""
        self.feed.close()
        self._gpus.close()

    def snapshot(self) -> dict[str, Any]:
        """Return what the page shows now."""
        uuids = {gpu.uuid for gpu in self._instance.gpus}
        return snapshot(self._instance, self._gpus.states(uuids), time.time())

    async def _event(self) -> bytes:
        return f"data: {json.dumps(self.snapshot(), separators=(',', ':'))}\n\n".encode()

    async def events(self, request: Request) -> Response:
        """Send a snapshot every second."""
        try:
            self.feed.admit()
        except TooManyReadersError:
            return JSONResponse(
                {"detail": "too many pages are open, or the agent ends"}, 503, HEADERS | {"Retry-After": "10"}
            )
        heard = getattr(request.state, HEARD, None)

        async def read() -> AsyncGenerator[bytes, None]:
            yield b"retry: 2000\n\n"
            async with aclosing(self.feed.read()) as snapshots:
                async for event in snapshots:
                    yield event
                    if heard is not None:
                        heard()

        return EventResponse(read(), media_type="text/event-stream", headers=HEADERS)

    async def ask(self, request: Request) -> Response:
        """Pass one question to the engine."""
        question = await _question(request)
        instance = self._instance
        api, model = instance.api, instance.model
        if api is None or model is None or instance.health.state not in ANSWERING:
            raise HTTPException(503, f"the instance is {instance.health.state}: {instance.health.reason}")
        if (role := instance.settings.role) != "generate":
            raise HTTPException(409, f"the model's role is {role}: it writes no answers")
        if self._questions >= MOST_QUESTIONS:
            raise HTTPException(503, f"{MOST_QUESTIONS} questions from pages run already; wait for one of them")
        path, body = request_of(question, model.served_name, has_chat_template=model.has_chat_template)
        self._questions += 1
        try:
            answer = await Answer.begin(api, path, body, request.headers.get("authorization"))
            if not answer.streams:
                self._questions -= 1
                return Response(await answer.whole(), answer.status, HEADERS, "application/json")
        except OSError as error:
            self._questions -= 1
            raise HTTPException(502, f"the engine did not answer: {error}") from error
        heard = getattr(request.state, HEARD, None)

        async def pieces() -> AsyncGenerator[bytes, None]:
            try:
                async with aclosing(answer.pieces()) as read:
                    async for piece in read:
                        yield piece
                        if heard is not None:
                            heard()
            finally:
                self._questions -= 1

        return EventResponse(pieces(), media_type="text/event-stream", headers=HEADERS)


async def _question(request: Request) -> Question:
    """Read a question. Raises HTTPException if it is too long or malformed."""
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > MOST_BODY_BYTES:
            raise HTTPException(413, f"the conversation is longer than {MOST_BODY_BYTES} bytes; begin a new one")
    try:
        return Question.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(each) for each in first["loc"])
        raise HTTPException(422, f"{place or 'the question'}: {first['msg']}") from None


@cache
def part(name: str) -> str:
    """Return one of the page's files."""
    return (WEB / name).read_text(encoding="utf-8")


def rendered(shown: Mapping[str, Any]) -> str:
    """Return the page with a snapshot's texts in their places, so that it can be read without scripts."""

    def text(found: re.Match[str]) -> str:
        return found[1] + html.escape(shown["texts"].get(found[2], ""))

    def rows(found: re.Match[str]) -> str:
        lines = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in shown["tables"][found[2]])
        return found[1] + "".join(f"<tr>{line}</tr>" for line in lines)

    page = _ROWS.sub(rows, _TEXT.sub(text, part("page.html")))
    page = page.replace('data-state=""', f'data-state="{html.escape(shown["state"])}"', 1)
    return page.replace('href="#runbook"', f'href="{html.escape(shown["runbook"])}"', 1) if shown["runbook"] else page


def add_page(app: FastAPI, instance: InstanceView, connections: int) -> Page:
    """Add the page's routes to the agent; they are for people, so its description for programs has none of them."""
    page = Page(instance, connections)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return Response(rendered(page.snapshot()), headers=HEADERS, media_type="text/html")

    async def file(request: Request) -> Response:
        name = request.url.path.removeprefix("/")
        return Response(part(name), headers=HEADERS, media_type=CONTENT_TYPES[Path(name).suffix])

    for name in ("page.css", "page.js"):
        app.add_api_route(f"/{name}", file, include_in_schema=False, response_class=Response)
    app.add_api_route("/events", page.events, include_in_schema=False, response_class=Response)
    app.add_api_route("/chat", page.ask, methods=["POST"], include_in_schema=False, response_class=Response)
    return page
