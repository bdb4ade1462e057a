"""The fake engine as a third engine: what a folder of `pascaline/engines/` must hold, and no more.

A test links this folder beside those of SGLang and llama.cpp (tests/serve/test_third_engine.py). Unlike them it gives
its series the prefix `fake`, reads its own flags, and holds weights as they are in the file.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from gguf_acceptance import Verdict
from pascaline.engines.base import Engine, Launch, Progress, Task, text_of
from pascaline.engines.client import json_object
from pascaline.engines.data import read_data
from pascaline.engines.installation import Installation, Probe
from pascaline.engines.memory_model import HeldTensor, MemoryModel, Part, Pool
from pascaline.engines.series import Selector, Series, samples_of
from pascaline.engines.server import Server

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pascaline.engines.base import Ask
    from pascaline.engines.memory_model import Weights
    from pascaline.engines.plan_request import PlanRequest
    from pascaline.models.spec import ModelSpec, TensorSpec
    from pascaline.settings import Settings

DATA = read_data(Path(__file__).parent)
SERIES = Series(
    running=Selector("fake:num_running_reqs"),
    queued=Selector("fake:num_queue_reqs"),
    generated=Selector("fake:realtime_tokens_total", {"mode": "decode"}),
    throughput=Selector("fake:gen_throughput"),
)


class FakeMemory(MemoryModel):
    """Weights as in the file, and a pool of whole contexts."""

    weights_source = ""
    pool_source = "tests/fake_engine"
    has_memory_fraction = False
    shares_pool = True

    def kv_dtype(self, chosen: str, dtype: str) -> str:
        """It has one type."""
        del dtype
        return "fp16" if chosen == "auto" else chosen

    def activation_columns(self, bits: int | None) -> int:
        """It multiplies nothing."""
        del bits
        return 1

    def held(self, tensor: TensorSpec, spec: ModelSpec, request: PlanRequest, *, tied: bool) -> HeldTensor:
        """As in the file."""
        del spec, request, tied
        return HeldTensor(tensor.tensor_type, tensor.n_bytes)

    def pool(self, spec: ModelSpec, request: PlanRequest, weights: Weights, dynamic: Sequence[Part]) -> Pool:
        """A whole context of each request."""
        del weights, dynamic
        tokens = request.max_total_tokens or request.max_running_requests * request.context_length
        return Pool(tokens, self.kv_bytes(spec, request, tokens), f"{tokens:,} tokens")

    def buffers(self, spec: ModelSpec, request: PlanRequest, weights: Weights) -> list[Part]:
        """It allocates nothing for requests."""
        del spec, request, weights
        return []

    def arguments(self, request: PlanRequest, kv_tokens: int, fraction: float | None) -> tuple[str, ...]:
        """The flags that determine memory."""
        del fraction
        return ("--context-length", str(request.context_length), "--max-total-tokens", str(kv_tokens))


class FakeEngine(Engine):
    """`fake_engine.py serve`."""

    data = DATA
    memory = FakeMemory(DATA)
    series = SERIES
    server_path = "/server_info"
    required = (DATA.name,)
    processes = ("fake",)
    variable_prefixes = ("FAKE_ENGINE_",)
    drains_on_sigterm = True
    setting_flags: ClassVar[Mapping[str, str]] = {"--port": "port", "--max-total-tokens": "kv_cache.max_tokens"}
    failures = ()

    def launch(self, task: Task) -> Launch:
        """Start the fake under its own name."""
        host, port = task.address
        command = (
            *(sys.executable, str(task.settings.engine_executable), "serve", "--model-path", str(task.model.path)),
            *("--served-model-name", task.model.served_name, "--host", host, "--port", str(port)),
            *("--context-length", str(task.context_length), "--max-total-tokens", str(task.max_total_tokens)),
            *task.settings.extra_args,
        )
        return Launch(command, {**task.variables, "FAKE_ENGINE_SERIES": "fake"})

    def judge(self, spec: ModelSpec) -> Verdict:
        """It computes nothing, so it serves everything that was trained as a llama."""
        return Verdict() if spec.architecture == "llama" else Verdict([f"it is a {spec.architecture}, no llama"])

    def progress(self, metrics: str) -> Progress | None:
        """Read the counters."""
        names = [each.name for each in (SERIES.generated, SERIES.running, SERIES.queued)]
        samples = samples_of(metrics, SERIES, names)
        if samples is None:
            return None
        generated, running, queued = (samples.total(name) for name in names)
        return Progress(generated, int(running), int(queued))

    def version(self, ask: Ask) -> str:
        """Ask the running engine."""
        return text_of(json_object(ask(self.server_path)[1]), "version")

    def server(self, entry: dict[str, Any], facts: dict[str, Any]) -> Server | None:
        """Any server may be this one."""
        return Server(model=str(entry["id"]), engine=self.name, engine_version=facts.get("version"))

    def probe(self, settings: Settings | None, variables: Sequence[str]) -> Probe:
        """Ask whether there is a Python."""
        del settings, variables
        return Probe(self.name, (sys.executable, "--version"), 20.0)

    def installation(self, probe: Probe, text: str, errors: str, code: int) -> Installation:
        """It is where Python is."""
        del probe, errors
        return Installation(versions={} if code else {self.name: text.strip()})

    def parse_line(self, line: str) -> tuple[str, str]:
        """Every line is information."""
        return "INFO", line


ENGINE = FakeEngine()
