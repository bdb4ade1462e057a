"""`pascaline bench`: measure an instance under load."""

from __future__ import annotations

import json
import re
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pascaline.cli.options import add_settings_arguments, load_from_arguments
from pascaline.cli.signals import interrupt_on_sigterm
from pascaline.configuration import flag_of, setting_fields
from pascaline.errors import ConfigurationError, EngineError, ExitCode

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from pascaline.bench.results import Results
    from pascaline.bench.sweep import Target

DESCRIPTION = """Measure an instance under real concurrent load over its OpenAI API.

  pascaline bench batch                       1, 2, 4, 8 requests at once: tokens/s, latencies, memory, power
  pascaline bench context                     one request at a time, 2048, 4096 and 8192 tokens long
  pascaline bench serve --rates 0.5,1,2       requests that arrive at given rates
  pascaline bench quant --model F16.gguf      size, memory, quality and speed of each type from F16 to Q3_K
  pascaline bench compare A B                 which differences between two results are significant
  pascaline bench report FOLDER               print results again and rewrite their report
  pascaline bench report BATCH CONTEXT QUANT --page all.html     one page with the charts of several results

It starts an instance with the given settings, as `pascaline serve` does, and ends it; with --url it measures a running
one. Results go to a folder: results.json (schema 1) and report.html, a self-contained page. An interrupted benchmark
keeps its results so far; the same command with the same --output continues it."""

MAX_CHUNKS = 32
"""The shipped text has some 19,000 tokens, which is 37 chunks; with other tokenisers it has fewer."""
# With --url these settings describe the server; all others can only configure an instance that bench starts.
_FACTS_OF_A_SERVER = frozenset({"model", "card", "api_key_file"})
_CHOSEN_HERE = frozenset({"host", "port", "agent_host", "agent_port", "drain_timeout"})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmarks and their flags."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="BENCHMARK")
    for name, (summary, add, function) in ACTIONS.items():
        sub = actions.add_parser(
            name, help=summary, description=summary[:1].upper() + summary[1:] + ".", allow_abbrev=False
        )
        sub.set_defaults(function=function)
        add(sub)


def run(arguments: argparse.Namespace) -> int:
    """Run one benchmark."""
    return int(arguments.function(arguments))


# --- flags ------------------------------------------------------------------------------------------------------------


def _add_batch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sizes", default="1,2,4,8", metavar="N,N,…", help="concurrent requests of each point (default: %(default)s)"
    )
    _add_lengths(parser, prompt="128", output="128")
    _add_common(parser)


def _add_context(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lengths",
        default="2048,4096,8192",
        metavar="N,N,…",
        help="tokens of prompt and answer together (default: %(default)s)",
    )
    parser.add_argument(
        "--output-tokens", type=int, default=64, metavar="N", help="tokens of each answer (default: %(default)s)"
    )
    _add_common(parser)


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rates", default="0.5,1,2", metavar="R,R,…", help="requests a second of each point (default: %(default)s)"
    )
    parser.add_argument(
        "--arrival",
        choices=("poisson", "fixed"),
        default="poisson",
        help="poisson: like many independent users; fixed: evenly spaced (default: %(default)s)",
    )
    parser.add_argument(
        "--workload",
        choices=("free", "edit", "quote"),
        default="free",
        help="what is asked for: free (go on with a story), edit (repeat the text with a change), quote (repeat "
        "sentences of it); the last two show what speculation wins (default: %(default)s)",
    )
    _add_lengths(parser, prompt="lognormal:128:0.7", output="lognormal:64:0.7")
    _add_common(parser)


