"""Looks for races between steps of SGLang's overlap scheduler: many mixed requests must get what each gets alone.

    python benchmarks/overlap_stress.py MODEL.gguf [FILE.json] [--seconds 240] [--engines 4] [--no-barrier]
    python benchmarks/overlap_stress.py small [FILE.json] …      a random model of four layers: more steps

The scheduler prepares a step while the last one still computes; without a barrier its writes may reach what that one
reads. Each engine answers 48 greedy requests one by one, then the same ones in random order from 24 clients: prompts of
3 to 900 tokens in chunks of 512, answers of 4 to 96 tokens, every seventh hung up in the middle, requests retracted
every 40th step and whenever the small KV cache is full. An answer must have the tokens that it had alone. A retracted
request's tokens are computed again by the kernels of a prompt, which round otherwise: a difference where the two best
tokens had almost the same probability is counted as a tie.

Exit codes: 0 all answers the same but for ties, 1 an answer differs or an engine failed, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import random
import signal
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import httpx
import numpy as np
from kernel_names import ENTRY_POINTS, METADATA, Engine, environment, prompt, wait_until_ready
from server_process import process
from support.models import tiny, write_gguf
from support.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

REQUESTS, CLIENTS, HUNG_UP = 48, 24, 7
LONGEST_PROMPT, LONGEST_ANSWER, CHUNK, KV_TOKENS, RETRACTED_EVERY = 900, 96, 512, 6000, 40
TIE = 0.05
"""Difference of two log-probabilities, natural logarithm, that float16 activations may turn round."""
SMALL = "small"
SMALL_SCALE, SMALL_OUTPUT_SCALE = 3, 12
"""Factors of write_gguf's random weights: every layer counts, and the best token is clearly the best."""
READY_SECONDS = {"cuda": 240, "cpu": 900}
COUNTER = '''
"""A plugin of SGLang for one measurement: counts a scheduler's steps and retracted requests in a file."""
import mmap, os, struct

def register():
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    with open(os.environ["OVERLAP_COUNTS"], "r+b") as file:
        page = mmap.mmap(file.fileno(), 16)

    def add(place, number):
        struct.pack_into("q", page, place, struct.unpack_from("q", page, place)[0] + number)

    def run(original, *arguments, **named):
        add(0, 1)
        return original(*arguments, **named)

    def retract(original, *arguments, **named):
        result = original(*arguments, **named)
        add(8, len(result[0]))
        return result

    HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.run_batch", run, HookType.AROUND)
    batch = "sglang.srt.managers.schedule_batch.ScheduleBatch"
    HookRegistry.register(f"{batch}.retract_decode", retract, HookType.AROUND)
'''


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL.gguf", help=f"or {SMALL}")
    parser.add_argument("output", type=Path, nargs="?", default=Path("overlap-stress.json"), metavar="FILE.json")
    parser.add_argument("--seconds", type=float, default=240, help="of mixed requests (default: 240)")
    parser.add_argument("--engines", type=int, default=1, metavar="N", help="at once on one card (default: 1)")
    parser.add_argument("--no-barrier", action="store_true", help="as SGLang serves where is_cuda() is False")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--logs", type=Path, help="folder for the engines' logs")
    args = parser.parse_args()
    if not args.model.is_file() and str(args.model) != SMALL:
        parser.error(f"there is no file {args.model}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # each process then ends its engine
    with ProcessPoolExecutor(args.engines) as pool:  # an engine's clients take most of a core
        # Processes of one fork could draw the same port, and all their clients would then reach one engine.
        ports = [free_port() for _ in range(args.engines)]
        engines = list(pool.map(functools.partial(one_engine, args), range(args.engines), ports))
    together: Counter[str] = Counter()
    for each in engines:
        together.update({name: value for name, value in each.items() if isinstance(value, int)})
    where = environment(args.device)
    found = where | {
        "model": args.model.stem,
        "barrier": not args.no_barrier,
        "together": dict(together),
        "engines": engines,
    }
    args.output.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{where['card']}: {dict(together)}")
    return 1 if together["different"] or any("error" in each for each in engines) else 0


def one_engine(args: argparse.Namespace, seed: int, port: int) -> dict[str, Any]:
    """Run one engine to its end. Returns counts; `error` if it failed."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "engine.log"
        try:
            with running(args, Path(folder), log, port) as (engine, counts):
                alone = [answer_alone(engine, number) for number in range(REQUESTS)]
                leads = sorted(lead for _, each in alone for lead in each)
                found |= {"tokens alone": len(leads), "of them near a tie": sum(lead < TIE for lead in leads)}
                found["median lead"] = round(leads[len(leads) // 2], 3)
                before = read(counts)
                found |= stress(engine, alone, args.seconds, seed)
                steps, retracted = (after - first for after, first in zip(read(counts), before, strict=True))
                found |= {"steps": steps, "retracted": retracted}
                if not steps:
                    found["error"] = "its scheduler made no step: the requests went elsewhere"
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {error}"[:600]
        if args.logs and log.is_file():
            (args.logs / f"overlap-{seed}.log").write_text(log.read_text(errors="replace")[-20000:])
    return found


@contextlib.contextmanager
def running(args: argparse.Namespace, folder: Path, log: Path, port: int) -> Iterator[tuple[Engine, Path]]:
    """Start SGLang with the counter; yield it and the file of its counts."""
    from sglang_pascal.checkpoint.prepare import prepare

    small = str(args.model) == SMALL
    prepare(write_small(folder / "small.gguf") if small else args.model, folder / "model")
    information, counts = folder / "plugin/overlap-0.dist-info", folder / "counts"
    information.mkdir(parents=True)
    (folder / "plugin/kernel_names_recorder.py").write_text(COUNTER)
    (information / "METADATA").write_text(METADATA)
    (information / "entry_points.txt").write_text(ENTRY_POINTS)
    counts.write_bytes(bytes(16))
    chosen = {
        "SGLANG_PLATFORM": "pascal",
        "HF_HUB_OFFLINE": "1",
        "SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND": "python",
        "SGLANG_TEST_RETRACT": "1",
        "SGLANG_TEST_RETRACT_INTERVAL": str(RETRACTED_EVERY),
        "OVERLAP_COUNTS": str(counts),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(folder / "plugin"), os.environ.get("PYTHONPATH")])),
    }
    if args.no_barrier:
        chosen["SGLANG_ENABLE_WAR_BARRIER"] = "0"
    if args.device == "cpu":
        chosen["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(folder / "model")]
    command += ["--load-format", "pascal_gguf", "--device", args.device, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--context-length", "2048", "--mem-fraction-static", "0.1", "--max-total-tokens", str(KV_TOKENS)]
    command += ["--max-running-requests", "16", "--chunked-prefill-size", str(CHUNK), "--log-level-http", "warning"]
    command += ["--skip-tokenizer-init"]  # requests and answers are token ids: the scheduler is what is to be busy
    with (
        process(command, log, os.environ | chosen, patience=5) as server,
        httpx.Client(
            base_url=f"http://127.0.0.1:{port}",
            timeout=300,
            trust_env=False,
            limits=httpx.Limits(max_connections=2 * CLIENTS),
        ) as client,
    ):
        wait_until_ready(server, client, log, READY_SECONDS[args.device])
        yield Engine(f"http://127.0.0.1:{port}", client), counts


def write_small(path: Path) -> Path:
    """Write a model of four layers whose answers depend on the whole prompt."""
    write_gguf(path, tiny("llama", num_heads=4, num_kv_heads=2, head_dim=64), "Q8_0")
    for tensor in gguf.GGUFReader(path, "r+").tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0:
            blocks = tensor.data.reshape(-1, 34)  # one scale in half precision, 32 weights
            scales = np.ascontiguousarray(blocks[:, :2]).view(np.float16)
            scales *= SMALL_OUTPUT_SCALE if tensor.name == "output.weight" else SMALL_SCALE
            blocks[:, :2] = scales.view(np.uint8)
    return path


def read(counts: Path) -> tuple[int, int]:
    """Return steps and retracted requests so far."""
    steps, retracted = struct.unpack("2q", counts.read_bytes())
    return steps, retracted


def shape(number: int) -> tuple[list[int], int]:
    """Return the prompt and the length of the answer of a request."""
    chooser = random.Random(number)
    length = round(3 * (LONGEST_PROMPT / 3) ** chooser.random())
    return prompt(length, number), chooser.randint(4, LONGEST_ANSWER)


def answer_alone(engine: Engine, number: int) -> tuple[list[int], list[float]]:
    """Return a request's tokens, and by how much the best of each beat the second (natural logarithm)."""
    ids, n_tokens = shape(number)
    answer = engine.generate(ids, n_tokens, {"return_logprob": True, "top_logprobs_num": 2})
    best = answer["meta_info"]["output_top_logprobs"]
    return answer["output_ids"], [first[0] - second[0] for first, second in best]


def stress(engine: Engine, alone: list[tuple[list[int], list[float]]], seconds: float, seed: int) -> dict[str, Any]:
    """Send requests from all clients for a time. Returns counts and the first differences."""
    counts: Counter[str] = Counter(different=0, ties=0)
    examples: list[dict[str, Any]] = []
    lock, end = threading.Lock(), time.monotonic() + seconds

    def client(index: int) -> None:
        chooser = random.Random(1000 * seed + index)
        while time.monotonic() < end:
            number = chooser.randrange(REQUESTS)
            outcome, example = ask(engine, number, alone[number], hangs_up=chooser.randrange(HUNG_UP) == 0)
            with lock:
                counts[outcome] += 1
                if example and len(examples) < 20:
                    examples.append(example)

    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(client, range(CLIENTS)))
    return {**counts, "examples": examples}


def ask(
    engine: Engine, number: int, expected: tuple[list[int], list[float]], *, hangs_up: bool
) -> tuple[str, dict[str, Any] | None]:
    """Send one request; return what became of it, and the place where its answer differs."""
    ids, n_tokens = shape(number)
    if hangs_up:
        sampling = {"temperature": 0, "max_new_tokens": n_tokens, "ignore_eos": True}
        engine.stream({"input_ids": ids, "sampling_params": sampling}, "/generate", lines=n_tokens // 2)
        return "hung up", None
    tokens, (alone, leads) = engine.generate(ids, n_tokens)["output_ids"], expected
    if tokens == alone:
        return "same", None
    place = next((n for n, (a, b) in enumerate(zip(tokens, alone, strict=False)) if a != b), len(tokens))
    lead = leads[place] if place < len(leads) else None
    example = {"request": number, "prompt": len(ids), "place": place, "lead": lead, "got": tokens[place : place + 4]}
    return ("ties" if lead is not None and lead < TIE else "different"), example


if __name__ == "__main__":
    sys.exit(main())
