"""What is known about an engine as data: its name, constants of its memory, and its speed, from its engine.toml."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pascaline.cards import Fact
from pascaline.settings import ENGINE_FILE, KV_TYPES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from pascaline.cards import Card


@dataclass(frozen=True, slots=True)
class SpeedPoint:
    """One measured speed."""

    engine: str
    card: str
    model: str
    phase: Literal["decode", "prefill"]
    batch: int
    """Sequences of a decode step, tokens of a prefill batch."""
    tokens_per_second: float
    read_bytes: int
    """Weights that a step reads."""
    macs: int
    """Multiply-accumulates of one token."""
    source: str
    confirmed: bool = True
    """False: a single claim, kept for reference; nothing is fitted to it."""
    mixture: bool = False
    """Whether the model is a mixture of experts: its kernels gather rows and reach other shares than dense ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HybridPoint:
    """One published or measured speed of a mixture with experts in the host's memory (planning/hybrid.py)."""

    model: str
    """Name in the catalogue."""
    file: str | None = None
    """Quantisation; None: the catalogue's."""
    hardware: str
    phase: Literal["decode", "prefill"]
    expert_layers: int
    """Layers whose experts are on the host, counted from the first."""
    batch: int = 1
    """Tokens of a prefill batch."""
    tokens_per_second: float
    card_bytes_per_second: float | None = None
    """Peak of the card's memory, for decode."""
    host_bytes_per_second: float | None = None
    """Peak of the host's memory (channels x transfers x 8 bytes); None if not published."""
    host_cores: int | None = None
    """Cores that compute; None if not published."""
    link_bytes_per_second: float | None = None
    """Rate of copies to the card, for prefill; None if not published."""
    device_tokens_per_second: float | None = None
    """Prefill with all experts on the card, for prefill."""
    fitted: bool = True
    """Whether the share of the host's memory is fitted to it, if the host is known; False: something else is not known
    or unusual, as the source says."""
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KvTypeEntry:
    """A type of a stored key or value, as an engine.toml has it."""

    flag: str
    """The engine's own name, as its flags have it."""
    value_bytes: float | None = None
    """Bytes of one number, of a block format its share of the block; None: the plugin knows it."""
    pool: str | None = None
    """The plugin's name for a pool of this type."""
    added_perplexity: float = 0.0
    """What it adds to the perplexity: estimated."""
    can_be_set: bool = True
    """Whether kv_cache.dtype may name it; if not, it is what `auto` becomes."""


@dataclass(frozen=True, slots=True)
class EngineData:
    """The data of one engine."""

    name: str
    """Its name in the setting `engine`."""
    efficiency: Mapping[str, Fact]
    """Shares of the roofline that do not come from points, with the error of an estimate (planning/speed.py)."""
    points: tuple[SpeedPoint, ...]
    """Measured speeds that calibrate the estimates."""
    hybrid_points: tuple[HybridPoint, ...]
    """Speeds with experts in the host's memory, against which tests hold the estimates."""
    kv_types: Mapping[str, KvTypeEntry]
    """By our names, in the order in which messages name them."""
    cuda: Mapping[str, Fact]
    cpu: Mapping[str, Fact]
    """Constants of the memory plan on a GPU and on a CPU: name of the part with `_bytes` -> bytes."""
    cards: Mapping[str, Mapping[str, Fact]]
    """The same for one card, by its name; they override those of its kind."""

    def constants(self, card: Card) -> dict[str, Fact]:
        """Return the constants of the memory plan on a card."""
        return {**(self.cpu if card.name == "cpu" else self.cuda), **self.cards.get(card.name, {})}


def read_data(folder: Path) -> EngineData:
    """Read the data of the engine whose package is this folder."""
    entry = tomllib.loads((folder / ENGINE_FILE).read_text(encoding="utf-8"))
    return EngineData(
        name=entry["name"],
        efficiency=_facts(entry["efficiency"]),
        points=tuple(SpeedPoint(engine=entry["name"], **point) for point in entry.get("points", ())),
        hybrid_points=tuple(HybridPoint(**point) for point in entry.get("hybrid_points", ())),
        kv_types={name: KvTypeEntry(**each) for name, each in entry[KV_TYPES].items()},
        cuda=_facts(entry["cuda"]),
        cpu=_facts(entry["cpu"]),
        cards={name: _facts(facts) for name, facts in entry.get("cards", {}).items()},
    )


def _facts(entries: dict[str, Any]) -> dict[str, Fact]:
    return {key: Fact(**fact) for key, fact in entries.items()}
