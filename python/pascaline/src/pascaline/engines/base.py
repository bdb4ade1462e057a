"""The interface between supervisor and engine: how to start it, whether it makes progress, what its output means."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from gguf_acceptance import Verdict

from pascaline.engines.causes import Cause, Diagnosis, Explanation, cuda_fault
from pascaline.engines.exposition import MalformedPageError, Samples
from pascaline.engines.last_words import cause_of_traceback, fatal_words, first_of_last_errors
from pascaline.engines.plan_request import ALL_LAYERS
from pascaline.engines.series import Series, Vitals, vitals_of
from pascaline.engines.speculation import NO_SPECULATION, Speculation
from pascaline.errors import ConfigurationError
from pascaline.gpu.devices import device_variables
from pascaline.models.roles import own_role, role_refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from pascaline.engines.data import EngineData
    from pascaline.engines.installation import Installation, Probe
    from pascaline.engines.memory_model import MemoryModel
    from pascaline.engines.server import Server
    from pascaline.models.resolve import ResolvedModel
    from pascaline.models.spec import ModelSpec
    from pascaline.settings import Role, Settings

    Ask = Callable[[str], tuple[int, bytes]]
    """Sends GET for a path to a running engine; returns (HTTP status, body), or raises OSError."""

LONGEST_NAME = 100
"""Most characters of the version that an engine reports."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Everything that determines how an engine is started."""

    settings: Settings
    model: ResolvedModel
    device: str
    """`cpu` or `cuda`: never auto, so that an engine cannot fall back to the CPU unnoticed."""
    dtype: str
    """`float16`, `bfloat16` or `float32`."""
    threads: int
    context_length: int
    max_total_tokens: int
    """Tokens of the KV pool."""
    mem_fraction_static: float | None
    prefill_bits: int
    decode_bits: int
    """Bits of the activations in decode steps, and `prefill_bits` those in prefill: 8 or 16, never auto."""
    gpu_layers: int = ALL_LAYERS
    """Layers on the GPU, counted from the last one and with the output layer as one more."""
    expert_layers_on_host: int = 0
    """Number of first layers that keep their experts in the host's memory."""
    prompt_cache_bytes: int | None = None
    """Limit of what the host's memory keeps of prompts beside weights; None: the engine's own."""
    numa_node: int | None = None
    """The GPU's NUMA node; None if the host has one node only, or the node is unknown."""
    speculation: Speculation = NO_SPECULATION
    runtime_dir: Path
    """Folder that only this user can read, for the file with the API key."""
    api_key: str | None = field(default=None, repr=False)
    whole_prompts: bool = False
    """As in PlanRequest."""
    device_variables: Mapping[str, str] | None = None
    """Variables that let the engine see the planned GPUs only; None: all visible GPUs, in the order of the PCI bus."""

    cpus: frozenset[int] = frozenset()
    """CPUs that it is bound to; empty: all that this process may use."""
    numa_nodes: int = 1
    """How many NUMA nodes have CPUs that it may use."""

    @property
    def variables(self) -> dict[str, str]:
        """The variables of the setting `environment`, and those that select the device.

        On a GPU the latter win: the placement has already read the setting, and names the same GPUs by UUID.
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
    """A command, and the variables that it needs besides this process's."""

    command: tuple[str, ...]
    environment: dict[str, str]


@dataclass(frozen=True, slots=True)
class Progress:
    """How much an engine has done and still has to do. Counters run since its start; only differences matter."""

    tokens: float
    """A sum that grows with every step of work; only its growth matters."""
    running: int
    queued: int
    answers: float | None = None
    """Grows with every token that is sent to a client; None: the engine counts only its work, and `tokens` is used
    instead."""
    prefill: float = 0.0
    """Prompt tokens computed."""
    decode: float = 0.0
    """Tokens generated, whether or not they reached a client."""
    prompts: float | None = None
    """Prompts whose computation began; None: the engine does not report it."""
    idle_seconds: float | None = None
    """Time without anything to compute; None: the engine does not report it."""

    @property
    def has_work(self) -> bool:
        """Whether any request waits for an answer."""
        return self.running + self.queued > 0


@dataclass(frozen=True, slots=True)
class WorkLimits:
    """The most that a healthy engine computes between two answers. If it computes more, answers are being lost."""

    chunk: float
    """Prompt tokens of one step, unless the prompt ends in that step."""
    prefill: float
    """Prompt tokens."""
    prompts: float
    """Prompts."""
    decode: float
    """Generated tokens that are not sent yet."""


