"""SGLang, with the plugin sglang-pascal, as a child process."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from gguf_acceptance import combined_sha256

from pascaline.engines.base import Engine, Progress, WorkLimits, sum_of_series, text_of
from pascaline.engines.causes import Cause, Diagnosis, Explanation, cuda_fault
from pascaline.engines.client import json_object
from pascaline.engines.data import read_data
from pascaline.engines.series import Selector, Series, samples_of
from pascaline.engines.server import Server
from pascaline.engines.sglang import acceptance, activations, installation, speculation
from pascaline.engines.sglang.launch import HELD_BACK_TOKENS, launch
from pascaline.engines.sglang.memory import SglangMemory
from pascaline.engines.sglang.parsers import choose_parsers, parser_problems
from pascaline.engines.sglang.prepare import prepare
from pascaline.engines.sglang.vocabulary import vocabulary_refusals
from pascaline.engines.sglang.weights import BITSANDBYTES
from pascaline.models.cache import cache_folder
from pascaline.models.resolve import cached_sha256, model_files

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gguf_acceptance import Verdict

    from pascaline.engines.base import Ask, Launch, Parsers, Task
    from pascaline.engines.installation import Installation, Probe
    from pascaline.engines.speculation import Speculation
    from pascaline.models.spec import ModelSpec
    from pascaline.settings import Role, Settings

DATA = read_data(Path(__file__).parent)

SERIES = Series(
    running=Selector("sglang:num_running_reqs"),
    queued=Selector("sglang:num_queue_reqs"),
    generated=Selector("sglang:realtime_tokens_total", {"mode": "decode"}),
    throughput=Selector("sglang:gen_throughput"),
    drafted=Selector("sglang_pascal:spec_drafted_tokens_total"),
    accepted=Selector("sglang_pascal:spec_accepted_tokens_total"),
    checks=Selector("sglang_pascal:spec_checks_total"),
    won=Selector("sglang_pascal:spec_won_seconds"),
    kv_usage=Selector("sglang:token_usage"),
    ttft="sglang:time_to_first_token_seconds",
    itl="sglang:inter_token_latency_seconds",
)
# Counted in the tokenizer's process, after the detokenizer: first tokens, further tokens, tokens of finished answers.
_ANSWERS = (
    f"{SERIES.ttft}_count",
    f"{SERIES.itl}_count",
    "sglang:generation_tokens_total",
)
_PROGRESS_SERIES = frozenset(
    {
        *_ANSWERS,
        SERIES.generated.name,
        SERIES.running.name,
        SERIES.queued.name,
        "sglang:queue_time_seconds_count",
        "sglang:scheduler_idle_seconds_total",
    }
)

# The last line of a traceback. The plugin's errors are written for users; after them SGLang reports signals and kills.
_PLUGIN_ERROR = re.compile(r"sglang_pascal(?:\.\w+)+: (.+)")
# "[2026-11-23 20:15:01] INFO message" or "[2026-11-23 20:15:01 TP0] message"; SGLang leaves INFO out.
_LINE = re.compile(r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[^\]]*\] (?:(DEBUG|INFO|WARNING|ERROR|CRITICAL):? )?(.*)")
_UVICORN_LINE = re.compile(r"(DEBUG|INFO|WARNING|ERROR|CRITICAL):\s+(.*)")
# What it allocated: our name -> SGLang's gauge and its unit ("gb" is GiB).
_ALLOCATED = {
    "weights_bytes": ("weight_memory_usage_gb", 2**30),
    "kv_bytes": ("kv_cache_memory_usage_gb", 2**30),
    "kv_tokens": ("max_total_num_tokens", 1),
}
# Fields of /server_info that change what is measured.
_SPEED_SETTINGS = (
    "attention_backend",
    "chunked_prefill_size",
    "device",
    "disable_cuda_graph",
    "disable_overlap_schedule",
    "disable_radix_cache",
    "dtype",
    "kv_cache_dtype",
    "load_format",
    "mem_fraction_static",
    "quantization",
    "sampling_backend",
    "schedule_policy",
    "tp_size",
)


class SglangEngine(Engine):
    """`python -m sglang.launch_server` under the platform `pascal`."""

    data = DATA
    memory = SglangMemory(DATA)
    drains_on_sigterm = True
    series = SERIES
    server_path = "/server_info"
    required = ("torch", "sglang", "sglang-pascal")
    packages = (*required, "transformers", BITSANDBYTES)
    processes = ("sglang", "python", "pt_main")
    variable_prefixes = ("SGLANG_", "SGL_")
    folder_methods = (BITSANDBYTES,)
    has_profiler = True
    setting_flags: ClassVar[Mapping[str, str]] = {
        "--model-path": "model",
        "--model": "model",
        "--served-model-name": "served_model_name",
        "--host": "host",
        "--port": "port",
        "--device": "device",
        "--dtype": "dtype",
        "--context-length": "context_length",
        "--max-running-requests": "max_running_requests",
        "--max-queued-requests": "max_queued_requests",
        "--mem-fraction-static": "mem_fraction_static",
        "--schedule-policy": "schedule_policy",
        "--is-embedding": "role",
        "--tool-call-parser": "tool_call_parser",
        "--reasoning-parser": "reasoning_parser",
        "--chunked-prefill-size": "chunked_prefill_tokens",
        "--max-total-tokens": "kv_cache.max_tokens",
        "--kv-cache-dtype": "kv_cache.dtype",
        "--disable-radix-cache": "radix_cache",
        "--attention-backend": "attention_backend",
        "--quantization": "quantization",
        "--tp-size": "tensor_parallel",
        "--tensor-parallel-size": "tensor_parallel",
        "--pp-size": "pipeline_parallel",
        "--pipeline-parallel-size": "pipeline_parallel",
        "--speculative-algorithm": "speculative.method",
        "--speculative-num-draft-tokens": "speculative.tokens",
        "--speculative-num-steps": "speculative.tokens",
        "--speculative-draft-model-path": "speculative.draft_model",
        "--speculative-draft-model": "speculative.draft_model",
        "--api-key": "api_key_file",
        "--config": "the settings of pascaline",
    }
    failures: ClassVar[Sequence[Explanation]] = [
        Explanation(
            re.compile(r"GPU is lost|fallen off the bus|Unable to determine the device handle"),
            Cause.GPU_LOST,
            "the GPU is lost",
        ),
        Explanation(
            re.compile(r"OutOfMemoryError|CUDA out of memory|Not enough memory"),
            Cause.DEVICE_MEMORY,
            "not enough memory on the device; lower mem_fraction_static, context_length or max_running_requests",
        ),
        Explanation(
            # SGLang chooses a port for its own processes at its start, but listens on it only a minute later.
            re.compile(r"DistNetworkError.*EADDRINUSE"),
            Cause.PORT,
            "a port that SGLang had chosen for its own processes was taken by another program; start it again",
        ),
        Explanation(re.compile(r"address already in use", re.IGNORECASE), Cause.PORT, "its port is in use"),
        Explanation(
            re.compile(r"incomplete metadata, file not fully covered"),
            Cause.MODEL,
            "a safetensors file is truncated; copy it again",
        ),
        Explanation(
            re.compile(r"Unsupported architectures|are not supported for now"),
            Cause.MODEL,
            "SGLang does not know the model's architecture",
        ),
        Explanation(
            re.compile(r"CUDA driver version is insufficient"),
            Cause.INSTALLATION,
            "the NVIDIA driver is too old for this torch",
        ),
        Explanation(
            re.compile(r"No module named '?sglang"),
            Cause.INSTALLATION,
            "sglang cannot be imported; see engine_executable",
        ),
        Explanation(
            re.compile(r"MemoryError|DefaultCPUAllocator: can't allocate"),
            Cause.HOST_MEMORY,
            "the host has too little memory",
        ),
    ]

    def launch(self, task: Task) -> Launch:
        """Return the command line and the variables. A file holds the API key, since every user can see arguments."""
        self.check_extra_args(task.settings.extra_args)
        return launch(task, self.memory.kv_flag(task.settings.kv_cache.dtype, task.dtype))

    def problems(self, settings: Settings) -> list[tuple[str, str]]:
        """Return the problems of extra arguments, of settings without a counterpart, of parsers and of the role."""
        return [
            *super().problems(settings),
            *_placement_problems(settings),
            *activations.problems(settings),
            *speculation.problems(settings),
            *parser_problems(settings),
            *acceptance.role_problems(settings),
        ]

    def judge(self, spec: ModelSpec) -> Verdict:
        """Check that SGLang will find every parameter, that none is ignored, the vocabulary and the factors."""
        verdict = acceptance.judge(spec)
        refusals = (*vocabulary_refusals(spec), *acceptance.rope_refusals(spec))
        verdict.refusals += [each for each in refusals if each not in verdict.refusals]
        return verdict

    def refuses_role(self, spec: ModelSpec, role: Role) -> str | None:
        """It embeds with causal models, whose last token it takes."""
        return acceptance.role_refusal(spec, role)

    def knows(self, spec: ModelSpec) -> bool:
        """Whether the plugin loads models of this architecture."""
        return acceptance.knows(spec)

    def parsers(self, settings: Settings, templates: str, architecture: str) -> Parsers | None:
        """Return the configured parsers, or those that fit the model's family and template; None without answers."""
        if settings.role != "generate":
            return None
        return choose_parsers(settings, templates, architecture)

    def prepare(self, settings: Settings, path: Path, digest: str) -> Path:
        """Return the folder that SGLang starts from; if it is missing, the plugin makes it."""
        return prepare(settings, path, digest)

    def prepare_draft(self, settings: Settings, found: Speculation) -> Speculation:
        """Return it with the draft model's own folder."""
        if found.draft is None:
            return found
        files = model_files(found.draft, Path(found.draft.files[0]))
        digests = [cached_sha256(file, cache_folder(settings)) for file in files]
        return replace(found, draft_dir=prepare(settings, files[0], combined_sha256(digests)))

    def diagnose(self, lines: Sequence[str]) -> Diagnosis | None:
        """Return the plugin's own error message if there is one, except when the output reports a lost GPU."""
        found = super().diagnose(lines)
        own = [match[1] for line in lines if (match := _PLUGIN_ERROR.fullmatch(line.strip()))]
        if not own or (found is not None and found.cause is Cause.GPU_LOST):
            return found
        return Diagnosis(Cause.CUDA_FAULT if cuda_fault(own) else found.cause if found else Cause.OTHER, own[-1])

    def is_chatter(self, line: str) -> bool:
        """Whether it has SGLang's time stamp and a level up to INFO; tracebacks and library messages have no stamp."""
        match = _LINE.match(line)
        return match is not None and match[1] in {None, "DEBUG", "INFO"}

    def progress(self, metrics: str) -> Progress | None:
        """Read the counters of its scheduler, and those of its tokenizer's process, which counts answers to clients.

        The detokenizer is between the two: if it stops, the scheduler goes on but no answer leaves.
        """
        samples = samples_of(metrics, SERIES, _PROGRESS_SERIES)
        if samples is None:
            return None
        return Progress(
            tokens=samples.total(SERIES.generated.name),
            running=int(samples.total(SERIES.running.name)),
            queued=int(samples.total(SERIES.queued.name)),
            answers=samples.total(*_ANSWERS),
            prefill=samples.sum(SERIES.generated.name, 'mode="prefill_compute"') or 0.0,
            decode=samples.sum(SERIES.generated.name, 'mode="decode"') or 0.0,
            prompts=samples.sum("sglang:queue_time_seconds_count"),
            idle_seconds=samples.sum("sglang:scheduler_idle_seconds_total"),
        )

    def work_limits(self, task: Task) -> WorkLimits | None:
        """Return the most that it computes before it sends something to a client, with room for retracted requests.

        The prompts of all running requests fit into the KV pool, and are computed before any of them generates. An
        answer that is not streamed is passed on every HELD_BACK_TOKENS. Its first part is one token, which the judge
        may mistake for a test generation's. Embeddings have no such counter.
        """
        settings = task.settings
        if settings.role != "generate":
            return None
        ranks = settings.tensor_parallel * settings.pipeline_parallel
        return WorkLimits(
            chunk=settings.chunked_prefill_tokens,
            prefill=2.0 * task.max_total_tokens * ranks,
            prompts=(2.0 * settings.max_running_requests + 2) * ranks,
            decode=3.0 * HELD_BACK_TOKENS * settings.max_running_requests * ranks,
        )

    def allocated(self, metrics: str) -> dict[str, int]:
        """Read its gauges. On the CPU, weights_bytes is rough: the drop of the host's free memory while loading."""
        found = {name: sum_of_series(metrics, f"sglang:{series}") for name, (series, _) in _ALLOCATED.items()}
        return {name: round(value * _ALLOCATED[name][1]) for name, value in found.items() if value is not None}

    def server(self, entry: dict[str, Any], facts: dict[str, Any]) -> Server | None:
        """Read /server_info."""
        if "version" not in facts:
            return None
        return Server(
            model=str(entry["id"]),
            engine=self.name,
            engine_version=str(facts["version"]),
            model_path=facts.get("model_path"),
            context_length=entry.get("max_model_len") or facts.get("context_length"),
            max_running_requests=facts.get("max_running_requests"),
            max_total_tokens=facts.get("max_total_num_tokens") or facts.get("max_total_tokens"),
            settings={key: facts[key] for key in _SPEED_SETTINGS if key in facts},
        )

    def probe(self, settings: Settings | None, variables: Sequence[str]) -> Probe:
        """Ask the Python that runs it."""
        return installation.probe(settings, variables)

    def installation(self, probe: Probe, text: str, errors: str, code: int) -> Installation:
        """Read what the Python answered."""
        return installation.read_probe(probe, text, errors, code)

    def version(self, ask: Ask) -> str:
        """Ask the running engine."""
        return text_of(json_object(ask("/server_info")[1]), "version")

    def parse_line(self, line: str) -> tuple[str, str]:
        """Remove SGLang's time stamp and return the line's level, INFO if it names none."""
        match = _LINE.match(line) or _UVICORN_LINE.match(line)
        if match is None:
            return ("ERROR" if line.startswith("Traceback") else "INFO"), line
        level, text = match.groups()
        return level or "INFO", text


def _placement_problems(settings: Settings) -> list[tuple[str, str]]:
    """SGLang holds every weight on the device."""
    chosen, on_gpu = settings.placement, ("auto", "gpu", 0)
    unknown: list[tuple[str, object]] = [("experts", chosen.experts)] if chosen.experts not in on_gpu else []
    unknown += [("layers", chosen.layers)] if chosen.layers not in on_gpu else []
    unknown += [("weights", chosen.weights)] if chosen.weights != "pinned" else []
    return [
        (f"placement.{key}", f"{value!r} has no counterpart in SGLang, must be left out or engine be llama.cpp")
        for key, value in unknown
    ]
