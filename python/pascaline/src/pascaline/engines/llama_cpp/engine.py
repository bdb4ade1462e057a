"""llama.cpp's llama-server as a child process."""

from __future__ import annotations

import re
import shutil
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from gguf_acceptance import Verdict

from pascaline.engines.base import Engine, Launch, Progress, Task, text_of
from pascaline.engines.causes import Cause, Explanation
from pascaline.engines.client import json_object
from pascaline.engines.data import read_data
from pascaline.engines.installation import Installation, Probe
from pascaline.engines.llama_cpp import speculation
from pascaline.engines.llama_cpp.host_caches import checkpoints
from pascaline.engines.llama_cpp.locking import check_limit
from pascaline.engines.llama_cpp.memory import LlamaCppMemory, memory_arguments
from pascaline.engines.llama_cpp.offload import expert_refusals, host_weights_bytes
from pascaline.engines.llama_cpp.options import (
    devices_of,
    host_cache_arguments,
    locked_arguments,
    mapped_arguments,
    numa_arguments,
    options_of,
    own_placement_arguments,
    pinned_arguments,
)
from pascaline.engines.plan_request import ALL_LAYERS, PlanRequest
from pascaline.engines.rope_factors import factor_refusals
from pascaline.engines.series import Selector, Series, samples_of
from pascaline.engines.server import Server
from pascaline.errors import ConfigurationError, MissingError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pascaline.engines.base import Ask
    from pascaline.models.spec import ModelSpec
    from pascaline.settings import Role, Settings

DATA = read_data(Path(__file__).parent)
WITHOUT_COUNTERPART: dict[str, Any] = {
    "activation_bits.decode": "auto",
    "activation_bits.prefill": "auto",
    "any_model_name": False,
    "attention_backend": None,
    "max_queued_requests": None,
    "pipeline_parallel": 1,
    "quantization": None,
    "radix_cache": True,
    "reasoning_parser": "auto",
    "schedule_policy": "fcfs",
    "tensor_parallel": 1,
    "tool_call_parser": "auto",
}
"""Settings without a counterpart in llama-server, each with its neutral value."""
PROGRAM = "llama-server"
PROBE_SECONDS = 20.0
SPINS = {"GOMP_SPINCOUNT": "1000"}
"""How often a thread looks at a barrier before it sleeps. A decode step has a thousand barriers.

libgomp's default, 300,000, takes milliseconds, on a core that the awaited thread may need. 1,000 takes tens of
microseconds, enough for threads that have a core each; libgomp itself takes it for `ACTIVE` with more threads than CPUs
(its manual, GOMP_SPINCOUNT). llama-bench on two busy cores (load average 5 to 6, SmolLM2-135M, 2 threads): 3.4 to 4.3
tokens/s with 300,000, 22 to 24 with 1,000, 28 to 38 with none. llama-server's `--poll` does not concern barriers, and
builds without OpenMP spin without a limit.

A server whose layers are on both sides keeps libgomp's default: its threads wait for the GPU in every layer, and waking
them costs more: with 12 layers on an H200's host 129 tokens/s with the default, 99 with threads that sleep at once.
"""
_WAITS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
SERIES = Series(
    running=Selector("llamacpp:requests_processing"),
    queued=Selector("llamacpp:requests_deferred"),
    generated=Selector("llamacpp:tokens_predicted_total"),
    throughput=Selector("llamacpp:predicted_tokens_seconds"),
    drafted=Selector("llamacpp:spec_decode_num_draft_tokens_total"),
    accepted=Selector("llamacpp:spec_decode_num_accepted_tokens_total"),
    checks=Selector("llamacpp:spec_decode_num_drafts_total"),
    kv_usage=Selector("llamacpp:kv_cache_usage_ratio"),
)
# The same thread computes and sends answers, so its steps also count as answers. Its decode calls leave out those that
# verify drafts.
_STEPS = (
    *("llamacpp:n_decode_total", "llamacpp:spec_decode_num_drafts_total", "llamacpp:prompt_tokens_total"),
    SERIES.generated.name,
)
_PROGRESS_SERIES = frozenset({*_STEPS, SERIES.running.name, SERIES.queued.name})

