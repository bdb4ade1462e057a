"""What the width of activations costs in quality, on random stacks in the shapes of real models.

    python benchmarks/activation_bits.py [--device cuda] [--tokens 256] [--json FILE] [SHAPE ...]

Every product of a stack is computed in float32 from activations that are rounded in one of three ways, and the logits
at its end are compared with those of activations that are not rounded:
  16 bits      sglang-pascal's two int8 (`reference.quantize_ref`)
  8 bits       its one int8 with a float32 scale for 32 values
  llama.cpp    its one int8 with a float16 scale for 32 values, whose minimum term takes the sum before the rounding

Weights are Gaussian, rounded to 4 bits with a scale and a minimum for 32 (Q4_K's shape). Activations have tails like
real ones: the norms' weights are log-normal (sigma 0.5) and every 500th channel is 20 times as large, which gives a
kurtosis beyond 100; the MLP's product of gate and up has more by itself. Logits have a standard deviation of 3. A
random model has no redundancy and flatter distributions than a trained one: it shows how the error depends on the
model's size, not how large it is in a trained one.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from sglang_pascal.kernels.formats import BLOCK
from sglang_pascal.reference import quantize_ref

if TYPE_CHECKING:
    from collections.abc import Sequence

SHAPES = {
    "smollm2-135m": (576, 1536, 30, 64),
    "qwen2.5-0.5b": (896, 4864, 24, 64),
    "llama-3.2-1b": (2048, 8192, 16, 64),
    "llama-3.2-3b": (3072, 8192, 28, 128),
    "qwen2.5-7b": (3584, 18944, 28, 128),
    "llama-3.1-8b": (4096, 14336, 32, 128),
}
"""Name -> hidden size, MLP size, layers, head size."""
VOCABULARY = 32768
LOGIT_DEVIATION = 3.0
OUTLIER_STEP, OUTLIER_FACTOR, TAIL = 500, 20.0, 0.5


@dataclass(frozen=True)
class Matrix:
    """A product's weights: value = quant * scale - minimum. float32 `[rows, columns]`."""

    value: torch.Tensor
    minimum: torch.Tensor


@dataclass(frozen=True)
class Loss:
    """Loss of one way of rounding, against activations that are not rounded."""

    kl: float
    """Mean over the tokens, in nats."""
    top1: float
    """Share of tokens with the same largest logit."""
    relative_error: float
    """Root mean square of the logits' difference over that of the logits."""


