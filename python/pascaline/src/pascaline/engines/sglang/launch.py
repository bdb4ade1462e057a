"""The command line and the variables of SGLang with the plugin."""

from __future__ import annotations

import json
import os
import shutil
import sys
from typing import TYPE_CHECKING, Final

from pascaline.engines.base import Launch
from pascaline.engines.sglang import activations, speculation
from pascaline.engines.sglang.parsers import parser_arguments
from pascaline.engines.sglang.weights import BITSANDBYTES
from pascaline.errors import MissingError
from pascaline.models.cache import cache_folder
from pascaline.plugin import PLUGIN

if TYPE_CHECKING:
    from pathlib import Path

    from pascaline.engines.base import Task
    from pascaline.settings import Settings

HELD_BACK_TOKENS = 10
"""Tokens after which SGLang's scheduler passes on an answer that is not streamed, so that it is counted (default: 50).
"""


def launch(task: Task, kv_type: str) -> Launch:
    """Return the command line and the variables. A file holds the API key, since every user can see arguments.

    kv_type: SGLang's name of the type of the KV cache.
    """
    settings = task.settings
    python = str(settings.engine_executable or sys.executable)
    if shutil.which(python) is None:
        raise MissingError(f"engine_executable: {python} is not a program, must be a Python that can import sglang")
    arguments = [*_model_arguments(task), *_limit_arguments(task), *_feature_arguments(task, kv_type)]
    if task.api_key is not None:
        arguments += ["--config", _write_key_file(task)]
    command = (python, "-m", "sglang.launch_server", *arguments, *settings.extra_args)
    return Launch(command, _environment(task))


def _model_arguments(task: Task) -> list[str]:
    model = task.model
    arguments = ["--model-path", str(model.prepared_dir or model.path), "--served-model-name", model.served_name]
    if model.prepared_dir is not None:
        arguments += ["--load-format", PLUGIN.load_format]
    if task.settings.quantization is not None:
        arguments += ["--quantization", task.settings.quantization]
        if task.settings.quantization == BITSANDBYTES and model.prepared_dir is None:
            # Only this loader quantises, and SGLang does not choose it from the method.
            arguments += ["--load-format", BITSANDBYTES]
    return [*arguments, "--device", task.device, "--dtype", task.dtype]


def _limit_arguments(task: Task) -> list[str]:
    settings = task.settings
    arguments = [
        *("--host", settings.host, "--port", str(settings.port)),
        *("--context-length", str(task.context_length)),
        *("--max-running-requests", str(settings.max_running_requests)),
        *("--max-total-tokens", str(task.max_total_tokens)),
        *("--chunked-prefill-size", str(settings.chunked_prefill_tokens)),
        *("--schedule-policy", settings.schedule_policy),
        *("--tp-size", str(settings.tensor_parallel), "--pp-size", str(settings.pipeline_parallel)),
    ]
    if task.mem_fraction_static is not None:
        arguments += ["--mem-fraction-static", f"{task.mem_fraction_static:g}"]
    if settings.max_queued_requests is not None:
        arguments += ["--max-queued-requests", str(settings.max_queued_requests)]
    return arguments


def _feature_arguments(task: Task, kv_type: str) -> list[str]:
    settings = task.settings
    # Without --sleep-on-idle its scheduler keeps one core busy all the time while it waits for requests.
    # SGLang ends itself if its own warm-up request is refused, as it is if clients have filled the queue by then: under
    # load it would never start. A test generation precedes readiness anyway.
    arguments = ["--enable-metrics", "--sleep-on-idle", "--skip-server-warmup", "--kv-cache-dtype", kv_type]
    if not settings.radix_cache:
        arguments.append("--disable-radix-cache")
    if settings.attention_backend is not None:
        arguments += ["--attention-backend", settings.attention_backend]
    if settings.role == "embed":
        return [*arguments, "--is-embedding", *_log_arguments(settings)]
    arguments += speculation.arguments(task.speculation)
    arguments += parser_arguments(settings, task.model.chat_templates, task.model.spec.architecture)
    return [*arguments, *_log_arguments(settings)]


def _log_arguments(settings: Settings) -> list[str]:
    if settings.debug:
        return ["--log-level", "debug"]
    # SGLang's own lines about requests are enough; our scrapes alone would add a line a second to an access log.
    return [] if "--log-level-http" in settings.extra_args else ["--log-level-http", "warning"]


def _write_key_file(task: Task) -> str:
    """Write SGLang's configuration file with the key, readable by this user alone. JSON is YAML too."""
    path = task.runtime_dir / "sglang.yaml"
    text = json.dumps({"api-key": task.api_key})
    path.touch(mode=0o600)
    # A full disk does not prevent a restart if nothing has to be written.
    if path.read_bytes() != text.encode():
        path.write_text(text)
    return str(path)


def _empty_folder(path: Path) -> Path:
    """Replace the engine's folder for temporary files: SGLang ends its workers with SIGKILL, so they leave sockets."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(mode=0o700)
    return path


CACHE: Final = "SGLANG_CACHE_DIR"
"""Where SGLang, torch's inductor, Triton and the driver keep what they compile; SGLang's default is in the home folder,
which need not be one that can be written: torch makes its folder there at each import."""


def _environment(task: Task) -> dict[str, str]:
    environment = {
        "SGLANG_PLATFORM": PLUGIN.platform,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "OMP_NUM_THREADS": str(task.threads),
        # By default OpenMP's threads spin for milliseconds after every product, on cores that other programs could use.
        # torch brings libgomp, for which PASSIVE means GOMP_SPINCOUNT=0 (its manual, GOMP_SPINCOUNT).
        "OMP_WAIT_POLICY": "PASSIVE",
        # Otherwise each of SGLang's processes forks compiler workers of more than a gigabyte that nothing uses.
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        # After a crash, do not wait a minute for a GPU core dump.
        "SGLANG_CUDA_COREDUMP_BEFORE_CRASH_WAIT_SECS": "0",
        # Lets the counters show that answers leave while they are computed, even if they are not streamed.
        "SGLANG_FORCE_STREAM_INTERVAL": str(HELD_BACK_TOKENS),
        # A tool call obeys the tool's schema even if the tool does not set `strict`.
        "SGLANG_TOOL_STRICT_LEVEL": "2",
        "PYTHONUNBUFFERED": "1",
        # Otherwise every start prints dozens of warnings about packages that are absent on purpose.
        "PYTHONWARNINGS": "default" if task.settings.debug else "ignore",
    }
    if CACHE not in os.environ:
        environment[CACHE] = str(cache_folder(task.settings) / "sglang")
    environment["TMPDIR"] = str(_empty_folder(task.runtime_dir / "tmp"))
    bits = {"prefill": task.prefill_bits, "decode": task.decode_bits}
    environment |= {variable: str(bits[phase]) for phase, variable in activations.VARIABLES.items()}
    if task.speculation.rows:
        environment[speculation.VARIABLE] = str(task.speculation.rows)
    if task.settings.debug:
        environment["CUDA_LAUNCH_BLOCKING"] = "1"
    if task.settings.any_model_name:
        environment[PLUGIN.variables["any_model"]] = "1"
    return environment | task.variables
