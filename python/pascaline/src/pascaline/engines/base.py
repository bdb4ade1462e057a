"""What the supervisor needs of an engine: how to start it, whether it works and moves on, what its words mean."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pascaline.engines.causes import Cause, Diagnosis, Explanation, cuda_fault
from pascaline.engines.exposition import MalformedPageError, Samples
from pascaline.engines.last_words import cause_of_traceback, fatal_words, first_of_last_errors
from pascaline.errors import ConfigurationError
from pascaline.gpu.devices import device_variables

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from pascaline.models.store import ResolvedModel
    from pascaline.settings import Settings

    Ask = Callable[[str], tuple[int, bytes]]
    """Asks a running engine for a path; returns (status, answer), or raises OSError."""

LONGEST_NAME = 100
"""Characters of a version that an engine says of itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """All that decides how an engine is started."""

    settings: Settings
    model: ResolvedModel
    device: str
    """`cpu` or `cuda`: never auto, so that an engine cannot fall back to the CPU unseen."""
    dtype: str
    """`float16`, `bfloat16` or `float32`."""
    threads: int
    context_length: int
    max_total_tokens: int
    """Tokens of the KV pool."""
    mem_fraction_static: float | None
    runtime_dir: Path
    """Folder that only this user can read, for a file with the API key."""
    api_key: str | None = field(default=None, repr=False)
    device_variables: Mapping[str, str] | None = None
    """What shows the engine the GPUs that were planned for, and no other; None: those that are visible, by the bus."""

    @property
    def variables(self) -> dict[str, str]:
        """The settings' variables and those that name the device.

        On a GPU the latter come last: the placement has read the settings' and says the same in UUIDs.
        """
        device = device_variables(self.device) if self.device_variables is None else self.device_variables
        own = self.settings.environment
        return {**own, **device} if self.device == "cuda" else {**device, **own}

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the engine's API."""
        return self.settings.host, self.settings.port


@dataclass(frozen=True, slots=True)
class Launch:
    """A command and the variables that it adds to this process's."""

    command: tuple[str, ...]
    environment: dict[str, str]


@dataclass(frozen=True, slots=True)
class Progress:
    """How much an engine has done and has to do. Counters since its start; their differences mean something."""

    tokens: float
    """A sum that grows with every step of work; its size means nothing."""
    running: int
    queued: int
    answers: float | None = None
    """Grows with every token that is handed to a client; None: the engine counts only its work, which then stands for
    it."""
    prefill: float = 0.0
    """Prompt tokens computed."""
    decode: float = 0.0
    """Tokens generated, whether or not they reached a client."""
    prompts: float | None = None
    """Prompts whose computation began; None: the engine does not say."""
    idle_seconds: float | None = None
    """Time without anything to compute; None: the engine does not say."""

    @property
    def has_work(self) -> bool:
        """Whether any request waits for an answer."""
        return self.running + self.queued > 0


@dataclass(frozen=True, slots=True)
class WorkLimits:
    """The most that a healthy engine computes between two answers: beyond it, answers are lost."""

    chunk: float
    """Prompt tokens of one step, as far as the prompt does not end in it."""
    prefill: float
    """Prompt tokens."""
    prompts: float
    """Prompts."""
    decode: float
    """Generated tokens that are still held back."""


