"""What a running server reports about itself through its API."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """What a server reports; None if it does not report it."""

    model: str
    """Model's name in the API."""
    engine: str
    """Name of the engine, or `unknown`."""
    engine_version: str | None = None
    model_path: str | None = None
    context_length: int | None = None
    max_running_requests: int | None = None
    max_total_tokens: int | None = None
    """Capacity of the KV pool, tokens."""
    settings: dict[str, Any] | None = None
    """Engine settings that change its speed."""
