"""`pascaline plan`: how much memory a model needs on a card, whether it fits, and which settings are best."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pascaline.cards import load_card
from pascaline.cli.measure_host import measure_host
from pascaline.cli.options import add_settings_arguments, add_token_argument, load_from_arguments, token_headers
from pascaline.engines import engine_named
from pascaline.errors import ConfigurationError, ExitCode, ModelError, StorageError
from pascaline.models import resolve
from pascaline.models.chat_template import chat_templates
from pascaline.models.reader import read_model
from pascaline.planning import make_plan, nearest_fits, other_engine_fits, refusal, table
from pascaline.planning.catalog import MIXTURE, catalog, catalog_table, fitting_with_layers_on_host, shapes
from pascaline.planning.hints import with_hints
from pascaline.planning.mixtures import MIXTURES, PERPLEXITY_LOSS, requantized
from pascaline.planning.plan_text import choices_table, explanation, sweep_table
from pascaline.units import parse_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pascaline.cards import Card
    from pascaline.configuration import Configuration
    from pascaline.engines.base import Parsers
    from pascaline.models.spec import ModelSpec
    from pascaline.planning import Plan, PlanRequest
    from pascaline.planning.placement import Placement
    from pascaline.settings import Settings

DESCRIPTION = f"""Plan a model's memory on a card: each part, a verdict, the engine's flags and the speed to expect.

MODEL is a GGUF file, a folder with config.json and safetensors, an http(s) address of one, or a name that
`pascaline models list` shows; only headers are read.
Without --card it plans for this host's GPU, whose free memory NVML reports, or for the host's memory if it has no GPU.

  pascaline plan emily.Q4_K_M.gguf --card tesla-p4
  pascaline plan emily.Q4_K_M.gguf --card tesla-p4 --context 8192 --requests 2 --kv-dtype int8 --explain
  pascaline plan emily.Q4_K_M.gguf --card tesla-p4 --sweep quant
  pascaline plan emily.Q4_K_M.gguf --card tesla-p4 --optimize throughput --min-quant Q5_K_M
  pascaline plan https://models.example.org/emily.Q4_K_M.gguf --token-file token --card tesla-p4
  pascaline plan --config emily.toml --json
  pascaline plan --measure-host
  pascaline plan emily.Q4_K_M.gguf --card tesla-p4 --engine llama.cpp --host-memory 192GiB --host-bandwidth 100GB
  pascaline plan --catalog --card tesla-p4 --host-memory 192GiB --host-bandwidth 100GB

