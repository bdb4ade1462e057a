#!/usr/bin/env python3
"""Stands for the interpreter that runs SGLang: a real process with SGLang's command line, HTTP interface, output and faults.

    fake_engine.py -m sglang.launch_server --model-path DIR --port PORT …    serves; unknown flags are ignored
    fake_engine.py serve --model-path DIR …                                  the same as an engine of its own (engine/)
    fake_engine.py -m sglang_pascal prepare FILE FOLDER --known-sha256 HEX   makes a folder that it serves from

Standard library only, so that it runs in a virtual machine with nothing but Python. As in SGLang a worker process
computes and dies with the server, SIGTERM drains (and new work is refused, as our plugin has SGLang do), `/metrics` has the series that dashboards and supervisor read, prompts
are computed one after the other and in chunks, and a server whose worker died kills itself. A token is a word.

Faults are `NAME=VALUE` separated by spaces, in the variable FAKE_ENGINE_FAULTS (every run) and in the file that
FAKE_ENGINE_FILE names (read at each start, so that the next run can differ). FAKE_ENGINE_SERIES is the prefix of its series. `POST /fake/faults` with a JSON object
changes those of the running process; `GET /fake/faults` shows them.

    start_seconds=0.1            time until it listens
    warmup_seconds=0             time after that before the first token
    load_error=NAME              fails instead of listening; NAME is a key of ERRORS, below
    crash_error=exception        what it says when it crashes, a key of ERRORS
    crash_after_seconds=S        crashes this long after it began to listen
    crash_after_requests=N       crashes when the N-th request for a generation comes
    crash_now=1                  crashes at once
    words=TEXT                   what it says when it crashes or answers with error_status, instead of its own words
    exit_code=N                  of a crash or load error instead of SGLang's own; negative: dies by that signal
    hang=1                       the worker stands still: no token, counters keep their values, /metrics answers
    lose_answers=1               the worker computes and its counters move, and no answer leaves: a stopped detokenizer
    raw_path=PATH                what this path answers is raw_answer (Latin-1) raw_repeat times, and the end
    raw_pause_seconds=S          time between two of these times
    raw_end=close                what follows: close, open (the connection stays open, silent) or reset
    mute=1                       connections are accepted and nothing is answered
    prefill_tokens_per_second=N  speed for prompts
    decode_tokens_per_second=N   speed for answers, for each request
    forget_counters=1            counters fall back to zero, once
    leak_bytes_per_second=N      memory that is taken and never given back
    error_status=N               HTTP status that requests for a generation get
    answer=TEXT                  the words of every answer, instead of its own; only by POST can it hold blanks
    weights_gib=0.25             memory of the weights that it reports
    kv_bytes_per_token=23040     the same for the KV cache
    empty_answers=1              an answer that is not streamed has status 200 and no token
    cut_stream_after=N           a streamed answer is cut off after N tokens, without its end
    flood_lines_per_second=N     lines of output
    flood_line_bytes=80          length of each
    ignore_sigterm=1             SIGTERM changes nothing
    stray=N                      starts N processes that ignore SIGTERM and outlive it
    zombies=N                    starts N processes that end, and never asks how
    prepare_seconds=S            time that `prepare` takes
    prepare_error=N              exit code with which `prepare` fails
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field, fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

if TYPE_CHECKING:
    from collections.abc import Iterator

ERRORS = {
    "exception": (
        -signal.SIGKILL,
        "Scheduler hit an exception: Traceback (most recent call last):\n"
        '  File "scheduler.py", line 4012, in run_scheduler_process\n    scheduler.run_event_loop()\n'
        "RuntimeError: the fake engine was told to crash",
    ),
    "out-of-memory": (
        -signal.SIGKILL,
        "Scheduler hit an exception: Traceback (most recent call last):\n"
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.16 GiB. GPU 0 has a total capacity of 7.43 GiB"
        " of which 412.00 MiB is free.",
    ),
    "gpu-lost": (
        -signal.SIGKILL,
        "Scheduler hit an exception: Traceback (most recent call last):\npynvml.NVMLError_GpuIsLost: GPU is lost",
    ),
    "cuda-unknown": (
        -signal.SIGKILL,
        "Scheduler hit an exception: Traceback (most recent call last):\n"
        "torch.AcceleratorError: CUDA error: unknown error\n"
        "CUDA kernel errors might be asynchronously reported at some other API call",
    ),
    "cuda-launch-failure": (
        -signal.SIGKILL,
        "Scheduler hit an exception: Traceback (most recent call last):\n"
        "torch.AcceleratorError: CUDA error: unspecified launch failure",
    ),
    "ecc": (
        -signal.SIGKILL,
        "Scheduler hit an exception: Traceback (most recent call last):\n"
        "torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered",
    ),
    "driver": (
        1,
        "RuntimeError: The NVIDIA driver on your system is too old: CUDA driver version is insufficient for CUDA runtime"
        " version",
    ),
    "truncated": (
        -signal.SIGKILL,
        "safetensors_rust.SafetensorError: Error while deserializing header: incomplete metadata, file not fully covered",
    ),
    "architecture": (
        1,
        "ValueError: Model architectures ['RwkvForCausalLM'] are not supported for now. Supported architectures: …",
    ),
    "port": (
        1,
        "ERROR:    [Errno 98] error while attempting to bind on address ('127.0.0.1', 30000): address already in use",
    ),
    "import": (1, "/usr/bin/python3: No module named sglang"),
    "host-memory": (
        1,
        "RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate",
    ),
    "unknown": (3, "something that nobody has seen before"),
    "silent": (1, ""),
}
"""Name -> (how SGLang 0.5.23 ends, negative: by a signal; what it writes before)."""

ANSWER = ("This", "is", "the", "fake", "engine.")
"""The words of every answer, from the first again after the last."""
DEFAULT_MAX_TOKENS = 16
RETRY_AFTER_SECONDS = 5
"""What the plugin answers to requests that it refuses while it drains."""
BUSY_RETRY_AFTER_SECONDS = 1
"""What it answers to requests for which the queue is full."""
HEALTH_TIMEOUT_SECONDS = 20.0
"""SGLANG_HEALTH_CHECK_TIMEOUT's default."""
STEP_SECONDS = 0.02
"""How soon a thread that waits notices a change."""
WORKER = """
import ctypes, os, signal, sys
from time import sleep
PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15  # <linux/prctl.h>
prctl = ctypes.CDLL(None).prctl
prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
prctl(PR_SET_NAME, b"sglang::schedul", 0, 0, 0)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)
while os.getppid() == int(sys.argv[2]):
    sleep(0.5)
"""
"""A program that does nothing, and dies with its parent as SGLang's scheduler does. It imports a tenth of this one."""


