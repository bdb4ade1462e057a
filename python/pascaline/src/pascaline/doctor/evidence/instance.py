"""The instance in question: its settings, its variables, and what it reports."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pascaline.configuration import load
from pascaline.doctor.host import Instance
from pascaline.engines.client import reachable
from pascaline.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pascaline.doctor.machine import Machine

UNIT_PREFIX = "pascaline-"
NOT_INSTANCES = ("exporter", "router", "gpu-limits", "model-gc")
"""Our units that serve no model. Units that fetch a model are named `model-<name>`."""
UNIT_PROPERTIES = ("LoadState", "ActiveState", "SubState", "NRestarts", "MainPID", "ExecStart", "Environment")


@dataclass(frozen=True, slots=True)
class Question:
    """What the user asks about."""

    instance: str | None = None
    """Name of an instance, URL of its agent, or its TOML file; None: the only one on this host, or none."""
    config_file: Path | None = None
    flags: Mapping[str, Any] | None = None
    """Settings given on the command line."""


def collect_instance(machine: Machine, question: Question) -> Instance:
    """Find the instance in question: its settings, its variables, and what it reports."""
    asked = question.instance
    if asked and asked.startswith(("http://", "https://")):
        return _answers(machine, Instance(name=asked), asked.rstrip("/"), None)
    if asked and (asked.endswith(".toml") or "/" in asked):
        return _from_settings(machine, Instance(), Path(asked), question.flags, machine.environment)
    names = [asked] if asked else _instances(machine)
    if len(names) == 1:
        return _from_unit(machine, names[0], question, must_exist=asked is not None)
    found = Instance(others=tuple(names))
    return _from_settings(machine, found, question.config_file, question.flags, machine.environment)


def _instances(machine: Machine) -> list[str]:
    command = ["systemctl", "list-units", "--all", "--plain", "--no-legend", f"{UNIT_PREFIX}*.service"]
    output = machine.run("systemctl-list-units", command)
    units = [line.split()[0] for line in (output.text if output else "").splitlines() if line.strip()]
    names = [unit.removeprefix(UNIT_PREFIX).removesuffix(".service") for unit in units]
    return [name for name in names if name not in NOT_INSTANCES and not name.startswith("model-")]


def _from_unit(machine: Machine, name: str, question: Question, *, must_exist: bool) -> Instance:
    unit = f"{UNIT_PREFIX}{name}.service"
    properties = _unit_properties(machine, unit)
    if must_exist and properties.get("LoadState") != "loaded":
        raise ConfigurationError(
            f"--instance: no unit {unit} on this host, must be an instance's name, its agent's URL or its TOML file"
        )
    variables = dict(part.partition("=")[::2] for part in shlex.split(properties.get("Environment", "")))
    match = re.search(r"--config[ =](\S+)", properties.get("ExecStart", ""))
    instance = Instance(name=name, unit=properties)
    file = Path(match[1]) if match else question.config_file
    return _from_settings(machine, instance, file, question.flags, variables, f"the unit {unit}")


def _unit_properties(machine: Machine, unit: str) -> dict[str, str]:
    command = ["systemctl", "show", unit, *(f"--property={name}" for name in UNIT_PROPERTIES)]
    output = machine.run("systemctl-show", command)
    return dict(line.partition("=")[::2] for line in (output.text if output else "").splitlines() if "=" in line)


def _from_settings(
    machine: Machine,
    instance: Instance,
    file: Path | None,
    flags: Mapping[str, Any] | None,
    variables: Mapping[str, str],
    source: str = "this process",
) -> Instance:
    try:
        located = machine.path(file) if file is not None and file.is_absolute() else file
        configuration = load(flags, located, variables, check_host=False)
    except ConfigurationError as error:
        return replace(instance, configuration_error=str(error), environment=variables, environment_source=source)
    settings = configuration.settings
    instance = replace(
        instance,
        configuration=configuration,
        environment={**variables, **settings.environment},
        environment_source=source,
    )
    agent = _url(settings.agent_host, settings.agent_port)
    return _answers(machine, instance, agent, _url(settings.host, settings.port))


def _url(host: str, port: int) -> str:
    host, port = reachable((host, port))
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _answers(machine: Machine, instance: Instance, agent: str, engine: str | None) -> Instance:
    health = json_object(machine.fetch(f"{agent}/health"))
    if health is None or "state" not in health:
        return instance
    return replace(
        instance,
        health=health,
        plan=json_object(machine.fetch(f"{agent}/plan")),
        engine_metrics=(machine.fetch(f"{engine}/metrics") or "") if engine else "",
    )


def json_object(text: str | None) -> dict[str, Any] | None:
    """Return the JSON object in a text; None for other text."""
    try:
        found = json.loads(text or "")
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