_ERROR_WORDS = re.compile(r"\b(error|failed|fatal|abort)", re.IGNORECASE)
_WARNING_WORDS = re.compile(r"\b(warn(ing)?|deprecated)\b", re.IGNORECASE)
# "0.00.123.456 I text", newer versions' prefix with --log-prefix.
_PREFIXED = re.compile(r"[\d.]+ ([DIWE]) (.*)")
_VERSION = re.compile(r"^version: (.+)$", re.MULTILINE)
_LEVELS = {"D": "DEBUG", "I": "INFO", "W": "WARNING", "E": "ERROR"}


ROLE_FLAGS: dict[Role, tuple[str, ...]] = {
    "generate": (),
    "embed": ("--embedding",),
    # With the pooling of the model's head, which the file names too.
    "rerank": ("--rerank", "--pooling", "rank"),
}


class LlamaCppEngine(Engine):
    """`llama-server` with a GGUF file."""

    data = DATA
    memory = LlamaCppMemory(DATA)
    drains_on_sigterm = False
    series = SERIES
    server_path = "/props"
    required = (DATA.name,)
    processes = ("llama",)
    variable_prefixes = ("LLAMA_", "GGML_")
    keeps_weights_on_host = True
    decides_itself = True
    setting_flags: ClassVar[Mapping[str, str]] = {
        "-m": "model",
        "--model": "model",
        "-mu": "model",
        "--model-url": "model",
        "-dr": "model",
        "--docker-repo": "model",
        "-hf": "model",
        "-hfr": "model",
        "--hf-repo": "model",
        "-hff": "model",
        "--hf-file": "model",
        "-a": "served_model_name",
        "--alias": "served_model_name",
        "--host": "host",
        "--port": "port",
        "-c": "context_length",
        "--ctx-size": "context_length",
        "-np": "max_running_requests",
        "--parallel": "max_running_requests",
        "-t": "threads",
        "--threads": "threads",
        "--embedding": "role",
        "--embeddings": "role",
        "--rerank": "role",
        "--reranking": "role",
        "--pooling": "role",
        "-b": "chunked_prefill_tokens",
        "--batch-size": "chunked_prefill_tokens",
        "-ctk": "kv_cache.dtype",
        "--cache-type-k": "kv_cache.dtype",
        "-ctv": "kv_cache.dtype",
        "--cache-type-v": "kv_cache.dtype",
        "-dev": "device",
        "--device": "device",
        "-ngl": "placement.layers",
        "--n-gpu-layers": "placement.layers",
        "--gpu-layers": "placement.layers",
        "-cmoe": "placement.experts",
        "--cpu-moe": "placement.experts",
        "-ncmoe": "placement.experts",
        "--n-cpu-moe": "placement.experts",
        "-ot": "placement.experts",
        "--override-tensor": "placement.experts",
        "-fit": "placement.experts",
        "--fit": "placement.experts",
        "-ub": "chunked_prefill_tokens",
        "--ubatch-size": "chunked_prefill_tokens",
        "-lm": "placement.weights",
        "--load-mode": "placement.weights",
        "--mlock": "placement.weights",
        "--no-mmap": "placement.weights",
        "--spec-type": "speculative.method",
        "--spec-draft-n-max": "speculative.tokens",
        "--spec-ngram-simple-size-m": "speculative.tokens",
        "-md": "speculative.draft_model",
        "--model-draft": "speculative.draft_model",
        "--spec-draft-model": "speculative.draft_model",
        "--api-key": "api_key_file",
        "--api-key-file": "api_key_file",
    }
    failures: ClassVar[Sequence[Explanation]] = [
        Explanation(
            re.compile(r"out of memory|failed to allocate", re.IGNORECASE),
            Cause.DEVICE_MEMORY,
            "not enough memory on the device; lower context_length or max_running_requests",
        ),
        Explanation(
            re.compile(r"couldn't bind|address already in use", re.IGNORECASE), Cause.PORT, "its port is in use"
        ),
        Explanation(
            re.compile(r"unknown model architecture"), Cause.MODEL, "llama.cpp does not know the model's architecture"
        ),
        Explanation(
            re.compile(r"tensor .* data is not within the file bounds|invalid magic"),
            Cause.MODEL,
            "the model file is damaged",
        ),
    ]

    def launch(self, task: Task) -> Launch:
        """Return the command line. Raises MissingError if llama-server cannot be found, or would leave out the GPU."""
        settings = task.settings
        self.check_extra_args(settings.extra_args)
        arguments = [
            *("--model", str(task.model.path), "--alias", task.model.served_name),
            *("--host", settings.host, "--port", str(settings.port)),
            *("--threads", str(task.threads)),
            *_memory_arguments(task, self.memory),
            *_offload_arguments(task, _program(task)),
            *speculation.arguments(task.speculation, settings),
            "--metrics",
            *ROLE_FLAGS[settings.role],
        ]
        if settings.api_key_file is not None:
            arguments += ["--api-key-file", str(settings.api_key_file)]
        if settings.debug:
            arguments.append("--verbose")
        if task.device == "cuda":
            _require_cuda(_program(task), task.variables)
        return Launch((_program(task), *arguments, *settings.extra_args), {**_spins(task), **task.variables})

    def problems(self, settings: Settings) -> list[tuple[str, str]]:
        """Return the problems of the extra arguments, of settings without a counterpart, and of the KV type."""
        unknown = [
            (key, f"{value!r} has no counterpart in llama.cpp, must be left out or engine be sglang")
            for key, neutral in WITHOUT_COUNTERPART.items()
            if (value := attrgetter(key)(settings)) != neutral
        ]
        return [*unknown, *super().problems(settings), *speculation.problems(settings)]

    def judge(self, spec: ModelSpec) -> Verdict:
        """Refuse what it cannot read at all; it refuses itself what it cannot load."""
        if spec.format != "gguf":
            return Verdict(["llama.cpp serves GGUF files only; set engine to sglang, or convert the model"])
        if not spec.tensors:
            return Verdict(["it has no tensors: it holds a vocabulary or other settings, and no weights"])
        return Verdict([*factor_refusals(spec), *expert_refusals(spec)])

    def progress(self, metrics: str) -> Progress | None:
        """Read the progress; the counter of decode calls grows with every batch of prompt or answer tokens."""
        samples = samples_of(metrics, SERIES, _PROGRESS_SERIES)
        if samples is None:
            return None
        running, queued = (int(samples.total(each.name)) for each in (SERIES.running, SERIES.queued))
        return Progress(samples.total(*_STEPS), running, queued)

    def server(self, entry: dict[str, Any], facts: dict[str, Any]) -> Server | None:
        """Read /props."""
        if "total_slots" not in facts:
            return None
        context = facts.get("default_generation_settings", {}).get("n_ctx")
        return Server(
            model=str(entry["id"]),
            engine=self.name,
            engine_version=facts.get("build_info"),
            model_path=facts.get("model_path"),
            context_length=context,
            max_running_requests=facts["total_slots"],
            max_total_tokens=context * facts["total_slots"] if context else None,
        )

    def probe(self, settings: Settings | None, variables: Sequence[str]) -> Probe:
        """Ask llama-server for its version."""
        del variables
        program = settings.engine_executable if settings else None
        return Probe(PROGRAM, (str(program or PROGRAM), "--version"), PROBE_SECONDS)

    def installation(self, probe: Probe, text: str, errors: str, code: int) -> Installation:
        """Read the version."""
        del code
        match = _VERSION.search(errors + text)
        if match is None:
            return Installation(error=f"{probe.command[0]} names no version")
        return Installation(versions={self.name: match[1]})

    def version(self, ask: Ask) -> str:
        """Ask the running engine."""
        return text_of(json_object(ask("/props")[1]), "build_info")

    def parse_line(self, line: str) -> tuple[str, str]:
        """Take the level from llama.cpp's prefix if there is one, otherwise from the line's words."""
        if match := _PREFIXED.match(line):
            return _LEVELS[match.group(1)], match.group(2)
        if _ERROR_WORDS.search(line):
            return "ERROR", line
        return ("WARNING" if _WARNING_WORDS.search(line) else "INFO"), line


