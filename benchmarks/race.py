"""Races this project's engine against llama.cpp on one card and one file, and writes the ratios as JSON and as a page.

    python benchmarks/race.py MODEL.gguf --llama-bench PATH --llama-batched-bench PATH [--output FOLDER]
        [--prompts 512,2048,8192] [--requests 1,2,4,8,16,24,32] [--context 256] [--bits 16,8] [--llama-env NAME=VALUE]

Ours is SGLang in one process without HTTP (`engine_speed.py`), with each width of the activations in turn; a decode
step is started before the host has the last one's tokens, as SGLang's scheduler does. "default" is the width that
`pascaline serve` chooses for as many requests. Theirs is llama-bench for prompts and llama-batched-bench
for decode steps, each with and without flash attention, of which the faster counts. A number of requests with which
llama-batched-bench fails is run again without CUDA graphs and without --llama-env; the page says so. Both run one after
the other on the first visible card; nothing else should run on it. The page names card, driver, dates, llama.cpp's
build and every command. If one of them fails, what was measured is written, and the exit code says so.

So that a newer card stands in for a Pascal card, both programs must be Pascal code. Ours is: PTX for compute_61 by
default. docs/results/engine.md ("A race") says in words how a ggml that has no other path is built.
Exit codes: 0 done, 2 wrong arguments, 6 no GPU, 8 a program is missing, 10 a program failed (its last lines are shown).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pascaline.bench.svg_chart import Chart, Mark, Series, bar_chart

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

HERE = Path(__file__).parent
ANSWER_TOKENS = 64
WITHOUT_GRAPHS = {"GGML_CUDA_DISABLE_GRAPHS": "1"}
"""Tokens of each answer of llama-batched-bench."""
UBATCH = 512
"""llama.cpp's own default of tokens in one pass."""
FLASH_ATTENTION = ("on", "off")
SECONDS = 1800
"""Time limit of one program."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    """prompt or decode."""
    n: int
    """Tokens of the prompt, or requests that are decoded together."""
    ours: dict[int, float]
    """Bits of the activations -> tokens/s."""
    llama_cpp: float | None
    """Tokens/s; None if it was not measured."""
    default_bits: int | None = None
    """Bits that `pascaline serve` chooses for as many requests."""

    def ratio(self, bits: int) -> float | None:
        """Ours over theirs."""
        return self.ours[bits] / self.llama_cpp if bits in self.ours and self.llama_cpp else None

    @property
    def name(self) -> str:
        """What was timed, in words."""
        return f"prompt of {self.n}" if self.what == "prompt" else f"{self.n} request{'s' if self.n > 1 else ''}"


def fail(code: int, message: str) -> NoReturn:
    """End with one line on standard error."""
    sys.stderr.write(f"race: error: {message}\n")
    sys.exit(code)


def run(command: Sequence[str], environment: dict[str, str] | None = None, *, seconds: float = SECONDS) -> str:
    """Return a program's standard output; end the race if it fails."""
    text, error = attempt(command, environment or {}, seconds)
    if error:
        fail(10, error)
    return text


def shown(command: Sequence[str]) -> str:
    """Return a command line for the page: files by their names, since folders are this machine's."""
    return " ".join(Path(word).name if Path(word).is_absolute() else word for word in command)


def attempt(command: Sequence[str], environment: dict[str, str], seconds: float) -> tuple[str, str]:
    """Return a program's standard output, and why it failed or an empty string."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=seconds, env=os.environ | environment
        )
    except OSError as exc:
        fail(8, f"{command[0]} cannot be started: {exc.strerror}; name a built program")
    except subprocess.TimeoutExpired as exc:
        text = exc.stdout.decode(errors="replace") if isinstance(exc.stdout, bytes) else exc.stdout or ""
        return text, f"{command[0]} did not end within {seconds:g} s"
    if not done.returncode:
        return done.stdout, ""
    tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-8:])
    return done.stdout, f"{' '.join(command)} ended with exit code {done.returncode}:\n{tail}"


def read_llama_bench(text: str) -> dict[int, float]:
    """Return tokens of a prompt -> tokens/s, the fastest of all settings; from `llama-bench -o json`."""
    rows = json.loads(text[text.index("[") : text.rindex("]") + 1])
    return fastest((row["n_prompt"], row["avg_ts"]) for row in rows if row["n_prompt"] and not row["n_gen"])


def read_batched_bench(text: str) -> dict[int, float]:
    """Return requests -> tokens/s of all answers together; from `llama-batched-bench --output-format jsonl`."""
    rows = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return fastest((row["pl"], row["speed_tg"]) for row in rows)


def fastest(pairs: Iterable[tuple[int, float]]) -> dict[int, float]:
    """Return the largest value of each key."""
    best: dict[int, float] = {}
    for key, value in pairs:
        best[key] = max(value, best.get(key, 0.0))
    return best


def bench_command(args: argparse.Namespace) -> list[str]:
    """Return llama-bench's command line: prompts."""
    prompts, attention = ",".join(map(str, args.prompts)), ",".join("01"[value == "on"] for value in FLASH_ATTENTION)
    settings = ["-n", "0", "-ub", str(UBATCH), "-fa", attention, "-r", str(args.repetitions), "-o", "json"]
    return [args.llama_bench, "-m", str(args.model), "-ngl", "99", "-p", prompts, *settings]