# --- faults -----------------------------------------------------------------------------------------------------------


@dataclass
class Faults:
    """What goes wrong; the module's docstring describes each."""

    start_seconds: float = 0.1
    warmup_seconds: float = 0.0
    load_error: str = ""
    crash_error: str = "exception"
    crash_after_seconds: float = 0.0
    crash_after_requests: int = 0
    crash_now: int = 0
    words: str = ""
    exit_code: int | None = None
    hang: int = 0
    lose_answers: int = 0
    raw_path: str = ""
    raw_answer: str = ""
    raw_repeat: int = 1
    raw_pause_seconds: float = 0.0
    raw_end: str = "close"
    mute: int = 0
    prefill_tokens_per_second: float = 20_000.0
    decode_tokens_per_second: float = 500.0
    forget_counters: int = 0
    leak_bytes_per_second: int = 0
    error_status: int = 0
    answer: str = ""
    weights_gib: float = 0.25
    kv_bytes_per_token: int = 23040
    empty_answers: int = 0
    cut_stream_after: int = 0
    flood_lines_per_second: int = 0
    flood_line_bytes: int = 80
    ignore_sigterm: int = 0
    stray: int = 0
    zombies: int = 0
    prepare_seconds: float = 0.0
    prepare_error: int = 0

    def update(self, values: dict[str, Any]) -> None:
        """Set some; ValueError names one that does not exist or has no such value."""
        kinds = {each.name: str(each.type) for each in fields(self)}
        for name, value in values.items():
            if name not in kinds:
                raise ValueError(f"unknown fault {name!r}, must be one of: {', '.join(kinds)}")
            kind = {"float": float, "str": str}.get(kinds[name], int)
            setattr(self, name, kind(value))
        for error in (self.load_error, self.crash_error):
            if error and error not in ERRORS:
                raise ValueError(f"unknown error {error!r}, must be one of: {', '.join(ERRORS)}")


