"""Times the operations of whole decode steps and prompts in CUDA graphs, and each product kernel by itself.

    python benchmarks/step_speed.py [FILE.json] [--model llama-3.1-8b|qwen2.5-7b|gemma-2-9b]
        [--parts steps,prompts,kernels,attention] [--bits 8,16] [--requests 1-64] [--prompts 512,2048,8192]
        [--context 256] [--kv F16] [--seconds 400]

What runs is what SGLang would start for a model: products, norms, rotation, attention, activation functions, head,
with random weights of the model's shapes in Q4_K_M's mixture; not SGLang itself, nor the embedding, the choice of the
next token, HTTP. A prompt longer than --chunk (default 2048) is several passes. Times are medians of replays. It needs
torch, sglang-pascal with built kernels and 8 GB of free device memory. Unless the card is a Pascal card, no figure is
one of Pascal: a newer card runs the same PTX, but has other proportions.

  steps      tokens/s of all requests together, and which kernels they were (`sglang_pascal.ops.matmul.parts`)
  prompts    tokens/s of one prompt
  kernels    microseconds of each kernel for some numbers of rows of x: what a choice between them can be checked with
  attention  microseconds of decode and prefill attention
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sglang_pascal import measure
from sglang_pascal.ops import matmul as products
from sglang_pascal.ops.activations import quantize, rms_norm_quantize, silu_mul_quantize
from sglang_pascal.ops.attention import Sequences, attention_decode, attention_prefill
from sglang_pascal.ops.kv_cache import KvPool, rope_and_store
from sglang_pascal.ops.matmul import Part, matmul
from sglang_pascal.ops.weights import PackedWeight, allocate_packed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@dataclass(frozen=True)
class Shape:
    """A model, without what is special to its layers (windows, soft caps, further norms)."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    head_dim: int = 128


MODELS = {
    "llama-3.1-8b": Shape(32, 4096, 14336, 32, 8, 128256),
    "qwen2.5-7b": Shape(28, 3584, 18944, 28, 4, 152064),
    "gemma-2-9b": Shape(42, 3584, 14336, 16, 8, 256000, head_dim=256),
}
"""From the models' configurations."""
KV_DTYPES = {"F16": torch.float16, "E5M2": torch.float8_e5m2, "INT8": torch.int8}
EPS = 1e-5
KERNEL_SHAPES = ("Llama-3.1-8B qkv", "Llama-3.1-8B o", "Llama-3.1-8B gate+up", "Llama-3.1-8B down", "Llama-3.1-8B head")
ATTENTION_LENGTHS = (512, 4096, 16384)


def has_more_bits(layer: int, layers: int) -> bool:
    """Whether the value and down projections of a layer of a Q4_K_M file are Q6_K (llama.cpp's `use_more_bits`)."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * eighth or (layer - eighth) % 3 == 2


def random_weight(tensor_type: str, rows: int, columns: int, device: torch.device) -> PackedWeight:
    """Return random bytes in the layout of a type: a product's time does not depend on them."""
    weight = allocate_packed(tensor_type, rows, columns, device)
    weight.data.random_(0, 100)
    return weight


class Layer:
    """One layer's weights."""

    def __init__(self, shape: Shape, device: torch.device, *, more_bits: bool) -> None:
        self.shape, better = shape, "Q6_K" if more_bits else "Q4_K"
        attention, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.qkv = (
            [
                random_weight("Q4_K", attention + keys, shape.hidden, device),
                random_weight("Q6_K", keys, shape.hidden, device),
            ]
            if more_bits
            else [random_weight("Q4_K", attention + 2 * keys, shape.hidden, device)]
        )
        self.o = random_weight("Q4_K", shape.hidden, attention, device)
        self.gate_up = random_weight("Q4_K", 2 * shape.intermediate, shape.hidden, device)
        self.down = random_weight(better, shape.hidden, shape.intermediate, device)
        self.norm = torch.ones(shape.hidden, device=device, dtype=torch.float16)
        slots = 1
        self.pool: KvPool = make_pool("F16", slots, shape, device)

    def attend(self, x: Any, n: int, is_16_bit: bool) -> torch.Tensor:
        """Return queries, keys and values of n tokens."""
        width = sum(weight.rows for weight in self.qkv)
        qkv = torch.empty(n, width, dtype=torch.float16, device=self.norm.device)
        first = 0
        for weight in self.qkv:
            matmul(x, weight, is_16_bit=is_16_bit, out=qkv[:, first : first + weight.rows])
            first += weight.rows
        return qkv


def make_pool(kv: str, slots: int, shape: Shape, device: torch.device) -> KvPool:
    """Return a pool of zeros."""
    sizes = (slots, shape.kv_heads, shape.head_dim)
    keys, values = (torch.zeros(sizes, dtype=KV_DTYPES[kv], device=device) for _ in range(2))
    scales = [torch.ones(sizes[:2], dtype=torch.float16, device=device) for _ in range(2)] if kv == "INT8" else []
    return KvPool(keys, values, *scales)


