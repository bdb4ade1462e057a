"""The agent's HTTP interface: what holds now, for probes, scrapers and people. Never in the path of users' requests."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from pascaline import __version__
from pascaline.descriptors import connection_limit, raise_descriptor_limit
from pascaline.redaction import redact_all
from pascaline.serving.connections import Connections, bounded_protocol
from pascaline.serving.guard import Guard, names_of_this_host
from pascaline.serving.health import ANSWERING, State

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

    from pascaline.serving.supervisor import Supervisor

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class ModelReport(BaseModel):
    """The model that is served."""

    name: str = Field(description="Name in the API")
    path: str = Field(description="File, first part of a split model, or folder")
    architecture: str
    sha256: str | list[str] | None = Field(description="Checksum of a GGUF file; of a split model one for each part")


class ProbeReport(BaseModel):
    """The last test generation."""

    at: float = Field(description="Unix time")
    ok: bool
    seconds: float = Field(description="Duration")
    reason: str | None = Field(description="Why it failed")


class HealthReport(BaseModel):
    """All that is known of the instance."""

    state: State
    since: float = Field(description="Unix time at which the state was entered")
    reason: str
    engine: str = Field(description="Kind of engine")
    engine_pid: int | None = Field(description="Process of the engine; null while none runs")
    running_requests: int | None = Field(description="Requests that the engine computes; null where it does not say")
    queued_requests: int | None = Field(description="Requests that wait for it; null where it does not say")
    restarts: int = Field(description="Restarts since the instance was started")
    model: ModelReport | None = Field(description="Null until it was resolved")
    versions: dict[str, str] = Field(description="Of pascaline, and of the engine once it is ready")
    last_probe: ProbeReport | None


class Verdict(BaseModel):
    """A yes or no with its reason."""

    ok: bool
    state: State
    reason: str


class RedactedResponse(JSONResponse):
    """An answer without the secrets that this process knows."""

    def render(self, content: Any) -> bytes:
        """Return the body."""
        return super().render(redact_all(content))


def create_app(supervisor: Supervisor) -> FastAPI:
    """Return the application over one supervisor."""
    app = FastAPI(
        title="pascaline agent",
        version=__version__,
        default_response_class=RedactedResponse,
        summary="Health, metrics and control of one instance. The model's API is on the engine's own port.",
    )

    @app.get("/livez", summary="Whether the supervisor runs; says nothing of the engine")
    async def livez() -> Verdict:
        return Verdict(ok=True, state=supervisor.health.state, reason="the supervisor answers")

    @app.get(
        "/readyz",
        summary="Whether requests are welcome: a generation succeeded, tokens move, and nobody asked to stop",
        responses={503: {"model": Verdict, "description": "Not now; the reason says why"}},
    )
    async def readyz(response: Response) -> Verdict:
        health = supervisor.health
        ok = health.state in ANSWERING
        response.status_code = 200 if ok else 503
        return Verdict(ok=ok, state=health.state, reason=health.reason)

    @app.get("/health", summary="Everything that is known of the instance")
    async def health() -> HealthReport:
        return report(supervisor)

    @app.get("/metrics", summary="Prometheus metrics of the instance", response_class=Response)
    async def metrics() -> Response:
        return Response(supervisor.metrics.page(), media_type=METRICS_TYPE)

    @app.get(
        "/plan", summary="The plan that the instance was started with", responses={404: {"description": "None yet"}}
    )
    async def plan(response: Response) -> dict[str, Any]:
        if supervisor.plan is None:
            response.status_code = 404
            return {"detail": "the model has not been planned yet"}
        return supervisor.plan

    @app.post(
        "/drain",
        summary="Stop taking requests, let the running ones end, then exit; with the API key, where there is one",
        status_code=202,
    )
    async def drain() -> Verdict:
        supervisor.stop("POST /drain")
        return Verdict(ok=True, state=supervisor.health.state, reason="draining")

    app.add_middleware(Guard, keys=supervisor.read_api_key, names=names_of_this_host())
    return app


def report(supervisor: Supervisor) -> HealthReport:
    """Return what is known now."""
    health, model, probe = supervisor.health, supervisor.model, supervisor.last_probe
    requests = supervisor.requests if supervisor.engine_pid is not None else None
    return HealthReport(
        state=health.state,
        since=health.since,
        reason=health.reason,
        engine=supervisor.settings.engine,
        engine_pid=supervisor.engine_pid,
        running_requests=requests.running if requests else None,
        queued_requests=requests.queued if requests else None,
        restarts=supervisor.restarts,
        model=ModelReport(
            name=model.served_name,
            path=str(model.path),
            architecture=model.spec.architecture,
            sha256=(list(model.sha256) if len(model.sha256) > 1 else model.sha256[0]) if model.sha256 else None,
        )
        if model
        else None,
        versions=supervisor.versions,
        last_probe=ProbeReport(at=probe.at, ok=probe.ok, seconds=probe.seconds, reason=probe.reason) if probe else None,
    )


class AgentServer(uvicorn.Server):
    """uvicorn without its signal handlers: the supervisor's are the process's only ones."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone."""
        yield


def create_server(supervisor: Supervisor) -> AgentServer:
    """Return the server of the agent; its socket is bound by the caller, before anything else is started."""
    connections = Connections(connection_limit(raise_descriptor_limit()))
    config = uvicorn.Config(
        create_app(supervisor),
        log_level="warning",
        access_log=False,
        lifespan="off",
        loop="asyncio",
        http=bounded_protocol(connections),
        # The queue of the kernel, and how many are accepted in one go.
        backlog=connections.most,
        ws="none",
        timeout_graceful_shutdown=2,
    )
    return AgentServer(config)


async def serve(server: AgentServer, *listeners: socket.socket) -> None:
    """Serve until `server.should_exit`."""
    await server.serve(sockets=list(listeners))