def faults_of_environment() -> Faults:
    """Read the variable, then the file, whose values win."""
    faults = Faults()
    faults.update(parse_faults(os.environ.get("FAKE_ENGINE_FAULTS", "")))
    with contextlib.suppress(KeyError, FileNotFoundError):
        faults.update(parse_faults(Path(os.environ["FAKE_ENGINE_FILE"]).read_text()))
    return faults


def parse_faults(text: str) -> dict[str, str]:
    """Return names and values of `NAME=VALUE NAME=VALUE`."""
    return dict(word.partition("=")[::2] for word in text.split())


def write_line(text: str) -> None:
    """Write a line whole: print writes its end apart, and another thread's line can come between."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def log(text: str, level: str = "") -> None:
    """Write a line as SGLang does: INFO goes without its name."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
    write_line(f"[{stamp}] {level + ' ' if level else ''}{text}")


def fail(name: str, faults: Faults) -> NoReturn:
    """Say what SGLang says and end as it ends."""
    code, text = ERRORS[name]
    code, text = code if faults.exit_code is None else faults.exit_code, faults.words or text
    if text:
        write_line(text)
    if code < 0:
        # The workers die with this process.
        os.kill(os.getpid(), -code)
        time.sleep(10)
    os._exit(code)


# --- metrics ----------------------------------------------------------------------------------------------------------


@dataclass
class Histogram:
    """A cumulative histogram; the bounds are SGLang's."""

    bounds: tuple[float, ...]
    count: int = 0
    total: float = 0.0
    counts: list[int] = field(default_factory=list)

    def observe(self, value: float) -> None:
        """Take in one value."""
        self.counts = self.counts or [0] * len(self.bounds)
        self.counts = [n + (value <= bound) for n, bound in zip(self.counts, self.bounds, strict=True)]
        self.count += 1
        self.total += value

    def lines(self, name: str, labels: str) -> Iterator[str]:
        """Yield the samples; none before the first observation, as SGLang's labels are known only then."""
        if not self.count:
            return
        yield f"{name}_sum{{{labels}}} {self.total}"
        for bound, count in zip((*self.bounds, "+Inf"), (*self.counts, self.count), strict=True):
            yield f'{name}_bucket{{{labels},le="{bound}"}} {float(count)}'
        yield f"{name}_count{{{labels}}} {float(self.count)}"


TTFT_BOUNDS = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 2.0, 4.0, 6.0, 8.0, 10.0, 20.0, 40.0, 60.0, 80.0, 100.0, 200.0, 400.0)
ITL_BOUNDS = (
    *(0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.06, 0.08),
    *(0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 2.0, 4.0, 6.0, 8.0),
)
E2E_BOUNDS = (*TTFT_BOUNDS, 600.0, 1200.0, 1800.0, 2400.0)


