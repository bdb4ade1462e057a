"""Cards: facts about each supported GPU, as data with sources, and its starting settings."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pascaline.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pascaline.gpu.memory import GpuRates

Origin = Literal["measured", "documented", "estimated"]

PROC_GPUS = Path("/proc/driver/nvidia/gpus")
"""One folder per GPU, written by NVIDIA's driver; its `information` file has a `Model:` line."""


@dataclass(frozen=True, slots=True)
class Fact:
    """A number, how it was determined, and its source."""

    value: float
    origin: Origin
    source: str


@dataclass(frozen=True, slots=True)
class DriverBranches:
    """Which branches of NVIDIA's driver a Pascal card and CUDA's releases need (driver.toml)."""

    last_pascal: int
    """The newest branch that drives Pascal."""
    least: dict[int, int]
    """CUDA's major version -> the oldest branch that runs its programs."""


@dataclass(frozen=True, slots=True)
class Card:
    """One card's facts and default settings."""

    name: str
    nvml_names: tuple[str, ...]
    """The driver's names for it."""
    compute_capability: str | None
    """None for the CPU."""
    facts: dict[str, Fact]
    settings: dict[str, Any]
    """Values of Settings that differ from the general defaults."""

    def number(self, fact: str) -> float:
        """Return a fact's value. Raises KeyError if the card has no such fact."""
        return self.facts[fact].value

    @property
    def memory_bytes(self) -> int:
        """Memory that the driver reports, bytes; 0 for the CPU."""
        return int(self.facts["memory_bytes"].value) if "memory_bytes" in self.facts else 0

    @property
    def has_dp4a(self) -> bool:
        """Whether the card multiplies four int8 pairs in one instruction: compute capability 6.1 and newer but 6.2."""
        if self.compute_capability is None:
            return False
        major, minor = map(int, self.compute_capability.split("."))
        return (major, minor) >= (6, 1) and (major, minor) != (6, 2)


def card_names() -> tuple[str, ...]:
    """The names of all profiles."""
    return tuple(_data())


def load_card(name: str) -> Card:
    """Return the card of this name."""
    try:
        entry = _data()[name]
    except KeyError:
        raise ConfigurationError(unknown_name(name)) from None
    return Card(
        name=name,
        nvml_names=tuple(entry.get("nvml_names", ())),
        compute_capability=entry.get("compute_capability"),
        facts=_facts(entry.get("facts", {})),
        settings=({} if name == "cpu" else _read("cards.toml")["gpu"]["settings"]) | entry.get("settings", {}),
    )


def unknown_name(name: object) -> str:
    """Return the message for a card that has no profile: it suggests the profiles whose names have the same words."""
    wanted = _words(str(name))
    similar = [card for card in card_names() if wanted and _is_similar(wanted, (card, *load_card(card).nvml_names))]
    if similar:
        return f"card: unknown card {name!r}, did you mean {' or '.join(similar)}?"
    return f"card: unknown card {name!r}, must be one of: {', '.join(card_names())}"


def _is_similar(wanted: list[str], names: Sequence[str]) -> bool:
    """Whether all words are in these names of a card, or one name ends with them written together (`1080ti`)."""
    words = [_words(name) for name in names]
    return {*wanted} <= {word for each in words for word in each} or any(
        "".join(each).endswith("".join(wanted)) for each in words
    )


def _words(name: str) -> list[str]:
    """Return the words and numbers of a card's name, without the maker's: gtx, 1060, 3gb."""
    found = re.findall(r"[a-z0-9]+", re.sub(r"(\d) gb", r"\1gb", name.lower()))
    return [word for word in found if word != "nvidia"]


def unknown_card(nvml_name: str, memory_bytes: int, rates: GpuRates | None = None) -> Card:
    """Return a card for a GPU without a profile; its speed is known only if NVML reports what bounds it."""
    numbers: dict[str, float] = {"memory_bytes": memory_bytes}
    if rates is not None:
        numbers |= {
            "bandwidth_bytes_per_second": rates.bandwidth_bytes_per_second,
            "cores": rates.cores,
            "boost_clock_hertz": rates.clock_hertz,
        }
    facts = {name: Fact(value, "measured", "NVML") for name, value in numbers.items()}
    capability = rates.compute_capability if rates else None
    return Card(nvml_name, (nvml_name,), capability, facts, {})


def card_for_device(nvml_name: str) -> Card | None:
    """Return the card with this driver name; None for a card without a profile."""
    for name in card_names():
        card = load_card(name)
        if nvml_name in card.nvml_names:
            return card
    return None


def detect_card(index: int = 0, proc_gpus: Path = PROC_GPUS) -> str | None:
    """Return the profile of this host's GPU of that index, `cpu` without a GPU, None if its card has no profile.

    This reads the driver's folder rather than NVML, which can block for minutes on a faulty card.
    """
    models = installed_models(proc_gpus)
    if not models:
        return "cpu"
    card = card_for_device(models[index]) if index < len(models) else None
    return card.name if card else None


def installed_models(proc_gpus: Path = PROC_GPUS) -> list[str]:
    """Return the model names of this host's NVIDIA GPUs, in PCI order."""
    models = []
    for information in sorted(proc_gpus.glob("*/information")):
        match = re.search(
            r"^Model:\s*(.+?)\s*$", information.read_text(encoding="utf-8", errors="replace"), re.MULTILINE
        )
        if match:
            models.append(match.group(1).removeprefix("NVIDIA "))
    return models


@cache
def driver_branches() -> DriverBranches:
    """Return the table of driver branches. The NixOS modules read it too."""
    data = _read("driver.toml")
    least = {int(major): branch for major, branch in data["least_branch"].items()}
    return DriverBranches(last_pascal=data["last_pascal_branch"], least=least)


def _facts(entries: dict[str, Any]) -> dict[str, Fact]:
    return {key: Fact(**fact) for key, fact in entries.items()}


@cache
def _data() -> dict[str, Any]:
    """Every card by its name; `gpu` is not a card, but the table from which all of them start."""
    return {name: entry for name, entry in _read("cards.toml").items() if name != "gpu"}


@cache
def _read(name: str) -> dict[str, Any]:
    return tomllib.loads(files("pascaline.cards").joinpath(name).read_text(encoding="utf-8"))