class Parsers(NamedTuple):
    """What reads tool calls and reasoning in answers; None: calls stay text, or reasoning stays in the answer."""

    tool_call_parser: str | None
    reasoning_parser: str | None

    @property
    def sentence(self) -> str:
        """What is chosen, for the log and the plan."""
        calls = (
            f"tool calls are read by {self.tool_call_parser}" if self.tool_call_parser else "no parser of tool calls"
        )
        thoughts = f"reasoning by {self.reasoning_parser}" if self.reasoning_parser else "no parser of reasoning"
        return f"{calls}, {thoughts}"


class Engine(ABC):
    """One kind of engine. Instances hold no state."""

    data: ClassVar[EngineData]
    """Its name, constants and measured speeds."""
    memory: ClassVar[MemoryModel]
    """What it allocates for a model."""
    drains_on_sigterm: ClassVar[bool]
    """Whether the engine finishes running requests after SIGTERM; if not, the supervisor first waits for them."""
    series: ClassVar[Series]
    """Names of its series that mean the same for every engine."""
    server_path: ClassVar[str]
    """Path of its API that describes the server."""
    required: ClassVar[tuple[str, ...]]
    """Names in `Installation.versions` without which it cannot run."""
    packages: ClassVar[tuple[str, ...]] = ()
    """Python packages that it consists of."""
    processes: ClassVar[tuple[str, ...]]
    """What the names of its processes begin with."""
    variable_prefixes: ClassVar[tuple[str, ...]]
    """What the names of its environment variables begin with."""
    folder_methods: ClassVar[tuple[str, ...]] = ()
    """Methods by which it quantises a folder of safetensors while it loads it."""
    has_profiler: ClassVar[bool] = False
    """Whether its API records a profile (/start_profile)."""
    keeps_weights_on_host: ClassVar[bool] = False
    """Whether it can compute a part of the weights in the host's memory while it uses a GPU."""
    decides_itself: ClassVar[bool] = False
    """Whether it may load architectures that `judge` cannot know, and refuses others itself."""
    setting_flags: ClassVar[Mapping[str, str]]
    """The engine's own flag -> the setting that controls it."""
    failures: ClassVar[Sequence[Explanation]]
    """Patterns of output that explain a failure, the most specific first."""

    @property
    def name(self) -> str:
        """Its name in the setting `engine`."""
        return self.data.name

    @abstractmethod
    def launch(self, task: Task) -> Launch:
        """Return how to start it. Raises MissingError if its program is not on this machine."""

    @abstractmethod
    def judge(self, spec: ModelSpec) -> Verdict:
        """Return why it refuses a model, by the header alone, and which defaults it assumes. Pure; never raises.

        plan, serve, verify and doctor all ask this.
        """

    def judge_as(self, spec: ModelSpec, role: Role | None = None) -> Verdict:
        """Return why it refuses a model in a role; None: the role that the file gives it."""
        role = role or own_role(spec)
        sentence = role_refusal(spec, role) or self.refuses_role(spec, role)
        return Verdict([sentence]) if sentence else self.judge(spec)

    def refuses_role(self, spec: ModelSpec, role: Role) -> str | None:
        """Return why it does not serve a role, or this model in it; None if it does."""
        del spec, role
        return None

    def knows(self, spec: ModelSpec) -> bool:
        """Whether it names the model's architecture among those that it serves."""
        del spec
        return self.decides_itself

    def prepare(self, settings: Settings, path: Path, digest: str) -> Path | None:
        """Return what it starts from instead of a GGUF file, made once for each content; None: the file itself.

        path: the file, or the first part of a split model. digest: of all its files (combined_sha256). This may take
        seconds, and raises ModelError, MissingError and StorageError.
        """
        del settings, path, digest
        return None

    def prepare_draft(self, settings: Settings, found: Speculation) -> Speculation:
        """Return it with what a draft model is loaded from instead of its file; times and errors as of `prepare`."""
        del settings
        return found

    def parsers(self, settings: Settings, templates: str, architecture: str) -> Parsers | None:
        """Return its parsers for a model; None if it has its own way to read answers.

        templates: the text of the model's chat templates, empty if it has none. architecture: as in ModelSpec.
        """
        del settings, templates, architecture
        return None

    @abstractmethod
    def progress(self, metrics: str) -> Progress | None:
        """Read the progress from its /metrics; None if the series are missing or the page is malformed."""

    def vitals(self, metrics: str) -> Vitals:
        """Read what people look at from its /metrics; nothing from a malformed page."""
        return vitals_of(metrics, self.series)

    @abstractmethod
    def version(self, ask: Ask) -> str:
        """Return the version that it reports. Raises OSError if it reports none."""

    @abstractmethod
    def server(self, entry: dict[str, Any], facts: dict[str, Any]) -> Server | None:
        """Read what a server reports; None if it is another engine's.

        entry: the model in /v1/models; facts: the answer from `server_path`.
        """

    @abstractmethod
    def probe(self, settings: Settings | None, variables: Sequence[str]) -> Probe:
        """Return a command that reports what is installed. variables: those of `variable_prefixes` that are set."""

    @abstractmethod
    def installation(self, probe: Probe, text: str, errors: str, code: int) -> Installation:
        """Read the answer of `probe`. text, errors: what it wrote to stdout and stderr; code: its exit status."""

    @abstractmethod
    def parse_line(self, line: str) -> tuple[str, str]:
        """Return (level, text) of a line of its output; level is a name of the logging module."""

    def work_limits(self, task: Task) -> WorkLimits | None:
        """Return the most that it computes between two answers; None if it does not count answers separately."""
        del task
        return None

    def allocated(self, metrics: str) -> dict[str, int]:
        """Read weights_bytes, kv_bytes and kv_tokens from its /metrics; values that it does not report are absent."""
        del metrics
        return {}

    def problems(self, settings: Settings) -> list[tuple[str, str]]:
        """Return (key, sentence) for every setting that this engine cannot use. Checks only what needs no I/O."""
        sentences = map(self._contradiction, settings.extra_args)
        found = [("extra_args", sentence) for sentence in sentences if sentence is not None]
        kv_problem = self.memory.kv_problem(settings.kv_cache.dtype)
        return [*found, ("kv_cache.dtype", kv_problem)] if kv_problem else found

    def _contradiction(self, argument: str) -> str | None:
        """Return why an argument is refused: a setting controls the same flag. None if it is allowed."""
        given = argument.partition("=")[0]
        flag = self._flag_of_setting(given)
        if flag is None:
            return None
        shown, setting = given if given == flag else f"{given} ({flag})", self.setting_flags[flag]
        return f"{shown} is set by {setting}, must be left out; set {setting} instead"

    def check_extra_args(self, extra_args: Sequence[str]) -> None:
        """Raise ConfigurationError for the first argument that a setting controls."""
        for argument in extra_args:
            if sentence := self._contradiction(argument):
                raise ConfigurationError(f"extra_args: {sentence}")

    def _flag_of_setting(self, given: str) -> str | None:
        """Return the flag among `setting_flags`, if any; engines that use argparse accept abbreviations too."""
        if given in self.setting_flags:
            return given
        abbreviates = given.startswith("--") and given != "--"
        return next((flag for flag in self.setting_flags if abbreviates and flag.startswith(given)), None)

    def diagnose(self, lines: Sequence[str]) -> Diagnosis | None:
        """Return why it failed according to its last lines; None if no pattern matches them."""
        text = "\n".join(lines)
        found = next((each for each in self.failures if each.pattern.search(text)), None)
        if found is not None and found.cause is Cause.GPU_LOST:
            return Diagnosis(found.cause, found.text)
        if error := cuda_fault(lines):
            return Diagnosis(Cause.CUDA_FAULT, f"CUDA says: {error.message} ({error.names[0]}, {error.code})")
        return Diagnosis(found.cause, found.text) if found else None

    def explain(self, lines: Sequence[str]) -> str | None:
        """Return in plain words why it failed; None if no pattern matches its last lines."""
        diagnosis = self.diagnose(lines)
        return diagnosis.text if diagnosis else None

    def last_words(self, lines: Sequence[str]) -> str:
        """Return the line that best explains why it ended; if no line is an error, say so and quote the last one."""
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
        """Whether this is a line that the engine also writes in normal operation."""
        del line
        return False


def sum_of_series(metrics: str, name: str) -> float | None:
    """Return the sum of all series of this name in a Prometheus text page; None if it has none or is malformed."""
    try:
        return Samples(metrics, {name}).sum(name)
    except MalformedPageError:
        return None


def text_of(document: dict[str, Any], key: str) -> str:
    """Return a short text from an engine's answer. Raises ConnectionError if it holds none."""
    value = document.get(key)
    if not isinstance(value, str) or not 0 < len(value) <= LONGEST_NAME or not value.isprintable():
        raise ConnectionError(f"no {key} in the answer")
    return value
