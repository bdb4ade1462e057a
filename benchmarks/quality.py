"""Compares 16 and 8 bits of activations, and llama.cpp, with float32: on a real model, one file and one text.

    python benchmarks/quality.py MODEL.gguf [--llama-perplexity PATH] [--ngl 99] [--tokens 2048] [--text FILE]
        [--device cpu] [--json FILE]

The reference multiplies the file's weights, dequantised, with activations that are not rounded. Each way of rounding is
that of `activation_bits.py`, in every product of transformers' model in float32: so they differ in nothing else. With
--llama-perplexity, llama.cpp's own program is measured as well: its logits of the same file against those of a float32
copy of it on the CPU with a float32 KV cache. Windows of 512 tokens; the second half of each counts, as in
llama-perplexity. Exit codes: 0 done, 1 a default is further from float32 than llama.cpp, 8 the program is missing,
10 it failed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import activation_bits
import numpy as np
import torch
from gguf.quants import dequantize
from numerics import agreement, load_reference, text_of
from requantize import requantize
from sglang_pascal.checkpoint.prepare import open_prepared, prepare
from sglang_pascal.checkpoint.weights import raw_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sglang_pascal.checkpoint.weights import RawTensor

WINDOW = 512
"""llama-perplexity's own default."""
SCALE_BYTES = {"Q4_1": 4, "Q5_1": 4, "Q4_K": 16, "Q5_K": 16}
"""Types whose blocks have a minimum -> bytes of scales and minima, which stand before the quants."""
PROGRAM_SECONDS = 900
PATTERNS = {
    "kl": r"Mean\s+KLD:\s+([-\d.e]+)",
    "top1": r"Same top p:\s+([\d.]+)",
    "perplexity": r"Mean PPL\(Q\)\s+:\s+([\d.]+)",
    "reference_perplexity": r"Mean PPL\(base\)\s+:\s+([\d.]+)",
}


@dataclass(frozen=True)
class Quality:
    """How far one way is from float32."""

    kl: float
    """Mean over the tokens, in nats."""
    top1: float
    """Share of tokens with the same largest logit."""
    perplexity: float
    reference_perplexity: float

    def row(self, name: str) -> str:
        """Return a line of a table."""
        change = 100 * (self.perplexity / self.reference_perplexity - 1)
        return f"| {name} | {self.kl:.2e} | {self.top1:.4f} | {change:+.3f} % |"


class Rounding:
    """Replaces the products of a transformers model by those of one way of rounding."""

    def __init__(self, model: torch.nn.Module, tensors: Iterator[RawTensor]) -> None:
        linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        found = {raw.hf_name.removesuffix(".weight"): raw for raw in tensors}
        self.way: Callable[[torch.Tensor, activation_bits.Matrix], torch.Tensor] = activation_bits.exact
        for name, module in linears.items():
            raw = found.get(name) or found["model.embed_tokens"]
            self._replace(
                module, activation_bits.Matrix(module.weight.detach(), minimum_of(raw).to(module.weight.device))
            )

    def _replace(self, module: torch.nn.Linear, matrix: activation_bits.Matrix) -> None:
        def forward(x: torch.Tensor) -> torch.Tensor:
            result = self.way(x.reshape(-1, x.shape[-1]), matrix).view(*x.shape[:-1], -1)
            return result if module.bias is None else result + module.bias

        module.forward = forward


def minimum_of(raw: RawTensor) -> torch.Tensor:
    """Return what a block's values are relative to, with its sign turned: `[rows, columns]`, zeros without minima."""
    kind = raw.tensor_type.name
    if kind not in SCALE_BYTES:
        return torch.zeros(1, 1).expand(raw.shape)
    block = {"Q4_1": 20, "Q5_1": 24, "Q4_K": 144, "Q5_K": 176}[kind]
    rows = np.array(raw.rows).reshape(-1, block)
    rows[:, SCALE_BYTES[kind] :] = 0
    return torch.from_numpy(-dequantize(rows, raw.tensor_type)).reshape(raw.shape)