def batched_command(args: argparse.Namespace, requests: Sequence[int], flash_attention: str) -> list[str]:
    """Return llama-batched-bench's command line: decode steps."""
    context = max(requests) * (args.context + ANSWER_TOKENS)
    return [
        *(args.llama_batched_bench, "-m", str(args.model), "-ngl", "99", "-c", str(context)),
        *("-npp", str(args.context), "-ntg", str(ANSWER_TOKENS), "-npl", ",".join(map(str, requests))),
        *("-ub", str(UBATCH), "-fa", flash_attention, "--output-format", "jsonl"),
    ]


@dataclass
class LlamaCpp:
    """What llama.cpp's programs reached."""

    speeds: dict[str, dict[int, float]]
    """prompt or decode -> number -> tokens/s."""
    commands: list[str]
    notes: list[str]


def run_llama_cpp(args: argparse.Namespace) -> LlamaCpp:
    """Run both programs with each setting."""
    found = LlamaCpp({"prompt": {}, "decode": {}}, [], [])
    if args.llama_bench:
        command = bench_command(args)
        found.commands.append(shown(command))
        text, error = attempt(command, args.llama_env, args.seconds)
        if error:
            found.notes.append(error)
        else:
            found.speeds["prompt"] = read_llama_bench(text)
    for value in FLASH_ATTENTION if args.llama_batched_bench else ():
        found.commands.append(shown(batched_command(args, args.requests, value)))
        speeds = decode_speeds(args, value, found.notes)
        found.speeds["decode"] = fastest([*found.speeds["decode"].items(), *speeds.items()])
    return found


def decode_speeds(args: argparse.Namespace, flash_attention: str, notes: list[str]) -> dict[int, float]:
    """Return requests -> tokens/s. Where the program fails, it is tried once without CUDA graphs."""
    left, found = sorted(args.requests), {}
    while left:
        text, error = attempt(batched_command(args, left, flash_attention), args.llama_env, args.seconds)
        found |= read_batched_bench(text)
        left = [n for n in left if n not in found]
        if not left:
            break
        # The program ends at the first number that it cannot do. Without any answer, nobody knows which that is.
        tried = left[:1] if found else left
        text, again = attempt(batched_command(args, tried, flash_attention), WITHOUT_GRAPHS, args.seconds)
        speeds = read_batched_bench(text)
        names = ", ".join(map(str, tried))
        notes.append(f"{names} requests, flash attention {flash_attention}: " + _one_line(error))
        notes.append(
            f"{names} requests: run without CUDA graphs" + (f", which failed: {_one_line(again)}" if again else "")
        )
        found |= speeds
        left = [n for n in left if n not in tried]
    return found


def _one_line(error: str) -> str:
    return " / ".join(error.splitlines()[:1] + error.splitlines()[-2:])


