"""Measures a model in SGLang on this device: loading, memory, prefill, and decode by batch size.

    python benchmarks/engine_speed.py MODEL.gguf [--device cuda] [--memory-gib 7.5] [--torch-only] [--json FILE] [FLAGS]

One request per row of a batch, without HTTP and without the scheduler. `--memory-gib` limits torch's allocations, as on
a smaller card. `--torch-only` serves the same file without our kernels: weights dequantised to float16, attention in
plain torch. FLAGS are SGLang's. Times are medians; a decode step includes the choice of the next token.
On a GPU, launched Triton kernels are counted by name: on a Pascal card there are none. Exit code 1 if reading the
weights took more than 1.5 GiB of the host's memory above the mapped file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_in_process import InProcessEngine
from sglang_pascal.checkpoint.prepare import prepare

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

BATCHES = (1, 2, 4, 8, 16)
DECODE_STEPS = 64
PREFILL_TOKENS = (128, 512, 2048)
HOST_LIMIT_BYTES = 3 * 2**29
"""Most host memory above the mapped file that reading weights to a GPU may take."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument(
        "--context", type=int, default=256, help="tokens before the decode steps (default: %(default)s)"
    )
    for name, default in (("--batches", BATCHES), ("--prompts", PREFILL_TOKENS)):
        text = "requests that decode together" if name == "--batches" else "tokens of the prompts"
        words = ",".join(map(str, default))
        parser.add_argument(name, type=_numbers, default=default, metavar="N,N", help=f"{text} (default: {words})")
    parser.add_argument("--memory-gib", type=float, help="most that torch may allocate")
    parser.add_argument("--torch-only", action="store_true", help="float16 weights and attention in plain torch")
    parser.add_argument("--json", type=Path, help="also write the results there")
    args, args.flags = parser.parse_known_args(arguments)
    return args


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def main(arguments: Sequence[str]) -> int:
    """Measure and print."""
    args = parse(arguments)
    import torch

    on_cuda = args.device == "cuda"
    if on_cuda and args.memory_gib:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(args.memory_gib * 2**30 / total)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        prepare(args.model, folder)
        launches = _count_triton_launches() if on_cuda else Counter[str]()
        start = time.monotonic()
        flags = ["--device", args.device, "--random-seed", "1", *args.flags]
        if args.torch_only:
            flags += ["--attention-backend", "pascal_torch"]
        engine = InProcessEngine(folder, *flags, quantized=not args.torch_only)
        results: dict[str, Any] = {
            "model": args.model.name,
            "device": torch.cuda.get_device_name() if on_cuda else "cpu",
            "flags": args.flags,
            "file_bytes": args.model.stat().st_size,
            "ready_seconds": round(time.monotonic() - start, 2),
            "import_seconds": round(engine.import_seconds, 2),
            "weights_seconds": round(engine.weights_seconds, 2),
            "weights_host_bytes": engine.weights_host_bytes,
            "torch_only": args.torch_only,
            "max_total_tokens": engine.runner.max_total_num_tokens,
        }
        _measure(engine, args, results)
    if on_cuda:
        results["peak_bytes"] = torch.cuda.max_memory_allocated()
        results["reserved_bytes"] = torch.cuda.max_memory_reserved()
    results["triton_launches"] = dict(launches)
    print(json.dumps(results, indent=2))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    above = engine.weights_host_bytes - results["file_bytes"]
    if on_cuda and above > HOST_LIMIT_BYTES:
        sys.stderr.write(
            f"engine_speed: error: reading the weights took {above / 2**30:.2f} GiB of host memory above the mapped "
            f"file, must be at most {HOST_LIMIT_BYTES / 2**30:g}\n"
        )
        return 1
    return 0


def _count_triton_launches() -> Counter[str]:
    """Return a counter: name of a Triton kernel -> number of launches from now on."""
    from triton.runtime.jit import JITFunction

    counts: Counter[str] = Counter()
    run = JITFunction.run

    def counted(self: Any, *arguments: Any, **named: Any) -> Any:
        counts[self.fn.__name__] += 1
        return run(self, *arguments, **named)

    JITFunction.run = counted
    return counts


def _measure(engine: InProcessEngine, args: argparse.Namespace, results: dict[str, Any]) -> None:
    wait = _waiter(args.device)
    results["prefill_tokens_per_second"] = {n: round(_prefill(engine, n, wait), 1) for n in args.prompts}
    results["decode_tokens_per_second"] = {
        n: round(n / _decode(engine, n, args.context, wait), 1)
        for n in args.batches
        if n * (args.context + DECODE_STEPS) <= results["max_total_tokens"]
    }
    if args.device == "cuda":
        results["host_waits_in_a_decode_step"] = _host_waits(engine, args.context)


def _host_waits(engine: InProcessEngine, context: int) -> dict[str, int]:
    """Return where the host waits for the device in one decode step: source line -> number of waits."""
    import torch

    logits, batch = engine.prefill([_prompt(engine, context, 0)])
    engine.decode(logits.argmax(-1), batch)
    tokens = logits.argmax(-1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            engine.decode(tokens, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        engine.clear()
    return dict(Counter(f"{warning.filename}:{warning.lineno}" for warning in caught))


def _prefill(engine: InProcessEngine, n_tokens: int, wait: Callable[[], None]) -> float:
    """Return the tokens per second of one request."""
    seconds = []
    for repeat in range(4):
        wait()
        start = time.monotonic()
        engine.prefill([_prompt(engine, n_tokens, repeat)])
        wait()
        seconds.append(time.monotonic() - start)
        engine.clear()
    return n_tokens / statistics.median(seconds[1:])


def _decode(engine: InProcessEngine, batch_size: int, context: int, wait: Callable[[], None]) -> float:
    """Return the seconds per step."""
    logits, batch = engine.prefill([_prompt(engine, context, seed) for seed in range(batch_size)])
    seconds = []
    for _ in range(DECODE_STEPS):
        start = time.monotonic()
        logits = engine.decode(logits.argmax(-1), batch)
        wait()
        seconds.append(time.monotonic() - start)
    engine.clear()
    return statistics.median(seconds)


def _prompt(engine: InProcessEngine, n_tokens: int, seed: int) -> list[int]:
    import random

    vocabulary = engine.runner.model_config.vocab_size
    return random.Random(seed).choices(range(min(300, vocabulary // 2), min(20000, vocabulary)), k=n_tokens)


def _waiter(device: str) -> Callable[[], None]:
    import torch

    return torch.cuda.synchronize if device == "cuda" else lambda: None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
