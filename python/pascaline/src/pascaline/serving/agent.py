"""The agent's HTTP interface: current state for probes, scrapers and people. Users' requests never pass through it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from pascaline import __version__
from pascaline.descriptors import MOST_CONNECTIONS, connection_limit, raise_descriptor_limit
from pascaline.redaction import redact_all
from pascaline.serving.connections import Connections, bounded_protocol
from pascaline.serving.guard import Guard, names_of_this_host
from pascaline.serving.health import ANSWERING, State
from pascaline.serving.page import PATHS, add_page
from pascaline.settings import Role  # noqa: TC001 - pydantic needs it at run time

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

    from pascaline.serving.instance_view import InstanceView

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class ModelReport(BaseModel):
    """The served model."""

    name: str = Field(description="Name in the API")
    path: str = Field(description="File, first part of a split model, or folder")
    architecture: str
    sha256: str | list[str] | None = Field(description="Checksum of a GGUF file; a list with one per part if split")


class ParsersReport(BaseModel):
    """SGLang's parsers of this instance."""

    tool_call_parser: str | None = Field(description="Null: calls stay text")
    reasoning_parser: str | None = Field(description="Null: reasoning stays in the answer")


class ProbeReport(BaseModel):
    """The last test generation."""

    at: float = Field(description="Unix time")
    ok: bool
    seconds: float = Field(description="Duration")
    reason: str | None = Field(description="Why it failed")


class HealthReport(BaseModel):
    """Everything known about the instance."""

    state: State
    since: float = Field(description="Unix time at which the state was entered")
    reason: str
    engine: str = Field(description="Kind of engine")
    role: Role = Field(description="What the model is for: generate, embed or rerank")
    engine_pid: int | None = Field(description="Process id of the engine; null while it does not run")
    running_requests: int | None = Field(description="Requests that run in the engine; null if it reports none")
    queued_requests: int | None = Field(description="Requests that wait in the engine; null if it reports none")
    restarts: int = Field(description="Restarts of the engine since the instance was started")
    model: ModelReport | None = Field(description="Null until the model is resolved")
    parsers: ParsersReport | None = Field(
        description="Null until the model is resolved, with llama.cpp, and if it generates no text"
    )
    versions: dict[str, str] = Field(description="Version of pascaline, and of the engine once it is ready")
    last_probe: ProbeReport | None


class Verdict(BaseModel):
    """A yes or no with its reason."""

    ok: bool
    state: State
    reason: str


class Refused(BaseModel):
    """Why a request was refused."""

    detail: str


REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": Refused, "description": "A header that decides who may do this is given twice"},
    401: {"model": Refused, "description": "The API key is missing or wrong"},
    403: {"model": Refused, "description": "From another host without an API key, under a foreign name, or by a page"},
    503: {"model": Refused, "description": "The API key cannot be read"},
}
"""The guard's answers, for the description of what it guards."""


class RedactedResponse(JSONResponse):
    """An answer without the secrets that this process knows."""

    def render(self, content: Any) -> bytes:
        """Return the body."""
        return super().render(redact_all(content))


def create_app(instance: InstanceView, connections: int = MOST_CONNECTIONS) -> FastAPI:
    """Return the HTTP application for one instance; its page is `state.page`. connections: most that are open."""
    app = FastAPI(
        title="pascaline agent",
        version=__version__,
        default_response_class=RedactedResponse,
        # FastAPI's pages of the API load their scripts from another server.
        docs_url=None,
        redoc_url=None,
        summary="Health, metrics and control of one instance. The model's API is on the engine's own port.",
    )

    @app.get("/livez", summary="Whether the supervisor runs; says nothing about the engine")
    async def livez() -> Verdict:
        return Verdict(ok=True, state=instance.health.state, reason="the supervisor answers")

    @app.get(
        "/readyz",
        summary="Whether requests are welcome: a generation succeeded, there is progress, and no stop was requested",
        responses={503: {"model": Verdict, "description": "Not ready; `reason` says why"}},
    )
    async def readyz(response: Response) -> Verdict:
        health = instance.health
        ok = health.state in ANSWERING
        response.status_code = 200 if ok else 503
        return Verdict(ok=ok, state=health.state, reason=health.reason)

    @app.get("/health", summary="Everything known about the instance")
    async def health() -> HealthReport:
        return report(instance)

    @app.get("/metrics", summary="Prometheus metrics of the instance", response_class=Response)
    async def metrics() -> Response:
        return Response(instance.metrics.page(), media_type=METRICS_TYPE)

    @app.get(
        "/plan", summary="The plan that the instance was started with", responses={404: {"description": "None yet"}}
    )
    async def plan(response: Response) -> dict[str, Any]:
        if instance.plan is None:
            response.status_code = 404
            return {"detail": "the model has not been planned yet"}
        return instance.plan

    @app.post(
        "/drain",
        summary="Stop taking requests, let the running ones finish, then exit; needs the API key if one is set",
        status_code=202,
        responses=REFUSALS,
    )
    async def drain() -> Verdict:
        instance.stop("POST /drain")
        return Verdict(ok=True, state=instance.health.state, reason="draining")

    app.state.page = add_page(app, instance, connections)
    app.add_middleware(Guard, keys=instance.read_api_key, names=names_of_this_host(), page=PATHS)
    return app


def report(instance: InstanceView) -> HealthReport:
    """Return the current report on the instance."""
    health, model, probe = instance.health, instance.model, instance.last_probe
    requests = instance.requests if instance.engine_pid is not None else None
    return HealthReport(
        state=health.state,
        since=health.since,
        reason=health.reason,
        engine=instance.settings.engine,
        role=instance.settings.role,
        engine_pid=instance.engine_pid,
        running_requests=requests.running if requests else None,
        queued_requests=requests.queued if requests else None,
        restarts=instance.restarts,
        model=ModelReport(
            name=model.served_name,
            path=str(model.path),
            architecture=model.spec.architecture,
            sha256=(list(model.sha256) if len(model.sha256) > 1 else model.sha256[0]) if model.sha256 else None,
        )
        if model
        else None,
        parsers=ParsersReport(**instance.parsers._asdict()) if instance.parsers else None,
        versions=instance.versions,
        last_probe=ProbeReport(at=probe.at, ok=probe.ok, seconds=probe.seconds, reason=probe.reason) if probe else None,
    )


class AgentServer(uvicorn.Server):
    """uvicorn without signal handlers: only the supervisor handles signals in this process."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install no handlers."""
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the open pages' streams first: they never end by themselves."""
        app = self.config.app
        if isinstance(app, FastAPI):
            app.state.page.close()
        await super().shutdown(sockets)


def create_server(instance: InstanceView) -> AgentServer:
    """Return the agent's server. The caller binds its socket before it starts anything else."""
    connections = Connections(connection_limit(raise_descriptor_limit()))
    config = uvicorn.Config(
        create_app(instance, connections.most),
        log_level="warning",
        access_log=False,
        lifespan="off",
        loop="asyncio",
        http=bounded_protocol(connections),
        # The length of the kernel's queue, and the number of connections accepted in one go.
        backlog=connections.most,
        ws="none",
        timeout_graceful_shutdown=2,
    )
    return AgentServer(config)


async def serve(server: AgentServer, *listeners: socket.socket) -> None:
    """Serve until `server.should_exit`."""
    await server.serve(sockets=list(listeners))