class Metrics:
    """SGLang's series as far as anything of ours reads them."""

    def __init__(self, model_name: str) -> None:
        self._request_labels = f'engine_type="unified",model_name="{model_name}"'
        self._labels = f'{self._request_labels},moe_ep_rank="0",pp_rank="0",tp_rank="0"'
        self.realtime = {"prefill_compute": 0, "decode": 0}
        self.prompts = 0
        self.idle_seconds = 0.0
        self.prompt_tokens = {"false": 0, "true": 0}
        self.generation_tokens = {"false": 0, "true": 0}
        self.requests = {"false": 0, "true": 0}
        self.ttft = {"false": Histogram(TTFT_BOUNDS), "true": Histogram(TTFT_BOUNDS)}
        self.e2e = {"false": Histogram(E2E_BOUNDS), "true": Histogram(E2E_BOUNDS)}
        self.itl = Histogram(ITL_BOUNDS)

    def token(self, streaming: str, position: int, seconds: float) -> None:
        """Count a generated token; seconds: since the one before it, or since the request came."""
        self.realtime["decode"] += 1
        (self.itl if position else self.ttft[streaming]).observe(seconds)

    def request(self, streaming: str, prompt_tokens: int, generated_tokens: int, seconds: float) -> None:
        """Count a request that has ended."""
        self.e2e[streaming].observe(seconds)
        self.requests[streaming] += 1
        self.prompt_tokens[streaming] += prompt_tokens
        self.generation_tokens[streaming] += generated_tokens

    def page(self, gauges: dict[str, float]) -> str:
        """Return the exposition."""
        lines = list(self._counters())
        for name, value in gauges.items():
            pid = f',pid="{os.getpid()}"' if name == "num_retracted_reqs" else ""
            lines += [f"# TYPE sglang:{name} gauge", f"sglang:{name}{{{self._labels}{pid}}} {float(value)}"]
        page = "\n".join([*lines, *self._histograms(), ""])
        return page.replace("sglang:", f"{os.environ.get('FAKE_ENGINE_SERIES', 'sglang')}:")

    def _counters(self) -> Iterator[str]:
        yield "# TYPE sglang:realtime_tokens_total counter"
        for mode, value in self.realtime.items():
            yield f'sglang:realtime_tokens_total{{{self._labels},mode="{mode}"}} {float(value)}'
        yield "# TYPE sglang:queue_time_seconds histogram"
        yield f"sglang:queue_time_seconds_count{{{self._labels}}} {float(self.prompts)}"
        yield "# TYPE sglang:scheduler_idle_seconds_total counter"
        yield f"sglang:scheduler_idle_seconds_total{{{self._labels}}} {self.idle_seconds}"
        by_request = {
            "prompt_tokens": self.prompt_tokens,
            "generation_tokens": self.generation_tokens,
            "num_requests": self.requests,
        }
        for name, values in by_request.items():
            yield f"# TYPE sglang:{name}_total counter"
            for streaming, value in values.items():
                yield f'sglang:{name}_total{{{self._request_labels},is_streaming="{streaming}"}} {float(value)}'

    def _histograms(self) -> Iterator[str]:
        for name, both in (("time_to_first_token_seconds", self.ttft), ("e2e_request_latency_seconds", self.e2e)):
            yield f"# TYPE sglang:{name} histogram"
            for streaming, histogram in both.items():
                yield from histogram.lines(f"sglang:{name}", f'{self._request_labels},is_streaming="{streaming}"')
        yield "# TYPE sglang:inter_token_latency_seconds histogram"
        yield from self.itl.lines("sglang:inter_token_latency_seconds", self._request_labels)


# --- generation -------------------------------------------------------------------------------------------------------


class QueueFullError(Exception):
    """More requests wait than --max-queued-requests allows."""


class Engine:
    """Computes tokens at a given speed for a bounded number of requests at once; thread-safe."""

    def __init__(self, arguments: argparse.Namespace, faults: Faults) -> None:
        self.arguments = arguments
        self.faults = faults
        self.metrics = Metrics(arguments.served_model_name)
        self.terminating = threading.Event()
        self.running = 0
        self.queued = 0
        self.in_flight = 0
        """Requests whose answer has not been sent whole."""
        self.received = 0
        self.used_tokens = 0
        self.worker_pid = 0
        """Of the process that plays the scheduler; nothing is computed while a signal has stopped it."""
        self.unreaped: list[subprocess.Popen[bytes]] = []
        self._idle_from = time.monotonic()
        self._turn = threading.Condition()
        self._counting = threading.Lock()
        self._prefill = threading.Lock()
        self._warm_from = time.monotonic() + faults.warmup_seconds

    def generate(self, prompt_tokens: int, max_tokens: int, streaming: str) -> Iterator[str]:
        """Yield words. Raises QueueFullError if no further request may wait."""
        start = last = time.monotonic()
        self._admit(prompt_tokens)
        try:
            self._compute_prompt(prompt_tokens)
            for position in range(max_tokens):
                self._step(1 / self.faults.decode_tokens_per_second)
                if self.faults.lose_answers:
                    with self._counting:
                        self.metrics.realtime["decode"] += 1
                    continue
                now = time.monotonic()
                with self._counting:
                    self.metrics.token(streaming, position, now - last)
                last = now
                words = self.faults.answer.split(" ") if self.faults.answer else ANSWER
                yield words[position % len(words)]
            if not self.faults.lose_answers:
                with self._counting:
                    self.metrics.request(streaming, prompt_tokens, max_tokens, last - start)
        finally:
            with self._turn:
                self.running -= 1
                if self.running == 0:
                    self._idle_from = time.monotonic()
                self.used_tokens -= prompt_tokens
                self._turn.notify_all()
        # The worker is done with it, and the client waits.
        while self.faults.lose_answers:
            time.sleep(STEP_SECONDS)

    def _admit(self, prompt_tokens: int) -> None:
        limit = self.arguments.max_queued_requests
        with self._turn:
            full = self.running >= self.arguments.max_running_requests
            if full and limit is not None and self.queued >= limit:
                raise QueueFullError
            self.queued += 1
            self._turn.wait_for(lambda: self.running < self.arguments.max_running_requests)
            self.queued -= 1
            self.metrics.prompts += 1
            if self.running == 0:
                self.metrics.idle_seconds += time.monotonic() - self._idle_from
            self.running += 1
            self.used_tokens += prompt_tokens

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Count a request until its answer has been sent."""
        with self._counting:
            self.in_flight += 1
        try:
            yield
        finally:
            with self._counting:
                self.in_flight -= 1

    def _compute_prompt(self, prompt_tokens: int) -> None:
        with self._prefill:
            for first in range(0, prompt_tokens, self.arguments.chunked_prefill_size):
                chunk = min(self.arguments.chunked_prefill_size, prompt_tokens - first)
                self._step(chunk / self.faults.prefill_tokens_per_second)
                with self._counting:
                    self.metrics.realtime["prefill_compute"] += chunk

    def _step(self, seconds: float) -> None:
        time.sleep(seconds)
        while self.faults.hang or time.monotonic() < self._warm_from or is_stopped(self.worker_pid):
            time.sleep(STEP_SECONDS)

    def gauges(self) -> dict[str, float]:
        """Return the state as SGLang's scheduler reports it."""
        pool = self.arguments.max_total_tokens
        return {
            "num_running_reqs": self.running,
            "num_queue_reqs": self.queued,
            "num_retracted_reqs": 0,
            "max_total_num_tokens": pool,
            "weight_memory_usage_gb": self.faults.weights_gib,
            "kv_cache_memory_usage_gb": (pool + 1) * self.faults.kv_bytes_per_token / 2**30,
            "context_len": self.arguments.context_length,
            "num_used_tokens": self.used_tokens,
            "kv_used_tokens": self.used_tokens,
            "kv_available_tokens": pool - self.used_tokens,
            "token_usage": self.used_tokens / pool,
            "cache_hit_rate": 0.0,
            "gen_throughput": self.running * self.faults.decode_tokens_per_second,
        }