class Engine(ABC):
    """One kind of engine. Instances hold no state."""

    name: ClassVar[str]
    drains_on_sigterm: ClassVar[bool]
    """Whether SIGTERM lets running requests finish; else the supervisor waits for them before it sends one."""
    setting_flags: ClassVar[Mapping[str, str]]
    """The engine's own flag -> the setting that stands for it."""
    failures: ClassVar[Sequence[Explanation]]
    """What explains a failure by the engine's output, the most telling first."""

    @abstractmethod
    def launch(self, task: Task) -> Launch:
        """Return how to start it; raises MissingError where its program is not on this machine."""

    @abstractmethod
    def progress(self, metrics: str) -> Progress | None:
        """Read the progress from its /metrics; None where the series are missing or the page is malformed."""

    @abstractmethod
    def version(self, ask: Ask) -> str:
        """Return its version as it says itself; OSError where it does not."""

    @abstractmethod
    def parse_line(self, line: str) -> tuple[str, str]:
        """Return (level, text) of a line of its output; level is a name of the logging module."""

    def work_limits(self, task: Task) -> WorkLimits | None:
        """Return what may be computed between two answers; None where it does not count answers apart."""
        del task
        return None

    def allocated(self, metrics: str) -> dict[str, int]:
        """Read from its /metrics what it allocated: weights_bytes, kv_bytes, kv_tokens, as far as it says so."""
        del metrics
        return {}

    def problems(self, settings: Settings) -> list[tuple[str, str]]:
        """Return (key, sentence) for everything that this engine cannot be started with. Only what needs no I/O."""
        sentences = map(self._contradiction, settings.extra_args)
        return [("extra_args", sentence) for sentence in sentences if sentence is not None]

    def _contradiction(self, argument: str) -> str | None:
        """Say why an argument is refused: one that a setting stands for would contradict it."""
        given = argument.partition("=")[0]
        flag = self._flag_of_setting(given)
        if flag is None:
            return None
        shown, setting = given if given == flag else f"{given} ({flag})", self.setting_flags[flag]
        return f"{shown} is set by {setting}, must be left out; set {setting} instead"

    def check_extra_args(self, extra_args: Sequence[str]) -> None:
        """Raise ConfigurationError for the first argument that a setting stands for."""
        for argument in extra_args:
            if sentence := self._contradiction(argument):
                raise ConfigurationError(f"extra_args: {sentence}")

    def _flag_of_setting(self, given: str) -> str | None:
        """Return the flag that a setting stands for; engines that use argparse take abbreviations too."""
        if given in self.setting_flags:
            return given
        abbreviates = given.startswith("--") and given != "--"
        return next((flag for flag in self.setting_flags if abbreviates and flag.startswith(given)), None)

    def diagnose(self, lines: Sequence[str]) -> Diagnosis | None:
        """Return why it failed, judged by its last lines; None where they are not understood."""
        text = "\n".join(lines)
        found = next((each for each in self.failures if each.pattern.search(text)), None)
        if found is not None and found.cause is Cause.GPU_LOST:
            return Diagnosis(found.cause, found.text)
        if error := cuda_fault(lines):
            return Diagnosis(Cause.CUDA_FAULT, f"CUDA says: {error.message} ({error.names[0]}, {error.code})")
        return Diagnosis(found.cause, found.text) if found else None

    def explain(self, lines: Sequence[str]) -> str | None:
        """Return in plain words why it failed; None where its last lines are not understood."""
        diagnosis = self.diagnose(lines)
        return diagnosis.text if diagnosis else None

    def last_words(self, lines: Sequence[str]) -> str:
        """Return the line that is nearest to why it ended; where no line is an error, that and the last one."""
        found = (
            cause_of_traceback(lines)
            or fatal_words(lines)
            or first_of_last_errors(lines, lambda line: self.parse_line(line)[0])
        )
        if found is not None:
            return self.parse_line(found)[1].strip()
        last = next((line for line in reversed(lines) if line.strip()), "no output")
        said = self.parse_line(last)[1].strip()
        return f"it wrote no error; its last line: {said}" if self.is_chatter(last) else said

    def is_chatter(self, line: str) -> bool:
        """Whether a line is one of those that the engine writes while all is well."""
        del line
        return False


def sum_of_series(metrics: str, name: str) -> float | None:
    """Return the sum of all series of this name in a Prometheus text page; None: there is none, or no page."""
    try:
        return Samples(metrics, {name}).sum(name)
    except MalformedPageError:
        return None


def text_of(document: dict[str, Any], key: str) -> str:
    """Return a short text from an engine's answer. Raises ConnectionError where it holds none."""
    value = document.get(key)
    if not isinstance(value, str) or not 0 < len(value) <= LONGEST_NAME or not value.isprintable():
        raise ConnectionError(f"no {key} in the answer")
    return value