def _add_quant(parser: argparse.ArgumentParser) -> None:
    from pascaline.bench.quant import DEFAULT_TYPES

    parser.add_argument(
        "--types",
        metavar="TYPE,TYPE,…",
        help="weight types; NF4 means bitsandbytes through SGLang "
        f"(default: {','.join(DEFAULT_TYPES)}, and NF4 for a Hugging Face folder)",
    )
    parser.add_argument(
        "--chunks",
        type=int,
        default=16,
        metavar="N",
        help="chunks of 512 tokens on which quality is measured, at most 32 (default: %(default)s)",
    )
    parser.add_argument(
        "--sizes", default="1,4", metavar="N,N,…", help="concurrent requests of the speed tests (default: %(default)s)"
    )
    parser.add_argument(
        "--keep-models", action="store_true", help="keep the model files of all types (default: remove each after use)"
    )
    parser.add_argument("--tools", type=Path, metavar="DIR", help="folder of llama.cpp's programs (default: PATH)")
    parser.add_argument(
        "--converter", type=Path, metavar="FILE", help="convert_hf_to_gguf.py, which a Hugging Face folder needs"
    )
    _add_lengths(parser, prompt="128", output="128")
    _add_common(parser)


def _add_lengths(parser: argparse.ArgumentParser, *, prompt: str, output: str) -> None:
    forms = "128, 64-256 (uniform), normal:128:32 or lognormal:128:0.7 (median, sigma)"
    parser.add_argument(
        "--prompt-tokens",
        default=prompt,
        metavar="LENGTHS",
        help=f"tokens of each prompt: {forms} (default: %(default)s)",
    )
    parser.add_argument(
        "--output-tokens",
        default=output,
        metavar="LENGTHS",
        help="tokens of each answer, in the same forms (default: %(default)s)",
    )


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--requests", type=int, metavar="N", help="requests of each run (default: enough for the point)"
    )
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="runs of each point (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="seed of prompts, lengths, arrivals (default: %(default)s)")
    parser.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        metavar="S",
        help="longest duration of a request in seconds (default: %(default)g)",
    )
    parser.add_argument("--url", help="measure a running server, such as http://127.0.0.1:30000")
    parser.add_argument(
        "--exporter",
        metavar="URL",
        help="page with the GPU's metrics (default: NVML on this host; port 9836 of another host)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="folder for results (default: ./bench-BENCHMARK-MODEL-TIME)"
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of a table")
    add_settings_arguments(parser)


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", type=Path, metavar="A", help="results: a folder or its results.json")
    parser.add_argument("second", type=Path, metavar="B", help="results to compare with A")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="results: a folder or its results.json")
    parser.add_argument("--page", type=Path, metavar="FILE", help="HTML page to write with the charts of all results")
    parser.add_argument(
        "--json", action="store_true", help="print JSON instead of tables; a list if there are several results"
    )


# --- sweeps -----------------------------------------------------------------------------------------------------------


def _batch(arguments: argparse.Namespace) -> int:
    from pascaline.bench.experiment import batch_points
    from pascaline.bench.workload import parse_lengths

    sizes = _sizes(arguments)
    for flag in ("prompt_tokens", "output_tokens"):
        parse_lengths(flag_of(flag), getattr(arguments, flag))
    points = batch_points(sizes, arguments.prompt_tokens, arguments.output_tokens, arguments.requests)
    return _sweep(arguments, "batch", points, {"max_running_requests": max(sizes)})


def _context(arguments: argparse.Namespace) -> int:
    from pascaline.bench.experiment import context_points

    lengths = _whole_numbers("--lengths", arguments.lengths)
    if not 1 <= arguments.output_tokens < min(lengths):
        raise ConfigurationError(
            f"--output-tokens: must be between 1 and {min(lengths) - 1}, so that each length has room for a prompt, "
            f"got {arguments.output_tokens}"
        )
    points = context_points(lengths, arguments.output_tokens, arguments.requests)
    return _sweep(arguments, "context", points, {"context_length": max(lengths)})


def _serve(arguments: argparse.Namespace) -> int:
    from pascaline.bench.experiment import serve_points
    from pascaline.bench.workload import parse_lengths

    for flag in ("prompt_tokens", "output_tokens"):
        parse_lengths(flag_of(flag), getattr(arguments, flag))
    rates = _rates(arguments.rates)
    points = serve_points(
        rates,
        arguments.arrival,
        arguments.prompt_tokens,
        arguments.output_tokens,
        arguments.requests,
        arguments.workload,
    )
    return _sweep(arguments, "serve", points, {})