# --- HTTP -------------------------------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """One thread a connection, as many waiting as the kernel allows."""

    request_queue_size = 128
    daemon_threads = True

    def __init__(self, address: tuple[str, int], engine: Engine) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        self.engine = engine
        super().__init__(address, Handler)


class Handler(BaseHTTPRequestHandler):
    """SGLang's endpoints."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server
    PUBLIC: ClassVar[frozenset[str]] = frozenset(
        {"/health", "/health_generate", "/ready", "/ping", "/metrics", "/fake/faults"}
    )

    @property
    def engine(self) -> Engine:
        """The engine that this server stands before."""
        return self.server.engine

    def do_GET(self) -> None:
        """Answer a GET."""
        if self._may_answer():
            answers = {
                "/health": self._health,
                "/health_generate": self._health,
                "/ready": self._ready,
                "/ping": self._ready,
                "/metrics": self._metrics,
                "/v1/models": self._models,
                "/model_info": self._model_info,
                "/get_model_info": self._model_info,
                "/server_info": self._server_info,
                "/get_server_info": self._server_info,
                "/fake/faults": self._show_faults,
            }
            answers.get(self.path, self._not_found)()

    def do_POST(self) -> None:
        """Answer a POST."""
        try:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        except ValueError as error:
            self._error(400, f"JSON decode error: {error}")
            return
        if self.engine.terminating.is_set() and not self.path.startswith("/fake/"):
            self._send(503, {"error": "draining"}, extra={"Retry-After": str(RETRY_AFTER_SECONDS)})
        elif self._may_answer():
            answers = {
                "/v1/completions": self._completions,
                "/v1/chat/completions": self._chat_completions,
                "/generate": self._generate,
                "/fake/faults": self._set_faults,
            }
            answers.get(self.path, lambda _: self._not_found())(body)

    def _may_answer(self) -> bool:
        key, faults = self.engine.arguments.api_key, self.engine.faults
        if faults.raw_path == self.path:
            self.close_connection = True
            self._answer_raw()
            return False
        while self.engine.faults.mute and not self.path.startswith("/fake/"):
            time.sleep(STEP_SECONDS)
        if key is None or self.path in self.PUBLIC or self.headers.get("Authorization") == f"Bearer {key}":
            return True
        self._send(401, {"error": "Unauthorized"})
        return False

    def _answer_raw(self) -> None:
        faults = self.engine.faults
        part, pause = faults.raw_answer.encode("latin1"), faults.raw_pause_seconds
        if not pause:
            self.wfile.write(part * faults.raw_repeat)
        for _ in range(faults.raw_repeat if pause else 0):
            self.wfile.write(part)
            time.sleep(pause)
        while faults.raw_end == "open":
            time.sleep(STEP_SECONDS)
        if faults.raw_end == "reset":
            # Seconds of lingering: none, so the kernel sends RST.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    # --- state

    def _health(self) -> None:
        if self.engine.terminating.is_set():
            self._send(503, b"")
            return
        done = threading.Event()

        def probe() -> None:
            with contextlib.suppress(QueueFullError):
                list(self.engine.generate(1, 1, "false"))
                done.set()

        threading.Thread(target=probe, daemon=True).start()
        self._send(200 if done.wait(HEALTH_TIMEOUT_SECONDS) else 503, b"")

    def _ready(self) -> None:
        self._send(503 if self.engine.terminating.is_set() else 200, b"")

    def _metrics(self) -> None:
        if self.engine.faults.forget_counters:
            self.engine.faults.forget_counters = 0
            self.engine.metrics = Metrics(self.engine.arguments.served_model_name)
        page = self.engine.metrics.page(self.engine.gauges())
        self._send(200, page.encode(), "text/plain; version=0.0.4; charset=utf-8")

    def _models(self) -> None:
        arguments = self.engine.arguments
        model = {
            "id": arguments.served_model_name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "sglang",
            "root": arguments.served_model_name,
            "max_model_len": arguments.context_length,
        }
        self._send(200, {"object": "list", "data": [model]})

    def _model_info(self) -> None:
        path = self.engine.arguments.model_path
        self._send(200, {"model_path": path, "tokenizer_path": path, "is_generation": True})

    def _server_info(self) -> None:
        arguments = {name: value for name, value in vars(self.engine.arguments).items() if name != "api_key"}
        self._send(200, arguments | {"version": "0.5.23", "status": "ready", "pid": os.getpid()})

    def _show_faults(self) -> None:
        self._send(200, asdict(self.engine.faults))

    def _set_faults(self, body: dict[str, Any]) -> None:
        try:
            self.engine.faults.update(body)
        except (ValueError, TypeError) as error:
            self._error(400, str(error))
        else:
            self._show_faults()

    # --- generation

    def _completions(self, body: dict[str, Any]) -> None:
        self._answer(body, str(body.get("prompt", "")), "text_completion", lambda text: {"text": text})

    def _chat_completions(self, body: dict[str, Any]) -> None:
        prompt = " ".join(str(message.get("content", "")) for message in body.get("messages", []))
        part = "delta" if body.get("stream") else "message"
        kind = "chat.completion.chunk" if body.get("stream") else "chat.completion"
        self._answer(body, prompt, kind, lambda text: {part: {"role": "assistant", "content": text}})

    def _generate(self, body: dict[str, Any]) -> None:
        sampling = body.get("sampling_params") or {}
        asked = {"max_tokens": sampling.get("max_new_tokens", 128), "stream": False}
        self._answer(asked, str(body.get("text", "")), "generate", lambda text: {"text": text})

    def _answer(self, body: dict[str, Any], prompt: str, kind: str, choice: Any) -> None:
        engine, streaming = self.engine, "true" if body.get("stream") else "false"
        prompt_tokens = max(1, len(prompt.split()))
        max_tokens = int(body.get("max_tokens") or body.get("max_completion_tokens") or DEFAULT_MAX_TOKENS)
        limit = engine.arguments.context_length
        engine.received += 1
        if engine.faults.error_status:
            self._error(engine.faults.error_status, engine.faults.words or "the fake engine was told to fail")
        elif prompt_tokens >= limit:
            text = f"The input ({prompt_tokens} tokens) is longer than the model's context length ({limit} tokens)."
            self._error(400, text)
        else:
            words = engine.generate(prompt_tokens, max_tokens, streaming)
            send = self._stream if streaming == "true" else self._whole
            try:
                with engine.answering():
                    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": max_tokens}
                    wanted = (body.get("stream_options") or {}).get("include_usage")
                    send(words, kind, choice, prompt_tokens, usage if wanted else None)
            except QueueFullError:
                self._error(503, "The request queue is full.")

    def _whole(self, words: Iterator[str], kind: str, choice: Any, prompt_tokens: int, _: object = None) -> None:
        said = [] if self.engine.faults.empty_answers else list(words)
        text = " ".join(said)
        if kind == "generate":
            self._send(200, {"text": text, "meta_info": {"completion_tokens": len(said)}})
            return
        usage = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": len(said),
            "total_tokens": prompt_tokens + len(said),
        }
        self._send(200, self._object(kind, choice(text), "length") | {"usage": usage})

    def _stream(self, words: Iterator[str], kind: str, choice: Any, _: int, usage: dict[str, int] | None) -> None:
        # The first word decides whether there is an answer at all.
        first = next(words)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self._end_headers()
        self._event(json.dumps(self._object(kind, choice(first), None)))
        for count, word in enumerate(words, 2):
            if 0 < self.engine.faults.cut_stream_after < count:
                self.close_connection = True
                return
            self._event(json.dumps(self._object(kind, choice(f" {word}"), None)))
        self._event(json.dumps(self._object(kind, choice(""), "length")))
        if usage is not None:
            self._event(json.dumps(self._object(kind, choice(""), None) | {"choices": [], "usage": usage}))
        self._event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def _event(self, data: str) -> None:
        event = f"data: {data}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))

    def _object(self, kind: str, choice: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        return {
            "id": f"fake-{self.engine.received}",
            "object": kind,
            "created": int(time.time()),
            "model": self.engine.arguments.served_model_name,
            "choices": [{"index": 0, **choice, "finish_reason": finish_reason}],
        }

    # --- answers

    def _not_found(self) -> None:
        self._send(404, {"detail": "Not Found"})

    def _error(self, status: int, text: str) -> None:
        extra = {"Retry-After": str(BUSY_RETRY_AFTER_SECONDS)} if status in (429, 503) else None
        self._send(status, {"object": "error", "message": text, "code": status}, extra=extra)

    def _end_headers(self) -> None:
        if self.engine.terminating.is_set():
            self.send_header("Connection", "close")
        self.end_headers()

    def _send(
        self,
        status: int,
        body: bytes | dict[str, Any],
        kind: str = "application/json",
        extra: dict[str, str] | None = None,
    ) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in (extra or {}).items():
            self.send_header(name, value)
        self._end_headers()
        self.wfile.write(content)

    def handle(self) -> None:
        """Serve a connection; a client that left ends it."""
        with contextlib.suppress(ConnectionError):
            super().handle()

    def log_message(self, text: str, *values: Any) -> None:
        """Write the access log as uvicorn does."""
        write_line(f"INFO:     {self.client_address[0]}:{self.client_address[1]} - {text % values}")


# --- processes --------------------------------------------------------------------------------------------------------


def start_worker() -> subprocess.Popen[bytes]:
    """Start the process that imitates SGLang's scheduler."""
    return subprocess.Popen([sys.executable, "-I", "-S", "-c", WORKER, "--worker", str(os.getpid())])


