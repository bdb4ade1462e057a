"""What is sent to the server: lengths, prompts and arrival times, all decided by a seed."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Literal, TypeVar

from pascaline.errors import ConfigurationError

if TYPE_CHECKING:
    import random
    from collections.abc import Mapping, Sequence

Arrival = Literal["poisson", "fixed"]
Prompt = list[int] | str
Workload = Literal["free", "edit", "quote"]
Item = TypeVar("Item")

NONCE_TOKENS = 4
"""Random tokens that open every prompt, so that no two share a prefix in the server's cache."""
MAX_TOKENS = 2**20
MAX_SIGMA = 10.0
"""Largest sigma of lognormal lengths: ten standard deviations must still be a finite number."""
REQUESTS_BY_WORKLOAD: dict[Workload, str] = {
    "free": "",
    "edit": "\n\nThe same text once more, with single quotation marks instead of double ones:\n\n",
    "quote": "\n\nThree sentences of the text above, word for word, as a list:\n\n- ",
}
"""What follows the text of a prompt. Nothing: the answer goes on with the story. Else the answer repeats from it."""
BEGUN_TOKENS = 8
"""Tokens of the edited text that the prompt already has, so that a model without instruction training goes on too."""
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
    requests: Mapping[Workload, Sequence[int]] = field(default_factory=dict)
    """`REQUESTS_BY_WORKLOAD` as tokens."""

    def make(self, source: random.Random, length: int, workload: Workload = "free") -> Prompt:
        """Return a prompt of about `length` tokens, exactly `length` for token ids. No two prompts begin alike.

        A prompt that is too short for its workload's request is longer.
        """
        if self.tokens is None:
            characters = round(length * self.characters_per_token)
            begun = round(BEGUN_TOKENS * self.characters_per_token)
            tail = REQUESTS_BY_WORKLOAD[workload]
            text = _text_prompt(source, max(1, characters - len(tail) - (begun if workload == "edit" else 0)))
            return text + tail + (text[:begun] if workload == "edit" else "")
        request = list(self.requests.get(workload, ()))
        rest = max(1, length - len(request) - (BEGUN_TOKENS if workload == "edit" else 0))
        nonce = [source.choice(self.tokens) for _ in range(min(NONCE_TOKENS, rest))]
        start = source.randrange(len(self.tokens))
        text_tokens = nonce + _cycled(self.tokens, start, rest - len(nonce))
        return text_tokens + request + (text_tokens[:BEGUN_TOKENS] if workload == "edit" else [])


@cache
def shipped_text() -> str:
    """Return the text from which prompts are cut."""
    return SHIPPED_TEXT.read_text(encoding="utf-8")


def make_requests(
    prompts: Prompts,
    prompt_lengths: Lengths,
    output_lengths: Lengths,
    count: int,
    source: random.Random,
    workload: Workload = "free",
) -> list[Request]:
    """Return requests without arrival times."""
    requests = []
    for _ in range(count):
        length = prompt_lengths.draw(source)
        requests.append(Request(prompts.make(source, length, workload), length, output_lengths.draw(source)))
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