def of_roundings(folder: Path, ids: list[int], device: str) -> dict[str, Quality]:
    """Return the quality of each way of rounding."""
    reference = load_reference(folder, device)
    model = reference.model
    rounding = Rounding(model, raw_tensors(open_prepared(folder)))
    windows = [ids[i : i + WINDOW] for i in range(0, len(ids) - WINDOW + 1, WINDOW)]
    half = WINDOW // 2

    def logits(way: str, window: list[int]) -> torch.Tensor:
        rounding.way = activation_bits.WAYS[way]
        return reference(window)[half:-1]

    exact = [logits("float32", window) for window in windows]
    found = {}
    for way in activation_bits.WAYS:
        if way == "float32":
            continue
        pairs = ((logits(way, window), right, window[half + 1 :]) for window, right in zip(windows, exact, strict=True))
        result = agreement(pairs)
        found[way] = Quality(result.kl, result.top1, result.perplexity, result.reference_perplexity)
        print(found[way].row(way), flush=True)
    return found


def of_llama_cpp(program: str, model: Path, text: str, tokens: int, ngl: int, scratch: Path) -> Quality:
    """Return the quality of llama.cpp's program."""
    (scratch / "text.txt").write_text(text, encoding="utf-8")
    exact = scratch / "f32.gguf"
    requantize(model, exact, ["F32"])
    common = [program, "-f", str(scratch / "text.txt"), "-c", str(WINDOW), "--chunks", str(tokens // WINDOW)]
    common += ["--kl-divergence-base", str(scratch / "logits.dat")]
    float32 = ["-ngl", "0", "-fa", "off", "-ctk", "f32", "-ctv", "f32"]
    _run([*common, "-m", str(exact), *float32])
    return read_perplexity(_run([*common, "-m", str(model), "-ngl", str(ngl), "--kl-divergence"]))


def read_perplexity(text: str) -> Quality:
    """Read what llama-perplexity says about the divergence."""
    found = {name: re.search(pattern, text) for name, pattern in PATTERNS.items()}
    missing = [name for name, match in found.items() if match is None]
    if missing:
        _fail(10, f"llama-perplexity did not say {', '.join(missing)}:\n{text[-1500:]}")
    values = {name: float(match[1]) for name, match in found.items() if match}
    return Quality(**values | {"top1": values["top1"] / 100})


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PROGRAM_SECONDS)
    except OSError as exc:
        _fail(8, f"{command[0]} cannot be started: {exc.strerror}; name a built program")
    except subprocess.TimeoutExpired:
        _fail(10, f"{command[0]} did not end within {PROGRAM_SECONDS} s; take fewer --tokens")
    if done.returncode:
        _fail(10, f"{' '.join(command)} ended with exit code {done.returncode}:\n{(done.stdout + done.stderr)[-1500:]}")
    return done.stdout + done.stderr


def _fail(code: int, message: str) -> NoReturn:
    sys.stderr.write(f"quality: error: {message}\n")
    sys.exit(code)


def main(arguments: Sequence[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument(
        "--llama-perplexity", metavar="PATH", help="the program; without it only its rounding is compared"
    )
    parser.add_argument("--ngl", type=int, default=99, help="layers that it puts on the GPU (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=2048, help="of the text, from its start (default: %(default)s)")
    parser.add_argument("--text", type=Path, help="default: this repository's docs")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="of the reference (default: cpu)")
    parser.add_argument("--json", type=Path, help="also write the results there")
    args = parser.parse_args(arguments)
    if not args.model.is_file():
        parser.error(f"there is no file {args.model}")
    import transformers

    print(f"| {args.model.name}, {args.tokens} tokens | KL | top-1 | perplexity |\n|---|---|---|---|")
    text = text_of(args.text)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        prepare(args.model, scratch / "model")
        ids = transformers.AutoTokenizer.from_pretrained(scratch / "model")(text)["input_ids"][: args.tokens]
        found = of_roundings(scratch / "model", ids, args.device)
        if args.llama_perplexity:
            program = "llama-perplexity, " + ("on the GPU" if args.ngl else "on the CPU")
            found[program] = of_llama_cpp(args.llama_perplexity, args.model, text, args.tokens, args.ngl, scratch)
            print(found[program].row(program))
    if args.json:
        args.json.write_text(json.dumps({way: asdict(each) for way, each in found.items()}, indent=2) + "\n")
    return int(max(found[way].kl for way in ("8 bits", "16 bits")) > found["llama.cpp"].kl)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
