"""Checks whether `pascaline serve` keeps its plan on an 8 GB card: memory, and requests of the whole context.

    python benchmarks/serve_in_8_gb.py MODEL.gguf [--device cuda] [--requests 4] [--tokens 4096] [--json FILE]

The server is started as a user starts it, with an int8 KV cache for the requests. On a larger card, torch may allocate
only what a Tesla P4 has. The CUDA context is larger there, and no plan can know its size, so it counts with the plan's
size. Exit code 1 if the server did not become ready, a request was not answered completely, or the device holds more
than the plan says.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.instance import Instance, running

CARD_BYTES = 7.6 * 2**30
"""Memory of a Tesla P4, as its driver reports it."""
CONTEXT_BYTES = 0.2 * 2**30
"""Size of a CUDA context, which torch does not count."""
SPARE_TOKENS = 64
"""Tokens of the context length beyond a request."""
ANSWER_TOKENS = 96
START_SECONDS = 300
REQUEST_SECONDS = 240


def main() -> int:
    """Serve, ask, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--requests", type=int, default=4, help="concurrent requests (default: 4)")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of each, answer included (default: 4096)")
    parser.add_argument("--json", type=Path, help="also write the results there")
    args = parser.parse_args()
    if not args.model.is_file():
        parser.error(f"there is no file {args.model}")
    if args.tokens <= ANSWER_TOKENS:
        parser.error(f"--tokens must be more than the {ANSWER_TOKENS} of the answer, got {args.tokens}")
    results = {"model": args.model.name, "device": args.device, **measure(args)}
    print(json.dumps(results, indent=2))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0 if results["kept"] else 1


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the results."""
    on_cuda = args.device == "cuda"
    before = device_bytes() if on_cuda else 0
    context = context_bytes() if on_cuda else 0
    start = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        running(
            Path(folder),
            environment=environment(on_cuda=on_cuda),
            model=args.model.resolve(),
            device=args.device,
            context_length=args.tokens + SPARE_TOKENS,
            max_running_requests=args.requests,
            kv_cache__dtype="int8",
            kv_cache__max_tokens=args.requests * (args.tokens + SPARE_TOKENS),
            start_timeout=START_SECONDS,
            drain_timeout=10,
        ) as server,
    ):
        server.wait_for_state("ready", seconds=START_SECONDS)
        ready = time.monotonic() - start
        plan = server.agent("/plan").json
        idle = device_bytes() - before if on_cuda else 0
        answers, seconds = ask_all(server, args.requests, args.tokens)
        busy = device_bytes() - before if on_cuda else 0
        code = server.stop()
    whole = all(answer == [200, args.tokens - ANSWER_TOKENS, ANSWER_TOKENS] for answer in answers)
    parts = {part["name"]: part["bytes"] for part in plan["parts"]}
    beyond = max(0, context - parts.get("CUDA context", 0))
    fits = busy - beyond <= min(plan["total_bytes"], CARD_BYTES)
    return {
        "ready_seconds": round(ready, 1),
        "plan_bytes": plan["total_bytes"],
        "plan_parts": parts,
        "context_bytes": context,
        "device_bytes_when_ready": idle,
        "device_bytes_after_requests": busy,
        "card_bytes": int(CARD_BYTES),
        "answers": answers,
        "seconds": round(seconds, 2),
        "exit_code": code,
        "kept": whole and fits and code == 0,
    }


def environment(*, on_cuda: bool) -> dict[str, str]:
    """Return the server's variables: the device that it sees, and how much of it."""
    if not on_cuda:
        return {"CUDA_VISIBLE_DEVICES": ""}
    import torch

    share = (CARD_BYTES - CONTEXT_BYTES) / torch.cuda.get_device_properties(0).total_memory
    limit = f"per_process_memory_fraction:{min(1.0, share):.6f}"
    return {"CUDA_VISIBLE_DEVICES": "0"} | ({"PYTORCH_CUDA_ALLOC_CONF": limit} if share < 1 else {})


def device_bytes() -> int:
    """Return the bytes in use on the first card, by its driver."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) * 2**20


def context_bytes() -> int:
    """Return the bytes that a process which only uses torch holds on the first card."""
    code = "import sys, torch; torch.zeros(1, device='cuda'); print('ready', flush=True); sys.stdin.read()"
    before = device_bytes()
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        used = device_bytes() - before
        process.communicate()
    return used


def ask_all(server: Instance, n: int, tokens: int) -> tuple[list[list[int]], float]:
    """Send all requests together; return status, prompt tokens and answer tokens of each, and the seconds for all."""
    start = time.monotonic()
    with ThreadPoolExecutor(n) as pool:
        answers = list(pool.map(lambda number: ask(server, number, tokens), range(n)))
    return answers, time.monotonic() - start


def ask(server: Instance, number: int, tokens: int) -> list[int]:
    """Send one request, whose prompt differs from all others from the first token on."""
    prompt = [(7 * number + 13 * i) % 250 + 3 for i in range(tokens - ANSWER_TOKENS)]
    body = {"model": "default", "prompt": prompt, "max_tokens": ANSWER_TOKENS, "temperature": 0, "ignore_eos": True}
    answer = server.api("/v1/completions", body, timeout=REQUEST_SECONDS)
    usage = answer.json.get("usage", {})
    return [answer.status, usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)]


if __name__ == "__main__":
    sys.exit(main())
