"""`pascaline profile`: shows where a decode spends its time."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pascaline.cli.options import add_settings_arguments, given_flags
from pascaline.cli.signals import interrupt_on_sigterm
from pascaline.engines import ENGINES, engine_named
from pascaline.errors import ConfigurationError, EngineError, ExitCode, MissingError, StorageError
from pascaline.redaction import read_secret

if TYPE_CHECKING:
    import argparse

    from pascaline.doctor.host import Instance
    from pascaline.profile.session import Load, Recording, Target
    from pascaline.profile.timeline import Timeline

DESCRIPTION = """Record the kernels of a running decode and compare them with the card's memory bandwidth.

  pascaline profile --instance emily          a running instance; adds its own requests to those of users
  pascaline profile --model emily.gguf        starts an instance for the recording
  pascaline profile --tool nvprof             the same under nvprof of CUDA 11.8, the last profiler made for Pascal
  pascaline profile --read FILE               summarise a trace of torch or a database of nvprof

Prints the kinds of work and the kernels that take the most time, each with its bandwidth, and leaves a trace for
ui.perfetto.dev. Bytes are those that a step must read according to the instance's plan, for all products and for our
kernels of each weight type. Without a plan (--read) they are those of the recorded operators. The roof is the bandwidth
of the card's profile, otherwise the one that NVML reports for a GPU of that name in this host.

torch's profiler is used on CPUs and on every card that its CUPTI supports. nvprof cannot attach to a running process,
so it needs its own instance."""

DEFAULT_STEPS = 20
TIMEOUT_SECONDS = 600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--instance", metavar="NAME|URL|FILE", help="instance to record: unit, agent or TOML file")
    parser.add_argument("--read", type=Path, metavar="FILE", help="summarise a recording instead of making one")
    parser.add_argument(
        "--steps", type=int, default=DEFAULT_STEPS, help="decode steps to record (default: %(default)s)"
    )
    parser.add_argument("--requests", type=int, default=1, help="requests to decode at once (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="length of their prompts (default: %(default)s)")
    parser.add_argument("--no-load", action="store_true", help="send no requests, record those of others")
    parser.add_argument(
        "--tool",
        choices=("auto", "torch", "nvprof"),
        default="auto",
        help="auto: nvprof on Pascal if it is installed, otherwise torch",
    )
    parser.add_argument("--top", type=int, default=15, help="kernels to list (default: %(default)s)")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="folder for the trace (default: ./profile-TIME)"
    )
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    add_settings_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Make or read a recording, and print its summary."""
    for flag, number in (("--steps", arguments.steps), ("--requests", arguments.requests), ("--top", arguments.top)):
        if number < 1:
            raise ConfigurationError(f"{flag} must be at least 1, got {number}")
    if arguments.read is not None:
        _print(arguments, _read(arguments.read, arguments.steps), {}, 0.0)
        return ExitCode.OK
    interrupt_on_sigterm()
    instance = _instance(arguments)
    folder = _new_folder(arguments.output)
    timeline, plan, context, trace = _record(arguments, instance, folder)
    _print(arguments, timeline, plan, context)
    print(f"pascaline profile: the trace is {trace}; open it in ui.perfetto.dev", file=sys.stderr)
    return ExitCode.OK


def _instance(arguments: argparse.Namespace) -> Instance:
    from pascaline.doctor.evidence.instance import Question, collect_instance
    from pascaline.doctor.machine import Machine

    question = Question(arguments.instance, arguments.config, given_flags(arguments))
    instance = collect_instance(Machine(), question)
    if instance.configuration_error:
        raise ConfigurationError(instance.configuration_error)
    engine = instance.settings.engine if instance.settings else None
    if engine and not engine_named(engine).has_profiler:
        able = " or ".join(name for name, other in ENGINES.items() if other.has_profiler)
        raise ConfigurationError(f"engine: {engine} has no profiler interface, must be {able}")
    if arguments.instance and instance.health is None:
        raise EngineError(f"--instance: no agent of {arguments.instance} answers; see pascaline doctor --instance")
    return instance


def _record(
    arguments: argparse.Namespace, instance: Instance, folder: Path
) -> tuple[Timeline, dict[str, Any], float, Path]:
    """Return (timeline, plan of the instance, tokens in the KV cache, trace for a viewer)."""
    from pascaline.profile.session import Load, record

    load = None if arguments.no_load else Load(arguments.requests, arguments.prompt_tokens)
    chosen = given_flags(arguments) or arguments.config
    if instance.health is None or (chosen and not arguments.instance):
        return _record_own(arguments, instance, folder, load)
    if arguments.tool == "nvprof":
        raise ConfigurationError(
            "--tool: nvprof cannot attach to a running instance; stop it and profile without --instance"
        )
    engine_folder = _engine_folder(instance, folder)
    recording = record(
        _target(instance), engine_folder, steps=arguments.steps, load=load, timeout=TIMEOUT_SECONDS, on_stage=_say
    )
    assert recording.trace is not None
    trace = folder / recording.trace.name
    if recording.trace.parent != folder:
        shutil.move(recording.trace, trace)
    return _read(trace, arguments.steps), dict(instance.plan or {}), recording.context_tokens, trace


def _target(instance: Instance) -> Target:
    from pascaline.engines.client import reachable
    from pascaline.profile.session import Target

    if instance.settings is None:
        raise ConfigurationError("--instance: an agent does not report the engine's address; give NAME or FILE, no URL")
    host, port = reachable((instance.settings.host, instance.settings.port))
    return Target(f"http://{f'[{host}]' if ':' in host else host}:{port}", _api_key(instance))


