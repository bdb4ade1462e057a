"""Real SGLangs on the CPU: one that serves the builtin model for all tests of this folder, and others for a module."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from sglang_pascal.checkpoint.prepare import prepare
from sglang_pascal.cpu import recommended_cpu_settings
from support import always_draft
from support.ports import free_port

START_DEADLINE_SECONDS = 600
STOP_DEADLINE_SECONDS = 60


COMMON_OPTIONS = ["--load-format", "pascal_gguf", "--dtype", "float32", "--max-total-tokens", "16384"]
COMMON_OPTIONS += ["--mem-fraction-static", "0.2", "--sleep-on-idle"]


@dataclass
class Engine:
    """A running SGLang."""

    process: subprocess.Popen
    url: str
    log: Path
    folder: Path
    client: httpx.Client

    def chat(self, text, **options):
        """A chat completion at temperature 0."""
        body = {"model": "default", "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 32}
        answer = self.client.post("/v1/chat/completions", json=body | options)
        answer.raise_for_status()
        return answer.json()

    def generate(self, ids, n_tokens, **options):
        """Greedy token ids after these."""
        sampling = {"temperature": 0, "max_new_tokens": n_tokens, "ignore_eos": True}
        body = {"input_ids": ids, "sampling_params": sampling}
        answer = self.client.post("/generate", json=body | options)
        answer.raise_for_status()
        return answer.json()


@contextlib.contextmanager
def running_engine(folder: Path, log: Path, *options: str, device: str = "cpu", **variables: str):
    """Start SGLang as the supervisor does, wait until it has generated once, and stop it.

    variables: further ones of its environment.
    """
    port = free_port()
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(folder), "--device", device]
    command += ["--host", "127.0.0.1", "--port", str(port), *options]
    environment = os.environ | recommended_cpu_settings().environment | variables
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(base_url=url, timeout=300) as client:
            _wait_until_ready(process, client, log)
            yield Engine(process, url, log, folder, client)
    finally:
        _stop(process)


def _wait_until_ready(process, client, log):
    deadline = time.monotonic() + START_DEADLINE_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(f"SGLang ended with {process.returncode}:\n{log.read_text()[-6000:]}")
        with contextlib.suppress(httpx.TransportError):
            if client.get("/health").status_code == 200:
                return
        time.sleep(0.5)
    raise AssertionError(f"SGLang was not ready after {START_DEADLINE_SECONDS} s:\n{log.read_text()[-6000:]}")


def _stop(process):
    """Ask, then kill its whole session: nothing may outlive the test."""
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_DEADLINE_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="session")
def engine(builtin_gguf, tmp_path_factory):
    """The builtin model in float32, so that token ids can be compared with transformers."""
    root = tmp_path_factory.mktemp("engine")
    prepare(builtin_gguf, root / "model")
    options = [*COMMON_OPTIONS, "--chunked-prefill-size", "128", "--enable-metrics", "--served-model-name", "smollm2"]
    with running_engine(root / "model", root / "engine.log", *options) as engine:
        yield engine


@contextlib.contextmanager
def _drafting_engine(root, tiny_model, *options):
    """Yield an engine of a tiny random model in `root / "model"` that drafts whenever it can, whatever that costs.

    If the file `root / "wrong"` is there, the drafts are wrong.
    """
    prepare(tiny_model("llama").path, root / "model")
    (root / "plugin").mkdir()
    variables = always_draft.installed(root / "plugin", root / "wrong")
    options = [*COMMON_OPTIONS, "--chunked-prefill-size", "32", "--enable-metrics", "--speculative-algorithm", *options]
    with running_engine(root / "model", root / "engine.log", *options, **variables) as engine:
        yield engine


@pytest.fixture(scope="module")
def lookup_engine(tiny_model, tmp_path_factory):
    """A model with prompt lookup in every step that has a match."""
    with _drafting_engine(tmp_path_factory.mktemp("lookup"), tiny_model, "PASCAL_LOOKUP") as engine:
        yield engine


@pytest.fixture(scope="module")
def draft_engine(tiny_model, tmp_path_factory):
    """A model that drafts for itself in every step, and the file that makes its drafts wrong."""
    root = tmp_path_factory.mktemp("draft")
    options = ["PASCAL_DRAFT", "--speculative-draft-model-path", str(root / "model")]
    with _drafting_engine(root, tiny_model, *options) as engine:
        yield engine, root / "wrong"


@pytest.fixture(scope="module")
def gemma_engine(tiny_model, tmp_path_factory):
    """A tiny random Gemma 2: sliding window of 8 tokens, soft caps, tied embeddings; chunks longer than the window."""
    root = tmp_path_factory.mktemp("gemma")
    prepare(tiny_model("gemma2").path, root / "model")
    options = [*COMMON_OPTIONS, "--chunked-prefill-size", "32"]
    with running_engine(root / "model", root / "engine.log", *options) as engine:
        yield engine


@pytest.fixture(scope="session")
def run_on_gpu():
    """run_on_gpu(folder, log, *options) -> context of a running engine."""
    return functools.partial(running_engine, device="cuda")


@pytest.fixture(scope="module", params=["auto", "int8", "fp8_e5m2"])
def gpu_engine(request, builtin_gguf, tmp_path_factory):
    """The builtin model on a GPU with what the platform chooses there; one engine per KV type."""
    root = tmp_path_factory.mktemp(f"gpu-{request.param}")
    prepare(builtin_gguf, root / "model")
    options = ["--load-format", "pascal_gguf", "--context-length", "4096", "--max-total-tokens", "20480"]
    options += ["--mem-fraction-static", "0.2", "--chunked-prefill-size", "512", "--max-running-requests", "8"]
    options += ["--kv-cache-dtype", request.param, "--served-model-name", "smollm2"]
    compiled = {"TRITON_CACHE_DIR": str(root / "triton")}
    with running_engine(root / "model", root / "engine.log", *options, device="cuda", **compiled) as engine:
        yield engine


@pytest.fixture(scope="module")
def quantized_engine(builtin_gguf, tmp_path_factory):
    """The builtin model on the CPU with its weights as they are in the file, and an int8 KV cache."""
    root = tmp_path_factory.mktemp("quantized")
    prepare(builtin_gguf, root / "model")
    options = [*COMMON_OPTIONS, "--quantization", "gguf", "--kv-cache-dtype", "int8", "--chunked-prefill-size", "128"]
    with running_engine(root / "model", root / "engine.log", *options) as engine:
        yield engine
