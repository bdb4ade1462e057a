"""The defaults that Nix needs too, from one file that both read: defaults.json (`modules/defaults.nix`)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Final

_DATA: Final[dict[str, Any]] = json.loads(files("pascaline").joinpath("defaults.json").read_text())


@dataclass(frozen=True, slots=True)
class Ports:
    """Default ports of one host."""

    engine: int
    agent: int
    exporter: int
    router: int
    router_metrics: int
    grafana: int
    node_exporter: int
    between_instances: int
    """How far the ports of a host's next instance are from those of the one before it."""


PORTS: Final = Ports(**_DATA["ports"])
SETTINGS: Final[dict[str, Any]] = _DATA["settings"]
"""Defaults of some settings, by name; all others have theirs in `settings.py`."""