def run_ours(args: argparse.Namespace) -> tuple[dict[int, dict[str, dict[int, float]]], str]:
    """Return bits -> prompt or decode -> number -> tokens/s of SGLang in one process, and what failed."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "ours.json"
        command = [
            *(sys.executable, str(HERE / "engine_speed.py"), str(args.model), "--json", str(path)),
            *("--prompts", ",".join(map(str, args.prompts)), "--batches", ",".join(map(str, args.requests))),
            *("--bits", ",".join(map(str, args.bits)), "--context", str(args.context)),
            *("--context-length", str(max(args.prompts) + 1024), "--max-running-requests", str(max(args.requests))),
            *("--max-total-tokens", str(max(max(args.requests) * (args.context + 128), max(args.prompts) + 128))),
        ]
        _, error = attempt(command, {}, args.seconds)
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    names = {"prompt": "prefill_tokens_per_second", "decode": "decode_tokens_per_second"}
    return {
        bits: {
            what: {int(n): value for n, value in found[f"bits_{bits}"][name].items()} for what, name in names.items()
        }
        for bits in args.bits
        if f"bits_{bits}" in found
    }, error


def default_bits(model: Path, requests: int) -> tuple[int | None, int | None]:
    """Return the bits of prompts and of decode steps that `pascaline serve` chooses on a GPU."""
    from pascaline.engines.sglang.activations import activation_bits
    from pascaline.models.gguf import read_gguf
    from pascaline.settings import Settings

    settings = Settings(model=str(model), max_running_requests=requests)
    return activation_bits(settings, read_gguf(model), device="cuda")


def table(
    ours: dict[int, dict[str, dict[int, float]]],
    theirs: dict[str, dict[int, float]],
    wanted: dict[str, list[int]],
    default: Callable[[str, int], int | None] = lambda _what, _n: None,
) -> list[Row]:
    """Join what both reached. ours: by bits, kind and number; theirs: by kind and number; default: bits for a row."""
    return [
        Row(
            what,
            n,
            {bits: found[what][n] for bits, found in ours.items() if n in found[what]},
            theirs.get(what, {}).get(n),
            default(what, n),
        )
        for what, numbers in wanted.items()
        for n in numbers
    ]


def findings(rows: list[Row], bits: Sequence[int]) -> list[str]:
    """Return the results, a sentence for each width; a width that nothing is compared with has none."""
    found = []
    for width in bits:
        ratios = [(ratio, row.name) for row in rows if (ratio := row.ratio(width)) is not None]
        if ratios:
            faster = sum(ratio > 1 for ratio, _ in ratios)
            (low, slowest), (high, fastest_row) = min(ratios), max(ratios)
            found.append(
                f"With activations of {width} bits {faster} of {len(ratios)} rows are faster than llama.cpp: "
                f"from {low:.2f} times its speed ({slowest}) to {high:.2f} times ({fastest_row})."
            )
    return found


def chart(rows: list[Row], bits: Sequence[int]) -> str:
    """Return the ratios as SVG; empty if nothing is compared."""
    series = [
        Series(
            f"ours, {width} bits", [Mark(place, ratio) for place, row in enumerate(rows) if (ratio := row.ratio(width))]
        )
        for width in bits
    ]
    names = [f"{row.n}{' tokens' if row.what == 'prompt' else ''}" for row in rows]
    drawn = [each for each in series if each.marks]
    title = Chart("Speed beside llama.cpp's, which is 1", "tokens of a prompt, then requests", "ratio", drawn, names)
    return bar_chart(title) if drawn else ""


def as_markdown(rows: list[Row], bits: Sequence[int], facts: dict[str, Any], picture: str = "") -> str:
    """Return the page. picture: file name of the chart, beside the page."""
    head = [
        "tok/s",
        *(f"ours, {width} bits" for width in bits),
        "llama.cpp",
        *(f"ratio, {width} bits" for width in bits),
        "default",
        "ratio",
    ]
    lines = [
        f"# A race on an {facts['card']}",
        "",
        f"`python benchmarks/race.py {facts['model']}`, {facts['date']}, driver {facts['driver']}, "
        f"llama.cpp {facts['llama_cpp']}. "
        "More than 1 is faster than llama.cpp, of whose settings the fastest counts."
        + ("" if facts["is_pascal"] else " **This is no Pascal card.**"),
        "",
        *findings(rows, bits),
        *(["", f"![Ratios to llama.cpp's speed]({picture})"] if picture else []),
        "",
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
    ]
    for row in rows:
        cells = [row.name, *(_cell(row.ours.get(width)) for width in bits), _cell(row.llama_cpp)]
        chosen = row.default_bits
        default = ["" if chosen is None else f"{chosen} bits", _cell(row.ratio(chosen), 2) if chosen else ""]
        lines.append("| " + " | ".join([*cells, *(_cell(row.ratio(width), 2) for width in bits), *default]) + " |")
    if facts.get("notes"):
        lines += ["", "What failed:", "", *(f"- {note}" for note in facts["notes"])]
    return "\n".join([*lines, "", "Commands of llama.cpp:", "", *(f"    {line}" for line in facts["commands"])]) + "\n"


def _cell(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def card_facts() -> dict[str, Any]:
    """Return the first card's name and driver, from nvidia-smi."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader", "--id=0"]
    try:
        text = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        fail(6, "no NVIDIA GPU is visible; run it where nvidia-smi lists one")
    name, driver, capability = text.split(", ")
    return {"card": name, "driver": driver, "is_pascal": capability.startswith("6.")}


