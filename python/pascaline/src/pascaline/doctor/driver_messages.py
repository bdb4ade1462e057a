"""Messages in the kernel's log with which the driver refuses a card: cause and remedy, from driver_messages.toml."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from pascaline.doctor.verdicts import Remedy

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True, slots=True)
class DriverMessage:
    """A message with which the driver refuses a card."""

    id: str
    pattern: re.Pattern[str]
    """Searched in single lines."""
    means: str
    remedy: Remedy
    source: str
    """Where the message is printed or documented."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A known message in the log, and the last line that contains it."""

    message: DriverMessage
    line: str


@cache
def driver_messages() -> tuple[DriverMessage, ...]:
    """Return all known messages, the most specific first."""
    text = files("pascaline.doctor").joinpath("driver_messages.toml").read_text(encoding="utf-8")
    return tuple(_message(entry) for entry in tomllib.loads(text)["message"])


def _message(entry: dict[str, str]) -> DriverMessage:
    remedy = Remedy(entry["remedy"], entry.get("command", ""), entry.get("option", ""))
    return DriverMessage(entry["id"], re.compile(entry["pattern"]), entry["means"], remedy, entry["source"])


def refusals(lines: Iterable[str]) -> list[Refusal]:
    """Return the refusals among lines of the kernel's log, the most specific first, each once.

    A line counts for the first message that it matches.
    """
    found: dict[str, Refusal] = {}
    for line in lines:
        message = next((each for each in driver_messages() if each.pattern.search(line)), None)
        if message is not None:
            found[message.id] = Refusal(message, line.strip())
    return [found[message.id] for message in driver_messages() if message.id in found]
