"""Measures a model in SGLang on this device: loading, memory, prefill, and decode by batch size.

    python benchmarks/engine_speed.py MODEL.gguf [--device cuda] [--memory-gib 7.5] [--torch-only] [--bits 16,8]
        [--json FILE] [FLAGS]

One request per row of a batch, without HTTP and without the scheduler. `--memory-gib` limits torch's allocations, as on
a smaller card. `--torch-only` serves the same file without our kernels: weights dequantised to float16, attention in
plain torch. `--bits` measures each width of the activations in turn. FLAGS are SGLang's. Times are medians; a decode
step includes the choice of the next token, and is timed as SGLang's scheduler runs it: on a GPU the next step begins
before the host has the tokens of the last one. `decode_host_milliseconds` is what the host needs to start a step; it
counts only where a step of the device takes less. Batches of similar size are the same requests, of which some end: the
smaller ones have up to 96 more tokens before them.
On a GPU, launched Triton kernels are counted by name: on a Pascal card there are none. Exit code 1 if reading the
weights took more than 1.5 GiB of the host's memory above the mapped file.
"""

from __future__ import annotations

import argparse
import json
import operator
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sglang_in_process import InProcessEngine
from sglang_pascal.checkpoint.prepare import prepare
from sglang_pascal.names import DECODE_BITS_VARIABLE, PREFILL_BITS_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

BATCHES = (1, 2, 4, 8, 16)
DECODE_STEPS = 24
GROUP = 4
"""Batches that are the same requests."""
REPEATS = 3
"""Measured prompts of each length, after one that is not."""
PREFILL_TOKENS = (128, 512, 2048)
BITS_VARIABLES = (PREFILL_BITS_VARIABLE, DECODE_BITS_VARIABLE)
HOST_LIMIT_BYTES = 3 * 2**29
"""Most host memory above the mapped file that reading weights to a GPU may take."""


class Step(NamedTuple):
    """Medians of a decode step."""

    seconds: float
    """From one step's tokens on the host to the next one's."""
    host_seconds: float
    """What the host needs to start one."""


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
    parser.add_argument(
        "--bits", type=_numbers, default=(), metavar="N,N", help="of the activations (default: configured)"
    )
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
        if args.bits:
            os.environ |= dict.fromkeys(BITS_VARIABLES, str(args.bits[0]))
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
        for bits in args.bits:
            _set_bits(engine, bits)
            results[f"bits_{bits}"] = _speeds(engine, args)
            _write(args.json, results)
        if not args.bits:
            results |= _speeds(engine, args)
        if on_cuda:
            results["host_waits_in_a_decode_step"] = _host_waits(engine, args.context)
    if on_cuda:
        results["peak_bytes"] = torch.cuda.max_memory_allocated()
        results["reserved_bytes"] = torch.cuda.max_memory_reserved()
    results["triton_launches"] = dict(launches)
    print(json.dumps(results, indent=2))
    _write(args.json, results)
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


def _write(path: Path | None, results: dict[str, Any]) -> None:
    if path:
        path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _set_bits(engine: InProcessEngine, bits: int) -> None:
    """Set the width of activations, 8 or 16 bits, and record the decode steps again."""
    from sglang_pascal.quantization.precision import activation_bits

    if any(activation_bits(variable) != bits for variable in BITS_VARIABLES):
        os.environ |= dict.fromkeys(BITS_VARIABLES, str(bits))
        activation_bits.cache_clear()
        engine.runner.init_cuda_graphs()


def _speeds(engine: InProcessEngine, args: argparse.Namespace) -> dict[str, dict[int, float]]:
    """Return tokens/s of prompts, by their length, and of decode steps, by the number of requests."""
    wait, room = _waiter(args.device), engine.runner.max_total_num_tokens
    batches = sorted((n for n in args.batches if n * (args.context + GROUP * DECODE_STEPS) <= room), reverse=True)
    decoded: dict[int, Step] = {}
    for first in range(0, len(batches), GROUP):
        decoded |= _decode(engine, batches[first : first + GROUP], args.context)
    return {
        "prefill_tokens_per_second": {n: round(_prefill(engine, n, wait), 1) for n in args.prompts},
        "decode_tokens_per_second": {n: round(n / decoded[n].seconds, 1) for n in sorted(decoded)},
        "decode_host_milliseconds": {n: round(decoded[n].host_seconds * 1e3, 3) for n in sorted(decoded)},
    }


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
    for repeat in range(REPEATS + 1):
        wait()
        start = time.monotonic()
        engine.prefill([_prompt(engine, n_tokens, repeat)])
        wait()
        seconds.append(time.monotonic() - start)
        engine.clear()
    return n_tokens / statistics.median(seconds[1:])


def _decode(engine: InProcessEngine, sizes: Sequence[int], context: int) -> dict[int, Step]:
    """Return the step of batches, the largest first; the smaller ones are some of its requests."""
    logits, batch = engine.prefill([_prompt(engine, context, seed) for seed in range(sizes[0])])
    tokens, found = logits.argmax(-1), {}
    for size in sizes:
        batch.filter_batch(keep_indices=list(range(size)))
        tokens, found[size] = _steps(engine, tokens[:size], batch)
    engine.clear()
    return found


def _steps(engine: InProcessEngine, tokens: torch.Tensor, batch: Any) -> tuple[torch.Tensor, Step]:
    """Decode; return the last tokens and the step's times: the host fetches a step's tokens once the next one began."""
    host: list[float] = []
    ends: list[float] = []
    fetched: Callable[[], object] | None = None
    for _ in range(DECODE_STEPS):
        start = time.monotonic()
        tokens = engine.step(tokens, batch)
        host.append(time.monotonic() - start)
        before, fetched = fetched, _fetch(tokens)
        if before:
            before()
            ends.append(time.monotonic())
    return tokens, Step(statistics.median(map(operator.sub, ends[1:], ends)), statistics.median(host))


def _fetch(tokens: torch.Tensor) -> Callable[[], object]:
    """Begin to copy tokens to the host; return what waits for them."""
    import torch

    if not tokens.is_cuda:
        return tokens.tolist
    host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
    host.copy_(tokens, non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    return done.synchronize


def _prompt(engine: InProcessEngine, n_tokens: int, seed: int) -> list[int]:
    import random

    vocabulary = engine.runner.model_config.vocab_size
    return random.Random(seed).choices(range(min(300, vocabulary // 2), min(20000, vocabulary)), k=n_tokens)


def _waiter(device: str) -> Callable[[], None]:
    import torch

    return torch.cuda.synchronize if device == "cuda" else lambda: None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