def _api_key(instance: Instance) -> str | None:
    """Return the API key that the engine requires, if any. Raises ConfigurationError if its file cannot be read."""
    path = instance.settings.api_key_file if instance.settings else None
    try:
        return read_secret(path) if path else None
    except OSError as error:
        raise ConfigurationError(f"api_key_file: failed to read {path}: {error.strerror}") from error


def _engine_folder(instance: Instance, folder: Path) -> Path:
    """Return a folder that the engine can write to: a hardened unit can use only its own folders."""
    if not instance.unit:
        return folder
    base = Path(instance.settings.cache_dir) if instance.settings and instance.settings.cache_dir else None
    target = (base or Path(f"/var/cache/pascaline-{instance.name}")) / f"profile-{int(time.time())}"
    try:
        target.mkdir(parents=True)
        target.chmod(0o777)
    except OSError as error:
        raise StorageError(f"failed to write to {target.parent}: {error.strerror}; run it as root") from error
    return target


def _record_own(
    arguments: argparse.Namespace, instance: Instance, folder: Path, load: Load | None
) -> tuple[Timeline, dict[str, Any], float, Path]:
    from pascaline.profile.engine import serving, write_nvprof_wrapper
    from pascaline.profile.nvprof import write_chrome_trace
    from pascaline.profile.session import Target, ask, record

    settings, key = _as_texts(given_flags(arguments)), _api_key(instance)
    nvprof = _nvprof(arguments.tool, instance)
    if nvprof:
        configured = instance.settings.engine_executable if instance.settings else None
        wrapper = write_nvprof_wrapper(folder, nvprof, str(configured or sys.executable))
        settings["engine_executable"] = str(wrapper)
    _say("starting an instance")
    with serving(settings, arguments.config, folder / "serve.log", TIMEOUT_SECONDS) as (engine, agent):
        plan = ask(f"{agent}/plan") or {}
        recording: Recording = record(
            Target(engine, key),
            folder,
            steps=arguments.steps,
            load=load,
            timeout=TIMEOUT_SECONDS,
            external=bool(nvprof),
            on_stage=_say,
        )
    if recording.trace is not None:
        return _read(recording.trace, arguments.steps), plan, recording.context_tokens, recording.trace
    databases = sorted(folder.glob("nvprof-*.sqlite"), key=lambda path: path.stat().st_size)
    if not databases:
        raise EngineError(f"nvprof wrote no record to {folder}; see {folder / 'serve.log'}")
    timeline = _read(databases[-1], arguments.steps)
    trace = folder / "nvprof.trace.json"
    write_chrome_trace(timeline, trace)
    return timeline, plan, recording.context_tokens, trace


def _as_texts(flags: dict[str, Any]) -> dict[str, str]:
    """Return settings as texts for environment variables."""
    return {key: _text(value) for key, value in flags.items()}


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(f"{name}={item}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _nvprof(tool: str, instance: Instance) -> str | None:
    """Return nvprof's path if it is to be used: on request, or on a Pascal card if it is installed; otherwise None."""
    from pascaline.serving.task import place_instance

    found = shutil.which("nvprof")
    if tool == "nvprof" and not found:
        raise MissingError(
            "nvprof is not on PATH; it comes with CUDA 11.8 (NixOS: hardware.pascaline.cuda.enable = true;)"
        )
    if tool == "nvprof":
        return found
    if found is None or tool != "auto" or instance.configuration is None:
        return None
    placement = place_instance(instance.configuration)
    is_pascal = placement.device == "cuda" and (placement.card.compute_capability or "").startswith("6.")
    return found if is_pascal else None


def _new_folder(output: Path | None) -> Path:
    folder = (output or Path(f"profile-{time.strftime('%Y%m%d-%H%M%S')}")).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"failed to write to {folder}: {error.strerror}; name a folder with --output") from error
    if any(folder.iterdir()):
        raise ConfigurationError(f"--output: {folder} is not empty, must be a new folder")
    return folder


def _read(path: Path, steps: int) -> Timeline:
    from pascaline.profile.nvprof import is_nvprof, read_nvprof
    from pascaline.profile.trace import read_trace

    return read_nvprof(path, steps) if is_nvprof(path) else read_trace(path, steps)


def _print(arguments: argparse.Namespace, timeline: Timeline, plan: dict[str, Any], context: float) -> None:
    from pascaline.profile.roofline import StepBytes, summarise, to_text

    summary = summarise(
        timeline,
        bandwidth=_bandwidth(timeline, plan),
        step=StepBytes.of_plan(plan, context),
        top=arguments.top,
    )
    print(json.dumps(summary.to_json(), indent=2) if arguments.json else to_text(summary), end="")
    if arguments.json:
        print()


def _bandwidth(timeline: Timeline, plan: dict[str, Any]) -> float | None:
    """Return the card's bandwidth in bytes per second; None for a CPU, or if no source has it.

    Sources in order: the card's profile, found by the driver's name or the plan's; the recording; NVML, if this host
    has a GPU of that name.
    """
    from pascaline.cards import card_for_device, card_names, load_card
    from pascaline.gpu.memory import memory_bandwidth
    from pascaline.profile.timeline import CPU

    name = plan.get("card", "")
    card = card_for_device(timeline.device.removeprefix("NVIDIA ")) or (
        load_card(name) if name in card_names() else None
    )
    fact = card.facts.get("bandwidth_bytes_per_second") if card else None
    if fact is not None:
        return fact.value
    if timeline.device == CPU:
        return None
    return timeline.device_bandwidth or memory_bandwidth(timeline.device)


def _say(stage: str) -> None:
    print(f"pascaline profile: {stage} …", file=sys.stderr)