exit codes:
  {ExitCode.OK.value:>3}  the plan fits; --sweep, --optimize, --catalog: at least one does
  {ExitCode.CONFIGURATION.value:>3}  {ExitCode.CONFIGURATION.meaning}
  {ExitCode.MODEL.value:>3}  {ExitCode.MODEL.meaning}
  {ExitCode.DOES_NOT_FIT.value:>3}  the plan needs more memory than the card has
  {ExitCode.MISSING.value:>3}  {ExitCode.MISSING.meaning}"""

# Short flags for settings that are often planned with -> the setting.
ALIASES = {"--context": "context_length", "--requests": "max_running_requests", "--kv-dtype": "kv_cache.dtype"}
KV_ALLOWANCE = 0.02
"""Perplexity that a smaller KV type may add to that of --min-quant under --optimize: this allows int8, but not fp8."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags: the plan's own, and those of all settings."""
    parser.add_argument("file", nargs="?", metavar="MODEL", help="model, as --model")
    for flag, key in ALIASES.items():
        parser.add_argument(
            flag, dest=key, metavar=flag.rpartition("-")[2].upper(), help=f"short for the flag of {key}"
        )
    parser.add_argument("--quant", choices=MIXTURES, help="plan the model as if it had this quantisation")
    parser.add_argument("--explain", action="store_true", help="show each formula with its numbers and source")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--sweep", choices=("context", "requests", "quant"), help="plan over a range of one setting")
    parser.add_argument(
        "--optimize",
        choices=("throughput", "latency", "context"),
        help="find the best combinations of quantisation, placement, KV type, context, requests and chunk",
    )
    parser.add_argument(
        "--min-quant",
        choices=MIXTURES,
        default="Q4_K_M",
        help="with --optimize: the coarsest quantisation that is good enough (default: %(default)s)",
    )
    parser.add_argument(
        "--catalog",
        action="store_true",
        help="plan well-known models by their shapes, each with the engine and placement that are fastest",
    )
    parser.add_argument(
        "--host-memory",
        type=size_argument,
        metavar="SIZE",
        help="free memory of the host beside the card, or of a host without one, for example 192GiB (default: not "
        "limited with --card, else this host's)",
    )
    parser.add_argument(
        "--host-bandwidth",
        type=size_argument,
        metavar="SIZE",
        help="what the CPUs beside the card read from their memory in a second, for example 100GB, for the speed of "
        "weights on the host (default: as --measure-host has measured; assumed with --card)",
    )
    parser.add_argument(
        "--measure-host",
        action="store_true",
        help="measure what each NUMA node reads from its memory, some seconds each, and keep it in the cache folder "
        "for later plans",
    )
    parser.add_argument(
        "--picture",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="draw the card's memory to a .svg or .png file; may be given several times",
    )
    add_token_argument(parser)
    add_settings_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Plan and print the plan."""
    if arguments.file is not None:
        arguments.model = arguments.file
    _check_kinds(arguments)
    configuration = load_from_arguments(arguments, check_host=False)
    if arguments.measure_host:
        return measure_host(configuration.settings, as_json=arguments.json)
    if arguments.catalog:
        return _catalog(arguments, configuration)
    spec = read_spec(configuration, token_headers(arguments.token_file))
    if arguments.quant is not None:
        spec = requantized(spec, arguments.quant)
    card, request = target(arguments, configuration, spec)
    if arguments.optimize:
        return _optimize(arguments, spec, card, request)
    if arguments.sweep:
        return _sweep(arguments, spec, card, request)
    return _plan(arguments, configuration, spec, card, request)


def _check_kinds(arguments: argparse.Namespace) -> None:
    """Refuse flags that show one plan together with those that make many, instead of ignoring them silently."""
    kinds = ("sweep", "optimize", "catalog", "measure_host")
    many = [flag.replace("_", "-") for flag in kinds if getattr(arguments, flag)]
    if len(many) > 1:
        raise ConfigurationError(f"--{many[1]}: is set beside --{many[0]}, must be the only one of the two")
    if arguments.catalog and arguments.file is not None:
        raise ConfigurationError(f"--catalog: plans many models, must not be set beside a model ({arguments.file})")
    if arguments.catalog and arguments.quant is not None:
        raise ConfigurationError(
            f"--quant: the catalogue is planned as most files are published, in {MIXTURE}; must be left out"
        )
    if arguments.measure_host and arguments.file is not None:
        raise ConfigurationError(f"--measure-host: plans no model, must not be set beside one ({arguments.file})")
    for flag in ("host_memory", "host_bandwidth"):
        if arguments.measure_host and getattr(arguments, flag) is not None:
            name = flag.replace("_", "-")
            raise ConfigurationError(f"--{name}: --measure-host measures this host, must be left out")
    for flag in ("explain", "picture"):
        if many and getattr(arguments, flag):
            what = "which makes none" if arguments.measure_host else "which makes many"
            raise ConfigurationError(f"--{flag}: shows one plan, must not be set beside --{many[0]}, {what}")


def read_spec(configuration: Configuration, headers: Mapping[str, str] | None = None) -> ModelSpec:
    """Read the header of the settings' model. headers: for the HTTP requests, if the model is an address.

    Raises ConfigurationError if there are headers but no address, or if the checksum cannot match.
    """
    settings = configuration.settings
    if settings.model.startswith(("http://", "https://")):
        spec = read_model(settings.model, headers)
    elif headers:
        raise ConfigurationError(
            f"--token-file: {settings.model} is not an http(s) address and needs none; leave it out"
        )
    else:
        spec = read_model(resolve.locate(settings)[0])
    if problem := resolve.checksum_problem(settings, spec):
        raise ConfigurationError(problem)
    return spec


def target(arguments: argparse.Namespace, configuration: Configuration, spec: ModelSpec) -> tuple[Card, PlanRequest]:
    """Return the card and the request to plan: a named card according to its profile, otherwise this host's device."""
    from pascaline.planning.request import request_from_placement

    placement = with_given_host(arguments, placement_of(configuration))
    return placement.card, request_from_placement(configuration.settings, spec, placement)