def build_of(program: str | None) -> str:
    """Return llama.cpp's own words about its build."""
    if program is None:
        return "not run"
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False, timeout=60)
    except OSError as exc:
        fail(8, f"{program} cannot be started: {exc.strerror}; name a built program")
    found = re.search(r"version: (.+)", done.stdout + done.stderr)
    return found[1] if found else "of unknown version"


def numbers(text: str) -> list[int]:
    """Read `1,2,4`."""
    return [int(part) for part in text.split(",")]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--llama-bench", metavar="PATH", help="the program; without it prompts have no ratio")
    parser.add_argument(
        "--llama-batched-bench", metavar="PATH", help="the program; without it decode steps have no ratio"
    )
    parser.add_argument("--prompts", type=numbers, default=[512, 2048, 8192], help="tokens (default: 512,2048,8192)")
    parser.add_argument("--requests", type=numbers, default=[1, 2, 4, 8, 16, 24, 32], help="default: 1,2,4,8,16,24,32")
    parser.add_argument(
        "--context", type=int, default=256, help="tokens before the decode steps (default: %(default)s)"
    )
    parser.add_argument("--bits", type=numbers, default=[16, 8], help="of the activations (default: 16,8)")
    parser.add_argument("--repetitions", type=int, default=3, help="of llama-bench (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="limit of one program (default: %(default)s)")
    parser.add_argument(
        "--llama-env", metavar="NAME=VALUE", action="append", default=[], help="variable of llama.cpp's programs"
    )
    parser.add_argument("--name", help="of the model in the names of the files (default: the file's)")
    parser.add_argument("--output", metavar="FOLDER", type=Path, default=HERE.parent / "docs" / "results")
    args = parser.parse_args(arguments)
    if not args.model.is_file():
        parser.error(f"there is no file {args.model}")
    if wrong := [text for text in args.llama_env if "=" not in text]:
        parser.error(f"--llama-env: {wrong[0]!r} must be NAME=VALUE")
    args.llama_env = dict(text.split("=", 1) for text in args.llama_env)
    args.name = args.name or args.model.stem
    return args


def main(arguments: Sequence[str]) -> int:
    """Run both and write the result after each."""
    args = parse(arguments)
    facts = card_facts()
    facts |= {
        "model": args.model.name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "llama_cpp": build_of(args.llama_batched_bench or args.llama_bench),
        "llama_env": args.llama_env,
    }
    theirs = run_llama_cpp(args)
    facts |= {"commands": theirs.commands, "notes": theirs.notes}
    write(args, facts, {}, theirs)
    ours, error = run_ours(args)
    if error:
        theirs.notes.append(f"ours: {error}")
    sys.stdout.write(write(args, facts, ours, theirs))
    complete = set(ours) == set(args.bits) and not error
    if not complete:
        sys.stderr.write(f"race: error: {error or 'a width is missing'}\n")
    return 0 if complete else 10


def write(
    args: argparse.Namespace,
    facts: dict[str, Any],
    ours: dict[int, dict[str, dict[int, float]]],
    theirs: LlamaCpp,
) -> str:
    """Write JSON, picture and page; return the page."""
    chosen = {n: default_bits(args.model, n) for n in (1, *args.requests)}
    rows = table(
        ours,
        theirs.speeds,
        {"prompt": args.prompts, "decode": args.requests},
        lambda what, n: chosen[1][0] if what == "prompt" else chosen[n][1],
    )
    name = "-".join(re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") for text in ("race", facts["card"], args.name))
    args.output.mkdir(parents=True, exist_ok=True)
    picture = chart(rows, args.bits)
    if picture:
        (args.output / f"{name}.svg").write_text(picture, encoding="utf-8")
    page = as_markdown(rows, args.bits, facts, f"{name}.svg" if picture else "")
    (args.output / f"{name}.md").write_text(page, encoding="utf-8")
    content = facts | {"rows": [asdict(row) for row in rows]}
    (args.output / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return page


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