def start_stray() -> None:
    """Start a process that ends only by SIGKILL."""
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    subprocess.Popen([sys.executable, "-I", "-S", "-c", code])


def is_stopped(pid: int) -> bool:
    """Whether a signal has stopped the process (state T of proc_pid_stat(5))."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def leak(engine: Engine) -> NoReturn:
    """Take memory at the wanted speed."""
    kept: list[bytes] = []
    while True:
        # Bytes other than zero, so that the pages are real.
        kept.append(b"x" * (engine.faults.leak_bytes_per_second // 10))
        time.sleep(0.1)


def flood(engine: Engine) -> NoReturn:
    """Write as many lines a second as wanted."""
    number = 0
    while True:
        faults = engine.faults
        for _ in range(faults.flood_lines_per_second // 10):
            # No two lines are alike.
            number += 1
            sys.stdout.write(f"{number} ".ljust(faults.flood_line_bytes, "x") + "\n")
        sys.stdout.flush()
        time.sleep(0.1)


def serve(argv: list[str]) -> NoReturn:
    """Be `python -m sglang.launch_server`."""
    arguments, faults = parse_server_arguments(argv), faults_of_environment()
    engine = Engine(arguments, faults)

    def on_signal(number: int, _: object) -> None:
        if not faults.ignore_sigterm:
            log(f"{signal.Signals(number).name} received. Draining requests and shutting down...", "WARNING")
            engine.terminating.set()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    # All of them in one line, the key of its configuration file among them.
    log(f"server_args={ {'model_path': arguments.model_path, 'api_key': arguments.api_key, 'port': arguments.port} }")
    worker = start_worker()
    engine.worker_pid = worker.pid
    engine.unreaped = [subprocess.Popen(["true"]) for _ in range(faults.zombies)]
    for _ in range(faults.stray):
        start_stray()
    log("Load weight begin. avail mem=7.31 GB")
    engine.terminating.wait(faults.start_seconds)
    if faults.load_error:
        fail(faults.load_error, faults)
    listen(engine)
    watch(engine, worker)


def parse_server_arguments(argv: list[str]) -> argparse.Namespace:
    """Return SGLang's arguments as far as they change what is served."""
    parser = argparse.ArgumentParser(prog="launch_server.py", allow_abbrev=False)
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--served-model-name")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--context-length", type=int, default=8192)
    parser.add_argument("--max-total-tokens", type=int, default=16384)
    parser.add_argument("--max-running-requests", type=int, default=2048)
    parser.add_argument("--max-queued-requests", type=int)
    parser.add_argument("--chunked-prefill-size", type=int, default=4096)
    parser.add_argument("--api-key")
    parser.add_argument("--config", type=Path)
    arguments, _ = parser.parse_known_args(argv)
    arguments.served_model_name = arguments.served_model_name or arguments.model_path
    if arguments.config is not None:
        arguments.api_key = json.loads(arguments.config.read_text()).get("api-key")
    arguments.config = None
    return arguments