def placement_of(configuration: Configuration) -> Placement:
    """Return where to plan for: a named card according to its profile, otherwise this host's device."""
    from pascaline.planning.placement import place_on_card
    from pascaline.serving.task import place_instance

    settings = configuration.settings
    if settings.card is not None and (card := load_card(settings.card)).memory_bytes and settings.device != "cpu":
        return place_on_card(settings, card)
    placement = place_instance(configuration)
    for note in placement.notes:
        print(f"pascaline plan: {note}", file=sys.stderr)
    return placement


LEAST_SIZE = 2**20
"""Less is no host's memory or bandwidth, but a number whose unit was forgotten."""


def size_argument(text: str) -> int:
    """Read a size for argparse."""
    try:
        size = parse_bytes(int(text) if text.isdecimal() else text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not isinstance(size, int) or size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size, must be such as 192GiB")
    if size < LEAST_SIZE:
        raise argparse.ArgumentTypeError(f"{text!r} means {size} B, must be at least 1 MiB, such as {size} GiB")
    return size


def with_given_host(arguments: argparse.Namespace, placement: Placement) -> Placement:
    """Return the placement beside the host that --host-memory and --host-bandwidth describe."""
    from pascaline.gpu.memory import DeviceMemory

    if arguments.host_memory is not None:
        if placement.device == "cpu":
            placement = replace(placement, memory=DeviceMemory("cpu", arguments.host_memory))
        else:
            placement = replace(placement, host_memory_bytes=arguments.host_memory)
    if arguments.host_bandwidth is None:
        return placement
    rates = replace(
        placement.host_rates, memory_bytes_per_second=float(arguments.host_bandwidth), source="--host-bandwidth"
    )
    return replace(placement, host_rates=rates)


def _catalog(arguments: argparse.Namespace, configuration: Configuration) -> int:
    settings, origins = configuration.settings, configuration.origins
    placement = with_given_host(arguments, placement_of(configuration))
    engines = (settings.engine,) if origins.is_chosen("engine") else ()
    rows = catalog(settings, placement, engines=engines, chunk_is_free=not origins.is_chosen("chunked_prefill_tokens"))
    if arguments.json:
        print(json.dumps([row.to_json() for row in rows], indent=2))
    elif rows:
        print(catalog_table(rows))
        if names := fitting_with_layers_on_host(rows, settings, placement):
            print(f"\nwith --placement-layers auto (whole layers on the host, slower) also: {', '.join(names)}")
    if others := sorted({shape["name"] for shape in shapes()} - {row.name for row in rows}):
        print(f"pascaline plan: {settings.engine} does not serve {', '.join(others)} so", file=sys.stderr)
    return _code([row.plan for row in rows])


def _plan(
    arguments: argparse.Namespace, configuration: Configuration, spec: ModelSpec, card: Card, request: PlanRequest
) -> int:
    verdict = engine_named(request.engine).judge_as(spec, request.role)
    is_free = not configuration.origins.is_chosen("chunked_prefill_tokens")
    plan = with_hints(make_plan(spec, card, request), spec, card, request, chunk_is_free=is_free)
    changes = []
    if not plan.fits:
        changes = nearest_fits(spec, card, request)
        changes += other_engine_fits(configuration.settings, spec, card, request)
    parsers = _parsers(configuration.settings, spec)
    notes = (*plan.notes, *verdict.notes, *([parsers.sentence] if parsers else []))
    plan = replace(plan, refusals=tuple(verdict.refusals), notes=notes)
    for picture in arguments.picture:
        draw(plan, picture)
    if arguments.json:
        nearest = {} if not plan.reasons else {"nearest": [change.to_json() for change in changes]}
        print(json.dumps(plan.to_json() | nearest | {"parsers": parsers._asdict() if parsers else None}, indent=2))
        return _code([plan])
    print(refusal(plan, changes) if plan.reasons else table(plan))
    if plan.fits:
        print(f"\nflags of {request.engine}: {' '.join(plan.engine_args)}")
    if arguments.explain:
        print(f"\n{explanation(plan)}")
    return _code([plan])


def _parsers(settings: Settings, spec: ModelSpec) -> Parsers | None:
    """Return the parsers that `serve` would choose; None for an address, whose chat template is not read."""
    path = spec.files[0] if spec.files else None
    if not isinstance(path, Path):
        return None
    return engine_named(settings.engine).parsers(settings, chat_templates(spec, path), spec.architecture)


def _sweep(arguments: argparse.Namespace, spec: ModelSpec, card: Card, request: PlanRequest) -> int:
    from pascaline.planning.search import sweep

    _require_served(spec, request)
    plans = sweep(spec, card, request, arguments.sweep)
    if arguments.json:
        print(json.dumps([plan.to_json() for plan in plans], indent=2))
    else:
        print(f"{spec.name or spec.architecture} on {card.name}, {request.engine}\n")
        print(sweep_table(plans, arguments.sweep))
    return _code(plans)


def _optimize(arguments: argparse.Namespace, spec: ModelSpec, card: Card, request: PlanRequest) -> int:
    from pascaline.planning.search import optimize

    _require_served(spec, request)
    choices = optimize(spec, card, request, arguments.optimize, PERPLEXITY_LOSS[arguments.min_quant] + KV_ALLOWANCE)
    if arguments.json:
        print(json.dumps([choice.to_json() for choice in choices], indent=2))
    elif choices:
        print(
            f"{spec.name or spec.architecture} on {card.name}, {request.engine}, best for {arguments.optimize} first\n"
        )
        print(choices_table(choices))
        print(f"\nflags of the best: {' '.join(choices[0].plan.engine_args)}")
    else:
        print(f"nothing down to {arguments.min_quant} fits {card.name}; lower --min-quant, --context or --requests")
    return ExitCode.OK if choices else ExitCode.DOES_NOT_FIT


def _require_served(spec: ModelSpec, request: PlanRequest) -> None:
    """Raise ModelError if the engine refuses the model whatever the settings are."""
    if refusals := engine_named(request.engine).judge_as(spec, request.role).sentence:
        raise ModelError(f"{spec.name or spec.architecture}: {refusals}")


def _code(plans: list[Plan]) -> ExitCode:
    if plans and all(plan.refusals for plan in plans):
        return ExitCode.MODEL
    return ExitCode.OK if any(plan.fits for plan in plans) else ExitCode.DOES_NOT_FIT


def draw(plan: Plan, path: Path) -> None:
    """Write the picture of a plan, in the format of the file's suffix."""
    from pascaline.planning.picture import png, svg

    try:
        if path.suffix.lower() == ".svg":
            path.write_text(svg(plan), encoding="utf-8")
        elif path.suffix.lower() == ".png":
            path.write_bytes(png(plan))
        else:
            raise ConfigurationError(f"--picture: {path} must end in .svg or .png")
    except OSError as error:
        raise StorageError(f"failed to write {path}: {error.strerror}") from error