def _quant(arguments: argparse.Namespace) -> int:
    from pascaline.bench import quant
    from pascaline.bench.workload import parse_lengths
    from pascaline.quantize import Tools

    _check_counts(arguments)
    if arguments.url:
        raise ConfigurationError("--url: bench quant starts an instance for each type, must be left out")
    if not 1 <= arguments.chunks <= MAX_CHUNKS:
        raise ConfigurationError(f"--chunks: must be between 1 and {MAX_CHUNKS}, got {arguments.chunks}")
    for flag in ("prompt_tokens", "output_tokens"):
        parse_lengths(flag_of(flag), getattr(arguments, flag))
    sizes = _sizes(arguments)
    chosen = tuple(part.strip().upper() for part in arguments.types.split(",")) if arguments.types else None
    quant.check_types(chosen or ())
    target = _target(arguments, {"max_running_requests": max(sizes)})
    comparison = quant.Comparison(
        types=chosen or quant.default_types(target.configuration.settings),
        sizes=tuple(sizes),
        chunks=arguments.chunks,
        prompt_tokens=arguments.prompt_tokens,
        output_tokens=arguments.output_tokens,
        requests=arguments.requests,
        repeats=arguments.repeats,
        seed=arguments.seed,
        timeout=arguments.timeout,
        keep_models=arguments.keep_models,
        tools=Tools(arguments.tools, arguments.converter),
    )
    folder = arguments.output or Path(default_folder("quant", target.model_name, time.time()))
    return _with_results(arguments, folder, lambda: quant.run_quant(target, comparison, folder))


def _sweep(arguments: argparse.Namespace, kind: str, points: Any, wanted: dict[str, Any]) -> int:
    """Measure points on one instance. wanted: settings that the sweep needs, unless the user chose others."""
    from pascaline.bench.experiment import Experiment
    from pascaline.bench.sweep import run_sweep

    _check_counts(arguments)
    experiment = Experiment(
        kind=kind, points=points, repeats=arguments.repeats, seed=arguments.seed, timeout=arguments.timeout
    )
    target = _target(arguments, wanted)
    folder = arguments.output or Path(default_folder(kind, target.model_name, time.time()))
    return _with_results(arguments, folder, lambda: run_sweep(target, experiment, folder))


def _target(arguments: argparse.Namespace, wanted: dict[str, Any]) -> Target:
    from pascaline.bench.sweep import Target

    configuration = load_from_arguments(arguments)
    if (role := configuration.settings.role) != "generate":
        raise ConfigurationError(
            f"role: a benchmark counts generated tokens, which role {role} has none of; leave it out"
        )
    return Target(
        url=arguments.url,
        exporter=arguments.exporter,
        configuration=configuration,
        given=_given_settings(arguments),
        config_file=arguments.config,
        wanted=wanted,
    )


def _with_results(arguments: argparse.Namespace, folder: Path, measure: Callable[[], Results]) -> int:
    """Run a measurement and show the results; if SIGTERM, Ctrl-C or the engine ends it, show those so far."""
    from pascaline.bench.results import FILE_NAME, load

    interrupt_on_sigterm()
    try:
        results = measure()
    except (KeyboardInterrupt, EngineError):
        if (folder / FILE_NAME).exists():
            _show(load(folder), as_json=arguments.json)
            again = shlex.join(["pascaline", *sys.argv[1:], *([] if arguments.output else ["--output", str(folder)])])
            print(f"interrupted; to continue: {again}", file=sys.stderr)
        raise
    _show(results, as_json=arguments.json)
    failed = any(not entry["summary"] for entry in results.document["points"])
    return ExitCode.FAILED if failed else ExitCode.OK


def _show(results: Results, *, as_json: bool) -> None:
    """Write the report and print the results."""
    from pascaline.bench.html_report import write_report
    from pascaline.bench.results_table import results_table

    report = write_report(results)
    if as_json:
        print(json.dumps(results.document, indent=1))
    else:
        print(results_table(results.document))
    print(f"results {results.path}\nreport  {report}", file=sys.stderr)