def listen(engine: Engine) -> None:
    """Answer requests from now on, in other threads."""
    address = (engine.arguments.host, engine.arguments.port)
    try:
        server = Server(address, engine)
    except OSError as error:
        print(f"ERROR:    [Errno {error.errno}] error while attempting to bind on address {address}: {error.strerror}")
        sys.exit(1)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    threading.Thread(target=flood, args=(engine,), daemon=True).start()
    threading.Thread(target=leak, args=(engine,), daemon=True).start()
    log("The server is fired up and ready to roll!")


def watch(engine: Engine, worker: subprocess.Popen[bytes]) -> NoReturn:
    """Crash on request, die with the worker, and end after SIGTERM once every request is answered."""
    start, faults = time.monotonic(), engine.faults
    while not (engine.terminating.is_set() and engine.in_flight == 0):
        late = 0 < faults.crash_after_seconds <= time.monotonic() - start
        often = 0 < faults.crash_after_requests <= engine.received
        if faults.crash_now or late or often:
            fail(faults.crash_error, faults)
        if worker.poll() is not None:
            log(f"Subprocess scheduler_0 (pid={worker.pid}) crashed with exit code {worker.returncode}.", "ERROR")
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(STEP_SECONDS)
    log("Gracefully exiting... Remaining number of requests 0.")
    worker.kill()
    os._exit(0)