class Model:
    """All layers, a pool for each, and the head."""

    def __init__(self, name: str, kv: str, slots: int, device: torch.device) -> None:
        self.shape, self.device = MODELS[name], device
        self.layers = [
            Layer(self.shape, device, more_bits=has_more_bits(i, self.shape.layers)) for i in range(self.shape.layers)
        ]
        for layer in self.layers:
            layer.pool = make_pool(kv, slots, self.shape, device)
        self.head = random_weight("Q6_K", self.shape.vocabulary, self.shape.hidden, device)
        self.cos_sin = torch.ones(slots, self.shape.head_dim, device=device)
        self.table = torch.randperm(slots, device=device).int()

    def run(
        self, tokens: int, is_16_bit: bool, attend: Callable[[torch.Tensor, KvPool], Any], places: torch.Tensor
    ) -> None:
        """Start the operations of a pass over n tokens. attend: from queries and a pool to activations."""
        shape = self.shape
        hidden = torch.ones(tokens, shape.hidden, dtype=torch.float16, device=self.device)
        residual = torch.ones_like(hidden)
        positions = places.clamp(max=len(self.cos_sin) - 1)
        for layer in self.layers:
            x = rms_norm_quantize(hidden, layer.norm, EPS, residual, is_16_bit=is_16_bit)
            qkv = layer.attend(x, tokens, is_16_bit)
            queries = rope_and_store(qkv, positions, places, self.cos_sin, layer.pool, is_neox=True)
            hidden = matmul(attend(queries, layer.pool), layer.o, is_16_bit=is_16_bit)
            x = rms_norm_quantize(hidden, layer.norm, EPS, residual, is_16_bit=is_16_bit)
            gate_up = matmul(x, layer.gate_up, is_16_bit=is_16_bit)
            hidden = matmul(silu_mul_quantize(gate_up, is_16_bit=is_16_bit), layer.down, is_16_bit=is_16_bit)
        last = hidden[-1:] if attend.__name__ == "prefill" else hidden
        x = rms_norm_quantize(last, self.layers[0].norm, EPS, residual[: len(last)].clone(), is_16_bit=is_16_bit)
        matmul(x, self.head, is_16_bit=is_16_bit)

    def decode(self, n: int, context: int, is_16_bit: bool) -> Callable[[], None]:
        """Return what starts a step of n requests, each with this number of tokens, the new one included."""
        lengths = torch.full((n,), context, device=self.device)
        table = self.table[: n * context].view(n, context)
        sequences = Sequences(table, torch.arange(n, device=self.device), lengths)
        scale = self.shape.head_dim**-0.5
        places = table[:, -1].long()

        def decode(queries: torch.Tensor, pool: KvPool) -> Any:
            return attention_decode(
                queries, pool, sequences, scale=scale, max_length=context, quantized=True, is_16_bit=is_16_bit
            )

        return lambda: self.run(n, is_16_bit, decode, places)

    def prefill(self, first: int, new: int, is_16_bit: bool) -> Callable[[], None]:
        """Return what starts a pass over `new` tokens of one request behind `first`."""
        table = self.table[: first + new].view(1, -1)
        device = self.device
        sequences = Sequences(
            table, torch.zeros(1, dtype=torch.long, device=device), torch.tensor([first + new], device=device)
        )
        starts = torch.tensor([0, new], dtype=torch.int32, device=device)
        scale = self.shape.head_dim**-0.5
        places = table[0, first:].long()

        def prefill(queries: torch.Tensor, pool: KvPool) -> Any:
            attended = attention_prefill(queries, pool, sequences, starts, scale=scale, max_new=new)
            return quantize(attended, is_16_bit=is_16_bit)

        return lambda: self.run(new, is_16_bit, prefill, places)


class Report:
    """Rows, written after each, and the end of the time."""

    def __init__(self, path: Path | None, seconds: float) -> None:
        self._path, self._end = path, time.monotonic() + seconds
        self.rows: list[dict[str, Any]] = []
        self.head = {
            "card": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }

    def add(self, **row: Any) -> None:
        """Print and keep a row."""
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        if self._path:
            self._path.write_text(json.dumps(self.head | {"rows": self.rows}, indent=1) + "\n", encoding="utf-8")

    @property
    def is_over(self) -> bool:
        """Whether nothing more may start."""
        return time.monotonic() > self._end


def run_steps(report: Report, model: Model, args: argparse.Namespace) -> None:
    """Time decode steps."""
    for bits, n in itertools.product(args.bits, args.requests):
        if report.is_over or n * args.context > len(model.table):
            continue
        us = measure.median_us([model.decode(n, args.context, bits == 16)])
        kernels = [f"{'tile' if p.is_tiles else 'decode'} {p.width}: {p.n}" for p in products.parts(n, bits)]
        report.add(
            part="step",
            bits=bits,
            requests=n,
            us=round(us, 1),
            tokens_per_second=round(n / us * 1e6, 1),
            kernels=kernels,
        )


