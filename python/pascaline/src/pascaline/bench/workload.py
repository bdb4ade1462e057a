"""What is sent to the server: lengths, prompts and arrival times, all decided by a seed."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Literal, TypeVar

from pascaline.errors import ConfigurationError

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

Arrival = Literal["poisson", "fixed"]
Prompt = list[int] | str
Item = TypeVar("Item")

NONCE_TOKENS = 4
"""Random tokens that open every prompt, so that no two share a prefix in the server's cache."""
MAX_TOKENS = 2**20
MAX_SIGMA = 10.0
"""Of lognormal lengths: ten standard deviations must still be a finite number."""
SHIPPED_TEXT = files("pascaline.bench").joinpath("texts/alice.txt")
"""In the public domain; see texts/README.md."""

_LENGTHS = re.compile(
    r"(?P<fixed>\d+)|(?P<low>\d+)-(?P<high>\d+)"
    r"|(?P<shape>normal|lognormal):(?P<middle>\d+(?:\.\d+)?):(?P<spread>\d+(?:\.\d+)?)",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of lengths in tokens.

    128                  always 128
    64-256               uniform, both ends included
    normal:128:32        mean and standard deviation
    lognormal:128:0.5    median, and standard deviation of the logarithm: chats look like this
    """

    text: str
    shape: Literal["fixed", "uniform", "normal", "lognormal"]
    first: float
    second: float = 0.0

    def draw(self, source: random.Random) -> int:
        """Return one length, at least 1."""
        match self.shape:
            case "fixed":
                drawn = self.first
            case "uniform":
                drawn = source.randint(int(self.first), int(self.second))
            case "normal":
                drawn = source.gauss(self.first, self.second)
            case "lognormal":
                drawn = source.lognormvariate(math.log(self.first), self.second)
        return max(1, min(round(drawn), MAX_TOKENS))

    @property
    def typical(self) -> int:
        """The median, tokens."""
        return round((self.first + self.second) / 2 if self.shape == "uniform" else self.first)


def parse_lengths(flag: str, text: str) -> Lengths:
    """Return the distribution that a flag's value describes."""
    match = _LENGTHS.fullmatch(text.strip())
    if match is None:
        raise ConfigurationError(f"{flag}: must be like 128, 64-256, normal:128:32 or lognormal:128:0.5, got {text!r}")
    if match["fixed"]:
        found = Lengths(text, "fixed", float(match["fixed"]))
    elif match["low"]:
        found = Lengths(text, "uniform", float(match["low"]), float(match["high"]))
    else:
        shape: Literal["normal", "lognormal"] = "normal" if match["shape"] == "normal" else "lognormal"
        found = Lengths(text, shape, float(match["middle"]), float(match["spread"]))
    if found.first < 1 or (found.shape == "uniform" and found.second < found.first):
        raise ConfigurationError(f"{flag}: lengths must be at least 1 token and ascending, got {text!r}")
    if max(found.first, found.second) > MAX_TOKENS:
        raise ConfigurationError(f"{flag}: lengths must be at most {MAX_TOKENS} tokens, got {text!r}")
    if found.shape == "lognormal" and found.second > MAX_SIGMA:
        raise ConfigurationError(f"{flag}: sigma must be at most {MAX_SIGMA:g}, got {text!r}")
    return found


@dataclass(frozen=True, slots=True)
class Request:
    """One request to send."""

    prompt: Prompt
    prompt_tokens: int
    """The intended length; the server's own count is recorded with the answer."""
    output_tokens: int
    at: float | None = None
    """Arrival time, seconds after the start of the run; None: sent as soon as a slot is free."""


@dataclass(frozen=True)
class Prompts:
    """Makes prompts of a wanted length from the text that ships with this package."""

    tokens: Sequence[int] | None
    """The text as the server's tokeniser splits it; None if the server has no such endpoint."""
    characters_per_token: float = 4.0
    """For servers without a tokeniser endpoint; measured by one request."""

    def make(self, source: random.Random, length: int) -> Prompt:
        """Return a prompt of about `length` tokens, exactly `length` for token ids. No two prompts begin alike."""
        if self.tokens is None:
            return _text_prompt(source, round(length * self.characters_per_token))
        nonce = [source.choice(self.tokens) for _ in range(min(NONCE_TOKENS, length))]
        start = source.randrange(len(self.tokens))
        return nonce + _cycled(self.tokens, start, length - len(nonce))


@cache
def shipped_text() -> str:
    """Return the text from which prompts are cut."""
    return SHIPPED_TEXT.read_text(encoding="utf-8")


def make_requests(
    prompts: Prompts, prompt_lengths: Lengths, output_lengths: Lengths, count: int, source: random.Random
) -> list[Request]:
    """Return requests without arrival times."""
    requests = []
    for _ in range(count):
        length = prompt_lengths.draw(source)
        requests.append(Request(prompts.make(source, length), length, output_lengths.draw(source)))
    return requests


def arrival_times(arrival: Arrival, rate: float, count: int, source: random.Random) -> list[float]:
    """Return each request's arrival time, seconds from the start. rate: mean requests per second."""
    if arrival == "fixed":
        return [number / rate for number in range(count)]
    times, now = [], 0.0
    for _ in range(count):
        times.append(now)
        now += source.expovariate(rate)
    return times


def _text_prompt(source: random.Random, characters: int) -> str:
    text = shipped_text()
    nonce = f"{source.randrange(36**6):x} "
    start = source.randrange(len(text))
    return (nonce + "".join(_cycled(text, start, characters)))[: max(1, characters)]


def _cycled(items: Sequence[Item], start: int, count: int) -> list[Item]:
    """Return `count` items from `start` on, going back to the beginning after the end."""
    size = len(items)
    return [items[(start + number) % size] for number in range(count)]