def prepare(argv: list[str]) -> int:
    """Be `python -m sglang_pascal prepare`: the folder appears whole, by a rename."""
    parser = argparse.ArgumentParser(prog="sglang_pascal prepare")
    parser.add_argument("gguf", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--known-sha256", default="")
    arguments, faults = parser.parse_args(argv), faults_of_environment()
    time.sleep(faults.prepare_seconds)
    if faults.prepare_error:
        print("sglang-pascal: error: the fake engine was told to fail", file=sys.stderr)
        return faults.prepare_error
    arguments.folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{arguments.folder.name}.", dir=arguments.folder.parent))
    manifest = {
        "gguf": str(arguments.gguf),
        "sha256": arguments.known_sha256,
        "size": arguments.gguf.stat().st_size,
        "format": 2,
    }
    (staging / "config.json").write_text("{}")
    (staging / "pascal.json").write_text(json.dumps(manifest))
    if arguments.folder.exists():
        shutil.rmtree(arguments.folder)
    staging.rename(arguments.folder)
    return 0


def main(argv: list[str]) -> int:
    """Be the program that the arguments name."""
    match argv:
        case ["-m", "sglang.launch_server", *rest] | ["serve", *rest]:
            serve(rest)
        case ["-m", "sglang_pascal", "prepare", *rest]:
            return prepare(rest)
    print(f"fake_engine.py: error: no such program: {' '.join(argv)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