def run_prompts(report: Report, model: Model, args: argparse.Namespace) -> None:
    """Time prompts."""
    for bits, n in itertools.product(args.bits, args.prompts):
        if report.is_over or n > len(model.table):
            continue
        chunks = [(first, min(args.chunk, n - first)) for first in range(0, n, args.chunk)]
        us = sum(measure.median_us([model.prefill(*chunk, bits == 16)]) for chunk in chunks)
        report.add(part="prompt", bits=bits, tokens=n, us=round(us, 1), tokens_per_second=round(n / us * 1e6, 1))


def kernels_of(bits: int) -> list[Part]:
    """Return each kernel with its fewest and most rows of x, and tiles as many as 512 rows fill."""
    decode = [part for part in products.every_kernel(bits) if not part.is_tiles]
    tiles = [
        Part(0, n, width, is_tiles=True) for width in products.TILE_WIDTHS[bits] for n in (width, 512 // width * width)
    ]
    return decode + tiles


def run_kernels(report: Report, args: argparse.Namespace, device: torch.device) -> None:
    """Time each kernel alone with weights from memory."""
    for name, bits in itertools.product(args.kernel_shapes, args.bits):
        tensor_type, rows, columns = measure.SHAPES[name]
        weights = [random_weight(tensor_type, rows, columns, device) for _ in range(2 if rows > 100000 else 4)]
        for part in kernels_of(bits):
            if report.is_over:
                return
            x = quantize(torch.randn(part.n, columns, device=device).half(), is_16_bit=bits == 16)
            out = torch.empty(part.n, rows, dtype=torch.float16, device=device)
            calls = [
                functools.partial(matmul, x, weight, is_16_bit=bits == 16, out=out, only=part) for weight in weights
            ]
            us = measure.median_us(calls, 3)
            report.add(
                part="kernel", name=name, bits=bits, tiles=part.is_tiles, width=part.width, n=part.n, us=round(us, 2)
            )


def run_attention(report: Report, device: torch.device) -> None:
    """Time attention with Llama-3.1-8B's heads."""
    for kv, length in itertools.product(("F16", "INT8"), ATTENTION_LENGTHS):
        for n, new in ((1, 1), (8, 1), (1, 512)):
            if report.is_over:
                return
            phase = "decode" if new == 1 else "prefill"
            found = measure.attention(phase, kv, n, length, device, new=new, with_torch=False)
            report.add(part="attention", kv=kv, sequences=n, new=new, length=length, us=round(found.ours_us, 1))


def numbers(text: str) -> list[int]:
    """Read `1,2,4-8`."""
    spans = [span.partition("-") for span in text.split(",") if span]
    return [n for first, _, last in spans for n in range(int(first), int(last or first) + 1)]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE.json", nargs="?", type=Path, help="also write the rows there")
    parser.add_argument("--model", choices=MODELS, default="llama-3.1-8b")
    parser.add_argument(
        "--parts", type=lambda text: text.split(","), default=["steps", "prompts", "kernels", "attention"]
    )
    parser.add_argument("--bits", type=numbers, default=[16, 8])
    parser.add_argument("--requests", type=numbers, default=numbers("1-64"))
    parser.add_argument("--prompts", type=numbers, default=[128, 512, 2048, 8192])
    parser.add_argument("--context", type=int, default=256, help="tokens of each request (default: %(default)s)")
    parser.add_argument("--chunk", type=int, default=2048, help="most tokens of a pass (default: %(default)s)")
    parser.add_argument("--kv", choices=KV_DTYPES, default="F16")
    parser.add_argument("--kernel-shapes", type=lambda text: text.split(","), default=list(KERNEL_SHAPES))
    parser.add_argument(
        "--seconds", type=float, default=400, help="after these nothing more starts (default: %(default)s)"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Run the parts."""
    args = parse(arguments)
    if not torch.cuda.is_available():
        sys.stderr.write("step_speed: error: no NVIDIA GPU is visible; run it where nvidia-smi lists one\n")
        return 6
    device = torch.device("cuda", 0)
    report = Report(args.file, args.seconds)
    if {"steps", "prompts"} & set(args.parts):
        wanted = [
            max(args.requests) * args.context if "steps" in args.parts else 1,
            *(args.prompts if "prompts" in args.parts else []),
        ]
        model = Model(args.model, args.kv, max(wanted), device)
        if "prompts" in args.parts:
            run_prompts(report, model, args)
        if "steps" in args.parts:
            run_steps(report, model, args)
        del model
        torch.cuda.empty_cache()
    if "attention" in args.parts:
        run_attention(report, device)
    if "kernels" in args.parts:
        run_kernels(report, args, device)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