def random_matrix(rows: int, columns: int, generator: torch.Generator) -> Matrix:
    """Return Gaussian weights of variance 1 / columns, 4 bits each."""
    blocks = torch.randn(rows, columns // BLOCK, BLOCK, generator=generator, device=generator.device) / columns**0.5
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    scale = (high - low) / 15
    value = ((blocks - low) / scale).round() * scale + low
    return Matrix(value.flatten(1), (-low).expand_as(blocks).flatten(1))


def exact(x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    """Multiply without rounding."""
    return x @ matrix.value.T


def rounded(x: torch.Tensor, matrix: Matrix, *, is_16_bit: bool) -> torch.Tensor:
    """Multiply as sglang-pascal does."""
    return _dequantized(x, is_16_bit=is_16_bit) @ matrix.value.T


def rounded_as_llama_cpp(x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    """Round as ggml's block_q8_1 does, with the sum that its quantize_mmq_q8_1 stores."""
    blocks = x.view(len(x), -1, BLOCK)
    d = blocks.abs().amax(-1, keepdim=True) / 127
    q = torch.where(d > 0, blocks / d, 0.0).round()
    value = (q * d.half().float()).flatten(1)
    sums = blocks.sum(-1, keepdim=True).half().float().expand_as(blocks).flatten(1) / BLOCK
    return value @ (matrix.value + matrix.minimum).T - sums @ matrix.minimum.T


def _dequantized(x: torch.Tensor, *, is_16_bit: bool) -> torch.Tensor:
    q, scales = quantize_ref(x, is_16_bit=is_16_bit)
    value = (q.view(*scales.shape[:2], BLOCK).float() * scales[..., :1]).flatten(1)
    return sum(value.chunk(2))[:, : x.shape[1]] if is_16_bit else value[:, : x.shape[1]]


WAYS = {
    "float32": exact,
    "16 bits": lambda x, matrix: rounded(x, matrix, is_16_bit=True),
    "8 bits": lambda x, matrix: rounded(x, matrix, is_16_bit=False),
    "llama.cpp": rounded_as_llama_cpp,
}


def norm_weight(size: int, generator: torch.Generator) -> torch.Tensor:
    """Return a norm's weight with outlier channels."""
    weight = (torch.randn(size, generator=generator, device=generator.device) * TAIL).exp()
    weight[::OUTLIER_STEP] *= OUTLIER_FACTOR
    return weight[torch.randperm(size, generator=generator, device=generator.device)]


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Apply RMSNorm, scaled so that its result has variance 1."""
    return x * x.square().mean(-1, keepdim=True).rsqrt() * weight / weight.square().mean().sqrt()


def attend(qkv: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Apply causal attention to one sequence; each head has its own keys and values."""
    heads = qkv.view(len(qkv), 3, -1, head_dim).permute(1, 2, 0, 3)
    return torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(0, 1).flatten(1)


def losses(shape: str, tokens: int, device: torch.device) -> tuple[dict[str, Loss], float]:
    """Return the loss by way of rounding, and the kurtosis of the normed activations (3 = Gaussian)."""
    hidden, inner, layers, head_dim = SHAPES[shape]
    generator = torch.Generator(device).manual_seed(1)
    start = torch.randn(tokens, hidden, generator=generator, device=device)
    streams, kurtoses = {way: start.clone() for way in WAYS}, []
    for _ in range(layers):
        first, second = (norm_weight(hidden, generator) for _ in range(2))
        qkv, out = random_matrix(3 * hidden, hidden, generator), random_matrix(hidden, hidden, generator)
        up, down = random_matrix(2 * inner, hidden, generator), random_matrix(hidden, inner, generator)
        for way, multiply in WAYS.items():
            x = streams[way]
            normed = norm(x, first)
            x = x + multiply(attend(multiply(normed, qkv), head_dim), out) / math.sqrt(2 * layers)
            gate, value = multiply(norm(x, second), up).chunk(2, dim=1)
            streams[way] = x + 2 * multiply(torch.nn.functional.silu(gate) * value, down) / math.sqrt(2 * layers)
            if way == "float32":
                kurtoses.append(float((normed**4).mean() / (normed**2).mean() ** 2))
    weight, head = norm_weight(hidden, generator), random_matrix(VOCABULARY, hidden, generator)
    logits = {way: LOGIT_DEVIATION * multiply(norm(streams[way], weight), head) for way, multiply in WAYS.items()}
    exact_logits = logits.pop("float32")
    return {way: _loss(found, exact_logits) for way, found in logits.items()}, sum(kurtoses) / layers


def _loss(found: torch.Tensor, expected: torch.Tensor) -> Loss:
    ours, theirs = found.double().log_softmax(-1), expected.double().log_softmax(-1)
    kl = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    same = (found.argmax(-1) == expected.argmax(-1)).double().mean()
    error = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    return Loss(float(kl), float(same), float(error))


def main(arguments: Sequence[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", choices=[*SHAPES, []], metavar="SHAPE", help=", ".join(SHAPES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of one sequence (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the results there")
    args = parser.parse_args(arguments)
    torch.backends.cuda.matmul.allow_tf32 = False
    results = {}
    print("| shape | kurtosis | rounding | KL | top-1 | relative error of the logits |\n|---|---|---|---|---|---|")
    for shape in args.shapes or SHAPES:
        found, kurtosis = losses(shape, args.tokens, torch.device(args.device))
        results[shape] = {"kurtosis": kurtosis} | {way: asdict(loss) for way, loss in found.items()}
        for way, loss in found.items():
            print(f"| {shape} | {kurtosis:.0f} | {way} | {loss.kl:.2e} | {loss.top1:.4f} | {loss.relative_error:.2e} |")
            sys.stdout.flush()
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
