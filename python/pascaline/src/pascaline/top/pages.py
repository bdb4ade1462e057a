"""Metrics pages of hosts, fetched at the same time, each with its own deadline."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import httpx
from prometheus_client.parser import text_string_to_metric_families

from pascaline.defaults import PORTS
from pascaline.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

EXPORTER_PORT, AGENT_PORT = PORTS.exporter, PORTS.agent
# The n-th instance of a host listens this many ports above the one before it (hosts/default.nix).
AGENT_PORT_STEP = PORTS.between_instances
MAX_INSTANCES = 8
# From an agent's port to its engine's, if no agent reports it.
ENGINE_PORT_OFFSET = PORTS.engine - PORTS.agent


class Sample(NamedTuple):
    """One line of a page."""

    labels: Mapping[str, str]
    value: float


@dataclass(frozen=True, slots=True)
class Page:
    """The samples of one metrics page by name."""

    samples: Mapping[str, list[Sample]]

    def select(self, name: str, **labels: str) -> list[Sample]:
        """Return the samples of a metric that have all these labels."""
        return [s for s in self.samples.get(name, []) if labels.items() <= s.labels.items()]

    def total(self, name: str, **labels: str) -> float | None:
        """Return the sum of the samples; None if there are none."""
        found = self.select(name, **labels)
        return sum(sample.value for sample in found) if found else None


@dataclass(frozen=True, slots=True)
class Target:
    """A host to look at; without an agent's port, all its instances at their default ports."""

    host: str
    agent_port: int | None = None
    exporter_port: int = EXPORTER_PORT


@dataclass(frozen=True, slots=True)
class HostPages:
    """What one host answered: None if nothing listens or the deadline passed."""

    host: str
    exporter: Page | None
    instances: Mapping[int, tuple[Page | None, Page | None]] = field(default_factory=dict)
    """Agent's port -> pages of agent and engine."""
    error: str | None = None
    """Why nothing answered at all."""


def parse_target(text: str, exporter_port: int) -> Target:
    """Return the target in HOST, HOST:PORT or [IPV6]:PORT; the port is an agent's."""
    host, port = text, ""
    if text.startswith("["):
        host, _, rest = text[1:].partition("]")
        port = rest.removeprefix(":")
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    if not host or (port and not (port.isdecimal() and 1 <= int(port) <= 65535)):
        raise ConfigurationError(
            f"--host: must be HOST, HOST:PORT or [IPV6]:PORT with a port of 1 to 65535, got {text!r}"
        )
    return Target(host, int(port) if port else None, exporter_port)


def parse_page(text: str) -> Page:
    """Return the samples of a page in Prometheus' text format."""
    samples: dict[str, list[Sample]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append(Sample(sample.labels, sample.value))
    return Page(samples)


async def fetch_hosts(client: httpx.AsyncClient, targets: list[Target], deadline: float) -> list[HostPages]:
    """Return the pages of all hosts; a slow or dead host does not delay the others."""
    return list(await asyncio.gather(*(_fetch_host(client, target, deadline) for target in targets)))


async def _fetch_host(client: httpx.AsyncClient, target: Target, deadline: float) -> HostPages:
    (exporter, error), instances = await asyncio.gather(
        _fetch_page(client, target.host, target.exporter_port, deadline), _fetch_instances(client, target, deadline)
    )
    answered = exporter is not None or any(page is not None for pair in instances.values() for page in pair)
    return HostPages(target.host, exporter, instances, error=None if answered else error)


async def _fetch_instances(
    client: httpx.AsyncClient, target: Target, deadline: float
) -> dict[int, tuple[Page | None, Page | None]]:
    if target.agent_port is not None:
        return {target.agent_port: await _fetch_instance(client, target.host, target.agent_port, deadline)}
    # All at once: a stopped instance does not hide those after it.
    ports = [AGENT_PORT + AGENT_PORT_STEP * number for number in range(MAX_INSTANCES)]
    pairs = await asyncio.gather(*(_fetch_instance(client, target.host, port, deadline) for port in ports))
    return {port: pair for port, pair in zip(ports, pairs, strict=True) if pair != (None, None)}


async def _fetch_instance(
    client: httpx.AsyncClient, host: str, agent_port: int, deadline: float
) -> tuple[Page | None, Page | None]:
    agent, _ = await _fetch_page(client, host, agent_port, deadline)
    engine, _ = await _fetch_page(client, host, _engine_port(agent, agent_port), deadline)
    return agent, engine


def _engine_port(agent: Page | None, agent_port: int) -> int:
    for sample in agent.select("pascaline_settings_info") if agent else []:
        if (port := sample.labels.get("port", "")).isdecimal():
            return int(port)
    return agent_port + ENGINE_PORT_OFFSET


async def _fetch_page(
    client: httpx.AsyncClient, host: str, port: int, deadline: float
) -> tuple[Page | None, str | None]:
    address = f"[{host}]" if ":" in host else host
    try:
        async with asyncio.timeout(deadline):
            # An engine redirects /metrics to /metrics/.
            response = await client.get(f"http://{address}:{port}/metrics", follow_redirects=True)
        response.raise_for_status()
        return parse_page(response.text), None
    except (TimeoutError, httpx.TimeoutException):
        return None, f"no answer in {deadline:g} s"
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return None, "nothing listens" if isinstance(error, httpx.ConnectError) else str(error)
    except ValueError as error:
        return None, f"not a metrics page: {error}"
