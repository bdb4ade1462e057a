"""The driver's refusals of a card in the kernel's log: what each means and what to do, from driver_messages.toml."""

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
    """A message that was found, and the last line that has it."""

    message: DriverMessage
    line: str


@cache
def driver_messages() -> tuple[DriverMessage, ...]:
    """All messages that are known, the most telling first."""
    text = files("pascaline.doctor").joinpath("driver_messages.toml").read_text(encoding="utf-8")
    return tuple(_message(entry) for entry in tomllib.loads(text)["message"])


def _message(entry: dict[str, str]) -> DriverMessage:
    remedy = Remedy(entry["remedy"], entry.get("command", ""), entry.get("option", ""))
    return DriverMessage(entry["id"], re.compile(entry["pattern"]), entry["means"], remedy, entry["source"])


def refusals(lines: Iterable[str]) -> list[Refusal]:
    """Return the refusals among lines of the kernel's log, the most telling first, each once.

    A line belongs to the first message that it has.
    """
    found: dict[str, Refusal] = {}
    for line in lines:
        message = next((each for each in driver_messages() if each.pattern.search(line)), None)
        if message is not None:
            found[message.id] = Refusal(message, line.strip())
    return [found[message.id] for message in driver_messages() if message.id in found]