def _compare(arguments: argparse.Namespace) -> int:
    from pascaline.bench.compare import compare, comparison_table
    from pascaline.bench.results import load

    differences = compare(load(arguments.first).document, load(arguments.second).document)
    if arguments.json:
        print(json.dumps(differences, indent=1))
    else:
        print(comparison_table(differences))
    return ExitCode.OK


def _report(arguments: argparse.Namespace) -> int:
    from pascaline.bench.html_report import write_page, write_report
    from pascaline.bench.results import load
    from pascaline.bench.results_table import results_table

    found = [load(folder) for folder in arguments.folders]
    documents = [results.document for results in found]
    if arguments.page is None:
        pages = [write_report(results) for results in found]
    else:
        write_page(arguments.page, documents)
        pages = [arguments.page]
    if arguments.json:
        print(json.dumps(documents if len(documents) > 1 else documents[0], indent=1))
    else:
        print("\n\n".join(map(results_table, documents)))
    for page in pages:
        print(f"report  {page}", file=sys.stderr)
    return ExitCode.OK


# --- values of flags --------------------------------------------------------------------------------------------------


def _whole_numbers(flag: str, text: str) -> list[int]:
    parts = text.split(",")
    if not all(re.fullmatch(r"\s*[0-9]{1,9}\s*", part) and int(part) > 0 for part in parts):
        raise ConfigurationError(f"{flag}: must be whole numbers above 0 with commas between, got {text!r}")
    return sorted({int(part) for part in parts})


def _sizes(arguments: argparse.Namespace) -> list[int]:
    """Return the batch sizes. With fewer requests than the batch size, a point would measure a smaller batch."""
    sizes = _whole_numbers("--sizes", arguments.sizes)
    if arguments.requests is not None and 1 <= arguments.requests < max(sizes):
        raise ConfigurationError(
            f"--requests: must be at least the largest of --sizes, which is {max(sizes)}, got {arguments.requests}"
        )
    return sizes


def _rates(text: str) -> list[float]:
    if not all(re.fullmatch(r"\s*\d*\.?\d+\s*", part) and float(part) > 0 for part in text.split(",")):
        raise ConfigurationError(f"--rates: must be numbers above 0 with commas between, got {text!r}")
    return sorted({float(part) for part in text.split(",")})


def _check_counts(arguments: argparse.Namespace) -> None:
    for flag, least, most in (("requests", 1, 10**6), ("repeats", 1, 1000), ("timeout", 0.1, 86400)):
        value = getattr(arguments, flag)
        if value is not None and not least <= value <= most:
            raise ConfigurationError(f"--{flag}: must be between {least} and {most}, got {value:g}")


def _given_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that were given as flags, to pass on to `pascaline serve`."""
    given = {key: getattr(arguments, key) for key, _ in setting_fields() if getattr(arguments, key, None) is not None}
    if chosen := sorted(given.keys() & _CHOSEN_HERE):
        flags = ", ".join(map(flag_of, chosen))
        raise ConfigurationError(f"{flags}: bench chooses free ports on loopback itself, must be left out")
    useless = sorted(given.keys() - _FACTS_OF_A_SERVER) if arguments.url else []
    if useless:
        flags = ", ".join(map(flag_of, useless))
        raise ConfigurationError(f"{flags}: cannot change the server of --url, must be left out")
    return given


def default_folder(kind: str, model: str, now: float) -> str:
    """Return the default name of the folder for results. now: Unix time."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", model)
    return f"bench-{kind}-{safe}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(now))}"


ACTIONS: dict[str, tuple[str, Any, Any]] = {
    "batch": ("measure 1, 2, 4, 8 concurrent requests", _add_batch, _batch),
    "context": ("measure long prompts, one at a time", _add_context, _context),
    "serve": ("measure requests that arrive at given rates", _add_serve, _serve),
    "quant": ("compare weight types: size, memory, quality, speed", _add_quant, _quant),
    "compare": ("show which differences between two results are significant", _add_compare, _compare),
    "report": ("print results and rewrite their report", _add_report, _report),
}