def _program(task: Task) -> str:
    named = task.settings.engine_executable
    found = shutil.which(str(named or PROGRAM))
    if found is None:
        where = f"{named} is not a program" if named else "llama-server is not on PATH"
        raise MissingError(
            f"engine_executable: {where}; install llama.cpp, or name its llama-server in engine_executable"
        )
    return found


def _require_cuda(program: str, variables: Mapping[str, str]) -> None:
    """Refuse a build that sees no NVIDIA GPU: it would compute everything on the CPU and say nothing."""
    devices = devices_of(program, variables)
    if devices is not None and not any(device.startswith("CUDA") for device in devices):
        seen = ", ".join(devices) or "none"
        raise MissingError(
            f"engine_executable: {program} sees no NVIDIA GPU ({program} --list-devices: {seen}) and would compute on "
            "the CPU; install a llama.cpp that is built with CUDA, repair the driver, or set device to cpu"
        )


def _spins(task: Task) -> dict[str, str]:
    """Return how long threads wait awake, if neither the settings nor layers on both sides decide that."""
    is_divided = task.device == "cuda" and (task.expert_layers_on_host > 0 or task.gpu_layers != ALL_LAYERS)
    return {} if is_divided or any(name in task.variables for name in _WAITS) else SPINS


def _offload_arguments(task: Task, program: str) -> tuple[str, ...]:
    """Return the flags for weights in the host's memory. They depend on the build, which is asked only if needed."""
    weights = task.settings.placement.weights
    is_whole = not task.expert_layers_on_host and task.gpu_layers == ALL_LAYERS
    if is_whole and task.device == "cpu" and weights != "locked" and (weights == "mapped" or task.numa_nodes > 1):
        options = options_of(program)
        mapped = mapped_arguments(options) if weights == "mapped" else ()
        return (*mapped, *numa_arguments(options, is_bound=bool(task.cpus), nodes=task.numa_nodes))
    if is_whole and not (weights == "locked" and task.device == "cpu"):
        return ()
    options = options_of(program)
    held: tuple[str, ...] = ()
    if weights == "pinned":
        held = pinned_arguments(options)
    elif weights == "locked":
        _check_locked(task)
        held = locked_arguments(options)
    numa = numa_arguments(options, is_bound=bool(task.cpus), nodes=task.numa_nodes)
    kept = host_cache_arguments(options, task.prompt_cache_bytes, checkpoints(task.context_length))
    return (*own_placement_arguments(options), *held, *numa, *kept)


def _check_locked(task: Task) -> None:
    request = PlanRequest(
        card_bytes=0,
        engine=DATA.name,
        device="cuda" if task.device == "cuda" else "cpu",
        context_length=task.context_length,
        gpu_layers=task.gpu_layers,
        expert_layers_on_host=task.expert_layers_on_host,
    )
    check_limit(host_weights_bytes(task.model.spec, request))


def _memory_arguments(task: Task, memory: LlamaCppMemory) -> tuple[str, ...]:
    chosen = task.settings.kv_cache.dtype
    if sentence := memory.kv_problem(chosen):
        raise ConfigurationError(f"kv_cache.dtype: {sentence}")
    return memory_arguments(
        context_length=task.context_length,
        max_running_requests=task.settings.max_running_requests,
        chunked_prefill_tokens=task.settings.chunked_prefill_tokens,
        device=task.device,
        kv_flag=memory.kv_flag(chosen, task.dtype),
        whole_prompts=task.whole_prompts,
        gpu_layers=task.gpu_layers,
        expert_layers_on_host=task.expert_layers_on_host,
    )
